"""Errors that nobody waits for: what a call on a GPU found wrong is raised by one of the next.

The host runs ahead of a GPU, and a step that read a value would hold it up. So the status of a call
(torch_side.calls.status) is copied to the host behind the call, and looked at when it has arrived,
as CUDA itself does with errors of kernels. The results of the call are NaN until then.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

import torch

from bridge import failures
from torch_side.calls.status import WIDTH, Status


@dataclass
class _Found:
    """The status of one call, on its way to the host.

    row     in pinned memory, or on the CPU anyway
    there   what has happened when the row has arrived (None: it has)
    status  the texts
    who     the name of what was called"""

    row: torch.Tensor
    there: torch.cuda.Event | None
    status: Status
    who: str


_on_its_way: deque[_Found] = deque()
_lock = threading.Lock()


def keep(status: Status, who: str) -> None:
    """Has the status of a call looked at later. `who` names what was called in the error text."""
    row = status.row()
    if row is None:
        return
    there = None
    if row.is_cuda:
        host = torch.empty(WIDTH, dtype=row.dtype, pin_memory=True)
        row, there = host.copy_(row, non_blocking=True), torch.cuda.Event()
        there.record()
    with _lock:
        _on_its_way.append(_Found(row, there, status, who))


def check() -> None:
    """Raises what earlier calls found wrong, as far as it is known by now.

    Raises: ValueError; the first one is raised, and what came after it, mostly by reason of it, is
    forgotten."""
    if error := known(wait=False):
        raise error


def known(wait: bool) -> ValueError | None:
    """Returns the first error of earlier calls, and forgets the others. With `wait` all calls are
    waited for."""
    with _lock:
        while _on_its_way:
            first = _on_its_way[0]
            if first.there is not None and wait:
                first.there.synchronize()
            if first.there is not None and not first.there.query():
                return None
            _on_its_way.popleft()
            if text := first.status.text(first.row.tolist()):
                _on_its_way.clear()
                error = ValueError(text)
                error.add_note(
                    f"bridge: an earlier call of {first.who} found this; a GPU is not waited for, "
                    "so that a later call raises it"
                )
                return error
    return None


failures.late.append(lambda: known(wait=True))
