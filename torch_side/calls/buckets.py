"""Padding of sizes that change at every step, atoms and edges, so that a few compiled programs
serve all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from bridge.errors import message, spec
from bridge.function import Function, Spec
from torch_side.calls import wrap
from torch_side.calls.calling import TorchCallable


@dataclass(frozen=True)
class Buckets:
    """Which axes of a call are padded, to which sizes, and with what.

    shapes   {input: "2 E"}: one word for each axis of an input, named by its parameter, or by its
             key where the argument is a dict. A name is an axis that is padded; a number or _ is an
             axis that is left alone
    fill     {input: value} for the padding: a number (default 0), or the name of an axis, which
             stands for its padded size: {"edge_index": "N"} makes the padding point past the last
             atom, which JAX's gathers clamp and its scatters drop. Values of integer inputs are
             cast to their dtype
    mask     {axis: keyword}: the function is also passed a bool tensor of the padded size, True
             where there is data
    start, growth   the ladder of sizes: start, then each growth times the one before, rounded up;
                    beyond start the padded
             length is at most growth times that of the data, and one

    Padding hides in the results: an axis of the padded size is cut to that of the data. Which axes
    these are is found out from shapes alone, once for each rung. What is summed over the padding is
    the function's affair: give its entries a value that adds nothing (fill), or look at the mask.

    >>> Buckets({"x": "N 3"}).rung(1000), Buckets({"x": "N 3"}, growth=1.5).rung(17)
    (1024, 24)
    """

    shapes: dict[str, str]
    fill: dict[str, float | str] = field(default_factory=dict)
    mask: dict[str, str] = field(default_factory=dict)
    start: int = 16
    growth: float = 2.0

    def __post_init__(self):
        if self.start < 1 or self.growth <= 1:
            raise ValueError(
                message(
                    "start >= 1 and growth > 1",
                    f"start={self.start}, growth={self.growth}",
                    "take a ladder that climbs",
                )
            )
        known = self.axes
        for what, names in (
            ("fill", set(self.fill) - set(self.shapes)),
            ("mask", set(self.mask) - known),
        ):
            if names:
                raise ValueError(
                    message(
                        f"{what} for {', '.join(sorted(self.shapes if what == 'fill' else known))}",
                        ", ".join(sorted(names)),
                        "name what is in shapes",
                    )
                )
        if unknown := sorted({v for v in self.fill.values() if isinstance(v, str)} - known):
            raise ValueError(
                message(
                    f"fill as a number or one of the axes {', '.join(sorted(known))}",
                    ", ".join(unknown),
                    "name an axis that is in shapes",
                )
            )

    @property
    def axes(self) -> set[str]:
        """The names of the padded axes."""
        return {
            word
            for words in self.shapes.values()
            for word in words.split()
            if word.isidentifier() and word != "_"
        }

    def rung(self, size: int) -> int:
        """The smallest size of the ladder that holds `size`."""
        rung = self.start
        while rung < size:
            rung = max(rung + 1, math.ceil(rung * self.growth))
        return rung


class Padded(TorchCallable):
    """A callable of the other bank on padded inputs, its results cut to the sizes of the data."""

    def __init__(self, exporter, buckets: Buckets):
        super().__init__(exporter)
        self._buckets = buckets
        self._axes: dict = {}  # by structure: {position of a leaf: (its name, its words)}

    def __eq__(self, other):
        return super().__eq__(other) and self._buckets == other._buckets

    __hash__ = TorchCallable.__hash__

    def __reduce__(self):
        return type(self), (self._exporter, self._buckets)

    def function(self, args, kwargs):
        raise NotImplementedError(
            message(
                "a call outside of torch.compile",
                "buckets= under torch.compile",
                "pad the inputs yourself, or compile what is around the call",
            )
        )

    def __call__(self, *args, **kwargs):
        b = self._buckets
        leaves, structure = self.flatten((args, kwargs))
        axes = self._named(structure)
        sizes = _sizes(leaves, axes)
        rungs = {name: b.rung(n) for name, n in sizes.items()}
        for i, (name, words) in axes.items():
            leaves[i] = _pad(leaves[i], words, rungs, b.fill.get(name, 0))
        args, kwargs = structure.unflatten(leaves)
        device = next(x.device for x in leaves if isinstance(x, torch.Tensor))
        masks = {
            key: torch.arange(rungs[name], device=device) < sizes[name]
            for name, key in b.mask.items()
        }
        fn, tensors = super().function(args, kwargs | masks)
        cuts = fn.memo.get("cuts") or fn.memo.setdefault("cuts", self._cuts(fn))
        outs = []
        for y, cut in zip(wrap.call(fn, tensors), cuts, strict=True):
            for axis, name in cut:
                y = y.narrow(axis, 0, sizes[name])
            outs.append(y)
        return fn.out_tree.unflatten(outs)

    def _named(self, structure) -> dict:
        """Which leaves of a call are padded."""
        if structure not in self._axes:
            names, shapes = self._exporter.leaf_names(structure), self._buckets.shapes
            if missing := sorted(set(shapes) - set(names)):
                raise ValueError(
                    message(
                        f"inputs named {', '.join(shapes)}, as buckets= says",
                        f"none named {', '.join(missing)}",
                        f"name some of {', '.join(sorted(set(names)))}",
                    )
                )
            self._axes[structure] = {
                i: (name, shapes[name].split()) for i, name in enumerate(names) if name in shapes
            }
        return self._axes[structure]

    def _cuts(self, fn: Function) -> list[list[tuple[int, str]]]:
        """For each output, the axes that follow a name, with that name: they are one longer where
        it is."""
        b, call = self._buckets, fn.call
        words = {name: text.split() for name, text in b.shapes.items()} | {
            key: [axis] for axis, key in b.mask.items()
        }
        fixed = {i for i, *_ in call.static}
        names = [n for i, n in enumerate(self._exporter.leaf_names(call.tree)) if i not in fixed]
        cuts = [[] for _ in fn.outputs]
        for axis in sorted(b.axes):
            longer = tuple(
                _longer(s, words.get(n, ()), axis) for s, n in zip(fn.inputs, names, strict=True)
            )
            others = self._exporter.function(call.tree, call.static, longer).outputs
            for k, (s, other) in enumerate(zip(fn.outputs, others, strict=True)):
                for a, (n, m) in enumerate(zip(s.shape, other.shape, strict=True)):
                    if m == n + 1:
                        cuts[k].append((a, axis))
                    elif m != n:
                        raise ValueError(
                            message(
                                f"outputs of {fn} whose sizes are {axis} or don't depend on it",
                                f"{s} and {other} for one more",
                                "leave that axis out of buckets=",
                            )
                        )
        return cuts


def _longer(s: Spec, words, axis: str) -> Spec:
    return Spec(
        tuple(n + (w == axis) for n, w in zip(s.shape, words)) if words else s.shape, s.dtype
    )


def _sizes(leaves, axes) -> dict[str, int]:
    """The size of each named axis, the same in all inputs."""
    sizes: dict[str, int] = {}
    for i, (name, words) in axes.items():
        x = leaves[i]
        if not isinstance(x, torch.Tensor) or x.ndim != len(words):
            got = spec(x.shape, x.dtype) if isinstance(x, torch.Tensor) else type(x).__name__
            raise ValueError(
                message(
                    f"{name} as a tensor with axes {' '.join(words)!r}",
                    got,
                    "correct buckets=, or the call",
                )
            )
        for word, n in zip(words, x.shape):
            if word.isidentifier() and word != "_" and sizes.setdefault(word, n) != n:
                raise ValueError(
                    message(
                        f"axis {word} of {sizes[word]} in every input",
                        f"{n} in {name}",
                        "give inputs that agree",
                    )
                )
    return sizes


def _pad(x: torch.Tensor, words, rungs, fill) -> torch.Tensor:
    """x up to the rungs of its axes; differentiable."""
    widths = []
    for n, word in reversed([*zip(x.shape, words)]):
        widths += [0, rungs.get(word, n) - n]
    return (
        torch.nn.functional.pad(x, widths, value=rungs[fill] if isinstance(fill, str) else fill)
        if any(widths)
        else x
    )
