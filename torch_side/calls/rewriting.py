"""Graphs rewritten where the compiler (Inductor, torch 2.13) makes something wrong or slow of them."""

from __future__ import annotations

import operator
from typing import Any

import torch

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
        known = first.meta.get("val")
        if isinstance(known, torch.Tensor) and known.is_contiguous():
            continue
        with graph.graph.inserting_before(node):
            dense = graph.graph.call_function(
                aten.clone.default, (first,), {"memory_format": torch.contiguous_format}
            )
        node.replace_input_with(first, dense)


def sum_up(graph: torch.fx.GraphModule) -> None:
    """Writes index_add into an axis of one entry, and what a gather of such an axis has for its
    derivative, as a sum.

    Energies of one system are added up so. Inductor fails there (an AssertionError without a text)
    when it compiles for several threads. An index other than 0 and -1 gives NaN."""
    for node in graph.graph.nodes:
        found = _added_to_one(node)
        if found is None:
            continue
        into, axis, index, values, alpha = found
        with graph.graph.inserting_before(node):
            call = graph.graph.call_function
            if values.meta["val"].is_floating_point():
                shape = [-1 if k == axis else 1 for k in range(values.meta["val"].ndim)]
                right = [call(aten.eq.Scalar, (index, k)) for k in (0, -1)]
                inside = call(aten.view.default, (call(aten.logical_or.default, tuple(right)), shape))
                nan = call(aten.full_like.default, (values, float("nan")))
                values = call(aten.where.self, (inside, values, nan))
            total = call(aten.sum.dim_IntList, (values, [axis], True))
            if not into.meta["val"].is_floating_point():  # sums of integers are int64
                total = call(aten._to_copy.default, (total,), {"dtype": into.meta["val"].dtype})
            added = call(aten.add.Tensor, (into, total), {"alpha": alpha})
        added.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(added)
        graph.graph.erase_node(node)


def _added_to_one(node: torch.fx.Node) -> tuple[Any, int, Any, Any, Any] | None:
    """(tensor, axis, index, values, factor) of a node that adds values to an axis of one entry."""
    if node.target is aten.index_add.default:
        into, axis, index, values = node.args[:4]
        alpha = node.kwargs.get("alpha", 1)
    elif node.target is aten.index_put.default and node.args[3:4] == (True,):
        into, indices, values = node.args[:3]
        named = [k for k, i in enumerate(indices) if i is not None]
        axis, index, alpha = named[0], indices[named[0]], 1
        if len(named) > 1 or index.meta["val"].ndim != 1 or index.meta["val"].dtype == torch.bool:
            return None
    else:
        return None
    sizes, given = list(into.meta["val"].shape), list(values.meta["val"].shape)
    if not sizes or into.meta["val"].dtype == torch.bool:
        return None
    axis %= len(sizes)
    n = index.meta["val"].shape[0] if index.meta["val"].ndim else 1
    if sizes[axis] != 1 or given != [*sizes[:axis], n, *sizes[axis + 1 :]]:
        return None
    return into, axis, index, values, alpha


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
        rows, inner = tall.meta["val"].shape
        columns = small.meta["val"].shape[1]
        if rows < _TALL or max(inner, columns) > _WIDE:
            continue
        matrix = _constant(graph, small)
        if matrix is None or matrix.dtype not in (torch.float32, torch.float64):
            continue
        if 0 < int((matrix != 0).sum()) <= _TERMS:
            with graph.graph.inserting_before(node):
                found = _sums(graph.graph, tall, matrix.tolist())
            found.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(found)
            graph.graph.erase_node(node)


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
        held = operator.attrgetter(node.target)(graph)
        return held.detach() if isinstance(held, torch.Tensor) else None
    if node.op != "call_function" or not _pure(node):
        return None
    values = {n: _constant(graph, n) for n in node.all_input_nodes}
    if not values or any(v is None for v in values.values()):
        return None
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    return node.target(*args, **kwargs)


def _pure(node: torch.fx.Node) -> bool:
    """True for an operator on small tensors whose result depends on its arguments alone."""
    schema = getattr(node.target, "_schema", None)
    known = node.meta.get("val")
    if schema is None or schema.is_mutable or not isinstance(known, torch.Tensor):
        return False
    return known.numel() <= _WIDE**2 and torch.Tag.nondeterministic_seeded not in node.target.tags
