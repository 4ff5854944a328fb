"""Does a model keep the systems of one call apart? Seen in its first call with several of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from bridge.contract import INPUTS, check_outputs
from bridge.errors import message
from torch_side.potentials import padding

# the models that have shown it, as long as they live
_keep_apart: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def check(
    owner: nn.Module | None,
    model: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    inputs: dict[str, torch.Tensor],
    found: dict[str, torch.Tensor],
    name: str,
    systems: Sequence[int] | np.ndarray,
) -> None:
    """Evaluate the last system alone, unless `owner` has already shown that it keeps systems apart.

    `found` is what `model(inputs)` gave for several systems, and `systems` are the numbers of these
    in the caller's call. If the energies agree, `owner` is remembered (with None, nobody is).
    Nothing is evaluated where `inputs` holds a tensor outside of the contract, since nobody knows
    which part of it belongs to which system.

    Raises: ValueError naming the system whose energy in the call is not the one that it has alone.
    """
    strange = any(isinstance(x, torch.Tensor) and key not in INPUTS for key, x in inputs.items())
    if strange or owner in _keep_apart:
        return
    last = len(inputs["cell"]) - 1
    outputs = model(_system(inputs, last))
    check_outputs(outputs, int((inputs["batch"] == last).sum()), 1)
    energy = float(found["energy"].detach()[last])
    alone = float(outputs["energy"].detach())
    largest = max(1.0, abs(energy), abs(alone))
    rounding = torch.finfo(found["energy"].dtype).eps ** 0.5 * largest
    if abs(energy - alone) > rounding:
        got = f"{energy:.8g} eV for system {systems[last]} in the call, {alone:.8g} eV alone"
        do = (
            'add up what belongs to each system by x["batch"] (index_add), or, for vmap, pass batched="sequential"; '
            "card=bridge.Card(batches=True) vouches for a model whose energies differ for another "
            "reason"
        )
        raise ValueError(
            message(f"systems of one call that don't see one another in {name}", got, do)
        )
    if owner is not None:
        _keep_apart.add(owner)


def _system(inputs: dict[str, torch.Tensor], number: int) -> dict[str, torch.Tensor]:
    """One system of several, without the caller's graph and without unused slots of edges."""
    inputs = {key: x.detach() if isinstance(x, torch.Tensor) else x for key, x in inputs.items()}
    batch = inputs["batch"]
    index: padding.Index = {
        "N": (batch == number).nonzero()[:, 0],
        "B": torch.tensor([number], device=batch.device),
    }
    if "edge_index" in inputs:
        edges = inputs["edge_index"].long()
        used = (edges < len(batch)).all(0)
        centres = torch.where(used, edges[0], 0)
        index["E"] = (used & (batch[centres] == number)).nonzero()[:, 0]
    return padding.taken(inputs, index)
