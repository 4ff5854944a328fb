"""Every transform of torch as a function of (f, inputs), for tests of JAX callables in torch. Add a
row, and all twins are tested on it."""

import re
from functools import cache, partial

import jax.numpy as jnp
import numpy as np
import torch
from torch.autograd import forward_ad as fwd
from torch.autograd import functional as A
from torch.utils.checkpoint import checkpoint

import bridge
from tests.cases import TWINS, Twin, draw

F = torch.func
ALL = lambda xs: tuple(range(len(xs)))
CT = lambda y: torch.cos(torch.arange(y.numel(), dtype=y.real.dtype)).reshape(y.shape)
real = lambda y: torch.view_as_real(y.resolve_conj()) if y.is_complex() else y
TOTAL = lambda f: lambda *xs: (lambda y: (CT(y) * y).sum())(real(f(*xs)))
TWO = lambda xs: [torch.stack([x, 2 * x]) for x in xs]
close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)

Z, R = (
    torch.tensor([0.3 + 0.4j, -1.2 + 0.7j], dtype=torch.complex128),
    torch.tensor([0.5, -1.5], dtype=torch.float64),
)
COMPLEX = {  # the third entry: the inputs themselves
    "holomorphic": Twin(lambda z: z**3 + z.exp(), lambda z: z**3 + jnp.exp(z), (Z,)),
    "conj": Twin(lambda z: z.conj() * z**2, lambda z: z.conj() * z**2, (Z,)),
    "only_conj": Twin(lambda z: z.conj().resolve_conj(), jnp.conj, (Z,)),
    "abs": Twin(lambda z: z.abs().sum(), lambda z: jnp.abs(z).sum(), (Z,)),
    "real_out": Twin(lambda z: z.real * z.imag**2, lambda z: z.real * z.imag**2, (Z,)),
    "real_in": Twin(lambda x: torch.exp(1j * x) * x, lambda x: jnp.exp(1j * x) * x, (R,)),
    "through": Twin(
        lambda x: torch.fft.fft(x).abs() ** 2, lambda x: jnp.abs(jnp.fft.fft(x)) ** 2, (R,)
    ),
    "mixed": Twin(
        lambda x, z: (x * z).sin() * z.conj(), lambda x, z: jnp.sin(x * z) * z.conj(), (R, Z)
    ),
}


@cache
def bridged(name):
    return bridge.to_torch((TWINS | COMPLEX)[name].jax)


def inputs(name, n=2, m=3, seed=0, dtype="float64"):
    return (
        tuple(torch.from_numpy(np.array(x)) for x in draw(TWINS[name], n, m, seed, dtype))
        if name in TWINS
        else COMPLEX[name].shapes
    )


def leaves(xs):
    return [x.detach().clone().requires_grad_() for x in xs]


def backward(f, xs):
    xs = leaves(xs)
    y = f(*xs)
    TOTAL(lambda: y)().backward()
    return y.detach(), [x.grad for x in xs]


def again(f, xs, order):
    """Gradients of gradients, by torch.autograd.grad; of what doesn't depend on xs, too."""
    xs = leaves(xs)
    y = f(*xs)
    for _ in range(order):
        loss = TOTAL(lambda: y)() + sum(0 * real(x).sum() for x in xs)
        y = torch.cat([real(g).flatten() for g in torch.autograd.grad(loss, xs, create_graph=True)])
    return y


def twice(f, xs):
    """Two backwards through one graph."""
    xs = leaves(xs)
    y = TOTAL(f)(*xs)
    return [torch.autograd.grad(c * y * y, xs, retain_graph=True) for c in (1, 2)]


def dual(f, xs, mode=torch.no_grad):
    with mode(), fwd.dual_level():
        y = fwd.unpack_dual(f(*[fwd.make_dual(x, x.cos()) for x in xs]))
        return torch.zeros_like(y.primal) if y.tangent is None else y.tangent


def offloaded(f, xs):
    with torch.autograd.graph.save_on_cpu():
        return backward(f, xs)


def over_first(f, xs):
    return F.vmap(f, (0,) + (None,) * (len(xs) - 1))


TRANSFORMS = {
    "call": lambda f, xs: f(*xs),
    "backward": backward,
    "backward_of_first": lambda f, xs: backward(lambda x: f(x, *xs[1:]), xs[:1]),
    "backward_twice": twice,
    "double_backward": lambda f, xs: again(f, xs, 2),
    "triple_backward": lambda f, xs: again(f, xs, 3),
    "grad": lambda f, xs: F.grad(TOTAL(f), ALL(xs))(*xs),
    "vjp": lambda f, xs: (lambda y, pull: (pull(CT(y).to(y.dtype)), pull(y)))(*F.vjp(f, *xs)),
    "vjp_backward": lambda f, xs: (
        lambda y, pull: backward(lambda c: pull(c)[0], [CT(y).to(y.dtype)])
    )(*F.vjp(f, *xs)),
    "jvp": lambda f, xs: F.jvp(f, xs, tuple(map(torch.cos, xs))),
    "jvp_of_first": lambda f, xs: F.jvp(lambda x: f(x, *xs[1:]), xs[:1], xs[:1]),
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
    "vmap_of_first": lambda f, xs: over_first(f, xs)(torch.stack([xs[0], -xs[0]]), *xs[1:]),
    "vmap_last_axis": lambda f, xs: F.vmap(f, -1, -1)(*[torch.stack([x, 2 * x], -1) for x in xs]),
    "vmap_vmap": lambda f, xs: F.vmap(F.vmap(f))(*TWO(TWO(xs))),
    "vmap_vmap_crossed": lambda f, xs: F.vmap(over_first(f, xs), (1,) + (None,) * (len(xs) - 1), 1)(
        torch.stack(TWO([xs[0], -xs[0]])), *xs[1:]
    ),
    "vmap_grad": lambda f, xs: F.vmap(F.grad(TOTAL(f), ALL(xs)))(*TWO(xs)),
    "vmap_jvp": lambda f, xs: F.vmap(lambda *xs: F.jvp(f, xs, xs))(*TWO(xs)),
    "vmap_hessian": lambda f, xs: F.vmap(F.hessian(TOTAL(f)))(*TWO(xs)),
    "grad_vmap": lambda f, xs: F.grad(lambda *ys: (over_first(f, xs)(*ys) ** 2).sum(), ALL(xs))(
        torch.stack([xs[0], -xs[0]]), *xs[1:]
    ),
    "jvp_vmap": lambda f, xs: F.jvp(
        over_first(f, xs),
        (torch.stack([xs[0], -xs[0]]), *xs[1:]),
        (torch.stack([xs[0], xs[0]]), *xs[1:]),
    )[1],
    "backward_vmap": lambda f, xs: backward(F.vmap(f), TWO(xs)),
    "backward_grad": lambda f, xs: backward(F.grad(TOTAL(f)), xs),
    "dual": dual,
    "dual_backward": lambda f, xs: dual(
        lambda *ys: torch.autograd.grad(TOTAL(f)(*ys), ys[0], create_graph=True)[0],
        leaves(xs),
        torch.enable_grad,
    ),
    "backward_dual": lambda f, xs: backward(lambda *xs: dual(f, xs, torch.enable_grad), xs),
    "functional_vjp": lambda f, xs: A.vjp(TOTAL(f), xs),
    "functional_jvp": lambda f, xs: A.jvp(f, xs, tuple(map(torch.cos, xs))),
    "functional_jacobian": lambda f, xs: A.jacobian(f, xs),
    "functional_hessian": lambda f, xs: A.hessian(TOTAL(f), xs),
    "functional_hvp": lambda f, xs: A.hvp(TOTAL(f), xs, tuple(map(torch.cos, xs))),
    "checkpoint": lambda f, xs: backward(lambda *xs: checkpoint(f, *xs, use_reentrant=False), xs),
    "checkpoint_reentrant": lambda f, xs: backward(
        lambda *xs: checkpoint(f, *xs, use_reentrant=True), xs
    ),
    "save_on_cpu": offloaded,
}
BATCHED_COTANGENTS = {
    "is_grads_batched": lambda f, xs: (
        lambda xs, y: torch.autograd.grad(
            y, xs, torch.stack([CT(y), y.detach()]), is_grads_batched=True
        )
    )(*(lambda xs: (xs, f(*xs)))(leaves(xs))),
    "is_grads_batched, one row": lambda f, xs: (
        lambda xs, y: torch.autograd.grad(y, xs, CT(y)[None], is_grads_batched=True)
    )(*(lambda xs: (xs, f(*xs)))(leaves(xs))),
    "jacobian": lambda f, xs: A.jacobian(f, xs, vectorize=True),
    "jacobian_forward": lambda f, xs: A.jacobian(f, xs, vectorize=True, strategy="forward-mode"),
    "hessian": lambda f, xs: A.hessian(TOTAL(f), xs, vectorize=True),
    "hessian_forward": lambda f, xs: A.hessian(
        TOTAL(f), xs, vectorize=True, outer_jacobian_strategy="forward-mode"
    ),
}

# What torch.compile makes of an error inside, and its own for what it can't do.
REFUSALS = NotImplementedError, RuntimeError, torch._dynamo.exc.Unsupported
_CLEAR = "expected .* got .*; |double backward|not supported|Unsupported functorch|meta conversion to view|must implement the jvp|wrap a dual tensor"


def equal_or_refused(run, want, must=False):
    """Never a wrong number; unless it must be right, an error that says what is not supported."""
    try:
        got = run()
    except REFUSALS as e:
        if must or not re.search(_CLEAR, str(e)):
            raise
    else:
        close(got, want)
