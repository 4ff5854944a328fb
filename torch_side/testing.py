"""What bridge.testing asks of torch: models called with NumPy arrays, and every transform of a
function, by torch itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float

from bridge.card import Card
from bridge.contract import INFO
from bridge.errors import message
from torch_side.potentials.model import Wrapped
from torch_side.potentials.strain import with_gradients

# a model of the contract: the dict of inputs -> the dict of outputs
TorchModel = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
Tensors = Sequence[torch.Tensor]
# (label of the transform, what it gives, the arrays)
Found = tuple[str, str, list[np.ndarray]]
# a way to a transform: (its label, what it gives, what computes it)
Way = tuple[str, str, Callable[[], Tensors]]


def of_the_contract(
    model: Callable, gradients: Literal["model", "autograd"], cutoff: float | None
) -> Callable:
    """Returns a user's potential as a callable that gives its energy and gradients.

    A model that has a card gives them already and is returned as it is. With a `cutoff` (Angstrom)
    the model becomes a Wrapped, which finds its edges. `gradients` says whether the model gives
    position and cell gradients itself, or torch.autograd makes them."""
    if getattr(model, "card", None) is not None:
        return model
    if cutoff is not None:
        # `batches` vouches that the model keeps systems apart; a property of bridge.testing checks
        # that.
        card = Card(
            cutoff=cutoff, neighbor_list="own", optional_inputs=frozenset(INFO), batches=True
        )
        return Wrapped(model, card, gradients)
    return model if gradients == "model" else with_gradients(model)


def tensor(x: np.ndarray, device: str | torch.device | None = None) -> torch.Tensor:
    """Returns a NumPy array of any layout as a tensor with memory of its own."""
    return torch.from_numpy(np.array(x, order="C")).to(device)


def array(x: torch.Tensor) -> np.ndarray:
    """Returns a tensor as a NumPy array: floats as float64, complex numbers as complex128."""
    x = x.detach().cpu().resolve_conj().resolve_neg()
    if x.is_complex():
        x = x.to(torch.complex128)
    elif x.is_floating_point():
        x = x.double()
    return x.numpy()


def call(
    model: TorchModel,
    inputs: Mapping[str, np.ndarray],
    device: str | torch.device | None = None,
) -> dict[str, np.ndarray]:
    """Returns the model's outputs as NumPy arrays in the dtypes that it gave.

    Raises: TypeError for a model that gives no dict; ValueError for one that writes to its
    inputs."""
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


def differentiable(
    model: TorchModel,
    inputs: Mapping[str, np.ndarray],
    device: str | torch.device | None = None,
) -> bool:
    """Returns True where torch can differentiate the model's position_gradients again."""
    given = {k: tensor(x, device) for k, x in inputs.items()}
    return model(given | {"pos": given["pos"].requires_grad_()})["position_gradients"].requires_grad


def potential_transforms(
    model: TorchModel,
    inputs: Mapping[str, np.ndarray],
    other: Float[np.ndarray, "N 3"],
    second: bool,
) -> list[Found]:
    """Returns [(label, what, arrays)] for the energy of a torch model under torch's transforms.

    `what` is "gradients", "batch" or "hessian". `other` holds other positions of the same atoms,
    for a batch of two structures. `second` is False for a model that can't be differentiated
    twice."""
    given = {k: tensor(x) for k, x in inputs.items()}
    leaves = [given[k].clone().requires_grad_() for k in ("pos", "cell")]
    energies = lambda x: model(given | {"pos": x})["energy"]
    total = lambda x: energies(x).sum()
    energy = model(given | dict(zip(("pos", "cell"), leaves)))["energy"]
    gradients = torch.autograd.grad(energy.sum(), leaves, materialize_grads=True)
    both = torch.stack([given["pos"], tensor(other)])
    found: list[tuple[str, str, list[torch.Tensor]]] = [
        ("torch.autograd.grad", "gradients", [energy, *gradients]),
        ("torch.func.vmap", "batch", [torch.func.vmap(energies)(both)]),
    ]
    if second:
        hessian = _hessian(total, given["pos"])
        found.append(("double backward", "hessian", [hessian]))
    return [(label, what, [array(x) for x in xs]) for label, what, xs in found]


def transforms(
    f: Callable[..., tuple[torch.Tensor, ...]],
    xs: Tensors,
    draw: Callable[[str, list[tuple[int, ...]]], list[np.ndarray]],
    wanted: Sequence[str],
    native: bool,
) -> list[Found]:
    """Returns [(label, transform, arrays)] for `f`, from tensors to a tuple of tensors.

    `f` is called with `xs` and differentiated in those of them that are floating or complex.
    `draw(name, shapes)` gives random NumPy arrays for tangents and cotangents. `wanted` names the
    transforms: some of "value", "vmap", "vjp", "jvp" and "hessian". With `native` they go by
    torch.autograd and a loop over rows, as every torch function does; else by torch.func as
    well."""
    at = [i for i, x in enumerate(xs) if _inexact(x)]
    inner = tuple(xs[i] for i in at)
    values = f(*xs)
    part = lambda *vs: tuple(y for y in f(*_put(xs, at, vs)) if _inexact(y))

    def random(name: str, like: Tensors) -> tuple[torch.Tensor, ...]:
        drawn = draw(name, [tuple(y.shape) for y in like])
        return tuple(tensor(a).to(y) for a, y in zip(drawn, like))

    ts = random("tangents", inner)
    cts = random("cotangents", [y for y in values if _inexact(y)])
    rows = [list(xs), [0.9 * x if _inexact(x) else x for x in xs]]
    stacked = lambda pairs: [torch.stack(pair) for pair in zip(*pairs)]
    ways: list[Way] = [
        ("call", "value", lambda: values),
        ("rows in a loop", "vmap", lambda: stacked(f(*row) for row in rows)),
    ]
    if not native:
        ways += [("torch.func.vmap", "vmap", lambda: torch.func.vmap(f)(*stacked(rows)))]
    if at and cts:
        ways += _derivatives(part, inner, ts, cts, native)
    return [(label, what, [array(y) for y in way()]) for label, what, way in ways if what in wanted]


def _derivatives(
    f: Callable[..., Tensors],
    xs: tuple[torch.Tensor, ...],
    tangents: tuple[torch.Tensor, ...],
    cotangents: tuple[torch.Tensor, ...],
    native: bool,
) -> list[Way]:
    """The ways to the first derivatives of `f`; where it gives one real number, also to the second
    ones in its first argument."""
    ways: list[Way] = [
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
    is_scalar = [c.shape for c in cotangents] == [()]
    if is_scalar and not any(x.is_complex() for x in (*xs, *cotangents)):
        of_first = lambda v: f(v, *xs[1:])[0]
        ways += [("double backward", "hessian", lambda: [_hessian(of_first, xs[0])])]
        if not native:
            by_func = lambda: [torch.func.hessian(of_first)(xs[0])]
            ways += [("torch.func.hessian", "hessian", by_func)]
    return ways


def _hessian(f: Callable, x: torch.Tensor) -> torch.Tensor:
    """The second derivatives of `f`, a function of one tensor, by double backward."""
    found: Any = torch.autograd.functional.hessian(f, x)
    return found


def _inexact(x: torch.Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _put(xs: Tensors, at: Sequence[int], values: Tensors) -> Tensors:
    """`xs` with `values` in the places `at`."""
    new = dict(zip(at, values))
    return [new.get(i, x) for i, x in enumerate(xs)]


def _backward(f: Callable[..., Tensors], xs: Tensors, cotangents: Tensors) -> Tensors:
    """Gradients by torch.autograd, in the convention of JAX: the conjugate of torch's."""
    leaves = [x.detach().clone().requires_grad_() for x in xs]
    reached = [(y, c.conj()) for y, c in zip(f(*leaves), cotangents) if y.requires_grad]
    if not reached:
        return [torch.zeros_like(x) for x in xs]
    ys, cts = zip(*reached)
    return [g.conj() for g in torch.autograd.grad(ys, leaves, cts, materialize_grads=True)]
