"""Values and gradients of local potentials against brute force: every kind of cell, capacity,
chunk, dtype, mixture of libraries."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import bridge
from jax_side.montecarlo.local import Change, Layout, LocalPotential
from jax_side.potentials import strain
from jax_side.potentials.potential import potential as bound
from tests.local_cases import (
    CELLS,
    CUTOFF,
    arrays,
    bits,
    brute,
    close,
    differentiable,
    functions,
    potential,
    quick,
    system,
)
from torch_side.potentials.neighbors import neighbor_list

MIXED = [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]


def with_edges(graph, spare=7):
    """The contract's dict; unused slots at the end."""
    t = lambda k: torch.from_numpy(np.array(graph[k]))
    edges, offsets = neighbor_list(t("pos"), t("cell")[None], t("pbc")[None], CUTOFF + 0.2)
    n = len(graph["pos"])
    edges, offsets = (
        np.pad(edges.numpy(), ((0, 0), (0, spare)), constant_values=n),
        np.pad(offsets.numpy(), ((0, spare), (0, 0))),
    )
    one = {
        "cell": graph["cell"][None],
        "pbc": jnp.asarray(graph["pbc"])[None],
        "batch": jnp.zeros(n, int),
    }
    return graph | one | {"edge_index": jnp.asarray(edges), "cell_offsets": jnp.asarray(offsets)}


@cache
def program(layout, dtype="float64"):
    """(pos, cell, atomic numbers) -> cache."""
    local = potential(dtype=dtype)
    return quick(
        lambda pos, cell, numbers: local.full(
            {"pos": pos, "atomic_numbers": numbers, "cell": cell}, layout
        )
    )


@cache
def cached(name):
    """A graph and its cache."""
    graph = system(name)
    return graph, program(potential().allocate(graph))(*arrays(graph)[:3])


@pytest.mark.parametrize("name", CELLS)
def test_full_x_brute_force(name):
    graph, found = cached(name)
    wanted = brute(*arrays(graph))
    potential().check(found)
    close(found.node_energies, wanted)
    close(found.energy, wanted.sum())
    assert found.count == (graph["atomic_numbers"] > 0).sum()
    assert found.energy.dtype == found.pos.dtype == jnp.float64


def test_full_x_eager():
    graph, same = cached("triclinic")
    found = potential().full(graph)
    assert found.layout == same.layout
    assert bits(found.cells) == bits(same.cells)
    close(found.energy, same.energy)


def test_full_x_no_atoms():
    found = potential().full(
        {"pos": jnp.zeros((0, 3)), "atomic_numbers": jnp.zeros(0, int), "cell": 4 * jnp.eye(3)}
    )
    assert (float(found.energy), int(found.count)) == (0, 0)


@pytest.mark.parametrize(
    "name, sizes",
    [
        ("triclinic", {"atoms": 19}),
        ("slab", {"atoms": 13, "chunk": 5}),
        ("open", {"chunk": 1}),
        ("none", {"atoms": 15}),
    ],
)
def test_full_x_capacity_and_chunks(name, sizes):
    graph, same = cached(name)
    found = program(replace(same.layout, **sizes))(*arrays(graph)[:3])
    close(found.node_energies[:12], same.node_energies)
    close(found.energy, same.energy)
    assert len(found.pos) == sizes.get("atoms", 12)
    assert not np.asarray(found.node_energies[12:]).any()


def test_full_x_float32():
    graph = system("triclinic", dtype="float32")
    found = program(cached("triclinic")[1].layout, "float32")(*arrays(graph)[:3])
    assert found.energy.dtype == found.sums.dtype == jnp.float32
    close(found.energy, brute(*arrays(graph)).sum(), 1e-5)


@pytest.mark.parametrize("name", ["triclinic", "small", "slab"])
def test_full_x_any_image(name):
    graph, same = cached(name)
    shift = np.random.default_rng(1).integers(-50, 51, size=(len(graph["pos"]), 3)) * graph["pbc"]
    close(
        program(same.layout)(
            graph["pos"] + shift @ np.asarray(graph["cell"]), *arrays(graph)[1:3]
        ).energy,
        same.energy,
    )


def test_full_x_cells_that_divide_the_cutoff():
    """In any orientation: what rounding makes of their widths is no narrower cell."""
    local, rng = (
        LocalPotential(
            lambda Z: jnp.ones((len(Z), 1), "float32"),
            lambda a, b, r: a,
            lambda a, s: s[:, 0],
            CUTOFF,
        ),
        np.random.default_rng(0),
    )
    turned = jnp.asarray(
        [1.5 * np.linalg.qr(rng.normal(size=(3, 3)))[0] for _ in range(32)], "float32"
    )
    graph = {
        "pos": jnp.zeros((1, 3), "float32"),
        "atomic_numbers": jnp.ones(1, int),
        "cell": 1.5 * jnp.eye(3, dtype="float32"),
    }
    layout = replace(local.allocate(graph), neighbors=60)
    found = quick(jax.vmap(lambda cell: local.full(graph | {"cell": cell}, layout)))(turned)
    local.check(found)
    lengths = np.linalg.norm(list(np.ndindex(5, 5, 5)) - np.full(3, 2), axis=1)
    inside, ends = ((lengths > 0) & (lengths < x) for x in (1.99, 2.01))
    assert ((inside.sum() <= found.energy) & (found.energy <= ends.sum())).all()


@pytest.mark.parametrize("name", [name for name in CELLS if name not in ("none", "one", "wire")])
def test_contract_x_full(name):
    graph, found = cached(name)
    out = quick(potential())(with_edges(graph))
    close(out["node_energies"], found.node_energies)
    close(out["energy"], found.energy[None])


def test_potential_x_full():
    """Bound to its atoms, by its card, which wants edges."""
    graph, found = cached("slab")
    edges = {name: with_edges(graph)[name] for name in ("edge_index", "cell_offsets")}
    energy = bound(
        potential(),
        atomic_numbers=np.asarray(graph["atomic_numbers"]),
        pbc=np.asarray(graph["pbc"], bool),
    )
    close(energy(graph["pos"], graph["cell"], **edges), found.energy)
    with pytest.raises(ValueError, match="got no cell_offsets, edge_index; pass"):
        energy(graph["pos"], graph["cell"])


@pytest.mark.parametrize("bridged", MIXED)
def test_gradients_x_libraries(bridged):
    graph, same = cached("triclinic")
    local = potential(bridged)
    energy = lambda pos, cell: local.full(graph | {"pos": pos, "cell": cell}, same.layout).energy
    e, got = quick(jax.value_and_grad(energy, (0, 1)))(graph["pos"], graph["cell"])
    close(e, same.energy)
    for a, b in zip(
        got, quick(jax.grad(differentiable(graph), (0, 1)))(graph["pos"], graph["cell"])
    ):
        close(a, b)


@pytest.mark.parametrize("name", ["small", "slab"])
def test_gradients_x_contract(name):
    graph, same = cached(name)
    wanted = quick(jax.grad(differentiable(graph), (0, 1)))(graph["pos"], graph["cell"])
    energy = lambda pos, cell: (
        potential().full(graph | {"pos": pos, "cell": cell}, replace(same.layout, chunk=3)).energy
    )
    out = quick(strain.with_gradients(potential()))(with_edges(graph))
    for got in (
        (out["position_gradients"], out["cell_gradients"][0]),
        quick(jax.grad(energy, (0, 1)))(graph["pos"], graph["cell"]),
    ):
        close(got[0], wanted[0])
        close(got[1], wanted[1])


def test_hessian_x_full():
    graph, same = cached("small")
    energy = lambda pos: potential().full(graph | {"pos": pos}, same.layout).energy
    wanted = quick(jax.hessian(lambda pos: differentiable(graph)(pos, graph["cell"])))(graph["pos"])
    assert abs(wanted).max() > 1e-2
    close(quick(jax.hessian(energy))(graph["pos"]), wanted, 1e-9)


class Counting:
    """Torch functions that count their calls, and keep how many rows each had."""

    def __init__(self):
        self.rows = {"init": [], "edge": [], "readout": []}
        of_torch = functions(torch, torch.tensor)
        self.local = LocalPotential(
            *(bridge.to_jax(self.counted(name, f)) for name, f in zip(self.rows, of_torch)), CUTOFF
        )

    def counted(self, name, f):
        def call(*xs):
            self.rows[name].append(len(xs[0]))
            return f(*xs)

        return call

    def calls(self, f, *args):
        """{name: calls} of a call that is no first one, which traces."""
        jax.block_until_ready(f(*args))
        for rows in self.rows.values():
            rows.clear()
        out = jax.block_until_ready(f(*args))
        return {name: len(rows) for name, rows in self.rows.items()}, out


@pytest.mark.parametrize("chains", [0, 3])
def test_calls_x_update(chains):
    count, (graph, same) = Counting(), cached("triclinic")
    local, each = count.local, jax.vmap if chains else lambda f: f
    pos = jnp.stack([graph["pos"] + 0.1 * b for b in range(chains)]) if chains else graph["pos"]
    calls, found = count.calls(
        quick(each(lambda pos: local.full(graph | {"pos": pos}, same.layout))), pos
    )
    assert calls == {"init": 1, "edge": 1, "readout": 1}
    index = jnp.array([2, 5])
    move, change = (
        each(lambda c, z=z: local.update(c, Change(index, c.pos[index] + 0.1, z)))
        for z in (None, jnp.array([3, 4]))
    )
    assert count.calls(quick(move), found)[0] == {"init": 0, "edge": 1, "readout": 1}
    assert count.calls(quick(change), found)[0] == {"init": 1, "edge": 1, "readout": 1}


def test_calls_x_chunks():
    count, (graph, same) = Counting(), cached("triclinic")
    parts = -(-len(graph["pos"]) // 5)
    calls, found = count.calls(
        quick(lambda pos: count.local.full(graph | {"pos": pos}, replace(same.layout, chunk=5))),
        graph["pos"],
    )
    assert calls == {"init": 1, "edge": parts, "readout": parts}
    close(found.energy, same.energy)


@pytest.mark.parametrize("kind", ["move", "mutate"])
def test_rows_x_number_of_atoms(kind):
    """What the functions see of an update is the same for 100 atoms as for 10,000."""
    seen = []

    def noted(f):
        def call(*xs):
            seen[-1].append([x.shape for x in xs])
            return f(*xs)

        return call

    local = LocalPotential(*map(noted, functions(jnp, jnp.asarray)), CUTOFF)
    for n in (100, 10_000):
        seen.append([])
        layout, x = (
            Layout(n, 30, 80, (True,) * 3, (n // 25, 2, 2), (1, 1, 1), CUTOFF),
            jax.ShapeDtypeStruct,
        )
        args = x((n, 3), float), x((n,), int), x((3, 3), float)
        found = jax.eval_shape(
            lambda *xs, layout=layout: local.full(
                dict(zip(("pos", "atomic_numbers", "cell"), xs)), layout
            ),
            *args,
        )
        assert {rows[0][0] for rows in seen[-1]} >= {min(n, layout.chunk)}
        seen[-1] = []
        change = lambda c: Change(
            jnp.array([1, 2]), c.pos[1:3] + 0.1, None if kind == "move" else jnp.array([5, 6])
        )
        jax.eval_shape(lambda c, change=change: local.update(c, change(c)), found)
    assert seen[0] == seen[1]
    assert len(seen[0]) == (2 if kind == "move" else 3)
