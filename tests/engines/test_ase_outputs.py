"""ASE calculators of both banks: every output that is asked for reaches the results, under ASE's
name where it has one."""

import ase.db
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from ase import Atoms, io
from ase.calculators.calculator import PropertyNotImplementedError, all_properties
from ase.calculators.singlepoint import SinglePointCalculator

from bridge.card import Card
from jax_side.engines import ase as in_jax
from tests.graph_cases import CELL, NUMBERS, POS
from torch_side.engines import ase as in_torch
from torch_side.potentials.committee import Committee
from torch_side.potentials.model import Wrapped

N, F, M = len(NUMBERS), 2, 3
SHAPES = {  # of the results: the contract's without the axis of systems
    "hessian": (N, 3, N, 3),
    "embeddings": (N, F),
    "energy_std": (),
    "position_gradients_std": (N, 3),
    "member_energies": (M,),
    "member_position_gradients": (M, N, 3),
    "node_energies": (N,),
    "charges": (N,),
    "magmoms": (N,),
    "dipole": (3,),
}
ASE_NAMES = {"node_energies": "energies"}
CARD = Card(
    outputs={"energy", "position_gradients", "cell_gradients", *SHAPES},
    sizes=(("F", F), ("M", M)),
    batches=True,
)


def outputs(xp, dtype):
    """Made-up numbers of each output in the contract's shapes, one system."""
    sizes = {"energy_std": (1,), "member_energies": (M, 1), "dipole": (1, 3)}
    shapes = {name: sizes.get(name, shape) for name, shape in SHAPES.items()}
    return {
        name: xp.arange(1.0, 1 + int(np.prod(s)), dtype=dtype).reshape(s)
        for name, s in shapes.items()
    }


def torch_model(x):
    energy = (x["pos"] ** 2).sum().reshape(1)
    gradients = {"position_gradients": 2 * x["pos"], "cell_gradients": 0 * x["cell"]}
    return {"energy": energy, **gradients, **outputs(torch, x["pos"].dtype)}


def jax_model(x):
    energy = (x["pos"] ** 2).sum()[None]
    gradients = {"position_gradients": 2 * x["pos"], "cell_gradients": 0 * x["cell"]}
    return {"energy": energy, **gradients, **outputs(jnp, x["pos"].dtype)}


BANKS = {
    "torch": lambda *asked, dtype=None: in_torch.calculator(
        Wrapped(torch_model, CARD, "model"), outputs=asked, dtype=dtype
    ),
    "jax": lambda *asked, dtype=None: in_jax.calculator(
        jax_model, outputs=asked, card=CARD, dtype=dtype
    ),
}
banks = pytest.mark.parametrize("bank", BANKS)


def crystal():
    return Atoms(NUMBERS, POS, cell=CELL, pbc=True)


@banks
@pytest.mark.parametrize("name", SHAPES)
def test_results_x_outputs(name, bank):
    atoms = crystal()
    atoms.calc = BANKS[bank](name)
    atoms.get_potential_energy()
    shown = ASE_NAMES.get(name, name)
    got = atoms.calc.results[shown]
    want = np.arange(1.0, 1 + int(np.prod(SHAPES[name]))).reshape(SHAPES[name])
    np.testing.assert_array_equal(got, want)
    assert np.asarray(got).dtype == np.float64 and shown in atoms.calc.implemented_properties
    np.testing.assert_array_equal(atoms.calc.get_property(shown, atoms), want)


@banks
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_results_x_dtypes(bank, dtype):
    atoms = crystal()
    atoms.calc = BANKS[bank](*SHAPES, dtype=dtype)
    atoms.get_forces()
    assert {np.asarray(x).dtype for x in atoms.calc.results.values()} == {np.dtype("float64")}


@banks
def test_what_is_not_asked_for_is_not_there(bank):
    atoms = crystal()
    atoms.calc = BANKS[bank]("energy_std")
    atoms.get_potential_energy()
    # ASE's own, which the model gives in any case
    named = {
        "energies",
        "charges",
        "magmoms",
        "dipole",
    }
    assert set(atoms.calc.results) - named == {
        "energy",
        "free_energy",
        "forces",
        "stress",
        "energy_std",
    }
    with pytest.raises(PropertyNotImplementedError):
        atoms.calc.get_property("hessian", atoms)


@banks
def test_ases_own_x_outputs_without_a_name_in_ase(bank):
    """What ASE exports are properties that it knows; the results keep all."""
    atoms = crystal()
    atoms.calc = BANKS[bank](*SHAPES)
    found = atoms.get_properties(["energy", "forces"])
    named = {
        "energy",
        "free_energy",
        "forces",
        "stress",
        "energies",
        "charges",
        "magmoms",
        "dipole",
    }
    assert set(found) - {"natoms"} == named and set(atoms.calc.export_properties()) == set(found)
    assert set(atoms.calc.results) == named | {
        name for name in SHAPES if name not in ("node_energies",)
    }
    frozen = SinglePointCalculator(
        atoms, **{name: x for name, x in atoms.calc.results.items() if name in all_properties}
    )
    assert frozen.get_property("energy", atoms) == atoms.get_potential_energy()


@banks
def test_files_x_outputs_without_a_name_in_ase(bank, tmp_path):
    """Databases and extended xyz keep what ASE knows."""
    atoms = crystal()
    atoms.calc = BANKS[bank](*SHAPES)
    energy = atoms.get_potential_energy()
    io.write(tmp_path / "crystal.xyz", atoms, format="extxyz")
    assert io.read(tmp_path / "crystal.xyz").get_potential_energy() == pytest.approx(energy)
    with ase.db.connect(tmp_path / "crystals.db") as database:
        database.write(atoms)
    assert next(database.select()).energy == energy
    io.write(tmp_path / "crystal.traj", atoms)
    assert io.read(tmp_path / "crystal.traj").get_potential_energy() == energy


def test_a_committees_spread():
    """Real ones: the standard deviation, and each member's."""

    def member(k):
        gradients = {
            "position_gradients": lambda x: 2 * k * x["pos"],
            "cell_gradients": lambda x: 0 * x["cell"],
        }
        model = lambda x: (
            {"energy": k * (x["pos"] ** 2).sum().reshape(1)}
            | {n: g(x) for n, g in gradients.items()}
        )
        return Wrapped(model, Card(batches=True), "model")

    atoms, ks = crystal(), np.array([1.0, 2.0, 4.0])
    atoms.calc = in_torch.calculator(
        Committee([member(k) for k in ks], vmap=False),
        outputs=("member_energies", "member_position_gradients"),
    )
    total = (atoms.positions**2).sum()
    assert atoms.get_potential_energy() == pytest.approx(ks.mean() * total)
    results = atoms.calc.results
    assert results["energy_std"] == pytest.approx(ks.std() * total)
    np.testing.assert_allclose(
        results["position_gradients_std"], 2 * ks.std() * abs(atoms.positions)
    )
    np.testing.assert_allclose(results["member_energies"], ks * total)
    np.testing.assert_allclose(
        results["member_position_gradients"], 2 * ks[:, None, None] * atoms.positions
    )
    np.testing.assert_allclose(atoms.get_forces(), -2 * ks.mean() * atoms.positions)
