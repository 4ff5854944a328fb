"""A torch callable as a Function: its shapes by fake tensors, its run into given buffers, and what a call must not do."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from bridge.errors import message
from bridge.function import Derived, Engine, Function, Spec
from torch_side import buffers

RANDOM_IN_TRAINING = (
    torch.nn.modules.dropout._DropoutNd,
    torch.nn.modules.batchnorm._BatchNorm,
    torch.nn.RReLU,
)


@dataclass(frozen=True)
class Call:
    """How a flat list of tensors becomes a call of the user's callable: `tree.unflatten` and `flatten` are the caller's
    pytree library, `static` holds (position, type, value) of the leaves that are no arrays."""

    target: Callable
    tree: Any
    static: tuple[tuple[int, type, Any], ...]
    flatten: Callable = field(compare=False)

    @property
    def name(self) -> str:
        return getattr(self.target, "__qualname__", type(self.target).__name__)

    def __call__(self, tensors):
        """-> (output leaves, output tree)."""
        if self.static:
            tensors = list(tensors)
            for position, _, value in self.static:
                tensors.insert(position, value)
        args, kwargs = self.tree.unflatten(tensors)
        return self.flatten(self.target(*args, **kwargs))


@dataclass(frozen=True)
class TorchFunction(Function):
    """The base Function of this bank. `axes` is None, or for a model that batches natively (input axes, output axis)."""

    call: Call
    inputs: tuple[Spec, ...]
    outputs: tuple[Spec, ...]
    engine: Engine
    axes: tuple[tuple[int | None, ...], int] | None
    out_tree: Any = field(compare=False)
    names: tuple[tuple[str, ...], tuple[str, ...]] = field(compare=False)

    native = property(lambda self: self.axes is not None)

    def __str__(self):
        return self.call.name

    tensor_type = torch.Tensor
    on_stream = staticmethod(buffers.on_stream)

    def input_name(self, i):
        return self.names[0][i]

    def __call__(self, *tensors):
        return self.checked(tensors, self.outputs, self._expected)

    @cached_property
    def _expected(self) -> tuple:
        return buffers.kinds(self.outputs)

    def checked(self, tensors, specs: tuple[Spec, ...], expected: tuple) -> list:
        """Call the user's code; its outputs must be what was inferred or declared."""
        leaves, tree = self.call(tensors)
        if tree != self.out_tree:
            raise TypeError(message(f"outputs {self.out_tree} of {self}", f"{tree}", _SHAPES_ONCE))
        for leaf, (shape, dtype) in zip(leaves, expected):
            if not isinstance(leaf, torch.Tensor) or leaf.shape != shape or leaf.dtype is not dtype or leaf.is_sparse:
                self._refuse(leaves, specs)
        return leaves

    def _refuse(self, leaves, specs) -> None:
        """Say which output is not what JAX was told."""
        for leaf, want, name in zip(leaves, specs, self.names[1]):
            check_output(leaf, f"output {name} of {self}")
            if (got := buffers.spec_of(leaf)) != want:
                raise ValueError(message(f"output {name} of {self} as {want}", str(got), _SHAPES_ONCE))

    def must_map(self, mapped):
        if not self.native:
            return mapped
        for i, (m, axis) in enumerate(zip(mapped, self.axes[0], strict=True)):
            if m and axis is None:
                raise NotImplementedError(
                    message(f"vmap over the inputs named in batched= of {self} only", f"input {self.names[0][i]}", "name its axis in batched={...}")
                )
        return tuple(axis is not None for axis in self.axes[0])

    def vmap(self, mapped, size):
        return NativeBatch(self, mapped, (size,)) if self.native else super().vmap(mapped, size)


_SHAPES_ONCE = "shapes and dtypes are fixed when JAX traces: return the same kind for the same input shapes, or declare outputs="


@dataclass(frozen=True)
class NativeBatch(Derived):
    """A model that takes a batch itself: several vmapped axes travel as one, at the axis that the user named."""

    mapped: tuple[bool, ...]
    sizes: tuple[int, ...]

    @property
    def inputs(self):
        lead = self.sizes
        return tuple(Spec((*lead, *s.shape), s.dtype) if m else s for s, m in zip(self.of.inputs, self.mapped, strict=True))

    @property
    def outputs(self):
        return tuple(Spec((*self.sizes, *s.shape), s.dtype) for s in self.of.outputs)

    def __call__(self, *tensors):
        axes, out_axis = self.of.axes
        n = len(self.sizes)
        flat = [t.flatten(0, n - 1).movedim(0, a) if m else t for t, m, a in zip(tensors, self.mapped, axes, strict=True)]
        size = torch.Size(self.sizes).numel()
        specs = tuple(_at(s, size, out_axis) for s in self.of.outputs)
        outs = self.of.checked(flat, specs, buffers.kinds(specs))
        return tuple(t.movedim(out_axis, 0).unflatten(0, self.sizes) for t in outs)

    def must_map(self, mapped):
        return self.of.must_map(mapped)

    def vmap(self, mapped, size):
        return NativeBatch(self.of, mapped, (size, *self.sizes))

    def gradient(self, wrt):
        """One backward of the sum: row b of a native batch depends on example b alone (the user's word)."""
        return self.of.gradient(wrt) and _gradient(self, wrt)


def _gradient(fn: Function, wrt):
    from bridge.function import Gradient

    return Gradient(fn, wrt, next(i for i, s in enumerate(fn.outputs) if s.inexact))


def _at(s: Spec, size: int, axis: int) -> Spec:
    shape = list(s.shape)
    shape.insert(axis if axis >= 0 else len(shape) + 1 + axis, size)
    return Spec(tuple(shape), s.dtype)


def check_output(leaf, what: str) -> None:
    """An output must be a dense torch.Tensor."""
    if not isinstance(leaf, torch.Tensor):
        raise TypeError(message(f"{what} as a torch.Tensor", f"{type(leaf).__name__} {leaf!r:.60}", "return torch.as_tensor(...) of it, or drop it"))
    if leaf.layout != torch.strided:
        raise TypeError(message(f"{what} as a dense tensor", f"layout {leaf.layout}", "return it .to_dense()"))


def check_mode(target) -> None:
    """A module in training mode whose layers draw random numbers or change their buffers is no function."""
    owner = target if isinstance(target, torch.nn.Module) else getattr(target, "__self__", None)
    for name, m in owner.named_modules() if isinstance(owner, torch.nn.Module) else ():
        if m.training and isinstance(m, RANDOM_IN_TRAINING) and getattr(m, "p", 1.0) != 0.0:
            raise ValueError(
                message(
                    f"{type(owner).__name__} in evaluation mode",
                    f"layer {name or '(itself)'!s} ({type(m).__name__}) in training mode, whose result is random or depends on earlier calls",
                    "call .eval() on it first",
                )
            )


def infer(call: Call, inputs: tuple[Spec, ...], engine: Engine):
    """Output types and tree of a call, found without running it."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

    check_mode(call.target)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.set_grad_enabled(engine.differentiates_inside):
            leaves, tree = call([torch.empty(s.shape, dtype=buffers.DTYPES[s.dtype], device=_device(call.target)) for s in inputs])
    except (DataDependentOutputException, DynamicOutputShapeException) as e:
        raise ValueError(message(f"output shapes of {call.name} that depend on input shapes alone", "a data-dependent operation", _DECLARE)) from e
    except Exception as e:
        e.add_note(f"bridge: while running {call.name} on fake tensors to find its output shapes; if it needs real values, {_DECLARE}")
        raise
    for i, leaf in enumerate(leaves):
        check_output(leaf, f"output {i} of {call.name}")
    _check_no_fake_kept(call.target)
    return tuple(map(buffers.spec_of, leaves)), tree


_DECLARE = "declare outputs= (a pytree of jax.ShapeDtypeStruct, or a function of the inputs' that returns it)"


def _device(target):
    tensors = target.parameters() if isinstance(target, torch.nn.Module) else ()
    return next((t.device for t in tensors), torch.device("cpu"))


def _check_no_fake_kept(target) -> None:
    """A module that stored a fake tensor (a cache, say) would fail in its first real call."""
    from torch._subclasses.fake_tensor import FakeTensor

    for name, m in target.named_modules() if isinstance(target, torch.nn.Module) else ():
        for key, value in vars(m).items():
            if isinstance(value, FakeTensor):
                setattr(m, key, None)
                raise ValueError(message(f"a module that keeps no tensor of a call in shape inference", f"attribute {name}.{key}".replace(" .", " "), _DECLARE))


def run(fn: Function, given: tuple, into: tuple | None = None):
    """Run `fn` on foreign buffers: into given ones (zero-copy in, one write out), or giving fresh tensors.

    Raises ValueError if the user's code changed an input in place or kept a view of one after the call.
    """
    tensors = buffers.views(given, fn.inputs)
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
        else:
            for r, b in zip(results, buffers.views(into, fn.outputs)):
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
        if isinstance(e, NotImplementedError) or not any(r in str(e) for r in _REFUSALS):
            raise
        e.add_note(f"bridge: torch.func can't transform {fn.base}{_culprits(fn.base.call.target)}; {fn.engine.alternative}")
        raise


def _culprits(target) -> str:
    parts = target.named_modules() if isinstance(target, torch.nn.Module) else ()
    scripted = [name or "(itself)" for name, m in parts if isinstance(m, torch.jit.ScriptModule)]
    return f" (TorchScript parts: {', '.join(scripted[:3])})" if scripted else ""


def _accuse(fn, before) -> None:
    """Name the input that was changed or kept; reference cycles are collected before anyone is accused of keeping."""
    for i, (t, version, *_) in enumerate(before):
        if t._version != version:
            raise ValueError(message(f"{fn.base} to leave its inputs as they are", f"input {_name(fn, i)} changed in place, and with it the caller's array", "use out-of-place operations, or clone the input first"))
    for young in (0, 2):
        gc.collect(young)
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


TorchFunction.run = staticmethod(run)


def _name(fn: Function, i: int) -> str:
    """Inputs of a transform begin with those of the base; what follows are tangents or cotangents."""
    return fn.base.names[0][i] if i < len(fn.base.inputs) else f"tangent {i - len(fn.base.inputs)}"
