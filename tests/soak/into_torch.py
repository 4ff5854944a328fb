"""JAX in torch: what is called, eagerly and under torch.compile, and what goes wrong in between."""

from __future__ import annotations

import gc
import os
import signal
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch

import bridge
from tests.soak import values
from tests.soak.faults import Planted, expect, interrupted, planted, tick
from tests.soak.into_jax import sines, slopes
from tests.soak.values import ALL, COMPLEX, FLOATS, WIDE, Sine, compare, draw, sine
from tests.soak.watch import settle

# "control" is "compile" without the bridge: what grows there as well is torch's own.
LANES = ("torch", "compile", "control")
EAGER = ("torch",)
TRACED = ("compile", "control")
func = torch.func


class Case(NamedTuple):
    """A function of one tensor, and its values.

    `of(w)` makes the function of a JAX callable with the weight w. `expected(xs, w)` are its values
    in NumPy for the inputs xs, one in each row. `lanes` says whether it is run eagerly alone.
    `share` is its part of the calls: little where they are slow."""

    of: Callable[[float], Callable]
    expected: Callable[[np.ndarray, float], Any]
    dtypes: tuple[str, ...]
    lanes: tuple[str, ...] = EAGER
    share: float = 1.0


def energy(w):
    return bridge.to_torch(sine(w))


def backward(f):
    """The gradient by torch.autograd."""

    def gradient(x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(f(x), x)[0]

    return gradient


def twice(f):
    """The gradient of half the square of the gradient, by double backward."""

    def gradient(x):
        x = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(f(x), x, create_graph=True)
        return torch.autograd.grad((g * g).sum() / 2, x)[0]

    return gradient


def weights(w):
    """The gradient in a parameter of a module."""
    module = bridge.module(lambda p, x: sine(1.0)(x) * p.astype(x.dtype), jnp.asarray(w))

    def gradient(x):
        module.zero_grad()
        module(x).backward()
        return module.get_parameter("param").grad

    return gradient


def potential(w):
    """Energy and gradients of a system, with edges made at each call."""
    model = bridge.torch_potential(values.springs(w), gradients="autodiff", cutoff=9.0)

    def call(x):
        out = model(structure(x))
        return out["energy"][0], out["position_gradients"]

    return call


def structure(x):
    """The contract's dict for positions in a row."""
    pos = x.reshape(-1, 3)
    fixed = {k: torch.as_tensor(v) for k, v in values.system(len(pos)).items()}
    return {"pos": pos, "cell": pos.new_zeros(1, 3, 3), **fixed}


def nested(w):
    """Torch in JAX in torch."""
    return bridge.to_torch(bridge.to_jax(Sine(w)))


def jvp(f):
    """The derivative of f along its input."""
    return lambda x: func.jvp(f, (x,), (x,))[1]


def two(f):
    """f mapped over x and -x."""
    return lambda x: torch.vmap(f)(torch.stack([x, -x]))


def curvatures(f):
    """The diagonal of the Hessian."""
    hessian = func.hessian(f)
    return lambda x: hessian(x).diagonal()


def inside(f):
    """f amid operations of torch, which torch.compile makes graphs of."""
    return lambda x: f(x + x) * 2


# The other backends of torch 2.13 keep 13 tensors for each function that they compile, for ever,
# also of torch alone.
compiled = partial(torch.compile, fullgraph=True, backend="eager")
COMPILED = ("torch", *TRACED)
CASES = {
    "energy": Case(energy, sines, FLOATS, COMPILED, 3.0),
    "amid operations": Case(
        lambda w: inside(energy(w)), lambda xs, w: 2 * sines(2 * xs, w), WIDE, COMPILED
    ),
    "backward": Case(lambda w: backward(energy(w)), slopes, FLOATS, share=0.5),
    "backward amid operations": Case(
        lambda w: backward(inside(energy(w))), lambda xs, w: 4 * slopes(2 * xs, w), WIDE, share=0.5
    ),
    "double backward": Case(
        lambda w: twice(energy(w)), lambda xs, w: -slopes(xs, w) * w * np.sin(xs), WIDE, share=0.3
    ),
    "weights": Case(weights, lambda xs, w: np.sin(xs).sum(-1), WIDE, share=0.5),
    "func.grad": Case(lambda w: func.grad(energy(w)), slopes, FLOATS, COMPILED, 0.1),
    "jvp": Case(
        lambda w: jvp(energy(w)), lambda xs, w: (xs * slopes(xs, w)).sum(-1), FLOATS, share=0.1
    ),
    "vmap": Case(
        lambda w: two(energy(w)),
        lambda xs, w: np.stack([sines(xs, w), -sines(xs, w)], -1),
        FLOATS,
        COMPILED,
        0.3,
    ),
    "hessian": Case(
        lambda w: curvatures(energy(w)), lambda xs, w: -w * np.sin(xs), WIDE, share=0.01
    ),
    "mirror": Case(
        lambda w: bridge.to_torch(lambda x: x[::-1]), lambda xs, w: xs[:, ::-1], ALL, COMPILED, 2.0
    ),
    "complex": Case(
        lambda w: bridge.to_torch(lambda z: w * z * z), lambda xs, w: w * xs * xs, COMPLEX
    ),
    "potential": Case(potential, values.springs_expected, WIDE, share=0.2),
    "nested": Case(nested, sines, WIDE, share=3.0),
    "backward of nested": Case(lambda w: backward(nested(w)), slopes, WIDE, share=0.2),
}


# What the control calls in the place of JAX's functions.
ALONE = {
    "energy": Sine,
    "amid operations": lambda w: inside(Sine(w)),
    "func.grad": lambda w: func.grad(Sine(w)),
    "vmap": lambda w: two(Sine(w)),
    "mirror": lambda w: (
        lambda x: x.view(torch.uint8).reshape(*x.shape, -1).flip(0).view(x.dtype)[..., 0]
    ),
}


def prepare(lane: str) -> None:
    """Nothing has to be made ahead."""


def cases(lane: str) -> dict[str, Case]:
    """Those that a lane has."""
    found = {name: c for name, c in CASES.items() if lane in c.lanes}
    if lane == "control":
        return {name: c._replace(of=ALONE[name]) for name, c in found.items()}
    return found


def good(rng: np.random.Generator, lane: str, case: Case, n: int) -> int:
    """n calls, all compared; returns how many there were."""
    dtype = case.dtypes[rng.integers(len(case.dtypes))]
    size = 3 * int(rng.integers(1, 9)) if case.of is potential else int(rng.choice(values.SIZES))
    w = float(rng.uniform(0.5, 1.5))
    xs = draw(rng, dtype, (n, size))
    wide = xs if xs.dtype.kind in "iubcV" else xs.astype(np.float64)
    f = case.of(w)
    if lane in TRACED:
        torch._dynamo.reset()  # or it stops to compile after some shapes
        f = compiled(f)
    given = bridge.to_torch(jnp.asarray(xs), copy=True)
    if lane in TRACED:  # torch 2.13 keeps two tensors for each view that it compiles for, for ever
        given = [x.clone() for x in given]
    outs = [f(x) for x in given]
    rows = zip(*outs) if isinstance(outs[0], tuple) else (outs,)
    got = [bridge.to_jax(torch.stack([t.detach() for t in row])) for row in rows]
    compare(got, case.expected(wide, values.rounded(w, dtype)), dtype)
    return n


# What goes wrong. Each says what must come of it; after each, calls have to be right again.


def right(f, rng, w=1.5, size=5) -> None:
    """The energy, and its gradient, are what they should be."""
    xs = draw(rng, "float64", (3, size))
    given = [torch.tensor(x) for x in xs]
    compare(torch.stack([f(x) for x in given]), sines(xs, w), "float64")
    compare(torch.stack([backward(f)(x) for x in given]), slopes(xs, w), "float64")


def raises_as_it_is_traced(rng, lane):
    """And works at the next call."""
    armed = [True]

    def model(x):
        if armed[0]:
            raise Planted("planted in the trace")
        return sine(1.5)(x)

    f = bridge.to_torch(model)
    with expect(Planted):
        f(torch.ones(5))
    armed[0] = False
    right(f, rng)


def raises_as_it_runs(rng, lane):
    """In a torch model within the JAX function, forward or back."""
    module = Sine(1.5, planted(int(rng.integers(1, 6))))
    f = bridge.to_torch(
        bridge.to_jax(
            module, outputs=lambda x: jax.ShapeDtypeStruct((), x.dtype), derivatives="autograd"
        )
    )
    with expect(Exception, "[Pp]lanted"):
        for _ in range(6):
            backward(f)(torch.ones(5, dtype=torch.float64))
    module.meanwhile = None
    right(f, rng)


def interrupt_inside(rng, lane):
    """Ctrl-C while a torch model within the JAX function runs."""
    at = tick(int(rng.integers(1, 6)), lambda: os.kill(os.getpid(), signal.SIGINT))
    module = Sine(1.5, at)
    f = bridge.to_torch(bridge.to_jax(module, outputs=lambda x: jax.ShapeDtypeStruct((), x.dtype)))
    interrupted(lambda: [f(torch.ones(5, dtype=torch.float64)) for _ in range(6)])
    module.meanwhile = None
    right(f, rng)


def interrupt_anywhere(rng, lane):
    """Ctrl-C at any moment: of tracing, compiling, running, differentiating."""
    f, x = energy(1.5), torch.ones(5, dtype=torch.float64)
    calls = [f, backward(f), func.grad(f), func.hessian(f)]
    call = calls[rng.integers(len(calls))]
    interrupted(lambda: [call(x) for _ in range(200)], rng.uniform(0, 0.3))
    right(f, rng)


def wrong_arguments(rng, lane):
    """Refused, whatever was called before."""
    f = energy(1.5)
    for _ in range(2):
        with expect(TypeError, "expected"):
            f({1: {2}})
        with expect(AttributeError):  # of the callable itself
            f("text")
        with expect((TypeError, ValueError)):
            bridge.to_torch(lambda x, w: x @ w)(torch.ones(2, 3), torch.ones(2, 3))
        right(f, rng)


def wrong_shape(rng, lane):
    """Within the JAX function, a torch model returns another shape than it declared."""
    f = bridge.to_torch(bridge.to_jax(lambda x: x[1:], outputs=lambda x: x))
    with expect(Exception, "float32"):
        f(torch.ones(5))


def not_finite(rng, lane):
    """A position is NaN, which a potential refuses."""
    call = potential(1.5)
    xs = draw(rng, "float64", (1, 3 * values.ATOMS))
    with expect(ValueError, "finite"):
        call(torch.as_tensor(np.where(np.arange(xs.shape[1]) == 4, np.nan, xs[0])))
    energy, gradients = call(torch.as_tensor(xs[0]))
    compare((energy[None], gradients[None]), values.springs_expected(xs, 1.5), "float64")


def changed_in_place(rng, lane):
    """Between the forward and its backward, which torch refuses."""
    f, x = energy(1.5), torch.ones(5, requires_grad=True)
    y = 1 * x
    out = f(y)
    with torch.no_grad():
        y.add_(1.0)
    with expect(RuntimeError, "inplace"):
        out.backward()
    right(f, rng)


def backward_alone(rng, lane):
    """The function is dropped, and caches are cleared, while a graph lives."""
    captured = jnp.asarray(1.5)
    alive = weakref.ref(captured)
    f = bridge.to_torch(lambda x: captured * jnp.sin(x).sum())
    x = torch.as_tensor(draw(rng, "float64", 7)).requires_grad_()
    y = f(x)
    del f, captured
    gc.collect()
    if rng.random() < 0.5:
        jax.clear_caches()
    (g,) = torch.autograd.grad(y, x)
    compare(g, slopes(x.detach().numpy(), 1.5), "float64")
    del y
    for _ in range(20):
        if alive() is None:
            return
        settle()
    raise AssertionError("expected what a function captured to go with it, got an array that lives")


def caches_cleared(rng, lane):
    """Beneath functions that are used again, compiled and not."""
    f = energy(1.5)
    traced = compiled(f)
    for clear in (jax.clear_caches, torch._dynamo.reset, gc.collect):
        right(f, rng)
        right(traced, rng)
        clear()
    right(f, rng)
    right(traced, rng)


def narrow(rng, lane):
    """x64 is off for a while."""
    f, x = energy(1.5), torch.ones(5, dtype=torch.float64)
    with jax.enable_x64(False), expect(ValueError, "64"):
        f(x)
    right(f, rng)


FAULTS: dict[str, tuple[Callable, tuple[str, ...]]] = {
    f.__name__.replace("_", " "): (f, ("torch", "compile"))
    for f in (
        raises_as_it_is_traced,
        raises_as_it_runs,
        interrupt_inside,
        interrupt_anywhere,
        wrong_arguments,
        wrong_shape,
        not_finite,
        changed_in_place,
        backward_alone,
        caches_cleared,
        narrow,
    )
}
