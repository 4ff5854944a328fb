"""The adapters of torch_side/models beside the calculators of their own packages: one Case for each, and the structures."""

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
    atoms.set_cell(atoms.cell[:] @ (np.eye(3) + strain * np.random.default_rng(seed).normal(size=(3, 3))), scale_atoms=True)
    return atoms


CRYSTALS = {
    "si": bulk("Si"),
    "skewed": skewed(bulk("NaCl", "rocksalt", 5.6) * (2, 1, 1)),
    "slab": Atoms("NaCl", positions=[[0, 0, 0], [0.1, 2.6, 0.2]], cell=[[4.0, 0, 0], [0.5, 5.2, 0], [0, 0, 12]], pbc=[True, True, False]),
}
MOLECULES = {"water": molecule("H2O"), "ethanol": skewed(molecule("CH3CH2OH"))}


@dataclass(frozen=True)
class Case:
    """`build(dtype)` gives the adapter, `calculator()` the family's own ASE calculator, in float32 unless dtype says otherwise.

    `triclinic` is the key of a triclinic and rattled crystal among the systems (None for a model without pbc)."""

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


MODELS = {"sevennet": Case(sevennet, sevennet_calculator)}


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
