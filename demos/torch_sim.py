"""One JAX potential of copper in two engines: torch-sim, through the bridge, and jax-md. The same
start, the same trajectory?

    make demo-torch-sim        or        python -m demos.torch_sim --help

The potential is jax-md's embedded-atom energy with Cleri and Rosato's second-moment parameters
(Phys. Rev. B 48, 22 (1993)), in float64. Both engines run NVE by velocity Verlet from the same
positions and momenta. Ends with a table and a PNG in demos/out.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import ase.build
import ase.units
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch_sim as ts
from jax_md import energy, quantity, simulate, space
from torch_sim.integrators import MDState
from tqdm import tqdm

import bridge
from demos.arguments import add_device, at_least, device
from jax_side.engines import jax_md as jax_engine
from torch_side.engines import torch_sim as torch_engine

LATTICE = 3.615  # Angstrom, copper at room temperature (experiment)
COHESIVE = -3.49  # eV per atom (experiment)
A, XI, P, Q, R0 = 0.0855, 1.224, 10.960, 2.278, 3.615 / 2**0.5  # copper: eV, eV, -, -, Angstrom
# Angstrom, behind the fifth neighbours to which the parameters were fitted
ONSET, CUTOFF = (
    5.8,
    6.2,
)


def options(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m demos.torch_sim", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--repeat",
        type=at_least(int, 4, 10),
        default=4,
        help="conventional cells along each axis (4: 256 atoms)",
    )
    parser.add_argument(
        "--temperature",
        type=at_least(float, 1.0),
        default=300.0,
        help="K, after it starts in its perfect lattice with twice that",
    )
    parser.add_argument("--dt", type=at_least(float, 0.01, 10.0), default=2.0, help="fs")
    parser.add_argument(
        "--steps", type=at_least(int, 2), default=3000, help="steps of NVE in each engine"
    )
    parser.add_argument(
        "--every", type=at_least(int, 1), default=20, help="steps between comparisons"
    )
    parser.add_argument("--seed", type=at_least(int, 0), default=0)
    parser.add_argument("--out", type=Path, default=Path("demos/out"))
    add_device(parser)
    chosen = parser.parse_args(argv)
    chosen.device = device(parser, chosen)
    if chosen.steps % chosen.every or chosen.steps == chosen.every:
        parser.error(
            f"argument --steps: expected a multiple of --every {chosen.every}, twice it or more, "
            f"got {chosen.steps}; change one of them"
        )
    if chosen.out.exists() and not chosen.out.is_dir():
        parser.error(f"argument --out: expected a folder, got the file {chosen.out}; name another")
    return chosen


def copper_energy(displacement):
    """jax-md's energy_fn(R, box=...): E = sum_i [sum_j A exp(-p (r/r0 - 1)) - sqrt(sum_j xi^2
    exp(-2 q (r/r0 - 1)))], in eV."""

    def switched(r, size, decay):
        x = jnp.clip((r - ONSET) / (CUTOFF - ONSET), 0.0, 1.0)
        smooth = 1 - x**3 * (10 - 15 * x + 6 * x**2)  # two continuous derivatives
        return jnp.where(r > 0, size * jnp.exp(-decay * (r / R0 - 1)) * smooth, 0.0)

    return energy.eam(
        displacement,
        lambda r: switched(r, XI**2, 2 * Q),
        lambda rho: -jnp.sqrt(rho),
        lambda r: switched(r, 2 * A, P),
    )


def start(chosen) -> ase.Atoms:
    """The crystal at rest in its lattice, momenta drawn once for both engines: of twice the
    temperature, for half of it goes into phonons."""
    atoms = ase.build.bulk("Cu", "fcc", a=LATTICE, cubic=True).repeat(chosen.repeat)
    spread = np.sqrt(atoms.get_masses() * ase.units.kB * 2 * chosen.temperature)
    momenta = np.random.default_rng(chosen.seed).normal(size=(len(atoms), 3)) * spread[:, None]
    atoms.set_momenta(momenta - momenta.mean(0))
    return atoms


class InTorchSim:
    """The potential through the bridge, in torch-sim's nve."""

    def __init__(self, atoms, energy_fn, dt, device):
        # The whole of the bridge: a jax-md energy as a torch-sim model.
        potential = bridge.torch_potential(
            jax_engine.model(energy_fn, cutoff=CUTOFF), gradients="autodiff"
        )
        self.model = torch_engine.model(
            potential, dtype=torch.float64, compute_stress=False, device=device
        )
        there = lambda x: torch.tensor(x, dtype=torch.float64, device=device)
        init, self.step = torch_engine.integrator("nve", self.model, dt=there(dt), kT=there(0.0))
        state = ts.io.atoms_to_state([atoms], self.model.device, self.model.dtype)
        state.masses = there(atoms.get_masses())
        blank = {
            "energy": there([0.0]),
            "forces": torch.zeros_like(state.positions),
        }
        self.state = init(MDState(**vars(state), momenta=there(atoms.get_momenta()), **blank))

    def run(self, steps):
        for _ in range(steps):
            self.state = self.step(self.state)

    def seen(self):
        """Positions in Angstrom, potential and kinetic energy in eV."""
        s = self.state
        return (
            s.positions.cpu().numpy().copy(),
            float(s.energy),
            float(ts.calc_kinetic_energy(momenta=s.momenta, masses=s.masses)),
        )


class InJaxMD:
    """The same energy in jax-md's own nve, jitted; `dt` must be a float32 number, for jax-md rounds
    it to one."""

    def __init__(self, atoms, energy_fn, dt, every):
        self.box = jnp.asarray(atoms.cell.array.T)
        shift = space.periodic_general(self.box, fractional_coordinates=True)[1]
        init, step = jax_engine.observed(
            simulate.nve, lambda R, **kwargs: energy_fn(R, box=self.box), shift, dt
        )
        momenta, mass = jnp.asarray(atoms.get_momenta()), jnp.asarray(atoms.get_masses())
        R = jnp.asarray(atoms.get_scaled_positions())
        self.state, self.potential = init(jax.random.key(0), R, kT=0.0, mass=mass, momenta=momenta)
        many = lambda state: jax.lax.fori_loop(0, every - 1, lambda _, s: step(s)[0], state)
        self.chunk = jax.jit(lambda state: step(many(state))).lower(self.state).compile()

    def run(self, steps):
        self.state, self.potential = jax.block_until_ready(self.chunk(self.state))

    def seen(self):
        s = self.state
        return (
            np.asarray(s.position) @ np.asarray(self.box).T,
            float(self.potential),
            float(quantity.kinetic_energy(momentum=s.momentum, mass=s.mass)),
        )


def run(chosen):
    """Both engines in turn, a stretch of `every` steps each: {name: dict of what was seen}."""
    atoms = start(chosen)
    displacement, _ = space.periodic_general(
        jnp.asarray(atoms.cell.array.T), fractional_coordinates=True
    )
    energy_fn, dt = copper_energy(displacement), float(np.float32(chosen.dt * ase.units.fs))
    engines = {
        "torch-sim, JAX by bridge": InTorchSim(atoms, energy_fn, dt, chosen.device),
        "jax-md, jitted": InJaxMD(atoms, energy_fn, dt, chosen.every),
    }
    rows = {name: dict(positions=[], potential=[], kinetic=[], ms=[]) for name in engines}

    def look():
        for name, engine in engines.items():
            for key, value in zip(("positions", "potential", "kinetic"), engine.seen()):
                rows[name][key].append(value)

    look()
    print(
        f"copper, {len(atoms)} atoms, {chosen.temperature:g} K, {chosen.dt:g} fs a step; jax "
        f"{jax.__version__}, torch {torch.__version__}, float64"
    )
    with tqdm(total=chosen.steps, desc="NVE in both", unit="step", file=sys.stdout) as bar:
        for _ in range(chosen.steps // chosen.every):
            for name, engine in engines.items():
                began = time.perf_counter()
                engine.run(chosen.every)
                rows[name]["ms"].append(1e3 * (time.perf_counter() - began) / chosen.every)
            look()
            bar.update(chosen.every)
            bar.set_postfix(apart=f"{apart(rows, atoms)[-1]:.1e} A")
    return atoms, rows


def apart(rows, atoms):
    """The largest distance of an atom to itself in the other engine, minimum image, at each
    comparison: Angstrom."""
    ours, theirs = (np.array(row["positions"]) for row in rows.values())
    s = (ours - theirs) @ np.linalg.inv(atoms.cell.array)
    return np.linalg.norm((s - np.round(s)) @ atoms.cell.array, axis=-1).max(-1)


def moved(row, atoms):
    """Root of the mean squared displacement from the start, to compare with: Angstrom."""
    s = (np.array(row["positions"]) - row["positions"][0]) @ np.linalg.inv(atoms.cell.array)
    return np.sqrt((((s - np.round(s)) @ atoms.cell.array) ** 2).sum(-1).mean(-1))


def table(rows, atoms, chosen) -> str:
    lines = [
        f"{'':26}{'steps':>7}{'ms/step':>9}{'E0 eV/atom':>13}{'E total, last':>20}{'drift meV/atom/ps':>20}{'T last K':>10}"
    ]
    ps = 1e-3 * chosen.dt * chosen.every * np.arange(len(rows["jax-md, jitted"]["potential"]))
    for name, row in rows.items():
        total = np.array(row["potential"]) + row["kinetic"]
        drift = 1e3 * np.polyfit(ps, total, 1)[0] / len(atoms)
        kelvin = 2 * row["kinetic"][-1] / (3 * (len(atoms) - 1)) / ase.units.kB
        numbers = f"{np.median(row['ms']):>9.2f}{row['potential'][0] / len(atoms):>13.4f}{total[-1]:>20.9f}{drift:>20.5f}{kelvin:>10.1f}"
        lines.append(f"{name:26}{chosen.steps:>7}{numbers}")
    far, energies = (
        apart(rows, atoms),
        [np.array(row["potential"]) + row["kinetic"] for row in rows.values()],
    )
    marks = sorted({len(far) // 10, len(far) // 2, len(far) - 1} - {0})
    lines += [
        "",
        "the two trajectories apart, largest of all atoms (Angstrom): "
        + ", ".join(f"{far[n]:.1e} after {ps[n]:.2f} ps" for n in marks),
    ]
    lines += [f"total energies apart, largest: {np.abs(energies[0] - energies[1]).max():.1e} eV"]
    lines += [
        f"the atoms moved by {moved(rows['jax-md, jitted'], atoms)[-1]:.2f} Angstrom (rms) from "
        "their sites"
    ]
    lines += [
        f"cohesive energy {rows['jax-md, jitted']['potential'][0] / len(atoms):.3f} eV/atom at a = "
        f"{LATTICE} Angstrom (experiment {COHESIVE})"
    ]
    return "\n".join(lines)


def picture(rows, atoms, chosen, path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3, 1, sharex=True, figsize=(7, 7), layout="constrained")
    ps = 1e-3 * chosen.dt * chosen.every * np.arange(len(rows["jax-md, jitted"]["potential"]))
    for (name, row), style in zip(rows.items(), ("-", "--")):
        total = np.array(row["potential"]) + row["kinetic"]
        axes[0].plot(
            ps,
            2 * np.array(row["kinetic"]) / (3 * (len(atoms) - 1)) / ase.units.kB,
            style,
            label=name,
        )
        axes[1].plot(ps, 1e3 * (total - total[0]) / len(atoms), style, label=name)
    axes[2].semilogy(
        ps[1:],
        np.maximum(apart(rows, atoms)[1:], 1e-16),
        label="same atom in the two engines, largest distance",
    )
    axes[2].semilogy(
        ps[1:],
        moved(rows["jax-md, jitted"], atoms)[1:],
        color="grey",
        label="moved since the start (rms)",
    )
    axes[0].set(
        ylabel="temperature (K)",
        title=f"Cu, {len(atoms)} atoms: one JAX potential (Cleri-Rosato) in torch-sim and in jax-md",
    )
    axes[1].set(ylabel="total energy (meV/atom)")
    axes[2].set(ylabel="Angstrom", xlabel="time (ps)")
    for axis in axes:
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main(argv=None) -> None:
    chosen = options(argv)
    chosen.out.mkdir(parents=True, exist_ok=True)
    with jax.enable_x64(True):
        atoms, rows = run(chosen)
    png = chosen.out / "torch_sim.png"
    picture(rows, atoms, chosen, png)
    print(f"\n{table(rows, atoms, chosen)}\n\npicture     {png}")


if __name__ == "__main__":
    main()
