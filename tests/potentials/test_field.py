"""The field of the contract: given to models that use it, system by system; refused, unless it is
zero, by those that don't."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from ase import Atoms

import bridge
from bridge.card import Card, shared_out
from bridge.join.calculators import calculator
from jax_side.engines import ase as in_jax
from jax_side.potentials.direct import direct
from jax_side.potentials.potential import potential
from jax_side.potentials.strain import with_gradients
from tests.potentials.test_charge_spin import R, carded, springs, structure, text
from torch_side.engines import ase as in_torch
from torch_side.potentials.model import Wrapped

NUMBERS = np.array([1, 1])
USES = Card(optional_inputs={"field"}, batches=True)
PLAIN = Card(batches=True)
FIELD = jnp.array([[0.0, 0.5, -2.0]])


def polar(x):
    """Springs, and a charge of 1 e on each atom."""
    energy = x["pos"].new_zeros(len(x["cell"])).index_add(0, x["batch"], (x["pos"] ** 2).sum(-1))
    if "field" not in x:
        return energy
    work = (x["pos"] * x["field"][x["batch"]]).sum(-1)
    return energy - torch.zeros_like(energy).index_add(0, x["batch"], work)


def shown(system=0):
    return text("field", r"\(0, 0.5, -2\)", system=system)


@pytest.mark.parametrize("lane", ["ffi", "host", "native"])
def test_values_x_vmap(lane):
    """Each system has its own field, and a batch is one call."""
    model = Wrapped(polar, USES, "autograd")
    energy = bridge.potential(model, atomic_numbers=NUMBERS, lane=lane)
    fields = jnp.stack([FIELD, 2 * FIELD, 0 * FIELD])
    found = jax.jit(jax.vmap(lambda f: jax.value_and_grad(energy)(R, field=f)))(fields)
    np.testing.assert_allclose(found[0], (R**2).sum() - fields[:, 0] @ R.sum(0))
    np.testing.assert_allclose(found[1], 2 * R - fields)


WAYS = {
    "bound": lambda model, f: bridge.potential(model, atomic_numbers=NUMBERS, field=f),
    "in the call": lambda model, f: bridge.potential(model, atomic_numbers=NUMBERS)(R, field=f),
    "jit": lambda model, f: jax.block_until_ready(
        jax.jit(lambda f: bridge.potential(model, atomic_numbers=NUMBERS)(R, field=f))(f)
    ),
    "jax": lambda model, f: potential(carded(springs, PLAIN), atomic_numbers=NUMBERS, field=f),
    "torch": lambda model, f: model(structure() | {"field": torch.tensor(np.array(f))}),
    "native": lambda model, f: bridge.potential(model, atomic_numbers=NUMBERS, lane="native")(
        R, field=f
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_error_x_ways(way):
    model = Wrapped(polar, PLAIN, "autograd")
    WAYS[way](model, 0 * FIELD)
    with pytest.raises(Exception, match=shown()):
        WAYS[way](model, FIELD)


def test_error_names_the_system():
    model, x = Wrapped(polar, PLAIN, "autograd"), structure(2)
    given = x | {"field": torch.tensor(np.concatenate([0 * FIELD, FIELD]))}
    with pytest.raises(ValueError, match=shown(1)):
        model(given)


def test_traced_x_nan():
    energy = potential(carded(springs, PLAIN), atomic_numbers=NUMBERS)
    of = jax.jit(jax.value_and_grad(lambda r, f: energy(r, field=f)))
    value, g = of(R, FIELD)
    assert np.isnan(value) and np.isnan(g).all()
    assert np.isfinite(of(R, 0 * FIELD)[0])


def test_sums():
    """The field goes to the term that uses it."""
    uses = with_gradients(lambda x: springs(x) - (x["pos"] @ x["field"][0]).sum()[None])

    def charged(x):
        return uses(x)

    charged.card = USES
    both = direct(carded(springs, PLAIN)) + direct(charged)
    inputs = {k: jnp.asarray(v.numpy()) for k, v in structure().items()} | {"field": FIELD}
    wanted = 2 * (inputs["pos"] ** 2).sum() - (inputs["pos"] @ FIELD[0]).sum()
    np.testing.assert_allclose(both(inputs).total_energies[0], wanted)
    assert ["field" in x for x in shared_out({"field": 1}, [PLAIN, USES])] == [False, True]


def test_shape():
    energy = bridge.potential(Wrapped(polar, USES, "autograd"), atomic_numbers=NUMBERS)
    with pytest.raises(ValueError, match=r"field as float\[1,3\].*field\[None\]"):
        energy(R, field=FIELD[0])


def polar_jax(x):
    return springs(x) - (x["pos"] @ x["field"][0]).sum()[None] if "field" in x else springs(x)


USED = {  # as calculators of ASE; nobody has said what the last three take
    "torch": lambda: in_torch.calculator(Wrapped(polar, USES, "autograd")),
    "jax": lambda: in_jax.calculator(carded(polar_jax, USES)),
    "bound": lambda: in_jax.calculator(
        bridge.potential(Wrapped(polar, USES, "autograd"), atomic_numbers=NUMBERS)
    ),
    "jax, no card": lambda: in_jax.calculator(with_gradients(polar_jax)),
    "torch, no card": lambda: calculator(polar, kind="torch", gradients="autograd"),
    "float32": lambda: calculator(polar, kind="torch", gradients="autograd", dtype="float32"),
}
PASSED_OVER = {
    "torch": lambda: in_torch.calculator(Wrapped(polar, PLAIN, "autograd")),
    "jax": lambda: in_jax.calculator(carded(springs, PLAIN)),
    "bound": lambda: in_jax.calculator(
        bridge.potential(Wrapped(polar, PLAIN, "autograd"), atomic_numbers=NUMBERS)
    ),
}


@pytest.mark.parametrize("name", USED)
def test_info_x_calculators(name):
    """ASE: atoms.info["field"], as an array, a list or a tuple; each change is seen."""
    atoms, r = Atoms("H2", np.asarray(R), info={"field": FIELD[0]}), np.asarray(R)
    atoms.calc = USED[name]()
    for field in (np.asarray(FIELD[0]), [0.0, 0.5, 2], (0, 0, 0)):
        atoms.info["field"] = field
        wanted = (r**2).sum() - (r @ np.asarray(field)).sum()
        np.testing.assert_allclose(atoms.get_potential_energy(), wanted, rtol=1e-6)
        np.testing.assert_allclose(atoms.get_forces(), -2 * r + field, rtol=1e-6)
    del atoms.info["field"]
    np.testing.assert_allclose(atoms.get_forces(), -2 * r)


NO_FIELDS = [1.0, "0 0 1", [0.0, 1], FIELD, np.ones((3, 1)), [0, 0, np.nan], [0, 0, np.inf], None]


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_info_that_is_no_field(name):
    atoms = Atoms("H2", np.asarray(R))
    atoms.calc = USED[name]()
    for bad in NO_FIELDS:
        atoms.info["field"] = bad
        text = r"expected three finite numbers as atoms.info\['field'\], got .*; set V/Angstrom"
        with pytest.raises(ValueError, match=text):
            atoms.get_forces()


@pytest.mark.parametrize("name", PASSED_OVER)
def test_info_x_models_without_a_field(name):
    """A field is refused, also once there are results; somebody's note of that name is not."""
    atoms = Atoms("H2", np.asarray(R))
    atoms.calc = PASSED_OVER[name]()
    for note in ("a meadow", [0, 0, 0], 7):
        atoms.info["field"] = note
        assert atoms.get_potential_energy() == 1
    atoms.info["field"] = [0.0, 0.5, -2]
    with pytest.raises(ValueError, match=shown()):
        atoms.get_potential_energy()


def test_a_field_that_is_needed():
    atoms = Atoms("H2", np.asarray(R))
    atoms.calc = in_torch.calculator(Wrapped(polar, Card(required_inputs={"field"}), "autograd"))
    text = r"expected atoms.info\['field'\], which .* needs, got none; set it \(homogeneous"
    with pytest.raises(ValueError, match=text):
        atoms.get_potential_energy()
