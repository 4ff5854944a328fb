"""JAX callables of every kind in torch: what is refused, exceptions, equality, compilations."""

import functools

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

import bridge
from tests.torch_cases import close

X = torch.arange(1.0, 5.0, dtype=torch.float64)
LEAF = lambda: X.clone().requires_grad_()

# What is refused.

REFUSED = {  # argument, type of the error, its text
    "numpy": (lambda: np.ones(3), TypeError, "expected torch tensors, or hashable"),
    "jax_array": (lambda: jnp.ones(3), TypeError, "expected torch tensors, or hashable"),
    "unhashable": (lambda: {1}, TypeError, "expected torch tensors, or hashable"),
    "bytearray": (lambda: bytearray(1), TypeError, "expected torch tensors, or hashable"),
    "complex32": (
        lambda: torch.ones(3).to(torch.complex32),
        TypeError,
        "expected a dtype that both sides know",
    ),
    "sparse": (
        lambda: torch.eye(3).to_sparse(),
        TypeError,
        "Sparse layout|layout torch.sparse_coo",
    ),
    "sparse_csr": (
        lambda: torch.eye(3).to_sparse_csr(),
        TypeError,
        "SparseCsr layout|layout torch.sparse_csr",
    ),
    "meta": (lambda: torch.ones(3, device="meta"), TypeError, "meta tensor"),
    "nested": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        TypeError,
        "nested tensor",
    ),
    "nested_strided": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        TypeError,
        "nested tensor",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_error_x_argument(name, nested):
    make, error, text = REFUSED[name]
    f = bridge.to_torch(lambda x: jax.tree.leaves(x)[0] + 1)
    for _ in range(2):
        with pytest.raises(error, match=text):
            f({"a": make()} if nested else make())


class Odd(Exception):
    def __init__(self, text, code):
        super().__init__(text)
        self.code = code


@jax.custom_vjp
def late(x):
    return x


late.defvjp(lambda x: (x, None), lambda _, ct: odd(ct))


def odd(x):
    raise Odd("as it is", x.shape)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_error_x_exception_of_the_callable(where):
    """Its type and attributes, at each call; what is right works before and after."""
    f = bridge.to_torch(
        lambda x: (odd if where == "forward" else late)(x) if x.shape[0] > 2 else x * 2
    )
    for size in (2, 4, 4, 2):
        x = torch.ones(size, requires_grad=True)
        if size == 2:
            close(torch.autograd.grad(f(x).sum(), x), (torch.full((2,), 2.0),))
            continue
        with pytest.raises(Odd, match="as it is") as caught:
            f(x).sum().backward()
        assert caught.value.code == (4,)


@pytest.mark.parametrize("compiled", [False, True])
def test_error_x_wide_dtypes_while_x64_is_off(compiled):
    f, x = bridge.to_torch(lambda x: x * 2), LEAF()
    if compiled:
        f(x)
    with jax.enable_x64(False):
        for call in (
            lambda: f(x),
            lambda: f(x.detach()),
            lambda: torch.func.jvp(f, (X,), (X,)),
            lambda: f(torch.arange(3)),
        ):
            with pytest.raises(ValueError, match="at most 32-bit parts while x64 is off"):
                call()
        close(f(X.float()), 2 * X.float())
    close(f(x).detach(), 2 * X)


def test_error_x_result_that_is_no_array():
    with pytest.raises(TypeError, match="not a valid JAX type"):
        bridge.to_torch(lambda x: "text")(X)


# Callables and compilations.


class Scale(equinox.Module):
    by: jax.Array
    name: str = equinox.field(static=True, default="scale")

    def __call__(self, x):
        return x * self.by

    def method(self, x):
        return x * self.by


CALLABLES = {
    "jit": jax.jit(lambda x: x * 2),
    "jit_static": functools.partial(jax.jit(lambda n, x: x * n, static_argnums=0), 2),
    "partial": functools.partial(lambda by, x: x * by, 2),
    "bound_method": Scale(jnp.asarray(2.0)).method,
    "equinox": Scale(jnp.asarray(2.0)),
    "ufunc": functools.partial(jnp.multiply, 2),
    "checkpoint": jax.checkpoint(lambda x: x * 2),
    "custom_jvp": jax.custom_jvp(lambda x: x * 2),
    "vmap": jax.vmap(lambda x: x * 2),
    "bridged": bridge.to_jax(lambda x: x * 2),
}
CALLABLES["custom_jvp"].defjvp(lambda x, t: (2 * x[0], 2 * t[0]))


@pytest.mark.parametrize("name", CALLABLES)
def test_callable_x_value_and_gradient(name):
    f, x = bridge.to_torch(CALLABLES[name]), LEAF()
    y = f(x)
    close((y.detach(), *torch.autograd.grad(y.sum(), x)), (2 * X, 0 * X + 2))
    assert isinstance(repr(f), str) and isinstance(f.__name__, str)


def test_equality_x_callable():
    f, g = lambda x: x, lambda x: x
    a, b, c = bridge.to_torch(f), bridge.to_torch(f), bridge.to_torch(g)
    assert a == b and hash(a) == hash(b) and a != c and len({a, b, c}) == 2
    assert bridge.to_torch(Scale(jnp.ones(4)).method) != a


def test_names_x_callable():
    """As messages and tracers call it."""
    named, nameless = bridge.to_torch(jnp.sin), bridge.to_torch(functools.partial(jnp.sin))
    assert named.__name__ == "sin" and repr(named) == "bridge.to_torch(sin)"
    assert nameless.__name__ == "partial"


def test_value_x_structures_of_the_same_types():
    """Positional tensors are looked up by their types alone; other calls with the same types are
    other calls."""

    def f(x, y=None):
        if isinstance(x, tuple):
            return x[0] - x[1]
        return {"sum": x["a"] + 3 * x["b"]} if isinstance(x, dict) else x + y

    f, a, b = bridge.to_torch(f), X.clone(), 10 * X
    for _ in range(2):
        close(f((a, b)), a - b)
        close(f({"a": a, "b": b})["sum"], a + 3 * b)
        close(f(a, b), a + b)
        close(f(a, y=b), a + b)


@pytest.mark.parametrize("scalar", [True, False])
def test_compilations_x_calls(scalar):
    """One program for values, two for a gradient, whatever the values and as often as they are
    called; more for other types."""
    f = bridge.to_torch(lambda x, y: (x * y).sum() if scalar else x * y)
    steps = [
        (1, lambda x: f(x, X)),
        (3, lambda x: f(x.requires_grad_(), X).sum().backward()),
        (3, lambda x: f(x.requires_grad_()[None, :, None].flatten(), X).sum().backward()),
        (3, lambda x: torch.no_grad()(f)(x, X)),
        (4, lambda x: f(x[:2], X[:2])),
        (5, lambda x: f(x.float(), X)),
    ]
    for want, step in steps:
        for k in range(3):
            step(X * k)
            assert f.compilations == want
    assert bridge.to_torch(f.__wrapped__).compilations == 0


def fake(f, x):
    with FakeTensorMode() as mode:
        return f(mode.from_tensor(x))


TWIN = lambda dtype: lambda x: torch.stack([x.to(dtype) * 2, x.to(dtype)])
SWITCHED = {
    "call": lambda f, x: f(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,))[1],
    "hessian": lambda f, x: torch.func.hessian(lambda x: (f(x) ** 2).sum())(x),
    "fake": lambda f, x: torch.zeros((), dtype=fake(f, x).dtype),
}


@pytest.mark.parametrize("order", [(False, True), (True, False)], ids=["off_on", "on_off"])
@pytest.mark.parametrize("way", SWITCHED)
def test_value_x_x64_switched(way, order):
    """What a function gives may depend on x64: types found under one setting are not believed under
    the other."""
    f, x = bridge.to_torch(lambda x: jnp.stack([x.astype(float) * 2, x.astype(float)])), X.float()
    for wide in order:
        with jax.enable_x64(wide):
            close(
                SWITCHED[way](f, x),
                SWITCHED[way](TWIN(torch.float64 if wide else torch.float32), x),
                rtol=1e-6,
                atol=1e-6,
            )


def test_value_x_x64_switched_after_compilation():
    """A compiled graph has memory for what it was told (with inductor: reads beyond it): it goes on
    as it was compiled."""
    f, x = bridge.to_torch(lambda x: x.astype(float)), X.float()
    g = torch.compile(lambda x: f(x) + 1, fullgraph=True, backend="aot_eager")
    with jax.enable_x64(False):
        close(g(x), x + 1)
    close(g(x), x + 1)


def test_backward_x_x64_switched_after_the_forward():
    """It runs under the setting of its forward."""
    f = bridge.to_torch(lambda x: jnp.sin(x).sum())
    x = X.double().requires_grad_()
    y = f(x)
    with jax.enable_x64(False):
        y.backward()
    close(x.grad, torch.cos(x.detach()))


def test_compiler_options_of_a_jitted_function_are_those_of_its_programs():
    """JAX takes them at the top alone, and here each function is called within another one."""
    plain = {"xla_cpu_enable_fast_math": False}
    f = bridge.to_torch(
        jax.jit(lambda x, n: (x**n).sum(), static_argnums=1, compiler_options=plain)
    )
    x = torch.arange(4.0, dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        (g,) = torch.autograd.grad(f(x, 3), x)
        assert g.tolist() == [0, 3, 12, 27] and f.compilations == 2
    hessian = torch.func.hessian(lambda x: f(x, 3))(x.detach())
    assert hessian.diagonal().tolist() == [0, 6, 12, 18]
    unknown = bridge.to_torch(jax.jit(jnp.sin, compiler_options={"xla_nothing": ""}))
    with pytest.raises(Exception, match="No such compile option: 'xla_nothing'"):
        unknown(x)
