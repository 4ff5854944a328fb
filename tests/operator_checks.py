"""First and second derivatives of an operator through the bridge, beside finite differences in
torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import bridge
from tests.operator_cases import NOT_FORWARD, ONCE, UNBATCHED, case

ENGINES = {"func": {}, "autograd": {"derivatives": "autograd", "batched": "sequential"}}
FIRST = {
    "jacrev": jax.jacrev,
    "jacfwd": jax.jacfwd,
    "jvp": lambda f: lambda x: jax.jvp(f, (x,), (jnp.cos(x),))[1],
}
SECOND = {
    "hessian": jax.hessian,
    "jacrev of grad": lambda f: jax.jacrev(jax.grad(f)),
    "jacfwd of jacfwd": lambda f: jax.jacfwd(jax.jacfwd(f)),
    "hvp": lambda f: lambda x: jax.jvp(jax.grad(f), (x,), (jnp.cos(x),))[1],
}
ALONG = {"jvp", "hvp"}  # these give the derivative along cos(x)


def points(shape):
    """Two points, away from the kinks of all operators."""
    rng = np.random.default_rng(0)
    if shape == (3, 3):
        return torch.from_numpy(rng.normal(size=(2, 3, 3)) + np.eye(3))
    values = [-1.36, -0.91, -0.26, 0.33, 0.62, 1.21]
    return torch.from_numpy(np.stack([rng.permutation(values).reshape(shape) for _ in range(2)]))


def slopes(f, x, step=2e-3):
    """d f / d x by central differences of the sixth order, (*f(x).shape, *x.shape)."""
    columns = []
    for unit in torch.eye(x.numel(), dtype=x.dtype).reshape(-1, *x.shape):
        differences = [
            (f(x + k * step * unit) - f(x - k * step * unit)) / (2 * k * step) for k in (1, 2, 3)
        ]
        columns.append(sum(w * d for w, d in zip((1.5, -0.6, 0.1), differences)))
    return torch.stack(columns, -1).reshape(*f(x).shape, *x.shape)


def gradient(f, x):
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(f(x).sum(), x, materialize_grads=True)[0]


def check(name, derivatives):
    """Every way of FIRST and SECOND, of one point and of two under vmap."""
    f, shape = case(name)
    total = lambda x: f(x).sum()
    xs = points(shape)
    X = jnp.asarray(xs.numpy())
    options = ENGINES[derivatives]
    first, second = bridge.to_jax(f, **options), bridge.to_jax(total, **options)
    wants = {
        "first": np.stack([slopes(f, x).numpy() for x in xs]),
        "second": np.stack([slopes(lambda x: gradient(total, x), x).numpy() for x in xs]),
    }
    for order, function, ways in (("first", first, FIRST), ("second", second, SECOND)):
        for way, transform in ways.items():
            want = wants[order]
            if way in ALONG:
                want = np.stack([np.tensordot(w, np.cos(x.numpy()), 2) for w, x in zip(want, xs)])
            for batched in (False, True):
                label = f"{way}{' under vmap' if batched else ''} of {name} by {derivatives}"
                run = jax.vmap(transform(function)) if batched else transform(function)
                _compare(
                    label,
                    run,
                    X if batched else X[0],
                    want if batched else want[0],
                    name,
                    order,
                    derivatives,
                )


def _compare(label, run, x, want, name, order, derivatives):
    if name in ONCE and order == "second":
        with pytest.raises((NotImplementedError, RuntimeError), match="is not implemented"):
            run(x)
        return
    try:
        got = np.asarray(run(x))
    except RuntimeError as error:
        once = name in ONCE and "is not implemented" in str(error)
        advised = any(
            'pass derivatives="autograd"' in note for note in getattr(error, "__notes__", ())
        )
        assert once or (
            derivatives == "func" and name in UNBATCHED and (advised or name == "prelu")
        ), (label, error)
        return
    if derivatives == "autograd" and name in NOT_FORWARD and np.isnan(got).any():
        return
    assert got.shape == want.shape, label
    error = abs(got - want).max(initial=0) / (1 + abs(want).max(initial=0))
    assert error < 1e-6, (label, error)
