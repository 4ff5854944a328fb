"""Vectors along the edges of a graph: made once in a call, and handed on to whoever asks."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import numpy as np
import torch

from torch_side.calls import kernels
from torch_side.potentials import padding


def edge_vectors(inputs: dict) -> torch.Tensor:
    """r_ij = r_j - r_i + cell_offsets @ cell (E,3), differentiable in pos and cell.

    `inputs` is the dict of the contract, with edges between atoms (no unused slots): pos (N,3) and
    cell (B,3,3) in Angstrom, edge_index (2,E), cell_offsets (E,3), batch (N,). Where
    torch_side.potentials.graph.evaluate has made the vectors of these positions, cells and edges
    already, they are not made again. The result is not to be changed in place.

    >>> edges = {"edge_index": torch.tensor([[0], [0]]), "cell_offsets": torch.tensor([[1, 0, 0]])}
    >>> system = {"pos": torch.zeros(1, 3), "cell": 2 * torch.eye(3)[None], "batch": torch.tensor([0])}
    >>> edge_vectors(system | edges)
    tensor([[2., 0., 0.]])
    """
    pos, cell = inputs["pos"], inputs["cell"]
    made = None if torch.compiler.is_compiling() else _MADE.get()
    if made is not None and made.are_of(inputs):
        return _Handed.apply(pos, cell, made)
    return _vectors(pos, cell, edges(inputs, len(cell), cell.dtype))


def edge_shifts(inputs: dict) -> torch.Tensor:
    """cell_offsets @ cell (E,3) in Angstrom, differentiable in cell: `inputs` as for
    edge_vectors."""
    cell = inputs["cell"]
    return _shifts(cell, edges(inputs, len(cell), cell.dtype))


@dataclass(frozen=True, eq=False)
class Edges:
    """Edges as torch reads them quickest. `crossing` (C,) are the positions of those whose offset
    is not zero, where these are few; None stands for all. Their offsets (C,3) are floats; systems
    (C,) is None where there is one."""

    index: torch.Tensor
    crossing: torch.Tensor | None
    offsets: torch.Tensor
    systems: torch.Tensor | None

    def where(self, kept, index) -> Edges:
        """Some of the edges: `kept` (E,) bool, their `index` known already."""
        if self.crossing is None:
            crossing, among = None, padding.positions(kept)
        else:
            inside = kept.index_select(0, self.crossing)
            among = padding.positions(inside)
            place = kept.cumsum(0, dtype=torch.int32)
            crossing = place.index_select(0, self.crossing.index_select(0, among)).long().sub_(1)
        systems = None if self.systems is None else self.systems.index_select(0, among)
        return Edges(index, crossing, self.offsets.index_select(0, among), systems)


def edges(inputs: dict, n_systems: int, dtype: torch.dtype, crossing: bool = False) -> Edges:
    """The Edges of a dict as for edge_vectors, offsets of that dtype. Who asks for those that cross
    has them looked for, by their values; else all count as such."""
    index, offsets = inputs["edge_index"].long(), inputs["cell_offsets"]
    places = _crossing(offsets) if crossing else None
    if places is not None:
        offsets = offsets.index_select(0, places)
    systems = None
    if n_systems > 1:
        centres = index[0] if places is None else index[0].index_select(0, places)
        systems = inputs["batch"].long().index_select(0, centres)
    return Edges(index, places, offsets.to(dtype), systems)


_FEW = 1000  # edges: fewer are moved quicker than looked through


def _crossing(offsets):
    """The positions of offsets (E,3) that are not zero; None where they are not few, or where
    nobody can say (on a GPU not without waiting for it)."""
    if not _plain(offsets) or not offsets.is_cpu or len(offsets) < _FEW:
        return None
    a, b, c = offsets.unbind(1)
    places = padding.positions((a | b | c) != 0)
    return places if 2 * len(places) < len(offsets) else None


@dataclass(frozen=True, eq=False)
class Made:
    """Vectors (E,3), without a graph, and what they were made of."""

    inputs: dict
    vectors: torch.Tensor
    edges: Edges
    versions: list[int]

    def are_of(self, inputs: dict) -> bool:
        """True where `inputs` has these very positions, cells and edges, or views of them,
        unchanged."""
        own = self.inputs
        edges = all(inputs.get(key) is own[key] for key in _EDGES)
        same = edges and all(_same(inputs[key], own[key]) for key in ("pos", "cell"))
        return same and self.versions == _versions(own, self.vectors)

    def where(self, kept: torch.Tensor) -> Made:
        """Of some of the edges: kept (E,) bool."""
        places = padding.positions(kept)
        index = _empty((2, len(places)), places)
        for row, of_all in zip(index, self.edges.index):
            torch.index_select(of_all, 0, places, out=row)
        offsets = _rows(self.inputs["cell_offsets"], places)
        inputs = self.inputs | {"edge_index": index, "cell_offsets": offsets}
        vectors = _rows(self.vectors, places)
        return Made(inputs, vectors, self.edges.where(kept, index), _versions(inputs, vectors))


def make(inputs: dict, known: Edges | None = None) -> Made:
    """The vectors of a graph, for edge_vectors: `inputs` as there, with its Edges where they are
    known. Nothing is differentiated."""
    pos, cell = inputs["pos"], inputs["cell"]
    known = known or edges(inputs, len(cell), cell.dtype, crossing=True)
    with torch.no_grad():
        vectors = _vectors(pos, cell, known)
    return Made(inputs, vectors, known, _versions(inputs, vectors))


@contextlib.contextmanager
def handing_on(made: Made | None) -> Iterator[None]:
    """Within, edge_vectors gives these where they are of what it is asked for."""
    token = _MADE.set(made if made is not None and _plain(made.vectors) else None)
    try:
        yield
    finally:
        _MADE.reset(token)


_MADE: ContextVar[Made | None] = ContextVar("made", default=None)
_EDGES = ("edge_index", "cell_offsets", "batch")


class _Handed(torch.autograd.Function):
    """Vectors that were made already, as a function of positions and cells: linear in both."""

    @staticmethod
    def forward(ctx, pos, cell, made):
        ctx.made, ctx.shapes = made, (pos.shape, cell.shape)
        return made.vectors.detach()

    @staticmethod
    def backward(ctx, gradient):
        edges, (atoms, cells) = ctx.made.edges, ctx.shapes
        for_pos = for_cell = None
        if ctx.needs_input_grad[0]:
            i, j = edges.index
            zeros = gradient.new_zeros(atoms)
            for_pos = zeros.index_add(0, j, gradient) - zeros.index_add(0, i, gradient)
        if ctx.needs_input_grad[1]:
            for_cell = _moments(edges, gradient, cells)
        return for_pos, for_cell, None


kernels.vouch(_Handed)


def _moments(edges, gradient, shape):
    """sum of offset (x) gradient over the edges of each system: (B,3,3)."""
    if edges.crossing is not None:
        gradient = gradient.index_select(0, edges.crossing)
    if edges.systems is None:
        return (edges.offsets.mT @ gradient).expand(shape)
    outer = edges.offsets[:, :, None] * gradient[:, None, :]
    return gradient.new_zeros(shape).index_add(0, edges.systems, outer)


def _vectors(pos, cell, edges):
    i, j = edges.index
    shifts = _shifts(cell, edges)
    if torch.is_grad_enabled() or not (_plain(pos) and _plain(cell)):
        between = pos.index_select(0, j) - pos.index_select(0, i)
        return (
            between + shifts
            if edges.crossing is None
            else between.index_add(0, edges.crossing, shifts)
        )
    between = _rows(pos, j)
    between -= _rows(pos, i)  # in place: fresh memory costs more than the sums
    return (
        between.add_(shifts)
        if edges.crossing is None
        else between.index_add_(0, edges.crossing, shifts)
    )


def _rows(x, places):
    """x.index_select(0, places), not differentiable."""
    few = len(places) * x.shape[1] * x.element_size() < _MUCH
    if few or not _plain(x):
        return x.index_select(0, places)
    return torch.index_select(x.detach(), 0, places, out=_empty((len(places), x.shape[1]), x))


def _empty(shape, like):
    """Memory for a tensor like another one: from NumPy where it is much, which asks the system for
    huge pages. Without them half of the time goes into the first touch."""
    if like.is_cpu and math.prod(shape) * like.element_size() >= _MUCH:
        return torch.from_numpy(np.empty(shape, like.detach().numpy().dtype))
    return like.new_empty(shape)


_MUCH = 2**22  # bytes, from which NumPy does


def _shifts(cell, edges):
    """offsets @ cell of the edges that cross (C,3)."""
    if edges.systems is None:
        return edges.offsets @ cell[0]
    rows = cell.flatten(1).index_select(0, edges.systems)
    a, b, c = edges.offsets.split(1, 1)
    return a * rows[:, :3] + b * rows[:, 3:6] + c * rows[:, 6:]


def _same(x, y) -> bool:
    """True for two tensors that show the same memory in the same way."""
    if x is y:
        return True
    if not (_plain(x) and x.dtype == y.dtype and x.shape == y.shape and x.stride() == y.stride()):
        return False
    return x.data_ptr() == y.data_ptr()


def _versions(inputs, vectors) -> list[int]:
    """How often each tensor was changed in place; those of inference mode don't count."""
    tensors = inputs["pos"], inputs["cell"], *[inputs[key] for key in _EDGES], vectors
    try:
        return [x._version for x in tensors]
    except RuntimeError:
        return [0 if x.is_inference() else x._version for x in tensors]


def _plain(x) -> bool:
    """No tracer, no wrapper, no dual number."""
    if (
        type(x) not in (torch.Tensor, torch.nn.Parameter)
        or torch.autograd.forward_ad._current_level >= 0
    ):
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(x)
