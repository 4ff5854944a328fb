"""JAX callables in torch: values of every transform equal those of the same function written in torch."""

import gc
import weakref
from functools import cache, partial

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch.autograd import forward_ad as fwd
from torch.autograd import functional as A
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import bridge
from tests.cases import ENERGIES, TWINS, Twin, draw, sizes
from torch_side import wrap

F = torch.func
ALL = lambda xs: tuple(range(len(xs)))  # noqa: E731
CT = lambda y: torch.cos(torch.arange(y.numel(), dtype=y.real.dtype)).reshape(y.shape)  # noqa: E731
real = lambda y: torch.view_as_real(y.resolve_conj()) if y.is_complex() else y  # noqa: E731
TOTAL = lambda f: lambda *xs: (lambda y: (CT(y) * y).sum())(real(f(*xs)))  # noqa: E731
TWO = lambda xs: [torch.stack([x, 2 * x]) for x in xs]  # noqa: E731
close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


@cache
def bridged(name):
    return bridge.to_torch((TWINS | COMPLEX)[name].jax)


def inputs(name, n=2, m=3, seed=0, dtype="float64"):
    return tuple(torch.from_numpy(np.array(x)) for x in draw(TWINS[name], n, m, seed, dtype))


def leaves(xs):
    return [x.detach().clone().requires_grad_() for x in xs]


def backward(f, xs, loss=TOTAL):
    xs = leaves(xs)
    y = f(*xs)
    loss(lambda *_: y)().backward()
    return y.detach(), [x.grad for x in xs]


def again(f, xs, order):
    """Gradients of gradients, by torch.autograd.grad."""
    xs = leaves(xs)
    y = f(*xs)
    for _ in range(order):
        grads = torch.autograd.grad(TOTAL(lambda: y)(), xs, create_graph=True, materialize_grads=True)
        y = torch.cat([real(g).flatten() for g in grads])
    return y


def dual(f, xs, mode=partial(torch.autograd.set_grad_enabled, False)):
    with mode(), fwd.dual_level():
        y = fwd.unpack_dual(f(*[fwd.make_dual(x, x.cos()) for x in xs]))
        return torch.zeros_like(y.primal) if y.tangent is None else y.tangent


def offloaded(f, xs):
    with torch.autograd.graph.save_on_cpu():
        return backward(f, xs)


def over_first(f, xs, **kwargs):
    return F.vmap(f, (0,) + (None,) * (len(xs) - 1), **kwargs)


TRANSFORMS = {  # f, xs -> values
    "call": lambda f, xs: f(*xs),
    "backward": backward,
    "backward_of_subset": lambda f, xs: backward(lambda x: f(x, *xs[1:]), xs[:1]),
    "double_backward": lambda f, xs: again(f, xs, 2),
    "triple_backward": lambda f, xs: again(f, xs, 3),
    "retained": lambda f, xs: (lambda xs: (lambda y: [torch.autograd.grad((c * y * y).sum(), xs, retain_graph=True) for c in (1, 2)])(f(*xs)))(leaves(xs)),
    "grad": lambda f, xs: F.grad(TOTAL(f), ALL(xs))(*xs),
    "vjp": lambda f, xs: (lambda y, pull: (pull(CT(y).to(y.dtype)), pull(y)))(*F.vjp(f, *xs)),
    "vjp_differentiated": lambda f, xs: (lambda y, pull: backward(lambda c: pull(c)[0], [CT(y)]))(*F.vjp(f, *xs)),
    "jvp": lambda f, xs: F.jvp(f, xs, tuple(map(torch.cos, xs))),
    "jvp_first": lambda f, xs: F.jvp(lambda x: f(x, *xs[1:]), xs[:1], xs[:1]),
    "linearize": lambda f, xs: F.linearize(f, *xs)[1](*map(torch.cos, xs)),
    "jacrev": lambda f, xs: F.jacrev(f, ALL(xs))(*xs),
    "jacfwd": lambda f, xs: F.jacfwd(f, ALL(xs))(*xs),
    "hessian": lambda f, xs: F.hessian(f, ALL(xs))(*xs),
    "jacrev_jacrev": lambda f, xs: F.jacrev(F.jacrev(f))(*xs),
    "jacfwd_jacfwd": lambda f, xs: F.jacfwd(F.jacfwd(f))(*xs),
    "jacrev_jacfwd": lambda f, xs: F.jacrev(F.jacfwd(f))(*xs),
    "jacfwd_jacrev": lambda f, xs: F.jacfwd(F.jacrev(f, len(xs) - 1))(*xs),
    "third_order": lambda f, xs: F.jacfwd(F.hessian(TOTAL(f)))(*xs),
    "hvp": lambda f, xs: F.jvp(F.grad(TOTAL(f)), xs, tuple(map(torch.cos, xs)))[1],
    "vmap": lambda f, xs: F.vmap(f)(*TWO(xs)),
    "vmap_chunked": lambda f, xs: F.vmap(f, chunk_size=1)(*TWO(xs)),
    "vmap_unmapped": lambda f, xs: over_first(f, xs)(torch.stack([xs[0], -xs[0]]), *xs[1:]),
    "vmap_last_axis": lambda f, xs: F.vmap(f, -1, -1)(*[torch.stack([x, 2 * x], -1) for x in xs]),
    "vmap_vmap": lambda f, xs: F.vmap(F.vmap(f))(*TWO(TWO(xs))),
    "vmap_vmap_crossed": lambda f, xs: over_first(over_first(f, xs, out_dims=0), xs)(torch.stack(TWO([xs[0], -xs[0]]), 1), *xs[1:]),
    "vmap_grad": lambda f, xs: F.vmap(F.grad(TOTAL(f), ALL(xs)))(*TWO(xs)),
    "vmap_jvp": lambda f, xs: F.vmap(lambda *xs: F.jvp(f, xs, xs))(*TWO(xs)),
    "vmap_hessian": lambda f, xs: F.vmap(F.hessian(TOTAL(f)))(*TWO(xs)),
    "grad_vmap": lambda f, xs: F.grad(lambda *ys: (over_first(f, xs)(*ys) ** 2).sum(), ALL(xs))(torch.stack([xs[0], -xs[0]]), *xs[1:]),
    "jvp_vmap": lambda f, xs: F.jvp(over_first(f, xs), (torch.stack([xs[0], -xs[0]]), *xs[1:]), (torch.stack([xs[0], xs[0]]), *xs[1:]))[1],
    "backward_vmap": lambda f, xs: backward(F.vmap(f), TWO(xs)),
    "backward_func_grad": lambda f, xs: backward(F.grad(TOTAL(f)), xs),
    "dual": dual,
    "dual_of_backward": lambda f, xs: dual(lambda *ys: torch.autograd.grad(TOTAL(f)(*ys), ys[0], create_graph=True)[0], leaves(xs), torch.enable_grad),
    "backward_of_dual": lambda f, xs: backward(lambda *xs: dual(f, xs, torch.enable_grad), xs),
    "functional_vjp": lambda f, xs: A.vjp(TOTAL(f), xs),
    "functional_jvp": lambda f, xs: A.jvp(f, xs, tuple(map(torch.cos, xs))),
    "functional_jacobian": lambda f, xs: A.jacobian(f, xs),
    "functional_hessian": lambda f, xs: A.hessian(TOTAL(f), xs),
    "functional_hvp": lambda f, xs: A.hvp(TOTAL(f), xs, tuple(map(torch.cos, xs))),
    "checkpoint": lambda f, xs: backward(lambda *xs: checkpoint(f, *xs, use_reentrant=False), xs),
    "checkpoint_reentrant": lambda f, xs: backward(lambda *xs: checkpoint(f, *xs, use_reentrant=True), xs),
    "save_on_cpu": offloaded,
}
UNDER_A_MODE = ("call", "backward", "double_backward", "grad", "jvp", "dual", "vmap", "hessian")


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", TWINS)
def test_transform_equals_pure_torch(name, transform):
    of, xs = TRANSFORMS[transform], inputs(name)
    native = TWINS[name].torch
    if transform == "backward_of_dual" and name == "softmax":  # torch's own raises: it writes to what it has saved
        native = lambda x: x.exp() / x.exp().sum(-1, keepdim=True)  # noqa: E731
    close(of(bridged(name), xs), of(native, xs))


@settings(max_examples=4)
@given(size=sizes)
@pytest.mark.parametrize("transform", ["backward", "double_backward", "jvp", "hessian", "vmap_grad"])
@pytest.mark.parametrize("name", ["bilinear", "softmax", "pair"])
def test_transform_equals_pure_torch_x_any_shape(name, transform, size):
    of, xs = TRANSFORMS[transform], inputs(name, *size)
    close(of(bridged(name), xs), of(TWINS[name].torch, xs))


@pytest.mark.parametrize("transform", ["call", "backward", "double_backward", "jvp", "vmap_grad"])
@pytest.mark.parametrize("name", TWINS)
def test_transform_equals_pure_torch_x_float32(name, transform):
    of, xs = TRANSFORMS[transform], inputs(name, dtype="float32")
    close(of(bridged(name), xs), of(TWINS[name].torch, xs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("transform", UNDER_A_MODE)
def test_transform_equals_pure_torch_x_dispatch_mode(transform):
    """Counters, loggers and the tracing in linearize are modes of torch.dispatch."""
    of, xs = TRANSFORMS[transform], inputs("matmul")
    with FlopCounterMode(display=False):
        got = of(bridged("matmul"), xs)
    close(got, of(TWINS["matmul"].torch, xs))


@pytest.mark.parametrize("vectorize", ["is_grads_batched", "jacobian", "hessian"])
def test_batched_cotangents_equal_pure_torch(vectorize):
    of = {
        "is_grads_batched": lambda f, xs: (lambda xs: torch.autograd.grad(f(*xs), xs, torch.stack([CT(xs[0]), xs[0].detach()]), is_grads_batched=True))(leaves(xs)),
        "jacobian": lambda f, xs: A.jacobian(f, xs, vectorize=True),
        "hessian": lambda f, xs: A.hessian(TOTAL(f), xs, vectorize=True),
    }[vectorize]
    xs = inputs("softmax")
    close(of(bridged("softmax"), xs), of(TWINS["softmax"].torch, xs))


# Complex: torch's convention, the conjugate of JAX's.

Z, R = torch.tensor([0.3 + 0.4j, -1.2 + 0.7j], dtype=torch.complex128), torch.tensor([0.5, -1.5], dtype=torch.float64)
COMPLEX = {  # shapes: the inputs themselves
    "holomorphic": Twin(lambda z: z**3 + z.exp(), lambda z: z**3 + jnp.exp(z), (Z,)),
    "conj": Twin(lambda z: z.conj() * z**2, lambda z: z.conj() * z**2, (Z,)),
    "only_conj": Twin(lambda z: z.conj().resolve_conj(), jnp.conj, (Z,)),
    "abs": Twin(lambda z: z.abs().sum(), lambda z: jnp.abs(z).sum(), (Z,)),
    "real_out": Twin(lambda z: z.real * z.imag**2, lambda z: z.real * z.imag**2, (Z,)),
    "real_in": Twin(lambda x: torch.exp(1j * x) * x, lambda x: jnp.exp(1j * x) * x, (R,)),
    "through": Twin(lambda x: torch.fft.fft(x).abs() ** 2, lambda x: jnp.abs(jnp.fft.fft(x)) ** 2, (R,)),
    "mixed": Twin(lambda x, z: (x * z).sin() * z.conj(), lambda x, z: jnp.sin(x * z) * z.conj(), (R, Z)),
}


@pytest.mark.parametrize("transform", ["call", "backward", "double_backward", "jvp", "dual", "vmap", "vjp", "backward_vmap", "dual_of_backward", "functional_jvp"])
@pytest.mark.parametrize("name", COMPLEX)
def test_complex_transform_equals_pure_torch(name, transform):
    of, (native, _, xs) = TRANSFORMS[transform], COMPLEX[name]
    close(of(bridged(name), xs), of(native, xs))


@pytest.mark.parametrize("name", TWINS | COMPLEX)
def test_gradcheck(name):
    xs = leaves(COMPLEX[name].shapes if name in COMPLEX else inputs(name))
    assert torch.autograd.gradcheck(bridged(name), xs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(bridged(name), xs, check_fwd_over_rev=True)


# What is kept between forward and backward.


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_drops_what_the_forward_keeps(reentrant, monkeypatch):
    """Alive after the forward, of all that came from JAX: without checkpoint residuals too, with it the result alone."""
    came, take = [], wrap.taken
    monkeypatch.setattr(wrap, "taken", lambda results: [came.append(weakref.ref(t)) or t for t in take(results)])
    f, x = bridge.to_torch(lambda x: jnp.sin(jnp.exp(x) * x).sum()), torch.ones(64, requires_grad=True)

    def alive(run):
        came.clear()
        y = run(x)
        gc.collect()
        return sum(t() is not None for t in came)

    assert alive(f) > 1 >= alive(partial(checkpoint, f, use_reentrant=reentrant))


def test_hooks_see_all_that_is_kept():
    """Packed and unpacked as often, in any representation; the graph itself holds none of it."""
    packed, unpacked = [], []
    f, x = bridge.to_torch(lambda x: jnp.sin(jnp.exp(x))), torch.ones(3, dtype=torch.float64, requires_grad=True)
    pack, unpack = lambda t: packed.append(t.shape) or t.numpy().copy(), lambda a: unpacked.append(a.shape) or torch.from_numpy(a)  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(lambda t: pack(t.detach()), unpack):
        y = f(x)
    close(torch.autograd.grad(y.sum(), x)[0], (x.exp().cos() * x.exp()).detach())
    assert len(packed) == len(unpacked) > 1


@pytest.mark.parametrize("kept", ["input", "output"])
def test_a_write_between_forward_and_backward_is_torchs_error(kept):
    f, x = bridge.to_torch(jnp.exp if kept == "output" else jnp.sin), torch.ones(3, requires_grad=True)
    w = x * 1
    y = f(w)
    (w if kept == "input" else y).detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_freed_graph_is_torchs_error():
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    y = bridge.to_torch(ENERGIES["cubic"].jax)(x)
    y.backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()
