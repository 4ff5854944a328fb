"""jax_side.local samples what statistical mechanics can say exactly: ideal gas, two atoms, sites, dimers; and a Lennard-Jones gas. tests/long has more."""

import itertools
from functools import cache as once

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import poisson

from jax_side import moves
from tests.mc_cases import (
    BUMPS, CROWD, LENNARD_JONES, SITE_ENERGIES, SITES, blocked, chain, chains, exchanged, pair_of_crowd, rotation, scattered, surprise, swapped, tails,
    translated, transmuted, trial,
)  # fmt: skip

CHAINS = 2048
SURE, ABSURD = 1e-4, 1e-8  # p-values


# Grand canonical: atoms come and go in a cube of side 1, open


def anywhere(key):
    return jax.random.uniform(key, (3,), jnp.float64)


def come_or_go(cache, key, kT, activity, element, more):
    return exchanged(CROWD, cache, key, kT, activity, 1.0, anywhere, element, more)


@once
def empty():
    corners = {"pos": jnp.array([[0.0, 0, 0], [1, 1, 1]]), "atomic_numbers": jnp.zeros(2, int), "pbc": False}
    return CROWD.full(corners, CROWD.allocate(corners, capacity=32, per_cell=32, neighbors=32))


@once
def numbers_of_atoms(activity, element, more):
    """How many there are after 120 trials, in each chain."""
    cache, keys = chains(empty(), 1, CHAINS, 120)
    cache, _, accepted = chain(come_or_go, lambda c: c.count, many=True)(cache, keys, 0.6, activity, element, more)
    CROWD.check(cache)
    assert 0.2 < accepted.mean() < 0.95
    return np.asarray(cache.count)


@once
def pair_integral():
    """Mean of exp(-u / 0.6) of two places in the cube, by Gauss's quadrature over the differences."""
    x, w = np.polynomial.legendre.leggauss(24)
    x, w = (x + 1) / 2, (w / 2) * (1 - (x + 1) / 2) * 2
    r = jnp.array(list(itertools.product(x, repeat=3)))
    return np.prod(list(itertools.product(w, repeat=3)), 1) @ np.exp(-np.asarray(pair_of_crowd(r))[:, 0] / 0.6)


def expected_numbers(activity, element):
    n = np.arange(33)
    return poisson.pmf(n, activity) if element == 2 else np.array([1, activity, activity**2 / 2 * pair_integral(), *np.zeros(30)])


@pytest.mark.parametrize("activity, element", [(6.0, 2), (2.0, 1)], ids=["ideal", "two-that-see-each-other"])
def test_number_of_atoms_x_grand_canonical(activity, element):
    counts = numbers_of_atoms(activity, element, 1)
    assert surprise(np.bincount(counts, minlength=33), expected_numbers(activity, element) + 1e-300) > SURE


def test_mean_and_variance_x_ideal_gas():
    counts = numbers_of_atoms(6.0, 2, 1)
    assert abs(counts.mean() - 6) < 4 * (6 / CHAINS) ** 0.5
    assert abs(counts.var() - 6) < 4 * ((6 + 2 * 36) / CHAINS) ** 0.5


def test_number_of_atoms_x_planted_error():
    """An insertion accepted with zV/N, not zV/(N+1), is seen."""
    counts = numbers_of_atoms(6.0, 2, 0)
    assert surprise(np.bincount(counts, minlength=33), expected_numbers(6.0, 2) + 1e-300) < ABSURD


# Semi-grand: five sites, far apart or close


def exchange_elements(cache, key, difference):
    one, other = jax.random.split(key)
    cache, accepted = transmuted(SITES, cache, one, 0.5, difference)
    return swapped(SITES, cache, other, 0.5)[0], accepted


PLACES = np.array([[0, 0, 0], [1.1, 0, 0], [0, 1.4, 0], [0, 0.3, 2.1], [1.7, 1.8, 0.2]])


@once
def elements(spread, difference):
    """Of the sites (CHAINS,5) after 60 changes of elements, each followed by a swap."""
    graph = {"pos": jnp.asarray(spread * PLACES), "atomic_numbers": jnp.ones(5, int), "pbc": False}
    layout = SITES.allocate({**graph, "pos": jnp.asarray(5 * PLACES)}, per_cell=8, neighbors=8)
    cache, keys = chains(SITES.full(graph, layout), 2, CHAINS, 60)
    cache, *_ = chain(exchange_elements, lambda c: None, many=True)(cache, keys, difference)
    SITES.check(cache)
    return np.asarray(cache.atomic_numbers)


def test_fraction_x_independent_sites():
    wanted = 1 / (1 + np.exp((SITE_ENERGIES[1] - SITE_ENERGIES[0] - 0.55) / 0.5))
    assert abs((elements(5, 0.55) == 2).mean() - wanted) < 4 * (wanted * (1 - wanted) / (5 * CHAINS)) ** 0.5


@pytest.mark.parametrize("spread", [5, 1], ids=["independent", "coupled"])
def test_all_states_x_semi_grand(spread):
    states = np.array(list(itertools.product([1, 2], repeat=5)))
    graph = lambda Z: {"pos": jnp.asarray(spread * PLACES), "atomic_numbers": Z, "pbc": False}  # noqa: E731
    r2 = ((spread * PLACES[:, None] - spread * PLACES) ** 2).sum(-1)
    coupling = np.divide(0.7, r2, where=(r2 > 0) & (r2 < 9), out=np.zeros_like(r2))
    spins = 2 * states - 3
    energies = np.array(SITE_ENERGIES)[states - 1].sum(1) + (spins @ coupling * spins).sum(1) / 2
    assert np.isclose(SITES.full(graph(jnp.asarray(states[21]))).energy, energies[21])
    weights = np.exp(-(energies - 0.55 * (states == 2).sum(1)) / 0.5)
    counts = np.bincount((elements(spread, 0.55) - 1) @ 2 ** np.arange(5)[::-1], minlength=32)
    assert surprise(counts, weights) > SURE


# Two atoms in a triclinic cell smaller than twice the cutoff

CELL = np.array([[2.9, 0, 0], [0.7, 2.6, 0], [-0.4, 0.5, 3.2]])


def displaced(cache, key):
    return translated(BUMPS, cache, key, 1.0, (0.5, 2.0))


def energies_of_two(points=24):
    """Of two atoms, for differences on a grid over the cell, all images within the cutoff by hand; eV."""
    at = np.stack(np.meshgrid(*[np.arange(points) / points] * 3, indexing="ij"), -1).reshape(-1, 3)
    shifts = np.array(list(itertools.product(range(-3, 4), repeat=3)))
    pairs = lambda at: -1.5 * (np.clip(1 - (((at[:, None] + shifts) @ CELL) ** 2).sum(-1) / 4, 0, None) ** 3).sum(1)  # noqa: E731
    return pairs(at) + pairs(np.zeros((1, 3))) + 1.5


def test_mean_energy_x_two_atoms():
    exact = energies_of_two()
    weights = np.exp(-exact)
    graph = {"pos": jnp.array([[0.0, 0, 0], [1, 1, 1]]), "atomic_numbers": jnp.ones(2, int), "cell": jnp.asarray(CELL)}
    cache, keys = chains(BUMPS.full(graph, BUMPS.allocate(graph, per_cell=2, neighbors=40)), 3, CHAINS, 60)
    cache, *_ = chain(displaced, lambda c: None, many=True)(cache, keys)
    BUMPS.check(cache)
    energy = np.asarray(cache.energy)
    mean = exact @ weights / weights.sum()
    error = energy.std() / CHAINS**0.5
    assert error < 0.02 < abs(mean - exact.mean()) / 4  # so that atoms that do not see each other would be told
    assert abs(energy.mean() - mean) < 4 * error


# Rigid dimers


def tumble(cache, key):
    return trial(BUMPS, cache, key, moves.turned(cache, jnp.array([0, 1]), rotation(key, 3.0)), 1.0)


def test_length_and_orientation_x_turned():
    graph = {"pos": jnp.array([[0.1, 0, 2.9], [1.2, 0.1, 3.3]]), "atomic_numbers": jnp.ones(2, int), "pbc": False}
    cache, keys = chains(BUMPS.full(graph), 4, CHAINS, 30)
    cache, *_ = chain(tumble, lambda c: None, many=True)(cache, keys)
    bond = np.asarray(cache.pos[:, 1] - cache.pos[:, 0])
    length = np.linalg.norm(bond, axis=1)
    assert abs(length - (1.1**2 + 0.1**2 + 0.4**2) ** 0.5).max() < 1e-12
    turn = np.arctan2(bond[:, 0], bond[:, 1])
    counts, _, _ = np.histogram2d(bond[:, 2] / length, turn, (8, 8), [(-1, 1), (-np.pi, np.pi)])
    assert surprise(counts.reshape(-1), np.ones(64)) > SURE


# A Lennard-Jones gas


def wander(cache, key):
    return translated(LENNARD_JONES, cache, key, 0.85, (0.5, 10.0))


def test_energy_x_lennard_jones_gas():
    """T* = 0.85, rho* = 0.009: NIST's Standard Reference Simulation Website, U* = -9.3973e-2."""
    graph = scattered(500, 0.009)
    cache = LENNARD_JONES.full(graph, LENNARD_JONES.allocate(graph, per_cell=12, neighbors=16))
    cache, energies, _ = chain(wander, lambda c: c.energy)(cache, jax.random.split(jax.random.key(5), 15000))
    LENNARD_JONES.check(cache)
    energy, error = blocked(energies[3000:] / 500)
    assert error < 0.012
    assert abs(energy + tails(0.009, 3.0)[0] + 9.3973e-2) < 3 * error
