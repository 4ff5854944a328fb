"""How a model takes several calls as one: along an axis that its user named, or as one batched
graph of the contract."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bridge.contract import INPUTS, OUTPUTS
from bridge.errors import message
from bridge.function import Derived, Gradient, Spec
from torch_side.calls import buffers


@dataclass(frozen=True)
class Axes:
    """The axis of each input (None: not batched), and that of the outputs."""

    inputs: tuple[int | None, ...]
    output: int

    def needed(self, mapped, fn):
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

    def merge(self, tensors, mapped, size):
        return [
            t.movedim(0, a) if m else t
            for t, m, a in zip(tensors, mapped, self.inputs, strict=True)
        ]

    def specs(self, specs, size):
        return tuple(_at(s, size, self.output) for s in specs)

    def split(self, outs, specs):
        return [t.movedim(self.output, 0) for t in outs]


@dataclass(frozen=True)
class Graphs:
    """Calls with B systems each become one call with all systems, for a model of one dict of the
    contract; `inputs` and `outputs` are the keys in the order of the arrays."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @classmethod
    def of(cls, fn):
        """For a TorchFunction; TypeError where it is called with anything but one dict of the
        contract, and gives one."""
        n = len(fn.inputs)
        args, kwargs = fn.call.tree.unflatten(range(n)) if not fn.call.static else ((), {})
        given, found = (
            args[0] if len(args) == 1 and not kwargs else None,
            fn.out_tree.unflatten(range(len(fn.outputs))),
        )
        for what, keys, table in (("argument", given, INPUTS), ("result", found, OUTPUTS)):
            if (
                not isinstance(keys, dict)
                or not all(isinstance(i, int) for i in keys.values())
                or set(keys) - set(table)
            ):
                got = ", ".join(map(str, keys)) if isinstance(keys, dict) else f"{keys!r:.60}"
                raise TypeError(
                    message(
                        f'one dict of the contract as {what} of {fn}, for batched="graph"',
                        got,
                        'use these keys, or batched="sequential"',
                    )
                )
        return cls(*(tuple(sorted(keys, key=keys.get)) for keys in (given, found)))

    def needed(self, mapped, fn):
        return (True,) * len(mapped)

    def merge(self, tensors, mapped, size):
        given = dict(zip(self.inputs, tensors, strict=True))
        (n_atoms, n_systems) = given["pos"].shape[1], given["cell"].shape[1]
        return [self._merged(key, x, size, n_atoms, n_systems) for key, x in given.items()]

    def _merged(self, key, x, size, n_atoms, n_systems):
        """(size, ...) of one call each -> the array of one call for all."""
        copies = torch.arange(size, device=x.device)
        if key == "batch":
            if (strange := (x < 0) | (x >= n_systems)).any():
                got = f"{int(x[strange][0])} in call {int(strange.nonzero()[0, 0])}"
                raise ValueError(
                    message(
                        f"batch within 0..{n_systems - 1}",
                        got,
                        "give the index of its system for each atom",
                    )
                )
            return (x + copies.to(x.dtype)[:, None] * n_systems).flatten()
        if key == "edge_index":
            x = x.long()
            shifted = torch.where(
                x < n_atoms, x + copies[:, None, None] * n_atoms * (x >= 0), size * n_atoms
            )
            return shifted.movedim(0, 1).flatten(1)
        return x.flatten(0, 1)

    def specs(self, specs, size):
        return tuple(
            Spec(
                tuple(
                    n * size if isinstance(d, str) and d in "NB" else n
                    for n, d in zip(s.shape, OUTPUTS[key][0])
                ),
                s.dtype,
            )
            for key, s in zip(self.outputs, specs, strict=True)
        )

    def split(self, outs, specs):
        return [
            _split(x, OUTPUTS[key][0], s.shape)
            for key, x, s in zip(self.outputs, outs, specs, strict=True)
        ]


def _split(x, dims, shape):
    """The axes N and B of all calls as an axis of calls in front; blocks between two calls are
    dropped. `shape` is that of one."""
    axes = [a for a, d in enumerate(dims) if d in ("N", "B")]
    size = x.shape[axes[0]] // max(shape[axes[0]], 1)
    for shift, axis in enumerate(axes):
        x = x.unflatten(axis + shift, (size, shape[axis]))
    x = x.movedim(axes[0], 0)
    return x if len(axes) == 1 else x.diagonal(dim1=0, dim2=axes[1] + 1).movedim(-1, 0)


@dataclass(frozen=True)
class NativeBatch(Derived):
    """A model that takes a batch itself: several vmapped axes travel as one."""

    mapped: tuple[bool, ...]
    sizes: tuple[int, ...]

    @property
    def inputs(self):
        lead = self.sizes
        return tuple(
            Spec((*lead, *s.shape), s.dtype) if m else s
            for s, m in zip(self.of.inputs, self.mapped, strict=True)
        )

    @property
    def outputs(self):
        return tuple(Spec((*self.sizes, *s.shape), s.dtype) for s in self.of.outputs)

    def __call__(self, *tensors):
        batching, n, size = self.of.batching, len(self.sizes), torch.Size(self.sizes).numel()
        flat = [t.flatten(0, n - 1) if m else t for t, m in zip(tensors, self.mapped, strict=True)]
        specs = batching.specs(self.of.outputs, size)
        outs = self.of.checked(batching.merge(flat, self.mapped, size), specs, buffers.kinds(specs))
        return tuple(t.unflatten(0, self.sizes) for t in batching.split(outs, self.of.outputs))

    def must_map(self, mapped):
        return self.of.must_map(mapped)

    def vmap(self, mapped, size):
        return NativeBatch(self.of, mapped, (size, *self.sizes))

    def gradient(self, wrt):
        """One backward of the sum: row b of a native batch depends on example b alone (the user's
        word)."""
        single = self.of.gradient(wrt)
        return single and Gradient(self, wrt, single.out)


def _at(s: Spec, size: int, axis: int) -> Spec:
    shape = list(s.shape)
    shape.insert(axis if axis >= 0 else len(shape) + 1 + axis, size)
    return Spec(tuple(shape), s.dtype)
