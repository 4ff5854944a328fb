"""What a local potential keeps of a system, what changes in it, and what a change proposes: rows of
arrays whose sizes a layout fixes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bridge.contract import check_inputs
from bridge.errors import message, spec
from jax_side.montecarlo import cells as lists
from jax_side.montecarlo.cells import Cells, Layout, Space

tree = jax.tree_util


class Change(NamedTuple):
    """What becomes of K atoms: those of `index` (K,) get `pos` (K,3) and `atomic_numbers` (K,),
    None for as they are.

    Atomic number 0 deletes an atom; one above 0 for an absent atom inserts it (with pos). A
    negative index is a row without meaning, so that moves of several sizes can share a program. K
    is fixed when a program is compiled. jax_side.montecarlo.moves makes them.
    """

    index: jax.Array
    pos: jax.Array | None = None
    atomic_numbers: jax.Array | None = None


@partial(
    tree.register_dataclass,
    data_fields=(
        "pos",
        "atomic_numbers",
        "nodes",
        "sums",
        "node_energies",
        "total",
        "count",
        "space",
        "cells",
        "needed",
    ),
    meta_fields=("layout",),
)
@dataclass(frozen=True)
class Cache:
    """A system and what the potential knows of it. N slots for atoms; those with atomic number 0
    are absent.

    pos (N,3) wrapped into the cell along periodic axes, Angstrom; atomic_numbers (N,); node
    embeddings `nodes` (N,F); sums of messages `sums` (N,2,M), their values and what rounding took
    from these; node_energies (N,) eV; `count` atoms are present; `needed` is zeros until something
    did not fit the layout (see LocalPotential.check).
    """

    pos: jax.Array
    atomic_numbers: jax.Array
    nodes: jax.Array
    sums: jax.Array
    node_energies: jax.Array
    total: tuple
    count: jax.Array
    space: Space
    cells: Cells
    needed: jax.Array
    layout: Layout

    @property
    def energy(self):
        """eV, a scalar; NaN once anything did not fit."""
        return jnp.where(self.needed.any(), jnp.nan, self.total[0] + self.total[1])

    cell = property(lambda self: self.space.cell)


class Proposal(NamedTuple):
    """The rows that a change would write: for the changed atoms, for all atoms that feel it, for
    the cell list."""

    index: jax.Array
    pos: jax.Array
    atomic_numbers: jax.Array
    nodes: jax.Array
    old_slot: jax.Array
    slot: jax.Array
    felt: jax.Array
    sums: jax.Array
    node_energies: jax.Array
    total: tuple
    count: jax.Array
    needed: jax.Array


class Changed(NamedTuple):
    """The K atoms of a change: index (N where there is none), atomic numbers and wrapped positions
    before and after."""

    index: jax.Array
    was: jax.Array
    now: jax.Array
    old_pos: jax.Array
    pos: jax.Array


def changed(cache, change):
    for name, x in (("index", change.index), ("atomic_numbers", change.atomic_numbers)):
        if x is not None and (x.ndim != 1 or not jnp.issubdtype(x.dtype, jnp.integer)):
            raise ValueError(
                message(f"{name} as int[K]", spec(x.shape, x.dtype), "give the atoms that change")
            )
    n, k = cache.layout.atoms, len(change.index)
    i = jnp.where(change.index < 0, n, change.index).astype(jnp.int32)
    was = jnp.take(cache.atomic_numbers, i, mode="fill", fill_value=0)
    now = (
        was
        if change.atomic_numbers is None
        else jnp.where(i < n, change.atomic_numbers, 0).astype(was.dtype)
    )
    was, now = _made(was), _made(now)
    old = jnp.take(cache.pos, i, axis=0, mode="fill", fill_value=0)
    for name, x, shape in (
        ("pos", change.pos, (k, 3)),
        ("atomic_numbers", change.atomic_numbers, (k,)),
    ):
        if x is not None and x.shape != shape:
            raise ValueError(
                message(
                    f"{name} {shape} in a change of {k} atoms",
                    str(x.shape),
                    "give a row for each index",
                )
            )
    if change.pos is not None and change.pos.dtype != old.dtype:
        raise ValueError(
            message(
                f"positions of a change as {old.dtype}, like the cache's",
                str(change.pos.dtype),
                "cast them yourself",
            )
        )
    pos = old if change.pos is None else lists.wrap(cache.space, cache.layout, change.pos)
    return Changed(i, was, now, old, pos)


def _made(x):
    """x >= 0, by a maximum: XLA would compute a mere read anew as it writes each array, and copy
    the one that is read before."""
    return jnp.where(jnp.arange(2)[:, None] > 0, x, 0).max(0)


def misused(change, c, n, lost):
    """The least capacity that an index beyond the last slot asks for; whether an atom stands twice,
    is inserted nowhere, or is not in the list."""
    real = change.index >= 0
    beyond = jnp.max(jnp.where(real & (change.index >= n), change.index + 1, 0), initial=0)
    twice = (jnp.tril(c.index[:, None] == c.index, -1) & (c.index < n)).any()
    nowhere = ((c.was == 0) & (c.now > 0)).any() if change.pos is None else False
    return beyond, twice | nowhere | lost.any()


def needed_of(per_cell, neighbors, atoms=0, misused=False, narrow=False):
    return jnp.stack(
        [jnp.asarray(x).astype(jnp.int32) for x in (per_cell, neighbors, atoms, misused, narrow)]
    )


def beyond(n, has):
    return jnp.where(n > has, n, 0)


NEEDS = (  # what did not fit, in the order of Cache.needed
    (
        "at most {has} atoms in a cell of the list",
        "{n}",
        "allocate with per_cell={n} or more",
        "per_cell",
    ),
    (
        "at most {has} neighbours of an atom",
        "{n}",
        "allocate with neighbors={n} or more",
        "neighbors",
    ),
    (
        "an index below the capacity of {has} atoms",
        "one that needs {n}",
        "allocate with capacity={n} or more",
        "atoms",
    ),
    (
        "each atom once in a change, and a position for each that is inserted",
        "an atom twice, or without",
        "mend the change",
        "atoms",
    ),
    (
        "a cell as wide as the layout was made for",
        "a narrower one",
        "allocate for this cell",
        "atoms",
    ),
)


def seen(x, layout):
    """x; a ValueError where its `needed` can be seen and says that something did not fit."""
    if not isinstance(x.needed, jax.core.Tracer):
        check(x.needed, layout)
    return x


def check(needed, layout):
    worst = np.asarray(needed).reshape(-1, len(NEEDS)).max(0)
    for n, (expected, got, do, has) in zip(worst, NEEDS):
        if n:
            raise ValueError(
                message(
                    *(text.format(n=n, has=getattr(layout, has)) for text in (expected, got, do))
                )
            )


def system(graph):
    """pos (N,3), atomic numbers (N,) and cell (3,3) of one system, checked."""
    lacks = [k for k in ("pos", "atomic_numbers") if graph.get(k) is None]
    if lacks:
        raise ValueError(
            message(
                "a graph with pos and atomic_numbers",
                f"none of {', '.join(lacks)}",
                "add what is missing",
            )
        )
    pos, numbers = jnp.asarray(graph["pos"]), jnp.asarray(graph["atomic_numbers"])
    cell = jnp.zeros((3, 3), pos.dtype) if graph.get("cell") is None else jnp.asarray(graph["cell"])
    cell = cell[0] if cell.shape == (1, 3, 3) else cell
    check_inputs(
        {
            "pos": pos,
            "atomic_numbers": numbers,
            "cell": cell[None],
            "batch": jnp.zeros(len(pos), int),
        },
        (),
    )
    return pos, numbers.astype(jnp.int32), cell


def periodic(graph):
    pbc = graph.get("pbc", graph.get("cell") is not None)
    if isinstance(pbc, jax.core.Tracer) or isinstance(graph["pos"], jax.core.Tracer):
        raise ValueError(
            message(
                "a layout inside of jit, vmap or scan",
                "None",
                "make one before: layout = local.allocate(graph); local.full(graph, layout)",
            )
        )
    return _axes(pbc)


def check_periodic(graph, layout):
    """ValueError where a pbc that can be seen is not the layout's."""
    pbc = graph.get("pbc")
    if pbc is None or isinstance(pbc, jax.core.Tracer):
        return
    got = _axes(pbc)
    if got != layout.periodic:
        raise ValueError(
            message(f"the layout's pbc {layout.periodic}", str(got), "allocate for this graph")
        )


def _axes(pbc):
    """Three bools, of one or three."""
    return tuple(bool(x) for x in np.broadcast_to(np.asarray(pbc).reshape(-1), 3))


def padded(pos, numbers, cell, atoms):
    if len(pos) > atoms:
        raise ValueError(
            message(
                f"at most {atoms} atoms, the layout's",
                str(len(pos)),
                f"allocate with capacity={len(pos)} or more",
            )
        )
    spare = atoms - len(pos)
    return jnp.pad(pos, ((0, spare), (0, 0))), jnp.pad(numbers, (0, spare)), cell
