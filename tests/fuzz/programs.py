"""Small functions of torch and of JAX from one list of steps, and transforms of both that can be
composed: each takes f(x, w, s, k) -> tree to another such function."""

from functools import partial
from types import SimpleNamespace

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

tree, F = jax.tree_util, torch.func
FLOATS = 3  # of the inputs x (3,), w (3,3), s (), and k (3,) of integers 0 to 2

TORCH = SimpleNamespace(
    sin=torch.sin,
    tanh=torch.tanh,
    where=torch.where,
    sqrt=torch.sqrt,
    outer=torch.outer,
    cat=torch.cat,
    softmax=lambda v: torch.softmax(v, -1),
    stop=lambda v: v.detach(),
    scatter=lambda v, k: torch.zeros_like(v).index_add(0, k, v),
)
JAX = SimpleNamespace(
    sin=jnp.sin,
    tanh=jnp.tanh,
    where=jnp.where,
    sqrt=jnp.sqrt,
    outer=jnp.outer,
    cat=jnp.concatenate,
    softmax=jax.nn.softmax,
    stop=jax.lax.stop_gradient,
    scatter=lambda v, k: jnp.zeros_like(v).at[k].add(v),
)
# What becomes of a vector, a matrix and a number, of which each step changes one.
STEPS = {
    "v sin": lambda xp, v, m, s, k: (xp.sin(v), m, s),
    "v tanh": lambda xp, v, m, s, k: (xp.tanh(v), m, s),
    "v square": lambda xp, v, m, s, k: (v * v - v, m, s),
    "v matvec": lambda xp, v, m, s, k: (m @ v, m, s),
    "v scaled": lambda xp, v, m, s, k: (v * s, m, s),
    "v where": lambda xp, v, m, s, k: (xp.where(v > 0.1, v, s * v), m, s),
    "v gathered": lambda xp, v, m, s, k: (v[k], m, s),
    "v scattered": lambda xp, v, m, s, k: (xp.scatter(v, k), m, s),
    "v rolled": lambda xp, v, m, s, k: (xp.cat([v[1:], v[:1]]), m, s),
    "v sums": lambda xp, v, m, s, k: (v.cumsum(0), m, s),
    "v softmax": lambda xp, v, m, s, k: (xp.softmax(v), m, s),
    "v stopped": lambda xp, v, m, s, k: (v * xp.stop(v), m, s),
    "m outer": lambda xp, v, m, s, k: (v, xp.outer(v, xp.sin(v)), s),
    "m matmul": lambda xp, v, m, s, k: (v, m @ m.T, s),
    "m plus": lambda xp, v, m, s, k: (v, m + v, s),
    "m rows": lambda xp, v, m, s, k: (v, xp.sin(m)[k], s),
    "s sum": lambda xp, v, m, s, k: (v, m, v.sum()),
    "s mean": lambda xp, v, m, s, k: (v, m, (m * m).mean()),
    "s first": lambda xp, v, m, s, k: (v, m, s * v[0]),
    "s norm": lambda xp, v, m, s, k: (v, m, xp.sqrt(1 + (v * v).sum())),
}
OUTPUTS = {
    "v": lambda v, m, s, k: v,
    "s": lambda v, m, s, k: s,
    "m": lambda v, m, s, k: m.T,
    "several": lambda v, m, s, k: (v, [s * v, m]),
    "integers": lambda v, m, s, k: {"v": v, "k": k + 1},
}
programs = st.tuples(
    st.lists(st.sampled_from(list(STEPS)), min_size=1, max_size=6), st.sampled_from(list(OUTPUTS))
)


def function(program, xp):
    """f(x, w, s, k) of one library."""
    steps, output = program

    def f(x, w, s, k):
        v, m, n = x, w, s
        for step in steps:
            v, m, n = STEPS[step](xp, v, m, n, k)
        return OUTPUTS[output](v, m, n, k)

    return f


def inputs(seed, dtype="float64"):
    """x, w, s, k in NumPy."""
    rng = np.random.default_rng(seed)
    floats = (rng.uniform(-1, 1, shape).astype(dtype) for shape in ((3,), (3, 3), ()))
    return *map(np.asarray, floats), rng.integers(0, 3, 3)


def widened(x):
    """An array of either framework; in float64 where it is in float32."""
    if isinstance(x, torch.Tensor):
        return x.double() if x.is_floating_point() else x
    return x.astype("float64") if jnp.issubdtype(x.dtype, jnp.inexact) else x


# Of JAX


def _inexact(y):
    return jnp.issubdtype(y.dtype, jnp.inexact)


def jax_floats(f):
    """f without its outputs of integers, which have no derivatives."""
    return lambda *xs: [y for y in tree.tree_leaves(f(*xs)) if _inexact(y)]


def jax_total(f):
    weights = lambda y: jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
    return lambda *xs: sum((weights(y) * y).sum() for y in jax_floats(f)(*xs))


def jax_slim(f):
    """Large outputs summed over their last axes, so that composed Jacobians stay small."""
    small = lambda y: jnp.cos(y).reshape(y.shape[0], -1).sum(1) if y.size > 27 else y
    return lambda *xs: tree.tree_map(small, f(*xs))


def _jvp(f, *xs, of=jax.jvp):
    f = jax_floats(f)
    return of(lambda *ys: f(*ys, xs[-1]), xs[:-1], tuple(map(jnp.cos, xs[:-1])))


def _vjp(f, *xs):
    f = jax_floats(f)
    y, pull = jax.vjp(lambda *ys: f(*ys, xs[-1]), *xs[:-1])
    return y, pull(tree.tree_map(jnp.cos, y))


def _linearize(f, *xs):
    f = jax_floats(f)
    y, push = jax.linearize(lambda *ys: f(*ys, xs[-1]), *xs[:-1])
    return y, push(*map(jnp.sin, xs[:-1]))


def _scan(f, x, *xs):
    body = lambda c, _: (c + 0.1 * jax_total(f)(c, *xs).astype(c.dtype), f(c, *xs))
    return jax.lax.scan(body, x, None, length=2)


def _while(f, x, *xs):
    step = lambda state: (
        state[0] + 1,
        state[1] + 0.1 * jax_total(f)(state[1], *xs).astype(x.dtype),
    )
    return jax.lax.while_loop(lambda state: state[0] < 2, step, (0, x))[1]


def _vmapped(xs, axes, stack, flip):
    """Inputs with a new axis where there is one, not all of them the same along it."""
    for i, axis in enumerate(axes):
        if axis is None:
            yield xs[i]
        else:
            other = flip(xs[i]) if i == FLOATS else -1.5 * xs[i]
            yield stack([xs[i], other, xs[i]], axis if xs[i].ndim else 0)


def _fitting(xs, axes):
    return tuple(a if a is None or x.ndim else 0 for x, a in zip(xs, axes))


def _vmap(f, *xs, axes, out):
    mapped = _vmapped(xs, axes, jnp.stack, lambda k: k[::-1])
    return jax.vmap(f, _fitting(xs, axes), out)(*mapped)


of_args = st.sampled_from([(0,), (1,), (0, 2), (0, 1, 2)])
in_axes = st.sampled_from(
    [(0,) * 4, (0, None, None, None), (None, 1, None, 0), (-1, 0, 0, None), (None, None, 0, None)]
)
JAX_TRANSFORMS = {
    "jit": st.just(jax.jit),
    "checkpoint": st.just(jax.checkpoint),
    "grad": of_args.map(lambda n: lambda f: jax.grad(jax_total(f), n)),
    "value_and_grad": of_args.map(lambda n: lambda f: jax.value_and_grad(jax_total(f), n)),
    "jacrev": of_args.map(lambda n: lambda f: jax.jacrev(jax_floats(f), n)),
    "jacfwd": of_args.map(lambda n: lambda f: jax.jacfwd(jax_floats(f), n)),
    "hessian": of_args.map(lambda n: lambda f: jax.hessian(jax_total(f), n)),
    "jvp": st.just(lambda f: partial(_jvp, f)),
    "vjp": st.just(lambda f: partial(_vjp, f)),
    "linearize": st.just(lambda f: partial(_linearize, f)),
    "vmap": st.tuples(in_axes, st.sampled_from([0, -1])).map(
        lambda a: lambda f: partial(_vmap, f, axes=a[0], out=a[1])
    ),
    "scan": st.just(lambda f: partial(_scan, f)),
    "while_loop": st.just(lambda f: partial(_while, f)),
    "cond": st.just(
        lambda f: (
            lambda *xs: jax.lax.cond(
                xs[0].sum() > 0, f, lambda *ys: tree.tree_map(lambda y: 2 * y, f(*ys)), *xs
            )
        )
    ),
}


# Of torch


def torch_floats(f):
    return lambda *xs: tuple(y for y in torch_leaves(f(*xs)) if y.is_floating_point())


def torch_leaves(y):
    """In JAX's order, of dicts too."""
    return tree.tree_leaves(y, is_leaf=lambda y: isinstance(y, torch.Tensor))


def torch_total(f):
    weights = lambda y: torch.cos(torch.arange(y.numel(), dtype=y.dtype)).reshape(y.shape)
    return lambda *xs: sum((weights(y) * y).sum() for y in torch_floats(f)(*xs))


def torch_slim(f):
    small = lambda y: torch.cos(y).reshape(y.shape[0], -1).sum(1) if y.numel() > 27 else y
    return lambda *xs: tuple(map(small, torch_leaves(f(*xs))))


def _of_floats(f, xs):
    f = torch_floats(f)
    return lambda *ys: f(*ys, xs[-1])


def _torch_jvp(f, *xs):
    return F.jvp(_of_floats(f, xs), xs[:-1], tuple(map(torch.cos, xs[:-1])))


def _torch_vjp(f, *xs):
    y, pull = F.vjp(_of_floats(f, xs), *xs[:-1])
    return y, pull(tuple(map(torch.cos, y)))


def _torch_linearize(f, *xs):
    y, push = F.linearize(_of_floats(f, xs), *xs[:-1])
    return y, push(*map(torch.sin, xs[:-1]))


def _torch_vmap(f, *xs, axes):
    """The results' new axis is the first one: with out_dims=-1 torch 2.13 reads beyond the sizes of
    an output that does not depend on what is mapped."""
    mapped = _vmapped(xs, axes, torch.stack, lambda k: k.flip(0))
    return F.vmap(lambda *ys: tuple(torch_leaves(f(*ys))), _fitting(xs, axes))(*mapped)


def _leaves_of_autograd(xs):
    """Inputs in a graph: their own where they are in one."""
    return [x if x.requires_grad else x.detach().clone().requires_grad_() for x in xs[:-1]]


def _autograd(f, *xs):
    """Gradients that have a graph, so that it can be done again."""
    ys = _leaves_of_autograd(xs)
    total = torch_total(f)(*ys, xs[-1]) + sum(0 * y.sum() for y in ys)
    return torch.autograd.grad(total, ys, create_graph=True)


def _checkpoint(f, *xs):
    ys = _leaves_of_autograd(xs)
    total = lambda *zs: torch_total(f)(*zs, xs[-1]) + sum(0 * z.sum() for z in zs)
    return torch.autograd.grad(checkpoint(total, *ys, use_reentrant=False), ys, create_graph=True)


TORCH_TRANSFORMS = {
    "grad": of_args.map(lambda n: lambda f: F.grad(torch_total(f), n)),
    "jacrev": of_args.map(lambda n: lambda f: F.jacrev(torch_floats(f), n)),
    "jacfwd": of_args.map(lambda n: lambda f: F.jacfwd(torch_floats(f), n)),
    "hessian": of_args.map(lambda n: lambda f: F.hessian(torch_total(f), n)),
    "jvp": st.just(lambda f: partial(_torch_jvp, f)),
    "vjp": st.just(lambda f: partial(_torch_vjp, f)),
    "linearize": st.just(lambda f: partial(_torch_linearize, f)),
    "vmap": in_axes.map(lambda axes: lambda f: partial(_torch_vmap, f, axes=axes)),
}
# These are the outermost ones, since torch.func does not see what torch.autograd does.
OF_AUTOGRAD = {
    "autograd": st.just(lambda f: partial(_autograd, f)),
    "checkpoint": st.just(lambda f: partial(_checkpoint, f)),
}


def chains(transforms, most, outer=None):
    """Lists of (name, transform), innermost first."""
    one = lambda table: st.sampled_from(list(table)).flatmap(
        lambda name: st.tuples(st.just(name), table[name])
    )
    inner = st.lists(one(transforms), min_size=1, max_size=most)
    if outer is None:
        return inner
    both = st.tuples(inner, st.lists(one(outer), max_size=2))
    return both.map(lambda pair: pair[0][: most - len(pair[1])] + pair[1])


def composed(f, chain, slim):
    for _, transform in chain:
        f = slim(transform(f))
    return f
