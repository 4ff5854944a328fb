"""How torch differentiates and batches a call: by torch.func, or by torch.autograd where a model
refuses torch.func."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bridge.errors import message
from bridge.function import Derived, Engine, Gradient, Jvp, Linearised, Vjp
from torch_side.calls import kernels, operators

DERIVATIVES = ("func", "autograd")

# torch keeps the levels of forward AD in globals of the process (torch 2.13): two threads at once
# (two devices, say) would use each other's, and get errors or, without a word, wrong tangents.
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
        return torch.func.vmap(
            f, in_dims=tuple(0 if m else None for m in mapped), randomness="error"
        )(*arrays)


def _is_base(f) -> bool:
    return not isinstance(f, Derived)


def _one_backward(f) -> bool:
    """The call itself, or one backward of it."""
    return _is_base(f) or (isinstance(f, (Vjp, Gradient)) and _is_base(f.of))


def _trusted(right: Callable):
    """A method of Func for what torch.func does right; Autograd serves the rest.

    `right(f)` tells for which f torch.func is right whatever the operators in it are. What its
    forward mode refuses is served anew by the outermost transform."""

    def decorate(method):
        def served(self, f, *arguments):
            by_autograd = getattr(_ROW_BY_ROW, method.__name__)
            trust = operators.RIGHT if _is_base(f) and right(f) else _trust(f.base)
            if trust == operators.WRONG or (trust == operators.NESTED_WRONG and not right(f)):
                return by_autograd(f, *arguments)
            try:
                return method(self, f, *arguments)
            except RuntimeError as refusal:
                if not any(words in str(refusal) for words in _NO_FORWARD_MODE):
                    raise
                f.base.memo["torch.func"] = max(_trust(f.base), operators.NESTED_WRONG)
                if right(f) or _inside_torch_func():
                    raise
            return by_autograd(f, *arguments)

        return served

    return decorate


class Func(Batching):
    """By torch.func, but a first vjp or gradient by torch.autograd, which is the same and faster;
    the forward call builds no graph.

    Grad mode is on within a jvp, as torch.func.vjp has it of itself: with it off, torch takes
    backward formulas that are right but not differentiable (of det and solve), or have no
    derivative (of SiLU)."""

    differentiates_inside = False
    shares = False
    alternative = 'pass derivatives="autograd" (torch.autograd), and batched="sequential" or an axis where vmap is meant'

    @_trusted(lambda f: False)
    def jvp(self, f, primals, wrt, tangents, outs):
        g, xs = _restrict(f, primals, wrt, outs)
        with _FORWARD_AD, torch.enable_grad():
            ys, found = torch.func.jvp(g, xs, tuple(tangents))
        # of `energy.sum() * 1.0` torch's is float64
        return tuple(t.to(y.dtype) for y, t in zip(ys, found))

    @_trusted(_is_base)
    def vjp(self, f, primals, wrt, cotangents, outs):
        if _outermost(f):
            return Autograd.vjp(self, f, primals, wrt, cotangents, outs)
        g, xs = _restrict(f, primals, wrt, outs)
        _, pull = torch.func.vjp(g, *xs)
        return _conj(pull(_conj(cotangents)))

    @_trusted(_is_base)
    def gradient(self, f, primals, wrt, out):
        if _outermost(f):
            return Autograd.gradient(self, f, primals, wrt, out)
        g, xs = _restrict(f, primals, wrt)
        y, pull, outputs = torch.func.vjp(lambda *xs: ((ys := g(*xs))[out], ys), *xs, has_aux=True)
        return (*outputs, *pull(torch.ones_like(y)))

    @_trusted(_one_backward)
    def vmap(self, f, mapped, size, arrays):
        return Batching.vmap(self, f, mapped, size, arrays)

    def check_vmap(self, f, mapped):
        pass


# What torch says where an operator, or a custom Function, has no forward mode.
_NO_FORWARD_MODE = ("forward AD", "forward mode AD")


def _trust(base) -> int:
    """How far torch.func is right for a call: by the operators in it, and by what it has
    refused."""
    if "torch.func" not in base.memo:
        base.memo["torch.func"] = operators.trust(base.call, base.inputs)
    return base.memo["torch.func"]


class Autograd(Batching):
    """vjp by torch.autograd, jvp by differentiating the vjp in its cotangent; a graph is kept only
    where a caller differentiates further."""

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
        rows = serve(
            f.of, primals, f.wrt, [tuple(t[i] for t in linear) for i in range(size)], f.outs
        )
        return tuple(torch.stack(column) for column in zip(*rows, strict=True))

    def gradient(self, f, primals, wrt, out):
        keep = _requires_grad(*primals)
        with torch.enable_grad():
            xs, ys = _record(f, primals, wrt)
            if keep:
                _check_twice(f, primals, wrt, (out,), xs, ys)
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


# What serves Func where torch.func can't.
_ROW_BY_ROW = Autograd(sequential=True)


def _shared(f, mapped) -> bool:
    """Many tangents or cotangents at one point."""
    return isinstance(f, Linearised) and not any(mapped[: len(f.of.inputs)])


def _push(f, primals, wrt, rows, outs):
    """A jvp for each row of tangents, f evaluated once."""
    keep = _requires_grad(*primals, *(t for row in rows for t in row))
    with torch.enable_grad():
        xs, ys = _record(f, primals, wrt)
        kernels.check_pushed([ys[o] for o in outs])
        if keep:
            _check_twice(f, primals, wrt, outs, xs, ys)
        # anywhere: pulled is linear in them
        us = tuple(torch.ones_like(ys[o], requires_grad=True) for o in outs)
        pulled = _grad(tuple(ys[o] for o in outs), xs, us, True)
        return [_grad(pulled, us, row, keep, more=row is not rows[-1]) for row in rows]


def _pull(f, primals, wrt, rows, outs):
    """A vjp for each row of cotangents, f evaluated once."""
    keep = _requires_grad(*primals, *(t for row in rows for t in row))
    with torch.enable_grad():
        xs, ys = _record(f, primals, wrt)
        if keep:
            _check_twice(f, primals, wrt, outs, xs, ys)
        ys = tuple(ys[o] for o in outs)
        return [_conj(_grad(ys, xs, _conj(row), keep, more=row is not rows[-1])) for row in rows]


def _restrict(f: Callable, primals, wrt, outs=None):
    """f as a function of the inputs `wrt` alone, giving the outputs `outs` (all of them if
    None)."""

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
    """One forward with a graph: fresh leaves where nobody differentiates further, else views inside
    the caller's graph."""
    xs = tuple(
        x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        for x in (primals[i] for i in wrt)
    )
    return xs, tuple(f(*_replaced(primals, wrt, xs)))


def _check_twice(f, primals, wrt, outs, xs, ys) -> None:
    """Raise where a derivative of the derivative that is about to be taken would be cut off by a
    kernel inside f."""

    def again():
        there = dict(zip(wrt, kernels.moved(primals[i] for i in wrt)))
        moved = _record(f, [there.get(i, p) for i, p in enumerate(primals)], wrt)[1]
        return [moved[o] for o in outs]

    leaves = [x for x in xs if x.is_leaf]
    kernels.check_twice([ys[o] for o in outs], again, leaves)


def _grad(ys, xs, cotangents, create_graph: bool, more: bool = False) -> tuple:
    """torch.autograd.grad with zeros for what is not reached; each x carries a graph or is a leaf.
    `more` will follow."""
    reached = [(y, c) for y, c in zip(ys, cotangents, strict=True) if y.requires_grad]
    if not reached:
        return tuple(torch.zeros_like(x) for x in xs)
    ys, cotangents = zip(*reached)
    return torch.autograd.grad(
        ys,
        xs,
        cotangents,
        create_graph=create_graph,
        retain_graph=create_graph or more,
        allow_unused=True,
        materialize_grads=True,
    )


def _outermost(f) -> bool:
    """The user's own call is differentiated, with no transform of torch.func around it."""
    return _is_base(f) and not _inside_torch_func()


def _inside_torch_func() -> bool:
    """Private in torch 2.13."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _requires_grad(*tensors) -> bool:
    return any(t.requires_grad for t in tensors)


def _conj(tensors) -> tuple:
    """torch's vjp is the conjugate transpose; the contract's is the plain one."""
    return tuple(t.conj() if t.is_complex() else t for t in tensors)


def _one_after_another(f, mapped, size, arrays) -> tuple:
    if not size:
        return tuple(
            arrays[0].new_empty((0, *s.shape), dtype=getattr(torch, s.dtype)) for s in f.outputs
        )
    calls = [
        f(*(a[i] if m else a for a, m in zip(arrays, mapped, strict=True))) for i in range(size)
    ]
    return tuple(torch.stack(column) for column in zip(*calls))
