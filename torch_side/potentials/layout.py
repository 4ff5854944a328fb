"""What the integers of a call say: which atoms and edges are real, and what belongs to which
system.

In a simulation these integers stay the same for many steps. So what was found is kept with the
model, together with copies of the integers, and it is used again for a call whose integers are
equal to the copies, entry by entry.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import nn

from bridge.card import Card, symbol
from bridge.errors import message
from torch_side.potentials import geometry, padding
from torch_side.potentials.neighbors import bounds_of, check_cells, system_of, values

INTEGERS = ("atomic_numbers", "batch", "pbc", "edge_index", "cell_offsets")
# numbers in one array: of a larger one, it costs less to look again than to keep a copy
LARGEST = 2**20
_last: weakref.WeakKeyDictionary[nn.Module, Layout] = weakref.WeakKeyDictionary()  # by model


@dataclass(frozen=True, eq=False)
class Layout:
    """What was found in the integers of one call.

    card       the card of the model, which says what counts as real
    given      copies of the integers, if the layout is kept for later calls; else empty
    bounds     the index of the first atom of each system, and N at the end
    periodic   pbc (B,3)
    sizes      N and B
    dtype      the dtype of pos, which the offsets in `edges` have
    shown      the numbers of the systems that the model sees
    index      the positions of what is real along the axes N, B and E (see padding.taken)
    inner      the integer inputs without padding; edge_index and batch are int64
    edges      the geometry.Edges of `inner`, None without edges
    versions   how often each tensor of `inner` had been changed in place, if the layout is kept
    sound      the cells that were checked last"""

    card: Card
    given: dict[str, torch.Tensor]
    bounds: list[int]
    periodic: Bool[np.ndarray, "B 3"]
    sizes: dict[str, int]
    dtype: torch.dtype
    shown: Int[np.ndarray, " b"] | range
    index: padding.Index
    inner: dict[str, torch.Tensor]
    edges: geometry.Edges | None
    versions: list[int] | None
    sound: dict[str, bytes] = field(default_factory=dict)

    def check_cells(self, cells: Float[np.ndarray, "B 3 3"]) -> None:
        """Raises ValueError naming a system without a cell vector of its own for each periodic
        axis.

        Cells that are equal to those of the last call, bit by bit, are not checked again."""
        these = cells.tobytes()
        if self.sound.get("cells") != these:
            check_cells(cells, self.periodic)
            self.sound["cells"] = these

    @cached_property
    def padded(self) -> bool:
        """True if there is anything to take out."""
        return any(kept is not None for kept in self.index.values())

    def taken(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the inputs without padding."""
        if not self.padded:
            return inputs | self.inner
        return {
            key: self.inner[key] if key in self.inner else padding.rows(key, x, self.index)
            for key, x in inputs.items()
        }

    def put_back(self, outputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the outputs at their full sizes, with zeros where nothing was computed."""
        if not self.padded:
            return outputs
        return {key: padding.put_back(key, x, self.index, self.sizes) for key, x in outputs.items()}

    def is_of(self, inputs: dict[str, torch.Tensor], card: Card) -> bool:
        """Returns True if this is the layout of `inputs`, whose integers equal those that it was
        made of, and if no model has changed the tensors in `inner`."""
        if self.card is not card:
            return False
        if self.sizes != _sizes(inputs) or self.dtype != inputs["pos"].dtype:
            return False
        if self.versions != _versions(self.inner):
            return False
        return all(_equal(self.given.get(key), inputs.get(key)) for key in INTEGERS)


def find(
    inputs: dict[str, torch.Tensor], card: Card, name: str, owner: nn.Module | None = None
) -> Layout:
    """Returns the layout of the inputs of a call, whose shapes and dtypes were checked before.

    It is kept with the model `owner`, and returned again for equal integers, if there is an owner,
    the integers are small tensors on the CPU and no transform or tracer is at work. `name` is that
    of the model in error texts.

    Raises: ValueError as graph.evaluate, for what is wrong with the integers."""
    if owner is None or _special() or not all(map(_small, map(inputs.get, INTEGERS))):
        return _found(inputs, card, name, None)
    last = _last.get(owner)
    if last is None or not last.is_of(inputs, card):
        copies = {key: inputs[key].clone() for key in INTEGERS if key in inputs}
        last = _last[owner] = _found(inputs | copies, card, name, copies)
    return last


def _found(
    inputs: dict[str, torch.Tensor], card: Card, name: str, copies: dict[str, torch.Tensor] | None
) -> Layout:
    """The layout of the inputs; with copies of their integers it can be kept."""
    sizes = _sizes(inputs)
    numbers, batch, periodic = (values(inputs[key]) for key in ("atomic_numbers", "batch", "pbc"))
    if card.needs_pbc or not card.supports_pbc:
        card.check_pbc(periodic.tolist(), name)
    bounds = bounds_of(inputs["batch"], sizes["N"], sizes["B"])
    _check_elements(numbers, bounds, card, name)
    atoms = None if numbers.all() else np.flatnonzero(numbers)
    systems = None if card.empty_systems else np.unique(batch if atoms is None else batch[atoms])
    shown = range(sizes["B"]) if systems is None else systems
    pos, device = inputs["pos"], inputs["pos"].device
    index: padding.Index = {
        "N": _on(device, atoms),
        "B": _on(device, systems) if len(shown) < sizes["B"] else None,
    }
    if "edge_index" in inputs:
        edges = torch.from_numpy(values(inputs["edge_index"]))
        edges = edges if edges.dtype == torch.int32 else edges.long()
        index["E"] = _on(device, used(edges, numbers, batch, sizes["B"]))
    inner = {key: inputs[key] for key in (*INTEGERS, "pos", "cell") if key in inputs}
    inner = padding.taken(inner, index)
    inner = {key: inner[key] for key in INTEGERS if key in inner}
    for key in {"edge_index", "batch"} & set(inner):  # torch is slow with other indices
        inner[key] = inner[key].long().contiguous()
    crossing = None
    if "edge_index" in inner and "cell_offsets" in inner:
        crossing = geometry.edges(inner, len(shown), pos.dtype, crossing=True)
    return Layout(
        card=card,
        given=copies or {},
        bounds=bounds,
        periodic=periodic,
        sizes=sizes,
        dtype=pos.dtype,
        shown=shown,
        index=index,
        inner=inner,
        edges=crossing,
        versions=_versions(inner) if copies else None,
    )


def _check_elements(numbers: np.ndarray, bounds: Sequence[int], card: Card, name: str) -> None:
    """ValueError naming an atom of an element that the card does not have."""
    known = numbers >= 0 if card.elements is None else np.isin(numbers, [0, *card.elements])
    if known.all():
        return
    atom = int(np.argmin(known))
    expected, do = "atomic numbers of at least 0", "0 marks a padding atom"
    if card.elements:
        expected, do = f"one of the {len(card.elements)} elements of {name}", "take another model"
    got = f"{symbol(int(numbers[atom]))} for atom {atom} of system {system_of(bounds, atom)}"
    raise ValueError(message(expected, got, do))


def used(
    edges: Int[torch.Tensor, "2 E"],
    numbers: Int[np.ndarray, " N"],
    batch: Int[np.ndarray, " N"],
    n_systems: int,
) -> Int[torch.Tensor, " e"] | int | None:
    """Returns the positions of the slots of edges (2,E) that are used.

    A slot is used if both of its atoms are real. A number stands for that many first slots, and
    None for all slots. `edges` lies on the CPU; `numbers` are the atomic numbers, 0 for padding.

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


def _slots(used: torch.Tensor) -> torch.Tensor | int | None:
    """The positions where `used` (E,) is True. If these come first it is their number, and None if
    all are True."""
    n = int(used.sum())
    if n == len(used):
        return None
    return n if used[:n].all() else padding.positions(used)


def _check_within_systems(
    i: torch.Tensor, j: torch.Tensor, batch: torch.Tensor, slots: torch.Tensor | int | None
) -> None:
    """ValueError naming an edge from one system to another."""
    apart = batch.index_select(0, i) != batch.index_select(0, j)
    if not apart.any():
        return
    edge = int(apart.int().argmax())
    slot = edge if slots is None or isinstance(slots, int) else int(slots[edge])
    a, b = int(i[edge]), int(j[edge])
    got = f"atoms {a} of system {batch[a]} and {b} of system {batch[b]} in slot {slot}"
    raise ValueError(message("edges within one system", got, "look at how the edges were made"))


def _on(
    device: torch.device, kept: np.ndarray | torch.Tensor | int | None
) -> torch.Tensor | int | None:
    """Positions as a tensor on that device; a number and None as they are."""
    kept = torch.from_numpy(kept) if isinstance(kept, np.ndarray) else kept
    return kept.to(device) if isinstance(kept, torch.Tensor) else kept


def _sizes(inputs: dict[str, torch.Tensor]) -> dict[str, int]:
    """N and B."""
    return {"N": len(inputs["pos"]), "B": len(inputs["cell"])}


def _special() -> bool:
    """True if a tensor that is made now could not be used later, since a transform or a tracer is
    at work. What it asks is private in torch 2.13."""
    transformed = torch._C._are_functorch_transforms_active()
    traced = bool(torch._C._len_torch_dispatch_stack())
    return transformed or traced or torch.compiler.is_compiling()


def _small(x: torch.Tensor | None) -> bool:
    """True for a plain tensor on the CPU that is small enough to keep a copy of, and for None."""
    return x is None or (type(x) is torch.Tensor and x.is_cpu and x.numel() <= LARGEST)


def _equal(kept: torch.Tensor | None, x: torch.Tensor | None) -> bool:
    """True for two tensors of one dtype with equal entries, and where both are None."""
    if kept is None or x is None:
        return kept is x
    if kept.dtype is not x.dtype or kept.shape != x.shape:
        return False
    return torch.equal(kept, x) if x.numel() < _FEW else np.array_equal(kept.numpy(), x.numpy())


_FEW = 2**14  # numbers; NumPy compares more than these twice as fast as torch


def _versions(inner: dict[str, torch.Tensor]) -> list[int]:
    """How often each tensor was changed in place."""
    return [x._version for x in inner.values()]
