"""Phonons of a crystal at any wave vector, from the Hessian of a supercell: force constants,
frequencies, density of states, Grueneisen parameters."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Complex, Float

from bridge.errors import message, spec
from jax_side.potentials.potential import array
from jax_side.potentials.second import UNITS, Energy, checked_cell, hessian_rows, respond
from jax_side.properties.supercells import (
    TIE,
    Repeats,
    check_reach,
    half_width,
    matrix,
    nearest,
    supercell,
)

SEEN = 1e-3  # force constants at the border that are this part of the largest: a warning
WRONG = 1e-2  # the same for what the sum rule and the symmetry take away
GENERAL = (0.137, 0.261, 0.389)  # a wave vector without symmetry
Constants = Float[jax.Array, "N 3 L N 3"]
Points = Float[ArrayLike, "*Q 3"]  # wave vectors in units of the reciprocal lattice vectors


def force_constants(
    energy: Energy,
    positions: Float[ArrayLike, "N 3"],
    cell: Float[ArrayLike, "3 3"],
    repeats: Repeats,
    *,
    chunk: int | None = None,
) -> Constants:
    """Returns the force constants of a supercell, (N,3,L,N,3) in eV/Angstrom^2: d2E / dr_ia dr_Ljb of
    atom i in the first cell and atom j in cell L.

    `energy(positions, cell)` is the energy in eV of the whole supercell, whose atoms are in the
    order of supercells.supercell, that of ASE's `atoms.repeat(repeats)`: a potential bound to the
    supercell's atomic numbers, or pure JAX. positions (N,3) and cell (3,3), by rows, are those of
    the crystal, in Angstrom. Only the 3 N rows of the first cell are made, all from one record of
    the forward; with `chunk` so many at a time, which bounds the memory. It is a pure function of
    positions and cell: jit it, with energy, repeats and chunk static, and differentiate it.

    Raises: ValueError as second.hessian_rows, for repeats that are none, and for a missing cell.

    >>> def chain(r, h):
    ...     return 0.5 * ((jnp.roll(r, -1, 0) - r)[:-1] ** 2).sum()
    >>> force_constants(chain, jnp.zeros((1, 3)), jnp.eye(3), (1, 1, 3))[0, 0, :, 0, 0].tolist()
    [1.0, -1.0, 0.0]
    """
    r, h = supercell(positions, cell, repeats)
    n = jnp.shape(positions)[0]
    rows = hessian_rows(energy, r, h, np.arange(3 * n), chunk=chunk)
    return rows.reshape(n, 3, -1, n, 3)


def phonons(
    energy: Energy,
    positions: Float[ArrayLike, "N 3"],
    cell: Float[ArrayLike, "3 3"],
    masses: Float[ArrayLike, " N"],
    repeats: Repeats,
    *,
    sum_rule: bool = True,
    reach: float | None = None,
    tolerance: float = TIE,
    chunk: int | None = None,
) -> Phonons:
    """Returns the phonons of a crystal, from one jitted Hessian of its supercell.

    Arguments are those of `force_constants`; `masses` (N,) are in amu. The crystal should be at
    rest: with forces, these are curvatures that belong to no state. Frequencies at wave vectors
    that the supercell holds a whole number of times are exact, and all others are interpolated,
    which is right if force constants end within the supercell.

        sum_rule    True takes from the force constants what makes a crystal resist being moved as a
                    whole, the smallest change that keeps them symmetric. How large that was is
                    `.drift`
        reach       distance in Angstrom beyond which force constants don't matter. None stands for
                    the cutoff of energy.card. A supercell that is too small for it is refused
        tolerance   images whose distances differ by less (Angstrom) share a force constant

    Where the potential may reach farther than the supercell (messages that pass over several
    cutoffs, long-ranged models, an energy without a card), and what is left of the force constants
    at its border is more than 1/1000 of the largest, or can't be seen, a warning says how much.
    All this looks at values, so that inside of jit `force_constants` is the function to take.

    Raises: ValueError for a supercell that is too small, saying by how much; for masses of another
    shape, for what is not finite, where no atom feels another, and as `force_constants`.

    >>> def chain(r, h):  # springs of 1 eV/Angstrom^2 along z
    ...     return 0.5 * ((jnp.roll(r, -1, 0).at[-1].add(h[2]) - r) ** 2).sum()
    >>> found = phonons(chain, jnp.zeros((1, 3)), jnp.eye(3), [1.0], (1, 1, 4), reach=0.0)
    >>> [round(float(found.frequencies([0.0, 0.0, q])[0]), 1) for q in (0.25, 0.5)]
    [22.1, 31.3]
    """
    r, h = array("positions", positions), checked_cell(cell)
    supercell(r, h, repeats)  # what is wrong with them is said before anything runs
    if not np.isfinite(r).all():
        atom = int(np.argmin(np.isfinite(r).all(1)))
        raise ValueError(
            message("finite positions", f"{r[atom]} for atom {atom}", "look at the step before")
        )
    m = jnp.asarray(masses, r.dtype)
    if m.shape != r.shape[:1] or not (np.asarray(m) > 0).all():
        raise ValueError(
            message(
                f"masses as [{len(r)}], positive",
                spec(m.shape, m.dtype),
                "give one mass in amu for each atom of the crystal",
            )
        )
    rows = tuple(map(tuple, matrix(repeats).tolist()))
    fits, half = check_reach(energy, h, repeats, reach), half_width(h, repeats)
    raw = constants_of(energy, r, h, rows, chunk)
    vectors, weights = (
        jnp.asarray(x, r.dtype) for x in nearest(r, h, repeats, tolerance=tolerance)
    )
    largest = float(abs(raw).max())
    if not largest > 0:
        do = "look at the cell: is it that of the crystal, not of its supercell, and in Angstrom?"
        raise ValueError(message("force constants that are not all zero", str(largest), do))
    drift = float(abs(raw.sum((2, 3))).max()) / largest
    border = _border(raw, vectors, half, h) / largest
    skew = fourier(raw, vectors, weights, jnp.asarray(GENERAL, r.dtype))
    asymmetry = float(abs(skew - skew.conj().T).max() / abs(skew).max() / 2)
    if not fits and not border <= SEEN:
        warnings.warn(
            message(
                f"force constants that end within {half:.2f} Angstrom, half of the supercell",
                f"{border:.1g} of the largest at its border"
                f"{', since no pair is that far apart' if np.isnan(border) else ''}",
                "compare with a larger supercell, or say how far they matter: reach=",
            ),
            stacklevel=2,
        )
    if max(asymmetry, drift if sum_rule else 0.0) > WRONG:
        warnings.warn(
            message(
                "force constants that are symmetric, with rows that sum to zero",
                f"{asymmetry:.1g} of the largest without symmetry, rows that sum to {drift:.1g} of it",
                "look at the energy: are its forces its gradient, and does it stay as all atoms move?",
            ),
            stacklevel=2,
        )
    constants = centred(raw) if sum_rule else raw
    return Phonons(
        constants, m, vectors, weights, r, h, drift, asymmetry, border, rows, bool(sum_rule)
    )


@partial(
    jax.tree_util.register_dataclass,
    data_fields="constants masses vectors weights positions cell drift asymmetry border".split(),
    meta_fields=["repeats", "sum_rule"],
)
@dataclass(frozen=True)
class Phonons:
    """What `phonons` returns: a pytree, whose methods are JAX functions of wave vectors q.

        constants           (N,3,L,N,3) eV/Angstrom^2, of `force_constants`
        masses              (N,) amu
        vectors, weights    of the nearest images: supercells.nearest
        positions, cell     the crystal, (N,3) and (3,3) in Angstrom
        drift               the largest sum of force constants over all atoms, which should be zero,
                            before it was made zero: a part of the largest force constant
        asymmetry           how far D(q) was from Hermitian at a general q, before its Hermitian part
                            was taken: a part of its largest element. Forces that are the gradient
                            of an energy make it zero
        border              the largest force constant at the border of the supercell, a part of the
                            largest of all; nan if no pair of atoms is that far apart
        repeats             the supercell's matrix, as tuples
        sum_rule            whether the acoustic sum rule was imposed

    q are (...,3), in units of the reciprocal lattice vectors: of the row q the phase at r is
    2 pi q h^-1 r. For a path, take the kpts of ASE's `atoms.cell.bandpath()`. Charges and their
    fields are no part of it: longitudinal and transverse optical modes of a polar crystal don't
    split at q -> 0, unless the energy itself is that long-ranged.
    """

    constants: Constants
    masses: Float[jax.Array, " N"]
    vectors: Float[jax.Array, "N L N K 3"]
    weights: Float[jax.Array, "N L N K"]
    positions: Float[jax.Array, "N 3"]
    cell: Float[jax.Array, "3 3"]
    drift: float
    asymmetry: float
    border: float
    repeats: tuple[tuple[int, ...], ...]
    sum_rule: bool

    def dynamical_matrices(self, q: Points) -> Complex[jax.Array, "*Q 3*N 3*N"]:
        """Returns D(q), (...,3N,3N) in eV/Angstrom^2/amu, Hermitian: with phases exp(2 pi i q.v),
        where v are the vectors between atoms, as phonopy has them.

        Raises: ValueError for q of another shape.
        """
        return self._at(_matrix, q)

    def frequencies(
        self, q: Points, *, unit: Literal["THz", "cm^-1", "meV"] = "THz"
    ) -> Float[jax.Array, "*Q 3*N"]:
        """Returns the frequencies (...,3N) at q, ascending; -|f| stands for an imaginary one.

        `unit` is as in second.frequencies.

        Raises: ValueError for q of another shape, and an unknown unit.
        """
        if unit not in UNITS:
            raise ValueError(
                message(f"a unit among {', '.join(UNITS)}", repr(unit), "take one of these")
            )
        return UNITS[unit] * self._at(_roots_only, q)

    def modes(
        self, q: Points
    ) -> tuple[Float[jax.Array, "*Q 3*N"], Complex[jax.Array, "*Q 3*N 3*N"]]:
        """Returns the frequencies (...,3N) at q in THz, ascending, and the modes (...,3N,3N) in the
        columns: D(q) e = (2 pi f)^2 e, of length 1, weighted by the roots of the masses.

        Raises: ValueError for q of another shape.
        """
        found, vectors = self._at(_roots_and_modes, q)
        return UNITS["THz"] * found, vectors

    def gruneisen(self, q: Points, slope: Constants) -> Float[jax.Array, "*Q 3*N"]:
        """Returns the mode Grueneisen parameters - d ln f / d ln V (...,3N), in the order of the
        frequencies at q.

        `slope` is that of `volume_slope`. A mode without a frequency, as the acoustic ones at q = 0,
        has none, and is nan.

        Raises: ValueError for q of another shape.
        """
        return self._at(_gruneisen, q, centred(slope) if self.sum_rule else slope)

    def dos(
        self,
        mesh: tuple[int, int, int],
        frequencies: Float[ArrayLike, " F"],
        *,
        width: float = 0.1,
    ) -> Float[jax.Array, " F"]:
        """Returns the density of states (F,) per THz at the frequencies (F,) in THz: 3 N modes in
        all.

        It is that of `mesh` wave vectors along the three axes (`grid`), each mode a Gaussian of the
        standard deviation `width`, in THz.

        Raises: ValueError for frequencies of another shape, and as `grid`.

        >>> lattice = phonons(lambda r, h: (r**2).sum() / 2, jnp.zeros((1, 3)), jnp.eye(3), [1.0], (1, 1, 1), sum_rule=False, reach=0.0)
        >>> round(float(lattice.dos((2, 2, 2), jnp.linspace(14, 17, 301)).sum()) / 100, 3)
        3.0
        """
        q, weights = grid(mesh)
        at = jnp.asarray(frequencies, self.masses.dtype)
        if at.ndim != 1:
            do = "give a row of them, as np.linspace(0, 10, 200)"
            raise ValueError(message("frequencies as [F], in THz", spec(at.shape, at.dtype), do))
        found = self.frequencies(q)
        return _density(found, jnp.asarray(weights, found.dtype), at, width)

    def _at(self, f: Any, q: Points, *more: jax.Array) -> Any:
        """f(self, q, *more) at each of the wave vectors."""
        q = jnp.asarray(q, self.masses.dtype)
        if q.shape[-1:] != (3,):
            raise ValueError(
                message(
                    "wave vectors as [..., 3]",
                    spec(q.shape, q.dtype),
                    "give three numbers each, in units of the reciprocal lattice vectors",
                )
            )
        found = _mapped(f, self, q.reshape(-1, 3), *more)
        return jax.tree.map(lambda x: x.reshape(*q.shape[:-1], *x.shape[1:]), found)


def volume_slope(
    energy: Energy, phonons: Phonons, *, relaxed: bool = True, chunk: int | None = None
) -> Constants:
    """Returns the derivatives of force constants in the logarithm of the volume, d Phi / d ln V,
    (N,3,L,N,3) in eV/Angstrom^2: what `Phonons.gruneisen` takes.

    All lengths grow alike. It is one forward derivative of `force_constants`, the third derivative
    of the energy, and no finite difference. `energy` is that of which the phonons are. With
    `relaxed` the atoms go along to where the forces vanish in the changed cell, which makes a
    difference in crystals that leave them free to. Where the model's own second derivative jumps (a
    neighbour comes at a kink of the cutoff function), this one does not see it.

    Raises: what the energy raises that has no third derivatives.
    """
    return _slope(energy, phonons.positions, phonons.cell, phonons.repeats, relaxed, chunk)


def grid(
    mesh: Sequence[int], *, shifted: bool = False
) -> tuple[Float[np.ndarray, "Q 3"], Float[np.ndarray, " Q"]]:
    """Returns wave vectors (Q,3) on an even mesh around q = 0, and their weights (Q,), whose sum is
    1.

    `mesh` are three counts. Of q and -q, which have the same frequencies, one is there, with the
    weight of both. `shifted` puts them half a step away from q = 0.

    Raises: ValueError for a mesh that is not three positive counts.

    >>> points, weights = grid((1, 1, 3))
    >>> points[:, 2].round(3).tolist(), weights.round(3).tolist()
    ([0.0, 0.333], [0.333, 0.667])
    """
    counts = np.asarray(mesh)
    if counts.shape != (3,) or counts.dtype.kind not in "iu" or (counts < 1).any():
        raise ValueError(
            message("a mesh of three positive int", str(mesh), "give counts as (20, 20, 20)")
        )
    doubled = [2 * np.arange(n) + shifted for n in counts]  # in units of half a step
    points = np.stack(np.meshgrid(*doubled, indexing="ij"), -1).reshape(-1, 3)
    number = lambda x: np.ravel_multi_index((x % (2 * counts)).T, 2 * counts)
    one, other = number(points), number(-points)
    kept = one <= other
    weights = np.where(one < other, 2.0, 1.0)[kept] / len(points)
    return points[kept] / (2.0 * counts), weights


def centred(constants: Constants) -> Constants:
    """Returns force constants of which each row and each column sums to zero: the nearest ones, with
    the same symmetry."""
    n = constants.shape[2] * constants.shape[3]
    rows = constants.sum((2, 3)) / n  # (N,3,3) of atom i
    whole = rows.mean(0)
    columns = rows.transpose(2, 0, 1)  # (3,N,3): those of atom j
    return constants - rows[:, :, None, None] - columns[:, None] + whole[:, None, None]


def fourier(
    constants: Constants,
    vectors: Float[jax.Array, "N L N K 3"],
    weights: Float[jax.Array, "N L N K"],
    q: Float[jax.Array, " 3"],
) -> Complex[jax.Array, "3*N 3*N"]:
    """Returns the sum of force constants times exp(2 pi i q.v), v and weights as of
    supercells.nearest."""
    waves = (weights * jnp.exp(2j * np.pi * (vectors @ q))).sum(-1)
    n = 3 * len(constants)
    return jnp.einsum("ialjb,ilj->iajb", constants, waves).reshape(n, n)


@partial(jax.jit, static_argnums=(0, 3, 4))
def constants_of(energy: Energy, positions: Any, cell: Any, repeats: Any, chunk: Any) -> Constants:
    """Returns `force_constants`, compiled once for each energy, supercell and dtype."""
    return force_constants(energy, positions, cell, repeats, chunk=chunk)


@partial(jax.jit, static_argnums=(0, 3, 4, 5))
def _slope(energy, positions, cell, repeats, relaxed, chunk):
    found = lambda r, h: force_constants(energy, r, h, repeats, chunk=chunk)
    along = positions / 3, cell / 3
    if relaxed:
        n = len(positions)
        gradient = lambda r, h: jax.grad(energy)(*supercell(r, h, repeats))[:n]
        slope = jax.jvp(gradient, (positions, cell), along)[1]
        moved = respond(found(positions, cell).sum(2), slope)
        along = along[0] - moved, along[1]
    return jax.jvp(found, (positions, cell), along)[1]


@partial(jax.jit, static_argnums=0)
def _mapped(f, phonons, q, *more):
    return jax.lax.map(lambda q: f(phonons, q, *more), q, batch_size=64)


def _matrix(phonons: Phonons, q: jax.Array) -> Complex[jax.Array, "3*N 3*N"]:
    return _hermitian(phonons, phonons.constants, q)


def _hermitian(phonons: Phonons, constants: Constants, q: jax.Array) -> jax.Array:
    """The Hermitian part of the Fourier sum of force constants, over the roots of the masses."""
    root = jnp.sqrt(jnp.repeat(phonons.masses, 3))
    d = fourier(constants, phonons.vectors, phonons.weights, q) / root[:, None] / root
    return (d + d.conj().T) / 2


def _roots_only(phonons: Phonons, q: jax.Array) -> Float[jax.Array, " 3*N"]:
    return _roots(jnp.linalg.eigvalsh(_matrix(phonons, q)))


def _roots_and_modes(phonons: Phonons, q: jax.Array) -> tuple[jax.Array, jax.Array]:
    squares, vectors = jnp.linalg.eigh(_matrix(phonons, q))
    return _roots(squares), vectors


def _gruneisen(phonons: Phonons, q: jax.Array, slope: Constants) -> Float[jax.Array, " 3*N"]:
    squares, vectors = jnp.linalg.eigh(_matrix(phonons, q))
    slopes = jnp.einsum("in,ij,jn->n", vectors.conj(), _hermitian(phonons, slope, q), vectors).real
    rounding = 64 * jnp.finfo(slope.dtype).eps * abs(phonons.constants).max() / phonons.masses.min()
    still = abs(squares) <= rounding
    return jnp.where(still, jnp.nan, -slopes / (2 * jnp.where(still, 1, squares)))


@jax.jit
def _density(found, weights, at, width):
    bell = lambda f: weights @ jnp.exp(-0.5 * ((found - f) / width) ** 2).sum(-1)
    return jax.lax.map(bell, at) / (width * np.sqrt(2 * np.pi))


def _border(constants: Any, vectors: Any, half: float, cell: Any) -> float:
    """The largest force constant of pairs of which another image may be as near; nan for none."""
    distances = np.linalg.norm(vectors[..., 0, :] @ np.asarray(cell, np.float64), axis=-1)
    sizes = np.asarray(abs(constants).max((1, 4)), np.float64)
    far = sizes[distances > half - TIE]
    return float(far.max()) if len(far) else np.nan


def _roots(squares: jax.Array) -> jax.Array:
    return jnp.sign(squares) * jnp.sqrt(abs(squares))
