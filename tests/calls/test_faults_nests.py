"""Nests three deep, in both directions, on every lane: gradients, and exceptions from the innermost
arrive at the outermost with type, text and traceback, from threads, too."""

import traceback

import jax
import jax.numpy as jnp
import pytest
import torch

import bridge
from tests.calls.test_torch_threads import together
from tests.cases import close
from tests.fault_cases import AT_RUN

pytestmark = [
    pytest.mark.usefixtures("unlogged"),
    pytest.mark.timeout(120, method="thread"),
]
X = jnp.linspace(0.1, 0.9, 4)


class NoSuchSpecies(ValueError):
    def __init__(self, species):
        super().__init__(f"species {species} is not in the training set")
        self.species = species


def innermost_torch(x):
    if x.max() > 100:
        raise NoSuchSpecies(int(x.max()))
    return torch.sin(x) * x.sum()


def torch_in_jax_in_torch_in_jax(lane):
    """torch, called by JAX, called by torch, called by JAX."""
    declared = dict(outputs=lambda x: x, lane=lane)
    first = bridge.to_jax(innermost_torch, **declared)
    second = bridge.to_torch(lambda x: first(2 * x) + x)
    return bridge.to_jax(lambda x: second(x) ** 2, **declared)


def jax_in_torch_in_jax_in_torch(lane):
    """JAX, called by torch, called by JAX, called by torch, and torch in the innermost."""
    inner = bridge.to_torch(lambda x: jnp.sin(x) * jnp.sum(x))

    def watched(x):
        if x.max() > 100:
            raise NoSuchSpecies(int(x.max()))
        return inner(2 * x) + x

    second = bridge.to_jax(watched, lane=lane, outputs=lambda x: x)
    return bridge.to_torch(lambda x: second(x) ** 2)


def plain(np):
    return lambda x: (np.sin(2 * x) * (2 * x).sum() + x) ** 2


def bad(k):
    """Doubled or not, as each nest has it, the species says which thread it was."""
    return X.at[0].set(1000.0 + k)


def species(caught):
    frames = [f.name for f in traceback.extract_tb(caught.value.__traceback__)]
    assert {"innermost_torch", "watched"} & {*frames}, frames
    return caught.value.species


OF_JAX = {
    "value": lambda f: f,
    "grad": lambda f: jax.grad(lambda x: f(x).sum()),
    "hvp": lambda f: lambda x: jax.jvp(jax.grad(lambda x: f(x).sum()), (x,), (x,))[1],
    "scan": lambda f: lambda x: jax.lax.scan(lambda c, _: (jnp.tanh(f(c)), f(c)), x, None, length=2)[1],
}  # fmt: skip


@pytest.mark.parametrize("transform", OF_JAX)
def test_torch_in_jax_in_torch_in_jax(transform, lane):
    program = jax.jit(OF_JAX[transform](torch_in_jax_in_torch_in_jax(lane)))
    want = jax.jit(OF_JAX[transform](plain(jnp)))(X)
    close(program(X), want, rtol=1e-12)
    for k in range(2):
        with pytest.raises(NoSuchSpecies) as caught, bridge.raising():
            jax.block_until_ready(program(bad(k)))
        assert species(caught) == 2 * (1000 + k)
        with pytest.raises(
            AT_RUN, match=rf"NoSuchSpecies: species {2 * (1000 + k)} is not in"
        ) as told:
            jax.block_until_ready(program(bad(k)))
        assert "in innermost_torch: raise NoSuchSpecies" in str(told.value)
        close(program(X), want, rtol=1e-12)


OF_TORCH = {
    "value": lambda f: f,
    "backward": lambda f: lambda x: torch.autograd.grad(f(x := x.clone().requires_grad_()).sum(), x)[0],
    "torch.func.grad": lambda f: torch.func.grad(lambda x: f(x).sum()),
    "hessian": lambda f: torch.func.hessian(lambda x: f(x).sum()),
}  # fmt: skip


@pytest.mark.parametrize("transform", OF_TORCH)
def test_jax_in_torch_in_jax_in_torch(transform, lane):
    f = OF_TORCH[transform](jax_in_torch_in_jax_in_torch(lane))
    x = bridge.to_torch(X, copy=True)
    want = OF_TORCH[transform](plain(torch))(x)
    torch.testing.assert_close(f(x), want, rtol=1e-12, atol=1e-12)
    if transform in ("torch.func.grad", "hessian"):
        return  # which don't let the value be looked at
    for k in range(2):
        with pytest.raises(NoSuchSpecies) as caught, bridge.raising():
            f(bridge.to_torch(bad(k), copy=True))
        assert species(caught) == 1000 + k
        torch.testing.assert_close(f(x), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lane", ["ffi", "host"])
def test_nests_in_threads(lane):
    """Each thread has its own numbers and its own exceptions."""
    outer = jax.jit(jax.value_and_grad(lambda x: torch_in_jax_in_torch_in_jax(lane)(x).sum()))
    other = jax_in_torch_in_jax_in_torch(lane)
    wanted = [jax.value_and_grad(lambda x: plain(jnp)(x).sum())(X + 0.01 * k) for k in range(8)]

    def work(k):
        x = bridge.to_torch(X + 0.01 * k, copy=True)
        for i in range(3):
            close(outer(X + 0.01 * k), wanted[k], rtol=1e-12)
            torch.testing.assert_close(other(x), plain(torch)(x), rtol=1e-12, atol=1e-12)
            if (k + i) % 2:
                with pytest.raises(NoSuchSpecies) as caught, bridge.raising():
                    jax.block_until_ready(outer(bad(k)))
                assert species(caught) == 2 * (1000 + k)
                with pytest.raises(NoSuchSpecies) as caught, bridge.raising():
                    other(bridge.to_torch(bad(k), copy=True))
                assert species(caught) == 1000 + k

    together(work)
