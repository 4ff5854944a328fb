"""Milliseconds a step of NVE for one model and crystal, in jitted jax-md, under ASE and under
torch-sim: `python -m benchmarks.engines`.

SevenNet-0 (float32) on NaCl of 8, 64 and 216 atoms, and a cheap pair potential in torch (float64)
on 256 and 4,000 atoms, beside what each code has of its own: SevenNet under ASE and torch-sim,
Lennard-Jones with the same cutoff in all three. The variants take turns in one process; `ms` is the
quickest round, a ratio the median over rounds. Prints JSON lines and a table, and draws
benchmarks/out/engines.png.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path

import ase.build
import ase.md.verlet
import ase.units
import jax
import jax.numpy as jnp
import numpy as np
import torch
from ase.calculators.lj import LennardJones
from jax_md import energy, simulate, space
from tqdm import tqdm

import bridge
from benchmarks.harness import Rival, attempt, bare, measure, ratio
from bridge.card import Card
from jax_side.engines import jax_md as jax_engine
from torch_side.engines import ase as ase_engine
from torch_side.engines import torch_sim as torch_engine
from torch_side.potentials.geometry import edge_vectors
from torch_side.potentials.model import Wrapped
from torch_side.potentials.neighbors import neighbor_list

OUT = Path(__file__).parent / "out"
FS = 1.0
SIGMA, EPSILON = 3.4, 0.0103  # Angstrom, eV: argon
CUTOFF = 5.0  # Angstrom, of the pair potential


def pair(inputs):
    """Lennard-Jones argon over the edges, smoothly switched off."""
    r2 = edge_vectors(inputs).square().sum(-1)
    s6 = (SIGMA**2 / r2) ** 3
    each = 0.5 * 4 * EPSILON * (s6 * s6 - s6) * (1 - r2 / CUTOFF**2) ** 2
    return r2.new_zeros(len(inputs["cell"])).index_add(
        0, inputs["batch"][inputs["edge_index"][0]], each
    )


def salt(repeats):
    return ase.build.bulk("NaCl", "rocksalt", 5.64, cubic=True) * repeats


def argon(repeats):
    return ase.build.bulk("Ar", "fcc", 5.3, cubic=True) * repeats


def sevennet():
    from torch_side.models.sevennet import SevenNet

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return SevenNet("7net-0")


CASES = {  # name: (model, atoms, steps in a round)
    "SevenNet-0, 8 atoms": ("sevennet", lambda: salt(1), 8),
    "SevenNet-0, 64 atoms": ("sevennet", lambda: salt(2), 2),
    "SevenNet-0, 216 atoms": ("sevennet", lambda: salt(3), 1),
    "pair, 256 atoms": ("pair", lambda: argon(4), 40),
    "pair, 4000 atoms": ("pair", lambda: argon(10), 4),
}
MODELS = {
    "sevennet": sevennet,
    "pair": lambda: Wrapped(
        pair,
        Card(cutoff=CUTOFF, neighbor_list="own", dtype="float64", batches=True),
        "autograd",
    ),
}


def dict_of(atoms, dtype) -> dict[str, torch.Tensor]:
    """The contract's dict of one structure."""
    return {
        "pos": torch.tensor(atoms.positions, dtype=dtype), "cell": torch.tensor(np.array(atoms.cell), dtype=dtype)[None], "pbc": torch.ones(1, 3, dtype=torch.bool),
        "batch": torch.zeros(len(atoms), dtype=torch.int64), "atomic_numbers": torch.tensor(atoms.numbers),
    }  # fmt: skip


def bare_model(model, atoms, dtype):
    """The model alone: neighbours, forward, backward."""
    return bare(model, dict_of(atoms, dtype))


def under_ase(calculator, atoms):
    atoms = atoms.copy()
    atoms.calc = calculator
    dynamics = ase.md.verlet.VelocityVerlet(atoms, FS * ase.units.fs)
    return dynamics.run


def under_torch_sim(engine, atoms, dtype):
    """`engine` is a model in torch-sim's own terms."""
    import torch_sim as ts

    init, step = torch_engine.integrator(
        "nve",
        engine,
        dt=torch.tensor(FS * ase.units.fs, dtype=dtype),
        kT=torch.tensor(0.0, dtype=dtype),
    )
    state = [init(ts.io.atoms_to_state([atoms], engine.device, engine.dtype))]

    def run(n):
        for _ in range(n):
            state[0] = step(state[0])

    return run


def room(atoms, cutoff) -> int:
    """Slots for the edges of a structure, a tenth of them to spare."""
    x = dict_of(atoms, torch.float64)
    edges, _ = neighbor_list(x["pos"], x["cell"], x["pbc"], cutoff)
    return int(edges.shape[1] / 0.9) + 1


def jax_md_energy(model, atoms, dtype, lane="auto"):
    """(the model as jax-md's energy, the box, its dtype); neighbours are found at each call, for
    the native lane by bridge.edges in the same program."""
    real = str(dtype).removeprefix("torch.")
    box = jnp.asarray(atoms.cell.array.T, real)
    potential = bridge.potential(model, atomic_numbers=atoms.numbers, pbc=True, lane=lane)
    cutoff = model.card.cutoff
    if lane != "native":
        return jax_engine.energy(potential, box), box, real
    find = bridge.edges(cutoff, room(atoms, cutoff))

    def listed(r, cell):
        return potential(r, cell, **find(r, cell))

    return jax_engine.energy(listed, box, cutoff=cutoff), box, real


def stepping(loop, state, dtype):
    """Chunks of n steps of a jitted loop(state, n), each from where the last one ended."""
    with jax.enable_x64(dtype == torch.float64):
        held = [loop(state, 0)]  # which makes weak types strong: or the second call would compile

    def run(n):
        with jax.enable_x64(dtype == torch.float64):
            held[0] = jax.block_until_ready(loop(held[0], n))

    return run


def under_jax_md(model, atoms, dtype, lane="auto"):
    """A chunk of steps in one jitted loop."""
    with jax.enable_x64(dtype == torch.float64):
        bridged, box, real = jax_md_energy(model, atoms, dtype, lane)
        init, step = simulate.nve(
            bridged, space.periodic_general(box, fractional_coordinates=True)[1], FS * ase.units.fs
        )
        masses = jnp.asarray(atoms.get_masses(), real)[:, None]
        places = jnp.asarray(atoms.get_scaled_positions(), real)
        state = init(jax.random.key(0), places, kT=0.0, mass=masses)
        loop = jax.jit(lambda state, n: jax.lax.fori_loop(0, n, lambda _, s: step(s), state))

    return stepping(loop, state, dtype)


def jax_md_alone(atoms, dtype):
    """jax-md's own Lennard-Jones, with its own neighbour list, made anew in the loop where atoms
    have moved far enough."""
    real = str(dtype).removeprefix("torch.")
    box = jnp.asarray(atoms.cell.array.T, real)
    displacement, shift = space.periodic_general(box, fractional_coordinates=True)
    reach = dict(
        r_onset=0.8 * CUTOFF / SIGMA,
        r_cutoff=CUTOFF / SIGMA,
        dr_threshold=0.5,
        fractional_coordinates=True,
    )
    neighbors, potential = energy.lennard_jones_neighbor_list(
        displacement, box, sigma=SIGMA, epsilon=EPSILON, **reach
    )
    init, step = simulate.nve(potential, shift, FS * ase.units.fs)
    places, masses = (
        jnp.asarray(atoms.get_scaled_positions(), real),
        jnp.asarray(atoms.get_masses(), real)[:, None],
    )
    found = neighbors.allocate(places)
    state = init(jax.random.key(0), places, kT=0.0, mass=masses, neighbor=found), found

    def move(_, carried):
        now, found = carried
        found = found.update(now.position)
        return step(now, neighbor=found), found

    loop = jax.jit(lambda carried, n: jax.lax.fori_loop(0, n, move, carried))

    return stepping(loop, state, dtype)


def own_of_each(kind, atoms, dtype) -> dict:
    """What each code has for this model, or for one like it, of itself."""
    if kind == "sevennet":
        from sevenn.calculator import SevenNetCalculator

        def sevennet_in_torch_sim(package):
            return under_torch_sim(package.SevenNetModel("7net-0", device="cpu"), atoms, dtype)

        return {
            "ASE, SevenNet's own calculator": under_ase(
                SevenNetCalculator("7net-0", device="cpu"), atoms
            ),
            "torch-sim, SevenNet's own model": Rival(
                "sevenn.torchsim", "torch-sim-atomistic", sevennet_in_torch_sim
            ),
        }
    from torch_sim.models.lennard_jones import LennardJonesModel

    lennard_jones = LennardJonesModel(
        sigma=SIGMA, epsilon=EPSILON, cutoff=CUTOFF, dtype=dtype, device=torch.device("cpu")
    )
    return {
        "ASE, its own Lennard-Jones": under_ase(
            LennardJones(sigma=SIGMA, epsilon=EPSILON, rc=CUTOFF), atoms
        ),
        "torch-sim, its own Lennard-Jones": under_torch_sim(lennard_jones, atoms, dtype),
        "jax-md, its own Lennard-Jones": jax_md_alone(atoms, dtype),
    }


def system(name):
    """(model, atoms, dtype) of a case."""
    kind, make, _ = CASES[name]
    model, atoms = MODELS[kind](), make()
    atoms.rattle(0.02, seed=0)
    return model, atoms, torch.float32 if kind == "sevennet" else torch.float64


def variants(name):
    kind, (model, atoms, dtype) = CASES[name][0], system(name)
    with jax.enable_x64(dtype == torch.float64):
        found = {
            "bare model": bare_model(model, atoms, dtype),
            "jitted jax-md": under_jax_md(model, atoms, dtype),
        }
        engine = torch_engine.model(model, compute_stress=False)
        found |= {
            "ASE, bridge's calculator": under_ase(ase_engine.calculator(model, outputs=()), atoms),
            "torch-sim, bridge's model": under_torch_sim(engine, atoms, dtype),
        }
        return found | own_of_each(kind, atoms, dtype)


def rows_of(name, rounds):
    runs = {v: attempt(run) if isinstance(run, Rival) else run for v, run in variants(name).items()}
    times = measure({v: run for v, run in runs.items() if callable(run)}, CASES[name][2], rounds)
    return [
        {"name": f"{name}/{v}", **(figures(times, v) if v in times else run)}
        for v, run in runs.items()
    ]


def figures(times, variant) -> dict:
    return {
        "ms": min(times[variant]) / 1e3,
        "jax_md_over_this": ratio(times["jitted jax-md"], times[variant]),
    }


def draw(rows, path):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys(r["name"].split("/")[0] for r in rows))
    names = list(dict.fromkeys(r["name"].split("/")[1] for r in rows))
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    for k, name in enumerate(names):
        own = [
            (i, r["ms"])
            for i, case in enumerate(cases)
            for r in rows
            if r["name"] == f"{case}/{name}"
        ]
        axes.bar([i + 0.1 * (k - 4) for i, _ in own], [ms for _, ms in own], 0.09, label=name)
    axes.set(yscale="log", ylabel="ms a step", xticks=range(len(cases)), xticklabels=cases)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engines",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--threads", type=int, default=1, help="torch's threads; XLA's pool is beside it"
    )
    parser.add_argument("--only", choices=CASES, nargs="*", default=list(CASES))
    parser.add_argument("--out", type=Path, default=OUT / "engines.png")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    rows = [row for name in tqdm(args.only, disable=None) for row in rows_of(name, args.rounds)]
    print("\n".join(map(json.dumps, rows)))
    width = max(len(r["name"]) for r in rows) + 2
    print(f"\n{'':{width}}{'ms a step':>10}   jax-md / this")
    for r in rows:
        shown = (
            f"{r['ms']:10.2f}   {r['jax_md_over_this']:.2f}"
            if "ms" in r
            else f"{r['status']}: {r['error']}"
        )
        print(f"{r['name']:{width}}{shown}")
    draw([r for r in rows if "ms" in r], args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
