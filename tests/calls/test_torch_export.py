"""One op in the graph, whoever traces: torch.export, torch.fx, fake tensors; and what is done with
the graph afterwards."""

import gc
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import bridge
from tests.cases import TWINS
from tests.torch_cases import TRANSFORMS, bridged, close, equal_or_refused, inputs, leaves
from torch_side.calls import numbers

X = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)
compiled = partial(torch.compile, fullgraph=True)


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Call(torch.nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, *xs):
        return self.f(*xs)


WAYS = {
    "compiled": lambda name, xs: compiled(bridged(name), backend="eager"),
    "aot": lambda name, xs: compiled(bridged(name), backend="aot_eager"),
    "exported": lambda name, xs: torch.export.export(Call(bridged(name)), xs).module(),
    "make_fx": lambda name, xs: make_fx(bridged(name))(*xs),
    "op": lambda name, xs: (
        lambda *xs: torch.ops.bridge.call(
            list(xs), numbers.number(bridged(name).function(xs, {})[0])
        )[0]
    ),
}


@pytest.mark.matrix
@pytest.mark.parametrize(
    "transform",
    ["call", "backward", "vmap", "grad", "jvp", "dual", "hessian", "jacfwd", "linearize"],
)
@pytest.mark.parametrize("way", WAYS)
def test_value_x_transform_of_graph(way, transform):
    """A tangent that nobody carries on would be a zero."""
    of, xs = TRANSFORMS[transform], inputs("matmul")
    f = WAYS[way]("matmul", xs)
    f(*xs)
    want = of(TWINS["matmul"].torch, xs)
    equal_or_refused(lambda: of(f, xs), want, must=transform in ("call", "backward"))


# The op.


def test_graph_x_export():
    """The op is in the graph; the program holds what it calls, the object that bridge.to_torch gave
    does not have to live."""

    def exported():
        f = bridge.to_torch(lambda d, *, by: {"y": d["x"] * by})
        return torch.export.export(Call(lambda x: f({"x": x}, by=3.0)["y"]), (X,))

    program = exported()
    gc.collect()
    assert [n.target for n in program.graph.nodes].count(torch.ops.bridge.call.default) == 1
    close(program.module()(X), X * 3)
    close(
        TRANSFORMS["backward"](program.module(), (X,)),
        TRANSFORMS["backward"](lambda x: x * 3, (X,)),
    )
    close(program.run_decompositions().module()(X), X * 3)
    with pytest.raises((RuntimeError, AssertionError), match="(?i)guard|shape|size"):
        program.module()(X[:2])


def test_error_x_other_process(tmp_path):
    torch.export.save(torch.export.export(Call(bridged("cubic")), (X,)), tmp_path / "program.pt2")
    code = f"import torch, bridge\nbridge.to_torch(abs)\np = torch.export.load({str(tmp_path / 'program.pt2')!r})\np.module()(torch.ones(3, 4, dtype=torch.float64))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "JAX_ENABLE_X64": "1"},
    )
    assert done.returncode and "which this process does not know" in done.stderr, done.stderr[
        -2000:
    ]


@pytest.mark.parametrize("number", ["987654:0", "x:0", "", "no number"])
def test_error_x_unknown_number(number):
    with pytest.raises(
        RuntimeError,
        match="expected a JAX function of this process.* which this process does not know",
    ):
        torch.ops.bridge.call([X], number)


def test_error_x_unknown_place():
    number = numbers.number(bridged("cubic").function((X,), {})[0]).split(":")[0] + ":77"
    with pytest.raises(RuntimeError, match="which this process does not know"):
        torch.ops.bridge.call([X], number)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", ["cubic", "matmul"])
def test_opcheck(name, requires_grad):
    xs = leaves(inputs(name)) if requires_grad else inputs(name)
    torch.library.opcheck(
        torch.ops.bridge.call.default, (list(xs), numbers.number(bridged(name).function(xs, {})[0]))
    )


def test_tracing_runs_nothing():
    """Only shapes are asked for: JAX computes when the graph runs, and compiles one program
    then."""
    f = bridge.to_torch(lambda x: jnp.sin(x) * 2)
    graph = make_fx(f, tracing_mode="fake")(X)
    torch.export.export(Call(f), (X,))
    assert f.compilations == 0
    for _ in range(2):
        close(graph(X), X.sin() * 2)
    assert f.compilations == 1
