"""Other processes than this one: jobs of several under jax.distributed, where one that fails ends
them all, and forks, in which JAX can't run."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

from bridge.errors import message
from bridge.failures import Carried, describe
from jax_side.calls import compat, ending

KEY = "bridge/error"
PERIOD = 0.5  # seconds between two looks at what other processes tell
GRACE = 10.0  # seconds in which a process may end by itself
forked = False  # whether this process is a fork of one in which JAX ran


def _note_fork() -> None:
    global forked
    forked = forked or compat.has_started()


os.register_at_fork(after_in_child=_note_fork)


def check_own() -> None:
    """Raises RuntimeError in a fork of a process in which JAX ran: its threads are gone, and a
    program would wait for them for ever."""
    if forked:
        expected = "a process of its own for JAX"
        got = "a fork of one in which JAX has run"
        do = 'start it by spawn or forkserver: DataLoader(..., multiprocessing_context="spawn")'
        raise RuntimeError(message(expected, got, do))


def telling(enter: Callable[..., Any]) -> Callable[..., Any]:
    """Returns what a lane calls in a program for several devices: where it raises, the error is
    said at once, since the other devices may wait in a collective until XLA ends the process. Other
    processes of a job are told."""
    watch()

    def told(*arguments: Any) -> Any:
        try:
            return enter(*arguments)
        except BaseException as error:
            if not ending.begun:
                tell(error)
            raise

    return told


def tell(error: BaseException) -> None:
    """Tells all processes of this job of an error. The first one is kept.

    It is said here, too: this process may wait in a collective for its other devices, and be ended
    before it can raise."""
    process, client = compat.job()
    error.add_note(
        "bridge: on one of several devices, which counts systems and atoms of its own part"
    )
    text = str(error) if isinstance(error, Carried) else describe(error)
    if client is None:
        _say(f"a call on one of several devices failed: {text}")
        return
    _say(f"process {process} of this job failed: {text}")
    # another process was first, or the job is ending
    with contextlib.suppress(Exception):
        client.key_value_set(KEY, f"{process} {text}")


def _say(text: str) -> None:
    print(f"bridge: {text}", file=sys.stderr, flush=True)


@functools.cache
def watch() -> None:
    """Ends this process if another one of the job fails."""
    process, client = compat.job()
    if client is None:
        return
    ending = threading.Event()
    watching = threading.Thread(target=_watch, args=(process, client, ending), daemon=True)
    atexit.register(watching.join)
    atexit.register(ending.set)  # which comes first
    watching.start()


def _watch(process: int, client: Any, ending: threading.Event) -> None:
    """Looks for what another process tells. To wait for it would be to wait at exit."""
    found = None
    while found is None and not ending.wait(PERIOD):
        with contextlib.suppress(Exception):
            found = client.key_value_try_get(KEY)
    if found is None:
        return
    other, _, text = found.partition(" ")
    if int(other) == process:
        return
    _say(f"process {other} of this job failed, and so process {process} ends: {text}")
    if not ending.wait(GRACE):
        os._exit(1)
