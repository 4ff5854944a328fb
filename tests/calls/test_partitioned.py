"""Batches under plain jit over two devices: each device calls torch for its own part, nothing is
gathered, results lie and are as those of the same function in JAX."""

import contextlib
import os
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bridge
from tests.cases import close
from tests.graph_cases import MODEL, NUMBERS, H, R, brute, seen

KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
X = jnp.linspace(0.1, 2, 24).reshape(8, 3)
W = jnp.array([1.0, 2.0, 3.0])
calls = []


def energy(x, w):
    calls.append(tuple(x.shape))
    return (w * x**3).sum(-1)


def twin(x, w):
    return (w * x**3).sum(-1)


over = lambda f: jax.vmap(f, (0, None))
total = lambda f: lambda x, w: (over(f)(x, w) ** 2).sum()
TRANSFORMS = {
    "value": over,
    "gradients": lambda f: over(jax.grad(f)),
    "in what is shared": lambda f: jax.grad(total(f), 1),
    "in both": lambda f: jax.grad(total(f), (0, 1)),
    "jvp": lambda f: lambda x, w: jax.jvp(over(f), (x, w), (jnp.sin(x), jnp.cos(w))),
    "hvp": lambda f: lambda x, w: jax.jvp(jax.grad(total(f)), (x, w), (jnp.sin(x), jnp.cos(w)))[1],
    "hessians": lambda f: over(jax.hessian(f)),
    "forces trained": lambda f: jax.grad(lambda x, w: (over(jax.grad(f))(x, w) ** 2).sum(), 1),
    "scan": lambda f: lambda x, w: jax.lax.scan(
        lambda x, _: (x - 0.01 * over(jax.grad(f))(x, w), over(f)(x, w).sum()), x, None, length=3
    ),
    "checkpoint": lambda f: jax.grad(lambda x, w: jax.checkpoint(over(f))(x, w).sum()),
    "batches of batches": lambda f: lambda x, w: jax.vmap(over(f), (1, None), 1)(
        x[:, None] + jnp.zeros((2, 1)), w
    ),
}  # fmt: skip
# what torch sees of eight examples on two devices
ONCE = {"vmap": [(3,)] * 2, "sequential": [(3,)] * 8, "native": [(4, 3)] * 2}
BATCHED = {"vmap": "vmap", "sequential": "sequential", "native": {"x": 0}}


def mesh_of(kind):
    return jax.make_mesh((2,), ("d",), axis_types=(KINDS[kind],))


def placed(mesh, x, *names):
    return jax.device_put(x, NamedSharding(mesh, P(*names)))


def context(mesh, kind):
    return jax.set_mesh(mesh) if kind == "explicit" else contextlib.nullcontext()


def compared(of, f, kind, *arguments):
    """The compiled program of f, its results beside the twin's, how the twin's lie."""
    mesh = mesh_of(kind)
    given = [placed(mesh, x, *names) for x, names in arguments]
    with context(mesh, kind):
        program = jax.jit(of(f)).lower(*given).compile()
        calls.clear()
        found = jax.block_until_ready(program(*given))
        pure = jax.jit(of(twin))(*given)
    close(found, jax.jit(of(twin))(*(x for x, _ in arguments)), rtol=1e-11)
    assert jax.tree.map(lambda y: y.sharding, found) == jax.tree.map(lambda y: y.sharding, pure)
    assert "all-gather" not in program.as_text()
    return found


@pytest.mark.matrix(2)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batched", BATCHED)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_each_device_has_its_part(name, batched, kind, lane):
    f = bridge.to_jax(energy, batched=BATCHED[batched], lane=lane)
    compared(TRANSFORMS[name], f, kind, (X, ("d",)), (W, ()))
    if name == "value":
        assert sorted(calls) == sorted(ONCE[batched])


DTYPES = (
    "bool int8 uint32 int64 float16 bfloat16 float32 float8_e4m3fn complex64 complex128".split()
)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype, lane):
    """Each travels as it does on one device."""
    x = jnp.arange(24).reshape(8, 3).astype(dtype)
    f = bridge.to_jax(lambda x: (x.clone(), x[1]), lane=lane, batched="sequential")
    found = jax.jit(jax.vmap(f))(placed(mesh_of("auto"), x, "d"))
    assert found[0].dtype == x.dtype and found[0].sharding.spec[0] == "d"
    for ours, theirs in zip(found, (x, x[:, 1])):
        assert (np.asarray(ours) == np.asarray(theirs)).all()


def test_a_gradient_in_what_a_native_batch_shares():
    """As many examples as weights: a sum over examples is no gradient of each."""
    f = bridge.to_jax(energy, batched={"x": 0})
    x = X[:3]
    close(jax.grad(total(f), 1)(x, W), jax.grad(total(twin), 1)(x, W))
    tangents = lambda f: jax.jvp(lambda w: over(f)(x, w), (W,), (jnp.cos(W),))
    close(tangents(f), tangents(twin))


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["value", "in both", "hessians", "scan"])
def test_the_native_lane(name, kind):
    f = bridge.to_jax(energy, lane="native")
    compared(TRANSFORMS[name], f, kind, (X, ("d",)), (W, ()))
    assert not calls


# Potentials: structures as one graph on each device.

MANY = R + 0.02 * jnp.sin(jnp.arange(8 * R.size)).reshape(8, *R.shape)
CELLS = H + 0.01 * jnp.cos(jnp.arange(8 * H.size)).reshape(8, *H.shape)
SYSTEMS = {
    "cells of their own": (lambda f: jax.vmap(jax.value_and_grad(f, (0, 1))), ("d",), CELLS),
    "one cell": (lambda f: jax.vmap(jax.grad(f, 1), (0, None)), (), H),
    "hvp": (lambda f: lambda r, h: jax.jvp(jax.vmap(jax.grad(f)), (r, h), (r, 0 * h))[1], ("d",), CELLS),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SYSTEMS)
def test_potentials(name, kind, lane):
    of, names, cells = SYSTEMS[name]
    mesh = mesh_of(kind)
    given = placed(mesh, MANY, "d"), placed(mesh, cells, *names)
    energy = bridge.potential(MODEL, atomic_numbers=NUMBERS, pbc=True, lane=lane)
    with context(mesh, kind):
        program = jax.jit(of(energy)).lower(*given).compile()
        seen.clear()
        found = jax.block_until_ready(program(*given))
    close(found, jax.jit(of(lambda r, h: brute(r, h, NUMBERS)))(MANY, cells))
    assert {x["pos"] for x in seen} == {(16, 3)} and "all-gather" not in program.as_text()
    assert all(y.sharding.spec[0] == "d" for y in jax.tree.leaves(found))


# What can't be shared out.


@pytest.mark.parametrize("kind", KINDS)
def test_one_system_over_devices(kind, lane):
    """Each device makes the whole call, a warning says so; its gradient lies as the input does."""
    mesh = mesh_of(kind)
    f = bridge.to_jax(lambda x: (x**3).sum(), lane=lane)
    x = placed(mesh, X, "d")
    with context(mesh, kind), pytest.warns(UserWarning, match="call it in jax.shard_map"):
        found = jax.block_until_ready(jax.jit(jax.grad(f))(x))
    close(found, 3 * X**2)
    if kind == "explicit":
        assert found.sharding.is_equivalent_to(x.sharding, 2)
    one = placed(mesh, X)
    with context(mesh, kind), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        close(jax.jit(jax.grad(f))(one), 3 * X**2)


def test_a_batch_that_does_not_divide(lane):
    """XLA would add rows to a part, which are no examples."""
    mesh = mesh_of("auto")
    there = NamedSharding(mesh, P("d"))
    with pytest.raises(ValueError, match="evenly divide"):
        jax.device_put(X[:7], there)

    def refused(x):
        assert (x > 0).all(), "a row that nobody gave"
        return (x**3).sum()

    shape = jax.ShapeDtypeStruct((), X.dtype)
    f = bridge.to_jax(refused, lane=lane, batched="sequential", outputs=shape)
    laid = lambda x: jax.vmap(f)(jax.lax.with_sharding_constraint(x + 1, there))
    close(jax.jit(laid)(X[:7]), ((X[:7] + 1) ** 3).sum(1))


def test_an_error_on_one_device(lane):
    mesh = mesh_of("auto")

    def picky(x):
        if float(x[0]) > 1.5:
            raise KeyError("too far out")
        return x.sum()

    shape = jax.ShapeDtypeStruct((), X.dtype)
    f = jax.jit(jax.vmap(bridge.to_jax(picky, lane=lane, batched="sequential", outputs=shape)))
    with pytest.raises(KeyError, match="too far out"), bridge.raising():
        jax.block_until_ready(f(placed(mesh, X, "d")))
    close(f(placed(mesh, X / 2, "d")), (X / 2).sum(1))


def test_what_the_native_lane_refuses():
    """XLA's partitioner asks for the part of a device, and tells of the error."""
    f = bridge.to_jax(lambda x: torch.unique(x), lane="native", batched=0, outputs=lambda x: x)
    program = jax.jit(jax.vmap(f))
    x = placed(mesh_of("auto"), X, "d")
    with (
        pytest.raises(NotImplementedError, match="shapes don't depend on values"),
        bridge.raising(),
    ):
        program(x)
    with pytest.raises(jax.errors.JaxRuntimeError, match="shapes don't depend on values"):
        program(x)


WAITING = """
import jax, jax.numpy as jnp, numpy as np, bridge
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
f = bridge.to_jax(lambda x: (x**2).sum(-1), lane="{lane}", batched=0)
total = jax.jit(lambda x: jax.vmap(f)(x).sum())
for k in range(200):
    x = np.full((64, 2000), k, "float32")
    found = total(jax.device_put(x, NamedSharding(mesh, P("d"))))
    np.testing.assert_allclose(found, 128000.0 * k**2, rtol=1e-5)
print("passed")
"""


def test_a_thread_that_waits_in_a_collective(lane):
    """With as many devices as threads, none is left to copy anything for the other call."""
    flags = "--xla_force_host_platform_device_count=2"
    ended = subprocess.run(
        [sys.executable, "-c", WAITING.format(lane=lane)],
        capture_output=True, text=True, env={**os.environ, "XLA_FLAGS": flags}, timeout=100,
    )  # fmt: skip
    assert ended.stdout.strip() == "passed", ended.stderr[-3000:]


FOUR = """
import itertools, jax, jax.numpy as jnp, numpy as np, bridge
from jax.sharding import NamedSharding, PartitionSpec as P
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_enable_x64", True)
calls = []
def energy(x, w):
    calls.append(tuple(x.shape))
    return (w * x**3).sum(-1)
mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.{kind},) * 2)
x, w = jnp.linspace(0.1, 2, 96).reshape(8, 4, 3), jnp.array([1.0, 2, 3])
inner = lambda f: jax.vmap(f, (0, None))
both = lambda f: jax.value_and_grad(lambda x, w: (jax.vmap(inner(f), (0, None))(x, w) ** 2).sum(), (0, 1))
want = both(lambda x, w: (w * x**3).sum(-1))(x, w)
f = both(bridge.to_jax(energy, batched={{"x": 0}}))
for spec in [("a",), (("a", "b"),), ("b", "a"), (None, ("b", "a")), (None, "b"), ()]:
    there = jax.device_put(x, NamedSharding(mesh, P(*spec)))
    shared = jax.device_put(w, NamedSharding(mesh, P()))
    with jax.set_mesh(mesh):
        program = jax.jit(f).lower(there, shared).compile()
        calls.clear()
        found = jax.block_until_ready(program(there, shared))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), found, want)
    rows = 32 // np.prod([mesh.shape[n] for s in spec if s for n in (s if isinstance(s, tuple) else (s,))] or [1])
    assert {{c[0] for c in calls if len(c) > 1}} == {{int(rows)}}, (spec, calls)
    assert "all-gather" not in program.as_text(), spec
    lies = lambda s: P(*s, *[None] * (3 - len(s)))
    assert lies(found[1][0].sharding.spec) == lies(there.sharding.spec), found[1][0].sharding
print("passed")
"""


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_two_batches_on_four_devices(kind):
    code = FOUR.format(kind=kind)
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=os.getcwd()
    )
    assert ended.stdout.strip().endswith("passed"), ended.stderr[-3000:]


def test_an_error_before_a_sum_is_said_at_once():
    """The other devices wait for it in the sum, until XLA ends the process."""
    code = WAITING.replace('print("passed")', "").format(lane="ffi").split("for k in")[0]
    code += """
import os, threading
threading.Timer(8, os._exit, (7,)).start()  # which XLA would do after 40 seconds
def model(x):
    if x.max() > 50:
        raise ValueError("x is too large")
    return x.sum(-1)
like = lambda x: jax.ShapeDtypeStruct(x.shape[:-1], x.dtype)
f = bridge.to_jax(model, lane="ffi", batched=0, outputs=like)
x = np.arange(24.0, dtype="float32").reshape(8, 3) * 3
total = jax.jit(lambda x: jax.vmap(f)(x).sum())
print(total(jax.device_put(x, NamedSharding(mesh, P("d")))))
"""
    flags = "--xla_force_host_platform_device_count=2"
    ended = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, env={**os.environ, "XLA_FLAGS": flags}, timeout=100,
    )  # fmt: skip
    said = "bridge: a call on one of several devices failed: ValueError: x is too large"
    assert ended.returncode and said in ended.stderr, ended.stderr[-3000:]


@pytest.mark.parametrize("kind", ["auto"])
def test_parts_that_have_no_names(kind, lane):
    """Minibatches of a sharded array lie over a part of an axis of the mesh."""
    x = placed(mesh_of(kind), X, "d")
    f = bridge.to_jax(lambda x: (x**2).sum(), lane=lane)
    for size in (3, 4):
        found = jax.jit(lambda x, size=size: jax.lax.map(f, x, batch_size=size))(x)
        close(found, (X**2).sum(1))
    swapped = lambda x: jax.vmap(f)(x.reshape(4, 2, 3).swapaxes(0, 1).reshape(8, 3))
    close(jax.jit(swapped)(x), (X.reshape(4, 2, 3).swapaxes(0, 1) ** 2).sum(-1).reshape(8))
    with jax.disable_jit():
        close(jax.vmap(f)(x), (X**2).sum(1))
