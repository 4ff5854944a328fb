"""How torch differentiates and batches a call: by torch.func, or by torch.autograd where a model refuses torch.func."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bridge.errors import message
from bridge.function import Derived, Engine, Jvp, Linearised

DERIVATIVES = ("func", "autograd")

# torch keeps the levels of forward AD in globals of the process (torch 2.13): two threads at once (two devices, say) would
# use each other's, and get errors or, without a word, wrong tangents.
_FORWARD_AD = threading.RLock()


def engine(derivatives: str, sequential: bool) -> Engine:
    return (Func if derivatives == "func" else Autograd)(sequential)


@dataclass(frozen=True)
class Batching(Engine):
    """vmap by torch.func.vmap, or by one call after another."""

    sequential: bool = False

    def vmap(self, f, mapped, size, arrays):
        if self.sequential:
            return _one_after_another(f, mapped, size, arrays)
        return torch.func.vmap(f, in_dims=tuple(0 if m else None for m in mapped), randomness="error")(*arrays)


class Func(Batching):
    """By torch.func, but a first vjp or gradient by torch.autograd, which is the same and faster; the forward call builds no graph."""

    differentiates_inside = False
    shares = False
    alternative = 'pass derivatives="autograd" (torch.autograd), and batched="sequential" or an axis where vmap is meant'

    def jvp(self, f, primals, wrt, tangents, outs):
        g, xs = _restrict(f, primals, wrt, outs)
        with _FORWARD_AD:
            return torch.func.jvp(g, xs, tuple(tangents))[1]

    def vjp(self, f, primals, wrt, cotangents, outs):
        if _outermost(f, *primals, *cotangents):
            return Autograd.vjp(self, f, primals, wrt, cotangents, outs)
        g, xs = _restrict(f, primals, wrt, outs)
        _, pull = torch.func.vjp(g, *xs)
        return _conj(pull(_conj(cotangents)))

    def gradient(self, f, primals, wrt, out):
        if _outermost(f, *primals):
            return Autograd.gradient(self, f, primals, wrt, out)
        g, xs = _restrict(f, primals, wrt)
        y, pull, outputs = torch.func.vjp(lambda *xs: ((ys := g(*xs))[out], ys), *xs, has_aux=True)
        return (*outputs, *pull(torch.ones_like(y)))

    def check_vmap(self, f, mapped):
        pass


class Autograd(Batching):
    """vjp by torch.autograd, jvp by differentiating the vjp in its cotangent; a graph is kept only where a caller differentiates further."""

    differentiates_inside = True
    shares = True
    alternative = 'pass batched="sequential", or an axis that the model batches natively'

    def jvp(self, f, primals, wrt, tangents, outs):
        return _push(f, primals, wrt, [tangents], outs)[0]

    def vjp(self, f, primals, wrt, cotangents, outs):
        return _pull(f, primals, wrt, [cotangents], outs)[0]

    def vmap(self, f, mapped, size, arrays):
        if not size or not _shared(f, mapped):
            return super().vmap(f, mapped, size, arrays)
        primals, linear = arrays[: len(f.of.inputs)], arrays[len(f.of.inputs) :]
        serve = _push if isinstance(f, Jvp) else _pull
        rows = serve(f.of, primals, f.wrt, [tuple(t[i] for t in linear) for i in range(size)], f.outs)
        return tuple(torch.stack(column) for column in zip(*rows, strict=True))

    def gradient(self, f, primals, wrt, out):
        keep = _requires_grad(*primals)
        with torch.enable_grad():
            xs, ys = _record(f, primals, wrt)
            grads = _grad((ys[out],), xs, (torch.ones_like(ys[out]),), keep)
        return (*(ys if keep else [y.detach() for y in ys]), *grads)

    def check_vmap(self, f, mapped):
        if isinstance(f, Derived) and not self.sequential and not _shared(f, mapped):
            raise NotImplementedError(
                message(
                    "a way to batch a derivative that goes by torch.autograd",
                    'batched="vmap" (torch.func.vmap does not go over torch.autograd)',
                    'pass batched="sequential" (one call after another), an axis that the model batches natively, or derivatives="func"',
                )
            )


def _shared(f, mapped) -> bool:
    """Many tangents or cotangents at one point."""
    return isinstance(f, Linearised) and not any(mapped[: len(f.of.inputs)])


def _push(f, primals, wrt, rows, outs):
    """A jvp for each row of tangents, f evaluated once."""
    keep = _requires_grad(*primals, *(t for row in rows for t in row))
    with torch.enable_grad():
        xs, ys = _record(f, primals, wrt)
        us = tuple(torch.zeros_like(ys[o], requires_grad=True) for o in outs)
        pulled = _grad(tuple(ys[o] for o in outs), xs, us, True)
        return [_grad(pulled, us, row, keep, more=row is not rows[-1]) for row in rows]


def _pull(f, primals, wrt, rows, outs):
    """A vjp for each row of cotangents, f evaluated once."""
    keep = _requires_grad(*primals, *(t for row in rows for t in row))
    with torch.enable_grad():
        xs, ys = _record(f, primals, wrt)
        ys = tuple(ys[o] for o in outs)
        return [_conj(_grad(ys, xs, _conj(row), keep, more=row is not rows[-1])) for row in rows]


def _restrict(f: Callable, primals, wrt, outs=None):
    """f as a function of the inputs `wrt` alone, giving the outputs `outs` (all of them if None)."""

    def g(*xs):
        ys = f(*_replaced(primals, wrt, xs))
        return tuple(ys) if outs is None else tuple(ys[o] for o in outs)

    return g, tuple(primals[i] for i in wrt)


def _replaced(primals, wrt, xs) -> list:
    full = list(primals)
    for i, x in zip(wrt, xs, strict=True):
        full[i] = x
    return full


def _record(f, primals, wrt):
    """One forward with a graph: fresh leaves where nobody differentiates further, else views inside the caller's graph."""
    xs = tuple(x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in (primals[i] for i in wrt))
    return xs, tuple(f(*_replaced(primals, wrt, xs)))


def _grad(ys, xs, cotangents, create_graph: bool, more: bool = False) -> tuple:
    """torch.autograd.grad with zeros for what is not reached; each x carries a graph or is a leaf. `more` will follow."""
    reached = [(y, c) for y, c in zip(ys, cotangents, strict=True) if y.requires_grad]
    if not reached:
        return tuple(torch.zeros_like(x) for x in xs)
    ys, cotangents = zip(*reached)
    return torch.autograd.grad(ys, xs, cotangents, create_graph=create_graph, retain_graph=create_graph or more, allow_unused=True, materialize_grads=True)


def _outermost(f, *tensors) -> bool:
    """A first derivative of the user's own call, with no torch.func transform around it (private in torch 2.13)."""
    return not isinstance(f, Derived) and torch._C._functorch.peek_interpreter_stack() is None and not _requires_grad(*tensors)


def _requires_grad(*tensors) -> bool:
    return any(t.requires_grad for t in tensors)


def _conj(tensors) -> tuple:
    """torch's vjp is the conjugate transpose; the contract's is the plain one."""
    return tuple(t.conj() if t.is_complex() else t for t in tensors)


def _one_after_another(f, mapped, size, arrays) -> tuple:
    if not size:
        return tuple(arrays[0].new_empty((0, *s.shape), dtype=getattr(torch, s.dtype)) for s in f.outputs)
    calls = [f(*(a[i] if m else a for a, m in zip(arrays, mapped, strict=True))) for i in range(size)]
    return tuple(torch.stack(column) for column in zip(*calls))
