"""A callable of the other bank as a torch function: its signature, one Function for each, and its
results in the user's pytree."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch

from bridge.call import static_leaf
from bridge.function import Spec
from torch_side.calls import library, numbers, wrap
from torch_side.calls.arrays import check_dense, dtype_name

if TYPE_CHECKING:
    from torch_side.calls.numbers import ForeignBase


class Exporter(Protocol):
    """What the other bank knows of a callable: its Functions, and how its arguments are taken
    apart."""

    @property
    def target(self) -> Callable:
        """The user's callable."""
        ...

    @property
    def flatten(self) -> Callable[[Any], tuple[list, Any]]:
        """The pytree library of the other bank: x -> (leaves, structure)."""
        ...

    @property
    def setting(self) -> Callable[[], Any]:
        """Gives the settings that output types depend on beside the types of the inputs."""
        ...

    def leaf_names(self, structure: Any) -> Sequence[str]:
        """Returns the name of each leaf of a call: its key in a dict, or that of its parameter."""
        ...

    def function(
        self, structure: Any, static: tuple[tuple[int, Any, Any], ...], inputs: tuple[Spec, ...]
    ) -> Any:
        """Returns the base Function for one signature, a numbers.ForeignBase."""
        ...


class Found:
    """The Functions of a callable, in an object of their own.

    torch.compile hashes what it finds in the dicts of a callable itself."""

    def __init__(self) -> None:
        self.known: dict[tuple, ForeignBase] = {}  # by signature
        # those of positional tensors with one output, by shapes and dtypes
        self.flat: dict[tuple, ForeignBase] = {}


class TorchCallable:
    """What bridge.to_torch returns; its docstring is the documentation.

    Those of equal callables are equal and hash equally. `exporter` is the other bank's."""

    def __init__(self, exporter: Exporter) -> None:
        self._exporter = exporter
        self._found = Found()
        self._token = numbers.register(self)
        self.__wrapped__ = exporter.target
        self.__name__ = getattr(exporter.target, "__name__", type(exporter.target).__name__)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TorchCallable) or type(other) is not type(self):
            return False
        return self._exporter == other._exporter

    def __hash__(self) -> int:
        return hash(self._exporter)

    def __repr__(self) -> str:
        return f"bridge.to_torch({self.__name__})"

    def __deepcopy__(self, memo: dict) -> Self:
        return self  # nothing in it changes but what it has compiled

    def __reduce__(self) -> tuple:
        return type(self), (self._exporter,)

    @property
    def flatten(self) -> Callable[[Any], tuple[list, Any]]:
        """The pytree library of the other bank: x -> (leaves, structure)."""
        return self._exporter.flatten

    @property
    def compilations(self) -> int:
        """How many programs were compiled for this callable and its derivatives."""
        return sum(fn.compilations for fn in self._found.known.values())

    @wrap.untraced
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return library.traced(self._token, args, kwargs)
        fn = None
        if not kwargs:  # positional tensors alone, as in most loops, need no pytree work
            # Arguments may be no tensors, may have symbolic sizes as under torch.compile, or may be
            # nested tensors.
            try:
                types = [(x.shape, x.dtype) for x in args]
                fn = self._found.flat.get((self._exporter.setting(), *types))
            except (AttributeError, TypeError, RuntimeError):
                fn = None
        if fn is not None:
            return wrap.call(fn, args)[0]
        fn, tensors = self.function(args, kwargs)
        return fn.out_tree.unflatten(wrap.call(fn, tensors))

    def function(
        self, args: Sequence, kwargs: Mapping[str, Any]
    ) -> tuple[ForeignBase, list[torch.Tensor]]:
        """Returns the Function for the signature of a call, and the tensors of the call.

        Output types are inferred here, before anything runs.

        Raises: TypeError for a tensor that is not dense, and for an argument that is neither a
        tensor nor hashable; what the callable raises for such arguments."""
        leaves, structure = self.flatten((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        static = tuple(
            static_leaf(i, x, "torch tensors")
            for i, x in enumerate(leaves)
            if not isinstance(x, torch.Tensor)
        )
        for t in tensors:
            check_dense(t)
        types = tuple([(torch.Size(map(int, t.shape)), t.dtype) for t in tensors])
        setting = self._exporter.setting()
        key = structure, static, types, setting
        fn = self._found.known.get(key)
        if fn is None:
            inputs = tuple(Spec(tuple(shape), dtype_name(dtype)) for shape, dtype in types)
            made = self._exporter.function(structure, static, inputs)
            fn = self._found.known.setdefault(key, made)
            positional = structure == self.flatten(((0,) * len(tensors), {}))[1]
            if positional and fn.out_tree == self.flatten(0)[1]:
                self._found.flat[setting, *types] = fn
        return fn, tensors
