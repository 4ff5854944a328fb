"""Frozen atoms: no gradient and no rows of the Hessian; integrators and minimisers of jax-md leave
them where they are, with the physics of what moves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax_md import minimize, partition, quantity, simulate, space

from jax_side.engines import jax_md as engine
from jax_side.potentials.bias import umbrella
from jax_side.potentials.frozen import freeze, held
from jax_side.potentials.second import hessian
from tests.jax_md_cases import BOX, KEY, LJ, SHIFT, R, ours, potential, scan

MASK = np.arange(len(R)) % 3 == 0
POSITIONS, CELL = R @ BOX.T, BOX.T
ENERGIES = {"ffi": lambda: potential(lane="ffi"), "host": lambda: potential(lane="host")}


@pytest.mark.parametrize("lane", ENERGIES)
def test_gradient_and_hessian_x_held(lane):
    energy = ENERGIES[lane]()
    some = held(energy, MASK)
    assert some.card is energy.card
    (value, g), (want, free) = (
        jax.jit(jax.value_and_grad(e))(POSITIONS, CELL) for e in (energy, some)
    )
    assert value == want
    np.testing.assert_array_equal(free[MASK], 0)
    np.testing.assert_allclose(free[~MASK], g[~MASK], atol=1e-12)
    H, F = (jax.jit(lambda r, e=e: hessian(e, r, CELL))(POSITIONS) for e in (energy, some))
    assert not F[MASK].any() and not F[:, :, MASK].any()
    np.testing.assert_allclose(F[~MASK][:, :, ~MASK], H[~MASK][:, :, ~MASK], atol=1e-10)


@settings(max_examples=5)
@given(mask=st.lists(st.booleans(), min_size=5, max_size=5).filter(lambda m: not all(m)))
def test_any_mask_x_energy_of_the_others(mask):
    """held, freeze and the rows of the whole gradient agree, under vmap, in float32."""
    r, mask = jnp.asarray(np.random.default_rng(1).normal(size=(5, 3)), "float32"), np.array(mask)
    energy = lambda r, cell=None: jnp.sin(r[1:] * r[:-1]).sum() + (r**3).sum()
    atoms = freeze(r, mask)

    @jax.jit
    def gradients(r):
        mobile = jax.vmap(jax.grad(atoms.energy(energy)))(jnp.stack([atoms.mobile(r)] * 2))
        return jax.grad(energy)(r), jax.grad(held(energy, mask))(r), mobile[1]

    g, zeroed, mobile = gradients(r)
    np.testing.assert_allclose(mobile, g[~mask], rtol=1e-5)
    np.testing.assert_allclose(zeroed, np.where(mask[:, None], 0, g), rtol=1e-5)
    np.testing.assert_array_equal(atoms.whole(atoms.mobile(r)), r)


def test_fire():
    """Held atoms don't move, to the bit; the others come to rest, as they do alone."""
    atoms, ends = freeze(R, MASK, fractional=True), []
    alone = atoms.energy(ours()), atoms.mobile(R)
    for f, r in (alone, (engine.energy(held(potential(), MASK), BOX), R)):
        init, step = minimize.fire_descent(f, SHIFT, 2**-6, 2**-4)
        ends.append(scan(step, 40)(init(r))[0])
    np.testing.assert_allclose(ends[0].position, atoms.mobile(ends[1].position), atol=1e-9)
    np.testing.assert_array_equal(ends[1].position[MASK], R[MASK])
    assert not ends[1].force[MASK].any()
    assert abs(ends[1].force).max() < 0.3 * abs(quantity.force(ours())(R)[~MASK]).max()


KT, HOME = 0.05, np.random.default_rng(2).uniform(0.3, 0.7, (7, 3))
FEW = np.arange(7) < 3
SIMULATORS = {
    "nve": lambda f: simulate.nve(f, SHIFT, 2**-6),
    "nvt_nose_hoover": lambda f: simulate.nvt_nose_hoover(f, SHIFT, 2**-6, KT),
    "nvt_langevin": lambda f: simulate.nvt_langevin(f, SHIFT, 2**-6, KT),
    "brownian": lambda f: simulate.brownian(f, SHIFT, 2**-10, KT),
    "npt": lambda f: engine.npt_nose_hoover(f, SHIFT, 2**-6, 0.0, KT),
}


@pytest.mark.parametrize("name", SIMULATORS)
def test_simulators_x_freeze(name):
    springs = engine.energy(lambda r, cell: ((r[1:] - r[:-1]) ** 2).sum() + cell.trace() ** 2, BOX)
    atoms = freeze(HOME, FEW, fractional=True)
    init, step = SIMULATORS[name](atoms.energy(springs))
    given = {"kT": KT} if name == "nve" else {}
    box = (BOX,) if name == "npt" else ()
    state, _ = scan(step, 20)(init(KEY, atoms.mobile(HOME), *box, mass=1.0, **given))
    whole = atoms.whole(state.position)
    np.testing.assert_array_equal(whole[FEW], HOME[FEW])
    assert np.isfinite(state.position).all()
    assert (abs(whole - HOME)[~FEW].max(1) > 0).all()
    if name == "nvt_nose_hoover":
        assert state.chain.degrees_of_freedom == 12
    if name == "npt":
        assert abs(state.box - BOX).max() > 1e-5


def test_energy_is_conserved():
    atoms = freeze(R, MASK, fractional=True)
    init, step = engine.observed(simulate.nve, atoms.energy(ours()), SHIFT, 2**-9)

    def total(state, e):
        return e + (state.momentum**2).sum() / 2

    state, e = init(KEY, atoms.mobile(R), kT=KT, mass=1.0)
    _, totals = jax.jit(
        lambda s: jax.lax.scan(lambda s, _: (lambda s, e: (s, total(s, e)))(*step(s)), s, length=50)
    )(state)
    assert abs(totals - total(state, e)).max() < 1e-3 * (state.momentum**2).sum()


def test_neighbour_lists():
    """The list is of all atoms, the energy of what moves."""
    find = partition.neighbor_list(
        space.periodic_general(BOX)[0],
        BOX,
        LJ["r_cutoff"],
        0.05,
        format=partition.Sparse,
        fractional_coordinates=True,
    )
    atoms, listed = freeze(R, MASK, fractional=True), find.allocate(R)
    energy_fn = atoms.energy(ours())
    with_list = energy_fn(atoms.mobile(R), neighbor=listed)
    np.testing.assert_allclose(with_list, energy_fn(atoms.mobile(R)), rtol=1e-10)


def test_a_bias_on_held_atoms():
    cv = lambda r, cell: jnp.linalg.norm(r[1] - r[0])
    total = held(potential() + umbrella(cv, 0.5, 2.0), MASK)
    g, plain = (jax.grad(e)(POSITIONS, CELL) for e in (total, potential()))
    assert not g[0].any() and abs(g[1] - plain[1]).max() > 0.1 and MASK[0] and not MASK[1]


FREE = lambda r, cell=None, perturbation=None: (r**2).sum()
TRACED = lambda: jax.jit(lambda m: held(FREE, m)(jnp.ones((2, 3))))(jnp.array([True, False]))


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda: held(FREE, np.array([1, 0])), ValueError, r"a mask of frozen atoms, bool\[N\], got int64\[2\]"),
        (lambda: held(FREE, np.ones((2, 3), bool)), ValueError, r"bool\[N\], got bool\[2,3\]"),
        (lambda: freeze(jnp.ones((2, 3)), [0.0, 1.0]), ValueError, r"got float64\[2\]"),
        (lambda: held(FREE, np.ones(4, bool)), ValueError, "a mask with an atom that moves, got 4 frozen"),
        (lambda: held(FREE, np.ones(0, bool)), ValueError, "a mask with an atom that moves, got 0 frozen"),
        (TRACED, ValueError, "a mask of frozen atoms with values, got one that is traced"),
        (lambda: held(FREE, np.array([True, False]))(jnp.ones((3, 3))), ValueError, r"positions of the 2 atoms of the mask, float64\[2,3\], got float64\[3,3\]"),
        (lambda: freeze(jnp.ones((3, 3)), np.array([True, False])), ValueError, "positions of the 2 atoms"),
        (lambda: freeze(R, MASK).whole(R), ValueError, rf"positions of the atoms that move, float64\[{(~MASK).sum()},3\]"),
        (lambda: freeze(R, MASK).energy(FREE)(R), ValueError, "leave the frozen atoms out"),
        (lambda: freeze(R, MASK).whole(R[~MASK].astype("float32")), ValueError, "one dtype for frozen and mobile"),
        (lambda: freeze(R, MASK).mobile(np.ones(3)), ValueError, f"an array of {len(R)} rows"),
        (lambda: freeze(R, MASK).mobile(np.ones(())), ValueError, f"an array of {len(R)} rows"),
        (lambda: freeze(R, MASK).energy(FREE)(R[~MASK], perturbation=jnp.eye(3)), NotImplementedError, "frozen atoms at fractions of a box"),
    ],
)  # fmt: skip
def test_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_the_mask_is_copied():
    mask = np.array([True, False])
    energy = held(FREE, mask)
    mask[:] = True
    assert jax.grad(energy)(jnp.ones((2, 3)))[1].any()
