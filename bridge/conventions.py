"""Virials and cells in the conventions of other codes. Standard library only: arrays of any
framework, by operators and indices.

Ours: W = dE/de (eV) of the strain r -> r(I+e), h -> h(I+e), W_ij = sum_b r_bi g_bj + ..., positive
where the system wants to shrink, and h with lattice vectors as rows. All codes below are in eV and
Angstrom, or in no units of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

from bridge.errors import message, spec


@dataclass(frozen=True)
class Convention:
    """What a code calls its stress or virial: sign * W, by volume or not, and how it is laid
    out."""

    what: str
    sign: int = 1
    per_volume: bool = True
    voigt: bool = False  # six numbers, xx, yy, zz, yz, xz, xy
    columns: bool = False  # lattice vectors are the columns of its cell
    # the strain acts from the left, r -> (I+e) r: indices of an asymmetric W change places
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
_VOIGT = [0, 4, 8, 5, 2, 1]  # places of xx, yy, zz, yz, xz, xy in a flattened matrix
_MATRIX = [0, 5, 4, 5, 1, 3, 4, 3, 2]  # and the way back
# of |W|, and in eV/Angstrom^3: less is rounding, more is no stress in Voigt's sense
_ASYMMETRIC = (
    1e-3,
    1e-5,
)
_FLAT = 1e-6  # a cell of a smaller volume, relative to the product of its edges, is singular


def to(convention: str, virial, cell=None):
    """Our virial W as the stress or virial of another code.

    `virial` W is (3,3) or (B,3,3) in eV, `cell` h of the same shape, by rows, in Angstrom (None
    where the convention does not divide by the volume). The result has W's shape, for "ase" (6,) or
    (B,6), in eV/Angstrom^3 or eV:

        ase               W/V, tension positive, Voigt xx, yy, zz, yz, xz, xy        ase-matrix
                          W/V
        torch-sim         W/V                                                        kups
                          -W/V
        jax-md            -(W/V)^T, without its kinetic part                         mace
                          W/V
        nvalchemi         W/V, from 0.2 on                                           mace-virials
                          -W
        nvalchemi-0.1     -W/V
                          nvalchemi-virial   -W

    with V = |det h|; `_` or a space in a name is as good as `-`. Nothing is symmetrised in a
    matrix: W of an energy that rotation leaves alone is symmetric anyway. Six numbers can't hold
    another, so there an asymmetric W is refused; rounding (1e-3 of |W|, or 1e-5 eV/Angstrom^3) is
    averaged over, as ASE does. kUPS sets the rows and columns of open axes to zero, which is the
    caller's to do, and a system without any periodic axis has no stress.

    numpy, torch and JAX arrays work, under jit, vmap and derivatives as well. The checks read
    values: they wait for a GPU, and torch.compile(fullgraph=True) refuses them.

    Raises: ValueError for an unknown convention, wrong shapes, a missing or singular cell, and an
    asymmetric W where there are six numbers, naming the system. Under tracing, where values can't
    be seen, such a system gives NaN.

    >>> import numpy as np
    >>> W = np.array([[8.0, 6, 5], [6, 16, 4], [5, 4, 24]])
    >>> to("ase", W, 2 * np.eye(3)).tolist(), to("mace-virials", W)[0].tolist()
    ([1.0, 2.0, 3.0, 0.5, 0.625, 0.75], [-8.0, -6.0, -5.0])
    """
    rule = _rule(convention)
    _check_shape("virial", virial, (3, 3))
    value = rule.sign * (virial.swapaxes(-1, -2) if rule.transposed else virial)
    volume = _volume(cell, virial.shape[:-2], convention) if rule.per_volume else None
    value = value if volume is None else value / volume[..., None, None]
    return _voigt(value) if rule.voigt else value


def from_(convention: str, value, cell=None):
    """Our virial W (3,3) or (B,3,3) in eV from the stress or virial of another code: the inverse of
    `to`.

    `value` is what that code gives, (3,3), (B,3,3), for "ase" (6,) or (B,6); `cell` is ours, by
    rows (`cell_from` makes it from theirs). From six numbers W comes out symmetric. From jax-md's
    stress take the kinetic part off first.

    Raises: ValueError as `to`.

    >>> import numpy as np
    >>> from_("kups", -np.eye(3), 2 * np.eye(3))[0].tolist()
    [8.0, 0.0, 0.0]
    """
    rule = _rule(convention)
    _check_shape(
        f"{convention} {'stress' if rule.per_volume else 'virial'}",
        value,
        (6,) if rule.voigt else (3, 3),
    )
    if rule.voigt:
        value = value[..., _MATRIX].reshape(*value.shape[:-1], 3, 3)
    volume = _volume(cell, value.shape[:-2], convention) if rule.per_volume else None
    value = rule.sign * (value.swapaxes(-1, -2) if rule.transposed else value)
    return value if volume is None else value * volume[..., None, None]


def cell_to(convention: str, cell):
    """Our cell h (3,3) or (B,3,3), lattice vectors as rows, as another code has it: transposed for
    "torch-sim" and "jax-md".

    jax-md's `box` is that for periodic_general. Raises: ValueError for an unknown convention or a
    wrong shape.

    >>> import numpy as np
    >>> cell_to("jax-md", np.arange(9).reshape(3, 3))[0].tolist()
    [0, 3, 6]
    """
    _check_shape("cell", cell, (3, 3))
    return cell.swapaxes(-1, -2) if _rule(convention).columns else cell


def cell_from(convention: str, cell):
    """Our cell from that of another code: the inverse of `cell_to`, which is the same."""
    return cell_to(convention, cell)


def pressure(virial, cell):
    """P = -tr W / 3V in eV/Angstrom^3 without its kinetic part, () or (B,), in all conventions the
    same; errors as in `to`.

    >>> import numpy as np
    >>> float(pressure(-np.eye(3), np.eye(3)))
    1.0
    """
    _check_shape("virial", virial, (3, 3))
    trace = virial[..., 0, 0] + virial[..., 1, 1] + virial[..., 2, 2]
    return -trace / (3 * _volume(cell, virial.shape[:-2], "pressure"))


def _rule(convention) -> Convention:
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


def _check_shape(name, x, inner):
    shape = tuple(x.shape)
    if shape[-len(inner) :] != inner or len(shape) > len(inner) + 1:
        do = "give one system, or one axis of systems in front"
        raise ValueError(
            message(
                f"{name} as {list(inner)} or {['B', *inner]}".replace("'", ""),
                spec(shape, x.dtype),
                do,
            )
        )


def _volume(cell, systems, convention):
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
    (a, b, c, d, e, f, g, h, i) = (cell[..., j, k] for j in range(3) for k in range(3))
    volume = abs(a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g))
    edges = (cell * cell).sum(-1).prod(-1)
    return _guarded(
        volume,
        volume * volume > _FLAT**2 * edges,
        "an invertible cell",
        "a singular cell",
        "it has no stress; use the virial",
    )


def _voigt(stress):
    """(...,6) of a matrix that is symmetric but for rounding."""
    other = stress.swapaxes(-1, -2)
    skew, size = (((x * x).sum(-1).sum(-1)) for x in (stress - other, stress))
    flat = (0.5 * (stress + other)).reshape(*stress.shape[:-2], 9)[..., _VOIGT]
    # what is not a number goes on
    fine = ~(skew > _ASYMMETRIC[0] ** 2 * size + _ASYMMETRIC[1] ** 2)
    return _guarded(
        flat,
        fine,
        "a symmetric virial",
        "an asymmetric one",
        'look at how it was made, or take "ase-matrix"',
    )


def _guarded(x, fine, expected, got, do):
    """x, if fine (one bool for each system) is True for all; where values can't be seen, NaN for
    those that are not."""
    try:
        seen = fine.reshape(-1).tolist()
    except (
        TypeError,
        RuntimeError,
        AttributeError,
    ):  # tracers of JAX; torch.func.vmap and fake tensors
        fine = fine.reshape((*fine.shape, *(1 for _ in x.shape[len(fine.shape) :])))
        return x * fine / fine
    if not all(seen):
        raise ValueError(message(expected, f"{got} in system {seen.index(False)}", do))
    return x
