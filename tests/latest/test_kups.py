"""Torch potentials in kUPS itself, on the CPU: values, molecular dynamics, relaxation. Run by `make
test-latest` alone (Python >= 3.12)."""

import dataclasses
import functools

import ase
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from ase.build import bulk
from kups.application.md.data import MdParameters, MdState, md_state_from_ase
from kups.application.md.simulation import make_md_propagator
from kups.application.potential.filter import FRECHET_FILTER, POSITIONS_AND_CELL, POSITIONS_ONLY
from kups.application.relaxation.data import RelaxState, relax_state_from_ase
from kups.application.relaxation.simulation import make_relax_propagator
from kups.application.utils.particles import particles_from_ase
from kups.application.utils.propagate import make_cycle_function, propagate_and_fix
from kups.core.cell import TriclinicFrame
from kups.core.data import Table
from kups.core.lens import identity_lens
from kups.core.neighborlist import AdaptiveNeighborList, UniversalNeighborlistParameters
from kups.core.potential import EMPTY
from kups.core.result import as_result_function
from kups.core.typing import SystemId
from kups.potential.mliap.direct import make_direct_mliap_potential
from kups.relaxation.config import make_optimizer

import bridge
from jax_side.engines import kups as engine
from tests.graph_cases import CARD, CELL, CUTOFF, NUMBERS, POS, Embedded, brute, close, seen

KEY = jax.random.key(0)
CRYSTAL = ase.Atoms(NUMBERS, POS, cell=CELL, pbc=True)
OTHER = ase.Atoms(NUMBERS[:3], POS[:3] + 0.1, cell=1.1 * CELL, pbc=True)
SLAB = ase.Atoms(NUMBERS, POS, cell=CELL, pbc=[True, True, False])
GAS = ase.Atoms(NUMBERS, POS, cell=3 * CELL, pbc=False)
STRUCTURES = {"crystal": [CRYSTAL], "slab": [SLAB], "gas": [GAS], "two": [CRYSTAL, OTHER]}
SEVENNET = bulk("NaCl", "rocksalt", 5.6)
SEVENNET.rattle(0.1, seed=0)


@functools.cache
def embedded():
    return bridge.jax_potential(Embedded())


@functools.cache
def sevennet():
    from torch_side.models.sevennet import SevenNet

    return bridge.jax_potential(SevenNet("7net-0", dtype=torch.float64))


def parameters(integrator="verlet", **options):
    fixed = dict(
        friction_coefficient=0.01,
        thermostat_time_constant=50.0,
        target_pressure=0.0,
        pressure_coupling_time=500.0,
    )
    fixed |= dict(temperature=300.0, time_step=0.5, compressibility=1e-10, minimum_scale_factor=0.9)
    return MdParameters(integrator=integrator, **fixed | options)


def capacity(particles, systems, cutoff):
    return UniversalNeighborlistParameters.estimate(
        particles.data.system.counts, systems, cutoff, multiplier=2.0
    )


def md_state(structures, cutoff, **options):
    """kUPS's own state of its MD, velocities of 300 K."""
    particles, systems = Table.union(
        *zip(*[md_state_from_ase(s, parameters(**options), key=KEY) for s in structures])
    )
    return MdState(
        particles=particles,
        systems=systems,
        neighborlist_params=capacity(particles, systems, cutoff),
        step=jnp.array([0]),
    )


def relax_state(atoms, cutoff, initial):
    """kUPS's own state of its relaxation, with the cell's vectors themselves to relax: the
    logarithm that kUPS takes of them compiles for minutes."""
    particles, systems = relax_state_from_ase(atoms)
    cell = particles_from_ase(atoms)[1][None]
    systems = systems.set_data(
        dataclasses.replace(
            systems.data, cell=cell, cell_gradients=jax.tree.map(jnp.zeros_like, cell)
        )
    )
    return RelaxState(
        particles,
        systems,
        capacity(particles, systems, cutoff),
        initial(particles, systems),
        jnp.array([0]),
    )


def once(potential, state):
    """What a kUPS potential gives, after kUPS has made its neighbour list large enough."""
    call = jax.jit(as_result_function(potential))
    for _ in range(10):
        result = call(state)
        if not result.failed_assertions:
            return result.value.data
        state = result.fix_or_raise(state)
    raise AssertionError("kUPS's list stays too small")


def itself(model, state):
    """The bridged model called by hand: each system alone, with neighbours of its own."""
    cell, batch = state.systems.data.cell, state.particles.data.system.indices
    for b in range(len(cell.vectors)):
        mine = batch == b
        energy = {
            "pos": state.particles.data.positions[mine],
            "cell": cell.vectors[b][None],
            "pbc": jnp.array([cell.periodic]),
        }
        numbers = state.particles.data.atomic_numbers[mine]
        yield model(
            energy | {"atomic_numbers": numbers, "batch": jnp.zeros(len(numbers), jnp.int32)}
        )


@pytest.mark.parametrize("name", STRUCTURES)
def test_values_x_kups(name):
    potential, cutoff = engine.build(embedded(), identity_lens(MdState))
    state = md_state(STRUCTURES[name], cutoff)
    out = once(potential, state)
    want = list(itself(embedded(), state))
    close(out.total_energies.data, jnp.concatenate([w["energy"] for w in want]))
    close(out.gradients.positions.data, jnp.concatenate([w["position_gradients"] for w in want]))
    # kUPS's frame has six parameters
    close(
        out.gradients.cell.data.vectors,
        jnp.tril(jnp.concatenate([w["cell_gradients"] for w in want])),
    )
    assert out.gradients.positions.keys == state.particles.keys and out.hessians == EMPTY


def test_values_x_brute_force():
    potential, cutoff = engine.build(embedded(), identity_lens(MdState))
    state = md_state([CRYSTAL], cutoff)
    out = once(potential, state)
    energy, (g, G) = jax.value_and_grad(brute, (0, 1))(
        state.particles.data.positions, state.systems.data.cell.vectors[0], NUMBERS
    )
    close((out.total_energies.data[0], out.gradients.positions.data), (energy, g))
    close(out.gradients.cell.data.vectors[0], jnp.tril(G))
    # kUPS turned the crystal, so that its cell is a lower triangle
    close(energy, brute(POS, CELL, NUMBERS))


def test_values_x_sevennet():
    potential, cutoff = engine.build(sevennet(), identity_lens(MdState))
    state = md_state([SEVENNET], cutoff)
    out = once(potential, state)
    (want,) = itself(sevennet(), state)
    close(
        (out.total_energies.data, out.gradients.positions.data),
        (want["energy"], want["position_gradients"]),
        1e-9,
    )
    close(out.gradients.cell.data.vectors, jnp.tril(want["cell_gradients"]), 1e-9)
    assert abs(want["position_gradients"]).max() > 0.1


def test_make_direct_mliap_potential_x_positions():
    """kUPS's own factory; gradients in the positions alone; particles of two systems, interleaved;
    one of padding."""
    radius = Table((SystemId(0),), jnp.array([CUTOFF]))
    state = md_state([CRYSTAL, OTHER], radius)
    whole = once(engine.build(embedded(), identity_lens(MdState))[0], state)
    order = jnp.array([4, 0, 5, 1, 2, 6, 3])
    system = dataclasses.replace(
        state.particles.data.system,
        indices=state.particles.data.system.indices[order].at[-1].set(2),
    )
    data = jax.tree.map(lambda x: x[order], state.particles.data)
    mixed = dataclasses.replace(
        state, particles=state.particles.set_data(dataclasses.replace(data, system=system))
    )
    fn = engine.model(embedded(), gradients="positions")
    views = (
        lambda s: s.particles,
        lambda s: s.systems,
        lambda s: AdaptiveNeighborList.from_state(s, radius),
    )
    potential = make_direct_mliap_potential(fn, *views, lambda s: None)
    out = once(potential, mixed)
    (first, second) = itself(embedded(), mixed)
    close(out.total_energies.data, jnp.concatenate([first["energy"], second["energy"]]))
    close(out.total_energies.data[1], whole.total_energies.data[1])
    close(out.gradients[jnp.array([0, 2, 5])], whole.gradients.positions.data[jnp.array([4, 5, 6])])
    close(out.gradients[jnp.array([1, 3, 4])], first["position_gradients"])
    close(out.gradients[6], jnp.zeros(3))
    assert abs(out.total_energies.data[0] - whole.total_energies.data[0]) > 0.01


def test_one_call_x_step():
    potential, cutoff = engine.build(embedded(), identity_lens(MdState))
    state = md_state([CRYSTAL], cutoff)
    run = make_cycle_function(make_md_propagator(identity_lens(MdState), "verlet", potential))
    state = propagate_and_fix(run, KEY, state)
    seen.clear()
    for _ in range(3):
        state = propagate_and_fix(run, KEY, state)
    assert len(seen) == 3


def trajectory(model, structures, steps, integrator="verlet", **options):
    """kUPS's MD: total energies (steps, B) in eV, and the last state."""
    potential, cutoff = engine.build(model, identity_lens(MdState), POSITIONS_AND_CELL)
    state = md_state(structures, cutoff, integrator=integrator, **options)
    run = make_cycle_function(make_md_propagator(identity_lens(MdState), integrator, potential))
    totals = []
    for key in jax.random.split(KEY, steps):
        state = propagate_and_fix(run, key, state)
        kinetic = state.particles.data.system.sum_over(state.particles.data.kinetic_energy).data
        totals.append(np.array([state.systems.data.potential_energy, kinetic]))
    return np.array(totals[1:]), state  # in the first step kUPS has no forces yet


@pytest.mark.parametrize(
    "model, structures, bound",
    [(embedded, [CRYSTAL, OTHER], 0.03), (sevennet, [SEVENNET], 0.02)],
    ids=["embedded", "sevennet"],
)
def test_energy_x_nve(model, structures, bound):
    found, _ = trajectory(model(), structures, 40)
    drift = np.ptp(found.sum(1), 0)
    assert (np.ptp(found[:, 1], 0) > 0.01).all() and (drift < bound * np.ptp(found[:, 1], 0)).all()


def test_energy_x_half_the_step():
    """Velocity Verlet: the error of the total goes by the square of the time step."""
    errors = [
        np.ptp(trajectory(embedded(), [CRYSTAL], steps, time_step=dt)[0].sum(1))
        for dt, steps in ((0.5, 40), (0.25, 80))
    ]
    assert 3 < errors[0] / errors[1] < 5


@pytest.mark.parametrize("integrator", ["baoab_langevin", "csvr", "csvr_npt", "baoab_npt_langevin"])
def test_thermostats_x_kups(integrator):
    found, state = trajectory(embedded(), [CRYSTAL], 5, integrator)
    want = next(itself(embedded(), state))
    assert np.isfinite(found).all() and np.ptp(found.sum(1)) > 1e-5
    close(found[-1, 0], want["energy"])
    start = md_state([CRYSTAL], Table((SystemId(0),), jnp.array([CUTOFF])))
    moved = abs(state.systems.data.cell.vectors - start.systems.data.cell.vectors)
    assert (moved.max() > 1e-9) == ("npt" in integrator)


@pytest.mark.parametrize("filter", [POSITIONS_ONLY, FRECHET_FILTER], ids=["positions", "cell"])
def test_forces_x_relaxation(filter):
    """kUPS's FIRE brings the largest gradient of its degrees of freedom below 0.02 eV/Angstrom, and
    the model agrees."""
    fire = {"transform": "scale_by_fire", "dt_start": 0.05}
    optimizer = make_optimizer(
        [
            {"transform": "scale", "step_size": -1.0},
            fire,
            {"transform": "max_step_size", "max_step_size": 0.1},
        ]
    )
    potential, cutoff = engine.build(embedded(), identity_lens(RelaxState), filter)
    propagator, initial = make_relax_propagator(
        identity_lens(RelaxState), potential, optimizer, filter
    )
    run, state = make_cycle_function(propagator), relax_state(CRYSTAL, cutoff, initial)
    start = state = propagate_and_fix(run, KEY, state)
    begin = float(largest(start))
    energy = float(start.systems.data.potential_energy[0])
    for _ in range(300):
        state = propagate_and_fix(run, KEY, state)
        if largest(state) < 0.02:
            break
    assert begin > 0.1 and largest(state) < 0.02
    want = next(itself(embedded(), state))
    assert abs(want["position_gradients"]).max() < 0.05 and want["energy"][0] < energy - 0.01


def largest(state):
    """The largest gradient of the optimizer's degrees of freedom."""
    return max(
        abs(x).max()
        for x in jax.tree.leaves(
            (state.particles.data.position_gradients, state.systems.data.cell_gradients.frame)
        )
    )


def test_programs_x_equal_models():
    """Two models of equal arguments are equal, so that kUPS compiles once."""
    potentials = [
        engine.build(model, identity_lens(MdState))[0]
        for model in (embedded(), bridge.jax_potential(embedded().__wrapped__.__self__))
    ]
    functions = [p.direct_potential_fn for p in potentials]
    assert functions[0] == functions[1] and hash(functions[0]) == hash(functions[1])


def test_wrong_use_x_kups():
    charged = dataclasses.replace(CARD, required_inputs=CARD.required_inputs | {"charge"})
    potential, cutoff = engine.build(
        bridge.jax_potential(Embedded(card=charged)), identity_lens(MdState)
    )
    with pytest.raises(
        ValueError,
        match="expected the inputs that Embedded needs .*, got no charge; pass charge=...",
    ):
        potential(md_state([CRYSTAL], cutoff))
    given, _ = engine.build(
        bridge.jax_potential(Embedded(card=charged)),
        identity_lens(MdState),
        extras=lambda inp: {"charge": jnp.zeros(1)},
    )
    close(
        once(given, md_state([CRYSTAL], cutoff)).total_energies.data,
        brute(POS, CELL, NUMBERS)[None],
    )
    with pytest.raises(
        ValueError, match="expected a cutoff in Angstrom, by the card or by cutoff=, got none"
    ):
        engine.build(lambda inputs: inputs, identity_lens(MdState))
    with pytest.raises(ValueError, match='expected gradients="positions and cell" with a filter'):
        engine.model(embedded(), gradients="positions", filter=POSITIONS_ONLY)
    single = bridge.jax_potential(
        Embedded(card=dataclasses.replace(CARD, dtype="float32", device="cpu"))
    )
    with pytest.raises(ValueError, match="expected pos as float32, the model's dtype, got float64"):
        engine.build(single, identity_lens(MdState))[0](md_state([CRYSTAL], cutoff))
    assert isinstance(md_state([CRYSTAL], cutoff).systems.data.cell.frame, TriclinicFrame)
