"""A potential of the other bank as a torch module of the contract."""

from __future__ import annotations

import torch
from torch import nn

from bridge.card import Card
from bridge.contract import GRADIENTS, INPUTS, OUTPUTS
from torch_side.calls.wrap import under_a_tracer
from torch_side.potentials import batches
from torch_side.potentials.model import Model
from torch_side.potentials.neighbors import neighbor_list


class JaxPotential(Model):
    """What bridge.torch_potential returns; its docstring is the documentation.

    `model` takes the dict of the contract and gives one: a TorchCallable, or a JaxModule that holds
    parameters."""

    def __init__(self, model, cutoff: float | None, card: Card):
        super().__init__()
        self.model, self.cutoff, self.card = model, cutoff, card

    def forward(self, inputs: dict, trained: bool | None = None) -> dict:
        inputs = {name: x for name, x in inputs.items() if x is not None}
        unused, traced = self.card.unused(inputs), under_a_tracer()
        for name in unused if not traced else ():
            self.card.check_unused(name, inputs[name].flatten().tolist(), "a JAX potential")
        if self.cutoff is not None and "edge_index" not in inputs:
            edges = neighbor_list(
                *(inputs.get(k) for k in ("pos", "cell", "pbc")), self.cutoff, inputs.get("batch")
            )
            inputs |= dict(zip(("edge_index", "cell_offsets"), edges))
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
        return self.model.compilations

    def extra_repr(self) -> str:
        return f"cutoff={self.cutoff}" + (
            "" if isinstance(self.model, nn.Module) else f", model={self.model!r}"
        )


def _marked(out, inputs, names) -> dict:
    """The outputs, energy and gradients NaN in systems where an input that the model passes over is
    not zero."""
    for name in names:
        wrong = {"B": inputs[name] != 0, "N": (inputs[name] != 0)[inputs["batch"].long()]}
        for key in {"energy", *GRADIENTS.values()} & set(out):
            rows = wrong[OUTPUTS[key][0][0]].reshape(-1, *[1] * (out[key].ndim - 1))
            # so that derivatives are NaN as well
            factor = torch.ones_like(out[key]).masked_fill(rows, torch.nan)
            out = out | {key: out[key] * factor}
    return out


def _index(name, x):
    """Indices, atomic numbers and offsets as int32, which JAX takes whether x64 is on or off."""
    return (
        x.to(torch.int32)
        if INPUTS.get(name, ("", ""))[1] == "int" and x.dtype in (torch.int64, torch.uint64)
        else x
    )
