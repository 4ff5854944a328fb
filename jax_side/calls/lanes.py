"""How XLA reaches a foreign Function: the ffi lane (jax-tvm-ffi; CPU and CUDA) and the host lane
(jax.pure_callback).

Both lanes hand buffers to `fn.base.run`, which reads them where they lie and writes the outputs in
place. The ffi lane knows a Function by its number in the registry.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bridge import failures
from bridge.errors import message, missing
from bridge.failures import Listener, carried
from bridge.function import WIDE, Function, Spec
from jax_side.calls import arrays, compat, ending, processes
from jax_side.calls.nesting import here
from jax_side.calls.registry import functions, lock, unknown

LANES = ("auto", "ffi", "host", "native")
FFI_PLATFORMS = ("cpu", "cuda")
TARGET = "bridge_call"


# A dtype that DLPack or jax-tvm-ffi has no name for travels as another one, its carrier.


def _carrier(spec: Spec) -> jax.ShapeDtypeStruct:
    if spec.dtype.startswith("complex"):
        part = jnp.float32 if spec.dtype == "complex64" else jnp.float64
        return jax.ShapeDtypeStruct((*spec.shape, 2), part)
    dtype = jnp.uint8 if spec.dtype.startswith("float8") else jnp.dtype(spec.dtype)
    return jax.ShapeDtypeStruct(spec.shape, dtype)


def _to_carrier(x: jax.Array, spec: Spec) -> jax.Array:
    if spec.dtype.startswith("complex"):
        return jnp.stack([x.real, x.imag], -1)
    if spec.dtype.startswith("float8"):
        return jax.lax.bitcast_convert_type(x, jnp.uint8)
    return x


def _from_carrier(x: jax.Array, spec: Spec) -> jax.Array:
    if spec.dtype.startswith("complex"):
        return jax.lax.complex(x[..., 0], x[..., 1])
    if spec.dtype.startswith("float8"):
        return jax.lax.bitcast_convert_type(x, jnp.dtype(spec.dtype))
    return x


# No lane: an eager call.


def eager(fn: Function, args: Iterable[jax.Array]) -> list[jax.Array]:
    """Runs a Function now, in this thread. Arrays in and out share memory with the tensors."""
    outs = fn.base.run(fn, arrays.lend([arrays.export(a) for a in args]))
    return arrays.taken(fn.base.give(outs), fn.outputs)


# The ffi lane.


def ffi(fn: Function, number: str, *args: jax.Array) -> list[jax.Array]:
    """Calls a Function by one XLA custom call, whose operands and results are DLPack tensors over
    XLA's own buffers."""
    call = jax.ffi.ffi_call(TARGET, [_carrier(s) for s in fn.outputs])
    outs = call(*map(_to_carrier, args, fn.inputs), number=number)
    return [_from_carrier(o, s) for o, s in zip(outs, fn.outputs, strict=True)]


def register_ffi(tensor_type: type) -> None:
    """Registers the one target of each platform, once.

    `tensor_type` is the class that buffers arrive as.

    Raises: ImportError without jax-tvm-ffi.
    """
    with lock:
        _register(tensor_type)


def has_ffi() -> bool:
    """True where the ffi lane is available. Elsewhere lane="auto" takes the host lane."""
    try:
        import jax_tvm_ffi  # noqa: F401
    except ImportError:
        return False
    return True


@functools.cache
def _register(tensor_type: type) -> None:
    try:
        import jax_tvm_ffi
        import tvm_ffi
    except ImportError as e:
        raise missing("jax-tvm-ffi", 'lane="ffi"') from e
    specs = {
        "cpu": ["attrs.number", "args", "rets"],
        "gpu": ["attrs.number", "ctx.stream", "args", "rets"],
    }
    for platform, entry in (("cpu", _enter_cpu), ("gpu", _enter_gpu)):
        handler = tvm_ffi.convert_func(entry, tensor_cls=tensor_type)
        jax_tvm_ffi.register_ffi_target(
            TARGET, handler, specs[platform], platform=platform, pass_owned_tensor=True
        )


@ending.call
def _enter_cpu(number, *buffers):
    outside = here.depth
    try:
        _, depth, n, enter, *_ = functions.get(number) or unknown(number)
        here.depth = depth + 1
        return enter(buffers[:n], buffers[n:])
    except BaseException as e:
        buffers = None
        error = carried(e)
    finally:
        here.depth = outside
    raise error  # here, where it has no context: the exception's frames must not outlive the call


@ending.call
def _enter_gpu(number, stream, *buffers):
    called = functions.get(number)
    try:
        fn, _, n, *_ = called or unknown(number)
        if fn.symbolic:
            fn = fn.of_shapes([b.shape for b in buffers[:n]])
        with fn.base.on_stream(stream, buffers):
            return fn.base.run(fn, buffers[:n], buffers[n:])
    except BaseException as e:
        buffers = None
        if called and called.telling:
            processes.tell(e)
        error = carried(e)
    raise error


# The host lane.


class HostCall:
    """What jax.pure_callback calls. HostCalls of equal Functions are equal, so that programs are
    found again.

    `run(arrays, outputs)` fills NumPy arrays; `fn` then is anything hashable that has `outputs`.
    Without `run` it is a Function, whose bank is lent the memory of both.
    """

    def __init__(self, fn: Any, run: Callable[..., Any] | None = None) -> None:
        ending.expect()
        self.fn = fn
        self.depth = here.depth
        self._run = run or _lending(fn)
        self._outputs = [host_carrier(s) for s in fn.outputs]
        self._wide = is_wide(*getattr(fn, "inputs", ()), *fn.outputs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HostCall) and self.fn == other.fn and self.depth == other.depth

    def __hash__(self) -> int:
        return hash(self.fn)

    def __call__(self, *given: Any) -> list[np.ndarray]:
        if self._wide and not compat.config.jax_enable_x64:
            do = 'call jax.config.update("jax_enable_x64", True), which holds for all threads'
            got = "x64 turned on for another thread alone, and values that JAX has narrowed"
            raise ValueError(message("64-bit values of a host callback", got, do))
        return self.called(given, _wait)

    @ending.call
    def called(self, given: Sequence[Any], wait: Callable[..., Any]) -> list[np.ndarray]:
        """Returns the results, having waited for what is given."""
        outs = [np.empty(shape, carrier) for shape, carrier, _ in self._outputs]
        outside, here.depth = here.depth, self.depth + 1
        try:
            if ending.begun:
                ending.refuse()
            wait(given)
            self._run(given, outs)
            return [
                o if o.dtype is dtype else o.view(dtype)
                for o, (*_, dtype) in zip(outs, self._outputs)
            ]
        except BaseException as e:
            del given, outs
            error = carried(e)
        finally:
            here.depth = outside
        raise error


def _lending(fn: Function) -> Callable[..., Any]:
    run = fn.base.runner(fn, ready=False)
    return lambda given, outs: run(arrays.lend(given), [o.__dlpack__() for o in outs])


def _wait(given: Sequence[Any], limit: float = 30.0) -> None:
    """Waits for the inputs of a callback, and raises RuntimeError after `limit` seconds.

    jax.pure_callback copies its inputs with XLA's threads, which may all be in callbacks: then
    they would never arrive."""
    start = time.monotonic()
    while not all(a.is_ready() for a in given):
        waited = time.monotonic() - start
        if waited > limit:
            do = f'{SYNCHRONOUS} (python -m bridge doctor tells more), or take lane="ffi"'
            raise RuntimeError(
                message(
                    "inputs of a host callback to arrive",
                    f"none in {limit:.0f} s, since every thread of XLA is in a callback",
                    do,
                )
            )
        time.sleep(0 if waited < _QUICK else 1e-5)  # the shortest real sleep takes 60 us


_QUICK = 1e-3  # seconds: copies of the inputs of a usual call arrive earlier
SYNCHRONOUS = (
    'call jax.config.update("jax_cpu_enable_async_dispatch", False) right after import jax'
)


def is_wide(*specs: Spec) -> bool:
    """True where one has 64-bit parts, which JAX narrows in a thread where x64 is off."""
    return any(s.dtype in WIDE for s in specs)


def host_carrier(s: Spec) -> tuple[tuple[int, ...], np.dtype, np.dtype]:
    """Returns (shape, dtype that it travels in, dtype). NumPy's DLPack knows complex dtypes, but neither
    bfloat16 nor float8."""
    if s.dtype == "bfloat16":
        carrier = "uint16"
    elif s.dtype.startswith("float8"):
        carrier = "uint8"
    else:
        carrier = s.dtype
    return s.shape, np.dtype(carrier), jnp.dtype(s.dtype)


def host(fn: Function, *args: jax.Array) -> Sequence[jax.Array]:
    """Calls a Function by one jax.pure_callback."""
    results = [jax.ShapeDtypeStruct(s.shape, jnp.dtype(s.dtype)) for s in fn.outputs]
    return jax.pure_callback(HostCall(fn), results, *args)


class HostPart:
    """What XLA calls on each of several devices, with its part of the batch: the same Function for
    as many examples as come.

    JAX has no part in it. A thread of XLA may wait for this call in a collective, and with another
    one in this call there may be none left to copy an array."""

    def __init__(self, fn: Function) -> None:
        self.fn = fn
        self.depth = here.depth
        self._sized = functools.lru_cache(maxsize=64)(self._sized)

    def __call__(self, *given: np.ndarray) -> tuple[np.ndarray, ...]:
        call = self._sized(tuple(map(np.shape, given)))
        return tuple(call.called(given, wait=lambda given: None))

    def _sized(self, shapes: tuple[tuple[int, ...], ...]) -> HostCall:
        outside, here.depth = here.depth, self.depth
        try:
            fn = self.fn.of_shapes(shapes)
            return HostCall(fn, _copying(fn))
        finally:
            here.depth = outside


def _copying(fn: Function) -> Callable[..., Any]:
    """What runs a Function on copies of NumPy arrays: what XLA gives can't be lent, for it is
    read-only."""
    run = fn.base.runner(fn, ready=False)
    carriers = [host_carrier(s)[1] for s in fn.inputs]

    def copying(given: Sequence[np.ndarray], outs: Sequence[np.ndarray]) -> None:
        copies = [np.array(x).view(carrier) for x, carrier in zip(given, carriers)]
        run([x.__dlpack__() for x in copies], [o.__dlpack__() for o in outs])

    return copying


def host_part(fn: Function, index: int, platform: str, *args: jax.Array) -> Sequence[jax.Array]:
    """Calls a HostPart, the program's callback number `index`, by one custom call: what
    jax.pure_callback comes to, which has no parts."""
    results = [jax.ShapeDtypeStruct(s.shape, jnp.dtype(s.dtype)) for s in fn.outputs]
    target = f"xla_ffi_python_{'cpu' if platform == 'cpu' else 'gpu'}_callback"
    return jax.ffi.ffi_call(target, results)(*args, index=np.uint64(index))


# The original exception.


@contextmanager
def raising() -> Iterator[None]:
    """Raises the exceptions of bridged code as they were, with their type, attributes and
    traceback, `from` JAX's own error.

    JAX hands a callback's exception on as text. Inside this context the exception itself is kept
    beside the text and raised in its place. This holds for computations that are still running when
    the block ends, too: the block waits for all arrays. So is a Ctrl-C: without this context, one
    that comes between two calls of a program is a JaxRuntimeError.

        >>> import bridge, jax, torch
        >>> def broken(x): raise KeyError("no such species")
        >>> f = jax.jit(bridge.to_jax(broken, outputs=lambda x: x))
        >>> with bridge.raising():
        ...     f(jax.numpy.ones(3))
        Traceback (most recent call last):
        KeyError: 'no such species'
    """
    with Listener() as listener, failures.noting_interrupts() as interrupts:
        try:
            yield
            error = _first(listener, _errors_of_running())
        except Exception as e:
            error = _first(listener, [e])
            if error is None and interrupts and _INTERRUPTED.search(str(e)):
                raise KeyboardInterrupt from e
            if error is None:
                raise
        original = None if error is None else listener.original(error)
        if original is not None:
            raise original from error
        for found in failures.late:
            if late := found():
                raise late


# What XLA says of a KeyboardInterrupt that no lane saw: nothing, or JAX's own frames.
_INTERRUPTED = re.compile(r"^INTERNAL: $|\nKeyboardInterrupt")


def _first(listener: Listener, errors: Iterable[BaseException]) -> BaseException | None:
    """The first JAX error that stands for an exception of this listener's. Others belong to earlier
    code."""
    return next((e for e in errors if listener.original(e) is not None), None)


def _errors_of_running() -> Iterator[BaseException]:
    """The errors of arrays that are still being computed, or failed."""
    for array in jax.live_arrays():
        try:
            if not array.is_deleted():
                array.block_until_ready()
        except Exception as e:
            yield e
