"""One op of torch.library, bridge::call, for whoever traces torch: torch.compile, torch.export,
fake tensors.

The op names its Function by a number (torch_side/calls/numbers.py).
"""

from __future__ import annotations

import torch
from torch.utils import _pytree as pytree

from bridge.errors import message
from torch_side.calls import buffers, numbers, wrap

# Calls that torch.compile traces: what the other bank's pytree library does is done at compile
# time, on numbers in place of tensors, and reaches the traced code as constants.


def traced(token: str, args, kwargs):
    """A call of a registered callable, in code that torch.compile can trace."""
    leaves, structure = pytree.tree_flatten((args, kwargs))
    # a size or number as it is now, in place of a symbol
    guard = torch.fx.experimental.symbolic_shapes.guard_scalar
    types = tuple(
        [
            (tuple([guard(n) for n in x.shape]), x.dtype)
            if isinstance(x, torch.Tensor)
            else guard(x)
            if isinstance(x, (int, float))
            else x
            for x in leaves
        ]
    )
    number, order, result = _resolve(
        token, pytree.tree_unflatten(list(range(len(leaves))), structure), types
    )
    return _rebuilt(result, torch.ops.bridge.call([leaves[i] for i in order], number))


def _resolve(token: str, call, types):
    """(number of the Function, the leaves that are its inputs, its result with positions for
    tensors)."""
    empty = [
        torch.empty(t[0], dtype=t[1], device="meta") if isinstance(t, tuple) else t for t in types
    ]
    args, kwargs = pytree.tree_map(lambda i: empty[i], call)
    fn, tensors = numbers.known(token).function(args, kwargs)
    order = tuple(next(i for i, e in enumerate(empty) if e is t) for t in tensors)
    return numbers.number(fn), order, _coded(fn.out_tree.unflatten(range(len(fn.outputs))))


# what torch.compiler.assume_constant_result does, which imports dynamo: that sets an environment
# variable
_resolve._dynamo_marked_constant = True


def _coded(x):
    """A result as nested tuples, the only container that torch.compile takes for a constant."""
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


def _rebuilt(code, outs):
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


def _run(tensors, function):
    return wrap.run(numbers.lookup(function), tensors)


def _fake(tensors, function):
    device = tensors[0].device if tensors else "cpu"
    return [
        torch.empty(s.shape, dtype=buffers.DTYPES[s.dtype], device=device)
        for s in numbers.lookup(function).outputs
    ]


def _above_transforms():
    """The dispatch keys as they are where torch.func begins to treat an op. Private in torch
    2.13."""
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


def _differentiable(keyset, tensors, function):
    """Backward, forward mode and torch.func of the op."""
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if recorded or (
        torch._C._is_fwd_grad_enabled()
        and any(torch._VF._unpack_dual(t, 0)[1] is not None for t in tensors)
    ):
        if torch._C._are_functorch_transforms_active():
            if (
                torch._C._functorch.peek_interpreter_stack().key()
                == torch._C._functorch.TransformType.Jvp
            ):
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
        return list(wrap.Bridged.apply(numbers.lookup(function), None, *tensors))
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.bridge.call.default.redispatch(
            keyset & torch._C._after_autograd_keyset, tensors, function
        )


def _vmap(info, in_dims, tensors, function):
    batched, tensors = wrap.over_batch(
        numbers.lookup(function), info.batch_size, in_dims[0], tensors
    )
    outs = numbers.call(batched, tensors)
    return outs, [0] * len(outs)


_lib.impl("call", _run, "CompositeExplicitAutograd")
_lib.impl("call", _differentiable, "Autograd", with_keyset=True)
torch.library.register_fake("bridge::call", _fake, lib=_lib)
torch.library.register_vmap("bridge::call", _vmap, lib=_lib)
