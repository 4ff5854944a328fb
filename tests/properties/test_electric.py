"""jax_side.properties.electric against formulas by hand, finite differences of mace-torch's own
calculator, and ASE's Infrared."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.constants
from ase import Atoms
from ase.vibrations import Infrared

import bridge
from bridge.card import Card
from jax_side.potentials.potential import potential
from jax_side.properties import electric
from jax_side.properties.electric import born_charges, dipole, infrared, polarisability
from tests.electric_cases import (
    AT_REST,
    FIELD,
    MASSES,
    MODEL,
    NUMBERS,
    OFF,
    TURN,
    TWIN,
    born_by_hand,
    bridged,
    polarisability_by_hand,
)
from torch_side.engines import ase as torch_ase

ENERGIES = {"ffi": bridged("ffi"), "host": bridged("host"), "jax": TWIN}
FIELDS = {  # a field is outside of the contract that batched="graph" knows
    lane: bridged(lane, batched="sequential") for lane in ("ffi", "host")
} | {"jax": TWIN}
SPECTRUM = jax.jit(lambda r: infrared(TWIN, r, None, MASSES))
R = jnp.asarray(OFF)


@pytest.mark.parametrize("name", ENERGIES)
def test_born_charges_x_by_hand(name):
    mu = dipole(ENERGIES[name])
    found = jax.jit(lambda r: born_charges(mu, r))(R)
    wanted = born_by_hand(OFF)
    assert abs(wanted - wanted.transpose(0, 2, 1)).max() > 0.01  # the order of axes matters
    np.testing.assert_allclose(found.charges, wanted, atol=1e-12)
    np.testing.assert_allclose(found.excess, 0, atol=1e-12)


def test_born_charges_x_vmap_and_float32():
    mu, several = dipole(FIELDS["ffi"]), jnp.stack([R, R @ TURN, R + 1])
    found = jax.vmap(lambda r: born_charges(mu, r).charges)(several)
    np.testing.assert_allclose(found, [*map(born_by_hand, np.asarray(several))], atol=1e-12)
    single = born_charges(mu, R.astype("float32")).charges
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, found[0], atol=1e-5)


def test_born_charges_x_native_lane():
    found = born_charges(dipole(bridged("native")), R).charges
    np.testing.assert_allclose(found, born_by_hand(OFF), atol=1e-12)


def test_born_charges_x_mace_calculator():
    """Central differences of the dipoles that MACE's own calculator gives."""
    from tests.models.test_mace_values import SYSTEMS, given, model

    atoms, _ = given(SYSTEMS["water"], "dipoles")
    energy = bridge.potential(model("dipoles"), atomic_numbers=atoms.numbers, outputs=("dipole",))
    mu = dipole(energy)
    found = born_charges(mu, atoms.positions)
    debye = 1e-11 / scipy.constants.c / scipy.constants.e
    wanted, h = np.zeros((len(atoms), 3, 3)), 1e-3
    for i, a in np.ndindex(len(atoms), 3):
        ends = []
        for way in (h, -h):
            moved = atoms.copy()
            moved.positions[i, a] += way
            moved.calc = atoms.calc
            ends.append(moved.get_dipole_moment() * debye)
        wanted[i, a] = (ends[0] - ends[1]) / (2 * h)
    assert abs(wanted).max() > 1e-3
    np.testing.assert_allclose(found.charges, wanted, atol=1e-6 * abs(wanted).max() + 1e-9)
    np.testing.assert_allclose(found.excess, found.charges.sum(0), atol=1e-12)


@pytest.mark.parametrize("charge", [0.0, 1.0])
def test_sum_rule_x_ions(charge):
    """An ion of charges 1.5 and -0.5 keeps the rule for the charge 1, and breaks it for 0."""
    q = jnp.array([1.5, -0.5])
    mu = lambda r, cell: q @ r
    plain = born_charges(mu, R[:2], charge=charge)
    np.testing.assert_allclose(plain.excess, (1 - charge) * np.eye(3), atol=1e-14)
    np.testing.assert_allclose(plain.charges[:, 2, 2], q)
    ruled = born_charges(mu, R[:2], sum_rule=True, charge=charge)
    np.testing.assert_allclose(ruled.excess, plain.excess)
    np.testing.assert_allclose(ruled.charges.sum(0), charge * np.eye(3), atol=1e-14)


def test_born_charges_x_crystal():
    """A dipole with charges that depend on distances to images: derivatives are periodic though the
    dipole is not."""
    cell = jnp.diag(jnp.array([3.0, 3.5, 4.0]))
    q = jnp.array([1.0, -1.0])

    def mu(r, h):
        s = (r[1] - r[0]) @ jnp.linalg.inv(h)
        flow = 0.1 * jnp.sin(2 * jnp.pi * s) / (2 * jnp.pi) @ h
        return q @ r + flow

    r = jnp.array([[0.1, 0.2, 0.3], [1.3, 1.9, 2.2]])
    charges = jax.jit(lambda r: born_charges(mu, r, cell))
    found, moved = charges(r), charges(r.at[1].add(cell[0]))
    np.testing.assert_allclose(found.charges, moved.charges, atol=1e-12)
    np.testing.assert_allclose(found.excess, 0, atol=1e-12)
    assert abs(found.charges[0, 0, 0] - 1) > 0.01


@pytest.mark.parametrize("by", ["output", "field"])
@pytest.mark.parametrize("name", FIELDS)
def test_polarisability_x_by_hand(name, by):
    wanted = polarisability_by_hand(OFF)
    ways = [{}, {"field": FIELD}, {"step": 1e-3}]
    found = jax.jit(lambda r: [polarisability(FIELDS[name], r, by=by, **way) for way in ways])(R)
    for alpha, tolerance in zip(found, (1e-12, 1e-12, 1e-10), strict=True):
        np.testing.assert_allclose(alpha, wanted, atol=tolerance)
    assert np.ptp(np.linalg.eigvalsh(wanted)) > 0.01


def test_polarisability_x_without_jit():
    found = polarisability(FIELDS["ffi"], R)
    np.testing.assert_allclose(found, polarisability_by_hand(OFF), atol=1e-12)


@pytest.mark.parametrize("name", FIELDS)
def test_dipole_x_field(name):
    """-dE/dF is the dipole that the model gives, without and with a field; and so are its Born
    charges."""
    energy = FIELDS[name]
    for field in (None, FIELD):
        given = {} if field is None else {"field": jnp.asarray(field)[None]}
        of_output = dipole(energy, **given)
        of_field = dipole(energy, by="field", **({} if field is None else {"field": field}))
        mus = (of_output, of_field)
        one, other = jax.jit(lambda r: [(mu(r), born_charges(mu, r).charges) for mu in mus])(R)
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-12), one, other)
    assert abs(dipole(energy)(R) - one[0]).max() > 1e-3


def test_constants_x_scipy():
    c = scipy.constants
    amu, angstrom = c.physical_constants["atomic mass constant"][0], 1e-10
    per_mol = c.N_A * c.e**2 / amu / (12 * c.epsilon_0 * c.c**2) / 1e3
    assert pytest.approx(per_mol, rel=1e-8) == electric.KM_PER_MOL
    volume = c.e / (4 * np.pi * c.epsilon_0) / angstrom
    assert pytest.approx(volume, rel=1e-8) == electric.ANGSTROM3
    debye = 1e-21 / c.c / (c.e * angstrom)
    assert electric.KM_PER_MOL * debye**2 == pytest.approx(42.256, abs=1e-3)


def test_infrared_x_ase(tmp_path):
    """ASE's own finite differences, of the same model as a calculator."""
    atoms = Atoms(NUMBERS, AT_REST, masses=MASSES)
    atoms.calc = torch_ase.calculator(MODEL.asking("dipole"))
    theirs = Infrared(atoms, name=str(tmp_path / "ir"), delta=1e-3)
    theirs.run()
    theirs.read()
    mine = jax.jit(lambda r: infrared(ENERGIES["ffi"], r, None, MASSES))(AT_REST)
    wanted = np.real(theirs.get_frequencies())
    np.testing.assert_allclose(mine.frequencies[6:], wanted[6:], rtol=1e-4)
    debye2 = (1e-21 / scipy.constants.c / (scipy.constants.e * 1e-10)) ** 2
    np.testing.assert_allclose(mine.strengths[6:] / debye2, theirs.intensities[6:], rtol=1e-3)
    assert theirs.intensity_prefactor("km/mol")[0] == pytest.approx(
        electric.KM_PER_MOL * debye2, rel=1e-4
    )
    assert (np.asarray(mine.intensities[6:]) > 1).all()


def test_infrared_x_finite_differences_of_the_dipole():
    mine = SPECTRUM(AT_REST)
    mu, h = jax.jit(dipole(TWIN)), 1e-4
    for mode, strength in zip(mine.modes, mine.strengths, strict=True):
        slope = (mu(AT_REST + h * mode) - mu(AT_REST - h * mode)) / (2 * h)
        np.testing.assert_allclose((slope**2).sum(), strength, atol=1e-8)
    mass = np.einsum("kia,i,lia->kl", mine.modes, MASSES, mine.modes)
    np.testing.assert_allclose(mass, np.eye(9), atol=1e-12)


def test_infrared_x_diatomic():
    """One bond of stiffness k and charges q (1 + x): frequency and strength by hand."""
    k, q, m = 30.0, 0.7, np.array([1.0, 35.0])
    energy = lambda r, cell: k / 2 * (jnp.linalg.norm(r[1] - r[0]) - 1) ** 2
    mu = lambda r, cell: q * (r[1] - r[0]) * (1 + 0.5 * (jnp.linalg.norm(r[1] - r[0]) - 1))
    r = jnp.array([[0.0, 0, 0], [0, 0, 1]])
    found = jax.jit(lambda r: infrared(energy, r, None, m, mu=mu))(r)
    reduced = m.prod() / m.sum()
    hertz = np.sqrt(k * scipy.constants.e / 1e-20 / reduced / scipy.constants.atomic_mass)
    assert found.frequencies[-1] == pytest.approx(hertz / (2 * np.pi * scipy.constants.c * 100))
    assert found.strengths[-1] == pytest.approx((1.5 * q) ** 2 / reduced)
    assert found.intensities[-1] == pytest.approx(electric.KM_PER_MOL * (1.5 * q) ** 2 / reduced)


def test_infrared_x_turned():
    straight, turned = map(SPECTRUM, (AT_REST, AT_REST @ TURN))
    np.testing.assert_allclose(straight.intensities[6:], turned.intensities[6:], rtol=1e-8)


SPRING = lambda x: {"energy": (x["pos"] ** 2).sum().reshape(1)}
NO_DIPOLE = bridge.potential(SPRING, atomic_numbers=NUMBERS, gradients="autograd")
UNASKED = bridge.potential(MODEL, atomic_numbers=NUMBERS)
PURE = potential(lambda x: {"energy": (x["pos"] ** 2).sum()[None]}, atomic_numbers=NUMBERS)
DEAF = potential(
    lambda x: {"energy": jnp.zeros(1), "dipole": x["pos"].sum(0)[None]}, atomic_numbers=NUMBERS
)
TWO = potential(lambda x: {}, atomic_numbers=NUMBERS, batch=np.array([0, 0, 1]), n_systems=2)


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda: dipole(NO_DIPOLE), ValueError, "a dipole among the outputs of .*outputs=\\(\"dipole\",\\)"),
        (lambda: dipole(UNASKED)(R), ValueError, "a dipole among the outputs of .*, got only .*energy"),
        (lambda: dipole(PURE)(R), ValueError, "a dipole among the outputs of .*, got only energy"),
        (lambda: infrared(NO_DIPOLE, R, None, MASSES), ValueError, "a dipole among the outputs"),
        (lambda: dipole(lambda r, cell: r), TypeError, "a potential, whose outputs hold a dipole, got <lambda>"),
        (lambda: infrared(lambda r, cell: r.sum(), R, None, MASSES), TypeError, "a potential, whose outputs hold"),
        (lambda: dipole(TWO), ValueError, "one system for a dipole, got 2 of them"),
        (lambda: dipole(TWIN, by="charges"), ValueError, "by as one of"),
        (lambda: born_charges(lambda r, cell: r, R), ValueError, r"a dipole as \[3\], got float64\[3,3\]"),
        (lambda: born_charges(dipole(TWIN), R[0]), ValueError, r"positions as \[N, 3\]"),
        (lambda: polarisability(DEAF, R), ValueError, "a dipole that changes with the field"),
        (lambda: polarisability(DEAF, R, step=1e-3), ValueError, "a dipole that changes with the field"),
        (lambda: born_charges(dipole(DEAF, by="field"), R), ValueError, "a dipole that changes with atoms"),
        (lambda: infrared(DEAF, R, None, MASSES, mu=dipole(DEAF, by="field")), ValueError, "changes with atoms"),
        (lambda: infrared(TWIN, R, None, -MASSES), ValueError, r"masses as \[3\], positive"),
        (lambda: polarisability(TWIN, R, step=0.0), ValueError, "a positive step of the field, got 0.0"),
        (lambda: polarisability(TWIN, R, field=jnp.ones(2)), ValueError, r"a field as \[3\]"),
        (lambda: infrared(TWIN, R, None, MASSES[:2]), ValueError, r"masses as \[3\]"),
    ],
)  # fmt: skip
def test_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_a_field_that_is_passed_over_x_jit():
    assert np.isnan(jax.jit(lambda r: polarisability(DEAF, r))(R)).all()
    charges = jax.jit(lambda r: born_charges(dipole(DEAF, by="field"), r).charges)
    assert np.isnan(charges(R)).all()
    still = born_charges(
        lambda r, cell: jnp.zeros(3), R
    ).charges  # one's own dipole: one's own word
    assert not still.any()


def test_a_card_without_a_field_is_refused(monkeypatch):
    """As it will be once the contract has a field."""
    monkeypatch.setattr(Card, "unused", lambda self, given: [n for n in given if n == "field"])
    expected = "a field among the inputs of .*, got a card without"
    for call in (lambda: polarisability(TWIN, R), lambda: dipole(TWIN, by="field")):
        with pytest.raises(ValueError, match=expected):
            call()
