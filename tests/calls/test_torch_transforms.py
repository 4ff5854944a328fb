"""JAX callables in torch: values of every transform equal those of the same function written in
torch."""

import gc
import weakref
from functools import partial

import jax.numpy as jnp
import pytest
import torch
from hypothesis import given, settings
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import bridge
from tests.cases import ENERGIES, TWINS, sizes
from tests.matrices import a_few
from tests.torch_cases import (
    BATCHED_COTANGENTS,
    COMPLEX,
    TRANSFORMS,
    Z,
    backward,
    bridged,
    close,
    inputs,
    leaves,
)
from torch_side.calls import wrap


def native(name, transform):
    """The function written in torch."""
    if (
        transform == "backward_dual" and name == "softmax"
    ):  # torch's own raises: its forward mode writes to what backward needs
        return lambda x: x.exp() / x.exp().sum(-1, keepdim=True)
    return (TWINS | COMPLEX)[name].torch


@pytest.mark.matrix
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", TWINS)
def test_value_x_transform(name, transform):
    of, xs = TRANSFORMS[transform], inputs(name)
    close(of(bridged(name), xs), of(native(name, transform), xs))


@pytest.mark.parametrize("argnums", [0, 1, (0, 1)])
@pytest.mark.parametrize("mapped", [False, True])
def test_tangents_that_torch_has_widened(mapped, argnums):
    """To torch 2.13, the tangent of a float32 number times one of Python's is float64."""
    x, s = torch.arange(1.0, 3.0), torch.tensor(0.5)

    def of(f):
        f = torch.func.vmap(f) if mapped else f
        g = lambda x, s: f(torch.stack([x, -1.5 * x]), torch.stack([s, -1.5 * s]))
        return torch.func.jacfwd(lambda x, s: g(x, -1.5 * s), argnums)(x, s)

    expand = lambda s: s.reshape(-1, 1) if s.ndim else s
    got = of(bridge.to_torch(lambda x, s: jnp.sin(x) * expand(s)))
    want = of(lambda x, s: torch.sin(x) * expand(s))
    for y, z in zip(leaves(got), leaves(want), strict=True):
        assert y.dtype == torch.float32
        torch.testing.assert_close(y, z.float())


@pytest.mark.matrix
@settings(max_examples=4)
@given(size=sizes)
@pytest.mark.parametrize(
    "transform", ["backward", "double_backward", "jvp", "hessian", "vmap_grad"]
)
@pytest.mark.parametrize("name", ["bilinear", "softmax", "pair"])
def test_value_x_transform_x_shape(name, transform, size):
    of, xs = TRANSFORMS[transform], inputs(name, *size)
    close(of(bridged(name), xs), of(native(name, transform), xs))


@pytest.mark.matrix
@pytest.mark.parametrize("transform", ["call", "backward", "double_backward", "jvp", "vmap_grad"])
@pytest.mark.parametrize("name", TWINS)
def test_value_x_transform_x_float32(name, transform):
    of, xs = TRANSFORMS[transform], inputs(name, dtype="float32")
    close(of(bridged(name), xs), of(native(name, transform), xs), rtol=1e-4, atol=1e-4)


@pytest.mark.matrix
@pytest.mark.parametrize(
    "transform",
    [
        "call",
        "backward",
        "double_backward",
        "vjp",
        "jvp",
        "dual",
        "vmap",
        "backward_vmap",
        "dual_backward",
        "functional_jvp",
        "checkpoint",
    ],
)
@pytest.mark.parametrize("name", COMPLEX)
def test_value_x_transform_x_complex(name, transform):
    """torch's convention, the conjugate of JAX's."""
    of, xs = TRANSFORMS[transform], inputs(name)
    close(of(bridged(name), xs), of(native(name, transform), xs))


@pytest.mark.parametrize("name", a_few(TWINS | COMPLEX, 6))
def test_gradcheck(name):
    xs = leaves(inputs(name))
    assert torch.autograd.gradcheck(bridged(name), xs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(bridged(name), xs, check_fwd_over_rev=True)


@pytest.mark.parametrize(
    "transform",
    ["call", "backward", "double_backward", "grad", "jvp", "dual", "vmap", "hessian", "checkpoint"],
)
@pytest.mark.parametrize("name", ["bilinear", "matmul"])
def test_value_x_transform_x_dispatch_mode(name, transform):
    """Counters, loggers and tracers are modes of torch's dispatch."""
    of, xs = TRANSFORMS[transform], inputs(name)
    with FlopCounterMode(display=False):
        got = of(bridged(name), xs)
    close(got, of(native(name, transform), xs))


@pytest.mark.matrix
@pytest.mark.parametrize("transform", BATCHED_COTANGENTS)
@pytest.mark.parametrize("name", ["cubic", "matmul", "softmax"])
def test_value_x_batched_cotangents(name, transform):
    of, xs = BATCHED_COTANGENTS[transform], inputs(name)
    close(of(bridged(name), xs), of(native(name, transform), xs))


def test_gradient_x_loss_scaling():
    """The scale of a loss arrives before float16 rounds to zero."""
    f = bridge.to_torch(lambda x: (x * 1e-4 * 1e-4).sum())
    x = torch.ones(3, dtype=torch.float16, requires_grad=True)
    (f(x) * 2.0**15).backward()
    close(x.grad, torch.full_like(x, 2.0**15 * 1e-8), rtol=0.1, atol=0)


@pytest.mark.parametrize("transform", ["backward", "grad"])
def test_gradient_x_conj_bit(transform):
    """A gradient is memory that NumPy reads."""
    got = TRANSFORMS[transform](bridged("holomorphic"), [Z])
    (got[1][0] if transform == "backward" else got[0]).numpy()


# What is kept between forward and backward.


@pytest.mark.parametrize("reentrant", [False, True])
def test_residuals_x_checkpoint(reentrant, monkeypatch):
    """Alive after the forward, of all that came from JAX: without checkpoint residuals too, with it
    the result alone."""
    came, take = [], wrap.taken
    monkeypatch.setattr(
        wrap, "taken", lambda results: [came.append(weakref.ref(t)) or t for t in take(results)]
    )
    f, x = bridge.to_torch(lambda x: jnp.sin(jnp.exp(x) * x)), torch.ones(64, requires_grad=True)

    def alive(run):
        came.clear()
        y = run(x)
        gc.collect()
        return sum(t() is not None for t in came)

    assert alive(f) > 1 >= alive(partial(checkpoint, f, use_reentrant=reentrant))


def test_residuals_x_hooks():
    """Packed and unpacked as often, into anything; the graph itself holds none of them."""
    packed, unpacked = [], []
    f, x = (
        bridge.to_torch(lambda x: jnp.sin(jnp.exp(x))),
        torch.ones(3, dtype=torch.float64, requires_grad=True),
    )

    def pack(t):
        packed.append(t.shape)
        return t.detach().numpy().tobytes(), t.dtype

    def unpack(saved):
        unpacked.append(saved)
        return torch.frombuffer(bytearray(saved[0]), dtype=saved[1])

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        y = f(x)
    close(torch.autograd.grad(y.sum(), x)[0], (x.exp().cos() * x.exp()).detach())
    assert len(packed) == len(unpacked) > 1


@pytest.mark.parametrize("kept", ["input", "output", "input of a scalar"])
def test_write_between_forward_and_backward(kept):
    """torch's own error, as its version counters give it."""
    f = bridge.to_torch(
        {"input": jnp.sin, "output": jnp.exp, "input of a scalar": lambda x: (x**3).sum()}[kept]
    )
    w = torch.ones(3, requires_grad=True) * 1
    y = f(w)
    (y if kept == "output" else w).detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("name", [*ENERGIES, "softmax"])
def test_second_backward_through_a_freed_graph(name):
    xs = leaves(inputs(name))
    y = bridged(name)(*xs).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_nan_and_infinity_x_backward(value):
    """In one entry they stay there; an output without a cotangent brings none."""
    f = bridge.to_torch(lambda x: (jnp.sqrt(x), 2 * x))
    x = torch.tensor([float(value), 0.0, 4.0], dtype=torch.float64, requires_grad=True)
    close(torch.autograd.grad(f(x)[1].sum(), x)[0], torch.full((3,), 2.0, dtype=torch.float64))
    got, want = (backward(g, [x.detach()]) for g in (lambda x: f(x)[0], torch.sqrt))
    close(got, want, equal_nan=True)
