"""What jax-md computes from an energy, of a torch Lennard-Jones and of its own: force, pressure,
stress, elastic moduli, free space."""

from functools import partial

import jax
import numpy as np
import pytest
from jax_md import elasticity, energy, minimize, quantity, simulate, space

from jax_side.engines import jax_md as engine
from jax_side.potentials.second import FIRST, SECOND, elastic_constants
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

DROPLET = R @ BOX.T
CLUSTER = energy.lennard_jones_pair(space.free()[0], **LJ)
VELOCITY = jax.random.normal(KEY, R.shape)


def test_force_pressure_and_stress(lane):
    quantities = {
        "force": lambda f: quantity.force(f)(R),
        "pressure": lambda f: quantity.pressure(f, R, 0.98 * BOX, kinetic_energy=1.5),
        "stress": lambda f: quantity.stress(f, R, BOX, velocity=VELOCITY),
    }
    for of in quantities.values():
        found, calls = counted(jax.jit(lambda: of(ours(lane))))
        assert calls == [1]
        close(found, jax.jit(lambda: of(native()))(), 1e-10)
    static = jax.jit(partial(quantity.stress, native()))(R, BOX)
    assert abs(static[0, 1]) > 1e-2 and np.ptp(np.diag(static)) > 1e-2
    close(-potential(lane=lane).stress(R @ BOX.T, BOX.T), static)


@pytest.mark.full
def test_athermal_moduli():
    """A crystal with a vacancy, so that atoms give way, at rest in a box that is under stress."""
    init, step = minimize.fire_descent(native(), SHIFT, 2**-6, 2**-4)
    state, _ = scan(step, 1500)(init(R[1:]))
    at_rest = state.position
    assert (
        abs(state.force).max()
        < 1e-9
        < abs(jax.jit(partial(quantity.stress, native()))(at_rest, BOX)).max()
    )
    moduli, own = (
        elasticity.athermal_moduli(f, cg_tol=1e-11) for f in (ours(n=len(R) - 1), native())
    )
    mine, theirs = (jax.jit(f)(at_rest, BOX) for f in (moduli, own))
    close(mine, theirs, 1e-7)
    # without jit the constants of jax-md's own loops reach the primitive as they are
    close(moduli(at_rest, BOX), theirs, 1e-7)
    constants_of = partial(elastic_constants, potential(len(R) - 1))
    constants, clamped = jax.jit(
        lambda r, cell: [constants_of(r, cell, relaxed) for relaxed in (True, False)]
    )(at_rest @ BOX.T, BOX.T)
    voigt = np.asarray(mine)[FIRST, SECOND][:, FIRST, SECOND]
    close(voigt, constants, 1e-7)
    assert abs(voigt - clamped).max() > 0.1


def test_free_space():
    mine = engine.energy(potential())
    close(*(jax.jit(jax.value_and_grad(f))(DROPLET) for f in (mine, CLUSTER)))
    ends = {}
    for name, f in (("mine", mine), ("theirs", CLUSTER)):
        init, step = simulate.nve(f, space.free()[1], 2**-8)
        state = jax.block_until_ready(init(KEY, DROPLET, 0.125))
        ends[name], calls = counted(scan(step, 200), state)
        assert calls == (200 * [1] if f is mine else [])
    close(ends["mine"][0].position, ends["theirs"][0].position, 1e-8)
    assert abs(ends["mine"][0].position - DROPLET).max() > 0.05


def test_relaxing_several_structures_at_once():
    init, step = minimize.fire_descent(ours(), SHIFT, 2**-6, 2**-4)
    starts = R + 0.005 * jax.random.normal(KEY, (4, *R.shape))
    state = jax.block_until_ready(jax.jit(jax.vmap(init))(starts))
    (state, _), calls = counted(scan(jax.vmap(step), 100), state)
    assert calls == 100 * [4]
    assert (
        apart(state.position, starts) > 0.05
        and abs(jax.jit(jax.vmap(quantity.force(native())))(state.position)).max() < 0.05
    )
