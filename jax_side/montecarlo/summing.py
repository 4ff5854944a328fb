"""Sums that keep what rounding takes: pairs (high, low) of floats, high + low the value (Knuth's
two-sum)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float

Array = Float[jax.Array, "*shape"]
Pair = tuple[Array, Array]  # (high, low): the rounded value, and what rounding took from it


def plus(high: Array, low: Array, x: Array) -> Pair:
    """Returns (high, low) + x, again as a pair whose high is the rounded value."""
    high, error = two_sum(high, x)
    return two_sum(high, low + error)


def two_sum(a: Array, b: Array) -> Pair:
    """Returns a + b rounded, and exactly what was lost (Knuth, TAOCP 4.2.2)."""
    s = a + b
    b_seen = s - a
    return s, (a - (s - b_seen)) + (b - b_seen)


def total(x: Float[jax.Array, " n"]) -> tuple[Float[jax.Array, ""], Float[jax.Array, ""]]:
    """Returns the sum of x (n,) as a pair of scalars, by adding halves to halves. It can be
    differentiated."""
    high, low = x, jnp.zeros_like(x)
    while len(high) > 1:
        half = -(-len(high) // 2)
        pad = [(0, 2 * half - len(high))]
        high, low = jnp.pad(high, pad), jnp.pad(low, pad)
        high, error = two_sum(high[:half], high[half:])
        low = low[:half] + low[half:] + error
    if len(high) == 0:
        nothing = jnp.zeros((), x.dtype)
        return nothing, nothing
    return high[0], low[0]
