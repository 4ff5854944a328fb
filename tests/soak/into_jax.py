"""Torch in JAX: what is called on a lane, most of the calls within one scan, and what goes wrong in
between."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch

import bridge
from tests.soak import values
from tests.soak.faults import Planted, expect, interrupted, planted, tick
from tests.soak.values import ALL, COMPLEX, FLOATS, WIDE, Sine, Springs, compare, draw
from tests.soak.watch import settle

LANES = ("ffi", "host", "native")
PYTHON = ("ffi", "host")  # lanes on which the model itself runs
SCALAR = lambda x: jax.ShapeDtypeStruct((), x.dtype)


class Case(NamedTuple):
    """A function of one input, and its values.

    `of(w, lane)` makes the function of a model with the weight w. `expected(xs, w)` are its values in
    NumPy for the inputs xs, one in each row. `native` are the (dtype, size) that are compiled for
    the native lane: none where it has no such thing. `share` is its part of the calls: little where
    they are slow."""

    of: Callable[[float, str], Callable]
    expected: Callable[[np.ndarray, float], Any]
    dtypes: tuple[str, ...]
    native: tuple[tuple[str, int], ...] = ()
    share: float = 1.0


def energy(w, lane, **options):
    return bridge.to_jax(Sine(w), lane=lane, **options)


def weights(w, lane):
    """The gradient in the weight of the module."""
    apply, params = bridge.functional(Sine(w), lane=lane)
    return lambda x: jax.grad(lambda p: apply(p, x).astype(jnp.float64))(params)["weight"]


def two(f):
    """f mapped over x and -x."""
    return lambda x: jax.vmap(f)(jnp.stack([x, -x]))


def jvp(f):
    """f with its derivative along its input."""
    return lambda x: jax.jvp(f, (x,), (x,))


def curvatures(f):
    """The diagonal of the Hessian."""
    hessian = jax.hessian(f)
    return lambda x: jnp.diagonal(hessian(x))


def potential(w, lane):
    """Energy and gradients of a system."""
    model = bridge.jax_potential(Springs(w), gradients="autograd", card=values.CARD, lane=lane)

    def call(x):
        out = model(structure(x))
        return out["energy"][0], out["position_gradients"]

    return call


def structure(x):
    """The contract's dict for positions in a row."""
    pos = x.reshape(-1, 3)
    fixed = {k: jnp.asarray(v) for k, v in values.system(len(pos)).items()}
    return {"pos": pos, "cell": jnp.zeros((1, 3, 3), pos.dtype), **fixed}


def nested(w, lane):
    """JAX in torch in JAX."""
    return bridge.to_jax(bridge.to_torch(values.sine(w)), lane=lane)


sines = lambda xs, w: w * np.sin(xs).sum(-1)
slopes = lambda xs, w: w * np.cos(xs)
CASES = {
    "energy": Case(energy, sines, FLOATS, (("float32", 5), ("float64", 3))),
    "gradient": Case(
        lambda w, lane: jax.grad(energy(w, lane)), slopes, FLOATS, (("float64", 4), ("float32", 5))
    ),
    "energy and gradient": Case(
        lambda w, lane: jax.value_and_grad(energy(w, lane)),
        lambda xs, w: (sines(xs, w), slopes(xs, w)),
        FLOATS,
    ),
    "jvp": Case(
        lambda w, lane: jvp(energy(w, lane)),
        lambda xs, w: (sines(xs, w), (xs * slopes(xs, w)).sum(-1)),
        FLOATS,
        (("float64", 3),),
    ),
    "vmap": Case(
        lambda w, lane: two(energy(w, lane)),
        lambda xs, w: np.stack([sines(xs, w), -sines(xs, w)], -1),
        FLOATS,
        (("float32", 2),),
    ),
    "vmap of gradient": Case(
        lambda w, lane: two(jax.grad(energy(w, lane))),
        lambda xs, w: np.stack([slopes(xs, w)] * 2, 1),
        FLOATS,
        share=0.3,
    ),
    "gradient, one after another": Case(
        lambda w, lane: two(
            jax.grad(energy(w, lane, derivatives="autograd", batched="sequential"))
        ),
        lambda xs, w: np.stack([slopes(xs, w)] * 2, 1),
        FLOATS,
    ),
    "hessian": Case(
        lambda w, lane: curvatures(energy(w, lane)),
        lambda xs, w: -w * np.sin(xs),
        WIDE,
        share=0.05,
    ),
    "weights": Case(weights, lambda xs, w: np.sin(xs).sum(-1), WIDE),
    "mirror": Case(
        lambda w, lane: bridge.to_jax(values.mirror, lane=lane),
        lambda xs, w: xs[:, ::-1],
        ALL,
        (("int32", 4), ("bfloat16", 3)),
        share=4.0,
    ),
    "complex": Case(
        lambda w, lane: jvp(bridge.to_jax(lambda z: w * z * z, lane=lane)),
        lambda xs, w: (w * xs * xs, 2 * w * xs * xs),
        COMPLEX,
        share=0.2,
    ),
    "potential": Case(potential, values.springs_expected, WIDE, (("float64", 12),), 0.25),
    "nested": Case(nested, sines, WIDE),
    "gradient of nested": Case(lambda w, lane: jax.grad(nested(w, lane)), slopes, WIDE, share=0.2),
}


def scanned(f):
    """The values of f for each row of an array, in one program."""
    return jax.jit(lambda xs: jax.lax.scan(lambda _, x: (None, f(x)), None, xs)[1])


def cases(lane: str) -> dict[str, Case]:
    """Those that a lane has."""
    return {name: c for name, c in CASES.items() if lane in PYTHON or c.native}


def prepare(lane: str) -> None:
    """Compiles all packages of the native lane: what torch's compiler keeps of each is no growth."""
    for case in cases(lane).values():
        for dtype, size in case.native if lane == "native" else ():
            program = scanned(case.of(1.5, lane))
            jax.block_until_ready(program(jnp.ones((1, size), dtype)))
            jax.block_until_ready(jax.jit(case.of(1.5, lane))(jnp.ones(size, dtype)))


def drawn(rng, lane, case):
    """(dtype, size, weight) for a case. Each is a package on the native lane, so that a few of them
    are taken again and again there."""
    if lane == "native":
        dtype, size = case.native[rng.integers(len(case.native))]
        return dtype, size, 1.5
    size = 3 * int(rng.integers(1, 9)) if case.of is potential else int(rng.choice(values.SIZES))
    return case.dtypes[rng.integers(len(case.dtypes))], size, float(rng.uniform(0.5, 1.5))


def good(rng: np.random.Generator, lane: str, case: Case, n: int) -> int:
    """n calls in a scan, a few jitted and eager ones, all compared; returns how many there were."""
    dtype, size, w = drawn(rng, lane, case)
    xs = draw(rng, dtype, (n, size))
    wide = xs if xs.dtype.kind in "iubcV" else xs.astype(np.float64)
    few = min(n, 3)
    want = case.expected(wide, values.rounded(w, dtype))
    first = jax.tree.map(lambda a: a[:few], want)
    f = case.of(w, lane)
    given = jnp.asarray(xs)
    compare(scanned(f)(given), want, dtype)
    single = jax.jit(f)
    for call in (single, f):
        outs = [call(x) for x in given[:few]]
        compare(jax.tree.map(lambda *rows: np.stack(rows), *outs), first, dtype)
    return n + 2 * few


# What goes wrong. Each says what must come of it; after each, calls have to be right again.


def meanwhile(lane, what) -> Any:
    """A model during whose calls something happens, and its program of a scan."""
    module = Sine(1.5, what)
    return module, scanned(bridge.to_jax(module, lane=lane, outputs=SCALAR))


def right(program, rng, dtype="float32", size=5, w=1.5) -> None:
    """A program of a scan still gives what it should."""
    xs = draw(rng, dtype, (6, size))
    compare(program(jnp.asarray(xs)), sines(xs.astype(np.float64), w), dtype)


def raises(rng, lane):
    """In the middle of a scan."""
    module, program = meanwhile(lane, planted(int(rng.integers(1, 30))))
    xs = jnp.ones((30, 5), jnp.float32)
    if rng.random() < 0.5:
        with expect(Planted), bridge.raising():
            jax.block_until_ready(program(xs))
    else:
        with expect(jax.errors.JaxRuntimeError, "Planted"):
            jax.block_until_ready(program(xs))
    module.meanwhile = None
    right(program, rng)


def raises_eagerly(rng, lane):
    """Outside of any program, and under its transforms."""
    f = bridge.to_jax(Sine(1.5, planted(1)), lane=lane, outputs=SCALAR)
    for call in (f, jax.grad(f), two(f)):
        with expect(Planted):
            call(jnp.ones(5))


def raises_on_several(rng, lane):
    """In the gradient of a scan, which runs the model forward and back."""
    module = Sine(1.5, planted(int(rng.integers(1, 20))))
    f = bridge.to_jax(module, lane=lane, outputs=SCALAR, derivatives="autograd")
    program = jax.jit(jax.grad(lambda xs: jax.lax.scan(lambda s, x: (s + f(x), None), 0.0, xs)[0]))
    with expect(jax.errors.JaxRuntimeError, "Planted"):
        jax.block_until_ready(program(jnp.ones((20, 5))))
    module.meanwhile = None
    compare(program(jnp.ones((20, 5))), 1.5 * np.cos(np.ones((20, 5))), "float64")


def interrupt_inside(rng, lane):
    """Ctrl-C while the model runs."""
    at = tick(int(rng.integers(1, 30)), lambda: os.kill(os.getpid(), signal.SIGINT))
    module, program = meanwhile(lane, at)
    interrupted(lambda: jax.block_until_ready(program(jnp.ones((30, 5), jnp.float32))))
    module.meanwhile = None
    right(program, rng)


def interrupt_anywhere(rng, lane):
    """Ctrl-C at any moment: of tracing, compiling, running."""
    case = cases(lane)["gradient"]
    dtype, size, w = drawn(rng, lane, case)
    xs = jnp.asarray(draw(rng, dtype, (2000, size)))

    def call():
        with bridge.raising() if must else contextlib.nullcontext():
            jax.block_until_ready(scanned(case.of(w, lane))(xs))

    must = rng.random() < 0.5
    interrupted(call, rng.uniform(0, 0.3), as_error=not must)
    good(rng, lane, case, 5)


def wrong_shape(rng, lane):
    """Not what was declared."""
    f = bridge.to_jax(lambda x: x[1:], lane=lane, outputs=lambda x: x)
    with expect((ValueError, jax.errors.JaxRuntimeError), "float32"), bridge.raising():
        jax.block_until_ready(jax.jit(f)(jnp.ones(5, jnp.float32)))


def keeps_an_input(rng, lane):
    """The model keeps a view of what is XLA's."""
    kept = []
    f = bridge.to_jax(lambda x: kept.append(x.view(-1)) or 2 * x, lane=lane, outputs=lambda x: x)
    with expect(ValueError, "keep no view"), bridge.raising():
        jax.block_until_ready(jax.jit(f)(jnp.ones(5, jnp.float32)))


def not_finite(rng, lane):
    """A position, and so an energy, is NaN, which a potential refuses."""
    program = scanned(potential(1.5, lane))
    xs = draw(rng, "float64", (6, 3 * values.ATOMS))
    bad = xs.copy()
    bad[int(rng.integers(6)), int(rng.integers(12))] = np.nan
    with expect((ValueError, jax.errors.JaxRuntimeError), "finite"):
        jax.block_until_ready(program(jnp.asarray(bad)))
    compare(program(jnp.asarray(xs)), values.springs_expected(xs, 1.5), "float64")


def no_tensor(rng, lane):
    """Refused as it is traced."""
    for wrong in (torch.ones(3), {1: {2}}):
        with expect(TypeError, "expected"):
            bridge.to_jax(torch.sin, lane=lane)(wrong)


def module_dropped(rng, lane):
    """The program lives on; when that goes, so does the module."""
    module = Sine(1.5)
    alive, program = weakref.ref(module), scanned(bridge.to_jax(module, lane=lane))
    right(program, rng)
    del module
    gc.collect()
    right(program, rng)
    del program
    for _ in range(20):
        if alive() is None:
            return
        settle()
    raise AssertionError("expected a module to go with its last program, got one that lives")


def program_dropped(rng, lane):
    """Before its result is there."""
    module, xs = Sine(1.5), draw(rng, "float32", (200, 5))
    pending = scanned(bridge.to_jax(module, lane=lane))(jnp.asarray(xs))
    settle()
    right(scanned(bridge.to_jax(module, lane=lane)), rng)
    compare(pending, sines(xs.astype(np.float64), 1.5), "float32")


def caches_cleared(rng, lane):
    """Beneath a program that is used again."""
    module = Sine(1.5)
    program = scanned(bridge.to_jax(module, lane=lane))
    right(program, rng)
    jax.clear_caches()
    right(program, rng)
    torch._dynamo.reset()
    gc.collect()
    right(program, rng)


def many_threads(rng, lane):
    """Programs compiled, called and dropped at the same time."""
    seeds, wrong = rng.integers(2**31, size=4), []

    def work(seed):
        try:
            good(np.random.default_rng(seed), lane, cases(lane)["gradient"], 20)
        except BaseException as e:
            wrong.append(e)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in seeds]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if wrong:
        raise wrong[0]


def weights_changed(rng, lane):
    """A compiled program has the weights of its compilation, and says so."""
    module = Sine(1.5)
    program = scanned(bridge.to_jax(module, lane=lane))
    right(program, rng)
    with torch.no_grad():
        module.weight.mul_(2.0)
    with expect((ValueError, jax.errors.JaxRuntimeError), "weights that the program"):
        right(program, rng, w=3.0)
    right(scanned(bridge.to_jax(module, lane=lane)), rng, w=3.0)


FAULTS: dict[str, tuple[Callable, tuple[str, ...]]] = {
    f.__name__.replace("_", " "): (f, lanes)
    for lanes, functions in {
        PYTHON: (
            raises,
            raises_eagerly,
            raises_on_several,
            interrupt_inside,
            wrong_shape,
            keeps_an_input,
        ),
        LANES: (
            interrupt_anywhere,
            not_finite,
            no_tensor,
            module_dropped,
            program_dropped,
            caches_cleared,
            many_threads,
        ),
        ("native",): (weights_changed,),
    }.items()
    for f in functions
}
