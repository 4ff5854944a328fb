"""A Function of the other bank as a torch function: autograd of any order, forward mode, torch.func; without a graph, no cost of one."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

from bridge.function import Function, Jvp, Vjp
from torch_side import library
from torch_side.buffers import lent, taken


def call(fn: Function, tensors):
    """Apply a Function to tensors of exactly its input types; gives a list or tuple of tensors."""
    if _traced() or not tensors:  # fake tensors, torch.export: they see one op of torch.library
        return library.call(fn, tensors) if tensors else run(fn, tensors)
    if _transformed() or forward_ad._current_level >= 0:
        return Bridged.apply(fn, None, *tensors)
    if _recorded():
        wrt = tuple([i for i, t in enumerate(tensors) if t.requires_grad])
        if wrt and fn.differentiable:
            return _apply(fn, Recording(fn.base.record(fn, wrt), wrt), *tensors)
    return taken(fn.program(lent(tensors)))


def run(fn: Function, tensors) -> list:
    """Now, without a graph: zero-copy in and out where tensors are dense and aligned."""
    return taken(fn.program(lent(tensors)))


# Private in torch 2.13: is a tracer of torch at work (fake tensors, proxies), or a transform of torch.func?
_traced = torch._C._len_torch_dispatch_stack
_transformed = torch._C._are_functorch_transforms_active
_recorded = torch.is_grad_enabled


class Recording:
    """What a forward keeps for one backward: the gradients of a scalar, else residuals for the second program of a pair."""

    def __init__(self, recorder, wrt):
        self.recorder, self.wrt = recorder, wrt

    def forward(self, tensors) -> list:
        outs, kept, self.plan = self.recorder.forward(lent(tensors))
        self.kept = taken(kept)
        return taken(outs)

    def to_save(self, outputs) -> tuple:
        """Tensors for save_for_backward, beside the inputs."""
        kept, self.kept = self.kept, None
        return (*(outputs[o] for o in self.plan.outputs), *kept) if self.plan else tuple(kept)

    def backward(self, needed, inputs, saved, cotangents) -> list:
        if self.plan is None:
            gradients = dict(zip(self.wrt, saved))
            return [gradients[i] * cotangents[self.recorder.out].to(gradients[i].dtype) for i in needed]
        n = len(self.plan.outputs)
        live = [o for o, c in enumerate(cotangents) if c is not None]
        cotangents = dict(zip(live, lent([cotangents[o] for o in live])))
        return taken(self.recorder.backward(self.plan, needed, *map(lent, (inputs, saved[:n], saved[n:])), cotangents))


class Bridged(torch.autograd.Function):
    """One for all Functions: each rule applies another Function that the first one gives.

    With a Recording, a backward that nobody differentiates further runs the second program of the pair; every other one
    applies the vjp, which evaluates anew. All tensors pass through save_for_backward: torch's version counters, saved tensor
    hooks (checkpoint, offloading) and its freeing of graphs hold for them."""

    @staticmethod
    def forward(fn, recording, *tensors):
        return tuple(recording.forward(tensors) if recording else run(fn, tensors))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.fn, ctx.recording, *tensors = inputs
        ctx.save_for_backward(*tensors, *(ctx.recording.to_save(output) if ctx.recording else ()))
        ctx.save_for_forward(*tensors)
        ctx.mark_non_differentiable(*(o for o, s in zip(output, ctx.fn.outputs) if not s.inexact))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *cotangents):
        fn, n = ctx.fn, len(ctx.fn.inputs)
        needed = tuple([i for i in range(n) if ctx.needs_input_grad[i + 2]])
        saved, result = ctx.saved_tensors, [None] * (n + 2)
        if all(c is None for c in cotangents):
            return tuple(result)
        if ctx.recording and not _recorded() and not _transformed():
            gradients = ctx.recording.backward(needed, saved[:n], saved[n:], cotangents)
        else:
            gradients = vjp(fn, needed, saved[:n], cotangents, call)
        for i, g in zip(needed, gradients, strict=True):
            result[i + 2] = g
        return tuple(result)

    @staticmethod
    def jvp(ctx, _fn, _recording, *tangents):
        fn = ctx.fn
        wrt = tuple(i for i, t in enumerate(tangents) if t is not None)
        inexact = tuple(o for o, s in enumerate(fn.outputs) if s.inexact)
        dots = call(derived(fn, Jvp, wrt, inexact), (*ctx.saved_tensors[: len(fn.inputs)], *(tangents[i] for i in wrt)))
        dots = dict(zip(inexact, dots, strict=True))
        return tuple(dots.get(o) for o in range(len(fn.outputs)))

    @staticmethod
    def vmap(info, in_dims, fn, _recording, *tensors):
        batched, tensors = over_batch(fn, info.batch_size, in_dims[2:], tensors)
        return tuple(call(batched, tensors)), (0,) * len(fn.outputs)


# What torch.autograd.Function.apply does once no transform of torch.func is active, without its look at the signature of
# `forward` (30 us). Private in torch 2.13.
_apply = super(torch.autograd.Function, Bridged).apply


def derived(fn: Function, kind: type, *args) -> Function:
    """kind(fn, *args), the same one each time."""
    key = kind, *args
    return fn.memo.get(key) or fn.memo.setdefault(key, kind(fn, *args))


def vjp(fn: Function, wrt, primals, cotangents, call) -> list:
    """Gradients of the inputs `wrt` by torch's convention, the conjugate of the contract's."""
    outs = tuple(o for o, c in enumerate(cotangents) if c is not None)
    values = call(derived(fn, Vjp, tuple(wrt), outs), (*primals, *(cotangents[o].conj() for o in outs)))
    return [v.conj() for v in values]


def over_batch(fn: Function, size: int, dims, tensors):
    """(the Function over a leading batch axis, its inputs)."""
    mapped = tuple(d is not None for d in dims)
    tensors = [t.movedim(d, 0) if m else t for t, d, m in zip(tensors, dims, mapped, strict=True)]
    key = "vmap", mapped, size
    return fn.memo.get(key) or fn.memo.setdefault(key, fn.vmap(mapped, size)), tensors
