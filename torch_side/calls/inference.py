"""What is known of a torch callable before it runs: the types of its outputs, and whether it is a
function at all."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Protocol

import torch

from bridge.call import Call
from bridge.errors import message
from bridge.function import Engine, Spec
from torch_side.calls import buffers

KNOWN = frozenset(buffers.DTYPES.values())
RANDOM_IN_TRAINING = (
    torch.nn.modules.dropout._DropoutNd,
    torch.nn.modules.batchnorm._BatchNorm,
    torch.nn.RReLU,
)


class TorchEngine(Engine, Protocol):
    """What the engines of this bank (torch_side.calls.transforms) also say of themselves.

    differentiates_inside   True where derivatives need grad mode on while the call runs
    alternative             what to pass instead, for error texts, where a model refuses this engine
    """

    differentiates_inside: bool
    alternative: str


def check_output(leaf: Any, what: str) -> None:
    """Raises TypeError unless an output is a dense torch.Tensor of a dtype that both sides know.

    `what` names the output in error texts."""
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


def module_of(target: Any) -> torch.nn.Module | None:
    """Returns the module that a callable is, or is a method of; None for other callables."""
    owner = target if isinstance(target, torch.nn.Module) else getattr(target, "__self__", None)
    return owner if isinstance(owner, torch.nn.Module) else None


def tensors_of(target: Any) -> tuple[torch.Tensor, ...]:
    """Returns the parameters and buffers of the module that a callable is, or is a method of."""
    owner = module_of(target)
    return () if owner is None else (*owner.parameters(), *owner.buffers())


def check_mode(target: Any) -> None:
    """Raises ValueError for a module, or a method of one, with a random layer in training mode.

    Such a layer draws random numbers (dropout, RReLU) or changes its buffers (batch norm), so that
    the module is no function."""
    owner = module_of(target)
    for name, m in owner.named_modules() if owner is not None else ():
        if m.training and isinstance(m, RANDOM_IN_TRAINING) and getattr(m, "p", 1.0) != 0.0:
            raise ValueError(
                message(
                    f"{type(owner).__name__} in evaluation mode",
                    f"layer {name or '(itself)'!s} ({type(m).__name__}) in training mode, whose "
                    "result is random or depends on earlier calls",
                    "call .eval() on it first",
                )
            )


def infer(
    call: Call, inputs: tuple[Spec, ...], names: tuple[str, ...], engine: TorchEngine
) -> tuple[tuple[Spec, ...], Any]:
    """Returns the types of a Call's outputs and their tree, found without running it.

    `names` are those of the inputs. Fake tensors run in place of real ones.

    Raises: ValueError where output shapes depend on data, where the call changes an input in place,
    and as `check_mode`; TypeError as `check_output`; and what the callable itself raises."""
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
    check_no_fake_kept(call.target)
    return tuple(map(buffers.spec_of, leaves)), tree


_DECLARE = "declare outputs= (a pytree of jax.ShapeDtypeStruct, or a function of the inputs' that returns it)"


@contextmanager
def fake() -> Iterator[None]:
    """Gives fake tensors for the length of a `with`.

    It leaves inference mode, which has no gradients. Compiled functions run in their Python form,
    since their kernels would read and write through fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.inference_mode(False), uncompiled(), FakeTensorMode(allow_non_fake_inputs=True):
        yield


def uncompiled() -> AbstractContextManager[None]:
    """Returns a context in which compiled functions run in their Python form."""
    return _uncompiled


class _Uncompiled:
    """Compiled functions run in their Python form while any thread is in here.

    torch keeps one such stance for the whole process, and threads leave in any order. So the first
    thread sets it and the last one takes it back. A thread that restored what it had found could
    leave torch.compile switched off for good."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0  # threads
        self.stance: Any = None

    def __enter__(self) -> None:
        with self.lock:
            if self.stance is None and "torch._dynamo" in sys.modules:
                self.stance = torch.compiler.set_stance("force_eager")
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.stance is not None and not self.inside:
                self.stance.__exit__(None, None, None)
                self.stance = None


_uncompiled = _Uncompiled()


def _unchanged(
    call: Call, names: Sequence[str], tensors: Sequence[torch.Tensor]
) -> tuple[list, Any]:
    """What the call gives for fake tensors. Raises ValueError where it changed one of them in
    place, before there is a real input that it could harm."""
    versions = [t._version for t in tensors]
    found = call([t.detach() for t in tensors])
    for t, version, name in zip(tensors, versions, names):
        if t._version != version:
            raise changed(call.name, name)
    return found


def changed(who: object, name: str) -> ValueError:
    """Returns the error for an input that was changed in place."""
    do = "use out-of-place operations, or clone the input first"
    return ValueError(
        message(
            f"{who} to leave its inputs as they are",
            f"input {name} changed in place, and with it the caller's array",
            do,
        )
    )


def on_some_device(
    call: Call,
    inputs: Sequence[Spec],
    run: Callable[[list[torch.Tensor]], tuple[Any, Any]] | None = None,
) -> tuple[Any, Any]:
    """Returns what `run` gives for uninitialised tensors of the types `inputs`; None runs `call`.

    The tensors lie on the device of the parameters of `call`'s module, or on the CPU. If `run`
    fails there and this machine has a GPU, it runs once more with tensors on that: a callable may
    hold tensors on a GPU without showing them."""

    def on(device: str | torch.device) -> tuple[Any, Any]:
        types = [(s.shape, buffers.DTYPES[s.dtype]) for s in inputs]
        tensors = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in types]
        return (run or call)(tensors)

    try:
        return on(_device(call.target))
    except Exception:
        if not torch.cuda.is_available():
            raise
    return on("cuda")


def _device(target: Any) -> str | torch.device:
    """The device of the first parameter of a module, or of the module that a method is of."""
    owner = module_of(target)
    tensors = owner.parameters() if owner is not None else ()
    return next((t.device for t in tensors), "cpu")


def check_no_fake_kept(target: Any) -> None:
    """Raises ValueError for a module that stored a fake tensor, for example in a cache.

    It would fail in its first real call. What it stored is taken out first."""
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
