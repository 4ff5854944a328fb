"""Some hundred alloys relaxed as one batch over several devices, and over several processes: a torch
potential in one jitted jax-md program, of which each device runs its part.

    make demo-distributed        or        python -m demos.distributed --help
    python -m demos.distributed --processes 2 --devices 2

The potential: Cleri and Rosato, Phys. Rev. B 48, 22 (1993), in torch (float64). Crystals of Cu3Au,
each with its atoms on other sites, strained and rattled; jax-md's FIRE moves atoms and cell. Ends
with a table of throughput for each number of devices and each lane, a PNG, and the relaxed crystals
as extxyz in demos/out. Ctrl-C stops it, --resume goes on, on any number of devices.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import ase.io
import jax
import jax.numpy as jnp
import numpy as np
import psutil
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import bridge
from demos import runs
from demos.alloy import AU, CUTOFF, Alloy, crystal
from demos.arguments import at_least, refuse_unless

SKIN = 0.4  # Angstrom: one list of edges serves the steps of a chunk
LANES = ("ffi", "host", "native")
MILLION = 10**6  # crystals, for which a cluster is reckoned


def options(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m demos.distributed", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--crystals", type=at_least(int, 1), default=128)
    parser.add_argument(
        "--repeat", type=at_least(int, 2, 6), default=2, help="cells along each axis (2: 32 atoms)"
    )
    parser.add_argument("--steps", type=at_least(int, 1), default=200, help="of FIRE")
    parser.add_argument(
        "--chunk", type=at_least(int, 1), default=10, help="steps with one list of edges"
    )
    parser.add_argument("--fmax", type=at_least(float, 1e-6), default=0.01, help="eV/Angstrom")
    parser.add_argument("--lane", choices=LANES, default="ffi", help="of the relaxation")
    parser.add_argument(
        "--devices", type=at_least(int, 1), nargs="+", default=[1, 2, 4],
        help="of a process; the relaxation takes the last of them",
    )  # fmt: skip
    parser.add_argument(
        "--timed", choices=LANES, nargs="*", default=["ffi", "native"], help="lanes in the table"
    )
    parser.add_argument("--processes", type=at_least(int, 1), default=1)
    parser.add_argument("--seed", type=at_least(int, 0), default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument("--out", type=Path, default=Path("demos/out"))
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args(argv)
    parts = [chosen.processes * n for n in chosen.devices]
    several = f"a multiple of {', '.join(map(str, parts))}"
    rules = (
        ("crystals", not any(chosen.crystals % n for n in parts), several),
        ("steps", chosen.steps % chosen.chunk == 0, f"a multiple of --chunk {chosen.chunk}"),
        ("out", chosen.out.is_dir() or not chosen.out.exists(), "a folder"),
    )
    refuse_unless(parser, chosen, rules)
    return chosen


def started(chosen) -> None:
    """JAX, with as many CPU devices as are asked for, where there are no others.

    Devices that jax_num_cpu_devices makes take turns (jax 0.10.2); these run at once."""
    jax.config.update("jax_enable_x64", True)
    count = f"--xla_force_host_platform_device_count={max(chosen.devices)}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}"
    if chosen.rank is not None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{chosen.port}", chosen.processes, chosen.rank)


def crystals(chosen) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions (B,N,3), cells (B,3,3) and the elements (N,), which are the same ones in all: each
    crystal has its atoms on other sites, strained and rattled."""
    rng = np.random.default_rng(chosen.seed)
    perfect = crystal(chosen.repeat)
    sites, n = perfect.positions, len(perfect)
    numbers = np.sort(perfect.numbers)
    cells = perfect.cell.array @ (np.eye(3) + 0.03 * rng.normal(size=(chosen.crystals, 3, 3)))
    order = np.array([rng.permutation(n) for _ in range(chosen.crystals)])
    scaled = sites[order] @ np.linalg.inv(perfect.cell.array)
    positions = scaled @ cells + 0.05 * rng.normal(size=(chosen.crystals, n, 3))
    return positions, cells, numbers


def mesh_of(n) -> Mesh:
    """The first n devices of each process."""
    mine = lambda process: [d for d in jax.devices() if d.process_index == process][:n]
    chosen = [d for process in range(jax.process_count()) for d in mine(process)]
    return Mesh(np.array(chosen), ("crystals",))


def placed(mesh, x):
    """An array over the devices, by its first axis."""
    there = NamedSharding(mesh, P("crystals") if np.ndim(x) else P())
    return jax.make_array_from_callback(np.shape(x), there, lambda part: np.asarray(x)[part])


class Relaxation:
    """FIRE on positions and strain of all crystals at once: the rows of x are atoms in the first
    cell, then N times the strain."""

    def __init__(self, numbers, lane, chosen):
        from jax_md import minimize  # which starts JAX

        self.n, self.chunk = len(numbers), chosen.chunk
        self.energy = bridge.potential(Alloy(), atomic_numbers=numbers, pbc=True, lane=lane)
        capacity = 150 * self.n
        self.find = bridge.edges(CUTOFF + SKIN, capacity)
        options = {"dt_start": 0.02, "dt_max": 0.1}
        self.init, self.move = minimize.fire_descent(
            self.forces, lambda x, dx, **_: x + dx, **options
        )

    def structure(self, x, home):
        strain = x[self.n :] / self.n
        deformed = jnp.eye(3) + (strain + strain.T) / 2
        return x[: self.n] @ deformed, home @ deformed

    def forces(self, x, home=None, edges=None, **_):
        total = lambda x: self.energy(*self.structure(x, home), **edges)
        return -jax.grad(total)(x)

    def edges(self, x, home):
        return self.find(*self.structure(x, home))

    def begin(self, positions, cells):
        x = jnp.concatenate([positions, jnp.zeros_like(cells)], 1)
        one = lambda x, home: self.init(x, home=home, edges=self.edges(x, home))
        return {"home": cells, "fire": jax.vmap(one)(x, cells)}

    def step(self, state):
        """A list of edges, and `chunk` steps with it."""
        home = state["home"]
        edges = jax.vmap(self.edges)(state["fire"].position, home)
        one = lambda fire, home, edges: self.move(fire, home=home, edges=edges)
        many = lambda _, fire: jax.vmap(one)(fire, home, edges)
        fire = jax.lax.fori_loop(0, self.chunk, many, state["fire"])
        energy = lambda x, home, edges: self.energy(*self.structure(x, home), **edges)
        return dict(home=home, fire=fire), jax.vmap(energy)(fire.position, home, edges) / self.n

    def observe(self, state, energies):
        largest = jnp.sqrt((state["fire"].force ** 2).sum(-1)).max(-1)
        return {"energy": energies, "fmax": largest}


def relaxed(chosen):
    """The relaxation itself, in chunks with a checkpoint after each: a runs.Run, atoms."""
    positions, cells, numbers = crystals(chosen)
    mesh = mesh_of(chosen.devices[-1])
    relaxation = Relaxation(numbers, chosen.lane, chosen)
    state = jax.jit(relaxation.begin)(placed(mesh, positions), placed(mesh, cells))
    # what belongs to all crystals lies on all devices
    state = jax.tree.map(lambda x: placed(mesh, runs._host(x)), state)
    rank = jax.process_index()
    path = chosen.out / ("distributed" if not rank else f"distributed-rank{rank}")
    done = runs.run(
        relaxation.step,
        state,
        chosen.steps // chosen.chunk,
        chunk=1,
        path=path,
        observe=relaxation.observe,
        settings={k: getattr(chosen, k) for k in ("crystals", "repeat", "chunk", "seed")},
        resume=chosen.resume,
        desc=None if rank else "lists of edges",
        shown=lambda last: {"fmax": f"{last['fmax'].max():.4f}"},
    )
    x = runs._host(done.state["fire"].position)
    structures = jax.vmap(relaxation.structure)(jnp.asarray(x), jnp.asarray(cells))
    atoms = [ase.Atoms(numbers, r, cell=h, pbc=True) for r, h in zip(*map(np.asarray, structures))]
    return done, atoms


def throughput(chosen) -> list[dict]:
    """Steps of crystals a second, for each lane and number of devices: best of three stretches."""
    positions, cells, numbers = crystals(chosen)
    rows, memory = [], psutil.Process().memory_info
    for lane in chosen.timed:
        for devices in sorted(set(chosen.devices)):
            mesh, before = mesh_of(devices), memory().rss
            relaxation = Relaxation(numbers, lane, chosen)
            state = jax.jit(relaxation.begin)(placed(mesh, positions), placed(mesh, cells))
            step, times = jax.jit(relaxation.step), []
            for _ in range(4):
                start = time.perf_counter()
                state, _ = jax.block_until_ready(step(state))
                times.append(time.perf_counter() - start)
            rate = chosen.crystals * chosen.chunk / min(times[1:])
            more = max(0, memory().rss - before) * chosen.processes / chosen.crystals
            rows.append(dict(lane=lane, devices=devices, rate=rate, memory=more))
            if not jax.process_index():
                print(f"timed  {lane:7} {devices} devices: {rate:.0f} steps of crystals a second")
    return rows


def table(rows, chosen, atoms) -> str:
    lines = [f"{'lane':8}{'devices':>9}{'steps of crystals/s':>22}{'to one device':>15}"]
    for row in rows:
        one = next(r["rate"] for r in rows if r["lane"] == row["lane"])
        count = chosen.processes * row["devices"]
        lines.append(f"{row['lane']:8}{count:>9}{row['rate']:>22.0f}{row['rate'] / one:>15.2f}")
    if rows:
        best = max(rows, key=lambda row: row["rate"] / row["devices"])
        each = best["rate"] / best["devices"] / chosen.processes
        hours = MILLION * chosen.steps / each / 3600
        most = max(row["memory"] for row in rows) / 1e6
        lines += [
            "",
            f"Reckoned, not seen: {MILLION:,} such crystals of {len(atoms)} atoms, {chosen.steps} "
            f"steps each, take {hours:,.0f} hours of one device of this kind ({best['lane']}, "
            f"{each:.0f} steps a second), {hours / 64:,.1f} hours of 64 if none waits for another, in batches of which each "
            f"crystal takes {most:.1f} MB at most.",
        ]
    return "\n".join(lines)


def picture(done, atoms, rows, chosen, path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    steps = chosen.chunk * (1 + np.arange(len(done.observables["energy"])))
    axes[0].plot(steps, 1e3 * (done.observables["energy"] - done.observables["energy"][-1]), lw=0.4)
    axes[0].set(xlabel="steps of FIRE", ylabel="energy above the end (meV/atom)", yscale="symlog")
    gold = [bonds_of_gold(a) for a in atoms]
    axes[1].plot(gold, done.observables["energy"][-1], ".", ms=4)
    axes[1].set(xlabel="Au-Au neighbours of an Au atom", ylabel="energy (eV/atom)")
    for lane in dict.fromkeys(row["lane"] for row in rows):
        points = [(r["devices"] * chosen.processes, r["rate"]) for r in rows if r["lane"] == lane]
        axes[2].plot(*zip(*points), "o-", label=lane)
    axes[2].set(xlabel="devices", ylabel="steps of crystals a second", ylim=(0, None))
    if rows:
        axes[2].legend()
        axes[2].set_xticks(sorted({r["devices"] * chosen.processes for r in rows}))
    figure.suptitle(
        f"{chosen.crystals} crystals of Cu3Au, {len(atoms[0])} atoms each: one batch over "
        f"{chosen.processes} process(es) of {chosen.devices[-1]} devices, Cleri-Rosato in torch"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def bonds_of_gold(atoms) -> float:
    """How many of the first neighbours of an Au atom are Au, on average."""
    from ase.neighborlist import neighbor_list

    i, j = neighbor_list("ij", atoms, 3.3)
    both = (atoms.numbers[i] == AU) & (atoms.numbers[j] == AU)
    return both.sum() / (atoms.numbers == AU).sum()


def work(chosen) -> int:
    """What each process does; the first one writes and prints."""
    started(chosen)
    chosen.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    first = not jax.process_index()
    if first:
        print(
            f"{chosen.crystals} crystals of Cu3Au, {4 * chosen.repeat**3} atoms each; "
            f"{jax.device_count()} devices of {chosen.processes} process(es), {os.cpu_count()} "
            f"cores; lane {chosen.lane}"
        )
    done, atoms = relaxed(chosen)
    if not done.finished:
        return 130
    rows = throughput(chosen)
    if not first:
        return 0
    largest = done.observables["fmax"][-1]
    path = chosen.out / "distributed"
    ase.io.write(path.with_suffix(".extxyz"), atoms)
    picture(done, atoms, rows, chosen, path.with_suffix(".png"))
    energies = done.observables["energy"][-1]
    print(
        f"\n{(largest < chosen.fmax).sum()} of {len(atoms)} crystals within {chosen.fmax:g} "
        f"eV/A after {chosen.steps} steps; {energies.min():.4f} to {energies.max():.4f} eV/atom\n"
    )
    print(f"{table(rows, chosen, atoms[0])}\n")
    for what, suffix in (("crystals", "extxyz"), ("picture", "png"), ("checkpoint", "ckpt.npz")):
        print(f"{what:12}{path}.{suffix}")
    print(f"{time.perf_counter() - began:.0f} seconds")
    return 0


def main(argv=None) -> int:
    chosen = options(argv)
    if chosen.processes == 1 or chosen.rank is not None:
        return work(chosen)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    again = [sys.executable, "-m", "demos.distributed", *(sys.argv[1:] if argv is None else argv)]
    ranks = range(chosen.processes)
    begin = lambda rank: subprocess.Popen([*again, f"--rank={rank}", f"--port={port}"])
    return max(abs(process.wait()) for process in [begin(rank) for rank in ranks])


if __name__ == "__main__":
    sys.exit(main())
