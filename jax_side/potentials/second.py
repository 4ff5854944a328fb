"""Second derivatives of any energy(positions, cell) of JAX: Hessians and their rows, elastic
constants, vibrations."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from bridge.errors import message, spec
from jax_side.potentials.potential import array

THZ = 15.6333042  # sqrt(eV/Angstrom^2/amu) / 2 pi in THz (CODATA 2018)
UNITS = {"THz": THZ, "cm^-1": THZ * 33.3564095, "meV": THZ * 4.13566770}
FIRST, SECOND = np.array(
    [[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]], "int32"
)  # xx, yy, zz, yz, xz, xy
STIFFNESSES = ("energy", "lagrangian", "stress")


def hvp(energy, positions, cell, vectors):
    """The Hessian times vectors: H v = d/dx grad E(r + x v), without H.

    `energy(positions, cell)` is any JAX function to a scalar in eV: a potential (bridge.potential,
    jax_side.potentials.potential) of one system, or pure JAX. Shapes: positions (N,3), cell (3,3)
    by rows or None, vectors (N,3) or (K,N,3); result as vectors, in eV/Angstrom^2 times their unit.
    It is the pullback of the gradient (H is symmetric), which through a bridged model costs one
    forward and two backward passes, less than its jvp; under vmap all K at once. jit, vmap, and
    derivatives work, as far as the model has them.

    Raises: ValueError for positions or vectors of another shape, and an energy that is no scalar.

    >>> hvp(lambda r, h: (r**3).sum(), jnp.ones((1, 3)), None, jnp.array([[1.0, 0, 2]])).tolist()
    [[6.0, 0.0, 12.0]]
    """
    positions, vectors = array("positions", positions), array("vectors", vectors)
    pull = _pullback(energy, positions, cell)
    if (
        vectors.ndim not in (2, 3)
        or vectors.shape[-2:] != positions.shape
        or vectors.dtype != positions.dtype
    ):
        n = len(positions)
        expected = (
            f"vectors as {spec((n, 3), positions.dtype)} or {spec(('K', n, 3), positions.dtype)}"
        )
        raise ValueError(
            message(
                expected,
                spec(vectors.shape, vectors.dtype),
                "give one vector for each atom, in the dtype of the positions",
            )
        )
    return pull(vectors) if vectors.ndim == 2 else jax.vmap(pull)(vectors)


def hessian_rows(energy, positions, cell, rows, *, chunk=None):
    """Some rows of the Hessian, (K,N,3) in eV/Angstrom^2: rows[k] = d/dr (dE/dr_ia) at fixed cell.

    `rows` (K,) int are numbers 3 i + a of atom i and axis a, or (K,2) the pairs (i, a). energy,
    positions and cell are those of `hvp`. All rows are made at once, by jax.vmap over the
    cotangents of one gradient; `chunk` of them at a time bounds the memory.

    Raises: ValueError as `hvp`, and for rows that are not there (under tracing, where values can't
    be seen, such a row is NaN).

    >>> hessian_rows(lambda r, h: r[0, 0] * r[1, 2], jnp.ones((2, 3)), None, [(0, 0)]).tolist()
    [[[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]]
    """
    positions = array("positions", positions)
    pull, n = _pullback(energy, positions, cell), positions.size
    rows = _flat_rows(rows, n)
    units = jax.nn.one_hot(rows, n, dtype=positions.dtype).reshape(-1, *positions.shape)
    return jnp.where(rows[:, None, None] < 0, jnp.nan, _mapped(pull, units, chunk))


def hessian(energy, positions, cell=None, *, chunk=None):
    """d2E/dr dr at fixed cell, (N,3,N,3) in eV/Angstrom^2: all rows of `hessian_rows`, with the
    same arguments and errors.

    Nothing is symmetrised: how far it is from symmetric is how far the model's forces are from the
    gradient of an energy.

    >>> hessian(lambda r, h: (r**2).sum(), jnp.ones((1, 3))).reshape(3, 3).diagonal().tolist()
    [2.0, 2.0, 2.0]
    """
    positions = array("positions", positions)
    pull = _pullback(energy, positions, cell)
    units = jnp.eye(positions.size, dtype=positions.dtype).reshape(-1, *positions.shape)
    return _mapped(pull, units, chunk).reshape(*positions.shape, *positions.shape)


def elastic_constants(energy, positions, cell, relaxed=True, *, stiffness="energy", chunk=None):
    """Elastic constants (6,6) in eV/Angstrom^3, Voigt order xx, yy, zz, yz, xz, xy (1 eV/Angstrom^3
    = 160.2177 GPa).

    The strain is symmetric, r -> r(I+e), h -> h(I+e), with e_yz = eta_4 / 2 and so on, V = |det h|:

        relaxed=False   clamped ions: the atoms follow the strain, K = d2E/deta deta / V
        relaxed=True    the atoms give way: K = (d2E/deta deta - L^T H^+ L) / V, with L = d2E/dr
                        deta and H^+ the pseudo-inverse of the Hessian, uniform translations
                        projected out (Lutsko, J. Appl. Phys. 65, 2991 (1989))

    For relaxed=True forces must vanish: relax first (else it is the curvature at fixed L and H, of
    no state that there is). An unstable crystal (negative modes of H) gives numbers without a
    meaning. Without stress all stiffnesses are the same; under a stress s (tension positive) they
    are not, and `stiffness` says which one is meant (Barron and Klein, Proc. Phys. Soc. 85, 523
    (1965); Wallace, Thermodynamics of Crystals (1972)), T_ijkl = (d_ik s_jl + d_il s_jk + d_jk s_il
    + d_jl s_ik) / 4:

        "energy"        K itself: second derivatives of the energy in e, symmetric in Voigt's
                        indices
        "lagrangian"    C = K - T: the same in the Lagrangian strain e + e^2 / 2, the thermodynamic
                        elastic constants
        "stress"        B = K + T - s_ij d_kl: derivatives ds_ij / de_kl of the Cauchy stress, what
                        finite differences of stresses give (ase.stress too); decides on stability;
                        not symmetric if s is not a pressure

    energy, positions (N,3) and cell (3,3), by rows, are as for `hvp`; all axes are periodic. Costs
    6 pullbacks of the gradient, and 3 N more for relaxed=True (`chunk` as in `hessian_rows`). Under
    jit, `relaxed` and `stiffness` are static.

    Raises: ValueError as `hvp`, for a missing or singular cell (under tracing such a cell gives no
    finite number), and an unknown stiffness.

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
    positions, cell = array("positions", positions), _checked_cell(cell)
    volume = abs(jnp.linalg.det(cell))
    stress, (mixed, curvature) = _strain_derivatives(energy, positions, cell)
    if relaxed:
        curvature = curvature - _given_way(hessian(energy, positions, cell, chunk=chunk), mixed)
    return _stiffness(curvature / volume, stress / volume, stiffness)


def dynamical_matrix(energy, positions, cell, masses, *, chunk=None):
    """D_ia,jb = H_ia,jb / sqrt(m_i m_j), (N,3,N,3) in eV/Angstrom^2/amu: that of a crystal at q =
    0, or of a molecule (cell None).

    `masses` (N,) in amu, cast to the dtype of the positions; the rest as `hessian`. For other wave
    vectors take a supercell, whose q = 0 holds them.

    Raises: ValueError as `hvp`, and for masses of another shape.

    >>> dynamical_matrix(lambda r, h: (r**2).sum(), jnp.ones((1, 3)), None, jnp.array([4.0]))[0, :, 0].diagonal().tolist()
    [0.5, 0.5, 0.5]
    """
    positions = array("positions", positions)
    masses = jnp.asarray(masses, positions.dtype)
    if masses.shape != positions.shape[:1]:
        raise ValueError(
            message(
                f"masses as [{len(positions)}]",
                spec(masses.shape, masses.dtype),
                "give one mass in amu for each atom",
            )
        )
    root = jnp.sqrt(masses)[:, None]
    return hessian(energy, positions, cell, chunk=chunk) / root[:, None, None] / root


def frequencies(energy, positions, cell, masses, *, unit="THz", chunk=None):
    """Frequencies (3N,) at q = 0, ascending, in "THz" (default; f, not 2 pi f), "cm^-1" or "meV" (h
    f).

    Arguments and errors are those of `dynamical_matrix`, of which they are the roots of the
    eigenvalues over 2 pi: the symmetric part is taken, and a negative eigenvalue gives -|f|, an
    imaginary frequency. Three are acoustic, zero but for rounding if the energy does not change as
    everything moves (a molecule has three rotations as well).

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


def _pullback(energy, positions, cell):
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


def _scalar(energy, positions, cell):
    value = energy(positions, cell)
    if jnp.shape(value) != ():
        do = "bind the potential to one system (no batch=), and use jax.vmap for several"
        raise ValueError(message("a scalar energy", spec(value.shape, value.dtype), do))
    return value


def _mapped(pull, vectors, chunk):
    return (
        jax.vmap(pull)(vectors) if chunk is None else jax.lax.map(pull, vectors, batch_size=chunk)
    )


def _flat_rows(rows, n):
    """(K,) numbers of rows, -1 for those that are not there; an error for these if they can be
    seen."""
    seen = not isinstance(rows, jax.core.Tracer)
    rows = np.asarray(rows) if seen else rows
    if (
        not jnp.issubdtype(rows.dtype, jnp.integer)
        or rows.ndim not in (1, 2)
        or rows.shape[1:] not in ((), (2,))
    ):
        raise ValueError(
            message(
                "rows as int [K] or [K, 2]",
                spec(rows.shape, rows.dtype),
                "give 3 atom + axis, or pairs (atom, axis)",
            )
        )
    bad = (
        ((rows < 0) | (rows >= (n if rows.ndim == 1 else np.array([n // 3, 3]))))
        .reshape(len(rows), -1)
        .any(1)
    )
    if seen and bad.any():
        raise ValueError(
            message(
                f"rows of {n // 3} atoms and 3 axes", str(rows[bad][0].tolist()), "count from 0"
            )
        )
    if rows.ndim == 2:
        rows = 3 * rows[:, 0] + rows[:, 1]
    return jnp.where(bad, -1, rows)


def _checked_cell(cell):
    """A cell with a volume, or an error; NaN where values can't be seen."""
    do = "give the lattice vectors as rows: what is not periodic has no elastic constants"
    cell = None if cell is None else array("cell", cell)
    if cell is None or cell.shape != (3, 3):
        raise ValueError(
            message(
                "a cell as [3, 3]", "None" if cell is None else spec(cell.shape, cell.dtype), do
            )
        )
    flat = ~(
        abs(jnp.linalg.det(cell))
        > 8 * jnp.finfo(cell.dtype).eps * jnp.linalg.norm(cell, axis=-1).prod()
    )
    if not isinstance(flat, jax.core.Tracer) and flat:
        raise ValueError(message("an invertible cell", "a singular one", do))
    return jnp.where(flat, jnp.nan, cell)


def _strain_derivatives(energy, positions, cell):
    """dE/deta (6,), and d2E/dr deta (6,N,3), d2E/deta deta (6,6)."""

    def strained(r, eta):
        half = (
            jnp.zeros((3, 3), r.dtype).at[FIRST, SECOND].add(eta / 2).at[SECOND, FIRST].add(eta / 2)
        )
        deform = jnp.eye(3, dtype=r.dtype) + half
        return _scalar(energy, r @ deform, cell @ deform)

    zero = jnp.zeros(6, positions.dtype)
    slope, pull = jax.vjp(lambda r, eta: jax.grad(strained, 1)(r, eta), positions, zero)
    return slope, jax.vmap(pull)(jnp.eye(6, dtype=positions.dtype))


def _given_way(h, mixed):
    """L^T H^+ L (6,6), uniform translations projected out of both."""
    n = len(h)
    mixed = _centred(mixed).reshape(6, 3 * n)
    h = _centred(_centred(h).transpose(2, 3, 0, 1)).reshape(3 * n, 3 * n)
    return mixed @ jnp.linalg.pinv((h + h.T) / 2, hermitian=True) @ mixed.T


def _centred(x):
    """(...,N,3) without its part along uniform translations."""
    return x - x.mean(-2, keepdims=True)


def _stiffness(k, s, name):
    """K (6,6) turned into the stiffness of that name, under the stress s (6,)."""
    k = (k + k.T) / 2
    matrix = jnp.zeros((3, 3), s.dtype).at[FIRST, SECOND].set(s).at[SECOND, FIRST].set(s)
    i, j, unit = FIRST, SECOND, jnp.eye(3, dtype=s.dtype)
    pairs = [(i, j, i, j), (i, j, j, i), (j, i, i, j), (j, i, j, i)]
    t = sum(unit[jnp.ix_(a, c)] * matrix[jnp.ix_(b, d)] for a, b, c, d in pairs) / 4
    return {"energy": k, "lagrangian": k - t, "stress": k + t - s[:, None] * unit[i, j]}[name]
