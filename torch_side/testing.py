"""What bridge.testing asks of torch: models called with NumPy arrays, and every transform of a
function, by torch itself."""

from __future__ import annotations

import numpy as np
import torch

from bridge.card import Card
from bridge.contract import INFO
from bridge.errors import message
from torch_side.potentials.model import Wrapped
from torch_side.potentials.strain import with_gradients


def of_the_contract(model, gradients, cutoff):
    """A user's potential as a callable that gives energy and gradients; with a card, it is one
    already."""
    if getattr(model, "card", None) is not None:
        return model
    if cutoff is not None:
        # a property checks that
        return Wrapped(
            model,
            Card(cutoff=cutoff, neighbor_list="own", optional_inputs=INFO, batches=True),
            gradients,
        )
    return model if gradients == "model" else with_gradients(model)


def tensor(x, device=None):
    """A NumPy array of any layout as a tensor of its own."""
    return torch.from_numpy(np.array(x, order="C")).to(device)


def array(x):
    """A tensor as a NumPy array of 64 bits."""
    x = x.detach().cpu().resolve_conj().resolve_neg()
    return (
        x.to(torch.complex128) if x.is_complex() else x.double() if x.is_floating_point() else x
    ).numpy()


def call(model, inputs, device=None):
    """The model's outputs as NumPy arrays in the dtypes that it gave. Raises ValueError where it
    writes to its inputs."""
    given = {k: tensor(x, device) for k, x in inputs.items()}
    out = model(given)
    if not isinstance(out, dict):
        raise TypeError(
            message(
                "a dict of tensors from the model",
                type(out).__name__,
                'return {"energy": ...} with energy (B,)',
            )
        )
    for key, x in inputs.items():
        if not np.array_equal(given[key].detach().cpu().numpy(), x):
            raise ValueError(
                message(
                    f"{key} as it was given",
                    "other values after the call",
                    "don't write to the inputs",
                )
            )
    return {k: x.detach().cpu().numpy() for k, x in out.items() if isinstance(x, torch.Tensor)}


def differentiable(model, inputs, device=None):
    """True where torch can differentiate position_gradients again."""
    given = {k: tensor(x, device) for k, x in inputs.items()}
    return model(given | {"pos": given["pos"].requires_grad_()})["position_gradients"].requires_grad


def potential_transforms(model, inputs, other, second):
    """[(label, what, arrays)] of a torch model of the contract: its energy under the transforms of
    torch.

    `other` are more positions, for a batch of two; `second` is False for a model that can't be
    differentiated twice."""
    given = {k: tensor(x) for k, x in inputs.items()}
    leaves = [given[k].clone().requires_grad_() for k in ("pos", "cell")]
    energies = lambda x: model(given | {"pos": x})["energy"]
    total = lambda x: energies(x).sum()
    energy = model(given | dict(zip(("pos", "cell"), leaves)))["energy"]
    gradients = torch.autograd.grad(energy.sum(), leaves, materialize_grads=True)
    found = [("torch.autograd.grad", "gradients", [energy, *gradients])]
    found += [
        (
            "torch.func.vmap",
            "batch",
            [torch.func.vmap(energies)(torch.stack([given["pos"], tensor(other)]))],
        )
    ]
    if second:
        found += [
            ("double backward", "hessian", [torch.autograd.functional.hessian(total, given["pos"])])
        ]
    return [(label, what, [array(x) for x in xs]) for label, what, xs in found]


def transforms(f, xs, draw, wanted, native):
    """[(label, transform, arrays)] of `f`, a function of tensors that gives a tuple of tensors,
    differentiated in its inexact inputs.

    `draw(name, shapes)` gives random NumPy arrays. With `native` by the ways that every torch
    function goes, else by torch.func as well."""
    at = [i for i, x in enumerate(xs) if _inexact(x)]
    inner, values = tuple(xs[i] for i in at), f(*xs)
    part = lambda *vs: tuple(y for y in f(*_put(xs, at, vs)) if _inexact(y))
    random = lambda name, ys: tuple(
        tensor(a).to(y) for a, y in zip(draw(name, [(*y.shape,) for y in ys]), ys)
    )
    ts, cts = random("tangents", inner), random("cotangents", [y for y in values if _inexact(y)])
    rows = [list(xs), [0.9 * x if _inexact(x) else x for x in xs]]
    stacked = lambda pairs: [torch.stack(pair) for pair in zip(*pairs)]
    ways = [
        ("call", "value", lambda: values),
        ("rows in a loop", "vmap", lambda: stacked(f(*row) for row in rows)),
    ]
    if not native:
        ways += [("torch.func.vmap", "vmap", lambda: torch.func.vmap(f)(*stacked(rows)))]
    if at and cts:
        ways += _derivatives(part, inner, ts, cts, native)
    return [(label, what, [array(y) for y in way()]) for label, what, way in ways if what in wanted]


def _derivatives(f, xs, tangents, cotangents, native):
    """The ways to first derivatives and, of one real number, second ones in the first argument."""
    ways = [
        ("backward", "vjp", lambda: _backward(f, xs, cotangents)),
        ("double backward", "jvp", lambda: torch.autograd.functional.jvp(f, xs, tangents)[1]),
    ]
    if not native:
        conjugate = lambda ys: tuple(y.conj() for y in ys)
        ways += [
            (
                "torch.func.vjp",
                "vjp",
                lambda: conjugate(torch.func.vjp(f, *xs)[1](conjugate(cotangents))),
            ),
            ("torch.func.jvp", "jvp", lambda: torch.func.jvp(f, xs, tangents)[1]),
        ]
    if [c.shape for c in cotangents] == [()] and not any(
        x.is_complex() for x in (*xs, *cotangents)
    ):
        of_first = lambda v: f(v, *xs[1:])[0]
        ways += [
            (
                "double backward",
                "hessian",
                lambda: [torch.autograd.functional.hessian(of_first, xs[0])],
            )
        ]
        ways += (
            []
            if native
            else [("torch.func.hessian", "hessian", lambda: [torch.func.hessian(of_first)(xs[0])])]
        )
    return ways


def _inexact(x):
    return x.is_floating_point() or x.is_complex()


def _put(xs, at, values):
    """xs with values in the places `at`."""
    new = dict(zip(at, values))
    return [new.get(i, x) for i, x in enumerate(xs)]


def _backward(f, xs, cotangents):
    """Gradients by torch.autograd in JAX's convention, which is the conjugate of torch's."""
    leaves = [x.detach().clone().requires_grad_() for x in xs]
    reached = [(y, c.conj()) for y, c in zip(f(*leaves), cotangents) if y.requires_grad]
    if not reached:
        return [torch.zeros_like(x) for x in xs]
    ys, cts = zip(*reached)
    return [g.conj() for g in torch.autograd.grad(ys, leaves, cts, materialize_grads=True)]
