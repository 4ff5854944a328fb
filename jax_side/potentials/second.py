"""Second derivatives of any energy(positions, cell) of JAX: Hessians and their rows, elastic
constants, vibrations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from bridge.errors import message, spec
from jax_side.potentials.potential import array

THZ = 15.6333042  # sqrt(eV/Angstrom^2/amu) / 2 pi in THz (CODATA 2018)
UNITS = {"THz": THZ, "cm^-1": THZ * 33.3564095, "meV": THZ * 4.13566770}
# the two axes of each of Voigt's indices: xx, yy, zz, yz, xz, xy
FIRST = np.array([0, 1, 2, 1, 0, 0], "int32")
SECOND = np.array([0, 1, 2, 2, 2, 1], "int32")
STIFFNESSES = ("energy", "lagrangian", "stress")

Energy = Callable[..., Float[jax.Array, ""]]  # energy(positions, cell) in eV
Positions = Float[ArrayLike, "N 3"]  # in Angstrom
Cell = Float[ArrayLike, "3 3"]  # lattice vectors as rows, in Angstrom
Hessian = Float[jax.Array, "N 3 N 3"]
# numbers (K,) of rows, or (K,2) pairs of atom and axis
Rows = Int[ArrayLike, "K *pair"] | Sequence[Any]
Voigt = Float[jax.Array, "6 6"]


def hvp(
    energy: Energy, positions: Positions, cell: Cell | None, vectors: Float[ArrayLike, "*K N 3"]
) -> Float[jax.Array, "*K N 3"]:
    """Returns the Hessian times vectors, H v = d/dx grad E(r + x v), without making H.

    `energy(positions, cell)` is any JAX function to a scalar in eV: a potential (bridge.potential,
    jax_side.potentials.potential) of one system, or pure JAX. Shapes: positions (N,3), cell (3,3)
    by rows or None, vectors (N,3) or (K,N,3). The result has the shape of the vectors, and the unit
    eV/Angstrom^2 times theirs. It is the pullback of the gradient, since H is symmetric. Through a
    bridged model a pullback costs one forward and two backward passes, less than its jvp does. All K
    vectors are served at once, by vmap. jit, vmap, and derivatives work, as far as the model has
    them.

    Raises: ValueError for positions or vectors of another shape, and for an energy that is no
    scalar.

    >>> hvp(lambda r, h: (r**3).sum(), jnp.ones((1, 3)), None, jnp.array([[1.0, 0, 2]])).tolist()
    [[6.0, 0.0, 12.0]]
    """
    r, v = array("positions", positions), array("vectors", vectors)
    pull = _pullback(energy, r, cell)
    if v.ndim not in (2, 3) or v.shape[-2:] != r.shape or v.dtype != r.dtype:
        n = len(r)
        raise ValueError(
            message(
                f"vectors as {spec((n, 3), r.dtype)} or {spec(('K', n, 3), r.dtype)}",
                spec(v.shape, v.dtype),
                "give one vector for each atom, in the dtype of the positions",
            )
        )
    return pull(v) if v.ndim == 2 else jax.vmap(pull)(v)


def hessian_rows(
    energy: Energy,
    positions: Positions,
    cell: Cell | None,
    rows: Rows,
    *,
    chunk: int | None = None,
) -> Float[jax.Array, "K N 3"]:
    """Returns some rows of the Hessian, (K,N,3) in eV/Angstrom^2, of which rows[k] is
    d/dr (dE/dr_ia) at fixed cell.

    `rows` are (K,) int, the numbers 3 i + a of atom i and axis a, or (K,2) int, the pairs (i, a).
    energy, positions and cell are those of `hvp`. All rows are made at once, by jax.vmap over the
    cotangents of one gradient. With `chunk` so many are made at a time, which bounds the memory.

    Raises: ValueError as `hvp`, and for rows that do not exist (under tracing, where values can't
    be seen, such a row is NaN).

    >>> hessian_rows(lambda r, h: r[0, 0] * r[1, 2], jnp.ones((2, 3)), None, [(0, 0)]).tolist()
    [[[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]]
    """
    r = array("positions", positions)
    pull = _pullback(energy, r, cell)
    numbers = _flat_rows(rows, r.size)
    units = jax.nn.one_hot(numbers, r.size, dtype=r.dtype).reshape(-1, *r.shape)
    return jnp.where(numbers[:, None, None] < 0, jnp.nan, _mapped(pull, units, chunk))


def hessian(
    energy: Energy, positions: Positions, cell: Cell | None = None, *, chunk: int | None = None
) -> Hessian:
    """Returns d2E/dr dr at fixed cell, (N,3,N,3) in eV/Angstrom^2.

    These are all rows of `hessian_rows`, with the same arguments and errors. Nothing is
    symmetrised: how far H is from symmetric is how far the model's forces are from the gradient of
    an energy.

    >>> hessian(lambda r, h: (r**2).sum(), jnp.ones((1, 3))).reshape(3, 3).diagonal().tolist()
    [2.0, 2.0, 2.0]
    """
    r = array("positions", positions)
    pull = _pullback(energy, r, cell)
    units = jnp.eye(r.size, dtype=r.dtype).reshape(-1, *r.shape)
    return _mapped(pull, units, chunk).reshape(*r.shape, *r.shape)


def elastic_constants(
    energy: Energy,
    positions: Positions,
    cell: Cell,
    relaxed: bool = True,
    *,
    stiffness: Literal["energy", "lagrangian", "stress"] = "energy",
    chunk: int | None = None,
) -> Voigt:
    """Returns the elastic constants (6,6) in eV/Angstrom^3, in Voigt order xx, yy, zz, yz, xz, xy
    (1 eV/Angstrom^3 = 160.2177 GPa).

    The strain is symmetric, r -> r(I+e), h -> h(I+e), with e_yz = eta_4 / 2 and so on, V = |det h|:

        relaxed=False   clamped ions. The atoms follow the strain, and K = d2E/deta deta / V
        relaxed=True    the atoms relax in the strained cell. K = (d2E/deta deta - L^T H^+ L) / V,
                        where L = d2E/dr deta, and H^+ is the pseudo-inverse of the Hessian with
                        uniform translations projected out (Lutsko, J. Appl. Phys. 65, 2991 (1989))

    For relaxed=True the forces must vanish, so relax the structure first. (With forces, K is a
    curvature that belongs to no physical state.) For an unstable crystal, whose H has negative
    modes, the numbers have no meaning.

    Without stress all stiffnesses are the same. Under a stress s (tension positive) they differ, and
    `stiffness` says which one is meant (Barron and Klein, Proc. Phys. Soc. 85, 523 (1965); Wallace,
    Thermodynamics of Crystals (1972)). With T_ijkl = (d_ik s_jl + d_il s_jk + d_jk s_il + d_jl
    s_ik) / 4 they are:

        "energy"        K itself, the second derivatives of the energy in e. It is symmetric in
                        Voigt's indices
        "lagrangian"    C = K - T, the second derivatives in the Lagrangian strain e + e^2 / 2.
                        These are the thermodynamic elastic constants
        "stress"        B = K + T - s_ij d_kl, the derivatives ds_ij / de_kl of the Cauchy stress,
                        which finite differences of stresses give (those of ASE's too). It decides
                        on stability. It is not symmetric if s is not a pressure

    energy, positions (N,3) and cell (3,3), by rows, are as for `hvp`. All axes are periodic. It
    costs 6 pullbacks of the gradient, and 3 N more for relaxed=True (`chunk` is as in
    `hessian_rows`). Under jit, `relaxed` and `stiffness` are static.

    Raises: ValueError as `hvp`, for a missing or singular cell (under tracing such a cell gives no
    finite number), and for an unknown stiffness.

    >>> spring = lambda r, h: (h**2).sum() / 2
    >>> elastic_constants(spring, jnp.zeros((1, 3)), jnp.eye(3)).diagonal().tolist()
    [1.0, 1.0, 1.0, 0.5, 0.5, 0.5]
    """
    if stiffness not in STIFFNESSES:
        raise ValueError(
            message(
                f"stiffness to be one of {', '.join(STIFFNESSES)}",
                repr(stiffness),
                "take one of these",
            )
        )
    r, h = array("positions", positions), checked_cell(cell)
    volume = abs(jnp.linalg.det(h))
    stress, (mixed, curvature) = _strain_derivatives(energy, r, h)
    if relaxed:
        curvature = curvature - _relaxation(hessian(energy, r, h, chunk=chunk), mixed)
    return _stiffness(curvature / volume, stress / volume, stiffness)


def dynamical_matrix(
    energy: Energy,
    positions: Positions,
    cell: Cell | None,
    masses: Float[ArrayLike, " N"],
    *,
    chunk: int | None = None,
) -> Hessian:
    """Returns the dynamical matrix D_ia,jb = H_ia,jb / sqrt(m_i m_j), (N,3,N,3) in
    eV/Angstrom^2/amu, of a crystal at q = 0, or of a molecule (cell None).

    `masses` (N,) are in amu, and are cast to the dtype of the positions. The other arguments are
    those of `hessian`. For other wave vectors take a supercell: they are at its q = 0.

    Raises: ValueError as `hvp`, for masses of another shape and for those that are not positive.

    >>> dynamical_matrix(lambda r, h: (r**2).sum(), jnp.ones((1, 3)), None, jnp.array([4.0]))[0, :, 0].diagonal().tolist()
    [0.5, 0.5, 0.5]
    """
    r = array("positions", positions)
    m = jnp.asarray(masses, r.dtype)
    traced = isinstance(m, jax.core.Tracer)
    if m.shape != r.shape[:1] or not (traced or (np.asarray(m) > 0).all()):
        raise ValueError(
            message(
                f"masses as [{len(r)}], positive",
                spec(m.shape, m.dtype),
                "give one mass in amu for each atom",
            )
        )
    root = jnp.sqrt(m)[:, None]
    return hessian(energy, r, cell, chunk=chunk) / root[:, None, None] / root


def frequencies(
    energy: Energy,
    positions: Positions,
    cell: Cell | None,
    masses: Float[ArrayLike, " N"],
    *,
    unit: Literal["THz", "cm^-1", "meV"] = "THz",
    chunk: int | None = None,
) -> Float[jax.Array, " 3*N"]:
    """Returns the frequencies (3N,) at q = 0, ascending, in "THz" (f, not 2 pi f), "cm^-1" or "meV"
    (h f).

    Arguments and errors are those of `dynamical_matrix`, of whose symmetric part the frequencies
    are the square roots of the eigenvalues, over 2 pi. A negative eigenvalue gives -|f|, which
    stands for an imaginary frequency. Three frequencies are acoustic. They are zero but for rounding
    if the energy does not change as all atoms move together (a molecule has three rotations as
    well).

    >>> [round(float(f), 2) for f in frequencies(lambda r, h: (r**2).sum() / 2, jnp.ones((1, 3)), None, jnp.ones(1))]
    [15.63, 15.63, 15.63]
    """
    if unit not in UNITS:
        raise ValueError(
            message(f"a unit among {', '.join(UNITS)}", repr(unit), "take one of these")
        )
    d = dynamical_matrix(energy, positions, cell, masses, chunk=chunk)
    squares = jnp.linalg.eigvalsh(d.reshape(3 * len(d), 3 * len(d)))
    return UNITS[unit] * jnp.sign(squares) * jnp.sqrt(abs(squares))


def respond(hessian: Hessian, gradient: Float[jax.Array, "N 3"]) -> Float[jax.Array, "N 3"]:
    """Returns H^+ g (N,3) in Angstrom: minus this is how far atoms go under the gradient (N,3) in
    eV/Angstrom until it vanishes.

    H^+ is the pseudo-inverse of the symmetric part of the Hessian (N,3,N,3), with uniform
    translations projected out of it, and of the gradient.

    >>> spring = hessian(lambda r, h: ((r[1] - r[0]) ** 2).sum(), jnp.zeros((2, 3)))
    >>> respond(spring, jnp.array([[-1.0, 0, 0], [1, 0, 0]]))[:, 0].round(4).tolist()
    [-0.25, 0.25]
    """
    h = _centred(_centred(hessian).transpose(2, 3, 0, 1)).reshape(2 * [gradient.size])
    inverse = jnp.linalg.pinv((h + h.T) / 2, hermitian=True)
    return (inverse @ _centred(gradient).ravel()).reshape(gradient.shape)


def checked_cell(cell: Any) -> Float[jax.Array, "3 3"]:
    """Returns the cell (3,3) of a crystal as a JAX array. One without a volume is NaN where values
    can't be seen.

    Raises: ValueError for a cell that is missing, of another shape, or singular.

    >>> checked_cell(jnp.eye(3)).shape
    (3, 3)
    """
    do = "give the lattice vectors as rows: what is not periodic has no elastic constants, and phonons at q = 0 only"
    if cell is None:
        raise ValueError(message("a cell as [3, 3]", "None", do))
    cell = array("cell", cell)
    if cell.shape != (3, 3):
        raise ValueError(message("a cell as [3, 3]", spec(cell.shape, cell.dtype), do))
    rounding = 8 * jnp.finfo(cell.dtype).eps * jnp.linalg.norm(cell, axis=-1).prod()
    flat = ~(abs(jnp.linalg.det(cell)) > rounding)  # True for NaN too
    if not isinstance(flat, jax.core.Tracer) and flat:
        raise ValueError(message("an invertible cell", "a singular one", do))
    return jnp.where(flat, jnp.nan, cell)


def _pullback(energy: Energy, positions: jax.Array, cell: Any) -> Callable[[jax.Array], jax.Array]:
    """v -> H v, from the gradient in the positions."""
    if positions.ndim != 2 or positions.shape[1] != 3:
        raise ValueError(
            message(
                "positions as [N, 3]",
                spec(positions.shape, positions.dtype),
                "for several structures use jax.vmap",
            )
        )
    gradient = jax.grad(partial(_scalar, energy))
    pull = jax.vjp(lambda r: gradient(r, cell), positions)[1]
    return lambda v: pull(v)[0]


def _scalar(energy: Energy, positions: jax.Array, cell: Any) -> Float[jax.Array, ""]:
    value = energy(positions, cell)
    if jnp.shape(value) != ():
        do = "bind the potential to one system (no batch=), and use jax.vmap for several"
        raise ValueError(message("a scalar energy", spec(value.shape, value.dtype), do))
    return value


def _mapped(
    pull: Callable[[jax.Array], jax.Array], vectors: jax.Array, chunk: int | None
) -> jax.Array:
    """The pullback of each vector."""
    if chunk is None:
        return jax.vmap(pull)(vectors)
    return jax.lax.map(pull, vectors, batch_size=chunk)


def _flat_rows(rows: Any, n: int) -> Int[jax.Array, " K"]:
    """The numbers of rows among n. A row that does not exist is an error if its value can be seen,
    else -1."""
    seen = not isinstance(rows, jax.core.Tracer)
    rows = np.asarray(rows) if seen else rows
    integers = jnp.issubdtype(rows.dtype, jnp.integer)
    if not integers or rows.ndim not in (1, 2) or rows.shape[1:] not in ((), (2,)):
        raise ValueError(
            message(
                "rows as int [K] or [K, 2]",
                spec(rows.shape, rows.dtype),
                "give 3 atom + axis, or pairs (atom, axis)",
            )
        )
    limit = n if rows.ndim == 1 else np.array([n // 3, 3])
    outside = (rows < 0) | (rows >= limit)
    bad = outside.reshape(len(rows), -1).any(1)
    if seen and bad.any():
        raise ValueError(
            message(
                f"rows of {n // 3} atoms and 3 axes", str(rows[bad][0].tolist()), "count from 0"
            )
        )
    if rows.ndim == 2:
        rows = 3 * rows[:, 0] + rows[:, 1]
    return jnp.where(bad, -1, rows)


def _strain_derivatives(
    energy: Energy, positions: jax.Array, cell: jax.Array
) -> tuple[Float[jax.Array, " 6"], tuple[Float[jax.Array, "6 N 3"], Voigt]]:
    """dE/deta (6,), and d2E/dr deta (6,N,3), d2E/deta deta (6,6)."""

    def strained(r, eta):
        strain = jnp.zeros((3, 3), r.dtype)
        strain = strain.at[FIRST, SECOND].add(eta / 2).at[SECOND, FIRST].add(eta / 2)
        deform = jnp.eye(3, dtype=r.dtype) + strain
        return _scalar(energy, r @ deform, cell @ deform)

    zero = jnp.zeros(6, positions.dtype)
    slope, pull = jax.vjp(lambda r, eta: jax.grad(strained, 1)(r, eta), positions, zero)
    return slope, jax.vmap(pull)(jnp.eye(6, dtype=positions.dtype))


def _relaxation(h: Hessian, mixed: Float[jax.Array, "6 N 3"]) -> Voigt:
    """L^T H^+ L, what the relaxing atoms take from the curvature. Uniform translations are
    projected out of both."""
    return jnp.einsum("kia,lia->kl", mixed, jax.vmap(partial(respond, h))(mixed))


def _centred(x: jax.Array) -> jax.Array:
    """(...,N,3) without its part along uniform translations."""
    return x - x.mean(-2, keepdims=True)


def _stiffness(k: Voigt, s: Float[jax.Array, " 6"], name: str) -> Voigt:
    """K turned into the stiffness of that name, under the stress s."""
    k = (k + k.T) / 2
    matrix = jnp.zeros((3, 3), s.dtype).at[FIRST, SECOND].set(s).at[SECOND, FIRST].set(s)
    i, j, unit = FIRST, SECOND, jnp.eye(3, dtype=s.dtype)
    pairs = [(i, j, i, j), (i, j, j, i), (j, i, i, j), (j, i, j, i)]
    t = sum(unit[jnp.ix_(a, c)] * matrix[jnp.ix_(b, d)] for a, b, c, d in pairs) / 4
    return {"energy": k, "lagrangian": k - t, "stress": k + t - s[:, None] * unit[i, j]}[name]
