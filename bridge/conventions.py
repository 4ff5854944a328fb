"""Virials and cells in the conventions of other codes. Standard library only: arrays of any
framework, by operators and indices.

Our virial is W = dE/de in eV for the strain r -> r(I+e), h -> h(I+e), so that W_ij = sum_b r_bi
g_bj + ... It is positive where the system wants to shrink. Our cell h has the lattice vectors as
rows. All codes below are in eV and Angstrom, or have no units of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from bridge.errors import message, spec

Array = TypeVar("Array")  # of numpy, torch or JAX: what comes in goes out


@dataclass(frozen=True)
class Convention:
    """What another code calls its stress or virial.

    what         the quantities of that code
    sign         its stress or virial is sign * W
    per_volume   True where W is divided by the volume
    voigt        True for six numbers, xx, yy, zz, yz, xz, xy
    columns      True where lattice vectors are the columns of its cell
    transposed   True where the strain acts from the left, r -> (I+e) r, so that the indices of an
                 asymmetric W change places
    """

    what: str
    sign: int = 1
    per_volume: bool = True
    voigt: bool = False
    columns: bool = False
    transposed: bool = False


CONVENTIONS = {
    "ase": Convention("atoms.get_stress(), Atoms.cell", voigt=True),
    "ase-matrix": Convention("atoms.get_stress(voigt=False), Atoms.cell"),
    "torch-sim": Convention('a model\'s "stress", SimState.cell', columns=True),
    "kups": Convention("stress_via_virial_theorem, Cell.vectors", -1),
    "jax-md": Convention(
        "quantity.stress without velocities, box", -1, columns=True, transposed=True
    ),
    "nvalchemi": Convention('a model\'s "stress" in nvalchemi-toolkit 0.2 and later, Batch.cell'),
    "nvalchemi-0.1": Convention('a model\'s "stress" in nvalchemi-toolkit 0.1, Batch.cell', -1),
    "nvalchemi-virial": Convention(
        '"virial" in nvalchemi-toolkit 0.2 and later, Batch.cell', -1, per_volume=False
    ),
    "mace": Convention('a model\'s "stress", its cell'),
    "mace-virials": Convention('a model\'s "virials", its cell', -1, per_volume=False),
}
VOIGT = [0, 4, 8, 5, 2, 1]  # places of xx, yy, zz, yz, xz, xy in a flattened matrix
_MATRIX = [0, 5, 4, 5, 1, 3, 4, 3, 2]  # and the way back
# An antisymmetric part up to this is rounding: relative to |W|, and in eV/Angstrom^3.
_ASYMMETRIC = (1e-3, 1e-5)
_FLAT = 1e-6  # a cell of a smaller volume, relative to the product of its edges, is singular


def to(convention: str, virial: Array, cell: Array | None = None) -> Array:
    """Returns our virial W as the stress or virial of another code.

    `virial` W is (3,3) or (B,3,3) in eV. `cell` h has the same shape, lattice vectors as rows, in
    Angstrom; it may be None for a convention that does not divide by the volume. The result has W's
    shape, but (6,) or (B,6) for "ase". It is in eV/Angstrom^3, or in eV where it is not divided by
    the volume V = |det h|:

        ase                W/V, tension positive, Voigt xx, yy, zz, yz, xz, xy
        ase-matrix         W/V
        torch-sim          W/V
        kups               -W/V
        jax-md             -(W/V)^T, without its kinetic part
        mace               W/V
        mace-virials       -W
        nvalchemi          W/V, from 0.2 on
        nvalchemi-0.1      -W/V
        nvalchemi-virial   -W

    `_` or a space in a name is as good as `-`. A matrix is not symmetrised: W of an energy that is
    invariant under rotation is symmetric anyway. Six numbers can't hold an asymmetric W, so "ase"
    refuses one. It averages over rounding (1e-3 of |W|, or 1e-5 eV/Angstrom^3), as ASE does. kUPS
    sets the rows and columns of open axes to zero; here that is left to the caller. A system
    without any periodic axis has no stress.

    numpy, torch and JAX arrays work, also under jit, vmap and derivatives. The checks read values,
    so they wait for a GPU, and torch.compile(fullgraph=True) refuses them.

    Raises: ValueError for an unknown convention, for wrong shapes, and for a missing cell; for a
    singular cell, and an asymmetric W where there are six numbers, naming the system. Under
    tracing, where values can't be seen, such a system gives NaN.

    >>> import numpy as np
    >>> W = np.array([[8.0, 6, 5], [6, 16, 4], [5, 4, 24]])
    >>> to("ase", W, 2 * np.eye(3)).tolist(), to("mace-virials", W)[0].tolist()
    ([1.0, 2.0, 3.0, 0.5, 0.625, 0.75], [-8.0, -6.0, -5.0])
    """
    rule = _rule(convention)
    _check_shape("virial", virial, (3, 3))
    w: Any = virial
    value = rule.sign * (w.swapaxes(-1, -2) if rule.transposed else w)
    if rule.per_volume:
        value = value / _volume(cell, w.shape[:-2], convention)[..., None, None]
    return _voigt(value) if rule.voigt else value


def from_(convention: str, value: Array, cell: Array | None = None) -> Array:
    """Returns our virial W from the stress or virial of another code: the inverse of `to`.

    `value` is what that code gives: (3,3) or (B,3,3), for "ase" (6,) or (B,6). `cell` is ours, with
    lattice vectors as rows (`cell_from` makes it from that of the code). The result is (3,3) or
    (B,3,3) in eV. Six numbers give a symmetric W. Subtract the kinetic part from jax-md's stress
    first.

    Raises: ValueError as `to` does.

    >>> import numpy as np
    >>> from_("kups", -np.eye(3), 2 * np.eye(3))[0].tolist()
    [8.0, 0.0, 0.0]
    """
    rule = _rule(convention)
    what = f"{convention} {'stress' if rule.per_volume else 'virial'}"
    _check_shape(what, value, (6,) if rule.voigt else (3, 3))
    w: Any = value
    if rule.voigt:
        w = w[..., _MATRIX].reshape(*w.shape[:-1], 3, 3)
    volume = _volume(cell, w.shape[:-2], convention) if rule.per_volume else None
    w = rule.sign * (w.swapaxes(-1, -2) if rule.transposed else w)
    return w if volume is None else w * volume[..., None, None]


def cell_to(convention: str, cell: Array) -> Array:
    """Returns our cell h as another code has it.

    `cell` is (3,3) or (B,3,3) with lattice vectors as rows. The result is transposed for
    "torch-sim" and "jax-md", whose lattice vectors are columns. For jax-md it is the `box` of
    periodic_general.

    Raises: ValueError for an unknown convention or a wrong shape.

    >>> import numpy as np
    >>> cell_to("jax-md", np.arange(9).reshape(3, 3))[0].tolist()
    [0, 3, 6]
    """
    _check_shape("cell", cell, (3, 3))
    h: Any = cell
    return h.swapaxes(-1, -2) if _rule(convention).columns else h


def cell_from(convention: str, cell: Array) -> Array:
    """Returns our cell from that of another code: the inverse of `cell_to`, which is the same."""
    return cell_to(convention, cell)


def pressure(virial: Array, cell: Array) -> Array:
    """Returns the pressure P = -tr W / 3V without its kinetic part, in eV/Angstrom^3.

    `virial` W and `cell` are those of `to`. The result is () or (B,), and the same in all
    conventions.

    Raises: ValueError as `to` does.

    >>> import numpy as np
    >>> float(pressure(-np.eye(3), np.eye(3)))
    1.0
    """
    _check_shape("virial", virial, (3, 3))
    w: Any = virial
    trace = w[..., 0, 0] + w[..., 1, 1] + w[..., 2, 2]
    return -trace / (3 * _volume(cell, w.shape[:-2], "pressure"))


def _rule(convention: str) -> Convention:
    name = str(convention).replace("_", "-").replace(" ", "-")
    if name not in CONVENTIONS:
        raise ValueError(
            message(
                f"a convention among {', '.join(CONVENTIONS)}",
                repr(convention),
                "take one of these",
            )
        )
    return CONVENTIONS[name]


def _check_shape(name: str, x: Any, inner: tuple[int, ...]) -> None:
    """Raises ValueError for an array that is neither `inner` nor systems of these."""
    shape = tuple(x.shape)
    if shape[-len(inner) :] != inner or len(shape) > len(inner) + 1:
        expected = f"{name} as {list(inner)} or {['B', *inner]}".replace("'", "")
        do = "give one system, or one axis of systems in front"
        raise ValueError(message(expected, spec(shape, x.dtype), do))


def _volume(cell: Any, systems: Sequence[int], convention: str) -> Any:
    """|det h|, () or (B,)."""
    if cell is None:
        raise ValueError(
            message(
                f"a cell for {convention}, which divides by the volume",
                "None",
                "pass our cell (rows)",
            )
        )
    if tuple(cell.shape) != (*systems, 3, 3):
        raise ValueError(
            message(
                f"a cell as {[*systems, 3, 3]}",
                spec(cell.shape, cell.dtype),
                "give one cell for each virial",
            )
        )
    a, b, c, d, e, f, g, h, i = (cell[..., j, k] for j in range(3) for k in range(3))
    volume = abs(a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g))
    edges = (cell * cell).sum(-1).prod(-1)
    return _guarded(
        volume,
        volume * volume > _FLAT**2 * edges,
        "an invertible cell",
        "a singular cell",
        "it has no stress; use the virial",
    )


def _voigt(stress: Any) -> Any:
    """The six numbers (...,6) of matrices that are symmetric but for rounding."""
    other = stress.swapaxes(-1, -2)
    skew, size = ((x * x).sum(-1).sum(-1) for x in (stress - other, stress))
    flat = (0.5 * (stress + other)).reshape(*stress.shape[:-2], 9)[..., VOIGT]
    # A stress of NaN is fine: it goes on.
    fine = ~(skew > _ASYMMETRIC[0] ** 2 * size + _ASYMMETRIC[1] ** 2)
    return _guarded(
        flat,
        fine,
        "a symmetric virial",
        "an asymmetric one",
        'look at how it was made, or take "ase-matrix"',
    )


def _guarded(x: Any, fine: Any, expected: str, got: str, do: str) -> Any:
    """x, if `fine` (one bool for each system) is True for all systems.

    Where values can't be seen, x is NaN for the systems that are not fine. Elsewhere these are an
    error.
    """
    try:
        seen = fine.reshape(-1).tolist()
    # tracers of JAX; torch.func.vmap and fake tensors
    except (TypeError, RuntimeError, AttributeError):
        fine = fine.reshape((*fine.shape, *(1 for _ in x.shape[len(fine.shape) :])))
        return x * fine / fine
    if not all(seen):
        raise ValueError(message(expected, f"{got} in system {seen.index(False)}", do))
    return x
