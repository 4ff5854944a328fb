"""jax_side.properties.thermal against phonopy, and against crystals whose expansion is known."""

from functools import cache

import ase.build
import numpy as np
import pytest
from phonopy import PhonopyQHA

from jax_side.engines.phonopy import phonopy as as_phonopy
from jax_side.properties.phonons import grid, phonons
from jax_side.properties.supercells import supercell
from jax_side.properties.thermal import (
    BOLTZMANN,
    PLANCK,
    expansion,
    harmonic,
    quasi_harmonic,
    scaled,
)
from tests.phonon_cases import CUTOFF, ENERGIES, arrays, crystal

T = np.array([0.0, 1.0, 50.0, 300.0, 1000.0])
EV = 0.01036426966  # eV in a kJ/mol


def test_one_oscillator_x_its_levels():
    """A sum over levels, and differences of its free energy."""
    f, levels = 2.5, np.arange(20000)[:, None]
    t = np.linspace(20.0, 900.0, 9)
    free = lambda t: (
        -BOLTZMANN * t * np.log(np.exp(-PLANCK * f * (levels + 0.5) / (BOLTZMANN * t)).sum(0))
    )
    found = harmonic([[f]], [1.0], t)
    np.testing.assert_allclose(found.free_energy, free(t), rtol=1e-9)
    h = 1e-2
    slope = -(free(t + h) - free(t - h)) / (2 * h)
    np.testing.assert_allclose(found.entropy, slope, rtol=1e-5, atol=1e-12)
    bent = -t * (free(t + h) - 2 * free(t) + free(t - h)) / h**2
    np.testing.assert_allclose(found.heat_capacity, bent, rtol=1e-4, atol=1e-10)


def test_limits():
    found = harmonic([[1e-3, 4.0, 9.0]], [1.0], [0.0, 1e6])
    np.testing.assert_allclose(found.free_energy[0], PLANCK * 13 / 2)
    np.testing.assert_allclose(found.entropy[0], 0)
    # Dulong and Petit; what is below the floor is left out
    np.testing.assert_allclose(found.heat_capacity, [0, 2 * BOLTZMANN], rtol=1e-6)


@cache
def at_scale(factor, kind="jax"):
    atoms = crystal()
    energy = ENERGIES[kind]((atoms * (3, 3, 3)).numbers)
    r, h = (x * factor for x in arrays(atoms))
    return energy, phonons(energy, r, h, atoms.get_masses(), (3, 3, 3), reach=CUTOFF)


MESH = (4, 4, 4)
FACTORS = np.array([0.985, 0.995, 1.005, 1.015, 1.025, 1.035])


def test_thermal_properties_x_phonopy():
    theirs = as_phonopy(at_scale(1.0)[1], crystal().numbers)
    theirs.run_mesh(MESH, is_gamma_center=True, is_mesh_symmetry=False)
    theirs.run_thermal_properties(temperatures=T, cutoff_frequency=0.01)
    want = theirs.get_thermal_properties_dict()
    q, weights = grid(MESH)
    found = harmonic(at_scale(1.0)[1].frequencies(q), weights, T)
    np.testing.assert_allclose(found.free_energy, want["free_energy"] * EV, rtol=1e-5)
    np.testing.assert_allclose(found.entropy, want["entropy"] * EV / 1e3, rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(
        found.heat_capacity, want["heat_capacity"] * EV / 1e3, rtol=1e-5, atol=1e-12
    )


@cache
def expanded(kind="jax", pressure=0.0):
    atoms = crystal()
    return expansion(
        at_scale(1.0, kind)[0],
        scaled(*arrays(atoms), FACTORS),
        atoms.get_masses(),
        (3, 3, 3),
        np.arange(0.0, 602.0, 2.0),
        mesh=MESH,
        pressure=pressure,
        reach=CUTOFF,
    )


def test_expansion_x_phonopys():
    found, atoms = expanded(), crystal()
    volumes, energies, f, s, c = [], [], [], [], []
    q, weights = grid(MESH)
    for factor in FACTORS:
        energy, at = at_scale(factor)
        volumes.append(np.linalg.det(at.cell))
        energies.append(float(energy(*supercell(at.positions, at.cell, at.repeats))) / 27)
        there = harmonic(at.frequencies(q), weights, found.temperatures)
        f.append(there.free_energy / EV)
        s.append(there.entropy / EV * 1e3)
        c.append(there.heat_capacity / EV * 1e3)
    theirs = PhonopyQHA(
        volumes=np.abs(volumes),
        electronic_energies=energies,
        eos="birch_murnaghan",
        temperatures=found.temperatures,
        free_energy=np.transpose(f),
        cv=np.transpose(c),
        entropy=np.transpose(s),
        t_max=600,
    )
    n = len(theirs.volume_temperature)
    np.testing.assert_allclose(found.volumes[:n], theirs.volume_temperature, rtol=1e-6)
    np.testing.assert_allclose(
        found.bulk_moduli[:n] * 160.2176634, theirs.bulk_modulus_temperature, rtol=1e-5
    )
    np.testing.assert_allclose(found.free_energies[:n], theirs.gibbs_temperature, atol=2e-7)
    # theirs is a difference over 2 K
    np.testing.assert_allclose(
        found.expansion[20:n], theirs.thermal_expansion[20:n], rtol=3e-3, atol=1e-8
    )
    assert 1e-5 < found.expansion[150] < 1e-3


def test_expansion_x_torch():
    for want, found in zip(expanded(), expanded("torch")):
        np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-12)


def test_identities():
    """Differences of what is returned, under a pressure too."""
    for pressure in (0.0, 0.01):
        at = expanded(pressure=pressure)
        t, middle = at.temperatures, slice(50, -10)  # below 100 K 2 K are much
        np.testing.assert_allclose(
            np.gradient(np.log(at.volumes), t)[middle], at.expansion[middle], rtol=2e-3, atol=1e-9
        )
        entropy = -np.gradient(at.free_energies, t)
        np.testing.assert_allclose(
            (t * np.gradient(entropy, t))[middle], at.heat_capacity_p[middle], rtol=5e-3, atol=1e-7
        )
    h = 1e-4
    volumes = [expanded(pressure=p).volumes for p in (-h, 0.0, h)]
    modulus = -volumes[1] * 2 * h / (volumes[2] - volumes[0])
    np.testing.assert_allclose(expanded().bulk_moduli, modulus, rtol=1e-4)


def test_a_crystal_of_known_expansion():
    """Frequencies that go as V^-g, far above their temperature: E(V) is Birch and Murnaghan's, so is
    F, and the thermodynamic Grueneisen parameter is g at every temperature."""
    g, f0, k, v0 = 2.0, 5.0, 0.5, 20.0
    v = np.linspace(17, 25, 9)
    x = (v0 / v) ** (2 / 3)
    e = 9 * v0 * k / 16 * ((x - 1) ** 3 * 1.0 + (x - 1) ** 2 * (6 - 4 * x))  # k' = 5
    f = f0 * (v / v0) ** -g
    t = np.array([100.0, 400.0])
    found = quasi_harmonic(v, e, np.repeat(f[:, None, None], 3, 2), [1.0], t)
    np.testing.assert_allclose(found.gruneisen, g, rtol=2e-3)
    # E' = -F_vib' at the volume in equilibrium, E' from its own formula
    h = 1e-4

    def slope(v):
        free = lambda v: (
            9
            * v0
            * k
            / 16
            * (
                ((v0 / v) ** (2 / 3) - 1) ** 3
                + ((v0 / v) ** (2 / 3) - 1) ** 2 * (6 - 4 * (v0 / v) ** (2 / 3))
            )
            + harmonic([3 * [f0 * (v / v0) ** -g]], [1.0], t).free_energy
        )
        return (free(v + h) - free(v - h)) / (2 * h)

    for i, volume in enumerate(found.volumes):
        assert abs(slope(volume)[i]) < 2e-6
    no_modes = quasi_harmonic(v, e, np.zeros((9, 1, 3)), [1.0], t)
    np.testing.assert_allclose(no_modes.volumes, v0, rtol=1e-9)
    np.testing.assert_allclose(no_modes.bulk_moduli, k, rtol=1e-9)
    np.testing.assert_allclose(no_modes.expansion, 0, atol=1e-12)
    assert np.isnan(no_modes.gruneisen).all()


V = np.linspace(18.0, 22.0, 5)
STATIC = 0.01 * (V - 20) ** 2
MODES = np.full((5, 1, 3), 3.0)
ERRORS = [
    (
        lambda: harmonic([[-2.0, 5.0]], [1.0], [300.0]),
        r"expected a stable crystal, with frequencies above -0.01 THz, got -2 THz; relax it",
    ),
    (
        lambda: scaled(np.zeros((1, 3)), np.eye(3), np.linspace(-0.01, 0.03, 5)),
        r"expected factors as \[K\], positive, got -0.01; give factors of lengths around 1",
    ),
    (lambda: scaled(np.zeros((1, 3)), np.eye(3), 1.0), r"factors as \[K\], positive, got float64"),
    (lambda: harmonic([[np.nan]], [1.0], [300.0]), "expected a stable crystal"),
    (lambda: harmonic([[1.0]], [1.0], [-1.0]), r"expected temperatures as \[T\], in K, got -1 K"),
    (lambda: harmonic([[1.0]], [1.0], 300.0), r"expected temperatures as \[T\], in K, got float64"),
    (
        lambda: quasi_harmonic(V[:3], STATIC[:3], MODES[:3], [1.0], [0.0]),
        r"expected at least 4 volumes, and an energy for each, got volumes float64\[3\]",
    ),
    (lambda: quasi_harmonic(V, STATIC[1:], MODES, [1.0], [0.0]), r"energies float64\[4\]"),
    (
        lambda: quasi_harmonic(V, (V - 25) ** 2, MODES, [1.0], [0.0, 10.0]),
        r"volumes on both sides of that in equilibrium at 0 K, got those from 18 to 22 .* add larger",
    ),
    (lambda: quasi_harmonic(V, (V - 15) ** 2, MODES, [1.0], [7.0]), "at 7 K, .* add smaller ones"),
    (
        lambda: quasi_harmonic(V, STATIC, MODES * (1 - 5 * (V > 21))[:, None, None], [1.0], [7.0]),
        "expected a stable crystal",
    ),
]


@pytest.mark.parametrize(("call", "text"), ERRORS)
def test_errors(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_structures_that_are_no_pairs():
    atoms = ase.build.bulk("Cu")
    with pytest.raises(TypeError, match=r"structures as pairs \(positions, cell\), got Atoms"):
        expansion(lambda r, h: (r**2).sum(), [atoms] * 4, [1.0], (1, 1, 1), [0.0])
