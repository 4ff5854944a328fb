"""Functions and callables by number, for the op of torch.library, which can hold nothing else.

The op names its Function by a number. A number answers as long as the Function's base lives, which
the user's own object holds; one that torch.export writes into a program answers until the process
ends.
"""

from __future__ import annotations

import itertools
import secrets
import weakref
from typing import Any

import torch

from bridge.errors import message
from bridge.function import Function

_bases: weakref.WeakValueDictionary[str, Function] = weakref.WeakValueDictionary()
_callables: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
_exported: dict[str, Function] = {}
# No other process has these numbers: torch.compile keeps compiled graphs on disk.
_next = map(f"{secrets.token_urlsafe(6)}.{{}}".format, itertools.count(1))


def register(target) -> str:
    """The token by which code under torch.compile finds a callable of the other bank, as long as it
    lives."""
    token = next(_next)
    _callables[token] = target
    return token


def call(fn: Function, tensors) -> list:
    """bridge::call of a Function."""
    return torch.ops.bridge.call(list(tensors), number(fn))


def number(fn: Function) -> str:
    """The number of the base, and the place of `fn` among the Functions derived from it."""
    base = fn.base
    family = base.memo.setdefault("family", [])
    if "number" not in base.memo:
        base.memo["number"] = next(_next)
        _bases[base.memo["number"]] = base
    if torch.compiler.is_exporting() and base.memo["number"] not in _exported:
        base.memo["number"] = "x" + secrets.token_urlsafe(9)  # no other process has it
        _bases[base.memo["number"]] = _exported[base.memo["number"]] = base
    if fn not in family:
        family.append(fn)
    return f"{base.memo['number']}:{family.index(fn)}"


def lookup(number: str) -> Function:
    base, _, place = number.partition(":")
    found = _bases.get(base)
    family = found.memo["family"] if found else ()
    if not place.isdecimal() or int(place) >= len(family):
        do = "compile or export again in this process, and keep what bridge.to_torch or bridge.module returned while the program is used"
        raise RuntimeError(
            message(
                "a JAX function of this process",
                f"bridge::call of {number}, which this process does not know (or no longer)",
                do,
            )
        )
    return family[int(place)]


def known(token: str):
    """The callable that `register` gave this token for."""
    return _callables[token]
