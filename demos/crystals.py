"""Crystals, what ASE's EMT says about them, and both as tensors of the potential contract."""

from __future__ import annotations

import ase.build
import numpy as np
import torch
from ase.calculators.emt import EMT

from torch_side.potentials import strain
from torch_side.potentials.neighbors import neighbor_list

METALS = ("Al", "Cu", "Ag", "Au", "Ni", "Pd", "Pt")  # fcc, in EMT


def strained(metal, repeat, count, seed) -> list[ase.Atoms]:
    """Strained and rattled crystals at several volumes, with EMT as their calculator."""
    rng, perfect = (
        np.random.default_rng(seed),
        ase.build.bulk(metal, "fcc", cubic=True).repeat(repeat),
    )
    crystals = []
    for _ in range(count):
        atoms = perfect.copy()
        atoms.set_cell(
            atoms.cell.array
            @ (rng.uniform(0.97, 1.05) * np.eye(3) + 0.02 * rng.normal(size=(3, 3))),
            scale_atoms=True,
        )
        atoms.positions += rng.uniform(0.02, 0.12) * rng.normal(size=atoms.positions.shape)
        atoms.calc = EMT()
        crystals.append(atoms)
    return crystals


def inputs_of(crystals, device="cpu") -> dict:
    """The dict of the contract for several crystals at once."""
    floats = lambda arrays: torch.tensor(np.concatenate(arrays), dtype=torch.float32)
    found = {
        "pos": floats([a.positions for a in crystals]),
        "cell": floats([a.cell.array[None] for a in crystals]),
        "pbc": torch.tensor(np.array([a.pbc for a in crystals])),
        "batch": torch.arange(len(crystals)).repeat_interleave(
            torch.tensor([len(a) for a in crystals])
        ),
        "atomic_numbers": torch.tensor(np.concatenate([a.numbers for a in crystals])),
    }
    return {key: x.to(device) for key, x in found.items()}


class Batch:
    """Inputs of some crystals, edges included, and what EMT says about them."""

    def __init__(self, crystals, cutoff, device="cpu"):
        self.inputs = inputs_of(crystals, device)
        self.n_atoms = torch.tensor([len(a) for a in crystals], device=device)
        edges = neighbor_list(
            *(self.inputs[k] for k in ("pos", "cell", "pbc")), cutoff, self.inputs["batch"]
        )
        # they stay: training moves no atom
        self.inputs |= dict(zip(("edge_index", "cell_offsets"), edges))
        floats = lambda x: torch.tensor(np.array(x), dtype=torch.float32, device=device)
        self.energy = floats([a.get_potential_energy() for a in crystals])
        self.forces = floats(np.concatenate([a.get_forces() for a in crystals]))
        self.stress = floats([a.get_stress(voigt=False) for a in crystals])

    def errors(self, out):
        """Energy per atom, forces, and stress, which the loss leaves out."""
        x, g, G = self.inputs, out["position_gradients"], out["cell_gradients"]
        stress = strain.stress(
            strain.virial(g, G, x["pos"], x["batch"], x["cell"]), x["cell"], x["pbc"]
        )
        return (out["energy"] - self.energy) / self.n_atoms, -g - self.forces, stress - self.stress
