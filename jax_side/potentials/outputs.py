"""All that a model of the contract gives, from one evaluation; its energy differentiates by the
gradients among it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from bridge.contract import GRADIENTS, OUTPUTS, check_inputs, check_outputs
from bridge.errors import message
from jax_side.potentials.derivatives import Call, outputs
from jax_side.potentials.strain import with_gradients

tree = jax.tree_util


def check_unused(card, given: dict, who: str) -> tuple:
    """Which of charge and spin are given, traced, though the model has no use for them: what
    `marked` is for.

    Raises: ValueError for one whose value is known and not zero, naming the system."""
    names = [name for name in card.unused(given) if given[name] is not None]
    traced = tuple(name for name in names if isinstance(given[name], jax.core.Tracer))
    for name in names:
        if name not in traced:
            card.check_unused(name, np.ravel(given[name]).tolist(), who)
    return traced


def marked(out: dict, inputs: dict, names) -> dict:
    """Outputs of a model that passes over the inputs `names` (B,): energy and gradients are NaN in
    systems where one is not zero."""
    for name in (name for name in names if inputs[name] is not None):
        wrong = {"B": inputs[name] != 0, "N": (inputs[name] != 0)[inputs["batch"]]}
        for key in {"energy", *GRADIENTS.values()} & set(out):
            rows = wrong[OUTPUTS[key][0][0]].reshape(-1, *[1] * (out[key].ndim - 1))
            # so that derivatives are NaN as well
            factor = jnp.where(rows, jnp.nan, 1).astype(out[key].dtype)
            out = out | {key: out[key] * factor}
    return out


@dataclass(frozen=True)
class Marking:
    """A model whose outputs are `marked`. Equal for equal models."""

    model: Callable
    names: tuple

    def __call__(self, inputs):
        return marked(self.model(inputs), inputs, self.names)


@dataclass(frozen=True)
class Outputs:
    """`outputs(inputs)`, or `outputs(params, inputs)` if parametric: the dict of the model, checked
    while it is traced.

    `gradients` says whether the model gives g and G itself ("model") or its energy alone
    ("autodiff"). The derivative of the energy in pos and cell is dE[b] = sum_{i in b} g_i . dr_i +
    <G_b, dh_b>, with no further evaluation; all other derivatives are JAX's own of the model. Equal
    for equal models, so that jit caches hit."""

    model: Callable
    gradients: str
    parametric: bool

    @property
    def __name__(self):
        return getattr(self.model, "__name__", type(self.model).__name__)

    def __call__(self, *args):
        leaves, structure = tree.tree_flatten(args)
        arrays = {i: x for i, x in enumerate(leaves) if isinstance(x, (jax.Array, np.ndarray))}
        places = structure.unflatten(range(len(leaves)))[-1]
        check_inputs(args[-1])

        def evaluate(arrays):
            return self._evaluate(
                *structure.unflatten([arrays.get(i, x) for i, x in enumerate(leaves)])
            )

        return outputs(Call(evaluate, places), arrays)

    def _evaluate(self, *args):
        *params, inputs = args
        model = partial(self.model, *params)
        if self.gradients == "autodiff":
            return with_gradients(model)(inputs)
        out, needed = model(inputs), ("energy", *GRADIENTS.values())
        if not isinstance(out, dict) or any(name not in out for name in needed):
            got = ", ".join(sorted(out)) if isinstance(out, dict) else type(out).__name__
            do = 'pass gradients="autodiff" for a model that gives its energy alone'
            raise ValueError(
                message(f"a dict with {', '.join(needed)} from {self.__name__}", got, do)
            )
        check_outputs(out, inputs["pos"].shape[0], inputs["cell"].shape[0])
        return out
