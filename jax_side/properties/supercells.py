"""Supercells of a crystal: repeats of its cell, the nearest images of its pairs, and whether it is
wide enough for what a potential reaches."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from bridge.errors import message, spec
from jax_side.potentials.potential import array
from jax_side.potentials.second import checked_cell

# three counts, or a matrix P of integers: the supercell's vectors are the rows of P h
Repeats = Sequence[int] | Sequence[Sequence[int]] | Int[np.ndarray, "3 *three"]
TIE = 1e-3  # Angstrom: images whose distances differ by less are at the same distance


def matrix(repeats: Repeats) -> Int[np.ndarray, "3 3"]:
    """Returns repeats as a matrix P of integers: the rows of P h are the lattice vectors of the
    supercell of the cell h.

    `repeats` are three positive counts, as in ASE's `atoms.repeat`, or P itself (the transpose of
    phonopy's supercell_matrix).

    Raises: ValueError for anything else, and for a P without a volume.

    >>> matrix((2, 1, 3)).tolist()
    [[2, 0, 0], [0, 1, 0], [0, 0, 3]]
    """
    found = np.asarray(repeats)
    do = "give counts as (3, 3, 3), or a matrix whose rows are the supercell's vectors"
    expected = "repeats as three positive int, or an int [3, 3] with a volume"
    if found.dtype.kind not in "iu" or found.shape not in ((3,), (3, 3)):
        raise ValueError(message(expected, spec(found.shape, found.dtype), do))
    square = np.diag(found) if found.ndim == 1 else found
    if (found.ndim == 1 and (found < 1).any()) or not round(np.linalg.det(square)):
        raise ValueError(message(expected, str(found.tolist()), do))
    return square.astype("int64")


def lattice_points(repeats: Repeats) -> Int[np.ndarray, "L 3"]:
    """Returns the L = |det P| lattice vectors of a supercell, in units of the cell's own: the
    origin first, the others in lexicographic order. For counts it is that of ASE's `atoms.repeat`.

    Raises: ValueError as `matrix`.

    >>> lattice_points((1, 1, 3)).tolist()
    [[0, 0, 0], [0, 0, 1], [0, 0, 2]]
    """
    p = matrix(repeats)
    volume = round(np.linalg.det(p))
    adjugate = np.rint(np.linalg.inv(p) * volume).astype("int64")
    corners = np.array(list(itertools.product((0, 1), repeat=3))) @ p
    ranges = [np.arange(low, high + 1) for low, high in zip(corners.min(0), corners.max(0))]
    found = np.stack(np.meshgrid(*ranges, indexing="ij"), -1).reshape(-1, 3)
    inside = found @ adjugate * np.sign(volume)
    found = found[((inside >= 0) & (inside < abs(volume))).all(1)]
    return found[np.argsort(found.any(1), kind="stable")]


def supercell(
    positions: Float[ArrayLike, "N 3"], cell: Float[ArrayLike, "3 3"], repeats: Repeats
) -> tuple[Float[jax.Array, "L*N 3"], Float[jax.Array, "3 3"]]:
    """Returns the positions (L N,3) and the cell (3,3) of a supercell, in Angstrom.

    The cells are in the order of `lattice_points`, each with all its atoms, so that atom j of cell L
    is number L N + j, and for three counts the order is that of ASE's `atoms.repeat(repeats)`. It is
    a JAX function of positions (N,3) and cell (3,3), by rows; `repeats` is static.

    Raises: ValueError as `matrix` and second.checked_cell, and for positions of another shape.

    >>> supercell(jnp.zeros((1, 3)), jnp.eye(3), (1, 1, 2))[0].tolist()
    [[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    """
    r, h = array("positions", positions), checked_cell(cell)
    if r.ndim != 2 or r.shape[1] != 3:
        raise ValueError(
            message(
                "positions as [N, 3]", spec(r.shape, r.dtype), "give one crystal at a time, or vmap"
            )
        )
    shifts = jnp.asarray(lattice_points(repeats), r.dtype) @ h
    return (shifts[:, None] + r).reshape(-1, 3), jnp.asarray(matrix(repeats), h.dtype) @ h


def half_width(cell: Any, repeats: Repeats) -> float:
    """Returns half of the length of the shortest lattice vector of a supercell, in Angstrom.

    Two atoms that are nearer than this have one nearest image, and no other as near.

    >>> half_width(np.diag([2.0, 3, 4]), (2, 1, 1))
    1.5
    """
    vectors = matrix(repeats) @ np.asarray(cell, np.float64)
    lengths = np.linalg.norm(_around(vectors, np.linalg.norm(vectors, axis=1).min()), axis=1)
    return float(lengths[lengths > 1e-9].min() / 2)


def nearest(
    positions: Any, cell: Any, repeats: Repeats, *, tolerance: float = TIE
) -> tuple[Float[np.ndarray, "N L N K 3"], Float[np.ndarray, "N L N K"]]:
    """Returns the vectors from each atom of a cell to the nearest images of each atom of a
    supercell, and their weights.

    Vectors (N,L,N,K,3) are in units of the cell's own lattice vectors. Of the K slots of a pair,
    those in use have the weight 1/k, where k images are at the same distance, to `tolerance` in
    Angstrom, and the others have the weight 0. (Parlinski, Li, Kawazoe, Phys. Rev. Lett. 78, 4063
    (1997), and phonopy share force constants out so.)

    >>> vectors, weights = nearest(np.zeros((1, 3)), np.eye(3), (2, 1, 1))
    >>> vectors[0, 1, 0].tolist(), weights[0, 1, 0].tolist()
    ([[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]], [0.5, 0.5])
    """
    h = np.asarray(cell, np.float64)
    p, inner = matrix(repeats), np.asarray(positions, np.float64) @ np.linalg.inv(h)
    everywhere = (lattice_points(repeats)[:, None] + inner).reshape(-1, 3)
    pairs = everywhere[None] - inner[:, None]  # (N, L N, 3)
    pairs = pairs - np.rint(pairs @ np.linalg.inv(p)) @ p
    farthest = np.linalg.norm(pairs @ h, axis=-1).max()
    shifts = np.rint(_around(p @ h, farthest) @ np.linalg.inv(h))
    found = []
    for pair in pairs.reshape(-1, 3):
        images = pair + shifts
        distances = np.linalg.norm(images @ h, axis=1)
        found.append(images[distances < distances.min() + tolerance])
    most = max(map(len, found))
    vectors, weights = np.zeros((len(found), most, 3)), np.zeros((len(found), most))
    for slot, images in enumerate(found):
        vectors[slot, : len(images)] = images
        weights[slot, : len(images)] = 1 / len(images)
    shape = (len(inner), -1, len(inner), most)
    return vectors.reshape(*shape, 3), weights.reshape(shape)


def check_reach(energy: Any, cell: Any, repeats: Repeats, reach: float | None) -> bool:
    """Raises ValueError for a supercell that is too small for a potential, and says otherwise
    whether it is known to be large enough.

    What atoms within `reach` (Angstrom) of one another do must be told apart from what their images
    do, so that half of the shortest lattice vector must not be less. None stands for the cutoff of
    energy.card, if there is one. Force constants of a sum of energies that each see atoms within a
    receptive field R end at 2 R: they are known to fit if that is no more than half of the shortest
    lattice vector, or if a `reach` is given.

    >>> check_reach(lambda r, h: 0.0, np.eye(3), (4, 4, 4), 2.0)
    True
    """
    card, half = getattr(energy, "card", None), half_width(cell, repeats)
    needed = reach if reach is not None else getattr(card, "cutoff", None)
    if needed is not None and needed > half + TIE:
        raise ValueError(
            message(
                f"a supercell whose lattice vectors are no shorter than {2 * needed:.2f} Angstrom, "
                f"twice the reach of the potential",
                f"one of {2 * half:.2f} Angstrom, {2 * (needed - half):.2f} too short",
                "take more repeats, or pass reach=, if force constants end earlier than that",
            )
        )
    field = getattr(card, "receptive_field", None)
    return reach is not None or (field is not None and 2 * field <= half + TIE)


def _around(vectors: Any, radius: float) -> Float[np.ndarray, "M 3"]:
    """Lattice vectors of these three, all of those within twice a radius among them."""
    counts = np.ceil(2 * radius * np.linalg.norm(np.linalg.inv(vectors), axis=0) + 1e-9)
    ranges = [np.arange(-n, n + 1) for n in counts]
    return np.stack(np.meshgrid(*ranges, indexing="ij"), -1).reshape(-1, 3) @ vectors
