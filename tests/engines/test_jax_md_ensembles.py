"""1,000 steps of each of jax-md's ensembles with a torch potential: the trajectory of jax-md's own,
one torch call for a step."""

import pickle
from functools import cache, partial

import jax
import jax.numpy as jnp
import pytest
from jax_md import minimize, partition, quantity, simulate, space

from jax_side.engines import jax_md as engine
from jax_side.engines.carrying import Carrying
from tests.jax_md_cases import (
    BOX,
    KEY,
    LJ,
    SHIFT,
    R,
    apart,
    close,
    counted,
    native,
    ours,
    potential,
    scan,
)

DT, KT, PRESSURE = 2**-8, 0.125, 0.25  # exact in float32
CHAIN = dict(chain_length=2, chain_steps=1, sy_steps=1)
NPT = dict(dt=DT, pressure=PRESSURE, kT=KT, barostat_kwargs=CHAIN, thermostat_kwargs=CHAIN)
FIRE = dict(dt_start=2**-6, dt_max=2**-4)
ENSEMBLES = {  # jax-md's own, ours where it differs, options, what starts it
    "nve": (simulate.nve, None, dict(dt=DT), (KEY, R, KT)),
    "nvt_nose_hoover": (simulate.nvt_nose_hoover, None, dict(dt=DT, kT=KT, **CHAIN), (KEY, R)),
    "nvt_langevin": (simulate.nvt_langevin, None, dict(dt=DT, kT=KT, gamma=0.25), (KEY, R)),
    "npt_nose_hoover": (simulate.npt_nose_hoover, engine.npt_nose_hoover, NPT, (KEY, R, BOX)),
    "fire_descent": (minimize.fire_descent, None, FIRE, (R,)),
    "fire_descent_box": (minimize.fire_descent_box, engine.fire_descent_box, FIRE, (R, BOX)),
}
STEPS = dict.fromkeys(ENSEMBLES, 300) | {"fire_descent_box": 1000}  # which has to arrive
ONCE = ["npt_nose_hoover", "fire_descent_box"]  # those that jax-md's own evaluates twice


def make(name, energy_fn, plain=False):
    """init, step, with the one line that users change."""
    theirs, mine, options, _ = ENSEMBLES[name]
    simulator = theirs if plain or energy_fn is native() else mine or theirs
    return simulator(energy_fn, SHIFT, **options)


def seen(energy_fn, name, state):
    """Positions, and what NPT conserves."""
    if name != "npt_nose_hoover":
        return state.position, 0.0
    known = (lambda R, **_: state.energy) if hasattr(state, "energy") else energy_fn
    return state.position, simulate.npt_nose_hoover_invariant(known, state, PRESSURE, KT)


@cache
def trajectory(name, mine):
    energy_fn = ours() if mine else native()
    init, step = make(name, energy_fn)
    start, calls = counted(init, *ENSEMBLES[name][3])
    assert calls == ([1] if mine else [])
    return counted(scan(step, STEPS[name], partial(seen, energy_fn, name)), start)


@pytest.mark.parametrize("name", ENSEMBLES)
def test_same_trajectory_and_one_torch_call_for_each_step(name):
    (a, (path, _)), calls = trajectory(name, True)
    (b, (reference, _)), none = trajectory(name, False)
    assert calls == STEPS[name] * [1] and none == []
    assert apart(path, reference) < 1e-8 and apart(a.position, R) > 0.05
    close(a.force, b.force, 1e-8)
    if name in ONCE:
        close([a.box, a.momentum, a.box_momentum], [b.box, b.momentum, b.box_momentum], 1e-8)
        assert abs(a.box - BOX).max() > 0.01


def test_npt_conserves_what_jax_mds_own_conserves():
    mine, theirs = (trajectory("npt_nose_hoover", x)[0][1][1] for x in (True, False))
    close(mine, theirs, 1e-9)
    drift = lambda x: float(abs(x - x[0]).max())
    assert drift(mine) < drift(theirs) + 1e-9 and drift(theirs) < 0.005 * abs(theirs[0])


def test_npt_in_real_coordinates_conserves_it_well():
    """Where jax-md's step is right: a hundredth of the drift that it has in fractional ones."""
    energy_fn = engine.energy(potential(), fractional=False)
    init, step = engine.npt_nose_hoover(energy_fn, space.free()[1], **NPT)
    start = jax.block_until_ready(init(KEY, R @ BOX.T, BOX))
    (_, (_, invariant)), calls = counted(
        scan(step, 300, partial(seen, None, "npt_nose_hoover")), start
    )
    assert calls == 300 * [1]
    assert 1e-6 < abs(invariant - invariant[0]).max() < 0.01


def test_fire_with_box_relaxes_both():
    state = trajectory("fire_descent_box", True)[0][0]
    assert (
        abs(state.force).max() < 1e-4
        and abs(quantity.stress(ours(), state.position, state.box)).max() < 1e-4
    )


@pytest.mark.parametrize("name", ONCE)
def test_energy_and_virial_of_the_state_are_those_of_its_positions_and_box(name):
    state = trajectory(name, True)[0][0]
    energy = jax.value_and_grad(lambda P, R, box: native()(R, box=box, perturbation=P))
    close(
        [state.energy, state.virial], jax.jit(energy)(jnp.eye(3), state.position, state.box), 1e-9
    )
    again = pickle.loads(pickle.dumps(state))
    assert type(again) is type(state) and isinstance(
        state, {"n": simulate.NPTNoseHooverState, "f": minimize.FireBoxDescentState}[name[0]]
    )
    close(again, state, 0)


@pytest.mark.parametrize("name", ONCE)
def test_one_call_for_each_step_on_the_host_lane(name):
    """The other one: above."""
    init, step = make(name, ours("host"))
    state, calls = counted(init, *ENSEMBLES[name][3])
    assert calls == [1]
    _, calls = counted(scan(step, 6), state)
    assert calls == 6 * [1]


@pytest.mark.parametrize("name", ONCE)
def test_jax_mds_own_calls_twice(name):
    """The control of the test above: the same trajectory, with two calls for each step."""
    init, step = make(name, ours("host"), plain=True)
    (state, _), calls = counted(scan(step, 6), jax.block_until_ready(init(*ENSEMBLES[name][3])))
    assert calls == 12 * [1]
    assert (
        apart(state.position, trajectory(name, True)[0][1][0][5]) < 1e-12 < apart(state.position, R)
    )


@pytest.mark.parametrize("name, lane", [("nve", "host"), ("npt_nose_hoover", "ffi")])
def test_replicas_are_one_torch_call_and_equal_single_runs(name, lane):
    init, step = make(name, ours(lane))
    options = ENSEMBLES[name][3]
    starts = R + 0.005 * jax.random.normal(KEY, (4, *R.shape))
    one = lambda r: init(*(r if x is R else x for x in options))
    states, calls = counted(jax.jit(jax.vmap(one)), starts)
    assert calls == [4]
    many, calls = counted(scan(jax.vmap(step), 10), states)
    assert calls == 10 * [4]
    single, calls = counted(scan(step, 10), jax.tree.map(lambda x: x[3], states))
    assert calls == 10 * [1]
    close(jax.tree.map(lambda x: x[3], many[0]), single[0], 1e-11)


def test_npt_with_keywords_of_the_step():
    """Another pressure and temperature, and jax-md's neighbour list."""
    find = partition.neighbor_list(
        space.periodic_general(BOX)[0],
        jnp.diag(BOX),
        LJ["r_cutoff"],
        0.04,
        fractional_coordinates=True,
        disable_cell_list=True,
        format=partition.Sparse,
    )
    listed, keywords = find.allocate(R), dict(pressure=2.0, kT=0.5)
    run = {}
    for name, energy_fn, more in (("mine", ours(), {"neighbor": listed}), ("theirs", native(), {})):
        init, step = make("npt_nose_hoover", energy_fn)
        run[name], calls = counted(
            scan(partial(step, **keywords, **more), 20), init(KEY, R, BOX, **more)
        )
        assert calls in ([], 20 * [1], 21 * [1])
    a, b = run["mine"][0], run["theirs"][0]
    close([a.position, a.box, a.momentum], [b.position, b.box, b.momentum], 1e-9)


def test_observed_takes_the_torch_potential(lane):
    init, step = engine.observed(simulate.nve, ours(lane), SHIFT, DT)
    (state, energy), calls = counted(init, KEY, R, KT)
    assert calls == [1]
    (state, energies), calls = counted(
        jax.jit(lambda s: jax.lax.scan(lambda s, _: step(s), s, None, length=6)), state
    )
    assert calls == 6 * [1]
    close([energy, energies[-1]], [jax.jit(native())(r) for r in (R, state.position)])


def test_npt_takes_jax_mds_own_energies():
    init, step = engine.npt_nose_hoover(native(), SHIFT, **NPT)
    state, _ = scan(step, 6)(init(KEY, R, BOX))
    assert (
        apart(state.position, trajectory("npt_nose_hoover", False)[0][1][0][5])
        < 1e-12
        < apart(state.position, R)
    )


@pytest.mark.parametrize("at_start, got", [(True, "end, end"), (False, "nowhere")])
def test_another_order_of_evaluations_is_refused(at_start, got):
    def simulator(energy_fn):
        return (
            None,
            lambda state: (
                (energy_fn(state.position + 0), energy_fn(state.position + 1))
                if at_start
                else state
            ),
        )

    state = engine.npt_nose_hoover(native(), SHIFT, **NPT)[0](KEY, R, BOX)
    with pytest.raises(
        NotImplementedError,
        match=f"expected a step that asks for its energy .*where it ends, got {got}; call jax-md's own",
    ):
        Carrying(simulator, native(), at_start).step(state)
