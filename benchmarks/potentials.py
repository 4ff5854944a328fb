"""What bridge.potential adds to a torch model, what a Hessian costs, and what vmap over structures saves; groups of benchmarks.bench."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import torch

import bridge
from benchmarks.harness import bare, goals, group, one_by_one
from torch_side.graph import edge_vectors
from torch_side.neighbors import neighbor_list
from torch_side.strain import with_gradients

CUTOFF, REPLICAS = 4.0, 16


def embedded(inputs):
    """An EAM-like energy of each system over its edges."""
    r2 = edge_vectors(inputs).square().sum(-1)
    density = r2.new_zeros(len(inputs["pos"])).index_add(0, inputs["edge_index"][0], (1 - r2 / CUTOFF**2) ** 3)
    return r2.new_zeros(len(inputs["cell"])).index_add(0, inputs["batch"], -torch.sqrt(1 + density))


def crystal(repeats):
    """A rattled simple cubic crystal: positions, cell."""
    sites = np.stack(np.meshgrid(*[np.arange(repeats)] * 3), -1).reshape(-1, 3) * 2.7
    return sites + 0.1 * np.random.default_rng(0).normal(size=sites.shape), np.eye(3) * 2.7 * repeats


def dict_of(pos, cell):
    """The contract's dict of one system, for torch."""
    return {
        "pos": torch.tensor(pos), "cell": torch.tensor(cell)[None], "pbc": torch.ones(1, 3, dtype=torch.bool),
        "batch": torch.zeros(len(pos), dtype=torch.int64), "atomic_numbers": torch.full((len(pos),), 29),
    }  # fmt: skip


def bare_model(inputs):
    """Neighbours, energy and gradients, nothing checked."""
    edges = neighbor_list(inputs["pos"], inputs["cell"], inputs["pbc"], CUTOFF, inputs["batch"])
    return with_gradients(embedded)(inputs | dict(zip(("edge_index", "cell_offsets"), edges)))


def bound(n, **options):
    return bridge.potential(embedded, atomic_numbers=np.full(n, 29), gradients="autograd", cutoff=CUTOFF, **options)


@group("bare torch", share=0.05)
def potential_step():
    """Energy, forces and cell gradients of 64 atoms, neighbours included, with the checks of values and the way through XLA."""
    with jax.enable_x64(True):
        pos, cell = crystal(4)
        x, r, h = dict_of(pos, cell), jnp.asarray(pos), jnp.asarray(cell)
        steps = {lane: jax.jit(jax.value_and_grad(bound(64, lane=lane), (0, 1))) for lane in ("ffi", "host")}
        return {"bare torch": bare(bare_model, x), **{lane: wide(one_by_one(step, r, h)) for lane, step in steps.items()}}


@group("torch.autograd, forward once", judge=goals(("jax.hessian", "torch.autograd, forward once", 1.5)), share=0.002)
def potential_hessian():
    """The 81 rows of a Hessian of 27 atoms."""
    with jax.enable_x64(True):
        pos, cell = crystal(3)
        x, r, h = dict_of(pos, cell), jnp.asarray(pos), jnp.asarray(cell)
        total = lambda p: bare_model(x | {"pos": p})["position_gradients"]  # noqa: E731

        def rows():
            p = x["pos"].clone().requires_grad_()
            return [torch.autograd.grad(g, p, retain_graph=True) for g in total(p).flatten()]

        each = jax.jit(lambda r, h: jax.lax.map(lambda v: jax.vjp(lambda r: jax.grad(bound(27))(r, h), r)[1](v)[0], jnp.eye(81).reshape(81, 27, 3)))
        hessians = {"jax.hessian": jax.jit(jax.hessian(bound(27))), "jacrev of grad": jax.jit(jax.jacrev(jax.grad(bound(27)))), "row by row in lax.map": each}
        return {"torch.autograd, forward once": bare(rows), **{name: wide(one_by_one(f, r, h)) for name, f in hessians.items()}}


@group('vmap, batched="sequential"', judge=goals(("vmap, one graph", 'vmap, batched="sequential"', 1.0)), share=0.01)
def potential_replicas():
    """Energy and gradients of 16 structures of 27 atoms under vmap."""
    with jax.enable_x64(True):
        pos, cell = crystal(3)
        r, h = jnp.asarray(pos) + 0.01 * jax.random.normal(jax.random.key(0), (REPLICAS, 27, 3)), jnp.asarray(cell)
        ways = {"vmap, one graph": "graph", 'vmap, batched="sequential"': "sequential"}
        many = lambda how: jax.jit(jax.vmap(jax.value_and_grad(bound(27, batched=how), (0, 1)), (0, None)))  # noqa: E731
        return {name: wide(one_by_one(many(how), r, h)) for name, how in ways.items()}


def wide(run):
    """With x64 on, as its arrays were made."""

    def with_x64(n):
        with jax.enable_x64(True):
            run(n)

    return with_x64
