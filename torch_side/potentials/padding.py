"""Rows of the arrays of the contract, taken out and put back: padding, one system of several, some
of the edges."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch._C._functorch import is_functorch_wrapped_tensor

from bridge.contract import INPUTS, OUTPUTS
from bridge.errors import message

NO_OFFSETS = message(
    "cell_offsets with edge_index",
    "edge_index alone",
    "pass both: r_ij = r_j - r_i + cell_offsets @ cell",
)

# Axis of the contract ("N", "B", "E"): the positions that are kept along it, or how many of the
# first ones. None, or no entry, keeps all.
Index = dict[str, torch.Tensor | int | None]


def positions(kept: Bool[torch.Tensor, " K"]) -> Int[torch.Tensor, " k"]:
    """Returns the positions at which `kept` is True, int64, on the device of `kept`.

    On the CPU, NumPy looks for them: it is six times faster at that than torch."""
    if kept.is_cpu and not is_functorch_wrapped_tensor(kept):
        return torch.from_numpy(np.flatnonzero(kept.numpy()))
    return kept.nonzero()[:, 0]


def counted(
    owner: Int[torch.Tensor, " K"], size: int, which: Bool[torch.Tensor, " K"] | None = None
) -> Int[torch.Tensor, " size"]:
    """Returns how many entries of `owner` name each of 0..size-1, where `which` is True if given.

    torch.bincount would have to look at the values, so that a program with it can't be compiled as
    a whole; and compilers add int32 much faster than int64."""
    ones = owner.new_ones(len(owner), dtype=torch.int32) if which is None else which.int()
    return ones.new_zeros(size).index_add(0, owner, ones).to(owner.dtype)


def one_hot(
    index: Int[torch.Tensor, " K"], size: int, dtype: torch.dtype
) -> Float[torch.Tensor, "K size"]:
    """Returns rows with a 1 at the place that `index` names, and zeros elsewhere.

    torch's own looks at the values, and gives int64."""
    return (index[..., None] == torch.arange(size, device=index.device)).to(dtype)


def taken(inputs: dict[str, torch.Tensor], index: Index) -> dict[str, torch.Tensor]:
    """Returns the inputs with only what `index` keeps; batch and edge_index are counted anew.

    `index` holds the positions to keep along the axes "N", "B" and "E", as int tensors. All is kept
    along an axis that is None or absent. Along "E" a number k keeps the first k edges. The entries
    of batch and edge_index that are kept must point to systems and atoms that are kept. What
    nothing is taken out of is returned as it is, without a copy.

    Raises: ValueError for a tensor outside of the contract, whose axes nobody knows.
    """
    inner = {key: rows(key, x, index) for key, x in inputs.items()}
    for key, axis, of in (("batch", "B", "cell"), ("edge_index", "N", "pos")):
        kept = index.get(axis)
        if key in inner and isinstance(kept, torch.Tensor):
            inner[key] = _counted_anew(inner[key], kept, len(inputs[of]))
    return inner


def rows(key: str, x: torch.Tensor, index: Index) -> torch.Tensor:
    """Returns the rows of the input `key` that `index` keeps, along each of its axes.

    An object outside of the contract that is no tensor is returned as it is. Raises: ValueError for
    a tensor outside of the contract."""
    if key not in INPUTS:
        if isinstance(x, torch.Tensor):
            do = f"pass no padding, or one of {', '.join(INPUTS)}"
            raise ValueError(message("inputs of the contract where there is padding", f"{key}", do))
        return x
    for axis, size in enumerate(INPUTS[key][0]):
        kept = index.get(size)
        if isinstance(kept, int):
            x = x.narrow(axis, 0, kept)
        elif kept is not None:
            x = x.index_select(axis, kept)
    return x


def _counted_anew(x: torch.Tensor, kept: torch.Tensor, size: int) -> torch.Tensor:
    """The indices x, below `size`, as positions among those that are kept."""
    place = torch.zeros(size, dtype=torch.int64, device=x.device)
    place[kept] = torch.arange(len(kept), device=x.device)
    return place[x.long()].to(x.dtype)


def put_back(key: str, x: torch.Tensor, index: Index, sizes: Mapping[str, int]) -> torch.Tensor:
    """Returns the output `key` at its full size, with zeros where nothing was computed.

    `index` says which positions of each axis `x` has, and `sizes` how long these axes are in full.
    Raises: ValueError for an output outside of the contract."""
    if key not in OUTPUTS:
        do = f"return {', '.join(OUTPUTS)}, or pass no padding"
        raise ValueError(message("outputs of the contract where there is padding", key, do))
    for axis, size in enumerate(OUTPUTS[key][0]):
        kept = index.get(size)
        if isinstance(kept, torch.Tensor):
            shape = [*x.shape]
            shape[axis] = sizes[size]
            x = x.new_zeros(shape).index_copy(axis, kept, x)
    return x
