"""The model that bridge.testing checks: NumPy in, NumPy out, whichever framework it is written
in."""

from __future__ import annotations

import contextlib
import importlib
from functools import partial

import numpy as np

from bridge.call import one_of
from bridge.contract import ENERGY_AND_GRADIENTS
from bridge.errors import message
from bridge.testing.checks import TOLERANCES, hessian
from bridge.testing.strategies import with_edges

SIDES = {"torch": "torch_side.testing", "jax": "jax_side.testing"}


class Subject:
    """The model under test: NumPy in, NumPy out."""

    def __init__(
        self,
        model,
        *,
        kind=None,
        gradients=None,
        cutoff=None,
        dtype=None,
        extras=None,
        tolerance=1.0,
    ):
        one_of("gradients", gradients, ("model", "autograd", "autodiff", None))
        self.raw, self.card, self.kind = (
            model,
            getattr(model, "card", None),
            one_of("kind", kind or _said(model), ("torch", "jax")),
        )
        self.torch, self.gradients = side("torch"), gradients or "model"
        self.cutoff = cutoff if self.card is None else self.card.cutoff
        self.extras, self.factor = _extras(extras, self.card), tolerance
        natural = side("jax").precision() if self.kind == "jax" else "float64"
        self.dtype = one_of(
            "dtype", dtype or (self.card and self.card.dtype) or natural, tuple(TOLERANCES)
        )
        self.limits, self.device = TOLERANCES[self.dtype], self.card and self.card.device
        self.model = self.unpadded = None
        self.model = self._in_torch()

    def _in_torch(self):
        if self.kind == "torch":
            return self.torch.of_the_contract(
                self.raw, "model" if self.gradients == "model" else "autograd", self.cutoff
            )
        from bridge.join.potentials import torch_potential
        from torch_side.calls.buckets import Buckets

        module = partial(
            torch_potential,
            self.raw,
            gradients="model" if self.gradients == "model" else "autodiff",
            cutoff=self.cutoff,
        )
        self.unpadded = module(buckets=False)
        few = (
            {
                "buckets": Buckets(
                    {"edge_index": "2 E", "cell_offsets": "E 3"},
                    fill={"edge_index": 2**31 - 1},
                    start=512,
                    growth=8,
                )
            }
            if self.cutoff
            else {}
        )
        return module(**few)

    def refuses(self, needs) -> str:
        """Why a property that needs these can't be checked."""
        if "edges" in needs and (
            self.cutoff is None or (self.kind == "torch" and not hasattr(self.model, "card"))
        ):
            return "the model takes no edges"
        return "lanes are for torch models" if "lanes" in needs and self.kind == "jax" else ""

    def few(self, max_examples):
        """How many examples for what compiles anew for each of them."""
        return max(1, max_examples // (20 if self.kind == "jax" else 8))

    def inputs(self, s):
        """The structure as the model gets it."""
        extras = {k: np.full(len(s["cell"]), x, self.dtype) for k, x in self.extras.items()}
        return {**s, **{k: np.asarray(s[k], self.dtype) for k in ("pos", "cell")}, **extras}

    def __call__(self, s):
        # edges that are given come as they are
        model = self.unpadded if self.unpadded and "edge_index" in s else self.model
        return self.torch.call(model, self.inputs(s), self.device)

    def room(self, relative, *found, noise=None):
        """How far numbers may be apart: relative to the largest of `found`; with `noise`, also for
        digits lost in finite differences of its energy."""
        limits, scale = (
            self.limits,
            max((abs(np.asarray(x)).max(initial=0) for x in found), default=0),
        )
        lost = (
            0
            if noise is None
            else 30 * limits.eps * (1 + abs(noise["energy"]).max()) / limits.strain
        )
        return self.factor * (relative * scale + limits.floor + lost)

    def transformed(self, s, other, lane, second):
        """[(label, what, arrays)] of the energy in the other framework, by the transforms there."""
        inputs, other = self.inputs(s), np.asarray(other, self.dtype)
        if self.kind == "jax":
            return self.torch.potential_transforms(
                self.unpadded, self._graph(inputs), other, second
            )
        from bridge.join.potentials import potential

        fixed = {k: x for k, x in inputs.items() if k not in ("pos", "cell")}
        with side("jax").wide(True) if self.dtype == "float64" else contextlib.nullcontext():
            energy = potential(self.model, n_systems=len(s["cell"]), lane=lane, **fixed)
            return side("jax").potential_transforms(
                energy, inputs["pos"], inputs["cell"], other, second
            )

    def expected(self, s, other):
        """{what: arrays} that `transformed` must give, by the model's own framework; no Hessian
        where it has none."""
        inputs, jax = self.inputs(s), side("jax")
        if self.kind == "jax":
            energies = jax.bound(self.raw, self._graph(inputs), self.gradients)
            return {
                what: x
                for _, what, x in jax.potential_transforms(
                    energies, inputs["pos"], inputs["cell"], np.asarray(other, self.dtype), True
                )
            }
        out = self(s)
        batch = np.stack([out["energy"], self(s | {"pos": other})["energy"]])
        twice = getattr(self.card, "derivative_order", None) in (
            None,
            2,
        ) and self.torch.differentiable(self.model, inputs, self.device)
        second = {"hessian": [hessian(self, s)]} if twice else {}
        return {"gradients": [out[k] for k in ENERGY_AND_GRADIENTS], "batch": [batch], **second}

    def _graph(self, inputs):
        """With edges, if the model takes them: they stay as they are where positions change under a
        transform."""
        if self.cutoff is None:
            return inputs
        return {
            k: x.astype(np.int32) if x.dtype == np.int64 else x
            for k, x in with_edges(inputs, self.cutoff).items()
        }


def side(kind):
    """The bank's own half of this file."""
    return importlib.import_module(SIDES[kind])


def kind_of(model) -> str | None:
    """torch for nn.Modules and models with a card; None for what may be either."""
    torch_module = any(c.__module__.startswith("torch.nn.") for c in type(model).__mro__)
    if torch_module or (
        getattr(model, "card", None) is not None
        and not type(model).__module__.startswith("jax_side")
    ):
        return "torch"
    return None


def _said(model) -> str:
    if kind := kind_of(model):
        return kind
    raise TypeError(
        message(
            'kind="torch" or kind="jax"',
            f"a {type(model).__name__}, which may be either",
            "say what its tensors are",
        )
    )


def _extras(extras, card):
    """The inputs besides the structure, none of them guessed."""
    extras = dict(extras or {})
    if absent := sorted(
        (card.required_inputs if card else frozenset()) & {"charge", "spin"} - set(extras)
    ):
        raise ValueError(
            message(
                f"the inputs {', '.join(absent)}",
                "none",
                f"pass extras={{{absent[0]!r}: 0.0, ...}}",
            )
        )
    return extras
