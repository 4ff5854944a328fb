"""How often torch runs: one forward and one backward for an energy and its forces, on every
path."""

import jax
import jax.numpy as jnp
import pytest
import torch

import bridge
from jax_side.calls import lanes, registry


class Counted(torch.autograd.Function):
    """x**3 that counts its forwards and backwards (for both ways to differentiate)."""

    forwards = backwards = 0

    @staticmethod
    def forward(x):
        Counted.forwards += 1
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, g):
        Counted.backwards += 1
        return 3 * g * ctx.saved_tensors[0] ** 2


class Calls:
    """Counts of torch during a block; the bridged functions count their calls here too."""

    def __enter__(self):
        Counted.forwards = Counted.backwards = 0
        return self

    def __exit__(self, *_):
        self.counts = (Counted.forwards, Counted.backwards)


X = jnp.arange(1.0, 7.0).reshape(2, 3)
ENERGY = lambda x: Counted.apply(x).sum()
VECTOR = lambda x: Counted.apply(x)

CASES = {  # (function, transform, forwards, backwards)
    "call": (ENERGY, lambda f: f, 1, 0),
    "grad": (ENERGY, jax.grad, 1, 1),
    "value_and_grad": (ENERGY, jax.value_and_grad, 1, 1),
    "value_and_grad of a function of the energy": (
        ENERGY,
        lambda f: jax.value_and_grad(lambda x: jnp.sin(f(x)) ** 2),
        1,
        1,
    ),
    "grad of two steps": (ENERGY, lambda f: jax.grad(lambda x: f(x + 0.1 * f(x))), 2, 2),
    "vjp": (ENERGY, lambda f: lambda x: (lambda y, pull: (y, pull(2 * y)))(*jax.vjp(f, x)), 1, 1),
    "vmap of value_and_grad": (ENERGY, lambda f: jax.vmap(jax.value_and_grad(f)), 1, 1),
    "value_and_grad of vmap": (
        ENERGY,
        lambda f: jax.value_and_grad(lambda x: jax.vmap(f)(x).sum()),
        1,
        1,
    ),
    "grad of a linear function of a vector": (
        VECTOR,
        lambda f: jax.grad(lambda x: f(x).sum()),
        1,
        1,
    ),
    "grad of a loss that needs the vector": (
        VECTOR,
        lambda f: jax.grad(lambda x: (f(x) ** 2).sum()),
        2,
        1,
    ),
}


@pytest.mark.parametrize("derivatives", ["func", "autograd"])
@pytest.mark.parametrize("case", CASES)
def test_forwards_and_backwards_in_a_jitted_call(case, lane, derivatives):
    f, transform, forwards, backwards = CASES[case]
    if "vmap" in case:
        f = (lambda g: lambda x: g(x).sum((-1, -2)) if x.dim() == 3 else g(x).sum(-1))(
            Counted.apply
        )
        bridged = bridge.to_jax(f, lane=lane, derivatives=derivatives, batched=0)
    else:
        bridged = bridge.to_jax(f, lane=lane, derivatives=derivatives)
    program = jax.jit(transform(bridged))
    jax.block_until_ready(program(X))
    with Calls() as calls:
        jax.block_until_ready(program(X))
    assert calls.counts == (forwards, backwards)


@pytest.mark.parametrize("transform", [jax.grad, jax.value_and_grad])
def test_forwards_and_backwards_in_an_eager_call(transform):
    of = transform(bridge.to_jax(ENERGY))
    of(X)
    with Calls() as calls:
        of(X)
    assert calls.counts == (1, 1)


def _calls_into_torch(program, *args):
    """Runs of the whole Function (one lookup by XLA each), counted at the lane."""
    host, before, n = lanes.HostCall.__call__, dict(registry.functions), [0]

    def counting(run):
        def counted(*a, **k):
            n[0] += 1
            return run(*a, **k)

        return counted

    lanes.HostCall.__call__ = counting(host)
    registry.functions.update(
        {number: c._replace(enter=counting(c.enter)) for number, c in before.items()}
    )
    try:
        jax.block_until_ready(program(*args))
    finally:
        lanes.HostCall.__call__ = host
        registry.functions.update(before)
    return n[0]


@pytest.mark.parametrize("steps", [1, 5])
def test_value_and_grad_in_a_scan_is_one_call_into_torch_for_each_step(lane, steps):
    bridged = bridge.to_jax(ENERGY, lane=lane)

    def step(x, _):
        e, g = jax.value_and_grad(bridged)(x)
        return x - 1e-3 * g, e

    program = jax.jit(lambda x: jax.lax.scan(step, x, None, length=steps))
    jax.block_until_ready(program(X))
    assert _calls_into_torch(program, X) == steps


@pytest.mark.parametrize("batched", ["vmap", 0])
def test_vmap_is_one_call_into_torch(lane, batched):
    f = lambda x: (x**3).sum(-1)
    program = jax.jit(jax.vmap(jax.value_and_grad(bridge.to_jax(f, lane=lane, batched=batched))))
    jax.block_until_ready(program(X))
    assert _calls_into_torch(program, X) == 1


def test_an_unused_result_is_not_computed(lane):
    program = jax.jit(lambda x: (bridge.to_jax(ENERGY, lane=lane)(x), x * 2)[1])
    assert _calls_into_torch(program, X) == 0
