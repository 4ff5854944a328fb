"""Compiled torch models in JAX, made ahead of time and compared: bridge.native.compile; packages as
JAX functions."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bridge.contract import dtype_name
from bridge.errors import message
from bridge.function import Spec
from bridge.native import folder as folders
from jax_side.calls import native
from torch_side.calls.packages import Package

tree = jax.tree_util
# relative to the largest value of an output (or to 1): eV, eV/Angstrom
TOLERANCES = {"float16": 1e-2, "bfloat16": 5e-2, "float32": 1e-4, "float64": 1e-9}


@dataclass(frozen=True)
class Report:
    """What `compile` made.

    records  the packages that the function calls: names, types, seconds, where they lie
    errors   the largest difference to eager torch in each result, in its own unit"""

    records: tuple[folders.Record, ...]
    errors: dict[str, float]


def compile(
    function: Callable[..., Any],
    *args: Any,
    folder: str | os.PathLike[str] | None = None,
    tolerance: float | None = None,
) -> Report:
    """Compiles what `function` needs for the native lane ahead of time, and compares it with eager
    torch on the inputs.

    `function` is a JAX function of arrays with bridged functions of lane="native" in it, as
    bridge.potential, bridge.jax_potential and bridge.to_jax return, or a transform of such a one:
    jax.value_and_grad(energy), a hessian. `args` are the inputs that it is compiled for and
    compared on: only their types decide what is compiled. Each package that was missing is
    compiled, which takes seconds to minutes and is told on stderr; then the function is evaluated
    on the lane, and once more by eager torch. `folder` is where packages lie; None stands for
    BRIDGE_CACHE, or the user's cache folder, where jitted programs look for them.

    Results must agree within `tolerance`, relative to the largest value of each and to 1 at least;
    by default 1e-4 for float32, 1e-9 for float64. Packages of a function that does not agree are
    removed.

    Raises: RuntimeError where results disagree, naming the result and the error; ValueError for a
    function that calls nothing on lane="native"; and what compiling raises.

    >>> import bridge, jax, torch
    >>> energy = bridge.to_jax(lambda x: (x**2).sum(), lane="native")
    >>> report = bridge.native.compile(jax.grad(energy), jax.numpy.ones(3))      # doctest: +SKIP
    """
    with folders.choosing(folder):
        jitted = jax.jit(lambda *xs: function(*xs))
        program = jitted.lower(*args)
        keys = native.keys_in(program.as_text())
        if not keys:
            do = 'pass lane="native" to bridge.potential, to_jax or the others'
            raise ValueError(message('calls on lane="native" in the function', "none", do))
        records = tuple(native.packages[key].record for key in keys)
        fast = program.compile()(*args)
        slow = function(*args)
        errors, wrong = _compared(fast, slow, tolerance)
        if wrong:
            for record in records:
                folders.remove(folders.chosen(), record.key)
            do = (
                'take lane="ffi" and report the model; its package was removed (tolerance= allows '
                "a larger error)"
            )
            raise RuntimeError(message("results equal to eager torch's", wrong, do))
    return Report(records, errors)


def _compared(fast: Any, slow: Any, tolerance: float | None) -> tuple[dict[str, float], str]:
    """The largest difference of each result, and a text on the worst that is too large."""
    errors, wrong = {}, ""
    for (path, a), b in zip(tree.tree_leaves_with_path(fast), tree.tree_leaves(slow), strict=True):
        name = tree.keystr(path) or "the result"
        if not jnp.issubdtype(a.dtype, jnp.inexact):
            a, b = a.astype("int64"), b.astype("int64")
        wide = np.complex128 if jnp.issubdtype(a.dtype, jnp.complexfloating) else np.float64
        x, y = np.asarray(a).astype(wide), np.asarray(b).astype(wide)
        errors[name] = float(np.abs(x - y).max()) if x.size else 0.0
        scale = max(1.0, float(np.abs(y).max()) if y.size else 0.0)
        limit = scale * (TOLERANCES.get(str(b.dtype), 1e-4) if tolerance is None else tolerance)
        if not errors[name] <= limit:
            wrong = wrong or f"an error of {errors[name]:.3g} in {name} (at most {limit:.3g})"
    return errors, wrong


def package_outputs(package: Package) -> Callable[..., Any]:
    """Returns what finds the types of a package's results from those of its inputs, and refuses
    inputs that the package was not compiled for."""

    def outputs(*args: Any, **kwargs: Any) -> Any:
        package.check(args, kwargs)
        leaves, structure = tree.tree_flatten((args, kwargs))
        specs = [Spec(tuple(x.shape), jnp.dtype(x.dtype).name) for x in leaves]
        given, named = structure.unflatten(package.zeros(specs))
        found = package(*given, **named)
        kind = lambda y: jax.ShapeDtypeStruct(tuple(y.shape), dtype_name(y))
        return tree.tree_map(kind, found)

    return outputs
