"""Which operators a callable runs, as far as its derivatives depend on it: found with fake tensors, before it runs."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torch_side import kernels

# Where torch.func is wrong and torch.autograd, one point after another, is right (torch 2.11 to 2.15; tests/test_operators.py
# finds them). The first two: wrong formulas of forward mode. The others differentiate by linalg_lu_solve, which takes another
# system's factors where these have fewer batch axes than the right side, as in a vmap over points of a vmap over tangents; det
# moreover gives NaN at equal singular values, that is in a cubic cell.
SUSPECTS = frozenset(
    f"aten::{name}"
    for name in (
        "cholesky_inverse",
        "scatter_reduce",
        "_linalg_det",
        "_linalg_slogdet",
        "_linalg_solve_ex",
        "linalg_lu_solve",
        "linalg_eig",
        "_linalg_eigvals",
    )
)


def suspect(call, inputs) -> bool:
    """True where derivatives of derivatives of a Call, and nested batches of them, should go by torch.autograd.

    Such is a call that runs one of SUSPECTS or a custom autograd Function, or that fake tensors can't look into."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from torch_side.inference import on_some_device

    def recorded(tensors):
        leaves = [t.requires_grad_() if t.is_floating_point() or t.is_complex() else t for t in tensors]
        with torch.enable_grad(), _Names() as seen:
            outputs, _ = call(leaves)
        return seen.names, [y for y in outputs if isinstance(y, torch.Tensor)]

    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            names, outputs = on_some_device(call, inputs, recorded)
        except Exception:  # whatever it is, the call itself will tell
            return True
    return bool(names & SUSPECTS or kernels.custom(outputs))


class _Names(TorchDispatchMode):
    """Collects the names of operators."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.add(operator._schema.name)
        return operator(*args, **(kwargs or {}))
