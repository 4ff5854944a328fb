"""Neighbour lists on the torch side, periodic images included."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

# private in torch 2.13, as _DisableFuncTorch: the tensors beneath the wrappers of torch.func
from torch._C._functorch import get_unwrapped, is_batchedtensor, is_functorch_wrapped_tensor

from bridge.contract import check_inputs
from bridge.errors import message, missing


def neighbor_list(
    pos: Float[torch.Tensor, "N 3"],
    cell: Float[torch.Tensor, "B 3 3"],
    pbc: Bool[torch.Tensor, "B 3"],
    cutoff: float,
    batch: Int[torch.Tensor, " N"] | None = None,
    *,
    ordered: bool = True,
) -> tuple[Int[torch.Tensor, "2 E"], Int[torch.Tensor, "E 3"]]:
    """Returns all directed edges shorter than the cutoff: edge_index (2,E) and cell_offsets (E,3),
    both int64.

    It takes pos (N,3) float in Angstrom (any periodic image), cell (B,3,3) by rows of the same
    dtype, pbc (B,3) bool, cutoff in Angstrom and batch (N,) int sorted (None for one system). An
    edge i -> j stands for the vector

        r_ij = pos[j] - pos[i] + cell_offsets @ cell[batch[i]],    0 <= |r_ij| < cutoff,

    Both directions of a pair are listed, and so are the edges of an atom to its own periodic
    images; an atom is no neighbour of itself. Cells may be smaller than the cutoff or triclinic,
    and pbc may differ from axis to axis and from system to system. The cell vector of an open axis
    is ignored: it may be zero, and the offsets along it are 0. Edges are sorted by centre. With
    ordered=False they come in the order in which they are found, which is the same each time, and
    the list costs half as much.

    vesin makes the list on the CPU in float64, with torch's number of threads. Positions on another
    device are copied to the CPU, and the result lies on the device of pos. The list itself has no
    derivatives: form r_ij from pos and cell as above to differentiate it. Inside torch.func.grad,
    torch.func.jvp and so on, the values beneath the transform are read.

    Raises: ValueError for shapes and dtypes outside the contract, a position (naming the atom) or a
    cell that is not finite, a periodic axis without a cell vector of its own, an unsorted batch, a
    cutoff that is not positive, or positions that torch.func.vmap runs over; ImportError without
    vesin.

    >>> edges, offsets = neighbor_list(torch.zeros(1, 3), torch.eye(3)[None], torch.tensor([[True, False, False]]), 1.5)
    >>> edges.tolist(), sorted(offsets.tolist())
    ([[0, 0], [0, 0]], [[-1, 0, 0], [1, 0, 0]])
    """
    parts = _found(pos, cell, pbc, cutoff, batch, ordered)
    return _written(parts, pos.device, np.int64, _count(parts))


def _found(
    pos: torch.Tensor,
    cell: torch.Tensor,
    pbc: torch.Tensor,
    cutoff: float,
    batch: torch.Tensor | None,
    ordered: bool,
) -> list[_Part]:
    """The edges of each system that has atoms."""
    inputs = {"pos": pos, "cell": cell, "pbc": pbc}
    if batch is not None:
        inputs["batch"] = batch
    n_atoms, n_systems = check_inputs(inputs, ("pos", "cell", "pbc"))
    x, h, periodic = (values(a) for a in (pos, cell, pbc))
    bounds = bounds_of(batch, n_atoms, n_systems)
    if not 0 < cutoff < np.inf:
        raise ValueError(
            message("a positive cutoff in Angstrom", f"{cutoff}", "pass the model's cutoff")
        )
    check_values(x, h, periodic, bounds)
    return [
        _edges(x[a:b], h[s], periodic[s], cutoff, a, ordered)
        for s, (a, b) in enumerate(itertools.pairwise(bounds))
        if b > a
    ]


class _Part(NamedTuple):
    """Pairs (E,2) and offsets (E,3) of one system, whose first atom has the index `first`. `owner`
    owns their memory."""

    first: int
    pairs: np.ndarray
    offsets: np.ndarray
    owner: object


def _count(parts: Sequence[_Part]) -> int:
    """How many edges there are in all systems."""
    return sum(len(part.offsets) for part in parts)


def _written(
    parts: Sequence[_Part], device: torch.device, dtype: type, capacity: int, unused: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """edge_index (2,capacity) and cell_offsets (capacity,3) of all systems; slots that are left
    over have the index `unused`. Each row of edge_index is dense, which makes torch's scatter
    faster."""
    index, shifts = np.empty((2, capacity), dtype), np.empty((capacity, 3), dtype)
    end = 0
    for part in parts:
        here = slice(end, end + len(part.offsets))
        index[0, here] = part.pairs[:, 0]
        index[1, here] = part.pairs[:, 1]
        shifts[here] = part.offsets
        if part.first:
            index[:, here] += part.first
        end = here.stop
    index[:, end:], shifts[end:] = unused, 0
    return torch.from_numpy(index).to(device), torch.from_numpy(shifts).to(device)


def bonds(
    edges: Int[torch.Tensor, "2 E"], offsets: Int[torch.Tensor, "E 3"]
) -> tuple[Int[torch.Tensor, " E"], Int[torch.Tensor, " bonds"]]:
    """Returns the bond (undirected edge) of each directed edge, and one directed edge of each bond.

    That edge leads from the lower index to the higher one, or, of an atom to its own image, to the
    one whose first offset that is not zero is positive.

    Raises: ValueError naming an edge that is not there exactly once in both directions.
    """
    flipped, rows = one_way(edges, offsets)
    bond, count = _distinct(rows)
    once = torch.bincount(bond[~flipped], minlength=len(count))
    if (bad := (once != 1) | (count != 2)).any():
        edge = int(bad[bond].nonzero()[0])
        ways = sorted([int(once[bond[edge]]), int((count - once)[bond[edge]])])
        got = (
            f"{ways[0]} and {ways[1]} of the one between atoms {edges[0, edge]} and "
            f"{edges[1, edge]} with offset {offsets[edge].tolist()}"
        )
        do = "look at how the edges were made, or pass none"
        raise ValueError(message("each edge once in both directions", got, do))
    edge_of_bond = bond.new_empty(len(count))
    edge_of_bond[bond[~flipped]] = (~flipped).nonzero()[:, 0]
    return bond, edge_of_bond


def one_way(
    edges: Int[torch.Tensor, "2 E"], offsets: Int[torch.Tensor, "E 3"]
) -> tuple[Bool[torch.Tensor, " E"], Int[torch.Tensor, "E 5"]]:
    """Returns which edges lead from the higher index to the lower one, or, of an atom to its own
    image, have a first offset that is not zero and negative; and each edge with these ones turned
    round, as indices and offsets: equal rows for the two directions of an edge."""
    (i, j), (a, b, c) = edges, offsets.T
    backward = (a < 0) | (a == 0) & ((b < 0) | (b == 0) & (c < 0))
    flipped = (i > j) | (i == j) & backward
    ends = torch.where(flipped, edges.flip(0), edges)
    ahead = torch.where(flipped[:, None], -offsets, offsets)
    return flipped, torch.cat([ends.T, ahead], 1)


def _distinct(
    rows: Int[torch.Tensor, "E 5"],
) -> tuple[Int[torch.Tensor, " E"], Int[torch.Tensor, " kinds"]]:
    """The number of the kind that each row is of, where equal rows are of one kind, and how many
    rows each kind has.

    Rows are compared as one integer each, 20 times as fast, unless these would not fit 64 bits."""
    if not len(rows):
        return rows.new_zeros(0), rows.new_zeros(0)
    least = rows.amin(0)
    sizes = (rows.amax(0) - least + 1).tolist()
    if math.prod(sizes) < 2**63:
        key = rows.new_zeros(len(rows))
        for column, low, size in zip(rows.T, least, sizes, strict=True):
            key = key * size + (column - low)
        _, kind, count = torch.unique(key, return_inverse=True, return_counts=True)
    else:
        _, kind, count = torch.unique(rows, dim=0, return_inverse=True, return_counts=True)
    return kind, count


@dataclass(frozen=True)
class Padded:
    """The neighbor_list of a dict of inputs, in a fixed number of slots.

    Calling it returns a dict of edge_index (2,capacity) and cell_offsets (capacity,3), both int32.
    Unused slots have the index N and offsets 0. `cutoff` is in Angstrom, and `ordered` is that of
    neighbor_list. Two of these with equal settings are equal.

    Calling it raises what neighbor_list raises, and ValueError if there are more edges than slots,
    saying how many slots are needed."""

    cutoff: float
    capacity: int
    ordered: bool = False

    def __call__(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        pos = inputs["pos"]
        parts = _found(
            pos, inputs["cell"], inputs["pbc"], self.cutoff, inputs["batch"], self.ordered
        )
        needed = _count(parts)
        if needed > self.capacity:
            got = f"{needed} edges shorter than {self.cutoff} Angstrom"
            do = f"pass capacity={needed} or more, with some room to spare"
            raise ValueError(message(f"at most {self.capacity} edges, the capacity", got, do))
        edges, offsets = _written(parts, pos.device, np.int32, self.capacity, len(pos))
        return {"edge_index": edges, "cell_offsets": offsets}


def values(tensor: torch.Tensor) -> np.ndarray:
    """Returns the values of a tensor as a NumPy array on the CPU, floats as float64.

    Inside torch.func.grad, torch.func.jvp and so on these are the values beneath the transform. The
    array shares the tensor's memory where dtype and device allow it.

    Raises: ValueError for a tensor that torch.func.vmap runs over."""
    plain = (
        type(tensor) is torch.Tensor
        and tensor.is_cpu
        and not tensor.requires_grad
        and tensor.dtype in _AS_THEY_ARE
        and not is_functorch_wrapped_tensor(tensor)
        and not torch._C._are_functorch_transforms_active()
    )
    if plain:
        return tensor.numpy()
    while is_functorch_wrapped_tensor(tensor):
        if is_batchedtensor(tensor):
            expected = "one value of each position, cell, pbc and batch"
            got = "a batch of them under torch.func.vmap"
            raise ValueError(message(expected, got, "make the edges outside, and pass them"))
        tensor = get_unwrapped(tensor)
    with torch._C._DisableFuncTorch():
        tensor = tensor.detach().cpu()
        return tensor.double().numpy() if tensor.is_floating_point() else tensor.numpy()


_AS_THEY_ARE = {torch.float64, torch.int32, torch.int64, torch.bool}


def _edges(
    x: np.ndarray, h: np.ndarray, periodic: np.ndarray, cutoff: float, first: int, ordered: bool
) -> _Part:
    """Edges of one system, whose first atom has index `first`."""
    try:
        import vesin
    except ImportError as error:
        raise missing("vesin", "neighbour lists") from error
    search = vesin.NeighborList(
        cutoff=cutoff, full_list=True, sorted=ordered, n_threads=torch.get_num_threads()
    )
    pairs, offsets = search.compute(
        x, _complete(h, periodic), periodic, quantities="PS", copy=False
    )
    return _Part(first, pairs, offsets, search)


def _complete(h: np.ndarray, periodic: np.ndarray) -> np.ndarray:
    """A copy of the cell, whose open axes have unit vectors orthogonal to the periodic ones."""
    spanned = h[periodic]
    across = np.linalg.svd(spanned)[2][len(spanned) :] if len(spanned) else np.eye(3)
    full = h.copy()
    full[~periodic] = across
    return full


def bounds_of(batch: Int[torch.Tensor, " N"] | None, n_atoms: int, n_systems: int) -> list[int]:
    """Returns the index of the first atom of each system, and N at the end: B + 1 numbers.

    Raises: ValueError for a batch that is not sorted or not within 0..B-1, and for None with
    several systems."""
    if batch is None:
        if n_systems != 1:
            raise ValueError(
                message(
                    "batch for several systems", f"None for {n_systems} cells", "pass batch (N,)"
                )
            )
        return [0, n_atoms]
    numbers = values(batch)
    if n_systems == 1 and not numbers.any():
        return [0, n_atoms]
    descends = (np.diff(numbers) < 0).any()
    if descends or (n_atoms and not 0 <= numbers[0] <= numbers[-1] < n_systems):
        expected = f"batch sorted, within 0..{n_systems - 1}"
        raise ValueError(message(expected, f"{numbers}", "sort the atoms by system"))
    return np.searchsorted(numbers, np.arange(n_systems + 1)).tolist()


def system_of(bounds: Sequence[int], atom: int) -> int:
    """Returns the system that an atom belongs to, given the `bounds_of` the batch."""
    return int(np.searchsorted(bounds, atom, "right")) - 1


def check_values(
    x: Float[np.ndarray, "N 3"],
    h: Float[np.ndarray, "B 3 3"],
    periodic: Bool[np.ndarray, "B 3"],
    bounds: Sequence[int],
) -> None:
    """Raises ValueError for positions x and cells h that have no neighbour list.

    vesin ends the process over some of them."""
    check_positions(x, bounds)
    check_cells(h, periodic)


def check_positions(x: Float[np.ndarray, "N 3"], bounds: Sequence[int]) -> None:
    """Raises ValueError naming an atom whose position is not finite."""
    if not np.isfinite(x).all():
        atom = int(np.argmax(~np.isfinite(x).all(-1)))
        raise ValueError(
            message(
                "finite positions",
                f"{x[atom]} for atom {atom} of system {system_of(bounds, atom)}",
                "look at the step before",
            )
        )


def check_cells(h: Float[np.ndarray, "B 3 3"], periodic: Bool[np.ndarray, "B 3"]) -> None:
    """Raises ValueError naming a system without a cell vector of its own for each periodic axis."""
    for s, (cell, axes) in enumerate(zip(h, periodic)):
        if axes.any() and not _independent(cell[axes]):
            raise ValueError(
                message(
                    "independent cell vectors on periodic axes",
                    f"{cell[axes].tolist()} in system {s}",
                    "give the cell, or set pbc False on that axis",
                )
            )


def _independent(vectors: np.ndarray) -> bool:
    """True if the vectors are linearly independent by more than rounding."""
    scale = math.prod(math.hypot(*v) for v in vectors.tolist())
    if len(vectors) == 3:
        (a, b, c), (d, e, f), (g, h, i) = vectors.tolist()
        volume = abs(a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g))
    else:
        volume = np.linalg.svd(vectors, compute_uv=False).prod() if math.isfinite(scale) else 0.0
    return volume > 1e-6 * scale and math.isfinite(volume)
