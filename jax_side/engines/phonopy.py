"""phonopy (Togo, J. Phys. Soc. Jpn. 92, 012001 (2023)): force constants as a Phonopy object, for all
that phonopy makes of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Int

from bridge.errors import message, missing
from jax_side.properties.phonons import Phonons
from jax_side.properties.supercells import lattice_points


def phonopy(phonons: Phonons, atomic_numbers: Int[np.ndarray, " N"], **options: Any) -> Any:
    """Returns a phonopy.Phonopy with the crystal, supercell and force constants of `phonons`
    (properties.phonons.phonons).

    `atomic_numbers` (N,) are those of the crystal, and `options` go to Phonopy (symprec, log_level,
    is_symmetry). The unit cell is phonopy's primitive cell too, so that wave vectors are in the same
    units. Its atoms of the supercell are in another order, by kinds instead of cells; force
    constants are put in it. phonopy writes them as its own file by
    `phonopy.file_IO.write_FORCE_CONSTANTS(made.force_constants, p2s_map=made.primitive.p2s_map)`, or
    with all else by `made.save(settings={"force_constants": True})`. For the splitting of optical
    modes in a polar crystal, give it Born charges as `made.nac_params`.

    Raises: ImportError without phonopy; ValueError for atomic numbers of another shape.

    >>> import jax.numpy as jnp
    >>> from jax_side.properties.phonons import phonons
    >>> spring = phonons(lambda r, h: (r**2).sum(), jnp.zeros((1, 3)), jnp.eye(3), [1.0], (1, 1, 1), sum_rule=False, reach=0.0)
    >>> phonopy(spring, np.array([1])).force_constants.shape
    (1, 1, 3, 3)
    """
    try:
        from phonopy import Phonopy
        from phonopy.structure.atoms import PhonopyAtoms
    except ImportError as error:
        raise missing("phonopy", "its Phonopy objects") from error
    numbers = np.asarray(atomic_numbers)
    if numbers.shape != phonons.masses.shape or numbers.dtype.kind not in "iu":
        other = "" if numbers.dtype.kind in "iu" else f" of {numbers.dtype}"
        raise ValueError(
            message(
                f"atomic numbers as [{len(phonons.masses)}]",
                f"{list(numbers.shape)}{other}",
                "give those of the crystal, not of its supercell",
            )
        )
    cell = np.asarray(phonons.cell, np.float64)
    crystal = PhonopyAtoms(
        numbers=numbers,
        masses=np.asarray(phonons.masses, np.float64),
        cell=cell,
        positions=np.asarray(phonons.positions, np.float64),
    )
    p = np.array(phonons.repeats)
    made = Phonopy(crystal, supercell_matrix=p.T, primitive_matrix=np.eye(3), **options)
    theirs = _numbers(made.supercell.positions, phonons, cell, p)
    n, count = len(numbers), len(theirs)
    constants = np.asarray(phonons.constants, np.float64).reshape(n, 3, count, 3)
    made.force_constants = np.ascontiguousarray(constants.transpose(0, 2, 1, 3)[:, theirs])
    return made


def _numbers(positions: Any, phonons: Phonons, cell: Any, p: Any) -> Int[np.ndarray, " M"]:
    """Which of our atoms L N + j each atom of phonopy's supercell is."""
    inner = np.asarray(phonons.positions, np.float64) @ np.linalg.inv(cell)
    ours = (lattice_points(p)[:, None] + inner).reshape(-1, 3)
    apart = (positions @ np.linalg.inv(cell))[:, None] - ours
    back = np.linalg.inv(p)
    apart = (apart @ back - np.rint(apart @ back)) @ p @ cell
    return np.linalg.norm(apart, axis=-1).argmin(1)
