"""Functions and callables by number, for the op of torch.library, which can hold nothing else.

The op names its Function by a number. A number answers as long as the Function's base lives, which
the user's own object holds; one that torch.export writes into a program answers until the process
ends.
"""

from __future__ import annotations

import itertools
import secrets
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from bridge.errors import message
from bridge.function import Function

if TYPE_CHECKING:
    from bridge.call import Call

    class Foreign(Function):
        """A Function of the other bank, as annotations of this bank name it.

        It is a ForeignBase or a transform of one. No object is an instance of this class."""

        @property
        def base(self) -> ForeignBase: ...

    class ForeignBase(Foreign):
        """What the other bank's exporter gives for one signature; annotations name it alone.

        `call` says how its arrays become a call. `out_tree.unflatten` puts its outputs in the
        user's pytree. `compilations` counts the programs that were compiled for it and its
        transforms. `record` gives the pair of programs that serves a forward and its backward."""

        call: Call
        out_tree: Any
        compilations: int

        def record(self, fn: Function, wrt: tuple[int, ...]) -> Recorder: ...


class Recorder(Protocol):
    """The other bank's pair of programs, of a forward and its backward, on lent memory."""

    def forward(self, lent: list) -> tuple[list, list, Any]:
        """Returns the outputs, what is kept for a backward, and a plan that `backward` is given."""
        ...

    def backward(
        self,
        own_and_plan: Any,
        needed: tuple[int, ...],
        inputs: list,
        outputs: list,
        kept: list,
        cotangents: dict[int, Any],
    ) -> list:
        """Returns the gradients of the inputs `needed`, by the convention of torch."""
        ...


class Registered(Protocol):
    """What `register` takes: it gives the Function of a call, and the tensors of that call."""

    def function(
        self, args: Sequence, kwargs: Mapping[str, Any]
    ) -> tuple[ForeignBase, list[torch.Tensor]]:
        """Returns the Function for the signature of a call, and its tensors."""
        ...


_bases: weakref.WeakValueDictionary[str, Function] = weakref.WeakValueDictionary()
_callables: weakref.WeakValueDictionary[str, Registered] = weakref.WeakValueDictionary()
_exported: dict[str, Function] = {}
# No other process has these numbers: torch.compile keeps compiled graphs on disk.
_next = map(f"{secrets.token_urlsafe(6)}.{{}}".format, itertools.count(1))


def register(target: Registered) -> str:
    """Returns a token by which code under torch.compile finds `target`, as long as that lives."""
    token = next(_next)
    _callables[token] = target
    return token


def call(fn: Function, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Returns the outputs of bridge::call for a Function."""
    return torch.ops.bridge.call(list(tensors), number(fn))


def number(fn: Function) -> str:
    """Returns the number of the base and the place of `fn` among the Functions derived from it."""
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


def lookup(number: str) -> Foreign:
    """Returns the Function that `number` gave this number for.

    Raises: RuntimeError for a number of another process, or of a Function that is gone."""
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


def known(token: str) -> Registered:
    """Returns the callable that `register` gave this token for."""
    return _callables[token]
