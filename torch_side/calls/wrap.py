"""A Function of the other bank as a torch function: autograd of any order, forward mode,
torch.func; without a graph, no cost of one."""

from __future__ import annotations

import weakref

import torch
from torch.autograd import forward_ad

from bridge.errors import message
from bridge.function import Function, Jvp, Vjp
from torch_side.calls import numbers
from torch_side.calls.buffers import lent, taken


def call(fn: Function, tensors):
    """Apply a Function to tensors of exactly its input types; gives a list or tuple of tensors."""
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


def _transform(fn, tensors):
    """Under torch.func, or forward mode."""
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


def run(fn: Function, tensors) -> list:
    """Now, without a graph: zero-copy in and out where tensors are dense and aligned."""
    return taken(fn.program(lent(tensors)))


# Private in torch 2.13: is a tracer of torch at work (fake tensors, proxies), or a transform of
# torch.func? What is left of a tensor of torch.func once its transform has ended; a batch of
# cotangents (is_grads_batched, vectorize=True).
_traced = torch._C._len_torch_dispatch_stack
_transformed = torch._C._are_functorch_transforms_active
_recorded = torch.is_grad_enabled
_alive = torch._C._functorch.unwrap_if_dead
_rows = torch._C._functorch.is_legacy_batchedtensor


def under_a_tracer() -> bool:
    """True inside torch.compile, torch.export, torch.func and with fake tensors, where values can't
    be read."""
    return torch.compiler.is_compiling() or bool(_traced()) or _transformed()


def untraced(f):
    """f, which runs as it is (JAX's own frames in it too) where torch.compile meets it between its
    graphs. Private in torch 2.13."""
    strategy, skip = torch._C._dynamo.eval_frame, torch._C._dynamo.eval_frame._FrameAction.SKIP
    strategy.set_code_exec_strategy(f.__code__, strategy._FrameExecStrategy(skip, skip))
    return f


class Recording:
    """What a forward keeps for one backward through the pair of programs of its Function."""

    def __init__(self, recorder):
        self.recorder = recorder

    def forward(self, tensors) -> list:
        outs, kept, self.plan = self.recorder.forward(lent(tensors))
        self.kept = taken(kept)
        return taken(outs)

    def to_save(self, outputs) -> tuple:
        """Tensors for save_for_backward, beside the inputs."""
        kept, self.kept = self.kept, None
        return (*(outputs[o] for o in self.plan[1].outputs), *kept)

    def backward(self, needed, inputs, saved, cotangents) -> list:
        n = len(self.plan[1].outputs)
        live = [o for o, c in enumerate(cotangents) if c is not None]
        cotangents = dict(zip(live, lent([cotangents[o] for o in live])))
        return taken(
            self.recorder.backward(
                self.plan, needed, *map(lent, (inputs, saved[:n], saved[n:])), cotangents
            )
        )


class Bridged(torch.autograd.Function):
    """One for all Functions: each rule applies another Function that the first one gives.

    With a Recording, a backward that nobody differentiates further runs the second program of the
    pair; every other one applies the vjp, which evaluates anew. All tensors pass through
    save_for_backward: torch's version counters, saved tensor hooks (checkpoint, offloading) and its
    freeing of graphs hold for them."""

    @staticmethod
    @untraced
    def forward(fn, recording, *tensors):
        return tuple(
            recording.forward(tensors)
            if recording
            else numbers.call(fn, tensors)
            if _traced()
            else run(fn, tensors)
        )

    @staticmethod
    @untraced
    def setup_context(ctx, inputs, output):
        fn, ctx.recording, *tensors = inputs
        # torch.compile keeps graphs of fake tensors, for ever
        ctx.fn = weakref.ref(fn) if _traced() else lambda: fn
        ctx.save_for_backward(*tensors, *(ctx.recording.to_save(output) if ctx.recording else ()))
        ctx.save_for_forward(*tensors)
        ctx.mark_non_differentiable(*(o for o, s in zip(output, fn.outputs) if not s.inexact))
        ctx.set_materialize_grads(False)

    @staticmethod
    @untraced
    def backward(ctx, *cotangents):
        fn = ctx.fn()
        n = len(fn.inputs)
        needed = tuple([i for i in range(n) if ctx.needs_input_grad[i + 2]])
        saved, result = ctx.saved_tensors, [None] * (n + 2)
        if all(c is None for c in cotangents):
            return tuple(result)
        if (
            ctx.recording
            and not _recorded()
            and not _transformed()
            and not any(c is not None and _rows(c) for c in cotangents)
        ):
            gradients = ctx.recording.backward(needed, saved[:n], saved[n:], cotangents)
        else:
            gradients = vjp(fn, needed, saved[:n], cotangents)
        for i, g in zip(needed, gradients, strict=True):
            result[i + 2] = g
        return tuple(result)

    @staticmethod
    @untraced
    def jvp(ctx, _fn, _recording, *tangents):
        fn = ctx.fn()
        wrt = tuple(i for i, t in enumerate(tangents) if t is not None)
        inexact = tuple(o for o, s in enumerate(fn.outputs) if s.inexact)
        dots = nested(
            derived(fn, Jvp, wrt, inexact),
            (*ctx.saved_tensors[: len(fn.inputs)], *(tangents[i] for i in wrt)),
        )
        dots = dict(zip(inexact, dots, strict=True))
        return tuple(dots.get(o) for o in range(len(fn.outputs)))

    @staticmethod
    @untraced
    def vmap(info, in_dims, fn, _recording, *tensors):
        batched, tensors = over_batch(fn, info.batch_size, in_dims[2:], tensors)
        return tuple(call(batched, tensors)), (0,) * len(fn.outputs)


# What torch.autograd.Function.apply does once no transform of torch.func is active, without its
# look at the signature of `forward` (30 us). Private in torch 2.13.
_apply = super(torch.autograd.Function, Bridged).apply


def derived(fn: Function, kind: type, *args) -> Function:
    """kind(fn, *args), the same one each time."""
    key = kind, *args
    return fn.memo.get(key) or fn.memo.setdefault(key, kind(fn, *args))


def vjp(fn: Function, wrt, primals, cotangents) -> list:
    """Gradients of the inputs `wrt` by torch's convention, the conjugate of the contract's."""
    outs = tuple(o for o, c in enumerate(cotangents) if c is not None)
    values = nested(
        derived(fn, Vjp, tuple(wrt), outs), (*primals, *(cotangents[o].conj() for o in outs))
    )
    return [v.conj_physical() for v in values]


def nested(fn: Function, tensors):
    """`call` by a rule, whose tensors may be what no user passes: of a transform that has ended, or
    a batch of cotangents."""
    if not _transformed():
        tensors = [*map(_alive, tensors)]
        if any(map(_rows, tensors)):
            return over_rows(fn, tensors)
    return call(fn, tensors)


def over_rows(fn: Function, tensors, level=None) -> list:
    """A call on the tensors of torch's first vmap, which is_grads_batched and vectorize=True still
    use."""
    if level is None:
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
    if not any(map(_rows, tensors)):
        return call(fn, tensors)
    # an axis of size 1 where there was none
    tensors = [torch._remove_batch_dim(t, level, 1, 0) for t in tensors]
    size = max(t.shape[0] for t in tensors)
    mapped = tuple(t.shape[0] == size > 1 for t in tensors)
    tensors = [t if m else t[0] for t, m in zip(tensors, mapped, strict=True)]
    if size == 1:
        return over_rows(fn, tensors, level - 1)
    return [
        torch._add_batch_dim(o, 0, level)
        for o in over_rows(_batched(fn, mapped, size), tensors, level - 1)
    ]


def _batched(fn: Function, mapped, size) -> Function:
    key = "vmap", mapped, size
    return fn.memo.get(key) or fn.memo.setdefault(key, fn.vmap(mapped, size))


def over_batch(fn: Function, size: int, dims, tensors):
    """(the Function over a leading batch axis, its inputs)."""
    mapped = tuple(d is not None for d in dims)
    tensors = [t.movedim(d, 0) if m else t for t, d, m in zip(tensors, dims, mapped, strict=True)]
    return _batched(fn, mapped, size), tensors
