"""Atoms that stay where they are: an energy that gives them no gradient, and an energy of the other
atoms alone, for integrators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from bridge.contract import same_dtype
from bridge.errors import message, spec
from jax_side.potentials.potential import array

Mask = Bool[np.ndarray, " N"] | Bool[jax.Array, " N"]  # True for an atom that stays
Energy = Callable[..., jax.Array]  # energy(positions, ...) in eV


def held(energy: Energy, mask: Mask) -> Held:
    """Returns an energy of the same arguments whose derivatives in the positions of the masked
    atoms are zero, to all orders: no gradient, and no rows and columns of the Hessian.

    `energy(positions, ...)` is any JAX function of positions (N,3): a potential, one with a bias, or
    an energy of jax-md, whose positions may be fractional. `mask` (N,) bool is True for an atom that
    is held. Its values must be known, and it is copied. The value is that of the energy, to the bit.
    Minimisers that start at rest (FIRE, gradient descent) leave held atoms where they are. For
    integrators, which give every atom a momentum of its own, and for their temperatures, take
    `freeze`.

    Derivatives in the cell are those of the energy at fixed Cartesian positions. Strain moves all
    atoms, so that elastic constants of a held energy have no meaning.

    Raises: ValueError for a mask that is traced, of another dtype or shape, or that holds all
    atoms. A call raises ValueError where the mask has not one entry for each of the positions.

    >>> energy = held(lambda r, cell=None: (r**2).sum(), np.array([True, False]))
    >>> jax.grad(energy)(jnp.ones((2, 3))).tolist()
    [[0.0, 0.0, 0.0], [2.0, 2.0, 2.0]]
    """
    return Held(energy, _checked(mask))


@dataclass(frozen=True, eq=False)
class Held:
    """What `held` returns."""

    energy: Energy
    mask: Bool[np.ndarray, " N"]

    @property
    def card(self) -> Any:
        """The card of the energy, None if it has none."""
        return getattr(self.energy, "card", None)

    @property
    def keywords(self) -> tuple[str, ...]:
        """The keywords of a bias in the energy, as jax_side.potentials.bias has them."""
        return getattr(self.energy, "keywords", ())

    def __call__(
        self, positions: Float[jax.Array, "N 3"], *args: Any, **kwargs: Any
    ) -> Float[jax.Array, "*B"]:
        r = _counted(positions, self.mask)
        fixed = jax.lax.stop_gradient(r)
        return self.energy(jnp.where(self.mask[:, None], fixed, r), *args, **kwargs)


def freeze(positions: Float[jax.Array, "N 3"], mask: Mask, *, fractional: bool = False) -> Frozen:
    """Returns what divides atoms into those of the mask, which stay at `positions`, and the M
    others, which move.

    An integrator is then given the M atoms alone: their positions, their masses and an energy of
    them. So frozen atoms have no momentum, no thermostat acts on them, temperatures and degrees of
    freedom are those of what moves, and every integrator and minimiser leaves them where they are:

        atoms.energy(energy)   an energy of the positions (M,3)
        atoms.mobile(x)        the rows of the M atoms of x (N,...): positions, masses, forces
        atoms.whole(r)         all positions (N,3), from those (M,3) of the M atoms

    `mask` (N,) bool is True for an atom that stays; its values must be known. `positions` (N,3) are
    Angstrom, or fractions of a box with fractional=True. Then frozen atoms keep their fractions
    where the box changes, as in NPT. Without it an energy with a `perturbation`, by which jax-md
    asks for a virial, is refused: a strain would move atoms that stay.

    jax-md draws momenta without a total momentum, which frozen atoms do not conserve. NVE of few
    atoms therefore starts a little cold, by one atom's share.

    Raises: ValueError as `held`, and for positions that are not one for each entry of the mask.

    >>> atoms = freeze(jnp.zeros((3, 3)), np.array([True, False, True]))
    >>> bond = atoms.energy(lambda r, cell=None: ((r[1] - r[0]) ** 2).sum())
    >>> jax.grad(bond)(jnp.ones((1, 3))).tolist(), atoms.whole(jnp.ones((1, 3)))[:, 0].tolist()
    ([[2.0, 2.0, 2.0]], [0.0, 1.0, 0.0])
    """
    mask = _checked(mask)
    return Frozen(_counted(positions, mask), mask, fractional)


@dataclass(frozen=True, eq=False)
class Frozen:
    """What `freeze` returns."""

    positions: Float[jax.Array, "N 3"]
    mask: Bool[np.ndarray, " N"]
    fractional: bool

    def energy(self, energy: Energy) -> Energy:
        """Returns an energy of the positions (M,3) of the atoms that move, with the other arguments
        of `energy`, to which it gives all atoms (N,3).

        Raises, when called: ValueError as `whole`; NotImplementedError for a perturbation of
        positions that are not fractional."""

        def of_mobile(positions: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
            if kwargs.get("perturbation") is not None and not self.fractional:
                raise NotImplementedError(
                    message(
                        "frozen atoms at fractions of a box that changes",
                        "a perturbation of real positions",
                        "pass fractional positions, and fractional=True to freeze",
                    )
                )
            return energy(self.whole(positions), *args, **kwargs)

        return of_mobile

    def mobile(self, x: jax.Array | np.ndarray) -> jax.Array:
        """Returns the rows (M,...) of the atoms that move, of an array (N,...).

        Raises: ValueError for an array with another number of rows."""
        x, n = array("x", x), len(self.mask)
        if x.ndim == 0 or len(x) != n:
            got = spec(x.shape, x.dtype)
            raise ValueError(message(f"an array of {n} rows", got, "give one row for each atom"))
        return x[~self.mask]

    def whole(self, positions: Float[jax.Array, "M 3"]) -> Float[jax.Array, "N 3"]:
        """Returns the positions of all atoms, given those of the atoms that move.

        Raises: ValueError for positions of another shape, or of another dtype than those given to
        `freeze`."""
        r, shape = array("positions", positions), (int((~self.mask).sum()), 3)
        if r.shape != shape:
            expected = f"positions of the atoms that move, {spec(shape, self.positions.dtype)}"
            do = "leave the frozen atoms out: atoms.mobile(positions)"
            raise ValueError(message(expected, spec(r.shape, r.dtype), do))
        same_dtype({"frozen": self.positions, "mobile": r}, ("frozen", "mobile"))
        return self.positions.at[np.flatnonzero(~self.mask)].set(r)


def _checked(mask: Any) -> Bool[np.ndarray, " N"]:
    """A copy of the mask in NumPy."""
    if isinstance(mask, jax.core.Tracer):
        do = "pass a NumPy array, made outside of jit and vmap"
        raise ValueError(message("a mask of frozen atoms with values", "one that is traced", do))
    seen = np.array(mask)
    if seen.dtype != bool or seen.ndim != 1:
        do = "give True or False for each atom, True for one that is frozen"
        raise ValueError(
            message("a mask of frozen atoms, bool[N]", spec(seen.shape, seen.dtype), do)
        )
    if seen.all():
        do = "leave one atom to move"
        raise ValueError(message("a mask with an atom that moves", f"{len(seen)} frozen", do))
    return seen


def _counted(positions: Any, mask: Bool[np.ndarray, " N"]) -> Float[jax.Array, "N 3"]:
    """Positions (N,3), one for each entry of the mask."""
    r = array("positions", positions)
    if r.shape != (len(mask), 3):
        do = "give the mask one entry for each atom"
        expected = (
            f"positions of the {len(mask)} atoms of the mask, {spec((len(mask), 3), r.dtype)}"
        )
        raise ValueError(message(expected, spec(r.shape, r.dtype), do))
    return r
