"""What this machine, these versions and these settings do, on the side of JAX."""

from __future__ import annotations

import importlib.metadata
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_side.calls import arrays, compat, lanes

Row = tuple[str, bool, str]  # what, whether all is well, what was found or what to do


def facts() -> list[Row]:
    """Returns versions, devices and settings of JAX."""
    versions = (
        f"{jax.__version__}, jaxlib {_version('jaxlib')}, jax-tvm-ffi {_version('jax-tvm-ffi')}"
    )
    found = "ffi (cpu, cuda), host"
    if not lanes.has_ffi():
        found = "host alone, slower: pip install jax-tvm-ffi"
    wide = "on"
    if not compat.config.jax_enable_x64:
        wide = 'off, float64 is an error: call jax.config.update("jax_enable_x64", True)'
    dispatch = "off"
    if compat.asynchronous():
        dispatch = f'on: fine on the ffi lane; lane="host" called by several threads can wait for ever: {lanes.SYNCHRONOUS}'
    return [
        ("jax", True, versions),
        ("devices of JAX", True, ", ".join(map(str, jax.local_devices()))),
        ("lanes", lanes.has_ffi(), found),
        ("64-bit dtypes", True, wide),
        ("lending arrays", *_lending()),
        ("asynchronous dispatch", True, dispatch),
        ("memory of a GPU", True, _preallocation()),
        ("compilation cache", True, _cache()),
        ("small reductions on the CPU", True, _reductions()),
        ("XLA_FLAGS", True, os.environ.get("XLA_FLAGS", "none")),
    ]


def checks(bridged: Callable[[str], Callable[..., Any]]) -> list[Row]:
    """Returns whether calls into the other bank, their gradients and their batches are right, on
    each lane.

    `bridged(lane)` gives x -> 2 x + x as a JAX function that the other bank runs, by itself or by
    calling back into JAX.
    """
    x = jnp.arange(3.0, dtype="float32")
    found = []
    for lane in ("ffi", "host") if lanes.has_ffi() else ("host",):
        f = bridged(lane)
        calls = {
            "a call": f,
            "its gradient": jax.grad(lambda x: f(x).sum()),
            "a batch": lambda x: jax.vmap(f)(x[None])[0],
        }
        found += [
            _check(f"torch in jit, {lane} lane, {name}", jax.jit(call), x)
            for name, call in calls.items()
        ]
    return found


def _check(what: str, call: Callable[..., Any], x: Any) -> Row:
    try:
        y = np.asarray(call(x))
    except Exception as e:
        return what, False, f"{type(e).__name__}: {str(e).splitlines()[0]:.120}"
    right = np.allclose(y, 3.0) or np.allclose(y, 3.0 * np.asarray(x))
    return what, right, "right" if right else f"wrong: {y}"


def _cache() -> str:
    """Whether compiled programs are kept for the next process."""
    config: Any = jax.config  # its options are attributes that no type checker knows
    folder = config.jax_compilation_cache_dir
    if not folder or not config.jax_enable_compilation_cache:
        do = 'jax.config.update("jax_compilation_cache_dir", "/a/folder") keeps programs for the next process'
        return f"off, each process compiles anew: {do} (not those with host callbacks, or over several devices)"
    least = config.jax_persistent_cache_min_compile_time_secs
    return f"on, in {folder}, for what takes {least:g} s or more to compile (jax_persistent_cache_min_compile_time_secs)"


def _preallocation() -> str:
    """How much of a GPU's memory XLA takes beforehand, and how to leave some to torch."""
    told = os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
    if told.lower() in ("false", "0"):
        return "XLA takes it as it needs it, beside torch (XLA_PYTHON_CLIENT_PREALLOCATE)"
    names = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"
    share = next(filter(None, map(os.environ.get, names)), "0.75")
    return (
        f"XLA takes {share} of it with its first array, and torch has the rest: set "
        f"XLA_PYTHON_CLIENT_PREALLOCATE=false, or another {names[0]}, before jax is imported"
    )


# jaxlib hands sums over short axes, of which e3nn-like models are full, to YNNPACK. With no fusion
# type named, XLA keeps them.
XLAS_OWN = {"xla_cpu_experimental_ynn_fusion_type": ""}
# The ratio of times from which on it is told. Where YNNPACK is slow it is 8 to 12, and wavers by a
# third on a busy machine.
SLOWER = 2.0


def _reductions() -> str:
    """The time of a sum over an axis of 3, as jaxlib computes it, beside that of XLA's own code."""
    option = f"compiler_options={XLAS_OWN}"
    x = jnp.ones((2048, 64, 3), "float32")
    ways = [jax.jit(_norms), jax.jit(_norms, compiler_options=XLAS_OWN)]
    try:
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            times = [[_seconds(way, x) for way in ways] for _ in range(8)]
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return "by XLA's own code: this jaxlib does not know the option that changes it"
    usual, own = (min(column) for column in zip(*times[1:]))
    ratio = usual / own
    if ratio < SLOWER:
        return f"{ratio:.1f} times the time of XLA's own code: fine"
    return f"{ratio:.0f} times slower than XLA's own code (YNNPACK): for JAX models pass jax.jit {option}, and measure"


def _norms(x: jax.Array) -> jax.Array:
    return (x * x).sum(-1)


def _seconds(call: Callable[..., Any], x: Any) -> float:
    start = time.perf_counter()
    call(x).block_until_ready()
    return time.perf_counter() - start


def _lending() -> tuple[bool, str]:
    if arrays._cpu_view(0):
        return True, "4 us an array"
    return False, "by the public functions, 19 us an array: this jaxlib has other private names"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"
