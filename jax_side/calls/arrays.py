"""DLPack in and out of JAX: x64, alignment, devices, tracers, and copies that are asked for."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from bridge.errors import message, spec
from bridge.function import Spec
from jax_side.calls import compat
from jax_side.calls.nesting import cpu_device, here

_NAMES = """bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 bfloat16 float32 float64 complex64 complex128
float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu"""
DTYPES = {name: jnp.dtype(getattr(jnp, name)) for name in _NAMES.split() if hasattr(jnp, name)}
KNOWN = frozenset(DTYPES.values())
_WIDE = {"int64": "int32", "uint64": "uint32", "float64": "float32", "complex128": "complex64"}
_REFUSED = (ValueError, RuntimeError, BufferError, TypeError)
_CPU = 1  # kDLCPU
_CPU_ALIGN = 64  # bytes, of memory that XLA reads where it lies
_SHARED = "a dtype that both sides know"
_CAST = f"cast it to one of {', '.join(DTYPES)}"


def import_(obj: Any, dtype: str, copy: bool | None = None) -> jax.Array:
    """Returns a committed jax.Array over the memory of an object that has `__dlpack__`.

    `dtype` is the neutral name of what the producer holds ("float32"), and the result has exactly
    that dtype. Shape, device and a layout of permuted axes are the producer's too. All shapes work,
    empty and 0-d ones included.

    copy=None   shares dense memory on a 64-byte boundary, copies memory that is not aligned, and
                refuses strided memory
    copy=True   always gives fresh memory
    copy=False  shares or raises

    Who owns the memory: the producer. The array keeps it alive, also after the producer's object
    was deleted. WRITING TO THE PRODUCER IN PLACE CHANGES THE ARRAY, which JAX believes constant,
    and the results of computations on it that still run. Donating the array doesn't let XLA write
    there. A copy is complete and independent when this returns.

    Raises: ValueError if `dtype` is 64-bit and x64 is off (nothing is narrowed in silence), and if
    the memory can't be shared or lies on no device of JAX; TypeError for a dtype that JAX doesn't
    know or that the producer doesn't hold, and for an object without `__dlpack__`.

    >>> buffer = jnp.arange(3, dtype="int32")
    >>> import_(buffer, "int32", copy=False).unsafe_buffer_pointer() == buffer.unsafe_buffer_pointer()
    True
    """
    want = DTYPES.get(dtype)
    if want is None:
        raise TypeError(message(_SHARED, f"{dtype}, which JAX doesn't know", _CAST))
    _check_width(dtype)
    array = _take(obj, copy)
    if array.dtype != want:
        raise TypeError(
            message(
                f"memory of dtype {dtype}, as announced",
                str(array.dtype),
                "announce the producer's own dtype",
            )
        )
    return array


def _check_width(dtype: str) -> None:
    """ValueError for 64-bit parts while x64 is off."""
    if dtype in _WIDE and not compat.config.jax_enable_x64:
        do = f'call jax.config.update("jax_enable_x64", True), or cast to {_WIDE[dtype]} on the producing side'
        raise ValueError(
            message(f"a dtype that JAX holds while x64 is off ({_WIDE[dtype]})", dtype, do)
        )


def export(array: jax.Array, copy: bool | None = None) -> jax.Array:
    """Returns an array whose `__dlpack__` lends the values of `array`: `array` itself unless
    copy=True.

    Shape, dtype and device are kept. Layouts other than row-major arrive as strides. copy=None and
    copy=False never copy, since every array that is accepted can be shared. copy=True gives fresh
    memory.

    Who owns the memory: JAX's buffer. The consumer keeps it alive, also after `array` was deleted.
    A consumer that WRITES IN PLACE CHANGES THE JAX ARRAY, which JAX believes constant: use
    copy=True for that. While the buffer is lent, XLA doesn't reuse it even if it is donated. A
    computation that is still running is waited for (on a GPU: by the consumer's stream).

    Raises: TypeError for a tracer, a typed PRNG key, a dtype that only JAX knows, and what is no
    jax.Array; ValueError for an array that was deleted or donated, or that doesn't lie on exactly
    one device of this process.

    >>> x = jnp.arange(3.0)
    >>> np.from_dlpack(export(x)).ctypes.data == x.unsafe_buffer_pointer()
    True
    """
    if not _has_values(array) or array.is_deleted():
        raise _refusal(array)
    if array.sharding.num_devices != 1 or not array.is_fully_addressable:
        raise _refusal(array)
    return _fresh(array) if copy else array


def _has_values(x: Any) -> bool:
    """True for a concrete array of a dtype that both sides know."""
    return isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and x.dtype in KNOWN


def _refusal(x: Any) -> Exception:
    """Why `x` has no values that DLPack could carry."""
    if not isinstance(x, jax.Array):
        return TypeError(
            message("a jax.Array", type(x).__name__, "make one with jax.numpy.asarray")
        )
    have = spec(x.shape, x.dtype)
    if isinstance(x, jax.core.Tracer):
        do = "convert outside jit, grad and vmap; inside them call a function made by bridge.to_jax(function)"
        return TypeError(
            message(
                "a concrete array, for its values", f"{have} as a tracer ({type(x).__name__})", do
            )
        )
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return TypeError(
            message(
                "an array of numbers", f"typed PRNG keys {have}", "pass jax.random.key_data(keys)"
            )
        )
    if x.dtype not in KNOWN:
        return TypeError(message(_SHARED, f"{have}, which only JAX knows", _CAST))
    if x.is_deleted():
        return ValueError(
            message("a live array", f"{have}, deleted or donated", "copy it before it is donated")
        )
    got = (
        f"{have} on {x.sharding.num_devices} device(s), fully addressable: {x.is_fully_addressable}"
    )
    do = "gather it with jax.device_put(array, jax.local_devices()[0]), or hand over its addressable_shards"
    return ValueError(message("an array on exactly one device of this process", got, do))


def _take(obj: Any, copy: bool | None) -> jax.Array:
    """The array that shares obj's memory, or a complete copy where `copy` allows or wants it."""
    if not hasattr(obj, "__dlpack_device__"):
        raise TypeError(
            message("an object with __dlpack__", type(obj).__name__, "make an array of it first")
        )
    try:
        return _fresh(_share(obj)) if copy else _share(obj)
    except _REFUSED as error:
        return _copy(obj, error, copy)


def _share(obj: Any) -> jax.Array:
    """The array that shares obj's memory; one of _REFUSED where it is not dense and aligned."""
    on_cpu = obj.__dlpack_device__()[0] == _CPU and _cpu_view(0)
    return on_cpu(obj.__dlpack__()) if on_cpu else _public(obj, copy=False)


def _copy(obj: Any, error: Exception, copy: bool | None) -> jax.Array:
    """XLA's copy of memory that it can't share. It is waited for, since XLA may read `obj` after the
    call (seen with jax 0.10.2)."""
    if copy is not False:
        try:
            return _public(obj, copy=None).block_until_ready()
        except _REFUSED as again:
            error = again
    got = f"{type(obj).__name__}: {' '.join(str(error).split())}"
    raise ValueError(
        message(
            "dense memory on a 64-byte boundary, on a device that JAX has",
            got,
            "copy it to such a place first",
        )
    ) from error


def _fresh(array: jax.Array) -> jax.Array:
    """A complete copy, also while jit traces. jax.dlpack's own copy=True would share aligned memory
    (jax 0.10.2)."""
    with jax.ensure_compile_time_eval():
        return array.copy().block_until_ready()


def _public(obj: Any, copy: bool | None) -> jax.Array:
    """jax.dlpack.from_dlpack, kept from narrowing 64-bit dtypes in silence."""
    with jax.enable_x64(True):
        return jax.dlpack.from_dlpack(obj, copy=copy)


# The hot path of a call. Memory is lent for its length, as a NumPy array, a bare DLPack capsule of
# CPU memory, or an object with __dlpack__ (on a GPU).


def borrow(lent: Iterable[Any]) -> list[Any]:
    """Returns arguments for a jitted function over lent memory.

    The lender has checked dtypes and widths, and that a capsule is dense and aligned. jit reads a
    NumPy array where it lies if it is dense and aligned, and copies it otherwise.
    """
    if here.depth or not _to_capsule():
        return [_placed(x) for x in lent]
    return [_view(x) if type(x) is _Bare else x for x in lent]


def _view(capsule: Any) -> jax.Array:
    """An array over a capsule's memory, on the CPU device of this depth."""
    view = _cpu_view(here.depth)
    return view(capsule) if view else _public(_Capsule(capsule), copy=False)


def _placed(lent: Any) -> jax.Array:
    """An array on the device where it belongs, which is not the one that jit would choose."""
    if type(lent) is np.ndarray:
        readable = lent.flags.c_contiguous and not lent.ctypes.data % _CPU_ALIGN
        dense = lent if readable else lent.copy()
        return jax.device_put(dense, cpu_device(here.depth), may_alias=True)
    if type(lent) is _Bare:
        return _view(lent)
    return lent if isinstance(lent, jax.Array) else _public(lent, copy=False)


def taken(results: Iterable[Any], specs: Sequence[Spec]) -> list[jax.Array]:
    """Returns arrays over results that their lender has let go.

    The results are bare capsules or objects that `import_` takes, of the types that `specs`
    announce.
    """
    return [
        _taken(x, s.dtype) if type(x) is _Bare else import_(x, s.dtype)
        for x, s in zip(results, specs, strict=True)
    ]


def _taken(capsule: Any, dtype: str) -> jax.Array:
    _check_width(dtype)
    to_array = _cpu_view(0)
    return to_array(capsule) if to_array else _public(_Capsule(capsule), copy=False)


def lend(results: Iterable[jax.Array]) -> list[Any]:
    """Returns results that the borrower alone is to hold.

    Where all memory is the CPU's they are complete, and come as capsules. Elsewhere they are the
    arrays themselves.
    """
    capsule = _to_capsule()
    return [*map(capsule, results)] if capsule else list(results)


_Bare = type(np.empty(0).__dlpack__())


class _Capsule:
    """A bare capsule of CPU memory for those who want an object."""

    def __init__(self, capsule: Any) -> None:
        self._capsule = capsule

    def __dlpack__(self, **_: Any) -> Any:
        return self._capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return _CPU, 0


@functools.cache
def _to_capsule():
    """What Array.__dlpack__ does, in 0.3 us instead of 1.7; None where there is another device than
    CPUs. PRIVATE to jax 0.10.2.

    It waits for the array without the GIL (seen), and raises what went wrong inside the program."""
    try:
        to_capsule = compat.jaxlib_private().buffer_to_dlpack_managed_tensor
        only_cpus = {d.platform for d in jax.local_devices()} == {"cpu"}
        return to_capsule if only_cpus else None
    except Exception:
        return None


@functools.cache
def _cpu_view(depth: int):
    """What jax.dlpack.from_dlpack does without its checks, in 4 us instead of 19. PRIVATE to jax
    0.10.2, and so tried before use; None where it does not work.

    It is for the CPU alone: on a GPU the public function orders the streams."""
    try:
        to_buffer = compat.jaxlib_private().dlpack_managed_tensor_to_buffer
        cpu = cpu_device(depth)
        view = lambda capsule: to_buffer(capsule, cpu, None, False, _CPU)
        with jax.ensure_compile_time_eval():
            probe = jax.device_put(np.zeros(1, np.int8), cpu_device(0))
        pointer = view(probe.__dlpack__()).unsafe_buffer_pointer()
        return view if pointer == probe.unsafe_buffer_pointer() else None
    except Exception:
        return None
