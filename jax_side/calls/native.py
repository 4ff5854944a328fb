"""The native lane: XLA calls a compiled Function of the other bank by C++ alone.

A program names a package by its key. The handler (bridge/native/handler.cpp) finds it by that, in
this process or in another one that has loaded it.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bridge.errors import message
from bridge.failures import carried
from bridge.function import Function, Spec
from bridge.native import handler
from jax_side.calls import registry
from jax_side.calls.nesting import here
from jax_side.calls.registry import Owner

TARGET = "bridge_native"
PLATFORMS = ("cpu", "cuda")
# dtypes that the handler knows
KNOWN = ("bool", "float16", "bfloat16", "float32", "float64", "complex64", "complex128") + tuple(
    f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)
)


def own(fn: Function, platform: str, forever: bool) -> Owner:
    """Returns the owner of a package of `fn`, which is compiled here unless it lies in the folder
    of packages, and loaded.

    `forever` keeps it until the process ends, for programs that jax.export writes.

    Raises: NotImplementedError for a Function that can't be compiled, and for float8."""
    for s in (*fn.inputs, *fn.outputs):
        if s.dtype not in KNOWN:
            do = 'cast it, or take lane="ffi"'
            raise NotImplementedError(message(f'one of {", ".join(KNOWN)} for lane="native"', str(s), do))
    package = fn.base.compiled(fn, platform)
    library = register(platform)
    key = package.record.key
    release = functools.partial(library.drop, key)
    with registry.lock:
        if key not in registry.functions:
            package.load(library)
        owner = registry.own(fn, key, release)
    if forever:
        registry.keep_forever(owner)
    return owner


def call(fn: Function, key: str, *args: jax.Array) -> list[jax.Array]:
    """Calls a package by one XLA custom call, on XLA's own buffers."""
    results = [jax.ShapeDtypeStruct(s.shape, jnp.dtype(s.dtype)) for s in fn.outputs]
    return jax.ffi.ffi_call(TARGET, results)(*args, package=key)


def register(platform: str) -> handler.Library:
    """Registers the one target of a platform, once, and returns the library that it lies in."""
    with registry.lock:
        library = _explaining(handler.library())
        register_target(platform, library)
    return library


@functools.cache
def register_target(platform: str, library: handler.Library) -> None:
    """Tells XLA of the function that it calls on a platform."""
    capsule = jax.ffi.pycapsule(library.target(platform))
    jax.ffi.register_ffi_target(TARGET, capsule, platform=platform)


@functools.cache
def _explaining(library: handler.Library) -> handler.Library:
    """Makes the library ask here for the texts of errors, as long as Python lives."""
    library.explain(_explain)
    atexit.register(library.explain, None)
    return library


@handler.Explain
def _explain(key: bytes, what: bytes, inputs: Any, text: int, size: int) -> int:
    """Evaluates what went wrong once more, without the lane, so that the user's own exception is
    raised. Writes its text, as the other lanes would raise it, and returns the length."""
    outside = here.depth
    try:
        fn, here.depth, n, *_ = registry.functions[key.decode()]
        here.depth += 1
        given = [_copied(inputs[i], s) for i, s in enumerate(fn.inputs[:n])]
        fn.base.run(fn, [x.__dlpack__() for x in given])
        raise RuntimeError(what.decode(errors="replace"))
    except BaseException as error:
        found = str(carried(error)).encode()[:size]
        ctypes.memmove(text, found, len(found))
        return len(found)
    finally:
        here.depth = outside


def _copied(memory: int | None, s: Spec) -> np.ndarray:
    """An input, in memory of its own. NumPy has no DLPack for bfloat16: that travels as uint16."""
    dtype = np.dtype("uint16" if s.dtype == "bfloat16" else s.dtype)
    x = np.empty(s.shape, dtype)
    if x.nbytes and memory:
        ctypes.memmove(x.ctypes.data, memory, x.nbytes)
    return x
