"""Exceptions on their way through a foreign runtime: what is written into its error text, and how
the object comes back.

Standard library only. A lane calls `carried(exception)` for the text that it raises inside the
foreign runtime. The object itself is kept only while a `Listener` waits for it, so that no other
traceback outlives its call.
"""

from __future__ import annotations

import _thread
import contextlib
import itertools
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

_numbers = itertools.count(1)
_listeners: list[Listener] = []
# Each gives an error that calls which have returned have found since, or None.
late: list[Callable[[], BaseException | None]] = []
_OURS = tuple(
    str(Path(__file__).resolve().parents[1] / d) for d in ("bridge", "jax_side", "torch_side")
)
_CALLBACKS = ("jax_side/calls/lanes.py", "jax/_src/callback.py")
_FOREIGN = tuple(
    f"site-packages/{p}/" for p in ("torch", "jax", "jaxlib", "tvm_ffi", "jax_tvm_ffi")
)


class Listener:
    """Collects the exceptions of a stretch of code by number.

    `heard` holds them, and `thread` is the thread that waits for them.
    """

    def __init__(self) -> None:
        self.heard: dict[str, BaseException] = {}
        self.thread = threading.current_thread()

    def __enter__(self) -> Listener:
        _listeners.append(self)
        return self

    def __exit__(self, *_: Any) -> None:
        _listeners.remove(self)

    def original(self, error: BaseException) -> BaseException | None:
        """Returns the exception whose number stands in the text of `error`, None if there is
        none."""
        text = str(error)
        found = next((e for tag, e in self.heard.items() if tag in text), None)
        if found is not None:
            release(found)
        return found


@contextlib.contextmanager
def noting_interrupts() -> Iterator[list[int]]:
    """Gives a list in which each Ctrl-C of the block is noted, beside what Python does with it.

    One that comes while a program runs in the main thread may be raised in the first frame above
    the foreign runtime, before any `try` in it, and is then an error of that runtime that tells
    nothing of it. Where the user has a handler of his own, and in other threads, nothing is
    noted."""
    noted: list[int] = []
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield noted
        return

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        if signal.getsignal(signal.SIGINT) is note:
            signal.signal(signal.SIGINT, signal.default_int_handler)


class Carried(RuntimeError):
    """What a lane raises in place of the user's exception: its type name, text and frame."""


def carried(error: BaseException) -> Carried:
    """Returns the stand-in of an exception that crosses the foreign runtime.

    A KeyboardInterrupt is sent to the main thread again, unless that is waiting for it.
    """
    tag = f"[bridge error {next(_numbers)}]"
    for listener in _listeners:
        listener.heard[tag] = error
    if isinstance(error, KeyboardInterrupt) and not any(
        x.thread is threading.main_thread() for x in _listeners
    ):
        _interrupt_again()
    text = f"{describe(error)}\n{tag} `with bridge.raising():` raises the original exception"
    release(error)
    return Carried(text)


def release(error: BaseException) -> None:
    """Clears the local variables of finished frames behind an exception and behind its causes.

    Some of these variables are tensors over memory that is freed.
    """
    cause: BaseException | None = error
    while cause is not None:
        for frame, _ in traceback.walk_tb(cause.__traceback__):
            _clear(frame)
        if cause.__traceback__:
            for frame in _callback(cause.__traceback__.tb_frame):
                _clear(frame)
        cause = cause.__cause__ or cause.__context__


def _callback(frame: FrameType) -> Iterator[FrameType]:
    """Gives the frames of the callback that `frame` is in, from it outwards: the lane's, and JAX's
    own, which hold the arrays as well. Beyond them lies the user's program."""
    yield frame
    while (outer := frame.f_back) and outer.f_code.co_filename.endswith(_CALLBACKS):
        yield outer
        frame = outer


def _clear(frame: FrameType) -> None:
    with contextlib.suppress(RuntimeError):  # still running
        frame.clear()


def describe(error: BaseException) -> str:
    """Returns type, text and notes of an exception, and the user's own frame that raised it."""
    lines = [f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())]
    if _users_frame(error):
        lines.append(f"  raised in {place(error)}")
    return "\n".join(lines)


def place(error: BaseException) -> str:
    """Returns the file, the line and the text of the user's own frame that raised an exception."""
    frame = _users_frame(error)
    if frame is None:
        return "code without a file"
    return f'File "{frame.filename}", line {frame.lineno}, in {frame.name}: {frame.line}'


def _users_frame(error: BaseException) -> traceback.FrameSummary | None:
    """The innermost frame that belongs to neither framework nor to the bridge. The innermost of all
    if there is no such frame."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        f
        for f in frames
        if not f.filename.startswith(_OURS) and not any(p in f.filename for p in _FOREIGN)
    ]
    return (own or frames or [None])[-1]


def _interrupt_again() -> None:
    """Interrupts the main thread anew once it has left the callback.

    The runtime would turn the first interrupt into an internal error.
    """
    *_, outermost = _callback(sys._getframe(2))
    waiting = (outermost, threading.get_ident())
    threading.Thread(target=_interrupt_after, args=waiting, daemon=True).start()


def _interrupt_after(callback: FrameType, thread: int) -> None:
    """Waits until `callback` is no frame of the thread any more. An interrupt inside of it would be
    swallowed like the first, and a later one than the runtime's own error would come too late."""
    while _is_running(callback, sys._current_frames().get(thread)):
        time.sleep(0)
    _thread.interrupt_main()


def _is_running(callback: FrameType, frame: FrameType | None) -> bool:
    while frame is not None and frame is not callback:
        frame = frame.f_back
    return frame is not None
