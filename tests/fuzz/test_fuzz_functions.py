"""State machines over functions: torch in JAX and JAX in torch under composed transforms, beside the
same function written in the other framework; and wrong calls in between."""

from functools import cache

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

import bridge
from tests.cases import ENERGIES, close
from tests.fuzz import programs
from tests.fuzz.programs import (
    JAX,
    JAX_TRANSFORMS,
    OF_AUTOGRAD,
    TORCH,
    TORCH_TRANSFORMS,
    chains,
    composed,
)

DEPTH = 4
seeds = st.integers(0, 2**16)
dtypes = st.sampled_from(["float64", "float64", "float32"])
TOLERANCE = {"float64": 1e-9, "float32": 2e-3}
# What a call is given instead of its inputs x (3,), w (3,3), s (), k (3,) of integers.
WRONG = {
    "shape": lambda x, w, s, k: (x[:2], w, s, k),
    "rank": lambda x, w, s, k: (w, w, s, k),
    "dtype": lambda x, w, s, k: (x.astype("float16"), w, s, k),
    "integers": lambda x, w, s, k: (k, w, s, k),
    "no integers": lambda x, w, s, k: (x, w, s, x),
    "too few": lambda x, w, s, k: (x, w, s),
    "too many": lambda x, w, s, k: (x, w, s, k, x),
    "None": lambda x, w, s, k: (x, None, s, k),
    "swapped": lambda x, w, s, k: (w, x, s, k),
}
wrong = st.sampled_from(list(WRONG))


def outcome(call):
    """The leaves that a call gives in NumPy, or the error that it is."""
    try:
        leaves = jax.tree_util.tree_leaves(call())
        return [np.asarray(y.detach() if isinstance(y, torch.Tensor) else y) for y in leaves]
    except Exception as error:
        return error


def same(got, want, tolerance, said):
    """Equal leaves, or errors both."""
    for one, other in ((got, want), (want, got)):
        if isinstance(one, Exception) and not isinstance(other, Exception):
            raise AssertionError(f"{said}: an error here only: {one!r:.3000}") from one
    if not isinstance(got, Exception):
        close([jnp.asarray(y) for y in got], [jnp.asarray(y) for y in want], tolerance)


def off(found, exact):
    """By how much leaves differ, relative to the largest entry of each."""
    pairs = [(y.astype(z.dtype), z) for y, z in zip(found, exact) if z.size]
    return max(abs(y - z).max() / (abs(z).max() or 1.0) for y, z in pairs)


class Machine(RuleBasedStateMachine):
    """One function of both frameworks."""

    @initialize(program=programs.programs, seed=seeds, dtype=dtypes)
    def begin(self, program, seed, dtype):
        self.of_torch = programs.function(program, TORCH)
        self.of_jax = programs.function(program, JAX)
        self.dtype, self.inputs = dtype, programs.inputs(seed, dtype)
        self.bridged = self.across()

    def compare(self, got, twin, xs, said):
        """With what the twin gives; or, where float32 has too few digits for both of them (cosines
        of large numbers), no further from its float64 than three times as far as its float32."""
        want, tolerance = outcome(lambda: twin(*xs)), TOLERANCE[self.dtype]
        try:
            same(got, want, tolerance, said)
        except AssertionError:
            exact = outcome(lambda: twin(*map(programs.widened, xs)))
            if self.dtype == "float64" or any(isinstance(y, Exception) for y in (got, want, exact)):
                raise
            alike = [(y.dtype, y.shape) for y in got] == [(y.dtype, y.shape) for y in want]
            own = off(want, exact)
            if not (alike and own > tolerance / 3 and off(got, exact) < 3 * own):
                raise


class InJax(Machine):
    """torch in JAX: eager, and in programs of each lane."""

    def across(self):
        lanes = {lane: bridge.to_jax(self.of_torch, lane=lane) for lane in ("ffi", "host")}
        return lanes | {"eager": bridge.to_jax(self.of_torch)}

    @rule(chain=chains(JAX_TRANSFORMS, DEPTH), way=st.sampled_from(["eager", "ffi", "host"]))
    def transform(self, chain, way):
        xs = tuple(map(jnp.asarray, self.inputs))
        make = lambda f: composed(f, chain, programs.jax_slim)
        run, want = make(self.bridged[way]), make(self.of_jax)
        run = run if way == "eager" else jax.jit(run)
        names = [name for name, _ in chain]
        got = outcome(lambda: run(*xs))
        # JAX sees which inputs its own functions leave alone, and refuses less
        if "while_loop" not in names or "Reverse-mode" not in str(got):
            self.compare(got, want, xs, f"{way}, {names}")

    @rule(
        kind=wrong, chain=chains(JAX_TRANSFORMS, 1), way=st.sampled_from(["eager", "ffi", "host"])
    )
    def misuse(self, kind, chain, way):
        """As torch takes it, whose function it is; and the next call is right."""
        xs = WRONG[kind](*self.inputs)
        run = self.bridged[way] if way == "eager" else jax.jit(self.bridged[way])
        in_torch = lambda x: None if x is None else torch.from_numpy(np.array(x))
        same(
            outcome(lambda: run(*(None if x is None else jnp.asarray(x) for x in xs))),
            outcome(lambda: self.of_torch(*map(in_torch, xs))),
            TOLERANCE[self.dtype],
            f"{way}, {kind}",
        )
        self.transform(chain, way)


class InTorch(Machine):
    """JAX in torch, under torch.func and torch.autograd."""

    def across(self):
        return bridge.to_torch(self.of_jax)

    @rule(chain=chains(TORCH_TRANSFORMS, DEPTH, OF_AUTOGRAD))
    def transform(self, chain):
        names = [name for name, _ in chain]
        # Torch 2.13 folds what linearize has computed into constants: derivatives of it are without
        # these, and now and then of memory that is free, without us too.
        if "linearize" in names and {*names[names.index("linearize") + 1 :]} - {"vmap"}:
            return
        xs = [torch.from_numpy(np.array(x)) for x in self.inputs]
        run, want = (composed(f, chain, programs.torch_slim) for f in (self.bridged, self.of_torch))
        # a tangent that torch has widened is float64 to the end
        narrow = lambda y: y.float() if self.dtype == "float32" and y.dtype == torch.float64 else y
        twin = lambda *ys: jax.tree.map(narrow, want(*ys))
        self.compare(outcome(lambda: run(*xs)), twin, xs, str(names))

    @rule(kind=wrong, chain=chains(TORCH_TRANSFORMS, 1))
    def misuse(self, kind, chain):
        """As JAX takes it; and the next call is right."""
        xs = WRONG[kind](*self.inputs)
        in_torch = (None if x is None else torch.from_numpy(np.array(x)) for x in xs)
        in_jax = (None if x is None else jnp.asarray(x) for x in xs)
        same(
            outcome(lambda: self.bridged(*in_torch)),
            outcome(lambda: self.of_jax(*in_jax)),
            TOLERANCE[self.dtype],
            kind,
        )
        self.transform(chain)


CUBIC = ENERGIES["cubic"]
SIDES = (bridge.to_jax(CUBIC.torch, lane="native"), CUBIC.jax)
INNER = {"call": lambda f: f, "grad": jax.grad}


def repeated(f):
    """Three steps downhill."""
    return lambda x: jax.lax.scan(lambda x, _: (x - 0.1 * f(x), (f(x) ** 2).sum()), x, None, 3)


def until(f):
    step = lambda s: (s[0] + 1, s[1] - 0.1 * f(s[1]))
    return lambda x: jax.lax.while_loop(lambda s: s[0] < 3, step, (0, x))[1]


def either(f):
    return lambda x: jax.lax.cond(x.sum() > 0, f, lambda x: 2 * f(x), x)


def checked(f):
    return jax.checkpoint(f)


# What is called stays the energy or its gradient, so that a few packages serve all of them.
OUTER = {f.__name__: f for f in (repeated, until, either, checked, jax.jit)}
ORDERS = st.lists(st.sampled_from(["either", "checked", "jit"]), max_size=3)


@cache
def native(inner, outer):
    """(program of the native lane, pure JAX)"""
    made = []
    for f in SIDES:
        f = INNER[inner](f)
        for name in outer:
            f = OUTER[name](f)
        made.append(jax.jit(f))
    return made


class Native(RuleBasedStateMachine):
    """Few functions, since each is compiled for some 20 seconds; any values, and any programs."""

    @rule(
        inner=st.sampled_from(list(INNER)),
        order=ORDERS,
        loop=st.sampled_from([None, "repeated", "until"]),
        seed=seeds,
        size=st.sampled_from([0.0, 1.0, 1e3, np.nan]),
    )
    def call(self, inner, order, loop, seed, size):
        run, want = native(inner, (*order, *([loop] if loop else [])))
        x = size * jnp.asarray(np.random.default_rng(seed).normal(size=(2, 3)))
        close(run(x), want(x), 1e-9)

    @rule(wrong=st.sampled_from([(3, 3, 2), (3,)]))
    def misuse(self, wrong):
        """A program of one shape is not run with another."""
        compiled = native("call", ())[0].lower(jnp.zeros((2, 3))).compile()
        with pytest.raises(TypeError):
            compiled(jnp.zeros(wrong))


def test_functions_in_jax(fuzz):
    fuzz(InJax)


def test_functions_in_torch(fuzz):
    fuzz(InTorch)


def test_functions_of_the_native_lane(fuzz):
    fuzz(Native)
