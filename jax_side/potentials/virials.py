"""Virials atom by atom in JAX: what each atom adds to W = dE/de, by the derivatives in the vectors
of the edges."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from bridge.contract import PARTS_OF_VIRIAL
from bridge.errors import message
from jax_side.potentials.derivatives import Inputs

Cells = Float[jax.Array, "B 3 3"]
Edges = Float[jax.Array, "E 3"]
Virials = Float[jax.Array, "N 3 3"]


def by_edges(inputs: Inputs) -> Inputs:
    """Returns inputs whose cell_offsets (E,3) are floats, for each edge to have a variable of its
    own.

    r_ij = r_j - r_i + S h, so that dE/dr_ij = h^-1 dE/dS for the offset S of one edge. For that the
    cells are completed: open axes of a singular cell get unit vectors, and their offsets are zero.
    `inputs` are those of a graph model of the contract. Derivatives in the cell that is given are
    unchanged.

    Raises: ValueError for inputs without edges."""
    if inputs.get("edge_index") is None or inputs.get("cell_offsets") is None:
        do = "pass edge_index and cell_offsets, or cutoff=..., in Angstrom, so that edges are found"
        raise ValueError(message("edges, to which virials of atoms belong", "none", do))
    cell, fixed = inputs["cell"], jax.lax.stop_gradient(inputs["cell"])
    empty = singular(fixed)[:, None] & ~inputs["pbc"]
    added = jnp.where(empty[:, :, None], _completed(fixed, empty) - fixed, 0)
    offsets = inputs["cell_offsets"].astype(cell.dtype)
    offsets = jnp.where(empty[_systems(inputs)], 0, offsets)
    return inputs | {"cell": cell + added, "cell_offsets": offsets}


def node_virials(inputs: Inputs, in_offsets: Edges) -> Virials:
    """Returns the virial of each atom, w_j = sum of r_ij (dE/dr_ij)^T over the edges that end there,
    (N,3,3) in eV.

    `inputs` are what `by_edges` returned, and `in_offsets` is dE/dS (E,3) for the offsets among
    them. Rows count components of r, columns those of the gradient, as in W. Edges with an index
    >= N are unused slots."""
    i, j = inputs["edge_index"]
    pos, cells = inputs["pos"], inputs["cell"]
    n_atoms = len(pos)
    systems = _systems(inputs)
    # an index >= N gives NaN, which no product with zero would take away
    used = (i < n_atoms) & (j < n_atoms)
    i, j = jnp.where(used, i, 0), jnp.where(used, j, 0)
    shifts = jnp.einsum("ei,eij->ej", inputs["cell_offsets"], cells[systems])
    vectors = pos[j] - pos[i] + shifts
    gradients = jnp.einsum("ei,eij->ej", in_offsets, _reciprocal(cells)[systems])
    outer = vectors[:, :, None] * gradients[:, None, :]
    return jax.ops.segment_sum(jnp.where(used[:, None, None], outer, 0), j, n_atoms)


def checked(found: Virials, virial: Cells, batch: Int[jax.Array, " N"]) -> Virials:
    """Returns the virials of atoms, which have to add up to those of their systems; NaN for systems
    in which they don't, where a trace hides the values.

    Raises: ValueError naming the system."""
    n_systems = len(virial)
    total = lambda x: jax.ops.segment_sum(jax.lax.stop_gradient(x), batch, n_systems)
    largest = lambda x: abs(x).max((1, 2))
    virial = jax.lax.stop_gradient(virial)
    # float32 sums of many edges are rounded by more than the last digits
    rounding = jnp.finfo(found.dtype).eps ** 0.5
    apart = largest(total(found) - virial)
    wrong = apart > rounding * (largest(total(abs(found))) + largest(virial))
    try:
        system = int(wrong.argmax()) if wrong.any() else None
    except jax.errors.ConcretizationTypeError:
        return jnp.where(wrong[batch][:, None, None], jnp.nan, found)
    if system is None:
        return found
    expected = "a virial that is made of edges alone (edge_index, cell_offsets)"
    got = f"{float(apart[system]):.3g} eV of another kind in system {system}"
    raise ValueError(message(expected, got, PARTS_OF_VIRIAL))


def singular(cell: Cells) -> Bool[jax.Array, " B"]:
    """Returns True where |det h| is no more than rounding, or not a number."""
    scale = jnp.linalg.norm(cell, axis=-1).prod(-1)
    return ~(abs(jnp.linalg.det(cell)) > 8 * jnp.finfo(cell.dtype).eps * scale)


def _systems(inputs: Inputs) -> Int[jax.Array, " E"]:
    """The system of each edge; that of the last atom for unused slots."""
    return inputs["batch"][jnp.minimum(inputs["edge_index"][0], len(inputs["pos"]) - 1)]


def _completed(cell: Cells, empty: Bool[jax.Array, "B 3"]) -> Cells:
    """The cells with a unit vector across the others on each axis that is empty."""
    rows = list(jnp.moveaxis(jnp.where(empty[:, :, None], 0, cell), 1, 0))
    for k in range(3):
        across = _perpendicular(rows[k - 1], rows[k - 2])
        rows[k] = jnp.where(empty[:, k, None], across, rows[k])
    return jnp.stack(rows, 1)


def _perpendicular(u: jax.Array, v: jax.Array) -> Float[jax.Array, "B 3"]:
    """Unit vectors across u and v (B,3), of which any may be zero."""
    axes = jnp.eye(3, dtype=u.dtype)
    some = jnp.where(_is_zero(u), v, u)
    shortest = axes[abs(some).argmin(-1)]
    alone = jnp.where(_is_zero(some), axes[0], jnp.cross(some, shortest))
    both = jnp.cross(u, v)
    normal = jnp.where(_is_zero(both), alone, both)
    return normal / jnp.linalg.norm(normal, axis=-1, keepdims=True)


def _is_zero(u: jax.Array) -> Bool[jax.Array, "B 1"]:
    return (u == 0).all(-1, keepdims=True)


def _reciprocal(cell: Cells) -> Cells:
    """The reciprocal vectors as rows, h^-T."""
    return jnp.linalg.inv(cell).mT
