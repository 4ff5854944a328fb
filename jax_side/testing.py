"""What bridge.testing asks of JAX: every transform of a function or of a potential, by JAX
itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from jax_side.calls import compat
from jax_side.potentials.derivatives import Inputs, Model
from jax_side.potentials.strain import with_gradients

Found = list[tuple[str, str, list[np.ndarray]]]  # label, transform, results
Energies = Callable[..., Float[jax.Array, " B"]]  # of pos and cell

wide = jax.enable_x64  # a context in which 64-bit dtypes are kept


def precision() -> str:
    """Returns the float dtype of this process's JAX."""
    return "float64" if compat.config.jax_enable_x64 else "float32"


def array(x: ArrayLike) -> np.ndarray:
    """Returns a JAX array as a NumPy array, floats and complex numbers in 64-bit parts."""
    x = np.asarray(x)
    if x.dtype.kind in "iub":
        return x
    return x.astype(np.complex128 if x.dtype.kind == "c" else np.float64)


def potential_transforms(
    energies: Energies,
    pos: Float[ArrayLike, "N 3"],
    cell: Float[ArrayLike, "B 3 3"],
    other: Float[ArrayLike, "N 3"],
    second: bool,
) -> Found:
    """Returns the transforms of `energies(pos, cell)` (B,), all jitted: value and gradients, a batch
    of the positions `pos` and `other`, and the Hessian if `second`."""
    pos, cell, other = (jnp.asarray(x) for x in (pos, cell, other))

    def everything(pos, cell):
        energy, pull = jax.vjp(energies, pos, cell)
        return [energy, *pull(jnp.ones_like(energy))]

    batch = jax.jit(jax.vmap(energies, (0, None)))
    found = [
        ("jax.vjp", "gradients", jax.jit(everything)(pos, cell)),
        ("jax.vmap", "batch", [batch(jnp.stack([pos, other]), cell)]),
    ]
    if second:
        hessian = jax.jit(jax.hessian(lambda x: energies(x, cell).sum()))
        found += [("jax.hessian", "hessian", [hessian(pos)])]
    return [(label, what, [array(x) for x in xs]) for label, what, xs in found]


def jitted(model: Model, inputs: Inputs) -> dict[str, Any]:
    """Returns what a JAX potential gives in a jitted program, as NumPy arrays."""
    found = jax.jit(model)({k: jnp.asarray(x) for k, x in inputs.items()})
    return {k: array(x) for k, x in found.items()}


def bound(model: Model, inputs: Inputs, gradients: str) -> Energies:
    """Returns a JAX potential as `energies(pos, cell)` at the other inputs.

    `gradients` is "model" for a model that gives its own, and else with_gradients makes them.
    """
    fixed = {k: jnp.asarray(x) for k, x in inputs.items() if k not in ("pos", "cell")}
    model = with_gradients(model) if gradients != "model" else model
    return lambda pos, cell: model(fixed | {"pos": pos, "cell": cell})["energy"]


def transforms(
    f: Callable[..., Any],
    xs: Sequence[Any],
    draw: Callable[..., Any],
    wanted: Collection[str],
    native: bool,
) -> Found:
    """Returns the transforms `wanted` of `f`, a function of the arrays `xs` that gives a tuple of
    arrays. It is differentiated in its inexact inputs.

    `draw(name, shapes)` gives random NumPy arrays, for tangents and cotangents. Each transform is
    computed as it is and, unless `native`, with jit around it too.
    """
    at = [i for i, x in enumerate(xs) if _inexact(x)]
    inner = [xs[i] for i in at]
    part = lambda *vs: tuple(y for y in f(*_put(xs, at, vs)) if _inexact(y))
    random = lambda name, ys: tuple(
        jnp.asarray(a).astype(y.dtype) for a, y in zip(draw(name, [y.shape for y in ys]), ys)
    )
    outs = [y for y in jax.eval_shape(f, *xs) if _inexact(y)]
    ts, cts = random("tangents", inner), random("cotangents", outs)
    stacked = [jnp.stack([x, 0.9 * x if _inexact(x) else x]) for x in xs]
    ways = [("value", f, xs), ("vmap", jax.vmap(f), stacked)]
    if at and cts:
        ways += [
            ("vjp", lambda *vs: jax.vjp(part, *vs)[1](cts), inner),
            ("jvp", lambda *vs: jax.jvp(part, tuple(vs), ts)[1], inner),
        ]
        scalar = [y.shape for y in outs] == [()]
        if scalar and not any(jnp.iscomplexobj(x) for x in (*inner, *cts)):
            hessian = lambda *vs: jax.hessian(lambda v: part(v, *vs[1:])[0])(vs[0])
            ways += [("hessian", lambda *vs: [hessian(*vs)], inner)]
    labels = {
        "value": "call",
        "hessian": "jax.hessian",
        "vmap": "jax.vmap",
        "vjp": "jax.vjp",
        "jvp": "jax.jvp",
    }
    ways = [way for way in ways if way[0] in wanted]
    found = [(labels[what], what, g(*args)) for what, g, args in ways]
    if not native:
        found += [(f"jax.jit of {labels[what]}", what, jax.jit(g)(*args)) for what, g, args in ways]
    return [(label, what, [array(y) for y in ys]) for label, what, ys in found]


def _inexact(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _put(xs: Sequence[Any], at: Sequence[int], values: Sequence[Any]) -> list[Any]:
    """xs with values in the places `at`."""
    new = dict(zip(at, values))
    return [new.get(i, x) for i, x in enumerate(xs)]


def tensor(x: ArrayLike) -> jax.Array:
    """Returns a NumPy array as a JAX array."""
    return jnp.asarray(np.array(x))
