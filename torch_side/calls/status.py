"""Checks of values in a program that nothing reads on the host: what is wrong goes into a row of
numbers, the status, and the error is raised from that later.

A row is (code, n, n, ...) in float64. Code 0 says that all is well. Any other code stands for a
text, in which the numbers take the places {} in their order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float

# private in torch 2.13: the tensor beneath a wrapper of torch.func, and where its batch axis is
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor, maybe_get_bdim

WIDTH = 6  # of a row: a code and five numbers


@dataclass
class Status:
    """The checks of one evaluation, the most urgent first.

    texts      the text of each code, from 1 on
    rows       what each check found (WIDTH,)
    may_read   whether what needs values may read them, for nothing is compiled"""

    texts: list[str] = field(default_factory=list)
    rows: list[Float[torch.Tensor, " width"]] = field(default_factory=list)
    may_read: bool = False

    def note(
        self,
        bad: Bool[torch.Tensor, " K"],
        text: str,
        *numbers: torch.Tensor,
        first: torch.Tensor | None = None,
    ) -> None:
        """Notes that something is wrong if an entry of `bad` is True.

        `numbers`, each as long as `bad`, fill the places of `text` with their entries at the first
        place that is bad, or at the place `first` (a scalar), which is bad if any is."""
        bad = _beneath(bad)
        self.texts.append(text)
        if not bad.numel():
            self.rows.append(bad.new_zeros(WIDTH, dtype=torch.float64))
            return
        bad = bad.reshape(-1)
        place = bad.int().argmax() if first is None else _beneath(first)
        # x[place] would read the place on the host
        at = lambda x: x.reshape(-1).index_select(0, place.reshape(1)).to(torch.float64)
        self.rows.append(_row([at(bad) * len(self.texts), *(at(_beneath(x)) for x in numbers)]))

    def row(self, since: int = 0) -> Float[torch.Tensor, " width"] | None:
        """Returns the row of the first check, from the one with the number `since` on, that found
        something wrong, and keeps it in place of those. None if there was no check."""
        if len(self.rows) <= since:
            return None
        *before, found = self.rows[since:]
        for row in reversed(before):
            found = torch.where(row[:1] != 0, row, found)
        self.rows[since:] = [found]
        return found

    def text(self, row: Sequence[float]) -> str | None:
        """Returns the text of a row, None if all is well."""
        if not row[0]:
            return None
        text = self.texts[int(row[0]) - 1]
        for number in row[1:]:
            text = text.replace("{}", f"{number:g}", 1)
        return text


def _row(entries: Sequence[Float[torch.Tensor, " one"]]) -> Float[torch.Tensor, " width"]:
    """A row that begins with these entries.

    Compilers give torch.cat of the same a place in memory for each entry, which takes longer than
    all else here."""
    column = torch.arange(WIDTH, device=entries[0].device)
    row = torch.zeros_like(column, dtype=torch.float64)
    for k, entry in enumerate(entries):
        row = torch.where(column == k, entry, row)
    return row


_CURRENT: ContextVar[Status | None] = ContextVar("status", default=None)


def current() -> Status | None:
    """Returns the Status that is being collected, None where values may be read at once."""
    return _CURRENT.get()


@contextlib.contextmanager
def collecting(status: Status | None = None) -> Iterator[Status]:
    """Gives a Status: within the `with`, checks go into it, and no value is read on the host.

    None makes a new one."""
    status = Status() if status is None else status
    token = _CURRENT.set(status)
    try:
        yield status
    finally:
        _CURRENT.reset(token)


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Within the `with`, values are read, whether or not a Status is being collected outside."""
    token = _CURRENT.set(None)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def _beneath(x: torch.Tensor) -> torch.Tensor:
    """A tensor of torch.func as what lies beneath: its value, or the values of all examples."""
    while is_functorch_wrapped_tensor(x):
        axis = maybe_get_bdim(x)
        x = get_unwrapped(x)
        if axis >= 0:
            x = x.movedim(axis, 0)
    return x.detach()
