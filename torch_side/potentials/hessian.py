"""Second derivatives on the torch side: the Hessian of a model of the contract, by rows of its
gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch


def hessian(
    model: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    inputs: dict[str, torch.Tensor],
    keep: bool = False,
) -> dict[str, torch.Tensor]:
    """Returns `model(inputs)` with d2E/dr dr at fixed cell as "hessian" (N,3,N,3), eV/Angstrom^2.

    `model` must give position_gradients (N,3) with their graph, so that torch.autograd can
    differentiate them. It is evaluated once, and 3 N backward passes go over that graph. The
    results keep their own graph if `keep` is True, or if grad mode is on and an input requires
    grad; otherwise they are detached.

    Raises: torch's own RuntimeError where the gradients can't be differentiated again.

    >>> from torch_side.potentials.strain import with_gradients
    >>> spring = with_gradients(lambda x: x["pos"].square().sum().reshape(1))
    >>> out = hessian(lambda x: spring(x, create_graph=True), {"pos": torch.ones(1, 3), "cell": torch.zeros(1, 3, 3)})
    >>> out["hessian"].reshape(3, 3).diagonal()
    tensor([2., 2., 2.])
    """
    pos = inputs["pos"]
    if not keep and torch.is_grad_enabled():
        tensors = (x for x in inputs.values() if isinstance(x, torch.Tensor))
        keep = any(x.requires_grad for x in tensors)
    with torch.enable_grad():
        pos = pos.view_as(pos) if pos.requires_grad else pos.detach().requires_grad_()
        out = model(inputs | {"pos": pos})
        g = out["position_gradients"]
        rows = []
        for x in g.flatten() if g.requires_grad else ():
            (row,) = torch.autograd.grad(
                x, pos, retain_graph=True, create_graph=keep, materialize_grads=True
            )
            rows.append(row)
    shape = (*g.shape, *pos.shape)
    found = torch.stack(rows).reshape(shape) if rows else pos.new_zeros(shape)
    out = out | {"hessian": found}
    return out if keep else {name: x.detach() for name, x in out.items()}
