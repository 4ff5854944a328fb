"""A FrankenPotential on SevenNet-0 (its weights lie in sevenn's wheel), fitted by franken's own
trainer to EMT energies and forces of Cu-Au."""

import copy
import functools
import tempfile
from pathlib import Path

import ase.io
import numpy as np
import torch
from ase import Atoms
from ase.build import bulk, fcc111
from ase.calculators.emt import EMT

from tests.model_cases import Case, quiet, skewed

PENALTIES, FORCE_WEIGHTS, N_FEATURES = (1e-5, 1e-3), (0.2, 0.8), 48


def alloy(seed, repeat=(2, 1, 1), rattle=0.08):
    """Cu-Au in a triclinic, rattled cell."""
    atoms = bulk("Cu", a=3.9) * repeat
    atoms.numbers[::2] = 79
    return skewed(atoms, seed, rattle)


def slab():
    atoms = fcc111("Au", (1, 1, 2), a=4.1, vacuum=None)
    atoms.numbers[1], atoms.pbc = 29, (True, True, False)
    atoms.cell[2] = 0
    return skewed(atoms, 3, strain=0.02)


SYSTEMS = {
    "skewed": alloy(100, (2, 2, 1)),
    "gold": bulk("Au", a=4.1),
    "slab": slab(),
    "trimer": Atoms("CuAuCu", positions=[[0, 0, 0], [2.4, 0.3, 0], [1.0, 2.2, 0.4]]),
    "atom": Atoms("Au"),
}
TRAINING = [
    *(alloy(seed) for seed in range(4)),
    *(alloy(9, (2, 2, 1), rattle) for rattle in (0.02, 0.1)),
    *(bulk(Z, a=a) for Z in ("Cu", "Au") for a in (3.7, 4.1)),
    SYSTEMS["trimer"],
]


@functools.cache
def checkpoint():
    import sevenn

    return str(
        next(Path(sevenn.__file__).parent.glob("pretrained_potentials/SevenNet_0__11Jul2024/*.pth"))
    )


@functools.cache
def folder():
    """Of the files made here, for as long as the process lives."""
    return tempfile.TemporaryDirectory(prefix="franken-")


@quiet
def untrained(n_features=N_FEATURES, use_offset=True):
    from franken.config import MultiscaleGaussianRFConfig, SevennBackboneConfig
    from franken.rf.model import FrankenPotential

    backbone = SevennBackboneConfig(path_or_id=checkpoint(), interaction_block=2)
    scales = {"length_scale_low": 2, "length_scale_high": 8, "length_scale_num": 3}
    head = MultiscaleGaussianRFConfig(n_features, **scales, use_offset=use_offset, rng_seed=3)
    return FrankenPotential(backbone, head, jac_chunk_size=12, num_species=2)


def labelled():
    found = []
    for atoms in TRAINING:
        atoms = atoms.copy()
        atoms.calc = EMT()
        atoms.get_forces()
        found.append(atoms)
    return found


@quiet
def fitted():
    """(potential, weights (M,F) float32) of franken's trainer, one model for each penalty and
    weight of the forces."""
    from franken.data import FrankenAtomsDataset
    from franken.trainers import RandomFeaturesTrainer

    potential, path = copy.deepcopy(untrained()), Path(folder().name) / "train.xyz"
    ase.io.write(path, labelled())
    data = FrankenAtomsDataset(path, "train", potential.gnn_config)
    trainer = RandomFeaturesTrainer(
        data.get_dataloader(distributed=False), None, device="cpu", dtype="float64"
    )
    _, weights = trainer.fit(potential, {"l2_penalty": PENALTIES, "force_weight": FORCE_WEIGHTS})
    potential.rf.weights = weights[:1].float()
    potential.gnn.franken_val()
    return potential, weights.float()


@quiet
def model(dtype=torch.float32, derivatives="autograd", committee=True):
    from torch_side.models.franken import Franken

    potential, weights = fitted()
    return Franken(potential, weights if committee else None, derivatives=derivatives, dtype=dtype)


@quiet
def calculator():
    from franken.calculators import FrankenCalculator

    return FrankenCalculator(fitted()[0])


@quiet
def mace():
    """A FrankenPotential on a small MACE with random weights."""
    from e3nn import o3
    from franken.config import GaussianRFConfig, MaceBackboneConfig
    from franken.rf.model import FrankenPotential
    from mace import modules

    torch.manual_seed(0)
    block, path = (
        modules.interaction_classes["RealAgnosticResidualInteractionBlock"],
        Path(folder().name) / "mace.pt",
    )
    network = modules.ScaleShiftMACE(
        r_max=4.5,
        num_bessel=4,
        num_polynomial_cutoff=5,
        max_ell=2,
        interaction_cls=block,
        interaction_cls_first=block,
        num_interactions=2,
        num_elements=2,
        hidden_irreps=o3.Irreps("8x0e + 8x1o"),
        MLP_irreps=o3.Irreps("8x0e"),
        gate=torch.nn.functional.silu,
        atomic_energies=np.zeros(2),
        avg_num_neighbors=8.0,
        atomic_numbers=[29, 79],
        correlation=2,
        radial_MLP=[8],
        radial_type="bessel",
        atomic_inter_scale=1.0,
        atomic_inter_shift=0.0,
    )
    torch.save(network, path)
    return FrankenPotential(
        MaceBackboneConfig(str(path)),
        GaussianRFConfig(24, length_scale=0.5, rng_seed=1),
        jac_chunk_size=12,
        num_species=2,
    )


def configuration(atoms, potential):
    """franken's own input for some ASE atoms, with the edges that it makes itself."""
    from franken.data import FrankenAtomsDataset

    return potential.gnn.get_neighbors(FrankenAtomsDataset(None, "md", None).convert(atoms))


CASE = Case(lambda dtype: model(dtype, "autograd", False), calculator, SYSTEMS, stress=False)
