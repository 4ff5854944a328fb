"""Graphs of the contract on the torch side: values checked, padding taken out before a model sees
it, results put back."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from bridge.card import Card
from bridge.contract import check_inputs, check_outputs, dtype_name
from bridge.errors import message
from torch_side.calls import kernels, modes
from torch_side.potentials import batches, geometry
from torch_side.potentials import layout as layouts
from torch_side.potentials.neighbors import check_positions, neighbor_list, system_of, values

TOUCHING = 1e-4  # Angstrom: atoms closer than this are one on top of the other


def evaluate(model: Callable, inputs: dict, card: Card, name: str, owner=None) -> dict:
    """`model(inputs)` as the contract has it, for a model that knows nothing of padding and checks
    nothing.

    `inputs` is the dict of the contract: N atoms in B systems, E edges. The model is given what is
    real: atoms of atomic number 0, edges with an index >= N or to such an atom, and systems without
    atoms (unless card.empty_systems) are taken out and their outputs are zeros; edges are made if
    card.cutoff is set and none are given, and those not shorter than it are left out (a list may
    have a skin). What model returns, with the shapes of the contract, is restored to N and B.

    Unless card.batches vouches, the first call with several systems also evaluates one of them
    alone; `owner` (an nn.Module) is who has then shown that it keeps them apart.

    Raises: ValueError for inputs outside of the contract, and, naming system and atom: positions
    that are not finite, an element that the card does not have, atoms on top of one another, an
    unsorted batch, edges that point nowhere or from one system to another, a periodic axis without
    a cell vector; also for outputs outside of the contract, an energy or a gradient that is not
    finite, and systems of one call that the model does not keep apart."""
    inputs = {key: x for key, x in inputs.items() if x is not None}
    if torch.is_inference_mode_enabled():
        with modes.recording(inputs) as inputs:
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
        found = model(inner)
    n_systems = len(inner["cell"])
    active = {key: found[key] for key in card.active_outputs if key in found}
    check_outputs(active, len(inner["pos"]), n_systems, (), dtype_name(inner["pos"]))
    if n_systems > 1 and not card.batches and "energy" in found:
        batches.check(owner, model, inner, found, name, layout.shown)
    if inner["pos"].requires_grad and torch.is_grad_enabled() and card.derivative_order is None:
        _check_own_gradients(model, inner, found, name)
    _check_finite(found, layout, name)
    return layout.put_back(found)


def _with_edges(inputs, card, layout):
    """The inputs with edges shorter than the cutoff, if there is one, and their vectors."""
    if card.cutoff is None:
        return inputs, None
    given = "edge_index" in inputs
    if not given:
        edges = neighbor_list(
            *(inputs[k] for k in ("pos", "cell", "pbc")),
            card.cutoff,
            inputs["batch"],
            ordered=False,
        )
        inputs = inputs | dict(zip(("edge_index", "cell_offsets"), edges))
    elif "cell_offsets" not in inputs:
        raise ValueError(
            message(
                "cell_offsets with edge_index",
                "edge_index alone",
                "pass both: r_ij = r_j - r_i + cell_offsets @ cell",
            )
        )
    made = geometry.make(inputs, layout.edges)
    if not len(made.vectors):
        return inputs, made
    length = torch.linalg.vector_norm(made.vectors, dim=-1)
    shortest, longest = map(float, length.aminmax())
    if shortest < TOUCHING:
        _refuse_touching(inputs, length)
    if given and not longest < card.cutoff:
        made = made.where(length < card.cutoff)
    return made.inputs, made


def _refuse_touching(inputs, length):
    """ValueError naming two atoms that lie one on top of the other."""
    slot = int(length.argmin())
    i, j = inputs["edge_index"][:, slot].tolist()
    got = f"atoms {i} and {j} of system {int(inputs['batch'][i])} {float(length[slot]):.1g} Angstrom apart"
    raise ValueError(
        message(
            "atoms apart from one another", got, "take one of them out, or look at the step before"
        )
    )


def _check_own_gradients(model, inputs, found, name) -> None:
    """NotImplementedError where someone differentiates gradients that are cut off from the
    positions."""

    def again():
        (pos,) = kernels.moved([inputs["pos"]])
        return model(inputs | {"pos": pos.requires_grad_()})["position_gradients"]

    if "position_gradients" in found:
        kernels.check_given(found["position_gradients"], again, name)


def _check_finite(found, layout, name) -> None:
    """ValueError naming the system whose energy, or the atom whose gradient, is not a number."""
    # which hide no inf and no NaN
    sums = [found[key].detach().sum() for key in _FINITE if key in found]
    if all(map(math.isfinite, sums)):
        return
    out = layout.put_back({key: found[key].detach() for key in _FINITE if key in found})
    for key, what in _FINITE.items():
        if key in out and not (fine := torch.isfinite(out[key])).all():
            first = int((~fine.flatten(1).all(1) if fine.ndim > 1 else ~fine).nonzero()[0])
            where = f"{what} {first}" + (
                f" of system {system_of(layout.bounds, first)}" if what == "atom" else ""
            )
            raise ValueError(
                message(
                    f"a finite {key} from {name}",
                    f"{out[key][first].tolist()} for {where}",
                    "look at its structure: atoms may be too close",
                )
            )


_FINITE = {"energy": "system", "position_gradients": "atom", "cell_gradients": "system"}


def _nothing(inputs, card) -> dict:
    """Zeros for inputs without any atom."""
    pos = inputs["pos"]
    return {
        key: pos.new_zeros(shape)
        for key, shape in card.shapes(len(pos), len(inputs["cell"])).items()
    }
