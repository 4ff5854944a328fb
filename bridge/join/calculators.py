"""A potential of either bank as an ASE calculator, for drivers: `python -m bridge ipi`."""

from __future__ import annotations

from typing import Any, Literal

import jax
import torch

from bridge.call import one_of
from bridge.card import Card
from bridge.contract import CONDITIONS
from bridge.errors import message
from jax_side.engines import ase as in_jax
from jax_side.potentials.strain import with_gradients
from torch_side.engines import ase as in_torch
from torch_side.potentials.model import Model, Wrapped


def calculator(
    model: Any,
    *,
    kind: Literal["torch", "jax", "ase"] | None = None,
    gradients: Literal["model", "autograd"] = "model",
    cutoff: float | None = None,
    dtype: Literal["float32", "float64"] | None = None,
) -> Any:
    """Returns a potential as an ASE calculator, by the engine of its bank.

    `kind` says whose arrays the model takes, and "ase" that it is a calculator already. None tells
    a torch_side.potentials.model.Model, an nn.Module and a calculator by themselves. For a model of
    your own without a card, gradients="autograd" makes the gradients of an energy, in either bank,
    and `cutoff` in Angstrom asks for edges. `dtype` is that of positions and cell; for a JAX model
    it sets jax_enable_x64 as it needs it.

    Raises: TypeError for a model whose kind nobody knows; and what the engines raise."""
    one_of("kind", kind, ("torch", "jax", "ase", None))
    kind = kind or _kind(model)
    if kind == "ase":
        return model
    if kind == "torch":
        if not isinstance(model, Model):
            card = Card(
                cutoff=cutoff,
                neighbor_list=None if cutoff is None else "own",
                optional_inputs=CONDITIONS,
            )
            model = Wrapped(model, getattr(model, "card", None) or card, gradients)
        return in_torch.calculator(model, dtype=dtype)
    if dtype is not None:
        jax.config.update("jax_enable_x64", dtype == "float64")
    if gradients == "autograd":
        model = with_gradients(model)
    return in_jax.calculator(model, cutoff=cutoff, dtype=dtype)


def _kind(model: Any) -> Literal["torch", "jax", "ase"]:
    """Whose arrays the model takes, as far as it can be seen."""
    if isinstance(model, torch.nn.Module):
        return "torch"
    if hasattr(model, "get_property"):
        return "ase"
    got = f"a {type(model).__name__}, which may be either"
    raise TypeError(message('kind="torch" or kind="jax"', got, "say which framework it is in"))
