"""JAX callables inside torch.compile: values and gradients of eager, no graph break, no wrong
number in silence."""

from functools import partial

import jax.numpy as jnp
import pytest
import torch

import bridge
from tests.cases import TWINS
from tests.torch_cases import (
    REFUSALS,
    TOTAL,
    TRANSFORMS,
    bridged,
    close,
    equal_or_refused,
    inputs,
    leaves,
)

BACKENDS = ["eager", "aot_eager", "inductor"]
X = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)
compiled = partial(torch.compile, fullgraph=True)


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def energy(inputs, scale=1.0, mode="plain", extra=None):
    y = jnp.tanh(inputs["x"]) * scale + (0 if extra is None else extra[0])
    if mode == "dict":
        return {"energy": y.sum(), "parts": [y, (y * 2, jnp.argmax(y))], "none": None}
    return (y, y.sum()) if mode == "tuple" else [y] if mode == "list" else y


class Model(torch.nn.Module):
    """Layers of torch before and after the bridged function."""

    def __init__(self, f, **kwargs):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.f, self.kwargs = torch.nn.Linear(4, 4, dtype=torch.float64), f, kwargs

    def forward(self, x):
        return self.f({"x": self.first(x)}, **self.kwargs)


def results(model, x):
    """Outputs, and gradients of all that has one."""
    x = x.clone().requires_grad_()
    out = model(x)
    loss = sum(
        (t * t).sum()
        for t in torch.utils._pytree.tree_leaves(out)
        if isinstance(t, torch.Tensor) and t.requires_grad
    )
    return out, torch.autograd.grad(loss, [x, *model.parameters()])


@pytest.mark.matrix
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"scale": 2.0},
        {"mode": "dict", "scale": 2},
        {"mode": "tuple"},
        {"mode": "list", "extra": (X, None)},
    ],
    ids=str,
)
def test_value_and_gradient_x_model(kwargs, backend):
    model = Model(bridge.to_torch(energy), **kwargs)
    close(results(torch.compile(model, backend=backend, fullgraph=True), X), results(model, X))


@pytest.mark.matrix
@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize("name", TWINS)
def test_value_and_gradient_x_twin(name, backend):
    f, xs = bridged(name), inputs(name)
    close(
        TRANSFORMS["backward"](compiled(lambda *xs: f(*xs) * 2, backend=backend), xs),
        TRANSFORMS["backward"](lambda *xs: TWINS[name].torch(*xs) * 2, xs),
    )


@pytest.mark.matrix
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dynamic", [None, True, False])
def test_value_x_sizes(dynamic, backend):
    f = bridge.to_torch(lambda x, n: jnp.sin(x) * x.shape[0] + n)
    g = compiled(lambda x: f(x * 2, x.shape[1]).sum(), backend=backend, dynamic=dynamic)
    for size in (3, 1, 5, 2, 3, 7):
        x = torch.ones(size, 4, dtype=torch.float64, requires_grad=True)
        want = f(x * 2, 4).sum()
        close(torch.autograd.grad(g(x), x), torch.autograd.grad(want, x))


@pytest.mark.matrix
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "call",
    [
        lambda f, x: f(x, 2),
        lambda f, x: f(x, 2.0),
        lambda f, x: f(x, by=True),
        lambda f, x: f(3, by=x),
        lambda f, x: f(2, 3),
    ],
    ids=range(5),
)
def test_value_x_static_arguments(call, backend):
    f = bridge.to_torch(lambda a, by: a * jnp.asarray(by))
    x = torch.arange(3)
    got = compiled(lambda x: call(f, x), backend=backend)(x)
    close(got, call(f, x), rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_x_outputs_without_cotangent(backend):
    """No 0 * inf of an output that nobody uses."""
    f, x = (
        bridge.to_torch(lambda x: (jnp.sqrt(x), 2 * x)),
        torch.zeros(2, dtype=torch.float64, requires_grad=True),
    )
    close(
        torch.autograd.grad(compiled(lambda x: f(x)[1].sum(), backend=backend)(x), x),
        (torch.full_like(x, 2.0).detach(),),
    )


@pytest.mark.parametrize("name", ["pair", "matmul"])
def test_double_backward_x_eager_backend(name):
    xs = inputs(name)
    close(
        TRANSFORMS["double_backward"](compiled(bridged(name), backend="eager"), xs),
        TRANSFORMS["double_backward"](TWINS[name].torch, xs),
    )


@pytest.mark.matrix
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", ["pair", "matmul"])
def test_double_backward_x_gradient_inside(name, backend):
    """aot_autograd refuses a double backward of what it has compiled, not one inside; dynamo wants
    to be told."""
    force = lambda f: lambda *xs: torch.autograd.grad(TOTAL(f)(*xs), xs, create_graph=True)
    loss = lambda f: lambda *xs: sum((g * g).sum() for g in force(f)(*xs))
    xs = leaves(inputs(name))
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        got = torch.autograd.grad(compiled(loss(bridged(name)), backend=backend)(*xs), xs)
    close(got, torch.autograd.grad(loss(TWINS[name].torch)(*xs), xs))


def test_double_backward_x_aot_is_torchs_error():
    f, x = bridged("softmax"), X.clone().requires_grad_()
    (g,) = torch.autograd.grad(
        compiled(lambda x: f(x).square().sum(), backend="aot_eager")(x), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        g.sum().backward()


# Transforms inside, and of what was compiled or exported: eager's numbers, or an error that says
# what to do.

INSIDE = [
    "vmap",
    "grad",
    "jacrev",
    "vmap_grad",
    "grad_vmap",
    "hessian",
    "jvp",
    "jacfwd",
    "dual",
    "vmap_jvp",
    "jacrev_jacrev",
]


@pytest.mark.matrix
@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("transform", INSIDE)
def test_value_x_transform_inside(transform, fullgraph):
    of, f, xs = TRANSFORMS[transform], bridged("matmul"), inputs("matmul")
    run = torch.compile(lambda *xs: of(f, xs), backend="aot_eager", fullgraph=fullgraph)
    equal_or_refused(lambda: run(*xs), of(TWINS["matmul"].torch, xs), must=transform == "vmap")


@pytest.mark.parametrize("transform", ["jvp", "jacfwd"])
def test_forward_mode_inside_says_what_to_do(transform):
    of, f = TRANSFORMS[transform], bridged("softmax")
    with pytest.raises(REFUSALS, match="expected .*forward mode.*; compile without"):
        compiled(lambda x: of(f, (x,)), backend="eager")(X)
