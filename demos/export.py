"""A whole simulation in a folder: SevenNet-0 in a jitted NVE loop, written by one process and run by
another one that never imports torch in Python.

    make demo-export        or        python -m demos.export --help

The first process exports the loop, runs it, and starts the second one, which loads the folder and
runs it too: the same trajectory. Ends with a table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import ase.build
import ase.units
import jax
import jax.numpy as jnp
import numpy as np
from ase.neighborlist import neighbor_list

import bridge.native
from demos.arguments import add_device, at_least, device, in_jax

A = 5.640  # Angstrom, NaCl
CUTOFF, SKIN = 5.0, 0.5  # Angstrom: of SevenNet-0; one list serves all steps of a call
FS = 2.0  # a step
STEPS = 10  # of one call


def options(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m demos.export", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--calls", type=at_least(int, 1), default=5, help=f"of {STEPS} steps each")
    parser.add_argument("--repeat", type=at_least(int, 1), default=2, help="cells along each axis")
    parser.add_argument("--out", type=Path, default=Path("demos/out"))
    parser.add_argument("--run", type=Path, help="run the program in this folder, and nothing else")
    add_device(parser)
    chosen = parser.parse_args(argv)
    if chosen.run:
        in_jax(jax.devices(chosen.device)[0])
    else:
        chosen.device = device(parser, chosen)
    return chosen


def crystal(repeat):
    """Atoms of a salt, with velocities of about 300 K that add up to zero."""
    atoms = ase.build.bulk("NaCl", "rocksalt", A, cubic=True) * repeat
    rng = np.random.default_rng(0)
    velocities = (
        rng.normal(size=(len(atoms), 3))
        * np.sqrt(2 * 300 * ase.units.kB / atoms.get_masses())[:, None]
    )
    atoms.set_velocities(velocities)
    atoms.set_momenta(atoms.get_momenta() - atoms.get_momenta().mean(0))
    return atoms


def neighbours(positions, cell, capacity=None):
    """Edges of the moment within cutoff and skin, in slots: (2,capacity) and (capacity,3)."""
    atoms = ase.Atoms(positions=np.asarray(positions, np.float64), cell=cell, pbc=True)
    i, j, shifts = neighbor_list("ijS", atoms, CUTOFF + SKIN)
    capacity = capacity or int(1.1 * len(i))
    if len(i) > capacity:
        raise RuntimeError(f"expected at most {capacity} edges, got {len(i)}; export it anew")
    index = np.full((2, capacity), len(atoms), np.int32)
    offsets = np.zeros((capacity, 3), np.int32)
    index[:, : len(i)] = i, j
    offsets[: len(i)] = shifts
    return index, offsets


def written(atoms, folder, device) -> None:
    """Exports STEPS steps of velocity Verlet, and saves them."""
    import torch

    from torch_side.models.sevennet import SevenNet

    torch.set_num_threads(1)  # what the package is compiled for: best for a small system
    energy = bridge.potential(
        SevenNet("7net-0").to(device), atomic_numbers=atoms.numbers, pbc=True, lane="native"
    )
    cell = jnp.asarray(atoms.cell.array, jnp.float32)
    mass = jnp.asarray(atoms.get_masses(), jnp.float32)[:, None]
    dt = FS * ase.units.fs

    @jax.jit
    def loop(positions, momenta, edge_index, cell_offsets):
        edges = {"edge_index": edge_index, "cell_offsets": cell_offsets}
        gradient = jax.value_and_grad(lambda r: energy(r, cell, **edges))

        def step(state, _):
            r, p, g = state
            p = p - 0.5 * dt * g
            r = r + dt * p / mass
            potential, g = gradient(r)
            p = p - 0.5 * dt * g
            return (r, p, g), potential + (p**2 / (2 * mass)).sum()

        start = positions, momenta, gradient(positions)[1]
        (r, p, _), total = jax.lax.scan(step, start, None, length=STEPS)
        return r, p, total

    index, offsets = neighbours(atoms.positions, atoms.cell.array)
    like = jnp.asarray(atoms.positions, jnp.float32)
    exported = bridge.native.export(loop, like, like, index, offsets)
    bridge.native.save(exported, folder)


def trajectory(loop, atoms, calls) -> tuple[np.ndarray, np.ndarray, float]:
    """Positions after each call, total energies of each step, and ms a step after the first
    call."""
    r = jnp.asarray(atoms.positions, jnp.float32)
    p = jnp.asarray(atoms.get_momenta(), jnp.float32)
    cell = atoms.cell.array
    capacity = loop.exported.in_avals[2].shape[1]
    positions, totals, times = [], [], []
    for _ in range(calls):
        began, start = time.perf_counter(), r
        r, p, total = jax.block_until_ready(loop(r, p, *neighbours(r, cell, capacity)))
        times.append(time.perf_counter() - began)
        if not float(jnp.linalg.norm(r - start, axis=-1).max()) < SKIN / 2:
            raise RuntimeError("expected atoms to move by less than half of the skin in one call")
        positions.append(np.asarray(r))
        totals.append(np.asarray(total))
    return np.array(positions), np.concatenate(totals), 1e3 * min(times[1:] or times) / STEPS


def run(folder, chosen) -> None:
    """What the second process does: JAX, jaxlib and torch's libraries are all it needs."""
    began = time.perf_counter()
    loop = bridge.native.load(folder / "program", trust=True)
    loaded = time.perf_counter() - began
    positions, totals, ms = trajectory(loop, crystal(chosen.repeat), chosen.calls)
    np.savez(folder / "second.npz", positions=positions, totals=totals)
    print(json.dumps({"ms": ms, "load": loaded, "torch": "torch" in sys.modules}))


def main(argv=None) -> None:
    chosen = options(argv)
    if chosen.run:
        run(chosen.run, chosen)
        return
    folder = chosen.out / time.strftime("export-%Y%m%d-%H%M%S")
    folder.mkdir(parents=True)
    atoms = crystal(chosen.repeat)
    began = time.perf_counter()
    written(atoms, folder / "program", chosen.device)
    seconds = time.perf_counter() - began
    positions, totals, ms = trajectory(
        bridge.native.load(folder / "program", trust=True), atoms, chosen.calls
    )
    arguments = {"calls": chosen.calls, "repeat": chosen.repeat, "device": chosen.device.type}
    command = [sys.executable, "-m", "demos.export", "--run", str(folder)]
    command += [f"--{name}={value}" for name, value in arguments.items()]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    second = json.loads(output.splitlines()[-1])
    saved = np.load(folder / "second.npz")
    apart = float(np.abs(saved["positions"] - positions).max())
    size = sum(f.stat().st_size for f in (folder / "program").rglob("*") if f.is_file()) / 1e6
    print(
        f"\nNaCl, {len(atoms)} atoms, {chosen.calls * STEPS} steps of {FS:g} fs, one thread; "
        f"jax {jax.__version__}\n"
    )
    print(f"{'':34}{'first process':>16}{'second process':>16}")
    print(f"{'exported and compiled, s':34}{seconds:>16.1f}{'-':>16}")
    print(f"{'loaded, s':34}{'-':>16}{second['load']:>16.1f}")
    print(f"{'ms/step':34}{ms:>16.1f}{second['ms']:>16.1f}")
    print(f"{'torch imported in Python':34}{'yes':>16}{'yes' if second['torch'] else 'no':>16}")
    print(f"{'last total energy, eV':34}{totals[-1]:>16.5f}{saved['totals'][-1]:>16.5f}")
    print(f"{'positions apart, at most, Angstrom':34}{'':>16}{apart:>16.2g}")
    drift = 1e3 * float(np.ptp(totals)) / len(atoms)
    print(
        f"\nprogram  {folder / 'program'}  ({size:.0f} MB); total energy within {drift:.2f} meV/atom"
    )
    if apart > 1e-5 or second["torch"]:
        raise SystemExit("expected the same trajectory from a process without Python's torch")


if __name__ == "__main__":
    main()
