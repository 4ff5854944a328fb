"""A state machine over local potentials: two chains of moves under vmap, accepted or not, beside
brute force; the potential is that of JAX, or one of the files that were written of it."""

import tempfile
from functools import cache
from pathlib import Path

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

import bridge
from jax_side.montecarlo import files as jax_files
from jax_side.montecarlo.local import Change, LocalPotential
from tests.local_cases import CELLS, CUTOFF, bits, brute, close, functions, potential, quick, system
from tests.matrices import a_few
from tests.montecarlo.test_local_moves import ATOMS, K, at, check_list, layout
from torch_side.montecarlo import files as torch_files

CHAINS = 2
FOLDER = tempfile.TemporaryDirectory()
seeds = st.integers(0, 2**16)
homes = st.sampled_from(["JAX", "JAX's file", "torch's file"])


@cache
def path(home):
    """The file of a potential, which is written once."""
    written = Path(FOLDER.name) / f"{home}.zip"
    if home == "JAX's file":
        jax_files.save(written, potential(), precision="64bit")
    else:
        in_torch = functions(torch, torch.tensor)
        torch_files.save(written, *in_torch, CUTOFF, precision="64bit")
    return written


def loaded(home):
    if home == "JAX":
        return potential()
    if home == "JAX's file":
        return jax_files.load(path(home))
    *of_torch, cutoff = torch_files.load(path(home))
    return LocalPotential(*map(bridge.to_jax, of_torch), cutoff)


@cache
def programs(home, name):
    """(full, step) over chains; a step gives (energy, its change, the cache if the change is
    accepted, the cache that is kept)."""
    local, sizes = loaded(home), layout(name)

    def full(pos, numbers, cell):
        return local.full({"pos": pos, "atomic_numbers": numbers, "cell": cell}, sizes)

    def step(cache, change, accept):
        energy, rise, proposal = local.update(cache, change)
        return (
            energy,
            rise,
            local.commit(cache, proposal, True),
            local.commit(cache, proposal, accept),
        )

    return quick(jax.vmap(full)), quick(jax.vmap(step))


def displaced(rng, i, pos, numbers):
    return pos[i] + rng.normal(size=(K, 3)) * 0.3, numbers[i]


def carried(rng, i, pos, numbers):
    return rng.normal(size=(K, 3)) * 9, numbers[i]


def swapped(rng, i, pos, numbers):
    return pos[i], numbers[np.roll(i, 1)]


def inserted(rng, i, pos, numbers):
    """Where there is room; what is there already stays."""
    free = numbers[i] == 0
    new = np.where(free, rng.integers(1, 20, K), numbers[i])
    return np.where(free[:, None], rng.uniform(-9, 9, (K, 3)), pos[i]), new


def deleted(rng, i, pos, numbers):
    return pos[i], 0 * numbers[i]


def mutated(rng, i, pos, numbers):
    return pos[i], np.where(numbers[i] > 0, rng.integers(1, 20, K), 0)


def anything(rng, i, pos, numbers):
    return rng.normal(size=(K, 3)) * 9, rng.integers(0, 3, K) * rng.integers(1, 9, K)


MOVES = {f.__name__: f for f in (displaced, carried, swapped, inserted, deleted, mutated, anything)}
moves = st.tuples(*[st.sampled_from(list(MOVES))] * CHAINS)
MISUSED = ("an atom twice", "an index beyond the capacity")


class LocalPotentials(RuleBasedStateMachine):
    """Two chains, each with a cell of its own, and what NumPy knows of them."""

    name = "slab"  # of CELLS

    @initialize(seed=seeds, home=homes)
    def begin(self, seed, home):
        rng = np.random.default_rng(seed)
        self.home, self.pbc = home, CELLS[self.name][1]
        graphs = [system(self.name, seed + c, atoms=ATOMS) for c in range(CHAINS)]
        self.pos, self.numbers, self.cell = (
            np.array([g[k] for g in graphs]) for k in ("pos", "atomic_numbers", "cell")
        )
        self.cell = self.cell * rng.uniform(1, 1.03, (CHAINS, 1, 1))
        self.numbers = self.numbers.astype(np.int32)
        self.full()

    def energies(self, pos, numbers):
        return [brute(*at, self.pbc).sum() for at in zip(pos, self.cell, numbers)]

    @rule()
    def full(self):
        """All anew: what the chain has kept up to now was right, and goes on from here."""
        new = programs(self.home, self.name)[0](self.pos, self.numbers, self.cell)
        potential().check(new)
        close(new.energy, self.energies(self.pos, self.numbers))
        if hasattr(self, "cache"):
            close(self.cache.energy, new.energy)
            close(self.cache.node_energies, new.node_energies)
        self.cache = new

    @rule(home=homes)
    def load(self, home):
        """The same chains go on with the potential of a file."""
        self.home = home

    @rule(seed=seeds)
    def strain(self, seed):
        """A new cell, which only `full` can take."""
        cell = np.array([system(self.name)["cell"]] * CHAINS)
        self.cell = cell * np.random.default_rng(seed).uniform(1, 1.03, (CHAINS, 1, 1))
        del self.cache
        self.full()

    def change(self, rng, kinds, k):
        """A change of each chain, of at most K atoms, and what it makes of NumPy's arrays."""
        index = np.array([rng.permutation(ATOMS)[:K] for _ in kinds])
        made = [
            MOVES[kind](rng, i, pos, numbers)
            for kind, i, pos, numbers in zip(kinds, index, self.pos, self.numbers)
        ]
        to, numbers = (np.array(x) for x in zip(*made))
        new = self.pos.copy(), self.numbers.copy()
        for c in range(CHAINS):
            new[0][c][index[c, :k]] = to[c, :k]
            new[1][c][index[c, :k]] = numbers[c, :k]
        index[:, k:] = -2
        return Change(*map(jnp.asarray, (index, to, numbers.astype(np.int32)))), new

    @rule(kinds=moves, k=st.integers(0, K), accept=st.tuples(*[st.booleans()] * CHAINS), seed=seeds)
    def move(self, kinds, k, accept, seed):
        change, (pos, numbers) = self.change(np.random.default_rng(seed), kinds, k)
        accept = np.array(accept)
        step = programs(self.home, self.name)[1]
        energy, rise, proposed, kept = step(self.cache, change, accept)
        potential().check(proposed)
        close(energy, self.energies(pos, numbers))
        close(energy - rise, self.cache.energy)
        close(proposed.energy, energy)
        for c in range(CHAINS):
            this, now, before = (at(tree, c) for tree in (proposed, kept, self.cache))
            assert bits(now) == bits(this if accept[c] else before)
            assert (this.atomic_numbers == numbers[c]).all()
            assert this.count == (numbers[c] > 0).sum()
            check_list(this)
        self.pos[accept], self.numbers[accept] = pos[accept], numbers[accept]
        self.cache = kept

    @rule(kind=st.sampled_from(MISUSED), seed=seeds)
    def misuse(self, kind, seed):
        """In one chain; it is NaN and says why, and the other chain goes on."""
        rng = np.random.default_rng(seed)
        change, (pos, numbers) = self.change(rng, ["displaced"] * CHAINS, K)
        bad = change.index[0, 1] if kind == MISUSED[0] else ATOMS + 1
        change = change._replace(index=change.index.at[0, 0].set(bad))
        energy, _, _, kept = programs(self.home, self.name)[1](
            self.cache, change, np.ones(CHAINS, bool)
        )
        assert np.isnan(energy[0]) and np.isnan(kept.energy[0])
        close(energy[1], self.energies(pos, numbers)[1])
        with pytest.raises(ValueError, match="expected "):
            potential().check(kept)
        same = lambda c: bits((c.pos, c.atomic_numbers, c.sums, c.node_energies, c.total, c.cells))
        assert same(at(kept, 0)) == same(at(self.cache, 0))


@pytest.mark.parametrize("name", a_few(["slab", "wide", "open"], 1))
def test_local_potentials(fuzz, name):
    fuzz(type("LocalPotentials", (LocalPotentials,), {"name": name}))
