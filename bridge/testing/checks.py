"""The properties that bridge.testing.check_potential checks: each a function of a model, a
structure and a random generator. NumPy only."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from bridge.contract import ENERGY_AND_GRADIENTS, check_outputs
from bridge.testing import continuity
from bridge.testing.strategies import Structure, pad, systems_of
from bridge.testing.subject import Outputs, Subject

# Raises Mismatch, or returns the text of a warning.
Check = Callable[[Subject, Structure, np.random.Generator], str | None]
UNITS = {"energy": "eV", "node_energies": "eV", "virial": "eV", "hessian": "eV/Angstrom^2"}
PROPERTIES: dict[str, Property] = {}


class Mismatch(AssertionError):
    """Two numbers that differ where a property has them equal."""


@dataclass(frozen=True)
class Property:
    """A property, and what it takes to check it.

    `check(model, structure, rng)` raises Mismatch, or returns the text of a warning. `needs` has
    "systems" (several of them), "pbc" (a periodic axis), "edges", "lanes", "transforms", "scan"
    (many evaluations, so that few structures are drawn), "compiled" (seconds to minutes for each
    structure, so that it is checked on request alone) or nothing.
    """

    check: Check
    needs: frozenset[str] = frozenset()


def holds(name: str, *needs: str) -> Callable[[Check], Check]:
    """Returns a decorator that lists a check among the PROPERTIES."""
    return lambda check: PROPERTIES.setdefault(name, Property(check, frozenset(needs))).check


def agree(got: np.ndarray, want: np.ndarray, allowed: float, what: str, why: str) -> None:
    """Raises Mismatch, naming the entry that is furthest off, if that is by more than `allowed`."""
    got, want = np.asarray(got), np.asarray(want)
    if got.shape != want.shape:
        raise Mismatch(f"{what}: expected shape {want.shape} ({why}), got shape {got.shape}")
    off = abs(got - want)
    if got.size and not off.max() <= allowed:
        at = np.unravel_index(np.argmax(np.where(np.isnan(off), np.inf, off)), off.shape)
        where = what + (f"[{', '.join(map(str, at))}]" if at else "")
        unit = UNITS.get(what, "eV/Angstrom" if what.endswith("gradients") else "")
        numbers = f"{where}: expected {want[at]:.10g} ({why}), got {got[at]:.10g} {unit}".rstrip()
        raise Mismatch(f"{numbers}; off by {off[at]:.3g}, allowed {allowed:.3g}")


def same(model: Subject, got: Outputs, want: Outputs, why: str) -> None:
    """Raises Mismatch where energy, gradients or node energies differ by more than rounding."""
    for key in (*ENERGY_AND_GRADIENTS, "node_energies"):
        if key in want and key in got:
            agree(got[key], want[key], model.room(model.limits.same, got[key], want[key]), key, why)


def slopes(
    model: Subject,
    s: Structure,
    key: str,
    directions: Iterable[np.ndarray],
    step: float,
    value: str = "energy",
) -> np.ndarray:
    """Returns central differences of the output `value` along changes of s[key].

    There is a row for each of the `directions`, which have the shape of s[key].
    """
    directions = list(directions)
    up, down = (
        [np.array(model(s | {key: s[key] + sign * step * d})[value], float) for d in directions]
        for sign in (1, -1)
    )
    return (np.array(up) - np.array(down)) / (2 * step)


def units_of(x: np.ndarray) -> np.ndarray:
    """Returns an array of the shape of x for each of its entries, which is 1 there and 0
    elsewhere."""
    return np.eye(x.size).reshape(-1, *x.shape)


@holds("shapes of the contract")
def shapes(model: Subject, s: Structure, rng: np.random.Generator) -> None:
    """Outputs have the shapes of the contract and are finite."""
    out = model(s)
    check_outputs(out, len(s["pos"]), len(s["cell"]), ENERGY_AND_GRADIENTS)
    for key in ENERGY_AND_GRADIENTS:
        if not np.isfinite(out[key]).all():
            raise Mismatch(f"{key}: expected finite numbers, got {out[key].tolist()}")


@holds("deterministic and dtype kept")
def deterministic(model: Subject, s: Structure, rng: np.random.Generator) -> None:
    """A second call gives the same, in the dtype of the positions and to its last digits."""
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
        allowed = 100 * model.factor * model.limits.eps * scale
        agree(again[key], out[key], allowed, key, "as in an earlier call on the same structure")
    if model.dtype == "float64":
        precise(model, s, out, direction)


def precise(
    model: Subject, s: Structure, out: Outputs, direction: np.ndarray, step: float = 1e-7
) -> None:
    """Raises Mismatch where the energy does not change as its gradient says, over a step so small
    that float32 has no digits left."""
    want = 2 * step * (out["position_gradients"] * direction).sum()
    got = 2 * step * slopes(model, s, "pos", [direction], step).sum()
    scale = 1 + abs(out["energy"]).max() + abs(out.get("node_energies", np.zeros(1))).sum()
    curvature = 2e-4 * step * abs(direction).sum() * abs(out["position_gradients"]).max()
    allowed = model.factor * (curvature + 200 * model.limits.eps * scale)
    change = f"change over a step of {2 * step:g} Angstrom by position_gradients"
    agree(got, want, allowed, "energy", f"{change}, which needs all digits of float64")


@holds("position gradients are those of finite differences")
def position_gradients(model: Subject, s: Structure, rng: np.random.Generator) -> None:
    """g = dE/dr, by finite differences."""
    out, pos = model(s), s["pos"]
    want = slopes(model, s, "pos", units_of(pos), model.limits.step).sum(-1).reshape(pos.shape)
    found, allowed = out["position_gradients"], model.room(model.limits.slope, want, noise=out)
    agree(found, want, allowed, "position_gradients", "finite differences of the energy")


@holds("cell gradients are those of finite differences at fixed Cartesian positions")
def cell_gradients(model: Subject, s: Structure, rng: np.random.Generator) -> None:
    """G = dE/dh at fixed Cartesian positions, by finite differences."""
    out, cell = model(s), s["cell"]
    want = slopes(model, s, "cell", units_of(cell), model.limits.strain).sum(-1).reshape(cell.shape)
    found, allowed = out["cell_gradients"], model.room(model.limits.slope, want, noise=out)
    agree(found, want, allowed, "cell_gradients", "finite differences of the energy")


@holds("virial is that of strain")
def virial(model: Subject, s: Structure, rng: np.random.Generator) -> None:
    """W = R^T g + h^T G is dE/de of the strain e, by finite differences."""
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
    allowed = model.room(model.limits.slope, want, found, noise=out)
    agree(found, want, allowed, "virial", "finite differences of the energy under strain")


@holds("translation")
def translation(model: Subject, s: Structure, rng: np.random.Generator) -> None:
    """Nothing changes where all atoms move by the same vector."""
    shift = rng.uniform(-3, 3, 3)
    moved = model(s | {"pos": s["pos"] + shift})
    same(model, moved, model(s), f"before all atoms moved by {shift.round(3).tolist()}")


@holds("rotation")
def rotation(model: Subject, s: Structure, rng: np.random.Generator) -> None:
    """The energy stays where a structure is rotated, and its gradients are rotated with it."""
    q = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    q *= np.linalg.det(q)
    out = model(s)
    want = out | {k: out[k] @ q for k in ("position_gradients", "cell_gradients")}
    rotated = model(s | {"pos": s["pos"] @ q, "cell": s["cell"] @ q})
    same(model, rotated, want, f"rotated with the structure by {q.round(3).tolist()}")


@holds("permutation")
def permutation(model: Subject, s: Structure, rng: np.random.Generator) -> None:
    """Outputs of atoms change places with them, and nothing else changes."""
    n = len(s["pos"])
    places = rng.permutation(n) if n > 2 else -np.arange(n)
    order = np.lexsort([places, s["batch"]])
    out = model(s)
    want = out | {k: out[k][order] for k in ("position_gradients", "node_energies") if k in out}
    reordered = model(s | {k: s[k][order] for k in ("pos", "atomic_numbers")})
    same(model, reordered, want, f"with the atoms in the order {order.tolist()}")


@holds("periodic wrap", "pbc")
def periodic_wrap(model: Subject, s: Structure, rng: np.random.Generator) -> None:
    """Another periodic image of an atom gives the same energy and forces."""
    n = rng.integers(-2, 3, s["pos"].shape) * s["pbc"][s["batch"]]
    out = model(s)
    cell = out["cell_gradients"].copy()
    # G is taken at fixed positions, and these are others now.
    np.subtract.at(cell, s["batch"], n[:, :, None] * out["position_gradients"][:, None, :])
    moved = s["pos"] + np.einsum("ia,iab->ib", n, s["cell"][s["batch"]])
    why = f"before atoms moved by lattice vectors {n.tolist()}"
    same(model, model(s | {"pos": moved}), out | {"cell_gradients": cell}, why)


@holds("lattice basis", "pbc")
def lattice_basis(model: Subject, s: Structure, rng: np.random.Generator) -> None:
    """Another basis of the same lattice gives the same energy and forces."""
    u = np.array([_unimodular(axes, rng) for axes in s["pbc"]])
    out = model(s)
    want = out | {"cell_gradients": np.linalg.inv(np.swapaxes(u, 1, 2)) @ out["cell_gradients"]}
    why = f"in the basis before cell -> U @ cell, U = {u.astype(int).tolist()}"
    same(model, model(s | {"cell": u @ s["cell"]}), want, why)


def _unimodular(pbc: np.ndarray, rng: np.random.Generator) -> Float[np.ndarray, "3 3"]:
    """A matrix of integers of determinant 1 or -1 that mixes periodic axes only."""
    axes, u = np.flatnonzero(pbc), np.eye(3)
    if len(axes) < 2:
        return np.diag(np.where(pbc, -1.0, 1.0))
    for _ in range(2):
        i, j = rng.permutation(axes)[:2]
        u[i] += rng.choice([-1, 1]) * u[j]
    return u


@holds("extensive")
def extensive(model: Subject, s: Structure, rng: np.random.Generator) -> None:
    """Two copies of a structure have twice the energy, and the same forces."""
    for one in systems_of(s):
        pos, cell, periodic = one["pos"], one["cell"].copy(), one["pbc"].any()
        axis = int(one["pbc"][0].argmax())
        if periodic:
            shift = cell[0, axis].copy()
            copies = f"repeated along axis {axis} of its cell"
        else:
            shift = np.array([1.0, 0, 0]) * (model.limits.far + np.ptp(pos))
            copies = f"with a copy {shift[0]:.0f} Angstrom away"
        cell[:, axis] *= 2
        double = {k: np.concatenate([one[k]] * 2) for k in ("atomic_numbers", "batch")}
        double |= {"pos": np.concatenate([pos, pos + shift]), "cell": cell}
        out = model(one)
        twice = {
            "energy": 2 * out["energy"],
            "position_gradients": np.concatenate([out["position_gradients"]] * 2),
        }
        why = f"from the structure alone, its energy twice; got for it {copies}"
        same(model, model(one | double), twice, why)


@holds("continuous where neighbours come and go", "scan")
def continuous(model: Subject, s: Structure, rng: np.random.Generator) -> str:
    """Energy and forces don't jump as a probe atom moves away. Returns the text of a kink."""
    reach = model.cutoff or continuity.UNKNOWN_REACH
    path = continuity.path_of(model, s, rng, reach)
    jump, kink = continuity.search(path, reach, continuity.RESOLUTIONS[model.dtype])
    if jump:
        probe = f"a probe, Z = {path.structure['atomic_numbers'][-1]}"
        along = path.direction.round(3).tolist()
        raise Mismatch(f"{jump} ({probe}, that moves from it along {along})")
    return kink


@holds("batched equals single", "systems")
def batched(model: Subject, s: Structure, rng: np.random.Generator) -> None:
    """A system of a batch gives what it gives alone."""
    whole = model(s)
    for b, one in enumerate(systems_of(s)):
        atoms, systems = s["batch"] == b, slice(b, b + 1)
        rows = {"energy": systems, "cell_gradients": systems}
        rows |= {"position_gradients": atoms, "node_energies": atoms}
        found = {k: whole[k][own] for k, own in rows.items() if k in whole}
        same(model, found, model(one), f"system {b} alone, got in the batch")


@holds("padding changes nothing", "edges", "systems")
def padding(model: Subject, s: Structure, rng: np.random.Generator) -> None:
    """Unused slots among the edges and atoms of number 0 change nothing."""
    graph, n = model.with_edges(s), len(s["pos"])
    out = model(graph)
    same(model, out, model(s), "without edges given, got with them")
    for atoms, slots, what in ((0, 3, "3 unused edge slots"), (2, 0, "2 padding atoms")):
        padded = model(pad(graph, atoms, slots, int(rng.integers(99))))
        nodes = {k: padded[k][:n] for k in ("position_gradients", "node_energies") if k in padded}
        same(model, padded | nodes, out, f"without {what}, got with them")


@holds("lanes agree", "lanes")
def lanes(model: Subject, s: Structure, rng: np.random.Generator) -> None:
    """Both lanes of the bridge give the same."""
    other = s["pos"] + 0.02 * rng.normal(size=s["pos"].shape)
    ffi, host = (model.transformed(s, other, lane, second=False) for lane in ("ffi", "host"))
    for (label, _, got), (_, _, want) in zip(ffi, host, strict=True):
        for a, b in zip(got, want, strict=True):
            allowed = model.room(model.limits.same, a, b)
            agree(a, b, allowed, f"{label} of the energy", "host lane, got on the ffi lane")


@holds("native lane agrees", "lanes", "compiled")
def native(model: Subject, s: Structure, rng: np.random.Generator) -> None:
    """The compiled model, with unused slots among its edges, gives what the model itself gives."""
    graph = model.with_edges(s)
    padded = pad(graph, 0, 3, int(rng.integers(99))) if "edge_index" in graph else graph
    same(model, model.compiled(padded), model(s), "the model itself, got on the native lane")


@holds("transforms agree", "transforms")
def transforms(model: Subject, s: Structure, rng: np.random.Generator) -> None:
    """Every transform of the energy through the bridge gives what the model itself gives."""
    other = s["pos"] + 0.02 * rng.normal(size=s["pos"].shape)
    want = model.expected(s, other, hessian)
    for label, what, got in model.transformed(s, other, "auto", second="hessian" in want):
        names = ENERGY_AND_GRADIENTS if what == "gradients" else [what]
        relative = 10 * model.limits.slope if what == "hessian" else model.limits.same
        why = f"the model itself, got through the bridge by {label}"
        for name, a, b in zip(names, got, want[what], strict=True):
            agree(a, b, model.room(relative, a, b), name, why)


def hessian(model: Subject, s: Structure) -> Float[np.ndarray, "N 3 N 3"]:
    """Returns d2E/dr dr by finite differences of the gradients, in eV/Angstrom^2."""
    rows = slopes(model, s, "pos", units_of(s["pos"]), model.limits.step, "position_gradients")
    return rows.reshape(*s["pos"].shape, *s["pos"].shape)
