"""What kUPS's potentials give: energies, gradients and hessians as one pytree that adds and
scales."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from numbers import Number
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bridge.contract import GRADIENTS, dtype_name
from bridge.errors import message, spec

tree = jax.tree_util
Kind = Literal["positions and cell", "positions"] | None  # of gradients
HessianKind = Literal["positions"] | None
Scalar = Float[jax.Array, ""] | Float[np.ndarray, ""] | float  # a weight
# asked for -> outputs of the contract
KINDS: dict[Kind, tuple[str, ...]] = {
    "positions and cell": tuple(GRADIENTS.values()),
    "positions": ("position_gradients",),
    None: (),
}
HESSIANS: dict[HessianKind, tuple[str, ...]] = {"positions": ("hessian",), None: ()}
NAMES = ("energy", *GRADIENTS.values(), "hessian")


@tree.register_static
@dataclass(frozen=True)
class EmptyType:
    """No gradients, or no hessians: a pytree without leaves."""


EMPTY = EmptyType()


class Positions(NamedTuple):
    """Gradients dE/dr (N,3) in eV/Angstrom, or hessians d2E/dr dr (N,3,N,3) in eV/Angstrom^2."""

    positions: Float[jax.Array, "N 3 *N3"]


class PositionsAndCell(NamedTuple):
    """Gradients g = dE/dr (N,3) at fixed cell and G = dE/dh (B,3,3) at fixed Cartesian positions,
    both in eV/Angstrom."""

    positions: Float[jax.Array, "N 3"]
    cell: Float[jax.Array, "B 3 3"]


class Linear:
    """What has 2 * x and x * 2, from scaled(2)."""

    __array_ufunc__ = None  # numpy's scalars leave * to us

    def scaled(self, scale: Scalar) -> Any:
        """Returns the same times a scalar weight. Subclasses define it."""
        raise NotImplementedError

    def __mul__(self, scale: Any) -> Any:
        if not isinstance(scale, (Number, np.ndarray, np.generic, jax.Array)):
            return NotImplemented
        return self.scaled(_weight(scale))

    __rmul__ = __mul__


@partial(
    tree.register_dataclass, data_fields=("total_energies", "gradients", "hessians"), meta_fields=()
)
@dataclass(frozen=True, eq=False)
class PotentialOut(Linear):
    """What a potential gives: total_energies (B,) in eV, gradients (PositionsAndCell, Positions or
    EMPTY, eV/Angstrom) and hessians (Positions or EMPTY, eV/Angstrom^2).

    It is a pytree, and linear: `a + b`, `a - b` and `2 * a` work. A weight is a scalar and takes
    the dtype of what it multiplies.

    Raises: ValueError for the sum of outputs with unlike gradients, shapes or dtypes, and for a
    weight that is not a scalar.
    """

    total_energies: Float[jax.Array, " B"]
    gradients: PositionsAndCell | Positions | EmptyType = EMPTY
    hessians: Positions | EmptyType = EMPTY

    def __add__(self, other: PotentialOut) -> PotentialOut:
        return self._with(jnp.add, other)

    def __sub__(self, other: PotentialOut) -> PotentialOut:
        return self._with(jnp.subtract, other)

    def scaled(self, scale: Scalar) -> PotentialOut:
        """Returns all outputs times a weight."""
        return jax.tree.map(lambda x: x * jnp.asarray(scale, x.dtype), self)

    def _with(self, operate: Callable[..., Any], other: Any) -> Any:
        if not isinstance(other, PotentialOut):
            return NotImplemented
        mine, yours = self._described(), other._described()
        if mine != yours:
            raise ValueError(
                message(f"outputs alike ({mine})", yours, "narrow the gradients of one, or cast it")
            )
        return jax.tree.map(operate, self, other)

    def _described(self) -> str:
        """Names, shapes and dtypes, for error texts."""
        outputs = self.named().items()
        return ", ".join(f"{name} {spec(x.shape, dtype_name(x))}" for name, x in outputs)

    def named(self) -> dict[str, jax.Array]:
        """Returns the outputs by the names of the contract."""
        of = lambda part, name: getattr(part, name, None)
        parts = (
            self.total_energies,
            of(self.gradients, "positions"),
            of(self.gradients, "cell"),
            of(self.hessians, "positions"),
        )
        return {name: x for name, x in zip(NAMES, parts) if x is not None}

    @classmethod
    def of(
        cls, named: Mapping[str, jax.Array], gradients: Kind, hessians: HessianKind
    ) -> PotentialOut:
        """Returns those parts that are asked for, from outputs by the names of the contract."""
        parts = [named[name] for name in KINDS[gradients]]
        if gradients == "positions and cell":
            kept = PositionsAndCell(*parts)
        elif gradients == "positions":
            kept = Positions(*parts)
        else:
            kept = EMPTY
        return cls(named["energy"], kept, Positions(named["hessian"]) if hessians else EMPTY)


def _weight(scale: Any) -> Any:
    if np.shape(scale):
        raise ValueError(
            message("a scalar weight", f"shape {np.shape(scale)}", "use jax.vmap over the weights")
        )
    return scale
