"""Draws walk.svg, the figure of docs/how-it-works.md: python docs/figures/walk.py."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

JAX, TORCH = "#dbe7f6", "#fbe3d4"
INK = "#222222"

# Lower left corner, width and height of each box, in units of the figure's own.
BOXES = {
    "program": (
        0.2,
        6.3,
        4.4,
        1.2,
        JAX,
        "jit(value_and_grad(energy))(r)\na JAX program, traced once",
    ),
    "rule": (0.2, 4.3, 4.4, 1.2, JAX, "one primitive, bridge_call\nwhose rules bind Functions"),
    "call": (0.2, 2.3, 4.4, 1.2, JAX, "one custom call of XLA\nlane: ffi (or host: pure_callback)"),
    "result": (0.2, 0.3, 4.4, 1.2, JAX, "the rest of the XLA program\ne ( ), g (N,3)"),
    "tensor": (8.4, 4.3, 4.4, 1.2, TORCH, "r as a tensor (N,3)\nover XLA's own memory"),
    "model": (8.4, 2.3, 4.4, 1.2, TORCH, "energy = f(r): one forward\ng = dE/dr: one backward"),
    "written": (8.4, 0.3, 4.4, 1.2, TORCH, "e and g written into\nXLA's output buffers"),
}

# From, to (places in the same units), and the words beside the arrow with their place.
ARROWS = (
    ((2.4, 6.3), (2.4, 5.5), "trace", (2.55, 5.9)),
    ((2.4, 4.3), (2.4, 3.5), "lower", (2.55, 3.9)),
    ((4.6, 3.1), (8.4, 4.7), "address of r\nno copy", (5.0, 4.35)),
    ((10.6, 4.3), (10.6, 3.5), "call", (10.75, 3.9)),
    ((10.6, 2.3), (10.6, 1.5), "one write each", (10.75, 1.9)),
    ((8.4, 0.9), (4.6, 0.9), "addresses of e and g\nno copy", (5.0, 1.3)),
)


def main() -> None:
    """Writes the figure beside this file."""
    figure, axes = plt.subplots(figsize=(9.2, 5.6))
    axes.set(xlim=(0, 13), ylim=(0, 8.3))
    axes.axis("off")
    axes.axvline(6.5, ymax=0.95, color="#999999", linestyle=":")
    axes.text(2.4, 7.85, "JAX", ha="center", fontsize=13, weight="bold", color=INK)
    axes.text(10.6, 7.85, "torch", ha="center", fontsize=13, weight="bold", color=INK)
    for x, y, width, height, colour, words in BOXES.values():
        _box(axes, x, y, width, height, colour, words)
    for start, end, words, place in ARROWS:
        arrow = dict(arrowstyle="-|>", color=INK, linewidth=1.2)
        axes.annotate("", xy=end, xytext=start, arrowprops=arrow)
        axes.text(*place, words, fontsize=9, va="center", color=INK)
    note = "trace and lowering: once a program\ncall and writes: once a step"
    axes.text(10.6, 6.9, note, ha="center", va="center", fontsize=9, style="italic", color=INK)
    figure.savefig(Path(__file__).with_suffix(".svg"), bbox_inches="tight", metadata={"Date": None})


def _box(axes: Axes, x: float, y: float, width: float, height: float, colour: str, words: str):
    style = "round,pad=0,rounding_size=0.15"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, fc=colour, ec=INK, lw=0.8))
    middle = (x + width / 2, y + height / 2)
    axes.text(*middle, words, ha="center", va="center", fontsize=9.5, color=INK)


if __name__ == "__main__":
    main()
