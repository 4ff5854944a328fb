"""What a local potential keeps of a system, what changes in it, and what a change proposes: rows of
arrays whose sizes a layout fixes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from bridge.contract import check_inputs
from bridge.errors import message, spec
from jax_side.montecarlo import cells as lists
from jax_side.montecarlo.cells import Axes, Cells, Layout, Space

tree = jax.tree_util

Graph = Mapping[str, Any]  # pos, atomic_numbers, cell and pbc of one system
System = tuple[Float[jax.Array, "N 3"], Int[jax.Array, " N"], Float[jax.Array, "3 3"]]
Total = tuple[Float[jax.Array, ""], Float[jax.Array, ""]]  # (high, low); see summing


class Change(NamedTuple):
    """What becomes of K atoms: those of `index` (K,) get `pos` (K,3) in Angstrom and
    `atomic_numbers` (K,). None leaves these as they are.

    Atomic number 0 deletes an atom. One above 0 inserts an absent atom, and then needs pos. A
    negative index is a row without meaning, so that moves of several sizes can share a program. K
    is fixed when a program is compiled. jax_side.montecarlo.moves makes changes.
    """

    index: Int[jax.Array, " K"]
    pos: Float[jax.Array, "K 3"] | None = None
    atomic_numbers: Int[jax.Array, " K"] | None = None


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
    """A system and what the potential knows of it. There are N slots for atoms; those with atomic
    number 0 are absent.

    pos              (N,3), Angstrom, wrapped into the cell along periodic axes
    atomic_numbers   (N,)
    nodes            (N,F), node embeddings
    sums             (N,2,M), sums of messages: their values, and what rounding took from these
    node_energies    (N,), eV
    total            the energy in eV, and what rounding took from it
    count            how many atoms are present
    space, cells     the cell, and the list of atoms in it
    needed           zeros until something did not fit the layout (see LocalPotential.check)
    layout           the sizes of all arrays
    """

    pos: Float[jax.Array, "N 3"]
    atomic_numbers: Int[jax.Array, " N"]
    nodes: Float[jax.Array, " N *F"]
    sums: Float[jax.Array, "N 2 *M"]
    node_energies: Float[jax.Array, " N"]
    total: Total
    count: Int[jax.Array, ""]
    space: Space
    cells: Cells
    needed: Int[jax.Array, " needs"]
    layout: Layout

    @property
    def energy(self) -> Float[jax.Array, ""]:
        """The energy in eV, a scalar. It is NaN once anything did not fit."""
        return jnp.where(self.needed.any(), jnp.nan, self.total[0] + self.total[1])

    @property
    def cell(self) -> Float[jax.Array, "3 3"]:
        """The cell (3,3) by rows, in Angstrom."""
        return self.space.cell


class Proposal(NamedTuple):
    """The rows that a change would write: those of the K changed atoms, those of the L atoms that
    feel it (`felt`), and those of the cell list. None for what does not change."""

    index: Int[jax.Array, " K"]
    pos: Float[jax.Array, "K 3"] | None
    atomic_numbers: Int[jax.Array, " K"] | None
    nodes: Float[jax.Array, " K *F"] | None
    old_slot: Int[jax.Array, " K"] | None
    slot: Int[jax.Array, " K"] | None
    felt: Int[jax.Array, " L"]
    sums: Float[jax.Array, "L 2 *M"]
    node_energies: Float[jax.Array, " L"]
    total: Total
    count: Int[jax.Array, ""]
    needed: Int[jax.Array, " needs"]


class Changed(NamedTuple):
    """The K atoms of a change: index (N where there is none), atomic numbers and wrapped positions
    before and after."""

    index: Int[jax.Array, " K"]
    was: Int[jax.Array, " K"]
    now: Int[jax.Array, " K"]
    old_pos: Float[jax.Array, "K 3"]
    pos: Float[jax.Array, "K 3"]


def changed(cache: Cache, change: Change) -> Changed:
    """Returns the atoms of a change as they are in the cache and as they become.

    Raises: ValueError for arrays whose shapes or dtypes don't fit one another or the cache."""
    for name, x in (("index", change.index), ("atomic_numbers", change.atomic_numbers)):
        if x is not None and (x.ndim != 1 or not jnp.issubdtype(x.dtype, jnp.integer)):
            raise ValueError(
                message(f"{name} as int[K]", spec(x.shape, x.dtype), "give the atoms that change")
            )
    n, k = cache.layout.atoms, len(change.index)
    i = jnp.where(change.index < 0, n, change.index).astype(jnp.int32)
    was = jnp.take(cache.atomic_numbers, i, mode="fill", fill_value=0)
    if change.atomic_numbers is None:
        now = was
    else:
        now = jnp.where(i < n, change.atomic_numbers, 0).astype(was.dtype)
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


def _made(x: Int[jax.Array, " K"]) -> Int[jax.Array, " K"]:
    """x >= 0, by a maximum.

    XLA would compute a mere read again while it writes each array, and would copy the array that
    is read before that."""
    return jnp.where(jnp.arange(2)[:, None] > 0, x, 0).max(0)


def misused(
    change: Change, c: Changed, n: int, lost: Bool[jax.Array, " K"]
) -> tuple[Int[jax.Array, ""], Bool[jax.Array, ""]]:
    """Returns the least capacity that an index beyond the last of `n` slots asks for, else 0; and
    whether an atom stands twice, is inserted without a position, or is not in the list (`lost`)."""
    real = change.index >= 0
    beyond = jnp.max(jnp.where(real & (change.index >= n), change.index + 1, 0), initial=0)
    twice = (jnp.tril(c.index[:, None] == c.index, -1) & (c.index < n)).any()
    nowhere = ((c.was == 0) & (c.now > 0)).any() if change.pos is None else False
    return beyond, twice | nowhere | lost.any()


def needed_of(
    per_cell: ArrayLike,
    neighbors: ArrayLike,
    atoms: ArrayLike = 0,
    misused: ArrayLike = False,
    narrow: ArrayLike = False,
) -> Int[jax.Array, " needs"]:
    """Returns Cache.needed: the sizes that would be needed where the layout's don't suffice, else
    0, and two flags; in the order of NEEDS."""
    found = (per_cell, neighbors, atoms, misused, narrow)
    return jnp.stack([jnp.asarray(x).astype(jnp.int32) for x in found])


def beyond(n: Int[jax.Array, "*B"], has: int) -> Int[jax.Array, "*B"]:
    """Returns n where it is more than `has`, else 0."""
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


Needing = TypeVar("Needing", Cache, Proposal)


def seen(x: Needing, layout: Layout) -> Needing:
    """Returns x.

    Raises: ValueError where its `needed` has a known value and says that something did not fit."""
    if not isinstance(x.needed, jax.core.Tracer):
        check(x.needed, layout)
    return x


def check(needed: Int[ArrayLike, "*B needs"], layout: Layout) -> None:
    """ValueError that says what did not fit and what to do, if anything is `needed`."""
    worst = np.asarray(needed).reshape(-1, len(NEEDS)).max(0)
    for n, (*texts, size) in zip(worst, NEEDS):
        if n:
            has = getattr(layout, size)
            raise ValueError(message(*(text.format(n=n, has=has) for text in texts)))


def system(graph: Graph) -> System:
    """Returns pos (N,3), atomic numbers (N,) as int32 and cell (3,3) of one system.

    Raises: ValueError where pos or atomic_numbers are missing, and for shapes and dtypes outside of
    the contract."""
    lacks = [k for k in ("pos", "atomic_numbers") if graph.get(k) is None]
    if lacks:
        raise ValueError(
            message(
                "a graph with pos and atomic_numbers",
                f"no {', '.join(lacks)}",
                "add what is missing",
            )
        )
    pos, numbers = jnp.asarray(graph["pos"]), jnp.asarray(graph["atomic_numbers"])
    given = graph.get("cell")
    cell = jnp.zeros((3, 3), pos.dtype) if given is None else jnp.asarray(given)
    cell = cell[0] if cell.shape == (1, 3, 3) else cell
    inputs = {
        "pos": pos,
        "atomic_numbers": numbers,
        "cell": cell[None],
        "batch": jnp.zeros(len(pos), int),
    }
    check_inputs(inputs, ())
    return pos, numbers.astype(jnp.int32), cell


def periodic(graph: Graph) -> Axes:
    """Returns which axes of a graph are periodic; without pbc all are, if there is a cell.

    Raises: ValueError inside of jit, vmap and scan, where values can't be seen."""
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


def check_periodic(graph: Graph, layout: Layout) -> None:
    """ValueError where the graph has a pbc with known values that is not the layout's."""
    pbc = graph.get("pbc")
    if pbc is None or isinstance(pbc, jax.core.Tracer):
        return
    got = _axes(pbc)
    if got != layout.periodic:
        raise ValueError(
            message(f"the layout's pbc {layout.periodic}", str(got), "allocate for this graph")
        )


def _axes(pbc: ArrayLike) -> Axes:
    """Three bools, from one or three."""
    x, y, z = np.broadcast_to(np.asarray(pbc).reshape(-1), 3)
    return bool(x), bool(y), bool(z)


def padded(
    pos: Float[jax.Array, "N 3"],
    numbers: Int[jax.Array, " N"],
    cell: Float[jax.Array, "3 3"],
    atoms: int,
) -> System:
    """Returns the system with absent atoms (number 0) appended up to `atoms` of them.

    Raises: ValueError for more atoms than that."""
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
