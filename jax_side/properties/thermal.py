"""Phonons and temperature: free energy, entropy and heat capacity, and thermal expansion in
the quasi-harmonic approximation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from bridge.errors import message, spec
from jax_side.potentials.second import Energy
from jax_side.properties.phonons import grid, phonons
from jax_side.properties.supercells import Repeats, supercell

BOLTZMANN = 8.617333262e-5  # eV/K (CODATA 2018)
PLANCK = 4.135667696e-3  # eV/THz
PARAMETERS = 4  # of a Birch-Murnaghan fit


class Harmonic(NamedTuple):
    """What `harmonic` returns, for one cell of the crystal; (...,T) each.

    free_energy    eV
    entropy        eV/K
    heat_capacity  eV/K, at constant volume
    """

    free_energy: Float[np.ndarray, "*K T"]
    entropy: Float[np.ndarray, "*K T"]
    heat_capacity: Float[np.ndarray, "*K T"]


class Expansion(NamedTuple):
    """What `quasi_harmonic` returns, for one cell of the crystal; (T,) each.

    temperatures   K
    volumes        Angstrom^3
    free_energies  eV: Gibbs energies under a pressure
    expansion      the volume's, d ln V / dT in 1/K (three times that of a length of a cubic crystal)
    bulk_moduli    isothermal, eV/Angstrom^3 (1 eV/Angstrom^3 = 160.2177 GPa)
    heat_capacity_v, heat_capacity_p   eV/K, at constant volume and pressure
    gruneisen      the thermodynamic one, expansion bulk_moduli volumes / heat_capacity_v; nan
                   where there is no heat capacity
    """

    temperatures: Float[np.ndarray, " T"]
    volumes: Float[np.ndarray, " T"]
    free_energies: Float[np.ndarray, " T"]
    expansion: Float[np.ndarray, " T"]
    bulk_moduli: Float[np.ndarray, " T"]
    heat_capacity_v: Float[np.ndarray, " T"]
    heat_capacity_p: Float[np.ndarray, " T"]
    gruneisen: Float[np.ndarray, " T"]


def harmonic(
    frequencies: Float[ArrayLike, "*K Q 3*N"],
    weights: Float[ArrayLike, " Q"],
    temperatures: Float[ArrayLike, " T"],
    *,
    floor: float = 0.01,
) -> Harmonic:
    """Returns the thermodynamic functions of harmonic oscillators, the zero-point energy included.

    frequencies (...,Q,3N) are in THz, of wave vectors with `weights` (Q,) that sum to 1
    (phonons.grid), temperatures (T,) in K, from 0 on. Modes below `floor` (THz) are left out: they
    are the three that move the crystal as a whole. It is computed in float64, on the host.

    Raises: ValueError for imaginary frequencies beyond the floor, of which the lowest is named, and
    for temperatures below zero.

    >>> round(float(harmonic([[10.0]], [1.0], [0.0]).free_energy[0]), 4)
    0.0207
    """
    f, t = np.asarray(frequencies, np.float64), _checked(temperatures)
    if not f.min() > -floor:
        raise ValueError(
            message(
                f"a stable crystal, with frequencies above {-floor:g} THz",
                f"{f.min():.3g} THz",
                "relax it, take a larger supercell, or another phase: it has no harmonic free energy",
            )
        )
    kept = (f > floor) * np.asarray(weights, np.float64)[:, None]
    energy = PLANCK * np.where(f > floor, f, 1.0)[..., None]  # (...,Q,3N,1)
    with np.errstate(divide="ignore"):
        x = energy / (BOLTZMANN * t)  # inf at zero temperature
    few = np.exp(-x)
    occupied = few / -np.expm1(-x)
    heat = np.where(x < 700, x, 0.0)  # beyond, nothing is excited
    log = np.log1p(-few)
    summed = lambda terms: (terms * kept[..., None]).sum((-3, -2))
    return Harmonic(
        summed(energy / 2 + BOLTZMANN * t * log),
        summed(BOLTZMANN * (heat * occupied - log)),
        summed(BOLTZMANN * heat**2 * occupied * (1 + occupied)),
    )


def quasi_harmonic(
    volumes: Float[ArrayLike, " K"],
    energies: Float[ArrayLike, " K"],
    frequencies: Float[ArrayLike, "K Q 3*N"],
    weights: Float[ArrayLike, " Q"],
    temperatures: Float[ArrayLike, " T"],
    *,
    pressure: float = 0.0,
    floor: float = 0.01,
) -> Expansion:
    """Returns the thermal expansion of a crystal in the quasi-harmonic approximation.

    At each temperature F(V,T) = E(V) + F_vib(V,T) of at least four volumes (K,) (Angstrom^3, of one
    cell) is fitted by Birch and Murnaghan's equation of state, which is a polynomial of third degree
    in V^(-2/3). Its slope is -pressure (eV/Angstrom^3) at the volume in equilibrium. `energies` (K,)
    are those of the crystal at rest, in eV. The other arguments are those of `harmonic`. Entropies
    and heat capacities are fitted by the same polynomial, so that the expansion
    (dS/dV) / (bulk modulus) is a derivative in temperature without differences.

    Raises: ValueError for fewer than four volumes, for a temperature at which the volume is not
    among those that were given, naming it, and as `harmonic`.

    >>> v = np.linspace(18, 22, 5)
    >>> still = quasi_harmonic(v, 0.01 * (v ** (-2 / 3) - 20 ** (-2 / 3)) ** 2, np.zeros((5, 1, 3)), [1.0], [300.0])
    >>> round(float(still.volumes[0]), 6)
    20.0
    """
    v, e = np.asarray(volumes, np.float64), np.asarray(energies, np.float64)
    if v.ndim != 1 or e.shape != v.shape or len(set(v)) < PARAMETERS or not v.min() > 0:
        raise ValueError(
            message(
                f"at least {PARAMETERS} volumes, and an energy for each",
                f"volumes {spec(v.shape, v.dtype)} and energies {spec(e.shape, e.dtype)}",
                "give volumes on both sides of the one in equilibrium",
            )
        )
    t = _checked(temperatures)
    found = harmonic(frequencies, weights, t, floor=floor)
    curves = e[:, None] + found.free_energy  # (K,T)
    state = _Curve(v, curves)
    at = state.where(-pressure, t)
    slope, curvature = state(at, 1), state(at, 2)
    modulus = at * curvature
    expansion = _Curve(v, found.entropy)(at, 1) / modulus
    heat = _Curve(v, found.heat_capacity)(at, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        gamma = np.where(heat > 1e-12, expansion * modulus * at / heat, np.nan)
    return Expansion(
        t,
        at,
        state(at, 0) - slope * at,
        expansion,
        modulus,
        heat,
        heat + expansion**2 * modulus * at * t,
        gamma,
    )


def expansion(
    energy: Energy,
    structures: Sequence[tuple[Float[ArrayLike, "N 3"], Float[ArrayLike, "3 3"]]],
    masses: Float[ArrayLike, " N"],
    repeats: Repeats,
    temperatures: Float[ArrayLike, " T"],
    *,
    mesh: tuple[int, int, int] = (12, 12, 12),
    pressure: float = 0.0,
    **options: Any,
) -> Expansion:
    """Returns the thermal expansion of a crystal, from its phonons at several volumes.

    `structures` are (positions, cell) of the crystal at four volumes or more, each at rest in its
    cell (`scaled` makes them of a crystal whose symmetry leaves atoms no choice; elastic.at_pressure
    relaxes any). `mesh` is that of phonons.grid, and energy, masses, repeats and `options`
    (sum_rule, reach, chunk) are those of phonons.phonons; temperatures, pressure and errors those
    of `quasi_harmonic`. One program serves all volumes.

    Raises: TypeError for structures that are no pairs; ValueError as `quasi_harmonic` and
    phonons.phonons.
    """
    q, weights = grid(mesh)
    volumes: list[float] = []
    energies: list[float] = []
    frequencies: list[np.ndarray] = []
    for structure in structures:
        if not isinstance(structure, tuple | list) or len(structure) != 2:
            do = "take those of thermal.scaled, or (atoms.positions, atoms.cell.array)"
            got = type(structure).__name__
            raise TypeError(message("structures as pairs (positions, cell)", got, do))
        positions, cell = structure
        crystal = phonons(energy, positions, cell, masses, repeats, **options)
        frequencies.append(np.asarray(crystal.frequencies(q)))
        volumes.append(abs(np.linalg.det(np.asarray(cell, np.float64))))
        cells = crystal.constants.shape[2]
        energies.append(float(energy(*supercell(positions, cell, crystal.repeats))) / cells)
    curves = np.array(volumes), np.array(energies), np.array(frequencies)
    return quasi_harmonic(*curves, weights, temperatures, pressure=pressure)


def scaled(
    positions: Float[ArrayLike, "N 3"],
    cell: Float[ArrayLike, "3 3"],
    factors: Float[ArrayLike, " K"],
) -> list[tuple[Float[np.ndarray, "N 3"], Float[np.ndarray, "3 3"]]]:
    """Returns (positions, cell) with all lengths times each of the factors, for `expansion`.

    Raises: ValueError for factors that are not positive, as strains.

    >>> scaled(np.zeros((1, 3)), np.eye(3), [1.0, 2.0])[1][1][0].tolist()
    [2.0, 0.0, 0.0]
    """
    x = np.asarray(factors, np.float64)
    if x.ndim != 1 or not (x > 0).all():
        got = spec(x.shape, x.dtype) if x.ndim != 1 else f"{x.min():g}"
        do = "give factors of lengths around 1, as np.linspace(0.99, 1.03, 5)"
        raise ValueError(message("factors as [K], positive", got, do))
    return [(np.asarray(positions) * f, np.asarray(cell) * f) for f in x.tolist()]


class _Curve:
    """Functions of the volume, fitted by polynomials of third degree in x = (V / V_0)^(-2/3): one
    for each column of values (K,T)."""

    def __init__(self, volumes: np.ndarray, values: np.ndarray) -> None:
        self.volumes, self.reference = volumes, volumes.mean()
        basis = np.vander((volumes / self.reference) ** (-2 / 3) - 1, PARAMETERS, increasing=True)
        self.coefficients = np.linalg.lstsq(basis, values, rcond=None)[0]  # (4,T)

    def __call__(self, v: np.ndarray, order: int) -> np.ndarray:
        """The values, first or second derivatives in V, each function at its own volume (T,)."""
        x = (v / self.reference) ** (-2 / 3)
        c, y = self.coefficients, x - 1
        first = c[1] + y * (2 * c[2] + y * 3 * c[3])
        if order == 0:
            return c[0] + y * (c[1] + y * (c[2] + y * c[3]))
        inner = -2 / 3 * x / v  # dx/dV
        if order == 1:
            return first * inner
        return (2 * c[2] + 6 * c[3] * y) * inner**2 + first * (10 / 9) * x / v**2

    def where(self, slope: float, temperatures: np.ndarray) -> np.ndarray:
        """The volumes (T,), between those given, at which the slopes rise through this one."""
        low, high = (
            np.full_like(temperatures, v) for v in (self.volumes.min(), self.volumes.max())
        )
        inside = (self(low, 1) < slope) & (self(high, 1) > slope)
        if not inside.all():
            at = int(np.argmin(inside))
            side = "larger" if self(high, 1)[at] <= slope else "smaller"
            raise ValueError(
                message(
                    f"volumes on both sides of that in equilibrium at {temperatures[at]:g} K",
                    f"those from {low[at]:.4g} to {high[at]:.4g} Angstrom^3",
                    f"add {side} ones, or leave that temperature out",
                )
            )
        for _ in range(60):  # bisection: the last bit
            middle = (low + high) / 2
            below = self(middle, 1) < slope
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return (low + high) / 2


def _checked(temperatures: Any) -> Float[np.ndarray, " T"]:
    t = np.asarray(temperatures, np.float64)
    if t.ndim != 1 or not (t >= 0).all():
        got = spec(t.shape, t.dtype) if t.ndim != 1 else f"{t.min():g} K"
        raise ValueError(message("temperatures as [T], in K", got, "give a row of them, from 0 on"))
    return t
