"""Neighbour lists on the torch side, periodic images included."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from bridge.contract import check_inputs
from bridge.errors import message, missing

# private in torch 2.13, as _DisableFuncTorch: the tensors beneath the wrappers of torch.func
_functorch = torch._C._functorch


def neighbor_list(pos, cell, pbc, cutoff, batch=None, *, ordered: bool = True):
    """All directed edges shorter than the cutoff: (edge_index (2,E), cell_offsets (E,3)), both
    int64.

    Takes pos (N,3) float in Angstrom (any image), cell (B,3,3) by rows of the same dtype, pbc (B,3)
    bool, cutoff in Angstrom, batch (N,) int sorted (None: one system). An edge i -> j stands for
    the vector

        r_ij = pos[j] - pos[i] + cell_offsets @ cell[batch[i]],    0 <= |r_ij| < cutoff,

    both directions are listed, and so are an atom's own periodic images; the atom itself is not.
    Cells may be smaller than the cutoff or triclinic, pbc may differ from axis to axis and from
    system to system. The cell vector of an open axis is not looked at: it may be zero, and its
    offsets are 0. Edges are sorted by centre; with ordered=False they come in the order in which
    they are found, the same each time, and the list costs half as much.

    The list is made by vesin on the CPU in float64, with torch's number of threads; positions on
    another device are copied there to be read, and the result lies on the device of pos. Nothing is
    differentiated: form r_ij from pos and cell, as above, to differentiate. Inside torch.func.grad,
    jvp and so on the values themselves are read.

    Raises: ValueError for shapes and dtypes outside the contract, a non-finite position (naming the
    atom) or cell, a periodic axis without a cell vector of its own, an unsorted batch, a cutoff
    that is not positive, or positions that torch.func.vmap runs over; ImportError without vesin.

    >>> edges, offsets = neighbor_list(torch.zeros(1, 3), torch.eye(3)[None], torch.tensor([[True, False, False]]), 1.5)
    >>> edges.tolist(), sorted(offsets.tolist())
    ([[0, 0], [0, 0]], [[-1, 0, 0], [1, 0, 0]])
    """
    parts = _found(pos, cell, pbc, cutoff, batch, ordered)
    return _written(parts, pos.device, np.int64, _count(parts))


def _found(pos, cell, pbc, cutoff, batch, ordered):
    """The edges of each system that has atoms."""
    inputs = {"pos": pos, "cell": cell, "pbc": pbc} | ({} if batch is None else {"batch": batch})
    n_atoms, n_systems = check_inputs(inputs, ("pos", "cell", "pbc"))
    x, h, periodic = (values(a) for a in (pos, cell, pbc))
    bounds = bounds_of(batch, n_atoms, n_systems)
    if not 0 < cutoff < np.inf:
        raise ValueError(
            message("a positive cutoff in Angstrom", f"{cutoff}", "pass the model's cutoff")
        )
    check_values(x, h, periodic, bounds)
    atoms = enumerate(itertools.pairwise(bounds))
    return [_edges(x[a:b], h[s], periodic[s], cutoff, a, ordered) for s, (a, b) in atoms if b > a]


class _Part(NamedTuple):
    """Pairs (E,2) and offsets (E,3) of one system, whose atoms begin at `first`; their memory is
    that of `owner`."""

    first: int
    pairs: np.ndarray
    offsets: np.ndarray
    owner: object


def _count(parts) -> int:
    return sum(len(part.offsets) for part in parts)


def _written(parts, device, dtype, capacity, unused=0):
    """edge_index (2,capacity), each row dense (torch's scatter is faster so), and cell_offsets
    (capacity,3)."""
    index, shifts = np.empty((2, capacity), dtype), np.empty((capacity, 3), dtype)
    end = 0
    for part in parts:
        here = slice(end, end + len(part.offsets))
        index[0, here], index[1, here], shifts[here] = (
            part.pairs[:, 0],
            part.pairs[:, 1],
            part.offsets,
        )
        if part.first:
            index[:, here] += part.first
        end = here.stop
    index[:, end:], shifts[end:] = unused, 0
    return torch.from_numpy(index).to(device), torch.from_numpy(shifts).to(device)


@dataclass(frozen=True)
class Padded:
    """neighbor_list of a dict of inputs, in a fixed number of slots: edge_index (2,capacity) and
    cell_offsets (capacity,3), int32.

    Unused slots have the index N and offsets 0. Equal for equal settings.

    Raises: as neighbor_list; ValueError saying how many slots are needed, where there are too
    few."""

    cutoff: float
    capacity: int
    ordered: bool = False

    def __call__(self, inputs: dict) -> dict:
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


def values(tensor):
    """The values of a tensor as NumPy: on the CPU, floats as float64, beneath the wrappers of
    torch.func."""
    if (
        type(tensor) is torch.Tensor
        and tensor.is_cpu
        and not tensor.requires_grad
        and tensor.dtype in _AS_THEY_ARE
    ) and (
        not _functorch.is_functorch_wrapped_tensor(tensor)
        and not torch._C._are_functorch_transforms_active()
    ):
        return tensor.numpy()
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            expected, got = (
                "one value of each position, cell, pbc and batch",
                "a batch of them under torch.func.vmap",
            )
            raise ValueError(message(expected, got, "make the edges outside, and pass them"))
        tensor = _functorch.get_unwrapped(tensor)
    with torch._C._DisableFuncTorch():
        tensor = tensor.detach().cpu()
        return tensor.double().numpy() if tensor.is_floating_point() else tensor.numpy()


_AS_THEY_ARE = {torch.float64, torch.int32, torch.int64, torch.bool}


def _edges(x, h, periodic, cutoff, first, ordered) -> _Part:
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


def _complete(h, periodic):
    """The cell with unit vectors across the periodic ones in place of what open axes have."""
    spanned = h[periodic]
    across = np.linalg.svd(spanned)[2][len(spanned) :] if len(spanned) else np.eye(3)
    full = h.copy()
    full[~periodic] = across
    return full


def bounds_of(batch, n_atoms, n_systems):
    """Where each system starts and the last one ends: B + 1 numbers."""
    if batch is None:
        if n_systems != 1:
            raise ValueError(
                message(
                    "batch for several systems", f"None for {n_systems} cells", "pass batch (N,)"
                )
            )
        return [0, n_atoms]
    batch = values(batch)
    if n_systems == 1 and not batch.any():
        return [0, n_atoms]
    if (np.diff(batch) < 0).any() or (n_atoms and not 0 <= batch[0] <= batch[-1] < n_systems):
        raise ValueError(
            message(
                f"batch sorted, within 0..{n_systems - 1}", f"{batch}", "sort the atoms by system"
            )
        )
    return np.searchsorted(batch, np.arange(n_systems + 1)).tolist()


def system_of(bounds, atom) -> int:
    """The system that an atom belongs to."""
    return int(np.searchsorted(bounds, atom, "right")) - 1


def check_values(x, h, periodic, bounds):
    """ValueError for values that have no neighbour list (vesin kills the process over some of
    them)."""
    check_positions(x, bounds)
    check_cells(h, periodic)


def check_positions(x, bounds) -> None:
    """ValueError naming an atom whose position is not finite."""
    if not np.isfinite(x).all():
        atom = int(np.argmax(~np.isfinite(x).all(-1)))
        raise ValueError(
            message(
                "finite positions",
                f"{x[atom]} for atom {atom} of system {system_of(bounds, atom)}",
                "look at the step before",
            )
        )


def check_cells(h, periodic) -> None:
    """ValueError naming a system without a cell vector of its own for each periodic axis."""
    for s, (cell, axes) in enumerate(zip(h, periodic)):
        if axes.any() and not _independent(cell[axes]):
            raise ValueError(
                message(
                    "independent cell vectors on periodic axes",
                    f"{cell[axes].tolist()} in system {s}",
                    "give the cell, or set pbc False on that axis",
                )
            )


def _independent(vectors):
    """True where the vectors span as many dimensions as they are, with room to spare for
    rounding."""
    scale = math.prod(math.hypot(*v) for v in vectors.tolist())
    if len(vectors) == 3:
        (a, b, c), (d, e, f), (g, h, i) = vectors.tolist()
        volume = abs(a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g))
    else:
        volume = np.linalg.svd(vectors, compute_uv=False).prod() if math.isfinite(scale) else 0.0
    return volume > 1e-6 * scale and math.isfinite(volume)
