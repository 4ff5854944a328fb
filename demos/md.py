"""SevenNet-0, a pretrained torch potential, drives a jitted jax-md run of a real crystal: NVT, then
NVE.

    make demo        or        python -m demos.md --help

Ends with a table, a PNG of energy and temperature, and an extxyz trajectory, in demos/out.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path

import ase.build
import ase.io
import ase.md.verlet
import ase.units
import jax
import jax.numpy as jnp
import numpy as np
import torch
from ase.calculators.singlepoint import SinglePointCalculator
from ase.neighborlist import neighbor_list
from jax_md import quantity, simulate, space
from tqdm import tqdm

import bridge
from demos.arguments import add_device, at_least, device
from jax_side.engines import jax_md as engine
from torch_side.models.sevennet import SevenNet

CRYSTALS = {  # prototype and lattice constant in Angstrom (experiment, room temperature)
    "NaCl": dict(crystalstructure="rocksalt", a=5.640),
    "MgO": dict(crystalstructure="rocksalt", a=4.212),
    "Si": dict(crystalstructure="diamond", a=5.431),
    "Cu": dict(crystalstructure="fcc", a=3.615),
}


def options(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demos.md", description=__doc__.split("\n")[0])
    parser.add_argument("--crystal", choices=CRYSTALS, default="NaCl")
    parser.add_argument(
        "--repeat",
        type=at_least(int, 1),
        default=2,
        help="conventional cells along each axis (2: 64 atoms of NaCl)",
    )
    parser.add_argument("--temperature", type=at_least(float, 1.0), default=300.0, help="K")
    parser.add_argument("--dt", type=at_least(float, 0.01, 10.0), default=2.0, help="fs")
    parser.add_argument(
        "--nvt", type=at_least(int, 1), default=150, help="steps of NVT (Nose-Hoover)"
    )
    parser.add_argument("--nve", type=at_least(int, 2), default=150, help="steps of NVE")
    parser.add_argument(
        "--every",
        type=at_least(int, 1),
        default=10,
        help="steps in one jitted call, and between frames",
    )
    parser.add_argument("--lane", choices=("auto", "ffi", "host", "native"), default="auto")
    parser.add_argument(
        "--threads",
        type=at_least(int, 1),
        help="of torch, everywhere (default: 1 on the native lane, else what torch takes)",
    )
    parser.add_argument("--seed", type=at_least(int, 0), default=0)
    parser.add_argument("--out", type=Path, default=Path("demos/out"))
    add_device(parser)
    chosen = parser.parse_args(argv)
    chosen.device = device(parser, chosen)
    for name in ("nvt", "nve"):
        if getattr(chosen, name) % chosen.every:
            parser.error(
                f"argument --{name}: expected a multiple of --every {chosen.every}, got "
                f"{getattr(chosen, name)}; change one of them"
            )
    if chosen.out.exists() and not chosen.out.is_dir():
        parser.error(f"argument --out: expected a folder, got the file {chosen.out}; name another")
    return chosen


SKIN = 0.5  # Angstrom: on the native lane one neighbour list serves all steps of a jitted call


class Calls:
    """How often Python called the model."""

    def __init__(self, model):
        self.count = 0
        model.register_forward_pre_hook(self)

    def __call__(self, *_):
        self.count += 1


class Energies:
    """The energy function of one jitted call: on the native lane with the neighbours of its start,
    on the others with those that torch finds at each step."""

    def __init__(self, energy, box, chosen, atoms, cutoff):
        self.energy, self.box, self.cell = energy, box, box.T
        self.find = None
        if chosen.lane == "native":
            n_edges = len(neighbor_list("i", atoms, cutoff + SKIN))
            self.find = bridge.edges(cutoff + SKIN, int(1.1 * n_edges))

    def start(self, R):
        """The energy function for the steps that begin at R, fractional coordinates."""
        if self.find is None:
            return engine.energy(self.energy, self.box)
        edges = self.find(R @ self.cell, self.cell)
        return engine.energy(lambda r, cell: self.energy(r, cell, **edges), self.box)

    def check(self, before, after):
        """The list must have had every pair: no atom may have moved by half of the skin."""
        moved = float(jnp.linalg.norm((after - before) @ self.cell, axis=-1).max())
        if self.find is not None and not moved < SKIN / 2:
            raise RuntimeError(
                f"expected atoms to move by less than {SKIN / 2} Angstrom in one jitted call, got "
                f"{moved:.2f}; pass a smaller --every"
            )


def run(chosen):
    atoms = ase.build.bulk(chosen.crystal, cubic=True, **CRYSTALS[chosen.crystal]).repeat(
        chosen.repeat
    )
    if threads := chosen.threads or (1 if chosen.lane == "native" else None):
        torch.set_num_threads(threads)
    model = SevenNet("7net-0").eval().to(chosen.device)
    calls = Calls(model)
    print(
        f"{chosen.crystal}, {len(atoms)} atoms, {chosen.temperature:g} K, {chosen.dt:g} fs a step; "
        f"jax {jax.__version__}, torch {torch.__version__}, lane {chosen.lane}, "
        f"{torch.get_num_threads()} threads, {chosen.device}"
    )

    # The whole of the bridge: a torch potential as a jax-md energy function.
    energy = bridge.potential(model, atomic_numbers=atoms.numbers, pbc=True, lane=chosen.lane)
    box = jnp.asarray(atoms.cell.array.T, jnp.float32)  # jax-md: columns
    # atoms are not wrapped, so that the images in a neighbour list stay right
    _, shift = space.periodic_general(box, fractional_coordinates=True, wrapped=False)
    energies = Energies(energy, box, chosen, atoms, model.card.cutoff)

    mass, kT, dt = (
        jnp.asarray(atoms.get_masses(), jnp.float32),
        ase.units.kB * chosen.temperature,
        chosen.dt * ase.units.fs,
    )
    R = jnp.asarray(atoms.get_scaled_positions(), jnp.float32)
    rows, frames = {}, []

    def nvt(R):
        energy_fn = energies.start(R)
        return engine.observed(
            simulate.nvt_nose_hoover, energy_fn, shift, dt, kT, tau=50 * ase.units.fs
        )

    def nve(R):
        return engine.observed(simulate.nve, energies.start(R), shift, dt)

    state, _ = nvt(R)[0](jax.random.key(chosen.seed), R, mass=mass)
    state = stretch("NVT", nvt, state, chosen.nvt, chosen, calls, rows, frames, atoms, energies)
    init, _ = nve(state.position)
    state, _ = init(jax.random.key(1), state.position, kT=kT, mass=mass, momenta=state.momentum)
    beside = baselines(frames[-1], model, chosen)
    stretch("NVE", nve, state, chosen.nve, chosen, calls, rows, frames, atoms, energies, beside)
    return atoms, rows, frames


def stretch(name, ensemble, state, steps, chosen, calls, rows, frames, atoms, energies, beside=()):
    """Steps in jitted chunks; each step gives its potential energy and temperature at no further
    call of the model.

    `beside` are (name, steps, call) to be timed in turn with the chunks, so that all see the same
    machine."""

    @jax.jit
    def chunk(state):
        _, step = ensemble(state.position)

        def one(state, _):
            state, potential = step(state)
            kinetic = quantity.kinetic_energy(momentum=state.momentum, mass=state.mass)
            return state, (potential, kinetic)

        return jax.lax.scan(one, state, None, length=chosen.every)

    chunk = chunk.lower(state).compile()
    made, trace, times = (
        0,
        [],
        {label: [] for label in (name, *(label for label, *_ in beside))},
    )
    with tqdm(total=steps, desc=name, unit="step", file=sys.stdout) as bar:
        for _ in range(steps // chosen.every):
            began = time.perf_counter()
            start, before = state.position, calls.count
            with bridge.raising():
                state, seen = jax.block_until_ready(chunk(state))
            made += calls.count - before
            times[name].append((time.perf_counter() - began) / chosen.every)
            energies.check(start, state.position)
            for label, n, call in beside:
                began = time.perf_counter()
                call()
                times[label].append((time.perf_counter() - began) / n)
            trace.append(np.asarray(seen, np.float64))
            frames.append(frame(atoms, state, trace[-1][:, -1]))
            bar.update(chosen.every)
            bar.set_postfix(
                E=f"{trace[-1][0, -1]:.3f} eV", T=f"{frames[-1].info['temperature']:.0f} K"
            )
    potential, kinetic = np.concatenate(trace, 1)
    ms = {label: 1e3 * float(np.median(seen)) for label, seen in times.items()}
    rows[name] = dict(
        steps=steps,
        ms=ms,
        calls=made / steps,
        potential=potential,
        kinetic=kinetic,
    )
    return state


def frame(atoms, state, energies) -> ase.Atoms:
    """One frame for extxyz, as ASE has it: wrapped positions, velocities, energy, forces."""
    atoms = atoms.copy()
    atoms.set_scaled_positions(np.asarray(state.position, np.float64) % 1.0)
    atoms.set_momenta(np.asarray(state.momentum, np.float64))
    atoms.calc = SinglePointCalculator(
        atoms, energy=energies[0], forces=np.asarray(state.force, np.float64)
    )
    atoms.info["temperature"] = atoms.get_temperature()
    return atoms


def baselines(atoms, model, chosen):
    """(name, steps, call) of the same model without the bridge: SevenNet's own calculator under
    ASE, and bare torch."""
    from sevenn.calculator import SevenNetCalculator

    atoms = atoms.copy()
    atoms.calc = SevenNetCalculator("7net-0", device=str(chosen.device))
    dynamics = ase.md.verlet.VelocityVerlet(atoms, timestep=chosen.dt * ase.units.fs)
    there = lambda x: torch.tensor(x, device=chosen.device)
    fixed = {
        "atomic_numbers": there(atoms.numbers),
        "cell": there(atoms.cell.array.astype(np.float32))[None],
        "pbc": there([[True, True, True]]),
        "batch": there(np.zeros(len(atoms), np.int64)),
    }
    bare = lambda: model({"pos": there(atoms.positions.astype(np.float32)), **fixed})
    dynamics.run(1), bare()
    return [
        ("SevenNet in ASE, NVE", 2, lambda: dynamics.run(2)),
        ("SevenNet, bare torch", 2, lambda: (bare(), bare())),
    ]


def drift(row, chosen, n_atoms) -> float:
    """Slope of the total energy, meV/atom/ps, by least squares."""
    ps = 1e-3 * chosen.dt * np.arange(row["steps"])
    return 1e3 * np.polyfit(ps, row["potential"] + row["kinetic"], 1)[0] / n_atoms


def table(rows, chosen, n_atoms) -> str:
    lines = [
        f"{'':22}{'steps':>7}{'ms/step':>10}{'x bare torch':>14}{'torch calls/step':>18}{'drift meV/atom/ps':>19}"
    ]
    base = rows["NVE"]["ms"]["SevenNet, bare torch"]
    for name, row in rows.items():
        for label, ms in row["ms"].items():
            ours = label == name
            ratio = f"{ms / base:.2f}" if name == "NVE" else "-"  # timed in turn with the baselines
            calls, shown = (
                (
                    f"{row['calls']:.2f}",
                    f"{drift(row, chosen, n_atoms):.3f}" if name == "NVE" else "-",
                )
                if ours
                else ("-", "-")
            )
            lines.append(
                f"{f'jax-md {name}, jitted' if ours else label:22}{row['steps'] if ours else '-':>7}{ms:>10.1f}{ratio:>14}{calls:>18}{shown:>19}"
            )
    return "\n".join(lines)


def picture(rows, chosen, n_atoms, path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 1, sharex=True, figsize=(7, 5), layout="constrained")
    start = 0
    for name, row in rows.items():
        ps = 1e-3 * chosen.dt * (start + np.arange(row["steps"]))
        total = row["potential"] + row["kinetic"]
        axes[0].plot(ps, 1e3 * (total - total[-1]) / n_atoms, label=f"{name}: total")
        axes[0].plot(
            ps,
            1e3 * (row["potential"] - rows["NVT"]["potential"][0]) / n_atoms,
            lw=0.8,
            label=f"{name}: potential - first",
        )
        axes[1].plot(ps, 2 * row["kinetic"] / (3 * (n_atoms - 1)) / ase.units.kB, label=name)
        start += row["steps"]
    axes[1].axhline(chosen.temperature, color="grey", lw=0.8)
    axes[0].set(
        ylabel="energy (meV/atom)",
        title=f"{chosen.crystal}, {n_atoms} atoms: SevenNet-0 (torch) in jitted jax-md",
    )
    axes[1].set(ylabel="temperature (K)", xlabel="time (ps)")
    axes[0].legend(fontsize=8)
    axes[1].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main(argv=None) -> None:
    chosen = options(argv)
    # jax-md sums momenta in float64 if it can
    warnings.filterwarnings("ignore", message="Explicitly requested dtype float64")
    warnings.filterwarnings("ignore", message="No tensor product accelerator")  # sevenn, on a CPU
    chosen.out.mkdir(parents=True, exist_ok=True)
    atoms, rows, frames = run(chosen)
    trajectory, png = chosen.out / "md.extxyz", chosen.out / "md.png"
    ase.io.write(trajectory, frames)
    picture(rows, chosen, len(atoms), png)
    read = ase.io.read(trajectory, ":")
    print(f"\n{table(rows, chosen, len(atoms))}\n")
    print(
        f"trajectory  {trajectory}  ({len(read)} frames, read back by ASE; last energy "
        f"{read[-1].get_potential_energy():.4f} eV)\npicture     {png}"
    )


if __name__ == "__main__":
    main()
