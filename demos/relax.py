"""A strained, rattled crystal relaxed with its cell by SevenNet-0 inside jitted jax-md, beside ASE
on SevenNet's own calculator.

    make demo-relax        or        python -m demos.relax --help

Ends with a table of lattice constants, energies and residual stresses, and a PNG of the
relaxations, in demos/out.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import ase.build
import ase.units
import jax
import jax.numpy as jnp
import numpy as np
import torch
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS
from jax_md import minimize
from tqdm import tqdm

import bridge
from demos.arguments import add_device, at_least, device
from demos.md import CRYSTALS
from torch_side.engines import ase as ase_engine
from torch_side.models.sevennet import SevenNet


def options(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m demos.relax", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--crystal", choices=CRYSTALS, default="MgO")
    parser.add_argument(
        "--repeat",
        type=at_least(int, 1),
        default=1,
        help="conventional cells along each axis (1: 8 atoms of MgO)",
    )
    parser.add_argument(
        "--strain",
        type=at_least(float, 0.0, 0.1),
        default=0.03,
        help="random strain of the cell at the start (standard deviation)",
    )
    parser.add_argument(
        "--rattle",
        type=at_least(float, 0.0, 0.3),
        default=0.05,
        help="random displacements at the start, Angstrom",
    )
    parser.add_argument(
        "--fmax",
        type=at_least(float, 5e-4),
        default=1e-3,
        help="largest force at the end, eV/Angstrom, that on the cell included",
    )
    parser.add_argument("--steps", type=at_least(int, 1), default=400, help="at most")
    parser.add_argument("--seed", type=at_least(int, 0), default=0)
    parser.add_argument("--out", type=Path, default=Path("demos/out"))
    add_device(parser)
    chosen = parser.parse_args(argv)
    chosen.device = device(parser, chosen)
    if chosen.out.exists() and not chosen.out.is_dir():
        parser.error(f"argument --out: expected a folder, got the file {chosen.out}; name another")
    return chosen


def start(chosen) -> ase.Atoms:
    """The crystal, out of equilibrium in all that a relaxation can change."""
    atoms = ase.build.bulk(chosen.crystal, cubic=True, **CRYSTALS[chosen.crystal]).repeat(
        chosen.repeat
    )
    strain = chosen.strain * np.random.default_rng(chosen.seed).normal(size=(3, 3))
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + (strain + strain.T) / 2), scale_atoms=True)
    atoms.rattle(chosen.rattle, seed=chosen.seed)
    return atoms


class Counted(torch.nn.Module):
    """A model, how often it was called, and who looks at each call."""

    def __init__(self, model, look=lambda inputs, out: None):
        super().__init__()
        self.model, self.calls, self.look = model, 0, look

    def forward(self, inputs):
        self.calls += 1
        out = self.model(inputs)
        self.look(inputs, out)
        return out


@dataclass
class Relaxation:
    """What one relaxation went through, and where it ended."""

    energies: list = field(default_factory=list)
    volumes: list = field(default_factory=list)
    atoms: ase.Atoms | None = None
    calls: int = 0
    seconds: float = 0.0
    converged: bool = False

    def see(self, energy, cell, bar):
        self.energies.append(float(energy))
        self.volumes.append(abs(np.linalg.det(np.asarray(cell, np.float64))))
        bar.update()
        bar.set_postfix(E=f"{self.energies[-1]:.5f} eV")


def in_jax(atoms, model, chosen) -> Relaxation:
    """jax-md's FIRE on positions and cell at once, one XLA program from start to end.

    The rows of x are the atoms' positions in the first cell, then N times the strain, as in ASE's
    filters."""
    found, n, home = Relaxation(), len(atoms), jnp.asarray(atoms.cell.array, jnp.float32)
    bar = tqdm(total=chosen.steps, desc="jax-md FIRE, jitted", unit="call", file=sys.stdout)
    model = Counted(model, lambda inputs, out: found.see(out["energy"], inputs["cell"][0], bar))
    energy = bridge.potential(model, atomic_numbers=atoms.numbers, pbc=True)

    def structure(x):
        deformed = jnp.eye(3, dtype=x.dtype) + (x[n:] + x[n:].T) / (2 * n)
        return x[:n] @ deformed, home @ deformed

    largest = lambda state: jnp.sqrt((state.force**2).sum(-1)).max()
    init, step = minimize.fire_descent(
        lambda x, **_: energy(*structure(x)), lambda x, dx, **_: x + dx, dt_start=0.1, dt_max=0.25
    )

    @jax.jit
    def relaxed(x):
        on = lambda carry: (largest(carry[0]) > chosen.fmax) & (carry[1] < chosen.steps)
        state, _ = jax.lax.while_loop(
            on, lambda carry: (step(carry[0]), carry[1] + 1), (init(x), 1)
        )
        return *structure(state.position), largest(state) <= chosen.fmax

    x = jnp.concatenate([jnp.asarray(atoms.positions, jnp.float32), jnp.zeros((3, 3), jnp.float32)])
    program, began = relaxed.lower(x).compile(), time.perf_counter()
    with bar, bridge.raising():
        positions, cell, found.converged = jax.device_get(program(x))
    found.seconds, found.calls = time.perf_counter() - began, model.calls
    found.atoms = ase.Atoms(atoms.numbers, positions, cell=cell, pbc=True)
    return found


def in_ase(atoms, calculator, counted, chosen, name) -> Relaxation:
    """BFGS on FrechetCellFilter, which is what one would do in ASE."""
    found, atoms, before = Relaxation(atoms=atoms.copy()), None, counted.calls
    found.atoms.calc = calculator
    relaxing = BFGS(FrechetCellFilter(found.atoms), logfile=None)
    with tqdm(total=chosen.steps, desc=name, unit="call", file=sys.stdout) as bar:
        relaxing.attach(
            lambda: found.see(found.atoms.get_potential_energy(), found.atoms.cell.array, bar)
        )
        began = time.perf_counter()
        found.converged = bool(relaxing.run(fmax=chosen.fmax, steps=chosen.steps))
    found.seconds, found.calls = time.perf_counter() - began, counted.calls - before
    return found


def run(chosen) -> dict:
    from sevenn.calculator import SevenNetCalculator

    atoms, model = start(chosen), SevenNet("7net-0").to(chosen.device)
    print(
        f"{chosen.crystal}, {len(atoms)} atoms, cell {np.round(atoms.cell.cellpar(), 3).tolist()}; "
        f"jax {jax.__version__}, torch {torch.__version__}"
    )
    own = SevenNetCalculator("7net-0", device=str(chosen.device))
    ours = ase_engine.calculator(model)
    own.model, ours.evaluate = Counted(own.model), Counted(ours.evaluate)
    # the first call of torch is slow
    (
        own.get_potential_energy(atoms),
        ours.get_potential_energy(atoms),
        own.reset(),
        ours.reset(),
    )
    rows = {"jax-md FIRE, jitted": in_jax(atoms, model, chosen)}
    rows["ASE BFGS, our calculator"] = in_ase(
        atoms, ours, ours.evaluate, chosen, "ASE BFGS, our calculator"
    )
    rows["ASE BFGS, SevenNet's own"] = in_ase(
        atoms, own, own.model, chosen, "ASE BFGS, SevenNet's own"
    )
    for row in rows.values():  # all by the same judge
        row.atoms.calc = own
        row.energy, row.stress, row.force = (
            row.atoms.get_potential_energy(),
            row.atoms.get_stress(),
            row.atoms.get_forces(),
        )
    return rows


def lattice(row, chosen):
    """Lengths of the conventional cell in Angstrom, angles in degrees."""
    lengths, angles = np.split(row.atoms.cell.cellpar(), 2)
    return lengths / chosen.repeat, angles


def table(rows, chosen) -> str:
    columns = {
        "a": 9,
        "b": 9,
        "c (A)": 9,
        "angles": 16,
        "eV/atom": 11,
        "max|stress| GPa": 17,
        "max|f| eV/A": 13,
        "torch calls": 13,
        "s": 7,
    }
    lines = [" " * 26 + "".join(f"{name:>{width}}" for name, width in columns.items())]
    for name, row in rows.items():
        lengths, angles = lattice(row, chosen)
        cell = (
            "".join(f"{x:9.4f}" for x in lengths)
            + f"{f'{angles.min():.2f}-{angles.max():.2f}':>16}"
        )
        stress, force = (
            abs(row.stress).max() / ase.units.GPa,
            np.linalg.norm(row.force, axis=1).max(),
        )
        costs = f"{row.calls:>13}{row.seconds:>7.1f}{'' if row.converged else '  not converged'}"
        lines.append(
            f"{name:26}{cell}{row.energy / len(row.atoms):>11.5f}{stress:>17.4f}{force:>13.5f}{costs}"
        )
    *others, own = rows
    apart = {
        name: abs(lattice(rows[name], chosen)[0] - lattice(rows[own], chosen)[0]).max()
        for name in others
    }
    return "\n".join(
        [
            *lines,
            *(
                f"{name}: lattice constants within {x:.1e} A of SevenNet's own"
                for name, x in apart.items()
            ),
        ]
    )


def picture(rows, chosen, path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 1, sharex=True, figsize=(7, 6), layout="constrained")
    lowest = min(min(row.energies) for row in rows.values())
    for (name, row), style in zip(rows.items(), ("-", "-", "--")):
        n = len(row.atoms)
        axes[0].semilogy(
            np.maximum(1e3 * (np.array(row.energies) - lowest) / n, 1e-4), style, label=name
        )
        axes[1].plot((np.array(row.volumes) / chosen.repeat**3) ** (1 / 3), style, label=name)
    axes[0].set(
        ylabel="energy - lowest (meV/atom)",
        title=f"{chosen.crystal}, {n} atoms: SevenNet-0 (torch) relaxed with its cell",
    )
    axes[1].set(ylabel="cube root of the cell's volume (A)", xlabel="evaluations of the model")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv=None) -> dict:
    chosen = options(argv)
    warnings.filterwarnings("ignore", message="No tensor product accelerator")  # sevenn, on a CPU
    # jax-md, without x64
    warnings.filterwarnings("ignore", message="Explicitly requested dtype float64")
    chosen.out.mkdir(parents=True, exist_ok=True)
    rows = run(chosen)
    png = chosen.out / "relax.png"
    picture(rows, chosen, png)
    print(f"\n{table(rows, chosen)}\n\npicture     {png}")
    return rows


if __name__ == "__main__":
    main()
