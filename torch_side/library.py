"""One op of torch.library, bridge::call, for whoever traces torch: torch.compile, torch.export, fake tensors.

The op names its Function by a number. A number answers as long as the Function's base lives, which the user's own object
holds; one that torch.export writes into a program answers until the process ends.
"""

from __future__ import annotations

import itertools
import secrets
import weakref
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from bridge.errors import message
from bridge.function import Function
from torch_side import buffers, wrap

_bases: weakref.WeakValueDictionary[str, Function] = weakref.WeakValueDictionary()
_exported: dict[str, Function] = {}
_next = map(str, itertools.count(1))


def register(target) -> str:
    """The token by which code under torch.compile finds a callable of the other bank, as long as it lives."""
    token = next(_next)
    _callables[token] = target
    return token


def call(fn: Function, tensors) -> list:
    """bridge::call of a Function."""
    return torch.ops.bridge.call(list(tensors), number(fn))


def number(fn: Function) -> str:
    """The number of the base, and the place of `fn` among the Functions derived from it."""
    base = fn.base
    family = base.memo.setdefault("family", [])
    if "number" not in base.memo:
        base.memo["number"] = next(_next)
        _bases[base.memo["number"]] = base
    if torch.compiler.is_exporting() and base.memo["number"] not in _exported:
        base.memo["number"] = "x" + secrets.token_urlsafe(9)  # no other process has it
        _bases[base.memo["number"]] = _exported[base.memo["number"]] = base
    if fn not in family:
        family.append(fn)
    return f"{base.memo['number']}:{family.index(fn)}"


def lookup(number: str) -> Function:
    base, _, place = number.partition(":")
    found = _bases.get(base)
    if found is None:
        do = "compile or export again in this process, and keep what bridge.to_torch or bridge.module returned while the program is used"
        raise RuntimeError(message("a JAX function of this process", f"bridge::call of {number}, which this process does not know (or no longer)", do))
    return found.memo["family"][int(place)]


# Calls that torch.compile traces: what the other bank's pytree library does is done at compile time, on numbers in place of
# tensors, and reaches the traced code as constants.


_callables: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


def traced(token: str, args, kwargs):
    """A call of a registered callable, in code that torch.compile can trace."""
    leaves, structure = pytree.tree_flatten((args, kwargs))
    types = tuple([(tuple([int(n) for n in x.shape]), x.dtype) if isinstance(x, torch.Tensor) else x for x in leaves])
    number, order, result = _resolve(token, pytree.tree_unflatten(list(range(len(leaves))), structure), types)
    return _rebuilt(result, torch.ops.bridge.call([leaves[i] for i in order], number))


@torch.compiler.assume_constant_result
def _resolve(token: str, call, types):
    """(number of the Function, the leaves that are its inputs, its result with positions for tensors)."""
    empty = [torch.empty(t[0], dtype=t[1], device="meta") if isinstance(t, tuple) else t for t in types]
    args, kwargs = pytree.tree_map(lambda i: empty[i], call)
    fn, tensors = _callables[token].function(args, kwargs)
    order = tuple(next(i for i, e in enumerate(empty) if e is t) for t in tensors)
    return number(fn), order, _coded(fn.out_tree.unflatten(range(len(fn.outputs))))


def _coded(x):
    """A result as nested tuples, the only container that torch.compile takes for a constant."""
    if isinstance(x, int) or x is None:
        return x
    if type(x) not in (dict, list, tuple):
        raise NotImplementedError(message("dicts, lists and tuples as results of a JAX function under torch.compile", type(x).__name__, "return one of these"))
    items = x.items() if isinstance(x, dict) else enumerate(x)
    return type(x).__name__, tuple((k, _coded(v)) for k, v in items)


def _rebuilt(code, outs):
    if code is None:
        return None
    if isinstance(code, int):
        return outs[code]
    kind, items = code
    if kind == "dict":
        return {k: _rebuilt(c, outs) for k, c in items}
    values = [_rebuilt(c, outs) for _, c in items]
    return tuple(values) if kind == "tuple" else values


@torch.library.custom_op("bridge::call", mutates_args=())
def _op(tensors: list[torch.Tensor], function: str) -> list[torch.Tensor]:
    return wrap.run(lookup(function), tensors)


@_op.register_fake
def _(tensors, function):
    if forward_ad._current_level >= 0:
        raise NotImplementedError(message("reverse mode, or no derivative, of a JAX function inside torch.compile and torch.export", "forward mode (jvp)", "compile without the jvp, or call it eagerly"))
    return [torch.empty(s.shape, dtype=buffers.DTYPES[s.dtype], device=tensors[0].device) for s in lookup(function).outputs]


def _setup_context(ctx, inputs, output):
    tensors, ctx.function = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, cotangents):
    fn, primals = lookup(ctx.function), ctx.saved_tensors
    cotangents = [c if s.inexact else None for c, s in zip(cotangents, fn.outputs, strict=True)]
    result = [None] * len(primals)
    wrt = tuple(i for i, s in enumerate(fn.inputs) if s.inexact and primals[i].requires_grad)
    if wrt and any(c is not None for c in cotangents):
        for i, g in zip(wrt, wrap.vjp(fn, wrt, primals, cotangents, call), strict=True):
            result[i] = g
    return result, None


def _vmap(info, in_dims, tensors, function):
    batched, tensors = wrap.over_batch(lookup(function), info.batch_size, in_dims[0], tensors)
    outs = call(batched, tensors)
    return outs, [0] * len(outs)


_op.register_autograd(_backward, setup_context=_setup_context)
_op.register_vmap(_vmap)
