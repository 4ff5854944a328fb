"""What a step costs on the native lane, beside eager torch on the exact list and the ffi lane, in
one process: `python -m benchmarks.native`.

A step is the energy with its gradients in positions and cell, in a jitted fori_loop; a tenth of the
edge slots is unused. Eager torch gets the same edges without unused slots. One thread. The variants
of a case take turns; a ratio is the median over rounds (see benchmarks/harness.py). Prints one JSON
line for each case, then a table. Packages are compiled where they are not in the folder of packages
(seconds to minutes each).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import warnings
from pathlib import Path

import ase.build
import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import bridge
from benchmarks.bench import COPY, tvm
from benchmarks.engines import CUTOFF, argon, pair, salt, sevennet
from benchmarks.harness import bare, goals, in_loop, measure, ratio, table, verdict
from bridge.card import Card
from torch_side.potentials.geometry import edge_vectors
from torch_side.potentials.model import Wrapped
from torch_side.potentials.neighbors import Padded, neighbor_list

SLACK = 0.1  # of the slots of edges, which are unused


class Messages(torch.nn.Module):
    """Message passing with three layers of 64 channels, random weights: E (B,)."""

    def __init__(self, channels: int = 64, layers: int = 3, cutoff: float = 5.0) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.embedding = torch.nn.Embedding(100, channels)
        self.radial = torch.nn.ModuleList(torch.nn.Linear(8, channels) for _ in range(layers))
        self.update = torch.nn.ModuleList(
            torch.nn.Linear(channels, channels) for _ in range(layers)
        )
        self.energy = torch.nn.Linear(channels, 1)

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        centre, neighbour = inputs["edge_index"]
        length = torch.linalg.vector_norm(edge_vectors(inputs), dim=-1)
        frequency = torch.arange(1, 9, device=length.device) * (torch.pi / self.cutoff)
        smooth = (1 - (length / self.cutoff) ** 2) ** 2
        basis = torch.sin(length[:, None] * frequency) / length[:, None] * smooth[:, None]
        state = self.embedding(inputs["atomic_numbers"])
        for radial, update in zip(self.radial, self.update):
            message = radial(basis) * state[neighbour]
            total = torch.zeros_like(state).index_add(0, centre, message)
            state = state + torch.nn.functional.silu(update(total / 8))
        each = self.energy(state)[:, 0]
        return each.new_zeros(len(inputs["cell"])).index_add(0, inputs["batch"], each)


def messages():
    torch.manual_seed(0)
    card = Card(cutoff=5.0, neighbor_list="own", dtype="float32", batches=True)
    return Wrapped(Messages().requires_grad_(False), card, "autograd")


def pairs():
    card = Card(cutoff=CUTOFF, neighbor_list="own", dtype="float32", batches=True)
    return Wrapped(pair, card, "autograd")


def mace():
    from tests.model_cases import mace as small

    return small(torch.float32)


def torchani():
    from tests.model_cases import torchani as random

    return random(torch.float32)


def molecules():
    """Ethanol six times, 54 atoms."""
    one = ase.build.molecule("CH3CH2OH")
    atoms = one.copy()
    for k in range(1, 6):
        atoms += ase.Atoms(one.symbols, one.positions + np.array([5.0 * k, 0, 0]))
    return atoms


MODELS = {  # name: (model, atoms, most that a step may cost of eager torch)
    "pair": (pairs, lambda: argon(2) * (2, 1, 1), 0.10),
    "messages": (messages, lambda: salt(2), 0.50),
    "mace": (mace, lambda: salt(2), 0.55),
    "sevennet": (sevennet, lambda: salt(2), 0.65),
    "torchani": (torchani, molecules, 1.0),
}


def rattled(atoms):
    atoms = atoms.copy()
    atoms.rattle(0.05, seed=0)
    return atoms


def structure(atoms) -> dict[str, torch.Tensor]:
    """The contract's dict without edges, float32."""
    return {
        "pos": torch.tensor(atoms.positions, dtype=torch.float32),
        "cell": torch.tensor(np.array(atoms.cell), dtype=torch.float32)[None],
        "pbc": torch.tensor(atoms.pbc)[None],
        "batch": torch.zeros(len(atoms), dtype=torch.int32),
        "atomic_numbers": torch.tensor(atoms.numbers, dtype=torch.int32),
    }


def with_edges(inputs: dict, cutoff: float) -> tuple[dict, dict]:
    """The inputs with the exact list, and with a tenth of unused slots."""
    edges, offsets = neighbor_list(inputs["pos"], inputs["cell"], inputs["pbc"], cutoff)
    capacity = int(edges.shape[1] / (1 - SLACK)) + 1
    padded = Padded(cutoff, capacity)(inputs)
    return inputs | {"edge_index": edges, "cell_offsets": offsets}, inputs | padded


def step(model):
    """One step of a descent far too short to move anything, so that no step can be left out."""

    def one(carry):
        inputs, _ = carry
        out = model(inputs)
        pos = inputs["pos"] - 1e-12 * out["position_gradients"]
        cell = inputs["cell"] - 1e-12 * out["cell_gradients"]
        return inputs | {"pos": pos, "cell": cell}, out["energy"]

    return one


def jitted(model, inputs):
    """n steps in one compiled loop."""
    given = {k: jnp.asarray(x) for k, x in inputs.items()}
    start = given, jnp.zeros(1, jnp.float32)
    loop = jax.jit(lambda carry, n: jax.lax.fori_loop(0, n, lambda _, c: step(model)(c), carry))
    return lambda n: jax.block_until_ready(loop(start, n))


def seconds(f):
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def model_rows(name: str, rounds: int) -> list[dict]:
    """One model: times, ratios, errors, and how long it took until the native step ran."""
    make, atoms, limit = MODELS[name]
    model = make()
    exact, padded = with_edges(structure(rattled(atoms())), model.card.cutoff)
    lanes = {lane: bridge.jax_potential(model, lane=lane) for lane in ("native", "ffi")}
    variants = {"eager torch": bare(model, exact)}
    variants |= {lane: jitted(bridged, padded) for lane, bridged in lanes.items()}
    first = seconds(lambda: variants["native"](1))
    want = model(exact)
    got = jax.jit(lanes["native"])({k: jnp.asarray(x) for k, x in padded.items()})
    errors = {k: float(np.abs(want[k].numpy() - np.asarray(got[k])).max()) for k in got}
    once = seconds(lambda: variants["eager torch"](2)) / 2
    times = measure(variants, max(2, min(200, int(0.3 / once))), rounds)
    shape = f"{len(exact['pos'])} atoms, {exact['edge_index'].shape[1]} edges"
    rows = [figures(f"{name}/{v}, {shape}", t, times["eager torch"]) for v, t in times.items()]
    rows[1] |= {"first call, s": round(first, 1), "errors": errors}
    ratio_of_step = ratio(times["native"], times["eager torch"])
    return [*rows, verdict(f"acceptance/{name}: native / eager torch", ratio_of_step, limit)]


def figures(name, times, baseline):
    return timed(name, times, **{"eager torch": ratio(times, baseline)})


def timed(name, times, **ratios):
    return {
        "name": name,
        "us": min(times),
        "us_median": statistics.median(times),
        "ratios": ratios,
    }


def hvp_rows(rounds: int) -> list[dict]:
    """A product of SevenNet-0's Hessian with a vector."""
    model = sevennet()
    exact, padded = with_edges(structure(rattled(salt(2))), model.card.cutoff)
    direction = torch.ones_like(exact["pos"])

    def eager():
        pos = exact["pos"].clone().requires_grad_()
        g = model(exact | {"pos": pos})["position_gradients"]
        return torch.autograd.grad((g * direction).sum(), pos)

    bound = {k: jnp.asarray(x) for k, x in padded.items()}

    def product(lane):
        edges = {key: bound[key] for key in ("edge_index", "cell_offsets")}
        energy = bridge.potential(
            model, atomic_numbers=bound["atomic_numbers"], pbc=True, lane=lane, **edges
        )
        along = jnp.asarray(direction)
        force = lambda pos: jax.grad(energy)(pos, bound["cell"][0])
        hvp = lambda pos: jax.jvp(force, (pos,), (along,))[1]
        return in_loop(lambda pos: pos - 1e-12 * hvp(pos), bound["pos"])

    variants = {"eager torch": bare(eager), "native": product("native"), "ffi": product("ffi")}
    first = seconds(lambda: variants["native"](1))
    times = measure(variants, 2, rounds)
    rows = [figures(f"hvp of sevennet/{v}", t, times["eager torch"]) for v, t in times.items()]
    rows[1] |= {"first call, s": round(first, 1)}
    value = ratio(times["native"], times["eager torch"])
    return [*rows, verdict("acceptance/hvp of sevennet: native / eager torch", value, 0.8)]


def empty_rows(rounds: int) -> list[dict]:
    """The identity of 64 float32 in a fori_loop."""
    x, like = jnp.ones(64), jax.ShapeDtypeStruct((64,), "float32")
    copy = tvm("bench_copy", lambda x, out: out.copy_(x), like)
    identity = lambda x: x
    variants = {COPY: in_loop(copy, x)}
    for lane in ("native", "ffi"):
        variants[lane] = in_loop(bridge.to_jax(identity, lane=lane), x)
    times = measure(variants, 2000, rounds)
    rows = [timed(f"empty/{v}", t, **{COPY: ratio(t, times[COPY])}) for v, t in times.items()]
    judged = goals(("native", COPY, 2.0))(times)
    return rows + [verdict(f"acceptance/empty: {what}", *rest) for what, *rest in judged]


def devices_rows(rounds: int) -> list[dict]:
    """Four structures of the message-passing model on two CPU devices, beside one device."""
    model = messages()
    _, padded = with_edges(structure(rattled(salt(2))), model.card.cutoff)
    four = {k: jnp.stack([jnp.asarray(x)] * 4) for k, x in padded.items()}

    def on(count, lane):
        one = bridge.jax_potential(model, lane=lane, batched="sequential")

        def chunk(inputs):
            def move(_, pos):
                out = jax.lax.map(one, inputs | {"pos": pos})
                return pos - 1e-12 * out["position_gradients"]

            return jax.lax.fori_loop(0, 5, move, inputs["pos"])

        mesh = Mesh(np.array(jax.devices("cpu")[:count]), "b")
        mapped = jax.shard_map(chunk, mesh=mesh, in_specs=P("b"), out_specs=P("b"))
        run = jax.jit(mapped)
        return bare(lambda: jax.block_until_ready(run(four)))

    variants = {f"{lane}, {n} devices": on(n, lane) for lane in ("native", "ffi") for n in (1, 2)}
    times = measure(variants, 4, rounds)
    rows, judged = [], []
    for lane, limit in (("native", 1 / 1.6), ("ffi", None)):
        one, two = (times[f"{lane}, {n} devices"] for n in (1, 2))
        value = ratio(two, one)
        rows.append(timed(f"shard_map/{lane}", two, **{"one device": value}))
        if limit:
            judged.append(verdict(f"acceptance/shard_map: {lane}, two / one device", value, limit))
    return rows + judged


EXTRA = {"hvp": hvp_rows, "empty": empty_rows, "devices": devices_rows}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.native", description=__doc__)
    parser.add_argument("--only", choices=[*MODELS, *EXTRA], nargs="*", default=[*MODELS, *EXTRA])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, help="write the JSON lines here, too")
    args = parser.parse_args(argv)
    if "devices" in args.only and len(jax.devices("cpu")) < 2:
        parser.error("expected two CPU devices, got one; run make bench-native")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = [{"name": "environment", "jax": jax.__version__, "torch": torch.__version__, "cpus": os.cpu_count(), "load": os.getloadavg()[0]}]  # fmt: skip
    for name in tqdm(args.only, disable=None):
        run = EXTRA.get(name, lambda rounds: model_rows(name, rounds))
        rows += run(args.rounds)
        print("\n".join(map(json.dumps, rows[-3:])), file=sys.stderr)
    text = "\n".join(map(json.dumps, rows))
    print(text, "", table(rows[1:]), sep="\n")
    if args.out:
        args.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
