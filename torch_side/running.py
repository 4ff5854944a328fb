"""A call on foreign memory: read where it lies, outputs written in place, and no trace of it left behind."""

from __future__ import annotations

import gc
import time

import torch

from bridge.errors import message
from bridge.function import Function
from torch_side import buffers, inference


def run(fn: Function, given: tuple, into: tuple | None = None):
    """Run `fn` on foreign buffers: into given ones (zero-copy in, one write out), or giving fresh tensors.

    Raises ValueError if the user's code changed an input in place or kept a view of one after the call.
    """
    if not torch.is_inference_mode_enabled():
        return _run(fn, given, into)
    with torch.inference_mode(False):  # whose tensors have no versions, by which changes are seen, and no gradients
        return _run(fn, buffers.normal(given), into and buffers.normal(into))


def _run(fn: Function, given: tuple, into: tuple | None):
    direct = into and fn.plain and type(into[0]) is torch.Tensor  # the ffi lane: all are tensors of their dtypes
    tensors = given if direct else buffers.views(given, fn.inputs)
    aliases, before = [], []
    for t in tensors:
        storage = t.untyped_storage()
        before.append((t, t._version, storage, buffers.holders(storage._cdata)))
        aliases.append(t.detach())  # the callee's own, so that any owner of one shows in the holders of the memory
    grad = torch.is_grad_enabled()
    buffers.set_grad_enabled(fn.engine.differentiates_inside)
    try:
        results = _transformed(fn, aliases)
        if into is None:
            results = [buffers.fresh(r) for r in results]
            buffers.finish(tensors)
        else:
            for r, b in zip(results, into if direct else buffers.views(into, fn.outputs)):
                b.copy_(r.detach() if r.requires_grad else r)
            results = None
    finally:
        buffers.set_grad_enabled(grad)
    r = aliases = None
    for t, version, storage, holders in before:
        if t._version != version or buffers.holders(storage._cdata) > holders:
            _accuse(fn, before)
    return results


# What torch says where torch.func (or vmap) meets code that it can't transform.
_REFUSALS = ("requires_grad", "functorch", "torch.func", "torch.jit", "vmap", "does not require grad", "setup_context", "forward AD", "batching rule")


def _transformed(fn: Function, tensors):
    """fn(*tensors); where torch.func refuses the model, the error says what to ask for and which part is in the way."""
    try:
        return fn(*tensors)
    except RuntimeError as e:
        if isinstance(e, NotImplementedError) or not any(r.lower() in str(e).lower() for r in _REFUSALS):
            raise
        e.add_note(f"bridge: torch.func can't transform {fn.base}{_culprits(fn.base.call.target)}; {fn.engine.alternative}")
        raise


def _culprits(target) -> str:
    parts = target.named_modules() if isinstance(target, torch.nn.Module) else ()
    scripted = [name or "(itself)" for name, m in parts if isinstance(m, torch.jit.ScriptModule)]
    return f" (TorchScript parts: {', '.join(scripted[:3])})" if scripted else ""


# Seconds to wait, and the generation up to which garbage is collected then.
_PATIENCE = ((0, 0), (0.001, 2), (0.01, 0), (0.1, 0), (0.5, 0))


def _accuse(fn, before) -> None:
    """Name the input that was changed or kept.

    Before anyone is accused of keeping one, reference cycles are collected, and other threads get time
    to let go: XLA drops the inputs of a JAX function a moment after its outputs are ready.
    """
    for i, (t, version, *_) in enumerate(before):
        if t._version != version:
            raise inference.changed(fn.base, _name(fn, i))
    for pause, oldest in _PATIENCE:
        time.sleep(pause)
        gc.collect(oldest)
        kept = [i for i, (*_, storage, holders) in enumerate(before) if buffers.holders(storage._cdata) > holders]
        if not kept:
            return
    raise ValueError(
        message(
            f"{fn.base} to keep no view of its inputs after the call (their memory is JAX's and is freed)",
            f"input {_name(fn, kept[0])} still referenced",
            "store a .detach().clone() of it",
        )
    )


def _name(fn: Function, i: int) -> str:
    """Inputs of a transform begin with those of the base; what follows are tangents or cotangents."""
    return fn.base.names[0][i] if i < len(fn.base.inputs) else f"tangent {i - len(fn.base.inputs)}"
