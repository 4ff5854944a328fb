"""What the integers of a call say: which atoms and edges are real, and what belongs to which
system.

In a simulation they stay the same for many steps, so what was found is kept with the model, beside
copies of these integers; it is used again where they are equal, entry by entry.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from bridge.card import Card, symbol
from bridge.errors import message
from torch_side.potentials import geometry, padding
from torch_side.potentials.neighbors import bounds_of, check_cells, system_of, values

INTEGERS = ("atomic_numbers", "batch", "pbc", "edge_index", "cell_offsets")
# numbers in one array, beyond which it costs less to look again than to keep a copy
LARGEST = 2**20
_last: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # by model


@dataclass(frozen=True, eq=False)
class Layout:
    """What was found. `index` holds the positions of what is real along the axes N, B and E (see
    padding.taken).

    given      the integers themselves: copies, where they are kept for later calls
    bounds     where each system starts, and the last one ends
    periodic   pbc (B,3)
    shown      the numbers of the systems that the model sees
    inner      the integer inputs without padding; edge_index and batch int64
    edges      geometry.Edges of these, where there are edges"""

    card: Card
    given: dict
    bounds: list
    periodic: np.ndarray
    sizes: dict
    shown: np.ndarray | range
    index: dict
    inner: dict
    edges: geometry.Edges | None
    versions: list | None
    sound: dict = field(default_factory=dict)  # the cells that were looked at last

    def check_cells(self, cells: np.ndarray) -> None:
        """ValueError naming a system without a cell vector of its own for each periodic axis."""
        these = cells.tobytes()
        if self.sound.get("cells") != these:
            check_cells(cells, self.periodic)
            self.sound["cells"] = these

    @cached_property
    def padded(self) -> bool:
        return any(kept is not None for kept in self.index.values())

    def taken(self, inputs: dict) -> dict:
        """The inputs without padding."""
        if not self.padded:
            return inputs | self.inner
        return {
            key: self.inner[key] if key in self.inner else padding.rows(key, x, self.index)
            for key, x in inputs.items()
        }

    def put_back(self, outputs: dict) -> dict:
        """The outputs at their full sizes, zeros where nothing was computed."""
        if not self.padded:
            return outputs
        return {key: padding.put_back(key, x, self.index, self.sizes) for key, x in outputs.items()}

    def is_of(self, inputs: dict, card: Card) -> bool:
        """True for inputs of the very same integers, if nobody has changed what was kept of
        them."""
        if (
            self.card is not card
            or self.sizes != _sizes(inputs)
            or self.versions != _versions(self.inner)
        ):
            return False
        return all(_equal(self.given.get(key), inputs.get(key)) for key in INTEGERS)


def find(inputs: dict, card: Card, name: str, owner=None) -> Layout:
    """The layout of the inputs of a call, whose shapes and dtypes were checked. `owner` is who
    keeps it.

    Raises: ValueError as graph.evaluate, for what is wrong with the integers."""
    if owner is None or _special() or not all(map(_small, map(inputs.get, INTEGERS))):
        return _found(inputs, card, name, None)
    last = _last.get(owner)
    if last is None or not last.is_of(inputs, card):
        copies = {key: inputs[key].clone() for key in INTEGERS if key in inputs}
        last = _last[owner] = _found(inputs | copies, card, name, copies)
    return last


def _found(inputs, card, name, copies) -> Layout:
    sizes = _sizes(inputs)
    numbers, batch, periodic = (values(inputs[key]) for key in ("atomic_numbers", "batch", "pbc"))
    if card.needs_pbc or not card.supports_pbc:
        card.check_pbc(periodic.tolist(), name)
    bounds = bounds_of(inputs["batch"], sizes["N"], sizes["B"])
    _check_elements(numbers, bounds, card, name)
    atoms = None if numbers.all() else np.flatnonzero(numbers)
    systems = None if card.empty_systems else np.unique(batch if atoms is None else batch[atoms])
    shown = range(sizes["B"]) if systems is None else systems
    kept = {"N": atoms, "B": systems if len(shown) < sizes["B"] else None}
    if "edge_index" in inputs:
        edges = torch.from_numpy(values(inputs["edge_index"]))
        kept["E"] = used(
            edges if edges.dtype == torch.int32 else edges.long(), numbers, batch, sizes["B"]
        )
    device = inputs["pos"].device
    index = {axis: _on(device, x) for axis, x in kept.items()}
    inner = padding.taken(
        {key: inputs[key] for key in (*INTEGERS, "pos", "cell") if key in inputs}, index
    )
    inner = {key: inner[key] for key in INTEGERS if key in inner}
    for key in {"edge_index", "batch"} & set(inner):  # torch is slow with other indices
        inner[key] = inner[key].long().contiguous()
    edges = None
    if "edge_index" in inner and "cell_offsets" in inner:
        edges = geometry.edges(inner, len(shown), inputs["pos"].dtype, crossing=True)
    versions = _versions(inner) if copies else None
    return Layout(card, copies, bounds, periodic, sizes, shown, index, inner, edges, versions)


def _check_elements(numbers, bounds, card, name) -> None:
    """ValueError naming an atom of an element that the card does not have."""
    known = numbers >= 0 if card.elements is None else np.isin(numbers, [0, *card.elements])
    if known.all():
        return
    atom = int(np.argmin(known))
    expected = (
        f"one of the {len(card.elements)} elements of {name}"
        if card.elements
        else "atomic numbers of at least 0"
    )
    got = f"{symbol(int(numbers[atom]))} for atom {atom} of system {system_of(bounds, atom)}"
    raise ValueError(
        message(expected, got, "take another model" if card.elements else "0 marks a padding atom")
    )


def used(edges, numbers, batch, n_systems):
    """Which slots of edges (2,E) are used: their positions, or how many where they come first; None
    if all are.

    Raises: ValueError naming a slot with a negative index, or an edge from one system to
    another."""
    if not edges.numel():
        return None
    n_atoms = len(numbers)
    lowest, highest = map(int, edges.aminmax())
    if lowest < 0:
        slot = int((edges < 0).any(0).int().argmax())
        expected = "edges between atoms, or slots marked unused by an index >= N"
        raise ValueError(
            message(expected, f"{edges[:, slot].tolist()} in slot {slot}", "mark unused slots by N")
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
    """The positions where `used` (E,) is True; their number where they come first; None where all
    are."""
    n = int(used.sum())
    if n == len(used):
        return None
    return n if used[:n].all() else padding.positions(used)


def _check_within_systems(i, j, batch, slots) -> None:
    """ValueError naming an edge from one system to another."""
    apart = batch.index_select(0, i) != batch.index_select(0, j)
    if not apart.any():
        return
    edge = int(apart.int().argmax())
    slot = edge if slots is None or isinstance(slots, int) else int(slots[edge])
    a, b = int(i[edge]), int(j[edge])
    got = f"atoms {a} of system {batch[a]} and {b} of system {batch[b]} in slot {slot}"
    raise ValueError(message("edges within one system", got, "look at how the edges were made"))


def _on(device, kept):
    """Positions as a tensor there; a number and None as they are."""
    kept = torch.from_numpy(kept) if isinstance(kept, np.ndarray) else kept
    return kept.to(device) if isinstance(kept, torch.Tensor) else kept


def _sizes(inputs) -> dict:
    """N and B, and the dtype that vectors have."""
    return {"N": len(inputs["pos"]), "B": len(inputs["cell"]), "dtype": inputs["pos"].dtype}


def _special() -> bool:
    """True where a new tensor is none that could be used later. Private in torch 2.13."""
    transformed, traced = (
        torch._C._are_functorch_transforms_active(),
        torch._C._len_torch_dispatch_stack(),
    )
    return transformed or bool(traced) or torch.compiler.is_compiling()


def _small(x) -> bool:
    """True for a plain tensor on the CPU of which a copy may be kept, and for None."""
    return x is None or (type(x) is torch.Tensor and x.is_cpu and x.numel() <= LARGEST)


def _equal(kept, x) -> bool:
    if kept is None or x is None:
        return kept is x
    if kept.dtype is not x.dtype or kept.shape != x.shape:
        return False
    return torch.equal(kept, x) if x.numel() < _FEW else np.array_equal(kept.numpy(), x.numpy())


_FEW = 2**14  # numbers, beyond which NumPy is twice as quick


def _versions(inner) -> list:
    """How often each was changed in place."""
    return [x._version for x in inner.values()]
