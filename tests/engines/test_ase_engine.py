"""ASE: calculators over potentials of both banks, and ASE's calculators as JAX functions."""

import builtins
import copy
import pickle

import ase.db
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.emt import EMT
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS
from ase.phonons import Phonons
from ase.vibrations import Vibrations

import bridge
from bridge.card import Card
from jax_side.engines import ase as in_jax
from jax_side.engines import jax_md as jax_md_engine
from jax_side.potentials.potential import potential
from jax_side.potentials.strain import with_gradients
from tests import graph_cases, model_cases
from tests.graph_cases import CELL, CUTOFF, NUMBERS, POS, Embedded, brute, close
from torch_side.engines import ase as in_torch
from torch_side.potentials.model import Model


def crystal():
    """Triclinic, rattled, of four elements."""
    return Atoms(NUMBERS, POS, cell=CELL, pbc=True)


def copper(pbc=True):
    """Triclinic, rattled, for EMT."""
    atoms = model_cases.skewed(bulk("Cu") * (2, 1, 1))
    atoms.pbc = pbc
    return atoms


def brute_model(inputs):
    """The energy of graph_cases in JAX."""
    return brute(
        inputs["pos"], inputs["cell"][0], inputs["atomic_numbers"].astype(inputs["pos"].dtype)
    )[None]


def graph_model(inputs):
    """The same from edges, some of whose slots are not used."""
    pos, (i, j), n = inputs["pos"], inputs["edge_index"], len(inputs["pos"])
    used, (i, j), numbers = (
        i < n,
        jnp.minimum(inputs["edge_index"], n - 1),
        inputs["atomic_numbers"].astype(pos.dtype),
    )
    r2 = ((pos[j] - pos[i] + inputs["cell_offsets"] @ inputs["cell"][0]) ** 2).sum(-1)
    density = jnp.where(used, (1 - r2 / CUTOFF**2) ** 3 * numbers[j], 0)
    nodes = -jnp.sqrt(1 + jax.ops.segment_sum(density, i, n)) + numbers / 100
    return {"energy": nodes.sum()[None], "node_energies": nodes}


BRUTE, GRAPH = with_gradients(brute_model), with_gradients(graph_model)
KINDS = {
    "torch": lambda: in_torch.calculator(Embedded()),
    "JAX": lambda: in_jax.calculator(BRUTE),
    "JAX, edges by ASE": lambda: in_jax.calculator(GRAPH, cutoff=CUTOFF, outputs=["node_energies"]),
    "JAX, bound": lambda: in_jax.calculator(potential(BRUTE, atomic_numbers=NUMBERS)),
    "JAX in torch": lambda: in_torch.calculator(bridge.torch_potential(BRUTE)),
    "torch in JAX, bound": lambda: in_jax.calculator(
        bridge.potential(
            graph_cases.MODEL, atomic_numbers=NUMBERS, pbc=True, outputs=["node_energies"]
        )
    ),
}


@pytest.fixture(params=KINDS)
def calculator(request):
    return KINDS[request.param]()


def evaluations(calculator):
    """A list that grows with each evaluation of the potential behind a calculator."""
    seen, evaluate = [], calculator.evaluate
    calculator.evaluate = lambda arrays: seen.append(arrays) or evaluate(arrays)
    return seen


# Calculators over potentials.


def test_values_x_the_potential(calculator):
    atoms = crystal()
    atoms.calc = calculator
    out = graph_cases.MODEL(graph_cases.system())
    close(
        [atoms.get_potential_energy(), atoms.get_potential_energy(force_consistent=True)],
        [float(out["energy"][0])] * 2,
    )
    close(atoms.get_forces(), -out["position_gradients"])
    W = POS.T @ out["position_gradients"].numpy() + CELL.T @ out["cell_gradients"][0].numpy()
    close(atoms.get_stress(voigt=False), W / abs(np.linalg.det(CELL)))
    assert atoms.get_stress().shape == (6,) and all(
        x.dtype == np.float64 for x in (atoms.get_forces(), atoms.get_stress())
    )
    if "energies" in calculator.implemented_properties:
        close(atoms.get_potential_energies(), out["node_energies"])


@pytest.mark.parametrize("kind", ["torch", "JAX"])
def test_forces_and_stress_x_finite_differences_of_ase(kind):
    atoms = crystal()
    atoms.calc = KINDS[kind]()
    np.testing.assert_allclose(atoms.get_forces(), calculate_numerical_forces(atoms), atol=1e-7)
    np.testing.assert_allclose(atoms.get_stress(), calculate_numerical_stress(atoms), atol=1e-8)
    assert abs(atoms.get_stress()).min() > 1e-4  # shear was tested


def test_cache_x_one_evaluation_for_the_same_atoms(calculator):
    atoms, seen = crystal(), evaluations(calculator)
    atoms.calc = calculator
    properties = ["energy", "forces", "stress"]
    assert calculator.calculation_required(atoms, properties)
    (
        atoms.get_potential_energy(),
        atoms.get_forces(),
        atoms.get_stress(),
        atoms.get_potential_energy(force_consistent=True),
    )
    atoms.copy().positions[0] += 1
    atoms.set_initial_magnetic_moments([1.0] * 4)  # nothing to a potential
    assert len(seen) == 1 and not calculator.calculation_required(atoms, properties)
    forces = atoms.get_forces()
    forces[:] = 0
    assert abs(atoms.get_forces()).max() > 0.01
    for count, change in enumerate(
        (lambda: atoms.rattle(0.01), lambda: atoms.set_cell(1.01 * CELL)), 2
    ):
        change()
        atoms.get_forces(), atoms.get_stress()
        assert len(seen) == count


@pytest.mark.parametrize("kind", ["torch", "JAX, edges by ASE"])
def test_other_atoms_x_one_calculator(kind):
    """More atoms, other boundaries: against the sum over images of each."""
    calculator = KINDS[kind]()
    for pbc in ((True, False, True), (False, False, False)):
        atoms = Atoms(NUMBERS[:3], POS[:3], cell=CELL, pbc=pbc, calculator=calculator)
        close(
            atoms.get_potential_energy(),
            jax.jit(brute, static_argnums=3)(POS[:3], CELL, NUMBERS[:3], pbc),
        )
    double, single = crystal() * (2, 1, 1), crystal()
    double.calc = single.calc = calculator
    close(double.get_potential_energy(), 2 * single.get_potential_energy(), 1e-9)


def test_edges_x_few_programs():
    traces = []
    atoms, calculator = (
        crystal(),
        in_jax.calculator(
            with_gradients(lambda x: traces.append(x["edge_index"].shape) or graph_model(x)),
            cutoff=CUTOFF,
        ),
    )
    atoms.calc = calculator
    for step in range(8):
        atoms.rattle(0.02, seed=step)
        atoms.get_forces()
    assert 1 <= len(set(traces)) == len(traces) <= 3


def test_molecule_x_no_stress(calculator):
    atoms, seen = Atoms(NUMBERS, POS), evaluations(calculator)
    atoms.calc = calculator
    with pytest.raises(
        PropertyNotImplementedError,
        match="expected a periodic system with three cell vectors for a stress, got no periodic axis",
    ):
        atoms.get_stress()
    assert not seen
    slab = Atoms(NUMBERS, POS, cell=[*CELL[:2], [0, 0, 0]], pbc=[True, True, False])
    slab.calc = calculator
    with pytest.raises(
        PropertyNotImplementedError, match="got a singular cell; such a system has none"
    ):
        slab.get_stress()


def test_relaxation_x_bfgs_and_cell(calculator):
    atoms = crystal()
    atoms.calc = calculator
    before, relaxing = atoms.get_potential_energy(), BFGS(FrechetCellFilter(atoms), logfile=None)
    seen = evaluations(calculator)
    relaxing.run(fmax=0.0, steps=4)
    assert atoms.get_potential_energy() < before - 0.01 and len(seen) == 4


def test_phonons_x_finite_displacements(tmp_path):
    """Of a primitive cell: acoustic branches that start at zero, from a model that holds its
    crystal."""
    atoms = bulk("Si")
    atoms.calc = in_torch.calculator(model_cases.sevennet(torch.float32))
    phonons = Phonons(
        atoms, atoms.calc, supercell=(1, 1, 1), delta=0.02, name=str(tmp_path / "phonon")
    )
    phonons.run()
    phonons.read(acoustic=True)
    energies = phonons.band_structure([[0, 0, 0]])[0]
    # eV; silicon has 0.064
    assert abs(energies[:3]).max() < 2e-3 < 0.04 < energies[3:].min() and energies[3:].max() < 0.08


def test_vibrations_x_spring(tmp_path):
    """A diatomic of stiffness k has one quantum, hbar sqrt(k / mu), and five of zero."""
    k = 30.0
    spring = with_gradients(
        lambda x: (0.5 * k * (jnp.linalg.norm(x["pos"][0] - x["pos"][1]) - 1.1) ** 2)[None]
    )
    atoms = Atoms(
        "N2", positions=[[0, 0, 0], [0, 0.66, 0.88]], calculator=in_jax.calculator(spring)
    )
    vibrations = Vibrations(atoms, name=str(tmp_path / "vib"), delta=1e-3)
    vibrations.run()
    quantum = units._hbar * 1e10 / np.sqrt(units._amu * units._e) * np.sqrt(k / (14.007 / 2))
    energies = np.sort(abs(vibrations.get_energies()))
    np.testing.assert_allclose(energies[-1], quantum, rtol=1e-4)
    assert abs(energies[:5]).max() < 1e-3


def test_database_x_round_trip(calculator, tmp_path):
    atoms = crystal()
    atoms.calc = calculator
    energy, forces, stress = atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()
    with ase.db.connect(tmp_path / "structures.db") as database:
        number = database.write(atoms, note="kept")
    row = ase.db.connect(tmp_path / "structures.db").get(number)
    back = row.toatoms()
    close([row.energy, back.get_potential_energy()], [energy] * 2, 0)
    close(
        [row.forces, back.get_forces(), row.stress, back.get_stress()],
        [forces, forces, stress, stress],
        0,
    )
    assert row.calculator == calculator.model_name.lower() and row.note == "kept"


def test_copies_x_pickle():
    atoms = crystal()
    for calculator in (in_torch.calculator(Embedded()), in_jax.calculator(BRUTE)):
        atoms.calc = calculator
        energy = atoms.get_potential_energy()
        for again in (copy.deepcopy(calculator), pickle.loads(pickle.dumps(calculator))):
            assert isinstance(again, (in_torch.Calculator, in_jax.Calculator)) and type(
                again
            ) is type(calculator)
            again.reset()
            close(again.get_potential_energy(atoms), energy)


class Ionic(Model):
    """A model with all that ASE has a name for, and whose energy depends on the charge."""

    def __init__(self, **options):
        super().__init__()
        names = {
            "energy",
            "position_gradients",
            "cell_gradients",
            "charges",
            "magmoms",
            "dipole",
            "embeddings",
        }
        self.card = Card(outputs=names, sizes=(("F", 2),), **options)

    def energies(self, inputs):
        pos, charge, active = inputs["pos"], inputs["charge"], self.card.active_outputs
        more = {
            "charges": charge.expand(len(pos)) / len(pos),
            "magmoms": inputs["spin"].expand(len(pos)),
            "dipole": pos.sum(0)[None] * charge,
        }
        return {
            "energy": charge * pos.square().sum(),
            **{name: x for name, x in more.items() if name in active},
        }


def test_charge_and_spin_x_info():
    atoms = crystal()
    atoms.calc = in_torch.calculator(Ionic(required_inputs={"charge"}, optional_inputs={"spin"}))
    assert atoms.calc.implemented_properties == [
        "energy",
        "free_energy",
        "forces",
        "stress",
        "charges",
        "magmoms",
        "dipole",
    ]
    with pytest.raises(
        ValueError,
        match=r"expected atoms.info\['charge'\], which Ionic needs, got none; set it .total charge in e",
    ):
        atoms.get_potential_energy()
    seen = evaluations(atoms.calc)
    atoms.info |= {"charge": 2, "spin": 1.5}
    close(atoms.get_potential_energy(), 2 * (POS**2).sum())
    close([atoms.get_charges(), atoms.get_magnetic_moments()], [np.full(4, 0.5), np.full(4, 1.5)])
    close(atoms.get_dipole_moment(), 2 * POS.sum(0))
    atoms.info["note"] = "nothing to the model"
    atoms.get_potential_energy()
    assert len(seen) == 1
    atoms.info["charge"] = -1  # seen, though no atom moved
    close(atoms.get_potential_energy(), -(POS**2).sum())
    assert len(seen) == 2


def test_outputs_x_asked_for():
    only = in_torch.calculator(Ionic(optional_inputs={"charge", "spin"}), outputs=["charges"])
    assert only.implemented_properties == ["energy", "free_energy", "forces", "stress", "charges"]
    energy_alone = Card(outputs={"energy"})
    atoms = crystal()
    atoms.calc = in_jax.calculator(brute_model_energy, card=energy_alone)
    assert atoms.get_potential_energy() < 0
    with pytest.raises(PropertyNotImplementedError):
        atoms.get_forces()


def brute_model_energy(inputs):
    return {"energy": brute_model(inputs)}


def test_dtype_x_the_models():
    assert in_torch.calculator(Ionic(dtype="float32")).dtype == "float32"  # the card's
    assert in_torch.calculator(Embedded()).dtype == "float64"  # its parameter's
    assert (
        in_torch.calculator(bridge.torch_potential(BRUTE)).dtype
        == in_jax.calculator(BRUTE).dtype
        == "float64"
    )
    assert (
        in_torch.calculator(Ionic(), dtype=torch.float32).dtype
        == in_jax.calculator(BRUTE, dtype="float32").dtype
        == "float32"
    )
    atoms = crystal()
    atoms.calc = in_jax.calculator(BRUTE, dtype="float32")
    assert (
        0
        < abs(
            atoms.get_potential_energy()
            - float(graph_cases.MODEL(graph_cases.system())["energy"][0])
        )
        < 1e-5
    )
    with jax.enable_x64(False):
        assert in_jax.calculator(BRUTE).dtype == "float32"


def test_sevennet_x_its_own_calculator():
    atoms, own = model_cases.CRYSTALS["skewed"].copy(), model_cases.CRYSTALS["skewed"].copy()
    atoms.calc, own.calc = (
        in_torch.calculator(model_cases.sevennet(torch.float32)),
        model_cases.sevennet_calculator(),
    )
    np.testing.assert_allclose(
        atoms.get_potential_energy(), own.get_potential_energy(), atol=1e-5 * len(atoms)
    )
    np.testing.assert_allclose(atoms.get_forces(), own.get_forces(), atol=1e-4)
    np.testing.assert_allclose(atoms.get_stress(), own.get_stress(), atol=1e-5)
    np.testing.assert_allclose(
        atoms.get_potential_energies(), own.get_potential_energies(), atol=1e-5
    )
    assert atoms.calc.name == "sevennet" and atoms.calc.dtype == "float32"


# ASE's calculators in JAX.


class Seen(EMT):
    """EMT that counts its calculations, and fails for one atom."""

    def __init__(self):
        super().__init__()
        self.calculations = 0

    def calculate(self, atoms=None, properties=("energy",), system_changes=()):
        self.calculations += 1
        if len(atoms) == 1:
            raise ArithmeticError("one atom is too lonely")
        super().calculate(atoms, properties, system_changes)


def energy_of(calculator, atoms, **options):
    return potential(in_jax.model(calculator), atomic_numbers=atoms.numbers, **options)


@pytest.mark.parametrize("pbc", [True, (True, True, False)], ids=["crystal", "slab"])
def test_values_and_gradients_x_emt(pbc, maybe_jit):
    atoms, calculator = copper(pbc), Seen()
    atoms.calc = EMT()
    energy, r, h = (
        energy_of(calculator, atoms, pbc=np.broadcast_to(pbc, 3)),
        jnp.asarray(atoms.positions),
        jnp.asarray(atoms.cell.array),
    )
    value, (g, G) = maybe_jit(jax.value_and_grad(energy, (0, 1)))(r, h)
    close([value, -g], [atoms.get_potential_energy(), atoms.get_forces()], 1e-12)
    close(
        [maybe_jit(energy.stress)(r, h), maybe_jit(energy.forces)(r, h)],
        [atoms.get_stress(voigt=False), atoms.get_forces()],
        1e-12,
    )
    step, deformed = 1e-5, 1e-5 * np.arange(9.0).reshape(3, 3)
    fd = [float(energy(r, h + sign * deformed)) for sign in (1, -1)]
    # G at fixed Cartesian positions
    close(np.vdot(G, deformed / step), (fd[0] - fd[1]) / (2 * step), 1e-6)
    assert calculator.calculations == 3  # what it had of these atoms was not calculated again


def test_one_calculation_x_each_call():
    atoms, calculator = copper(), Seen()
    energy, h = energy_of(calculator, atoms), jnp.asarray(atoms.cell.array)
    step = jax.jit(jax.value_and_grad(energy, (0, 1)))
    for count in range(1, 4):
        step(jnp.asarray(atoms.positions) + 0.01 * count, h)
        assert calculator.calculations == count


def test_vmap_and_scan_x_emt():
    atoms = copper()
    atoms.calc = EMT()
    energy, h = energy_of(EMT(), atoms), jnp.asarray(atoms.cell.array)
    moved = jnp.asarray(atoms.positions) + 0.05 * np.random.default_rng(1).normal(
        size=(3, len(atoms), 3)
    )
    energies, forces = [], []
    for r in moved:
        atoms.positions = r
        energies.append(atoms.get_potential_energy()), forces.append(atoms.get_forces())
    gradients = jax.value_and_grad(energy)
    want = [np.stack(energies), -np.stack(forces)]
    close(jax.jit(jax.vmap(gradients, (0, None)))(moved, h), want, 1e-12)
    close(jax.lax.scan(lambda _, r: (None, gradients(r, h)), None, moved)[1], want, 1e-12)


def test_systems_and_padding_x_emt():
    """Two systems in one call, one of them a molecule, and atoms that are padding."""
    crystal, pair = copper(), Atoms("Cu2", positions=[[0, 0, 0], [0.3, 0.2, 2.4]])
    crystal.calc, pair.calc = EMT(), EMT()
    numbers, batch = np.array([29, 29, 0, 29, 29, 0]), np.array([0, 0, 0, 1, 1, 1])
    pos = np.concatenate([crystal.positions, [[9, 9, 9]], pair.positions, [[9, 9, 9]]])
    cell, pbc = (
        np.stack([crystal.cell.array, np.zeros((3, 3))]),
        np.array([[True] * 3, [False] * 3]),
    )
    inputs = {"pos": pos, "atomic_numbers": numbers, "batch": batch, "cell": cell, "pbc": pbc}
    out = jax.jit(in_jax.model(EMT(), outputs=["node_energies"]))(
        {k: jnp.asarray(x) for k, x in inputs.items()}
    )
    close(
        out["energy"],
        np.array([crystal.get_potential_energy(), pair.get_potential_energy()]),
        1e-12,
    )
    zero = np.zeros((1, 3))
    close(
        out["position_gradients"],
        -np.concatenate([crystal.get_forces(), zero, pair.get_forces(), zero]),
        1e-12,
    )
    close(
        out["node_energies"],
        np.array([*crystal.get_potential_energies(), 0, *pair.get_potential_energies(), 0]),
        1e-12,
    )
    assert not out["cell_gradients"][1].any() and out["cell_gradients"][0].all()


def test_jax_md_x_emt():
    """A short NVE run conserves what ASE calls the energy of its last frame."""
    from jax_md import quantity, simulate, space

    atoms, calculator = copper(), Seen()
    box = jnp.asarray(atoms.cell.array.T)
    energy_fn, (_, shift) = (
        jax_md_engine.energy(energy_of(calculator, atoms), box),
        space.periodic_general(box, fractional_coordinates=True),
    )
    init, step = jax_md_engine.observed(simulate.nve, energy_fn, shift, 2 * units.fs)
    state, first = init(
        jax.random.key(0),
        jnp.asarray(atoms.get_scaled_positions()),
        kT=0.02,
        mass=jnp.asarray(atoms.get_masses()),
    )
    kinetic = lambda state: float(quantity.kinetic_energy(momentum=state.momentum, mass=state.mass))
    total, begun = float(first) + kinetic(state), kinetic(state)
    for _ in range(10):
        state, last = step(state)
    atoms.set_scaled_positions(np.asarray(state.position))
    atoms.calc = EMT()
    close([float(last), state.force], [atoms.get_potential_energy(), atoms.get_forces()], 1e-9)
    assert (
        abs(float(last) + kinetic(state) - total) < 0.02 * abs(kinetic(state) - begun)
        and calculator.calculations == 11
    )


def test_nested_x_both_banks():
    """A calculator over a torch potential in JAX, and one over a JAX potential: JAX in ASE in
    JAX."""
    want = float(graph_cases.MODEL(graph_cases.system())["energy"][0])
    for calculator in (in_torch.calculator(Embedded()), in_jax.calculator(BRUTE)):
        energy = energy_of(calculator, crystal())
        close(jax.jit(energy)(POS, CELL), want)
        close(-jax.jit(jax.grad(energy))(POS, CELL), calculator.get_property("forces", crystal()))


def test_second_derivatives_x_refused():
    atoms = copper()
    r, h, model = jnp.asarray(atoms.positions), jnp.asarray(atoms.cell.array), in_jax.model(EMT())
    expected = "expected first derivatives of EMT, whose card has derivative_order=1, got a second derivative; take finite differences"
    with pytest.raises(NotImplementedError, match=expected):
        jax.hessian(energy_of(EMT(), atoms))(r, h)
    inputs = {
        k: jnp.asarray(x)
        for k, x in {
            "cell": h[None],
            "pbc": [[True] * 3],
            "batch": [0, 0],
            "atomic_numbers": [29, 29],
        }.items()
    }
    with pytest.raises(
        NotImplementedError,
        match="expected first derivatives of the energy of EMT, an ASE calculator, got a derivative of its outputs",
    ):
        jax.grad(lambda r: model(inputs | {"pos": r})["energy"].sum())(r)


def test_exceptions_x_arrive(maybe_jit):
    energy = maybe_jit(energy_of(Seen(), Atoms("Cu")))
    with pytest.raises(Exception, match="ArithmeticError: one atom is too lonely"):
        energy(jnp.zeros((1, 3))).block_until_ready()
    with pytest.raises(ArithmeticError, match="^one atom is too lonely$"), bridge.raising():
        energy(jnp.zeros((1, 3))).block_until_ready()
    with pytest.raises(Exception, match="No EMT-potential for Fe"):
        maybe_jit(energy_of(EMT(), Atoms("Fe")))(jnp.zeros((1, 3))).block_until_ready()


def test_equality_x_caches():
    calculator = Seen()
    assert in_jax.model(calculator) == in_jax.model(calculator) != in_jax.model(Seen())
    assert hash(in_jax.model(calculator)) == hash(in_jax.model(calculator))


def test_singular_cell_x_nan():
    """A slab without its third vector has no stress: its energy and forces are there, G is no
    number."""
    atoms = copper((True, True, False))
    atoms.cell[2] = 0
    atoms.calc = EMT()
    out = energy_of(EMT(), atoms, pbc=atoms.pbc).outputs(
        jnp.asarray(atoms.positions), jnp.asarray(atoms.cell.array)
    )
    close(-out["position_gradients"], atoms.get_forces(), 1e-12)
    assert np.isnan(out["cell_gradients"]).all()


class Energies(EMT):
    """Says that it has energies only."""

    implemented_properties = ["energy", "stress"]


def test_card_x_what_the_calculator_has():
    card = in_jax.model(EMT()).card
    assert (card.derivative_order, card.active) == (
        1,
        ("energy", "position_gradients", "cell_gradients"),
    ) and "node_energies" in card.outputs
    atoms, model = copper(), in_jax.model(Energies())
    assert model.card.active == ("energy",)
    with pytest.raises(NotImplementedError, match="a gradient of the energy in pos"):
        jax.grad(potential(model, atomic_numbers=atoms.numbers))(
            jnp.asarray(atoms.positions), jnp.asarray(atoms.cell.array)
        )


# Errors.


BOUND = potential(BRUTE, atomic_numbers=NUMBERS, pbc=(True, True, False))
WRONG = {
    "torch, no model": (lambda: in_torch.calculator(torch.nn.Linear(1, 1)), TypeError, "expected a torch_side.potentials.model.Model, got a Linear; wrap it"),
    "torch, outputs": (lambda: in_torch.calculator(Embedded(), outputs=["charges"]), ValueError, "got charges; ask for these, or take another model"),
    "JAX, no callable": (lambda: in_jax.calculator(3), TypeError, "expected a JAX potential: a callable from dict to dict, or an energy bound"),
    "JAX, outputs": (lambda: in_jax.calculator(BRUTE, card=Card(), outputs=["charges"]), ValueError, "got charges; ask for these"),
    "JAX, two cutoffs": (lambda: in_jax.calculator(GRAPH, cutoff=2.0, card=graph_cases.CARD), ValueError, "expected one cutoff, got 2.0, and 3.0 on the card"),
    "JAX, systems": (
        lambda: in_jax.calculator(potential(BRUTE, atomic_numbers=NUMBERS, batch=np.array([0, 0, 1, 1]), n_systems=2)),
        ValueError, "expected an energy of one system, got 2 systems; bind one system, or pass its model",
    ),
    "JAX, other atoms": (
        lambda: in_jax.calculator(BOUND).get_potential_energy(copper()),
        ValueError, r"expected the atoms that the energy is bound to, \[1, 6, 8, 14\], got \[29, 29\]; bind another energy",
    ),
    "JAX, other pbc": (
        lambda: in_jax.calculator(BOUND).get_potential_energy(crystal()),
        ValueError, r"expected pbc \[True, True, False\], as the energy is bound",
    ),
    "JAX, element": (
        lambda: in_jax.calculator(BRUTE, card=Card(elements=[1])).get_potential_energy(crystal()), ValueError, "got C .Z = 6. for atom 1 of system 0"
    ),
    "JAX, no gradients": (lambda: in_jax.calculator(brute_model_energy).get_potential_energy(crystal()), ValueError, "expected the outputs"),
    "model, class": (lambda: in_jax.model(EMT), TypeError, "expected an ASE calculator, got the class EMT; pass an object"),
    "model, outputs": (lambda: in_jax.model(EMT(), outputs=["dipole"]), ValueError, "got dipole; ask for these"),
    "model, dtype": (
        lambda: in_jax.model(EMT())({k: jnp.asarray(x) for k, x in graph_cases.system(dtype=torch.float16).items()}),
        ValueError, "expected pos as float32 or float64, got float16; cast pos and cell",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_errors_x_clear(what):
    call, kind, text = WRONG[what]
    with pytest.raises(kind, match=text):
        call()


def test_asymmetric_virial_x_refused_as_a_stress():
    """Energy and forces there are; six numbers can't hold this one."""
    wrong = lambda x: GRAPH(x) | {"cell_gradients": jnp.asarray(np.arange(9.0).reshape(1, 3, 3))}
    atoms = crystal()
    atoms.calc = in_jax.calculator(wrong, cutoff=CUTOFF)
    assert atoms.get_potential_energy() < 0 and atoms.get_forces().any()
    with pytest.raises(
        ValueError, match="expected a symmetric virial, got an asymmetric one in system 0"
    ):
        atoms.get_stress()


@pytest.mark.parametrize(
    "call",
    [
        lambda: in_torch.calculator(Embedded()),
        lambda: in_jax.calculator(BRUTE),
        lambda: in_jax.model(EMT()),
    ],
)
def test_missing_package_x_pip_line(call, monkeypatch):
    real = builtins.__import__

    def without_ase(name, *args, **kwargs):
        if name.split(".")[0] == "ase":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    for module in (in_torch, in_jax):
        module._kind.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without_ase)
    with pytest.raises(
        ImportError,
        match="expected the package 'ase' for calculators of ASE, got no such package; run: pip install ase",
    ):
        call()
