"""Thermal conductivity of solid argon by Green and Kubo: a Lennard-Jones potential written in JAX,
and the same in torch, in jitted jax-md runs that see the heat flux.

    make demo-conductivity        or        python -m demos.conductivity --help

The system is the example of LAMMPS's documentation of `compute heat/flux` (docs.lammps.org): 256
atoms of fcc argon at 70 K, a = 5.376 Angstrom, for which it says 0.29 W/m/K. Several runs from other
velocities give the spread. Ends with a table and a PNG in demos/out.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import NamedTuple

import ase.build
import ase.units
import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax_md import simulate, space
from tqdm import tqdm

import bridge
from bridge.card import Card
from bridge.contract import ENERGY_AND_GRADIENTS
from demos.arguments import at_least
from jax_side.potentials.potential import potential
from jax_side.potentials.strain import with_gradients
from jax_side.properties import heat
from torch_side.potentials.geometry import edge_vectors

EPSILON, SIGMA = 0.2381 * ase.units.kcal / ase.units.mol, 3.405  # eV, Angstrom
LATTICE, MASS, PUBLISHED = 5.376, 39.948, 0.29  # Angstrom, amu, W/m/K
SKIN = 1.0  # Angstrom, for the steps between two fluxes
POTENTIALS = ("jax", "torch")
OUTPUTS = ("node_energies", "node_virials")


def options(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m demos.conductivity", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    add("--potentials", nargs="+", choices=POTENTIALS, default=list(POTENTIALS))
    add("--repeat", type=at_least(int, 3, 10), default=4, help="cells of 4 atoms along each axis")
    add("--temperature", type=at_least(float, 1.0, 85.0), default=70.0, help="K")
    add("--cutoff", type=at_least(float, 5.0, 20.0), default=8.5, help="Angstrom")
    add("--seeds", type=at_least(int, 2), default=4, help="runs from other velocities")
    add("--ps", type=at_least(float, 0.1), default=200.0, help="of each run, after 16 ps of NVT")
    add("--dt", type=at_least(float, 0.1, 8.0), default=4.0, help="fs")
    add("--every", type=at_least(int, 1, 50), default=10, help="steps between two fluxes")
    add("--lag", type=at_least(float, 0.01), default=8.0, help="ps, where the integral is read")
    add(
        "--lane", choices=("ffi", "host", "native"), default="native", help="of the torch potential"
    )
    add("--seed", type=at_least(int, 0), default=0)
    add("--out", type=Path, default=Path("demos/out"))
    chosen = parser.parse_args(argv)
    if chosen.lag > chosen.ps / 2:
        parser.error(
            f"argument --lag: expected at most half of --ps {chosen.ps:g}, got {chosen.lag:g}; "
            "change one of them"
        )
    if chosen.out.exists() and not chosen.out.is_dir():
        parser.error(f"argument --out: expected a folder, got the file {chosen.out}; name another")
    return chosen


def lennard_jones(r, cutoff):
    """Half of a pair's energy, in eV, zero at the cutoff; of JAX or torch."""
    well = lambda s6: 4 * EPSILON * (s6 * s6 - s6)
    return 0.5 * (well((SIGMA / r) ** 6) - well((SIGMA / cutoff) ** 6))


def in_torch(cutoff):
    def model(x):
        each = lennard_jones(torch.linalg.vector_norm(edge_vectors(x), dim=-1), cutoff)
        nodes = each.new_zeros(len(x["pos"])).index_add(0, x["edge_index"][0].long(), each)
        energy = each.new_zeros(len(x["cell"])).index_add(0, x["batch"].long(), nodes)
        return {"energy": energy, "node_energies": nodes}

    return model


def in_jax(cutoff):
    def model(x):
        i, j = x["edge_index"]
        pos, n_atoms = x["pos"], len(x["pos"])
        vectors = pos[j] - pos[i] + x["cell_offsets"].astype(pos.dtype) @ x["cell"][0]
        r2 = (vectors**2).sum(-1)
        near = (i < n_atoms) & (r2 < cutoff**2)
        r = jnp.sqrt(jnp.where(near, r2, cutoff**2))
        each = jnp.where(near, lennard_jones(r, cutoff), 0)
        nodes = jax.ops.segment_sum(each, i, n_atoms)
        return {"energy": nodes.sum()[None], "node_energies": nodes}

    return model


def energies(which, atoms, chosen):
    """The potential for dynamics, and the same with what a heat flux needs."""
    card = Card(
        outputs={*ENERGY_AND_GRADIENTS, *OUTPUTS},
        cutoff=chosen.cutoff,
        neighbor_list="given",
        receptive_field=chosen.cutoff,
        batches=True,
    )
    bound = dict(atomic_numbers=atoms.numbers)
    if which == "torch":
        bound |= dict(card=card, gradients="autograd", lane=chosen.lane)
        model = in_torch(chosen.cutoff)
        return bridge.potential(model, **bound), bridge.potential(model, outputs=OUTPUTS, **bound)
    model = in_jax(chosen.cutoff)
    seen = with_gradients(model, node_virials=True)
    return (
        potential(with_gradients(model), card=card, **bound),
        potential(seen, card=card.asking(*OUTPUTS), **bound),
    )


class Result(NamedTuple):
    """What the runs of one potential gave.

    kappa     running integrals (seeds, lags) in W/m/K, the mean over the axes
    kelvin    mean temperature of each run
    drift     largest change of the total energy, eV an atom
    seconds   of all runs"""

    kappa: np.ndarray
    kelvin: np.ndarray
    drift: float
    seconds: float


def runs(which, atoms, chosen) -> Result:
    """NVT, then NVE with a flux after each `every` steps, from as many velocities as there are
    seeds."""
    dynamics, seen = energies(which, atoms, chosen)
    cell, masses = jnp.asarray(atoms.cell.array), jnp.full(len(atoms), MASS)
    kT, dt = ase.units.kB * chosen.temperature, chosen.dt * ase.units.fs
    per_atom = 4 / 3 * np.pi * (chosen.cutoff + SKIN) ** 3 * 4 / LATTICE**3
    find = bridge.edges(chosen.cutoff + SKIN, int(1.15 * per_atom * len(atoms)))
    _, shift = space.free()  # positions that are never wrapped: the potential has the cell
    energy = lambda R, edges, **_: dynamics(R, cell, **edges)
    warm, heated = simulate.nvt_nose_hoover(energy, shift, dt, kT, tau=100 * ase.units.fs)
    _, kept = simulate.nve(energy, shift, dt)

    def block(step):
        """`every` steps with the neighbours of their start, and what is seen at their end."""

        @jax.jit
        def walk(state, _):
            edges = find(state.position, cell)
            start = state.position
            state = jax.lax.fori_loop(0, chosen.every, lambda _, s: step(s, edges=edges), state)
            moved = jnp.linalg.norm(state.position - start, axis=-1).max()
            found = heat.by_virials(seen, state.position, cell, state.velocity, masses, **edges)
            kinetic = (masses * (state.velocity**2).sum(-1)).sum() / 2
            total = kinetic + dynamics(state.position, cell, **edges)
            flux = jnp.where(moved < SKIN / 2, found.virial, jnp.nan)
            return state, (flux, kinetic, total)

        return jax.jit(lambda state, n: jax.lax.scan(walk, state, None, n), static_argnums=1)

    count = lambda ps: max(2, round(1000 * ps / chosen.dt / chosen.every))
    heating, running = block(heated), block(kept)
    lags, kappa, kelvin, drift, began = count(chosen.lag), [], [], 0.0, time.perf_counter()
    for k in tqdm(range(chosen.seeds), desc=f"argon, {which}", disable=None):
        key = jax.random.PRNGKey(chosen.seed + k)
        R = jnp.asarray(atoms.positions)
        state = warm(key, R, mass=MASS, edges=find(R, cell))
        state, _ = heating(state, count(min(16.0, chosen.ps)))
        start = simulate.NVEState(state.position, state.momentum, state.force, state.mass)
        _, (fluxes, kinetic, total) = running(start, count(chosen.ps))
        kelvin.append(float(kinetic.mean()) / (1.5 * ase.units.kB * (len(atoms) - 1)))
        drift = max(drift, float(abs(total - total[0]).max()) / len(atoms))
        found = heat.conductivity(fluxes, chosen.every * dt, atoms.cell.volume, kelvin[-1])
        kappa.append(found[: lags + 1].mean(1))
    return Result(np.array(kappa), np.array(kelvin), drift, time.perf_counter() - began)


def plot(results, chosen, path):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for k, (which, found) in enumerate(results.items()):
        ps = np.arange(found.kappa.shape[1]) * chosen.every * chosen.dt / 1000
        mean = found.kappa.mean(0)
        error = found.kappa.std(0, ddof=1) / len(found.kappa) ** 0.5
        axis.plot(ps, found.kappa.T, color=f"C{k}", lw=0.5, alpha=0.4)
        axis.plot(ps, mean, color=f"C{k}", label=f"{which}, mean of {len(found.kappa)} runs")
        axis.fill_between(ps, mean - error, mean + error, color=f"C{k}", alpha=0.3)
    axis.axhline(PUBLISHED, color="k", ls="--", lw=1, label="LAMMPS's documentation, 70 K")
    axis.set(xlabel="time lag, ps", ylabel="thermal conductivity, W/m/K")
    axis.set_title(f"fcc argon, {chosen.temperature:g} K, Green-Kubo", fontsize=10)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv=None) -> dict[str, Result]:
    chosen = options(argv)
    jax.config.update("jax_enable_x64", True)
    atoms = ase.build.bulk("Ar", "fcc", a=LATTICE, cubic=True) * ((chosen.repeat,) * 3)
    print(
        f"fcc argon, {len(atoms)} atoms, {chosen.temperature:g} K, {chosen.seeds} runs of "
        f"{chosen.ps:g} ps, a flux each {chosen.every * chosen.dt:g} fs"
    )
    results = {which: runs(which, atoms, chosen) for which in chosen.potentials}
    print(f"{'potential':10}{'W/m/K':>16}{'K':>8}{'drift, eV/atom':>16}{'seconds':>9}")
    for which, found in results.items():
        last = found.kappa[:, -1]
        error = last.std(ddof=1) / len(last) ** 0.5
        print(
            f"{which:10}{last.mean():8.3f} +- {error:.3f}{found.kelvin.mean():8.1f}"
            f"{found.drift:16.1e}{found.seconds:9.0f}"
        )
    print(f"LAMMPS's documentation (70 K, cutoff 13 Angstrom): {PUBLISHED}")
    chosen.out.mkdir(parents=True, exist_ok=True)
    path = chosen.out / "conductivity.png"
    plot(results, chosen, path)
    print(f"picture: {path}")
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
