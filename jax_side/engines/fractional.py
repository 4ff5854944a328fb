"""Fractional coordinates as jax-md differentiates them: a tangent of R is one in real space, in
exact rules for both directions."""

from __future__ import annotations

import jax
import jax.numpy as jnp


@jax.custom_jvp
def real(matrix, R):
    """r = box R, where a tangent of R is one of r at fixed box, as space.transform has it; right to
    all orders."""
    return R @ matrix.T


@real.defjvp
def _real_jvp(primals, tangents):
    (matrix, R), (dmatrix, dR) = primals, tangents
    return real(matrix, R), dR + _moved(matrix, R) @ dmatrix.T


@jax.custom_jvp
def _moved(matrix, R):
    """R itself, whose tangent is that of a fraction."""
    return R


@_moved.defjvp
def _moved_jvp(primals, tangents):
    (matrix, R), (_, dR) = primals, tangents
    return _moved(matrix, R), dR @ jnp.linalg.inv(matrix).T


@jax.custom_jvp
def fractions(pos, cell, home):
    """s = r h^-1 for jax-md, which takes a tangent of s for one of s h: there is the true ds times
    `home`, a constant h."""
    return pos @ jnp.linalg.inv(cell)


@fractions.defjvp
def _fractions_jvp(primals, tangents):
    (pos, cell, home), (dpos, dcell, _) = primals, tangents
    s = pos @ jnp.linalg.inv(cell)  # by the plain formula, for higher derivatives
    ds_cell = dpos - s @ dcell
    return fractions(*primals), ds_cell + ds_cell @ jnp.linalg.inv(home) @ (home - cell)
