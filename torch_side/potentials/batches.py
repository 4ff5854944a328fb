"""Does a model keep the systems of one call apart? Seen in its first call with several of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch

from bridge.contract import INPUTS, check_outputs
from bridge.errors import message
from torch_side.potentials import padding

_keep_apart = weakref.WeakSet()  # models that have shown it, as long as they live


def check(owner, model: Callable, inputs: dict, found: dict, name: str, systems) -> None:
    """Evaluate the last system alone where `owner` has not shown yet that it keeps systems apart.

    `model(inputs)` gave `found` for several systems, whose numbers in the caller's call are
    `systems`; `owner` is who is remembered. Tensors outside of the contract can't be shared out:
    with them nothing is evaluated.

    Raises: ValueError naming the system whose energy in the call is not the one that it has alone.
    """
    strange = any(isinstance(x, torch.Tensor) and key not in INPUTS for key, x in inputs.items())
    if strange or owner in _keep_apart:
        return
    last = len(inputs["cell"]) - 1
    outputs = model(_system(inputs, last))
    check_outputs(outputs, int((inputs["batch"] == last).sum()), 1)
    energy, alone = float(found["energy"].detach()[last]), float(outputs["energy"].detach())
    rounding = torch.finfo(found["energy"].dtype).eps ** 0.5 * max(1.0, abs(energy), abs(alone))
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


def _system(inputs, number) -> dict:
    """One system of several, without the caller's graph and without unused slots of edges."""
    inputs = {key: x.detach() if isinstance(x, torch.Tensor) else x for key, x in inputs.items()}
    batch = inputs["batch"]
    index = {
        "N": (batch == number).nonzero()[:, 0],
        "B": torch.tensor([number], device=batch.device),
    }
    if "edge_index" in inputs:
        edges = inputs["edge_index"].long()
        used = (edges < len(batch)).all(0)
        centres = torch.where(used, edges[0], 0)
        index["E"] = (used & (batch[centres] == number)).nonzero()[:, 0]
    return padding.taken(inputs, index)
