"""A Function of the other bank as a torch function: autograd of any order, forward mode,
torch.func; without a graph, no cost of one."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.autograd import forward_ad

from bridge.errors import message
from bridge.function import Function, Jvp, Vjp
from torch_side.calls import numbers
from torch_side.calls.buffers import lent, taken

if TYPE_CHECKING:
    import torch._C._dynamo.eval_frame
    import torch._C._functorch

    from torch_side.calls.numbers import Foreign, Recorder

Tensors = Sequence[torch.Tensor]
F = TypeVar("F", bound=Callable)


def call(fn: Foreign, tensors: Tensors) -> Tensors:
    """Returns the outputs of a Function for tensors of exactly its input types.

    Where autograd, forward mode, torch.func or a tracer of torch is at work, it sees the call."""
    if not tensors:
        return run(fn, tensors)
    if _transformed() or forward_ad._current_level >= 0:
        return _transform(fn, tensors)
    if _traced():  # fake tensors, torch.export: they see one op of torch.library
        return numbers.call(fn, tensors)
    if _recorded():
        wrt = tuple([i for i, t in enumerate(tensors) if t.requires_grad])
        if wrt and fn.differentiable:
            return _apply(fn, Recording(fn.base.record(fn, wrt)), *tensors)
    return taken(fn.program(lent(tensors)))


def _transform(fn: Foreign, tensors: Tensors) -> Tensors:
    """A call under torch.func or forward mode."""
    try:
        return Bridged.apply(fn, None, *tensors)
    except RuntimeError as error:
        if "Functionalize rule" not in str(error):
            raise
        do = "call it outside of functionalize: it changes nothing in place, and has no operations of torch inside"
        raise NotImplementedError(
            message(
                f"{fn.base} under a transform that torch has rules for",
                "torch.func.functionalize",
                do,
            )
        ) from error


def run(fn: Function, tensors: Tensors) -> list[torch.Tensor]:
    """Returns the outputs, computed now and without a graph.

    Tensors that are dense and aligned are read where they lie, and no output is copied."""
    return taken(fn.program(lent(tensors)))


# What follows is private in torch 2.13.
_traced = torch._C._len_torch_dispatch_stack  # is a tracer at work (fake tensors, proxies)?
_transformed = torch._C._are_functorch_transforms_active  # is a transform of torch.func at work?
_recorded = torch.is_grad_enabled  # this one is public
# what is left of a tensor of torch.func once its transform has ended
_alive = torch._C._functorch.unwrap_if_dead
# is a tensor a batch of cotangents (is_grads_batched, vectorize=True)?
_rows = torch._C._functorch.is_legacy_batchedtensor


def under_a_tracer() -> bool:
    """Returns True where values can't be read: inside torch.compile, torch.export and torch.func,
    and with fake tensors."""
    return torch.compiler.is_compiling() or bool(_traced()) or _transformed()


def untraced(f: F) -> F:
    """Returns `f`, marked to run as it is where torch.compile meets it between its graphs.

    That holds for JAX's own frames in it too. What it uses is private in torch 2.13."""
    strategy = torch._C._dynamo.eval_frame
    skip = strategy._FrameAction.SKIP
    strategy.set_code_exec_strategy(f.__code__, strategy._FrameExecStrategy(skip, skip))
    return f


class Recording:
    """What a forward keeps for one backward through the pair of programs of its Function.

    `plan` is what the recorder is given back: (arrays of dtypes that only the other bank has, where
    each residual comes from). `kept` holds the residuals until autograd saves them."""

    plan: tuple[Any, Any]
    kept: list[torch.Tensor]

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def forward(self, tensors: Tensors) -> list[torch.Tensor]:
        """Runs the first program and returns the outputs."""
        outs, kept, self.plan = self.recorder.forward(lent(tensors))
        self.kept = taken(kept)
        return taken(outs)

    def to_save(self, outputs: Tensors) -> tuple[torch.Tensor, ...]:
        """Returns the tensors for save_for_backward, beside the inputs, and lets them go."""
        kept, self.kept = self.kept, []
        return (*(outputs[o] for o in self.plan[1].outputs), *kept)

    def backward(
        self,
        needed: tuple[int, ...],
        inputs: Tensors,
        saved: Tensors,
        cotangents: Sequence[torch.Tensor | None],
    ) -> list[torch.Tensor]:
        """Runs the second program and returns the gradients of the inputs `needed`.

        `saved` are the tensors that `to_save` gave. A cotangent may be None, which is zero."""
        n = len(self.plan[1].outputs)
        live = {o: c for o, c in enumerate(cotangents) if c is not None}
        read = dict(zip(live, lent(live.values())))
        outputs, kept = lent(saved[:n]), lent(saved[n:])
        return taken(self.recorder.backward(self.plan, needed, lent(inputs), outputs, kept, read))


class Bridged(torch.autograd.Function):
    """One torch Function for all Functions of the other bank.

    Each of its rules applies another Function that the first one gives. With a Recording, a
    backward that nobody differentiates further runs the second program of the pair. Every other
    backward applies the vjp, which evaluates anew. All tensors pass through save_for_backward, so
    that torch's version counters, saved tensor hooks (checkpoint, offloading) and freeing of graphs
    hold for them."""

    @staticmethod
    @untraced
    def forward(
        fn: Foreign, recording: Recording | None, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Returns the outputs; a Recording keeps what its backward needs."""
        if recording:
            return tuple(recording.forward(tensors))
        return tuple(numbers.call(fn, tensors) if _traced() else run(fn, tensors))

    @staticmethod
    @untraced
    def setup_context(ctx: Any, inputs: tuple, output: tuple[torch.Tensor, ...]) -> None:
        """Keeps the Function and the tensors that the other rules need."""
        fn, ctx.recording, *tensors = inputs
        # torch.compile keeps graphs of fake tensors, for ever
        ctx.fn = weakref.ref(fn) if _traced() else lambda: fn
        ctx.save_for_backward(*tensors, *(ctx.recording.to_save(output) if ctx.recording else ()))
        ctx.save_for_forward(*tensors)
        ctx.mark_non_differentiable(*(o for o, s in zip(output, fn.outputs) if not s.inexact))
        ctx.set_materialize_grads(False)

    @staticmethod
    @untraced
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Returns the gradients of the tensors, None for those that nobody needs."""
        fn = ctx.fn()
        n = len(fn.inputs)
        needed = tuple([i for i in range(n) if ctx.needs_input_grad[i + 2]])
        saved = ctx.saved_tensors
        result: list[torch.Tensor | None] = [None] * (n + 2)
        if all(c is None for c in cotangents):
            return tuple(result)
        last = ctx.recording and not _recorded() and not _transformed()
        if last and not any(c is not None and _rows(c) for c in cotangents):
            gradients = ctx.recording.backward(needed, saved[:n], saved[n:], cotangents)
        else:
            gradients = vjp(fn, needed, saved[:n], cotangents)
        for i, g in zip(needed, gradients, strict=True):
            result[i + 2] = g
        return tuple(result)

    @staticmethod
    @untraced
    def jvp(
        ctx: Any, _fn: None, _recording: None, *tangents: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        """Returns the tangents of the outputs, None for those that have no derivative."""
        fn = ctx.fn()
        wrt = tuple(i for i, t in enumerate(tangents) if t is not None)
        inexact = tuple(o for o, s in enumerate(fn.outputs) if s.inexact)
        primals = ctx.saved_tensors[: len(fn.inputs)]
        # torch's tangent of a float32 number times one of Python's is float64
        live = [t.to(p.dtype) for p, t in zip(primals, tangents, strict=True) if t is not None]
        pushed = nested(derived(fn, Jvp, wrt, inexact), (*primals, *live))
        dots = dict(zip(inexact, pushed, strict=True))
        return tuple(dots.get(o) for o in range(len(fn.outputs)))

    @staticmethod
    @untraced
    def vmap(
        info: Any, in_dims: tuple, fn: Foreign, _recording: None, *tensors: torch.Tensor
    ) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...]]:
        """Returns the outputs over a batch, and their batch axes, which are the first ones."""
        batched, moved = over_batch(fn, info.batch_size, in_dims[2:], tensors)
        return tuple(call(batched, moved)), (0,) * len(fn.outputs)


# What torch.autograd.Function.apply does once no transform of torch.func is active, without its
# look at the signature of `forward` (30 us). Private in torch 2.13; pyright does not see the base
# class of torch.autograd.Function, which has it.
_apply: Callable[..., tuple[torch.Tensor, ...]]
_apply = super(torch.autograd.Function, Bridged).apply  # pyright: ignore[reportAttributeAccessIssue]


def derived(fn: Foreign, kind: type[Jvp] | type[Vjp], *args: tuple[int, ...]) -> Foreign:
    """Returns kind(fn, *args), the same object each time."""
    key = kind, *args
    return fn.memo.get(key) or fn.memo.setdefault(key, kind(fn, *args))


def vjp(
    fn: Foreign,
    wrt: Sequence[int],
    primals: Tensors,
    cotangents: Sequence[torch.Tensor | None],
) -> list[torch.Tensor]:
    """Returns the gradients of the inputs `wrt` by torch's convention.

    That is the conjugate of the contract's convention. A cotangent may be None, which is zero."""
    live = {o: c.conj() for o, c in enumerate(cotangents) if c is not None}
    values = nested(derived(fn, Vjp, tuple(wrt), tuple(live)), (*primals, *live.values()))
    return [v.conj_physical() for v in values]


def nested(fn: Foreign, tensors: Tensors) -> Tensors:
    """Returns what `call` gives, for the tensors that a rule of Bridged is given.

    These may be what no user passes: tensors of a transform that has ended, or a batch of
    cotangents."""
    if not _transformed():
        tensors = [*map(_alive, tensors)]
        if any(map(_rows, tensors)):
            return over_rows(fn, tensors)
    return call(fn, tensors)


def over_rows(fn: Foreign, tensors: Tensors, level: int | None = None) -> Tensors:
    """Returns what `call` gives for tensors of torch's first vmap.

    is_grads_batched and vectorize=True still use that one. `level` is how deep in it the call is;
    None finds that out."""
    if level is None:
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
    if not any(map(_rows, tensors)):
        return call(fn, tensors)
    # an axis of size 1 where there was none
    tensors = [_remove_batch_dim(t, level, 1, 0) for t in tensors]
    size = max(t.shape[0] for t in tensors)
    mapped = tuple(t.shape[0] == size > 1 for t in tensors)
    tensors = [t if m else t[0] for t, m in zip(tensors, mapped, strict=True)]
    if size == 1:
        return over_rows(fn, tensors, level - 1)
    outs = over_rows(_batched(fn, mapped, size), tensors, level - 1)
    return [_add_batch_dim(o, 0, level) for o in outs]


# Private in torch 2.13: an axis becomes a level of torch's first vmap, and an axis again.
_add_batch_dim = torch._VF._add_batch_dim
_remove_batch_dim = torch._VF._remove_batch_dim


def _batched(fn: Foreign, mapped: tuple[bool, ...], size: int) -> Foreign:
    """fn.vmap(mapped, size), the same object each time."""
    key = "vmap", mapped, size
    return fn.memo.get(key) or fn.memo.setdefault(key, fn.vmap(mapped, size))


def over_batch(
    fn: Foreign, size: int, dims: Sequence[int | None], tensors: Tensors
) -> tuple[Foreign, list[torch.Tensor]]:
    """Returns the Function over a leading batch axis, and its inputs.

    `dims` are the batch axes of the tensors, None for a tensor without one."""
    mapped = tuple(d is not None for d in dims)
    moved = [t if d is None else t.movedim(d, 0) for t, d in zip(tensors, dims, strict=True)]
    return _batched(fn, mapped, size), moved
