"""A cell list in a fixed number of slots, kept up to date change by change: every periodic image
within a cutoff, at a cost that knows no N."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

MARGIN = 1 + 1e-4  # cells are wider than the cutoff by more than rounding


@dataclass(frozen=True)
class Layout:
    """The sizes that a compiled program has fixed, from LocalPotential.allocate;
    dataclasses.replace gives others.

    atoms      slots for atoms, present and absent
    per_cell   slots for atoms in each cell of the list
    neighbors  slots for neighbours of each atom, periodic images counted singly
    periodic   which axes are
    grid       cells along each axis
    reach      how many cells away the cutoff ends, along each axis
    width      of the cells along open axes, Angstrom
    chunk      atoms that `full` evaluates in one call of each function
    """

    atoms: int
    per_cell: int
    neighbors: int
    periodic: tuple[bool, bool, bool]
    grid: tuple[int, int, int]
    reach: tuple[int, int, int]
    width: float
    chunk: int = 4096

    @property
    def cells(self):
        return math.prod(self.grid)

    @property
    def stencil(self):
        """Steps from a cell to those that the cutoff reaches: (S,3)."""
        return np.array(list(itertools.product(*(range(-r, r + 1) for r in self.reach))), np.int32)

    def images(self, moved):
        """Lattice translations (I,3) between `moved` atoms, wrapped into the cell, that can lie
        within the cutoff: one sees only its own images."""
        far = lambda n, r: r // n if moved == 1 else -(-(r + n) // n) - 1
        ranges = [far(n, r) if p else 0 for n, r, p in zip(self.grid, self.reach, self.periodic)]
        return np.array(list(itertools.product(*(range(-m, m + 1) for m in ranges))), np.int32)


class Space(NamedTuple):
    """A cell h (3,3) of rows, and u = (r - origin) @ to_grid, which counts cells of the list."""

    cell: jax.Array
    to_grid: jax.Array
    origin: jax.Array


class Cells(NamedTuple):
    """Who is where: `slots` (cells * per_cell,) holds atoms, or N where free; `slot` (N,) is its
    inverse, cells * per_cell for absent atoms."""

    slots: jax.Array
    slot: jax.Array


class Near(NamedTuple):
    """Neighbours of one atom in a fixed number of slots: atom j, r = r_j - r_i, which slots are
    used, how many there should be."""

    j: jax.Array
    r: jax.Array
    used: jax.Array
    count: jax.Array


def basis(cell, periodic, width):
    """Rows to count along: lattice vectors, and for open axes directions perpendicular to these,
    `width` long."""
    rows, open_axes = (
        {a: cell[a] for a in range(3) if periodic[a]},
        [a for a in range(3) if not periodic[a]],
    )
    if len(rows) == 2:
        new = [jnp.cross(*rows.values())]
    elif len(rows) == 1:
        (row,) = rows.values()
        across = jnp.cross(row, jnp.eye(3, dtype=cell.dtype)[jnp.argmin(abs(row))])
        new = [across, jnp.cross(row, across)]
    else:
        new = list(jnp.eye(3, dtype=cell.dtype))[: len(open_axes)]
    rows |= {a: width * v / jnp.linalg.norm(v) for a, v in zip(open_axes, new)}
    return jnp.stack([rows[a] for a in range(3)])


def space_of(cell, pos, here, layout) -> Space:
    """Where u = 0 is the lowest atom along open axes, and nothing special along periodic ones."""
    periodic = np.array(layout.periodic)
    inverse = jnp.linalg.inv(basis(cell, layout.periodic, layout.width)) * np.where(
        periodic, layout.grid, 1
    ).astype(cell.dtype)
    lowest = jnp.min(pos @ inverse, axis=0, initial=jnp.inf, where=here[:, None])
    u0 = jnp.where(periodic | ~jnp.isfinite(lowest), 0, lowest)
    return Space(cell, inverse, u0 @ jnp.linalg.inv(inverse))


def widths(space):
    """Of the cells of the list, perpendicular to each axis: (3,)."""
    return 1 / jnp.linalg.norm(space.to_grid, axis=0)


def wrap(space, layout, pos):
    """Into the cell along periodic axes: r = pos - n @ h, with the gradient of that at fixed n."""
    u = jax.lax.stop_gradient(pos - space.origin) @ jax.lax.stop_gradient(space.to_grid)
    n = jnp.where(np.array(layout.periodic), jnp.floor(u / np.array(layout.grid, u.dtype)), 0)
    return pos - n @ space.cell


def cell_of(space, layout, pos):
    """The three indices of the cell that holds r; beyond the ends of open axes, the last one."""
    u = jnp.floor((pos - space.origin) @ space.to_grid).astype(jnp.int32)
    return jnp.clip(u, 0, np.array(layout.grid) - 1)


def flat(layout, index):
    """(..., 3) -> the number of a cell."""
    return (index[..., 0] * layout.grid[1] + index[..., 1]) * layout.grid[2] + index[..., 2]


def fill(space, layout, pos, here) -> tuple[Cells, jax.Array]:
    """The list from nothing, and how many slots its fullest cell needs; `here` (N,) tells which
    atoms are present."""
    number = jnp.where(here, flat(layout, cell_of(space, layout, pos)), layout.cells)
    order = jnp.argsort(number)
    ranked = number[order]
    rank = jnp.arange(layout.atoms) - jnp.searchsorted(ranked, ranked)
    fits = (ranked < layout.cells) & (rank < layout.per_cell)
    end = layout.cells * layout.per_cell
    slot = (
        jnp.zeros(layout.atoms, jnp.int32)
        .at[order]
        .set(jnp.where(fits, ranked * layout.per_cell + rank, end).astype(jnp.int32))
    )
    slots = (
        jnp.full(end, layout.atoms, jnp.int32)
        .at[slot]
        .set(jnp.arange(layout.atoms, dtype=jnp.int32), mode="drop")
    )
    return Cells(slots, slot), jnp.max(jnp.where(ranked < layout.cells, rank + 1, 0), initial=0)


def candidates(space, layout, slots, here):
    """Atoms (S,P) in the cells that the cutoff reaches from r, N for none, and the lattice
    translation (S,3) of each cell."""
    grid, periodic = np.array(layout.grid), np.array(layout.periodic)
    at = cell_of(space, layout, here) + layout.stencil
    images = jnp.where(periodic, jnp.floor_divide(at, grid), 0)
    number = flat(layout, at - images * grid)
    if not all(layout.periodic):
        number = jnp.where((periodic | ((at >= 0) & (at < grid))).all(-1), number, layout.cells)
    places = number[:, None] * layout.per_cell + np.arange(layout.per_cell)
    return jnp.take(slots, places, mode="fill", fill_value=layout.atoms), images


def near(space, layout, cutoff, pos, slots, here, index, without=None, more=None) -> Near:
    """Neighbours of the atom `index` at r = `here` in the list, but for the atoms `without` (K,);
    `more` gives further candidates (j, r, used)."""
    j, images = candidates(space, layout, slots, here)
    # -r, to the bit, from the other end
    r = (jnp.take(pos, j, axis=0, mode="clip") - here) + (images.astype(pos.dtype) @ space.cell)[
        :, None
    ]
    used = (j < layout.atoms) & ~((j == index) & (images == 0).all(-1)[:, None])
    j, r, used = j.reshape(-1), r.reshape(-1, 3), used.reshape(-1)
    if without is not None:
        used &= ~(j[:, None] == without).any(-1)
    used &= (r**2).sum(-1) < cutoff**2
    if more is not None:
        j, r, used = (jnp.concatenate(pair) for pair in zip((j, r, used), more))
    kept = jnp.nonzero(used, size=layout.neighbors, fill_value=len(used))[0]
    count = used.sum()
    return Near(j[kept], r[kept], jnp.arange(layout.neighbors) < count, count)


def place(space, layout, cells, index, pos, here):
    """Slots (K,) of atoms that move, before and after, all of them taken out first; what cells
    would need where one is full, else 0."""
    number = jnp.where(here, flat(layout, cell_of(space, layout, pos)), layout.cells)
    slots = number[:, None] * layout.per_cell + np.arange(layout.per_cell)
    holds = jnp.take(cells.slots, slots, mode="fill", fill_value=-1)
    free = (holds == layout.atoms) | (holds[:, :, None] == index).any(-1) & (holds >= 0)
    before = jnp.tril(number[:, None] == number, -1).sum(-1)
    this = free & (jnp.cumsum(free, -1) == before[:, None] + 1)
    fits = this.any(-1) & here
    needed = jnp.where(here & ~fits, layout.per_cell - free.sum(-1) + before + 1, 0)
    slot = jnp.where(
        fits, number * layout.per_cell + jnp.argmax(this, -1), layout.cells * layout.per_cell
    )
    return _slot(layout, cells, index), slot.astype(jnp.int32), jnp.max(needed, initial=0)


def _slot(layout, cells, index):
    """Where atoms are, or the end, by a maximum over their cell: XLA would read `slot[index]` anew
    as it writes `slot`, and copy that before."""
    end = layout.cells * layout.per_cell
    first = (
        jnp.take(cells.slot, index, mode="fill", fill_value=end)
        // layout.per_cell
        * layout.per_cell
    )
    slots = first[:, None] + np.arange(layout.per_cell)
    held = jnp.take(cells.slots, slots, mode="fill", fill_value=-1) == index[:, None]
    found = jnp.max(jnp.where(held, slots, -1), axis=1)
    return jnp.where(found < 0, end, found)


def move(layout, cells, index, old, slot, yes) -> Cells:
    """The list after atoms `index` (K,) went from slots `old` to `slot`; where `yes` is False, the
    same bits."""
    end, i = layout.cells * layout.per_cell, jnp.where(yes, index, layout.atoms)
    slots = cells.slots.at[jnp.where(yes, old, end)].set(layout.atoms, mode="drop")
    slots = slots.at[jnp.where(yes, slot, end)].set(index.astype(jnp.int32), mode="drop")
    return Cells(slots, cells.slot.at[i].set(slot, mode="drop"))


def build(cell, pos, here, layout, cutoff):
    """Space, wrapped positions, the list, and how many slots its fullest cell needs."""
    space = space_of(cell, pos, here, layout)
    pos = wrap(space, layout, pos)
    return space, pos, *fill(jax.lax.stop_gradient(space), layout, jax.lax.stop_gradient(pos), here)


def neighbors(space, layout, cutoff, pos, here, cells, index):
    """Those of the atoms `index` (A,), by `near`."""
    found = jax.vmap(lambda i: near(space, layout, cutoff, pos, cells.slots, pos[i], i))(index)
    present = here[index]
    return found._replace(
        used=found.used & present[:, None], count=jnp.where(present, found.count, 0)
    )


def layout_of(pos, here, cell, periodic, cutoff, chunk) -> Layout:
    """Sizes that just fit systems pos (B,N,3), here (B,N), cell (B,3,3)."""
    atoms, coarser = pos.shape[1], 1
    while True:
        width = coarser * cutoff * MARGIN
        shapes = [
            _grid(p[h], np.asarray(basis(c, periodic, width)), periodic, width)
            for p, h, c in zip(pos, here, cell)
        ]
        grid = tuple(min(n) if p else max(n) for n, p in zip(zip(*shapes), periodic))
        if math.prod(grid) <= max(27, 4 * atoms):
            break
        coarser *= 2
    thin = np.min(
        [_heights(np.asarray(basis(c, periodic, width))) for c in cell], axis=0
    ) / np.array(grid)
    far = cutoff * (1 + MARGIN) / 2  # beyond what rounding makes of the widths
    reach = tuple(
        math.ceil(far / w) if p else min(n - 1, 1) for n, w, p in zip(grid, thin, periodic)
    )
    layout = Layout(atoms, 1, 1, periodic, grid, reach, width, chunk)
    fullest = max(int(build(c, p, h, layout, cutoff)[3]) for p, h, c in zip(pos, here, cell))
    layout = replace(layout, per_cell=max(fullest, 1))
    return replace(
        layout,
        neighbors=max(1, *(_most(c, p, h, layout, cutoff) for p, h, c in zip(pos, here, cell))),
    )


def _most(cell, pos, here, layout, cutoff):
    """Neighbours of the atom that has most of them."""
    here = jnp.asarray(here)
    space, pos, cells, _ = build(cell, pos, here, layout, cutoff)
    count = lambda i: neighbors(space, layout, cutoff, pos, here, cells, i[None]).count[0]
    return int(
        jax.jit(
            lambda: jax.lax.map(count, jnp.arange(layout.atoms), batch_size=layout.chunk).max(
                initial=0
            )
        )()
    )


def _heights(rows):
    return 1 / np.linalg.norm(np.linalg.inv(rows), axis=0)


def _grid(pos, rows, periodic, width):
    """Cells along each axis: no narrower than `width`, along open axes for all atoms."""
    extent = np.ptp(pos @ np.linalg.inv(rows), axis=0) if len(pos) else np.zeros(3)
    return [
        max(1, int(h / width)) if p else int(e) + 1
        for h, e, p in zip(_heights(rows), extent, periodic)
    ]
