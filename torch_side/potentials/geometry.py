"""Vectors along the edges of a graph: made once in a call, and handed on to whoever asks."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch._C._functorch import is_functorch_wrapped_tensor

from torch_side.calls import kernels
from torch_side.potentials import padding


def edge_vectors(inputs: dict[str, torch.Tensor]) -> Float[torch.Tensor, "E 3"]:
    """Returns r_ij = r_j - r_i + cell_offsets @ cell (E,3), differentiable in pos and cell.

    `inputs` is the dict of the contract, with edges between atoms (no unused slots): pos (N,3) and
    cell (B,3,3) in Angstrom, edge_index (2,E), cell_offsets (E,3), batch (N,). If
    torch_side.potentials.graph.evaluate has already made the vectors of these positions, cells and
    edges, the result shares their memory. It must not be changed in place.

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


def edge_shifts(inputs: dict[str, torch.Tensor]) -> Float[torch.Tensor, "E 3"]:
    """Returns cell_offsets @ cell (E,3) in Angstrom, differentiable in cell, for inputs as
    edge_vectors takes them."""
    cell = inputs["cell"]
    return _shifts(cell, edges(inputs, len(cell), cell.dtype))


@dataclass(frozen=True, eq=False)
class Edges:
    """Edges as torch reads them quickest.

    index      atoms i and j of each edge (2,E), int64
    crossing   the positions (C,) of the edges whose offset is not zero, if these are few; None
               stands for all edges, C = E
    offsets    the offsets of the crossing edges (C,3), as floats
    systems    the systems of the crossing edges (C,), None where there is only one system"""

    index: Int[torch.Tensor, "2 E"]
    crossing: Int[torch.Tensor, " C"] | None
    offsets: Float[torch.Tensor, "C 3"]
    systems: Int[torch.Tensor, " C"] | None

    def where(self, kept: Bool[torch.Tensor, " E"], index: Int[torch.Tensor, "2 e"]) -> Edges:
        """Returns the edges where `kept` (E,) is True. Their `index` (2,e) is given, since the
        caller has it already."""
        if self.crossing is None:
            crossing, among = None, padding.positions(kept)
        else:
            inside = kept.index_select(0, self.crossing)
            among = padding.positions(inside)
            place = kept.cumsum(0, dtype=torch.int32)
            crossing = place.index_select(0, self.crossing.index_select(0, among)).long().sub_(1)
        systems = None if self.systems is None else self.systems.index_select(0, among)
        return Edges(index, crossing, self.offsets.index_select(0, among), systems)


def edges(
    inputs: dict[str, torch.Tensor], n_systems: int, dtype: torch.dtype, crossing: bool = False
) -> Edges:
    """Returns the Edges of inputs as edge_vectors takes them, with offsets of the given dtype.

    With `crossing` the values of the offsets are read, to find the edges that cross a cell
    boundary. Otherwise all edges count as such."""
    index, offsets = inputs["edge_index"].long(), inputs["cell_offsets"]
    places = _crossing(offsets) if crossing else None
    if places is not None:
        offsets = offsets.index_select(0, places)
    systems = None
    if n_systems > 1:
        centres = index[0] if places is None else index[0].index_select(0, places)
        systems = inputs["batch"].long().index_select(0, centres)
    return Edges(index, places, offsets.to(dtype), systems)


_FEW = 1000  # edges; it takes longer to look for the crossing ones among fewer than to move all


def _crossing(offsets: torch.Tensor) -> torch.Tensor | None:
    """The positions of offsets (E,3) that are not zero. None if they are not few, or if their
    values can't be read at once: a tracer has none, and a GPU would have to be waited for."""
    if not _plain(offsets) or not offsets.is_cpu or len(offsets) < _FEW:
        return None
    a, b, c = offsets.unbind(1)
    places = padding.positions((a | b | c) != 0)
    return places if 2 * len(places) < len(offsets) else None


@dataclass(frozen=True, eq=False)
class Made:
    """Vectors along edges, and what they were made of.

    inputs     the dict of the contract that they belong to
    vectors    r_ij (E,3), without a graph
    edges      the Edges of `inputs`
    versions   how often each of these tensors had been changed in place by then"""

    inputs: dict[str, torch.Tensor]
    vectors: Float[torch.Tensor, "E 3"]
    edges: Edges
    versions: list[int]

    def are_of(self, inputs: dict[str, torch.Tensor]) -> bool:
        """Returns True if `inputs` holds these very positions, cells and edges, or views of them,
        and none of these was changed since."""
        own = self.inputs
        edges = all(inputs.get(key) is own[key] for key in _EDGES)
        same = edges and all(_same(inputs[key], own[key]) for key in ("pos", "cell"))
        return same and self.versions == _versions(own, self.vectors)

    def where(self, kept: Bool[torch.Tensor, " E"]) -> Made:
        """Returns the vectors of the edges where `kept` (E,) is True."""
        places = padding.positions(kept)
        index = _empty((2, len(places)), places)
        for row, of_all in zip(index, self.edges.index):
            torch.index_select(of_all, 0, places, out=row)
        offsets = _rows(self.inputs["cell_offsets"], places)
        inputs = self.inputs | {"edge_index": index, "cell_offsets": offsets}
        vectors = _rows(self.vectors, places)
        return Made(inputs, vectors, self.edges.where(kept, index), _versions(inputs, vectors))


def make(inputs: dict[str, torch.Tensor], known: Edges | None = None) -> Made:
    """Returns the vectors of a graph, which edge_vectors can then hand on.

    `inputs` are those of edge_vectors, and `known` their Edges, if somebody has these already. The
    vectors have no graph; edge_vectors gives them one."""
    pos, cell = inputs["pos"], inputs["cell"]
    known = known or edges(inputs, len(cell), cell.dtype, crossing=True)
    with torch.no_grad():
        vectors = _vectors(pos, cell, known)
    return Made(inputs, vectors, known, _versions(inputs, vectors))


@contextlib.contextmanager
def handing_on(made: Made | None) -> Iterator[None]:
    """Within this context, edge_vectors returns these vectors where they belong to its inputs.

    With None, and where the vectors are a tracer's, it makes its own."""
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
    def forward(ctx: Any, pos: torch.Tensor, cell: torch.Tensor, made: Made) -> torch.Tensor:
        """Returns the vectors; pos and cell are there for their gradients alone."""
        ctx.made = made
        ctx.shapes = (pos.shape, cell.shape)
        return made.vectors.detach()

    @staticmethod
    def backward(
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        """Returns the gradients in pos (N,3) and cell (B,3,3), as far as they are asked for."""
        edges = ctx.made.edges
        atoms, cells = ctx.shapes
        for_pos = for_cell = None
        if ctx.needs_input_grad[0]:
            i, j = edges.index
            zeros = gradient.new_zeros(atoms)
            for_pos = zeros.index_add(0, j, gradient) - zeros.index_add(0, i, gradient)
        if ctx.needs_input_grad[1]:
            for_cell = _moments(edges, gradient, cells)
        return for_pos, for_cell, None


kernels.vouch(_Handed)


def _moments(edges: Edges, gradient: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The sum of the outer products of offset and gradient over the edges of each system:
    (B,3,3)."""
    if edges.crossing is not None:
        gradient = gradient.index_select(0, edges.crossing)
    if edges.systems is None:
        return (edges.offsets.mT @ gradient).expand(shape)
    outer = edges.offsets[:, :, None] * gradient[:, None, :]
    return gradient.new_zeros(shape).index_add(0, edges.systems, outer)


def _vectors(pos: torch.Tensor, cell: torch.Tensor, edges: Edges) -> torch.Tensor:
    """r_ij (E,3). Without a graph the sums are done in place, since fresh memory costs more than
    they do."""
    i, j = edges.index
    shifts = _shifts(cell, edges)
    if torch.is_grad_enabled() or not (_plain(pos) and _plain(cell)):
        between = pos.index_select(0, j) - pos.index_select(0, i)
        if edges.crossing is None:
            return between + shifts
        return between.index_add(0, edges.crossing, shifts)
    between = _rows(pos, j)
    between -= _rows(pos, i)
    if edges.crossing is None:
        return between.add_(shifts)
    return between.index_add_(0, edges.crossing, shifts)


def _rows(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """x.index_select(0, places), not differentiable."""
    few = len(places) * x.shape[1] * x.element_size() < _MUCH
    if few or not _plain(x):
        return x.index_select(0, places)
    return torch.index_select(x.detach(), 0, places, out=_empty((len(places), x.shape[1]), x))


def _empty(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Memory for a tensor like another one. Where it is much, NumPy allocates it, which asks the
    system for huge pages: without them half of the time goes into the first touch."""
    if like.is_cpu and math.prod(shape) * like.element_size() >= _MUCH:
        return torch.from_numpy(np.empty(shape, like.detach().numpy().dtype))
    return like.new_empty(shape)


_MUCH = 2**22  # bytes, from which NumPy allocates


def _shifts(cell: torch.Tensor, edges: Edges) -> torch.Tensor:
    """offsets @ cell of the edges that cross (C,3)."""
    if edges.systems is None:
        return edges.offsets @ cell[0]
    rows = cell.flatten(1).index_select(0, edges.systems)
    a, b, c = edges.offsets.split(1, 1)
    return a * rows[:, :3] + b * rows[:, 3:6] + c * rows[:, 6:]


def _same(x: torch.Tensor, y: torch.Tensor) -> bool:
    """True for two tensors that show the same memory in the same way."""
    if x is y:
        return True
    if not (_plain(x) and x.dtype == y.dtype and x.shape == y.shape and x.stride() == y.stride()):
        return False
    return x.data_ptr() == y.data_ptr()


def _versions(inputs: dict[str, torch.Tensor], vectors: torch.Tensor) -> list[int]:
    """How often each tensor was changed in place. Tensors of inference mode have no such count; 0
    stands for it."""
    tensors = inputs["pos"], inputs["cell"], *[inputs[key] for key in _EDGES], vectors
    try:
        return [x._version for x in tensors]
    except RuntimeError:
        return [0 if x.is_inference() else x._version for x in tensors]


def _plain(x: torch.Tensor) -> bool:
    """True for what is no tracer, no wrapper and no dual number."""
    if type(x) not in (torch.Tensor, torch.nn.Parameter):
        return False
    if torch.autograd.forward_ad._current_level >= 0:
        return False
    return not is_functorch_wrapped_tensor(x)
