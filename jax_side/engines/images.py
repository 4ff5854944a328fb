"""Whether minimum images are all that a potential needs, and whether a jax-md list has them."""

from __future__ import annotations

import inspect
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from bridge.errors import message

ROUNDING = 1e-6  # relative; that close to its cutoff a pair has no energy to speak of


def cutoff_of(card, given):
    """The cutoff of a potential in Angstrom: the card's, else what the caller gives, else None.

    Raises: ValueError for one that is not positive, and where the two differ."""
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


def reach(neighbor):
    """The cutoff of a jax-md list, skin included; None where it can't be read.

    jax-md keeps it in a closure alone."""
    function = neighbor.update_fn
    kept = inspect.getclosurevars(function).nonlocals if inspect.isfunction(function) else {}
    seen = known(kept.get("cutoff"))
    return None if seen is None else float(seen)


def check_width(cell, cutoff, who, do, kind="cutoff"):
    """True where pairs closer than `cutoff` are minimum images; a traced bool inside jit.

    The cutoff is in Angstrom, the cell (3,3) by rows. They are where opposite faces are twice the
    cutoff apart, whatever the shape: such a pair is then less than half of each lattice vector
    apart. `who` takes minimum images; `do` is the cure, `kind` what cutoff it is.

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


def check_list(neighbor, cell, cutoff, fractional):
    """True where a jax-md list has all edges up to `cutoff`; a traced bool inside jit.

    The cutoff is in Angstrom, None for the list's own; the cell (3,3) by rows, None in free space.
    Beyond the cell's width, what counts are the list's own cutoff, jax-md's flags, and the width of
    the cells that a list is made in (jax-md computes it for boxes that are upper triangular).

    Raises: ValueError where edges are known to be missing, and where nobody gives a cutoff."""
    listed = reach(neighbor)
    cutoff = listed if cutoff is None else cutoff
    if cutoff is None and cell is not None:
        expected = "the cutoff of a potential that is given a neighbour list, in Angstrom"
        raise ValueError(message(expected, "none", "pass cutoff=..."))
    if None not in (listed, cutoff) and listed < (1 - ROUNDING) * cutoff:
        expected = f"a neighbour list up to the potential's cutoff of {_number(cutoff)} Angstrom"
        got = f"one up to {_number(listed)}, skin included"
        raise ValueError(
            message(expected, got, "pass a longer r_cutoff to partition.neighbor_list")
        )
    verdicts = [_check_flags(neighbor)]
    if cell is not None:
        verdicts.append(_check_images(cell, cutoff, listed or cutoff))
        if fractional and neighbor.cell_list_fn is not None:
            verdicts.append(_check_cells(cell, listed or cutoff, neighbor.cell_size))
    unknown = [verdict for verdict in verdicts if verdict is not True]
    return jnp.stack(unknown).all() if unknown else True


def _check_flags(neighbor):
    """jax-md's own: pairs that found no room, cells that became too narrow as the box shrank."""
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


def _check_images(cell, cutoff, listed):
    """In a skewed box the skin counts as well.

    There the nearest image by fractions may be out of the list's reach while another is within."""
    seen = known(cell)
    xp, cell = (jnp, cell) if seen is None else (np, seen)
    products = cell @ cell.T
    sizes = xp.sqrt(xp.diagonal(products))
    skewed = (abs(products) > ROUNDING * sizes * sizes[:, None]).sum() > 3
    kind = (
        "cutoff with its skin (the box is skewed)"
        if listed > cutoff and seen is not None and skewed
        else "cutoff"
    )
    do = "leave neighbor out (torch then finds all images), or give the potential edges "
    do += "by bridge.edges"
    return check_width(cell, xp.where(skewed, listed, cutoff), "a jax-md list", do, kind)


def _check_cells(cell, listed, size):
    """The cells of a list in fractional coordinates: neighbours are in adjacent ones."""
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


def heights(cell):
    """Distances (3,) between opposite faces of a cell (3,3) by rows, of NumPy or JAX."""
    xp = np if isinstance(cell, np.ndarray) else jnp
    a, b, c = cell
    faces = xp.stack([xp.cross(b, c), xp.cross(c, a), xp.cross(a, b)])
    areas = xp.linalg.norm(faces, axis=-1)
    return abs((cell * faces).sum(-1)) / xp.where(areas == 0, 1, areas)


def known(x):
    """x as NumPy, floats in float64; None where x has no value yet, as inside jit and vmap."""
    if isinstance(x, jax.core.Tracer):
        x = jax.lax.stop_gradient(x)
    if x is None or isinstance(x, jax.core.Tracer):
        return None
    x = np.asarray(x)
    return x.astype(np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x


@jax.custom_jvp
def where_sound(sound, x, instead):
    """x where sound, else `instead`, whose derivative is NaN."""
    return jnp.where(sound, x, instead)


def _where_sound_jvp(primals, tangents):
    dx = tangents[1]
    if not isinstance(dx, SymbolicZero):
        dx = or_nan(primals[0], dx)
    return where_sound(*primals), dx


where_sound.defjvp(_where_sound_jvp, symbolic_zeros=True)


def or_nan(sound, x):
    """x where sound, else NaN, in derivatives as well."""
    return x * jnp.where(sound, 1, jnp.nan).astype(x.dtype)


def _verdict(fine, seen, expected, got, do):
    """True, or what is fine if nobody can see it; ValueError where it is seen not to be."""
    if seen and not fine:
        raise ValueError(message(expected, got, do))
    return True if seen else fine


def _number(x, times=1):
    """A number of Angstrom for a text."""
    seen = known(x)
    return "?" if seen is None else f"{times * float(seen):.7g}"
