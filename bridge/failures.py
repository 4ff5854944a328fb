"""Exceptions on their way through a foreign runtime: what is written into its error text, and how
the object comes back.

Standard library only. A lane calls `carried(exception)` for the text that it raises inside the
foreign runtime; the object itself is kept only while somebody waits for it (`Listener`), so that no
traceback outlives its call otherwise.
"""

from __future__ import annotations

import _thread
import contextlib
import itertools
import sys
import threading
import time
import traceback
from pathlib import Path

_numbers = itertools.count(1)
_listeners: list[Listener] = []
_OURS = tuple(
    str(Path(__file__).resolve().parents[1] / d) for d in ("bridge", "jax_side", "torch_side")
)
_FOREIGN = tuple(
    f"site-packages/{p}/" for p in ("torch", "jax", "jaxlib", "tvm_ffi", "jax_tvm_ffi")
)


class Listener:
    """Collects the exceptions of a stretch of code by number."""

    def __init__(self):
        self.heard: dict[str, BaseException] = {}
        self.thread = threading.current_thread()

    def __enter__(self):
        _listeners.append(self)
        return self

    def __exit__(self, *_):
        _listeners.remove(self)

    def original(self, error: BaseException) -> BaseException | None:
        """The exception whose number stands in the text of `error`."""
        text = str(error)
        found = next((e for tag, e in self.heard.items() if tag in text), None)
        if found is not None:
            release(found)
        return found


class Carried(RuntimeError):
    """What a lane raises in place of the user's exception: its type name, text and frame."""


def carried(error: BaseException) -> Carried:
    """The stand-in that crosses the foreign runtime; a KeyboardInterrupt is also sent to the main
    thread again."""
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
    """Clear the local variables of finished frames behind an exception: some are tensors over
    memory that is freed."""
    while error is not None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            _clear(frame)
        if error.__traceback__:
            _clear_callers(error.__traceback__.tb_frame.f_back)
        error = error.__cause__ or error.__context__


def _clear_callers(frame) -> None:
    """JAX's own part of a callback holds the arrays, too; beyond it lies the user's program."""
    while frame is not None and frame.f_code.co_filename.endswith("callback.py"):
        _clear(frame)
        frame = frame.f_back


def _clear(frame) -> None:
    with contextlib.suppress(RuntimeError):  # still running
        frame.clear()


def describe(error: BaseException) -> str:
    """Type, text, notes and the user's own frame of an exception."""
    lines = [f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())]
    if frame := _users_frame(error):
        lines.append(
            f'  raised in File "{frame.filename}", line {frame.lineno}, in {frame.name}: {frame.line}'
        )
    return "\n".join(lines)


def _users_frame(error: BaseException):
    """The innermost frame that belongs to neither framework nor to the bridge; else the innermost
    of all."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        f
        for f in frames
        if not f.filename.startswith(_OURS) and not any(p in f.filename for p in _FOREIGN)
    ]
    return (own or frames or [None])[-1]


def _interrupt_again() -> None:
    """Interrupt the main thread anew once it has left the callback: the runtime would turn Ctrl-C
    into an internal error."""
    callback = sys._getframe(2)
    while callback.f_back and callback.f_back.f_code.co_filename.endswith(
        "callback.py"
    ):  # JAX's own part of it
        callback = callback.f_back
    threading.Thread(
        target=_interrupt_after, args=(callback, threading.get_ident()), daemon=True
    ).start()


def _interrupt_after(callback, thread: int) -> None:
    """Wait until `callback` is no frame of the thread any more: an interrupt inside it would be
    swallowed like the first."""
    while _is_running(callback, sys._current_frames().get(thread)):
        time.sleep(1e-4)
    _thread.interrupt_main()


def _is_running(callback, frame) -> bool:
    while frame is not None and frame is not callback:
        frame = frame.f_back
    return frame is not None
