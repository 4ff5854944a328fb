"""Trial moves for jax_side.montecarlo.local: which atoms, and what becomes of them, as a Change;
all inside jit, vmap and scan."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from jax_side.montecarlo.states import Cache, Change


def pick(cache: Cache, key: jax.Array) -> Int[jax.Array, ""]:
    """Returns the index of an atom drawn uniformly from those present, an int32 scalar. It is -1, a
    row without meaning, where there is none.

    Slots are drawn until one is taken: on average capacity / atoms draws, whatever N. `key` is a
    JAX PRNG key.

    >>> from jax_side.montecarlo.local import LocalPotential
    >>> free = LocalPotential(lambda Z: jnp.ones((Z.shape[0], 1)), lambda a, b, r: 0 * a, lambda a, s: 0 * s[:, 0], 1.0)
    >>> cache = free.full({"pos": jnp.eye(3), "atomic_numbers": jnp.array([0, 2, 0])})
    >>> int(pick(cache, jax.random.key(0))), int(vacant(cache, jax.random.key(0))) in (0, 2)
    (1, True)
    """
    return jnp.where(cache.count > 0, _draw(cache, key, lambda Z: Z > 0, cache.count > 0), -1)


def vacant(cache: Cache, key: jax.Array) -> Int[jax.Array, ""]:
    """Returns the index of a free slot, for an atom to insert, an int32 scalar. It is drawn with
    the PRNG `key`, on average by capacity / free slots draws.

    Where no slot is free it is the capacity, an index that `update` refuses by name. For several
    atoms at once (a molecule), draw the first and take the others from `vacant_after`.
    """
    free = cache.count < cache.layout.atoms
    return jnp.where(free, _draw(cache, key, lambda Z: Z == 0, free), cache.layout.atoms)


def vacant_after(cache: Cache, index: ArrayLike, k: int) -> Int[jax.Array, " k"]:
    """Returns the next `k` free slots (k,) from `index` on, that one included if it is free; the
    capacity where there are no more."""
    n = cache.layout.atoms

    def one(at, _):
        wanted = lambda s: (s[1] < n) & (jnp.take(cache.atomic_numbers, s[0] % n) > 0)
        at, seen = jax.lax.while_loop(wanted, lambda s: (s[0] + 1, s[1] + 1), at)
        return (at + 1, seen + 1), jnp.where(seen < n, at % n, n).astype(jnp.int32)

    return jax.lax.scan(one, (jnp.asarray(index, jnp.int32), jnp.zeros((), jnp.int32)), length=k)[1]


def moved(index: ArrayLike, pos: Float[ArrayLike, "K 3"]) -> Change:
    """Returns the change by which atoms `index` (K,) come to `pos` (K,3), Angstrom, any periodic
    image."""
    return Change(_rows(index), jnp.reshape(pos, (-1, 3)))


def inserted(index: ArrayLike, pos: Float[ArrayLike, "K 3"], atomic_numbers: ArrayLike) -> Change:
    """Returns the change that inserts atoms of `atomic_numbers` (K,) at `pos` (K,3), Angstrom. They
    take the free slots `index` (K,) that `vacant` gave."""
    return Change(_rows(index), jnp.reshape(pos, (-1, 3)), _rows(atomic_numbers))


def deleted(index: ArrayLike) -> Change:
    """Returns the change that takes out atoms `index` (K,)."""
    return Change(_rows(index), None, jnp.zeros_like(_rows(index)))


def mutated(index: ArrayLike, atomic_numbers: ArrayLike) -> Change:
    """Returns the change by which atoms `index` (K,) become atoms of `atomic_numbers` (K,), where
    they are."""
    return Change(_rows(index), None, _rows(atomic_numbers))


def swapped(cache: Cache, i: ArrayLike, j: ArrayLike) -> Change:
    """Returns the change by which atoms i and j exchange their elements. The same atom twice is no
    change."""
    i, j = jnp.asarray(i, jnp.int32), jnp.asarray(j, jnp.int32)
    same = i == j
    index = jnp.stack([i, jnp.where(same, -1, j)])
    numbers = cache.atomic_numbers[jnp.where(same, i, jnp.stack([j, i]))]
    return Change(index, None, numbers)


def turned(
    cache: Cache,
    index: ArrayLike,
    rotation: Float[ArrayLike, "3 3"],
    shift: ArrayLike = 0.0,
) -> Change:
    """Returns the change by which the molecule of atoms `index` (K,) is turned about its centre by
    `rotation` (3,3), r -> R r, then shifted by `shift` (3,), Angstrom.

    The atoms of a molecule may lie in several periodic images. Each is taken where it is nearest to
    the first one, as rounding in the coordinates of the lattice finds it, which is right for
    molecules smaller than half of the cell.
    """
    pos = cache.pos[_rows(index)]
    periodic = jnp.array(cache.layout.periodic)
    apart = pos - pos[0]
    u = apart @ cache.space.to_grid / jnp.where(periodic, jnp.array(cache.layout.grid), 1)
    whole = pos[0] + apart - jnp.where(periodic, jnp.round(u), 0).astype(pos.dtype) @ cache.cell
    centre = whole.mean(0)
    turned = (whole - centre) @ jnp.asarray(rotation, pos.dtype).T
    return Change(_rows(index), centre + turned + jnp.asarray(shift, pos.dtype))


def _rows(x: ArrayLike) -> Int[jax.Array, " K"]:
    """Integers as int32 (K,)."""
    return jnp.asarray(x, jnp.int32).reshape(-1)


def _draw(
    cache: Cache,
    key: jax.Array,
    fits: Callable[[jax.Array], jax.Array],
    possible: jax.Array,
) -> Int[jax.Array, ""]:
    """A slot drawn until its atomic number fits; one draw where that is not `possible`."""

    def again(state):
        key, _ = state
        key, this = jax.random.split(key)
        return key, jax.random.randint(this, (), 0, cache.layout.atoms, jnp.int32)

    refused = lambda s: possible & ~fits(cache.atomic_numbers[s[1]])
    return jax.lax.while_loop(refused, again, again((key, 0)))[1]
