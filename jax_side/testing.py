"""What bridge.testing asks of JAX: every transform of a function or of a potential, by JAX
itself."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jax_side.potentials.strain import with_gradients

wide = jax.enable_x64  # a context in which 64-bit dtypes are kept


def precision() -> str:
    """The float dtype of this process's JAX."""
    return "float64" if jax.config.jax_enable_x64 else "float32"


def array(x):
    """A JAX array as a NumPy array of 64 bits."""
    x = np.asarray(x)
    return (
        x.astype(np.complex128)
        if x.dtype.kind == "c"
        else x
        if x.dtype.kind in "iub"
        else x.astype(np.float64)
    )


def potential_transforms(energies, pos, cell, other, second):
    """[(label, what, arrays)] of `energies(pos, cell)` (B,): its value and gradients, a batch of
    two positions, its Hessian, all jitted."""
    pos, cell, other = (jnp.asarray(x) for x in (pos, cell, other))

    def everything(pos, cell):
        energy, pull = jax.vjp(energies, pos, cell)
        return [energy, *pull(jnp.ones_like(energy))]

    found = [("jax.vjp", "gradients", jax.jit(everything)(pos, cell))]
    found += [
        (
            "jax.vmap",
            "batch",
            [jax.jit(jax.vmap(energies, (0, None)))(jnp.stack([pos, other]), cell)],
        )
    ]
    if second:
        found += [
            (
                "jax.hessian",
                "hessian",
                [jax.jit(jax.hessian(lambda x: energies(x, cell).sum()))(pos)],
            )
        ]
    return [(label, what, [array(x) for x in xs]) for label, what, xs in found]


def bound(model, inputs, gradients):
    """A JAX potential as `energies(pos, cell)` on the other inputs."""
    fixed = {k: jnp.asarray(x) for k, x in inputs.items() if k not in ("pos", "cell")}
    model = with_gradients(model) if gradients != "model" else model
    return lambda pos, cell: model(fixed | {"pos": pos, "cell": cell})["energy"]


def transforms(f, xs, draw, wanted, native):
    """[(label, transform, arrays)] of `f`, a function of arrays that gives a tuple of arrays,
    differentiated in its inexact inputs.

    `draw(name, shapes)` gives random NumPy arrays. With `native` each transform once, else with jit
    around them as well."""
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
        if [y.shape for y in outs] == [()] and not any(jnp.iscomplexobj(x) for x in (*inner, *cts)):
            ways += [
                ("hessian", lambda *vs: [jax.hessian(lambda v: part(v, *vs[1:])[0])(vs[0])], inner)
            ]
    labels = {
        "value": "call",
        "hessian": "jax.hessian",
        "vmap": "jax.vmap",
        "vjp": "jax.vjp",
        "jvp": "jax.jvp",
    }
    found = [(labels[what], what, g(*args)) for what, g, args in ways if what in wanted]
    found += (
        []
        if native
        else [
            (f"jax.jit of {labels[what]}", what, jax.jit(g)(*args))
            for what, g, args in ways
            if what in wanted
        ]
    )
    return [(label, what, [array(y) for y in ys]) for label, what, ys in found]


def _inexact(x):
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _put(xs, at, values):
    """xs with values in the places `at`."""
    new = dict(zip(at, values))
    return [new.get(i, x) for i, x in enumerate(xs)]


def tensor(x):
    """A NumPy array as a JAX array."""
    return jnp.asarray(np.array(x))
