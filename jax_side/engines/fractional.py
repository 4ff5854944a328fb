"""Fractional coordinates as jax-md differentiates them: a tangent of R is a displacement in real
space. The rules are exact, forward and in reverse.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float


@jax.custom_jvp
def real(matrix: Float[jax.Array, "3 3"], R: Float[jax.Array, "N 3"]) -> Float[jax.Array, "N 3"]:
    """Returns real positions r = box R, for a box `matrix` of columns in Angstrom.

    A tangent of the fractional R is taken for a tangent of r at fixed box, as space.transform of
    jax-md has it. Derivatives are right to all orders."""
    return R @ matrix.T


@real.defjvp
def _real_jvp(primals, tangents):
    (matrix, R), (dmatrix, dR) = primals, tangents
    return real(matrix, R), dR + _moved(matrix, R) @ dmatrix.T


@jax.custom_jvp
def _moved(matrix, R):
    """R itself, where a tangent dr of it becomes the fraction inv(box) dr."""
    return R


@_moved.defjvp
def _moved_jvp(primals, tangents):
    (matrix, R), (_, dR) = primals, tangents
    return _moved(matrix, R), dR @ jnp.linalg.inv(matrix).T


@jax.custom_jvp
def fractions(
    pos: Float[jax.Array, "N 3"], cell: Float[jax.Array, "3 3"], home: Float[jax.Array, "3 3"]
) -> Float[jax.Array, "N 3"]:
    """Returns fractions s = r h^-1 of positions in a cell h of rows, for an energy of jax-md.

    jax-md takes a tangent of s for a displacement s h in real space. The tangent here is therefore
    the true ds times `home`, the value of h held constant."""
    return pos @ jnp.linalg.inv(cell)


@fractions.defjvp
def _fractions_jvp(primals, tangents):
    (pos, cell, home), (dpos, dcell, _) = primals, tangents
    # By the plain formula, not by `fractions`, so that higher derivatives are right.
    s = pos @ jnp.linalg.inv(cell)
    ds_cell = dpos - s @ dcell
    return fractions(*primals), ds_cell + ds_cell @ jnp.linalg.inv(home) @ (home - cell)
