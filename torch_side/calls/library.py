"""One op of torch.library, bridge::call, for whoever traces torch: torch.compile, torch.export,
fake tensors.

The op names its Function by a number (torch_side/calls/numbers.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from bridge.errors import message
from torch_side.calls import buffers, numbers, wrap

if TYPE_CHECKING:
    import torch._C._functorch
    import torch.fx.experimental.symbolic_shapes

# Calls that torch.compile traces. What the other bank's pytree library does is done at compile
# time, on numbers in place of tensors, and reaches the traced code as constants.


def traced(token: str, args: Sequence, kwargs: Mapping[str, Any]) -> Any:
    """Returns the result of a registered callable, by code that torch.compile can trace.

    Raises: NotImplementedError for a result of other containers than dicts, lists and tuples."""
    leaves, structure = pytree.tree_flatten((args, kwargs))
    # a size or number as it is now, in place of a symbol
    guard = torch.fx.experimental.symbolic_shapes.guard_scalar
    types = []
    for x in leaves:
        if isinstance(x, torch.Tensor):
            types.append((tuple([guard(n) for n in x.shape]), x.dtype))
        else:
            types.append(guard(x) if isinstance(x, (int, float)) else x)
    positions = pytree.tree_unflatten(list(range(len(leaves))), structure)
    number, order, result = _resolve(token, positions, tuple(types))
    return _rebuilt(result, torch.ops.bridge.call([leaves[i] for i in order], number))


def _resolve(token: str, call: Any, types: tuple) -> tuple[str, tuple[int, ...], Any]:
    """(the number of the Function, the leaves that are its inputs, its result with positions in
    place of tensors).

    `call` is (args, kwargs) with the position of each leaf in its place. `types` has (shape, dtype)
    for each leaf that is a tensor, and the leaf itself for others."""
    empty = [
        torch.empty(t[0], dtype=t[1], device="meta") if isinstance(t, tuple) else t for t in types
    ]
    args, kwargs = pytree.tree_map(lambda i: empty[i], call)
    fn, tensors = numbers.known(token).function(args, kwargs)
    order = tuple(next(i for i, e in enumerate(empty) if e is t) for t in tensors)
    return numbers.number(fn), order, _coded(fn.out_tree.unflatten(range(len(fn.outputs))))


# This is what torch.compiler.assume_constant_result does. That imports dynamo, which sets an
# environment variable.
_resolve._dynamo_marked_constant = True


def _coded(x: Any) -> Any:
    """A result as nested tuples, the only containers that torch.compile takes for constants."""
    if isinstance(x, int) or x is None:
        return x
    if type(x) not in (dict, list, tuple):
        raise NotImplementedError(
            message(
                "dicts, lists and tuples as results of a JAX function under torch.compile",
                type(x).__name__,
                "return one of these",
            )
        )
    items = x.items() if isinstance(x, dict) else enumerate(x)
    return type(x).__name__, tuple((k, _coded(v)) for k, v in items)


def _rebuilt(code: Any, outs: Sequence[torch.Tensor]) -> Any:
    """The result that `_coded` made a code of, with tensors in place of their positions."""
    if code is None:
        return None
    if isinstance(code, int):
        return outs[code]
    kind, items = code
    if kind == "dict":
        return {k: _rebuilt(c, outs) for k, c in items}
    values = [_rebuilt(c, outs) for _, c in items]
    return tuple(values) if kind == "tuple" else values


# The op itself. Its autograd is that of an eager call, so that both have the same rules.

_lib = torch.library.Library("bridge", "DEF")
_lib.define("call(Tensor[] tensors, str function) -> Tensor[]", tags=[torch.Tag.pt2_compliant_tag])


def _run(tensors: Sequence[torch.Tensor], function: str) -> list[torch.Tensor]:
    return wrap.run(numbers.lookup(function), tensors)


def _fake(tensors: Sequence[torch.Tensor], function: str) -> list[torch.Tensor]:
    device = tensors[0].device if tensors else "cpu"
    return [
        torch.empty(s.shape, dtype=buffers.DTYPES[s.dtype], device=device)
        for s in numbers.lookup(function).outputs
    ]


def _above_transforms() -> Any:
    """A context in which the dispatch keys are as where torch.func begins to treat an op.

    What it uses is private in torch 2.13."""
    key = torch._C.DispatchKey
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for name in (
        "FuncTorchDynamicLayerFrontMode",
        "FuncTorchBatched",
        "FuncTorchVmapMode",
        "FuncTorchGradWrapper",
    ):
        if hasattr(key, name):
            excluded = excluded.remove(getattr(key, name))
    return torch._C._ForceDispatchKeyGuard(
        torch._C._dispatch_tls_local_include_set().add(key.FuncTorchDynamicLayerFrontMode), excluded
    )


def _differentiable(
    keyset: Any, tensors: Sequence[torch.Tensor], function: str
) -> list[torch.Tensor]:
    """The op under autograd: its backward, its forward mode, and torch.func."""
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if not (recorded or _has_tangents(tensors)):
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.bridge.call.default.redispatch(
                keyset & torch._C._after_autograd_keyset, tensors, function
            )
    if not torch._C._are_functorch_transforms_active():
        return list(wrap.Bridged.apply(numbers.lookup(function), None, *tensors))
    functorch = torch._C._functorch
    if functorch.peek_interpreter_stack().key() == functorch.TransformType.Jvp:
        do = "compile without the jvp, or call it eagerly"
        raise NotImplementedError(
            message(
                "reverse mode, or no derivative, of a JAX function inside torch.compile "
                "and torch.export",
                "forward mode (torch.func.jvp)",
                do,
            )
        )
    with _above_transforms():
        return list(wrap.Bridged.apply(numbers.lookup(function), None, *tensors))


def _has_tangents(tensors: Sequence[torch.Tensor]) -> bool:
    """True within forward mode, where one of the tensors has a tangent."""
    return torch._C._is_fwd_grad_enabled() and any(
        torch._VF._unpack_dual(t, 0)[1] is not None for t in tensors
    )


def _vmap(
    info: Any, in_dims: tuple, tensors: Sequence[torch.Tensor], function: str
) -> tuple[list[torch.Tensor], list[int]]:
    batched, tensors = wrap.over_batch(
        numbers.lookup(function), info.batch_size, in_dims[0], tensors
    )
    outs = numbers.call(batched, tensors)
    return outs, [0] * len(outs)


_lib.impl("call", _run, "CompositeExplicitAutograd")
_lib.impl("call", _differentiable, "Autograd", with_keyset=True)
torch.library.register_fake("bridge::call", _fake, lib=_lib)
torch.library.register_vmap("bridge::call", _vmap, lib=_lib)
