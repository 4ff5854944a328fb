"""Cu-Au alloys for the demo of Monte Carlo: Cleri and Rosato's second-moment potential as a local
one, in torch; crystals and their order."""

from __future__ import annotations

import ase
import ase.build
import jax.numpy as jnp
import numpy as np
import torch
from ase.neighborlist import neighbor_list

import bridge
from bridge.card import Card
from jax_side.montecarlo.local import Layout, LocalPotential
from torch_side.potentials.geometry import edge_vectors
from torch_side.potentials.model import Model

CU, AU = 29, 79
# A (eV), xi (eV), p, q, r0 (Angstrom); r0 of the unlike pair is our choice, copper's: Cu3Au is then
# stable, and 2.5 % too narrow
PAIRS = {
    (CU, CU): (0.0855, 1.224, 10.960, 2.278, 2.556),
    (CU, AU): (0.1539, 1.5605, 11.05, 3.0475, 2.556),
    (AU, CU): (0.1539, 1.5605, 11.05, 3.0475, 2.556),
    (AU, AU): (0.2061, 1.790, 10.229, 4.036, 2.884),
}
LATTICE = 3.654  # Angstrom, what the potential gives Cu3Au at rest
# Angstrom, behind the fifth neighbours to which the parameters were fitted
ONSET, CUTOFF = (
    5.9,
    6.2,
)


class Bonds(torch.nn.Module):
    """Messages of pairs: repulsion A exp(-p x) and squared hopping xi^2 exp(-2 q x), x = r/r0 - 1,
    switched off smoothly; rows in any leading shape."""

    def __init__(self):
        super().__init__()
        A, xi, p, q, r0 = torch.tensor(list(PAIRS.values()), dtype=torch.float64).T
        self.register_buffer("pairs", torch.stack([A, xi**2, p, 2 * q, r0], -1))

    def forward(self, a, b, r):
        size, decay, r0 = ((a[..., :, None] * b[..., None, :]).flatten(-2) @ self.pairs).split(
            [2, 2, 1], -1
        )
        d = r.square().sum(-1, keepdim=True).sqrt()
        x = ((d - ONSET) / (CUTOFF - ONSET)).clamp(0, 1)
        return size * torch.exp(-decay * (d / r0 - 1)) * (1 - x**3 * (10 - 15 * x + 6 * x**2))


class Alloy(Model):
    """The same potential as a graph model of the contract, float64."""

    def __init__(self):
        super().__init__()
        self.bonds = Bonds()
        self.card = Card(
            cutoff=CUTOFF, neighbor_list="own", elements=[CU, AU], dtype="float64", batches=True
        )

    def energies(self, inputs):
        r = edge_vectors(inputs)
        kinds = torch.stack([inputs["atomic_numbers"] == z for z in (CU, AU)], -1).to(r.dtype)
        i, j = inputs["edge_index"].long()
        sums = r.new_zeros(len(kinds), 2).index_add(0, i, self.bonds(kinds[i], kinds[j], r))
        nodes = sums[:, 0] - torch.sqrt(sums[:, 1].clamp(min=1e-12))
        energy = r.new_zeros(len(inputs["cell"])).index_add(0, inputs["batch"], nodes)
        return {"energy": energy, "node_energies": nodes}


class Cohesion(torch.nn.Module):
    def forward(self, node, sums):
        return sums[..., 0] - sums[..., 1].sqrt()


def potential(device="cpu") -> LocalPotential:
    """E = sum_i [sum_j A exp(-p x) - sqrt(sum_j xi^2 exp(-2 q x))] in eV; an element is (1,0) for
    Cu, (0,1) for Au. Batch axes go straight into torch. `device` is that of the tables."""
    kinds = torch.zeros(120, 2, dtype=torch.float64)
    kinds[CU, 0] = kinds[AU, 1] = 1
    parts = (torch.nn.Embedding.from_pretrained(kinds), Bonds(), Cohesion())
    there = [part.eval().to(device) for part in parts]
    return LocalPotential(*(bridge.to_jax(part, batched=0) for part in there), CUTOFF)


def crystal(repeat, start="ordered", seed=0, a=LATTICE) -> ase.Atoms:
    """Cu3Au; of atom i the sublattice is i % 4, and Au is on the first where it's ordered."""
    atoms = ase.build.bulk("Cu", "fcc", a=a, cubic=True).repeat(repeat)
    atoms.positions += a / 4
    atoms.numbers[::4] = AU
    if start == "random":
        atoms.numbers = np.random.default_rng(seed).permutation(atoms.numbers)
    return atoms


def graph(atoms):
    return dict(
        pos=jnp.asarray(atoms.positions),
        atomic_numbers=jnp.asarray(atoms.numbers),
        cell=jnp.asarray(atoms.cell.array),
        pbc=np.ones(3, bool),
    )


def layout_of(repeat) -> Layout:
    """One cell of the list for each conventional cell, whose four atoms rattle in its middle; the
    cutoff reaches less than two."""
    return Layout(
        4 * repeat**3,
        per_cell=8,
        neighbors=100,
        periodic=(True,) * 3,
        grid=(repeat,) * 3,
        reach=(2,) * 3,
        width=CUTOFF,
    )


def order(cache, near):
    """Long-range order of Au among the four sublattices, and Warren and Cowley's of first
    neighbours: 1, -1/3 in order; about 0 without."""
    gold = (cache.atomic_numbers == AU).astype(float)
    long = (gold.reshape(-1, 4).mean(0).max() - 0.25) / 0.75
    return long, 1 - (gold * (1 - gold[near]).mean(1)).sum() / gold.sum() / 0.75


def neighbors_of(atoms):
    """The 12 first neighbours (N,12) in the perfect crystal: an atom keeps its site, only elements
    wander."""
    i, j = neighbor_list("ij", atoms, 0.85 * atoms.cell[0, 0] / round((len(atoms) / 4) ** (1 / 3)))
    return j[np.argsort(i, kind="stable")].reshape(len(atoms), 12)


def apart(local, cache):
    """The incremental energy of a cache against a full evaluation of where it ended, relative."""
    full = local.full(
        dict(pos=cache.pos, atomic_numbers=cache.atomic_numbers, cell=cache.cell), cache.layout
    ).energy
    return abs(cache.energy / full - 1)
