"""Committees: models of one architecture with other weights, evaluated at once; their mean and
their spread."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any, Self, cast

import torch
from torch import nn

from bridge.card import Card
from bridge.errors import message
from torch_side.potentials import graph
from torch_side.potentials.hessian import hessian
from torch_side.potentials.model import Model
from torch_side.potentials.strain import with_gradients

# output of the members: the names of its standard deviation, and of all members' values
SPREAD = {
    "energy": ("energy_std", "member_energies"),
    "position_gradients": ("position_gradients_std", "member_position_gradients"),
}
NOT_AVERAGED = {"embeddings", *(name for names in SPREAD.values() for name in names)}
ONE_BY_ONE = "evaluate them one after another: Committee(models, vmap=False)"


class Committee(Model):
    """M models of one card as one model of the contract, with the mean of their outputs and their
    disagreement.

    Called with the dict of the contract for N atoms in B systems, it returns the outputs of the
    members averaged over these, in eV and Angstrom: energy (B,), position_gradients g (N,3) and
    cell_gradients G (B,3,3) at least, and never embeddings; node_virials with vmap=False alone. It adds

        energy_std (B,), position_gradients_std (N,3)

    which are standard deviations over the M members, component by component, with M in the
    denominator (ddof=0). This is the spread of these M models, as in MACE's calculator; for the
    unbiased estimate multiply by sqrt(M / (M - 1)). `asking("member_energies",
    "member_position_gradients")` adds the values of each member, (M,B) and (M,N,3), and
    `asking("hessian")` adds the Hessian of the mean. If pos, cell or a parameter requires grad, all
    outputs can be differentiated again, for example to bias dynamics by energy_std.

    With `vmap=True` one call evaluates all members: torch.func.vmap runs over their weights in one
    pass through the code of the model, and one backward pass follows. The members must be of one
    class and structure and differ in parameters and buffers alone, and torch.func.vmap must be able
    to run over them. Their weights are copied: the committee has parameters of the members' names,
    with an axis M in front. With `vmap=False` the members are evaluated one after another on one
    neighbour list. They are not copied, and share their parameters with the committee. This is for
    models that torch.func refuses: MACE, and models with TorchScript inside, such as SevenNet.

    Raises: TypeError for members that are no Models, or that have no weights to tell them apart;
    ValueError for no members at all, for unlike cards and, with vmap=True, for members that differ
    in more than weights; NotImplementedError where vmap=True can't be served.

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

    members: _Joint | Sequence[Model]  # with vmap=True one module, else an nn.ModuleList

    def __init__(self, models: Iterable[Model], vmap: bool = True) -> None:
        super().__init__()
        models = list(models)
        self.card = _card(models, vmap)
        self.vmap = vmap
        if vmap:
            self.members, self.stacked = _stack(models)
        else:
            self.members = cast("Sequence[Model]", nn.ModuleList(models))
            self.stacked = frozenset()
        self.training = any(m.training for m in models)

    def asking(self, *outputs: str) -> Self:
        """Returns a committee with more outputs active, which shares the weights of this one.

        Raises: ValueError for an output that the committee does not have."""
        other = copy.copy(self)
        other.card = self.card.asking(*outputs)
        asked = lambda model: model.asking(*(set(outputs) & model.card.outputs))
        if isinstance(self.members, _Joint):
            members = _Joint(asked(self.members.model))
        else:
            members = nn.ModuleList(map(asked, self.members))
        other._modules = {"members": members}
        return other

    def forward(
        self, inputs: dict[str, torch.Tensor], trained: bool | None = None
    ) -> dict[str, torch.Tensor]:
        """Returns the active outputs; see Model.forward."""
        return graph.evaluate(
            partial(self._evaluate, trained=trained), inputs, self.card, type(self).__name__, self
        )

    def _evaluate(
        self, inputs: dict[str, torch.Tensor], trained: bool | None
    ) -> dict[str, torch.Tensor]:
        """The active outputs of inputs without padding."""
        if trained is None:
            trained = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        members, keep = self.members, trained
        if not isinstance(members, _Joint):
            each = [m(inputs, trained=keep) for m in members]
            stacked = {name: torch.stack([out[name] for out in each]) for name in each[0]}
            return self._summary(stacked)
        if "hessian" not in self.card.active_outputs:
            return self._summary(self._at_once(members, inputs, keep))
        with_graph = lambda x: self._summary(self._at_once(members, x, True))
        return hessian(with_graph, inputs, keep=keep)

    def _at_once(
        self, joint: _Joint, inputs: dict[str, torch.Tensor], keep: bool
    ) -> dict[str, torch.Tensor]:
        """The outputs of all members, (M, ...) each. pos and cell get an axis M as well, so that
        one backward pass makes the gradients of each member."""
        size = dict(self.card.sizes)["M"]
        each = {name: inputs[name].expand(size, *inputs[name].shape) for name in ("pos", "cell")}
        inputs = inputs | each
        energies = partial(self._energies, joint)
        # a Wrapped may return gradients of its own
        if getattr(joint.model, "gradients", "autograd") == "model":
            return energies(inputs)
        return with_gradients(energies)(inputs, create_graph=keep or None)

    def _energies(self, joint: _Joint, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What the members' `energies` return, (M, ...) each, by torch.func.vmap."""

        def one(
            tensors: dict[str, torch.Tensor], pos: torch.Tensor, cell: torch.Tensor
        ) -> dict[str, torch.Tensor]:
            geometry = {"pos": pos, "cell": cell}
            return torch.func.functional_call(joint, tensors, (inputs | geometry,))

        tensors = dict(joint.named_parameters()) | dict(joint.named_buffers())
        pos, cell = inputs["pos"], inputs["cell"]
        axes = {n: 0 if n in self.stacked else None for n in tensors}
        try:
            return torch.func.vmap(one, in_dims=(axes, 0, 0))(tensors, pos, cell)
        except Exception as error:
            # If the model itself has raised it, the first member alone raises it again.
            first = {n: t[0] if n in self.stacked else t for n, t in tensors.items()}
            one(first, pos[0], cell[0])
            name, text = type(joint.model).__name__, str(error).split("\n")[0]
            raise NotImplementedError(
                message(
                    "members that torch.func.vmap can run over",
                    f"{name}, which it can't ({text:.200})",
                    ONE_BY_ONE,
                )
            ) from error

    def _summary(self, out: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Means and standard deviations of the members' outputs (M, ...), and what is asked for of
        these themselves."""
        averaged = self.card.outputs - NOT_AVERAGED
        found = {name: x.mean(0) for name, x in out.items() if name in averaged}
        for name, (spread, members) in SPREAD.items():
            if spread in self.card.active_outputs:
                found[spread] = out[name].std(0, correction=0)
            if members in self.card.active_outputs:
                found[members] = out[name]
        return found


class _Joint(nn.Module):
    """The first model with the weights of all, M in front, for torch.func.functional_call. Its
    forward is the model's `energies`."""

    model: Model

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns what the model's `energies` return."""
        return self.model.energies(inputs)


def _card(models: Sequence[Model], vmap: bool) -> Card:
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
        for name in (f.name for f in fields(Card)):
            ours, theirs = getattr(card, name), getattr(m.card, name)
            if theirs != ours:
                got = f"{name} {ours} and {theirs}"
                do = "take models that were trained alike"
                raise ValueError(message("members of one card", got, do))
    # the edges of all members are the same variables
    outputs = card.outputs - NOT_AVERAGED - ({"node_virials"} if vmap else set())
    spread = [names for name, names in SPREAD.items() if name in outputs]
    others = [(axis, n) for axis, n in card.sizes if axis != "M"]
    return replace(
        card,
        outputs=outputs.union(*spread),
        active_outputs=(card.active_outputs & outputs).union(names[0] for names in spread),
        sizes=(*others, ("M", len(models))),
    )


def _stack(models: Sequence[Model]) -> tuple[_Joint, frozenset[str]]:
    """A copy of the first model with the weights of all, M in front, and the names of these
    weights. Buffers that are equal in all models are not stacked."""
    first = models[0]
    undefined = type(first).energies is Model.energies
    if undefined or type(first)._with_gradients is not Model._with_gradients:
        raise NotImplementedError(
            message(
                "members that are evaluated by their energies(inputs) alone",
                f"a {type(first).__name__}",
                ONE_BY_ONE,
            )
        )
    for m in models[1:]:
        _check_alike(first, m)
    whole = _Joint(copy.deepcopy(first))
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by id: one of the copy, the joint one
    for path, module in whole.model.named_modules():
        for kind in ("_parameters", "_buffers"):
            slots = getattr(module, kind)
            for name, x in slots.items():
                tensors = [getattr(m.get_submodule(path), kind).get(name) for m in models]
                # a copied GraphModule has constants of its own
                if all(t is not None for t in (x, *tensors)):
                    made.setdefault(id(x), (x, _join(tensors, kind)))
                    slots[name] = made[id(x)][1]
    new = {id(joint) for old, joint in made.values() if joint.shape != old.shape}
    weights = (*whole.named_parameters(), *whole.named_buffers())
    stacked = frozenset(n for n, t in weights if id(t) in new)
    if not stacked:
        raise TypeError(
            message(
                "members with parameters or buffers that differ",
                f"{type(first).__name__} without any",
                ONE_BY_ONE,
            )
        )
    return whole, stacked


def _join(tensors: list[torch.Tensor], kind: str) -> torch.Tensor:
    """The tensors with an axis M in front, as a parameter or a buffer; one alone for equal
    buffers."""
    first, *rest = tensors
    if kind == "_parameters":
        return nn.Parameter(
            torch.stack([t.detach() for t in tensors]),
            requires_grad=any(t.requires_grad for t in tensors),
        )
    return first.clone() if all(torch.equal(first, t) for t in rest) else torch.stack(tensors)


def _check_alike(first: Model, other: Model) -> None:
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


def _description(model: Model) -> dict[str, Any]:
    """What members must have in common, each thing by its name: the classes of their parts, the
    shapes of their weights, and what can be compared of their other attributes."""
    parts = {
        f"the class of {path or 'a member'}": type(m).__name__ for path, m in model.named_modules()
    }
    weights = {
        f"the shape of {n}": tuple(t.shape)
        for n, t in (*model.named_parameters(), *model.named_buffers())
    }
    others = {
        f"{path}.{k}".lstrip("."): _plain(x)
        for path, m in model.named_modules()
        for k, x in vars(m).items()
    }
    return parts | weights | others


def _plain(x: Any) -> Any:
    """What can be compared of an attribute that is no weight."""
    if isinstance(x, torch.Tensor):
        return str(x.dtype), x.tolist()
    if isinstance(x, int | float | str | tuple):
        return x
    return getattr(x, "__code__", getattr(x, "__name__", None))
