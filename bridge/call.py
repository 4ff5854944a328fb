"""One call of a user's callable, taken apart: its arrays, the leaves that stay Python values, and
how both become a call again.

Standard library only: the pytree library is the caller's, a bank says what it counts as an array.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bridge.errors import message


@dataclass(frozen=True)
class Call:
    """How a flat list of arrays becomes a call of the user's callable: `tree.unflatten` and
    `flatten` are the caller's pytree library, `static` holds (position, kind, value) of the leaves
    that are no arrays."""

    target: Callable
    tree: Any
    static: tuple[tuple[int, Any, Any], ...]
    flatten: Callable = field(compare=False)

    @property
    def name(self) -> str:
        return getattr(self.target, "__qualname__", type(self.target).__name__)

    def apply(self, arrays):
        """The callable's own result."""
        args, kwargs = self.tree.unflatten(between(self.static, arrays))
        return self.target(*args, **kwargs)

    def __call__(self, arrays):
        """-> (output leaves, output tree)."""
        return self.flatten(self.apply(arrays))


def between(static, arrays) -> list:
    """All leaves again: static ones between the given arrays."""
    leaves = list(arrays)
    for position, _, value in static:
        leaves.insert(position, value)
    return leaves


def static_leaf(position: int, x, arrays: str) -> tuple[int, Any, Any]:
    """(position, kind, value) of a leaf that is no array; the kind tells equal values apart: 1, 1.0
    and True; 0.0 and -0.0.

    Raises TypeError for what is not hashable; `arrays` says what may be passed instead."""
    try:
        hash(x)
    except TypeError as e:
        raise TypeError(
            message(
                f"{arrays}, or hashable Python values, as arguments",
                f"a {type(x).__name__}",
                f"pass {arrays}, or something hashable",
            )
        ) from e
    return position, (type(x), repr(x)) if isinstance(x, (float, complex)) else type(x), x


def one_of(name: str, value, allowed, also=""):
    """`value` if it is one of the allowed ones; else ValueError."""
    if value not in allowed:
        listed = ", ".join((*map(repr, allowed), *filter(None, [also])))
        raise ValueError(message(f"{name} as one of {listed}", repr(value), "choose one of these"))
    return value


def parameter_names(target) -> list[str]:
    return list(inspect.signature(target).parameters)
