"""The base of the models in torch_side/models: a potential of the contract from one function of a
graph; sums of them."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

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
    cell_offsets) if card.cutoff is set, and returns a dict with energy (B,) in eV and other outputs
    of bridge.contract.OUTPUTS that card.active_outputs asks for (or that cost nothing). It must be
    differentiable in pos and cell: `geometry.edge_vectors(inputs)` gives the r_ij that are. It need
    not check anything: see graph.evaluate for what is checked.

    Calling the model gives these outputs with position_gradients g = dE/dr at fixed cell (N,3) and
    cell_gradients G = dE/dh at fixed Cartesian positions (B,3,3), from one forward and one
    backward; with `model.asking("hessian")` also d2E/dr dr (N,3,N,3), by 3 N more backward passes.
    If pos, cell or a parameter requires grad, all can be differentiated again, else they are
    detached. `a + b` is the sum of two models.

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

    def energies(self, inputs: dict) -> dict:
        raise NotImplementedError(
            message(
                f"energies(inputs) of {type(self).__name__}",
                "none",
                "define it: a dict with energy (B,)",
            )
        )

    def forward(self, inputs: dict, trained: bool | None = None) -> dict:
        """`trained` says whether someone differentiates in the parameters; None: if one of them
        requires grad."""
        return graph.evaluate(
            partial(self._with_gradients, trained=trained),
            inputs,
            self.card,
            type(self).__name__,
            self,
        )

    def asking(self, *outputs: str):
        """This model, weights shared, with more outputs active (to() moves the weights of both:
        cast first, ask then).

        Raises: ValueError for an output that the card does not have."""
        other = copy.copy(self)
        other.card = self.card.asking(*outputs)
        return other

    def _apply(self, fn, recurse=True):
        """to(dtype), to(device): the card follows."""
        super()._apply(fn, recurse)
        if (
            self.card.dtype is not None
            and (home := next((p for p in self.parameters()), None)) is not None
        ):
            self.card = replace(
                self.card, dtype=str(home.dtype).removeprefix("torch."), device=str(home.device)
            )
        return self

    def __add__(self, other):
        return Sum([self, other]) if isinstance(other, Model) else NotImplemented

    def _with_gradients(self, inputs, trained=None):
        if trained is None:
            trained = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        evaluate = with_gradients(self.energies)
        if "hessian" not in self.card.active_outputs:
            return evaluate(inputs, create_graph=trained or None)
        return hessian(lambda x: evaluate(x, create_graph=True), inputs, keep=trained)


class Sum(Model):
    """The sum of several models: each with its own cutoff, on the same atoms. `a + b` makes one.

    energy, gradients and what else adds (bridge.contract.ADDITIVE) is added where all terms have
    it; other outputs (charges, embeddings) come from the one term that gives them. `card` is the
    sum of the cards.

    Raises: ValueError for terms of unlike units, dtypes or devices, and for an output that does not
    add and is active in two terms; TypeError for a term that is no Model."""

    def __init__(self, terms):
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
        self.terms = nn.ModuleList(flat)
        self.card = sum((t.card for t in flat[1:]), flat[0].card)

    def asking(self, *outputs):
        self.card.check_outputs(outputs, "this sum")
        other = copy.copy(self)
        other._modules = {
            "terms": nn.ModuleList(t.asking(*(set(outputs) & t.card.outputs)) for t in self.terms)
        }
        other.card = self.card.asking(*outputs)
        return other

    def forward(self, inputs, trained=None):
        each = shared_out(inputs, [term.card for term in self.terms])
        return added([term(given, trained=trained) for term, given in zip(self.terms, each)])


class Wrapped(Model):
    """A user's own torch potential with a card: checks, edges and padding as for the models of this
    package.

    `model(inputs)` takes the dict of the contract and returns one. With gradients="autograd" it
    holds energy (B,), and torch.autograd makes g and G from it; with gradients="model" it holds
    these as well. `card` says what it has and needs.

    >>> spring = Wrapped(lambda x: {"energy": x["pos"].square().sum().reshape(1)}, Card(), "autograd")
    >>> spring.card.cutoff is None
    True
    """

    def __init__(self, model, card: Card, gradients: str):
        super().__init__()
        self.model, self.card, self.gradients = model, card, gradients
        self.__qualname__ = getattr(model, "__qualname__", type(model).__name__)

    def energies(self, inputs):
        return named(self.model(inputs))

    def forward(self, inputs, trained=None):
        own = (
            self.energies
            if self.gradients == "model"
            else partial(self._with_gradients, trained=trained)
        )
        return graph.evaluate(own, inputs, self.card, self.__qualname__, self)

    def __eq__(self, other):
        return type(self) is type(other) and (self.model, self.card, self.gradients) == (
            other.model,
            other.card,
            other.gradients,
        )

    def __hash__(self):
        return hash((self.model, self.card, self.gradients))
