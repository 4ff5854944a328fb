"""Graphs of the contract on the torch side: values checked, padding taken out before a model sees it, results put back."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from bridge.card import Card, symbol
from bridge.contract import check_inputs, check_outputs, dtype_name
from bridge.errors import message
from torch_side import batches, geometry, kernels, padding
from torch_side.neighbors import bounds_of, check_values, neighbor_list, system_of, values

TOUCHING = 1e-4  # Angstrom: atoms closer than this are one on top of the other


def evaluate(model: Callable, inputs: dict, card: Card, name: str, owner=None) -> dict:
    """`model(inputs)` as the contract has it, for a model that knows nothing of padding and checks nothing.

    `inputs` is the dict of the contract: N atoms in B systems, E edges. The model is given what is real: atoms of atomic number 0,
    edges with an index >= N or to such an atom, and systems without atoms (unless card.empty_systems) are taken out and
    their outputs are zeros; edges are made if card.cutoff is set and none are given, and those not shorter than it are left
    out (a list may have a skin). What model returns, with the shapes of the contract, is restored to N and B.

    Unless card.batches vouches, the first call with several systems also evaluates one of them alone; `owner` (an nn.Module)
    is who has then shown that it keeps them apart.

    Raises: ValueError for inputs outside of the contract, and, naming system and atom: positions that are not finite, an
    element that the card does not have, atoms on top of one another, an unsorted batch, edges that point nowhere or from
    one system to another, a periodic axis without a cell vector; also for outputs outside of the contract, an energy or a gradient
    that is not finite, and systems of one call that the model does not keep apart."""
    inputs = {key: x for key, x in inputs.items() if x is not None}
    sizes = check_inputs(inputs)
    card.check_bound(inputs, name)
    for key in card.unused(inputs):
        card.check_unused(key, inputs[key].tolist(), name)
    card.check_home(inputs["pos"], str(inputs["pos"].device))
    numbers, batch = values(inputs["atomic_numbers"]), values(inputs["batch"])
    bounds = _check(inputs, card, name, numbers, *sizes)
    inner, restore = _real(inputs, card, numbers, batch, *sizes)
    if not len(inner["pos"]):
        return _nothing(inputs, card)
    inner, made = _with_edges(inner, card)
    with geometry.handing_on(made):
        found = model(inner)
    n_systems = len(inner["cell"])
    active = {key: found[key] for key in card.active_outputs if key in found}
    check_outputs(active, len(inner["pos"]), n_systems, (), dtype_name(inner["pos"]))
    if n_systems > 1 and not card.batches and "energy" in found:
        shown = range(n_systems) if card.empty_systems else np.unique(batch[numbers != 0])
        batches.check(owner, model, inner, found, name, shown)
    if inner["pos"].requires_grad and torch.is_grad_enabled() and card.derivative_order is None:
        _check_own_gradients(model, inner, found, name)
    out = restore(found)
    _check_finite(out, bounds, name)
    return out


def _check(inputs, card, name, numbers, n_atoms, n_systems) -> list:
    """Values of all inputs but the edges; gives where each system starts and the last one ends."""
    periodic = values(inputs["pbc"])
    if card.needs_pbc or not card.supports_pbc:
        card.check_pbc(periodic.tolist(), name)
    bounds = bounds_of(inputs["batch"], n_atoms, n_systems)
    check_values(values(inputs["pos"]), values(inputs["cell"]), periodic, bounds)
    known = numbers >= 0 if card.elements is None else np.isin(numbers, [0, *card.elements])
    if not known.all():
        atom = int(np.argmin(known))
        expected = f"one of the {len(card.elements)} elements of {name}" if card.elements else "atomic numbers of at least 0"
        got = f"{symbol(int(numbers[atom]))} for atom {atom} of system {system_of(bounds, atom)}"
        raise ValueError(message(expected, got, "take another model" if card.elements else "0 marks a padding atom"))
    return bounds


def _real(inputs, card, numbers, batch, n_atoms, n_systems):
    """The inputs without padding, and a function that puts the outputs back."""
    atoms = None if numbers.all() else np.flatnonzero(numbers)
    systems = None if card.empty_systems else np.unique(batch if atoms is None else batch[atoms])
    kept = {"N": atoms, "B": systems if systems is not None and len(systems) < n_systems else None}
    if "edge_index" in inputs:
        edges = torch.from_numpy(values(inputs["edge_index"]))
        kept["E"] = _used(edges if edges.dtype == torch.int32 else edges.long(), numbers, batch, n_systems)
    if all(index is None for index in kept.values()):
        return inputs, lambda out: out
    index = {axis: _on(inputs["pos"].device, x) for axis, x in kept.items()}
    inner = padding.taken(inputs, index)
    sizes = {"N": n_atoms, "B": n_systems}
    return inner, lambda out: {key: padding.put_back(key, x, index, sizes) for key, x in out.items()}


def _on(device, kept):
    """Positions as a tensor there; a number and None as they are."""
    kept = torch.from_numpy(kept) if isinstance(kept, np.ndarray) else kept
    return kept.to(device) if isinstance(kept, torch.Tensor) else kept


def _used(edges, numbers, batch, n_systems):
    """Which slots of edges are used: their positions, or how many where they come first; None if all are."""
    if not edges.numel():
        return None
    n_atoms = len(numbers)
    lowest, highest = map(int, edges.aminmax())
    if lowest < 0:
        slot = int((edges < 0).any(0).int().argmax())
        raise ValueError(
            message(
                "edges between atoms, or slots marked unused by an index >= N",
                f"{edges[:, slot].tolist()} in slot {slot}",
                "mark unused slots by N",
            )
        )
    slots = None if highest < n_atoms else _slots((edges[0] < n_atoms) & (edges[1] < n_atoms))
    i, j = padding.rows("edge_index", edges, {"E": slots})
    if n_systems > 1:
        _check_within_systems(i, j, torch.from_numpy(batch), slots)
    if numbers.all():
        return slots
    real = torch.from_numpy(numbers != 0)
    among = _slots(real.index_select(0, i) & real.index_select(0, j))
    if among is None:
        return slots
    if isinstance(slots, torch.Tensor):
        return slots[:among] if isinstance(among, int) else slots[among]
    return among  # of all slots or of the first ones, where positions are the same


def _slots(used):
    """The positions where `used` (E,) is True; their number where they come first; None where all are."""
    n = int(used.sum())
    if n == len(used):
        return None
    return n if used[:n].all() else used.nonzero()[:, 0]


def _check_within_systems(i, j, batch, slots):
    """ValueError naming an edge from one system to another."""
    apart = batch.index_select(0, i) != batch.index_select(0, j)
    if not apart.any():
        return
    edge = int(apart.int().argmax())
    slot = edge if slots is None or isinstance(slots, int) else int(slots[edge])
    a, b = int(i[edge]), int(j[edge])
    got = f"atoms {a} of system {batch[a]} and {b} of system {batch[b]} in slot {slot}"
    raise ValueError(message("edges within one system", got, "look at how the edges were made"))


def _with_edges(inputs, card):
    """The inputs with edges shorter than the cutoff, if there is one, and their vectors."""
    for key in ("edge_index", "batch"):  # torch is slow with other indices
        if key in inputs:
            inputs = inputs | {key: inputs[key].long().contiguous()}
    if card.cutoff is None:
        return inputs, None
    given = "edge_index" in inputs
    if not given:
        edges = neighbor_list(*(inputs[k] for k in ("pos", "cell", "pbc")), card.cutoff, inputs["batch"])
        inputs = inputs | dict(zip(("edge_index", "cell_offsets"), edges))
    elif "cell_offsets" not in inputs:
        raise ValueError(message("cell_offsets with edge_index", "edge_index alone", "pass both: r_ij = r_j - r_i + cell_offsets @ cell"))
    made = geometry.make(inputs)
    if not len(made.vectors):
        return inputs, made
    length = torch.linalg.vector_norm(made.vectors, dim=-1)
    shortest, longest = length.aminmax()
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
    raise ValueError(message("atoms apart from one another", got, "take one of them out, or look at the step before"))


def _check_own_gradients(model, inputs, found, name) -> None:
    """NotImplementedError where someone differentiates gradients that are cut off from the positions."""

    def again():
        (pos,) = kernels.moved([inputs["pos"]])
        return model(inputs | {"pos": pos.requires_grad_()})["position_gradients"]

    if "position_gradients" in found:
        kernels.check_given(found["position_gradients"], again, name)


def _check_finite(out, bounds, name):
    """ValueError naming the system whose energy, or the atom whose gradient, is not a number."""
    for key, what in (("energy", "system"), ("position_gradients", "atom"), ("cell_gradients", "system")):
        if key in out and not (fine := torch.isfinite(out[key])).all():
            first = int((~fine.flatten(1).all(1) if fine.ndim > 1 else ~fine).nonzero()[0])
            where = f"{what} {first}" + (f" of system {system_of(bounds, first)}" if what == "atom" else "")
            raise ValueError(message(f"a finite {key} from {name}", f"{out[key][first].tolist()} for {where}", "look at its structure: atoms may be too close"))


def _nothing(inputs, card) -> dict:
    """Zeros for inputs without any atom."""
    pos = inputs["pos"]
    return {key: pos.new_zeros(shape) for key, shape in card.shapes(len(pos), len(inputs["cell"])).items()}
