"""The bridge between JAX and PyTorch for interatomic potentials. Importing it imports neither
framework."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bridge import native as native
    from bridge.card import Card
    from bridge.join.calls import functional, module, to_jax, to_torch
    from bridge.join.potentials import edges, jax_potential, potential, torch_potential
    from jax_side.calls.lanes import raising
    from torch_side.calls.buckets import Buckets

__all__ = [
    "Buckets",
    "Card",
    "edges",
    "functional",
    "jax_potential",
    "module",
    "native",
    "potential",
    "raising",
    "to_jax",
    "to_torch",
    "torch_potential",
]
__version__ = "0.1.0"
# name: the file that it is loaded from, when it is first asked for
_HOMES = {
    "to_jax": "bridge.join.calls",
    "to_torch": "bridge.join.calls",
    "functional": "bridge.join.calls",
    "module": "bridge.join.calls",
    "potential": "bridge.join.potentials",
    "jax_potential": "bridge.join.potentials",
    "edges": "bridge.join.potentials",
    "torch_potential": "bridge.join.potentials",
    "Buckets": "torch_side.calls.buckets",
    "Card": "bridge.card",
    "native": "bridge.native",
    "raising": "jax_side.calls.lanes",
}


def __getattr__(name: str) -> Any:
    """Loads one of the names above when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(
            f"module 'bridge' has no attribute {name!r}; it has {', '.join(_HOMES)}"
        )
    home = importlib.import_module(_HOMES[name])
    value = globals()[name] = home if name == "native" else getattr(home, name)
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
