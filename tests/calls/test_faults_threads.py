"""Eight threads at once, each with calls, gradients, compilations, dropped functions and errors of
its own, on every lane and in both directions: each has its own numbers and its own exceptions."""

import gc
import sys
import weakref

import jax
import jax.numpy as jnp
import pytest
import torch

import bridge
from tests.calls.test_torch_threads import together
from tests.cases import close
from tests.fault_cases import GOOD, LANES, counts, picked, twin
from tests.graph_cases import MODEL, NUMBERS, H, R, brute

pytestmark = [
    pytest.mark.usefixtures("unlogged"),
    pytest.mark.timeout(120, method="thread"),  # a hang inside the runtime hears no signal
]


@pytest.fixture(autouse=True)
def fast_switching():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


class Own(ValueError):
    """Says whose it is."""

    def __init__(self, owner):
        super().__init__(f"of {owner}")
        self.owner = owner


def bad(k):
    """In thread k, index 10 + k is out of bounds."""
    return GOOD.at[1].set(10.0 + k)


def own_text(k):
    return f"index {10 + k} is out of bounds"


@pytest.mark.parametrize("lane", LANES)
def test_values_gradients_and_errors(lane):
    """One function, and programs of its own for each thread."""
    f = bridge.to_jax(picked, lane=lane)
    value, slope = jax.jit(f), jax.jit(jax.grad(lambda x: f(x).sum()))
    wanted = [(twin(GOOD + 0.01 * k), jax.grad(lambda x: twin(x).sum())(GOOD)) for k in range(8)]
    value(GOOD), slope(GOOD)
    before = counts()

    def work(k):
        own = jax.jit(lambda x: f(x) + k)
        for _ in range(5):
            close(value(GOOD + 0.01 * k), wanted[k][0])
            close(slope(GOOD), wanted[k][1])
            close(own(GOOD + 0.01 * k), wanted[k][0] + k)
            if k % 2:
                with pytest.raises(IndexError, match=own_text(k)), bridge.raising():
                    value(bad(k))
                with pytest.raises(RuntimeError, match=own_text(k)) as caught:
                    jax.block_until_ready(jax.jit(lambda x: f(x) * k)(bad(k)))
                assert type(caught.value) is jax.errors.JaxRuntimeError
                del caught

    together(work)
    gc.collect()
    assert (counts() <= before).all()


def test_compilations_and_drops(lane):
    """Each thread makes functions, compiles and drops them, while others raise."""
    dropped = []

    def work(k):
        for i in range(6):

            def scaled(x, i=i):
                if x[0] < 0:
                    raise Own((k, i))
                return x * (10 * k + i)

            f = bridge.to_jax(scaled, lane=lane, outputs=lambda x: x)
            program = jax.jit(f)
            close(program(GOOD), GOOD * (10 * k + i))
            if (k + i) % 2:
                with pytest.raises(Own) as caught, bridge.raising():
                    program(-GOOD)
                assert caught.value.owner == (k, i)
                del caught
            dropped.append(weakref.ref(scaled))
            del f, program, scaled

    together(work)
    counts()
    gc.collect()
    assert sum(alive() is not None for alive in dropped) == 0


def test_potentials(lane):
    """Energies and both gradients, of structures of their own."""
    energy = bridge.potential(MODEL, atomic_numbers=NUMBERS, pbc=True, lane=lane)
    program = jax.jit(jax.value_and_grad(energy, (0, 1)))
    moved = lambda k: (
        R + 0.01 * k * jnp.sin(jnp.arange(R.size)).reshape(R.shape),
        H * (1 + 0.002 * k),
    )
    wanted = [
        jax.value_and_grad(lambda r, h: brute(r, h, NUMBERS), (0, 1))(*moved(k)) for k in range(8)
    ]

    def work(k):
        for i in range(3):
            close(program(*moved(k)), wanted[k])
            if (k + i) % 3 == 0:
                with pytest.raises(ValueError, match="expected"), bridge.raising():
                    jax.block_until_ready(program(*moved(k)[:1], 0 * H))

    together(work)


def test_jax_in_torch(lane):
    """Values, gradients, compilations, and errors of torch beneath."""
    into = bridge.to_jax(picked, lane=lane)
    shared = bridge.to_torch(lambda x: jnp.sin(into(x)))
    plain = lambda x: picked(x).sin()

    def work(k):
        own = bridge.to_torch(lambda x: into(x) * k)
        x = bridge.to_torch(GOOD + 0.01 * k, copy=True).requires_grad_()
        for _ in range(4):
            for f, g in ((shared, plain), (own, lambda x: picked(x) * k)):
                y, want = f(x), g(x)
                torch.testing.assert_close(y.detach(), want.detach())
                slope = torch.autograd.grad(y.sum(), x)
                torch.testing.assert_close(slope, torch.autograd.grad(want.sum(), x))
            if k % 2:
                with pytest.raises(IndexError, match=own_text(k)), bridge.raising():
                    shared(bridge.to_torch(bad(k), copy=True).requires_grad_())
                with pytest.raises(RuntimeError, match=own_text(k)):
                    own(bridge.to_torch(bad(k), copy=True))

    together(work)
