"""Metadynamics, plain and well-tempered: a bias of Gaussian hills in a fixed number of slots, which
a jitted run carries along."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from bridge.errors import message, spec
from jax_side.potentials.bias import Bias, Period, Variables, apart, checked_period

tree = jax.tree_util
Cell = Float[jax.Array, "3 3"]


@partial(
    tree.register_dataclass,
    data_fields=("centres", "heights", "count", "refused"),
    meta_fields=(),
)
@dataclass(frozen=True, eq=False)
class Hills:
    """The hills of a run, in M slots: a pytree of arrays, which a scan carries.

    centres   (M,) or (M,K), values of the collective variables
    heights   (M,) in eV, 0 in slots that are free
    count     how many slots are taken
    refused   how many hills found no free slot. More than 0 means that the bias has stopped to grow:
              `Metadynamics.check` makes an error of it
    """

    centres: Float[jax.Array, "M ..."]
    heights: Float[jax.Array, " M"]
    count: Int[jax.Array, ""]
    refused: Int[jax.Array, ""]


def metadynamics(
    cv: Variables,
    height: float,
    width: Float[ArrayLike, "*K"],
    *,
    kT: float | None = None,
    bias_factor: float | None = None,
    period: Period = None,
    name: str = "hills",
) -> Metadynamics:
    """Returns the bias V(s) = sum_h w_h exp(-sum_k (s_k - s_hk)^2 / (2 sigma_k^2)) in eV, which a
    run raises where it has been.

    `cv(positions, cell)` gives the variables s, a scalar or (K,), as jax_side.potentials.bias.Bias
    has it. `width` is sigma, one number or one for each variable, in their units. `period` is as for
    an umbrella. Hills are all of the height w = `height` in eV (Laio and Parrinello, Proc. Natl.
    Acad. Sci. 99, 12562 (2002)), or, with a `bias_factor` g > 1 and the temperature `kT` in eV,

        w = height exp(-V(s) / ((g - 1) kT)),

    well-tempered (Barducci, Bussi, Parrinello, Phys. Rev. Lett. 100, 020603 (2008)), where V is the
    bias when the hill is added. Free energies are then F(s) = -g / (g - 1) V(s), and -V(s) for
    plain hills, but for a constant: `free_energy`.

    The bias is a pure function of positions, cell and the hills, and keeps no state of its own:

        hills = bias.start(R, cell, capacity=500)
        energy = potential + bias                  # called as energy(R, cell, hills=hills)
        hills = bias.deposit(hills, R, cell)       # in jit and scan: every some steps of a run

    Energies of jax_side.engines.jax_md hand the keyword on, so that `step(state, hills=hills)`
    moves atoms in it. `name` is another keyword, for a second such bias.

    Raises: ValueError for a height, width, period, kT or bias factor that is not positive (a bias
    factor must be above 1), and for one of the latter two without the other.

    >>> bias = metadynamics(lambda r, cell: r[0, 0], height=0.1, width=0.5)
    >>> r = jnp.zeros((1, 3))
    >>> hills = bias.deposit(bias.start(r, capacity=2), r)
    >>> round(float(bias(r, hills=hills)), 6), int(hills.count)
    (0.1, 1)
    """
    if (kT is None) != (bias_factor is None):
        got = f"kT={kT}, bias_factor={bias_factor}"
        raise ValueError(message("kT with bias_factor", got, "pass both, or none of them"))
    positive = {"height": height, "width": width, "kT": 1 if kT is None else kT}
    for what, value in positive.items():
        if not np.all(np.asarray(value) > 0):
            do = "give energies in eV, and widths in units of the variable"
            raise ValueError(message(f"a positive {what} of hills", f"{value}", do))
    if bias_factor is not None and not bias_factor > 1:
        do = "leave it out for plain metadynamics"
        raise ValueError(message("a bias factor above 1", f"{bias_factor}", do))
    sigma = tuple(np.ravel(width).tolist())
    return Metadynamics(cv, float(height), sigma, kT, bias_factor, checked_period(period), name)


@dataclass(frozen=True)
class Metadynamics(Bias):
    """What `metadynamics` returns."""

    cv: Variables
    height: float
    width: tuple[float, ...]
    kT: float | None
    bias_factor: float | None
    period: tuple[float, ...] | None
    name: str

    @property
    def keywords(self) -> tuple[str, ...]:
        """The keyword that hills are given by."""
        return (self.name,)

    def start(
        self, positions: Float[jax.Array, "N 3"], cell: Cell | None = None, *, capacity: int
    ) -> Hills:
        """Returns `capacity` free slots for hills, in the dtype of the variables.

        Raises: ValueError for a capacity that is no positive int, for variables that are not a
        scalar or (K,), and for another number of widths."""
        if not isinstance(capacity, int) or capacity < 1:
            do = "give the number of hills that a run may add"
            raise ValueError(message("a positive number of slots for hills", f"{capacity}", do))
        s = jax.eval_shape(self.variables, positions, cell)
        if len(self.width) not in (1, s.size):
            do = "give one width for all, or one for each variable"
            raise ValueError(message(f"{s.size} widths of hills", f"{len(self.width)} of them", do))
        zero = jnp.zeros((), jnp.int32)
        return Hills(
            jnp.zeros((capacity, *s.shape), s.dtype), jnp.zeros(capacity, s.dtype), zero, zero
        )

    def of(self, s: Float[ArrayLike, "*K"], **inputs: Any) -> Float[jax.Array, ""]:
        """Returns the bias V(s) in eV of the values s of the variables; the hills are the keyword.

        Raises: ValueError where the hills have other variables than s."""
        hills, s = inputs[self.name], jnp.asarray(s)
        if hills.centres.shape[1:] != s.shape:
            got = spec(s.shape, s.dtype)
            expected = spec(hills.centres.shape[1:], hills.centres.dtype)
            do = "start the hills with the variables of this bias; for several s use jax.vmap"
            raise ValueError(message(f"variables {expected}, as the hills have them", got, do))
        width = jnp.asarray(self.width, s.dtype).reshape(s.shape if len(self.width) > 1 else ())
        away = jax.vmap(lambda centre: apart(s, centre, self.period))(hills.centres) / width
        squares = (away**2).reshape(len(away), -1).sum(1)
        return (hills.heights * jnp.exp(-squares / 2)).sum()

    def deposit(
        self, hills: Hills, positions: Float[jax.Array, "N 3"], cell: Cell | None = None
    ) -> Hills:
        """Returns the hills with one more, at the variables of these positions.

        Where no slot is free, the hills stay as they are and `refused` counts one more, so that a
        compiled run goes on, with finite numbers, to where somebody looks: see `check`.

        Raises: ValueError for full slots outside of jit."""
        if not isinstance(hills.count, jax.core.Tracer) and hills.count >= len(hills.heights):
            raise _full(hills)
        s = self.variables(positions, cell)
        height = jnp.asarray(self.height, hills.heights.dtype)
        if self.kT is not None and self.bias_factor is not None:
            scale = self.kT * (self.bias_factor - 1)
            height = height * jnp.exp(-self.of(s, **{self.name: hills}) / scale)
        room = hills.count < len(hills.heights)
        return Hills(
            hills.centres.at[hills.count].set(s, mode="drop"),
            hills.heights.at[hills.count].set(height, mode="drop"),
            hills.count + room,
            hills.refused + ~room,
        )

    def check(self, hills: Hills) -> None:
        """Looks, after a compiled run, whether every hill found a slot.

        Raises: ValueError if hills were refused, also of one of several runs in a leading axis;
        TypeError inside of jit, where there are no values."""
        if isinstance(hills.refused, jax.core.Tracer):
            do = "call it after the program has run"
            raise TypeError(message("hills with values", "ones that jit traces", do))
        if np.any(np.asarray(hills.refused) > 0):
            raise _full(hills)

    def grown(self, hills: Hills, capacity: int) -> Hills:
        """Returns the hills in `capacity` slots, more than they have, for a run that goes on.

        Raises: ValueError for fewer slots than there are."""
        more = capacity - len(hills.heights)
        if more < 0:
            do = "slots are added, never taken away"
            got = f"{capacity}"
            raise ValueError(message(f"at least {len(hills.heights)} slots for hills", got, do))
        rows = ((0, more), *[(0, 0)] * (hills.centres.ndim - 1))
        return replace(
            hills,
            centres=jnp.pad(hills.centres, rows),
            heights=jnp.pad(hills.heights, (0, more)),
        )

    def free_energy(self, hills: Hills, s: Float[ArrayLike, "G ..."]) -> Float[jax.Array, " G"]:
        """Returns the free energy in eV at values of the variables, (G,) or (G,K), as the hills of a
        run estimate it. Its lowest value is 0.

        Raises: ValueError if hills were refused; inside jit the result is then NaN."""
        if not isinstance(hills.refused, jax.core.Tracer):
            self.check(hills)
        bias = jax.vmap(lambda s: self.of(s, **{self.name: hills}))(
            jnp.asarray(s, hills.centres.dtype)
        )
        g = self.bias_factor
        found = -bias if g is None else -g / (g - 1) * bias
        return jnp.where(hills.refused > 0, jnp.nan, found - found.min())


def _full(hills: Hills) -> ValueError:
    do = "start the run with a larger capacity, or go on with bias.grown(hills, capacity)"
    lost = int(np.asarray(hills.refused).max())
    n = hills.heights.shape[-1]
    return ValueError(message(f"a free slot for each hill among {n}", f"{lost} hills refused", do))
