"""jax_side.montecarlo.local samples what statistical mechanics can say exactly: ideal gas, two
atoms, sites; and a Lennard-Jones gas. tests/long has more."""

import itertools
from functools import cache as once

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import poisson

from jax_side.montecarlo.local import Layout
from tests.mc_cases import (
    BUMPS,
    CROWD,
    LENNARD_JONES,
    SITE_ENERGIES,
    SITES,
    blocked,
    chain,
    chains,
    energy_of,
    exchanged,
    pair_of_crowd,
    relabeled,
    scattered,
    surprise,
    tails,
    translated,
)  # fmt: skip

CHAINS = 1000
SURE, ABSURD = 1e-4, 1e-8  # p-values


def one_cell(atoms, neighbors, periodic=False):
    """A layout, not by `allocate`, which compiles for seconds: a list of a single cell, with itself
    as neighbour along periodic axes."""
    return Layout(atoms, atoms, neighbors, (periodic,) * 3, (1,) * 3, (int(periodic),) * 3, 10.0)


# Grand canonical: atoms come and go in a cube of side 1, open


def anywhere(key):
    return jax.random.uniform(key, (3,), jnp.float64)


def come_or_go(cache, key, kT, activity, element, more):
    return exchanged(CROWD, cache, key, kT, activity, 1.0, anywhere, element, more)


@once
def empty():
    corners = {
        "pos": jnp.array([[0.0, 0, 0], [1, 1, 1]]),
        "atomic_numbers": jnp.zeros(2, int),
        "pbc": False,
    }
    return CROWD.full(corners, one_cell(16, 16))


@once
def numbers_of_atoms(activity, element, more):
    """How many there are after 50 trials, in each chain."""
    cache, keys = chains(empty(), 1, CHAINS, 50)
    cache, _, accepted = chain(come_or_go, many=True)(cache, keys, 0.6, activity, element, more)
    CROWD.check(cache)
    assert 0.2 < accepted.mean() < 0.95
    return np.asarray(cache.count)


@once
def pair_integral():
    """Mean of exp(-u / 0.6) of two places in the cube, by Gauss's quadrature over the
    differences."""
    x, w = np.polynomial.legendre.leggauss(24)
    x, w = (x + 1) / 2, (w / 2) * (1 - (x + 1) / 2) * 2
    r = jnp.array(list(itertools.product(x, repeat=3)))
    return np.prod(list(itertools.product(w, repeat=3)), 1) @ np.exp(
        -np.asarray(pair_of_crowd(r))[:, 0] / 0.6
    )


def expected_numbers(activity, element):
    n = np.arange(17)
    return (
        poisson.pmf(n, activity)
        if element == 2
        else np.array([1, activity, activity**2 / 2 * pair_integral(), *np.zeros(14)])
    )


@pytest.mark.parametrize(
    "activity, element",
    [
        pytest.param(3.0, 2, id="ideal", marks=pytest.mark.full),
        pytest.param(2.0, 1, id="two-that-see-each-other"),
    ],
)
def test_number_of_atoms_x_grand_canonical(activity, element):
    counts, wanted = (
        np.bincount(numbers_of_atoms(activity, element, 1), minlength=17),
        expected_numbers(activity, element),
    )
    assert not counts[wanted == 0].any()
    assert surprise(counts, wanted) > SURE


def test_mean_and_variance_x_ideal_gas():
    counts = numbers_of_atoms(3.0, 2, 1)
    assert abs(counts.mean() - 3) < 4 * (3 / CHAINS) ** 0.5
    assert abs(counts.var() - 3) < 4 * ((3 + 2 * 9) / CHAINS) ** 0.5


def test_number_of_atoms_x_planted_error():
    """An insertion accepted with zV/N, not zV/(N+1), is seen."""
    counts = numbers_of_atoms(3.0, 2, 0)
    assert surprise(np.bincount(counts, minlength=17), expected_numbers(3.0, 2)) < ABSURD


# Semi-grand: five sites, far apart or close


def relabel(cache, key, difference):
    return relabeled(SITES, cache, key, 0.5, difference)


PLACES = np.array([[0, 0, 0], [1.1, 0, 0], [0, 1.4, 0], [0, 0.3, 2.1], [1.7, 1.8, 0.2]])


@once
def elements(spread, difference):
    """Of the sites (CHAINS,5) after 60 changes or swaps of elements."""
    graph = {"pos": jnp.asarray(spread * PLACES), "atomic_numbers": jnp.ones(5, int), "pbc": False}
    cache, keys = chains(SITES.full(graph, one_cell(5, 4)), 2, CHAINS, 60)
    cache, *_ = chain(relabel, many=True, level=0)(cache, keys, difference)
    SITES.check(cache)
    return np.asarray(cache.atomic_numbers)


def test_fraction_x_independent_sites():
    wanted = 1 / (1 + np.exp((SITE_ENERGIES[1] - SITE_ENERGIES[0] - 0.55) / 0.5))
    assert (
        abs((elements(5, 0.55) == 2).mean() - wanted)
        < 4 * (wanted * (1 - wanted) / (5 * CHAINS)) ** 0.5
    )


@pytest.mark.parametrize("spread", [5, 1], ids=["independent", "coupled"])
def test_all_states_x_semi_grand(spread):
    states = np.array(list(itertools.product([1, 2], repeat=5)))
    graph = lambda Z: {"pos": jnp.asarray(spread * PLACES), "atomic_numbers": Z, "pbc": False}
    r2 = ((spread * PLACES[:, None] - spread * PLACES) ** 2).sum(-1)
    coupling = np.divide(0.7, r2, where=(r2 > 0) & (r2 < 9), out=np.zeros_like(r2))
    spins = 2 * states - 3
    energies = np.array(SITE_ENERGIES)[states - 1].sum(1) + (spins @ coupling * spins).sum(1) / 2
    assert np.isclose(
        SITES.full(graph(jnp.asarray(states[21])), one_cell(5, 4)).energy, energies[21]
    )
    weights = np.exp(-(energies - 0.55 * (states == 2).sum(1)) / 0.5)
    counts = np.bincount((elements(spread, 0.55) - 1) @ 2 ** np.arange(5)[::-1], minlength=32)
    assert surprise(counts, weights) > SURE


# Two atoms in a triclinic cell smaller than twice the cutoff

CELL = np.array([[2.9, 0, 0], [0.7, 2.6, 0], [-0.4, 0.5, 3.2]])


def displaced(cache, key):
    return translated(BUMPS, cache, key, 1.0, (0.5, 2.0))


def energies_of_two(points=16):
    """Of two atoms, for differences on a grid over the cell, all images within the cutoff by hand;
    eV."""
    at = np.stack(np.meshgrid(*[np.arange(points) / points] * 3, indexing="ij"), -1).reshape(-1, 3)
    shifts = np.array(list(itertools.product(range(-2, 3), repeat=3)))
    pairs = lambda at: (
        -1.5
        * (np.clip(1 - (((at[:, None] + shifts) @ CELL) ** 2).sum(-1) / 4, 0, None) ** 3).sum(1)
    )
    return pairs(at) + pairs(np.zeros((1, 3))) + 1.5


@pytest.mark.full
def test_mean_energy_x_two_atoms():
    exact = energies_of_two()
    weights = np.exp(-exact)
    graph = {
        "pos": jnp.array([[0.0, 0, 0], [1, 1, 1]]),
        "atomic_numbers": jnp.ones(2, int),
        "cell": jnp.asarray(CELL),
    }
    cache, keys = chains(BUMPS.full(graph, one_cell(2, 40, periodic=True)), 3, CHAINS, 40)
    cache, *_ = chain(displaced, many=True, level=0)(cache, keys)
    BUMPS.check(cache)
    energy = np.asarray(cache.energy)
    mean = exact @ weights / weights.sum()
    error = energy.std() / CHAINS**0.5
    # so that atoms that do not see each other would be told
    assert error < 0.02 < abs(mean - exact.mean()) / 4
    assert abs(energy.mean() - mean) < 4 * error


# A Lennard-Jones gas


def wander(cache, key):
    return translated(LENNARD_JONES, cache, key, 0.85, (0.5, 10.0))


@pytest.mark.full
def test_energy_x_lennard_jones_gas():
    """T* = 0.85, rho* = 0.009: NIST's Standard Reference Simulation Website, U* = -9.3973e-2."""
    graph = scattered(500, 0.009)
    cache = LENNARD_JONES.full(graph, Layout(500, 12, 16, (True,) * 3, (12,) * 3, (1,) * 3, 0.0))
    cache, energies, _ = chain(wander, energy_of)(cache, jax.random.split(jax.random.key(5), 9000))
    LENNARD_JONES.check(cache)
    energy, error = blocked(energies[2000:] / 500)
    assert error < 0.02
    assert abs(energy + tails(0.009, 3.0)[0] + 9.3973e-2) < 3 * error
