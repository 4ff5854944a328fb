"""Rows of the arrays of the contract, taken out and put back: padding, one system of several, some
of the edges."""

from __future__ import annotations

import numpy as np
import torch

from bridge.contract import INPUTS, OUTPUTS
from bridge.errors import message


def positions(kept: torch.Tensor) -> torch.Tensor:
    """Where `kept` (bool, one axis) is True: int64. NumPy finds that six times faster than torch
    does."""
    if kept.is_cpu and not torch._C._functorch.is_functorch_wrapped_tensor(kept):
        return torch.from_numpy(np.flatnonzero(kept.numpy()))
    return kept.nonzero()[:, 0]


def taken(inputs: dict, index: dict) -> dict:
    """The inputs with only what `index` keeps, batch and edge_index counted anew.

    `index` has the positions to keep (int tensors; None or absent: all) along the axes "N", "B" and
    "E"; of edges a number k stands for the first k. What is kept of batch and edge_index must point
    to what is kept.

    Raises: ValueError for a tensor outside of the contract, whose axes nobody knows.
    """
    inner = {key: rows(key, x, index) for key, x in inputs.items()}
    for key, axis, of in (("batch", "B", "cell"), ("edge_index", "N", "pos")):
        if key in inner and index.get(axis) is not None:
            inner[key] = _counted_anew(inner[key], index[axis], len(inputs[of]))
    return inner


def rows(key, x, index):
    """Rows of one input, along each axis that has an index."""
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


def _counted_anew(x, kept, size):
    """Indices among what is kept."""
    place = torch.zeros(size, dtype=torch.int64, device=x.device)
    place[kept] = torch.arange(len(kept), device=x.device)
    return place[x.long()].to(x.dtype)


def put_back(key, x, index, sizes):
    """An output at its full size, zeros where nothing was computed."""
    if key not in OUTPUTS:
        do = f"return {', '.join(OUTPUTS)}, or pass no padding"
        raise ValueError(message("outputs of the contract where there is padding", key, do))
    for axis, size in enumerate(OUTPUTS[key][0]):
        if index.get(size) is not None:
            shape = [*x.shape]
            shape[axis] = sizes[size]
            x = x.new_zeros(shape).index_copy(axis, index[size], x)
    return x
