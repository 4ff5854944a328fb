"""Whether minimum images are all that a potential needs, and whether a jax-md list has them."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike
from jaxtyping import Bool, Float

from bridge.card import Card
from bridge.errors import message

# Relative. A pair whose distance is that close to its cutoff has no energy to speak of.
ROUNDING = 1e-6

Cell = Float[Any, "3 3"]  # by rows, Angstrom, of NumPy or JAX
Verdict = bool | Bool[jax.Array, ""]  # True, or an array whose value a trace hides


def cutoff_of(card: Card | None, given: float | None) -> float | None:
    """Returns the cutoff of a potential in Angstrom: the card's, else what the caller gives, else
    None.

    Raises: ValueError for a cutoff that is not positive, and where the two differ."""
    own = getattr(card, "cutoff", None)
    if given is None:
        return own
    if not 0 < given < float("inf"):
        raise ValueError(
            message("a positive cutoff in Angstrom", str(given), "pass the potential's reach")
        )
    if own is not None and abs(own - given) > ROUNDING * own:
        raise ValueError(
            message("one cutoff", f"{given}, and {own} on the card", "leave cutoff out")
        )
    return float(given)


def reach(neighbor: Any) -> float | None:
    """Returns the cutoff of a jax-md list in Angstrom, skin included; None where it can't be read.

    jax-md keeps it in a closure and nowhere else."""
    function = neighbor.update_fn
    kept = inspect.getclosurevars(function).nonlocals if inspect.isfunction(function) else {}
    seen = known(kept.get("cutoff"))
    return None if seen is None else float(seen)


def check_width(
    cell: Cell,
    cutoff: float | ArrayLike,
    who: str,
    do: str,
    kind: str = "cutoff",
) -> Verdict:
    """Returns True where all pairs closer than `cutoff` are minimum images; a traced bool inside
    jit.

    The cutoff is in Angstrom, the cell (3,3) by rows. The condition is that opposite faces of the
    cell are at least twice the cutoff apart, whatever its shape. A pair within the cutoff is then
    less than half of each lattice vector apart. For the error text, `who` takes minimum images,
    `do` is the remedy, and `kind` says which cutoff it is.

    Raises: ValueError where the cell is known to be narrower."""
    seen = known(cell)
    height = heights(cell if seen is None else seen).min()
    wide = (1 + ROUNDING) * height >= 2 * cutoff
    faces = "between opposite faces of the box"
    expected = (
        f"at least {_number(cutoff, 2)} Angstrom {faces}, twice the {kind} of {_number(cutoff)}"
    )
    got = f"{_number(height)}, where {who} has one image of each pair alone"
    return _verdict(wide, seen is not None, expected, got, do)


def check_list(
    neighbor: Any,
    cell: Cell | None,
    cutoff: float | None,
    fractional: bool,
) -> Verdict:
    """Returns True where a jax-md list has all edges up to `cutoff`; a traced bool inside jit.

    The cutoff is in Angstrom, and None stands for the list's own. The cell is (3,3) by rows, None
    in free space. Four things are checked: that the cell is wide enough for minimum images, that
    the list reaches as far as the cutoff, jax-md's own flags, and, for a list in `fractional`
    coordinates, the width of the cells in which it was made (which jax-md computes for boxes that
    are upper triangular).

    Raises: ValueError where edges are known to be missing, and where no cutoff is known."""
    listed = reach(neighbor)
    if cutoff is None:
        cutoff = listed
    if listed is not None and cutoff is not None and listed < (1 - ROUNDING) * cutoff:
        expected = f"a neighbour list up to the potential's cutoff of {_number(cutoff)} Angstrom"
        got = f"one up to {_number(listed)}, skin included"
        raise ValueError(
            message(expected, got, "pass a longer r_cutoff to partition.neighbor_list")
        )
    if cell is not None and cutoff is None:
        expected = "the cutoff of a potential that is given a neighbour list, in Angstrom"
        raise ValueError(message(expected, "none", "pass cutoff=..."))
    verdicts = [_check_flags(neighbor)]
    if cell is not None and cutoff is not None:
        listed = listed or cutoff
        verdicts.append(_check_images(cell, cutoff, listed))
        if fractional and neighbor.cell_list_fn is not None:
            verdicts.append(_check_cells(cell, listed, neighbor.cell_size))
    unknown = [verdict for verdict in verdicts if verdict is not True]
    return jnp.stack(unknown).all() if unknown else True


def _check_flags(neighbor: Any) -> Verdict:
    """jax-md's own flags: pairs that found no room, and cells that became too narrow as the box
    shrank."""
    seen = known(neighbor.error.code)
    if seen is not None:
        neighbor = replace(neighbor, error=replace(neighbor.error, code=seen))
    full, outgrown = neighbor.did_buffer_overflow != 0, neighbor.cell_size_too_small != 0
    got = "one that its box has outgrown (cell_size_too_small)"
    if seen is not None and full:
        got = "one that overflowed (did_buffer_overflow)"
    do = "allocate it anew (neighbor_fn.allocate)"
    return _verdict(
        ~(full | outgrown), seen is not None, "a neighbour list that has all pairs", got, do
    )


def _check_images(cell: Cell, cutoff: float, listed: float) -> Verdict:
    """Whether the cell is wide enough for a list whose own cutoff is `listed`, skin included.

    In a skewed box the skin counts as well: the nearest image by fractions may be out of the
    list's reach while another image is within it."""
    seen = known(cell)
    xp, cell = (jnp, cell) if seen is None else (np, seen)
    products = cell @ cell.T
    sizes = xp.sqrt(xp.diagonal(products))
    skewed = (abs(products) > ROUNDING * sizes * sizes[:, None]).sum() > 3
    kind = "cutoff"
    if listed > cutoff and seen is not None and skewed:
        kind = "cutoff with its skin (the box is skewed)"
    do = "leave neighbor out (torch then finds all images), or give the potential edges "
    do += "by bridge.edges"
    return check_width(cell, xp.where(skewed, listed, cutoff), "a jax-md list", do, kind)


def _check_cells(cell: Cell, listed: float, size: ArrayLike) -> Verdict:
    """Whether the cells in which a list was made are as wide as its cutoff, so that neighbours are
    in adjacent cells. `size` is the width of these cells in fractional coordinates."""
    seen = known(cell)
    along = np.floor(1 / np.asarray(size))  # how many there are on each axis
    width = heights(cell if seen is None else seen).min() / along
    expected = (
        f"a neighbour list made in cells at least {_number(listed)} Angstrom wide, its cutoff"
    )
    got = f"cells of {_number(width)} (jax-md computes them for upper triangular boxes)"
    do = "allocate it in this box, upper triangular, or pass disable_cell_list=True to "
    do += "partition.neighbor_list"
    return _verdict((1 + ROUNDING) * width >= listed, seen is not None, expected, got, do)


def heights(cell: Cell) -> Float[Any, " 3"]:
    """Returns the distances (3,) between opposite faces of a cell (3,3) by rows, in NumPy for a
    NumPy array and in JAX otherwise."""
    xp = np if isinstance(cell, np.ndarray) else jnp
    a, b, c = cell
    faces = xp.stack([xp.cross(b, c), xp.cross(c, a), xp.cross(a, b)])
    areas = xp.linalg.norm(faces, axis=-1)
    return abs((cell * faces).sum(-1)) / xp.where(areas == 0, 1, areas)


def known(x: ArrayLike | None) -> np.ndarray | None:
    """Returns x as NumPy, floats in float64. None where x has no value yet, as inside jit and vmap,
    or is None."""
    if isinstance(x, jax.core.Tracer):
        x = jax.lax.stop_gradient(x)
    if x is None or isinstance(x, jax.core.Tracer):
        return None
    x = np.asarray(x)
    return x.astype(np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x


@jax.custom_jvp
def where_sound(
    sound: Bool[jax.Array, ""], x: Float[jax.Array, "*shape"], instead: Float[jax.Array, "*shape"]
) -> Float[jax.Array, "*shape"]:
    """Returns x where `sound`, else `instead`, whose derivative is NaN."""
    return jnp.where(sound, x, instead)


def _where_sound_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    dx = tangents[1]
    if not isinstance(dx, SymbolicZero):
        dx = or_nan(primals[0], dx)
    return where_sound(*primals), dx


where_sound.defjvp(_where_sound_jvp, symbolic_zeros=True)


def or_nan(sound: Bool[ArrayLike, ""], x: Float[jax.Array, "*shape"]) -> Float[jax.Array, "*shape"]:
    """Returns x where `sound`, else NaN, in derivatives as well."""
    return x * jnp.where(sound, 1, jnp.nan).astype(x.dtype)


def _verdict(fine: Any, seen: bool, expected: str, got: str, do: str) -> Verdict:
    """True where `fine` is seen to hold, `fine` itself where a trace hides its value; ValueError
    where it is seen not to hold."""
    if seen and not fine:
        raise ValueError(message(expected, got, do))
    return True if seen else fine


def _number(x: ArrayLike, times: int = 1) -> str:
    """A number of Angstrom for an error text."""
    seen = known(x)
    return "?" if seen is None else f"{times * float(seen):.7g}"
