"""What a batch costs on two devices beside one, under plain jit: `python -m benchmarks.scale`; and a
long sharded loop whose memory has to stay flat: `python -m benchmarks.scale --soak`.

A batch is 64 structures of 64 atoms, in a jitted loop of energies and gradients, each structure
with its list of edges. One thread for torch; the variants take turns, a ratio is the median over
rounds (benchmarks/harness.py). Prints one JSON line for each case, then a table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys

import jax
import numpy as np
import psutil
import torch
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import bridge
from benchmarks.engines import argon, salt
from benchmarks.harness import measure, ratio, table, verdict
from benchmarks.native import messages, pairs, structure
from torch_side.potentials.neighbors import Padded

STRUCTURES = 64  # of a batch
GAIN = 1.6  # of two devices, on the native lane
MODELS = {"pair": (pairs, lambda: argon(2) * (2, 1, 1)), "messages": (messages, lambda: salt(2))}


def batch(model, atoms, seed: int, count: int = STRUCTURES, capacity: int | None = None) -> dict:
    """`count` rattled copies of a structure with their edges, in slots of which a tenth is unused:
    arrays with a leading axis."""
    made = []
    for k in range(count):
        copy = atoms.copy()
        copy.rattle(0.05, seed=seed * count + k)
        made.append(structure(copy))
    if capacity is None:
        longest = max(int((found["edge_index"][0] < len(x["pos"])).sum()) for x, found in (
            (x, Padded(model.card.cutoff, 20_000)(x)) for x in made[:4]
        ))  # fmt: skip
        capacity = int(1.1 * longest)
    padded = [x | Padded(model.card.cutoff, capacity)(x) for x in made]
    return {key: np.stack([x[key].numpy() for x in padded]) for key in padded[0]}


def over(count: int) -> NamedSharding:
    """The first axis over so many devices."""
    return NamedSharding(
        Mesh(np.array(jax.devices("cpu")[:count]), ("structures",)), P("structures")
    )


def loop(model, lane: str, given: dict, count: int):
    """n steps of all structures, over so many devices: plain jit and vmap."""
    one = bridge.jax_potential(model, lane=lane)
    placed = jax.device_put(given, over(count))

    def move(inputs, _):
        out = jax.vmap(one)(inputs)
        # far too short to move anything, so that no step can be left out
        return inputs | {"pos": inputs["pos"] - 1e-12 * out["position_gradients"]}, out["energy"]

    steps = jax.jit(lambda x: jax.lax.scan(move, x, None, length=5))

    def run(n):
        for _ in range(n):
            jax.block_until_ready(steps(placed))

    return run


def rows(name: str, rounds: int) -> list[dict]:
    """Times of one and two devices on two lanes."""
    make, atoms = MODELS[name]
    model = make()
    given = batch(model, atoms(), 0)
    variants = {
        f"{lane}, {count} device{'s' * (count > 1)}": loop(model, lane, given, count)
        for lane in ("native", "ffi")
        for count in (1, 2)
    }
    times = measure(variants, 2, rounds)
    found = []
    for v, t in times.items():
        one = times[f"{v.split(',')[0]}, 1 device"]
        row = {"name": f"{name}/{v}", "us": min(t), "us_median": statistics.median(t)}
        found.append(row | {"ratios": {"1 device": ratio(t, one)}})
    gain = 1 / ratio(times["native, 2 devices"], times["native, 1 device"])
    return [*found, verdict(f"acceptance/{name}: 1 / gain of two devices", 1 / gain, 1 / GAIN)]


def soak(batches: int) -> list[dict]:
    """Structures that are new in each batch through one sharded program: memory before and after,
    on each lane."""
    model, atoms = pairs(), argon(2) * (2, 1, 1)
    first = batch(model, atoms, 0)
    capacity = int(1.15 * first["edge_index"].shape[2])
    memory, found = psutil.Process().memory_info, []
    for lane in ("ffi", "host", "native"):
        one = bridge.jax_potential(model, lane=lane)
        program = jax.jit(jax.vmap(one))
        sizes, total = [], 0.0
        for k in tqdm(range(batches), desc=lane, file=sys.stderr):
            given = jax.device_put(batch(model, atoms, k, capacity=capacity), over(2))
            total += float(program(given)["energy"].sum())
            sizes.append(memory().rss / 1e6)
        calm = batches // 4  # what is made once has been made
        growth = statistics.mean(sizes[-calm:]) - statistics.mean(sizes[calm : 2 * calm])
        found.append(
            {
                "name": f"soak/{lane}",
                "structures": batches * STRUCTURES,
                "energy, eV": total,
                "MB": [round(x) for x in sizes[:: max(1, batches // 8)]],
                "MB, last quarter over second": round(growth, 1),
            }
        )
        assert np.isfinite(total) and growth < 50, found[-1]
    return found


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", choices=MODELS, nargs="*", default=[*MODELS])
    parser.add_argument("--soak", action="store_true", help="the long loop, and no times")
    parser.add_argument(
        "--batches", type=int, default=157, help="of the soak; 157: 10,048 structures"
    )
    chosen = parser.parse_args(argv)
    if len(jax.devices("cpu")) < 2:
        parser.error("expected two CPU devices, got one; run make bench-scale or soak-scale")
    torch.set_num_threads(1)
    if chosen.soak:
        for row in soak(chosen.batches):
            print(json.dumps(row), flush=True)
        return 0
    found = []
    for name in chosen.models:
        more = rows(name, chosen.rounds)
        found += more
        for row in more:
            print(json.dumps(row), flush=True)
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
