"""Checkpoints that somebody else has written: read without running what is in them, where that is
possible."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from bridge import archive
from bridge import trust as trusting
from bridge.errors import message

PICKLE = "the Python code that is pickled in it"
# What NumPy's arrays of plain numbers are pickled as, with the names of older versions.
_ARRAY = np.array(0.0).__reduce__()[0]  # the function that begins an array
ARRAYS = [
    (_ARRAY, "numpy.core.multiarray._reconstruct"),
    (_ARRAY, "numpy._core.multiarray._reconstruct"),
    np.ndarray,
    np.dtype,
    *(type(np.dtype(name)) for name in ("float32", "float64", "int32", "int64", "bool")),
]


def read(path: str | os.PathLike[str], trust: bool) -> Any:
    """Returns what torch.save wrote to `path`, on the CPU.

    Without `trust`, only what runs no code is read: tensors, arrays, numbers, texts, and lists and
    dicts of these. With it, whatever is pickled there.

    Raises: ValueError that names the file where that does not suffice, and for a file that torch
    can't read; OSError where it can't be opened."""
    if trust:
        return torch.load(path, map_location="cpu", weights_only=False)
    with open(path, "rb"):
        pass
    try:
        with torch.serialization.safe_globals(ARRAYS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch has no one exception for what it can't read
        if strange := _classes(path):
            shown = ", ".join(strange[:3])
            trusting.ask(path, f"{PICKLE} ({shown})", trust)
        got = archive.said(error)
        do = "copy or save it again, by torch.save"
        raise ValueError(message(f"a checkpoint of torch in {os.fspath(path)}", got, do)) from error


def _classes(path: str | os.PathLike[str]) -> list[str]:
    """The names of classes and functions in a checkpoint that are not allowed; none where it is no
    readable one."""
    known = {f"{x.__module__}.{x.__qualname__}" for x in ARRAYS if isinstance(x, type)}
    known |= {x[1] for x in ARRAYS if isinstance(x, tuple)}
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(os.fspath(path))
    except Exception:
        return []
    return sorted(set(found) - known)


@contextlib.contextmanager
def of(package: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """Within the `with`, whatever goes wrong is a ValueError that names the file `path`, from which
    a model of `package` is made."""
    try:
        yield
    except Exception as error:
        got = archive.said(error)
        do = f"pass a file that this version of {package} wrote"
        raise ValueError(
            message(f"a checkpoint of {package} in {os.fspath(path)}", got, do)
        ) from error
