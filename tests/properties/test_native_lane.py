"""jax_side.properties and frozen atoms on the native lane, beside the other lanes and a twin in JAX:
elastic constants with internal relaxation, derivatives in pressure and volume, thermal expansion."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_side.potentials import second
from jax_side.potentials.frozen import freeze, held
from jax_side.properties import elastic
from jax_side.properties.phonons import phonons, volume_slope
from jax_side.properties.thermal import expansion, scaled
from tests.bonded_cases import CELL, POSITIONS, TWIN, bonded
from tests.cases import close

MASSES = np.array([22.99, 35.45])
ONE = (1, 1, 1)  # the crystal is its own supercell
OPTIONS = dict(reach=0.1)  # bonds are named, and reach what they reach
LANES = ["ffi", "host", "native"]


@pytest.fixture(scope="module", params=LANES)
def energy(request):
    """One model for all tests of this file, so that they share its compiled packages."""
    return bonded(request.param)


AT_REST = jnp.asarray(POSITIONS), jnp.asarray(CELL)


def strained():
    """Without any symmetry, so that the first atom has somewhere to go."""
    r, h = AT_REST
    e = jnp.eye(3) + 0.01 * jnp.asarray(np.random.default_rng(0).normal(size=(3, 3)))
    return r @ e + jnp.array([[0.02, -0.01, 0.03], [0, 0, 0]]), h @ e


def both(f, energy, *args):
    """(of the energy, of its twin), jitted."""
    return [jax.jit(partial(f, e))(*args) for e in (energy, TWIN)]


def test_elastic_constants_with_internal_relaxation(energy):
    found, want = both(partial(second.elastic_constants, stiffness="stress"), energy, *AT_REST)
    close(found, want, 1e-9)
    clamped = jax.jit(partial(second.elastic_constants, TWIN, relaxed=False))(*AT_REST)
    assert abs(clamped - want).max() > 0.1


def test_the_crystal_is_at_rest():
    assert max(abs(g).max() for g in jax.grad(TWIN, (0, 1))(*AT_REST)) < 1e-12


@pytest.mark.parametrize(  # it compiles two packages that no other test does
    "energy", [*LANES[:2], pytest.param("native", marks=pytest.mark.full)], indirect=True
)
def test_pressure_derivatives(energy):
    close(*both(elastic.pressure_derivatives, energy, *AT_REST), 1e-8)


def test_volume_slope(energy):
    found, want = (
        volume_slope(e, phonons(e, *AT_REST, MASSES, ONE, **OPTIONS)) for e in (energy, TWIN)
    )
    close(found, want, 1e-8)
    assert abs(want).max() > 1


def test_thermal_expansion(energy):
    structures, t = scaled(*AT_REST, np.linspace(0.98, 1.04, 5)), np.array([50.0, 300.0])
    found, want = (
        expansion(e, structures, MASSES, ONE, t, mesh=ONE, **OPTIONS) for e in (energy, TWIN)
    )
    close(found, want, 1e-7)
    assert 1e-6 < want.expansion[1] < 1e-3


def test_frozen_atoms(energy):
    """No gradient and no rows of the Hessian; a jitted descent leaves the atom where it is, and
    moves the other as a descent of it alone."""
    r, h = strained()
    mask = np.array([True, False])
    g = jax.grad(TWIN)(r, h)
    value, found = jax.jit(jax.value_and_grad(held(energy, mask)))(r, h)
    close((value, found), (TWIN(r, h), g.at[0].set(0)))
    assert abs(g).min() > 1e-3 and not found[0].any()
    hessian = jax.jit(partial(second.hessian, held(energy, mask)))(r, h)
    close(hessian[1, :, 1], second.hessian(TWIN, r, h)[1, :, 1])
    assert not hessian[0].any() and not hessian[:, :, 0].any()
    atoms = freeze(r, mask)
    step = lambda f: lambda _, x: x - 0.02 * jax.grad(f)(x, h)
    run = lambda f, x: jax.jit(lambda x: jax.lax.fori_loop(0, 20, step(f), x))(x)
    whole, alone = run(held(energy, mask), r), run(atoms.energy(TWIN), atoms.mobile(r))
    np.testing.assert_array_equal(whole[0], r[0])
    close(whole[1:], alone)
    assert abs(whole[1] - r[1]).max() > 1e-3
