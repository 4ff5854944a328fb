"""What this machine, these versions and these settings do, on the side of torch."""

from __future__ import annotations

import os

import torch


def facts() -> list[tuple[str, bool, str]]:
    """(what, whether all is well, what was found or what to do)."""
    cores, threads = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        torch.get_num_threads(),
    )
    cuda = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else "none; the GPU part of the bridge was never seen to run: make gpu-check"
    )
    return [
        ("torch", True, torch.__version__),
        ("CUDA for torch", True, cuda),
        (
            "threads of torch",
            threads <= cores,
            f"{threads} on {cores} cores"
            + ("" if threads <= cores else ": they fight XLA's, call torch.set_num_threads"),
        ),
    ]


def checks(called) -> list[tuple[str, bool, str]]:
    """`called` is x -> 2 x + x, made by the other bank, as a torch function."""
    x = torch.arange(3.0)
    calls = {
        "a call": called,
        "its gradient": torch.func.grad(lambda x: called(x).sum()),
        "a batch": lambda x: torch.func.vmap(called)(x[None])[0],
    }
    return [_check(f"JAX in torch, {name}", call, x) for name, call in calls.items()]


def _check(what, call, x):
    try:
        y = call(x)
    except Exception as e:
        return what, False, f"{type(e).__name__}: {str(e).splitlines()[0]:.120}"
    right = bool(torch.allclose(y, 3.0 * x) or torch.allclose(y, torch.full_like(x, 3.0)))
    return what, right, "right" if right else f"wrong: {y}"
