"""How a model takes several calls as one: along an axis that its user named, or as one batched
graph of the contract."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from bridge.call import Call
from bridge.contract import INPUTS, OUTPUTS
from bridge.errors import message
from bridge.function import Batch, Derived, Function, Gradient, Spec
from torch_side.calls import buffers, inference, status

Kinds = tuple[tuple[torch.Size, torch.dtype], ...]  # shapes and dtypes, as buffers.kinds gives them


class TorchBase(Function):
    """What this bank knows of its own base Functions, which are export.TorchFunction.

    `call` says how the arrays become a call, and `out_tree` is the pytree of its results. `names`
    are those of the inputs and of the outputs. `batching` is how the model takes several calls as
    one, or None where it does not."""

    engine: inference.TorchEngine
    call: Call
    batching: Axes | Graphs | None
    out_tree: Any
    names: tuple[tuple[str, ...], tuple[str, ...]]

    def checked(
        self, tensors: Sequence[torch.Tensor], specs: Sequence[Spec], expected: Kinds
    ) -> Sequence[torch.Tensor]:
        """Calls the user's code and returns its outputs, which must be what `specs` say.

        `expected` are the kinds of `specs`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Axes:
    """A model that takes a batch along an axis of its inputs.

    inputs   the axis of each input, None for one that is not batched
    output   the axis of every output
    """

    inputs: tuple[int | None, ...]
    output: int

    def needed(self, mapped: Sequence[bool], fn: TorchBase) -> tuple[bool, ...]:
        """Returns which inputs have to carry the batch axis, where those of `mapped` do.

        Raises: NotImplementedError for a mapped input without an axis."""
        for m, axis, name in zip(mapped, self.inputs, fn.names[0], strict=True):
            if m and axis is None:
                raise NotImplementedError(
                    message(
                        f"vmap over the inputs named in batched= of {fn} only",
                        f"input {name}",
                        "name its axis in batched={...}",
                    )
                )
        return tuple(axis is not None for axis in self.inputs)

    def merge(
        self, tensors: Sequence[torch.Tensor], mapped: Sequence[bool], size: int
    ) -> list[torch.Tensor]:
        """Returns the inputs of the one call, from those of `size` calls stacked in front."""
        return [
            t.movedim(0, a) if m and a is not None else t
            for t, m, a in zip(tensors, mapped, self.inputs, strict=True)
        ]

    def specs(self, specs: Sequence[Spec], size: int) -> tuple[Spec, ...]:
        """Returns the outputs of the one call, where `specs` are those of each of `size` calls."""
        return tuple(_at(s, size, self.output) for s in specs)

    def split(self, outs: Sequence[torch.Tensor], specs: Sequence[Spec]) -> list[torch.Tensor]:
        """Returns the outputs of the one call as those of all calls, stacked in front."""
        return [t.movedim(self.output, 0) for t in outs]


@dataclass(frozen=True)
class Graphs:
    """A model of the contract that takes the structures of several calls as systems of one call.

    Such a model takes one dict of the contract and gives one. `inputs` and `outputs` are the keys
    of these, in the order of the arrays. Calls with B systems each become one call with all
    systems."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @classmethod
    def of(cls, fn: TorchBase) -> Graphs:
        """Returns the Graphs of a Function, by the keys that it is called with and gives.

        Raises: TypeError for a Function whose argument or result is not one dict of the
        contract."""
        args, kwargs = (), {}
        if not fn.call.static:
            args, kwargs = fn.call.tree.unflatten(range(len(fn.inputs)))
        given = args[0] if len(args) == 1 and not kwargs else None
        found = fn.out_tree.unflatten(range(len(fn.outputs)))
        inputs = cls._keys(given, "argument", INPUTS, fn)
        outputs = cls._keys(found, "result", OUTPUTS, fn)
        return cls(inputs, outputs)

    @staticmethod
    def _keys(places: Any, what: str, table: dict, fn: TorchBase) -> tuple[str, ...]:
        """The keys of a dict {key: position of its array}, in the order of the positions."""
        if (
            not isinstance(places, dict)
            or not all(isinstance(i, int) for i in places.values())
            or set(places) - set(table)
        ):
            got = ", ".join(map(str, places)) if isinstance(places, dict) else f"{places!r:.60}"
            raise TypeError(
                message(
                    f'one dict of the contract as {what} of {fn}, for batched="graph"',
                    got,
                    'use these keys, or batched="sequential"',
                )
            )
        return tuple(sorted(places, key=places.__getitem__))

    def needed(self, mapped: Sequence[bool], fn: TorchBase) -> tuple[bool, ...]:
        """Returns True for every input: each of them has to carry the batch axis."""
        return (True,) * len(mapped)

    def merge(
        self, tensors: Sequence[torch.Tensor], mapped: Sequence[bool], size: int
    ) -> list[torch.Tensor]:
        """Returns the inputs of the one call, from those of `size` calls stacked in front.

        `batch` and `edge_index` are counted anew. An edge that points to an atom of index >= N in
        its own call points past the last atom of all.

        Raises: ValueError for a system in `batch` that its call does not have."""
        given = dict(zip(self.inputs, tensors, strict=True))
        n_atoms = given["pos"].shape[1]
        n_systems = given["cell"].shape[1]
        return [self._merged(key, x, size, n_atoms, n_systems) for key, x in given.items()]

    def _merged(
        self, key: str, x: torch.Tensor, size: int, n_atoms: int, n_systems: int
    ) -> torch.Tensor:
        """An input of `size` calls, stacked in front -> the same input of one call for all."""
        copies = torch.arange(size, device=x.device)
        if key == "batch":
            strange = (x < 0) | (x >= n_systems)
            expected = f"batch within 0..{n_systems - 1}"
            do = "give the index of its system for each atom"
            if collected := status.current():
                text = message(expected, "{} in call {}", do)
                collected.note(strange, text, x, copies[:, None].expand_as(x))
                x = x.clamp(0, n_systems - 1)
            elif strange.any():
                got = f"{int(x[strange][0])} in call {int(strange.nonzero()[0, 0])}"
                raise ValueError(message(expected, got, do))
            return (x + copies.to(x.dtype)[:, None] * n_systems).flatten()
        if key == "edge_index":
            x = x.long()
            first = copies[:, None, None] * n_atoms  # the first atom of each call among all
            shifted = torch.where(x < n_atoms, x + first * (x >= 0), size * n_atoms)
            return shifted.movedim(0, 1).flatten(1)
        return x.flatten(0, 1)

    def specs(self, specs: Sequence[Spec], size: int) -> tuple[Spec, ...]:
        """Returns the outputs of the one call, where `specs` are those of each of `size` calls."""
        return tuple(
            Spec(_of_all(s.shape, OUTPUTS[key][0], size), s.dtype)
            for key, s in zip(self.outputs, specs, strict=True)
        )

    def split(self, outs: Sequence[torch.Tensor], specs: Sequence[Spec]) -> list[torch.Tensor]:
        """Returns the outputs of the one call as those of all calls, stacked in front."""
        return [
            _split(x, OUTPUTS[key][0], s.shape)
            for key, x, s in zip(self.outputs, outs, specs, strict=True)
        ]


def _of_all(shape: Sequence[int], dims: Sequence[str | int], size: int) -> tuple[int, ...]:
    """The shape of an output of one call -> that of `size` calls as one, longer along N and B."""
    return tuple(n * size if d in ("N", "B") else n for n, d in zip(shape, dims))


def _split(x: torch.Tensor, dims: Sequence[str | int], shape: Sequence[int]) -> torch.Tensor:
    """An output of one call for all -> the same output of each call, stacked in front.

    The axes N and B of `x` are those of all calls, one after another; `shape` is that of one call.
    Of an output with two such axes, blocks between two calls are dropped."""
    axes = [a for a, d in enumerate(dims) if d in ("N", "B")]
    size = x.shape[axes[0]] // max(shape[axes[0]], 1)
    for shift, axis in enumerate(axes):
        x = x.unflatten(axis + shift, (size, shape[axis]))
    x = x.movedim(axes[0], 0)
    return x if len(axes) == 1 else x.diagonal(dim1=0, dim2=axes[1] + 1).movedim(-1, 0)


@dataclass(frozen=True)
class NativeBatch(Derived):
    """A call over one or several leading axes of a model that takes a batch itself.

    Several vmapped axes reach the model as one. `mapped` says which inputs carry the axes, `sizes`
    are their sizes, and `batching` is that of the model."""

    of: TorchBase
    mapped: tuple[bool, ...]
    sizes: tuple[int, ...]
    batching: Axes | Graphs

    @property
    def inputs(self) -> tuple[Spec, ...]:
        """The inputs, those of `mapped` with the leading axes."""
        lead = self.sizes
        return tuple(
            Spec((*lead, *s.shape), s.dtype) if m else s
            for s, m in zip(self.of.inputs, self.mapped, strict=True)
        )

    @property
    def outputs(self) -> tuple[Spec, ...]:
        """The outputs, all of them with the leading axes."""
        return tuple(Spec((*self.sizes, *s.shape), s.dtype) for s in self.of.outputs)

    @property
    def batches(self) -> tuple[Batch, ...]:
        """The examples along each of the leading axes."""
        outputs = (True,) * len(self.of.outputs)
        return tuple(Batch(size, self.mapped, outputs) for size in self.sizes)

    def resized(self, sizes: Sequence[int]) -> NativeBatch:
        """Returns the same call for other numbers of examples along these axes."""
        return replace(self, sizes=tuple(sizes))

    def __call__(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        batching = self.batching
        n = len(self.sizes)
        size = torch.Size(self.sizes).numel()
        flat = [t.flatten(0, n - 1) if m else t for t, m in zip(tensors, self.mapped, strict=True)]
        specs = batching.specs(self.of.outputs, size)
        outs = self.of.checked(batching.merge(flat, self.mapped, size), specs, buffers.kinds(specs))
        return tuple(t.unflatten(0, self.sizes) for t in batching.split(outs, self.of.outputs))

    def must_map(self, mapped: tuple[bool, ...]) -> tuple[bool, ...]:
        """Returns which inputs have to carry another batch axis: those that the model says."""
        return self.of.must_map(mapped)

    def vmap(self, mapped: tuple[bool, ...], size: int) -> NativeBatch:
        """Returns the call over one more leading axis."""
        return NativeBatch(self.of, mapped, (size, *self.sizes), self.batching)

    def gradient(self, wrt: tuple[int, ...]) -> Gradient | None:
        """Returns a Function of the outputs and gradients by one backward of the sum, or None.

        That is right since row b of a native batch depends on example b alone, by the user's word.
        The gradient in an input that examples share would be the sum of theirs: None."""
        if not all(self.mapped[i] for i in wrt):
            return None
        single = self.of.gradient(wrt)
        return Gradient(self, wrt, single.out) if isinstance(single, Gradient) else None


def _at(s: Spec, size: int, axis: int) -> Spec:
    """`s` with an axis of `size` at the place `axis`."""
    shape = list(s.shape)
    shape.insert(axis if axis >= 0 else len(shape) + 1 + axis, size)
    return Spec(tuple(shape), s.dtype)
