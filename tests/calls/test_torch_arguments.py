"""What goes in and comes out of a JAX callable in torch: pytrees, keywords, static values,
integers; what has a gradient."""

from typing import NamedTuple

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest
import torch
from hypothesis import given

import bridge
from tests.torch_cases import close

X = torch.arange(1.0, 5.0, dtype=torch.float64)
LEAF = lambda: X.clone().requires_grad_()


class Pair(NamedTuple):
    a: object
    b: object


# Pytrees, keywords, static values.


def model(inputs, *others, scale=1.0, mode="sum", extra=None):
    x = inputs["x"] * scale
    if mode == "none":
        return None
    if extra is not None:
        x = x + extra["shift"][0]
    return {
        "total": x.sum(),
        "pair": Pair(x**2, (inputs["i"] + 1, x > 2)),
        "others": [o * 2 for o in others],
        "nothing": None,
    }


def test_structure_x_value_and_gradient():
    x = LEAF()
    out = bridge.to_torch(model)(
        {"x": x, "i": torch.arange(3)}, X, scale=2, extra={"shift": [1.0, None]}
    )
    want = {
        "total": (2 * x + 1).sum(),
        "pair": Pair((2 * x + 1) ** 2, (torch.arange(3) + 1, 2 * x + 1 > 2)),
        "others": [2 * X],
    }
    assert (
        type(out) is dict
        and out.pop("nothing") is None
        and type(out["pair"]) is Pair
        and type(out["pair"].b) is tuple
        and type(out["others"]) is list
    )
    close(out, want)
    assert (
        not any(t.requires_grad for t in out["pair"].b)
        and out["total"].requires_grad
        and out["pair"].a.requires_grad
    )
    close(
        torch.autograd.grad(out["pair"].a.sum() + out["total"], x),
        torch.autograd.grad(want["pair"].a.sum() + want["total"], x),
    )


@pytest.mark.parametrize("out", [None, (), [], {}, {"a": None}], ids=repr)
def test_structure_x_no_outputs(out):
    assert bridge.to_torch(lambda x: out)(LEAF()) == out


STATIC = st.sampled_from(
    [
        0,
        1,
        0.0,
        -0.0,
        1.0,
        True,
        False,
        "1",
        "",
        (),
        (1,),
        (1.0,),
        (True,),
        1j,
        b"1",
        None,
        torch.float64,
    ]
)


@given(st.lists(STATIC, min_size=2, max_size=6), st.booleans())
def test_static_arguments_x_type(values, keyword):
    """1, 1.0 and True are equal in Python, and so are 0.0 and -0.0; each arrives as it was given,
    and is compiled once."""
    seen = []
    f = bridge.to_torch(lambda x, value=(): (seen.append(repr(value)), x + 1)[1])
    for value in values + values:
        f(X, value=value) if keyword else f(X, value)
    assert list(dict.fromkeys(seen)) == list(dict.fromkeys(map(repr, values)))
    assert f.compilations == len(set(seen))


# What has a gradient.

# f, inputs, gradients of the sum of what has a gradient, None where torch would refuse
GRADIENTS = {
    "integer_input": (
        lambda x, i: x[i],
        (X, torch.tensor([0, 0, 2])),
        [torch.tensor([2.0, 0, 1, 0])],
    ),
    "bool_input": (lambda x, m: jnp.where(m, x, 0.0), (X, X > 2), [(X > 2) * 1.0]),
    "integer_output": (lambda x: (x**2, jnp.argmax(x)), (X,), [2 * X]),
    "unused_input": (lambda x, y: x**2, (X, X), [2 * X, 0 * X]),
    "unreached_output": (lambda x: (x**2, jnp.ones(3)), (X,), [2 * X]),
    "only_constants": (lambda x: jnp.ones(3), (X,), [0 * X]),
    "identity": (lambda x: x, (X,), [0 * X + 1]),
    "rounded": (lambda x: jnp.round(x), (X,), [0 * X]),
    "through_integers": (lambda x: x.astype(int).astype(float), (X,), [0 * X]),
    "stopped": (lambda x: jax.lax.stop_gradient(x) * x, (X,), [X]),
    "same_twice": (lambda x, y: x * y, (X, X), [X, X]),
    "empty": (lambda x: jnp.sin(x), (torch.zeros(0, 3),), [torch.zeros(0, 3)]),
    "zero_d": (lambda x: x**3, (torch.tensor(2.0),), [torch.tensor(12.0)]),
    "float32": (
        lambda x, y: x * y,
        (torch.ones(2), torch.ones(2, dtype=torch.float64)),
        [torch.ones(2), torch.ones(2)],
    ),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradient_x_kind(name):
    f, given, want = GRADIENTS[name]
    xs = [x.clone().requires_grad_() if x.is_floating_point() else x for x in given]
    moved = [x for x in xs if x.requires_grad]
    outs = bridge.to_torch(f)(*xs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    assert [y.requires_grad for y in outs] == [y.is_floating_point() for y in outs]
    got = torch.autograd.grad(sum(y.sum() for y in outs if y.requires_grad), moved)
    close(got, tuple(w.to(x.dtype) for w, x in zip(want, moved)))


@pytest.mark.parametrize("outs", [(0,), (1,), (0, 1)])
def test_gradient_x_outputs_without_cotangent(outs):
    x = torch.tensor([0.0, 4.0], dtype=torch.float64, requires_grad=True)
    ys, want = bridge.to_torch(lambda x: (x**2, 3 * x, jnp.sqrt(x)))(x), (x**2, 3 * x)
    close(
        torch.autograd.grad(sum(ys[o].sum() for o in outs), x),
        torch.autograd.grad(sum(want[o].sum() for o in outs), x),
    )


GRAD_MODES = {
    "enabled": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


@pytest.mark.parametrize("mode", GRAD_MODES)
@pytest.mark.parametrize("of_x, of_y", [(True, False), (False, True), (False, False)])
def test_requires_grad_x_mode(mode, of_x, of_y):
    x, y = X.clone().requires_grad_(of_x), X.clone().requires_grad_(of_y)
    with GRAD_MODES[mode]():
        got, want = bridge.to_torch(lambda x, y: x * y)(x, y), x * y
    for ask in ("requires_grad", "is_leaf", "is_inference"):
        value = [t() if callable(t) else t for t in (getattr(got, ask), getattr(want, ask))]
        assert value[0] == value[1], ask
    assert (got.grad_fn is None) == (want.grad_fn is None)


def test_lists_by_keyword():
    f = bridge.to_torch(lambda x, weights: x * weights[0] + weights[1])
    x = torch.arange(3.0)
    torch.testing.assert_close(f(x, weights=[x, x + 1]), x * x + x + 1)
