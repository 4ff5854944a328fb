"""The properties that bridge.testing.check_potential checks: each a function of a model, a
structure and a random generator. NumPy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bridge.contract import ENERGY_AND_GRADIENTS, check_outputs
from bridge.testing import continuity
from bridge.testing.strategies import pad, systems_of, with_edges

UNITS = {"energy": "eV", "node_energies": "eV", "virial": "eV", "hessian": "eV/Angstrom^2"}
PROPERTIES = {}  # name: Property


class Mismatch(AssertionError):
    """Two numbers that differ where a property has them equal."""


@dataclass(frozen=True)
class Tolerance:
    """`step` of finite differences in Angstrom, relative errors of `slope`s and of what must be the
    `same`, absolute ones `floor`."""

    step: float
    strain: float
    slope: float
    same: float
    floor: float
    eps: float
    far: float


TOLERANCES = {
    "float64": Tolerance(1e-4, 2e-5, 1e-5, 1e-8, 1e-7, 2.3e-16, 500.0),
    "float32": Tolerance(1e-2, 2e-3, 2e-2, 2e-4, 1e-4, 1.2e-7, 60.0),
}


@dataclass(frozen=True)
class Property:
    """`check(model, structure, rng)` raises Mismatch, or returns the text of a warning. `needs`:
    "systems" (several), "pbc" (a periodic axis), "edges", "lanes", "transforms", "scan" (many
    evaluations, so few structures) or nothing."""

    check: object
    needs: frozenset = frozenset()


def holds(name, *needs):
    return lambda check: PROPERTIES.setdefault(name, Property(check, frozenset(needs))).check


def agree(got, want, allowed, what, why):
    """Mismatch naming the entry that is furthest off, if it is by more than allowed."""
    got, want = np.asarray(got), np.asarray(want)
    if got.shape != want.shape:
        raise Mismatch(f"{what}: expected shape {want.shape} ({why}), got shape {got.shape}")
    off = abs(got - want)
    if got.size and not off.max() <= allowed:
        at = np.unravel_index(np.argmax(np.where(np.isnan(off), np.inf, off)), off.shape)
        where = what + (f"[{', '.join(map(str, at))}]" if at else "")
        unit = UNITS.get(what, "eV/Angstrom" if what.endswith("gradients") else "")
        raise Mismatch(
            f"{where}: expected {want[at]:.10g} ({why}), got {got[at]:.10g} {unit}".rstrip()
            + f"; off by {off[at]:.3g}, allowed {allowed:.3g}"
        )


def same(model, got, want, why):
    """Energy, gradients and node energies equal, to rounding."""
    for key in (*ENERGY_AND_GRADIENTS, "node_energies"):
        if key in want and key in got:
            agree(got[key], want[key], model.room(model.limits.same, got[key], want[key]), key, why)


def slopes(model, s, key, directions, step, value="energy"):
    """Central differences of the energy, or of another output, along changes of s[key]."""
    up, down = (
        [np.array(model(s | {key: s[key] + sign * step * d})[value], float) for d in directions]
        for sign in (1, -1)
    )
    return (np.array(up) - np.array(down)) / (2 * step)


def units_of(x):
    """An array of the shape of x for each of its entries: 1 there, 0 elsewhere."""
    return np.eye(x.size).reshape(-1, *x.shape)


@holds("shapes of the contract")
def shapes(model, s, rng):
    out = model(s)
    check_outputs(out, len(s["pos"]), len(s["cell"]), ENERGY_AND_GRADIENTS)
    for key in ENERGY_AND_GRADIENTS:
        if not np.isfinite(out[key]).all():
            raise Mismatch(f"{key}: expected finite numbers, got {out[key].tolist()}")


@holds("deterministic and dtype kept")
def deterministic(model, s, rng):
    out, direction = model(s), rng.normal(size=s["pos"].shape)
    for key in ENERGY_AND_GRADIENTS:
        if str(out[key].dtype) != model.dtype:
            raise Mismatch(
                f"{key}: expected {model.dtype}, the dtype of the positions, got {out[key].dtype}"
            )
    model(s | {"pos": s["pos"] + 0.05 * direction})
    again = model(s)
    for key in ENERGY_AND_GRADIENTS:
        scale = abs(out[key]).max(initial=1.0)
        agree(
            again[key],
            out[key],
            100 * model.factor * model.limits.eps * scale,
            key,
            "as in an earlier call on the same structure",
        )
    if model.dtype == "float64":
        precise(model, s, out, direction)


def precise(model, s, out, direction, step=1e-7):
    """Over a step so small that float32 has no digits left, the energy changes as its gradient has
    it."""
    want = 2 * step * (out["position_gradients"] * direction).sum()
    got = 2 * step * slopes(model, s, "pos", [direction], step).sum()
    scale = 1 + abs(out["energy"]).max() + abs(out.get("node_energies", np.zeros(1))).sum()
    allowed = model.factor * (
        2e-4 * step * abs(direction).sum() * abs(out["position_gradients"]).max()
        + 200 * model.limits.eps * scale
    )
    agree(
        got,
        want,
        allowed,
        "energy",
        f"change over a step of {2 * step:g} Angstrom by position_gradients, which needs all "
        "digits of float64",
    )


@holds("position gradients are those of finite differences")
def position_gradients(model, s, rng):
    out = model(s)
    want = (
        slopes(model, s, "pos", units_of(s["pos"]), model.limits.step)
        .sum(-1)
        .reshape(s["pos"].shape)
    )
    agree(
        out["position_gradients"],
        want,
        model.room(model.limits.slope, want, noise=out),
        "position_gradients",
        "finite differences of the energy",
    )


@holds("cell gradients are those of finite differences at fixed Cartesian positions")
def cell_gradients(model, s, rng):
    out = model(s)
    want = (
        slopes(model, s, "cell", units_of(s["cell"]), model.limits.strain)
        .sum(-1)
        .reshape(s["cell"].shape)
    )
    agree(
        out["cell_gradients"],
        want,
        model.room(model.limits.slope, want, noise=out),
        "cell_gradients",
        "finite differences of the energy",
    )


@holds("virial is that of strain")
def virial(model, s, rng):
    out, step, systems = model(s), model.limits.strain, len(s["cell"])
    found = np.zeros_like(s["cell"])
    np.add.at(found, s["batch"], s["pos"][:, :, None] * out["position_gradients"][:, None, :])
    found += np.swapaxes(s["cell"], 1, 2) @ out["cell_gradients"]
    strained = lambda e: s | {"pos": s["pos"] + s["pos"] @ e, "cell": s["cell"] + s["cell"] @ e}
    energies = [
        [np.array(model(strained(sign * step * e))["energy"], float) for sign in (1, -1)]
        for e in units_of(np.zeros((3, 3)))
    ]
    want = np.array([(up - down) / (2 * step) for up, down in energies]).T.reshape(systems, 3, 3)
    agree(
        found,
        want,
        model.room(model.limits.slope, want, found, noise=out),
        "virial",
        "finite differences of the energy under strain",
    )


@holds("translation")
def translation(model, s, rng):
    shift = rng.uniform(-3, 3, 3)
    same(
        model,
        model(s | {"pos": s["pos"] + shift}),
        model(s),
        f"before all atoms moved by {shift.round(3).tolist()}",
    )


@holds("rotation")
def rotation(model, s, rng):
    q = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    q *= np.linalg.det(q)
    out = model(s)
    want = out | {k: out[k] @ q for k in ("position_gradients", "cell_gradients")}
    same(
        model,
        model(s | {"pos": s["pos"] @ q, "cell": s["cell"] @ q}),
        want,
        f"rotated with the structure by {q.round(3).tolist()}",
    )


@holds("permutation")
def permutation(model, s, rng):
    order = np.lexsort(
        [
            rng.permutation(len(s["pos"])) if len(s["pos"]) > 2 else -np.arange(len(s["pos"])),
            s["batch"],
        ]
    )
    out = model(s)
    want = out | {k: out[k][order] for k in ("position_gradients", "node_energies") if k in out}
    same(
        model,
        model(s | {k: s[k][order] for k in ("pos", "atomic_numbers")}),
        want,
        f"with the atoms in the order {order.tolist()}",
    )


@holds("periodic wrap", "pbc")
def periodic_wrap(model, s, rng):
    n = rng.integers(-2, 3, s["pos"].shape) * s["pbc"][s["batch"]]
    out = model(s)
    cell = out["cell_gradients"].copy()
    # fixed positions are others now
    np.subtract.at(cell, s["batch"], n[:, :, None] * out["position_gradients"][:, None, :])
    moved = s["pos"] + np.einsum("ia,iab->ib", n, s["cell"][s["batch"]])
    same(
        model,
        model(s | {"pos": moved}),
        out | {"cell_gradients": cell},
        f"before atoms moved by lattice vectors {n.tolist()}",
    )


@holds("lattice basis", "pbc")
def lattice_basis(model, s, rng):
    u = np.array([_unimodular(axes, rng) for axes in s["pbc"]])
    out = model(s)
    want = out | {"cell_gradients": np.linalg.inv(np.swapaxes(u, 1, 2)) @ out["cell_gradients"]}
    same(
        model,
        model(s | {"cell": u @ s["cell"]}),
        want,
        f"in the basis before cell -> U @ cell, U = {u.astype(int).tolist()}",
    )


def _unimodular(pbc, rng):
    """A matrix of integers of determinant 1 or -1 that mixes periodic axes only."""
    axes, u = np.flatnonzero(pbc), np.eye(3)
    if len(axes) < 2:
        return np.diag(np.where(pbc, -1.0, 1.0))
    for _ in range(2):
        i, j = rng.permutation(axes)[:2]
        u[i] += rng.choice([-1, 1]) * u[j]
    return u


@holds("extensive")
def extensive(model, s, rng):
    for one in systems_of(s):
        pos, cell, periodic = one["pos"], one["cell"].copy(), one["pbc"].any()
        axis = int(one["pbc"][0].argmax())
        shift = (
            cell[0, axis].copy()
            if periodic
            else np.array([1.0, 0, 0]) * (model.limits.far + np.ptp(pos))
        )
        cell[:, axis] *= 2
        double = {k: np.concatenate([one[k]] * 2) for k in ("atomic_numbers", "batch")} | {
            "pos": np.concatenate([pos, pos + shift]),
            "cell": cell,
        }
        copies = (
            f"repeated along axis {axis} of its cell"
            if periodic
            else f"with a copy {shift[0]:.0f} Angstrom away"
        )
        out = model(one)
        twice = {
            "energy": 2 * out["energy"],
            "position_gradients": np.concatenate([out["position_gradients"]] * 2),
        }
        same(
            model,
            model(one | double),
            twice,
            f"from the structure alone, its energy twice; got for it {copies}",
        )


@holds("continuous where neighbours come and go", "scan")
def continuous(model, s, rng):
    reach = model.cutoff or continuity.UNKNOWN_REACH
    path = continuity.path_of(model, s, rng, reach)
    jump, kink = continuity.search(path, reach, continuity.RESOLUTIONS[model.dtype])
    if jump:
        raise Mismatch(
            f"{jump} (a probe, Z = {path.structure['atomic_numbers'][-1]}, that moves from it "
            f"along {path.direction.round(3).tolist()})"
        )
    return kink


@holds("batched equals single", "systems")
def batched(model, s, rng):
    whole, names = model(s), (*ENERGY_AND_GRADIENTS, "node_energies")
    for b, one in enumerate(systems_of(s)):
        own = s["batch"] == b
        found = {
            k: whole[k][own]
            if k in ("position_gradients", "node_energies")
            else whole[k][b : b + 1]
            for k in names
            if k in whole
        }
        same(model, found, model(one), f"system {b} alone, got in the batch")


@holds("padding changes nothing", "edges", "systems")
def padding(model, s, rng):
    graph, n = with_edges(s, model.cutoff), len(s["pos"])
    out = model(graph)
    same(model, out, model(s), "without edges given, got with them")
    for atoms, slots, what in ((0, 3, "3 unused edge slots"), (2, 0, "2 padding atoms")):
        padded = model(pad(graph, atoms, slots, int(rng.integers(99))))
        nodes = {k: padded[k][:n] for k in ("position_gradients", "node_energies") if k in padded}
        same(model, padded | nodes, out, f"without {what}, got with them")


@holds("lanes agree", "lanes")
def lanes(model, s, rng):
    other = s["pos"] + 0.02 * rng.normal(size=s["pos"].shape)
    ffi, host = (model.transformed(s, other, lane, second=False) for lane in ("ffi", "host"))
    for (label, _, got), (_, _, want) in zip(ffi, host, strict=True):
        for a, b in zip(got, want, strict=True):
            agree(
                a,
                b,
                model.room(model.limits.same, a, b),
                f"{label} of the energy",
                "host lane, got on the ffi lane",
            )


@holds("transforms agree", "transforms")
def transforms(model, s, rng):
    other = s["pos"] + 0.02 * rng.normal(size=s["pos"].shape)
    want = model.expected(s, other)
    for label, what, got in model.transformed(s, other, "auto", second="hessian" in want):
        for name, a, b in zip(
            ENERGY_AND_GRADIENTS if what == "gradients" else [what], got, want[what], strict=True
        ):
            relative = 10 * model.limits.slope if what == "hessian" else model.limits.same
            agree(
                a,
                b,
                model.room(relative, a, b),
                name,
                f"the model itself, got through the bridge by {label}",
            )


def hessian(model, s):
    """d2E/dr dr (N,3,N,3) by finite differences of the gradients."""
    rows = slopes(model, s, "pos", units_of(s["pos"]), model.limits.step, "position_gradients")
    return rows.reshape(*s["pos"].shape, *s["pos"].shape)
