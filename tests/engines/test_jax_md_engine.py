"""jax-md runs a contract model as it runs its own energies: trajectories, stress, and one
evaluation for a step."""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_md import energy as jax_md_energy
from jax_md import quantity, simulate, space

from jax_side.engines import jax_md as engine
from jax_side.potentials import strain
from jax_side.potentials.potential import potential
from tests.potential_cases import Counted

N, SIGMA = 12, 1.625  # exact in float32, which jax-md rounds it to
BOX = jnp.array([[4.0, 0.7, -0.5], [0.0, 4.2, 0.9], [0.0, 0.0, 3.9]])  # upper triangular, columns
KEY = jax.random.key(0)


def soft_spheres(inputs):
    """(B=1,) of jax-md's soft_sphere_pair, minimum image, from the keys of the contract."""
    pos, cell = inputs["pos"], inputs["cell"][0]
    d = pos[:, None] - pos[None]
    if "images" in inputs:  # an extra of the tests' own
        s = d @ jnp.linalg.inv(cell)
        d = (s - jnp.round(s)) @ cell
    r2 = (d**2).sum(-1)
    close = (r2 < SIGMA**2) & (r2 > 0)
    r = jnp.sqrt(jnp.where(close, r2, SIGMA**2))
    return (0.25 * jnp.where(close, (1 - r / SIGMA) ** 2, 0).sum())[None]


MODEL = jax.jit(strain.with_gradients(soft_spheres))
NUMBERS = np.full(N, 18)
CRYSTAL = potential(MODEL, atomic_numbers=NUMBERS, images=np.array(1))
CLUSTER = potential(MODEL, atomic_numbers=NUMBERS)
FRACTIONAL = jax.random.uniform(KEY, (N, 3), jnp.float64)
REAL = 1.5 * jax.random.normal(KEY, (N, 3), jnp.float64)


def native(displacement):
    return jax_md_energy.soft_sphere_pair(displacement, sigma=SIGMA)


def systems():
    """(name, jax-md's own energy, ours, shift_fn, starting positions)"""
    frac, shift_frac = space.periodic_general(BOX)
    real, shift_real = space.periodic_general(BOX, fractional_coordinates=False)
    free, shift_free = space.free()
    return {
        "fractional": (native(frac), engine.energy(CRYSTAL, BOX), shift_frac, FRACTIONAL),
        "real": (
            native(real),
            engine.energy(CRYSTAL, BOX, fractional=False),
            shift_real,
            FRACTIONAL @ BOX.T,
        ),
        "free": (native(free), engine.energy(CLUSTER), shift_free, REAL),
    }


SYSTEMS = systems()
INTEGRATORS = {
    "nve": (partial(simulate.nve, dt=2e-2), dict(kT=0.1)),
    "nvt_nose_hoover": (partial(simulate.nvt_nose_hoover, dt=2e-2, kT=0.1), {}),
    "nvt_langevin": (partial(simulate.nvt_langevin, dt=2e-2, kT=0.1), {}),
}


def close(a, b, tolerance=1e-10):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", SYSTEMS)
def test_energy_and_gradient_are_jax_mds(name):
    reference, ours, _, R = SYSTEMS[name]
    assert float(ours(R)) > 0.1
    close(jax.value_and_grad(ours)(R), jax.jit(jax.value_and_grad(reference))(R))


def test_same_trajectory_in_real_coordinates():
    """In fractional ones, for each ensemble: tests/engines/test_jax_md_ensembles.py; in free space:
    tests/engines/test_jax_md_torch.py."""
    reference, ours, shift, R = SYSTEMS["real"]

    def run(energy_fn):
        init, step = simulate.nve(energy_fn, shift, 2e-2)
        return jax.jit(lambda s: jax.lax.fori_loop(0, 100, lambda i, s: step(s), s))(
            init(KEY, R, 0.1)
        )

    a, b = run(ours), run(reference)
    assert float(abs(a.position - R).max()) > 0.05
    close([a.position, a.momentum, a.force], [b.position, b.momentum, b.force])


@pytest.mark.parametrize("name", SYSTEMS)
def test_stress_and_perturbation_are_the_virial(name):
    reference, ours, _, R = SYSTEMS[name]
    box = None if name == "free" else BOX
    virial = lambda f: jax.grad(lambda P: f(R, perturbation=P))(jnp.eye(3))
    of = (
        [virial]
        if box is None
        else [virial, lambda f: quantity.stress(f, R, box), lambda f: quantity.pressure(f, R, box)]
    )
    mine, theirs = (jax.jit(lambda f=f: [g(f) for g in of])() for f in (ours, reference))
    close(mine, theirs)
    if box is not None:
        r = R @ BOX.T if name == "fractional" else R
        close(-CRYSTAL.stress(r, BOX.T), mine[1])


@pytest.mark.parametrize(
    "box",
    [4.0, np.float64(4.0), jnp.full(1, 4.0), jnp.array([4.0, 4.2, 3.9]), BOX, np.asarray(BOX)],
)
def test_every_kind_of_box(box):
    displacement, _ = space.periodic_general(box)
    close(engine.energy(CRYSTAL, box)(FRACTIONAL), native(displacement)(FRACTIONAL))


def test_gradient_in_the_box():
    reference, ours, _, R = SYSTEMS["fractional"]
    close(*(jax.jit(jax.grad(lambda box: f(R, box=box)))(1.02 * BOX) for f in (ours, reference)))


def mixed(r, cell):
    """No physics, but a dependence on all there is, and no symmetry."""
    return (
        jnp.sin(r @ jnp.array([0.3, -0.5, 0.9])).sum()
        * jnp.cos(cell @ jnp.array([0.2, 0.1, -0.3])).sum()
        + jnp.einsum("ni,nj,ij->", r, r, cell) / 40
    )


def second_derivatives(energy_fn, forward):
    """How dE/dR and dE/dbox change along DR, and along DBOX."""
    first, second = jax.grad(energy_fn, (0, 1)), jax.jvp if forward else pushed_by_reverse
    moves = lambda R, box: (
        second(lambda R: first(R, box), (R,), (DR,))[1],
        second(lambda box: first(R, box), (box,), (DBOX,))[1],
    )
    return jax.jit(moves)(FRACTIONAL, BOX)


def pushed_by_reverse(f, at, along):
    """jvp made of reverse mode alone."""
    jacobian = jax.jacrev(f)(*at)
    return f(*at), jax.tree.map(lambda j: jnp.tensordot(j, along[0], along[0].ndim), jacobian)


DR, DBOX = jax.random.normal(KEY, (N, 3)), jax.random.normal(KEY, (3, 3))


def test_second_derivatives_are_those_of_finite_differences():
    """Where R moves by real displacements; the trap is jax-md's space.transform."""
    right = lambda R, box: engine.energy(mixed, box)(R)
    wrong = lambda R, box: mixed(space.transform(box, R), box.T)
    first, h = jax.jit(jax.grad(right, (0, 1))), 1e-5
    close(first(FRACTIONAL, BOX), jax.jit(jax.grad(wrong, (0, 1)))(FRACTIONAL, BOX))
    slope = lambda f: jax.tree.map(lambda a, b: (a - b) / (2 * h), f(h), f(-h))
    moves = (
        slope(lambda x: first(FRACTIONAL + x * DR @ jnp.linalg.inv(BOX).T, BOX)),
        slope(lambda x: first(FRACTIONAL, BOX + x * DBOX)),
    )
    for forward in (True, False):
        close(second_derivatives(right, forward), moves, 1e-8)
    assert (
        abs(second_derivatives(wrong, True)[0][1] - moves[0][1]).max()
        > 0.05 * abs(moves[0][1]).max()
    )


def test_forward_over_forward():
    ours, twice = (
        engine.energy(mixed, BOX),
        lambda f: lambda R: jax.jvp(lambda R: jax.jvp(f, (R,), (DR,))[1], (R,), (DR,))[1],
    )
    found = jax.jit(twice(ours))(FRACTIONAL)
    close(
        found, jax.jit(lambda R: (jax.jvp(jax.grad(ours), (R,), (DR,))[1] * DR).sum())(FRACTIONAL)
    )
    close(found, jax.jit(twice(lambda r: mixed(r, BOX.T)))(FRACTIONAL @ BOX.T))


def test_general_box_and_keywords_that_are_not_for_the_energy():
    turn = jnp.linalg.qr(jax.random.normal(KEY, (3, 3)))[0]
    ours = SYSTEMS["fractional"][1]
    close(ours(FRACTIONAL, box=turn @ BOX, kT=0.1, t=0), ours(FRACTIONAL))


# One evaluation for a step. The model counts the times that the host runs it.


def counting():
    model = Counted(MODEL)
    return model, engine.energy(potential(model, atomic_numbers=NUMBERS, images=np.array(1)), BOX)


def scan(step, n):
    return jax.jit(lambda state: jax.lax.scan(lambda s, _: step(s), state, None, length=n))


@pytest.mark.parametrize("observed", [False, True])
def test_one_evaluation_for_each_step(observed):
    """Without jit, too."""
    model, energy_fn = counting()
    options = energy_fn, SYSTEMS["fractional"][2], 2e-2
    init, step = engine.observed(simulate.nve, *options) if observed else simulate.nve(*options)
    state_of = (lambda out: out[0]) if observed else (lambda out: out)
    state = state_of(jax.block_until_ready(init(KEY, FRACTIONAL, 0.1)))
    assert model.calls == 1
    state = state_of(jax.block_until_ready(step(state)))
    assert model.calls == 2
    jax.block_until_ready(scan(lambda s: (state_of(step(s)), None), 5)(state))
    assert model.calls == 7


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_observed_energy_costs_no_evaluation(integrator):
    model, energy_fn = counting()
    make, start = INTEGRATORS[integrator]
    init, step = engine.observed(make, energy_fn, SYSTEMS["fractional"][2])
    state, first = jax.block_until_ready(jax.jit(partial(init, **start))(KEY, FRACTIONAL))
    assert model.calls == 1
    state, energies = jax.block_until_ready(scan(step, 5)(state))
    assert model.calls == 6
    close(first, energy_fn(FRACTIONAL))
    close(energies[-1], energy_fn(state.position))


def test_logging_beside_the_step_would_evaluate_twice():
    """The control of the test above: pure_callback calls are not merged, so `observed` is what
    saves the second."""
    model, energy_fn = counting()
    init, step = simulate.nve(energy_fn, SYSTEMS["fractional"][2], 2e-2)

    def logged(state):
        state = step(state)
        return state, energy_fn(state.position)

    state = jax.block_until_ready(init(KEY, FRACTIONAL, 0.1))
    jax.block_until_ready(scan(logged, 5)(state))
    assert model.calls == 1 + 2 * 5


def test_observed_trajectory_is_the_plain_one():
    _, ours, shift, R = SYSTEMS["fractional"]
    make, start = INTEGRATORS["nvt_nose_hoover"]
    init, step = make(ours, shift)
    init_observed, step_observed = engine.observed(make, ours, shift)
    plain, energies = scan(lambda s: ((s := step(s)), ours(s.position)), 20)(
        jax.jit(init)(KEY, R, **start)
    )
    state, observed = scan(step_observed, 20)(jax.jit(init_observed)(KEY, R, **start)[0])
    close(observed, energies)
    close([state.position, state.momentum], [plain.position, plain.momentum])


def test_nve_conserves_energy():
    _, ours, shift, R = SYSTEMS["fractional"]
    init, step = engine.observed(simulate.nve, ours, shift, 1e-3)

    def total(state, energy):
        return state, energy + quantity.kinetic_energy(momentum=state.momentum, mass=state.mass)

    energies = scan(lambda s: total(*step(s)), 300)(init(KEY, R, 0.1)[0])[1]
    assert float(abs(energies - energies[0]).max()) < 1e-5


def test_observed_refuses_an_integrator_that_moves_on():
    init, step = engine.observed(
        simulate.brownian, SYSTEMS["fractional"][1], SYSTEMS["fractional"][2], 1e-3, 0.1
    )
    state = simulate.BrownianState(FRACTIONAL, 1.0, KEY)
    with pytest.raises(
        NotImplementedError,
        match="expected a step that ends where its forces were evaluated, got positions",
    ):
        step(state)
    with pytest.raises(NotImplementedError, match="call energy_fn beside jax-md's own step"):
        init(KEY, FRACTIONAL)


def test_errors_say_what_came():
    ours = SYSTEMS["fractional"][1]
    with pytest.raises(ValueError, match="one dtype for R and box, got R float32 and box float64"):
        ours(FRACTIONAL.astype(jnp.float32))
    with pytest.raises(
        ValueError, match=r"expected box as a number, \(3,\) or \(3,3\), got \(2, 2\)"
    ):
        ours(FRACTIONAL, box=jnp.eye(2))
    with pytest.raises(
        NotImplementedError, match="expected box=... for a box that changes, got new_box"
    ):
        ours(FRACTIONAL, new_box=BOX)


def test_without_jax_md_the_error_gives_the_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_md", None)
    with pytest.raises(ImportError, match="pip install jax-md"):
        engine.energy(CRYSTAL)
