"""Committees: models of one architecture with other weights, evaluated at once; their mean and
their spread."""

from __future__ import annotations

import copy
from dataclasses import fields, replace
from functools import partial

import torch
from torch import nn

from bridge.card import Card
from bridge.errors import message
from torch_side.potentials import graph
from torch_side.potentials.hessian import hessian
from torch_side.potentials.model import Model
from torch_side.potentials.strain import with_gradients

SPREAD = {
    "energy": ("energy_std", "member_energies"),
    "position_gradients": ("position_gradients_std", "member_position_gradients"),
}
NOT_AVERAGED = {"embeddings", *(name for names in SPREAD.values() for name in names)}
ONE_BY_ONE = "evaluate them one after another: Committee(models, vmap=False)"


class Committee(Model):
    """M models of one card as one model of the contract, with the mean of their outputs and their
    disagreement.

    Called with the dict of the contract it returns, for N atoms in B systems, in eV and Angstrom,
    what the members return (but embeddings) averaged over them, energy (B,), position_gradients g
    (N,3) and cell_gradients G (B,3,3) at least, with

        energy_std (B,), position_gradients_std (N,3)

    the standard deviations over the M members, component by component, with M in the denominator
    (ddof=0, the spread of these M, as in MACE's calculator; for the unbiased estimate multiply by
    sqrt(M / (M - 1))). `asking("member_energies", "member_position_gradients")` adds each member's,
    (M,B) and (M,N,3), and `asking("hessian")` the Hessian of the mean. If pos, cell or a parameter
    requires grad, all can be differentiated again (biasing dynamics by energy_std, say).

    With `vmap=True` all members are evaluated by one call: one pass through the code of the model
    by torch.func.vmap over their weights, one backward. The members must be of one class and
    structure, differ in parameters and buffers alone, and torch.func.vmap must be able to run over
    them. Their weights are copied: the committee has parameters of the members' names with M in
    front. With `vmap=False` they are evaluated one after another on one neighbour list, and stay
    what they are, parameters shared; that is for models that torch.func refuses (MACE, and those
    with TorchScript inside, as SevenNet).

    Raises: TypeError for members that are no Models, or have no weights to tell them apart;
    ValueError for none at all, unlike cards or, with vmap=True, members that differ in more than
    weights; NotImplementedError where vmap=True can't be served.

    >>> from torch_side.potentials.model import Wrapped
    >>> class Spring(nn.Module):
    ...     def __init__(self, k):
    ...         super().__init__()
    ...         self.k = nn.Parameter(torch.tensor(k))
    ...     def forward(self, x):
    ...         return self.k * x["pos"].square().sum().reshape(1)
    >>> springs = Committee([Wrapped(Spring(k), Card(), "autograd").requires_grad_(False) for k in (1.0, 2.0, 3.0)])
    >>> x = {"pos": torch.ones(1, 3), "cell": torch.zeros(1, 3, 3), "pbc": torch.zeros(1, 3, dtype=torch.bool),
    ...      "batch": torch.tensor([0]), "atomic_numbers": torch.tensor([1])}
    >>> out = springs(x)
    >>> out["energy"], out["energy_std"]
    (tensor([6.]), tensor([2.4495]))
    """

    def __init__(self, models, vmap: bool = True):
        super().__init__()
        models = list(models)
        self.card, self.vmap = _card(models), vmap
        self.members, self.stacked = (
            _stack(models) if vmap else (nn.ModuleList(models), frozenset())
        )
        self.training = any(m.training for m in models)

    def asking(self, *outputs):
        other = copy.copy(self)
        other.card = self.card.asking(*outputs)
        asked = [m.asking(*(set(outputs) & m.card.outputs)) for m in self._models]
        other._modules = {"members": _Energies(*asked) if self.vmap else nn.ModuleList(asked)}
        return other

    def forward(self, inputs, trained=None):
        return graph.evaluate(
            partial(self._evaluate, trained=trained), inputs, self.card, type(self).__name__, self
        )

    @property
    def _models(self):
        """The members; with vmap=True the one that holds all weights."""
        return [self.members.model] if self.vmap else self.members

    def _evaluate(self, inputs, trained):
        if trained is None:
            trained = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        if not self.vmap:
            each = [m(inputs, trained=trained) for m in self.members]
            return self._summary(
                {name: torch.stack([out[name] for out in each]) for name in each[0]}
            )
        if "hessian" not in self.card.active_outputs:
            return self._summary(self._at_once(inputs, trained))
        return hessian(lambda x: self._summary(self._at_once(x, True)), inputs, keep=trained)

    def _at_once(self, inputs, keep):
        """The outputs of all members, (M, ...) each: pos and cell are made M, so that one backward
        gives each member's gradients."""
        size = dict(self.card.sizes)["M"]
        inputs = inputs | {
            name: inputs[name].expand(size, *inputs[name].shape) for name in ("pos", "cell")
        }
        # a Wrapped that gives them
        own = getattr(self.members.model, "gradients", "autograd") == "model"
        return (
            self._energies(inputs)
            if own
            else with_gradients(self._energies)(inputs, create_graph=keep or None)
        )

    def _energies(self, inputs):
        def one(tensors, pos, cell):
            return torch.func.functional_call(
                self.members, tensors, (inputs | {"pos": pos, "cell": cell},)
            )

        tensors, geometry = (
            dict(self.members.named_parameters()) | dict(self.members.named_buffers()),
            (inputs["pos"], inputs["cell"]),
        )
        try:
            return torch.func.vmap(
                one, in_dims=({n: 0 if n in self.stacked else None for n in tensors}, 0, 0)
            )(tensors, *geometry)
        except Exception as error:
            # or the model's own error
            one(
                {n: t[0] if n in self.stacked else t for n, t in tensors.items()},
                *(x[0] for x in geometry),
            )
            name, text = type(self.members.model).__name__, str(error).split("\n")[0]
            raise NotImplementedError(
                message(
                    "members that torch.func.vmap can run over",
                    f"{name}, which it can't ({text:.200})",
                    ONE_BY_ONE,
                )
            ) from error

    def _summary(self, out):
        found = {
            name: x.mean(0) for name, x in out.items() if name in self.card.outputs - NOT_AVERAGED
        }
        for name, (spread, members) in SPREAD.items():
            if spread in self.card.active_outputs:
                found[spread] = out[name].std(0, correction=0)
            if members in self.card.active_outputs:
                found[members] = out[name]
        return found


class _Energies(nn.Module):
    """`energies` of a model as the forward of a module, for torch.func.functional_call."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs):
        return self.model.energies(inputs)


def _card(models) -> Card:
    """The members' card, with what a committee adds."""
    if not models:
        raise ValueError(message("at least one model", "none", "pass a list of models of one card"))
    if strange := [m for m in models if not isinstance(m, Model)]:
        raise TypeError(
            message(
                "models of the contract as members",
                f"a {type(strange[0]).__name__}",
                "wrap it by torch_side.potentials.model.Wrapped",
            )
        )
    card = models[0].card
    for m in models:
        if unlike := [
            f.name for f in fields(Card) if getattr(m.card, f.name) != getattr(card, f.name)
        ]:
            got = f"{unlike[0]} {getattr(card, unlike[0])} and {getattr(m.card, unlike[0])}"
            raise ValueError(
                message("members of one card", got, "take models that were trained alike")
            )
    outputs = card.outputs - NOT_AVERAGED
    spread = [names for name, names in SPREAD.items() if name in outputs]
    return replace(
        card,
        outputs=outputs.union(*spread),
        active_outputs=(card.active_outputs & outputs).union(names[0] for names in spread),
        sizes=(*((axis, n) for axis, n in card.sizes if axis != "M"), ("M", len(models))),
    )


def _stack(models):
    """A copy of the first model whose weights are those of all, M in front, and the names of these;
    buffers that are equal stay."""
    first = models[0]
    if (
        type(first).energies is Model.energies
        or type(first)._with_gradients is not Model._with_gradients
    ):
        raise NotImplementedError(
            message(
                "members that are evaluated by their energies(inputs) alone",
                f"a {type(first).__name__}",
                ONE_BY_ONE,
            )
        )
    for m in models[1:]:
        _check_alike(first, m)
    whole, made = _Energies(copy.deepcopy(first)), {}
    for path, module in whole.model.named_modules():
        for kind in ("_parameters", "_buffers"):
            slots = getattr(module, kind)
            for name, x in slots.items():
                tensors = [getattr(m.get_submodule(path), kind).get(name) for m in models]
                if all(
                    t is not None for t in (x, *tensors)
                ):  # a copied GraphModule has constants of its own
                    made.setdefault(id(x), (x, _join(tensors, kind)))
                    slots[name] = made[id(x)][1]
    new = {id(joint) for old, joint in made.values() if joint.shape != old.shape}
    stacked = frozenset(
        n for n, t in (*whole.named_parameters(), *whole.named_buffers()) if id(t) in new
    )
    if not stacked:
        raise TypeError(
            message(
                "members with parameters or buffers that differ",
                f"{type(first).__name__} without any",
                ONE_BY_ONE,
            )
        )
    return whole, stacked


def _join(tensors, kind):
    first, *rest = tensors
    if kind == "_parameters":
        return nn.Parameter(
            torch.stack([t.detach() for t in tensors]),
            requires_grad=any(t.requires_grad for t in tensors),
        )
    return first.clone() if all(torch.equal(first, t) for t in rest) else torch.stack(tensors)


def _check_alike(first, other):
    """ValueError where two members differ in more than the values of their weights."""
    a, b = _description(first), _description(other)
    if unlike := [name for name in {**a, **b} if a.get(name) != b.get(name)]:
        got = f"{unlike[0]} {a.get(unlike[0])} and {b.get(unlike[0])}"
        raise ValueError(
            message(
                "members that differ in their weights alone",
                got,
                f"build them alike, or {ONE_BY_ONE}",
            )
        )


def _description(model) -> dict:
    """What members must have in common: classes of their parts, shapes of their weights, and what
    can be compared of the rest."""
    weights = {
        f"the shape of {n}": tuple(t.shape)
        for n, t in (*model.named_parameters(), *model.named_buffers())
    }
    parts = {
        f"the class of {path or 'a member'}": type(m).__name__ for path, m in model.named_modules()
    }
    return (
        parts
        | weights
        | {
            f"{path}.{k}".lstrip("."): _plain(x)
            for path, m in model.named_modules()
            for k, x in vars(m).items()
        }
    )


def _plain(x):
    """What can be compared of an attribute that is no weight."""
    if isinstance(x, torch.Tensor):
        return str(x.dtype), x.tolist()
    return (
        x
        if isinstance(x, int | float | str | tuple)
        else getattr(x, "__code__", getattr(x, "__name__", None))
    )
