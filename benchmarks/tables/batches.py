"""vmap over 1 to 256 small systems, microseconds a system, beside torch with the batch made by hand
and with one call after another."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import torch

import bridge
from benchmarks.harness import Case, bare, late, one_by_one
from benchmarks.potentials import CUTOFF, bare_model, bound, crystal, dict_of, embedded, wide
from bridge.card import Card
from torch_side.potentials.neighbors import neighbor_list

X64 = True
SIZES = (1, 4, 16, 64, 256)
COMPILED = (1, 16, 256)  # a package for each
BY_HAND = "torch, batched by hand"


def replicas(count: int) -> np.ndarray:
    pos, _ = crystal(3)
    return pos + 0.01 * np.random.default_rng(1).normal(size=(count, *pos.shape))


def batched(structures, cell) -> dict[str, torch.Tensor]:
    """The contract's dict of all of them, as one writes it for a model that takes batches."""
    each = [dict_of(pos, cell) for pos in structures]
    whole = {key: torch.cat([x[key] for x in each]) for key in each[0]}
    return whole | {"batch": torch.arange(len(each)).repeat_interleave(len(structures[0]))}


def native(r, h, capacity):
    """The compiled potential, and its neighbours by bridge.edges in the same program."""
    card = Card(cutoff=CUTOFF, neighbor_list="given", batches=True)
    energy = bridge.potential(
        embedded,
        atomic_numbers=np.full(r.shape[1], 29),
        gradients="autograd",
        card=card,
        lane="native",
    )
    find = bridge.edges(CUTOFF, capacity)
    step = jax.value_and_grad(lambda r, h: energy(r, h, **find(r, h)), (0, 1))
    return one_by_one(jax.jit(jax.vmap(step, (0, None))), r, h)


def variants(count: int) -> dict:
    with jax.enable_x64(True):
        structures, (_, cell) = replicas(count), crystal(3)
        r, h, each = jnp.asarray(structures), jnp.asarray(cell), dict_of(structures[0], cell)
        edges, _ = neighbor_list(each["pos"], each["cell"], each["pbc"], CUTOFF)
        whole, single = batched(structures, cell), [dict_of(pos, cell) for pos in structures]

        def mapped(lane, how="graph"):
            energy = bound(r.shape[1], lane=lane, batched=how)
            step = jax.jit(jax.vmap(jax.value_and_grad(energy, (0, 1)), (0, None)))
            return wide(one_by_one(step, r, h))

        def compiled():
            with jax.enable_x64(True):
                return wide(native(r, h, int(1.2 * edges.shape[1])))

        found = {
            BY_HAND: bare(bare_model, whole),
            "torch, one by one": bare(lambda: [bare_model(x) for x in single]),
            "ffi": mapped("ffi"),
            "ffi, one by one": mapped("ffi", "sequential"),
            "host": mapped("host"),
        }
        return found | ({"native": late(compiled, True)} if count in COMPILED else {})


def cases(quick: bool) -> dict[str, Case]:
    return {
        f"{count} systems": Case(lambda count=count: variants(count), (BY_HAND,), per=count)
        for count in ((1, 4) if quick else SIZES)
    }
