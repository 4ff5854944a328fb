"""A water molecule whose charges flow along its bonds and whose bonds polarise, in torch and in JAX,
with Born charges and polarisability written out by hand."""

from __future__ import annotations

from functools import cache

import jax.numpy as jnp
import numpy as np
import torch

import bridge
from bridge.card import Card
from jax_side.potentials import strain
from jax_side.potentials.potential import potential
from torch_side.potentials.model import Wrapped

NUMBERS = np.array([8, 1, 1])
MASSES = np.array([15.999, 1.008, 1.008])
LENGTH, ANGLE = 0.96, np.deg2rad(104.5)
# e, e/Angstrom: of a hydrogen q = CHARGE + FLOW (d - LENGTH) + CROSS (d' - LENGTH), d' of the other
CHARGE, FLOW, CROSS = 0.4, 0.35, -0.2
ALONG, ACROSS = 0.05, 0.02  # e Angstrom^2/V for each bond, times its direction and isotropic
AT_REST = LENGTH * np.array(
    [
        [0, 0, 0],
        [np.sin(ANGLE / 2), 0, np.cos(ANGLE / 2)],
        [-np.sin(ANGLE / 2), 0, np.cos(ANGLE / 2)],
    ]
)
OFF = AT_REST + 0.05 * np.random.default_rng(3).normal(size=(3, 3))
TURN = np.linalg.qr(np.random.default_rng(4).normal(size=(3, 3)))[0]
OUTPUTS = ("energy", "position_gradients", "cell_gradients", "dipole")
FIELD = np.array([0.02, -0.03, 0.01])  # V/Angstrom


def water(np_, stacked):
    """One text for both frameworks, of one system."""

    def model(x):
        r, f = x["pos"], x.get("field")
        bonds = r[1:] - r[:1]
        d = (bonds**2).sum(-1) ** 0.5
        cosine = (bonds[0] * bonds[1]).sum() / (d[0] * d[1])
        energy = 25.0 * ((d - LENGTH) ** 2).sum() + 2.0 * (cosine - np.cos(ANGLE)) ** 2
        q = CHARGE + FLOW * (d - LENGTH) + CROSS * (d.sum() - d - LENGTH)
        mu = (q[:, None] * bonds).sum(0)
        if f is not None:
            u = bonds / d[:, None]
            induced = ALONG * (u * (u @ f[0])[:, None]).sum(0) + 2 * ACROSS * f[0]
            energy = energy - (mu * f[0]).sum() - (induced * f[0]).sum() / 2
            mu = mu + induced
        return {"energy": stacked(energy), "dipole": stacked(mu)}

    return model


in_torch = water(torch, lambda x: x[None])
in_jax = water(jnp, lambda x: x[None])
CARD = Card(outputs=OUTPUTS, optional_inputs={"field"}, batches=False)
MODEL = Wrapped(in_torch, CARD, "autograd")
TWIN = potential(strain.with_gradients(in_jax), atomic_numbers=NUMBERS)


@cache
def bridged(lane="auto", **kwargs):
    return bridge.potential(MODEL, atomic_numbers=NUMBERS, outputs=("dipole",), lane=lane, **kwargs)


def born_by_hand(r):
    """Z*[i,a,b] of the molecule without a field."""
    bonds, z = r[1:] - r[0], np.zeros((3, 3, 3))
    d = np.linalg.norm(bonds, axis=1)
    for h in (0, 1):
        q = CHARGE + FLOW * (d[h] - LENGTH) + CROSS * (d[1 - h] - LENGTH)
        flown = FLOW * bonds[h] + CROSS * bonds[1 - h]
        z[1 + h] = q * np.eye(3) + np.outer(bonds[h] / d[h], flown)
    z[0] = -z[1] - z[2]
    return z


def polarisability_by_hand(r):
    u = (r[1:] - r[:1]) / np.linalg.norm(r[1:] - r[:1], axis=1)[:, None]
    return ALONG * u.T @ u + 2 * ACROSS * np.eye(3)
