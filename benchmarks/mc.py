"""Microseconds a move of one atom in jitted Monte Carlo (jax_side.montecarlo.local) at 1,000,
10,000 and 100,000 atoms: `python -m benchmarks.mc`.

A Lennard-Jones fluid (rho 0.8, cutoff 2.5, float32) in JAX, and a small network of messages of its
distances in torch on the ffi lane. All systems have one layout (slots per cell, neighbours), take
turns in one process, and a round is one jitted scan with fresh random numbers on a donated cache.
The control draws the random numbers alone. A ratio is the median over rounds. `full` is a full
evaluation, which a move would cost without the cache. Prints JSON lines and a table with the
verdict, and draws benchmarks/out/mc.png.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from tqdm import tqdm

import bridge
from benchmarks.harness import measure, ratio, verdict
from jax_side.montecarlo import moves
from jax_side.montecarlo.local import LocalPotential

OUT = Path(__file__).parent / "out"
DENSITY, CUTOFF, WIDTH = 0.8, 2.5, 16
SIZES = (1_000, 10_000, 100_000)
LIMIT = 1.3  # of the time of a move at any size over that at the smallest


def lennard_jones() -> LocalPotential:
    def edge(a, b, r):
        s6 = 1 / (r**2).sum(-1, keepdims=True) ** 3
        return 4 * (s6 * s6 - s6)

    return LocalPotential(
        lambda Z: jnp.ones((len(Z), 1), jnp.float32), edge, lambda a, s: s[:, 0] / 2, CUTOFF
    )


class Messages(torch.nn.Module):
    """A dense layer of Gaussians of the distance, times the neighbour's embedding."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(8, WIDTH), torch.nn.SiLU(), torch.nn.Linear(WIDTH, WIDTH)
        )
        self.register_buffer("centres", torch.linspace(0.5, CUTOFF, 8))

    def forward(self, a, b, r):
        d = r.square().sum(-1, keepdim=True).sqrt()
        return self.net(torch.exp(-4 * (d - self.centres) ** 2) * (1 - (d / CUTOFF) ** 2) ** 2) * b


class Readout(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(2 * WIDTH, WIDTH), torch.nn.SiLU(), torch.nn.Linear(WIDTH, 1)
        )

    def forward(self, a, s):
        return self.net(torch.cat([a, s], -1))[:, 0]


def network() -> LocalPotential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = torch.nn.Embedding(100, WIDTH), Messages(), Readout()
    return LocalPotential(*(bridge.to_jax(part.eval(), lane="ffi") for part in parts), CUTOFF)


MODELS = {"JAX": lennard_jones, "torch": network}


def fluid(n, shuffled=False):
    """n atoms near the sites of a simple cubic lattice, row after row as crystals are built, or in
    any order."""
    rng, m = np.random.default_rng(0), int(np.ceil(n ** (1 / 3) - 1e-9))
    L = (n / DENSITY) ** (1 / 3)
    sites = np.stack(np.meshgrid(*[np.arange(m)] * 3, indexing="ij"), -1).reshape(-1, 3)
    sites = sites[np.sort(rng.permutation(m**3)[:n])] * (L / m) + 0.05 * rng.normal(size=(n, 3))
    pos = rng.permutation(sites) if shuffled else sites
    return dict(
        pos=jnp.asarray(pos, jnp.float32),
        atomic_numbers=jnp.full(n, 18),
        cell=L * jnp.eye(3, dtype=jnp.float32),
        pbc=np.ones(3, bool),
    )


def layouts(systems) -> dict:
    """For all the same room."""
    found = {n: lennard_jones().allocate(graph) for n, graph in systems.items()}
    room = {
        name: max(getattr(layout, name) for layout in found.values())
        for name in ("per_cell", "neighbors")
    }
    return {n: replace(layout, **room) for n, layout in found.items()}


def drawn(key, n):
    """What a move needs of chance: an atom, where it goes, the test."""
    which, where, last = jax.random.split(key, 3)
    return (
        jax.random.randint(which, (), 0, n),
        0.1 * jax.random.normal(where, (3,), jnp.float32),
        jnp.log(jax.random.uniform(last, dtype=jnp.float32)),
    )


def step(local, cache, key):
    i, far, test = drawn(key, cache.layout.atoms)
    _, change, proposal = local.update(cache, moves.moved(i, cache.pos[i] + far))
    return local.commit(cache, proposal, test < -change), change


def chance_alone(n):
    def step(total, key):
        i, far, test = drawn(key, n)
        return total + i + far.sum() + test, None

    return step


class Scans:
    """One after another, on what the one before left; the cache is donated."""

    def __init__(self, step, carry, length, seed):
        self.program = jax.jit(
            lambda carry, key: jax.lax.scan(step, carry, jax.random.split(key, length))[0],
            donate_argnums=0,
        )
        self.carry, self.key, self.length = carry, jax.random.key(seed), length

    def __call__(self, n):
        for _ in range(n):
            self.key, key = jax.random.split(self.key)
            self.carry = jax.block_until_ready(self.program(self.carry, key))


def timed_full(local, graph, layout):
    """A cache and the seconds that it took, of the second evaluation: the first one compiles."""
    jax.block_until_ready(local.full(graph, layout))
    began = time.perf_counter()
    return jax.block_until_ready(local.full(graph, layout)), time.perf_counter() - began


def rows_of(args) -> list[dict]:
    systems = {n: fluid(n, args.shuffled) for n in args.sizes}
    rooms, scans, full, bars = (
        layouts(systems),
        {},
        {},
        tqdm(total=len(args.sizes) * len(args.only) + 1, disable=None),
    )
    for n, graph in systems.items():
        scans["control", n] = Scans(chance_alone(n), jnp.zeros((), jnp.float32), args.moves, n)
        for model in args.only:
            local = MODELS[model]()
            cache, full[model, n] = timed_full(local, graph, rooms[n])
            scans[model, n] = Scans(
                lambda cache, key, local=local: step(local, cache, key), cache, args.moves, n
            )
            bars.update()
    times = {
        case: [t / args.moves for t in ts] for case, ts in measure(scans, 1, args.rounds).items()
    }
    bars.close()
    for model in args.only:
        for n in args.sizes:
            MODELS[model]().check(scans[model, n].carry)
    return rows(
        times,
        full,
        args.sizes,
        {name: getattr(rooms[args.sizes[0]], name) for name in ("per_cell", "neighbors")},
    )


def rows(times, full, sizes, room) -> list[dict]:
    """{(model, n): microseconds a move in each round}, {(model, n): seconds of a full evaluation}
    -> JSON lines; the last ones are verdicts."""
    found = []
    for (model, n), ts in times.items():
        us, smallest = statistics.median(ts), times[model, sizes[0]]
        row = {
            "name": f"{model}, {n} atoms",
            "model": model,
            "atoms": n,
            "us": us,
            "us_best": min(ts),
            "to_smallest": ratio(ts, smallest),
        }
        row |= (
            {"without_control": us - statistics.median(times["control", n])}
            if model != "control"
            else {}
        )
        found.append(
            row
            | (
                {"full_ms": 1e3 * full[model, n], "speed_up": 1e6 * full[model, n] / us}
                if (model, n) in full
                else {}
            )
        )
    found.sort(key=lambda r: (r["model"] == "control", r["model"], r["atoms"]))
    models = dict.fromkeys(model for model, _ in times if model != "control")
    worst = {model: max(r["to_smallest"] for r in found if r["model"] == model) for model in models}
    environment = {
        "name": "environment",
        "jax": jax.__version__,
        "torch": torch.__version__,
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
        **room,
    }
    return [
        environment,
        *found,
        *(
            verdict(
                f"acceptance/{model}: a move at {sizes[-1]} atoms / at {sizes[0]}", value, LIMIT
            )
            for model, value in worst.items()
        ),
    ]


def table(found) -> str:
    lines = [
        f"{'':24}{'us a move':>10}{'best':>9}{'/ smallest':>12}{'less control':>14}{'full, ms':>11}{'speed-up':>10}"
    ]
    for r in found:
        if "us" in r:
            more = (
                f"{r['without_control']:14.1f}{r['full_ms']:11.1f}{r['speed_up']:10.0f}"
                if "full_ms" in r
                else ""
            )
            lines.append(
                f"{r['name']:24}{r['us']:10.1f}{r['us_best']:9.1f}{r['to_smallest']:12.2f}{more}"
            )
    return "\n".join(
        [
            *lines,
            *(
                f"{r['name']}: {r['value']:.2f}, limit {r['limit']}: {r['verdict']}"
                for r in found
                if "verdict" in r
            ),
        ]
    )


def draw(found, path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for k, model in enumerate(dict.fromkeys(r["model"] for r in found if "model" in r)):
        own = [r for r in found if r.get("model") == model]
        axes[0].semilogx(
            [r["atoms"] for r in own], [r["us"] for r in own], "o-", color=f"C{k}", label=model
        )
        if "full_ms" in own[0]:
            axes[1].loglog(
                [r["atoms"] for r in own],
                [r["speed_up"] for r in own],
                "o-",
                color=f"C{k}",
                label=model,
            )
    axes[0].set(xlabel="atoms", ylabel="us a move (median)", ylim=(0, None))
    axes[1].set(xlabel="atoms", ylabel="full evaluation / move")
    axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def options(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mc",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--moves", type=int, default=500, help="in one scan")
    parser.add_argument("--rounds", type=int, default=41, help="scans of each case, in turns")
    parser.add_argument("--only", choices=MODELS, nargs="*", default=list(MODELS))
    parser.add_argument(
        "--shuffled",
        action="store_true",
        help="atoms in no order: neighbours far from one another in memory",
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="torch's threads; XLA's pool is beside it"
    )
    parser.add_argument("--out", type=Path, default=OUT / "mc.png")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = options(argv)
    args.sizes = sorted(set(args.sizes))
    torch.set_num_threads(args.threads)
    with jax.default_device(jax.devices("cpu")[0]), jax.enable_x64(False):
        found = rows_of(args)
    print("\n".join(map(json.dumps, found)), "", table(found), sep="\n")
    draw(found, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
