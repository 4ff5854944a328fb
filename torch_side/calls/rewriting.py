"""Graphs rewritten where the compiler (Inductor, torch 2.13) makes something wrong or slow of them.

The graphs are those of make_fx, whose nodes have an example of what they give, without values. Each
function here changes a graph in place; a node whose result another one may ask for has one, too.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch.fx.node import map_arg

aten: Any = torch.ops.aten

# Operators that return their first argument with some of its entries changed.
_CHANGED = ("index_put", "index_add", "index_copy", "index_fill", "put", "diagonal_scatter")


def unshare(graph: torch.fx.GraphModule) -> None:
    """Gives the entries of an expanded tensor a place each before some of them are changed.

    Inductor keeps one place for all entries of an expanded constant, as derivatives of a gather
    have it, and writes all values there: wrong numbers without a word."""
    for node in graph.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None or schema.name.removeprefix("aten::") not in _CHANGED:
            continue
        first = node.args[0]
        if _example(first).is_contiguous():
            continue
        with graph.graph.inserting_before(node):
            dense = graph.graph.call_function(
                aten.clone.default, (first,), {"memory_format": torch.contiguous_format}
            )
        dense.meta["val"] = _example(first).contiguous()
        node.replace_input_with(first, dense)


# Products with constants.

_TALL = 1024  # rows
_TERMS = 64  # entries of a matrix that are not zero, for which a product is written out
_WIDE = 64  # rows or columns of that matrix


def write_out(graph: torch.fx.GraphModule) -> None:
    """Writes products of a tall matrix with a small constant one as sums of columns.

    Coupling coefficients (Wigner 3j) of equivariant models are such matrices, most of their entries
    zero. What goes before the product and what comes after it is then one loop with it; a library
    takes seven times as long."""
    for node in graph.graph.nodes:
        if node.target is not aten.mm.default:
            continue
        tall, small = node.args
        rows, inner = _example(tall).shape
        columns = _example(small).shape[1]
        if rows < _TALL or max(inner, columns) > _WIDE:
            continue
        matrix = _constant(graph, small)
        if matrix is None or matrix.dtype not in (torch.float32, torch.float64):
            continue
        if 0 < int((matrix != 0).sum()) <= _TERMS:
            with graph.graph.inserting_before(node):
                found = _sums(graph.graph, tall, matrix.tolist())
            _replace(node, found)


def _sums(graph: torch.fx.Graph, tall: torch.fx.Node, matrix: list[list[float]]) -> torch.fx.Node:
    """The product with a matrix, one sum for each of its columns."""
    call = graph.call_function
    taken = {k: call(aten.select.int, (tall, 1, k)) for k, row in enumerate(matrix) if any(row)}
    nothing = call(aten.zeros_like.default, (next(iter(taken.values())),))
    sums = []
    for entries in zip(*matrix):
        total = nothing
        for k, entry in enumerate(entries):
            if entry:
                total = call(aten.add.Tensor, (total, taken[k]), {"alpha": entry})
        sums.append(total)
    return call(aten.stack.default, (sums, 1))


def _constant(graph: torch.fx.GraphModule, node: torch.fx.Node) -> torch.Tensor | None:
    """The value of a node that is made of tensors that the graph holds and of nothing else."""
    if node.op == "get_attr":
        held = operator.attrgetter(str(node.target))(graph)
        return held.detach() if isinstance(held, torch.Tensor) else None
    if not _pure(node):
        return None
    values = {n: _constant(graph, n) for n in node.all_input_nodes}
    if not values or any(v is None for v in values.values()):
        return None
    args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
    run: Any = node.target
    return run(*args, **kwargs)


def _pure(node: torch.fx.Node) -> bool:
    """True for an operator on small tensors whose result depends on its arguments alone."""
    called: Any = node.target
    schema = getattr(called, "_schema", None)
    known = node.meta.get("val")
    if schema is None or schema.is_mutable or not isinstance(known, torch.Tensor):
        return False
    return known.numel() <= _WIDE**2 and torch.Tag.nondeterministic_seeded not in called.tags


# Sums into one entry.


class Added(NamedTuple):
    """What an operator does that adds `factor` times `values` to the entries of `into` that `index`
    names along `axis`, an axis of one entry."""

    into: torch.fx.Node
    axis: int
    index: torch.fx.Node
    values: torch.fx.Node
    factor: Any


def sum_up(graph: torch.fx.GraphModule) -> None:
    """Writes index_add into an axis of one entry, and what a gather of such an axis has for its
    derivative, as a sum.

    Energies of one system are added up so. Inductor fails there (an AssertionError without a text)
    when it compiles for several threads. An index other than 0 and -1 gives NaN."""
    for node in graph.graph.nodes:
        added = _added_to_one(node)
        if added is not None:
            with graph.graph.inserting_before(node):
                found = _sum(graph.graph, added)
            _replace(node, found)


def _sum(graph: torch.fx.Graph, added: Added) -> torch.fx.Node:
    """The same by a sum over all values."""
    call, values, like = graph.call_function, added.values, _example(added.into)
    if like.is_floating_point():
        right = tuple(call(aten.eq.Scalar, (added.index, k)) for k in (0, -1))
        along = [-1 if k == added.axis else 1 for k in range(like.ndim)]
        inside = call(aten.view.default, (call(aten.logical_or.default, right), along))
        nan = call(aten.full_like.default, (values, float("nan")))
        values = call(aten.where.self, (inside, values, nan))
    dtype: dict[str, Any] = {"dtype": like.dtype}  # a sum of integers would be int64
    total = call(aten.sum.dim_IntList, (values, [added.axis], True), dtype)
    return call(aten.add.Tensor, (added.into, total), {"alpha": added.factor})


def _added_to_one(node: torch.fx.Node) -> Added | None:
    """What a node adds to an axis of one entry; None if it does something else."""
    arguments: Any = node.args
    if node.target is aten.index_add.default:
        into, axis, index, values = arguments[:4]
        factor = node.kwargs.get("alpha", 1)
    elif node.target is aten.index_put.default and arguments[3:4] == (True,):
        into, indices, values = arguments[:3]
        named = [k for k, i in enumerate(indices) if i is not None]
        axis, index, factor = named[0], indices[named[0]], 1
        if len(named) > 1 or _example(index).ndim != 1 or _example(index).dtype == torch.bool:
            return None
    else:
        return None
    sizes, given = list(_example(into).shape), list(_example(values).shape)
    if not sizes or _example(into).dtype == torch.bool:
        return None
    axis %= len(sizes)
    n = _example(index).numel()
    if sizes[axis] != 1 or given != [*sizes[:axis], n, *sizes[axis + 1 :]]:
        return None
    return Added(into, axis, index, values, factor)


def _example(node: torch.fx.Node) -> torch.Tensor:
    """A tensor without values, of the shape and dtype that a node gives."""
    return node.meta["val"]


def _replace(node: torch.fx.Node, found: torch.fx.Node) -> None:
    """Takes a node out of its graph; who used it takes what was found."""
    found.meta["val"] = _example(node)
    node.replace_all_uses_with(found)
    node.graph.erase_node(node)
