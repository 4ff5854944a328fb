"""A torch callable as a Function: what is called, what it must return, and how it takes a batch of
its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch

from bridge.call import Call, one_of, parameter_names
from bridge.errors import message
from bridge.function import Function, Spec
from torch_side.calls import buffers, compiling, inference, running, transforms
from torch_side.calls.adapted import Applied
from torch_side.calls.arrays import DTYPES
from torch_side.calls.batching import Axes, Graphs, Kinds, NativeBatch, TorchBase
from torch_side.calls.fingerprints import fingerprint
from torch_side.calls.inference import TorchEngine, check_output

BATCHED = ("vmap", "sequential", "graph")
# one of BATCHED, an axis of all inputs, or the axes of some inputs by their names
Batched = Literal["vmap", "sequential", "graph"] | int | dict[str, int]


class Exporter:
    """What the other bank needs of a torch callable: its output types, and a Function for each set
    of argument types.

    Exporters of the same callable with the same options are equal and hash equally. `batched` and
    `derivatives` are those of bridge.to_jax.

    Raises: ValueError for options that don't exist."""

    def __init__(self, target: Callable, batched: Batched, derivatives: str) -> None:
        if not isinstance(batched, (dict, int)) or isinstance(batched, bool):
            one_of("batched", batched, BATCHED, "an axis (int), {argument: axis}")
        one_of("derivatives", derivatives, transforms.DERIVATIVES)
        self.target = target
        self._batched = tuple(sorted(batched.items())) if isinstance(batched, dict) else batched
        self._engine = transforms.engine(derivatives, batched in ("sequential", "graph"))
        self._key = target, self._batched, derivatives

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Exporter) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def weights(self) -> tuple[tuple[int, int, int], ...]:
        """Returns something that changes when a weight of the module is changed or replaced."""
        return tuple(map(compiling.state, inference.tensors_of(self.target)))

    def fingerprint(self) -> str:
        """Returns a hash of the callable with its weights, and of the options."""
        return fingerprint(*self._key)

    def check(self) -> None:
        """Raises ValueError for a callable that is no function (see inference.check_mode)."""
        inference.check_mode(self.target)

    def check_types(self, types: Sequence[Spec], names: Sequence[str]) -> None:
        """Raises TypeError naming the first array of a dtype that torch does not know."""
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

    def infer(
        self, call: Call, inputs: tuple[Spec, ...], names: tuple[str, ...]
    ) -> tuple[tuple[Spec, ...], Any]:
        """Returns the types of the outputs and their tree, without running the callable.

        Raises as inference.infer does."""
        return inference.infer(call, inputs, names, self._engine)

    def function(
        self,
        call: Call,
        inputs: tuple[Spec, ...],
        outputs: tuple[Spec, ...],
        out_tree: Any,
        names: tuple[tuple[str, ...], tuple[str, ...]],
        owners: Callable[[list[str]], tuple[str, ...]],
    ) -> TorchFunction:
        """Returns the base Function for one set of argument types.

        `names` are those of the inputs and of the outputs. `owners` gives the parameter that each
        input belongs to, from the names of the callable's parameters.

        Raises: ValueError for names in batched= that no argument has; TypeError as Graphs.of."""
        # a package that others compiled has no transforms
        kind = getattr(self.target, "function_type", TorchFunction)
        fn = kind(call, inputs, outputs, self._engine, self._axes(inputs, owners), out_tree, names)
        return replace(fn, batching=Graphs.of(fn)) if self._batched == "graph" else fn

    def _axes(
        self, inputs: Sequence[Spec], owners: Callable[[list[str]], tuple[str, ...]]
    ) -> Axes | None:
        """The batch axes of a model that batches natively along an axis, else None."""
        if isinstance(self._batched, str):
            return None
        if isinstance(self._batched, int):
            return Axes((self._batched,) * len(inputs), self._batched)
        axes = dict(self._batched)
        out = axes.pop("return", 0)
        if isinstance(self.target, Applied):
            parameters = self.target.parameters
        else:
            parameters = parameter_names(getattr(self.target, "forward", self.target))
        names = owners(parameters)
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
class TorchFunction(TorchBase):
    """The base Function of this bank: a torch callable for one set of argument types.

    `batching` says how a model that batches natively does so; it is None for all others. `run`,
    `runner`, `give` and `on_stream` are what bridge.function.Function asks of a base."""

    call: Call
    inputs: tuple[Spec, ...]
    outputs: tuple[Spec, ...]
    engine: TorchEngine
    batching: Axes | Graphs | None
    out_tree: Any = field(compare=False)
    names: tuple[tuple[str, ...], tuple[str, ...]] = field(compare=False)

    @property
    def native(self) -> bool:
        """True where the model takes batches itself."""
        return self.batching is not None

    def __str__(self) -> str:
        return self.call.name

    tensor_type = torch.Tensor
    run = staticmethod(running.run)
    runner = staticmethod(running.runner)
    give = staticmethod(buffers.given)
    on_stream = staticmethod(buffers.on_stream)
    compiled = staticmethod(compiling.compiled)

    def input_name(self, i: int) -> str:
        """Returns the name of input `i` in the user's call, for error texts."""
        return self.names[0][i]

    def __call__(self, *tensors: torch.Tensor) -> Sequence[torch.Tensor]:
        return self.checked(tensors, self.outputs, self._expected)

    @property
    def evaluator(self) -> Callable:
        """`__call__` for many calls, with what it needs looked up once."""
        if not self._direct:
            return self.__call__
        target = self.call.target
        tensor, strided = torch.Tensor, torch.strided
        shape, dtype = self._expected[0]

        def evaluate(*tensors: torch.Tensor) -> Sequence[torch.Tensor]:
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
        """True for positional tensors in and one tensor out: a call needs no pytree work."""
        flatten, n = self.call.flatten, len(self.inputs)
        return (
            not self.call.static
            and self.call.tree == flatten(((0,) * n, {}))[1]
            and self.out_tree == flatten(0)[1]
        )

    @cached_property
    def _expected(self) -> Kinds:
        return buffers.kinds(self.outputs)

    def _leaves(self, tensors: Sequence[torch.Tensor]) -> tuple[Sequence, Any]:
        """What the user's code gives, as leaves and their tree."""
        if not self._direct:
            return self.call(tensors)
        out = self.call.target(*tensors)
        return ((out,), self.out_tree) if isinstance(out, torch.Tensor) else self.call.flatten(out)

    def checked(
        self, tensors: Sequence[torch.Tensor], specs: Sequence[Spec], expected: Kinds
    ) -> Sequence[torch.Tensor]:
        """Calls the user's code and returns its outputs, which must be what `specs` say.

        `specs` are what was inferred or declared, and `expected` are their kinds.

        Raises: TypeError for an output that is no dense tensor, or for another pytree; ValueError
        for an output of another shape or dtype."""
        return self._fitting(self._leaves(tensors), specs, expected)

    def _fitting(
        self, found: tuple[Sequence, Any], specs: Sequence[Spec], expected: Kinds
    ) -> Sequence[torch.Tensor]:
        """The leaves of what was found, if they are what was expected."""
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

    def _refuse(self, leaves: Sequence, specs: Sequence[Spec]) -> None:
        """Raises an error that says which output is not what JAX was told."""
        for leaf, want, name in zip(leaves, specs, self.names[1]):
            check_output(leaf, f"output {name} of {self}")
            if (got := buffers.spec_of(leaf)) != want:
                raise ValueError(
                    message(f"output {name} of {self} as {want}", str(got), _SHAPES_ONCE)
                )

    def must_map(self, mapped: tuple[bool, ...]) -> tuple[bool, ...]:
        """Returns which inputs have to carry the batch axis, given which do.

        Raises: NotImplementedError for an input that a model which batches natively has no axis
        for."""
        return mapped if self.batching is None else self.batching.needed(mapped, self)

    def vmap(self, mapped: tuple[bool, ...], size: int) -> Function:
        """Returns the call over a leading axis: one call of the model if it batches natively."""
        if self.batching is None:
            return super().vmap(mapped, size)
        return NativeBatch(self, mapped, (size,), self.batching)


_SHAPES_ONCE = "shapes and dtypes are fixed when JAX traces: return the same kind for the same input shapes, or declare outputs="
