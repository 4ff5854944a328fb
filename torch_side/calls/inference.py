"""What is known of a torch callable before it runs: the types of its outputs, and whether it is a
function at all."""

from __future__ import annotations

import sys
import threading
from contextlib import contextmanager
from functools import partial

import torch

from bridge.errors import message
from bridge.function import Engine, Spec
from torch_side.calls import buffers

KNOWN = frozenset(buffers.DTYPES.values())
RANDOM_IN_TRAINING = (
    torch.nn.modules.dropout._DropoutNd,
    torch.nn.modules.batchnorm._BatchNorm,
    torch.nn.RReLU,
)


def check_output(leaf, what: str) -> None:
    """An output must be a dense torch.Tensor."""
    if not isinstance(leaf, torch.Tensor):
        raise TypeError(
            message(
                f"{what} as a torch.Tensor",
                f"{type(leaf).__name__} {leaf!r:.60}",
                "return torch.as_tensor(...) of it, or drop it",
            )
        )
    if leaf.dtype not in KNOWN:
        do = f"cast it to one of {', '.join(buffers.DTYPES)}"
        raise TypeError(
            message(
                f"{what} in a dtype that both sides know",
                f"{leaf.dtype}, which only torch knows",
                do,
            )
        )
    if leaf.layout != torch.strided:
        raise TypeError(
            message(f"{what} as a dense tensor", f"layout {leaf.layout}", "return it .to_dense()")
        )


def check_mode(target) -> None:
    """A module in training mode whose layers draw random numbers or change their buffers is no
    function."""
    owner = target if isinstance(target, torch.nn.Module) else getattr(target, "__self__", None)
    for name, m in owner.named_modules() if isinstance(owner, torch.nn.Module) else ():
        if m.training and isinstance(m, RANDOM_IN_TRAINING) and getattr(m, "p", 1.0) != 0.0:
            raise ValueError(
                message(
                    f"{type(owner).__name__} in evaluation mode",
                    f"layer {name or '(itself)'!s} ({type(m).__name__}) in training mode, whose "
                    "result is random or depends on earlier calls",
                    "call .eval() on it first",
                )
            )


def infer(call, inputs: tuple[Spec, ...], names: tuple[str, ...], engine: Engine):
    """Output types and tree of an export.Call, found without running it."""
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
    )

    check_mode(call.target)
    try:
        with fake(), torch.set_grad_enabled(engine.differentiates_inside):
            leaves, tree = on_some_device(call, inputs, partial(_unchanged, call, names))
    except (DataDependentOutputException, DynamicOutputShapeException) as e:
        raise ValueError(
            message(
                f"output shapes of {call.name} that depend on input shapes alone",
                "a data-dependent operation",
                _DECLARE,
            )
        ) from e
    except Exception as e:
        e.add_note(
            f"bridge: while running {call.name} on fake tensors to find its output shapes; if it "
            f"needs real values, {_DECLARE}"
        )
        raise
    for i, leaf in enumerate(leaves):
        check_output(leaf, f"output {i} of {call.name}")
    _check_no_fake_kept(call.target)
    return tuple(map(buffers.spec_of, leaves)), tree


_DECLARE = "declare outputs= (a pytree of jax.ShapeDtypeStruct, or a function of the inputs' that returns it)"


@contextmanager
def fake():
    """Fake tensors, outside of inference mode (which has no gradients), compiled code in its Python
    form: the kernels of a compiled function would read and write through them."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.inference_mode(False), _uncompiled, FakeTensorMode(allow_non_fake_inputs=True):
        yield


class _Uncompiled:
    """Compiled functions run in their Python form while any thread is in here.

    torch keeps that stance once for the process. Threads leave in any order, so the first one sets
    it and the last one takes it back: one that restored what it had found could leave torch.compile
    switched off for good."""

    def __init__(self):
        self.lock, self.inside, self.stance = threading.Lock(), 0, None

    def __enter__(self):
        with self.lock:
            if self.stance is None and "torch._dynamo" in sys.modules:
                self.stance = torch.compiler.set_stance("force_eager")
            self.inside += 1

    def __exit__(self, *_):
        with self.lock:
            self.inside -= 1
            if self.stance is not None and not self.inside:
                self.stance.__exit__(None, None, None)
                self.stance = None


_uncompiled = _Uncompiled()


def _unchanged(call, names, tensors):
    """The call; ValueError where it changed an input in place, before there is one that could be
    harmed."""
    versions = [t._version for t in tensors]
    found = call([t.detach() for t in tensors])
    for t, version, name in zip(tensors, versions, names):
        if t._version != version:
            raise changed(call.name, name)
    return found


def changed(who, name) -> ValueError:
    """An input was changed in place."""
    do = "use out-of-place operations, or clone the input first"
    return ValueError(
        message(
            f"{who} to leave its inputs as they are",
            f"input {name} changed in place, and with it the caller's array",
            do,
        )
    )


def on_some_device(call, inputs, run=None):
    """`run` (the call itself, if None) of uninitialised tensors. A callable may hold tensors on a
    GPU without showing them: where there is one, it is tried second."""
    devices = [_device(call.target), *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        try:
            return (run or call)(
                [torch.empty(s.shape, dtype=buffers.DTYPES[s.dtype], device=device) for s in inputs]
            )
        except Exception:
            if device is devices[-1]:
                raise


def _device(target):
    owner = target if isinstance(target, torch.nn.Module) else getattr(target, "__self__", None)
    tensors = owner.parameters() if isinstance(owner, torch.nn.Module) else ()
    return next((t.device for t in tensors), "cpu")


def _check_no_fake_kept(target) -> None:
    """A module that stored a fake tensor (a cache, say) would fail in its first real call."""
    from torch._subclasses.fake_tensor import FakeTensor

    for name, m in target.named_modules() if isinstance(target, torch.nn.Module) else ():
        for key, value in vars(m).items():
            if isinstance(value, FakeTensor):
                setattr(m, key, None)
                raise ValueError(
                    message(
                        "a module that keeps no tensor of a call in shape inference",
                        f"attribute {f'{name}.{key}'.lstrip('.')}",
                        _DECLARE,
                    )
                )
