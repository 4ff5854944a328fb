"""A potential of the other bank as a torch module of the contract."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from bridge.card import Card
from bridge.contract import GRADIENTS, INPUTS, OUTPUTS
from torch_side.calls.wrap import under_a_tracer
from torch_side.potentials import batches
from torch_side.potentials.model import Model
from torch_side.potentials.neighbors import neighbor_list


class JaxPotential(Model):
    """A JAX potential as a torch module: what bridge.torch_potential returns, and documents.

    `model` takes the dict of the contract and returns one: a TorchCallable, or a JaxModule that
    holds parameters. `cutoff` in Angstrom is that of the neighbour list that is made where no edges
    are given; None makes none."""

    model: Any  # a TorchCallable or a JaxModule

    def __init__(self, model: Any, cutoff: float | None, card: Card) -> None:
        super().__init__()
        self.model = model
        self.cutoff = cutoff
        self.card = card

    def forward(
        self, inputs: dict[str, torch.Tensor], trained: bool | None = None
    ) -> dict[str, torch.Tensor]:
        """Returns what the JAX potential returns for the dict of the contract.

        Inputs that are None count as absent. Indices, atomic numbers and offsets of 64 bits go to
        JAX as int32. `trained` is an argument of every Model and has no effect here.

        Raises: ValueError for a charge or spin that is not zero and that the potential has no use
        for, and for systems of one call that it does not keep apart. Under a tracer, where values
        can't be read, the energy and gradients of such a charge or spin are NaN instead."""
        inputs = {name: x for name, x in inputs.items() if x is not None}
        unused, traced = self.card.unused(inputs), under_a_tracer()
        for name in unused if not traced else ():
            self.card.check_unused(name, inputs[name].flatten().tolist(), "a JAX potential")
        if self.cutoff is not None and "edge_index" not in inputs:
            # what is missing here is named by neighbor_list
            structure: dict[str, Any] = {k: inputs.get(k) for k in ("pos", "cell", "pbc", "batch")}
            edges, offsets = neighbor_list(**structure, cutoff=self.cutoff)
            inputs |= {"edge_index": edges, "cell_offsets": offsets}
        inputs = {name: _index(name, x) for name, x in inputs.items()}
        found = self.model(inputs)
        if unused and traced:
            return _marked(found, inputs, unused)
        n_systems = len(inputs["cell"]) if "cell" in inputs else 1
        if n_systems > 1 and not self.card.batches and not traced:
            batches.check(self, self.model, inputs, found, "a JAX potential", range(n_systems))
        return found

    @property
    def compilations(self) -> int:
        """How many programs were compiled for it so far."""
        return self.model.compilations

    def extra_repr(self) -> str:
        """What repr shows of it in addition to its submodules."""
        text = f"cutoff={self.cutoff}"
        return text if isinstance(self.model, nn.Module) else f"{text}, model={self.model!r}"


def _marked(
    out: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor], names: Sequence[str]
) -> dict[str, torch.Tensor]:
    """The outputs, with NaN for energy and gradients of systems in which one of the inputs `names`,
    which the model ignores, is not zero."""
    for name in names:
        wrong = {"B": inputs[name] != 0, "N": (inputs[name] != 0)[inputs["batch"].long()]}
        for key in {"energy", *GRADIENTS.values()} & set(out):
            axis = OUTPUTS[key][0][0]
            rows = wrong[axis].reshape(-1, *[1] * (out[key].ndim - 1))
            # a factor, so that derivatives are NaN as well
            factor = torch.ones_like(out[key]).masked_fill(rows, torch.nan)
            out = out | {key: out[key] * factor}
    return out


def _index(name: str, x: torch.Tensor) -> torch.Tensor:
    """Indices, atomic numbers and offsets as int32, which JAX takes whether x64 is on or off."""
    is_int = INPUTS.get(name, ("", ""))[1] == "int"
    return x.to(torch.int32) if is_int and x.dtype in (torch.int64, torch.uint64) else x
