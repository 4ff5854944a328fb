"""The adapters of torch_side/models beside the calculators of their own packages: one Case for
each, and the structures."""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk, molecule


def skewed(atoms, seed=0, rattle=0.1, strain=0.06):
    """Triclinic, rattled."""
    atoms = atoms.copy()
    atoms.rattle(rattle, seed=seed)
    atoms.set_cell(
        atoms.cell[:] @ (np.eye(3) + strain * np.random.default_rng(seed).normal(size=(3, 3))),
        scale_atoms=True,
    )
    return atoms


CRYSTALS = {
    "si": bulk("Si"),
    "skewed": skewed(bulk("NaCl", "rocksalt", 5.6) * (2, 1, 1)),
    "slab": Atoms(
        "NaCl",
        positions=[[0, 0, 0], [0.1, 2.6, 0.2]],
        cell=[[4.0, 0, 0], [0.5, 5.2, 0], [0, 0, 12]],
        pbc=[True, True, False],
    ),
}
MOLECULES = {"water": molecule("H2O"), "ethanol": skewed(molecule("CH3CH2OH"))}


@dataclass(frozen=True)
class Case:
    """`build(dtype)` gives the adapter, `calculator()` the family's own ASE calculator, in float32
    unless dtype says otherwise.

    `triclinic` is the key of a triclinic and rattled crystal among the systems (None for a model
    without pbc)."""

    build: Callable
    calculator: Callable
    systems: dict = field(default_factory=lambda: {**CRYSTALS, **MOLECULES})
    triclinic: str | None = "skewed"
    dtype: torch.dtype = torch.float32
    stress: bool = True
    float64: bool = True  # can be built in float64


def quiet(f):
    """Called once, without the warnings of the package behind it."""

    @functools.cache
    def call(*args):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return f(*args)

    return call


@quiet
def sevennet(dtype):
    from torch_side.models.sevennet import SevenNet

    return SevenNet("7net-0", dtype=dtype)


@quiet
def sevennet_calculator():
    from sevenn.calculator import SevenNetCalculator

    return SevenNetCalculator("7net-0", device="cpu")


@quiet
def chgnet(dtype):
    from torch_side.models.chgnet import CHGNet

    return CHGNet("0.3.0", dtype=dtype)


@quiet
def chgnet_calculator():
    from chgnet.model.dynamics import CHGNetCalculator

    return CHGNetCalculator(use_device="cpu", return_site_energies=True)


def boxed(atoms, size=15.0):
    """The same with a cell but open, as pymatgen wants it."""
    atoms = atoms.copy()
    atoms.set_cell([size] * 3)
    return atoms


def mace_network(kind="ScaleShiftMACE", seed=0, heads=None, **options):
    """A MACE with seeded random weights, E0s and, from ScaleShiftMACE, forces of about 1
    eV/Angstrom, in float32."""
    from e3nn import o3
    from mace import modules

    each = (
        (lambda x: x)
        if heads is None
        else lambda x: np.array([x * (1 + 0.2 * i) for i in range(len(heads))])
    )
    settings = dict(
        r_max=4.0,
        num_bessel=6,
        num_polynomial_cutoff=5,
        max_ell=2,
        correlation=2,
        num_interactions=2,
        avg_num_neighbors=8.0,
        interaction_cls_first=modules.RealAgnosticInteractionBlock,
        interaction_cls=modules.RealAgnosticResidualInteractionBlock,
        hidden_irreps=o3.Irreps("4x0e+4x1o"),
        MLP_irreps=o3.Irreps("4x0e+4x1o" if "Dipole" in kind else "4x0e"),
        radial_MLP=[16, 16],
        gate=torch.nn.functional.silu,
        num_elements=6,
        atomic_numbers=[1, 6, 8, 11, 14, 17],
        atomic_energies=each(-3.3 * np.arange(1.0, 7.0)),
    )
    if kind == "ScaleShiftMACE":
        settings |= {"atomic_inter_scale": each(200.0), "atomic_inter_shift": each(0.2)}
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return getattr(modules, kind)(**settings | options | ({"heads": heads} if heads else {}))


@quiet
def mace(dtype):
    from torch_side.models.mace import MACE

    return MACE(mace_network(), dtype=dtype)


@quiet
def mace_calculator():
    from mace.calculators import MACECalculator

    return MACECalculator(models=mace_network(), device="cpu", default_dtype="float32")


@functools.cache
def ani(kind="simple_ani", **options):
    """A model of torchani of random weights, large enough to be felt, in float64."""
    from torchani import arch

    energies = {"H": -0.5, "C": -37.8, "O": -75.0, "Na": -162.1, "Si": -289.2, "Cl": -459.9}
    options = {
        "strategy": "pyaev",
        "radial_shifts": 8,
        "angular_shifts": 2,
        "sections": 2,
        "bias": True,
        **options,
    }
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        network = getattr(arch, kind)(
            tuple(energies), "wb97x-631gd", self_energies=energies, **options
        )
    for name, p in network.named_parameters():
        p.data *= 4 if "final_layer" not in name else 1
    return network.double()


@quiet
def torchani(dtype):
    from torch_side.models.torchani import TorchANI

    return TorchANI(ani(), dtype=dtype)


@quiet
def torchani_calculator():
    # "scaling" shears an open axis of a slab away from its atoms: xz is not zx there
    return ani().ase(stress_kind="fdotr")


# PBE's with damping="zero", 40 times as strong, so that forces are of about 1 eV/Angstrom
D3_PARAMETERS = {"s6": 40.0, "rs6": 1.217, "s18": 28.88, "rs18": 1.0, "alp": 14.0}
D3_CUTOFFS = 9.0, 7.0


@quiet
def d3(dtype):
    from torch_side.models.d3 import D3

    cutoff, counted = D3_CUTOFFS
    options = dict(cutoff=cutoff, coordination_cutoff=counted, smooth=True)
    return D3(D3_PARAMETERS, "zero", dtype=dtype, **options)


@quiet
def d3_calculator():
    from torch_dftd.torch_dftd3_calculator import TorchDFTD3Calculator

    cutoff, counted = D3_CUTOFFS
    options = dict(cutoff=cutoff, cnthr=counted, cutoff_smoothing="poly")
    calculator = TorchDFTD3Calculator(damping="zero", dtype=torch.float64, **options)
    calculator.dftd_module.params = D3_PARAMETERS
    return calculator


MODELS = {
    "sevennet": Case(sevennet, sevennet_calculator),
    "chgnet": Case(
        chgnet, chgnet_calculator, CRYSTALS | {name: boxed(a) for name, a in MOLECULES.items()}
    ),
    "torchani": Case(torchani, torchani_calculator, dtype=torch.float64),
    "mace": Case(
        mace, mace_calculator, {k: a for k, a in (CRYSTALS | MOLECULES).items() if k != "slab"}
    ),  # slabs: tests/models/test_mace_values.py
    "d3": Case(d3, d3_calculator),
}


def inputs(*systems, dtype=torch.float32):
    """The contract's dict for some ASE atoms."""
    sizes = torch.tensor([len(a) for a in systems])
    return {
        "pos": torch.tensor(np.concatenate([a.positions for a in systems]), dtype=dtype),
        "atomic_numbers": torch.tensor(np.concatenate([a.numbers for a in systems])),
        "cell": torch.tensor(np.stack([np.array(a.cell) for a in systems]), dtype=dtype),
        "pbc": torch.tensor(np.stack([a.pbc for a in systems])),
        "batch": torch.arange(len(systems)).repeat_interleave(sizes),
    }
