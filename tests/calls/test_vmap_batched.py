"""vmap as `batched=` asks for it: every way gives the values of pure JAX, and calls torch as often
as it says."""

import jax
import jax.numpy as jnp
import pytest
import torch

import bridge
from tests.cases import close

X = jnp.cos(jnp.arange(12.0)).reshape(4, 3)
W = jnp.sin(jnp.arange(12.0)).reshape(4, 3)
PURE = lambda x, w: jnp.sin(x) * w.sum()
PLAIN = lambda x, w: torch.sin(x) * w.sum()
NATIVE = lambda x, w: torch.sin(x) * w.sum(-1, keepdim=True)
LAST = lambda x, w: torch.sin(x) * (w.sum() if w.dim() == 1 else w.sum(0))

WAYS = {
    "vmap": (PLAIN, "vmap"),
    "sequential": (PLAIN, "sequential"),
    "axis 0": (NATIVE, 0),
    "last axis": (LAST, -1),
    "named": (NATIVE, {"x": 0, "w": 0}),
    "named, from the end": (NATIVE, {"x": -2, "w": -2, "return": -2}),
    "named, return": (LAST, {"x": -1, "w": -1, "return": -1}),
}
OVER = {
    "both": ((0, 0), lambda f: jax.vmap(f)),
    "first": ((0, None), lambda f: jax.vmap(f, (0, None))),
    "second": ((None, 0), lambda f: jax.vmap(f, (None, 0))),
}
DERIVED = {
    "value": lambda vmap, f: vmap(f),
    "vmap of jacrev": lambda vmap, f: vmap(jax.jacrev(f, (0, 1))),
    "vmap of jacfwd": lambda vmap, f: vmap(jax.jacfwd(f, (0, 1))),
    "vmap of hessian": lambda vmap, f: vmap(jax.hessian(lambda x, w: f(x, w).sum())),
    "grad of vmap": lambda vmap, f: jax.grad(lambda x, w: (vmap(f)(x, w) ** 2).sum(), (0, 1)),
    "jvp of vmap": lambda vmap, f: lambda x, w: jax.jvp(vmap(f), (x, w), (jnp.cos(x), w))[1],
}


@pytest.mark.matrix(2)
@pytest.mark.parametrize("derived", DERIVED)
@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("derivatives", ["func", "autograd"])
def test_values_equal_pure_jax(way, over, derived, derivatives):
    if derivatives == "autograd" and way == "vmap":
        way = "sequential"
    f, batched = WAYS[way]
    axes, vmap = OVER[over]
    xs = tuple(a if axis == 0 else a[0] for a, axis in zip((X, W), axes))
    bridged = bridge.to_jax(f, batched=batched, derivatives=derivatives)
    close(
        jax.jit(DERIVED[derived](vmap, bridged))(*xs),
        jax.jit(DERIVED[derived](vmap, PURE))(*xs),
        rtol=1e-12,
    )


@pytest.mark.parametrize("way", WAYS)
def test_vmap_of_vmap(way, lane):
    f, batched = WAYS[way]
    xs = jnp.stack([X, 2 * X]), jnp.stack([W, 3 * W])
    if way in ("last axis", "named, return"):
        f = lambda x, w: torch.sin(x) * (w.sum() if w.dim() == 1 else w.sum(0))
    twice = lambda g: jax.jit(jax.vmap(jax.vmap(g)))
    close(twice(bridge.to_jax(f, batched=batched, lane=lane))(*xs), twice(PURE)(*xs), rtol=1e-12)


@pytest.mark.parametrize("way, calls", [("sequential", 4), ("axis 0", 1), ("named", 1)])
def test_calls_of_the_model(way, calls, lane):
    f, batched = WAYS[way]
    n = []

    def counted(x, w):
        n.append(1)
        return f(x, w)

    program = jax.jit(
        jax.vmap(bridge.to_jax(counted, batched=batched, lane=lane, outputs=lambda x, w: x))
    )
    jax.block_until_ready(program(X, W))
    n.clear()
    jax.block_until_ready(program(X, W))
    assert len(n) == calls


def test_shared_weights_of_a_native_batch_get_summed_gradients(lane):
    """{"x": 0}: w has no batch axis; its gradient is the sum over the batch."""
    f = bridge.to_jax(lambda x, w: torch.tanh(x @ w), batched={"x": 0}, lane=lane)
    g = lambda x, w: jnp.tanh(x @ w)
    w = jnp.ones((3, 2))
    loss = lambda f: jax.jit(jax.grad(lambda w: (jax.vmap(f, (0, None))(X, w) ** 2).sum()))
    close(loss(f)(w), loss(g)(w), rtol=1e-12)


def test_an_empty_batch(lane):
    for way in ("vmap", "sequential", "axis 0"):
        f, batched = WAYS[way]
        out = jax.jit(jax.vmap(bridge.to_jax(f, batched=batched, lane=lane)))(X[:0], W[:0])
        assert out.shape == (0, 3)


def test_scalar_energies_vmapped_natively_give_gradients_in_one_backward(lane):
    f = bridge.to_jax(lambda x: (x**3).sum(-1), batched=0, lane=lane)
    e, g = jax.jit(jax.vmap(jax.value_and_grad(f)))(X)
    close(e, (X**3).sum(-1), rtol=1e-12)
    close(g, 3 * X**2, rtol=1e-12)
