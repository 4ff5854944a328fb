"""Chains side by side, each with its own decisions, and long float32 runs."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_side.montecarlo.local
from jax_side.montecarlo import moves
from jax_side.montecarlo.local import Change, LocalPotential
from tests.local_cases import bits, close, potential, quick, system

CHAINS = 3


@cache
def sizes():
    return replace(potential().allocate(system("triclinic")), per_cell=12, neighbors=60)


def steps(local, start, keys, decisions):
    """(caches after each step, energies) of moves, mutations and deletions, one after the other."""

    def one(cache, given):
        key, accept = given
        i = moves.pick(cache, key)
        shift, numbers = (
            jax.random.normal(key, (2, 3)),
            jnp.stack([jax.random.randint(key, (), 0, 19), 3]),
        )
        energy, _, proposal = local.update(
            cache, Change(jnp.stack([i, -1]), cache.pos[i] + shift, numbers.astype(jnp.int32))
        )
        cache = local.commit(cache, proposal, accept)
        return cache, (cache, energy)

    pos, numbers, cell = start
    return jax.lax.scan(
        one,
        local.full({"pos": pos, "atomic_numbers": numbers, "cell": cell}, sizes()),
        (keys, decisions),
    )[1]


@pytest.mark.parametrize(
    "bridged",
    [
        pytest.param((False, False, False), id="jax", marks=pytest.mark.full),
        pytest.param((False, True, True), id="torch"),
    ],
)
def test_chains_x_alone(bridged):
    """Other atoms, other draws, other decisions in each; in jit and scan."""
    local, _ = potential(bridged), sizes()
    many = [system("triclinic", seed) for seed in range(CHAINS)]
    start = tuple(
        jnp.stack([graph[k] for graph in many]) for k in ("pos", "atomic_numbers", "cell")
    )
    keys = jax.random.split(jax.random.key(0), (CHAINS, 6))
    decisions = jnp.array(np.random.default_rng(0).random((CHAINS, 6)) < 0.6)
    run = lambda *xs: steps(local, *xs)
    together = quick(jax.vmap(run))(start, keys, decisions)
    alone = quick(run)
    local.check(together[0])
    for b in range(CHAINS):
        one, wanted = (
            jax.tree.map(lambda x, b=b: x[b], together),
            alone(tuple(x[b] for x in start), keys[b], decisions[b]),
        )
        for a, w in zip(jax.tree.leaves(one), jax.tree.leaves(wanted)):
            close(a, w, 1e-12)
        assert any(bridged) or bits(one[0].cells) == bits(wanted[0].cells)
    energies = np.asarray(together[0].energy)
    stayed = energies[:, 1:] == energies[:, :-1]
    assert (stayed == ~np.asarray(decisions)[:, 1:]).all()


def elementwise():
    """No matrix products, whose rounding depends on their sizes."""
    edge = lambda a, b, r: jnp.stack([a[:, 0] + b[:, 0] * r[:, 1], (r**2).sum(-1)], 1)
    return LocalPotential(
        lambda Z: Z[:, None] * jnp.ones((1, 1)), edge, lambda a, s: s[:, 0] * s[:, 1] + a[:, 0], 3.0
    )


def test_chains_x_alone_to_the_bit():
    local, graph = elementwise(), system("triclinic")
    first = local.full(graph, sizes())
    caches = jax.tree.map(lambda x: jnp.stack([x] * CHAINS), first)
    change = Change(
        jnp.array([[1], [2], [3]]), jax.random.normal(jax.random.key(0), (CHAINS, 1, 3))
    )
    accept = jnp.array([True, False, True])
    energies, changes, proposals = jax.vmap(local.update)(caches, change)
    after = jax.vmap(local.commit)(caches, proposals, accept)
    at = lambda tree, b: jax.tree.map(lambda x: x[b], tree)
    for b in range(CHAINS):
        energy, this, proposal = local.update(first, at(change, b))
        assert bits((energy, this, local.commit(first, proposal, accept[b]))) == bits(
            (energies[b], changes[b], at(after, b))
        )
    assert bits(at(after, 1)) == bits(first)


def crystal(dtype):
    """32 atoms of a lattice that never move, 32 between them that do."""
    grid = np.stack(np.meshgrid(*[np.arange(4)] * 3, indexing="ij"), -1).reshape(-1, 3)
    order = np.argsort(grid.sum(-1) % 2, kind="stable")
    return {
        "pos": jnp.asarray(grid[order] * 2.0, dtype),
        "atomic_numbers": jnp.ones(64, int),
        "cell": 8 * jnp.eye(3, dtype=dtype),
    }


def drift(local, n=100_000):
    """Relative difference to float64 after so many accepted moves of the second half, each about
    its own site."""
    graph = crystal("float32")
    layout = replace(local.allocate(graph), per_cell=9, neighbors=16)
    sites = graph["pos"]

    def one(cache, key):
        at, place = jax.random.split(key)
        i = jax.random.randint(at, (1,), 32, 64)
        _, _, proposal = local.update(
            cache, moves.moved(i, sites[i] + 0.3 * jax.random.uniform(place, (1, 3), "float32"))
        )
        return local.commit(cache, proposal, True), None

    last = jax.jit(
        lambda cache, keys: jax.lax.scan(one, cache, keys)[0],
        donate_argnums=0,
        compiler_options={"xla_backend_optimization_level": 3},
    )(local.full(graph, layout), jax.random.split(jax.random.key(0), n))
    local.check(last)
    exact = summed(last.pos)
    return float(abs(last.energy - exact) / abs(exact))


def many_body():
    """A readout that is not linear in the sums, as in the embedded-atom method."""
    edge = lambda a, b, r: jnp.maximum(1 - (r**2).sum(-1, keepdims=True) / 6.0, 0) ** 2 * b
    return LocalPotential(
        lambda Z: Z[:, None].astype("float32"), edge, lambda a, s: -jnp.sqrt(s[:, 0] + 0.1), 2.45
    )


def summed(pos):
    """Energy of the crystal's atoms by nearest images, in NumPy and float64."""
    r = np.asarray(pos, np.float64)[:, None] - np.asarray(pos, np.float64)
    d2 = ((r - 8 * np.round(r / 8)) ** 2).sum(-1)
    pairs = np.where((d2 < 2.45**2) & (d2 > 0), np.maximum(1 - d2 / 6, 0) ** 2, 0)
    return -np.sqrt(pairs.sum(1) + 0.1).sum()


@pytest.mark.full
def test_drift_x_float32(monkeypatch):
    """Beside the same without what rounding took, which is worse after fewer moves."""
    kept = drift(many_body())
    assert kept < 1e-6
    monkeypatch.setattr(jax_side.montecarlo.local, "plus", lambda high, low, x: (high + x, 0 * low))
    assert drift(many_body(), 40_000) > 10 * max(kept, 1e-8)
