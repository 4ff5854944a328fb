"""bridge.to_torch and bridge.module: residuals go with the backward, captured arrays with the last
handle, nothing grows."""

import copy
import ctypes
import gc
import json
import subprocess
import sys
import time
import weakref
from pathlib import Path

import jax.numpy as jnp
import psutil
import pytest
import torch

import bridge
from tests.calls.test_torch_memory import tensor
from tests.calls.test_torch_module import draw

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
_give_back = ctypes.CDLL(None).malloc_trim


pytestmark = pytest.mark.usefixtures("frozen")


def grown(before, want=0):
    """By how many MiB the process has grown, once that is what is wanted, or after a second. XLA's
    threads let go of inputs a little later, jaxlib of lent results when JAX is next called or
    garbage is collected (0.10.2), glibc of what was freed when it is told."""
    for _ in range(50):
        gc.collect()
        (jnp.ones(1) + 1).block_until_ready()
        _give_back(0)
        if abs((size := psutil.Process().memory_info().rss / MIB) - before - want) < 4:
            break
        time.sleep(0.02)
    return size - before


KEPT = {  # a function of x, 32 MiB, and the most that it may keep for the backward
    "scalar": (lambda x: jnp.sin(jnp.sin(x)).sum(), 64),
    "vector": (lambda x: jnp.sin(jnp.sin(x)).sum(keepdims=True), 64),
    "input": (lambda x: x @ x, 0),
}
HOLD = {  # what outlives the backward, its size beside what is kept
    "nothing": (lambda y, x: None, lambda kept: 0),
    "graph": (lambda y, x: y, lambda kept: kept),
    "output and gradient": (lambda y, x: (y, *torch.autograd.grad(y, x)), lambda kept: 32),
}


@pytest.mark.matrix
@pytest.mark.parametrize("what", KEPT)
@pytest.mark.parametrize("how", HOLD)
def test_residuals_x_backward(how, what):
    """They live as long as the graph, or until its backward."""
    (f, most), (hold, size) = KEPT[what], HOLD[how]
    f, x = bridge.to_torch(f), tensor(4 * MIB)
    torch.autograd.grad(f(x), x)
    before = grown(0)
    y = f(x)
    kept = grown(before, most)
    assert kept < most + 4
    held = hold(y, x)
    del y
    assert abs(grown(before, size(kept)) - size(kept)) < 4
    del held
    assert abs(grown(before)) < 4


CALLS = {
    "forward": 50_000,
    "backward": 10_000,
    "module_backward": 10_000,
    "double_backward": 5_000,
    "vmap": 5_000,
    "planted": 10_000,
}
MEASURE = """
import gc, json, sys, jax, psutil, torch, bridge
jax.config.update("jax_enable_x64", True)
leaked, x = [], torch.ones(64, requires_grad=True)
f = bridge.to_torch(lambda x: jax.numpy.sin(jax.numpy.sin(x)).sum())
m = bridge.module(lambda p, x: f.__wrapped__(x * p), jax.numpy.ones(64))
def grad(f, x, **options):
    return torch.autograd.grad(f(x), x, **options)[0]
calls = {"forward": lambda: f(x), "backward": lambda: grad(f, x), "module_backward": lambda: (m(x).backward(), m.zero_grad()),
         "double_backward": lambda: grad(lambda x: grad(f, x, create_graph=True).sum(), x), "planted": lambda: leaked.append(bytearray(400)),
         "vmap": lambda: torch.vmap(f)(x.detach().view(8, 8))}
def state(call, n):
    for _ in range(n):
        call()
    gc.collect()
    return psutil.Process().memory_info().rss, len(jax.live_arrays())
print(json.dumps({name: [b - a for a, b in zip(state(calls[name], n // 5), state(calls[name], n))] for name, n in json.loads(sys.argv[1]).items()}))
"""


@pytest.fixture(scope="module")
def measured():
    return json.loads(
        subprocess.check_output(
            [sys.executable, "-c", MEASURE, json.dumps(CALLS)], text=True, cwd=ROOT, timeout=200
        )
    )


@pytest.mark.full
@pytest.mark.parametrize("name", CALLS)
def test_memory_x_many_calls(name, measured):
    """In a process of its own. The planted leak of 4 MB shows that more is seen."""
    size, arrays = measured[name]
    assert (size < 2 * MIB) is (name != "planted") and arrays == 0, (
        f"{size / CALLS[name]:.1f} bytes a call, {arrays} arrays"
    )


USES = {
    "never": lambda f, x: None,
    "called": lambda f, x: f(x.detach()),
    "backward": lambda f, x: f(x).sum().backward(),
    "hessian": lambda f, x: torch.func.hessian(lambda x: f(x).sum())(x),
    "vmap": lambda f, x: torch.vmap(f)(x[:, None]),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "compiled": lambda f, x: (
        torch.compile(f, fullgraph=True, backend="aot_eager")(x).sum().backward(),
        torch._dynamo.reset(),
    ),
    "deepcopy": lambda f, x: copy.deepcopy(f)(x),
    "failed": lambda f, x: pytest.raises(TypeError, f, "text"),
}


def capturing(what):
    """(a function or module, a weak reference to an array in its closure)."""
    captured = draw(5)
    if what == "function":
        return bridge.to_torch(lambda x: jnp.sin(x) * captured.sum()), weakref.ref(captured)
    return bridge.module(lambda p, x: jnp.sin(x) * p * captured.sum(), jnp.ones(())), weakref.ref(
        captured
    )


@pytest.mark.matrix
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("what", ["function", "module"])
def test_captured_arrays_x_dropped(what, use):
    """What a callable captured dies with the last handle, whatever had been compiled of it."""
    f, alive = capturing(what)
    USES[use](f, tensor(5))
    del f
    gc.collect()
    assert alive() is None
