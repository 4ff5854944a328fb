"""All that a model of the contract gives, from one evaluation; its energy differentiates by the
gradients among it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from bridge.card import Card
from bridge.contract import (
    ENERGY_AND_GRADIENTS,
    GRADIENTS,
    OUTPUTS,
    called,
    check_inputs,
    check_outputs,
)
from bridge.errors import message
from jax_side.potentials.derivatives import Call, Inputs, Model, Named, outputs
from jax_side.potentials.strain import with_gradients

tree = jax.tree_util


def check_unused(card: Card, given: Mapping[str, Any], who: str) -> tuple[str, ...]:
    """Returns which of charge, spin and field are given, though the model has no use for them, and
    are traced, so that nobody can see whether they are zero. `marked` is for these.

    Raises: ValueError for one whose value is known and not zero, naming the system.
    """
    names = [name for name in card.unused(given) if given[name] is not None]
    traced = tuple(name for name in names if isinstance(given[name], jax.core.Tracer))
    for name in names:
        if name not in traced:
            card.check_unused(name, np.atleast_1d(given[name]).tolist(), who)
    return traced


def marked(out: Named, inputs: Mapping[str, Any], names: Collection[str]) -> Named:
    """Returns the outputs of a model that passes over the inputs `names` (B,...), with energy and
    gradients NaN in systems where one of these inputs is not zero."""
    for name in names:
        if inputs[name] is None:
            continue
        other = (inputs[name] != 0).any(axis=tuple(range(1, inputs[name].ndim)))
        wrong = {"B": other, "N": other[inputs["batch"]]}
        for key in {"energy", *GRADIENTS.values()} & set(out):
            rows = wrong[OUTPUTS[key][0][0]].reshape(-1, *[1] * (out[key].ndim - 1))
            # A factor makes derivatives NaN as well.
            factor = jnp.where(rows, jnp.nan, 1).astype(out[key].dtype)
            out = out | {key: out[key] * factor}
    return out


@dataclass(frozen=True)
class Marking:
    """A model whose outputs are `marked`. It is equal for equal models."""

    model: Model
    names: tuple[str, ...]

    def __call__(self, inputs: Inputs) -> Named:
        return marked(self.model(inputs), inputs, self.names)


@dataclass(frozen=True)
class Outputs:
    """A model of the contract as `outputs(inputs)`, or as `outputs(params, inputs)` if parametric,
    which returns the dict of the model, checked while it is traced.

    `gradients` says whether the model gives g and G itself ("model") or its energy alone
    ("autodiff"). `node_virials` has them made from an energy, too. The energy differentiates in pos
    and cell by g and G, and all else by JAX, as jax_side.potentials.derivatives has it. Outputs of
    equal models are equal, so that jit caches hit.

    Raises, when it is called: ValueError for inputs and outputs outside of the contract.
    """

    model: Callable[..., Any]
    gradients: Literal["model", "autodiff"]
    parametric: bool
    node_virials: bool = False

    @property
    def __name__(self) -> str:
        """The name of the model, for error texts."""
        return getattr(self.model, "__name__", type(self.model).__name__)

    def __call__(self, *args: Any) -> Named:
        leaves, structure = tree.tree_flatten(args)
        arrays = {i: x for i, x in enumerate(leaves) if isinstance(x, (jax.Array, np.ndarray))}
        places = structure.unflatten(range(len(leaves)))[-1]
        check_inputs(args[-1])

        def evaluate(arrays):
            given = structure.unflatten([arrays.get(i, x) for i, x in enumerate(leaves)])
            return self._evaluate(*given)

        return outputs(Call(evaluate, places), arrays)

    def _evaluate(self, *args):
        *params, inputs = args
        model = partial(self.model, *params)
        if self.gradients == "autodiff":
            return with_gradients(model, node_virials=self.node_virials)(inputs)
        out = called(model, inputs, self.__name__)
        needed = ENERGY_AND_GRADIENTS
        if not isinstance(out, dict) or any(name not in out for name in needed):
            got = ", ".join(sorted(out)) if isinstance(out, dict) else type(out).__name__
            do = 'pass gradients="autodiff" for a model that gives its energy alone'
            raise ValueError(
                message(f"a dict with {', '.join(needed)} from {self.__name__}", got, do)
            )
        check_outputs(out, inputs["pos"].shape[0], inputs["cell"].shape[0])
        return out
