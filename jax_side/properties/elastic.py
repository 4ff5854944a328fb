"""Elasticity under pressure: crystals relaxed to it, Born's criterion of stability, and how elastic
constants change with pressure."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Bool, Float

from bridge.errors import message, spec
from jax_side.potentials.potential import array
from jax_side.potentials.second import (
    FIRST,
    SECOND,
    Energy,
    checked_cell,
    elastic_constants,
    hessian,
    respond,
)

Positions = Float[ArrayLike, "N 3"]  # in Angstrom
Cell = Float[ArrayLike, "3 3"]  # lattice vectors as rows, in Angstrom
Voigt = Float[jax.Array, "6 6"]
STEP = 0.03  # the largest strain of a step of at_pressure
PARTS = (1.0, 0.5, 0.25, 0.125, 0.0625)  # of a step: the largest that makes the enthalpy less
AT_REST = 1e-4  # the largest strain that may be left


class Born(NamedTuple):
    """What `born` returns.

    eigenvalues  (6,) ascending, in the unit of the stiffness: the crystal resists all strains if
                 all are positive
    strains      (6,3,3): the symmetric strains of these eigenvalues, of norm 1. The first is the way
                 in which the crystal yields first
    """

    eigenvalues: Float[jax.Array, " 6"]
    strains: Float[jax.Array, "6 3 3"]

    @property
    def stable(self) -> Bool[jax.Array, ""]:
        """Whether all eigenvalues are positive."""
        return (self.eigenvalues > 0).all()


def born(stiffness: Float[ArrayLike, "6 6"]) -> Born:
    """Returns Born's criterion of stability under a homogeneous strain, at any stress: the
    eigenvalues of the symmetric part of the Birch coefficients B.

    `stiffness` (6,6), in Voigt order, is elastic_constants(..., stiffness="stress"), or without
    stress any of the others. (Born and Huang (1954); Wang, Li, Yip, Phys. Rev. B 52, 12627 (1995).)
    The eigenvalues are those of the tensor, which don't depend on the axes: for a cubic crystal
    C11 + 2 C12 once, C11 - C12 twice, and 2 C44 three times. Stability against waves within the
    cell is another question: phonons.phonons.

    Raises: ValueError for a matrix of another shape.

    >>> found = born(jnp.diag(jnp.array([3.0, 3, 3, 1, 1, 1])))
    >>> [round(float(x), 3) for x in found.eigenvalues]
    [2.0, 2.0, 2.0, 3.0, 3.0, 3.0]
    """
    b = array("stiffness", stiffness)
    if b.shape != (6, 6):
        do = 'give second.elastic_constants(..., stiffness="stress")'
        raise ValueError(message("a stiffness as [6, 6]", spec(b.shape, b.dtype), do))
    root = jnp.sqrt(jnp.where(FIRST == SECOND, 1.0, 2.0)).astype(b.dtype)
    values, vectors = jnp.linalg.eigh((b + b.T) / 2 * root[:, None] * root)
    strains = jax.vmap(_matrix)((vectors * root[:, None]).T)
    return Born(values, strains)


def pressure_derivatives(
    energy: Energy,
    positions: Positions,
    cell: Cell,
    relaxed: bool = True,
    *,
    chunk: int | None = None,
) -> Voigt:
    """Returns dB/dp (6,6), without a unit: how the stiffness under stress changes with pressure.

    B is elastic_constants(energy, positions, cell, relaxed, stiffness="stress"), and so are the
    arguments. The crystal is as it is, at rest, with or without a pressure. Under a little more of
    it, it takes the strain -B^-1 (1,1,1,0,0,0) for each unit, which need not be the same along all
    axes, and with `relaxed` its atoms go to where forces vanish again. The derivative of B along that
    way is the third derivative of the energy, by one jvp. Of the result the first 3 by 3 numbers,
    summed and over 9, are the pressure derivative of the bulk modulus of a cubic crystal.

    jit, vmap and derivatives work. It costs about three times as much as elastic_constants.

    Raises: ValueError as elastic_constants.
    """
    r, h = array("positions", positions), checked_cell(cell)
    stiffness = partial(elastic_constants, energy, relaxed=relaxed, stiffness="stress", chunk=chunk)
    b = stiffness(r, h)
    pressure = jnp.asarray(FIRST == SECOND, b.dtype)
    strain = _matrix(-jnp.linalg.solve(b, pressure))
    along = r @ strain, h @ strain
    if relaxed:
        along = along[0] - _response(energy, r, h, along, chunk), along[1]
    return jax.jvp(stiffness, (r, h), along)[1]


class Relaxed(NamedTuple):
    """What `at_pressure` returns.

    positions, cell   (N,3) and (3,3) in Angstrom
    force             the largest force that is left, eV/Angstrom
    strain            the largest strain by which the stress that is left would still move the cell
    """

    positions: Float[jax.Array, "N 3"]
    cell: Float[jax.Array, "3 3"]
    force: Float[jax.Array, ""]
    strain: Float[jax.Array, ""]


def at_pressure(
    energy: Energy,
    positions: Positions,
    cell: Cell,
    pressure: float | Float[jax.Array, ""] = 0.0,
    *,
    steps: int = 8,
    fmax: float = 1e-3,
    chunk: int | None = None,
) -> Relaxed:
    """Returns the crystal at rest under a pressure (eV/Angstrom^3, positive where it is compressed),
    atoms and cell, by Newton's method: `steps` steps, each with the whole Hessian.

    It is for crystals of some atoms that are nearly at rest: forces are small, and the strain of a
    step is at most 3 %. A step that does not make the enthalpy less is made shorter. The symmetry
    of the start is kept, so that it may end on a saddle point: see `born`, and phonons. The
    arguments are those of second.elastic_constants. jit works with energy, steps and chunk static,
    and so does vmap over pressures.

    Raises: ValueError where forces above `fmax` (eV/Angstrom) are left, or a strain above 1e-4, if
    values can be seen (under tracing look at `.force` and `.strain`); and as elastic_constants.

    >>> stiff = lambda r, h: ((h @ h.T - jnp.eye(3)) ** 2).sum()
    >>> found = at_pressure(stiff, jnp.zeros((1, 3)), 1.02 * jnp.eye(3))
    >>> [round(float(x), 3) for x in found.cell.diagonal()]
    [1.0, 1.0, 1.0]
    """
    r, h = array("positions", positions), checked_cell(cell)
    volume = lambda h: abs(jnp.linalg.det(h))
    enthalpy = lambda r, h: energy(r, h) + pressure * volume(h)
    parts = jnp.asarray(PARTS, r.dtype)

    def step(at, _):
        r, h = at
        r = r - respond(hessian(energy, r, h, chunk=chunk), jax.grad(energy)(r, h))
        b = elastic_constants(energy, r, h, stiffness="stress", chunk=chunk)
        eta = -_downhill(b, _excess(energy, r, h, pressure))
        strain = _matrix(eta * jnp.minimum(1, STEP / jnp.maximum(abs(eta).max(), STEP)))
        along = r @ strain, h @ strain
        along = along[0] - _response(energy, r, h, along, chunk), along[1]
        after = jax.vmap(lambda x: enthalpy(r + x * along[0], h + x * along[1]))(parts)
        before = enthalpy(r, h)
        rounding = 16 * jnp.finfo(r.dtype).eps * abs(before)
        part = parts[
            jnp.argmax(after <= before + rounding)
        ]  # the first; all of it, if there is none
        return (r + part * along[0], h + part * along[1]), b

    (r, h), stiffnesses = jax.lax.scan(step, (r, h), length=steps)
    force = jnp.linalg.norm(jax.grad(energy)(r, h), axis=-1).max()
    strain = abs(jnp.linalg.solve(stiffnesses[-1], _excess(energy, r, h, pressure))).max()
    if not isinstance(force, jax.core.Tracer) and not (force <= fmax and strain <= AT_REST):
        raise ValueError(
            message(
                f"a crystal at rest after {steps} steps: a force below {fmax:g} eV/Angstrom, and "
                f"a cell within {AT_REST:g}",
                f"{force:.2g} eV/Angstrom, and a cell strained by {strain:.2g}",
                "begin nearer to it, or allow more steps=",
            )
        )
    return Relaxed(r, h, force, strain)


def _excess(energy: Energy, r: jax.Array, h: jax.Array, pressure: Any) -> Float[jax.Array, " 6"]:
    """The stress (tension positive) plus the pressure: zero in equilibrium."""
    one = jnp.eye(3, dtype=r.dtype)
    slope = jax.grad(lambda e: energy(r @ (one + e), h @ (one + e)))(jnp.zeros_like(one))
    stress = (slope + slope.T) / 2 / abs(jnp.linalg.det(h)) + pressure * one
    return stress[FIRST, SECOND]


def _downhill(b: Voigt, stress: Float[jax.Array, " 6"]) -> Float[jax.Array, " 6"]:
    """B^-1 s, with the sign of each eigenvalue of the symmetric part of B made positive."""
    values, vectors = jnp.linalg.eigh((b + b.T) / 2)
    return vectors @ ((vectors.T @ stress) / abs(values))


def _response(energy, r, h, along, chunk):
    """Minus how far atoms go on beyond `along`, a change of (r, h), so that forces stay as they
    are."""
    slope = jax.jvp(jax.grad(energy), (r, h), along)[1]
    return respond(hessian(energy, r, h, chunk=chunk), slope)


def _matrix(eta: jax.Array) -> Float[jax.Array, "3 3"]:
    """The symmetric strain of six Voigt components."""
    zero = jnp.zeros((3, 3), eta.dtype)
    return zero.at[FIRST, SECOND].add(eta / 2).at[SECOND, FIRST].add(eta / 2)
