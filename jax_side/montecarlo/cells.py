"""A cell list in a fixed number of slots, kept up to date change by change: every periodic image
within a cutoff, at a cost that knows no N."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

MARGIN = 1 + 1e-4  # cells are wider than the cutoff by more than rounding

Axes = tuple[bool, bool, bool]  # which axes are periodic


@dataclass(frozen=True)
class Layout:
    """The sizes that are fixed in a compiled program. LocalPotential.allocate makes one;
    dataclasses.replace changes it.

    atoms      slots for atoms, present and absent
    per_cell   slots for atoms in each cell of the list
    neighbors  slots for neighbours of each atom, periodic images counted singly
    periodic   which axes are periodic
    grid       number of cells along each axis
    reach      how many cells away the cutoff ends, along each axis
    width      width of the cells along open axes, in Angstrom
    chunk      number of atoms that `full` evaluates in one call of each function
    """

    atoms: int
    per_cell: int
    neighbors: int
    periodic: Axes
    grid: tuple[int, int, int]
    reach: tuple[int, int, int]
    width: float
    chunk: int = 4096

    @property
    def cells(self) -> int:
        """The number of cells of the list."""
        return math.prod(self.grid)

    @property
    def stencil(self) -> Int[np.ndarray, "S 3"]:
        """Steps (S,3) from a cell to those that the cutoff reaches."""
        return _steps(self.reach)

    def images(self, moved: int) -> Int[np.ndarray, "I 3"]:
        """Returns lattice translations (I,3), among them all by which two of the `moved` atoms,
        wrapped into the cell, can lie within the cutoff of one another.

        A single atom sees only its own images."""

        def farthest(n: int, reach: int) -> int:
            return reach // n if moved == 1 else -(-(reach + n) // n) - 1

        axes = zip(self.grid, self.reach, self.periodic)
        return _steps([farthest(n, reach) if periodic else 0 for n, reach, periodic in axes])


def _steps(far: Sequence[int]) -> Int[np.ndarray, "S 3"]:
    """All triples of integers from -far to far along each axis."""
    ranges = [range(-n, n + 1) for n in far]
    return np.array(list(itertools.product(*ranges)), np.int32)


class Space(NamedTuple):
    """A cell h (3,3) of rows in Angstrom, and coordinates u = (r - origin) @ to_grid that count
    cells of the list."""

    cell: Float[jax.Array, "3 3"]
    to_grid: Float[jax.Array, "3 3"]
    origin: Float[jax.Array, " 3"]


class Cells(NamedTuple):
    """Which atom is in which slot of the list.

    `slots` (cells * per_cell,) holds the index of an atom, or N where a slot is free. `slot` (N,)
    is its inverse, cells * per_cell for absent atoms."""

    slots: Int[jax.Array, " slots"]
    slot: Int[jax.Array, " N"]


class Near(NamedTuple):
    """Neighbours of one atom (or, with leading axes, of several) in P slots: the atom j, r = r_j -
    r_i in Angstrom, which slots are used, and how many there should be."""

    j: Int[jax.Array, "*atoms P"]
    r: Float[jax.Array, "*atoms P 3"]
    used: Bool[jax.Array, "*atoms P"]
    count: Int[jax.Array, "*atoms"]


def basis(cell: Float[ArrayLike, "3 3"], periodic: Axes, width: float) -> Float[jax.Array, "3 3"]:
    """Returns the vectors (rows) along which cells are counted.

    They are the lattice vectors of periodic axes. For open axes they are perpendicular to these,
    and `width` long."""
    h = jnp.asarray(cell)
    rows = {a: h[a] for a in range(3) if periodic[a]}
    open_axes = [a for a in range(3) if not periodic[a]]
    if len(rows) == 2:
        first, second = rows.values()
        new = [jnp.cross(first, second)]
    elif len(rows) == 1:
        (row,) = rows.values()
        across = jnp.cross(row, jnp.eye(3, dtype=h.dtype)[jnp.argmin(abs(row))])
        new = [across, jnp.cross(row, across)]
    else:
        new = list(jnp.eye(3, dtype=h.dtype))[: len(open_axes)]
    rows |= {a: width * v / jnp.linalg.norm(v) for a, v in zip(open_axes, new)}
    return jnp.stack([rows[a] for a in range(3)])


def space_of(
    cell: Float[jax.Array, "3 3"],
    pos: Float[jax.Array, "N 3"],
    here: Bool[jax.Array, " N"],
    layout: Layout,
) -> Space:
    """Returns the coordinates in which cells are counted. Along open axes u = 0 is at the lowest
    atom that is present (`here`); along periodic axes it is at r = 0."""
    periodic = np.array(layout.periodic)
    per_row = np.where(periodic, layout.grid, 1).astype(cell.dtype)
    inverse = jnp.linalg.inv(basis(cell, layout.periodic, layout.width)) * per_row
    lowest = jnp.min(pos @ inverse, axis=0, initial=jnp.inf, where=here[:, None])
    u0 = jnp.where(periodic | ~jnp.isfinite(lowest), 0, lowest)
    return Space(cell, inverse, u0 @ jnp.linalg.inv(inverse))


def widths(space: Space) -> Float[jax.Array, " 3"]:
    """Returns the widths (3,) of the cells of the list, perpendicular to each axis, in Angstrom."""
    return 1 / jnp.linalg.norm(space.to_grid, axis=0)


def wrap(space: Space, layout: Layout, pos: Float[jax.Array, "*K 3"]) -> Float[jax.Array, "*K 3"]:
    """Returns positions wrapped into the cell along periodic axes: r = pos - n @ h, with the
    gradient of that at fixed n."""
    u = jax.lax.stop_gradient(pos - space.origin) @ jax.lax.stop_gradient(space.to_grid)
    n = jnp.where(np.array(layout.periodic), jnp.floor(u / np.array(layout.grid, u.dtype)), 0)
    return pos - n @ space.cell


def cell_of(space: Space, layout: Layout, pos: Float[jax.Array, "*K 3"]) -> Int[jax.Array, "*K 3"]:
    """Returns the three indices of the cell that holds r. Beyond the ends of open axes it is the
    last cell."""
    u = jnp.floor((pos - space.origin) @ space.to_grid).astype(jnp.int32)
    return jnp.clip(u, 0, np.array(layout.grid) - 1)


def flat(layout: Layout, index: Int[jax.Array, "*K 3"]) -> Int[jax.Array, "*K"]:
    """Returns the number of a cell from its three indices."""
    return (index[..., 0] * layout.grid[1] + index[..., 1]) * layout.grid[2] + index[..., 2]


def fill(
    space: Space, layout: Layout, pos: Float[jax.Array, "N 3"], here: Bool[jax.Array, " N"]
) -> tuple[Cells, Int[jax.Array, ""]]:
    """Returns the list made from nothing, and how many slots its fullest cell needs. `here` (N,)
    tells which atoms are present."""
    number = jnp.where(here, flat(layout, cell_of(space, layout, pos)), layout.cells)
    order = jnp.argsort(number)
    ranked = number[order]
    rank = jnp.arange(layout.atoms) - jnp.searchsorted(ranked, ranked)
    fits = (ranked < layout.cells) & (rank < layout.per_cell)
    end = layout.cells * layout.per_cell
    places = jnp.where(fits, ranked * layout.per_cell + rank, end).astype(jnp.int32)
    slot = jnp.zeros(layout.atoms, jnp.int32).at[order].set(places)
    atoms = jnp.arange(layout.atoms, dtype=jnp.int32)
    slots = jnp.full(end, layout.atoms, jnp.int32).at[slot].set(atoms, mode="drop")
    return Cells(slots, slot), jnp.max(jnp.where(ranked < layout.cells, rank + 1, 0), initial=0)


def candidates(
    space: Space,
    layout: Layout,
    slots: Int[jax.Array, " slots"],
    here: Float[jax.Array, " 3"],
) -> tuple[Int[jax.Array, "S P"], Int[jax.Array, "S 3"]]:
    """Returns the atoms (S,P) in the cells that the cutoff reaches from r = `here`, N where there
    is none, and the lattice translation (S,3) of each cell."""
    grid, periodic = np.array(layout.grid), np.array(layout.periodic)
    at = cell_of(space, layout, here) + layout.stencil
    images = jnp.where(periodic, jnp.floor_divide(at, grid), 0)
    number = flat(layout, at - images * grid)
    if not all(layout.periodic):
        exists = (periodic | ((at >= 0) & (at < grid))).all(-1)
        number = jnp.where(exists, number, layout.cells)
    places = number[:, None] * layout.per_cell + np.arange(layout.per_cell)
    return jnp.take(slots, places, mode="fill", fill_value=layout.atoms), images


def near(
    space: Space,
    layout: Layout,
    cutoff: float,
    pos: Float[jax.Array, "N 3"],
    slots: Int[jax.Array, " slots"],
    here: Float[jax.Array, " 3"],
    index: Int[jax.Array, ""],
    without: Int[jax.Array, " K"] | None = None,
    more: tuple[jax.Array, jax.Array, jax.Array] | None = None,
) -> Near:
    """Returns the neighbours within the cutoff of the atom `index` at r = `here`.

    They are those in the list, except for the atoms `without` (K,). `more` gives further neighbours
    as (j, r, used)."""
    j, images = candidates(space, layout, slots, here)
    # In this order of additions r is, to the bit, the negative of what the other end sees.
    shifts = images.astype(pos.dtype) @ space.cell
    r = (jnp.take(pos, j, axis=0, mode="clip") - here) + shifts[:, None]
    itself = (j == index) & (images == 0).all(-1)[:, None]
    used = (j < layout.atoms) & ~itself
    j, r, used = j.reshape(-1), r.reshape(-1, 3), used.reshape(-1)
    if without is not None:
        used &= ~(j[:, None] == without).any(-1)
    used &= (r**2).sum(-1) < cutoff**2
    if more is not None:
        j, r, used = (jnp.concatenate(pair) for pair in zip((j, r, used), more))
    kept = jnp.nonzero(used, size=layout.neighbors, fill_value=len(used))[0]
    count = used.sum()
    return Near(j[kept], r[kept], jnp.arange(layout.neighbors) < count, count)


def place(
    space: Space,
    layout: Layout,
    cells: Cells,
    index: Int[jax.Array, " K"],
    pos: Float[jax.Array, "K 3"],
    here: Bool[jax.Array, " K"],
) -> tuple[Int[jax.Array, " K"], Int[jax.Array, " K"], Int[jax.Array, ""]]:
    """Returns the slots (K,) of atoms before and after they move to `pos`, and how many slots a
    cell would need where one is full, else 0.

    All K atoms are taken out of the list before the first is put in again. `here` (K,) tells which
    are present afterwards."""
    number = jnp.where(here, flat(layout, cell_of(space, layout, pos)), layout.cells)
    slots = number[:, None] * layout.per_cell + np.arange(layout.per_cell)
    holds = jnp.take(cells.slots, slots, mode="fill", fill_value=-1)
    free = (holds == layout.atoms) | (holds[:, :, None] == index).any(-1) & (holds >= 0)
    before = jnp.tril(number[:, None] == number, -1).sum(-1)
    this = free & (jnp.cumsum(free, -1) == before[:, None] + 1)
    fits = this.any(-1) & here
    needed = jnp.where(here & ~fits, layout.per_cell - free.sum(-1) + before + 1, 0)
    end = layout.cells * layout.per_cell
    slot = jnp.where(fits, number * layout.per_cell + jnp.argmax(this, -1), end)
    return _slot(layout, cells, index), slot.astype(jnp.int32), jnp.max(needed, initial=0)


def _slot(layout: Layout, cells: Cells, index: Int[jax.Array, " K"]) -> Int[jax.Array, " K"]:
    """Where atoms are in the list, cells * per_cell for absent ones.

    It is found by a maximum over the atom's cell. XLA would compute a mere `slot[index]` again
    while it writes `slot`, and would copy the array before that."""
    end = layout.cells * layout.per_cell
    held = jnp.take(cells.slot, index, mode="fill", fill_value=end)
    first = held // layout.per_cell * layout.per_cell
    slots = first[:, None] + np.arange(layout.per_cell)
    held = jnp.take(cells.slots, slots, mode="fill", fill_value=-1) == index[:, None]
    found = jnp.max(jnp.where(held, slots, -1), axis=1)
    return jnp.where(found < 0, end, found)


def move(
    layout: Layout,
    cells: Cells,
    index: Int[jax.Array, " K"],
    old: Int[jax.Array, " K"],
    slot: Int[jax.Array, " K"],
    yes: Bool[jax.Array, ""],
) -> Cells:
    """Returns the list after atoms `index` (K,) went from slots `old` to `slot`; where `yes` is
    False, the same bits as before."""
    end, i = layout.cells * layout.per_cell, jnp.where(yes, index, layout.atoms)
    slots = cells.slots.at[jnp.where(yes, old, end)].set(layout.atoms, mode="drop")
    slots = slots.at[jnp.where(yes, slot, end)].set(index.astype(jnp.int32), mode="drop")
    return Cells(slots, cells.slot.at[i].set(slot, mode="drop"))


def build(
    cell: Float[jax.Array, "3 3"],
    pos: Float[jax.Array, "N 3"],
    here: Bool[jax.Array, " N"],
    layout: Layout,
    cutoff: float,
) -> tuple[Space, Float[jax.Array, "N 3"], Cells, Int[jax.Array, ""]]:
    """Returns the space, wrapped positions, the list, and how many slots its fullest cell needs."""
    space = space_of(cell, pos, here, layout)
    pos = wrap(space, layout, pos)
    fixed_space, fixed_pos = jax.lax.stop_gradient((space, pos))
    return space, pos, *fill(fixed_space, layout, fixed_pos, here)


def neighbors(
    space: Space,
    layout: Layout,
    cutoff: float,
    pos: Float[jax.Array, "N 3"],
    here: Bool[jax.Array, " N"],
    cells: Cells,
    index: Int[jax.Array, " A"],
) -> Near:
    """Returns the neighbours of the atoms `index` (A,), each by `near`."""
    found = jax.vmap(lambda i: near(space, layout, cutoff, pos, cells.slots, pos[i], i))(index)
    present = here[index]
    return found._replace(
        used=found.used & present[:, None], count=jnp.where(present, found.count, 0)
    )


def layout_of(
    pos: Float[np.ndarray, "B N 3"],
    here: Bool[np.ndarray, "B N"],
    cell: Float[np.ndarray, "B 3 3"],
    periodic: Axes,
    cutoff: float,
    chunk: int,
) -> Layout:
    """Returns the sizes that just fit the systems given. `here` tells which atoms are present."""
    atoms, coarser = pos.shape[1], 1
    while True:
        width = coarser * cutoff * MARGIN
        shapes = [
            _grid(p[h], np.asarray(basis(c, periodic, width)), periodic, width)
            for p, h, c in zip(pos, here, cell)
        ]
        # no cell of any system is too narrow, and every atom along open axes has one
        along = [min(n) if p else max(n) for n, p in zip(zip(*shapes), periodic)]
        grid = (along[0], along[1], along[2])
        if math.prod(grid) <= max(27, 4 * atoms):
            break
        coarser *= 2
    heights = [_heights(np.asarray(basis(c, periodic, width))) for c in cell]
    thin = np.min(heights, axis=0) / np.array(grid)
    far = cutoff * (1 + MARGIN) / 2  # beyond what rounding makes of the widths
    steps = [math.ceil(far / w) if p else min(n - 1, 1) for n, w, p in zip(grid, thin, periodic)]
    reach = (steps[0], steps[1], steps[2])
    layout = Layout(atoms, 1, 1, periodic, grid, reach, width, chunk)
    systems = list(zip(cell, pos, here))
    fullest = max(int(build(c, p, h, layout, cutoff)[3]) for c, p, h in systems)
    layout = replace(layout, per_cell=max(fullest, 1))
    most = max(_most(c, p, h, layout, cutoff) for c, p, h in systems)
    return replace(layout, neighbors=max(1, most))


def _most(cell: Any, pos: Any, here: Any, layout: Layout, cutoff: float) -> int:
    """The number of neighbours of the atom that has most of them."""
    here = jnp.asarray(here)
    space, pos, cells, _ = build(cell, pos, here, layout, cutoff)
    count = lambda i: neighbors(space, layout, cutoff, pos, here, cells, i[None]).count[0]

    @jax.jit
    def most():
        counts = jax.lax.map(count, jnp.arange(layout.atoms), batch_size=layout.chunk)
        return counts.max(initial=0)

    return int(most())


def _heights(rows: Float[np.ndarray, "3 3"]) -> Float[np.ndarray, " 3"]:
    """Distances between opposite faces of a cell."""
    return 1 / np.linalg.norm(np.linalg.inv(rows), axis=0)


def _grid(
    pos: Float[np.ndarray, "N 3"], rows: Float[np.ndarray, "3 3"], periodic: Axes, width: float
) -> list[int]:
    """The number of cells along each axis. Along periodic axes none is narrower than `width`, along
    open axes there are enough for all atoms."""
    extent = np.ptp(pos @ np.linalg.inv(rows), axis=0) if len(pos) else np.zeros(3)
    return [
        max(1, int(h / width)) if p else int(e) + 1
        for h, e, p in zip(_heights(rows), extent, periodic)
    ]
