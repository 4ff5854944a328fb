"""Bridged functions that exported programs find again in another process: by the name that a user
gave, and by a fingerprint of what is behind it.

A program calls a Function by a number (jax_side.calls.registry). That of a named one is made of its
recipe: the name, the fingerprint, the types and structure of its arguments, and its transforms.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
from typing import Any

import jax

from bridge import recipes
from bridge.call import static_leaf
from bridge.errors import message
from bridge.function import Function, Spec
from jax_side.calls import lanes, registry
from jax_side.calls.registry import Owner
from jax_side.calls.signature import Signature

Recipe = dict[str, Any]
callables: dict[str, Any] = {}  # by name: the last JaxCallable of that name
_recipes: dict[str, Recipe] = {}  # by number
_PLAIN = (bool, int, float, str, type(None))


def own(fn: Function) -> Owner:
    """Returns the owner of a named Function's number, for a program that is exported."""
    recipe = written(fn)
    numbers = (_number(recipe, salt) for salt in itertools.count())
    number = next(n for n in numbers if _recipes.setdefault(n, recipe) == recipe)
    return registry.own_forever(fn, number)


def _number(recipe: Recipe, salt: int) -> str:
    """Seven letters: jax-tvm-ffi takes no more."""
    told = json.dumps([recipe, salt], sort_keys=True).encode()
    return "n" + base64.urlsafe_b64encode(hashlib.sha256(told).digest())[:6].decode()


def written(fn: Function) -> Recipe:
    """Returns the recipe of a named Function.

    Raises: NotImplementedError for arguments that JSON can't hold."""
    base: Any = fn.base
    named = base.memo["named"]
    call = base.call
    leaves = call.tree.num_leaves
    return {
        "name": named.name,
        "fingerprint": named.fingerprint(),
        "inputs": [[[*s.shape], s.dtype] for s in base.inputs],
        "outputs": [[[*s.shape], s.dtype] for s in base.outputs],
        "arguments": _encoded(call.tree.unflatten(range(leaves)), named.name),
        "static": [[position, _plain(value, named.name)] for position, _, value in call.static],
        "transforms": recipes.written(fn),
    }


def recipes_in(program: str) -> dict[str, Recipe]:
    """Returns the recipes of the named Functions that a program calls, by number, given its text in
    MLIR.

    Raises: KeyError for a call of a Function that has no name."""
    numbers = sorted(set(re.findall(r'\bnumber = "([^"]+)"', program)))
    return {number: _recipes[number] for number in numbers}


def answer(number: str, recipe: Recipe) -> None:
    """Lets a number of a loaded program stand for the named Function of this process.

    Raises: ValueError where no function of that name is there, or another one."""
    name = recipe["name"]
    expected = f"a bridged function with name={name!r}, as the program was exported with"
    do = f"bridge.to_jax(model, name={name!r}) with that model, before the program is loaded"
    if name not in callables:
        there = ", ".join(map(repr, callables)) or "none"
        raise ValueError(message(expected, f"{there} in this process", do))
    named = callables[name]
    if named.fingerprint() != recipe["fingerprint"]:
        got = "one of other weights, other code or other options"
        raise ValueError(message(expected, got, do))
    if number not in {_number(recipe, salt) for salt in range(8)}:
        raise ValueError(message("recipes as they were saved", "altered ones", "save it again"))
    specs = lambda key: tuple(Spec(tuple(shape), dtype) for shape, dtype in recipe[key])
    static = [static_leaf(position, value, "arrays") for position, value in recipe["static"]]
    structure = jax.tree_util.tree_structure(_decoded(recipe["arguments"]))
    base = named.base(Signature(structure, specs("inputs"), tuple(static)))
    if base.outputs != specs("outputs"):
        got = "one with " + ", ".join(map(str, base.outputs))
        raise ValueError(message(expected, got, do))
    _recipes[number] = recipe
    lanes.register_ffi(base.tensor_type)
    registry.own_forever(recipes.read(recipe["transforms"], base), number)


def _encoded(x: Any, name: str) -> Any:
    """The structure of arguments in JSON; leaves are their numbers."""
    if x is None or isinstance(x, int):
        return x
    if type(x) in (tuple, list):
        return {type(x).__name__: [_encoded(y, name) for y in x]}
    if type(x) is dict and all(isinstance(key, str) for key in x):
        return {"dict": {key: _encoded(y, name) for key, y in x.items()}}
    raise _no_json(f"a {type(x).__name__}", name)


def _decoded(x: Any) -> Any:
    """The structure again, with numbers for leaves."""
    if not isinstance(x, dict):
        return x
    ((kind, inner),) = x.items()
    if kind == "dict":
        return {key: _decoded(y) for key, y in inner.items()}
    return (tuple if kind == "tuple" else list)(map(_decoded, inner))


def _plain(value: Any, name: str) -> Any:
    if type(value) not in _PLAIN:
        raise _no_json(f"{value!r:.60}", name)
    return value


def _no_json(got: str, name: str) -> NotImplementedError:
    expected = f"arguments of {name!r} that are arrays, numbers, strings, or dicts, lists and tuples of these"
    return NotImplementedError(message(expected, got, "pass them so, or take lane='native'"))
