"""Calls of functions across the border: to_jax, to_torch, functional, module; and the doctor's
diagnosis of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, overload

import jax
import torch

from bridge.call import one_of
from bridge.errors import message
from bridge.join.native import package_outputs
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
from torch_side.calls.export import Batched
from torch_side.calls.module import JaxModule
from torch_side.calls.packages import Package

tree = jax.tree_util
Lane = Literal["auto", "ffi", "host", "native"]
BucketsOrShapes = Buckets | dict[str, str]


@overload
def to_jax(x: torch.Tensor, *, copy: bool | None = None) -> jax.Array:
    """A tensor becomes an array."""


@overload
def to_jax(
    x: Callable[..., Any],
    *,
    outputs: Any = None,
    batched: Batched = "vmap",
    derivatives: Literal["func", "autograd"] = "func",
    lane: Lane = "auto",
    name: str | None = None,
) -> JaxCallable:
    """A callable becomes a JAX function."""


@overload
def to_jax(x: Any, *, copy: bool | None = None) -> Any:
    """A pytree of tensors becomes the same pytree of arrays."""


def to_jax(
    x: Any,
    *,
    copy: bool | None = None,
    outputs: Any = None,
    batched: Batched = "vmap",
    derivatives: Literal["func", "autograd"] = "func",
    lane: Lane = "auto",
    name: str | None = None,
) -> Any:
    """Returns the JAX counterpart of a torch tensor, of a pytree of tensors, or of a torch
    callable.

    TENSORS become jax.Arrays over the same memory. `copy=None` copies only what can't be shared
    (gaps, stride 0, an address that is no multiple of XLA's 64 bytes, requires_grad, conj and neg
    bits). `copy=False` raises instead, and `copy=True` always copies. Writing to a tensor in place
    changes the array that shares its memory. The other arguments are for callables.

    A CALLABLE (function, nn.Module, bound method) becomes a JAX function of the same signature. It
    takes pytrees and keyword arguments of arrays and returns pytrees of arrays. jit, grad, jvp,
    vmap, hessian, scan, shard_map and so on work as for any JAX function. Arguments that are no
    arrays (numbers, strings, None) stay Python values and must be hashable. A module must be in
    evaluation mode if it has dropout or batch norm. Its weights are read at each call; to train
    them from JAX use `functional`. The callable must be pure: it may neither change its inputs nor
    keep a view of them.

    outputs      the types of the outputs. None: they are found with torch's fake tensors, without
                 running the callable, and a change of an input in place is an error before anything
                 runs. Otherwise a pytree of jax.ShapeDtypeStruct, or a function that takes the
                 arguments as ShapeDtypeStructs and returns such a pytree; a change in place is then
                 seen after the first call
    batched      how vmap is served. "vmap": by torch.func.vmap. "sequential": by one call after
                 another. An int: the model takes a batch axis there in every input and gives it
                 there in every output. A dict {argument: axis}: only these inputs take a batch
                 axis, and outputs have it first, or at the axis named "return". The shape of a
                 natively batched output is checked. That its rows are independent is your word
    derivatives  "func": by torch.func. A first gradient is by torch.autograd, which gives the same
                 and is faster. What torch.func gets wrong, or has no forward mode for, is by
                 torch.autograd as well, one point after another. "autograd": by torch.autograd, for
                 models that torch.func refuses (TorchScript, an inner torch.autograd.grad,
                 requires_grad_). vmap of derivatives then needs batched="sequential" or an axis
    lane         "ffi": an XLA custom call on XLA's own buffers and stream (CPU, CUDA). "host":
                 jax.pure_callback (everywhere). "native": the callable and each of its derivatives
                 that is asked for are compiled by AOTInductor when JAX lowers a program, and called
                 without Python (CPU, CUDA; see bridge.native). "auto": ffi where it exists, else
                 host; native for a bridge.native.Package. An eager call uses none
    name         what programs of lane="ffi" that bridge.native.save writes find this callable by, in
                 a process that has made it anew under this name

    Units and signs are the callable's own. Inputs are lent to torch without a copy, but for complex
    and float8, which the ffi lane can't carry and XLA repacks. Each output is written once.

    Raises: TypeError for an argument of the wrong kind or an output that is no tensor; ValueError
    for shapes and dtypes that are not what was inferred or declared, for 64-bit outputs while x64
    is off, and for a module in training mode; NotImplementedError for a transform that can't be
    served as asked, for what lane="native" can't trace or compile, and for second derivatives that
    a custom autograd Function cuts off or a compiled model does not have. For exceptions of the
    callable see `raising`.

    >>> import jax, torch, bridge
    >>> energy = bridge.to_jax(lambda x: (x**2).sum())
    >>> jax.jit(jax.grad(energy))(jax.numpy.arange(3.0)).tolist()
    [0.0, 2.0, 4.0]
    """
    if isinstance(x, Package):
        outputs = package_outputs(x) if outputs is None else outputs
        lane = "native" if lane == "auto" else lane
    if callable(x):
        return JaxCallable(torch_export.Exporter(x, batched, derivatives), outputs, lane, name)
    return tree.tree_map_with_path(functools.partial(_tensor_to_jax, copy), x)


@overload
def to_torch(x: jax.Array, *, copy: bool | None = None) -> torch.Tensor:
    """An array becomes a tensor."""


@overload
def to_torch(x: Callable[..., Any], *, buckets: BucketsOrShapes | None = None) -> TorchCallable:
    """A callable becomes a torch function."""


@overload
def to_torch(x: Any, *, copy: bool | None = None) -> Any:
    """A pytree of arrays becomes the same pytree of tensors."""


def to_torch(x: Any, *, copy: bool | None = None, buckets: BucketsOrShapes | None = None) -> Any:
    """Returns the torch counterpart of a jax.Array, of a pytree of these, or of a JAX callable.

    ARRAYS become tensors over the same memory. `copy=None` and `copy=False` share it, and
    `copy=True` always copies. A tensor that shares memory must not be written to, since JAX takes
    its arrays for constants; use copy=True for a tensor of your own.

    A CALLABLE (a function, a jitted one, an equinox module) becomes a torch function of the same
    signature. It takes pytrees and keyword arguments of tensors and returns pytrees of tensors.
    Leaves that are no tensors (numbers, strings, None) stay Python values and must be hashable.
    Each combination of these, of shapes and of dtypes is compiled once, by jax.jit. `.compilations`
    counts the programs: the forward, and the backward where one was asked for. JAX arrays in the
    callable's closure are constants; for parameters that torch trains see `module`.

    The function differentiates as torch does: backward, double backward, torch.func (grad, vjp,
    jvp, jacrev, jacfwd, hessian, vmap and what they compose to), forward-mode AD, gradcheck,
    checkpoint, torch.compile(fullgraph=True), torch.export. A backward costs one backward, because
    the forward keeps what it needs. That is kept as torch tensors which save_for_backward guards:
    if they are changed in place in between, torch raises its own error. Without a graph (no_grad,
    or no input that requires grad) nothing is kept. A derivative of a derivative evaluates anew.
    Complex gradients follow torch's convention, the conjugate of JAX's. An input that no output
    uses has a gradient of zeros, not None.

    `buckets={"edge_index": "2 E", ...}` pads the named axes to a geometric ladder of sizes and cuts
    the results, so that a few programs serve every E. Its keys are names of parameters or of dict
    keys. Buckets(...) also has fill values, masks and the ladder.

    Tensors that are row-major and begin on a 64-byte boundary are read where they lie; others are
    copied first. Results are fresh memory that belongs to the tensors alone. They are complete on
    the CPU, and in the order of the current stream on a GPU.

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
        exporter = jax_export.Exporter(x)
        return Padded(exporter, as_buckets(buckets)) if buckets else TorchCallable(exporter)
    return tree.tree_map_with_path(functools.partial(_array_to_torch, copy), x)


def module(
    apply: Callable[..., Any], params: Any = None, *, buckets: BucketsOrShapes | None = None
) -> JaxModule:
    """Returns a JAX model as an nn.Module, which torch trains.

    `module(apply, params)(*args)` is apply(params, *args), called with tensors. For flax write
    module(model.apply, variables); for equinox, or any pytree that is itself callable,
    module(model).

    `params` is any pytree. Its floating and complex arrays become Parameters, its integer and bool
    arrays buffers, and what is no array (activation functions, sizes) stays as it is. Their names
    are the paths in the pytree, joined by dots, as in `state_dict`.

    The arrays are copied once, here. From then on the Parameters own the memory, and JAX reads it
    at each call without a copy, so that it sees what an optimizer writes. state_dict,
    load_state_dict, to(dtype), to(device), requires_grad_, deepcopy, torch.optim, clip_grad_norm_
    and torch.func.functional_call work as for any module. So does pickle, if apply and what is no
    array can be pickled (jitted functions can't). `.pytree()` gives the parameters in the shape of
    `params`. `.compilations` and `buckets` are those of `to_torch`.

    Raises: TypeError where no array is among the parameters, or one that torch can't hold (typed
    PRNG keys). A call raises what `to_torch` raises.

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
    tensors = [
        torch_arrays.import_(jax_arrays.export(x), copy=True) if isinstance(x, jax.Array) else x
        for x in leaves
    ]
    return JaxModule(to_torch(apply, buckets=buckets), skeleton, paths, tensors)


def functional(
    module: torch.nn.Module,
    *,
    gradients: Literal["trainable", "all"] = "trainable",
    copy: bool | None = True,
    **options: Any,
) -> tuple[Callable[..., Any], dict[str, jax.Array]]:
    """Returns a torch module as `(apply, params)`, which JAX trains.

    `apply(params, *args, **kwargs)` is a JAX function, and `params` is a dict of JAX arrays. It has
    the parameters and the floating buffers, under their names in `state_dict`. Integer buffers stay
    in the module, so that jax.grad takes the whole dict. `params` are inputs of the compiled
    program: an update needs no recompilation, and the module itself is never written to.

    As in torch, gradients of buffers and of parameters with requires_grad=False are zero;
    `gradients="all"` gives these as well. `copy=False` lets params share the module's memory; don't
    train both then. Other options are those of `to_jax`, where `batched={...}` names the module's
    own arguments, or "params".

    Raises: TypeError if `module` is no nn.Module; ValueError for float64 weights while x64 is off,
    and for a module in training mode with dropout or batch norm.

    >>> import jax, torch, bridge
    >>> apply, params = bridge.functional(torch.nn.Linear(3, 1))
    >>> loss = lambda p, x: (apply(p, x) ** 2).sum()
    >>> sorted(jax.grad(loss)(params, jax.numpy.ones((2, 3))))
    ['bias', 'weight']
    """
    if not isinstance(module, torch.nn.Module):
        do = "use bridge.to_jax for other callables"
        raise TypeError(message("a torch.nn.Module", type(module).__name__, do))
    one_of("gradients", gradients, ("trainable", "all"))
    every = (*module.named_parameters(), *module.named_buffers())
    named = {n: t for n, t in every if buffers.spec_of(t).inexact}
    params = {n: _tensor_to_jax(copy, (), t.detach()) for n, t in named.items()}
    frozen = frozenset(
        n for n, t in named.items() if gradients == "trainable" and not t.requires_grad
    )
    call = to_jax(Applied(module), **options)

    def apply(params: dict[str, jax.Array], *args: Any, **kwargs: Any) -> Any:
        held = {n: jax.lax.stop_gradient(p) if n in frozen else p for n, p in params.items()}
        return call(held, *args, **kwargs)

    return apply, params


def diagnosis() -> list[tuple[str, bool, str]]:
    """Returns what `python -m bridge doctor` prints: rows of (what was looked at, whether it is
    well, what was found or what to do)."""
    triple = lambda x: 2 * x + x
    into_jax = {
        "torch in JAX": lambda lane: to_jax(triple, lane=lane),
        "JAX in torch in JAX": lambda lane: to_jax(to_torch(triple), lane=lane),
    }
    rows = [*jax_doctor.facts(), *torch_doctor.facts()]
    for where, bridged in into_jax.items():
        found = jax_doctor.checks(bridged)
        rows += [(what.replace("torch in jit", where), well, do) for what, well, do in found]
    rows += torch_doctor.checks(to_torch(triple))
    for what, well, do in torch_doctor.checks(to_torch(to_jax(triple))):
        rows.append((what.replace("JAX in torch", "torch in JAX in torch"), well, do))
    return rows


def as_buckets(buckets: BucketsOrShapes) -> Buckets:
    """Returns Buckets as they are, and shapes as the Buckets that they describe."""
    return buckets if isinstance(buckets, Buckets) else Buckets(buckets)


def _tensor_to_jax(copy: bool | None, path: tuple[Any, ...], x: Any) -> jax.Array:
    """One leaf of a pytree, which lies at `path`."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(
            message(
                f"a torch.Tensor at {tree.keystr(path) or 'the root'}",
                f"{type(x).__name__} {x!r:.60}",
                "pass tensors, or a torch callable",
            )
        )
    return jax_arrays.import_(torch_arrays.export(x, copy, "JAX"), torch_arrays.dtype_name(x.dtype))


def _array_to_torch(copy: bool | None, path: tuple[Any, ...], x: Any) -> torch.Tensor:
    """One leaf of a pytree, which lies at `path`."""
    if not isinstance(x, jax.Array):
        raise TypeError(
            message(
                f"a jax.Array at {tree.keystr(path) or 'the root'}",
                f"{type(x).__name__} {x!r:.60}",
                "pass JAX arrays",
            )
        )
    return torch_arrays.import_(jax_arrays.export(x, copy))
