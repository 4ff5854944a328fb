"""Torch in JAX in torch and JAX in torch in JAX: values and derivatives through all of it, in
threads, without a deadlock."""

import contextlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import bridge
from jax_side.calls import lanes
from jax_side.calls.nesting import here
from tests.cases import close

JAX_TRANSFORMS = {
    "value": lambda f: f,
    "grad": jax.grad,
    "hessian": jax.hessian,
    "jvp": lambda f: lambda x: jax.jvp(f, (x,), (x * x,)),
    "vmap of grad": lambda f: lambda x: jax.vmap(jax.grad(f))(jnp.stack([x, 2 * x])),
    "grad of scan": lambda f: jax.grad(
        lambda x: f(jax.lax.scan(lambda c, _: (c - 0.001 * jax.grad(f)(c), None), x, length=3)[0])
    ),
}
TORCH_TRANSFORMS = {
    "value": lambda f: f,
    "grad": torch.func.grad,
    "hessian": torch.func.hessian,
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (x * x,)),
    "vmap of grad": lambda f: (
        lambda x: torch.func.vmap(torch.func.grad(f))(torch.stack([x, 2 * x]))
    ),
}


def plain_jax(x):
    return jnp.sum((jnp.sin(2 * x) * jnp.sum(2 * x)) ** 2)


def plain_torch(x):
    return torch.sum((torch.sin(2 * x) * torch.sum(2 * x)) ** 2)


def jax_torch_jax(lane):
    inner = bridge.to_torch(lambda x: jnp.sin(x) * jnp.sum(x))
    return bridge.to_jax(lambda x: (inner(2 * x) ** 2).sum(), lane=lane)


def torch_jax_torch(lane):
    inner = bridge.to_jax(lambda x: torch.sin(x) * x.sum(), lane=lane)
    return bridge.to_torch(lambda x: jnp.sum(inner(2 * x) ** 2))


X = np.random.default_rng(0).uniform(-1, 1, 4)


@pytest.mark.matrix
@pytest.mark.parametrize(
    "transform, lane, jitted",
    [
        (t, lane, (i + j) % 2)
        for i, t in enumerate(JAX_TRANSFORMS)
        for j, lane in enumerate(["ffi", "host"])
    ],
)
def test_jax_in_torch_in_jax(transform, lane, jitted):
    """Each transform on both lanes, eager on the one and jitted on the other."""
    wrap = JAX_TRANSFORMS[transform]
    found = wrap(jax_torch_jax(lane))
    close(
        (jax.jit(found) if jitted else found)(jnp.asarray(X)),
        jax.jit(wrap(plain_jax))(jnp.asarray(X)),
        rtol=1e-12,
    )


@pytest.mark.parametrize("transform", TORCH_TRANSFORMS)
def test_torch_in_jax_in_torch(transform, lane):
    wrap = TORCH_TRANSFORMS[transform]
    torch.testing.assert_close(
        wrap(torch_jax_torch(lane))(torch.tensor(X)),
        wrap(plain_torch)(torch.tensor(X)),
        rtol=1e-12,
        atol=1e-12,
    )


def test_torch_in_jax_in_torch_x_backward_twice(lane):
    f, x = torch_jax_torch(lane), torch.tensor(X, requires_grad=True)
    (g,) = torch.autograd.grad(f(x), x, create_graph=True)
    (h,) = torch.autograd.grad(g.pow(2).sum(), x)
    (want,) = torch.autograd.grad(torch.func.grad(plain_torch)(x).pow(2).sum(), x)
    torch.testing.assert_close(h, want)
    assert torch.autograd.gradcheck(f, (x,)) and torch.autograd.gradgradcheck(f, (x,))


def test_jax_in_torch_in_jax_x_autograd_engine(lane):
    """derivatives="autograd": the inner JAX function is reached by the backward of torch."""
    inner = bridge.to_torch(lambda x: jnp.sin(x) * jnp.sum(x))
    f = bridge.to_jax(
        lambda x: (inner(2 * x) ** 2).sum(), lane=lane, derivatives="autograd", batched="sequential"
    )
    for wrap in (jax.grad, jax.hessian):
        close(
            jax.jit(wrap(f))(jnp.asarray(X)), jax.jit(wrap(plain_jax))(jnp.asarray(X)), rtol=1e-12
        )


def test_three_deep(lane):
    """JAX in torch in JAX in torch, with its gradient."""
    f = bridge.to_torch(lambda x: jax_torch_jax(lane)(x) * 2)
    x = torch.tensor(X)
    torch.testing.assert_close(torch.func.grad(f)(x), 2 * torch.func.grad(plain_torch)(x))


def test_a_model_in_the_middle_is_trained(lane):
    """Gradients reach parameters that lie in torch, beneath JAX, beneath torch."""
    net = torch.nn.Linear(4, 1, dtype=torch.float64)
    apply, params = bridge.functional(net, copy=True, lane=lane)
    outer = bridge.module(lambda p, x: apply(p, x).sum() ** 2, params)
    outer(torch.tensor(X)).backward()
    (net(torch.tensor(X)).sum() ** 2).backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(outer.get_parameter(name).grad, p.grad)


def test_an_exception_deep_inside_has_its_text_and_type():
    def broken(x):
        if type(x) is torch.Tensor:
            raise KeyError("no such species")
        return x

    f = bridge.to_torch(jax.jit(bridge.to_jax(broken)))
    with pytest.raises(jax.errors.JaxRuntimeError, match="KeyError: 'no such species'"):
        f(torch.ones(3))
    with pytest.raises(KeyError, match="no such species"), bridge.raising():
        f(torch.ones(3))


@pytest.mark.parametrize("fails", [False, True], ids=["works", "fails"])
def test_a_call_leaves_the_depth_as_it_was(lane, fails, unlogged):
    """Programs are compiled for the depth of the thread that runs them: each call adds one, whether
    it fails or not."""
    depths = []

    def inner(x):
        depths.append(here.depth)
        if fails:
            raise KeyError("on purpose")
        return x

    same = lambda x: x
    middle = bridge.to_torch(jax.jit(bridge.to_jax(inner, outputs=same, lane=lane)))

    def outer(x):
        depths.append(here.depth)
        for _ in range(2):
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                middle(x)
            depths.append(here.depth)
        return x

    f = jax.jit(bridge.to_jax(outer, outputs=same, lane=lane))
    jax.block_until_ready(f(jnp.asarray(X)))
    assert depths == [1, 2, 1, 2, 1] and here.depth == 0


THREADS = """
import faulthandler, sys, threading
faulthandler.dump_traceback_later(100, exit=True)
import jax, jax.numpy as jnp, numpy as np, torch, bridge
if {synchronous}:
    jax.config.update("jax_cpu_enable_async_dispatch", False)
def steps(f, x, n):
    step = jax.jit(lambda x: jnp.tanh(f(x) @ x / len(x)) + jax.grad(lambda x: f(x).sum())(x) / len(x))
    for _ in range(n):
        x = step(x)  # nobody waits: many computations are in flight
    return x
def run(lane, n):
    inner = bridge.to_torch(lambda x: jnp.tanh(x @ x / n))
    middle = bridge.to_jax(lambda x: inner(x) * 0.5 + torch.sin(x), lane=lane)
    plain = lambda x: jnp.tanh(x @ x / n) * 0.5 + jnp.sin(x)
    def work(seed):
        x = jnp.asarray(np.random.default_rng(seed).random((n, n)), "float32")
        got, want = steps(middle, x, 60), steps(plain, x, 60)
        assert np.allclose(got, want, atol=1e-4), abs(got - want).max()
        done.append(seed)
    done = []
    work(0)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(1, 5)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert sorted(done) == [0, 1, 2, 3, 4], done
    print(lane, n)
for lane, n in {runs}:
    run(lane, n)
"""


@pytest.mark.parametrize(
    "synchronous, runs",
    [
        pytest.param(False, [("ffi", 8), ("ffi", 200)], marks=pytest.mark.full),
        (True, [("ffi", 200), ("host", 200)]),
    ],
)
def test_threads_x_computations_in_flight_don_t_deadlock(synchronous, runs):
    """A watchdog ends a process that hangs. The host lane has the setting that its error names."""
    out = subprocess.run(
        [sys.executable, "-c", THREADS.format(synchronous=synchronous, runs=runs)],
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert out.stdout.splitlines() == [f"{lane} {n}" for lane, n in runs], out.stderr[-3000:]


class Never:
    def is_ready(self):
        return False


def test_the_host_lane_names_the_setting_rather_than_wait_for_ever():
    with pytest.raises(
        RuntimeError,
        match=r'jax.config.update\("jax_cpu_enable_async_dispatch", False\) right after import jax .*python -m bridge doctor',
    ):
        lanes._wait([Never()], limit=0.01)
