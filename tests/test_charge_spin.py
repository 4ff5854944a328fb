"""A charge or spin that a potential has no use for is an error, unless it is zero; never passed over."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import bridge
from bridge.card import Card, shared_out
from jax_side import potential as jax_side_potential
from jax_side.strain import with_gradients
from tests.adapters import MODELS
from tests.model_cases import inputs
from torch_side.committee import Committee
from torch_side.model import Wrapped

R = jnp.array([[0.0, 0, 0], [1, 0, 0]])
NUMBERS = np.array([1, 1])
PLAIN = Card(batches=True)
ION = Card(optional_inputs={"charge"}, batches=True)


def spring(x):
    energy = x["pos"].new_zeros(len(x["cell"])).index_add(0, x["batch"], (x["pos"] ** 2).sum(-1))
    return energy * (1 + x["charge"]) if "charge" in x else energy


def structure(systems=1):
    n = 2 * systems
    return {
        "pos": torch.arange(3.0 * n, dtype=torch.float64).reshape(n, 3),
        "cell": torch.zeros(systems, 3, 3, dtype=torch.float64),
        "pbc": torch.zeros(systems, 3, dtype=torch.bool),
        "batch": torch.arange(n) // 2,
        "atomic_numbers": torch.ones(n, dtype=torch.int64),
    }


def text(name, value, who=".*", system=0):
    return rf"expected no {name}, or zero, since {who} has no use for one, got {name} {value} in system {system}; leave it out, .*optional_inputs={{'{name}'}}"


@pytest.mark.parametrize("key", ["charge", "spin"])
@pytest.mark.parametrize("name", MODELS)
def test_error_x_adapters(name, key):
    case = MODELS[name]
    model = case.build(case.dtype)
    atoms = next(iter(case.systems.values()))
    given = inputs(atoms, atoms, dtype=case.dtype)
    want = model(given)["energy"]
    zero = torch.zeros(2, dtype=case.dtype)
    torch.testing.assert_close(model(given | {key: zero})["energy"], want)
    own = name == "torchani" and key == "charge"  # it takes a charge, and has an error of its own
    with pytest.raises(ValueError, match="neutral systems" if own else text(key, 2, system=1)):
        model(given | {key: zero + torch.tensor([0, 2])})


WAYS = {
    "bound": lambda model, value: bridge.potential(model, atomic_numbers=NUMBERS, charge=value),
    "bound, by a card": lambda model, value: bridge.potential(spring, atomic_numbers=NUMBERS, charge=value, card=PLAIN, gradients="autograd"),
    "in the call": lambda model, value: bridge.potential(model, atomic_numbers=NUMBERS)(R, charge=value),
    "jit": lambda model, value: jax.block_until_ready(jax.jit(lambda q: bridge.potential(model, atomic_numbers=NUMBERS)(R, charge=q))(value)),
    "jax potential": lambda model, value: jax_side_potential.potential(with_gradients(lambda x: (x["pos"] ** 2).sum()[None]), atomic_numbers=NUMBERS, charge=value, card=PLAIN),
    "torch": lambda model, value: model(structure() | {"charge": torch.tensor(np.array(value))}),
    "jax model in torch": lambda model, value: Wrapped(bridge.torch_potential(lambda x: (x["pos"] ** 2).sum()[None], gradients="autodiff"), PLAIN, "model")(
        structure() | {"charge": torch.tensor(np.array(value))}
    ),
    "committee": lambda model, value: Committee([model, model], vmap=False)(structure() | {"charge": torch.tensor(np.array(value))}),
    "sum": lambda model, value: (model + model)(structure() | {"charge": torch.tensor(np.array(value))}),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_error_x_ways(way):
    model = Wrapped(spring, PLAIN, "autograd")
    WAYS[way](model, jnp.zeros(1))
    with pytest.raises(ValueError, match=text("charge", -1)), bridge.raising():
        WAYS[way](model, jnp.array([-1.0]))


def test_a_model_that_nobody_described_gets_what_is_given():
    """Without a card it may use a charge, and here it does."""
    energy = bridge.potential(spring, atomic_numbers=NUMBERS, charge=jnp.array([2.0]), gradients="autograd")
    assert energy(R) == 3 * bridge.potential(spring, atomic_numbers=NUMBERS, gradients="autograd")(R) == 3
    pure = lambda x: (x["pos"] ** 2).sum()[None] * (1 + x["charge"])  # noqa: E731
    assert jax_side_potential.potential(with_gradients(pure), atomic_numbers=NUMBERS, charge=jnp.array([2.0]))(R) == 3


def test_values_x_sums():
    """The term that uses a charge gets it, the other is not asked to."""
    one, other = Wrapped(spring, ION, "autograd"), Wrapped(lambda x: spring({k: v for k, v in x.items() if k != "charge"}), PLAIN, "autograd")
    given = structure() | {"charge": torch.tensor([2.0], dtype=torch.float64)}
    want = 4 * spring(structure())
    torch.testing.assert_close((one + other)(given)["energy"], want)
    bound = [bridge.potential(m, atomic_numbers=NUMBERS, charge=jnp.array([2.0])) for m in (one, one + other)]
    assert bound[0](R) == 3 and bound[1](R) == 4
    separate = bridge.potential(one, atomic_numbers=NUMBERS) + bridge.potential(other, atomic_numbers=NUMBERS)
    assert separate(R, charge=jnp.array([2.0])) == 4


def test_what_each_term_is_given():
    given = {"pos": 1, "charge": 2, "spin": 3}
    both = Card(optional_inputs={"charge", "spin"})
    assert shared_out(given, [ION, PLAIN]) == [{"pos": 1, "charge": 2, "spin": 3}, {"pos": 1, "spin": 3}]
    assert shared_out(given, [both, PLAIN]) == [given, {"pos": 1}]
    assert shared_out(given, [PLAIN, PLAIN]) == [given, given]
