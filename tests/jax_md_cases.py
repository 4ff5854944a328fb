"""A Lennard-Jones crystal: the pair potential in torch, which counts its calls, and jax-md's own,
of the same physics."""

import itertools
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax_md import energy as jax_md_energy
from jax_md import space

import bridge
from bridge.card import Card
from jax_side.engines import jax_md as engine
from torch_side.potentials.geometry import edge_vectors
from torch_side.potentials.model import Wrapped

# exact in float32, which jax-md rounds it to
LJ = dict(sigma=1.0, epsilon=1.0, r_onset=1.25, r_cutoff=1.5)
BOX = jnp.array([[3.25, 0.125, -0.0625], [0, 3.1875, 0.09375], [0, 0, 3.125]])  # columns
FCC = [[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]]
SITES = (np.array(list(itertools.product(range(2), repeat=3)))[:, None] + FCC).reshape(-1, 3) / 2
# fractional
R = jnp.asarray((SITES + 0.01 * np.random.default_rng(0).normal(size=SITES.shape)) % 1)
KEY = jax.random.key(0)
SHIFT = space.periodic_general(BOX)[1]
calls = []  # how many systems each call of the torch model was given


def smoothed(r2):
    """1 up to r_onset, 0 from r_cutoff on, of the square of the distance."""
    on, off = LJ["r_onset"] ** 2, LJ["r_cutoff"] ** 2
    return torch.where(r2 < on, 1.0, (off - r2) ** 2 * (off + 2 * r2 - 3 * on) / (off - on) ** 3)


def lennard_jones(inputs):
    """Half of each pair for each of its two edges."""
    batch, systems = inputs["batch"], len(inputs["cell"])
    calls.append(systems)
    r2 = edge_vectors(inputs).square().sum(-1)
    each = (
        2
        * LJ["epsilon"]
        * smoothed(r2)
        * ((LJ["sigma"] ** 2 / r2) ** 6 - (LJ["sigma"] ** 2 / r2) ** 3)
    )
    return {"energy": r2.new_zeros(systems).index_add(0, batch[inputs["edge_index"][0]], each)}


MODEL = Wrapped(
    lennard_jones, Card(cutoff=LJ["r_cutoff"], neighbor_list="own", batches=True), "autograd"
)


@cache
def potential(n=len(R), lane="auto"):
    return bridge.potential(MODEL, atomic_numbers=np.full(n, 18), lane=lane)


@cache
def ours(lane="auto", n=len(R)):
    """The torch model as jax-md's energy_fn."""
    return engine.energy(potential(n, lane), BOX)


@cache
def native(displacement=None):
    """jax-md's own; its constants, kept here, are none of a program that calls this first."""
    with jax.ensure_compile_time_eval():
        return jax_md_energy.lennard_jones_pair(
            displacement or space.periodic_general(BOX)[0], **LJ
        )


def counted(f, *args):
    """(result, systems in each call of the torch model meanwhile)"""
    calls.clear()
    result = jax.block_until_ready(f(*args))
    jax.effects_barrier()
    return result, list(calls)


def scan(step, n, seen=lambda state: None):
    """n steps as one program: (last state, what was seen of each)."""

    def one(state, _):
        state = step(state)
        return state, seen(state)

    return jax.jit(lambda state: jax.lax.scan(one, state, None, length=n))


def apart(a, b, box=BOX):
    """The largest distance between fractional positions, whatever their images."""
    d = (a - b + 0.5) % 1 - 0.5
    return float(abs(d @ jnp.swapaxes(box, -1, -2)).max())


def close(got, want, tolerance=1e-10):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)
