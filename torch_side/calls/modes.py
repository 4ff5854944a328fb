"""torch.inference_mode, which records nothing: gradients made inside of it would be zeros without a
word."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def recording(inputs: dict) -> Iterator[dict]:
    """Leave inference mode for the length of a `with`, grad mode off; gives `inputs` with copies of
    the tensors that were made in it, which autograd can't save."""
    with torch.inference_mode(False), torch.no_grad():
        yield {
            name: x.clone() if isinstance(x, torch.Tensor) and x.is_inference() else x
            for name, x in inputs.items()
        }
