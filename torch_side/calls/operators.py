"""Which operators a callable runs, as far as its derivatives depend on it: found with fake tensors,
before it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bridge.call import Call
from bridge.function import Spec
from torch_side.calls import kernels

# Where torch.func is wrong and torch.autograd, one point after another, is right (torch 2.11 to
# 2.14; tests/full finds them). A vmap of one backward is wrong already:
MISBATCHED = frozenset({"aten::_cdist_forward"})
# The formulas of forward mode are wrong for cholesky_inverse and scatter_reduce. The others
# differentiate by linalg_lu_solve, which takes another system's factors where these have fewer
# batch axes than the right side, as in a vmap over points of a vmap over tangents. det moreover
# gives NaN at equal singular values, that is in a cubic cell.
SUSPECTS = MISBATCHED | {
    "aten::cholesky_inverse",
    "aten::scatter_reduce",
    "aten::_linalg_det",
    "aten::_linalg_slogdet",
    "aten::_linalg_solve_ex",
    "aten::linalg_lu_solve",
    "aten::linalg_eig",
    "aten::_linalg_eigvals",
}
# how far torch.func is right: always, for one backward, not at all
RIGHT, NESTED_WRONG, WRONG = range(3)


def trust(call: Call, inputs: Sequence[Spec]) -> int:
    """Returns how far torch.func is right for derivatives of a Call, found by its operators.

    WRONG is for a call that runs one of MISBATCHED. NESTED_WRONG is for a call that runs another
    one of SUSPECTS or a custom autograd Function, or that fake tensors can't look into. All others
    are RIGHT."""
    from torch_side.calls.inference import fake, on_some_device

    def recorded(tensors: list[torch.Tensor]) -> tuple[set[str], list[torch.Tensor]]:
        leaves = [
            t.requires_grad_() if t.is_floating_point() or t.is_complex() else t for t in tensors
        ]
        with torch.enable_grad(), _Names() as seen:
            outputs, _ = call(leaves)
        return seen.names, [y for y in outputs if isinstance(y, torch.Tensor)]

    with fake():
        try:
            names, outputs = on_some_device(call, inputs, recorded)
        except Exception:  # whatever it is, the call itself will tell
            return NESTED_WRONG
    if names & MISBATCHED:
        return WRONG
    return NESTED_WRONG if names & SUSPECTS or kernels.custom(outputs) else RIGHT


class _Names(TorchDispatchMode):
    """Collects the names of the operators that run under it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self,
        operator: Any,
        types: Sequence[type],
        args: tuple = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self.names.add(operator._schema.name)
        return operator(*args, **(kwargs or {}))
