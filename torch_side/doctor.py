"""What this machine, these versions and these settings do, on the side of torch."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

Finding = tuple[str, bool, str]  # what, whether all is well, what was found or what to do


def facts() -> list[Finding]:
    """Returns a finding for the version of torch, for CUDA and for torch's number of threads."""
    cores = _cores()
    threads = torch.get_num_threads()
    fits = threads <= cores
    cuda = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else "none; what was seen on one is in docs/gpu.md"
    )
    advice = "" if fits else ": they fight XLA's, call torch.set_num_threads"
    return [
        ("torch", True, torch.__version__),
        ("CUDA for torch", True, cuda),
        ("threads of torch", fits, f"{threads} on {cores} cores{advice}"),
    ]


def checks(called: Callable[[torch.Tensor], torch.Tensor]) -> list[Finding]:
    """Calls `called`, differentiates it and batches it; returns a finding for each of the three.

    `called` is x -> 2 x + x, made by the other bank, as a torch function. What it raises becomes
    the text of a finding."""
    x = torch.arange(3.0)
    calls = {
        "a call": called,
        "its gradient": torch.func.grad(lambda x: called(x).sum()),
        "a batch": lambda x: torch.func.vmap(called)(x[None])[0],
    }
    return [_check(f"JAX in torch, {name}", call, x) for name, call in calls.items()]


def _cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _check(what: str, call: Callable, x: torch.Tensor) -> Finding:
    try:
        y = call(x)
    except Exception as e:
        return what, False, f"{type(e).__name__}: {str(e).splitlines()[0]:.120}"
    right = bool(torch.allclose(y, 3.0 * x) or torch.allclose(y, torch.full_like(x, 3.0)))
    return what, right, "right" if right else f"wrong: {y}"
