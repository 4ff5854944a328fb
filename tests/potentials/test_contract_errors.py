"""What a potential returns outside of the contract: errors speak of the contract, whichever
framework it is written in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from ase import Atoms

import bridge
from jax_side.engines.ase import calculator
from jax_side.potentials.direct import direct
from jax_side.potentials.outputs import Outputs
from jax_side.potentials.potential import potential as jax_energy
from jax_side.potentials.strain import with_gradients as jax_with_gradients
from torch_side.potentials.strain import with_gradients as torch_with_gradients

R = jnp.array([[0.0, 0, 0], [1, 0, 0]], "float32")
NUMBERS = np.array([1, 1])
ONE_EACH = r"return one energy for each system, \(B,\): add up the energies of its atoms by batch .*index_add.*segment_sum.*energy.reshape\(1\)"

# Of x: what is wrong with the energies, in torch and in JAX alike.
ENERGIES = {
    "no axis": (lambda x: (x["pos"] ** 2).sum(), ValueError, rf"expected energy as float\[1\], got float32\[\]; {ONE_EACH}"),
    "no axis, in a dict": (lambda x: {"energy": (x["pos"] ** 2).sum()}, ValueError, rf"expected energy as float\[1\], got float32\[\]; {ONE_EACH}"),
    "one for each atom": (lambda x: (x["pos"] ** 2).sum(-1), ValueError, rf"expected energy as float\[1\], got float32\[2\]; {ONE_EACH}"),
    "two axes": (lambda x: (x["pos"] ** 2).sum().reshape(1, 1), ValueError, rf"expected energy as float\[1\], got float32\[1,1\]; {ONE_EACH}"),
    "another name": (lambda x: {"energies": (x["pos"] ** 2).sum()}, ValueError, "expected the outputs energy, got only energies; let the model return energy"),
    "nothing": (lambda x: {}, ValueError, "expected the outputs energy, got only nothing"),
    "None": (lambda x: None, TypeError, r"expected the energy as an array \(B,\), got NoneType; return energies \(B,\) in eV"),
    "a tuple": (lambda x: ((x["pos"] ** 2).sum(), x["pos"]), TypeError, r"expected the energy as an array \(B,\), got tuple; return energies"),
    "a number": (lambda x: 3.0, TypeError, r"expected the energy as an array \(B,\), got float; return energies"),
}  # fmt: skip


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", ENERGIES)
def test_energies_x_torch(name, jit):
    model, kind, text = ENERGIES[name]
    energy = bridge.potential(model, atomic_numbers=NUMBERS, gradients="autograd")
    with pytest.raises(kind, match=text), bridge.raising():
        jax.block_until_ready((jax.jit(energy) if jit else energy)(R))


@pytest.mark.parametrize("name", ENERGIES)
def test_energies_x_jax(name):
    model, kind, text = ENERGIES[name]
    with pytest.raises(kind, match=text):
        jax_energy(jax_with_gradients(model), atomic_numbers=NUMBERS)(R)
    inputs = {
        "pos": torch.zeros(2, 3), "cell": torch.zeros(1, 3, 3), "pbc": torch.zeros(1, 3, dtype=torch.bool),
        "batch": torch.zeros(2, dtype=torch.int32), "atomic_numbers": torch.ones(2, dtype=torch.int32),
    }  # fmt: skip
    with pytest.raises(kind, match=text):
        bridge.torch_potential(model, gradients="autodiff")(inputs)


@pytest.mark.parametrize("name", ["another name", "None", "a tuple", "a number"])
def test_energies_x_with_gradients_in_torch(name):
    model, kind, text = ENERGIES[name]
    with pytest.raises(kind, match=text):
        torch_with_gradients(model)({"pos": torch.zeros(2, 3), "cell": torch.zeros(1, 3, 3)})


def test_a_wider_energy():
    energy = bridge.potential(
        lambda x: (x["pos"].double() ** 2).sum()[None], atomic_numbers=NUMBERS, gradients="autograd"
    )
    with pytest.raises(
        ValueError,
        match=r"expected energy as float32\[1\], in the dtype of pos, got float64\[1\]; compute it in the dtype of pos, or cast",
    ):
        energy(R)


GIVEN = {
    "forces": (
        lambda x: {"energy": x["pos"].sum()[None], "forces": -x["pos"], "stress": torch.zeros(1, 3, 3)},
        r"expected energy, position_gradients, cell_gradients from .*, got no position_gradients, cell_gradients; pass gradients=\"autograd\" "
        r".*or let the model return position_gradients, cell_gradients \(dE/dr at fixed cell, that is minus the forces\)",
    ),
    "no cell gradients": (
        lambda x: {"energy": x["pos"].sum()[None], "position_gradients": x["pos"]},
        r"got no cell_gradients; pass gradients=\"autograd\".*or let the model return cell_gradients",
    ),
    "no energy": (
        lambda x: {"position_gradients": x["pos"], "cell_gradients": 0 * x["cell"]},
        "expected the outputs energy, got only cell_gradients, position_gradients; let the model "
        "return energy",
    ),
    "wider gradients": (
        lambda x: {"energy": x["pos"].sum()[None], "position_gradients": x["pos"].double(), "cell_gradients": 0 * x["cell"]},
        r"expected position_gradients as float32\[2,3\], in the dtype of pos, got float64\[2,3\]",
    ),
    "flat gradients": (
        lambda x: {"energy": x["pos"].sum()[None], "position_gradients": x["pos"].flatten(), "cell_gradients": 0 * x["cell"]},
        r"expected position_gradients as float\[2,3\], got float32\[6\]; return dE/dr at fixed cell, a row for each atom; forces are minus that",
    ),
    "one stress": (
        lambda x: {"energy": x["pos"].sum()[None], "position_gradients": x["pos"], "cell_gradients": torch.zeros(6)},
        r"expected cell_gradients as float\[1,3,3\], got float32\[6\]; return dE/dh at fixed Cartesian positions",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GIVEN)
def test_gradients_that_the_model_gives(name):
    model, text = GIVEN[name]
    with pytest.raises(ValueError, match=text):
        bridge.potential(model, atomic_numbers=NUMBERS)(R)


def test_an_output_that_is_missing():
    energy = bridge.potential(
        lambda x: x["pos"].sum()[None],
        atomic_numbers=NUMBERS,
        gradients="autograd",
        outputs=("charges",),
    )
    with pytest.raises(
        ValueError, match="charges from .*, got no charges; let the model return charges"
    ):
        energy(R)


def reads(name):
    return lambda x: x[name].sum().reshape(1) * 1.0


CALLED = {
    "potential": lambda model: bridge.potential(
        model, atomic_numbers=NUMBERS, gradients="autograd"
    )(R),
    "jitted potential": lambda model: jax.jit(
        bridge.potential(model, atomic_numbers=NUMBERS, gradients="autograd")
    )(R),
    "JAX": lambda model: jax_energy(jax_with_gradients(model), atomic_numbers=NUMBERS)(R),
    "all outputs": lambda model: Outputs(jax_with_gradients(model), "model", False)(JAX_INPUTS),
    "direct": lambda model: direct(jax_with_gradients(model))(JAX_INPUTS),
    "ASE": lambda model: calculator(jax_with_gradients(model)).get_potential_energy(
        Atoms("HH", np.array(R))
    ),
}
JAX_INPUTS = {
    "pos": R,
    "cell": jnp.zeros((1, 3, 3), "float32"),
    "pbc": jnp.zeros((1, 3), bool),
    "batch": jnp.zeros(2, "int32"),
    "atomic_numbers": jnp.asarray(NUMBERS),
}


@pytest.mark.parametrize("way", CALLED)
@pytest.mark.parametrize(
    "name, do",
    [("edge_index", "pass cutoff=..., in Angstrom"), ("charge", "pass it with the call")],
)
def test_an_optional_input_that_a_model_reads_and_nobody_gives(name, do, way):
    text = f"expected {name} among the inputs, which .* reads, got none; {do}"
    with pytest.raises(ValueError, match=text), bridge.raising():
        jax.block_until_ready(CALLED[way](reads(name)))


@pytest.mark.parametrize("way", CALLED)
def test_a_key_error_of_its_own_stays(way):
    with pytest.raises(KeyError, match="of the user"), bridge.raising():
        jax.block_until_ready(CALLED[way](lambda x: {}["of the user"]))
