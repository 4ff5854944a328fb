"""What kUPS's potentials give: energies, gradients and hessians as one pytree that adds and
scales."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from numbers import Number
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bridge.contract import GRADIENTS, dtype_name
from bridge.errors import message, spec

tree = jax.tree_util
# asked for -> outputs of the contract
KINDS = {
    "positions and cell": tuple(GRADIENTS.values()),
    "positions": ("position_gradients",),
    None: (),
}
HESSIANS = {"positions": ("hessian",), None: ()}
NAMES = ("energy", *GRADIENTS.values(), "hessian")


@tree.register_static
@dataclass(frozen=True)
class EmptyType:
    """No gradients, or no hessians: a pytree without leaves."""


EMPTY = EmptyType()


class Positions(NamedTuple):
    """Of gradients: (N,3); of hessians: (N,3,N,3)."""

    positions: Any


class PositionsAndCell(NamedTuple):
    """g = dE/dr (N,3) at fixed cell, G = dE/dh (B,3,3) at fixed Cartesian positions."""

    positions: Any
    cell: Any


class Linear:
    """2 * x and x * 2, where scaled(2) is defined."""

    __array_ufunc__ = None  # numpy's scalars leave * to us

    def __mul__(self, scale):
        return (
            self.scaled(_weight(scale))
            if isinstance(scale, (Number, np.ndarray, np.generic, jax.Array))
            else NotImplemented
        )

    __rmul__ = __mul__


@partial(
    tree.register_dataclass, data_fields=("total_energies", "gradients", "hessians"), meta_fields=()
)
@dataclass(frozen=True, eq=False)
class PotentialOut(Linear):
    """What a potential gives: total_energies (B,) in eV, gradients (PositionsAndCell, Positions or
    EMPTY, eV/Angstrom) and hessians (Positions or EMPTY, eV/Angstrom^2). A pytree, and linear: `a +
    b`, `a - b`, `2 * a`. Raises ValueError for the sum of outputs with unlike gradients, shapes or
    dtypes; a weight is a scalar and takes the dtype of what it multiplies."""

    total_energies: Any
    gradients: Any = EMPTY
    hessians: Any = EMPTY

    def __add__(self, other):
        return self._with(jnp.add, other)

    def __sub__(self, other):
        return self._with(jnp.subtract, other)

    def scaled(self, scale):
        return jax.tree.map(lambda x: x * jnp.asarray(scale, x.dtype), self)

    def _with(self, operate, other):
        if not isinstance(other, PotentialOut):
            return NotImplemented
        mine, yours = (
            ", ".join(f"{name} {spec(x.shape, dtype_name(x))}" for name, x in out.named().items())
            for out in (self, other)
        )
        if mine != yours:
            raise ValueError(
                message(f"outputs alike ({mine})", yours, "narrow the gradients of one, or cast it")
            )
        return jax.tree.map(operate, self, other)

    def named(self) -> dict:
        """The same by the names of the contract."""
        of = lambda part, name: getattr(part, name, None)
        parts = (
            self.total_energies,
            of(self.gradients, "positions"),
            of(self.gradients, "cell"),
            of(self.hessians, "positions"),
        )
        return {name: x for name, x in zip(NAMES, parts) if x is not None}

    @classmethod
    def of(cls, named, gradients, hessians):
        """From names of the contract, those parts that are asked for."""
        kind = {
            "positions and cell": PositionsAndCell,
            "positions": Positions,
            None: lambda: EMPTY,
        }[gradients]
        return cls(
            named["energy"],
            kind(*(named[n] for n in KINDS[gradients])),
            Positions(named["hessian"]) if hessians else EMPTY,
        )


def _weight(scale):
    if np.shape(scale):
        raise ValueError(
            message("a scalar weight", f"shape {np.shape(scale)}", "use jax.vmap over the weights")
        )
    return scale
