"""torch.compile around JAX callables: recompilation, graph breaks, graphs that torch keeps on
disk."""

import os
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import pytest
import torch

import bridge
from tests.cases import TWINS
from tests.torch_cases import bridged, close, inputs, leaves

F = torch.func
BACKENDS = ["eager", "aot_eager", "inductor"]
X = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)
compiled = partial(torch.compile, fullgraph=True)


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def test_compilations_x_calls():
    """torch and JAX compile once."""
    counts = Counter()

    def f(x):
        counts["traced"] += 1
        return jnp.sin(x)

    def backend(graph, _):
        counts["graphs"] += 1
        return graph

    f = bridge.to_torch(f)
    g = torch.compile(lambda x: f(x) * 2, backend=backend, fullgraph=True)
    for k in range(4):
        close(g(X * k), 2 * torch.sin(X * k))
    assert counts == {"traced": 2, "graphs": 1} and f.compilations == 1


@pytest.mark.matrix
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "values", [(2, 3, 4, 3), (2.0, 3.0, 4.5, 3.0), (True, False, True)], ids=str
)
def test_value_x_changing_number(values, backend):
    """torch.compile makes symbols of numbers that change."""
    f = bridge.to_torch(lambda x, n: x * n + (0.5 if isinstance(n, float) else 0))
    g = compiled(lambda x, n: f(x, n) * 2, backend=backend)
    for n in values:
        close(g(X, n), f(X, n) * 2, rtol=0, atol=0)


def test_value_x_changing_function():
    """Each function has a graph of its own."""
    step = compiled(lambda f, x: f(x) * 2, backend="eager")
    for k in (2, 3, 2):
        close(step(bridge.to_torch(lambda x: x * k), X), X * k * 2)


def broken(torch_step):
    """A step with a graph break before and after the call."""

    def step(f, x, w):
        torch._dynamo.graph_break()
        y = f(x, w)
        torch._dynamo.graph_break()
        return torch_step(f, y, x, w)

    return step


BROKEN = {
    "backward": lambda f, y, x, w: (y.sum().backward(), w.grad)[1],
    "create_graph": lambda f, y, x, w: torch.autograd.grad(y.sum(), w, create_graph=True)[
        0
    ].tolist(),
    "func": lambda f, y, x, w: F.grad(lambda w: f(x, w).sum())(w),
    "jvp": lambda f, y, x, w: F.jvp(lambda w: f(x, w), (w,), (w,))[1],
    "vmap": lambda f, y, x, w: F.vmap(lambda x: f(x[None], w))(x),
}


@pytest.mark.matrix
@pytest.mark.parametrize(
    "name, backend",
    [(n, b) for n in BROKEN for b in BACKENDS[:2] if (n, b) != ("create_graph", "aot_eager")],
)  # torch's own fails there
def test_value_x_graph_break(name, backend):
    """What runs between graphs is run as it is: nothing of the bridge or of JAX is traced."""
    step = broken(BROKEN[name])
    want = step(TWINS["matmul"].torch, *leaves(inputs("matmul")))
    close(torch.compile(step, backend=backend)(bridged("matmul"), *leaves(inputs("matmul"))), want)


CACHED = """
import sys, torch, jax.numpy as jnp, bridge
f = bridge.to_torch(lambda x, w: x * w * w)
x, w = torch.tensor([2.0, 3.0]), torch.tensor([5.0, 7.0])
of_x = torch.compile(lambda x, w: f(x, w).sum(), fullgraph=True)
of_w = torch.compile(lambda x, w: (f(x, w) * 3).sum(), fullgraph=True)
if sys.argv[1] == "other order":
    torch.autograd.grad(of_w(x, w.requires_grad_()), w)
print(torch.autograd.grad(of_x(x.requires_grad_(), w.detach()), x)[0].tolist())
"""


@pytest.mark.full
def test_gradient_x_graphs_on_disk(tmp_path):
    """What one process has compiled calls no function of another one."""
    for order in ("first", "other order"):
        env = {
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }
        done = subprocess.run(
            [sys.executable, "-c", CACHED, order],
            check=False,
            capture_output=True,
            text=True,
            timeout=200,
            cwd=Path(__file__).parents[2],
            env=env,
        )
        assert done.stdout.endswith("[25.0, 49.0]\n"), done.stdout + done.stderr[-2000:]
