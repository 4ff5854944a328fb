"""A call on foreign memory: read where it lies, outputs written in place, and no trace of it left
behind."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from operator import gt
from sys import getrefcount

import torch

from bridge.errors import message
from bridge.function import Function
from torch_side.calls import buffers, inference
from torch_side.calls.arrays import DTYPES


def run(fn: Function, given: tuple, into: tuple | None = None):
    """Run `fn` on foreign buffers: into given ones (zero-copy in, one write out), or giving fresh
    tensors.

    Raises ValueError if the user's code changed an input in place or kept a view of one after the
    call.
    """
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(
            False
        ):  # whose tensors have no versions, by which changes are seen, and no gradients
            return run(fn, buffers.normal(given), into and buffers.normal(into))
    tensors, outside = buffers.views(given, fn.inputs), torch.is_grad_enabled()
    before = _traces(tensors)
    buffers.set_grad_enabled(fn.engine.differentiates_inside)
    try:
        results = fn(*tensors)
        if into is None:
            results = [buffers.fresh(r) for r in results]
            buffers.finish(tensors)
        else:
            for r, b in zip(results, buffers.views(into, fn.outputs)):
                b.copy_(r.detach())
            results = r = None
    except RuntimeError as e:
        _explain(fn, e)
        raise
    finally:
        buffers.set_grad_enabled(outside)
    if _traces(tensors) != before:
        _accuse(fn, tensors, before)
    return results


def runner(fn: Function, ready: bool) -> Callable:
    """`run` into buffers, for a lane that calls often: nobody else holds a tensor over any of them.

    `ready` says that all are torch tensors of the dtypes of `fn`. What a call needs is looked up
    once, here, and what an input is like before it is known: so this costs half as much."""
    evaluate, inside = fn.evaluator, fn.engine.differentiates_inside
    is_inference, is_grad_enabled, set_grad_enabled = (
        torch.is_inference_mode_enabled,
        torch.is_grad_enabled,
        buffers.set_grad_enabled,
    )
    take, storage, holders = buffers.view, buffers.storage, buffers.holders
    inputs, outputs = ([DTYPES[s.dtype] for s in specs] for specs in (fn.inputs, fn.outputs))
    untouched = references = None  # traces of inputs before a call; how often Python refers to each

    def into_buffers(tensors, into):
        nonlocal untouched, references
        if is_inference():
            return run(fn, tensors, into)
        if not ready:
            tensors, into = [*map(take, tensors, inputs)], [*map(take, into, outputs)]
        if references is None:
            untouched = _traces(tensors)
            for t in tensors:
                references = getrefcount(t)
        outside = is_grad_enabled()
        if outside is not inside:
            set_grad_enabled(inside)
        try:
            results = evaluate(*tensors)
            for r, b in zip(results, into):
                b.copy_(r.detach() if inside and r.requires_grad else r)
        except RuntimeError as e:
            _explain(fn, e)
            raise
        finally:
            if outside is not inside:
                set_grad_enabled(outside)
        results = r = None
        for t in tensors:
            if (
                t._version
                or getrefcount(t) > references
                or t._use_count() > 1
                or holders(storage(t)) > 1
            ):
                t = None
                _accuse(fn, tensors, untouched)

    return into_buffers


def _traces(tensors) -> list[tuple]:
    """What a call must leave as it was, for each input."""
    return [_trace(t) for t in tensors]


def _trace(t) -> tuple:
    """How often a tensor was changed in place, and who holds it and its memory (Python, C++)."""
    storage = t.untyped_storage()
    return (
        t._version,
        getrefcount(t),
        t._use_count(),
        getrefcount(storage),
        buffers.holders(storage._cdata),
    )


# What torch says where torch.func (or vmap) meets code that it can't transform.
_REFUSALS = (
    "requires_grad",
    "functorch",
    "torch.func",
    "torch.jit",
    "vmap",
    "does not require grad",
    "setup_context",
    "forward AD",
    "batching rule",
)


def _explain(fn: Function, e: RuntimeError) -> None:
    """Where torch.func refuses the model, the error says what to ask for and which part is in the
    way."""
    if not isinstance(e, NotImplementedError) and any(
        r.lower() in str(e).lower() for r in _REFUSALS
    ):
        e.add_note(
            f"bridge: torch.func can't transform {fn.base}{_culprits(fn.base.call.target)}; "
            f"{fn.engine.alternative}"
        )


def _culprits(target) -> str:
    parts = target.named_modules() if isinstance(target, torch.nn.Module) else ()
    scripted = [name or "(itself)" for name, m in parts if isinstance(m, torch.jit.ScriptModule)]
    return f" (TorchScript parts: {', '.join(scripted[:3])})" if scripted else ""


# Seconds to wait, and the generation up to which garbage is collected then.
_PATIENCE = ((0, 0), (0.001, 2), (0.01, 0), (0.1, 0), (0.5, 0))


def _accuse(fn, tensors, before) -> None:
    """Name the input that was changed or kept.

    Before anyone is accused of keeping one, reference cycles are collected, and other threads get
    time to let go: XLA drops the inputs of a JAX function a moment after its outputs are ready.
    """
    for i, (now, then) in enumerate(zip(_traces(tensors), before)):
        if now[0] != then[0]:
            raise inference.changed(fn.base, _name(fn, i))
    for pause, oldest in _PATIENCE:
        time.sleep(pause)
        gc.collect(oldest)
        kept = [
            i
            for i, (now, then) in enumerate(zip(_traces(tensors), before))
            if any(map(gt, now, then))
        ]
        if not kept:
            return
    raise ValueError(
        message(
            f"{fn.base} to keep no view of its inputs after the call (their memory is JAX's and is "
            "freed)",
            f"input {_name(fn, kept[0])} still referenced",
            "store a .detach().clone() of it",
        )
    )


def _name(fn: Function, i: int) -> str:
    """Inputs of a transform begin with those of the base; what follows are tangents or
    cotangents."""
    return fn.base.names[0][i] if i < len(fn.base.inputs) else f"tangent {i - len(fn.base.inputs)}"
