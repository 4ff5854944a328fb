"""Is an energy continuous, with continuous forces, where a neighbour comes and goes? A probe atom
moves through all distances. NumPy only."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

Arrays = dict[str, np.ndarray]  # with the keys of bridge.contract
UNKNOWN_REACH = 8.0  # Angstrom, where a model does not tell its cutoff
NEAREST = 1.2  # Angstrom, where the probe starts
INTERVALS = 24
ROUGHEST = 6  # intervals that are searched for kinks


@dataclass(frozen=True)
class Resolution:
    """What is a jump and what is rounding.

    width             an interval (Angstrom) so narrow that what still changes in it has jumped
    energy, gradient  what is rounding, relative
    kink              the interval (Angstrom) at which second derivatives are compared, None where
                      rounding hides them
    """

    width: float
    energy: float
    gradient: float
    kink: float | None


RESOLUTIONS = {
    "float64": Resolution(1e-4, 1e-7, 1e-5, 1e-3),
    "float32": Resolution(2e-3, 2e-5, 5e-3, None),
}


@dataclass(frozen=True)
class Point:
    """The probe at distance t from its atom: the energy, its slope along the path, and the
    gradients of all atoms."""

    t: float
    energy: float
    slope: float
    gradients: Float[np.ndarray, "N 3"]


Misfit = Callable[[Point, Point, Point], float]  # of the ends and the middle of an interval


@dataclass(frozen=True)
class Path:
    """A probe, the last atom, that moves away from the outermost atom of a cluster along
    `direction`."""

    model: Callable[[Arrays], Arrays]
    structure: Arrays
    atom: int
    direction: Float[np.ndarray, " 3"]

    def __call__(self, t: float) -> Point:
        """Returns what the model gives with the probe at distance t (Angstrom)."""
        pos = self.structure["pos"].copy()
        pos[-1] = pos[self.atom] + t * self.direction
        out = self.model(self.structure | {"pos": pos})
        g = np.asarray(out["position_gradients"], float)
        return Point(t, float(out["energy"][0]), float(g[-1] @ self.direction), g)


def path_of(
    model: Callable[[Arrays], Arrays], s: Arrays, rng: np.random.Generator, reach: float
) -> Path:
    """Returns the first system of a structure as a cluster with a probe of one of its elements.

    A periodic system gets a wide cell, in which images are beyond the `reach` of the model.
    """
    own = s["batch"] == 0
    pos, numbers = s["pos"][own], s["atomic_numbers"][own]
    direction = rng.normal(size=3)
    direction /= np.linalg.norm(direction)
    length = np.ptp(pos, 0).max() + 4 * reach
    periodic = bool(s["pbc"][0].any())
    structure = {
        "pos": np.concatenate([pos, pos[:1]]),
        "atomic_numbers": np.append(numbers, rng.choice(numbers)),
        "cell": periodic * length * np.eye(3)[None],
        "pbc": np.full((1, 3), periodic),
        "batch": np.zeros(len(pos) + 1, s["batch"].dtype),
    }
    return Path(model, structure, int(np.argmax(pos @ direction)), direction)


def search(path: Path, reach: float, resolution: Resolution) -> tuple[str, str]:
    """Returns the texts of (a jump in energy or gradients, a kink in the gradients) on the way of
    the probe. A text is "" if there is none."""
    points = [path(float(t)) for t in np.linspace(NEAREST, 1.15 * reach, INTERVALS + 1)]
    scale = _scales(points)
    if jump := _jump(path, points, scale, resolution):
        return jump, ""
    kink = None if resolution.kink is None else _strongest_kink(path, points, resolution.kink)
    if kink is None or not kink[0] > 0.05 * scale.curvature:
        return "", ""
    strength, at = kink
    jumps = f"second derivatives jump by {strength:.3g} eV/Angstrom^2"
    return "", f"{jumps} where a probe is {at:.5g} Angstrom from atom {path.atom}"


def _jump(path: Path, points: Sequence[Point], scale: _Scale, resolution: Resolution) -> str:
    """The text of the nearest jump in energy or gradients; "" if there is none."""
    energies = "energy: expected none that jumps, got {:.6g} eV"
    gradients = "position_gradients: expected none that jump, got {:.6g} eV/Angstrom"
    kinds: tuple[tuple[Misfit, float, str], ...] = (
        (_energy_misfit, resolution.energy * scale.energy, energies),
        (_gradient_misfit, resolution.gradient * scale.gradient, gradients),
    )
    for left, right in itertools.pairwise(points):
        for misfit, allowed, text in kinds:
            at, size = _narrowed(path, left, right, misfit, allowed, resolution.width)
            if at is not None:
                where = f"where the probe is {at:.5g} Angstrom from atom {path.atom}"
                return f"{text.format(size)} {where}; allowed {allowed:.3g}"
    return ""


def _strongest_kink(path: Path, points: Sequence[Point], width: float) -> tuple[float, float]:
    """(jump of the second derivatives, where), from the intervals that look roughest."""
    bends = [
        abs(a.gradients - 2 * b.gradients + c.gradients).max()
        for a, b, c in zip(points, points[1:], points[2:])
    ]
    rough = sorted(range(len(bends)), key=bends.__getitem__)[-ROUGHEST // 2 :]
    intervals = {at + side for at in rough for side in (0, 1)}
    return max(_kink(path, points[i], points[i + 1], width) for i in intervals)


@dataclass(frozen=True)
class _Scale:
    """The sizes of what a path has, beside which an error is large or small."""

    energy: float
    gradient: float
    curvature: float


def _scales(points: Sequence[Point]) -> _Scale:
    steps = [
        abs(b.gradients - a.gradients).max() / (b.t - a.t) for a, b in itertools.pairwise(points)
    ]
    return _Scale(
        1 + max(abs(p.energy) for p in points),
        1 + max(abs(p.gradients).max() for p in points),
        max(steps),
    )


def _energy_misfit(a: Point, middle: Point, b: Point) -> float:
    """What Simpson's rule for the slopes leaves of the change of the energy. It is of fifth order
    in the width, or a jump."""
    rule = (a.slope + 4 * middle.slope + b.slope) / 6
    return abs(b.energy - a.energy - (b.t - a.t) * rule)


def _gradient_misfit(a: Point, middle: Point, b: Point) -> float:
    """How far the gradients are from a straight line. It is of second order in the width, of first
    order at a kink, or half of a jump."""
    return abs(middle.gradients - (a.gradients + b.gradients) / 2).max()


def _narrowed(
    path: Path, a: Point, b: Point, misfit: Misfit, allowed: float, width: float
) -> tuple[float | None, float]:
    """(where, how large) a misfit is that stays as the interval narrows; (None, 0) if it goes
    away."""
    while True:
        middle = path((a.t + b.t) / 2)
        off = misfit(a, middle, b)
        if off <= allowed:
            return None, 0.0
        if b.t - a.t < width:
            return middle.t, off
        halves = [(a, middle), (middle, b)]
        a, b = max(halves, key=lambda ends: _roughness(misfit, *ends))


def _roughness(misfit: Misfit, a: Point, b: Point) -> float:
    """How much does not fit in a half, as far as its ends tell."""
    if misfit is _energy_misfit:
        return abs(b.energy - a.energy - (b.t - a.t) * (a.slope + b.slope) / 2)
    return abs(b.gradients - a.gradients).max()


def _kink(path: Path, a: Point, b: Point, width: float) -> tuple[float, float]:
    """(jump of the second derivatives, where), as it is left in an interval of this width."""
    while b.t - a.t > width:
        middle = path((a.t + b.t) / 2)
        left = _gradient_misfit(a, path((a.t + middle.t) / 2), middle)
        right = _gradient_misfit(middle, path((middle.t + b.t) / 2), b)
        a, b = (a, middle) if left > right else (middle, b)
    middle = path((a.t + b.t) / 2)
    return 8 * _gradient_misfit(a, middle, b) / (b.t - a.t), middle.t
