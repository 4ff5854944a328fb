"""Custom autograd Functions in a graph: is their backward something that torch can differentiate
again?

torch takes a backward that is cut off from its inputs (@once_differentiable, NumPy, .detach()) for
a constant, and gives zeros for its derivatives. The backward of a linear Function is a constant
indeed, and looks the same in the graph. What tells the two apart is that this one stays the same
where the inputs move.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float

# private in torch 2.13: a tensor of torch.func.grad, vmap and so on, and what lies beneath
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.autograd.function import BackwardCFunction

from bridge.errors import message

Node = Any  # a node of a graph of torch: its own type lacks what is read here
Kernel = type  # a custom autograd Function

_MOVE = 1e-4  # relative change of the inputs, of which a constant must not show the tenth part
_vouched: set[Kernel] = set()
# the Functions that were found to be differentiable
_proven: weakref.WeakSet[Kernel] = weakref.WeakSet()


def check_twice(
    ys: Sequence[torch.Tensor],
    again: Callable[[], Sequence[torch.Tensor]],
    private: Iterable[torch.Tensor] = (),
) -> None:
    """Raises where derivatives of a backward through the graph of `ys` would be silently cut.

    `again()` gives the same outputs, with a graph, where the inputs have moved a little (see
    `moved`). `private` are leaves that nobody differentiates in later. What depends on these alone
    may be cut.

    Raises: NotImplementedError naming the Function.
    """
    for at, node in enumerate(custom(ys)):
        cls = node._forward_cls
        if cls in _proven:
            continue
        if _compiled(cls):
            raise once_only()
        cotangents, gradients = _backward(node)
        inputs = [edge for edge, _ in node.next_functions if edge is not None]
        only_private = _only_private(inputs, private)
        if not _linear(gradients) and not (only_private and _cotangent_is_fixed(ys, node)):
            raise _cut(cls)
        if only_private:
            continue
        found = [g.grad_fn for g in gradients if g.grad_fn is not None]
        if not _reaches(found, inputs):
            # under a tracer nobody can see whether it changes
            if not have_values(gradients):
                raise _cut(cls, traced=True)
            rest = custom(again())[at:]
            if _changes(rest, node, cotangents, gradients):
                raise _cut(cls)
        if have_values(gradients) and any(g.any() for g in gradients):
            _proven.add(cls)


def check_pushed(ys: Sequence[torch.Tensor]) -> None:
    """Raises where a backward is cut off from its own cotangents, by which forward mode is served.

    Raises: NotImplementedError naming the Function.
    """
    for node in custom(ys):
        cls = node._forward_cls
        if _compiled(cls):
            raise once_only()
        if cls not in _proven and not _linear(_backward(node)[1]):
            raise _cut(cls)


def check_given(
    gradients: Float[torch.Tensor, "N 3"],
    pos: Float[torch.Tensor, "N 3"],
    again: Callable[[], Float[torch.Tensor, "N 3"]],
    who: str,
) -> None:
    """Raises where the position gradients that a model gives can't be differentiated.

    They carry no graph then, and yet `again()`, which gives them where the positions have moved a
    little, gives other ones. Under a tracer, where there are no values, those that were computed
    from `pos` count as such. `who` names the model in the error text.

    Raises: NotImplementedError."""
    if gradients.requires_grad:
        return
    if have_values([gradients]):
        if not _differ(again(), gradients):
            return
    elif traced() and not depends(gradients, pos):
        return
    got = "some that change with the positions and carry no graph (detached, or from NumPy)"
    do = "compute them with create_graph=True, or pass card=bridge.Card(derivative_order=1)"
    raise NotImplementedError(
        message(f"position_gradients of {who} that can be differentiated", got, do)
    )


def check_unreached(
    energy: torch.Tensor, x: torch.Tensor, again: Callable[[], torch.Tensor], name: str
) -> None:
    """Raises where an energy changes with an input `x` that its graph does not reach.

    torch gives zeros there, as for a constant, and the forces of a model that leaves autograd would
    be zero without a word. `again()` gives the energy where the input `name` has moved a little.
    Under a tracer, where there are no values, an energy that was computed from `x` counts as one
    that changes with it.

    Raises: NotImplementedError naming the input."""
    if have_values([energy]):
        with torch.no_grad():
            change = (again() - energy).abs()
        rounding = 16 * torch.finfo(energy.dtype).eps * (1 + energy.abs())
        if not bool((change > rounding).any()):
            return
    elif not depends(energy, x):
        return
    got = "one that changes with it and has no graph to it (no_grad, detach, item or NumPy inside)"
    do = (
        "compute it in operations of torch, or return the gradients as well and pass "
        'gradients="model"'
    )
    raise NotImplementedError(message(f"an energy that torch can differentiate in {name}", got, do))


def traced() -> bool:
    """Returns True where a tracer (make_fx) sees what is computed."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return get_proxy_mode() is not None


def depends(y: torch.Tensor, x: torch.Tensor) -> bool:
    """Returns True where `y` was computed from `x` in any way, as a tracer (make_fx) saw it.

    That includes the ways on which autograd sees nothing: no_grad, detach, comparisons."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot

    mode = get_proxy_mode()
    if mode is None:
        return False

    def node(t: torch.Tensor) -> Any:
        while is_functorch_wrapped_tensor(t):
            t = get_unwrapped(t)
        return getattr(get_proxy_slot(t, mode.tracer, None), "proxy", None)

    below, wanted = node(y), node(x)
    if below is None or wanted is None:
        return False
    seen, stack = set(), [below.node]
    while stack:
        at = stack.pop()
        if at is wanted.node:
            return True
        if at not in seen:
            seen.add(at)
            stack += at.all_input_nodes
    return False


def have_values(tensors: Iterable[torch.Tensor]) -> bool:
    """Returns False for fake tensors, under torch.compile and in transforms of torch.func."""
    from torch._subclasses.fake_tensor import is_fake

    if torch.compiler.is_compiling():
        return False
    return not any(is_fake(x) or is_functorch_wrapped_tensor(x) for x in tensors)


def custom(ys: Iterable[torch.Tensor]) -> list[Node]:
    """Returns the nodes of custom Functions in the graph of `ys`, without those vouched for.

    Their order is that of a walk which is the same each time."""
    roots = [y.grad_fn for y in ys if y.requires_grad and y.grad_fn is not None]
    found: list[Node] = [node for node in _walk(roots) if isinstance(node, BackwardCFunction)]
    return [node for node in found if node._forward_cls not in _vouched]


def vouch(cls: Kernel) -> None:
    """Says of a Function that its backward is written in operations of torch, so that nothing here
    looks at it."""
    _vouched.add(cls)


def moved(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Returns tensors a ten-thousandth away, each entry moved by another amount, without a graph.

    Tensors that are not real and floating are returned as they are."""
    return [_moved(t) if t.is_floating_point() else t for t in tensors]


def _moved(t: torch.Tensor) -> torch.Tensor:
    entries = torch.arange(t.numel(), dtype=torch.float64, device=t.device)
    direction = torch.cos(entries).reshape(t.shape)
    return t.detach() + _MOVE * (1 + t.detach().abs()) * direction.to(t.dtype)


def _walk(roots: Iterable[Node]) -> Iterator[Node]:
    """Every node of the graph beneath `roots`, once."""
    seen, stack = set(), list(roots)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        stack += [below for below, _ in node.next_functions if below is not None]


def _reaches(roots: Iterable[Node], nodes: Iterable[Node]) -> bool:
    """True where one of `nodes` lies in the graph beneath `roots`."""
    wanted = set(nodes)
    return any(node in wanted for node in _walk(roots))


def _only_private(inputs: Iterable[Node], private: Iterable[torch.Tensor]) -> bool:
    """True where nothing but private leaves lies beneath these nodes."""
    leaves = [node.variable for node in _walk(inputs) if hasattr(node, "variable")]
    own = {id(x) for x in private}
    return all(id(leaf) in own for leaf in leaves)


def _backward(node: Node) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Cotangents that require grad, and what the user's backward makes of them."""
    types = node._input_metadata
    cotangents = [
        torch.ones(m.shape, dtype=m.dtype, device=m.device, requires_grad=True) for m in types
    ]
    with torch.enable_grad():
        found = node.apply(*cotangents)
    found = found if isinstance(found, tuple) else (found,)
    return cotangents, [g for g in found if g is not None]


def _linear(gradients: Sequence[torch.Tensor]) -> bool:
    """False where gradients of one Function carry no graph back to the cotangents that they are
    linear in. A gradient may be a cotangent itself, and then has no node of its own."""
    nodes: list[Node] = [g.grad_fn for g in gradients if g.grad_fn is not None]
    constants = [g for g in gradients if not g.requires_grad]
    # torch puts a node of an error in place of a backward that is @once_differentiable
    refused = any("Error" in node.name() for node in nodes)
    if constants and not have_values(constants):
        return False
    return not refused and not any(g.any() for g in constants)


def _cotangent_is_fixed(ys: Sequence[torch.Tensor], node: Node) -> bool:
    """True where what a backward hands to this node is a constant."""
    seen: list[bool] = []
    hook = node.register_prehook(
        lambda given: seen.append(any(g is not None and g.requires_grad for g in given))
    )
    leaves = [below.variable for below in _walk([node]) if hasattr(below, "variable")]
    roots = [y for y in ys if y.requires_grad]
    ones = [torch.ones_like(y) for y in roots]
    try:
        torch.autograd.grad(roots, leaves, ones, create_graph=True, allow_unused=True)
    finally:
        hook.remove()
    return not any(seen)


def _changes(
    rest: Sequence[Node],
    node: Node,
    cotangents: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
) -> bool:
    """True where the backward of the same Function at moved inputs gives other gradients.

    It is the first of `rest`; True also where that is another Function, or there is none."""
    if not rest or _shape(rest[0]) != _shape(node):
        return True
    with torch.no_grad():
        found = rest[0].apply(*cotangents)
    found = [g for g in (found if isinstance(found, tuple) else (found,)) if g is not None]
    return any(_differ(a, b) for a, b in zip(found, gradients, strict=True) if b.numel())


def _shape(node: Node) -> tuple[Kernel, list[tuple[int, ...]]]:
    """What two nodes of the same Function, called alike, have in common."""
    return node._forward_cls, [tuple(m.shape) for m in node._input_metadata]


def _differ(a: torch.Tensor, b: torch.Tensor) -> bool:
    """True where an entry of `a` is off by more than a tenth of the move, relative to `b`."""
    a, b = a.detach(), b.detach()
    return bool((a - b).abs().max() > 0.1 * _MOVE * b.abs().max()) if b.numel() else False


def _compiled(cls: Kernel) -> bool:
    """True for a Function whose backward torch.compile made."""
    return cls.__module__.startswith(("torch._functorch", "torch._dynamo", "torch._inductor"))


def once_only() -> NotImplementedError:
    """Returns the error for derivatives that a compiled model does not have."""
    got = "a second one, or forward mode by torch.autograd"
    return NotImplementedError(
        message(
            "a first backward of a model inside torch.compile", got, "pass the model uncompiled"
        )
    )


def _cut(cls: Kernel, traced: bool = False) -> NotImplementedError:
    """The error for a Function whose backward is cut off, or, under a tracer, may be."""
    got = "one that is cut off from its input (@once_differentiable, NumPy or .detach() inside)"
    do = (
        "take first derivatives only (of a potential, card=bridge.Card(derivative_order=1) says "
        "so), "
        "or write that backward in operations of torch"
    )
    if traced:
        got = "one that may be cut off from its input, which can't be told while it is compiled"
        do = "take this derivative once outside of jit, which tells, or take " + 'lane="ffi"'
    return NotImplementedError(
        message(f"a backward of {cls.__qualname__} that can be differentiated again", got, do)
    )
