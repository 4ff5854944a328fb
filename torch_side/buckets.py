"""Padding of sizes that change at every step, atoms and edges, so that a few compiled programs serve all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from bridge.errors import message, spec


@dataclass(frozen=True)
class Buckets:
    """Which axes of a call are padded, to which sizes, and with what.

    shapes   {input: "2 E"}: one word for each axis of an input, named by its parameter, or by its key where the argument is a
             dict. A name is an axis that is padded; a number or _ is an axis that is left alone
    fill     {input: value} for the padding: a number (default 0), or the name of an axis, which stands for its padded
             size: {"edge_index": "N"} makes the padding point past the last atom, which JAX's gathers clamp and its scatters
             drop. Values of integer inputs are cast to their dtype
    mask     {axis: keyword}: the function is also passed a bool tensor of the padded size, True where there is data
    start, growth   the ladder of sizes: start, start * growth, start * growth^2 ..., each rounded up; what is padded is at most growth
             times as long as the data

    Padding hides in the results: an axis of the padded size is cut to that of the data. Which axes these are is found out
    from shapes alone, once for each rung. What is summed over the padding is the function's affair: give its entries a value
    that adds nothing (fill), or look at the mask.

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
            raise ValueError(message("start >= 1 and growth > 1", f"start={self.start}, growth={self.growth}", "take a ladder that climbs"))
        known = self.axes
        for what, names in (("fill", set(self.fill) - set(self.shapes)), ("mask", set(self.mask) - known)):
            if names:
                raise ValueError(message(f"{what} for {', '.join(sorted(self.shapes if what == 'fill' else known))}", ", ".join(sorted(names)), "name what is in shapes"))
        if unknown := sorted({v for v in self.fill.values() if isinstance(v, str)} - known):
            raise ValueError(message(f"fill as a number or one of the axes {', '.join(sorted(known))}", ", ".join(unknown), "name an axis that is in shapes"))

    @property
    def axes(self) -> set[str]:
        """The names of the padded axes."""
        return {word for words in self.shapes.values() for word in words.split() if word.isidentifier() and word != "_"}

    def rung(self, size: int) -> int:
        """The smallest size of the ladder that holds `size`."""
        if size <= self.start:
            return self.start
        steps = math.ceil(math.log(size / self.start) / math.log(self.growth) - 1e-9)
        return math.ceil(self.start * self.growth**steps)


class Padded:
    """A torch callable of the other bank on padded inputs."""

    def __init__(self, call, buckets: Buckets):
        ...
