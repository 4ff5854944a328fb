"""A callable of the other bank as a torch function: its signature, one Function for each, and its
results in the user's pytree."""

from __future__ import annotations

import torch

from bridge.call import static_leaf
from bridge.function import Function, Spec
from torch_side.calls import library, numbers, wrap
from torch_side.calls.arrays import check_dense, dtype_name


class Found:
    """The Functions of a callable, in an object of their own: torch.compile hashes what it finds in
    the dicts of a callable."""

    def __init__(self):
        self.known: dict[tuple, Function] = {}  # by signature
        # those of positional tensors with one output, by shapes and dtypes
        self.flat: dict[tuple, Function] = {}


class TorchCallable:
    """What bridge.to_torch returns; its docstring is the documentation. Equal, and equally hashed,
    for equal callables.

    `exporter` is the other bank's: `target`, `flatten`, `setting()` and `function(structure,
    static, inputs)`, which gives a base Function with `out_tree` and `compilations`."""

    def __init__(self, exporter):
        self._exporter = exporter
        self._found = Found()
        self._token = numbers.register(self)
        self.__wrapped__ = exporter.target
        self.__name__ = getattr(exporter.target, "__name__", type(exporter.target).__name__)

    def __eq__(self, other):
        return type(other) is type(self) and self._exporter == other._exporter

    def __hash__(self):
        return hash(self._exporter)

    def __repr__(self):
        return f"bridge.to_torch({self.__name__})"

    def __deepcopy__(self, memo):
        return self  # nothing in it changes but what it has compiled

    def __reduce__(self):
        return type(self), (self._exporter,)

    @property
    def flatten(self):
        """The pytree library of the other bank: x -> (leaves, structure)."""
        return self._exporter.flatten

    @property
    def compilations(self) -> int:
        return sum(fn.compilations for fn in self._found.known.values())

    @wrap.untraced
    def __call__(self, *args, **kwargs):
        if torch.compiler.is_dynamo_compiling():
            return library.traced(self._token, args, kwargs)
        try:  # positional tensors alone, as in most loops, need no pytree work
            fn = (
                None
                if kwargs
                else self._found.flat.get(
                    (self._exporter.setting(), *[(x.shape, x.dtype) for x in args])
                )
            )
        except (
            AttributeError,
            TypeError,
            RuntimeError,
        ):  # no tensors; a symbolic size, as torch.compile has them; nested tensors
            fn = None
        if fn is not None:
            return wrap.call(fn, args)[0]
        fn, tensors = self.function(args, kwargs)
        return fn.out_tree.unflatten(wrap.call(fn, tensors))

    def function(self, args, kwargs) -> tuple[Function, list]:
        """The Function for a signature, and its tensors; output types are inferred here, before
        anything runs."""
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
            fn = self._found.known.setdefault(
                key, self._exporter.function(structure, static, inputs)
            )
            if (
                structure == self.flatten(((0,) * len(tensors), {}))[1]
                and fn.out_tree == self.flatten(0)[1]
            ):
                self._found.flat[setting, *types] = fn
        return fn, tensors
