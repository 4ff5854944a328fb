"""bridge.module: a JAX model under all that torch does with modules: values, gradients, memory,
state_dict, conversions, copies."""

import copy
import io
import pickle
from typing import NamedTuple

import equinox as eqx
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import bridge
from tests.cases import close

KEY = jax.random.key(0)
ACT = {"tanh": jnp.tanh, "none": lambda x: x}


def draw(*shape, seed=0, dtype="float64"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def dense(p, x):
    return jnp.tanh(x @ p["w"] + p["b"]) * p["n"]


def scale(p, x):
    return p * x


def chain(p, x):
    for layer in p["layers"]:
        x = ACT[layer["act"]](x @ layer["w"] + layer["b"][: layer["size"]])
    return x * p["scale"]


def layer(n, m, act, seed):
    return {"w": draw(n, m, seed=seed), "b": draw(m, seed=seed + 1), "act": act, "size": m}


def mlp(width=8, act=jax.nn.relu):
    return eqx.nn.MLP(3, 2, width, 2, activation=act, key=KEY)


class Flax(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x):
        return flax.linen.Dense(2)(jnp.tanh(flax.linen.Dense(4)(x)))


class Model(NamedTuple):
    """Arguments of bridge.module, made anew; the module's names; the type of its input."""

    args: callable
    names: str
    shape: tuple = (4, 3)
    dtype: str = "float64"


EQUINOX = " ".join(f"layers.{i}.{n}" for i in range(3) for n in ("bias", "weight"))
MODELS = {
    "dict": Model(
        lambda: (dense, {"w": draw(3, 2), "b": draw(2, seed=1), "n": jnp.int32(3)}), "b n w"
    ),
    "nested": Model(
        lambda: (
            chain,
            {"layers": [layer(3, 5, "tanh", 0), layer(5, 2, "none", 2)], "scale": jnp.float64(2)},
        ),
        "layers.0.b layers.0.w layers.1.b layers.1.w scale",
    ),
    "equinox": Model(lambda: (mlp(),), EQUINOX, (3,)),
    "equinox_apply": Model(lambda: (lambda model, x: jax.vmap(model)(x), mlp()), EQUINOX),
    "equinox_linear": Model(lambda: (eqx.nn.Linear(3, 2, key=KEY),), "bias weight", (3,)),
    "flax": Model(
        lambda: (Flax().apply, Flax().init(KEY, jnp.ones(3))),
        "params.Dense_0.bias params.Dense_0.kernel params.Dense_1.bias params.Dense_1.kernel",
        dtype="float32",
    ),
    "array": Model(lambda: (scale, draw(3)), "param"),
    "bfloat16": Model(lambda: (scale, draw(3, dtype="bfloat16")), "param", dtype="bfloat16"),
    "complex": Model(
        lambda: (lambda p, x: jnp.sin(x @ p["z"]), {"z": draw(3, 2) + 1j * draw(3, 2, seed=1)}), "z"
    ),
}
any_model = pytest.mark.parametrize("name", MODELS)


def make(name="dict"):
    """(apply, its parameters, the module, a tensor for it)."""
    args, _, shape, dtype = MODELS[name]
    args = args()
    apply, params = args if len(args) == 2 else (lambda p, x: p(x), *args)
    return (
        apply,
        params,
        bridge.module(*args),
        bridge.to_torch(draw(*shape, seed=9, dtype=dtype), copy=True),
    )


def loss(module, x):
    return (module(x).abs() ** 2).sum()


def split(params):
    return eqx.partition(params, eqx.is_inexact_array)


@any_model
def test_values_and_names_x_model(name):
    apply, params, module, x = make(name)
    close(
        bridge.to_jax(module(x)),
        apply(params, bridge.to_jax(x)),
        rtol=1e-14 if x.dtype == torch.float64 else None,
    )
    assert sorted(module.state_dict()) == MODELS[name].names.split()
    assert all(type(t) is torch.nn.Parameter for t in module.parameters()) and not any(
        t.is_floating_point() for t in module.buffers()
    )


@any_model
def test_gradients_x_model(name):
    apply, params, module, x = make(name)
    trained, fixed = split(params)
    want = jax.grad(lambda p: (jnp.abs(apply(eqx.combine(p, fixed), bridge.to_jax(x))) ** 2).sum())(
        trained
    )
    loss(module, x).backward()
    got = [
        bridge.to_jax(t.grad).conj()
        for t in jax.tree.leaves(module.pytree())
        if isinstance(t, torch.nn.Parameter)
    ]
    close(got, jax.tree.leaves(want), rtol=1e-12 if x.dtype == torch.float64 else None)
    module.zero_grad()
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize(
    "name", [n for n in MODELS if n != "complex"]
)  # complex is repacked where the test looks at it
def test_memory_x_model(name):
    """XLA reads the module's own tensors; they are none of the user's arrays."""
    apply, params, _, x = make(name)
    read = set()
    look = bridge.to_jax(
        lambda x: read.add(x.data_ptr()) or x.clone(), outputs=lambda x: x, lane="ffi"
    )

    def seen(tree):
        return jax.tree.map(lambda a: look(a) if eqx.is_array(a) else a, tree)

    module = bridge.module(lambda p, x: apply(seen(p), seen(x)), params)
    module.requires_grad_(False)(x)
    assert read == {t.data_ptr() for t in (x, *module.state_dict().values())}
    assert not read & {
        a.unsafe_buffer_pointer() for a in jax.tree.leaves(params) if eqx.is_array(a)
    }


def test_construction_x_copy():
    """Training leaves the user's arrays alone; the module outlives them."""
    _, params, module, x = make()
    before, want = jax.tree.map(np.array, params), module(x)
    torch.optim.SGD(module.parameters(), lr=0.1).step(
        lambda: (v := loss(module, x), v.backward())[0]
    )
    assert all((np.asarray(params[k]) == before[k]).all() for k in params) and not torch.equal(
        module(x), want
    )
    module.load_state_dict({k: torch.as_tensor(v) for k, v in before.items()})
    [a.delete() for a in params.values()]
    torch.testing.assert_close(module(x), want)


def test_state_dict_x_load():
    _, _, module, x = make()
    state = {k: 2 * v for k, v in module.state_dict().items()}
    for assign in (False, True):
        module.load_state_dict(state, assign=assign)
        torch.testing.assert_close(module(x), torch.tanh(x @ state["w"] + state["b"]) * 6)
    for bad, text in (
        ({"w": state["w"]}, r'Missing key\(s\).*"b", "n"'),
        ({**state, "q": x}, r'Unexpected key\(s\).*"q"'),
        ({**state, "w": x}, "size mismatch for w"),
    ):
        with pytest.raises(RuntimeError, match=f"(?s){text}"):
            module.load_state_dict(bad)


CONVERSIONS = {
    "float64": (lambda m: m.to(torch.float64), "float64"),
    "double": (lambda m: m.float().double(), "float64"),
    "float": (lambda m: m.float(), "float32"),
    "half": (lambda m: m.half(), "float16"),
    "bfloat16": (lambda m: m.to(torch.bfloat16), "bfloat16"),
    "cpu": (lambda m: m.to("cpu"), "float64"),
    "to_empty": (
        lambda m: (
            s := copy.deepcopy(m.state_dict()),
            m.to_empty(device="cpu").load_state_dict(s),
            m,
        )[2],
        "float64",
    ),
    "train_eval": (lambda m: m.train().eval().train(), "float64"),
}


@pytest.mark.parametrize("how", CONVERSIONS)
def test_values_x_conversion(how):
    apply, params, module, x = make()
    convert, dtype = CONVERSIONS[how]
    module, params = (
        convert(module),
        {k: v if k == "n" else v.astype(dtype) for k, v in params.items()},
    )
    assert module.n.dtype == torch.int32
    close(
        bridge.to_jax(module(x.to(module.w.dtype))),
        apply(params, bridge.to_jax(x).astype(dtype)),
        rtol=1e-2 if "16" in dtype else 1e-6,
    )


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": lambda m: (
        torch.save(m, f := io.BytesIO()),
        f.seek(0),
        torch.load(f, weights_only=False),
    )[2],
}


PICKLED = ("dict", "nested", "equinox_linear", "flax", "array")


@pytest.mark.matrix
@pytest.mark.parametrize(
    "name, how", [(n, h) for h in COPIES for n in (MODELS if h == "deepcopy" else PICKLED)]
)
def test_values_x_copy(name, how):
    """Equal and independent; a deep copy finds what was compiled."""
    _, _, module, x = make(name)
    loss(module, x).backward()
    other, before, want = COPIES[how](module), module.compilations, module(x)
    loss(other, x).backward()
    assert other.compilations == (before if how == "deepcopy" else 2)
    assert torch.equal(other(x), want) and not {p.data_ptr() for p in other.parameters()} & {
        p.data_ptr() for p in module.parameters()
    }
    with torch.no_grad():
        [p.add_(1) for p in other.parameters()]
    assert torch.equal(module(x), want) and not torch.equal(other(x), want)
