"""Does a model keep the systems of one call apart? Seen in its first call with several of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from bridge.card import Card
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


def check_ahead(
    owner: nn.Module | None,
    model: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    card: Card,
    inputs: dict[str, torch.Tensor],
    name: str,
) -> None:
    """Does what `check` does where values can't be read: on two pairs of atoms made here.

    `inputs` are those of the call, of which only types are looked at.

    Raises: ValueError as `check`, and where the model can't be evaluated on such pairs."""
    if owner in _keep_apart:
        return
    try:
        # outside of whatever tracer is at work, for this needs values
        with _disable_current_modes(), torch.enable_grad():
            pairs = _two_pairs(inputs, card)
            found = model(pairs)
            check_outputs(found, 4, 2)
            check(owner, model, pairs, found, name, range(2))
    except Exception as error:
        do = (
            "call it once on several systems outside of jit, which shows it, or pass "
            "card=bridge.Card(batches=True), which vouches for it; an energy is (B,), one for each "
            'system, added up by x["batch"] (index_add)'
        )
        expected = f"{name} to keep systems of one call apart, as a compiled graph needs"
        got = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        raise ValueError(message(expected, got, do)) from error


def _two_pairs(inputs: dict[str, torch.Tensor], card: Card) -> dict[str, torch.Tensor]:
    """Two systems of two atoms, as inputs of a model like those given."""
    like = inputs["pos"]
    length = card.cutoff or 2.0
    apart = torch.tensor([0.0, 0.5, 0.0, 0.6], dtype=like.dtype, device=like.device)
    pos = torch.stack([length * apart, 0 * apart, 0 * apart], 1)
    whole = lambda rows: torch.tensor(rows, device=like.device)
    given = {
        "pos": pos,
        "atomic_numbers": whole([min(card.elements or [1])] * 4),
        "batch": whole([0, 0, 1, 1]),
        "cell": 3 * length * torch.eye(3, dtype=like.dtype, device=like.device).repeat(2, 1, 1),
        "pbc": torch.full((2, 3), card.needs_pbc, device=like.device),
        "edge_index": whole([[0, 1, 2, 3], [1, 0, 3, 2]]),
        "cell_offsets": whole([[0, 0, 0]] * 4),
        "charge": torch.zeros(2, dtype=like.dtype, device=like.device),
        "spin": torch.zeros(2, dtype=like.dtype, device=like.device),
    }
    return {key: x for key, x in given.items() if key in inputs}


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
