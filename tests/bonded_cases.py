"""Zincblende, a crystal of two atoms with bonds that are named beforehand, in torch and in JAX: a model without
edges, whose packages of the native lane compile fast."""

from __future__ import annotations

from functools import cache

import jax.numpy as jnp
import numpy as np
import scipy.optimize
import torch

import bridge
from bridge.card import Card
from jax_side.potentials.potential import potential
from jax_side.potentials.strain import with_gradients
from torch_side.potentials.model import Wrapped

NUMBERS = np.array([11, 17])
# bonds from the first atom to the second, and of either one to its own images
ACROSS = np.array([[0, 0, 0], [-1, 0, 0], [0, -1, 0], [0, 0, -1]], float)
IMAGES = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, -1, 0], [1, 0, -1], [0, 1, -1]], float)


def _slope(a):
    """dE/da of zincblende, in eV/Angstrom."""
    u, v = np.exp(-1.6 * (np.sqrt(3) / 4 * a - 1.75)), np.exp(-1.2 * (np.sqrt(0.5) * a - 2.85))
    return -3.2 * np.sqrt(3) * (u * u - u) - 2.88 * np.sqrt(0.5) * (v * v - v)


A = scipy.optimize.brentq(_slope, 3.0, 5.0, xtol=1e-14)  # Angstrom
CELL = A / 2 * (1 - np.eye(3))
POSITIONS = A / 4 * np.array([[0.0, 0, 0], [1, 1, 1]])  # at rest by symmetry


def crystal(exp, made):
    """One text for both frameworks, of one system: eV, Morse wells at 1.75 and 2.85 Angstrom."""

    def model(x):
        r, h = x["pos"], x["cell"][0]
        apart = r[1] - r[0] + made(ACROSS, r) @ h
        u = exp(-1.6 * ((apart**2).sum(-1) ** 0.5 - 1.75))
        v = exp(-1.2 * (((made(IMAGES, r) @ h) ** 2).sum(-1) ** 0.5 - 2.85))
        return ((u * u - 2 * u).sum() + 0.2 * (v * v - 2 * v).sum())[None]

    return model


in_torch = crystal(torch.exp, lambda a, r: torch.tensor(a, dtype=r.dtype))
in_jax = crystal(jnp.exp, lambda a, r: jnp.asarray(a, r.dtype))
CARD = Card(needs_pbc=True, batches=False)


@cache
def bonded(lane="auto"):
    """The energy in torch, on a lane."""
    model = Wrapped(in_torch, CARD, "autograd")
    return bridge.potential(
        model, atomic_numbers=NUMBERS, pbc=True, lane=lane, batched="sequential"
    )


TWIN = potential(with_gradients(in_jax), atomic_numbers=NUMBERS, pbc=True)
