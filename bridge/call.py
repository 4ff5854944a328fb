"""One call of a user's callable, taken apart: its arrays, the leaves that stay Python values, and
how both become a call again.

Standard library only. The pytree library is the caller's, and each bank says what it counts as an
array.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from bridge.errors import message

T = TypeVar("T")
Static = tuple[int, Any, Any]  # position, kind and value of a leaf that is no array


@dataclass(frozen=True)
class Call:
    """How a flat list of arrays becomes a call of the user's callable `target`.

    `tree.unflatten` and `flatten` are those of the caller's pytree library. `static` holds the
    leaves that are no arrays.
    """

    target: Callable[..., Any]
    tree: Any
    static: tuple[Static, ...]
    flatten: Callable[[Any], tuple[list[Any], Any]] = field(compare=False)

    @property
    def name(self) -> str:
        """The callable's name, as error texts have it."""
        return getattr(self.target, "__qualname__", type(self.target).__name__)

    def apply(self, arrays: Iterable[Any]) -> Any:
        """Calls the callable with `arrays` in their places, and returns its own result."""
        args, kwargs = self.tree.unflatten(between(self.static, arrays))
        return self.target(*args, **kwargs)

    def __call__(self, arrays: Iterable[Any]) -> tuple[list[Any], Any]:
        """The same with the result flattened: (its leaves, its tree)."""
        return self.flatten(self.apply(arrays))


def between(static: Iterable[Static], arrays: Iterable[Any]) -> list[Any]:
    """Returns all leaves of a call: the static ones in their places among the given arrays."""
    leaves = list(arrays)
    for position, _, value in static:
        leaves.insert(position, value)
    return leaves


def static_leaf(position: int, x: Any, arrays: str) -> Static:
    """Returns (position, kind, value) of the leaf `x`, which is no array.

    The kind tells apart values that are equal in Python: 1, 1.0 and True; 0.0 and -0.0.

    Raises: TypeError for what is not hashable; `arrays` says what may be passed instead.
    """
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
    kind = (type(x), repr(x)) if isinstance(x, (float, complex)) else type(x)
    return position, kind, x


def one_of(name: str, value: T, allowed: Collection[Any], also: str = "") -> T:
    """Returns `value`, the argument `name`, if it is one of the allowed ones.

    Raises: ValueError that lists these, and what is allowed `also`.
    """
    if value not in allowed:
        listed = ", ".join((*map(repr, allowed), *filter(None, [also])))
        raise ValueError(message(f"{name} as one of {listed}", repr(value), "choose one of these"))
    return value


def parameter_names(target: Callable[..., Any]) -> list[str]:
    """Returns the names of the parameters of a callable, in order."""
    return list(inspect.signature(target).parameters)
