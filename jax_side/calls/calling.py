"""A callable of the other bank as a JAX function: its signature, one Function for each, and its
results in the user's pytree."""

from __future__ import annotations

import jax

from bridge.call import Call, one_of
from bridge.function import Function
from jax_side.calls import lanes, primitive, registry
from jax_side.calls.signature import Signature, check_width, output_names, sign

tree = jax.tree_util


class JaxCallable:
    """What bridge.to_jax returns for a callable; its docstring is the documentation. Equal, and
    equally hashed, for the same callable and options.

    `exporter` is the other bank's: `target`, `check()`, `check_types(types, names)`, `infer(call,
    inputs, names)` -> (output types, their tree), and `function(call, inputs, outputs, out_tree,
    names, owners)`, which gives a base Function."""

    def __init__(self, exporter, outputs, lane: str):
        registry.release_retired()
        exporter.check()
        self._exporter, self._outputs, self._lane = (
            exporter,
            outputs,
            one_of("lane", lane, lanes.LANES),
        )
        self._key = (
            exporter,
            outputs if callable(outputs) else tuple(map(tuple, _flat(outputs))),
            lane,
        )
        self._known: dict[Signature, Function] = {}
        self.__wrapped__ = exporter.target
        self.__name__ = getattr(exporter.target, "__name__", type(exporter.target).__name__)

    def __eq__(self, other):
        return isinstance(other, JaxCallable) and self._key == other._key

    def __hash__(self):
        return hash(self._key)

    def __repr__(self):
        return f"bridge.to_jax({self.__name__})"

    def __call__(self, *args, **kwargs):
        registry.release_retired()
        signature, arrays = sign(args, kwargs)
        fn = self._known.get(signature)
        if fn is None:
            fn = self._known[signature] = self._function(signature)
        return fn.out_tree.unflatten(primitive.call(fn, *arrays, lane=self._lane))

    def _function(self, signature: Signature) -> Function:
        """The Function for one signature: its output types are inferred or declared here, before
        anything runs."""
        call = Call(self.__wrapped__, signature.tree, signature.static, tree.tree_flatten)
        given = signature.names()
        self._exporter.check_types(signature.inputs, given)
        if self._outputs is None:
            outputs, out_tree = self._exporter.infer(call, signature.inputs, given)
        else:
            outputs, out_tree = signature.declared(self._outputs)
        names = given, output_names(out_tree)
        self._exporter.check_types(outputs, [f"output {name}" for name in names[1]])
        for s, name in zip(outputs, names[1], strict=True):
            check_width(s, f"output {name} of {call.name}")
        return self._exporter.function(
            call, signature.inputs, outputs, out_tree, names, signature.parameters
        )


def _flat(outputs):
    """Declared outputs as something hashable."""
    leaves, structure = tree.tree_flatten(outputs)
    return [
        (structure,),
        *((tuple(x.shape), str(x.dtype)) if hasattr(x, "shape") else (repr(x),) for x in leaves),
    ]
