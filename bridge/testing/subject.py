"""The model that bridge.testing checks: NumPy in, NumPy out, whichever framework it is written
in."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from bridge.call import one_of
from bridge.card import Card
from bridge.contract import ENERGY_AND_GRADIENTS
from bridge.errors import message
from bridge.testing import strategies
from bridge.testing.strategies import Structure

Outputs = dict[str, np.ndarray]  # with the keys of bridge.contract


@dataclass(frozen=True)
class Tolerance:
    """How far numbers of one dtype may be apart.

    step    step of finite differences of positions and cells, in Angstrom
    strain  step of finite differences of strain
    slope   relative error of finite differences
    same    relative error of what must be the same
    floor   absolute error of both
    eps     relative rounding of the dtype
    far     distance in Angstrom at which copies of a molecule don't feel one another
    """

    step: float
    strain: float
    slope: float
    same: float
    floor: float
    eps: float
    far: float


TOLERANCES = {
    "float64": Tolerance(1e-4, 2e-5, 1e-5, 1e-8, 1e-7, 2.3e-16, 500.0),
    "float32": Tolerance(1e-2, 2e-3, 2e-2, 2e-4, 1e-4, 1.2e-7, 60.0),
}

Kind = Literal["torch", "jax"]
Gradients = Literal["model", "autograd", "autodiff"]
Found = tuple[str, str, list[np.ndarray]]  # by which transform, of what, the arrays
SIDES = {"torch": "torch_side.testing", "jax": "jax_side.testing"}
ROUNDING = 30  # an energy is taken to be off by this many of its roundings


class Subject:
    """The model under test: NumPy in, NumPy out.

    raw        the user's own model, of which `kind` tells the framework
    model      the same as a torch model of the contract
    unpadded   the same for edges that are given (for a JAX model), which it takes as they are
    gradients  "model" if the model gives its own
    limits     how far numbers of its dtype may be apart, times `factor`
    extras     inputs beside the structure, one number for each system

    Raises: TypeError for a model of unknown kind; ValueError for arguments that make no sense.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        kind: Kind | None = None,
        gradients: Gradients | None = None,
        cutoff: float | None = None,
        dtype: str | None = None,
        extras: Mapping[str, float] | None = None,
        tolerance: float = 1.0,
    ) -> None:
        one_of("gradients", gradients, ("model", "autograd", "autodiff", None))
        self.raw = model
        self.card: Card | None = getattr(model, "card", None)
        self.kind: Kind = one_of("kind", kind or _said(model), ("torch", "jax"))
        self.torch = side("torch")
        self.gradients: Gradients = gradients or "model"
        self.cutoff: float | None = cutoff if self.card is None else self.card.cutoff
        self.extras = _extras(extras, self.card)
        self.factor = tolerance
        natural = side("jax").precision() if self.kind == "jax" else "float64"
        stated = dtype or (self.card.dtype if self.card else None)
        self.dtype = one_of("dtype", stated or natural, tuple(TOLERANCES))
        self.limits = TOLERANCES[self.dtype]
        self.device = self.card.device if self.card else None
        self.model, self.unpadded = self._in_torch()

    def _in_torch(self) -> tuple[Any, Any]:
        """(the model in torch, the same for edges that are given, None if that is no other)."""
        if self.kind == "torch":
            gradients = "model" if self.gradients == "model" else "autograd"
            return self.torch.of_the_contract(self.raw, gradients, self.cutoff), None
        from bridge.join.potentials import torch_potential
        from torch_side.calls.buckets import Buckets

        module = partial(
            torch_potential,
            self.raw,
            gradients="model" if self.gradients == "model" else "autodiff",
            cutoff=self.cutoff,
        )
        unpadded = module(buckets=False)
        if not self.cutoff:
            return module(), unpadded
        few = Buckets(
            {"edge_index": "2 E", "cell_offsets": "E 3"},
            fill={"edge_index": 2**31 - 1},
            start=512,
            growth=8,
        )
        return module(buckets=few), unpadded

    def refuses(self, needs: Collection[str]) -> str:
        """Returns why a property that needs these can't be checked; "" if it can."""
        takes_none = self.kind == "torch" and not hasattr(self.model, "card")
        if "edges" in needs and (self.cutoff is None or takes_none):
            return "the model takes no edges"
        return "lanes are for torch models" if "lanes" in needs and self.kind == "jax" else ""

    def few(self, max_examples: int) -> int:
        """Returns how many examples are drawn for what compiles anew for each of them."""
        return max(1, max_examples // (20 if self.kind == "jax" else 8))

    def inputs(self, s: Structure) -> Structure:
        """Returns the structure as the model gets it."""
        extras = {k: np.full(len(s["cell"]), x, self.dtype) for k, x in self.extras.items()}
        return {**s, **{k: np.asarray(s[k], self.dtype) for k in ("pos", "cell")}, **extras}

    def __call__(self, s: Structure) -> Outputs:
        """Returns what the model gives for a structure."""
        # Edges that are given come as they are.
        model = self.unpadded if self.unpadded and "edge_index" in s else self.model
        return self.torch.call(model, self.inputs(s), self.device)

    def room(self, relative: float, *found: np.ndarray, noise: Outputs | None = None) -> float:
        """Returns how far numbers may be apart, `relative` to the largest of `found`.

        `noise` are the outputs of a structure. The room then has space for the digits that finite
        differences of their energy lose.
        """
        limits = self.limits
        scale = max((abs(np.asarray(x)).max(initial=0) for x in found), default=0)
        lost = 0.0
        if noise is not None:
            lost = ROUNDING * limits.eps * (1 + abs(noise["energy"]).max()) / limits.strain
        return self.factor * (relative * scale + limits.floor + lost)

    def transformed(
        self, s: Structure, other: np.ndarray, lane: Literal["auto", "ffi", "host"], second: bool
    ) -> list[Found]:
        """Returns the energy under the transforms of the other framework.

        `other` are more positions, for a batch of two. `second` is False for a model without second
        derivatives.
        """
        inputs, other = self.inputs(s), np.asarray(other, self.dtype)
        if self.kind == "jax":
            graph = self._graph(inputs)
            return self.torch.potential_transforms(self.unpadded, graph, other, second)
        from bridge.join.potentials import potential

        jax, fixed = side("jax"), {k: x for k, x in inputs.items() if k not in ("pos", "cell")}
        arguments: dict[str, Any] = {"n_systems": len(s["cell"]), "lane": lane, **fixed}
        with jax.wide(True) if self.dtype == "float64" else contextlib.nullcontext():
            energy = potential(self.model, **arguments)
            return jax.potential_transforms(energy, inputs["pos"], inputs["cell"], other, second)

    def compiled(self, s: Structure) -> Outputs:
        """Returns what a torch model gives on the native lane, in a jitted program."""
        from bridge.join.potentials import jax_potential

        jax = side("jax")
        with jax.wide(True) if self.dtype == "float64" else contextlib.nullcontext():
            return jax.jitted(jax_potential(self.model, lane="native"), self.inputs(s))

    def expected(
        self, s: Structure, other: np.ndarray, hessian: Callable[[Subject, Structure], np.ndarray]
    ) -> dict[str, list[np.ndarray]]:
        """Returns {what: arrays} that `transformed` must give, by the model's own framework.

        `hessian` takes finite differences, for torch. There is no "hessian" for a model without
        second derivatives.
        """
        inputs, jax = self.inputs(s), side("jax")
        if self.kind == "jax":
            energies = jax.bound(self.raw, self._graph(inputs), self.gradients)
            pos, cell, other = inputs["pos"], inputs["cell"], np.asarray(other, self.dtype)
            found = jax.potential_transforms(energies, pos, cell, other, True)
            return {what: x for _, what, x in found}
        out = self(s)
        batch = np.stack([out["energy"], self(s | {"pos": other})["energy"]])
        want = {"gradients": [out[k] for k in ENERGY_AND_GRADIENTS], "batch": [batch]}
        may = getattr(self.card, "derivative_order", None) in (None, 2)
        if may and self.torch.differentiable(self.model, inputs, self.device):
            want["hessian"] = [hessian(self, s)]
        return want

    def with_edges(self, s: Structure) -> Structure:
        """Returns the structure with its edges, if the model takes edges."""
        return s if self.cutoff is None else strategies.with_edges(s, self.cutoff)

    def _graph(self, inputs: Structure) -> Structure:
        """Inputs for JAX. The edges stay as they are where positions change under a transform."""
        if self.cutoff is None:
            return inputs
        return {
            k: x.astype(np.int32) if x.dtype == np.int64 else x
            for k, x in self.with_edges(inputs).items()
        }


def side(kind: str) -> Any:
    """Returns the bank's own half of this file, a module."""
    return importlib.import_module(SIDES[kind])


def kind_of(model: Any) -> Kind | None:
    """Returns "torch" for nn.Modules and models with a card, None for what may be either."""
    if any(c.__module__.startswith("torch.nn.") for c in type(model).__mro__):
        return "torch"
    carded = getattr(model, "card", None) is not None
    return "torch" if carded and not type(model).__module__.startswith("jax_side") else None


def _said(model: Any) -> Kind:
    """The kind of a model. Raises TypeError for one that may be either."""
    if kind := kind_of(model):
        return kind
    got = f"a {type(model).__name__}, which may be either"
    raise TypeError(message('kind="torch" or kind="jax"', got, "say what its tensors are"))


def _extras(extras: Mapping[str, float] | None, card: Card | None) -> dict[str, float]:
    """The inputs beside the structure. Raises ValueError for a missing one, for none is guessed."""
    found = dict(extras or {})
    required = card.required_inputs if card else frozenset()
    if absent := sorted(required & {"charge", "spin"} - set(found)):
        do = f"pass extras={{{absent[0]!r}: 0.0, ...}}"
        raise ValueError(message(f"the inputs {', '.join(absent)}", "none", do))
    return found
