"""Torch models compiled ahead of time and called by XLA without Python: packages, and programs that
last. Importing it imports neither framework."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bridge.join.native import Report, compile
    from jax_side.calls.saved import Loaded, export, load, save
    from torch_side.calls.packages import Package

__all__ = ["Loaded", "Package", "Report", "compile", "export", "load", "save"]
# name: the file that it is loaded from, when it is first asked for
_HOMES = {
    "compile": "bridge.join.native",
    "Report": "bridge.join.native",
    "Package": "torch_side.calls.packages",
    "export": "jax_side.calls.saved",
    "save": "jax_side.calls.saved",
    "load": "jax_side.calls.saved",
    "Loaded": "jax_side.calls.saved",
}


def __getattr__(name: str) -> Any:
    """Loads one of the names above when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(
            f"module 'bridge.native' has no attribute {name!r}; it has {', '.join(_HOMES)}"
        )
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
