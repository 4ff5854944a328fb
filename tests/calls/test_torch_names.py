"""bridge.module: names that torch uses itself, parameters that are replaced or shared, what can't
be a module."""

import copy
from collections import OrderedDict

import jax
import jax.numpy as jnp
import pytest
import torch
from torch.nn.utils import parametrizations, parametrize

import bridge
from tests.calls.test_torch_module import KEY, dense, draw, make

NAMES = ["training", "forward", "type", "weight.x", "", "_parameters", "_call", "_places"]


@pytest.mark.matrix
@pytest.mark.parametrize("nested", [False, True], ids=["leaf", "branch"])
@pytest.mark.parametrize("name", NAMES)
def test_values_x_name_that_modules_use(name, nested):
    wrap = (lambda v: {"x": v}) if nested else (lambda v: v)
    module = bridge.module(
        lambda p, x: x * jax.tree.leaves(p[name])[0] + p["z"],
        {name: wrap(draw(3)), "z": draw(3, seed=1)},
    )
    x, want = torch.ones(3, dtype=torch.float64), bridge.to_torch(draw(3) + draw(3, seed=1))
    for same in (module, module.train(), module.eval(), module.double(), copy.deepcopy(module)):
        torch.testing.assert_close(same(x), want)
    module.load_state_dict({k: 2 * v for k, v in module.state_dict().items()})
    torch.testing.assert_close(module(x), 2 * want)


@pytest.mark.parametrize("a, b", [("a.b", "a_b"), (1, "1")])
def test_values_x_names_that_look_alike(a, b):
    """Both parameters are there, or an error says that they can't be."""
    params = OrderedDict({a: jnp.full(3, 2.0), b: jnp.full(3, 5.0)})
    try:
        module = bridge.module(lambda p, x: x * p[a] / p[b], params)
    except ValueError as e:
        assert str(b) in str(e)
        return
    assert (
        module(torch.ones(3, dtype=torch.float64)).tolist() == [0.4] * 3
        and len(module.state_dict()) == 2
    )


ERRORS = {
    "no arrays": (
        (dense, {"a": 1}),
        r"expected a pytree of arrays as params, got \{'a': 1\}; pass module\(apply, params\)",
    ),
    "no params": (
        (dense,),
        "expected a pytree of arrays as params, got <function dense.*pass module",
    ),
    "prng key": (
        (dense, {"w": jnp.ones(3), "k": KEY}),
        r"got typed PRNG keys key<fry>\[\]; pass jax.random.key_data\(keys\)",
    ),
    "apply": (
        (3, {"w": jnp.ones(3)}),
        r"expected a callable apply\(params, ...\), got 3; pass the model's function first",
    ),
}


@pytest.mark.parametrize("what", ERRORS)
def test_errors_x_construction(what):
    args, text = ERRORS[what]
    with pytest.raises(TypeError, match=text):
        bridge.module(*args)


def test_errors_x_call():
    _, _, module, x = make()
    with pytest.raises(TypeError, match="got a meta tensor, which has no memory"):
        copy.deepcopy(module).to("meta")(x)
    with pytest.raises(TypeError, match="dot_general"):
        module(x.T)
    with pytest.raises(AttributeError, match="w"):
        del module.w
        module(x)


class Double(torch.nn.Module):
    def forward(self, w):
        return 2 * w


def branch(p, x):
    return jnp.tanh(x @ p["a"]["w"])


REPLACED = {
    "setattr": lambda m, w: setattr(m.a, "w", torch.nn.Parameter(w)),
    "data": lambda m, w: setattr(m.a.w, "data", w),
    "submodule": lambda m, w: setattr(m, "a", torch.nn.ParameterDict({"w": w})),
    "parametrize": lambda m, w: (
        m.a.w.data.copy_(w / 2),
        parametrize.register_parametrization(m.a, "w", Double()),
    ),
    "unparametrized": lambda m, w: (
        REPLACED["parametrize"](m, w),
        parametrize.remove_parametrizations(m.a, "w"),
    ),
    "weight_norm": lambda m, w: (m.a.w.data.copy_(w), parametrizations.weight_norm(m.a, "w")),
    "buffer": lambda m, w: (delattr(m.a, "w"), m.a.register_buffer("w", w)),
}


@pytest.mark.parametrize("how", REPLACED)
def test_values_x_replaced_parameter(how):
    module = bridge.module(branch, {"a": {"w": draw(3, 2)}})
    x, w = bridge.to_torch(draw(4, 3, seed=1)), bridge.to_torch(draw(3, 2, seed=2), copy=True)
    module(x)
    REPLACED[how](module, w)
    torch.testing.assert_close(module(x), torch.tanh(x @ w))
    if how != "buffer":
        module(x).sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in module.parameters())


def test_gradients_x_tied_parameters():
    module = bridge.module(
        lambda p, x: (x * p["a"] * p["b"]).sum(), {"a": draw(3), "b": draw(3, seed=1)}
    )
    module.b = module.a
    module(torch.ones(3, dtype=torch.float64)).backward()
    torch.testing.assert_close(module.a.grad, 2 * module.a.detach())
    assert len(list(module.parameters())) == 1


def test_values_x_replica():
    """torch.nn.DataParallel gives each replica other tensors."""
    _, _, module, x = make()
    replica = module._replicate_for_data_parallel()
    for name in ("w", "b"):
        setattr(replica, name, torch.zeros_like(getattr(module, name)))
    assert not replica(x).any() and module(x).any()
