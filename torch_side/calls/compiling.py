"""Graphs as packages of AOTInductor: compiled once, found again in a folder."""

from __future__ import annotations

import _thread
import gc
import hashlib
import itertools
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from bridge.errors import message
from bridge.function import Derived, Function
from bridge.native import folder as folders
from bridge.native.handler import Library, check_compiler
from torch_side.calls import inference, tracing
from torch_side.calls.tracing import OTHER_LANES, Traced


@dataclass(frozen=True, eq=False)
class Compiled:
    """A package that is ready to be called.

    record   what is known of it
    path     the file with its code
    weights  tensors of the user's that it has copies of
    others   tensors that nobody else need hold, of which it has copies too
    given    the order in which it takes the inputs of the Function; None for theirs
    found    the place of each output of the Function among its results; None for theirs"""

    record: folders.Record
    path: Path
    given: tuple[int, ...] | None = None
    found: tuple[int, ...] | None = None
    weights: tuple[weakref.ref[torch.Tensor], ...] = ()
    others: tuple[torch.Tensor, ...] = ()

    @property
    def holders(self) -> str:
        """Returns something that is the same for packages that copy the same tensors of the
        user's in the same state. Other modules may have equal weights now, and others later."""
        # with their state: after a change there and back, what was loaded before stays stale
        states = sorted(map(state, self._tensors))
        return hashlib.sha256(str(states).encode()).hexdigest()[:8]

    @property
    def _tensors(self) -> list[torch.Tensor]:
        """The tensors that it has copies of, as far as they live."""
        tensors = (*(ref() for ref in self.weights), *self.others)
        return [t for t in tensors if t is not None]

    def load(self, library: Library, key: str, watching: bool) -> None:
        """Makes the package callable by a key; with `watching`, calls fail once a weight has
        changed."""
        r = self.record
        library.load(key, self.path, r.inputs, r.outputs, r.has_status)
        for tensor in self._tensors if watching else ():
            library.watch(key, tensor._cdata)


_numbers: Any = WeakTensorKeyDictionary()  # unlike addresses, they are never used again
_next = itertools.count()


def state(tensor: torch.Tensor) -> tuple[int, int, int]:
    """Returns a number of this tensor alone, how often it was changed in place, and where its
    memory lies.

    Raises: ValueError for a tensor of inference mode, which does not count its changes."""
    if tensor.is_inference():
        do = 'make the model outside of it, give it clones of its weights, or take lane="ffi"'
        got = f"one of shape {tuple(tensor.shape)}, made under torch.inference_mode()"
        raise ValueError(message("weights that count their changes", got, do))
    return _numbers.setdefault(tensor, next(_next)), tensor._version, tensor.data_ptr()


def compiled(fn: Function, device: str) -> Compiled:
    """Returns the package of a Function for "cpu" or "cuda", with the weights of this moment.

    It is taken from the folder of packages where one of the same graph, weights, types, processor
    and versions lies there, and compiled otherwise, which takes seconds to minutes. A line on
    stderr says so.

    Raises: NotImplementedError for code that can't be traced or compiled, naming what is in the
    way; RuntimeError without a C++ compiler; ValueError for a folder that can't be written to."""
    with _interruptible():
        found = _found(fn, device)
    # What tracing leaves behind holds the weights in circles. A weight must die when its module lets
    # it go, for that is how a replaced one is noticed.
    gc.collect()
    return found


@contextmanager
def _interruptible() -> Iterator[None]:
    """Sends a Ctrl-C again that Python has lost.

    One that comes while the garbage collector calls somebody back, which JAX has it do, is printed
    and forgotten; and torch makes much garbage as it compiles."""
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            threading.Timer(0.1, _thread.interrupt_main).start()
        else:
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _found(fn: Function, device: str) -> Compiled:
    """The package, and what holds it."""
    traced = tracing.trace(fn, device)
    place = folders.chosen()
    record = _record(fn, traced, device)
    found = folders.find(place, record.key)
    if found is None:
        check_compiler()
        with folders.locked(place, record.key):
            # another process may have made it while this one waited
            found = folders.find(place, record.key)
            if found is None:
                found = folders.add(place, lambda path: _compile(traced, record, path))
    weights, others = _held(fn, traced)
    path = place / record.key / folders.MODEL
    return Compiled(found, path, weights=weights, others=others)


def _record(fn: Function, traced: Traced, device: str) -> folders.Record:
    """The record of a package that need not exist yet."""
    versions = {"torch": torch.__version__, "format": str(folders.FORMAT)}
    processor = folders.processor()
    made_of = [traced.digest, device, processor, str(sorted(versions.items()))]
    made_of.append(str(torch.get_num_threads()))
    if device == "cuda":
        made_of.append(str(torch.cuda.get_device_capability()))
    return folders.Record(
        key=hashlib.sha256("\n".join(made_of).encode()).hexdigest()[:32],
        name=described(fn),
        inputs=fn.inputs,
        outputs=fn.outputs,
        has_status=bool(traced.texts),
        device=device,
        processor=processor,
        versions=versions,
    )


def _compile(traced: Traced, record: folders.Record, path: Path) -> folders.Record:
    """Compiles a graph into a file, and returns the record with what is known then."""
    n = len(traced.graph.graph.nodes)
    where = "the GPU" if record.device == "cuda" else "the CPU"
    _say(f"compiling {record.name}, {n} operations, for {where}")
    began = time.perf_counter()
    texts = {f"bridge.status.{i}": text for i, text in enumerate(traced.texts, 1)}
    options: dict[str, Any] = {"aot_inductor.metadata": texts}
    try:
        with warnings.catch_warnings(), torch.inference_mode(False):
            warnings.simplefilter("ignore")
            program = torch.export.export(traced.graph, traced.examples, strict=False)
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(path), inductor_configs=options
            )
    except Exception as error:
        what = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        expected = f"{record.name} to be compiled by AOTInductor"
        raise NotImplementedError(message(expected, what, OTHER_LANES)) from error
    seconds = time.perf_counter() - began
    _say(f"compiled {record.name} in {seconds:.0f} s, {path.stat().st_size / 1e6:.1f} MB")
    return replace(record, seconds=seconds, sha256=folders.sha256(path))


def _say(text: str) -> None:
    print(f"bridge: {text}", file=sys.stderr, flush=True)


def _held(
    fn: Function, traced: Traced
) -> tuple[tuple[weakref.ref[torch.Tensor], ...], tuple[torch.Tensor, ...]]:
    """The weights that a module or a method holds, weakly; and the graph's other tensors."""
    target = fn.base.call.target  # pyright: ignore[reportAttributeAccessIssue]
    own = {id(x) for x in inference.tensors_of(target)}
    tensors = traced.constants.values()
    weights = tuple(weakref.ref(x) for x in tensors if id(x) in own)
    return weights, tuple(x for x in tensors if id(x) not in own)


def described(fn: Function) -> str:
    """Returns what a Function is, for people: the name of the user's callable, and what is asked of
    it."""
    names = []
    while isinstance(fn, Derived):
        names.append(type(fn).__name__.lower())
        fn = fn.of
    return " of ".join([*names, str(fn)])
