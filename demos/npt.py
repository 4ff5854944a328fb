"""Thermal expansion of a salt: SevenNet-0 (torch) in jitted jax-md NPT, one call into torch for a
step at all temperatures at once.

    make demo-npt        or        python -m demos.npt --help

Ends with a table, a PNG of the runs, and an extxyz trajectory for each temperature, in demos/out.
Ctrl-C stops it, --resume goes on.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path

import ase.build
import ase.io
import ase.units
import jax
import jax.numpy as jnp
import numpy as np
from jax_md import space

import bridge
from demos import observables, runs
from demos.arguments import add_device, at_least, device, refuse_unless
from jax_side.engines import jax_md as engine
from torch_side.models.sevennet import SevenNet

# experiment at room temperature, rounded: Angstrom, g/cm^3, 1e-6/K (Rapp and Merchant, J. Appl.
# Phys. 44, 3919, 1973, and handbooks)
SALTS = {
    "NaCl": dict(a=5.640, density=2.16, alpha=40),
    "KCl": dict(a=6.293, density=1.98, alpha=37),
    "LiF": dict(a=4.027, density=2.64, alpha=34),
}
ROOM = 300.0  # K


def options(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demos.npt", description=__doc__.split("\n")[0])
    parser.add_argument("--salt", choices=SALTS, default="NaCl")
    parser.add_argument(
        "--repeat",
        type=at_least(int, 1, 8),
        default=1,
        help="conventional cells along each axis (1: 8 atoms)",
    )
    parser.add_argument(
        "--temperatures",
        type=at_least(float, 1.0),
        nargs="+",
        default=[100.0, 300.0, 500.0],
        metavar="K",
        help="all run side by side",
    )
    parser.add_argument("--pressure", type=at_least(float, -5.0, 100.0), default=0.0, help="GPa")
    parser.add_argument("--dt", type=at_least(float, 0.01, 10.0), default=4.0, help="fs")
    parser.add_argument("--steps", type=at_least(int, 1), default=1200, help="in all")
    parser.add_argument(
        "--equilibrate",
        type=at_least(int, 0),
        default=200,
        help="steps at the start that are left out of averages",
    )
    parser.add_argument(
        "--chunk",
        type=at_least(int, 1),
        default=10,
        help="steps in one jitted call, between frames and checkpoints",
    )
    parser.add_argument("--blocks", type=at_least(int, 2), default=8, help="for error bars")
    parser.add_argument("--seed", type=at_least(int, 0), default=0)
    parser.add_argument(
        "--resume", action="store_true", help="go on from the checkpoint, to --steps"
    )
    parser.add_argument("--out", type=Path, default=Path("demos/out"))
    add_device(parser)
    chosen = parser.parse_args(argv)
    chosen.device = device(parser, chosen)
    rules = (
        ("steps", chosen.steps % chosen.chunk == 0, f"a multiple of --chunk {chosen.chunk}"),
        (
            "steps",
            chosen.steps - chosen.equilibrate >= chosen.blocks,
            f"at least --equilibrate {chosen.equilibrate} + --blocks {chosen.blocks}",
        ),
        (
            "temperatures",
            len(set(chosen.temperatures)) == len(chosen.temperatures),
            "different ones",
        ),
        ("out", chosen.out.is_dir() or not chosen.out.exists(), "a folder"),
    )
    refuse_unless(parser, chosen, rules)
    return chosen


def relaxed(energy, salt) -> ase.Atoms:
    """The conventional cell of least energy: one call for eleven lattice constants, a cubic through
    them."""
    grid = SALTS[salt]["a"] * np.linspace(0.97, 1.07, 11)
    crystals = [ase.build.bulk(salt, "rocksalt", a=a, cubic=True) for a in grid]
    positions, cells = (
        jnp.asarray(np.array(x), jnp.float32)
        for x in ([c.positions for c in crystals], [c.cell.array for c in crystals])
    )
    curve = np.polynomial.Polynomial.fit(
        grid, np.asarray(jax.vmap(energy)(positions, cells), float), 4
    )
    minima = [
        a.real
        for a in curve.deriv().roots()
        if abs(a.imag) < 1e-9 and grid[0] < a.real < grid[-1] and curve.deriv(2)(a.real) > 0
    ]
    return ase.build.bulk(salt, "rocksalt", a=min(minima, key=curve), cubic=True)


def simulation(potential, atoms, chosen):
    """(state, step, observe, frames, histogram) for runs.run: a jax-md NPT state with a leading
    axis of temperatures."""
    # Real coordinates without a wrap: jax-md's npt_nose_hoover strains R as positions, which a
    # fraction of the box is not.
    energy_fn, (_, shift) = engine.energy(potential, fractional=False), space.free()
    dt, pressure, n = chosen.dt * ase.units.fs, chosen.pressure * ase.units.GPa, len(atoms)
    # jax-md's thermostat shares kT among 3N degrees of freedom; the centre of mass rests and has
    # none of them.
    kT = jnp.asarray(np.array(chosen.temperatures) * ase.units.kB * (n - 1) / n, jnp.float32)
    chains = dict(
        thermostat_kwargs=dict(tau=100 * ase.units.fs), barostat_kwargs=dict(tau=500 * ase.units.fs)
    )
    init, move = engine.npt_nose_hoover(energy_fn, shift, dt, pressure, float(kT[0]), **chains)
    box, R, mass = (
        jnp.asarray(x, jnp.float32)
        for x in (atoms.cell.array.T, atoms.positions, atoms.get_masses())
    )
    # Half of what the atoms bring goes into the springs of the perfect crystal that they leave.
    md = jax.vmap(lambda key, kT: init(key, R, box, mass=mass, kT=2 * kT))(
        jax.random.split(jax.random.key(chosen.seed), len(kT)), kT
    )
    # jax-md's numbers of Python are float64 where x64 is on
    md = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), md)
    pairs = observables.PairHistogram(
        atoms.get_chemical_symbols(), atoms.cell.array, r_max=1.4 * SALTS[chosen.salt]["a"]
    )

    def step(state):
        md = jax.vmap(lambda md, kT: move(md, kT=kT))(state["md"], kT)
        counts = jax.vmap(lambda md: pairs.counts(md.position, md.box.T))(md)
        return dict(
            md=md,
            done=state["done"] + 1,
            counts=state["counts"] + jnp.where(state["done"] < chosen.equilibrate, 0, counts),
        )

    def observe(state, _):
        return jax.vmap(lambda md, kT: observables.thermodynamics(md, kT=kT, pressure=pressure))(
            state["md"], kT
        )

    def frames(state, last):
        md = jax.tree.map(np.asarray, state["md"])
        of = lambda tree, i: jax.tree.map(lambda x: x[i], tree)
        return {
            f"{T:g}K": observables.frame(atoms, of(md, i), of(last, i))
            for i, T in enumerate(chosen.temperatures)
        }

    return (
        dict(md=md, done=jnp.zeros((), int), counts=jnp.array([pairs.zero] * len(kT))),
        step,
        observe,
        frames,
        pairs,
    )


def measured(seen, chosen, n_cells) -> dict:
    """Averages and their errors at each temperature; the expansion coefficient by a weighted
    straight line through a(T)."""
    tail = {name: np.moveaxis(x[chosen.equilibrate :], 1, 0) for name, x in seen.items()}
    series = dict(
        a=np.cbrt(tail["volume"] / n_cells),
        density=tail["density"],
        temperature=tail["temperature"],
        pressure=tail["pressure"] * observables.GPA,
    )
    found = {
        name: np.array([observables.averaged(x, chosen.blocks) for x in rows])
        for name, rows in series.items()
    }
    ps = 1e-3 * chosen.dt * np.arange(1, len(seen["conserved"]) + 1)
    found["drift"] = np.polyfit(ps, seen["conserved"], 1)[0] * 1e3 / (8 * n_cells)
    if len(chosen.temperatures) > 1:
        mean, error = np.array(found["a"]).T
        (slope, at_room), covariance = np.polyfit(
            np.array(chosen.temperatures) - ROOM, mean, 1, w=1 / error, cov="unscaled"
        )
        found["alpha"] = 1e6 * slope / at_room, 1e6 * np.sqrt(covariance[0, 0]) / at_room
        found["room"] = at_room, np.sqrt(covariance[1, 1])
    return found


def table(found, a0, chosen, n_cells) -> str:
    known = SALTS[chosen.salt]
    lines = [
        f"{'K':>6}{'T measured':>17}{'P, GPa':>16}{'a, Å':>18}{'density, g/cm³':>18}{'drift, meV/atom/ps':>21}"
    ]
    pm = lambda pair, digits: f"{pair[0]:.{digits}f} ± {pair[1]:.{digits}f}"
    for i, T in enumerate(chosen.temperatures):
        cells = [
            pm(found[name][i], digits)
            for name, digits in (("temperature", 0), ("pressure", 3), ("a", 4), ("density", 3))
        ]
        lines.append(
            f"{T:6g}{cells[0]:>17}{cells[1]:>16}{cells[2]:>18}{cells[3]:>18}{found['drift'][i]:>21.3f}"
        )
    lines += ["", f"relaxed, no motion                 a = {a0:.4f} Å"]
    if "alpha" in found:
        fitted, alpha, expected = (
            pm(found["room"], 4),
            pm(found["alpha"], 0),
            f"about {known['alpha']} 1e-6/K, density {known['density']} g/cm³",
        )
        lines.append(
            f"line through the runs, at {ROOM:g} K     a = {fitted} Å     expansion {alpha} 1e-6/K"
        )
        lines.append(
            f"experiment, room temperature       a = {known['a']:.4f} Å              expansion "
            f"{expected}"
        )
    ps = 1e-3 * chosen.dt * (chosen.steps - chosen.equilibrate)
    lines.append(
        f"Rough: {ps:.1f} ps of {8 * n_cells} classical atoms. The errors are those of "
        f"{chosen.blocks} blocks and know nothing of slower motions,"
    )
    lines.append(
        f"nor of the small cell (its centre of mass rests: 1/{8 * n_cells} of the thermal motion "
        "is missing), nor of PBE, from which"
    )
    lines.append(
        "SevenNet-0 learned that salts are a percent or two too large; and below some 300 K the "
        "experiment is quantum."
    )
    return "\n".join(lines)


def picture(seen, rdf, found, chosen, n_cells, path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(14, 7), layout="constrained")
    ps, atoms = 1e-3 * chosen.dt * np.arange(1, len(seen["volume"]) + 1), 8 * n_cells
    total = 1e3 * (seen["conserved"] - seen["conserved"][0]) / atoms
    series = (
        np.cbrt(seen["volume"] / n_cells),
        seen["temperature"],
        total,
        seen["pressure"] * observables.GPA,
    )
    traces = list(
        zip(("a (Å)", "temperature (K)", "conserved - first (meV/atom)", "pressure (GPa)"), series)
    )
    for axis, (label, rows) in zip(axes.flat, traces):
        for T, row in zip(chosen.temperatures, rows.T):
            axis.plot(ps, row, lw=0.7, label=f"{T:g} K")
        axis.axvspan(0, 1e-3 * chosen.dt * chosen.equilibrate, color="0.92")
        axis.set(xlabel="time (ps)", ylabel=label)
    r, gs, names = rdf
    for T, g, color in zip(chosen.temperatures, gs, (f"C{i % 10}" for i in range(99))):
        axes[1, 1].plot(r, g[0, 1], color=color, label=f"{T:g} K")
        axes[1, 1].plot(r, g[0, 0], color=color, lw=0.7, ls=":")
    axes[1, 1].set(
        xlabel="r (Å)", ylabel="g(r)", title=f"{names[0]}-{names[1]}; dotted: {names[0]}-{names[0]}"
    )
    mean, error = np.array(found["a"]).T
    axes[1, 2].errorbar(
        chosen.temperatures, mean, error, fmt="o", capsize=4, label="SevenNet-0, jax-md NPT"
    )
    if "alpha" in found:
        T = np.array([min(chosen.temperatures), max(chosen.temperatures)])
        line = found["room"][0] * (1 + 1e-6 * found["alpha"][0] * (T - ROOM))
        axes[1, 2].plot(
            T, line, lw=0.8, label=f"{found['alpha'][0]:.0f} ± {found['alpha'][1]:.0f} 1e-6/K"
        )
    axes[1, 2].plot([ROOM], [SALTS[chosen.salt]["a"]], "k*", label="experiment")
    axes[1, 2].set(xlabel="T (K)", ylabel="a (Å)")
    axes[0, 0].legend(fontsize=8)
    axes[1, 2].legend(fontsize=8)
    figure.suptitle(
        f"{chosen.salt}, {atoms} atoms, {chosen.pressure:g} GPa: SevenNet-0 (torch) in jitted "
        "jax-md NPT"
    )
    figure.savefig(path, dpi=110)


def main(argv=None) -> int:
    chosen, began = options(argv), time.perf_counter()
    # jax-md sums momenta in float64 if it can
    warnings.filterwarnings("ignore", message="Explicitly requested dtype float64")
    warnings.filterwarnings("ignore", message="No tensor product accelerator")  # sevenn, on a CPU
    model = SevenNet("7net-0").eval().to(chosen.device)
    cell = relaxed(
        bridge.potential(
            model,
            atomic_numbers=ase.build.bulk(chosen.salt, "rocksalt", a=1.0, cubic=True).numbers,
            pbc=True,
        ),
        chosen.salt,
    )
    atoms, n_cells, a0 = cell.repeat(chosen.repeat), chosen.repeat**3, cell.cell[0, 0]
    print(
        f"{chosen.salt}, {len(atoms)} atoms, relaxed a = {a0:.4f} Å; {len(chosen.temperatures)} "
        f"temperatures in one batch, {chosen.dt:g} fs a step"
    )

    potential = bridge.potential(model, atomic_numbers=atoms.numbers, pbc=True)
    state, step, observe, frames, pairs = simulation(potential, atoms, chosen)
    settings = {
        name: getattr(chosen, name)
        for name in ("salt", "repeat", "temperatures", "pressure", "dt", "equilibrate", "seed")
    }
    shown = lambda last: {
        "T": np.round(last["temperature"]).astype(int).tolist(),
        "V": np.round(last["volume"]).astype(int).tolist(),
    }
    path = chosen.out / "npt"
    seeing = dict(observe=observe, frames=frames, shown=shown, desc="NPT")
    run = runs.run(
        step,
        state,
        chosen.steps,
        chunk=chosen.chunk,
        path=path,
        settings=settings,
        resume=chosen.resume,
        **seeing,
    )
    if not run.finished:
        return 130

    found = measured(run.observables, chosen, n_cells)
    r, gs = pairs.rdf(run.state["counts"], chosen.steps - chosen.equilibrate)
    picture(run.observables, (r, gs, pairs.names), found, chosen, n_cells, path.with_suffix(".png"))
    print(f"\n{table(found, a0, chosen, n_cells)}\n")
    for T in chosen.temperatures:
        trajectory = f"{path}-{T:g}K.extxyz"
        print(
            f"trajectory   {trajectory}  ({len(ase.io.read(trajectory, ':'))} frames, read back by "
            "ASE)"
        )
    print(
        f"observables  {path}.jsonl  (each step)\ncheckpoint   {path}.ckpt.npz\npicture      "
        f"{path}.png\n{time.perf_counter() - began:.0f} seconds"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
