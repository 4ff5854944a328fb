"""A JAX callable as a Function: its output types, found without running it, and how JAX
differentiates and batches it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bridge.call import Call, parameter_names
from bridge.errors import message
from bridge.function import Engine, Function, Spec
from jax_side.calls import arrays, programs
from jax_side.calls.signature import check_width, output_names

tree = jax.tree_util


class Transforms(Engine):
    """By jax.jvp, jax.vjp and jax.vmap, inside the one program that a Function becomes."""

    def jvp(self, f, primals, wrt, tangents, outs):
        g, xs = programs.restrict(f, primals, wrt, outs)
        return jax.jvp(g, xs, tuple(tangents))[1]

    def vjp(self, f, primals, wrt, cotangents, outs):
        g, xs = programs.restrict(f, primals, wrt, outs)
        return jax.vjp(g, *xs)[1](tuple(cotangents))

    def gradient(self, f, primals, wrt, out):
        g, xs = programs.restrict(f, primals, wrt)
        y, pull, ys = jax.vjp(lambda *xs: ((ys := g(*xs))[out], ys), *xs, has_aux=True)
        return (*ys, *pull(jnp.ones_like(y)))

    def vmap(self, f, mapped, size, arrays):
        return jax.vmap(
            f, in_axes=tuple(0 if m else None for m in mapped), out_axes=0, axis_size=size
        )(*arrays)

    shares = False  # JAX's own vmap does

    def check_vmap(self, f, mapped):
        pass


_TRANSFORMS = Transforms()


@dataclass(frozen=True)
class JaxFunction(Function):
    """The base Function of this bank."""

    call: Call
    inputs: tuple[Spec, ...]
    outputs: tuple[Spec, ...] = field(compare=False)
    out_tree: Any = field(compare=False)
    x64: bool  # the setting under which the output types were found, and no other
    engine = _TRANSFORMS
    program_of = staticmethod(programs.program)
    record = staticmethod(programs.record)

    def __str__(self):
        return self.call.name

    def __call__(self, *xs) -> tuple:
        """Traced, never run as it is; each output becomes an array of its own."""
        return tuple(map(jnp.asarray, self.call(xs)[0]))

    @property
    def output_names(self) -> tuple[str, ...]:
        return output_names(self.out_tree)

    @property
    def compilations(self) -> int:
        return programs.compilations(self)


@dataclass(frozen=True)
class Exporter:
    """What the other bank needs of a JAX callable: how its arguments are taken apart, and a
    Function for their types."""

    target: Callable
    flatten = staticmethod(tree.tree_flatten)
    # what types depend on beside those of the inputs
    setting = staticmethod(lambda: jax.config.jax_enable_x64)

    def leaf_names(self, structure) -> tuple[str, ...]:
        """The name of each leaf of a call: its own key where it lies in a dict, else that of its
        parameter."""
        try:
            parameters = parameter_names(self.target)
        except (TypeError, ValueError):  # a built-in function
            parameters = []
        return tuple(
            _name(path, parameters)
            for path, _ in tree.tree_leaves_with_path(
                structure.unflatten(range(structure.num_leaves))
            )
        )

    def function(self, structure, static, inputs: tuple[Spec, ...]) -> JaxFunction:
        """Raises what the callable raises for such arguments; ValueError for 64-bit inputs while
        x64 is off."""
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
        call = Call(self.target, structure, static, tree.tree_flatten)
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
        )


def _name(path, parameters: list[str]) -> str:
    """The name of one leaf of (args, kwargs)."""
    key = path[-1]
    if isinstance(key, tree.DictKey):
        return str(key.key)
    if path[0].idx == 1:
        return str(path[1].key)
    return parameters[min(path[1].idx, len(parameters) - 1)] if parameters else str(path[1].idx)


def call_itself(model, *args, **kwargs):
    """The apply of a pytree that is itself callable, as equinox's modules are."""
    return model(*args, **kwargs)


def parameters(params) -> tuple[Any, tuple, list]:
    """(the pytree with positions for leaves, the names on the way to each leaf, leaves: JAX arrays
    or Python values)."""
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


def _key(key) -> str:
    """One step of a path, as state_dict can write it."""
    name = next(getattr(key, a) for a in ("key", "name", "idx") if hasattr(key, a))
    return str(name).replace(".", "_")
