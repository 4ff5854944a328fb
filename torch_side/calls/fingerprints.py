"""A fingerprint of a torch callable: equal for the same code with the same weights, in any process
with the same versions."""

from __future__ import annotations

import functools
import hashlib
import inspect
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from torch_side.calls.adapted import Adapted

_PLAIN = (str, int, float, complex, bool, bytes, type(None))
_OURS = {"_parameters", "_buffers", "_modules"}  # of a module: named_parameters has them


def fingerprint(*parts: Any) -> str:
    """Returns a hash of callables, modules and options: the code of functions and of classes, what
    closures, defaults, partials and objects hold, tensors and arrays by their values; the version
    of torch.

    What code calls by a global name is not looked into, nor what C++ alone knows."""
    found = hashlib.sha256()
    for piece in _pieces([torch.__version__, *parts], {}):
        found.update(piece)
        found.update(b"\0")
    return found.hexdigest()


def _pieces(x: Any, seen: dict[int, Any]) -> Iterator[bytes]:
    """What is hashed of a value. `seen` keeps what was looked at, so that no id is used again."""
    yield type(x).__qualname__.encode()
    if isinstance(x, _PLAIN):
        yield repr(x).encode()
        return
    if id(x) in seen:
        yield b"again"
        return
    seen[id(x)] = x
    if isinstance(x, torch.Tensor):
        yield from _of_tensor(x)
    elif isinstance(x, np.ndarray):
        yield f"{x.dtype} {x.shape}".encode()
        yield np.ascontiguousarray(x).tobytes() if x.dtype != object else repr(x).encode()
    elif isinstance(x, types.CodeType):
        yield x.co_code
        yield from _pieces([x.co_consts, x.co_names], seen)
    elif isinstance(x, types.FunctionType):
        cells = [_held(cell) for cell in x.__closure__ or ()]
        yield from _pieces([x.__code__, x.__defaults__, x.__kwdefaults__, cells], seen)
    elif isinstance(x, types.MethodType):
        yield from _pieces([x.__func__, x.__self__], seen)
    elif isinstance(x, functools.partial):
        yield from _pieces([x.func, x.args, x.keywords], seen)
    elif isinstance(x, dict):
        yield from _pieces(list(x.items()), seen)
    elif isinstance(x, (list, tuple)):
        for y in x:
            yield from _pieces(y, seen)
    elif isinstance(x, (set, frozenset)):
        yield repr(sorted(map(repr, x))).encode()
    elif isinstance(x, (type, types.ModuleType, types.BuiltinFunctionType)):
        yield f"{getattr(x, '__module__', '')}.{x.__name__}".encode()
    else:
        yield from _of_object(x, seen)


def _held(cell: types.CellType) -> Any:
    """What a closure holds, None where it holds nothing yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _of_tensor(x: torch.Tensor) -> Iterator[bytes]:
    yield f"{x.dtype} {tuple(x.shape)}".encode()
    plain = x.detach().cpu().contiguous().resolve_conj().resolve_neg()
    yield plain.flatten().view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def _of_object(x: Any, seen: dict[int, Any]) -> Iterator[bytes]:
    """An object with its classes and its attributes; of a module also the weights and the layers."""
    for cls in type(x).__mro__:
        if not cls.__module__.startswith(("torch.", "builtins", "abc", "typing")):
            yield from _of_class(cls, seen)
    yield f"{type(x).__module__}.{type(x).__qualname__}".encode()
    own = {k: v for k, v in getattr(x, "__dict__", {}).items() if k not in _OURS}
    yield from _pieces(dict(sorted(own.items())), seen)
    if isinstance(x, Adapted):
        yield from _pieces(x.__self__, seen)
    if isinstance(x, torch.jit.ScriptModule):
        yield str(getattr(x, "code", "")).encode()
    if isinstance(x, torch.nn.Module):
        for name, tensor in (
            *x.named_parameters(recurse=False),
            *x.named_buffers(recurse=False),
        ):
            yield name.encode()
            yield from _of_tensor(tensor)
        for name, layer in x.named_children():
            yield name.encode()
            yield from _pieces(layer, seen)


def _of_class(cls: type, seen: dict[int, Any]) -> Iterator[bytes]:
    """The functions and the plain attributes of a class."""
    if id(cls) in seen:
        return
    seen[id(cls)] = cls
    for name, value in sorted(vars(cls).items()):
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        if isinstance(value, property):
            value = [value.fget, value.fset]
        kept = (*_PLAIN, types.FunctionType, list, tuple, torch.Tensor, np.ndarray)
        if not name.startswith("__") or inspect.isfunction(value):
            yield name.encode()
            yield from _pieces(value if isinstance(value, kept) else None, seen)
