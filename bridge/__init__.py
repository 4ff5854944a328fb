"""The bridge between JAX and PyTorch for interatomic potentials. Importing it imports neither
framework."""

from __future__ import annotations

import importlib

_HOMES = {
    "to_jax": "bridge.join",
    "to_torch": "bridge.join",
    "functional": "bridge.join",
    "module": "bridge.join",
    "potential": "bridge.join",
    "jax_potential": "bridge.join",
    "edges": "bridge.join",
    "torch_potential": "bridge.join",
    "Buckets": "torch_side.calls.buckets",
    "Card": "bridge.card",
    "raising": "jax_side.calls.lanes",
}
__all__ = [*_HOMES]
__version__ = "0.1.0"


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(
            f"module 'bridge' has no attribute {name!r}; it has {', '.join(__all__)}"
        )
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__():
    return [*globals(), *__all__]
