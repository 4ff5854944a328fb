"""Second derivatives on the torch side: the Hessian of a model of the contract, by rows of its
gradients."""

from __future__ import annotations

import torch


def hessian(model, inputs: dict, keep: bool = False) -> dict:
    """`model(inputs)`, with d2E/dr dr at fixed cell as "hessian" (N,3,N,3), eV/Angstrom^2.

    `model` gives position_gradients (N,3) with their graph (torch.autograd can differentiate them).
    One forward, and 3 N backward passes over it. The results are detached unless `keep` is True or
    pos requires grad.

    Raises: torch's own RuntimeError where the gradients can't be differentiated again.

    >>> from torch_side.potentials.strain import with_gradients
    >>> spring = with_gradients(lambda x: x["pos"].square().sum().reshape(1))
    >>> out = hessian(lambda x: spring(x, create_graph=True), {"pos": torch.ones(1, 3), "cell": torch.zeros(1, 3, 3)})
    >>> out["hessian"].reshape(3, 3).diagonal()
    tensor([2., 2., 2.])
    """
    pos = inputs["pos"]
    keep = keep or (
        torch.is_grad_enabled()
        and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs.values())
    )
    with torch.enable_grad():
        pos = pos.view_as(pos) if pos.requires_grad else pos.detach().requires_grad_()
        out = model(inputs | {"pos": pos})
        g = out["position_gradients"]
        rows = (
            [
                torch.autograd.grad(
                    x, pos, retain_graph=True, create_graph=keep, materialize_grads=True
                )[0]
                for x in g.flatten()
            ]
            if g.requires_grad
            else []
        )
    out = out | {
        "hessian": torch.stack(rows).reshape(*g.shape, *pos.shape)
        if rows
        else pos.new_zeros(*g.shape, *pos.shape)
    }
    return out if keep else {name: x.detach() for name, x in out.items()}
