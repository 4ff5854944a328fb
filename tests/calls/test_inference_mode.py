"""torch.inference_mode around calls, in both directions; changes in place that are seen before
anything runs; dtypes of one side."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import bridge
from torch_side.potentials.model import Model
from torch_side.potentials.strain import with_gradients

X = jnp.linspace(0.3, 2.3, 3)
net = (
    torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    .eval()
    .double()
    .requires_grad_(False)
)
ENGINES = {"func": {}, "autograd": {"derivatives": "autograd", "batched": "sequential"}}
WAYS = {
    "call": lambda f: f,
    "grad": lambda f: jax.grad(f),
    "hessian": lambda f: jax.hessian(f),
    "jvp": lambda f: lambda x: jax.jvp(f, (x,), (x,))[1],
    "vmap of grad": lambda f: lambda x: jax.vmap(jax.grad(f))(jnp.stack([x, 2 * x])),
}


@pytest.mark.parametrize("run", ["eager", "ffi", "host"])
@pytest.mark.parametrize("derivatives", ENGINES)
@pytest.mark.parametrize("way", WAYS)
def test_values_x_inference_mode_around(way, derivatives, run):
    """Around all of it: shapes found, traced, compiled, run."""
    model = lambda x: net(x).sum()
    options = ENGINES[derivatives] | {"lane": "auto" if run == "eager" else run}

    def value():
        f = WAYS[way](bridge.to_jax(model, **options))
        return jax.block_until_ready((f if run == "eager" else jax.jit(f))(X))

    want = value()
    with torch.inference_mode():
        np.testing.assert_array_equal(value(), want)


@pytest.mark.parametrize("run", ["eager", "ffi", "host"])
def test_guards_x_inference_mode(run):
    lane = "auto" if run == "eager" else run
    declared = lambda x: x
    kept = []
    wrong = {
        r"argument 0 changed in place": bridge.to_jax(
            lambda x: x.mul_(2), outputs=declared, lane=lane
        ),
        r"argument 0 still referenced": bridge.to_jax(
            lambda x: (kept.append(x[:1]), x + 1)[1], outputs=declared, lane=lane
        ),
    }
    for text, f in wrong.items():
        with pytest.raises(ValueError, match=text), torch.inference_mode(), bridge.raising():
            jax.block_until_ready((f if run == "eager" else jax.jit(f))(jnp.array(X)))
        kept.clear()


def test_potentials_x_inference_mode():
    spring = lambda x: (
        x["pos"].new_zeros(len(x["cell"])).index_add(0, x["batch"], (x["pos"] ** 3).sum(-1))
    )
    energy = bridge.potential(spring, atomic_numbers=np.array([1, 1]), gradients="autograd")
    r = jnp.arange(6.0).reshape(2, 3)
    with torch.inference_mode():
        np.testing.assert_allclose(jax.jit(jax.grad(energy))(r), 3 * r**2)
        np.testing.assert_allclose(jax.hessian(energy)(r).reshape(6, 6).diagonal(), 6 * r.flatten())
        apply, params = bridge.functional(net)
        np.testing.assert_allclose(
            jax.jit(apply)(params, X), net(torch.from_numpy(np.array(X))).numpy()
        )


def test_jax_models_x_inference_mode():
    f = bridge.to_torch(lambda x: (x**2).sum())
    module = bridge.module(lambda p, x: p["w"] * x.sum(), {"w": jnp.array(2.0)})
    with torch.inference_mode():
        x = torch.arange(3.0, dtype=torch.float64)
        assert f(x) == 5 and module(x) == 6
        assert bridge.to_jax(x).tolist() == [0, 1, 2]
    assert f(x) == 5 and f(x).is_inference() is False


# Changes in place, where shapes are found with fake tensors.

CHANGED = {
    "itself": lambda x: x.mul_(2).sum(),
    "a view": lambda x: x[1:].zero_().sum() + x.sum(),
    "out=": lambda x: torch.sin(x, out=x).sum(),
    "copy_": lambda x: x.copy_(torch.ones_like(x)).sum(),
    "index": lambda x: x.__setitem__(0, 1.0) or x.sum(),
}


@pytest.mark.parametrize("run", ["eager", "ffi", "host"])
@pytest.mark.parametrize("name", CHANGED)
def test_array_intact_x_changes_in_place(name, run):
    x = jnp.linspace(0.3, 2.3, 3)
    before = np.array(x)
    f = bridge.to_jax(CHANGED[name], lane="auto" if run == "eager" else run)
    with pytest.raises(
        ValueError,
        match=r"to leave its inputs as they are, got input argument 0 changed in place, .*; use out-of-place operations, or clone the input first",
    ):
        (f if run == "eager" else jax.jit(f))(x)
    assert np.array_equal(x, before)


def test_weights_intact_x_changes_in_place():
    class Counting(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))

        def forward(self, x):
            self.w.mul_(2)
            return (self.w * x).sum()

    apply, params = bridge.functional(Counting())
    with pytest.raises(ValueError, match=r"input argument 0\['w'\] changed in place"):
        apply(params, X)
    assert params["w"].tolist() == [1, 1, 1]


def test_what_is_no_change():
    fine = bridge.to_jax(lambda x: x.clone().mul_(2).sum() + x.detach().clone().zero_().sum())
    assert fine(X) == 2 * X.sum()


# Dtypes that only one side knows.

ONLY_JAX = ["int2", "uint2", "int4", "uint4", "float4_e2m1fn", "float8_e3m4"]
TEXT = r"expected a dtype that both sides know, got {} as {}, which only JAX knows; cast it to one of bool, int8"


@pytest.mark.parametrize("run", ["eager", "ffi", "host"])
@pytest.mark.parametrize("dtype", ONLY_JAX)
def test_error_x_dtypes_of_jax(dtype, run):
    lane = "auto" if run == "eager" else run
    maybe = (lambda f: f) if run == "eager" else jax.jit
    narrow = X.astype(dtype)
    with pytest.raises(TypeError, match=TEXT.format(rf"{dtype}\[3\]", r"argument 0\['x'\]")):
        maybe(bridge.to_jax(lambda d: d["x"].sum(), lane=lane))({"x": narrow})
    with pytest.raises(TypeError, match=TEXT.format(rf"{dtype}\[2\]", "output 0")):
        maybe(bridge.to_jax(lambda x: x, outputs=jax.ShapeDtypeStruct((2,), dtype), lane=lane))(X)


@pytest.mark.parametrize("dtype", ["complex32", "bits8", "uint4", "quint8"])
def test_error_x_dtypes_of_torch(dtype):
    wanted = getattr(torch, dtype)
    make = (
        (lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, wanted))
        if dtype == "quint8"
        else lambda x: torch.empty(3, dtype=wanted)
    )
    with pytest.raises(
        TypeError,
        match=rf"expected output 0 of .* in a dtype that both sides know, got torch.{dtype}, which only torch knows; cast it",
    ):
        bridge.to_jax(make)(X)


def test_functionalize_is_refused_in_words():
    f = bridge.to_torch(lambda x: x**2)
    with pytest.raises(
        NotImplementedError, match="got torch.func.functionalize; call it outside of functionalize"
    ):
        torch.func.functionalize(f)(torch.ones(3))


class Cubic(Model):
    card = bridge.Card(batches=True)

    def energies(self, inputs):
        each = (inputs["pos"] ** 3).sum(-1) + inputs["cell"].sum()
        return {
            "energy": inputs["pos"]
            .new_zeros(len(inputs["cell"]))
            .index_add(0, inputs["batch"], each)
        }


def structure():
    pos, cell = (
        torch.arange(6.0, dtype=torch.float64).reshape(2, 3),
        torch.eye(3, dtype=torch.float64)[None],
    )
    return {
        "pos": pos,
        "cell": cell,
        "pbc": torch.ones(1, 3, dtype=torch.bool),
        "batch": torch.zeros(2, dtype=torch.int64),
        "atomic_numbers": torch.tensor([1, 1]),
    }


@pytest.mark.parametrize("made", ["inside", "outside"])
@pytest.mark.parametrize(
    "model", [Cubic(), with_gradients(Cubic().energies)], ids=["Model", "with_gradients"]
)
def test_gradients_x_inference_mode_around_torch(model, made):
    """Not the zeros of what inference mode has not recorded; tensors made in it are welcome."""
    x = structure()
    want = model(x)
    with torch.inference_mode():
        got = model(structure() if made == "inside" else x)
    for name in ("energy", "position_gradients", "cell_gradients"):
        assert want[name].any() and not got[name].requires_grad
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=0)
