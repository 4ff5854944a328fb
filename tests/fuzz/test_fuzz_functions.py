"""State machines over functions: torch in JAX and JAX in torch under composed transforms, beside the
same function written in the other framework; and wrong calls in between."""

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


class Machine(RuleBasedStateMachine):
    """One function of both frameworks."""

    @initialize(program=programs.programs, seed=seeds, dtype=dtypes)
    def begin(self, program, seed, dtype):
        self.of_torch = programs.function(program, TORCH)
        self.of_jax = programs.function(program, JAX)
        self.dtype, self.inputs = dtype, programs.inputs(seed, dtype)
        self.bridged = self.across()

    def compare(self, call, reference, said):
        same(outcome(call), outcome(reference), TOLERANCE[self.dtype], said)


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
        self.compare(lambda: run(*xs), lambda: want(*xs), f"{way}, {[name for name, _ in chain]}")

    @rule(kind=wrong, chain=chains(JAX_TRANSFORMS, 1), way=st.sampled_from(["eager", "ffi", "host"]))
    def misuse(self, kind, chain, way):
        """As torch takes it, whose function it is; and the next call is right."""
        xs = WRONG[kind](*self.inputs)
        run = self.bridged[way] if way == "eager" else jax.jit(self.bridged[way])
        in_torch = lambda x: None if x is None else torch.from_numpy(np.array(x))
        self.compare(
            lambda: run(*(None if x is None else jnp.asarray(x) for x in xs)),
            lambda: self.of_torch(*map(in_torch, xs)),
            f"{way}, {kind}",
        )
        self.transform(chain, way)


class InTorch(Machine):
    """JAX in torch, under torch.func and torch.autograd."""

    def across(self):
        return bridge.to_torch(self.of_jax)

    @rule(chain=chains(TORCH_TRANSFORMS, DEPTH, OF_AUTOGRAD))
    def transform(self, chain):
        xs = [torch.from_numpy(np.array(x)) for x in self.inputs]
        run, want = (
            composed(f, chain, programs.torch_slim) for f in (self.bridged, self.of_torch)
        )
        self.compare(lambda: run(*xs), lambda: want(*xs), f"{[name for name, _ in chain]}")

    @rule(kind=wrong, chain=chains(TORCH_TRANSFORMS, 1))
    def misuse(self, kind, chain):
        """As JAX takes it; and the next call is right."""
        xs = WRONG[kind](*self.inputs)
        self.compare(
            lambda: self.bridged(
                *(None if x is None else torch.from_numpy(np.array(x)) for x in xs)
            ),
            lambda: self.of_jax(*(None if x is None else jnp.asarray(x) for x in xs)),
            kind,
        )
        self.transform(chain)


def test_functions_in_jax(fuzz):
    fuzz(InJax)


def test_functions_in_torch(fuzz):
    fuzz(InTorch)
