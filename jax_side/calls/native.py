"""The native lane: XLA calls a compiled Function of the other bank by C++ alone.

A program names a package by its key. The handler (bridge/native/handler.cpp) finds it by that, in
this process or in another one that has loaded it.
"""

from __future__ import annotations

import ctypes
import functools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bridge.errors import message
from bridge.failures import carried
from bridge.function import Function, Spec
from bridge.native import handler
from jax_side.calls import ending, processes, registry
from jax_side.calls.lanes import host_carrier
from jax_side.calls.nesting import here
from jax_side.calls.registry import Owner

TARGET = "bridge_native"
# what is loaded here, by key: packages of the other bank, with record and path
packages: dict[str, Any] = {}
# the keys of those that programs for several devices call
_telling: set[str] = set()
# dtypes that the handler knows
_INTEGERS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
_FLOATS = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")
KNOWN = ("bool", *_INTEGERS, *_FLOATS)


def own(fn: Function, platform: str, forever: bool, telling: bool = False) -> Owner:
    """Returns the owner of a package of `fn`, which is compiled here unless it lies in the folder
    of packages, and loaded.

    `forever` keeps it until the process ends, for programs that jax.export writes. `telling` says
    that it is a program for several devices (jax_side.calls.processes).

    Raises: NotImplementedError for a Function that can't be compiled, and for float8."""
    for s in (*fn.inputs, *fn.outputs):
        if s.dtype not in KNOWN:
            do = 'cast it, or take lane="ffi"'
            raise NotImplementedError(
                message(f'one of {", ".join(KNOWN)} for lane="native"', str(s), do)
            )
    package = fn.base.compiled(fn, platform)
    library = _explaining(register(platform))
    # An exported program is another process's: nobody there changes weights.
    key = package.record.key if forever else f"{package.record.key}-{package.holders}"
    with registry.lock:
        # This forgets what nobody needs any more, which may be a package of this key.
        owner = registry.own(fn, key, functools.partial(_release, library, key))
        if key not in packages:
            package.load(library, key, watching=not forever)
            packages[key] = package
    if forever:
        registry.keep_forever(owner)
    if telling:
        processes.watch()
        _telling.add(key)
    return owner


def _release(library: handler.Library, key: str) -> None:
    """Lets a package go that no program needs any more."""
    packages.pop(key, None)
    _telling.discard(key)
    library.drop(key)


def call(fn: Function, key: str, *args: jax.Array) -> list[jax.Array]:
    """Calls a package by one XLA custom call, on XLA's own buffers."""
    package = packages[key]
    if package.given is not None:
        args = tuple(args[i] for i in package.given)
    results = [jax.ShapeDtypeStruct(s.shape, jnp.dtype(s.dtype)) for s in package.record.outputs]
    found = jax.ffi.ffi_call(TARGET, results)(*args, package=key)
    order = range(len(found)) if package.found is None else package.found
    return [found[i] for i in order]


def keys_in(program: str) -> list[str]:
    """Returns the keys of the packages that a program calls, given its text in MLIR."""
    return sorted(set(re.findall(r'package = "([^"]+)"', program)))


def register(platform: str, path: Path | None = None) -> handler.Library:
    """Registers the one target of a platform, once, and returns the library that it lies in.

    `path` is that of the library, None for the one that is built here."""
    with registry.lock:
        library = handler.library(path)
        ending.expect(library.end)
        _register_target(platform, library)
    return library


@functools.cache
def _register_target(platform: str, library: handler.Library) -> None:
    """Tells XLA of the function that it calls on a platform."""
    capsule = jax.ffi.pycapsule(library.target(platform))
    jax.ffi.register_ffi_target(TARGET, capsule, platform=platform)


@functools.cache
def _explaining(library: handler.Library) -> handler.Library:
    """Makes the library ask here for the texts of errors, as long as Python lives."""
    library.explain(_explain)
    return library


@handler.Explain
@ending.call
def _explain(key: bytes, what: bytes, inputs: Any, text: int, size: int) -> int:
    """Evaluates what went wrong once more, without the lane, so that the user's own exception is
    raised. Writes its text, as the other lanes would raise it, and returns the length."""
    outside = here.depth
    called = registry.functions.get(key.decode())
    if called is None:  # of a program that was loaded
        return 0
    try:
        fn, here.depth, n, *_ = called
        here.depth += 1
        given = [_copied(inputs[i], s) for i, s in enumerate(fn.inputs[:n])]
        fn.base.run(fn, [x.__dlpack__() for x in given])
        raise RuntimeError(what.decode(errors="replace"))
    except BaseException as error:
        if key.decode() in _telling:
            processes.tell(error)
        found = str(carried(error)).encode()[:size]
        ctypes.memmove(text, found, len(found))
        return len(found)
    finally:
        here.depth = outside


def _copied(memory: int | None, s: Spec) -> np.ndarray:
    """An input, in memory of its own."""
    shape, carrier, _ = host_carrier(s)
    x = np.empty(shape, carrier)
    if x.nbytes and memory:
        ctypes.memmove(x.ctypes.data, memory, x.nbytes)
    return x
