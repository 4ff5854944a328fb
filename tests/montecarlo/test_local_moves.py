"""Any sequence of moves: incremental energies against brute force and `full`, rejected moves to the
bit, the cell list; jax_side.montecarlo.moves."""

from dataclasses import replace
from functools import cache
from typing import NamedTuple

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from jax_side.montecarlo import moves
from jax_side.montecarlo.local import Change, Layout, LocalPotential
from tests.local_cases import CELLS, bits, brute, close, potential, quick, system
from tests.matrices import a_few

ATOMS, K, STEPS = 10, 3, 6
LISTS = {
    "wide": {"per_cell": ATOMS, "neighbors": 60},
    "small": {"per_cell": ATOMS, "neighbors": 1200},
    "slab": {"per_cell": ATOMS, "neighbors": 150},
}
LISTS |= {"open": {"per_cell": ATOMS, "neighbors": ATOMS}}


class Draw(NamedTuple):
    """Random numbers of one step, from which a change is made."""

    kind: jax.Array
    key: jax.Array
    pos: jax.Array
    atomic_numbers: jax.Array
    k: jax.Array


def rows(change, cache):
    """With K rows, those beyond the change negative."""
    i = jnp.pad(change.index.astype(jnp.int32), (0, K - len(change.index)), constant_values=-1)
    pos = cache.pos[change.index] if change.pos is None else change.pos
    numbers = (
        cache.atomic_numbers[change.index]
        if change.atomic_numbers is None
        else change.atomic_numbers
    )
    return Change(
        i,
        jnp.pad(pos, ((0, K - len(pos)), (0, 0))),
        jnp.pad(numbers, (0, K - len(numbers))).astype(jnp.int32),
    )


def some(cache, d, change):
    """`change` with a negative index from the k-th row on."""
    return change._replace(index=jnp.where(jnp.arange(K) < d.k, change.index, -2))


def anywhere(d):
    """K slots, each once."""
    return jax.random.permutation(d.key, ATOMS)[:K].astype(jnp.int32)


def turned(cache, d):
    """Three atoms of one molecule, in any images."""
    axis = jnp.linalg.qr(jax.random.normal(d.key, (3, 3), cache.pos.dtype))[0]
    return moves.turned(cache, anywhere(d), axis, d.pos[0])


def inserted(cache, d):
    """Nothing where there is no room."""
    i = moves.vacant(cache, d.key)
    return rows(moves.inserted(jnp.where(i < ATOMS, i, -1), d.pos[0], d.atomic_numbers[:1]), cache)


KINDS = {
    "moved": lambda cache, d: some(
        cache, d, rows(moves.moved(anywhere(d), cache.pos[anywhere(d)] + d.pos * 0.2), cache)
    ),
    "carried": lambda cache, d: some(cache, d, rows(moves.moved(anywhere(d), d.pos * 9), cache)),
    "turned": lambda cache, d: rows(turned(cache, d), cache),
    "mutated": lambda cache, d: some(
        cache,
        d,
        rows(
            moves.mutated(
                anywhere(d), jnp.where(cache.atomic_numbers[anywhere(d)] > 0, d.atomic_numbers, 0)
            ),
            cache,
        ),
    ),
    "swapped": lambda cache, d: rows(
        moves.swapped(
            cache, moves.pick(cache, d.key), moves.pick(cache, jax.random.fold_in(d.key, d.k))
        ),
        cache,
    ),
    "inserted": inserted,
    "deleted": lambda cache, d: rows(moves.deleted(moves.pick(cache, d.key)), cache),
    "anything": lambda cache, d: some(
        cache, d, Change(anywhere(d), d.pos * 9, jnp.where(d.pos[:, 0] > 0, d.atomic_numbers, 0))
    ),
}


@cache
def layout(name):
    return replace(potential().allocate(system(name)), atoms=ATOMS, **LISTS[name])


def step(local, carry, given):
    """(energy, change, what was proposed, what is kept); NumPy looks at it afterwards."""
    d, accept = given
    energy, change, proposal = local.update(
        carry, jax.lax.switch(d.kind, [lambda c, d, f=f: f(c, d) for f in KINDS.values()], carry, d)
    )
    kept = local.commit(carry, proposal, accept)
    return kept, (energy, change, local.commit(carry, proposal, True), kept)


@cache
def program(name):
    """(graph, draws, accepts) -> the first cache, and what each step gave: one program for all
    sequences."""

    local, sizes = potential(), layout(name)

    def run(graph, draws, accepts):
        first = local.full(graph, sizes)
        return first, jax.lax.scan(lambda c, x: step(local, c, x), first, (draws, accepts))[1]

    return quick(run)


@cache
def again(name):
    """caches -> what `full` makes of their atoms; all at once."""
    sizes = layout(name)
    one = lambda pos, numbers, cell: potential().full(
        {"pos": pos, "atomic_numbers": numbers, "cell": cell}, sizes
    )
    return quick(lambda caches: jax.vmap(one)(caches.pos, caches.atomic_numbers, caches.space.cell))


@st.composite
def sequences(draw, name):
    """A cell near that of the layout, atoms, and steps of drawn kinds."""
    kinds = draw(
        st.lists(
            st.tuples(st.integers(0, len(KINDS) - 1), st.integers(0, K), st.booleans()),
            min_size=STEPS,
            max_size=STEPS,
        )
    )
    seed = draw(st.integers(0, 2**31))
    rng, graph = np.random.default_rng(seed), system(name, seed, atoms=ATOMS)
    cell = np.asarray(graph["cell"]) * rng.uniform(1, 1.03) + 0.01 * np.abs(
        np.asarray(graph["cell"])
    ).max() * rng.uniform(-1, 1, (3, 3))
    kind, k, accept = (np.array(x) for x in zip(*kinds))
    keys = jax.random.split(jax.random.key(seed), STEPS)
    d = Draw(
        kind,
        keys,
        rng.normal(size=(STEPS, K, 3)),
        rng.integers(1, 20, size=(STEPS, K)).astype(np.int32),
        k,
    )
    return {k: v for k, v in graph.items() if k != "pbc"} | {"cell": jnp.asarray(cell)}, d, accept


def at(tree, t):
    return jax.tree.map(lambda x: np.asarray(x)[t], tree)


def check_list(cache):
    """Each atom that is present stands once, in the cell where it is; none else does."""
    lay, here = cache.layout, np.asarray(cache.atomic_numbers) > 0
    slots, slot = (np.asarray(x) for x in cache.cells)
    assert sorted(slots[slots < lay.atoms]) == list(np.flatnonzero(here))
    assert (slots[slot[here]] == np.flatnonzero(here)).all()
    assert (slot[~here] == len(slots)).all()
    u = (np.asarray(cache.pos) - np.asarray(cache.space.origin)) @ np.asarray(cache.space.to_grid)
    cell = np.stack(np.unravel_index(slot[here] // lay.per_cell, lay.grid), -1)
    u, last = u[here], np.array(lay.grid) - 1
    below, above = (cell <= u + 1e-9) | (cell == 0), (u < cell + 1 + 1e-9) | (cell == last)
    assert (below & above).all()
    assert ((u > -1e-9) & (u < last + 1 + 1e-9))[:, list(lay.periodic)].all()


@pytest.mark.parametrize("name", a_few(LISTS, 2))
def test_energy_x_any_sequence(name):
    @settings(max_examples=12)
    @given(sequences(name))
    def check(drawn):
        graph, draws, accepts = drawn
        first, (energies, changes, proposed, kept) = jax.block_until_ready(
            program(name)(graph, draws, accepts)
        )
        potential().check(kept)
        close(again(name)(proposed).energy, energies)
        before = at(first, ())
        for t, accept in enumerate(accepts):
            this, now = at(proposed, t), at(kept, t)
            close(
                energies[t],
                brute(this.pos, this.space.cell, this.atomic_numbers, CELLS[name][1]).sum(),
            )
            close(energies[t] - changes[t], sum(before.total))
            assert bits(now) == bits(this if accept else before)
            assert now.count == (now.atomic_numbers > 0).sum()
            check_list(this)
            before = now

    check()


FEW = {  # kinds whose changes lack positions or elements, with their own programs
    "moved": lambda c, d: moves.moved(d.k, c.pos[d.k] + d.pos[0]),
    "swapped": lambda c, d: moves.swapped(c, moves.pick(c, d.key), d.k),
}


@pytest.mark.parametrize("kind", FEW)
def test_energy_x_changes_without_positions_or_elements(kind):
    local = potential()
    first = local.full(system("wide", 3, atoms=ATOMS), layout("wide"))

    def run(cache, key):
        d = Draw(
            None,
            key,
            jax.random.normal(key, (K, 3)) * 4,
            None,
            jax.random.randint(key, (), 0, ATOMS),
        )
        energy, change, proposal = local.update(cache, FEW[kind](cache, d))
        cache = local.commit(cache, proposal, True)
        return cache, (energy, change, cache)

    last, (energies, changes, caches) = quick(lambda c, keys: jax.lax.scan(run, c, keys))(
        first, jax.random.split(jax.random.key(1), 8)
    )
    local.check(last)
    assert (
        len(
            {
                x.tobytes()
                for x in np.asarray(caches.pos if kind == "moved" else caches.atomic_numbers)
            }
        )
        > 5
    )
    for t in range(8):
        this = at(caches, t)
        close(energies[t], brute(this.pos, this.space.cell, this.atomic_numbers, (1, 1, 1)).sum())
        check_list(this)
    close(float(first.energy) + np.cumsum(changes), energies)


@cache
def boxes(*numbers):
    """A cache of atoms in a row, 2 Angstrom apart, which feel nothing."""
    free = LocalPotential(
        lambda Z: jnp.ones((len(Z), 1)), lambda a, b, r: 0 * a, lambda a, s: 0 * s[:, 0], 1.0
    )
    sizes = Layout(len(numbers), 9, 2, (False,) * 3, (1, 1, 1), (0, 0, 0), 1.0)
    pos = jnp.arange(len(numbers))[:, None] * jnp.array([2.0, 0, 0])
    return quick(lambda pos: free.full({"pos": pos, "atomic_numbers": jnp.array(numbers)}, sizes))(
        pos
    )


def test_pick_and_vacant_x_slots():
    """Uniform among the atoms, and among the free slots; the refused index where there are none."""
    found = boxes(0, 3, 0, 4, 5, 0, 0, 6)
    keys = jax.random.split(jax.random.key(0), 4000)
    for draw, wanted in ((moves.pick, [1, 3, 4, 7]), (moves.vacant, [0, 2, 5, 6])):
        i, times = np.unique(
            quick(jax.vmap(lambda key, draw=draw: draw(found, key)))(keys), return_counts=True
        )
        assert i.tolist() == wanted
        assert (abs(times - 1000) < 5 * 1000**0.5).all()
    assert moves.pick(boxes(0, 0), keys[0]) == -1
    assert moves.vacant(boxes(1, 2), keys[0]) == 2


def test_vacant_after_x_slots():
    found = boxes(0, 3, 0, 4, 5, 0, 0, 6)
    assert moves.vacant_after(found, 2, 3).tolist() == [2, 5, 6]
    assert moves.vacant_after(found, 6, 3).tolist() == [6, 0, 2]
    assert moves.vacant_after(found, 7, 6).tolist() == [0, 2, 5, 6, 8, 8]


def test_turned_x_shape_of_the_molecule():
    """Distances within it, over the boundary, stay; the centre goes by the shift."""
    cell, lay = np.asarray(system("wide")["cell"]), layout("wide")
    whole = np.array([[0.2, 0.1, 9.8], [-0.8, 0.4, 10.3], [0.5, -0.9, 9.1]])
    graph = system("wide", atoms=ATOMS)
    found = potential().full(graph | {"pos": graph["pos"].at[jnp.array([4, 1, 7])].set(whole)}, lay)
    turn, shift = (
        np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0],
        np.array([0.3, -0.2, 5.0]),
    )
    pos = np.asarray(moves.turned(found, jnp.array([4, 1, 7]), turn, shift).pos)
    wanted = whole.mean(0) + (whole - whole.mean(0)) @ turn.T + shift
    images = (pos - wanted) @ np.linalg.inv(cell)
    close(images, np.broadcast_to(np.round(images[0]), (3, 3)), 1e-9)


def test_swapped_x_the_same_atom_twice():
    def run(found):
        energy, change, proposal = potential().update(found, moves.swapped(found, 3, 3))
        return energy, change, potential().commit(found, proposal, True)

    found = potential().full(system("wide", atoms=ATOMS), layout("wide"))
    energy, change, after = quick(run)(found)
    assert (change, energy) == (0, found.energy)
    same = lambda c: (c.pos, c.atomic_numbers, c.cells, c.sums, c.energy)
    assert bits(same(after)) == bits(same(found))
