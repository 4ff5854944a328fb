"""What must not grow: memory, live arrays and tensors, everything that the packages keep, file
descriptors, threads."""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
import weakref
from collections import deque
from collections.abc import Mapping
from typing import Any

import jax
import psutil
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakTensorKeyDictionary

import bridge
from bridge.function import Function

PACKAGES = ("bridge", "jax_side", "torch_side")
KEPT = (
    dict,
    list,
    set,
    deque,
    weakref.WeakValueDictionary,
    weakref.WeakKeyDictionary,
    weakref.WeakSet,
    WeakTensorKeyDictionary,
)
# What is made anew at each look, with as many entries as XLA holds programs: these come and go.
OF_PROGRAMS = ("jax_side.calls.registry._called",)
# The most by which the last quarter of a series may lie above its second quarter.
# torch.compile keeps two fake tensors, now and then, of a function that it compiles anew, for ever
# and without the bridge, too.
BOUNDS = {"MB": 50.0, "threads": 4.0, "fake tensors": 16.0}
FEW = 4.0  # of anything else: a growth by one at each fault or round is more
_give_back = ctypes.CDLL(None).malloc_trim


def settle() -> None:
    """Lets go of what is garbage: by Python, by the bridge, by XLA's threads, by glibc."""
    for _ in range(2):
        gc.collect()
        bridge.to_jax(torch.sin)  # forgets functions whose programs are gone
        (jax.numpy.ones(1) + 1).block_until_ready()
        time.sleep(0.01)
    _give_back(0)


def kept() -> dict[str, int]:
    """The sizes of what the packages keep at the level of their modules: containers, and caches
    without a limit of their own."""
    found = {}
    for module in sorted(m for m in sys.modules if m.split(".")[0] in PACKAGES):
        for name, x in vars(sys.modules[module]).items():
            place = f"{module}.{name}"
            if isinstance(x, KEPT) and not name.startswith("__") and place not in OF_PROGRAMS:
                found[place] = len(x)
            elif callable(getattr(x, "cache_info", None)) and x.cache_info().maxsize is None:
                found[place] = x.cache_info().currsize
    return found


def measured() -> dict[str, float]:
    """All that is watched, now: what the packages keep as it is; memory and all objects once the
    caches of the frameworks are empty, which hold programs of their own for each new shape."""
    settle()
    sizes = kept()
    jax.clear_caches()
    torch._dynamo.reset()
    settle()
    process = psutil.Process()
    alive = [type(x) for x in gc.get_objects()]
    of = lambda kind: sum(issubclass(t, kind) for t in alive)
    return {
        "MB": process.memory_info().rss / 1e6,
        "files": process.num_fds(),
        "threads": process.num_threads(),
        "arrays": len(jax.live_arrays()),
        "tensors": of(torch.Tensor) - of(FakeTensor),
        "fake tensors": of(FakeTensor),
        "modules": of(torch.nn.Module),
        "Functions": of(Function),
        **sizes,
    }


def growths(series: Mapping[str, list[float]]) -> dict[str, Any]:
    """By how much each quantity has grown beyond its bound, with its series; nothing where all are
    flat. The first quarter is the warm-up."""
    beyond = {}
    for name, values in series.items():
        quarter = max(1, len(values) // 4)
        grown = statistics.mean(values[-quarter:]) - statistics.mean(values[quarter : 2 * quarter])
        bound = BOUNDS.get(name, FEW)
        if grown > bound:
            told = [round(x, 1) for x in values[:: max(1, len(values) // 12)]]
            beyond[name] = {"grown": round(grown, 1), "bound": bound, "series": told}
    return beyond
