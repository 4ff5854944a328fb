"""A fingerprint of a torch callable: equal for the same code with the same weights, in any process
with the same versions."""

from __future__ import annotations

import hashlib
import types
from collections.abc import Iterator
from typing import Any

import torch

from torch_side.calls.adapted import Adapted


def fingerprint(*parts: Any) -> str:
    """Returns a hash of callables, modules and options: the code of functions and of the forwards
    of modules, what closures and defaults hold, tensors by their values; the version of torch.

    What code calls by a global name is not looked into."""
    found = hashlib.sha256()
    for piece in _pieces([torch.__version__, *parts], set()):
        found.update(piece)
        found.update(b"\0")
    return found.hexdigest()


def _pieces(x: Any, seen: set[int]) -> Iterator[bytes]:
    """What is hashed of a value."""
    if id(x) in seen:
        yield b"again"
        return
    if not isinstance(x, (str, int, float, bool, bytes, type(None))):
        seen.add(id(x))
    yield type(x).__qualname__.encode()
    if isinstance(x, torch.Tensor):
        yield from _of_tensor(x)
    elif isinstance(x, torch.nn.Module):
        yield from _of_module(x, seen)
    elif isinstance(x, types.CodeType):
        yield x.co_code
        yield from _pieces([x.co_consts, x.co_names], seen)
    elif isinstance(x, types.FunctionType):
        cells = [cell.cell_contents for cell in x.__closure__ or ()]
        yield from _pieces([x.__code__, x.__defaults__, x.__kwdefaults__, cells], seen)
    elif isinstance(x, types.MethodType | Adapted):
        yield from _pieces([getattr(x, "__func__", None), x.__self__], seen)
    elif isinstance(x, dict):
        yield from _pieces(list(x.items()), seen)
    elif isinstance(x, (list, tuple)):
        for y in x:
            yield from _pieces(y, seen)
    elif isinstance(x, (str, int, float, bool, bytes, type(None), complex)):
        yield repr(x).encode()
    elif isinstance(x, (set, frozenset)):
        yield repr(sorted(map(repr, x))).encode()
    else:
        yield f"{type(x).__module__}.{getattr(x, '__qualname__', '')}".encode()


def _of_tensor(x: torch.Tensor) -> Iterator[bytes]:
    yield f"{x.dtype} {tuple(x.shape)}".encode()
    plain = x.detach().cpu().contiguous()
    yield plain.flatten().view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def _of_module(module: torch.nn.Module, seen: set[int]) -> Iterator[bytes]:
    """Layers with their code and their plain settings, parameters and buffers."""
    for name, layer in module.named_modules():
        yield f"{name} {type(layer).__module__}.{type(layer).__qualname__}".encode()
        forward = getattr(type(layer).forward, "__code__", None)
        yield from _pieces(forward, seen)
        settings = {k: v for k, v in vars(layer).items() if isinstance(v, (bool, int, float, str))}
        yield repr(sorted(settings.items())).encode()
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        yield name.encode()
        yield from _of_tensor(tensor)
