"""Sums that keep what rounding takes: pairs (high, low) of floats, high + low the value (Knuth's
two-sum)."""

from __future__ import annotations

import jax.numpy as jnp


def plus(high, low, x):
    """(high, low) + x, and high + low again as a pair whose high is the rounded value."""
    high, error = two_sum(high, x)
    return two_sum(high, low + error)


def two_sum(a, b):
    """a + b rounded, and exactly what was lost."""
    s = a + b
    b_seen = s - a
    return s, (a - (s - b_seen)) + (b - b_seen)


def total(x):
    """Sum of x (n,) as a pair, halves added to halves; differentiable."""
    high, low = x, jnp.zeros_like(x)
    while len(high) > 1:
        half = -(-len(high) // 2)
        pad = [(0, 2 * half - len(high))]
        high, low = jnp.pad(high, pad), jnp.pad(low, pad)
        high, error = two_sum(high[:half], high[half:])
        low = low[:half] + low[half:] + error
    return (high[0], low[0]) if len(high) else (jnp.zeros((), x.dtype),) * 2
