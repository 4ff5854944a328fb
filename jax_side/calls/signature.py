"""The arguments of one call of a foreign function: which are arrays, which stay Python values, and
what they are called."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bridge.call import Static, between, static_leaf
from bridge.errors import message
from bridge.function import WIDE, Spec
from jax_side.calls import compat

tree = jax.tree_util


@dataclass(frozen=True)
class Signature:
    """The pytree of (args, kwargs), the types of its arrays, and (position, kind, value) of the
    leaves that are no arrays."""

    tree: Any
    inputs: tuple[Spec, ...]
    static: tuple[Static, ...]

    def _paths(self) -> list[Any]:
        """The key path of each array."""
        fixed = {i for i, *_ in self.static}
        paths = tree.tree_leaves_with_path(self.tree.unflatten(range(self.tree.num_leaves)))
        return [path for i, (path, _) in enumerate(paths) if i not in fixed]

    def names(self) -> tuple[str, ...]:
        """Returns how error texts call the arrays: argument 0, argument 0['pos'], charge."""
        return tuple(
            (f"argument {p[1].idx}" if p[0].idx == 0 else p[1].key) + tree.keystr(p[2:])
            for p in self._paths()
        )

    def parameters(self, names: list[str]) -> tuple[str, ...]:
        """Returns the parameter that each array belongs to, given those of the callable in
        order."""
        return tuple(
            names[min(p[1].idx, len(names) - 1)] if p[0].idx == 0 else p[1].key
            for p in self._paths()
        )

    def declared(self, outputs: Any) -> tuple[tuple[Spec, ...], Any]:
        """Returns (types, tree) of the outputs that the user declared, as a pytree or as a function
        of the inputs' types.

        Raises: TypeError for a leaf without shape and dtype.
        """
        if callable(outputs):
            args, kwargs = self.tree.unflatten(
                between(self.static, (jax.ShapeDtypeStruct(*s) for s in self.inputs))
            )
            outputs = outputs(*args, **kwargs)
        leaves, out_tree = tree.tree_flatten(outputs)
        for x in leaves:
            if not (hasattr(x, "shape") and hasattr(x, "dtype")):
                raise TypeError(
                    message(
                        "outputs= as a pytree of jax.ShapeDtypeStruct",
                        f"{type(x).__name__} {x!r:.60}",
                        "give shape and dtype of each output",
                    )
                )
        return tuple(Spec(tuple(x.shape), jnp.dtype(x.dtype).name) for x in leaves), out_tree


def check_numbers(inputs: Sequence[Spec], names: Sequence[str], who: str) -> None:
    """Raises NotImplementedError naming the first input with a size that is a symbol of jax.export,
    in a call of `who`."""
    for s, name in zip(inputs, names, strict=True):
        if not all(isinstance(n, int) for n in s.shape):
            expected = f"sizes that are numbers in a call of {who}"
            do = (
                "export it for each size, or map it over examples by jax.vmap: how many there are "
                'may be a symbol on lane="ffi"'
            )
            raise NotImplementedError(message(expected, f"{s} as {name}", do))


def sign(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Signature, list[jax.Array]]:
    """Returns the signature of a call, and its arrays.

    Raises: TypeError for a value that is neither an array nor hashable; ValueError for a NumPy
    array that JAX would narrow.
    """
    leaves, structure = tree.tree_flatten((args, kwargs))
    arrays, static = [], []
    for i, x in enumerate(leaves):
        if isinstance(x, (jax.Array, np.ndarray, np.generic)):
            arrays.append(x if isinstance(x, jax.Array) else _from_numpy(x))
        else:
            static.append(_static(i, x))
    inputs = tuple([Spec(x.shape, _name(x.dtype)) for x in arrays])
    return Signature(structure, inputs, tuple(static)), arrays


_name = functools.cache(operator.attrgetter("name"))  # of a dtype; NumPy makes it anew each time


def _static(i: int, x: Any) -> Static:
    if hasattr(x, "__torch_function__") or hasattr(x, "__dlpack__"):
        raise TypeError(
            message(
                "JAX or NumPy arrays as arguments of a bridged function",
                type(x).__name__,
                "convert it first: bridge.to_jax(tensor)",
            )
        )
    return static_leaf(i, x, "arrays")


def _from_numpy(x: np.ndarray | np.generic) -> jax.Array:
    check_width(Spec(x.shape, x.dtype.name), "a NumPy argument")
    return jnp.asarray(x)


def check_width(s: Spec, what: str) -> None:
    """Raises ValueError for 64-bit parts while x64 is off; `what` says in its text what has
    them."""
    if s.dtype in WIDE and not compat.config.jax_enable_x64:
        do = 'call jax.config.update("jax_enable_x64", True), or cast it first'
        raise ValueError(message(f"{what} of at most 32-bit parts while x64 is off", str(s), do))


def output_names(structure: Any) -> tuple[str, ...]:
    """Returns how error texts call outputs: ['energy'], [0]. A lone output is called 0."""
    paths = tree.tree_leaves_with_path(structure.unflatten(range(structure.num_leaves)))
    return tuple(tree.keystr(path) or "0" for path, _ in paths)
