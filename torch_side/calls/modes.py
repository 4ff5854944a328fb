"""torch.inference_mode, which records nothing: gradients made inside of it would be zeros without a
word."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch


@contextlib.contextmanager
def recording(inputs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Leaves inference mode for the length of a `with`, with grad mode off.

    The `with` gives `inputs`, in which copies stand for the tensors that were made in inference
    mode, since autograd can't save those. What is no tensor is passed on."""
    with torch.inference_mode(False), torch.no_grad():
        yield {
            name: x.clone() if isinstance(x, torch.Tensor) and x.is_inference() else x
            for name, x in inputs.items()
        }
