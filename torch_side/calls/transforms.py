"""How torch differentiates and batches a call: by torch.func, or by torch.autograd where a model
refuses torch.func."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch

from bridge.errors import message
from bridge.function import Derived, Function, Gradient, Jvp, Linearised, Vjp
from torch_side.calls import kernels, operators
from torch_side.calls.inference import TorchEngine

if TYPE_CHECKING:
    import torch._C._functorch

Tensors = Sequence[torch.Tensor]
Positions = tuple[int, ...]  # of inputs or of outputs
DERIVATIVES = ("func", "autograd")

# torch keeps the levels of forward AD in globals of the process (torch 2.13). Two threads that used
# them at once, for two devices say, would use each other's levels, and get errors or, without a
# word, wrong tangents.
_FORWARD_AD = threading.RLock()


def engine(derivatives: str, sequential: bool) -> Batching:
    """Returns the engine for one of DERIVATIVES; with `sequential` its vmap makes one call after
    another."""
    return (Func if derivatives == "func" else Autograd)(sequential)


@dataclass(frozen=True)
class Batching(TorchEngine):
    """vmap by torch.func.vmap, or by one call after another."""

    sequential: bool = False

    def vmap(self, f: Function, mapped: Sequence[bool], size: int, arrays: Tensors) -> Tensors:
        """Returns the outputs of `f` over a leading axis of the `mapped` arrays, stacked."""
        if self.sequential:
            return _one_after_another(f, mapped, size, arrays)
        in_dims = tuple(0 if m else None for m in mapped)
        return torch.func.vmap(f, in_dims=in_dims, randomness="error")(*arrays)


def _is_base(f: Function) -> bool:
    return not isinstance(f, Derived)


def _one_backward(f: Function) -> bool:
    """True for the call itself, and for one backward of it."""
    return _is_base(f) or (isinstance(f, (Vjp, Gradient)) and _is_base(f.of))


def _trusted(right: Callable[[Function], bool]) -> Callable[[Callable], Callable]:
    """Decorates a method of Func: torch.func serves what it does right, Autograd serves the rest.

    `right(f)` tells for which f torch.func is right, whatever the operators in it are. Where
    forward mode refuses an operator, the outermost transform is served anew by Autograd."""

    def decorate(method: Callable) -> Callable:
        def served(self: Func, f: Function, *arguments: Any) -> Tensors:
            by_autograd = getattr(_ROW_BY_ROW, method.__name__)
            trust = operators.RIGHT if _is_base(f) and right(f) else trust_in(f.base)
            if trust == operators.WRONG or (trust == operators.NESTED_WRONG and not right(f)):
                return by_autograd(f, *arguments)
            try:
                return method(self, f, *arguments)
            except RuntimeError as refusal:
                if not any(words in str(refusal) for words in _NO_FORWARD_MODE):
                    raise
                f.base.memo["torch.func"] = max(trust_in(f.base), operators.NESTED_WRONG)
                if right(f) or _inside_torch_func():
                    raise
            return by_autograd(f, *arguments)

        return served

    return decorate


class Func(Batching):
    """By torch.func, except for a first vjp or gradient.

    These go by torch.autograd, which gives the same and is faster. The forward call builds no
    graph.

    Grad mode is on within a jvp, as torch.func.vjp switches it on of itself. With it off, torch
    takes backward formulas that are right but that can't be differentiated (of det and solve), or
    that have no derivative (of SiLU)."""

    differentiates_inside = False
    shares = False
    alternative = 'pass derivatives="autograd" (torch.autograd), and batched="sequential" or an axis where vmap is meant'

    @_trusted(lambda f: False)
    def jvp(
        self, f: Function, primals: Tensors, wrt: Positions, tangents: Tensors, outs: Positions
    ) -> Tensors:
        """Returns the tangents of the outputs `outs`, for tangents of the inputs `wrt`."""
        g, xs = _restrict(f, primals, wrt, outs)
        pushed: Callable[..., tuple] = torch.func.jvp
        with _FORWARD_AD, torch.enable_grad():
            ys, found = pushed(g, xs, tuple(tangents))
        # the tangent of `energy.sum() * 1.0` is float64 in torch
        return tuple(t.to(y.dtype) for y, t in zip(ys, found))

    @_trusted(_is_base)
    def vjp(
        self, f: Function, primals: Tensors, wrt: Positions, cotangents: Tensors, outs: Positions
    ) -> Tensors:
        """Returns the cotangents of the inputs `wrt`, for cotangents of the outputs `outs`."""
        if _outermost(f):
            return _vjp(f, primals, wrt, cotangents, outs)
        g, xs = _restrict(f, primals, wrt, outs)
        pulled: Callable[..., tuple] = torch.func.vjp
        _, pull = pulled(g, *xs)
        return _conj(pull(_conj(cotangents)))

    @_trusted(_is_base)
    def gradient(self, f: Function, primals: Tensors, wrt: Positions, out: int) -> Tensors:
        """Returns the outputs, then the gradients of output `out` in the inputs `wrt`."""
        if _outermost(f):
            return _gradient(f, primals, wrt, out)
        g, xs = _restrict(f, primals, wrt)
        pulled: Callable[..., tuple] = torch.func.vjp
        y, pull, outputs = pulled(lambda *xs: ((ys := g(*xs))[out], ys), *xs, has_aux=True)
        return (*outputs, *pull(torch.ones_like(y)))

    @_trusted(_one_backward)
    def vmap(self, f: Function, mapped: Sequence[bool], size: int, arrays: Tensors) -> Tensors:
        """Returns the outputs of `f` over a leading axis of the `mapped` arrays, stacked."""
        return Batching.vmap(self, f, mapped, size, arrays)

    def check_vmap(self, f: Function, mapped: Sequence[bool]) -> None:
        """Raises nothing: every `f` can be batched."""


# What torch says where an operator, or a custom Function, has no forward mode.
_NO_FORWARD_MODE = ("forward AD", "forward mode AD")


def trust_in(base: Any) -> int:
    """Returns how far torch.func is right for a base, by the operators in it and by what it has refused."""
    if "torch.func" not in base.memo:
        base.memo["torch.func"] = operators.trust(base.call, base.inputs)
    return base.memo["torch.func"]


class Autograd(Batching):
    """vjp by torch.autograd, and jvp by differentiating the vjp in its cotangent.

    A graph is kept only where a caller differentiates further."""

    differentiates_inside = True
    shares = True
    alternative = 'pass batched="sequential", or an axis that the model batches natively'

    def jvp(
        self, f: Function, primals: Tensors, wrt: Positions, tangents: Tensors, outs: Positions
    ) -> Tensors:
        """Returns the tangents of the outputs `outs`, for tangents of the inputs `wrt`.

        Raises: NotImplementedError for a custom autograd Function inside `f` whose backward is cut
        off from what it is differentiated in (see kernels)."""
        return _push(f, primals, wrt, [tangents], outs)[0]

    def vjp(
        self, f: Function, primals: Tensors, wrt: Positions, cotangents: Tensors, outs: Positions
    ) -> Tensors:
        """Returns the cotangents of the inputs `wrt`, for cotangents of the outputs `outs`.

        Raises: NotImplementedError as `jvp`, where a caller differentiates further."""
        return _vjp(f, primals, wrt, cotangents, outs)

    def vmap(self, f: Function, mapped: Sequence[bool], size: int, arrays: Tensors) -> Tensors:
        """Returns the outputs of `f` over a leading axis of the `mapped` arrays, stacked.

        Many tangents or cotangents at one point share one evaluation of the call."""
        if not size or not _shared(f, mapped):
            return super().vmap(f, mapped, size, arrays)
        n = len(f.of.inputs)
        primals, linear = arrays[:n], arrays[n:]
        serve = _push if isinstance(f, Jvp) else _pull
        each = [tuple(t[i] for t in linear) for i in range(size)]
        rows = serve(f.of, primals, f.wrt, each, f.outs)
        return tuple(torch.stack(column) for column in zip(*rows, strict=True))

    def gradient(self, f: Function, primals: Tensors, wrt: Positions, out: int) -> Tensors:
        """Returns the outputs, then the gradients of output `out` in the inputs `wrt`.

        Raises: NotImplementedError as `jvp`, where a caller differentiates further."""
        return _gradient(f, primals, wrt, out)

    def check_vmap(self, f: Function, mapped: Sequence[bool]) -> None:
        """Raises NotImplementedError, naming the alternatives, for a derivative that `vmap` can't
        serve."""
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


def _shared(f: Function, mapped: Sequence[bool]) -> TypeGuard[Linearised]:
    """True where many tangents or cotangents belong to one point."""
    return isinstance(f, Linearised) and not any(mapped[: len(f.of.inputs)])


def _vjp(
    f: Function, primals: Tensors, wrt: Positions, cotangents: Tensors, outs: Positions
) -> Tensors:
    """A vjp by torch.autograd."""
    return _pull(f, primals, wrt, [cotangents], outs)[0]


def _gradient(f: Function, primals: Tensors, wrt: Positions, out: int) -> Tensors:
    """The outputs, then the gradients of output `out`, by torch.autograd."""
    keep = _requires_grad(*primals)
    with torch.enable_grad():
        xs, ys = _record(f, primals, wrt)
        if keep:
            _check_twice(f, primals, wrt, (out,), xs, ys)
        grads = _grad((ys[out],), xs, (torch.ones_like(ys[out]),), keep)
    return (*(ys if keep else [y.detach() for y in ys]), *grads)


def _push(
    f: Function, primals: Tensors, wrt: Positions, rows: Sequence[Tensors], outs: Positions
) -> list[Tensors]:
    """A jvp for each row of tangents, from one evaluation of `f`.

    The vjp is linear in its cotangents `us`; its derivative in these is the jvp."""
    keep = _requires_grad(*primals, *(t for row in rows for t in row))
    with torch.enable_grad():
        xs, ys = _record(f, primals, wrt)
        kernels.check_pushed([ys[o] for o in outs])
        if keep:
            _check_twice(f, primals, wrt, outs, xs, ys)
        # ones will do, as anything would: what is pulled is linear in them
        us = tuple(torch.ones_like(ys[o], requires_grad=True) for o in outs)
        pulled = _grad(tuple(ys[o] for o in outs), xs, us, True)
        return [_grad(pulled, us, row, keep, more=row is not rows[-1]) for row in rows]


def _pull(
    f: Function, primals: Tensors, wrt: Positions, rows: Sequence[Tensors], outs: Positions
) -> list[Tensors]:
    """A vjp for each row of cotangents, from one evaluation of `f`."""
    keep = _requires_grad(*primals, *(t for row in rows for t in row))
    with torch.enable_grad():
        xs, ys = _record(f, primals, wrt)
        if keep:
            _check_twice(f, primals, wrt, outs, xs, ys)
        ys = tuple(ys[o] for o in outs)
        return [_conj(_grad(ys, xs, _conj(row), keep, more=row is not rows[-1])) for row in rows]


def _restrict(
    f: Callable[..., Tensors], primals: Tensors, wrt: Positions, outs: Positions | None = None
) -> tuple[Callable[..., tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]:
    """`f` as a function of the inputs `wrt` alone, and these inputs.

    The function gives the outputs `outs`, or all of them if that is None."""

    def g(*xs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ys = f(*_replaced(primals, wrt, xs))
        return tuple(ys) if outs is None else tuple(ys[o] for o in outs)

    return g, tuple(primals[i] for i in wrt)


def _replaced(primals: Tensors, wrt: Positions, xs: Tensors) -> list[torch.Tensor]:
    """The primals with `xs` in the places `wrt`."""
    full = list(primals)
    for i, x in zip(wrt, xs, strict=True):
        full[i] = x
    return full


def _record(
    f: Callable[..., Tensors], primals: Tensors, wrt: Positions
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """One forward with a graph: the inputs `wrt` and all outputs.

    These inputs are fresh leaves where nobody differentiates further, else views inside the
    caller's graph."""
    xs = tuple(
        x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        for x in (primals[i] for i in wrt)
    )
    return xs, tuple(f(*_replaced(primals, wrt, xs)))


def _check_twice(
    f: Function, primals: Tensors, wrt: Positions, outs: Positions, xs: Tensors, ys: Tensors
) -> None:
    """Raises NotImplementedError where a kernel inside `f` would cut off a derivative of the
    derivative that is about to be taken."""

    def again() -> list[torch.Tensor]:
        there = dict(zip(wrt, kernels.moved(primals[i] for i in wrt)))
        moved = _record(f, [there.get(i, p) for i, p in enumerate(primals)], wrt)[1]
        return [moved[o] for o in outs]

    leaves = [x for x in xs if x.is_leaf]
    kernels.check_twice([ys[o] for o in outs], again, leaves)


def _grad(
    ys: Tensors, xs: Tensors, cotangents: Tensors, create_graph: bool, more: bool = False
) -> tuple[torch.Tensor, ...]:
    """torch.autograd.grad with zeros for what is not reached; each x carries a graph or is a leaf.

    `more` keeps the graph for another call."""
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


def _outermost(f: Function) -> bool:
    """True where the user's own call is differentiated, outside of every transform of torch.func."""
    return _is_base(f) and not _inside_torch_func()


def _inside_torch_func() -> bool:
    """True within a transform of torch.func. What it asks is private in torch 2.13."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _requires_grad(*tensors: torch.Tensor) -> bool:
    return any(t.requires_grad for t in tensors)


def _conj(tensors: Iterable[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The conjugates: torch's vjp is the conjugate transpose, the contract's is the plain one."""
    return tuple(t.conj() if t.is_complex() else t for t in tensors)


def _one_after_another(
    f: Function, mapped: Sequence[bool], size: int, arrays: Tensors
) -> tuple[torch.Tensor, ...]:
    """vmap by one call for each row."""
    if not size:
        return tuple(
            arrays[0].new_empty((0, *s.shape), dtype=getattr(torch, s.dtype)) for s in f.outputs
        )
    row = lambda i: [a[i] if m else a for a, m in zip(arrays, mapped, strict=True)]
    calls = [f(*row(i)) for i in range(size)]
    return tuple(torch.stack(column) for column in zip(*calls))
