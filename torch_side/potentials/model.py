"""The base of the models in torch_side/models: a potential of the contract from one function of a
graph; sums of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Self, cast

import torch
from torch import nn

from bridge.card import Card, shared_out
from bridge.contract import added, named
from bridge.errors import message
from torch_side.potentials import graph
from torch_side.potentials.hessian import hessian
from torch_side.potentials.strain import with_gradients


class Model(nn.Module):
    """A potential of the contract: a subclass sets `card` in its __init__ and defines `energies`.

    `energies(inputs)` takes the dict of the contract without padding, with edges (edge_index,
    cell_offsets) if card.cutoff is set. It returns a dict with energy (B,) in eV and those other
    outputs of bridge.contract.OUTPUTS that card.active_outputs asks for, or that cost nothing. The
    energy must be differentiable in pos and cell; `geometry.edge_vectors(inputs)` returns r_ij that
    are. `energies` need not check its inputs, since graph.evaluate has done so.

    Calling the model returns these outputs together with position_gradients g = dE/dr at fixed cell
    (N,3) and cell_gradients G = dE/dh at fixed Cartesian positions (B,3,3), from one forward and
    one backward pass. After `model.asking("hessian")` it also returns d2E/dr dr (N,3,N,3), by 3 N
    more backward passes. If pos, cell or a parameter requires grad, all outputs can be
    differentiated again; otherwise they are detached. `a + b` is the sum of two models.

    >>> class Spring(Model):
    ...     card = Card()
    ...     def energies(self, inputs):
    ...         return {"energy": inputs["pos"].square().sum().reshape(1)}
    >>> x = {"pos": torch.ones(1, 3), "cell": torch.zeros(1, 3, 3), "pbc": torch.zeros(1, 3, dtype=torch.bool),
    ...      "batch": torch.tensor([0]), "atomic_numbers": torch.tensor([1])}
    >>> (2 * Spring()(x)["position_gradients"] == (Spring() + Spring())(x)["position_gradients"]).all()
    tensor(True)
    """

    card: Card

    def energies(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the energy (B,) in eV, and other outputs, of inputs without padding.

        Raises: NotImplementedError where a subclass does not define it."""
        raise NotImplementedError(
            message(
                f"energies(inputs) of {type(self).__name__}",
                "none",
                "define it: a dict with energy (B,)",
            )
        )

    def forward(
        self, inputs: dict[str, torch.Tensor], trained: bool | None = None
    ) -> dict[str, torch.Tensor]:
        """Returns the active outputs for the dict of the contract.

        `trained` says whether somebody differentiates the outputs in the parameters. None stands
        for True if grad mode is on and a parameter requires grad.

        Raises: what graph.evaluate raises."""
        return graph.evaluate(
            partial(self._with_gradients, trained=trained),
            inputs,
            self.card,
            type(self).__name__,
            self,
        )

    def asking(self, *outputs: str) -> Self:
        """Returns a model with more outputs active, which shares the weights of this one.

        `to` moves the weights of both, but changes the card of one alone: first cast, then ask.

        Raises: ValueError for an output that the card does not have."""
        other = copy.copy(self)
        other.card = self.card.asking(*outputs)
        return other

    def _apply(self, fn: Callable, recurse: bool = True) -> Self:
        """What to(dtype) and to(device) do to the weights; the card follows them."""
        super()._apply(fn, recurse)
        home = next(self.parameters(), None)
        if self.card.dtype is not None and home is not None:
            dtype = str(home.dtype).removeprefix("torch.")
            self.card = replace(self.card, dtype=dtype, device=str(home.device))
        return self

    def __add__(self, other: Model) -> Sum:
        return Sum([self, other]) if isinstance(other, Model) else NotImplemented

    def _with_gradients(
        self, inputs: dict[str, torch.Tensor], trained: bool | None = None
    ) -> dict[str, torch.Tensor]:
        """The energies with g and G, and the Hessian if it is active, by torch.autograd."""
        if trained is None:
            trained = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        asked = "node_virials" in self.card.active_outputs
        evaluate = with_gradients(self.energies, node_virials=asked)
        if "hessian" not in self.card.active_outputs:
            return evaluate(inputs, create_graph=trained or None)
        return hessian(lambda x: evaluate(x, create_graph=True), inputs, keep=trained)


class Sum(Model):
    """The sum of several models of the same atoms, each with its own cutoff. `a + b` makes one.

    Energies, gradients and the other outputs of bridge.contract.ADDITIVE are added where all terms
    have them. Other outputs (charges, embeddings) come from the one term that has them. `card` is
    the sum of the cards. Sums among the terms are taken apart.

    Raises: ValueError for terms of unlike units, dtypes or devices, and for an output that does not
    add and is active in two terms; TypeError for a term that is no Model."""

    terms: Sequence[Model]  # an nn.ModuleList

    def __init__(self, terms: Iterable[Model]) -> None:
        super().__init__()
        flat = [t for term in terms for t in (term.terms if isinstance(term, Sum) else [term])]
        if strange := [t for t in flat if not isinstance(t, Model)]:
            raise TypeError(
                message(
                    "models of the contract as terms",
                    f"a {type(strange[0]).__name__}",
                    "wrap it by torch_side.potentials.model.Wrapped",
                )
            )
        self.terms = cast("Sequence[Model]", nn.ModuleList(flat))
        self.card = sum((t.card for t in flat[1:]), flat[0].card)

    def asking(self, *outputs: str) -> Self:
        """Returns the sum of the terms, each with those of the outputs active that it has.

        Raises: ValueError for an output that the sum does not have."""
        self.card.check_outputs(outputs, "this sum")
        other = copy.copy(self)
        terms = nn.ModuleList(t.asking(*(set(outputs) & t.card.outputs)) for t in self.terms)
        other._modules = {"terms": terms}
        other.card = self.card.asking(*outputs)
        return other

    def forward(
        self, inputs: dict[str, torch.Tensor], trained: bool | None = None
    ) -> dict[str, torch.Tensor]:
        """Returns the sums of the terms' outputs.

        A charge or a spin goes to the terms that have a use for it, if there are such terms."""
        each = shared_out(inputs, [term.card for term in self.terms])
        return added([term(given, trained=trained) for term, given in zip(self.terms, each)])


class Wrapped(Model):
    """A user's own torch potential with a card, called with the checks, the edges and the padding
    of the models of this package.

    `model(inputs)` takes the dict of the contract and returns one. With gradients="autograd" the
    result holds energy (B,), and torch.autograd makes g and G from it. With gradients="model" it
    holds g and G as well. `card` says what the model computes and needs. Two of these are equal if
    their model, card and gradients are.

    >>> spring = Wrapped(lambda x: {"energy": x["pos"].square().sum().reshape(1)}, Card(), "autograd")
    >>> spring.card.cutoff is None
    True
    """

    model: Callable[[dict[str, torch.Tensor]], Any]

    def __init__(
        self,
        model: Callable[[dict[str, torch.Tensor]], Any],
        card: Card,
        gradients: Literal["autograd", "model"],
    ) -> None:
        super().__init__()
        self.model = model
        self.card = card
        self.gradients = gradients
        self.__qualname__ = getattr(model, "__qualname__", type(model).__name__)

    def energies(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns what the user's model returns, as a dict.

        Raises: TypeError for an energy that is no tensor; ValueError where there is none."""
        return named(self.model(inputs))

    def forward(
        self, inputs: dict[str, torch.Tensor], trained: bool | None = None
    ) -> dict[str, torch.Tensor]:
        """Returns the active outputs; see Model.forward."""
        own = self.energies
        if self.gradients != "model":
            own = partial(self._with_gradients, trained=trained)
        return graph.evaluate(own, inputs, self.card, self.__qualname__, self)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Wrapped) or type(self) is not type(other):
            return False
        return self._value() == other._value()

    def __hash__(self) -> int:
        return hash(self._value())

    def _value(self) -> tuple:
        """What it is compared by."""
        return self.model, self.card, self.gradients
