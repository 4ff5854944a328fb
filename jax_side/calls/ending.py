"""The end of a process in which programs still run: their calls fail from then on, and Python waits
until none can come any more.

A thread of XLA that asks for the lock of an interpreter that is gone ends the process with SIGABRT.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import sys
import threading
import time
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from bridge.errors import message
from jax_side.calls import compat

F = TypeVar("F", bound=Callable[..., Any])

LIMIT = 10.0  # seconds that calls have to end
QUIET = 3.0  # seconds after the last call that failed, for devices that wait for it in a collective
SETTLE = 0.1  # seconds after the last call, for daemon threads, which may call again
PATIENCE = 1.0  # seconds after which threads that call again and again are stopped
_STEP = 0.002

begun = False  # whether the process ends
_expected = False  # whether programs may run
_last = 0.0  # when a call was refused
_calls: set[CodeType] = set()
_hooks: list[Callable[[], Any]] = []


def call(f: F) -> F:
    """Marks a function in whose frames the user's code runs, called by XLA."""
    _calls.add(f.__code__)
    return f


def expect(hook: Callable[[], Any] | None = None) -> None:
    """Says that programs may run. `hook` makes their calls fail, and returns how many of them have
    failed that don't come to `refuse`; None: they look at `begun`."""
    global _expected
    _expected = True
    if hook is not None and hook not in _hooks:
        _hooks.append(hook)


def refuse() -> NoReturn:
    """Raises RuntimeError for a call that comes as the process ends."""
    global _last
    _last = time.monotonic()
    do = "wait for its results by jax.block_until_ready, and don't call it in atexit handlers"
    raise RuntimeError(message("a call before the process ends", "one at its end", do))


def refuse_threads() -> None:
    """Raises RuntimeError in a thread that goes on as the process ends. Handlers at exit may call
    JAX in torch."""
    if threading.current_thread() is not threading.main_thread():
        refuse()


@atexit.register  # after JAX's own, so that it runs before them
def end() -> None:
    """Ends the programs of this process, or leaves those that don't end where they are."""
    global begun
    if not _expected or not compat.has_started():
        return
    clean = False
    try:
        compat.wait_for_ordered_effects()
        begun = True
        compat.log_no_failed_callbacks()
        _refused()
        clean = _wait()
    finally:
        if clean:
            compat.forget_errors("[bridge error")
        else:
            compat.leave_programs()


def _wait() -> bool:
    """Waits until no call runs and none can come. Returns False where it was in vain."""
    global _last
    start = time.monotonic()
    refused = _refused()
    pending = [*_markers(), *jax.live_arrays()]
    while True:
        now = time.monotonic()
        pending = [a for a in pending if not _is_ready(a)]
        before, refused = refused, _refused()
        if refused != before:
            _last = now
        settled = now - max(_last, start) > SETTLE or threading.active_count() == 1
        running = _running()
        if settled and not running and not pending:
            return True
        stuck = _last and not running and now - _last > QUIET
        if stuck or now - start > LIMIT:
            return False
        if not settled and now - start > PATIENCE:
            _stop_threads()
        time.sleep(_STEP)


def _refused() -> list[Any]:
    """Calls the hooks."""
    return [hook() for hook in _hooks]


def _stop_threads() -> None:
    """Stops the daemon threads, one of which calls again and again, at their next step in Python."""
    for thread in threading.enumerate():
        if thread.daemon and thread.ident is not None:
            ident, stop = ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, stop)


def _markers() -> list[jax.Array]:
    """Arrays that are ready once all programs have ended that this thread has begun, or that run on
    several devices: XLA keeps their order."""
    found: list[jax.Array] = []
    with contextlib.suppress(Exception):
        devices = jax.local_devices()
        places: list[Sharding] = [SingleDeviceSharding(d) for d in devices]
        if len(devices) > 1:
            places.append(NamedSharding(Mesh(np.array(devices), ("devices",)), P("devices")))
        for place in places:
            shape = (len(devices),) if isinstance(place, NamedSharding) else ()
            found.append(jax.jit(lambda shape=shape: jnp.zeros(shape), out_shardings=place)())
    return found


def _is_ready(array: Any) -> bool:
    try:
        return array.is_deleted() or array.is_ready()
    except Exception:  # it failed
        return True


def _running() -> bool:
    """Whether a thread is in a call."""
    return any(map(_in_call, sys._current_frames().values()))


def _in_call(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code not in _calls:
        frame = frame.f_back
    return frame is not None
