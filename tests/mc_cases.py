"""Potentials and samplers for tests of jax_side.montecarlo.local against known physics. Reduced
units: energies, lengths and kT as the potential's."""

from functools import cache as once
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import chisquare

from jax_side.montecarlo import moves
from jax_side.montecarlo.local import LocalPotential
from jax_side.potentials.strain import virial

NO_ATOM = -1  # an index that makes a trial no trial


def ones(Z):
    return jnp.ones((len(Z), 1), jnp.float32)


def half(node, sums):
    return sums[:, 0] / 2


def lennard_jones_pair(a, b, r):
    attraction = 1 / (r**2).sum(-1, keepdims=True) ** 3
    return 4 * (attraction**2 - attraction)


def bump(a, b, r):
    """-1.5 (1 - r^2/4)^3, smooth at its cutoff of 2."""
    return -1.5 * (1 - (r**2).sum(-1, keepdims=True) / 4) ** 3


LENNARD_JONES = LocalPotential(ones, lennard_jones_pair, half, 3.0)
BUMPS = LocalPotential(ones, bump, half, 2.0)


def crowd_node(Z):
    """1 for the element 1, which sees others of its kind; 0 for the element 2, an ideal gas."""
    return (Z == 1).astype(jnp.float64)[:, None]


def crowd_edge(a, b, r):
    both = a * b
    return jnp.concatenate([both * pair_of_crowd(r), both], -1)


def pair_of_crowd(r):
    return jnp.cos(2 * (r**2).sum(-1, keepdims=True))


def crowd_readout(node, sums):
    """Half of the pair energies, and two neighbours are too many."""
    return sums[:, 0] / 2 + 1e4 * (sums[:, 1] > 1.5)


# in a cube of side 1 all see one another: at most two atoms
CROWD = LocalPotential(crowd_node, crowd_edge, crowd_readout, 2.0)

SITE_ENERGIES = (0.3, 1.1)  # of the elements 1 and 2


def site_node(Z):
    return jnp.stack([jnp.take(jnp.array([0.0, *SITE_ENERGIES]), Z, mode="clip"), 2.0 * Z - 3], -1)


def site_edge(a, b, r):
    return 0.7 * a[:, 1:] * b[:, 1:] / (r**2).sum(-1, keepdims=True)


def site_readout(node, sums):
    return node[:, 0] + sums[:, 0] / 2


SITES = LocalPotential(site_node, site_edge, site_readout, 3.0)


def scattered(n, density, seed=0):
    """Graph of n atoms of the element 1 on sites of a cubic lattice, drawn without order, in a
    periodic cube; float32."""
    rng = np.random.default_rng(seed)
    edge, across = (n / density) ** (1 / 3), int(np.ceil(n ** (1 / 3) - 1e-9))
    sites = np.stack(np.meshgrid(*[np.arange(across)] * 3, indexing="ij"), -1).reshape(-1, 3)
    pos = (rng.permutation(sites)[:n] + 0.5) * edge / across + rng.normal(size=(n, 3)) * 0.02
    return {
        "pos": jnp.asarray(pos, jnp.float32),
        "atomic_numbers": jnp.ones(n, jnp.int32),
        "cell": jnp.eye(3, dtype=jnp.float32) * edge,
        "pbc": True,
    }


def trial(local, cache, key, change, kT, weight=0.0):
    """The cache after a trial move, accepted with min(1, exp(weight - change of energy / kT)), and
    whether it was."""
    _, change_of_energy, proposal = local.update(cache, change)
    accept = jnp.log(jax.random.uniform(key)) < weight - change_of_energy / kT
    return local.commit(cache, proposal, accept), accept


def translated(local, cache, key, kT, steps):
    """One atom, displaced by up to one of `steps` along each axis."""
    which, far, move, last = jax.random.split(key, 4)
    i, dtype = moves.pick(cache, which), cache.pos.dtype
    step = jax.random.choice(far, jnp.asarray(steps, dtype)) * jax.random.uniform(
        move, (3,), dtype, -1, 1
    )
    return trial(local, cache, last, moves.moved(i, cache.pos[i] + step), kT)


def exchanged(local, cache, key, kT, activity, volume, draw, element, more=1):
    """An atom in, at a place of `draw(key)`, or one out: zV/(N+1) exp(-dE/kT) and N/zV exp(-dE/kT).
    A `more` other than 1 is an error."""
    which, where, who, last = jax.random.split(key, 4)
    comes, mean = jax.random.bernoulli(which), activity * volume
    index = jnp.where(comes, moves.vacant(cache, who), moves.pick(cache, who))
    weight = jnp.log(
        jnp.where(comes, mean / jnp.maximum(cache.count + more, 1e-9), cache.count / mean)
    )
    return trial(
        local,
        cache,
        last,
        moves.inserted(index, draw(where), jnp.where(comes, element, 0)),
        kT,
        weight,
    )


def relabeled(local, cache, key, kT, difference):
    """An atom of the elements 1 or 2 becomes of the other, or two atoms swap their elements;
    `difference` is mu(2) - mu(1)."""
    which, one, other, last = jax.random.split(key, 4)
    i, mutates = moves.pick(cache, one), jax.random.bernoulli(which)
    Z = 3 - cache.atomic_numbers[i]
    one, two = (
        moves.mutated(jnp.stack([i, NO_ATOM]), jnp.stack([Z, 0])),
        moves.swapped(cache, i, moves.pick(cache, other)),
    )
    change = jax.tree.map(lambda a, b: jnp.where(mutates, a, b), one, two)
    return trial(
        local,
        cache,
        last,
        change,
        kT,
        jnp.where(mutates, jnp.where(Z == 2, difference, -difference) / kT, 0.0),
    )


def rotation(key, largest):
    """About a random axis by an angle of up to `largest`: as likely as its inverse."""
    axis, angle = jax.random.split(key)
    n = jax.random.normal(axis, (3,))
    n, a = n / jnp.linalg.norm(n), jax.random.uniform(angle, minval=-largest, maxval=largest)
    cross = jnp.cross(jnp.eye(3), n)
    return jnp.eye(3) + jnp.sin(a) * cross + (1 - jnp.cos(a)) * cross @ cross


def nothing(cache):
    return None


def energy_of(cache):
    return cache.energy


@once
def chain(move, observe=nothing, many=False, level=3):
    """A jitted (cache, keys (moves,), *args) -> cache, observed, accepted, one after each move of
    `move(cache, key, *args)`.

    `many`: caches and keys of many chains, under vmap. A `level` of 0 halves the time to compile,
    and runs four times as long.
    """

    def run(cache, keys, *args):
        def step(cache, key):
            cache, accepted = move(cache, key, *args)
            return cache, (observe(cache), accepted)

        cache, (observed, accepted) = jax.lax.scan(step, cache, keys)
        return cache, observed, accepted

    whole = (
        (lambda caches, keys, *args: jax.vmap(lambda c, k: run(c, k, *args))(caches, keys))
        if many
        else run
    )
    return jax.jit(whole, compiler_options={"xla_backend_optimization_level": level})


def chains(cache, seed, many, length):
    """`many` copies of a cache, and keys (many, length)."""
    keys = jax.random.split(jax.random.key(seed), (many, length))
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (many, *x.shape)), cache), keys


def pressure(local, cache, kT):
    """rho kT - tr W / 3V, of one system, from gradients of the full path in positions and cell."""

    def energy(pos, cell):
        return local.full(
            {"pos": pos, "atomic_numbers": cache.atomic_numbers, "cell": cell}, cache.layout
        ).energy

    g, G = jax.grad(energy, (0, 1))(cache.pos, cache.cell)
    W = virial(g, G[None], cache.pos, jnp.zeros(len(cache.pos), int), cache.cell[None])[0]
    volume = abs(jnp.linalg.det(cache.cell))
    return cache.count * kT / volume - jnp.trace(W) / (3 * volume)


def tails(density, cutoff):
    """Long-range corrections of a cut Lennard-Jones fluid: energy of an atom, and pressure (Allen
    and Tildesley, Computer Simulation of Liquids, 2.8)."""
    a, b = cutoff**-9, cutoff**-3
    return 8 / 3 * np.pi * density * (a / 3 - b), 16 / 3 * np.pi * density**2 * (2 / 3 * a - b)


def blocked(x, fewest=32):
    """Mean of a correlated series, and its standard error: the largest for blocks of 1, 2, 4, ...
    (Flyvbjerg and Petersen 1989)."""
    x = np.asarray(x, float)
    mean, errors = x.mean(), []
    while len(x) >= fewest:
        errors.append(x.std(ddof=1) / len(x) ** 0.5)
        x = x[: len(x) // 2 * 2].reshape(-1, 2).mean(1)
    return mean, max(errors)


def surprise(counts, probabilities):
    """How improbable is a histogram of independent draws: p-value of Pearson's chi-square, bins
    with fewer than 8 expected are joined."""
    order = np.argsort(probabilities)
    expected = np.asarray(probabilities)[order] / np.sum(probabilities) * np.sum(counts)
    seen, few = (
        np.asarray(counts)[order],
        max(int((expected < 8).sum()), int(np.searchsorted(np.cumsum(expected), 8)) + 1),
    )
    join = partial(lambda n, x: np.concatenate([[x[:n].sum()], x[n:]]), few)
    return chisquare(join(seen), join(expected)).pvalue
