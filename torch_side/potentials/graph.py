"""Graphs of the contract on the torch side: values checked, padding taken out before a model sees
it, results put back."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable

import torch
from torch import nn

from bridge.card import Card
from bridge.contract import called, check_inputs, check_outputs, dtype_name
from bridge.errors import message
from torch_side.calls import modes, status
from torch_side.potentials import batches, geometry, padding, static
from torch_side.potentials import layout as layouts
from torch_side.potentials.neighbors import check_positions, neighbor_list, system_of, values


def evaluate(
    model: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    inputs: dict[str, torch.Tensor],
    card: Card,
    name: str,
    owner: nn.Module | None = None,
) -> dict[str, torch.Tensor]:
    """Returns `model(inputs)` for a model that knows nothing of padding and checks nothing.

    `inputs` is the dict of the contract, with N atoms in B systems and E edges; entries that are
    None count as absent. The model sees only what is real. Padding is taken out: atoms of atomic
    number 0, edges with an index >= N or to such an atom, and systems without atoms (unless
    card.empty_systems). If card.cutoff is set, edges are made where none are given, and given edges
    that are not shorter than it are left out, since a list may have a skin. What the model returns,
    in the shapes of the contract, is put back to N atoms and B systems, with zeros for what was
    taken out.

    Unless card.batches vouches for the model, the first call with several systems also evaluates
    one of them alone. Once the energies have agreed, `owner` is remembered as a model that keeps
    systems apart. `name` is that of the model in error texts.

    Raises: ValueError for inputs outside of the contract, and, naming system and atom: positions
    that are not finite, an element that the card does not have, atoms on top of one another, an
    unsorted batch, edges that point nowhere or from one system to another, a periodic axis without
    a cell vector; also for outputs outside of the contract, an energy or a gradient that is not
    finite, and systems of one call that the model does not keep apart. NotImplementedError where
    the caller differentiates gradients whose graph the model has cut off.

    While a status is collected (see torch_side.calls.status), static.evaluate does this without
    reading a value. Where that status says that values may be read, they are read for what it can't
    do: for models that don't vouch for keeping systems apart (card.batches), edges that are not
    given, and models that refuse."""
    inputs = {key: x for key, x in inputs.items() if x is not None}
    if torch.is_inference_mode_enabled():
        with modes.recording(inputs) as inputs:
            return evaluate(model, inputs, card, name, owner)
    if collected := status.current():
        if not collected.may_read:
            return static.evaluate(model, inputs, card, name, owner, collected)
        found = _unread(model, inputs, card, name, owner, collected)
        if found is not None:
            return found
        with status.reading():
            return evaluate(model, inputs, card, name, owner)
    check_inputs(inputs)
    card.check_bound(inputs, name)
    for key in card.unused(inputs):
        card.check_unused(key, inputs[key].tolist(), name)
    card.check_home(inputs["pos"], str(inputs["pos"].device))
    layout = layouts.find(inputs, card, name, owner)
    check_positions(values(inputs["pos"]), layout.bounds)
    layout.check_cells(values(inputs["cell"]))
    inner = layout.taken(inputs)
    if not len(inner["pos"]):
        return _nothing(inputs, card)
    inner, made = _with_edges(inner, card, layout)
    with geometry.handing_on(made):
        found = called(model, inner, name)
    n_systems = len(inner["cell"])
    active = {key: found[key] for key in card.active_outputs if key in found}
    check_outputs(active, len(inner["pos"]), n_systems, (), dtype_name(inner["pos"]))
    if n_systems > 1 and not card.batches and "energy" in found:
        batches.check(owner, model, inner, found, name, layout.shown)
    static.check_own_gradients(model, inner, found, card, name)
    _check_finite(found, layout, name)
    return layout.put_back(found)


# the models that can't do without values, as long as they live
_reads: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _unread(
    model: static.Model,
    inputs: dict[str, torch.Tensor],
    card: Card,
    name: str,
    owner: nn.Module | None,
    collected: status.Status,
) -> dict[str, torch.Tensor] | None:
    """What static.evaluate gives, None where it can't do without values."""
    no_edges = card.cutoff is not None and "edge_index" not in inputs
    if not card.batches or no_edges or not len(inputs["pos"]) or owner in _reads:
        return None
    notes = len(collected.rows)
    try:
        return static.evaluate(model, inputs, card, name, owner, collected)
    except NotImplementedError:
        del collected.rows[notes:]  # the texts of later notes keep their numbers
        if owner is not None:
            _reads.add(owner)
        return None


def _with_edges(
    inputs: dict[str, torch.Tensor], card: Card, layout: layouts.Layout
) -> tuple[dict[str, torch.Tensor], geometry.Made | None]:
    """The inputs with edges shorter than the cutoff, and their vectors, if there is a cutoff."""
    if card.cutoff is None:
        return inputs, None
    given = "edge_index" in inputs
    if not given:
        edges, offsets = neighbor_list(
            inputs["pos"],
            inputs["cell"],
            inputs["pbc"],
            card.cutoff,
            inputs["batch"],
            ordered=False,
        )
        inputs = inputs | {"edge_index": edges, "cell_offsets": offsets}
    elif "cell_offsets" not in inputs:
        raise ValueError(padding.NO_OFFSETS)
    made = geometry.make(inputs, layout.edges)
    if not len(made.vectors):
        return inputs, made
    length = torch.linalg.vector_norm(made.vectors, dim=-1)
    shortest, longest = map(float, length.aminmax())
    if shortest < static.TOUCHING:
        _refuse_touching(inputs, length)
    if given and not longest < card.cutoff:
        made = made.where(length < card.cutoff)
    return made.inputs, made


def _refuse_touching(inputs: dict[str, torch.Tensor], length: torch.Tensor) -> None:
    """ValueError naming two atoms that lie one on top of the other."""
    slot = int(length.argmin())
    i, j = inputs["edge_index"][:, slot].tolist()
    system, apart = int(inputs["batch"][i]), float(length[slot])
    got = f"atoms {i} and {j} of system {system} {apart:.1g} Angstrom apart"
    raise ValueError(
        message(
            "atoms apart from one another", got, "take one of them out, or look at the step before"
        )
    )


def _check_finite(found: dict[str, torch.Tensor], layout: layouts.Layout, name: str) -> None:
    """ValueError naming the system whose energy, or the atom whose gradient, is not finite."""
    # a sum is finite only if all of its terms are
    sums = [found[key].detach().sum() for key in static.FINITE if key in found]
    if all(map(math.isfinite, sums)):
        return
    out = layout.put_back({key: found[key].detach() for key in static.FINITE if key in found})
    for key, what in static.FINITE.items():
        if key in out and not (fine := torch.isfinite(out[key])).all():
            wrong = ~fine.flatten(1).all(1) if fine.ndim > 1 else ~fine
            first = int(wrong.nonzero()[0])
            where = f"{what} {first}"
            if what == "atom":
                where += f" of system {system_of(layout.bounds, first)}"
            raise ValueError(
                message(
                    f"a finite {key} from {name}",
                    f"{out[key][first].tolist()} for {where}",
                    "look at its structure: atoms may be too close",
                )
            )


def _nothing(inputs: dict[str, torch.Tensor], card: Card) -> dict[str, torch.Tensor]:
    """Zeros for inputs without any atom."""
    pos = inputs["pos"]
    shapes = card.shapes(len(pos), len(inputs["cell"]))
    return {key: pos.new_zeros(shape) for key, shape in shapes.items()}
