"""Trial moves for jax_side.montecarlo.local: which atoms, and what becomes of them, as a Change;
all inside jit, vmap and scan."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_side.montecarlo.states import Cache, Change


def pick(cache: Cache, key) -> jax.Array:
    """The index of an atom drawn uniformly from those present: an int32 scalar. -1, a row without
    meaning, where there is none.

    Draws slots until one is taken, so on average capacity / atoms draws, whatever N. `key` is a JAX
    PRNG key.

    >>> from jax_side.montecarlo.local import LocalPotential
    >>> free = LocalPotential(lambda Z: jnp.ones((Z.shape[0], 1)), lambda a, b, r: 0 * a, lambda a, s: 0 * s[:, 0], 1.0)
    >>> cache = free.full({"pos": jnp.eye(3), "atomic_numbers": jnp.array([0, 2, 0])})
    >>> int(pick(cache, jax.random.key(0))), int(vacant(cache, jax.random.key(0))) in (0, 2)
    (1, True)
    """
    return jnp.where(cache.count > 0, _draw(cache, key, lambda Z: Z > 0, cache.count > 0), -1)


def vacant(cache: Cache, key) -> jax.Array:
    """The index of a free slot, for an atom to insert: an int32 scalar; drawn, for about capacity /
    free slots draws.

    Where none is free it is the capacity, an index that `update` refuses by name. For several atoms
    at once (a molecule), draw the first and let the others follow by `vacant_after`.
    """
    free = cache.count < cache.layout.atoms
    return jnp.where(free, _draw(cache, key, lambda Z: Z == 0, free), cache.layout.atoms)


def vacant_after(cache: Cache, index, k) -> jax.Array:
    """The next `k` free slots (k,) from `index` on, that one included if it is free; the capacity
    where there are no more."""
    n = cache.layout.atoms

    def one(at, _):
        wanted = lambda s: (s[1] < n) & (jnp.take(cache.atomic_numbers, s[0] % n) > 0)
        at, seen = jax.lax.while_loop(wanted, lambda s: (s[0] + 1, s[1] + 1), at)
        return (at + 1, seen + 1), jnp.where(seen < n, at % n, n).astype(jnp.int32)

    return jax.lax.scan(one, (jnp.asarray(index, jnp.int32), jnp.zeros((), jnp.int32)), length=k)[1]


def moved(index, pos) -> Change:
    """Atoms `index` (K,) come to `pos` (K,3), Angstrom, any image."""
    return Change(_rows(index), jnp.reshape(pos, (-1, 3)))


def inserted(index, pos, atomic_numbers) -> Change:
    """Atoms of `atomic_numbers` (K,) in the free slots `index` (K,) of `vacant`, at `pos` (K,3)."""
    return Change(_rows(index), jnp.reshape(pos, (-1, 3)), _rows(atomic_numbers))


def deleted(index) -> Change:
    """Atoms `index` (K,) are taken out."""
    return Change(_rows(index), None, jnp.zeros_like(_rows(index)))


def mutated(index, atomic_numbers) -> Change:
    """Atoms `index` (K,) become of `atomic_numbers` (K,), where they are."""
    return Change(_rows(index), None, _rows(atomic_numbers))


def swapped(cache: Cache, i, j) -> Change:
    """Atoms i and j exchange their elements. The same atom twice is no change."""
    i, j = (jnp.asarray(x, jnp.int32) for x in (i, j))
    same = i == j
    return Change(
        jnp.stack([i, jnp.where(same, -1, j)]),
        None,
        cache.atomic_numbers[jnp.where(same, i, jnp.stack([j, i]))],
    )


def turned(cache: Cache, index, rotation, shift=0.0) -> Change:
    """The molecule of atoms `index` (K,) turned about its centre by `rotation` (3,3), r -> R r,
    then shifted by `shift` (3,), Angstrom.

    The atoms of a molecule may lie in several periodic images; each is taken where it is nearest to
    the first one, as far as rounding in the lattice's coordinates tells (molecules smaller than
    half of the cell).
    """
    pos = cache.pos[_rows(index)]
    periodic = jnp.array(cache.layout.periodic)
    apart = pos - pos[0]
    u = apart @ cache.space.to_grid / jnp.where(periodic, jnp.array(cache.layout.grid), 1)
    whole = pos[0] + apart - jnp.where(periodic, jnp.round(u), 0).astype(pos.dtype) @ cache.cell
    centre = whole.mean(0)
    return Change(
        _rows(index),
        centre
        + (whole - centre) @ jnp.asarray(rotation, pos.dtype).T
        + jnp.asarray(shift, pos.dtype),
    )


def _rows(x):
    return jnp.asarray(x, jnp.int32).reshape(-1)


def _draw(cache, key, fits, possible):
    """A slot drawn until its atomic number fits; one draw where that is not `possible`."""

    def again(state):
        key, _ = state
        key, this = jax.random.split(key)
        return key, jax.random.randint(this, (), 0, cache.layout.atoms, jnp.int32)

    return jax.lax.while_loop(
        lambda s: possible & ~fits(cache.atomic_numbers[s[1]]), again, again((key, 0))
    )[1]
