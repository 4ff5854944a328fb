"""Which number stands for which Function in a compiled program: alive as long as a program, also a
running one, can call it."""

from __future__ import annotations

import functools
import itertools
import secrets
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import jax

from bridge.errors import message
from bridge.function import Function
from jax_side.calls.nesting import here


class Owner:
    """What a compiled program holds: while any lives, its number answers."""

    def __init__(self, number: str):
        self.number = number


class Called(NamedTuple):
    """What a number stands for: a Function, the depth of the programs that call it, and what they
    enter by."""

    fn: Function
    depth: int
    n: int
    enter: Callable


lock = threading.RLock()
functions: dict[str, Called] = {}
_numbers: dict[tuple[Function, int], str] = {}
_owners: weakref.WeakValueDictionary[str, Owner] = weakref.WeakValueDictionary()
_retired: set[str] = set()
_pinned: set[Owner] = set()
# A short string: of a numeric attribute jax-tvm-ffi 0.1.3 keeps 16 bytes for each call, for ever;
# strings above 7 bytes crash.
_next = map("{:x}".format, itertools.count(1))


def _entry(fn: Function) -> Callable:
    """What a lane calls."""
    return fn.base.runner(fn, ready=True) if fn.plain else functools.partial(fn.base.run, fn)


def own(fn: Function) -> Owner:
    """The owner of a Function's number for the programs that are lowered here; equal Functions
    share it."""
    release_retired()
    with lock:
        called = fn, here.depth
        number = _numbers.setdefault(called, next(_next))
        if (owner := _owners.get(number)) is None:
            owner = _owners[number] = Owner(number)
            functions[number] = Called(*called, len(fn.inputs), _entry(fn))
            _retired.discard(number)
            weakref.finalize(owner, _retire, number).atexit = False
        return owner


def own_forever(fn: Function) -> Owner:
    """For a program that jax.export writes: it lives until the process ends, by a number that no
    other process has."""
    number = "x" + secrets.token_urlsafe(6)[:6]
    owner = _owners[number] = Owner(number)
    functions[number] = Called(fn, here.depth, len(fn.inputs), _entry(fn))
    _pinned.add(owner)
    return owner


def _retire(number: str) -> None:
    """A finalizer: it may run inside a deallocation, where jax.live_arrays() would revive dead
    arrays, so it only notes."""
    _retired.add(number)


def release_retired() -> None:
    """Forget Functions whose programs are gone, unless an array is still being computed (it may be
    by one of them).

    Called wherever a bridged function is made, called or lowered: a dropped model is freed then,
    not at once."""
    while (gone := tuple(_retired)) and all(
        a.is_deleted() or a.is_ready() for a in jax.live_arrays()
    ):
        # only those noted before the arrays were looked at: what another thread drops meanwhile may
        # be running
        with lock:
            for number in gone:
                _retired.discard(number)
                if number in functions and number not in _owners:
                    del _numbers[functions.pop(number)[:2]]


def unknown(number: str):
    raise RuntimeError(
        message(
            "a program compiled in this process",
            f"a call of Function {number}, which this process does not know (or no longer, as it "
            "ends)",
            "trace and compile it here",
        )
    )


def close() -> None:
    """At exit (after Ctrl-C, say) programs may still run in XLA's threads: their next call fails,
    and Python waits for that, since a thread that asks for the GIL of an interpreter that is gone
    ends the process with SIGABRT."""
    functions.clear()
    for array in jax.live_arrays():
        with suppress(Exception):
            array.block_until_ready()
