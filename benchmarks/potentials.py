"""What bridge.potential adds to a torch model, what a Hessian costs, and what vmap over structures
saves; groups of benchmarks.bench."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import torch

import bridge
from benchmarks.harness import bare, goals, group, one_by_one
from torch_side.potentials.geometry import edge_vectors
from torch_side.potentials.neighbors import neighbor_list
from torch_side.potentials.strain import with_gradients

CUTOFF, REPLICAS = 4.0, 16
SKIN, EMPTY = 0.3, 0.1  # Angstrom, and the part of a list's slots that is not used
OF_HAND = {4: 2.0, 10: 1.3, 46: 1.3, 100: 1.3}  # limits, by repeats of the cell
WHY = {
    4: "the model alone, under with_gradients, takes 1.3; the call 0.2; lengths and vectors 0.4, checks of values 0.4, and all of torch runs on cold caches",
    10: "lengths and the cut of the skin take 0.3, the look at the integers 0.1, the call 0.1; the list is too short for what long ones gain",
}
OF_VESIN = 1.5


def embedded(inputs):
    """An EAM-like energy of each system over its edges."""
    r2 = edge_vectors(inputs).square().sum(-1)
    density = r2.new_zeros(len(inputs["pos"])).index_add(
        0, inputs["edge_index"][0], (1 - r2 / CUTOFF**2) ** 3
    )
    return r2.new_zeros(len(inputs["cell"])).index_add(0, inputs["batch"], -torch.sqrt(1 + density))


def crystal(repeats):
    """A rattled simple cubic crystal: positions, cell."""
    sites = np.stack(np.meshgrid(*[np.arange(repeats)] * 3), -1).reshape(-1, 3) * 2.7
    return sites + 0.1 * np.random.default_rng(0).normal(size=sites.shape), np.eye(
        3
    ) * 2.7 * repeats


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
    return bridge.potential(
        embedded, atomic_numbers=np.full(n, 29), gradients="autograd", cutoff=CUTOFF, **options
    )


@group("bare torch", share=0.05)
def potential_step():
    """Energy, forces and cell gradients of 64 atoms, neighbours included, with the checks of values
    and the way through XLA."""
    with jax.enable_x64(True):
        pos, cell = crystal(4)
        x, r, h = dict_of(pos, cell), jnp.asarray(pos), jnp.asarray(cell)
        steps = {
            lane: jax.jit(jax.value_and_grad(bound(64, lane=lane), (0, 1)))
            for lane in ("ffi", "host")
        }
        return {
            "bare torch": bare(bare_model, x),
            **{lane: wide(one_by_one(step, r, h)) for lane, step in steps.items()},
        }


def pairs(inputs):
    """A pair potential of each system over its edges."""
    r2 = edge_vectors(inputs).square().sum(-1)
    halves = 0.5 * (1 - r2 / CUTOFF**2) ** 3
    nodes = r2.new_zeros(len(inputs["pos"])).index_add(0, inputs["edge_index"][0], halves)
    return r2.new_zeros(len(inputs["cell"])).index_add(0, inputs["batch"], nodes)


def by_hand(pos, cell, i, j, offsets):
    """The same energy, g and G as torch alone is written for one periodic system and a list with a
    skin."""
    pos, cell = pos.detach().requires_grad_(), cell.detach().requires_grad_()
    r = pos.index_select(0, j) - pos.index_select(0, i) + offsets @ cell
    r2 = r.square().sum(-1)
    energy = torch.where(r2 < CUTOFF**2, 0.5 * (1 - r2 / CUTOFF**2) ** 3, 0).sum()
    return energy.detach(), *torch.autograd.grad(energy, (pos, cell))


def with_list(repeats):
    """Energy, g and G of a pair potential on one list: by hand, as a module, and through XLA."""
    with jax.enable_x64(True):
        pos, cell = crystal(repeats)
        x, n = dict_of(pos, cell), len(pos)
        skin, empty = (SKIN, EMPTY) if n > 64 else (0.0, 0.0)
        edges, offsets = neighbor_list(x["pos"], x["cell"], x["pbc"], CUTOFF + skin, x["batch"])
        spare = int(empty * len(offsets))
        index = jnp.pad(edges.int().numpy(), ((0, 0), (0, spare)), constant_values=n)
        slots = {
            "edge_index": index,
            "cell_offsets": jnp.pad(offsets.int().numpy(), ((0, spare), (0, 0))),
        }
        card = bridge.Card(cutoff=CUTOFF, neighbor_list="given", batches=True)
        energy = bridge.potential(
            pairs, atomic_numbers=np.full(n, 29), gradients="autograd", card=card
        )
        step, r, h = (
            jax.jit(jax.value_and_grad(energy, (0, 1))),
            jnp.asarray(pos),
            jnp.asarray(cell),
        )
        module, graph = with_gradients(pairs), x | {"edge_index": edges, "cell_offsets": offsets}
        if skin:  # a module leaves out nothing by itself
            near = edge_vectors(graph).norm(dim=-1) < CUTOFF
            graph |= {"edge_index": edges[:, near], "cell_offsets": offsets[near]}
        hand = x["pos"], x["cell"][0], *edges, offsets.double()
        want, (got, gradients) = by_hand(*hand), step(r, h, **slots)
        for a, b in zip(want, (got, *gradients), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
        return {
            "by hand": bare(by_hand, *hand),
            "with_gradients, without skin": bare(module, graph),
            "bridge": wide(one_by_one(step, r, h, **slots)),
        }


def list_group(repeats, share, rounds=None):
    limit = goals(("bridge", "by hand", OF_HAND[repeats], WHY.get(repeats, "")))

    def make():
        return with_list(repeats)

    make.__name__ = f"potential_list_{repeats**3}"
    make.__doc__ = with_list.__doc__
    group("by hand", share=share, judge=limit, rounds=rounds)(make)


list_group(4, 0.2)
list_group(10, 0.02)
list_group(46, 0.0005, rounds=9)
list_group(100, 0.0005, rounds=5)


@group(
    "vesin, unsorted",
    judge=goals(("bridge.edges", "vesin, unsorted", OF_VESIN)),
    share=0.0005,
    rounds=5,
)
def edges_of_a_million():
    """The list of 10^6 atoms."""
    import vesin

    with jax.enable_x64(True):
        pos, cell = crystal(100)
        r, h = jnp.asarray(pos), jnp.asarray(cell)
        threads = torch.get_num_threads()

        def search(ordered):
            found = vesin.NeighborList(
                cutoff=CUTOFF, full_list=True, sorted=ordered, n_threads=threads
            )
            return found.compute(pos, cell, True, quantities="PS")

        capacity = int(1.1 * len(search(False)[0]))
        find = jax.jit(bridge.edges(CUTOFF, capacity))
        return {
            "vesin, unsorted": bare(search, False),
            "vesin, sorted": bare(search, True),
            "bridge.edges": wide(one_by_one(find, r, h)),
        }


@group(
    "torch.autograd, forward once",
    judge=goals(("jax.hessian", "torch.autograd, forward once", 1.5)),
    share=0.002,
)
def potential_hessian():
    """The 81 rows of a Hessian of 27 atoms."""
    with jax.enable_x64(True):
        pos, cell = crystal(3)
        x, r, h = dict_of(pos, cell), jnp.asarray(pos), jnp.asarray(cell)
        total = lambda p: bare_model(x | {"pos": p})["position_gradients"]

        def rows():
            p = x["pos"].clone().requires_grad_()
            return [torch.autograd.grad(g, p, retain_graph=True) for g in total(p).flatten()]

        each = jax.jit(
            lambda r, h: jax.lax.map(
                lambda v: jax.vjp(lambda r: jax.grad(bound(27))(r, h), r)[1](v)[0],
                jnp.eye(81).reshape(81, 27, 3),
            )
        )
        hessians = {
            "jax.hessian": jax.jit(jax.hessian(bound(27))),
            "jacrev of grad": jax.jit(jax.jacrev(jax.grad(bound(27)))),
            "row by row in lax.map": each,
        }
        return {
            "torch.autograd, forward once": bare(rows),
            **{name: wide(one_by_one(f, r, h)) for name, f in hessians.items()},
        }


@group(
    'vmap, batched="sequential"',
    judge=goals(("vmap, one graph", 'vmap, batched="sequential"', 1.0)),
    share=0.01,
)
def potential_replicas():
    """Energy and gradients of 16 structures of 27 atoms under vmap."""
    with jax.enable_x64(True):
        pos, cell = crystal(3)
        r, h = (
            jnp.asarray(pos) + 0.01 * jax.random.normal(jax.random.key(0), (REPLICAS, 27, 3)),
            jnp.asarray(cell),
        )
        ways = {"vmap, one graph": "graph", 'vmap, batched="sequential"': "sequential"}
        many = lambda how: jax.jit(
            jax.vmap(jax.value_and_grad(bound(27, batched=how), (0, 1)), (0, None))
        )
        return {name: wide(one_by_one(many(how), r, h)) for name, how in ways.items()}


def wide(run):
    """With x64 on, as its arrays were made."""

    def with_x64(n):
        with jax.enable_x64(True):
            run(n)

    return with_x64
