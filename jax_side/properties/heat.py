"""Heat flux in JAX, and the thermal conductivity that its fluctuations give (Green-Kubo)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from bridge.errors import message, spec
from jax_side.potentials.potential import Named, Potential, array, potential
from jax_side.properties.thermal import BOLTZMANN

# eV^2/amu/Angstrom^3 times Angstrom sqrt(amu/eV), over eV, in W/m/K: see `conductivity`
_IN_SI = 1.602176634e-19 / (1e-10 * 1.0180505710774743e-14)

Positions = Float[ArrayLike, "N 3"]  # in Angstrom
Cell = Float[ArrayLike, "3 3"]  # lattice vectors as rows, in Angstrom
Masses = Float[ArrayLike, " N"]  # in amu
Vector = Float[jax.Array, "3"]


class HeatFlux(NamedTuple):
    """The heat flux of a system, in eV sqrt(eV/amu), in its two parts. J is their sum.

    virial      sum_i (r_i dE_i/dt), what atoms do to one another (3,)
    convective  sum_i (E_i + m_i v_i^2 / 2) v_i, what moves with them (3,). In a solid it adds
                nothing to the conductivity; it depends on the zero of energy."""

    virial: Vector
    convective: Vector


def by_virials(
    energy: Potential,
    positions: Positions,
    cell: Cell | None,
    velocities: Positions,
    masses: Masses,
    **changing: Any,
) -> HeatFlux:
    """Returns the heat flux from the virials of atoms: J_virial = -sum_i w_i v_i.

    `energy` is a potential of one system (bridge.potential, jax_side.potentials.potential) with the
    outputs node_energies and node_virials. Shapes: positions and velocities (N,3), cell (3,3) by
    rows or None, masses (N,) in amu; `changing` are edges, as energy takes them. Velocities are in
    sqrt(eV/amu), as ASE and jax-md have them, and dE/dt is that of NVE. One evaluation, which jit,
    vmap and scan take.

    This is eq. (24) of Fan et al., PRB 92, 094301 (2015). It is exact where the energy E_i of an
    atom depends on no other edges than those that start at it. Messages that go further need
    `Unfolded`: there dE/dr_ij has parts of other atoms' energies, and this flux is another one
    (Langer et al., PRB 108, L100302 (2023)).

    Raises: TypeError for another function; ValueError for a potential of several systems, without
    these outputs, or with a receptive field that is longer than its cutoff or unknown; for shapes.

    >>> from jax_side.potentials.strain import with_gradients
    >>> from bridge.card import Card
    >>> def springs(x):
    ...     i, j = x["edge_index"]
    ...     r = x["pos"][j] - x["pos"][i] + x["cell_offsets"] @ x["cell"][0]
    ...     nodes = jax.ops.segment_sum(0.5 * (jnp.linalg.norm(r, axis=-1) - 1) ** 2, i, len(x["pos"]))
    ...     return {"energy": nodes.sum()[None], "node_energies": nodes}
    >>> names = {"energy", "position_gradients", "cell_gradients", "node_energies", "node_virials"}
    >>> card = Card(outputs=names, active_outputs=names, cutoff=3.0, neighbor_list="given", receptive_field=3.0)
    >>> edges = dict(edge_index=jnp.array([[0, 1], [1, 0]]), cell_offsets=jnp.zeros((2, 3), int))
    >>> energy = potential(with_gradients(springs, node_virials=True), atomic_numbers=np.ones(2, int), card=card)
    >>> v = jnp.array([[1.0, 0, 0], [0, 0, 0]])
    >>> J = by_virials(energy, jnp.array([[0.0, 0, 0], [2, 0, 0]]), None, v, jnp.ones(2), **edges)
    >>> J.virial.tolist(), J.convective.tolist()
    ([-2.0, -0.0, -0.0], [1.0, 0.0, 0.0])
    """
    _check(energy, ("node_energies", "node_virials"))
    card = energy.card
    if card.receptive_field is None or card.receptive_field != card.cutoff or card.messages:
        got = f"a receptive field of {card.receptive_field} and a cutoff of {card.cutoff} Angstrom"
        got += ", and messages in one term" * card.messages
        do = "take Unfolded, which is exact for any range (a model without messages of your own says so: card=bridge.Card(receptive_field=cutoff, ...))"
        raise ValueError(message("energies of atoms that depend on their own edges alone", got, do))
    r = array("positions", positions)
    v, m = _moving(r, velocities, masses)
    out = energy.outputs(r, cell, **changing)
    found = -jnp.einsum("iab,ib->a", out["node_virials"], v)
    return HeatFlux(found, _convective(out["node_energies"], v, m))


class Unfolded:
    """The heat flux of a periodic system for a model of any range, by its energies in an open one:
    `flux(positions, velocities, masses)`.

    J_virial = sum_ij (r_i - r_j) (dE_i/dr_j . v_j), eq. (4) of Langer et al., PRB 108, L100302
    (2023), where i runs over the atoms of the cell and j over these and all images of them that
    they feel. The images are atoms of their own in an open system, whose energies of atoms are
    differentiated: forward in time, and by the positions.

    `energy` is a potential of one system with the output node_energies; any model that makes do
    without pbc. positions (N,3) and cell (3,3) by rows are a structure near those that are to come,
    of which the images within `reach` are taken: by default the card's receptive field, in Angstrom,
    and `skin` more. `find` gives a model of given edges its edges, as bridge.edges does.

    A call costs some four evaluations of `atoms` atoms. jit, vmap and scan take it; the images stay
    the same. Where an atom has moved by more than half of the skin, the flux is NaN.

    Raises: TypeError for another function; ValueError for a potential of several systems, without
    node_energies, that needs pbc, or whose reach is not known; for a singular cell, and for shapes.
    """

    def __init__(
        self,
        energy: Potential,
        positions: Positions,
        cell: Cell,
        *,
        reach: float | None = None,
        skin: float = 1.0,
        find: Callable[..., Named] | None = None,
    ) -> None:
        _check(energy, ("node_energies",))
        card = energy.card
        reach = card.receptive_field if reach is None else reach
        if reach is None or not 0 < reach < float("inf") or not skin >= 0:
            do = "pass reach=..., in Angstrom: cutoff times layers of messages; and a skin of 0 or more"
            raise ValueError(
                message("the distance at which atoms are felt", f"{reach}, skin {skin}", do)
            )
        if card.needs_pbc:
            raise ValueError(
                message(
                    "a model that makes do without pbc",
                    "one that needs it",
                    "its images can't be atoms of their own: take by_virials",
                )
            )
        self.start = np.asarray(positions)
        self.cell = np.asarray(cell)
        self.skin = skin
        self.owner, self.shift = _images(self.start, self.cell, reach + skin)
        numbers = np.asarray(energy.fixed["atomic_numbers"])[self.owner]
        extras = {k: x for k, x in energy.fixed.items() if k not in ("atomic_numbers", "batch")}
        self.energy = potential(
            energy.model, atomic_numbers=numbers, pbc=False, card=card, **extras
        )
        self.find = find

    @property
    def atoms(self) -> int:
        """How many atoms the open system has."""
        return len(self.owner)

    def __call__(self, positions: Positions, velocities: Positions, masses: Masses) -> HeatFlux:
        """Returns the heat flux, for positions and velocities (N,3) and masses (N,) as `by_virials`
        takes them."""
        r = array("positions", positions)
        if r.shape != self.start.shape:
            got = spec(r.shape, r.dtype)
            do = "give the atoms that the images are of"
            raise ValueError(message(f"positions as {spec(self.start.shape, r.dtype)}", got, do))
        v, m = _moving(r, velocities, masses)
        moved = jnp.linalg.norm(r - self.start.astype(r.dtype), axis=-1).max()
        n_atoms = len(r)
        all_r = r[self.owner] + (self.shift @ self.cell).astype(r.dtype)
        all_v = v[self.owner]
        edges = {} if self.find is None else self.find(all_r)

        def inner(r):
            return self.energy.outputs(r, **edges)["node_energies"][:n_atoms]

        nodes, pull = jax.vjp(inner, all_r)
        _, rates = jax.jvp(inner, (all_r,), (all_v,))
        (gradients,) = pull(jnp.ones_like(nodes))
        power = (gradients * all_v).sum(-1)
        found = rates @ r - power @ all_r
        found = jnp.where(moved < self.skin / 2, found, jnp.nan)
        return HeatFlux(found, _convective(nodes, v, m))


def conductivity(
    fluxes: Float[ArrayLike, "T 3"],
    interval: float,
    volume: float,
    temperature: float,
) -> Float[np.ndarray, "t 3"]:
    """Returns the thermal conductivity of Green and Kubo up to each time lag, (T/2, 3) in W/m/K:
    kappa_a(t) = 1/(V kB T^2) integral_0^t <J_a(0) J_a(s)> ds.

    `fluxes` J (T,3) are in eV sqrt(eV/amu), one each `interval`, in Angstrom sqrt(amu/eV) (the unit of
    time of ASE and jax-md, 10.18 fs), of an equilibrium run at constant energy; volume is in
    Angstrom^3, temperature in K. The correlation is the mean over all pairs of that lag, and the
    integral that of trapezes. The conductivity is where the integral stays: look at its plateau,
    and at the spread over runs.

    Raises: TypeError for a HeatFlux, which is two; ValueError for other shapes, fluxes that are not
    finite and numbers that are not positive.

    >>> white = np.random.default_rng(0).normal(size=(1000, 3))
    >>> conductivity(white, 1.0, 1000.0, 300.0).shape
    (500, 3)
    """
    if isinstance(fluxes, HeatFlux):
        do = "take one of them, or their sum: fluxes.virial + fluxes.convective"
        raise TypeError(message("fluxes in one array", "a HeatFlux of two", do))
    J = np.asarray(fluxes, "float64")
    if J.ndim != 2 or J.shape[1] != 3 or len(J) < 2:
        do = "give the fluxes of one run, one in a row"
        raise ValueError(
            message(f"fluxes as {spec(('T', 3), 'float')}", spec(J.shape, J.dtype), do)
        )
    numbers = {"interval": interval, "volume": volume, "temperature": temperature}
    for name, x in numbers.items():
        if not 0 < x < float("inf"):
            raise ValueError(message(f"a positive {name}", str(x), "look at its unit"))
    if not np.isfinite(J).all():
        first = int(np.argmin(np.isfinite(J).all(1)))
        do = "look at the step before; the images of Unfolded may need a longer skin"
        raise ValueError(message("finite fluxes", f"another one in row {first}", do))
    T = len(J)
    spectrum = np.fft.rfft(J, 2 * T, axis=0)
    sums = np.fft.irfft(abs(spectrum) ** 2, 2 * T, axis=0)[: T // 2]
    means = sums / (T - np.arange(T // 2))[:, None]
    steps = (means[1:] + means[:-1]) / 2
    integral = np.concatenate([np.zeros((1, 3)), np.cumsum(steps, 0)]) * interval
    return _IN_SI * integral / (volume * BOLTZMANN * temperature**2)


def _check(energy: Potential, outputs: tuple[str, ...]) -> None:
    """TypeError for what is no potential; ValueError for one of several systems, or without these
    outputs."""
    if not isinstance(energy, Potential):
        got = getattr(energy, "__name__", type(energy).__name__)
        do = "pass what bridge.potential gives, or jax_side.potentials.potential.potential"
        raise TypeError(message("a potential with energies of atoms", got, do))
    if not energy.single:
        do = "bind one system, and take vmap for several"
        raise ValueError(message("a potential of one system", f"{energy.n_systems}", do))
    absent = [name for name in outputs if name not in energy.card.active_outputs]
    if absent:
        names = ", ".join(repr(name) for name in absent)
        do = f"bind it with outputs=[{names}]"
        raise ValueError(message(f"a potential with {', '.join(outputs)}", f"no {names}", do))


def _moving(
    positions: jax.Array, velocities: Positions, masses: Masses
) -> tuple[Float[jax.Array, "N 3"], Float[jax.Array, " N"]]:
    """Velocities and masses as arrays.

    Raises: ValueError for another shape than that of the atoms."""
    v, m = array("velocities", velocities), array("masses", masses)
    for name, x, shape in (("velocities", v, positions.shape), ("masses", m, positions.shape[:1])):
        if x.shape != shape or x.dtype != positions.dtype:
            got, do = spec(x.shape, x.dtype), "give one for each atom, in the dtype of positions"
            raise ValueError(message(f"{name} as {spec(shape, positions.dtype)}", got, do))
    return v, m


def _convective(energies: jax.Array, v: jax.Array, m: jax.Array) -> Vector:
    return (energies + m * (v * v).sum(-1) / 2) @ v


def _images(
    positions: Float[np.ndarray, "N 3"], cell: Float[np.ndarray, "3 3"], reach: float
) -> tuple[Int[np.ndarray, " K"], Int[np.ndarray, "K 3"]]:
    """The atom and the shift of each image within `reach` of an atom of the cell, the atoms
    themselves first."""
    if cell.shape != (3, 3) or not abs(np.linalg.det(cell)) > 1e-9:
        do = "give the three lattice vectors as rows; an open system needs no images"
        raise ValueError(message("a cell with a volume", str(cell.tolist()), do))
    heights = 1 / np.linalg.norm(np.linalg.inv(cell), axis=0)
    spread = positions @ np.linalg.inv(cell)
    width = np.ptp(spread, axis=0)
    counts = [math.ceil(reach / h + w) for h, w in zip(heights, width)]
    ranges = [np.arange(-n, n + 1) for n in counts]
    shifts = np.stack(np.meshgrid(*ranges, indexing="ij"), -1).reshape(-1, 3)
    shifts = shifts[np.argsort(abs(shifts).sum(1), kind="stable")]  # no shift comes first
    near = np.array([_within(positions + shift, positions, reach) for shift in shifts @ cell])
    which, owner = np.nonzero(near)
    return owner, shifts[which]


def _within(
    images: Float[np.ndarray, "N 3"], atoms: Float[np.ndarray, "N 3"], reach: float
) -> Bool[np.ndarray, " N"]:
    """Which of the images are within reach of an atom."""
    apart = images[:, None] - atoms
    return (apart * apart).sum(-1).min(1) <= reach * reach
