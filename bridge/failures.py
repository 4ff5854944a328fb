"""Exceptions on their way through a foreign runtime: what is written into its error text, and how the object comes back.

Standard library only. A lane calls `carried(exception)` for the text that it raises inside the foreign runtime; the
object itself is kept only while somebody waits for it (`Listener`), so that no traceback outlives its call otherwise.
"""

from __future__ import annotations

import _thread
import itertools
import sys
import threading
import time
import traceback
from pathlib import Path

_numbers = itertools.count(1)
_listeners: list[Listener] = []
_OURS = tuple(str(Path(__file__).resolve().parents[1] / d) for d in ("bridge", "jax_side", "torch_side"))
_FOREIGN = tuple(f"site-packages/{p}/" for p in ("torch", "jax", "jaxlib", "tvm_ffi", "jax_tvm_ffi"))


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
        return next((e for tag, e in self.heard.items() if tag in text), None)


class Carried(RuntimeError):
    """What a lane raises in place of the user's exception: its type name, text and frame."""


def carried(error: BaseException) -> Carried:
    """The stand-in that crosses the foreign runtime; a KeyboardInterrupt is also sent to the main thread again."""
    tag = f"[bridge error {next(_numbers)}]"
    for listener in _listeners:
        listener.heard[tag] = error
    if isinstance(error, KeyboardInterrupt) and not any(x.thread is threading.main_thread() for x in _listeners):
        _interrupt_again()
    return Carried(f"{describe(error)}\n{tag} `with bridge.raising():` raises the original exception")


def describe(error: BaseException) -> str:
    """Type, text, notes and the user's own frame of an exception."""
    lines = [f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())]
    if frame := _users_frame(error):
        lines.append(f'  raised in File "{frame.filename}", line {frame.lineno}, in {frame.name}: {frame.line}')
    return "\n".join(lines)


def _users_frame(error: BaseException):
    """The innermost frame that belongs to neither framework nor to the bridge; else the innermost of all."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith(_OURS) and not any(p in f.filename for p in _FOREIGN)]
    return (own or frames or [None])[-1]


def _interrupt_again() -> None:
    """Interrupt the main thread anew once it has left the callback: the runtime would turn Ctrl-C into an internal error."""
    callback = sys._getframe(2)
    while callback.f_back and callback.f_back.f_code.co_filename.endswith("callback.py"):  # JAX's own part of it
        callback = callback.f_back
    threading.Thread(target=_interrupt_after, args=(callback, threading.get_ident()), daemon=True).start()


def _interrupt_after(callback, thread: int) -> None:
    """Wait until `callback` is no frame of the thread any more: an interrupt inside it would be swallowed like the first."""
    while _is_running(callback, sys._current_frames().get(thread)):
        time.sleep(1e-4)
    _thread.interrupt_main()


def _is_running(callback, frame) -> bool:
    while frame is not None and frame is not callback:
        frame = frame.f_back
    return frame is not None
