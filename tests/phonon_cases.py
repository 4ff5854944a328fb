"""A pair potential of two kinds of ions in torch and in JAX, and crystals of them, for tests of
jax_side.properties."""

import itertools
from functools import cache, partial

import ase.build
import jax
import jax.numpy as jnp
import numpy as np
import torch

import bridge
from jax_side.properties import elastic
from torch_side.potentials.geometry import edge_vectors

CUTOFF = 4.0  # Angstrom
ANION = 17  # chlorine; all else are cations
LARGE = 12  # a cation whose bonds are longer


def bonds(exp, d, like, large):
    """eV of a pair at the distance d: a Morse well between unlike ions, at 2.1 Angstrom, or 2.3 for
    a large one; a wall between like ones; smoothly cut."""
    x = exp(-1.8 * (d - 2.1 - 0.2 * large))
    return (like * 0.8 * exp(-1.0 * (d - 2.1)) + (1 - like) * (x**2 - 2 * x)) * (
        1 - (d / CUTOFF) ** 2
    ) ** 4


class Ions(torch.nn.Module):
    """The torch model: (B,) eV."""

    def forward(self, x):
        i, j = x["edge_index"]
        z = x["atomic_numbers"]
        d = edge_vectors(x).norm(dim=-1)
        like, large = (z[i] == ANION) == (z[j] == ANION), (z[i] == LARGE) | (z[j] == LARGE)
        pair = bonds(torch.exp, d, like.to(d.dtype), large.to(d.dtype)) / 2  # each pair: two edges
        nodes = d.new_zeros(len(x["pos"])).index_add(0, i, pair)
        return d.new_zeros(len(x["cell"])).index_add(0, x["batch"], nodes)


def torch_energy(numbers, lane="auto"):
    return bridge.potential(
        Ions(), atomic_numbers=np.asarray(numbers), cutoff=CUTOFF, gradients="autograd", lane=lane
    )


@cache
def _jax_energy(numbers, reach):
    images = np.array(list(itertools.product(range(-reach, reach + 1), repeat=3)), float)
    z = np.array(numbers)
    like = np.equal.outer(z == ANION, z == ANION).astype(float)[..., None]
    large = np.logical_or.outer(z == LARGE, z == LARGE).astype(float)[..., None]

    def energy(r, h):
        apart = r[None, :, None] - r[:, None, None] + jnp.asarray(images, r.dtype) @ h
        squares = (apart**2).sum(-1)
        near = (squares > 1e-6) & (squares < CUTOFF**2)
        d = jnp.sqrt(jnp.where(near, squares, 1.0))
        return (
            jnp.where(
                near, bonds(jnp.exp, d, like.astype(d.dtype), large.astype(d.dtype)), 0.0
            ).sum()
            / 2
        )

    return energy


def jax_energy(numbers, reach=1):
    """Pure JAX, without a card: all images within `reach` cells, equal for equal arguments."""
    return _jax_energy(tuple(np.asarray(numbers).tolist()), reach)


ENERGIES = {"torch": torch_energy, "jax": jax_energy}


@cache
def relaxing(numbers):
    """The program that brings a crystal to rest, compiled once for all pressures."""
    return jax.jit(partial(elastic.at_pressure, jax_energy(numbers, 3), steps=12, fmax=1e-3))


@cache
def crystal(structure="rocksalt", pressure=0.0):
    """Ions at rest under a pressure (eV/Angstrom^3): rocksalt, or with two of three layers of large
    cations, whose distances are free."""
    atoms = ase.build.bulk("NaCl", "rocksalt", a=3.9)
    if structure == "layers":
        atoms = atoms * (1, 1, 3)
        atoms.numbers[[2, 4]] = LARGE
    relax = relaxing(tuple(atoms.numbers.tolist()))
    found = relax(jnp.array(atoms.positions), jnp.array(atoms.cell.array), pressure)
    assert found.force < 1e-10 and found.strain < 1e-10
    atoms.set_cell(found.cell)
    atoms.positions = found.positions
    return atoms


def arrays(atoms):
    return jnp.array(atoms.positions), jnp.array(atoms.cell.array)


def waves(n=40, seed=0):
    """Wave vectors without any symmetry, and some with."""
    some = [[0, 0, 0], [0.5, 0, 0], [0.5, 0.5, 0], [1 / 3, 1 / 3, 0], [1e-3, 0, 0]]
    return np.concatenate([some, np.random.default_rng(seed).normal(size=(n, 3))])
