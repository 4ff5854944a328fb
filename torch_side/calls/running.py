"""A call on foreign memory: read where it lies, outputs written in place, and no trace of it left
behind."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from operator import attrgetter, gt
from sys import getrefcount
from typing import Any

import torch

from bridge.errors import message
from bridge.function import Function
from torch_side.calls import buffers, inference, late, status
from torch_side.calls.arrays import DTYPES
from torch_side.calls.batching import TorchBase
from torch_side.calls.inference import TorchEngine


def run(
    fn: Function, given: Sequence[Any], into: Sequence[Any] | None = None
) -> list[torch.Tensor] | None:
    """Runs `fn` on foreign buffers, which are read where they lie.

    With `into` the outputs are written to these buffers, and the result is None. Without it the
    result is a list of fresh tensors, which nobody else holds.

    On a GPU, checks of values go into a status (torch_side.calls.status). With `into` nobody waits
    for it (torch_side.calls.late).

    Raises: ValueError if the user's code changed an input in place or kept a view of one after the
    call; on a GPU also what the status says, or that of an earlier call.
    """
    if torch.is_inference_mode_enabled():
        # Its tensors have no gradients, and no versions, by which changes are seen.
        with torch.inference_mode(False):
            return run(fn, buffers.normal(given), into and buffers.normal(into))
    tensors, outside = buffers.views(given, fn.inputs), torch.is_grad_enabled()
    before = _traces(tensors)
    found = status.Status(may_read=True) if buffers.runs_ahead(tensors) else None
    if found:
        late.check()
    buffers.set_grad_enabled(_engine(fn).differentiates_inside)
    try:
        with status.collecting(found) if found else nullcontext():
            results = fn(*tensors)
        if found:
            late.keep(found, str(fn.base))
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
    if found and into is None:
        late.check()  # the call has been waited for
    return results


def runner(fn: Function, ready: bool) -> Callable[[Sequence[Any], Sequence[Any]], None]:
    """Returns `run` into buffers, for a lane that calls often.

    Nobody else may hold a tensor over any of the buffers. `ready` says that all of them are torch
    tensors of the dtypes of `fn`. A call costs half as much as `run`, since what it needs is looked
    up once, here, and since it is known what an input is like before the call."""
    evaluate = fn.evaluator
    inside = _engine(fn).differentiates_inside
    is_inference = torch.is_inference_mode_enabled
    is_grad_enabled = torch.is_grad_enabled
    set_grad_enabled = buffers.set_grad_enabled
    take, storage = buffers.view, buffers.storage
    holders, owners = buffers.holders, buffers.owners
    inputs = [DTYPES[s.dtype] for s in fn.inputs]
    outputs = [DTYPES[s.dtype] for s in fn.outputs]
    # Both are known from the first call on. `references`, which says so, is set last, since several
    # threads may make that call.
    untouched: list[tuple] = []  # the traces of the inputs before a call
    references = 0  # how often Python refers to an input during a call

    def into_buffers(tensors: Sequence[Any], into: Sequence[Any]) -> None:
        nonlocal untouched, references
        if is_inference():
            run(fn, tensors, into)
            return
        if not ready:
            tensors, into = [*map(take, tensors, inputs)], [*map(take, into, outputs)]
        if not references:
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
                or owners(t) > 1
                or holders(storage(t)) > 1
            ):
                t = None
                _accuse(fn, tensors, untouched)

    return into_buffers


# The engine and the base of a Function of this bank, which the neutral contract does not know.
_engine: Callable[[Function], TorchEngine] = attrgetter("engine")
_base: Callable[[Function], TorchBase] = attrgetter("base")


def _traces(tensors: Sequence[torch.Tensor]) -> list[tuple]:
    """What a call must leave as it was, for each input."""
    return [_trace(t) for t in tensors]


def _trace(t: torch.Tensor) -> tuple:
    """How often a tensor was changed in place, and how many hold it and its memory in Python and in
    C++."""
    storage = t.untyped_storage()
    return (
        t._version,
        getrefcount(t),
        buffers.owners(t),
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
    """Adds to an error by which torch.func refuses the model: what to ask for instead, and which
    part of the model is in the way."""
    refusal = any(r.lower() in str(e).lower() for r in _REFUSALS)
    if refusal and not isinstance(e, NotImplementedError):
        base = _base(fn)
        e.add_note(
            f"bridge: torch.func can't transform {base}{_culprits(base.call.target)}; "
            f"{_engine(fn).alternative}"
        )


def _culprits(target: Any) -> str:
    """The parts of a module that are TorchScript, as text."""
    parts = target.named_modules() if isinstance(target, torch.nn.Module) else ()
    scripted = [name or "(itself)" for name, m in parts if isinstance(m, torch.jit.ScriptModule)]
    return f" (TorchScript parts: {', '.join(scripted[:3])})" if scripted else ""


# Seconds to wait, and the generation up to which garbage is collected then.
_PATIENCE = ((0, 0), (0.001, 2), (0.01, 0), (0.1, 0), (0.5, 0))


def _accuse(fn: Function, tensors: Sequence[torch.Tensor], before: Sequence[tuple]) -> None:
    """Raises ValueError naming the input that was changed or kept.

    Before anyone is accused of keeping an input, reference cycles are collected, and other threads
    get time to let go: XLA drops the inputs of a JAX function a moment after its outputs are ready.
    """
    for i, (now, then) in enumerate(zip(_traces(tensors), before)):
        if now[0] != then[0]:
            raise inference.changed(fn.base, input_name(fn, i))
    kept: list[int] = []
    for pause, oldest in _PATIENCE:
        time.sleep(pause)
        gc.collect(oldest)
        traces = zip(_traces(tensors), before)
        kept = [i for i, (now, then) in enumerate(traces) if any(map(gt, now, then))]
        if not kept:
            return
    raise ValueError(
        message(
            f"{fn.base} to keep no view of its inputs after the call (their memory is JAX's and is "
            "freed)",
            f"input {input_name(fn, kept[0])} still referenced",
            "store a .detach().clone() of it",
        )
    )


def input_name(fn: Function, i: int) -> str:
    """Returns the name of an input of a transform: those of the base come first, tangents or
    cotangents follow."""
    base = _base(fn)
    n = len(base.inputs)
    return base.names[0][i] if i < n else f"tangent {i - n}"
