"""Is an energy continuous, with continuous forces, where a neighbour comes and goes? A probe atom
moves through all distances. NumPy only."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

UNKNOWN_REACH = 8.0  # Angstrom, where a model does not tell its cutoff
NEAREST = 1.2  # Angstrom, where the probe starts
INTERVALS = 24
ROUGHEST = 6  # intervals that are searched for kinks


@dataclass(frozen=True)
class Resolution:
    """How narrow an interval must be (Angstrom) for what jumps in it to be a jump, and what is
    rounding (relative)."""

    width: float
    energy: float
    gradient: float
    # width at which second derivatives are compared; None where rounding hides them
    kink: float | None


RESOLUTIONS = {
    "float64": Resolution(1e-4, 1e-7, 1e-5, 1e-3),
    "float32": Resolution(2e-3, 2e-5, 5e-3, None),
}


@dataclass(frozen=True)
class Point:
    """The probe at distance t from its atom: energy, slope along the path, gradients of all
    atoms."""

    t: float
    energy: float
    slope: float
    gradients: np.ndarray


@dataclass(frozen=True)
class Path:
    """A probe that moves away from the outermost atom of a cluster, along `direction`."""

    model: object
    structure: dict
    atom: int
    direction: np.ndarray

    def __call__(self, t) -> Point:
        pos = self.structure["pos"].copy()
        pos[-1] = pos[self.atom] + t * self.direction
        out = self.model(self.structure | {"pos": pos})
        g = np.asarray(out["position_gradients"], float)
        return Point(t, float(out["energy"][0]), float(g[-1] @ self.direction), g)


def path_of(model, s, rng, reach) -> Path:
    """The first system of a structure as a cluster with a probe of one of its elements; in a wide
    cell where it is periodic."""
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
    """(a jump in energy or gradients, a kink in the gradients) on the way of the probe; "" where
    there is none."""
    points = [path(t) for t in np.linspace(NEAREST, 1.15 * reach, INTERVALS + 1)]
    scale = _scales(points)
    for left, right in itertools.pairwise(points):
        for misfit, allowed, text in (
            (
                _energy_misfit,
                resolution.energy * scale.energy,
                "energy: expected none that jumps, got {:.6g} eV",
            ),
            (
                _gradient_misfit,
                resolution.gradient * scale.gradient,
                "position_gradients: expected none that jump, got {:.6g} eV/Angstrom",
            ),
        ):
            at, jump = _narrowed(path, left, right, misfit, allowed, resolution.width)
            if at is not None:
                where = f" where the probe is {at:.5g} Angstrom from atom {path.atom}; allowed {allowed:.3g}"
                return text.format(jump) + where, ""
    if resolution.kink is None:
        return "", ""
    bends = [
        abs(a.gradients - 2 * b.gradients + c.gradients).max()
        for a, b, c in zip(points, points[1:], points[2:])
    ]
    rough = sorted(range(len(bends)), key=bends.__getitem__)[-ROUGHEST // 2 :]
    intervals = {at + side for at in rough for side in (0, 1)}
    strength, at = max(_kink(path, points[i], points[i + 1], resolution.kink) for i in intervals)
    text = f"second derivatives jump by {strength:.3g} eV/Angstrom^2 where a probe is {at:.5g} Angstrom from atom {path.atom}"
    return "", text if strength > 0.05 * scale.curvature else ""


@dataclass(frozen=True)
class _Scale:
    energy: float
    gradient: float
    curvature: float


def _scales(points) -> _Scale:
    steps = [
        abs(b.gradients - a.gradients).max() / (b.t - a.t) for a, b in itertools.pairwise(points)
    ]
    return _Scale(
        1 + max(abs(p.energy) for p in points),
        1 + max(abs(p.gradients).max() for p in points),
        max(steps),
    )


def _energy_misfit(a: Point, middle: Point, b: Point) -> float:
    """What Simpson's rule for the slopes leaves of the change of the energy: fifth order in the
    width, or a jump."""
    rule = (a.slope + 4 * middle.slope + b.slope) / 6
    return abs(b.energy - a.energy - (b.t - a.t) * rule)


def _gradient_misfit(a: Point, middle: Point, b: Point) -> float:
    """How far the gradients are from straight: second order in the width, first at a kink, or half
    of a jump."""
    return abs(middle.gradients - (a.gradients + b.gradients) / 2).max()


def _narrowed(path, a, b, misfit, allowed, width):
    """(where, how large) a misfit stays that does not go away as the interval narrows; (None, 0)
    where it does."""
    while True:
        middle = path((a.t + b.t) / 2)
        off = misfit(a, middle, b)
        if off <= allowed:
            return None, 0.0
        if b.t - a.t < width:
            return middle.t, off
        halves = [(a, middle), (middle, b)]
        a, b = max(halves, key=lambda ends: _roughness(misfit, *ends))


def _roughness(misfit, a, b) -> float:
    """Which half has what does not fit, by its ends alone."""
    if misfit is _energy_misfit:
        return abs(b.energy - a.energy - (b.t - a.t) * (a.slope + b.slope) / 2)
    return abs(b.gradients - a.gradients).max()


def _kink(path, a, b, width) -> tuple[float, float]:
    """(jump of the second derivatives, where), as it is left at an interval of this width."""
    while b.t - a.t > width:
        middle = path((a.t + b.t) / 2)
        quarter, three = path((a.t + middle.t) / 2), path((middle.t + b.t) / 2)
        a, b = (
            (a, middle)
            if _gradient_misfit(a, quarter, middle) > _gradient_misfit(middle, three, b)
            else (middle, b)
        )
    middle = path((a.t + b.t) / 2)
    return 8 * _gradient_misfit(a, middle, b) / (b.t - a.t), middle.t
