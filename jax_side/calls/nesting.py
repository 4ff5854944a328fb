"""Programs that run inside callbacks of other programs (JAX in torch in JAX), without a deadlock.

XLA's CPU client lets 32 computations be in flight, and has one thread for each core. A callback
that runs a program on the same client can wait for ever: its program may queue behind computations
that wait for the callback, or all threads may be in callbacks. So the programs of each depth run on
a client of their own, which runs them at once, in the thread that calls.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import jax

from jax_side.calls import compat


class Here(threading.local):
    """How many callbacks of programs this thread is in."""

    depth = 0


here = Here()


@functools.cache
def cpu_device(depth: int) -> Any:
    """Returns the CPU device for programs of a depth. Beneath callbacks it belongs to a client that
    was made for this depth."""
    return compat.cpu_client().local_devices()[0] if depth else jax.local_devices(backend="cpu")[0]
