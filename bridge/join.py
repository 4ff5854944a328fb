"""The one file that imports both sides: to_jax, to_torch, functional."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import numpy as np
import torch

from bridge.errors import message
from bridge.function import Spec
from jax_side import arrays as jax_arrays
from jax_side import lanes, primitive
from torch_side import arrays as torch_arrays
from torch_side import buffers, export, transforms

tree = jax.tree_util
BATCHED = ("vmap", "sequential")


def to_jax(x, *, copy=None, outputs=None, batched="vmap", derivatives="func", lane="auto"):
    """A torch tensor, a pytree of tensors, or a torch callable as its JAX counterpart.

    TENSORS become jax.Arrays over the same memory (see jax_side.arrays): `copy=None` copies only what can't be shared,
    `copy=False` raises instead, `copy=True` always copies. The other arguments are for callables.

    A CALLABLE (function, nn.Module, bound method) becomes a JAX function of the same signature: pytrees and keyword
    arguments of arrays in, pytrees of arrays out; jit, grad, jvp, vmap, hessian, scan, shard_map and so on as for any JAX
    function. Arguments that are no arrays (numbers, strings, None) stay Python values and must be hashable. A module must
    be in evaluation mode if it has dropout or batch norm; its weights are read at each call (to train them from JAX use
    `functional`). The callable must be pure: it may neither change its inputs nor keep a view of them.

    outputs      None: shapes are found with torch's fake tensors, without running; or a pytree of jax.ShapeDtypeStruct;
                 or a function of ShapeDtypeStructs in the shape of the arguments that returns such a pytree
    batched      how vmap is served. "vmap": torch.func.vmap. "sequential": one call after another. An int: the model
                 takes a batch axis there in every input and gives it there in every output. A dict {argument: axis}:
                 only these inputs take a batch axis, outputs have it first (or at the axis named "return"). The shape
                 of a natively batched output is checked; that its rows are independent is your word
    derivatives  "func": torch.func. "autograd": torch.autograd, for models that torch.func refuses (TorchScript, an
                 inner torch.autograd.grad, requires_grad_); vmap of derivatives then wants batched="sequential" or an axis
    lane         "ffi": an XLA custom call on XLA's own buffers and stream (CPU, CUDA). "host": jax.pure_callback
                 (everywhere). "auto": ffi where it exists, else host

    Units and signs are the callable's own. Inputs are lent to torch without a copy, each output is written once.

    Raises: TypeError for an argument of the wrong kind or an output that is no tensor; ValueError for shapes and dtypes
    that are not what was inferred or declared, 64-bit outputs while x64 is off, a module in training mode;
    NotImplementedError for a transform that can't be served as asked. Exceptions of the callable: see `raising`.

    >>> import jax, torch, bridge
    >>> energy = bridge.to_jax(lambda x: (x**2).sum())
    >>> jax.jit(jax.grad(energy))(jax.numpy.arange(3.0)).tolist()
    [0.0, 2.0, 4.0]
    """
    if callable(x) and not isinstance(x, torch.Tensor):
        return JaxFunction(x, outputs, _axes(batched), _one_of("derivatives", derivatives, transforms.DERIVATIVES), _one_of("lane", lane, lanes.LANES))
    return tree.tree_map_with_path(functools.partial(_tensor_to_jax, copy), x)


def to_torch(x, *, copy=None):
    """A jax.Array, or a pytree of them, as torch tensors over the same memory.

    `copy=None` copies only what can't be shared, `copy=False` raises instead, `copy=True` always copies. A tensor that
    shares memory must not be written to: JAX believes its arrays constant (use copy=True for a tensor of your own).

    Raises: TypeError for a leaf that is no jax.Array, for a tracer (inside jit use `to_jax(function)`) and for a JAX
    function (not supported yet); ValueError for a deleted array or one that lies on several devices.

    >>> import jax, bridge
    >>> bridge.to_torch({"x": jax.numpy.arange(3)})["x"].tolist()
    [0, 1, 2]
    """
    if callable(x):
        raise NotImplementedError(message("arrays or a pytree of arrays", f"the callable {x!r:.60}", "JAX functions in torch are not supported yet"))
    return tree.tree_map_with_path(functools.partial(_array_to_torch, copy), x)


def functional(module: torch.nn.Module, *, gradients="trainable", copy=True, **options):
    """A module as `(apply, params)`: `apply(params, *args, **kwargs)` is a JAX function, `params` a dict of JAX arrays.

    `params` has the names of `state_dict`: parameters and floating buffers (integer buffers stay in the module, so that
    jax.grad takes the whole dict). They are inputs of the compiled program: an update needs no recompilation, and the
    module itself is never written to. As in torch, gradients of buffers and of parameters with requires_grad=False are
    zero; `gradients="all"` gives them too. `copy=False` lets params share the module's memory (then don't train both).
    Other options are those of `to_jax`; `batched={...}` names the module's own arguments.

    Raises: TypeError if `module` is no nn.Module; ValueError for float64 weights while x64 is off, or a module in training
    mode with dropout or batch norm.

    >>> import jax, torch, bridge
    >>> apply, params = bridge.functional(torch.nn.Linear(3, 1))
    >>> loss = lambda p, x: (apply(p, x) ** 2).sum()
    >>> sorted(jax.grad(loss)(params, jax.numpy.ones((2, 3))))
    ['bias', 'weight']
    """
    if not isinstance(module, torch.nn.Module):
        raise TypeError(message("a torch.nn.Module", type(module).__name__, "use bridge.to_jax for other callables"))
    _one_of("gradients", gradients, ("trainable", "all"))
    named = {n: t for n, t in (*module.named_parameters(), *module.named_buffers()) if buffers.spec_of(t).inexact}
    params = {n: jax_arrays.import_(torch_arrays.export(t.detach(), copy), torch_arrays.dtype_name(t.dtype)) for n, t in named.items()}
    frozen = frozenset(n for n, t in named.items() if gradients == "trainable" and not t.requires_grad)
    call = to_jax(_Apply(module), **options)

    def apply(params, *args, **kwargs):
        return call({n: jax.lax.stop_gradient(p) if n in frozen else p for n, p in params.items()}, *args, **kwargs)

    return apply, params


class _Apply:
    """torch.func.functional_call of one module; equal for the same module."""

    def __init__(self, module):
        self.__self__ = module
        self.__qualname__ = type(module).__name__

    def __eq__(self, other):
        return isinstance(other, _Apply) and self.__self__ is other.__self__

    def __hash__(self):
        return hash(self.__self__)

    def __call__(self, params, *args, **kwargs):
        return torch.func.functional_call(self.__self__, params, args, kwargs)


class JaxFunction:
    """A torch callable as a JAX function; equal, and equally hashed, for the same callable and options."""

    def __init__(self, target: Callable, outputs, axes, derivatives: str, lane: str):
        export.check_mode(target)
        self._key = (target, outputs if callable(outputs) else _hashable(outputs), axes, derivatives, lane)
        self._outputs, self._axes, self._lane = outputs, axes, lane
        self._engine = transforms.engine(derivatives, axes == "sequential")
        self._known: dict = {}
        self.__wrapped__ = target
        self.__name__ = getattr(target, "__name__", type(target).__name__)

    def __eq__(self, other):
        return isinstance(other, JaxFunction) and self._key == other._key

    def __hash__(self):
        return hash(self._key)

    def __repr__(self):
        return f"bridge.to_jax({self.__name__})"

    def __call__(self, *args, **kwargs):
        leaves, in_tree = tree.tree_flatten((args, kwargs))
        kinds = [_is_array(x) for x in leaves]
        given = [_as_jax(x) for x, a in zip(leaves, kinds) if a]
        specs = tuple(Spec(x.shape, x.dtype.name) for x in given)
        static = tuple((i, type(x), x) for i, (x, a) in enumerate(zip(leaves, kinds)) if not a)
        try:
            fn = self._known.get((in_tree, specs, static))
        except TypeError as e:
            raise TypeError(message("arrays, or hashable Python values, as arguments", _unhashable(static), "pass an array or a tuple")) from e
        if fn is None:
            fn = self._known[in_tree, specs, static] = self._function(in_tree, specs, static)
        return fn.out_tree.unflatten(primitive.call(fn, *given, lane=self._lane))

    def _function(self, in_tree, specs, static) -> export.TorchFunction:
        """The base Function for one signature: its shapes are inferred or declared here, before anything runs."""
        call = export.Call(self.__wrapped__, in_tree, static, tree.tree_flatten)
        inputs = _names(in_tree, static)
        if self._outputs is None:
            leaves, out_tree = export.infer(call, specs, self._engine)
            outputs = tuple(map(buffers.spec_of, leaves))
        else:
            leaves, out_tree = _declared(self._outputs, in_tree, specs, static)
            outputs = tuple(Spec(tuple(x.shape), np.dtype(x.dtype).name) for x in leaves)
        names = (inputs, _paths(out_tree))
        for s, name in zip(outputs, names[1], strict=True):
            _check_width(s, f"output {name} of {call.name}")
        axes = None if self._axes in BATCHED else _native(self._axes, in_tree, static, call)
        return export.TorchFunction(call, specs, outputs, self._engine, axes, out_tree, names)


# Arguments.


def _is_array(x) -> bool:
    if isinstance(x, torch.Tensor):
        raise TypeError(message("JAX arrays as arguments of a bridged function", "a torch.Tensor", "convert it: bridge.to_jax(tensor)"))
    return isinstance(x, (jax.Array, np.ndarray, np.generic))


def _as_jax(x):
    if isinstance(x, jax.Array):
        return x
    _check_width(Spec(x.shape, x.dtype.name), "a NumPy argument")
    return jax.numpy.asarray(x)


def _check_width(s: Spec, what: str) -> None:
    if s.dtype in ("float64", "int64", "uint64", "complex128") and not jax.config.jax_enable_x64:
        raise ValueError(message(f"{what} of at most 32-bit parts while x64 is off", str(s), 'call jax.config.update("jax_enable_x64", True), or cast it in torch'))


def _unhashable(static) -> str:
    for _, kind, value in static:
        try:
            hash(value)
        except TypeError:
            return f"a {kind.__name__}"
    return "an unhashable value"


def _names(in_tree, static) -> tuple[str, ...]:
    fixed = {i for i, *_ in static}
    return tuple(p for i, p in enumerate(_paths(in_tree, inputs=True)) if i not in fixed)


def _paths(t, inputs=False) -> tuple[str, ...]:
    """How a leaf is written in error texts: x, x['pos'] (an argument), ['energy'] (an output)."""
    paths = [k for k, _ in tree.tree_leaves_with_path(t.unflatten(range(t.num_leaves)))]
    if not inputs:
        return tuple(tree.keystr(p) or "(the only one)" for p in paths)
    return tuple((f"argument {p[1].idx}" if p[0].idx == 0 else p[1].key) + tree.keystr(p[2:]) for p in paths)


# Options.


def _one_of(name: str, value, allowed):
    if value not in allowed:
        raise ValueError(message(f"{name} as one of {', '.join(map(repr, allowed))}", repr(value), "choose one of these"))
    return value


def _axes(batched):
    if isinstance(batched, dict):
        return tuple(sorted(batched.items()))
    return batched if isinstance(batched, int) and not isinstance(batched, bool) else _one_of("batched", batched, (*BATCHED, "an axis", "{argument: axis}")[:2])


def _native(axes, in_tree, static, call):
    """(axis of each array input or None, axis of the outputs) for a model that batches natively."""
    count = in_tree.num_leaves - len(static)
    if isinstance(axes, int):
        return (axes,) * count, axes
    named = dict(axes)
    out = named.pop("return", 0)
    owners = _arguments(call, in_tree, static)
    if unknown := set(named) - set(owners):
        raise ValueError(message(f"names of arguments of {call.name} in batched= ({', '.join(sorted(set(owners)))})", ", ".join(sorted(unknown)), "name an argument that holds arrays"))
    return tuple(named.get(o) for o in owners), out


def _arguments(call, in_tree, static) -> list[str]:
    """The name of the argument that each array input belongs to."""
    import inspect

    target = call.target.__self__ if isinstance(call.target, _Apply) else call.target
    signature = inspect.signature(target.forward if isinstance(target, torch.nn.Module) else target)
    names = (["params"] if isinstance(call.target, _Apply) else []) + list(signature.parameters)
    fixed = {i for i, *_ in static}
    paths = [k for k, _ in tree.tree_leaves_with_path(in_tree.unflatten(range(in_tree.num_leaves)))]
    return [names[p[1].idx] if p[0].idx == 0 else p[1].key for i, p in enumerate(paths) if i not in fixed]


def _declared(outputs, in_tree, specs, static):
    if callable(outputs):
        leaves = [jax.ShapeDtypeStruct(s.shape, s.dtype) for s in specs]
        for i, _, value in static:
            leaves.insert(i, value)
        args, kwargs = in_tree.unflatten(leaves)
        outputs = outputs(*args, **kwargs)
    leaves, out_tree = tree.tree_flatten(outputs)
    for x in leaves:
        if not (hasattr(x, "shape") and hasattr(x, "dtype")):
            raise TypeError(message("outputs= as a pytree of jax.ShapeDtypeStruct", f"{type(x).__name__} {x!r:.60}", "give shape and dtype of each output"))
    return leaves, out_tree


def _hashable(outputs):
    leaves, t = tree.tree_flatten(outputs)
    return t, tuple((tuple(x.shape), str(x.dtype)) if hasattr(x, "shape") else x for x in leaves)


# Arrays.


def _tensor_to_jax(copy, path, x):
    if not isinstance(x, torch.Tensor):
        raise TypeError(message(f"a torch.Tensor at {tree.keystr(path) or 'the root'}", f"{type(x).__name__} {x!r:.60}", "pass tensors, or a torch callable"))
    return jax_arrays.import_(torch_arrays.export(x, copy, "JAX"), torch_arrays.dtype_name(x.dtype), None if copy else copy)


def _array_to_torch(copy, path, x):
    if not isinstance(x, jax.Array):
        raise TypeError(message(f"a jax.Array at {tree.keystr(path) or 'the root'}", f"{type(x).__name__} {x!r:.60}", "pass JAX arrays"))
    return torch_arrays.import_(jax_arrays.export(x, copy), None if copy else copy)
