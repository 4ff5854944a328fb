"""What both directions need for faults: errors that are planted and expected, and a Ctrl-C that is a
real signal to this process."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


class Planted(ValueError):
    """What the callee raises here, and nothing else does."""


def tick(at: int, do: Callable[[], Any]) -> Callable[..., None]:
    """Something that is done in the call of this number, and in none of the others."""
    calls = [0]

    def count(*_):
        calls[0] += 1
        if calls[0] == at:
            do()

    return count


def planted(first: int) -> Callable[..., None]:
    """Raises Planted in the call of this number, and in each after it."""
    calls = [0]

    def count(*_):
        calls[0] += 1
        if calls[0] >= first:
            raise Planted(f"planted in call {calls[0]}")

    return count


@contextlib.contextmanager
def expect(kind: Any, text: str = "") -> Iterator[None]:
    """AssertionError unless the block ends in an exception of this kind, with this text in it."""
    try:
        yield
    except kind as e:
        if not re.search(text, f"{type(e).__name__}: {e}"):
            raise AssertionError(f"expected {text!r} in an error, got {e}") from e
        return
    raise AssertionError(f"expected {kind} with {text!r}, got no error")


# How Ctrl-C came: as KeyboardInterrupt; as an error of the program, where it met Python code of JAX
# or of jax-tvm-ffi around a callback; or not at all, where a finalizer was running, or code of
# somebody else's that swallows it.
interrupts = {"raised": 0, "as an error": 0, "lost in a finalizer": 0, "lost elsewhere": 0}
_places: list[str] = []  # where Python was when Ctrl-C came, the innermost frame last
_ROOT = Path(__file__).resolve().parents[2]
_OURS = tuple(str(_ROOT / package) for package in ("bridge", "jax_side", "torch_side"))
_AS_ERROR = "KeyboardInterrupt|^INTERNAL: $"


def note_place(number: int, frame: Any) -> None:
    """Python's own handler of Ctrl-C, with a note of where it was."""
    _places[:] = traceback.format_stack(frame)
    raise KeyboardInterrupt


def note_lost(unraisable: Any) -> None:
    """A hook of sys: notes where a KeyboardInterrupt was lost, and prints everything else."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        interrupts["lost in a finalizer"] += 1
    else:
        sys.__unraisablehook__(unraisable)


def listen() -> None:
    """Makes Ctrl-C work here as at a terminal (a shell's background has it ignored), and notes what
    becomes of it. bridge.raising looks at what Python's own handler is."""
    signal.default_int_handler = note_place
    signal.signal(signal.SIGINT, note_place)
    sys.unraisablehook = note_lost


def interrupted(
    call: Callable[[], Any],
    after: float | None = None,
    as_error: bool = True,
    patience: float = 5.0,
) -> None:
    """Makes a call in which Ctrl-C comes, from the callee or `after` so many seconds, or after which
    it does, and waits for KeyboardInterrupt.

    AssertionError where nothing at all comes of it within `patience` seconds, or, without
    `as_error`, an error of the program alone. What finalizers and other packages swallow is counted,
    but no fault of ours: there the innermost frame is not of our packages."""
    before, error = interrupts["lost in a finalizer"], None
    _places.clear()
    try:
        if after is not None:
            threading.Timer(after, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            call()
        except Exception as e:  # the program may end in an error of its own
            error = e
        end = time.monotonic() + patience
        while time.monotonic() < end and interrupts["lost in a finalizer"] == before:
            time.sleep(0.01)
    except KeyboardInterrupt:
        interrupts["raised"] += 1
        return
    if interrupts["lost in a finalizer"] != before:
        return
    if as_error and re.search(_AS_ERROR, str(error)):
        interrupts["as an error"] += 1
    elif error is None and _places and not any(p in _places[-1] for p in _OURS):
        interrupts["lost elsewhere"] += 1
        print("Ctrl-C was lost in", "".join(_places[-4:]), file=sys.stderr)
    else:
        where = "".join(_places[-12:])
        raise AssertionError(f"expected KeyboardInterrupt after Ctrl-C, got {error!r}; {where}")
