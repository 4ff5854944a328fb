"""Umbrellas, sums of an energy and a bias, metadynamics: values by hand, every transform, torch
potentials in jitted runs, and free energies of a double well beside quadrature."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax_md import partition, simulate, space

import bridge
from jax_side.engines import jax_md as engine
from jax_side.potentials.bias import Bias, umbrella
from jax_side.potentials.metadynamics import metadynamics
from tests.bias_cases import (
    CENTRES,
    KT,
    STIFFNESS,
    along,
    coarse,
    exact,
    histograms_put_together,
    in_errors,
    langevin,
    particle,
    well,
)
from tests.electric_cases import AT_REST, MODEL, NUMBERS, OFF, TWIN
from tests.jax_md_cases import BOX, KEY, LJ, R, counted, ours, potential

WATER = {
    lane: bridge.potential(MODEL, atomic_numbers=NUMBERS, lane=lane) for lane in ("ffi", "host")
} | {"jax": TWIN}


def bond(r, cell=None):
    return jnp.linalg.norm(r[1] - r[0])


def bonds(r, cell=None):
    return jnp.stack([bond(r), jnp.linalg.norm(r[2] - r[0])])


def angle(r, cell=None):
    return jnp.arctan2(r[0, 1], r[0, 0])


@pytest.mark.parametrize("lane", WATER)
def test_sum_x_transforms(lane):
    """Values, gradients, Hessians, vmap and aux of the sum are those of its terms."""
    energy, r = WATER[lane], jnp.asarray(OFF)
    bias = umbrella(bonds, [1.0, 0.9], [3.0, 5.0])
    by_hand = lambda r: 1.5 * (bonds(r)[0] - 1) ** 2 + 2.5 * (bonds(r)[1] - 0.9) ** 2
    total = energy + bias
    assert total.card is energy.card

    (e, g, h), (b, db, hb), (t, dt, ht) = (
        jax.jit(lambda r, f=f: (f(r), jax.grad(f)(r), jax.hessian(f)(r)))(r)
        for f in (energy, by_hand, total)
    )
    np.testing.assert_allclose(t, e + b, atol=1e-12)
    np.testing.assert_allclose(dt, g + db, atol=1e-10)
    np.testing.assert_allclose(ht, h + hb, atol=1e-8)
    (value, parts), gradient = jax.jit(jax.value_and_grad(total.aux, has_aux=True))(r)
    np.testing.assert_allclose((value, gradient[0, 0]), (t, dt[0, 0]), atol=1e-10)
    np.testing.assert_allclose(parts["energy"], e, atol=1e-12)
    np.testing.assert_allclose(parts["biases"][0], b, atol=1e-12)
    np.testing.assert_allclose(parts["cvs"][0], bonds(r))


def test_sum_x_native_lane():
    energy = bridge.potential(MODEL, atomic_numbers=NUMBERS, lane="native")
    found, wanted = (
        jax.jit(jax.value_and_grad(e + umbrella(bond, 0.5, 2.0)))(jnp.asarray(OFF))
        for e in (energy, TWIN)
    )
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-10), found, wanted)


@pytest.mark.parametrize("lane", WATER)
def test_windows_x_vmap(lane):
    """All windows are one call."""
    energy, centres = WATER[lane], jnp.linspace(0.8, 1.2, 3)
    of = lambda c, r: (energy + umbrella(bond, c, 4.0))(r)
    r = jnp.stack([jnp.asarray(OFF)] * 3)
    if lane != "jax":  # the model has one system
        energy = bridge.potential(MODEL, atomic_numbers=NUMBERS, lane=lane, batched="sequential")
    found = jax.jit(jax.vmap(of))(centres, r)
    wanted = TWIN(r[0]) + 2 * (bond(r[0]) - centres) ** 2
    np.testing.assert_allclose(found, wanted, atol=1e-10)


def test_several_biases_and_any_function():
    spring = lambda r, cell=None: (r**2).sum()
    one, other = umbrella(bond, 0.5, 2.0), umbrella(along, 1.0, 3.0)
    r = jnp.asarray(OFF)
    total = spring + one + other
    np.testing.assert_allclose(total(r), spring(r) + one(r) + other(r))
    assert len(total.aux(r)[1]["cvs"]) == 2 and total.card is None


def test_cell_in_a_variable():
    """A variable of the cell: the volume; its gradient comes through the sum."""
    volume = lambda r, cell: jnp.linalg.det(cell)
    total = (lambda r, cell: (r**2).sum()) + umbrella(volume, 7.0, 2.0)
    cell = 2 * jnp.eye(3)
    found = jax.grad(total, 1)(jnp.ones((1, 3)), cell)
    np.testing.assert_allclose(found, 2 * (8 - 7) * 8 * np.linalg.inv(cell).T)


@given(turns=st.integers(-3, 3), at=st.floats(-3, 3), centre=st.floats(-10, 10))
def test_period_x_turns(turns, at, centre):
    bias = umbrella(angle, centre, 1.0, period=2 * np.pi)
    value = float(bias.of(at))
    assert value == pytest.approx(float(bias.of(at + 2 * np.pi * turns)), abs=1e-9)
    assert value <= np.pi**2 / 2 + 1e-9
    near = min(abs(at - centre + 2 * np.pi * k) for k in range(-4, 5))
    assert value == pytest.approx(near**2 / 2, abs=1e-9)
    some = umbrella(bonds, [0.0, centre], 1.0, period=(None, 2 * np.pi))
    both = float(some.of(jnp.array([9.0, at])))
    assert both == pytest.approx(40.5 + near**2 / 2, abs=1e-9)


def test_period_x_gradient():
    bias = umbrella(angle, 3.0, 1.0, period=2 * np.pi)
    np.testing.assert_allclose(jax.grad(bias.of)(-3.0), 2 * np.pi - 6)


def test_hills_x_by_hand():
    """Two variables, one of them periodic; what is in free slots does not count."""
    centres, widths = np.array([[0.9, 0.2], [1.1, -3.0], [1.0, 3.0]]), (0.1, 0.5)
    cv = lambda r, cell=None: jnp.stack([r[0, 0], r[0, 1]])
    kT, g, w = 0.1, 5.0, 0.3
    bias = metadynamics(cv, w, widths, kT=kT, bias_factor=g, period=(None, 2 * np.pi))
    hills = bias.start(jnp.zeros((1, 3)), capacity=8)

    def value(s, heights):
        d = s - centres[: len(heights)]
        d[:, 1] -= 2 * np.pi * np.round(d[:, 1] / (2 * np.pi))
        return (heights * np.exp(-((d / widths) ** 2).sum(1) / 2)).sum()

    heights = []
    for c in centres:
        heights.append(w * np.exp(-value(c, heights) / ((g - 1) * kT)))
        hills = jax.jit(bias.deposit)(hills, jnp.array([[*c, 0.0]]))
    assert int(hills.count) == 3 and int(hills.refused) == 0 and heights[2] < w - 1e-3
    np.testing.assert_allclose(hills.heights[:3], heights)
    assert not hills.heights[3:].any()
    grid = np.array([[1.0, 3.1], [0.9, 0.0], [0.0, 0.0]])
    wanted = np.array([value(s, heights) for s in grid])
    for s, v in zip(grid, wanted, strict=True):
        np.testing.assert_allclose(bias(jnp.array([[*s, 0.0]]), hills=hills), v)
    F = -g / (g - 1) * wanted
    np.testing.assert_allclose(bias.free_energy(hills, grid), F - F.min())
    plain = metadynamics(cv, w, widths, period=(None, 2 * np.pi))
    np.testing.assert_allclose(plain.free_energy(hills, grid), wanted.max() - wanted)
    np.testing.assert_allclose(plain.deposit(hills, jnp.zeros((1, 3))).heights[3], w)


def test_full_slots():
    """In jit a refused hill is counted, and all stays finite; outside it is an error."""
    bias, r = metadynamics(along, 0.1, 0.2), particle(0.3)
    hills = bias.start(r, capacity=2)
    fill = jax.jit(lambda h: jax.lax.scan(lambda h, _: (bias.deposit(h, r), None), h, length=5)[0])
    full = fill(hills)
    assert int(full.count) == 2 and int(full.refused) == 3
    assert float((well + bias)(r, hills=full)) == pytest.approx(float(well(r)) + 0.2)
    text = "a free slot for each hill among 2, got {} hills refused; .*grown"
    for call, n in (
        (lambda: bias.check(full), 3),
        (lambda: bias.free_energy(full, jnp.zeros(1)), 3),
        (lambda: bias.check(jax.tree.map(lambda a, b: jnp.stack([a, b]), hills, full)), 3),
        (lambda: bias.deposit(bias.deposit(bias.deposit(hills, r), r), r), 0),
    ):
        with pytest.raises(ValueError, match=text.format(n)):
            call()
    assert np.isnan(jax.jit(lambda h: bias.free_energy(h, jnp.zeros(1)))(full)).all()
    bias.check(hills)
    more = bias.grown(fill(bias.grown(hills, 2)), 4)
    assert int(bias.deposit(more, r).count) == 3 and more.centres.shape == (4,)


@pytest.mark.parametrize("lane", ["ffi", "host"])
def test_torch_potential_in_a_jitted_metadynamics_run(lane):
    """Lennard-Jones atoms in torch, hills on a distance: one torch call a step, and the hills are
    those of the same run with jax-md's own energy."""
    cv = lambda r, cell: jnp.linalg.norm(r[1] - r[0])
    bias = metadynamics(cv, 0.2, 0.1)
    periodic = space.periodic_general(BOX)[1]
    box = BOX.T

    def run(energy_fn):
        init, step = simulate.nve(energy_fn, periodic, 2**-7)

        def cycle(carry, _):
            state, hills = carry
            state = jax.lax.fori_loop(0, 5, lambda _, s: step(s, hills=hills), state)
            return (state, bias.deposit(hills, state.position @ BOX.T, box)), None

        def whole(key):
            hills = bias.start(R @ BOX.T, box, capacity=6)
            state = init(key, R, kT=0.2, hills=hills)
            return jax.lax.scan(cycle, (state, hills), length=6)[0]

        return jax.jit(whole)

    (state, hills), calls = counted(run(engine.energy(potential(lane=lane) + bias, BOX)), KEY)
    assert calls == 31 * [1]
    assert int(hills.count) == 6 and np.ptp(hills.centres) > 1e-3

    def twin(R, hills, **kwargs):  # the bias by hand, beside the unbiased energy
        r = R @ BOX.T + jax.lax.stop_gradient(0 * R)
        return ours(lane)(R) + engine.energy(lambda r, cell: bias(r, cell, hills=hills), BOX)(R)

    other, _ = run(twin)(KEY)
    np.testing.assert_allclose(state.position, other.position, atol=1e-9)
    assert abs(hills.centres - jnp.linalg.norm(R[1] - R[0])).max() > 1e-3


def test_hills_x_neighbour_list():
    """Keywords of a bias reach it beside the edges of a list, and a list that is too narrow is
    refused as without one."""
    cv = lambda r, cell: jnp.linalg.norm(r[1] - r[0])
    bias = metadynamics(cv, 0.2, 0.1)
    find = partition.neighbor_list(
        space.periodic_general(BOX)[0],
        BOX,
        LJ["r_cutoff"],
        0.05,
        format=partition.Sparse,
        fractional_coordinates=True,
    )
    hills = bias.deposit(bias.start(R, capacity=3), R @ BOX.T, BOX.T)
    energy_fn = engine.energy(potential() + bias, BOX)
    found = energy_fn(R, neighbor=find.allocate(R), hills=hills)
    np.testing.assert_allclose(found, ours()(R) + 0.2)
    with pytest.raises(TypeError, match="hills in the call, which Metadynamics needs, got none"):
        energy_fn(R)


def test_npt_x_bias_on_the_volume():
    """One evaluation a step, and a virial with the bias in it."""
    volume = lambda r, cell: jnp.linalg.det(cell)
    total = potential() + umbrella(volume, 30.0, 0.5)
    init, step = engine.npt_nose_hoover(
        engine.energy(total, BOX), space.periodic_general(BOX)[1], 2**-8, 0.0, 0.1
    )
    state = jax.block_until_ready(init(KEY, R, BOX))
    (virial, v0) = (state.virial, jnp.linalg.det(BOX))
    plain = engine.npt_nose_hoover(ours(), space.periodic_general(BOX)[1], 2**-8, 0.0, 0.1)[0]
    without = plain(KEY, R, BOX).virial
    np.testing.assert_allclose(virial - without, 0.5 * (v0 - 30) * v0 * np.eye(3), atol=1e-8)
    _, calls = counted(step, state)
    assert calls == [1]


# tests compile without optimisation, and these run for long
FAST = {"xla_backend_optimization_level": 3}
GRID = np.linspace(-1.1, 1.1, 23)


def test_free_energy_x_umbrella_windows():
    """17 windows in 8 independent sets; the bound is by the spread of the sets."""
    sets = 8

    @partial(jax.jit, compiler_options=FAST)
    @partial(jax.vmap, in_axes=(0, None))
    @jax.vmap
    def sampled(key, centre):
        energy = well + umbrella(along, centre, STIFFNESS)
        return langevin(energy, 450, 10, along)(key, particle(centre))

    keys = jax.random.split(jax.random.key(1), (sets, len(CENTRES)))
    samples = np.asarray(sampled(keys, jnp.asarray(CENTRES)))[:, :, 50:]
    found = [histograms_put_together(one) for one in samples]
    xs, inner = found[0][0], slice(20, 160)  # |x| < 1.4
    F = coarse(np.array([F[inner] for _, F in found]))
    wanted = coarse(exact(xs)[inner])
    deviations, errors = in_errors(F, wanted)
    assert errors.max() < 0.02 < 0.8 < np.ptp(wanted)
    assert abs(deviations).max() < 5 and (deviations**2).mean() < 3


def metadynamics_runs(bias, hills, samples):
    """16 runs of so many hills, and then of samples under the hills as they are: (hills, x, bias)."""
    init, step = simulate.nvt_langevin(well + bias, space.free()[1], 0.05, KT, 1.0)

    @partial(jax.jit, compiler_options=FAST)
    @jax.vmap
    def run(key):
        def cycle(carry, _):
            state, hills = carry
            state = jax.lax.fori_loop(0, 30, lambda _, s: step(s, hills=hills), state)
            return (state, bias.deposit(hills, state.position)), None

        start = bias.start(particle(-1.0), capacity=hills)
        state = init(key, particle(-1.0), mass=1.0, hills=start)
        state, found = jax.lax.scan(cycle, (state, start), length=hills)[0]

        def sample(state, _):
            state = jax.lax.fori_loop(0, 10, lambda _, s: step(s, hills=found), state)
            return state, (along(state.position), bias(state.position, hills=found))

        return found, *jax.lax.scan(sample, state, length=samples)[1]

    return run(jax.random.split(jax.random.key(5), 16))


def by_the_hills(bias, hills):
    """Deviations of the hills' own estimate in errors, and these, of which 0.04 eV is a fifth of
    kT."""
    bias.check(hills)
    F = np.asarray(jax.vmap(lambda h: bias.free_energy(h, GRID))(hills))
    wanted = exact(GRID)
    assert np.ptp(wanted) > 0.6
    return in_errors(F - F.mean(1, keepdims=True), wanted - wanted.mean())


def test_free_energy_x_metadynamics():
    """The bound is by the spread of independent runs."""
    bias = metadynamics(along, 0.02, 0.1)
    deviations, errors = by_the_hills(bias, metadynamics_runs(bias, 800, 1)[0])
    assert abs(deviations).max() < 4 and errors.max() < 0.04


def test_free_energy_x_well_tempered():
    """By the hills; and by samples under hills that stay, which are reweighted."""
    bias = metadynamics(along, 0.02, 0.15, kT=KT, bias_factor=12.0)
    hills, x, value = map(jax.device_get, metadynamics_runs(bias, 600, 4000))
    deviations, errors = by_the_hills(bias, hills)
    assert abs(deviations).max() < 4 and errors.max() < 0.04
    bins = np.linspace(-1.155, 1.155, 22)
    weighted = np.array(
        [np.histogram(a, bins, weights=np.exp(b / KT))[0] for a, b in zip(x, value, strict=True)]
    )
    F = -KT * np.log(weighted)
    fine = np.linspace(bins[0], bins[-1], 10 * 21 + 1)
    deviations, errors = in_errors(
        F - F.mean(1, keepdims=True), coarse(exact((fine[1:] + fine[:-1]) / 2))
    )
    assert abs(deviations).max() < 4 and errors.max() < 0.03


FLAT = lambda r, cell=None, **_: (r**2).sum()
ONE = umbrella(along, 0.0, 1.0)
HILLS = metadynamics(along, 0.1, 0.1)


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda: umbrella(along, 0.0, 0.0), ValueError, "a positive stiffness, got 0.0"),
        (lambda: umbrella(along, 0.0, np.nan), ValueError, "a positive stiffness, got nan"),
        (lambda: umbrella(along, 0.0, 1.0, period=0.0), ValueError, "a positive period, got 0.0"),
        (lambda: umbrella(along, 0.0, 1.0, period=()), ValueError, "a positive period"),
        (lambda: umbrella(along, [0.0, 1.0], 1.0)(particle(0)), ValueError, r"an umbrella of variables float64\[\], got centre float64\[2\]"),
        (lambda: umbrella(bonds, 0.0, 1.0)(AT_REST), ValueError, r"an umbrella of variables float64\[2\], got centre float64\[\]"),
        (lambda: umbrella(bonds, [0.0, 1.0], [1.0])(AT_REST), ValueError, r"stiffness float64\[1\]"),
        (lambda: umbrella(bonds, [0.0, 1.0], 1.0, period=(1.0, 2.0, 3.0))(AT_REST), ValueError, "2 periods, got 3"),
        (lambda: umbrella(lambda r, h: r, 0.0, 1.0)(AT_REST), ValueError, r"collective variables as float\[\] or float\[K\], got float64\[3,3\]"),
        (lambda: umbrella(lambda r, h: r[0, 0] > 0, 0.0, 1.0)(particle(0)), ValueError, r"got bool\[\]"),
        (lambda: Bias().of(0.0), NotImplementedError, r"of\(s\) of Bias"),
        (lambda: ((lambda r, cell: r[:, 0]) + ONE)(AT_REST), ValueError, r"a scalar energy to add a bias to, got float64\[3\]"),
        (lambda: (FLAT + umbrella(lambda r, h: r[0, 0].astype("float32"), 0.0, 1.0))(particle(0)), ValueError, "a bias as float64, as the energy, got float32"),
        (lambda: FLAT + HILLS + HILLS, ValueError, "biases with keywords of their own, got hills in two"),
        (lambda: (FLAT + HILLS)(particle(0)), TypeError, "hills in the call"),
        (lambda: (FLAT + HILLS)(particle(0), hills=None), TypeError, "hills in the call"),
        (lambda: 1 + ONE, TypeError, "unsupported operand"),
        (lambda: (FLAT + ONE) + 1, TypeError, "unsupported operand"),
        (lambda: metadynamics(along, -0.1, 0.1), ValueError, "a positive height of hills, got -0.1"),
        (lambda: metadynamics(along, 0.1, [0.1, 0.0]), ValueError, "a positive width of hills"),
        (lambda: metadynamics(along, 0.1, 0.1, kT=0.0, bias_factor=2.0), ValueError, "a positive kT of hills"),
        (lambda: metadynamics(along, 0.1, 0.1, kT=0.1), ValueError, "kT with bias_factor, got kT=0.1, bias_factor=None"),
        (lambda: metadynamics(along, 0.1, 0.1, kT=0.1, bias_factor=1.0), ValueError, "a bias factor above 1, got 1.0"),
        (lambda: HILLS.start(particle(0), capacity=0), ValueError, "a positive number of slots for hills, got 0"),
        (lambda: metadynamics(along, 0.1, [0.1, 0.2]).start(particle(0), capacity=1), ValueError, "1 widths of hills, got 2"),
        (lambda: HILLS.of(jnp.ones(2), hills=HILLS.start(particle(0), capacity=1)), ValueError, r"variables float64\[\], as the hills have them, got float64\[2\]"),
        (lambda: HILLS.grown(HILLS.start(particle(0), capacity=3), 2), ValueError, "at least 3 slots for hills, got 2"),
        (lambda: jax.jit(HILLS.check)(HILLS.start(particle(0), capacity=3)), TypeError, "hills with values, got ones that jit traces"),
    ],
)  # fmt: skip
def test_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_two_metadynamics_by_name():
    other = metadynamics(lambda r, cell: r[0, 1], 0.2, 0.1, name="more")
    total, r = FLAT + HILLS + other, particle(0.0)
    assert total.keywords == ("hills", "more")
    one, two = (b.deposit(b.start(r, capacity=2), r) for b in (HILLS, other))
    np.testing.assert_allclose(total(r, hills=one, more=two), FLAT(r) + 0.3)
