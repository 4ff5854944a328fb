"""A torch callable as a Function: what is called, what it must return, and how it takes a batch of
its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from bridge.call import Call, one_of, parameter_names
from bridge.errors import message
from bridge.function import Engine, Function, Spec
from torch_side.calls import buffers, inference, running, transforms
from torch_side.calls.adapted import Applied
from torch_side.calls.arrays import DTYPES
from torch_side.calls.batching import Axes, Graphs, NativeBatch
from torch_side.calls.inference import check_output

BATCHED = ("vmap", "sequential", "graph")


class Exporter:
    """What the other bank needs of a torch callable: its output types and a Function for each set
    of argument types. Equal, and equally hashed, for the same callable and options."""

    def __init__(self, target: Callable, batched, derivatives: str):
        if not isinstance(batched, (dict, int)) or isinstance(batched, bool):
            one_of("batched", batched, BATCHED, "an axis (int), {argument: axis}")
        one_of("derivatives", derivatives, transforms.DERIVATIVES)
        self.target, self._batched = (
            target,
            tuple(sorted(batched.items())) if isinstance(batched, dict) else batched,
        )
        self._engine = transforms.engine(derivatives, batched in ("sequential", "graph"))
        self._key = target, self._batched, derivatives

    def __eq__(self, other):
        return isinstance(other, Exporter) and self._key == other._key

    def __hash__(self):
        return hash(self._key)

    def check(self) -> None:
        inference.check_mode(self.target)

    def check_types(self, types, names) -> None:
        """TypeError naming the first array of a dtype that torch does not know."""
        for s, name in zip(types, names, strict=True):
            if s.dtype not in DTYPES:
                got = f"{s} as {name}, which only JAX knows"
                raise TypeError(
                    message(
                        "a dtype that both sides know",
                        got,
                        f"cast it to one of {', '.join(DTYPES)}",
                    )
                )

    def infer(self, call: Call, inputs: tuple[Spec, ...], names: tuple[str, ...]):
        return inference.infer(call, inputs, names, self._engine)

    def function(self, call: Call, inputs, outputs, out_tree, names, owners) -> TorchFunction:
        """`owners` gives the parameter that each input belongs to, from the names of the callable's
        parameters."""
        fn = TorchFunction(
            call, inputs, outputs, self._engine, self._axes(inputs, owners), out_tree, names
        )
        return replace(fn, batching=Graphs.of(fn)) if self._batched == "graph" else fn

    def _axes(self, inputs, owners):
        """Batch axes for a model that batches natively along an axis."""
        if self._batched in BATCHED:
            return None
        if isinstance(self._batched, int):
            return Axes((self._batched,) * len(inputs), self._batched)
        axes = dict(self._batched)
        out = axes.pop("return", 0)
        names = owners(
            self.target.parameters
            if isinstance(self.target, Applied)
            else parameter_names(getattr(self.target, "forward", self.target))
        )
        if unknown := sorted(set(axes) - set(names)):
            raise ValueError(
                message(
                    f"names of array arguments in batched= ({', '.join(sorted(set(names)))})",
                    ", ".join(unknown),
                    "name an argument that holds arrays",
                )
            )
        return Axes(tuple(axes.get(n) for n in names), out)


@dataclass(frozen=True)
class TorchFunction(Function):
    """The base Function of this bank. `batching` is how a model that batches natively does, else
    None."""

    call: Call
    inputs: tuple[Spec, ...]
    outputs: tuple[Spec, ...]
    engine: Engine
    batching: Axes | Graphs | None
    out_tree: Any = field(compare=False)
    names: tuple[tuple[str, ...], tuple[str, ...]] = field(compare=False)

    native = property(lambda self: self.batching is not None)

    def __str__(self):
        return self.call.name

    tensor_type = torch.Tensor
    run = staticmethod(running.run)
    runner = staticmethod(running.runner)
    give = staticmethod(buffers.given)
    on_stream = staticmethod(buffers.on_stream)

    def input_name(self, i):
        return self.names[0][i]

    def __call__(self, *tensors):
        return self.checked(tensors, self.outputs, self._expected)

    @property
    def evaluator(self):
        """`__call__` for many calls, with what it needs looked up once."""
        if not self._direct:
            return self.__call__
        target, tensor, strided, (shape, dtype) = (
            self.call.target,
            torch.Tensor,
            torch.strided,
            self._expected[0],
        )

        def evaluate(*tensors):
            out = target(*tensors)
            if (
                type(out) is tensor
                and out.shape == shape
                and out.dtype is dtype
                and out.layout is strided
            ):
                return (out,)
            return self._fitting(self.call.flatten(out), self.outputs, self._expected)

        return evaluate

    @cached_property
    def _direct(self) -> bool:
        """Positional tensors in, one tensor out: a call needs no pytree work."""
        flatten, n = self.call.flatten, len(self.inputs)
        return (
            not self.call.static
            and self.call.tree == flatten(((0,) * n, {}))[1]
            and self.out_tree == flatten(0)[1]
        )

    @cached_property
    def _expected(self) -> tuple:
        return buffers.kinds(self.outputs)

    def _leaves(self, tensors):
        if not self._direct:
            return self.call(tensors)
        out = self.call.target(*tensors)
        return ((out,), self.out_tree) if isinstance(out, torch.Tensor) else self.call.flatten(out)

    def checked(self, tensors, specs: tuple[Spec, ...], expected: tuple) -> list:
        """Call the user's code; its outputs must be what was inferred or declared."""
        return self._fitting(self._leaves(tensors), specs, expected)

    def _fitting(self, found, specs, expected) -> list:
        leaves, tree = found
        if tree is not self.out_tree and tree != self.out_tree:
            raise TypeError(message(f"outputs {self.out_tree} of {self}", f"{tree}", _SHAPES_ONCE))
        for leaf, (shape, dtype) in zip(leaves, expected):
            if (
                not isinstance(leaf, torch.Tensor)
                or leaf.shape != shape
                or leaf.dtype is not dtype
                or leaf.layout is not torch.strided
            ):
                self._refuse(leaves, specs)
        return leaves

    def _refuse(self, leaves, specs) -> None:
        """Say which output is not what JAX was told."""
        for leaf, want, name in zip(leaves, specs, self.names[1]):
            check_output(leaf, f"output {name} of {self}")
            if (got := buffers.spec_of(leaf)) != want:
                raise ValueError(
                    message(f"output {name} of {self} as {want}", str(got), _SHAPES_ONCE)
                )

    def must_map(self, mapped):
        return self.batching.needed(mapped, self) if self.native else mapped

    def vmap(self, mapped, size):
        return NativeBatch(self, mapped, (size,)) if self.native else super().vmap(mapped, size)


_SHAPES_ONCE = "shapes and dtypes are fixed when JAX traces: return the same kind for the same input shapes, or declare outputs="
