"""A JAX callable as a Function: its output types, found without running it, and how JAX
differentiates and batches it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bridge.call import Call, Static, parameter_names
from bridge.errors import message
from bridge.function import Arrays, Engine, Function, Mapped, Positions, Spec
from jax_side.calls import arrays, compat, programs
from jax_side.calls.signature import check_width, output_names

tree = jax.tree_util


class Transforms(Engine):
    """The engine of JAX: jax.jvp, jax.vjp and jax.vmap, inside the one program that a Function
    becomes."""

    shares = False  # JAX's own vmap does

    def jvp(
        self, f: Function, primals: Arrays, wrt: Positions, tangents: Arrays, outs: Positions
    ) -> Sequence[Any]:
        """Returns the tangents of the outputs `outs`, given those of the inputs `wrt`."""
        g, xs = programs.restrict(f, primals, wrt, outs)
        return jax.jvp(g, xs, tuple(tangents))[1]

    def vjp(
        self, f: Function, primals: Arrays, wrt: Positions, cotangents: Arrays, outs: Positions
    ) -> Sequence[Any]:
        """Returns the cotangents of the inputs `wrt`, given those of the outputs `outs`."""
        g, xs = programs.restrict(f, primals, wrt, outs)
        return jax.vjp(g, *xs)[1](tuple(cotangents))

    def gradient(self, f: Function, primals: Arrays, wrt: Positions, out: int) -> Sequence[Any]:
        """Returns all outputs, and then the gradients of the scalar output `out` in `wrt`."""
        g, xs = programs.restrict(f, primals, wrt)

        def scalar_first(*xs):
            ys = g(*xs)
            return ys[out], ys

        y, pull, ys = compat.vjp_with_aux(scalar_first, *xs)
        return (*ys, *pull(jnp.ones_like(y)))

    def vmap(self, f: Function, mapped: Mapped, size: int, arrays: Arrays) -> Sequence[Any]:
        """Returns the outputs over `size` examples, which lie along the first axis."""
        in_axes = tuple(0 if m else None for m in mapped)
        return jax.vmap(f, in_axes=in_axes, out_axes=0, axis_size=size)(*arrays)

    def check_vmap(self, f: Function, mapped: Mapped) -> None:
        """Raises nothing: JAX batches every function."""


_TRANSFORMS = Transforms()


@dataclass(frozen=True)
class JaxFunction(Function):
    """The base Function of this bank: a JAX callable with arguments of known types."""

    call: Call
    inputs: tuple[Spec, ...]
    outputs: tuple[Spec, ...] = field(compare=False)
    out_tree: Any = field(compare=False)
    x64: bool  # the setting under which the output types were found, and no other
    # (name, value): of the user's jax.jit, for those of the programs
    options: tuple[tuple[str, Any], ...] = ()
    engine = _TRANSFORMS
    program_of = staticmethod(programs.program)
    record = staticmethod(programs.record)

    def __str__(self) -> str:
        return self.call.name

    def __call__(self, *xs: Any) -> tuple[Any, ...]:
        """Returns the outputs, each as an array of its own. It is traced, and never run as it
        is."""
        return tuple(map(jnp.asarray, self.call(xs)[0]))

    @property
    def compilations(self) -> int:
        """How many programs were compiled for this Function and its derivatives."""
        return programs.compilations(self)


@dataclass(frozen=True)
class Exporter:
    """What the other bank needs of a JAX callable: how its arguments are taken apart, and a
    Function for their types."""

    target: Callable[..., Any]
    flatten = staticmethod(tree.tree_flatten)
    # what the types of the outputs depend on beside those of the inputs
    setting = staticmethod(lambda: compat.config.jax_enable_x64)

    def leaf_names(self, structure: Any) -> tuple[str, ...]:
        """Returns the name of each leaf of a call: its own key if it lies in a dict, else the name
        of its parameter."""
        try:
            parameters = parameter_names(self.target)
        except (TypeError, ValueError):  # a built-in function
            parameters = []
        call = structure.unflatten(range(structure.num_leaves))
        return tuple(_name(path, parameters) for path, _ in tree.tree_leaves_with_path(call))

    def function(
        self, structure: Any, static: tuple[Static, ...], inputs: tuple[Spec, ...]
    ) -> JaxFunction:
        """Returns the Function of calls whose arguments have this structure, these static leaves
        and these types.

        Raises: ValueError for 64-bit inputs while x64 is off; TypeError for dtypes that only one
        side knows; whatever the callable raises as it is traced.
        """
        for i, s in enumerate(inputs):
            if s.dtype not in arrays.DTYPES:
                raise TypeError(
                    message(
                        "a dtype that both sides know",
                        f"{s} as input {i} of {self.target}",
                        f"cast it to one of {', '.join(arrays.DTYPES)}",
                    )
                )
            check_width(s, f"input {i} of {getattr(self.target, '__name__', self.target)}")
        target = compat.without_options(self.target)
        call = Call(target, structure, static, tree.tree_flatten)
        types = [jax.ShapeDtypeStruct(s.shape, arrays.DTYPES[s.dtype]) for s in inputs]
        leaves, out_tree = tree.tree_flatten(jax.eval_shape(lambda *xs: call.apply(xs), *types))
        for x, name in zip(leaves, output_names(out_tree), strict=True):
            if x.dtype not in arrays.KNOWN:
                do = (
                    "return jax.random.key_data(keys)"
                    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
                    else f"cast it to one of {', '.join(arrays.DTYPES)}"
                )
                raise TypeError(
                    message(
                        "outputs of dtypes that both sides know",
                        f"{x.dtype} as output {name} of {call.name}",
                        do,
                    )
                )
        return JaxFunction(
            call,
            inputs,
            tuple(Spec(x.shape, x.dtype.name) for x in leaves),
            out_tree,
            self.setting(),
            tuple(compat.compiler_options(self.target).items()),
        )


def _name(path: Any, parameters: list[str]) -> str:
    """The name of one leaf of (args, kwargs)."""
    key = path[-1]
    if isinstance(key, tree.DictKey):
        return str(key.key)
    if path[0].idx == 1:
        return str(path[1].key)
    return parameters[min(path[1].idx, len(parameters) - 1)] if parameters else str(path[1].idx)


def call_itself(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a pytree that is itself callable, as equinox's modules are. It is their `apply`."""
    return model(*args, **kwargs)


def parameters(params: Any) -> tuple[Any, tuple[tuple[str, ...], ...], list[Any]]:
    """Takes a pytree of parameters apart.

    Returns the pytree with positions in place of its leaves, the names on the way to each leaf, and
    the leaves, which are JAX arrays or Python values.

    Raises: TypeError where no leaf is an array.
    """
    found = tree.tree_leaves_with_path(params)
    leaves = [jnp.asarray(x) if isinstance(x, (np.ndarray, np.generic)) else x for _, x in found]
    if not any(isinstance(x, jax.Array) for x in leaves):
        raise TypeError(
            message(
                "a pytree of arrays as params",
                f"{params!r:.60}",
                "pass module(apply, params), or a callable pytree of arrays",
            )
        )
    skeleton = tree.tree_structure(params).unflatten(range(len(leaves)))
    return skeleton, tuple(tuple(map(_key, path)) or ("param",) for path, _ in found), leaves


def _key(key: Any) -> str:
    """One step of a path, as torch's state_dict can write it."""
    name = next(getattr(key, a) for a in ("key", "name", "idx") if hasattr(key, a))
    return str(name).replace(".", "_")
