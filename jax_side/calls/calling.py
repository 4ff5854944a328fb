"""A callable of the other bank as a JAX function: its signature, one Function for each, and its
results in the user's pytree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax

from bridge.call import Call, one_of
from bridge.function import Spec
from jax_side.calls import lanes, named, primitive, registry
from jax_side.calls.signature import Signature, check_numbers, check_width, output_names, sign

tree = jax.tree_util


class Exporter(Protocol):
    """What this bank needs of a callable of the other bank. Exporters of the same callable and
    options are equal and hash alike."""

    target: Callable[..., Any]

    def weights(self) -> Any:
        """Returns something hashable that changes when a weight of the callable does."""
        ...

    def fingerprint(self) -> str:
        """Returns a hash of the callable with its weights, and of the options."""
        ...

    def check(self) -> None:
        """Raises ValueError for a callable that is no function."""
        ...

    def check_types(self, types: Sequence[Spec], names: Sequence[str]) -> None:
        """Raises TypeError naming the first array of a dtype that the other bank does not know."""
        ...

    def infer(
        self, call: Call, inputs: tuple[Spec, ...], names: tuple[str, ...]
    ) -> tuple[tuple[Spec, ...], Any]:
        """Returns the types of the outputs and their tree."""
        ...

    def function(
        self,
        call: Call,
        inputs: tuple[Spec, ...],
        outputs: tuple[Spec, ...],
        out_tree: Any,
        names: tuple[tuple[str, ...], tuple[str, ...]],
        owners: Callable[[list[str]], tuple[str, ...]],
    ) -> Any:
        """Returns the base Function, which has the `out_tree`."""
        ...


class JaxCallable:
    """What bridge.to_jax returns for a callable; its docstring is the documentation.

    JaxCallables of the same callable and options are equal and hash alike. `outputs` are None, or
    the types that the user declared: a pytree, or a function of the inputs' types.

    Raises: ValueError for a lane that does not exist, and for a callable that is no function.
    """

    def __init__(
        self, exporter: Exporter, outputs: Any, lane: str, name: str | None = None
    ) -> None:
        registry.release_retired(thorough=True)
        exporter.check()
        self._exporter = exporter
        self._outputs = outputs
        self._lane = one_of("lane", lane, lanes.LANES)
        declared = outputs if callable(outputs) else tuple(map(tuple, _flat(outputs)))
        # What was compiled with other weights is another function.
        weights = exporter.weights() if lane == "native" else None
        self._key = (exporter, declared, lane, weights, name)
        self.name = name
        if name is not None:
            allowed = [name] if isinstance(name, str) and name else []
            one_of("name", name, allowed, "a text that is not empty")
            named.callables[name] = self
        # a base Function of the other bank, which has the tree of its outputs
        self._known: dict[Signature, Any] = {}
        self.__wrapped__ = exporter.target
        self.__name__ = getattr(exporter.target, "__name__", type(exporter.target).__name__)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, JaxCallable) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return f"bridge.to_jax({self.__name__})"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        registry.release_retired()
        signature, arrays = sign(args, kwargs)
        fn = self._known.get(signature) or self.base(signature)
        return fn.out_tree.unflatten(primitive.call(fn, *arrays, lane=self._lane))

    def base(self, signature: Signature) -> Any:
        """Returns the Function for one signature, made once."""
        fn = self._known.get(signature)
        if fn is None:
            fn = self._known[signature] = self._function(signature)
            if self.name is not None:
                fn.memo["named"] = self
        return fn

    def fingerprint(self) -> str:
        """Returns what changes with the code, the weights and the options behind this function."""
        return self._exporter.fingerprint()

    def _function(self, signature: Signature) -> Any:
        """The base Function for one signature. Its output types are inferred here, or taken as
        declared, before anything runs."""
        call = Call(self.__wrapped__, signature.tree, signature.static, tree.tree_flatten)
        given = signature.names()
        self._exporter.check_types(signature.inputs, given)
        check_numbers(signature.inputs, given, call.name)
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


def _flat(outputs: Any) -> list[tuple[Any, ...]]:
    """Declared outputs as something hashable."""
    leaves, structure = tree.tree_flatten(outputs)
    return [
        (structure,),
        *((tuple(x.shape), str(x.dtype)) if hasattr(x, "shape") else (repr(x),) for x in leaves),
    ]
