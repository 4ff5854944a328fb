"""x64 that is on in one thread alone, by `with jax.enable_x64(True)`: XLA's threads, which serve the
host lane, don't see it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import bridge
from jax_side.calls import compat, lanes


@pytest.fixture
def off_elsewhere():
    """x64 as it is by default, in all threads but in the block of a test."""
    jax.config.update("jax_enable_x64", False)
    yield
    jax.config.update("jax_enable_x64", True)


TABLE = torch.arange(10.0)
INDICES, X = np.array([[1, 2], [3, 4]]), np.random.default_rng(0).normal(size=(6, 2))
square = lambda x: (x * x).sum()
CASES = {  # (torch function, how JAX calls it, argument, result)
    "int64 in, float32 out": (lambda i: TABLE[i % 10], lambda f: f, INDICES, INDICES % 10),
    "int64 in, a sum out": (lambda i: i.float().sum(), lambda f: f, INDICES, INDICES.sum()),
    "float64": (square, lambda f: f, X, (X * X).sum()),
    "float32 in, float64 out": (lambda x: x.double() / 3, lambda f: f, np.float32(X), np.float32(X).astype(float) / 3),
    "complex128": (lambda x: x * 2, lambda f: f, X + 1j, 2 * (X + 1j)),
    "gradient": (square, jax.grad, X, 2 * X),
    "vmap": (square, jax.vmap, X, (X * X).sum(-1)),
    "hessian": (square, jax.hessian, X[0], 2 * np.eye(2)),
    "scan": (square, lambda f: lambda xs: jax.lax.scan(lambda s, x: (s + f(x), f(x)), 0.0, xs)[1], X, (X * X).sum(-1)),
}  # fmt: skip


@pytest.mark.parametrize("lane", ["ffi", "host"])
@pytest.mark.parametrize("case", CASES)
def test_a_program_gives_the_same_where_x64_is_off_now(off_elsewhere, lane, case):
    f, transform, x, want = CASES[case]
    with jax.enable_x64(True):
        given = jnp.asarray(x)
        program = jax.jit(transform(bridge.to_jax(f, lane=lane))).lower(given).compile()
    found = np.asarray(program(given))
    np.testing.assert_allclose(found, want, rtol=1e-14)


def test_errors_of_the_callable_arrive(off_elsewhere):
    def broken(x):
        raise KeyError("no such species")

    with jax.enable_x64(True):
        given = jnp.asarray(X)
        f = bridge.to_jax(broken, outputs=lambda x: x, lane="host")
        program = jax.jit(f).lower(given).compile()
    with pytest.raises(KeyError, match="no such species"), bridge.raising():
        program(given)


@pytest.mark.parametrize("everywhere", [True, False])
def test_who_sees_x64(everywhere):
    try:
        jax.config.update("jax_enable_x64", everywhere)
        with jax.enable_x64(True):
            assert compat.x64_in_all_threads() is everywhere
    finally:
        jax.config.update("jax_enable_x64", True)


def test_values_that_jax_has_narrowed_are_an_error():
    """Where x64 was on for all threads when the program was compiled, and is off now."""
    program = jax.jit(bridge.to_jax(lambda i: i.float().sum(), lane="host"))
    given = jnp.asarray(INDICES)
    program = program.lower(given).compile()
    jax.config.update("jax_enable_x64", False)
    try:
        with pytest.raises(Exception, match="expected 64-bit values of a host callback"):
            program(given)
    finally:
        jax.config.update("jax_enable_x64", True)


def test_what_is_wide():
    spec = lanes.Spec
    assert lanes.is_wide(spec((1,), "float32"), spec((), "complex128"))
    assert not lanes.is_wide(spec((1,), "float32"), spec((), "complex64"), spec((), "bool"))
