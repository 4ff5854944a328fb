"""Exceptions anywhere in a program: each is the user's own, the next call is right, nothing is left
behind."""

import subprocess
import sys
import traceback

import jax
import jax.numpy as jnp
import pytest
import torch
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bridge
from tests.cases import close
from tests.fault_cases import AT_RUN, BAD, GOOD, TEXT, counts, picked, twin

pytestmark = pytest.mark.usefixtures("unlogged")
lax = jax.lax
mesh = lambda: jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))


def over_devices(f):
    """The second device has what is bad."""
    mapped = jax.jit(jax.vmap(f))
    return lambda x: mapped(jax.device_put(x.reshape(2, 2), NamedSharding(mesh(), P("d"))))


def scan_over_devices(f):
    step = lambda x, _: (x + 0 * jax.vmap(f)(x), jax.vmap(f)(x))
    program = jax.jit(lambda x: lax.scan(step, x, None, length=3))
    return lambda x: program(jax.device_put(x.reshape(2, 2), NamedSharding(mesh(), P("d"))))


PATHS = {
    "jit": jax.jit,
    "scan": lambda f: jax.jit(lambda x: lax.scan(lambda c, x: (c + f(x).sum(), f(x)), 0.0, x)),
    "a scan outside of jit": lambda f: lambda x: lax.scan(lambda c, x: (c, f(x)), x[0], x),
    "the body of a while_loop": lambda f: jax.jit(
        lambda x: lax.while_loop(lambda c: c[1] < 3, lambda c: (c[0] + f(x), c[1] + 1), (x, 0))[0]
    ),
    "the condition of a while_loop": lambda f: jax.jit(
        lambda x: lax.while_loop(lambda c: f(c).sum() < 60, lambda c: c + 0.25, x)
    ),
    "one branch of a cond": lambda f: jax.jit(lambda x: lax.cond(x[0] > 0, f, jnp.sin, x)),
    "the other branch of a cond": lambda f: jax.jit(lambda x: lax.cond(x[0] < 0, jnp.sin, f, x)),
    "a branch of a switch": lambda f: jax.jit(lambda x: lax.switch(1, [jnp.sin, f, jnp.cos], x)),
    "map": lambda f: jax.jit(lambda x: lax.map(f, x)),
    "vmap": lambda f: jax.jit(jax.vmap(f)),
    "jvp": lambda f: jax.jit(lambda x: jax.jvp(f, (x,), (x,))),
    "grad": lambda f: jax.jit(jax.grad(lambda x: f(x).sum())),
    "grad of scan": lambda f: jax.jit(
        jax.grad(lambda x: lax.scan(lambda c, x: (c + f(x).sum(), None), 0.0, x)[0])
    ),
    "checkpoint": lambda f: jax.jit(jax.grad(lambda x: jax.checkpoint(f)(x).sum())),
    "shard_map": lambda f: jax.jit(
        jax.shard_map(f, mesh=mesh(), in_specs=P("d"), out_specs=P("d"))
    ),
    "one of two devices": over_devices,
    "a scan on one of two devices": scan_over_devices,
}  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("path", PATHS)
def test_exceptions_on_the_native_lane(path):
    exceptions(path, "native")


@pytest.mark.matrix
@pytest.mark.parametrize("path", PATHS)
def test_exceptions_x_path(path, lane):
    exceptions(path, lane)


def exceptions(path, lane):
    program = PATHS[path](bridge.to_jax(picked, lane=lane))
    want = PATHS[path](twin)(GOOD)
    close(program(GOOD), want)
    before, kept = counts(), []
    for _ in range(3):
        with pytest.raises(IndexError, match=TEXT) as caught, bridge.raising():
            kept.append(program(BAD))  # or nobody would wait for it
        assert "picked" in [f.name for f in traceback.extract_tb(caught.value.__traceback__)]
        del caught
        kept.clear()
        close(program(GOOD), want)
    with pytest.raises(AT_RUN, match=TEXT):
        jax.block_until_ready(program(BAD))
    assert (counts() <= before).all()


class Guarded(torch.autograd.Function):
    """A backward that refuses what the forward takes."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 2.0

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        if x.max() > 5:
            raise FloatingPointError(f"no gradient at {x.max().item()}")
        return 2 * g


BACKWARD = {
    "grad": lambda f: jax.jit(jax.grad(lambda x: f(x).sum())),
    "vjp": lambda f: jax.jit(lambda x: jax.vjp(f, x)[1](x)[0]),
    "a scan that is transposed": lambda f: jax.jit(
        jax.grad(lambda x: lax.scan(lambda c, _: (f(c) * 0.5, None), x, None, length=3)[0].sum())
    ),
    "grad of shard_map": lambda f: jax.jit(
        jax.grad(
            lambda x: jax.shard_map(f, mesh=mesh(), in_specs=P("d"), out_specs=P("d"))(x).sum()
        )
    ),
}


@pytest.mark.parametrize("path", BACKWARD)
def test_exceptions_of_a_backward(path, lane):
    f = bridge.to_jax(Guarded.apply, lane=lane, derivatives="autograd", outputs=lambda x: x)
    program, value = BACKWARD[path](f), jax.jit(f)
    want = BACKWARD[path](lambda x: 2 * x)(GOOD)
    close(program(GOOD), want)
    close(value(BAD), 2 * BAD)
    before, kept = counts(), []
    for _ in range(2):
        close(value(BAD), 2 * BAD)
        with pytest.raises(FloatingPointError, match=r"no gradient at 7\.5"), bridge.raising():
            kept.append(program(BAD))
        kept.clear()
        close(program(GOOD), want)
    assert (counts() <= before).all()


# JAX in torch: a JAX function that calls torch, which raises.

TORCH = {
    "a call": lambda f: f,
    "no_grad": lambda f: torch.no_grad()(f),
    "backward": lambda f: lambda x: torch.autograd.grad(
        f(x := x.clone().requires_grad_()).sum(), x
    )[0],
    "torch.func.grad": lambda f: torch.func.grad(lambda x: f(x).sum()),
    "torch.func.vmap": lambda f: torch.func.vmap(f),
    "torch.func.jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (x,))[1],
    "checkpoint": lambda f: lambda x: torch.autograd.grad(
        torch.utils.checkpoint.checkpoint(f, x := x.clone().requires_grad_(), use_reentrant=False).sum(), x
    )[0],
}  # fmt: skip


@pytest.mark.matrix
@pytest.mark.parametrize("path", TORCH)
@pytest.mark.parametrize("inside", ["jit", "scan"])
def test_exceptions_x_path_in_torch(path, inside, lane):
    into = bridge.to_jax(picked, lane=lane)
    steps = lambda f: lambda x: lax.scan(lambda c, x: (c, f(x)), 0.0, jnp.stack([x, x]))[1][1]
    of = {"jit": jax.jit, "scan": steps}[inside]
    program = TORCH[path](bridge.to_torch(of(into)))
    want = TORCH[path](picked)(bridge.to_torch(GOOD, copy=True))
    good, bad = (bridge.to_torch(x, copy=True) for x in (GOOD, BAD))
    torch.testing.assert_close(program(good), want)
    for _ in range(2):
        with pytest.raises(IndexError, match=TEXT), bridge.raising():
            program(bad)
        with pytest.raises(AT_RUN, match=TEXT):
            program(bad)
        torch.testing.assert_close(program(good), want)


def test_exceptions_while_jax_traces_are_the_users():
    """What the callable raises before anything runs needs no `raising`."""

    def broken(x):
        raise LookupError("while it is traced")

    for f in (bridge.to_torch(broken), bridge.to_torch(jax.jit(broken))):
        with pytest.raises(LookupError, match="while it is traced"):
            f(torch.ones(3))


# Memory that is not there.

HUGE = 2**44


def too_much(x):
    return torch.zeros(HUGE).sort().values[: len(x)] + x if x.max() > 5 else picked(x)


def test_torch_has_no_memory(lane):
    f = bridge.to_jax(too_much, lane=lane, outputs=lambda x: x)
    program, want = jax.jit(f), twin(GOOD)
    for _ in range(2):
        for call in (f, program):
            with pytest.raises(RuntimeError, match="alloc") as caught, bridge.raising():
                call(BAD)
            assert not isinstance(caught.value, jax.errors.JaxRuntimeError)
        with pytest.raises(AT_RUN, match="RuntimeError.*alloc"):
            jax.block_until_ready(program(BAD))
        close(program(GOOD), want)


def test_xla_has_no_memory():
    small = bridge.to_torch(jnp.sin)
    huge = bridge.to_torch(lambda x: jnp.sort(jnp.outer(x, jnp.arange(HUGE, dtype=x.dtype)))[:, :2])
    x = torch.ones(3, dtype=torch.float64)
    for _ in range(2):
        with pytest.raises(
            jax.errors.JaxRuntimeError, match=r"RESOURCE_EXHAUSTED|[Oo]ut of memory"
        ):
            huge(x)
        torch.testing.assert_close(small(x), x.sin())


LIMITED = """
import resource, sys
import jax, jax.numpy as jnp, numpy as np, psutil, torch, bridge
lane, size = sys.argv[1], 2**31
def doubled(x):
    return torch.zeros(size, dtype=torch.uint8).fill_(3)[:3] * x if x[0] > 1 else 2 * x
f = jax.jit(bridge.to_jax(doubled, lane=lane, outputs=lambda x: x))
g = bridge.to_torch(lambda x: jnp.sort(jnp.outer(x, jnp.ones(size // 4, x.dtype)))[:, 0])
h = bridge.to_torch(lambda x: 2 * x)
good, bad, t = jnp.ones(3), jnp.full(3, 2.0), torch.ones(3)
jax.block_until_ready(f(good)), h(t)
limit = psutil.Process().memory_info().vms + 2**30
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for _ in range(3):
    try:
        with bridge.raising():
            f(bad)
    except RuntimeError as error:
        assert "alloc" in str(error) and type(error) is RuntimeError, error
    else:
        raise AssertionError("no error")
    try:
        g(t)
    except jax.errors.JaxRuntimeError as error:
        assert "RESOURCE_EXHAUSTED" in str(error) or "emory" in str(error), error
    else:
        raise AssertionError("no error")
    assert np.asarray(f(good)).tolist() == [2, 2, 2] and h(t).tolist() == [2, 2, 2]
print("passed")
"""


def test_a_limit_of_memory(lane):
    child = subprocess.run(
        [sys.executable, "-c", LIMITED, lane], capture_output=True, text=True, timeout=100
    )
    assert child.stdout == "passed\n", child.stderr[-3000:]
