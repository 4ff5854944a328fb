"""Virials atom by atom: what each atom adds to W = dE/de, by the derivatives in the vectors of the
edges."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int

from bridge.contract import PARTS_OF_VIRIAL
from bridge.errors import message
from torch_side.calls import kernels, status
from torch_side.potentials.geometry import edge_vectors

Inputs = dict[str, torch.Tensor]


def by_edges(inputs: Inputs) -> Inputs:
    """Returns inputs in which each edge has a variable of its own: its cell_offsets (E,3), as
    floats that require grad.

    r_ij = r_j - r_i + S h, so that dE/dr_ij = h^-1 dE/dS for the offset S of one edge. For that the
    cells are completed: open axes of a singular cell get unit vectors, and their offsets are zero.
    `inputs` are those of geometry.edge_vectors, with pbc (B,3). Derivatives in the cell that is
    given are unchanged."""
    cell, pbc = inputs["cell"], inputs["pbc"]
    with torch.no_grad():
        empty = _singular(cell)[:, None] & ~pbc
        added = torch.where(empty[:, :, None], _completed(cell, empty) - cell, 0)
        offsets = inputs["cell_offsets"].to(cell.dtype)
        offsets = torch.where(empty[_systems(inputs)], 0, offsets)
    return inputs | {"cell": cell + added, "cell_offsets": offsets.requires_grad_()}


def are_asked(inputs: Inputs) -> bool:
    """Returns True for inputs of `by_edges`, in which the two directions of an edge are variables
    of their own. A model that takes each pair once takes both of its edges then."""
    return inputs["cell_offsets"].is_floating_point()


def node_virials(
    inputs: Inputs, in_offsets: Float[torch.Tensor, "E 3"] | None
) -> Float[torch.Tensor, "N 3 3"]:
    """Returns the virial of each atom, w_j = sum of r_ij (dE/dr_ij)^T over the edges that end there,
    (N,3,3) in eV.

    `inputs` are what `by_edges` returned, and `in_offsets` is dE/dS (E,3) for the offsets among
    them, None for zeros. Rows count components of r, columns those of the gradient, as in W."""
    vectors = edge_vectors(inputs)
    found = vectors.new_zeros(len(inputs["pos"]), 3, 3)
    if in_offsets is None:
        return found
    rows = _reciprocal(inputs["cell"]).flatten(1)[_systems(inputs)]
    a, b, c = in_offsets.split(1, 1)
    gradients = a * rows[:, :3] + b * rows[:, 3:6] + c * rows[:, 6:]
    outer = vectors[:, :, None] * gradients[:, None, :]
    return found.index_add(0, inputs["edge_index"][1].long(), outer)


def check_sum(
    found: Float[torch.Tensor, "N 3 3"],
    virial: Float[torch.Tensor, "B 3 3"],
    batch: Int[torch.Tensor, " N"],
) -> None:
    """Raises where the virials of atoms don't add up to those of their systems.

    While a status is collected, it is noted there. Nothing is checked where values can't be read.

    Raises: ValueError naming the system."""
    with torch.no_grad():
        # float32 sums of many edges are rounded by more than the last digits
        rounding = torch.finfo(found.dtype).eps ** 0.5
        zeros = torch.zeros_like(virial)
        size = zeros.index_add(0, batch, found.abs()).amax((1, 2)) + virial.abs().amax((1, 2))
        apart = (zeros.index_add(0, batch, found) - virial).abs().amax((1, 2))
        wrong = apart > rounding * size
    got, do = "{:.3g} eV of another kind in system {}", PARTS_OF_VIRIAL
    expected = "a virial that is made of edges alone (edge_index, cell_offsets)"
    if collected := status.current():
        systems = torch.arange(len(virial), device=virial.device)
        text = message(expected, got.replace(":.3g", ""), do)
        collected.note(wrong, text, apart, systems)
    elif kernels.have_values([found, virial]) and wrong.any():
        system = int(wrong.nonzero()[0])
        raise ValueError(message(expected, got.format(float(apart[system]), system), do))


def _systems(inputs: Inputs) -> Int[torch.Tensor, " E"]:
    """The system of each edge."""
    return inputs["batch"].long()[inputs["edge_index"][0].long()]


def _singular(cell: Float[torch.Tensor, "B 3 3"]) -> Bool[torch.Tensor, " B"]:
    """True where the vectors are dependent."""
    a, b, c = cell.unbind(1)
    volume = (a * _cross(b, c)).sum(-1).abs()
    scale = torch.linalg.vector_norm(cell, dim=-1).prod(-1)
    return ~(volume > 8 * torch.finfo(cell.dtype).eps * scale)


def _completed(
    cell: Float[torch.Tensor, "B 3 3"], empty: Bool[torch.Tensor, "B 3"]
) -> Float[torch.Tensor, "B 3 3"]:
    """The cells with a unit vector across the others on each axis that is empty."""
    rows = list(torch.where(empty[:, :, None], 0, cell).unbind(1))
    for k in range(3):
        across = _perpendicular(rows[k - 1], rows[k - 2])
        rows[k] = torch.where(empty[:, k, None], across, rows[k])
    return torch.stack(rows, 1)


def _perpendicular(u: torch.Tensor, v: torch.Tensor) -> Float[torch.Tensor, "B 3"]:
    """Unit vectors across u and v (B,3), of which any may be zero."""
    some = torch.where(_is_zero(u), v, u)
    axes = torch.eye(3, dtype=u.dtype, device=u.device)
    shortest = some.abs().argmin(-1, keepdim=True) == torch.arange(3, device=u.device)
    alone = torch.where(_is_zero(some), axes[0], _cross(some, shortest.to(u.dtype)))
    both = _cross(u, v)
    normal = torch.where(_is_zero(both), alone, both)
    return normal / torch.linalg.vector_norm(normal, dim=-1, keepdim=True)


def _is_zero(u: torch.Tensor) -> Bool[torch.Tensor, "B 1"]:
    return (u == 0).all(-1, keepdim=True)


def _reciprocal(cell: Float[torch.Tensor, "B 3 3"]) -> Float[torch.Tensor, "B 3 3"]:
    """The reciprocal vectors as rows, h^-T. Compilers fuse this, and call a library for an
    inverse."""
    a, b, c = cell.unbind(1)
    rows = torch.stack([_cross(b, c), _cross(c, a), _cross(a, b)], 1)
    return rows / (a * rows[:, 0]).sum(-1)[:, None, None]


def _cross(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return u.roll(-1, -1) * v.roll(1, -1) - u.roll(1, -1) * v.roll(-1, -1)
