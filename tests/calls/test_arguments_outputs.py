"""What goes in and comes out of a bridged function: pytrees, keywords, static values, integers,
several outputs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import bridge
from tests.cases import close

X = jnp.arange(1.0, 5.0)


class Pair(NamedTuple):
    a: object
    b: object


def model(inputs, *others, scale=1.0, mode="sum", extra=None):
    x = inputs["x"] * scale
    if mode == "none":
        return None
    if extra is not None:
        x = x + extra["shift"]
    return {
        "total": x.sum(),
        "pair": Pair(x**2, (inputs["i"] + 1, x > 2)),
        "others": [o * 2 for o in others],
        "nothing": None,
    }


def test_pytrees_keywords_and_static_values(lane, maybe_jit):
    f = bridge.to_jax(model, lane=lane)
    inputs = {"x": X, "i": jnp.arange(3)}
    out = maybe_jit(lambda inputs, o: f(inputs, o, scale=2, extra={"shift": 1.0}))(inputs, X)
    assert isinstance(out["pair"], Pair) and out["nothing"] is None
    want = {
        "total": (2 * X + 1).sum(),
        "pair": Pair((2 * X + 1) ** 2, (jnp.arange(3) + 1, 2 * X + 1 > 2)),
        "others": [2 * X],
        "nothing": None,
    }
    close_exact(out, want)


def close_exact(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert a.dtype == b.dtype and (np.asarray(a) == np.asarray(b)).all()


def test_a_traced_keyword_is_an_array_and_a_number_stays_a_number(lane):
    kinds = []

    def f(x, *, scale):
        kinds.append(type(scale))
        return x * scale

    g = bridge.to_jax(f, lane=lane)
    close(g(X, scale=2.0), 2 * X)
    close(jax.jit(lambda s: g(X, scale=s))(2.0), 2 * X)
    assert kinds[0] is float and issubclass(kinds[-1], torch.Tensor)


def test_gradient_of_one_output_among_several(lane, maybe_jit):
    f = bridge.to_jax(model, lane=lane)
    g = maybe_jit(jax.grad(lambda x: f({"x": x, "i": jnp.arange(3)}, mode="sum")["pair"].a.sum()))(
        X
    )
    close(g, 2 * X)


def test_gradient_with_aux_and_integer_outputs(lane):
    f = bridge.to_jax(lambda x: (x.pow(3).sum(), torch.argmax(x)), lane=lane)
    (e, i), g = jax.jit(jax.value_and_grad(f, has_aux=True))(X)
    assert i.dtype == jnp.int64 and int(i) == 3 and float(e) == float((X**3).sum())
    close(g, 3 * X**2)


def test_integer_inputs_have_no_gradient(lane):
    f = bridge.to_jax(lambda x, i: x[i].sum(), lane=lane)
    _, pull = jax.vjp(f, X, jnp.array([0, 0, 2]))
    gx, gi = pull(jnp.ones(()))
    close(gx, jnp.array([2.0, 0.0, 1.0, 0.0]))
    assert gi.dtype == jax.dtypes.float0


def test_an_unreached_input_has_gradient_zero(lane):
    for derivatives in ("func", "autograd"):
        f = bridge.to_jax(lambda x, y: (x**2).sum(), lane=lane, derivatives=derivatives)
        close(jax.jit(jax.grad(f, 1))(X, X), jnp.zeros(4))
        g = bridge.to_jax(lambda x, y: x**2, lane=lane, derivatives=derivatives)
        close(jax.jit(lambda x, y: jax.jvp(g, (x, y), (x, y))[1])(X, X), 2 * X * X)


def test_a_dropped_cotangent_is_no_zero_times_infinity(lane):
    for derivatives in ("func", "autograd"):
        f = bridge.to_jax(lambda x: (torch.sqrt(x), x * 2), lane=lane, derivatives=derivatives)
        close(jax.jit(jax.grad(lambda x: f(x)[1].sum()))(jnp.zeros(2)), jnp.full(2, 2.0))


def test_no_array_inputs(lane, maybe_jit):
    f = bridge.to_jax(lambda n: torch.arange(n, dtype=torch.float64), lane=lane)
    close(maybe_jit(lambda: f(3))(), jnp.arange(3.0))


def test_no_outputs(lane):
    assert jax.jit(lambda: bridge.to_jax(model, lane=lane)({"x": X}, mode="none"))() is None


def test_numpy_arguments(lane, maybe_jit):
    f = bridge.to_jax(lambda x, y: x * y, lane=lane)
    close(maybe_jit(lambda x: f(x, np.arange(4.0)))(X), X * np.arange(4.0))
    close(f(X, np.float64(3.0)), 3 * X)


def test_outputs_declared_as_pytree_or_function_equal_inferred(lane):
    f = lambda x: {"y": x[1:] * 2, "s": x.sum()}
    shapes = {
        "y": jax.ShapeDtypeStruct((3,), jnp.float64),
        "s": jax.ShapeDtypeStruct((), jnp.float64),
    }
    inferred = jax.jit(bridge.to_jax(f, lane=lane))(X)
    close_exact(jax.jit(bridge.to_jax(f, lane=lane, outputs=shapes))(X), inferred)
    close_exact(jax.jit(bridge.to_jax(f, lane=lane, outputs=lambda x: shapes))(X), inferred)


def test_shapes_are_found_without_running_the_model(lane):
    ran = []

    def f(x):
        ran.append(type(x).__name__)
        return torch.linalg.inv(x)

    assert jax.eval_shape(
        bridge.to_jax(f, lane=lane), jax.ShapeDtypeStruct((1000, 1000), jnp.float32)
    ).shape == (1000, 1000)
    assert ran == ["FakeTensor"]


def test_methods_modules_and_partials_are_callables(lane):
    import functools

    net = torch.nn.Linear(4, 2).double().eval()
    x = jnp.ones((3, 4))
    want = jnp.asarray(net(torch.ones(3, 4, dtype=torch.float64)).detach().numpy())
    for f in (net, net.forward, functools.partial(net.forward)):
        close(jax.jit(bridge.to_jax(f, lane=lane))(x), want)


def test_weights_are_read_at_each_call(lane):
    net = torch.nn.Linear(4, 2).double().eval()
    f = jax.jit(bridge.to_jax(net, lane=lane))
    x = jnp.ones((3, 4))
    f(x)
    with torch.no_grad():
        net.weight.zero_()
        net.bias.fill_(7.0)
    close(f(x), jnp.full((3, 2), 7.0))


@pytest.mark.parametrize("spelling", ["x.T @ w", "w.T @ x"])
def test_transposed_and_broadcast_arguments_inside_jit(lane, spelling):
    x, w = jnp.arange(6.0).reshape(3, 2), jnp.broadcast_to(jnp.arange(2.0), (3, 2))
    f = bridge.to_jax(torch.matmul, lane=lane)
    a, b = (x.T, w) if spelling.startswith("x") else (w.T, x)
    close(jax.jit(f)(a, b), a @ b)
    close(f(a, b), a @ b)


# Complex numbers: JAX's conventions, whatever torch's are.

COMPLEX = {
    "holomorphic": (lambda z: z * z + 3 * z, lambda z: z * z + 3 * z),
    "not holomorphic": (
        lambda z: z * torch.conj(z) + torch.abs(z) * z,
        lambda z: z * jnp.conj(z) + jnp.abs(z) * z,
    ),
    "to real": (lambda z: torch.abs(z) ** 2 + z.imag, lambda z: jnp.abs(z) ** 2 + z.imag),
    "from real": (lambda z: torch.exp(1j * z.real), lambda z: jnp.exp(1j * z.real)),
}


@pytest.mark.parametrize("derivatives", ["func", "autograd"])
@pytest.mark.parametrize("case", COMPLEX)
def test_complex_derivatives_follow_jax(lane, case, derivatives):
    f, g = bridge.to_jax(COMPLEX[case][0], lane=lane, derivatives=derivatives), COMPLEX[case][1]
    z, t = jnp.array([1 + 2j, -0.5 + 1j]), jnp.array([0.3 - 1j, 2 + 0.1j])
    close(jax.jit(f)(z), g(z))
    close(jax.jit(lambda z: jax.jvp(f, (z,), (t,))[1])(z), jax.jvp(g, (z,), (t,))[1])
    ct = jnp.ones_like(g(z)) * (1 if case == "to real" else 1 - 2j)
    close(jax.jit(lambda z: jax.vjp(f, z)[1](ct)[0])(z), jax.vjp(g, z)[1](ct)[0])
