"""Which number stands for which Function in a compiled program: alive as long as a program, also a
running one, can call it."""

from __future__ import annotations

import functools
import itertools
import re
import secrets
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import jax

from bridge.errors import message
from bridge.function import Function
from jax_side.calls import compat, ending, processes
from jax_side.calls.nesting import here


class Owner:
    """What a compiled program holds. A number stands for its Function as long as an owner of it
    lives."""

    def __init__(self, number: str) -> None:
        self.number = number


class Called(NamedTuple):
    """What a number stands for."""

    fn: Function
    depth: int  # of the programs that call it
    n: int  # of its inputs
    enter: Callable[..., Any]  # what a lane calls
    release: Callable[[], Any]  # what is done when no program needs it any more
    telling: bool = False  # whether it is a program for several devices


lock = threading.RLock()
functions: dict[str, Called] = {}
_numbers: dict[tuple[Function, int, bool], str] = {}
_owners: weakref.WeakValueDictionary[str, Owner] = weakref.WeakValueDictionary()
_retired: set[str] = set()
# Their owners are gone, programs that call them are not: JAX lets go of what it keeps for a program
# while another jitted function that equals the first (a bound method, a bridged function) runs it.
_outliving: set[str] = set()
_pinned: set[Owner] = set()
# Numbers are short strings: of a numeric attribute jax-tvm-ffi 0.1.3 keeps 16 bytes for each call,
# for ever, and strings of more than 7 bytes crash it.
_next = map("{:x}".format, itertools.count(1))


def _entry(fn: Function) -> Callable[..., Any]:
    """What a lane calls."""
    if fn.symbolic:
        return _sized(fn)
    return fn.base.runner(fn, ready=True) if fn.plain else functools.partial(fn.base.run, fn)


def _sized(fn: Function) -> Callable[..., Any]:
    """What a lane calls where the sizes of batches are known in the call alone."""
    entry = functools.lru_cache(maxsize=64)(lambda shapes: _entry(fn.of_shapes(shapes)))

    def enter(given: Any, into: Any) -> Any:
        return entry(tuple(tuple(x.shape) for x in given))(given, into)

    return enter


def own(
    fn: Function,
    key: str | None = None,
    release: Callable[[], Any] | None = None,
    telling: bool = False,
) -> Owner:
    """Returns the owner of a Function's number, for a program that is being lowered. Equal
    Functions share it. `telling` says that it is a program for several
    devices (jax_side.calls.processes).

    The number may be given, as the `key` of a package; `release` is then called when no program
    needs it any more."""
    release_retired(thorough=True)
    ending.expect(functions.clear)
    with lock:
        called = fn, here.depth, telling
        number = key or _numbers.setdefault(called, next(_next))
        if (owner := _owners.get(number)) is None:
            owner = _owners[number] = Owner(number)
            release = release or functools.partial(_numbers.pop, called)
            enter = processes.telling(_entry(fn)) if telling else _entry(fn)
            functions[number] = Called(fn, here.depth, len(fn.inputs), enter, release, telling)
            _retired.discard(number)
            _outliving.discard(number)
            weakref.finalize(owner, _retire, number).atexit = False
        return owner


def _nothing() -> None:
    """The release of what is never let go."""


def own_forever(fn: Function, number: str | None = None) -> Owner:
    """Returns an owner for a program that jax.export writes. It lives until the process ends.

    `number` is one that other processes know, too (jax_side.calls.named); None makes one that no
    other process has."""
    ending.expect(functions.clear)
    number = number or "x" + secrets.token_urlsafe(6)[:6]
    owner = _owners[number] = Owner(number)
    functions[number] = Called(fn, here.depth, len(fn.inputs), _entry(fn), _nothing)
    keep_forever(owner)
    return owner


def keep_forever(owner: Owner) -> None:
    """Keeps an owner until the process ends."""
    _pinned.add(owner)


def _retire(number: str) -> None:
    """Notes that an owner is gone. This is a finalizer, and does no more: it may run inside a
    deallocation, where jax.live_arrays() would revive dead arrays."""
    _retired.add(number)


def release_retired(thorough: bool = False) -> None:
    """Forgets Functions whose programs are gone. `thorough` looks again at those of which a program
    has outlived what JAX kept for it.

    As long as an array is being computed, which one of these programs may do, nothing is forgotten.
    This is called wherever a bridged function is made, called or lowered: a dropped model is freed
    then, not at once.
    """
    if thorough and _outliving:
        with lock:
            _retired.update(_outliving)
            _outliving.clear()
    while (gone := tuple(_retired)) and all(
        a.is_deleted() or a.is_ready() for a in jax.live_arrays()
    ):
        # Only those that were noted before the arrays were looked at: what another thread drops
        # meanwhile may still be running.
        with lock:
            called = _called_by_programs()
            for number in gone:
                _retired.discard(number)
                if number not in functions or number in _owners:
                    continue
                if called is None or number in called:
                    _outliving.add(number)
                else:
                    functions.pop(number).release()


_called: dict[bytes, frozenset[str]] = {}  # by the fingerprint of a program


def _called_by_programs() -> set[str] | None:
    """Returns the numbers that the programs of this process call; None where XLA does not say."""
    found: set[str] = set()
    known = dict(_called)
    _called.clear()
    for fingerprint, text in compat.live_programs():
        if fingerprint is None:
            return None
        numbers = known.get(fingerprint)
        if numbers is None:
            numbers = frozenset(re.findall(r'\b(?:number|package) = "([^"]+)"', text()))
        _called[fingerprint] = numbers
        found |= numbers
    return found


def unknown(number: str) -> NoReturn:
    """Raises RuntimeError for a number that stands for nothing in this process."""
    if ending.begun:
        ending.refuse()
    raise RuntimeError(
        message(
            "a program compiled in this process",
            f"a call of Function {number}, which this process does not know",
            "trace and compile it here",
        )
    )
