"""The long checks of jax_side.montecarlo.local against known physics, `make check-mc`: about 10
minutes on two cores, twice that on busy ones.

Canonical sampling of the Lennard-Jones fluid, cut at 3 sigma, with long-range corrections, 500
atoms, in float32, against NIST's Standard Reference Simulation Website
(https://mmlapps.nist.gov/srs/LJ_PURE/mc.htm); a torch edge; ideal gas, two atoms and dimers at
length, in float64. Each prints a table or a line, which pytest shows with -rP.
"""

import itertools
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import poisson

import bridge
from jax_side.montecarlo import moves
from jax_side.montecarlo.local import LocalPotential
from tests.mc_cases import (
    BUMPS,
    LENNARD_JONES,
    NO_ATOM,
    blocked,
    chain,
    chains,
    energy_of,
    half,
    lennard_jones_pair,
    ones,
    pressure,
    rotation,
    scattered,
    surprise,
    tails,
    translated,
    trial,
)  # fmt: skip

STATES = {  # density at kT = 0.85: U* and p* of NIST, each with its standard deviation
    0.009: ((-9.3973e-2, 1.29e-4), (7.1641e-3, 2.24e-6)),
    0.860: ((-6.0305, 2.38e-3), (1.2660, 1.36e-2)),
    0.776: ((-5.5121, 4.55e-4), (6.7714e-3, 1.72e-3)),
}
# density: steps, layout, blocks of samples to reach equilibrium and to average, moves a sample,
# largest errors
SIZES = {
    0.009: ((0.4, 12.0), dict(per_cell=16, neighbors=24), (20, 220), 5000, (1e-3, 3e-5)),
    0.860: (
        (0.13,),
        dict(per_cell=11, neighbors=124, grid=(5, 5, 5), reach=(2, 2, 2)),
        (80, 240),
        2500,
        (6e-3, 4e-2),
    ),
    0.776: (
        (0.17,),
        dict(per_cell=11, neighbors=120, grid=(5, 5, 5), reach=(2, 2, 2)),
        (80, 240),
        2500,
        (6e-3, 4e-2),
    ),
}
KT, ATOMS, OFTEN = 0.85, 500, 100


def sampled(cache, key, n, steps):
    """The cache after `n` moves, energies after each OFTEN of them, and the pressure and the part
    accepted at the end."""

    def some(cache, keys):
        cache, accepted = jax.lax.scan(
            lambda c, k: translated(LENNARD_JONES, c, k, KT, steps), cache, keys
        )
        return cache, (cache.energy, accepted.mean())

    keys = jax.random.split(key, n).reshape(-1, OFTEN)
    cache, (energies, accepted) = jax.lax.scan(some, cache, keys)
    return cache, energies, pressure(LENNARD_JONES, cache, KT), accepted.mean()


def fluid(density):
    """U* and p* with their errors, the part accepted, and how far incremental energies are from
    full ones at the end."""
    steps, sizes, (first, samples), n, _ = SIZES[density]
    graph = scattered(ATOMS, density)
    layout = replace(
        LENNARD_JONES.allocate(graph, per_cell=sizes["per_cell"], neighbors=sizes["neighbors"]),
        **sizes,
    )
    cache, run = LENNARD_JONES.full(graph, layout), jax.jit(partial(sampled, n=n, steps=steps))
    series = []
    for s, key in enumerate(jax.random.split(jax.random.key(7), first + samples)):
        cache, energies, p, accepted = run(cache, key)
        LENNARD_JONES.check(cache)
        series += [(np.asarray(energies) / ATOMS, float(p), float(accepted))] * (s >= first)
    again = LENNARD_JONES.full({**graph, "pos": cache.pos}, layout)
    energies, pressures, accepted = zip(*series)
    tail = tails(density, 3.0)
    ours = [
        (mean + t, error)
        for (mean, error), t in zip((blocked(np.concatenate(energies)), blocked(pressures)), tail)
    ]
    return ours, np.mean(accepted), abs(float(cache.energy / again.energy) - 1)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("density", STATES)
def test_energy_and_pressure_x_lennard_jones_fluid(density):
    ours, accepted, drift = fluid(density)
    rows = []
    for name, (mean, error), (wanted, theirs) in zip(("U*", "p*"), ours, STATES[density]):
        apart = (mean - wanted) / np.hypot(error, theirs)
        rows.append(
            f"{name:>4} {mean:12.6f} {error:9.2g} {wanted:12.6f} {theirs:9.2g} {apart:8.2f}"
        )
    title = f"Lennard-Jones, T* {KT}, rho* {density}, {ATOMS} atoms, float32, {accepted:.0%} accepted, drift {drift:.1e}"
    print(
        title,
        "             ours     error         NIST     error   apart (in errors)",
        *rows,
        sep="\n",
    )
    for (mean, error), (wanted, theirs), largest in zip(ours, STATES[density], SIZES[density][-1]):
        assert error < largest
        assert abs(mean - wanted) < 3 * np.hypot(error, theirs)
    assert drift < 1e-6


# A torch edge


def torch_pair(a, b, r):
    attraction = 1 / (r**2).sum(-1, keepdim=True) ** 3
    return 4 * (attraction**2 - attraction)


def test_accepted_moves_x_torch_edge():
    """The same 1500 moves of 100 atoms with the pair energies in torch: the same decisions."""
    graph = jax.tree.map(
        lambda x: x.astype(jnp.float64) if jnp.issubdtype(jnp.result_type(x), jnp.floating) else x,
        scattered(100, 0.6),
    )
    runs = []
    for edge in (lennard_jones_pair, bridge.to_jax(torch_pair)):
        local = LocalPotential(ones, edge, half, 2.0)
        cache = local.full(graph, local.allocate(graph, per_cell=40, neighbors=60))
        move = lambda cache, key, local=local: translated(local, cache, key, KT, (0.2,))
        cache, energies, accepted = chain(move, energy_of)(
            cache, jax.random.split(jax.random.key(8), 1500)
        )
        local.check(cache)
        runs.append((np.asarray(energies), np.asarray(accepted)))
    (ours, decisions), (theirs, same) = runs
    print(
        f"100 atoms, edge in torch: {same.sum()} of {len(same)} moves accepted, as in JAX; "
        f"energies within {abs(ours - theirs).max():.1e}"
    )
    assert 0.2 < decisions.mean() < 0.8
    assert (decisions == same).all()
    assert np.allclose(ours, theirs, rtol=1e-10)


# Exactly solvable


IDEAL = LocalPotential(ones, lambda a, b, r: 0 * a, half, 1.0)
CELL = np.array([[3.1, 0, 0], [0.9, 2.7, 0], [-0.6, 0.8, 3.4]])


def come_and_go(cache, key, mean):
    """An ideal gas in a periodic cell, by `inserted` and `deleted`, each with the factor of
    detailed balance."""
    which, who, where, first, second = jax.random.split(key, 5)
    comes = jax.random.bernoulli(which)
    pos = jax.random.uniform(where, (3,), cache.pos.dtype) @ cache.cell
    into, out = (
        jnp.where(comes, moves.vacant(cache, who), NO_ATOM),
        jnp.where(comes, NO_ATOM, moves.pick(cache, who)),
    )
    cache, came = trial(
        IDEAL,
        cache,
        first,
        moves.inserted(into, pos, 1),
        1.0,
        jnp.where(comes, jnp.log(mean / (cache.count + 1)), -jnp.inf),
    )
    cache, went = trial(
        IDEAL,
        cache,
        second,
        moves.deleted(out),
        1.0,
        jnp.where(comes, -jnp.inf, jnp.log(cache.count / mean)),
    )
    return cache, came | went


def test_number_of_atoms_x_ideal_gas():
    """Mean 25 in a triclinic cell, capacity 80: every 250th of 250,000 moves; Poisson."""
    mean, capacity = 25.0, 80
    graph = {
        "pos": jnp.asarray(np.random.default_rng(0).random((25, 3)) @ CELL),
        "atomic_numbers": jnp.ones(25, int),
        "cell": jnp.asarray(CELL),
    }
    cache = IDEAL.full(graph, IDEAL.allocate(graph, capacity=capacity, per_cell=24, neighbors=48))
    cache, counts, _ = chain(come_and_go, lambda c: c.count)(
        cache, jax.random.split(jax.random.key(9), 250_000), mean
    )
    IDEAL.check(cache)
    n = np.asarray(counts)[1000::250]
    (average, error), p = (
        blocked(counts[1000:]),
        surprise(
            np.bincount(n, minlength=capacity + 1), poisson.pmf(np.arange(capacity + 1), mean)
        ),
    )
    print(
        f"Ideal gas, mu V T: N {average:.3f} +- {error:.3f}, exactly {mean}; variance "
        f"{n.var():.2f}, exactly {mean}; chi-square p {p:.3f}"
    )
    assert error < 0.2 and abs(average - mean) < 3 * error
    assert abs(n.var() - mean) < 4 * ((mean + 2 * mean**2) / len(n)) ** 0.5
    assert p > 1e-4


def displaced(cache, key):
    return translated(BUMPS, cache, key, 1.0, (0.5, 2.0))


def nearest(r):
    """Distance of the nearest image of differences (..., 3)."""
    shifts = np.array(list(itertools.product(range(-2, 3), repeat=3))) @ CELL
    return np.sqrt(((r[..., None, :] + shifts) ** 2).sum(-1)).min(-1)


def test_distances_x_two_atoms():
    """Histogram of the distance to the nearest image against exp(-u/kT), in a cell smaller than
    twice the cutoff."""
    graph = {
        "pos": jnp.array([[0.0, 0, 0], [1, 1, 1]]),
        "atomic_numbers": jnp.ones(2, int),
        "cell": jnp.asarray(CELL),
    }
    cache = BUMPS.full(graph, BUMPS.allocate(graph, per_cell=2, neighbors=40))
    apart = chain(displaced, lambda c: c.pos[1] - c.pos[0])
    cache, seen, _ = apart(cache, jax.random.split(jax.random.key(10), 250_000))
    BUMPS.check(cache)
    u = np.random.default_rng(1).random((400_000, 3)) @ CELL
    shifts = np.array(list(itertools.product(range(-2, 3), repeat=3))) @ CELL
    energy = sum(-1.5 * np.clip(1 - ((u + s) ** 2).sum(-1) / 4, 0, None) ** 3 for s in shifts)
    edges = np.linspace(0, nearest(u).max() + 1e-9, 25)
    wanted = np.histogram(nearest(u), edges, weights=np.exp(-energy))[0]
    counts = np.histogram(nearest(np.asarray(seen)[100::50]), edges)[0]
    p, uniform = surprise(counts, wanted), surprise(counts, np.histogram(nearest(u), edges)[0])
    print(
        f"Two atoms, distances: chi-square p {p:.3f} for exp(-u/kT), {uniform:.0e} for atoms that "
        "do not see each other"
    )
    assert p > 1e-4 and uniform < 1e-10


def tumble(cache, key):
    """One of four rigid dimers turned and shifted."""
    which, turn, shift, last = jax.random.split(key, 4)
    index = 2 * jax.random.randint(which, (), 0, 4) + jnp.arange(2)
    change = moves.turned(
        cache, index, rotation(turn, 2.0), jax.random.uniform(shift, (3,), minval=-1, maxval=1)
    )
    return trial(BUMPS, cache, last, change, 1.0)


def bonds(cache):
    u = (cache.pos[1::2] - cache.pos[::2]) @ jnp.linalg.inv(cache.cell)
    return (u - jnp.round(u)) @ cache.cell


def test_lengths_and_orientations_x_dimers():
    """Four dimers that see each other in a periodic cube: lengths after 40,000 moves; each axis of
    the cube is as good as another."""
    cell, rng = 6.0 * np.eye(3), np.random.default_rng(2)
    centre, arm = rng.random((4, 1, 3)) * 6, rng.normal(size=(4, 1, 3))
    arm *= 0.6 / np.linalg.norm(arm, axis=-1, keepdims=True)
    pos = np.concatenate([centre - arm, centre + arm], 1).reshape(-1, 3)
    graph = {"pos": jnp.asarray(pos), "atomic_numbers": jnp.ones(8, int), "cell": jnp.asarray(cell)}
    cache = BUMPS.full(graph, BUMPS.allocate(graph, per_cell=8, neighbors=8))
    cache, seen, accepted = chain(tumble, bonds)(
        cache, jax.random.split(jax.random.key(11), 40_000)
    )
    BUMPS.check(cache)
    length = np.linalg.norm(seen, axis=-1)
    print(
        f"Dimers: lengths within {abs(length / 1.2 - 1).max():.1e} of 1.2 after "
        f"{int(accepted.sum())} accepted moves"
    )
    assert accepted.sum() > 10_000 and abs(length - 1.2).max() < 1e-12
    for axis in range(3):
        mean, error = blocked((np.asarray(seen)[:, :, axis] ** 2).mean(1) / 1.44)
        assert error < 0.01 and abs(mean - 1 / 3) < 3.5 * error


def turn(cache, key):
    return trial(BUMPS, cache, key, moves.turned(cache, jnp.array([0, 1]), rotation(key, 3.0)), 1.0)


def test_orientations_x_one_dimer():
    """Uniform on the sphere: 2000 chains of 30 turns from one orientation, chi-square of 64 equal
    parts."""
    graph = {
        "pos": jnp.array([[0.1, 0, 2.9], [1.2, 0.1, 3.3]]),
        "atomic_numbers": jnp.ones(2, int),
        "pbc": False,
    }
    cache, keys = chains(BUMPS.full(graph), 4, 2000, 30)
    cache, *_ = chain(turn, many=True)(cache, keys)
    bond = np.asarray(cache.pos[:, 1] - cache.pos[:, 0])
    z, around = bond[:, 2] / np.linalg.norm(bond, axis=1), np.arctan2(bond[:, 0], bond[:, 1])
    p = surprise(
        np.histogram2d(z, around, (8, 8), [(-1, 1), (-np.pi, np.pi)])[0].reshape(-1), np.ones(64)
    )
    print(f"One dimer, orientations: chi-square p {p:.3f}")
    assert p > 1e-4
