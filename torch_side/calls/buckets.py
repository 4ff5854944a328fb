"""Padding of sizes that change at every step, atoms and edges, so that a few compiled programs
serve all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from bridge.errors import message, spec
from bridge.function import Spec
from torch_side.calls import wrap
from torch_side.calls.calling import Exporter, TorchCallable

if TYPE_CHECKING:
    from torch_side.calls.numbers import ForeignBase

# position of a leaf that is padded: (its name, one word for each of its axes)
Axes = dict[int, tuple[str, list[str]]]


@dataclass(frozen=True)
class Buckets:
    """Which axes of a call are padded, to which sizes, and with what.

    shapes   {input: "2 E"}, one word for each axis of an input. The input is named by its
             parameter, or by its key where the argument is a dict. A name is an axis that is
             padded; a number or _ is an axis that is left alone
    fill     {input: value} for the padding. The value is a number (default 0), or the name of an
             axis, which stands for its padded size: {"edge_index": "N"} makes the padding point
             past the last atom, which JAX's gathers clamp and its scatters drop. Values of integer
             inputs are cast to their dtype
    mask     {axis: keyword}. The function is also passed a bool tensor of the padded size, which is
             True where there is data
    start, growth   the ladder of sizes. It begins with start; each further size is growth times the
             one before, rounded up. Beyond start the padded length is at most growth times that of
             the data, and one

    Results show no padding: an axis of the padded size is cut to that of the data. Which axes these
    are is found out from shapes alone, once for each rung. What is summed over the padding is the
    function's affair: give its entries a value that adds nothing (fill), or look at the mask.

    Raises: ValueError for a ladder that does not climb, and for a name that is not in shapes.

    >>> Buckets({"x": "N 3"}).rung(1000), Buckets({"x": "N 3"}, growth=1.5).rung(17)
    (1024, 24)
    """

    shapes: dict[str, str]
    fill: dict[str, float | str] = field(default_factory=dict)
    mask: dict[str, str] = field(default_factory=dict)
    start: int = 16
    growth: float = 2.0

    def __post_init__(self) -> None:
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
        """Returns the smallest size of the ladder that holds `size`."""
        rung = self.start
        while rung < size:
            rung = max(rung + 1, math.ceil(rung * self.growth))
        return rung


class Padded(TorchCallable):
    """A callable of the other bank on padded inputs, its results cut to the sizes of the data."""

    def __init__(self, exporter: Exporter, buckets: Buckets) -> None:
        super().__init__(exporter)
        self._buckets = buckets
        self._axes: dict[Any, Axes] = {}  # by the structure of a call

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Padded) and super().__eq__(other) and self._buckets == other._buckets
        )

    __hash__ = TorchCallable.__hash__

    def __reduce__(self) -> tuple:
        return type(self), (self._exporter, self._buckets)

    def function(
        self, args: Sequence, kwargs: Mapping[str, Any]
    ) -> tuple[ForeignBase, list[torch.Tensor]]:
        """Raises NotImplementedError: torch.compile, which asks for this, can't trace padding."""
        raise NotImplementedError(
            message(
                "a call outside of torch.compile",
                "buckets= under torch.compile",
                "pad the inputs yourself, or compile what is around the call",
            )
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the results of the call, cut to the sizes of the data.

        Raises: ValueError for inputs that `shapes` does not fit; else as TorchCallable does."""
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

    def _named(self, structure: Any) -> Axes:
        """Which leaves of a call are padded. Raises ValueError for a name that no leaf has."""
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

    def _cuts(self, fn: ForeignBase) -> list[list[tuple[int, str]]]:
        """(axis, name) for each axis of each output whose size is that of a named axis.

        Such an axis is one longer where the named one is."""
        b, call = self._buckets, fn.call
        words = {name: text.split() for name, text in b.shapes.items()} | {
            key: [axis] for axis, key in b.mask.items()
        }
        fixed = {i for i, *_ in call.static}
        names = [n for i, n in enumerate(self._exporter.leaf_names(call.tree)) if i not in fixed]
        cuts: list[list[tuple[int, str]]] = [[] for _ in fn.outputs]
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


def _longer(s: Spec, words: Sequence[str], axis: str) -> Spec:
    """`s` with one entry more along the axis of that name."""
    if not words:
        return s
    return Spec(tuple(n + (w == axis) for n, w in zip(s.shape, words)), s.dtype)


def _sizes(leaves: Sequence[Any], axes: Axes) -> dict[str, int]:
    """The size of each named axis. Raises ValueError where inputs don't agree on it."""
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


def _pad(
    x: torch.Tensor, words: Sequence[str], rungs: Mapping[str, int], fill: float | str
) -> torch.Tensor:
    """x, padded up to the rungs of its axes; differentiable."""
    widths: list[int] = []
    for n, word in reversed([*zip(x.shape, words)]):
        widths += [0, rungs.get(word, n) - n]
    if not any(widths):
        return x
    value = rungs[fill] if isinstance(fill, str) else fill
    return torch.nn.functional.pad(x, widths, value=value)
