"""Calls of functions across the border: to_jax, to_torch, functional, module; and the doctor's
diagnosis of them."""

from __future__ import annotations

import functools

import jax
import torch

from bridge.call import one_of
from bridge.errors import message
from jax_side import doctor as jax_doctor
from jax_side.calls import arrays as jax_arrays
from jax_side.calls import export as jax_export
from jax_side.calls.calling import JaxCallable
from torch_side import doctor as torch_doctor
from torch_side.calls import arrays as torch_arrays
from torch_side.calls import buffers
from torch_side.calls import export as torch_export
from torch_side.calls.adapted import Applied
from torch_side.calls.buckets import Buckets, Padded
from torch_side.calls.calling import TorchCallable
from torch_side.calls.module import JaxModule

tree = jax.tree_util


def to_jax(x, *, copy=None, outputs=None, batched="vmap", derivatives="func", lane="auto"):
    """A torch tensor, a pytree of tensors, or a torch callable as its JAX counterpart.

    TENSORS become jax.Arrays over the same memory: `copy=None` copies only what can't be shared
    (gaps, stride 0, an address off XLA's 64 bytes, requires_grad, conj and neg bits), `copy=False`
    raises instead, `copy=True` always copies. Writing to a tensor in place changes the array that
    shares its memory. The other arguments are for callables.

    A CALLABLE (function, nn.Module, bound method) becomes a JAX function of the same signature:
    pytrees and keyword arguments of arrays in, pytrees of arrays out; jit, grad, jvp, vmap,
    hessian, scan, shard_map and so on as for any JAX function. Arguments that are no arrays
    (numbers, strings, None) stay Python values and must be hashable. A module must be in evaluation
    mode if it has dropout or batch norm; its weights are read at each call (to train them from JAX
    use `functional`). The callable must be pure: it may neither change its inputs nor keep a view
    of them.

    outputs      None: shapes are found with torch's fake tensors, without running, and a change of
                 an input in place is an error before anything runs; or a pytree of
                 jax.ShapeDtypeStruct; or a function of ShapeDtypeStructs in the shape of the
                 arguments that returns such a pytree (a change in place is then seen after the
                 first call)
    batched      how vmap is served. "vmap": torch.func.vmap. "sequential": one call after another.
                 An int: the model takes a batch axis there in every input and gives it there in
                 every output. A dict {argument: axis}: only these inputs take a batch axis, outputs
                 have it first (or at the axis named "return"). The shape of a natively batched
                 output is checked; that its rows are independent is your word
    derivatives  "func": torch.func (a first gradient by torch.autograd, the same and faster; what
                 torch.func gets wrong, or has no forward mode for, by torch.autograd, one point
                 after another). "autograd": torch.autograd, for models that torch.func refuses
                 (TorchScript, an inner torch.autograd.grad, requires_grad_); vmap of derivatives
                 then wants batched="sequential" or an axis
    lane         "ffi": an XLA custom call on XLA's own buffers and stream (CPU, CUDA). "host":
                 jax.pure_callback (everywhere). "auto": ffi where it exists, else host. An eager
                 call goes by neither

    Units and signs are the callable's own. Inputs are lent to torch without a copy (complex and
    float8 are repacked by XLA on the ffi lane, which can't carry them), each output is written
    once.

    Raises: TypeError for an argument of the wrong kind or an output that is no tensor; ValueError
    for shapes and dtypes that are not what was inferred or declared, 64-bit outputs while x64 is
    off, a module in training mode; NotImplementedError for a transform that can't be served as
    asked, and for second derivatives that a custom autograd Function cuts off or a compiled model
    does not have. Exceptions of the callable: see `raising`.

    >>> import jax, torch, bridge
    >>> energy = bridge.to_jax(lambda x: (x**2).sum())
    >>> jax.jit(jax.grad(energy))(jax.numpy.arange(3.0)).tolist()
    [0.0, 2.0, 4.0]
    """
    if callable(x):
        return JaxCallable(torch_export.Exporter(x, batched, derivatives), outputs, lane)
    return tree.tree_map_with_path(functools.partial(_tensor_to_jax, copy), x)


def to_torch(x, *, copy=None, buckets=None):
    """A jax.Array, a pytree of them, or a JAX callable as its torch counterpart.

    ARRAYS become tensors over the same memory: `copy=None` and `copy=False` share it, `copy=True`
    always copies. A tensor that shares memory must not be written to: JAX believes its arrays
    constant (use copy=True for a tensor of your own).

    A CALLABLE (a function, a jitted one, an equinox module) becomes a torch function of the same
    signature: pytrees and keyword arguments of tensors in, pytrees of tensors out. Leaves that are
    no tensors (numbers, strings, None) stay Python values and must be hashable; each combination of
    these, of shapes and dtypes is compiled once, by jax.jit (`.compilations` counts programs: the
    forward, and the backward where one was asked for). JAX arrays in the callable's closure are
    constants; for parameters that torch trains see `module`.

    It differentiates as torch does: backward, double backward, torch.func (grad, vjp, jvp, jacrev,
    jacfwd, hessian, vmap and what they compose to), forward-mode AD, gradcheck, checkpoint,
    torch.compile(fullgraph=True), torch.export. A backward costs one backward: the forward keeps
    what it needs, as torch tensors that save_for_backward guards (an in-place change in between is
    torch's own error). Without a graph (no_grad, no input that requires grad) nothing is kept. A
    derivative of a derivative evaluates anew. Complex gradients follow torch's convention, the
    conjugate of JAX's. An input that no output uses has a gradient of zeros, not None.

    `buckets={"edge_index": "2 E", ...}` (shapes by the names of parameters or dict keys;
    Buckets(...) also has fill values, masks and the ladder) pads the named axes to a geometric
    ladder of sizes and cuts the results: a few programs serve every E.

    Tensors that are row-major and begin on a 64-byte boundary are read where they lie; others are
    copied first. Results are fresh memory that belongs to the tensors alone, complete on the CPU,
    in the order of the current stream on a GPU.

    Raises: TypeError for a leaf that is no jax.Array, for a tracer (inside jit use
    `to_jax(function)`) and for arguments that are neither tensors nor hashable; ValueError for a
    deleted array or one on several devices, and for 64-bit tensors while x64 is off;
    NotImplementedError for forward mode inside torch.compile. What the callable raises while JAX
    traces it arrives as it is.

    >>> import bridge, jax, torch
    >>> bridge.to_torch({"x": jax.numpy.arange(3)})["x"].tolist()
    [0, 1, 2]
    >>> energy = bridge.to_torch(lambda r: (r**2).sum())
    >>> torch.func.grad(energy)(torch.arange(3.0)).tolist()
    [0.0, 2.0, 4.0]
    """
    if callable(x):
        return (
            Padded(jax_export.Exporter(x), as_buckets(buckets))
            if buckets
            else TorchCallable(jax_export.Exporter(x))
        )
    return tree.tree_map_with_path(functools.partial(_array_to_torch, copy), x)


def module(apply, params=None, *, buckets=None):
    """A JAX model as an nn.Module: `module(apply, params)(*args)` is apply(params, *args), called
    with tensors.

    `params` is any pytree: floating and complex arrays become Parameters, integer and bool arrays
    buffers, what is no array (activation functions, sizes) stays as it is. Their names are the
    paths in the pytree, joined by dots, as in `state_dict`. flax: module(model.apply, variables).
    equinox, or any pytree that is itself callable: module(model).

    The arrays are copied once, here; from then on the Parameters own the memory and JAX reads it at
    each call without a copy, so that what an optimizer writes is seen. state_dict, load_state_dict,
    to(dtype), to(device), requires_grad_, deepcopy, pickle (if apply and what is no array can be
    pickled; jitted functions can't), torch.optim, clip_grad_norm_ and torch.func.functional_call
    work as for any module. `.pytree()` gives the parameters in the shape of `params`,
    `.compilations` and `buckets` are those of `to_torch`.

    Raises: TypeError where there is no array among the parameters, or one that torch can't hold
    (typed PRNG keys); as `to_torch` when it is called.

    >>> import bridge, jax, torch
    >>> net = bridge.module(lambda p, x: x @ p["w"], {"w": jax.numpy.ones((3, 1))})
    >>> net(torch.ones(2, 3)).sum().backward()
    >>> net.state_dict()["w"].shape, net.get_parameter("w").grad.flatten().tolist()
    (torch.Size([3, 1]), [2.0, 2.0, 2.0])
    """
    if params is None:
        apply, params = jax_export.call_itself, apply
    if not callable(apply):
        raise TypeError(
            message(
                "a callable apply(params, ...)",
                f"{apply!r:.60}",
                "pass the model's function first, its parameters second",
            )
        )
    skeleton, paths, leaves = jax_export.parameters(params)
    leaves = [
        torch_arrays.import_(jax_arrays.export(x), copy=True) if isinstance(x, jax.Array) else x
        for x in leaves
    ]
    return JaxModule(to_torch(apply, buckets=buckets), skeleton, paths, leaves)


def functional(module: torch.nn.Module, *, gradients="trainable", copy=True, **options):
    """A module as `(apply, params)`: `apply(params, *args, **kwargs)` is a JAX function, `params` a
    dict of JAX arrays.

    `params` has the names of `state_dict`: parameters and floating buffers (integer buffers stay in
    the module, so that jax.grad takes the whole dict). They are inputs of the compiled program: an
    update needs no recompilation, and the module itself is never written to. As in torch, gradients
    of buffers and of parameters with requires_grad=False are zero; `gradients="all"` gives them
    too. `copy=False` lets params share the module's memory (then don't train both). Other options
    are those of `to_jax`; `batched={...}` names the module's own arguments, or "params".

    Raises: TypeError if `module` is no nn.Module; ValueError for float64 weights while x64 is off,
    or a module in training mode with dropout or batch norm.

    >>> import jax, torch, bridge
    >>> apply, params = bridge.functional(torch.nn.Linear(3, 1))
    >>> loss = lambda p, x: (apply(p, x) ** 2).sum()
    >>> sorted(jax.grad(loss)(params, jax.numpy.ones((2, 3))))
    ['bias', 'weight']
    """
    if not isinstance(module, torch.nn.Module):
        raise TypeError(
            message(
                "a torch.nn.Module", type(module).__name__, "use bridge.to_jax for other callables"
            )
        )
    one_of("gradients", gradients, ("trainable", "all"))
    named = {
        n: t
        for n, t in (*module.named_parameters(), *module.named_buffers())
        if buffers.spec_of(t).inexact
    }
    params = {n: _tensor_to_jax(copy, (), t.detach()) for n, t in named.items()}
    frozen = frozenset(
        n for n, t in named.items() if gradients == "trainable" and not t.requires_grad
    )
    call = to_jax(Applied(module), **options)

    def apply(params, *args, **kwargs):
        return call(
            {n: jax.lax.stop_gradient(p) if n in frozen else p for n, p in params.items()},
            *args,
            **kwargs,
        )

    return apply, params


def diagnosis() -> list[tuple[str, bool, str]]:
    """What `python -m bridge doctor` prints: (what, whether all is well, what was found or what to
    do)."""
    triple = lambda x: 2 * x + x
    into_jax = {
        "torch in JAX": lambda lane: to_jax(triple, lane=lane),
        "JAX in torch in JAX": lambda lane: to_jax(to_torch(triple), lane=lane),
    }
    rows = [*jax_doctor.facts(), *torch_doctor.facts()]
    for where, bridged in into_jax.items():
        rows += [
            (what.replace("torch in jit", where), *rest)
            for what, *rest in jax_doctor.checks(bridged)
        ]
    rows += torch_doctor.checks(to_torch(triple))
    return rows + [
        (what.replace("JAX in torch", "torch in JAX in torch"), *rest)
        for what, *rest in torch_doctor.checks(to_torch(to_jax(triple)))
    ]


def as_buckets(buckets) -> Buckets:
    """Buckets, or the shapes of one."""
    return buckets if isinstance(buckets, Buckets) else Buckets(buckets)


def _tensor_to_jax(copy, path, x):
    if not isinstance(x, torch.Tensor):
        raise TypeError(
            message(
                f"a torch.Tensor at {tree.keystr(path) or 'the root'}",
                f"{type(x).__name__} {x!r:.60}",
                "pass tensors, or a torch callable",
            )
        )
    return jax_arrays.import_(torch_arrays.export(x, copy, "JAX"), torch_arrays.dtype_name(x.dtype))


def _array_to_torch(copy, path, x):
    if not isinstance(x, jax.Array):
        raise TypeError(
            message(
                f"a jax.Array at {tree.keystr(path) or 'the root'}",
                f"{type(x).__name__} {x!r:.60}",
                "pass JAX arrays",
            )
        )
    return torch_arrays.import_(jax_arrays.export(x, copy))
