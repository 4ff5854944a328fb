"""Bias on collective variables: umbrellas, and sums `energy + bias` that are energies like any
other."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from bridge.errors import message, spec

Energy = Callable[..., jax.Array]  # energy(positions, cell, ...), a scalar in eV
# cv(positions, cell): one collective variable (), or K of them (K,)
Variables = Callable[..., Float[jax.Array, "*K"]]
Period = float | Sequence[float | None] | None


class Bias:
    """An energy of collective variables s, which any energy can be added to: `energy + bias`.

    `cv(positions, cell)` is any JAX function, differentiable as often as the energy is to be:
    positions (N,3) in Angstrom, cell (3,3) by rows or None; s is a scalar or (K,), in units of its
    own. Positions are any periodic image of the atoms, so where atoms cross the boundary, s has to
    take the minimum image itself. A subclass gives the energy of s, `of(s)`. `keywords` names the
    inputs that it takes in the call beside positions and cell.
    """

    cv: Variables
    keywords: tuple[str, ...] = ()

    def of(self, s: Float[ArrayLike, "*K"], **inputs: Any) -> Float[jax.Array, ""]:
        """Returns the energy in eV of the values s of the variables.

        Raises: NotImplementedError where a subclass does not define it."""
        raise NotImplementedError(
            message(f"of(s) of {type(self).__name__}", "none", "define it: an energy in eV of s")
        )

    def variables(
        self, positions: Float[jax.Array, "N 3"], cell: Float[jax.Array, "3 3"] | None = None
    ) -> Float[jax.Array, "*K"]:
        """Returns the collective variables, checked.

        Raises: ValueError for variables that are not a scalar or (K,) of floats."""
        s = jnp.asarray(self.cv(positions, cell))
        if s.ndim > 1 or not jnp.issubdtype(s.dtype, jnp.floating):
            do = "return one float, or K of them in one axis"
            raise ValueError(
                message("collective variables as float[] or float[K]", spec(s.shape, s.dtype), do)
            )
        return s

    def __call__(
        self,
        positions: Float[jax.Array, "N 3"],
        cell: Float[jax.Array, "3 3"] | None = None,
        **inputs: Any,
    ) -> Float[jax.Array, ""]:
        return self.of(self.variables(positions, cell), **inputs)

    def __radd__(self, energy: Energy) -> Biased:
        return Biased(energy, (self,)) if callable(energy) else NotImplemented


@dataclass(frozen=True, eq=False)
class Biased:
    """What `energy + bias` gives, for any energy(positions, cell, ...) of one system in eV: an
    energy of the same arguments. `+ bias` adds another.

    jit, grad, vmap, hessian and scan compose with it as with the energy itself, a potential from
    torch included, and jax_side.engines.jax_md.energy takes it. Keywords of the call that a bias
    has among its `keywords` go to that bias, and the others to the energy. `card` is the energy's.

    `aux(positions, cell)` returns the sum together with what it is made of, for logging at no
    further evaluation: jax.value_and_grad(total.aux, has_aux=True).

    Raises, when called: ValueError for an energy that is no scalar, and for unlike dtypes of energy
    and bias; TypeError where a bias lacks one of its keywords.

    >>> spring = lambda r, cell=None: (r**2).sum() / 2
    >>> total = spring + umbrella(lambda r, cell: r[0, 0], 1.0, 4.0)
    >>> r = jnp.array([[0.5, 0.0, 0.0]])
    >>> (value, parts), gradient = jax.value_and_grad(total.aux, has_aux=True)(r)
    >>> float(value), float(parts["energy"]), float(parts["cvs"][0]), gradient.tolist()
    (0.625, 0.125, 0.5, [[-1.5, 0.0, 0.0]])
    """

    energy: Energy
    biases: tuple[Bias, ...]

    def __post_init__(self) -> None:
        """Refuses biases that would be given the same input."""
        names = self.keywords
        if twice := sorted({name for name in names if names.count(name) > 1}):
            do = "give each a name of its own: metadynamics(..., name=...)"
            raise ValueError(
                message("biases with keywords of their own", f"{', '.join(twice)} in two", do)
            )

    @property
    def card(self) -> Any:
        """The card of the energy, None if it has none."""
        return getattr(self.energy, "card", None)

    @property
    def keywords(self) -> tuple[str, ...]:
        """What the biases take in the call beside positions and cell."""
        return tuple(name for bias in self.biases for name in bias.keywords)

    def aux(
        self,
        positions: Float[jax.Array, "N 3"],
        cell: Float[jax.Array, "3 3"] | None = None,
        **changing: Any,
    ) -> tuple[Float[jax.Array, ""], dict[str, Any]]:
        """Returns the sum, and {"energy": that without bias, "biases": those of each bias, "cvs":
        the variables of each bias}. Energies are in eV."""
        given = {k: x for k, x in changing.items() if k not in self.keywords}
        energy = self.energy(positions, cell, **given)
        if jnp.shape(energy) != ():
            do = "bind the energy to one system, and use jax.vmap for several"
            got = spec(energy.shape, energy.dtype)
            raise ValueError(message("a scalar energy to add a bias to", got, do))
        cvs = tuple(bias.variables(positions, cell) for bias in self.biases)
        each = tuple(
            bias.of(s, **_taken(bias, changing)) for bias, s in zip(self.biases, cvs, strict=True)
        )
        for value in each:
            if value.dtype != energy.dtype:
                do = "compute the variables in the dtype of the positions"
                raise ValueError(
                    message(f"a bias as {energy.dtype}, as the energy", f"{value.dtype}", do)
                )
        return sum(each, energy), {"energy": energy, "biases": each, "cvs": cvs}

    def __call__(
        self,
        positions: Float[jax.Array, "N 3"],
        cell: Float[jax.Array, "3 3"] | None = None,
        **changing: Any,
    ) -> Float[jax.Array, ""]:
        return self.aux(positions, cell, **changing)[0]

    def __add__(self, bias: Bias) -> Biased:
        if not isinstance(bias, Bias):
            return NotImplemented
        return Biased(self.energy, (*self.biases, bias))


def umbrella(
    cv: Variables,
    centre: Float[ArrayLike, "*K"],
    stiffness: Float[ArrayLike, "*K"],
    *,
    period: Period = None,
) -> Umbrella:
    """Returns the harmonic bias k/2 (s - s0)^2 in eV, summed over the variables (Torrie and Valleau,
    J. Comput. Phys. 23, 187 (1977)).

    `cv(positions, cell)` gives the variables s, a scalar or (K,), as `Bias` has it. `centre` is s0,
    of the shape of s; `stiffness` is k > 0 in eV per square unit of s, one number or one for each
    variable. Both are cast to the dtype of s. `period` is that of a variable such as an angle, or a
    sequence with one for each, None for those that have none; distances are then to the nearest
    image of the centre.

    Windows are an axis for jax.vmap, with one torch call for all of them: `jax.vmap(lambda s0, r:
    (energy + umbrella(cv, s0, k))(r))(centres, positions)`.

    Raises: ValueError for a stiffness that is not positive, and for a period that is not. A call
    raises ValueError where centre or stiffness do not have the shape of the variables.

    >>> bias = umbrella(lambda r, cell: jnp.linalg.norm(r[1] - r[0]), 2.0, 10.0)
    >>> float(bias(jnp.array([[0.0, 0, 0], [3, 0, 0]])))
    5.0
    """
    if not _all_positive(stiffness):
        do = "give k in eV per square unit of the variable"
        raise ValueError(message("a positive stiffness", f"{stiffness}", do))
    return Umbrella(cv, checked_period(period), centre, stiffness)


@dataclass(frozen=True, eq=False)
class Umbrella(Bias):
    """What `umbrella` returns."""

    cv: Variables
    period: tuple[float, ...] | None
    centre: Float[ArrayLike, "*K"]
    stiffness: Float[ArrayLike, "*K"]

    def of(self, s: Float[ArrayLike, "*K"], **inputs: Any) -> Float[jax.Array, ""]:
        """Returns the energy in eV of the values s of the variables.

        Raises: ValueError for shapes that differ."""
        s = jnp.asarray(s)
        centre, k = (jnp.asarray(x, s.dtype) for x in (self.centre, self.stiffness))
        if centre.shape != s.shape or k.shape not in ((), s.shape):
            got = f"centre {spec(centre.shape, s.dtype)}, stiffness {spec(k.shape, s.dtype)}"
            do = "give one centre for each variable, and for windows use jax.vmap"
            raise ValueError(message(f"an umbrella of variables {spec(s.shape, s.dtype)}", got, do))
        return (k / 2 * apart(s, centre, self.period) ** 2).sum()


def apart(
    s: Float[jax.Array, "*K"], centre: Float[jax.Array, "*K"], period: tuple[float, ...] | None
) -> Float[jax.Array, "*K"]:
    """Returns s - centre, to the nearest image of the centre along variables with a period. `period`
    is what `checked_period` gives; one number is for all variables.

    Raises: ValueError for another number of periods than of variables.

    >>> apart(jnp.array([3.0, 3.0]), jnp.array([-3.0, -3.0]), (6.0, math.inf)).tolist()
    [0.0, 6.0]
    """
    d = s - centre
    if period is None:
        return d
    if len(period) != max(s.size, 1) and len(period) > 1:
        do = "give one period for all, or one for each variable"
        raise ValueError(message(f"{s.size} periods", f"{len(period)}", do))
    size = jnp.asarray([1 if math.isinf(p) else p for p in period], d.dtype)
    wraps = jnp.asarray([0 if math.isinf(p) else 1 for p in period], d.dtype)
    shape = d.shape if len(period) > 1 else ()
    return d - (size * wraps).reshape(shape) * jnp.round(d / size.reshape(shape))


def checked_period(period: Period) -> tuple[float, ...] | None:
    """Returns the periods of variables as a tuple, infinite for those that have none.

    Raises: ValueError for one that is not positive."""
    if period is None:
        return None
    each = period if isinstance(period, Sequence) else (period,)
    found = tuple(math.inf if p is None else float(p) for p in each)
    if not found or not all(p > 0 for p in found):
        do = "give it in units of the variable, 2 pi for an angle, None for no period"
        raise ValueError(message("a positive period", f"{period}", do))
    return found


def _taken(bias: Bias, changing: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs that a bias takes, all of which must be there."""
    if absent := [name for name in bias.keywords if changing.get(name) is None]:
        expected = f"{', '.join(absent)} in the call, which {type(bias).__name__} needs"
        do = "pass it as a keyword: energy(positions, cell, hills=hills)"
        raise TypeError(message(expected, "none", do))
    return {name: changing[name] for name in bias.keywords}


def _all_positive(x: Any) -> bool:
    """True where no value that can be seen is zero, negative or NaN."""
    return isinstance(x, jax.core.Tracer) or bool(np.all(np.asarray(x) > 0))
