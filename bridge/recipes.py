"""What a Function is made of, as JSON: how another process makes it again around the same base.

Standard library only. A recipe names the transforms from the outermost to the base, which it says
nothing of.
"""

from __future__ import annotations

from typing import Any

from bridge.errors import message
from bridge.function import Function, Gradient, Jvp, Vjp, Vmap

Recipe = dict[str, Any]
_LINEARISED = {"jvp": Jvp, "vjp": Vjp}


def written(fn: Function) -> Recipe | None:
    """Returns the recipe of a Function, None for a base."""
    if fn is fn.base:
        return None
    of: Any = fn
    recipe: Recipe = {"of": written(of.of)}
    if isinstance(fn, Jvp | Vjp):
        kind = "jvp" if isinstance(fn, Jvp) else "vjp"
        return recipe | {"kind": kind, "wrt": [*fn.wrt], "outs": [*fn.outs]}
    if isinstance(fn, Gradient):
        return recipe | {"kind": "gradient", "wrt": [*fn.wrt], "out": fn.out}
    if isinstance(fn, Vmap):
        return recipe | {
            "kind": "vmap",
            "mapped": [*fn.mapped],
            "sizes": [_size(fn.size)],
            "axis": fn.axis,
        }
    # a base that takes batches itself
    return recipe | {"kind": "batch", "mapped": [*of.mapped], "sizes": [*map(_size, of.sizes)]}


def read(recipe: Recipe | None, base: Function) -> Function:
    """Returns the Function of a recipe around a base.

    Raises: ValueError for a recipe that `written` did not write."""
    if recipe is None:
        return base
    try:
        of = read(recipe["of"], base)
        kind = recipe["kind"]
        if kind in _LINEARISED:
            return _LINEARISED[kind](of, tuple(recipe["wrt"]), tuple(recipe["outs"]))
        if kind == "gradient":
            return Gradient(of, tuple(recipe["wrt"]), recipe["out"])
        mapped, sizes = tuple(recipe["mapped"]), recipe["sizes"]
        if kind == "vmap":
            return Vmap(of, mapped, sizes[0], recipe["axis"])
        if kind == "batch":
            for size in reversed(sizes):
                of = of.vmap(mapped, size)
            return of
    except (KeyError, TypeError, IndexError) as error:
        raise _strange(type(error).__name__) from error
    raise _strange(repr(kind))


def _size(size: Any) -> int | str:
    """A size, or the symbol that stands for one."""
    return size if isinstance(size, int) else str(size)


def _strange(got: str) -> ValueError:
    do = "save the program again"
    return ValueError(message("the recipe of a bridged function", got, do))
