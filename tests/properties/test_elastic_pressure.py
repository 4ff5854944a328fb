"""jax_side.properties.elastic against finite differences along the pressure, and what is known of
cubic crystals."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bridge
from jax_side.potentials import second
from jax_side.properties import elastic
from tests.cases import close
from tests.phonon_cases import CUTOFF, Ions, arrays, crystal, jax_energy, torch_energy

PRESSURE = 0.03  # eV/Angstrom^3: 4.8 GPa


def energies(structure):
    numbers = crystal(structure).numbers
    return {"torch": torch_energy(numbers), "jax": jax_energy(numbers, 3)}


@cache
def program(structure, kind, f, **options):
    return jax.jit(partial(f, energies(structure)[kind], **options))


def stiffness(structure, pressure, kind="jax"):
    f = program(structure, kind, second.elastic_constants, stiffness="stress")
    return f(*arrays(crystal(structure, pressure)))


@pytest.mark.parametrize("structure", ["rocksalt", "layers"])
def test_crystals_at_rest_have_the_pressure(structure):
    for pressure in (0.0, PRESSURE):
        where = arrays(crystal(structure, pressure))
        energy = torch_energy(crystal(structure).numbers)
        np.testing.assert_allclose(energy.stress(*where), -pressure * np.eye(3), atol=1e-10)
        assert abs(energy.forces(*where)).max() < 1e-9


@pytest.mark.parametrize(("kind", "structure"), [("torch", "rocksalt"), ("jax", "layers")])
def test_pressure_derivatives_x_finite_differences(structure, kind):
    h = 1e-4
    below, above = (stiffness(structure, PRESSURE + x) for x in (-h, h))
    want = (above - below) / (2 * h)
    found = program(structure, kind, elastic.pressure_derivatives)(
        *arrays(crystal(structure, PRESSURE))
    )
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5 * abs(want).max())


def test_internal_relaxation_makes_a_difference_at_pressure():
    where = arrays(crystal("layers", PRESSURE))
    clamped = program("layers", "jax", second.elastic_constants, stiffness="stress", relaxed=False)
    relaxed = stiffness("layers", PRESSURE)
    assert abs(clamped(*where) - relaxed).max() > 1e-3 * abs(relaxed).max()
    slope = program("layers", "jax", elastic.pressure_derivatives)(*where)
    other = program("layers", "jax", elastic.pressure_derivatives, relaxed=False)(*where)
    assert abs(slope - other).max() > 1e-3 * abs(slope).max()


def test_bulk_modulus_x_volumes_under_pressure():
    h = 1e-4
    volume = lambda p: abs(np.linalg.det(crystal("rocksalt", p).cell.array))
    b = np.asarray(stiffness("rocksalt", PRESSURE))
    modulus = b[:3, :3].sum() / 9
    want = -volume(PRESSURE) * 2 * h / (volume(PRESSURE + h) - volume(PRESSURE - h))
    np.testing.assert_allclose(modulus, want, rtol=1e-6)


def test_eigenvalues_of_a_cubic_crystal():
    b = np.asarray(stiffness("rocksalt", PRESSURE))
    found = elastic.born(b)
    want = [b[0, 0] + 2 * b[0, 1], *2 * [b[0, 0] - b[0, 1]], *3 * [2 * b[3, 3]]]
    np.testing.assert_allclose(found.eigenvalues, sorted(want), rtol=1e-9)
    assert found.stable
    strains = np.asarray(found.strains)
    np.testing.assert_allclose(np.einsum("kij,lij->kl", strains, strains), np.eye(6), atol=1e-9)
    i, j = second.FIRST, second.SECOND
    for value, e in zip(found.eigenvalues, strains):  # e:B:e
        eta = e[i, j] * np.where(i == j, 1, 2)
        np.testing.assert_allclose(eta @ b @ eta, value, atol=1e-12)


def test_eigenvalues_x_rotation():
    """They are those of the tensor."""
    r, h = arrays(crystal("layers"))
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    f = program("layers", "jax", second.elastic_constants, stiffness="stress")
    found, turned = (elastic.born(f(*x)).eigenvalues for x in ((r, h), (r @ turn, h @ turn)))
    np.testing.assert_allclose(found, turned, rtol=1e-7)


def test_a_crystal_that_yields():
    """Under tension the bulk modulus falls, and the eigenvalue with it goes through zero where the
    largest tension is reached."""
    atoms = crystal()
    f = program("rocksalt", "jax", second.elastic_constants, stiffness="stress")
    r, h = arrays(atoms)
    slopes, values = [], []
    stress = jax.jit(torch_energy(atoms.numbers).stress)
    for x in (1.08, 1.1, 1.12, 1.14):
        e = 1e-5
        rise = [float(jnp.trace(stress(r * x * (1 + d), h * x * (1 + d)))) for d in (-e, e)]
        slopes.append((rise[1] - rise[0]) / (2 * e) / 3)
        b = f(r * x, h * x)
        values.append(float(b[:3, :3].sum() / 3))
        at = elastic.born(b)
        assert float(abs(at.eigenvalues - values[-1]).min()) < 1e-9
    np.testing.assert_allclose(values, slopes, rtol=1e-6, atol=1e-6)
    assert values[0] > 0 > values[-1]
    assert not elastic.born(f(1.14 * r, 1.14 * h)).stable


@pytest.mark.parametrize("kind", ["torch", "jax"])
def test_rattled_crystals_come_to_rest(kind):
    atoms = crystal("layers", PRESSURE)
    begun = atoms.copy()
    begun.rattle(0.02, seed=1)
    strain = 0.01 * np.random.default_rng(0).normal(size=(3, 3))
    begun.set_cell(begun.cell.array @ (np.eye(3) + strain + strain.T), scale_atoms=True)
    found = program("layers", kind, elastic.at_pressure, steps=10)(*arrays(begun), PRESSURE)
    assert found.force < 1e-8 and found.strain < 1e-8
    lengths = lambda h: np.linalg.norm(np.asarray(h), axis=1)
    np.testing.assert_allclose(lengths(found.cell), lengths(atoms.cell.array), atol=1e-6)


def test_float32_and_vmap():
    atoms = crystal()
    r, h = (x.astype("float32") * 1.01 for x in arrays(atoms))
    energy = torch_energy(atoms.numbers)
    at = jax.jit(jax.vmap(lambda p: elastic.at_pressure(energy, r, h, p)))(
        jnp.array([0.0, PRESSURE], "float32")
    )
    for cell, pressure in zip(at.cell, (0.0, PRESSURE)):
        assert cell.dtype == "float32"
        np.testing.assert_allclose(cell, crystal("rocksalt", pressure).cell.array, atol=1e-4)
    slopes = jax.jit(partial(elastic.pressure_derivatives, energy))(at.positions[1], at.cell[1])
    want = program("rocksalt", "jax", elastic.pressure_derivatives)(
        *arrays(crystal("rocksalt", PRESSURE))
    )
    np.testing.assert_allclose(slopes, want, atol=2e-3 * abs(want).max())


def test_lanes(lane):
    numbers = crystal().numbers
    energy = bridge.potential(
        Ions(), atomic_numbers=numbers, cutoff=CUTOFF, gradients="autograd", lane=lane
    )
    where = arrays(crystal("rocksalt", PRESSURE))
    found = jax.jit(partial(elastic.pressure_derivatives, energy))(*where)
    close(found, program("rocksalt", "jax", elastic.pressure_derivatives)(*where), 1e-7)


ERRORS = [
    (lambda: elastic.born(np.eye(3)), r"expected a stiffness as \[6, 6\], got float64\[3,3\]"),
    (
        lambda: elastic.at_pressure(jax_energy([11, 17], 2), np.zeros((2, 3)), None),
        r"expected a cell as \[3, 3\], got None",
    ),
    (
        lambda: elastic.pressure_derivatives(jax_energy([11, 17], 2), np.zeros((2, 3)), None),
        r"expected a cell as \[3, 3\], got None",
    ),
    (
        lambda: elastic.at_pressure(
            lambda r, h: ((h @ h.T - jnp.eye(3)) ** 2).sum(),
            np.zeros((1, 3)),
            1.2 * np.eye(3),
            steps=1,
        ),
        "expected a crystal at rest after 1 steps: a force below 0.001 eV/Angstrom, .* "
        "allow more steps=",
    ),
]


@pytest.mark.parametrize(("call", "text"), ERRORS)
def test_errors(call, text):
    with pytest.raises(ValueError, match=text):
        call()
