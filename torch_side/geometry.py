"""Vectors along the edges of a graph: made once in a call, and handed on to whoever asks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from torch_side import kernels, padding


def edge_vectors(inputs: dict) -> torch.Tensor:
    """r_ij = r_j - r_i + cell_offsets @ cell (E,3), differentiable in pos and cell.

    `inputs` is the dict of the contract, with edges between atoms (no unused slots): pos (N,3) and cell
    (B,3,3) in Angstrom, edge_index (2,E), cell_offsets (E,3), batch (N,). Where torch_side.graph.evaluate
    has made the vectors of these positions, cells and edges already, they are not made again. The result
    is not to be changed in place.

    >>> edges = {"edge_index": torch.tensor([[0], [0]]), "cell_offsets": torch.tensor([[1, 0, 0]])}
    >>> system = {"pos": torch.zeros(1, 3), "cell": 2 * torch.eye(3)[None], "batch": torch.tensor([0])}
    >>> edge_vectors(system | edges)
    tensor([[2., 0., 0.]])
    """
    pos, cell = inputs["pos"], inputs["cell"]
    made = None if torch.compiler.is_compiling() else _MADE.get()
    if made is not None and made.are_of(inputs):
        return _Handed.apply(pos, cell, made)
    return _vectors(pos, cell, *_parts(inputs))


def edge_shifts(inputs: dict) -> torch.Tensor:
    """cell_offsets @ cell (E,3) in Angstrom, differentiable in cell: `inputs` as for edge_vectors."""
    _, offsets, systems = _parts(inputs)
    return _shifts(inputs["cell"], offsets, systems)


@dataclass(frozen=True, eq=False)
class Made:
    """Vectors (E,3), without a graph, and what they were made of: offsets (E,3) float, systems (E,) or None."""

    inputs: dict
    vectors: torch.Tensor
    edges: torch.Tensor
    offsets: torch.Tensor
    systems: torch.Tensor | None
    versions: list[int]

    def are_of(self, inputs: dict) -> bool:
        """True where `inputs` has these very positions, cells and edges, or views of them, unchanged."""
        own = self.inputs
        edges = all(inputs.get(key) is own[key] for key in _EDGES)
        same = edges and all(_same(inputs[key], own[key]) for key in ("pos", "cell"))
        return same and self.versions == _versions(own, self.vectors)

    def where(self, kept: torch.Tensor) -> Made:
        """Of some of the edges: kept (E,) bool."""
        kept = kept.nonzero()[:, 0]
        some = {key: padding.rows(key, self.inputs[key], {"E": kept}) for key in ("edge_index", "cell_offsets")}
        inputs = self.inputs | some
        vectors, offsets = (x.index_select(0, kept) for x in (self.vectors, self.offsets))
        systems = None if self.systems is None else self.systems.index_select(0, kept)
        versions = _versions(inputs, vectors)
        return Made(inputs, vectors, some["edge_index"], offsets, systems, versions)


def make(inputs: dict) -> Made:
    """The vectors of a graph, for edge_vectors: `inputs` as there. Nothing is differentiated."""
    edges, offsets, systems = _parts(inputs)
    with torch.no_grad():
        vectors = _vectors(inputs["pos"], inputs["cell"], edges, offsets, systems)
    return Made(inputs, vectors, edges, offsets, systems, _versions(inputs, vectors))


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
        made, (i, j) = ctx.made, ctx.made.edges
        atoms, systems = ctx.shapes
        for_pos = for_cell = None
        if ctx.needs_input_grad[0]:
            zeros = gradient.new_zeros(atoms)
            for_pos = zeros.index_add(0, j, gradient) - zeros.index_add(0, i, gradient)
        if ctx.needs_input_grad[1]:
            for_cell = _moments(made, gradient, systems)
        return for_pos, for_cell, None


kernels.vouch(_Handed)


def _moments(made, gradient, shape):
    """sum of offset (x) gradient over the edges of each system: (B,3,3)."""
    if made.systems is None:
        return (made.offsets.mT @ gradient)[None]
    outer = made.offsets[:, :, None] * gradient[:, None, :]
    return gradient.new_zeros(shape).index_add(0, made.systems, outer)


def _vectors(pos, cell, edges, offsets, systems):
    i, j = edges
    between = pos.index_select(0, j) - pos.index_select(0, i)
    return between + _shifts(cell, offsets, systems)


def _shifts(cell, offsets, systems):
    if systems is None:
        return offsets @ cell[0]
    rows = cell.flatten(1).index_select(0, systems)
    a, b, c = offsets.split(1, 1)
    return a * rows[:, :3] + b * rows[:, 3:6] + c * rows[:, 6:]


def _parts(inputs):
    """edge_index as int64, offsets (E,3) as floats, and the system of each edge (E,) int64: None where there is one."""
    cell, edges = inputs["cell"], inputs["edge_index"].long()
    systems = None if len(cell) == 1 else inputs["batch"].long().index_select(0, edges[0])
    return edges, inputs["cell_offsets"].to(cell.dtype), systems


def _same(x, y) -> bool:
    """True for two tensors that show the same memory in the same way."""
    if x is y:
        return True
    if not (_plain(x) and x.dtype == y.dtype and x.shape == y.shape and x.stride() == y.stride()):
        return False
    return x.data_ptr() == y.data_ptr()


def _versions(inputs, vectors) -> list[int]:
    """How often each tensor was changed in place; those of inference mode don't count."""
    tensors = [*(inputs[key] for key in ("pos", "cell", *_EDGES)), vectors]
    return [0 if x.is_inference() else x._version for x in tensors]


def _plain(x) -> bool:
    """No tracer, no wrapper, no dual number."""
    if type(x) not in (torch.Tensor, torch.nn.Parameter) or torch.autograd.forward_ad._current_level >= 0:
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(x)
