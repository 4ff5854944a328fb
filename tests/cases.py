"""The same function in torch and in JAX, for tests of every transform. Add a row, and every
transform is tested on it."""

from typing import NamedTuple

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import torch


class Twin(NamedTuple):
    """`torch` and `jax` compute the same; `shapes(n, m)` are those of the inputs."""

    torch: callable
    jax: callable
    shapes: callable


def _lj_torch(r):
    d = r[:, None] - r[None]
    i, j = torch.triu_indices(r.shape[0], r.shape[0], 1)
    s = (1.0 / (1.0 + (d[i, j] ** 2).sum(-1))) ** 3
    return (s * s - s).sum()


def _lj_jax(r):
    d = r[:, None] - r[None]
    i, j = jnp.triu_indices(r.shape[0], 1)
    s = (1.0 / (1.0 + (d[i, j] ** 2).sum(-1))) ** 3
    return (s * s - s).sum()


ENERGIES = {  # real scalars
    "pair": Twin(_lj_torch, _lj_jax, lambda n, m: [(n + 1, 3)]),
    "cubic": Twin(
        lambda x: (torch.sin(x) ** 3).sum(),
        lambda x: (jnp.sin(x) ** 3).sum(),
        lambda n, m: [(n, m)],
    ),
    "bilinear": Twin(
        lambda x, w: torch.tanh(x @ w).sum(),
        lambda x, w: jnp.tanh(x @ w).sum(),
        lambda n, m: [(n, m), (m, 2)],
    ),
}
VECTORS = {  # everything else
    "elementwise": Twin(
        lambda x: torch.sin(x) * x.sum(), lambda x: jnp.sin(x) * x.sum(), lambda n, m: [(n,)]
    ),
    "matmul": Twin(
        lambda x, w: torch.tanh(x @ w), lambda x, w: jnp.tanh(x @ w), lambda n, m: [(n, m), (m, 3)]
    ),
    "softmax": Twin(
        lambda x: torch.softmax(x, -1), lambda x: jax.nn.softmax(x, -1), lambda n, m: [(n, m)]
    ),
    "expanded": Twin(
        lambda x: (x.sum() ** 2).expand(3),
        lambda x: jnp.broadcast_to(x.sum() ** 2, (3,)),
        lambda n, m: [(n,)],
    ),
    "transposed": Twin(lambda x: (x**2).T, lambda x: (x**2).T, lambda n, m: [(n, m)]),
}
TWINS = ENERGIES | VECTORS


def draw(twin: Twin, n=2, m=3, seed=0, dtype="float64"):
    """Inputs of a twin."""
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.uniform(-1, 1, s), dtype) for s in twin.shapes(n, m))


sizes = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**16))


def close(got, want, rtol=None):
    """Equal structure, dtypes and shapes; equal values to rounding of the dtype, relative to the
    largest entry."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert a.dtype == b.dtype and a.shape == b.shape, (a.dtype, b.dtype, a.shape, b.shape)
        scale = float(jnp.max(jnp.abs(b), initial=0.0)) + 1e-3
        tol = rtol or 200 * float(jnp.finfo(a.dtype).eps)
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=tol * scale)
