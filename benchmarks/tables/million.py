"""A million atoms each way: the time of energy and gradients of a pair potential on a given list,
and the memory that it takes. Each variant is a process of its own:
`python -m benchmarks.tables.million VARIANT ATOMS_ALONG_AN_EDGE CALLS`."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.harness import Case, compared, said, without

EDGE, CALLS, TURNS = 100, 3, 2
CUTOFF, SPACING = 3.3, 2.7  # Angstrom: the six nearest, with a little room
IN_JAX = ("bare torch", "ffi", "host", "native")
IN_TORCH = ("pure jax", "bridge.to_torch", "torch_jax_interop", "jax2torch")
COMPILED = "native"


def crystal(edge: int):
    """Positions of a rattled simple cubic crystal, its cell, and its directed edges (i, j, offset),
    each atom with its six nearest."""
    rng, n = np.random.default_rng(0), edge**3
    sites = np.stack(np.meshgrid(*[np.arange(edge)] * 3, indexing="ij"), -1).reshape(-1, 3)
    pos = SPACING * sites + 0.02 * rng.normal(size=sites.shape)
    ends, offsets = [], []
    for axis in range(3):
        for way in (-1, 1):
            there = sites.copy()
            there[:, axis] += way
            offset = there // edge
            there -= offset * edge
            ends.append(there @ [edge * edge, edge, 1])
            offsets.append(offset)
    index = np.stack([np.tile(np.arange(n), 6), np.concatenate(ends)])
    cell = SPACING * edge * np.eye(3)
    return pos.astype("f"), cell.astype("f"), index.astype("i"), np.concatenate(offsets).astype("i")


def bonds(r2, where):
    """A pair potential of squared distances, half for each direction: torch or JAX, by `where`."""
    return where(r2 < CUTOFF**2, 0.5 * (1 - r2 / CUTOFF**2) ** 3, 0.0).sum()


def torch_by_hand(pos, cell, index, offsets):
    import torch

    pos, cell = (torch.tensor(x).requires_grad_() for x in (pos, cell))
    i, j, shifts = torch.tensor(index[0]), torch.tensor(index[1]), torch.tensor(offsets).float()

    def step():
        r = pos.index_select(0, j) - pos.index_select(0, i) + shifts @ cell
        energy = bonds(r.square().sum(-1), torch.where)
        return energy.detach(), *torch.autograd.grad(energy, (pos, cell))

    return step


def by_lane(lane, pos, cell, index, offsets):
    """A torch potential in JAX."""
    import jax
    import jax.numpy as jnp
    import torch

    import bridge
    from torch_side.potentials.geometry import edge_vectors

    def pairs(x):
        r2 = edge_vectors(x).square().sum(-1)
        each = torch.where(r2 < CUTOFF**2, 0.5 * (1 - r2 / CUTOFF**2) ** 3, 0)
        nodes = r2.new_zeros(len(x["pos"])).index_add(0, x["edge_index"][0], each)
        return r2.new_zeros(len(x["cell"])).index_add(0, x["batch"], nodes)

    card = bridge.Card(cutoff=CUTOFF, neighbor_list="given", batches=True)
    energy = bridge.potential(
        pairs, atomic_numbers=np.full(len(pos), 29), gradients="autograd", card=card, lane=lane
    )
    step = jax.jit(jax.value_and_grad(energy, (0, 1)))
    r, h, index, offsets = map(jnp.asarray, (pos, cell, index, offsets))
    return lambda: jax.block_until_ready(step(r, h, edge_index=index, cell_offsets=offsets))


def jax_energy(index, offsets):
    import jax.numpy as jnp

    i, j, shifts = *map(jnp.asarray, index), jnp.asarray(offsets, "float32")

    def energy(pos, cell):
        r = pos[j] - pos[i] + shifts @ cell
        return bonds((r * r).sum(-1), jnp.where)

    return energy


def pure_jax(pos, cell, index, offsets):
    import jax
    import jax.numpy as jnp

    step = jax.jit(jax.value_and_grad(jax_energy(index, offsets), (0, 1)))
    r, h = jnp.asarray(pos), jnp.asarray(cell)
    return lambda: jax.block_until_ready(step(r, h))


def in_torch(way, pos, cell, index, offsets):
    """A JAX function in torch."""
    import jax
    import torch

    energy = jax.jit(jax_energy(index, offsets))
    if way == "bridge.to_torch":
        import bridge

        f = bridge.to_torch(energy)
    elif way == "jax2torch":
        from jax2torch import jax2torch

        f = jax2torch(energy)
    else:
        from torch_jax_interop import WrappedJaxFunction

        f = WrappedJaxFunction(jax.jit(lambda _, pos, cell: energy(pos, cell)), ())
    r, h = (torch.tensor(x).requires_grad_() for x in (pos, cell))
    return lambda: torch.autograd.grad(f(r, h), (r, h))


def step_of(variant, structure):
    if variant == "bare torch":
        return torch_by_hand(*structure)
    if variant in IN_JAX:
        return by_lane(variant, *structure)
    return pure_jax(*structure) if variant == "pure jax" else in_torch(variant, *structure)


def peak() -> float:
    """MB that this process has had at most since `forget`."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def forget() -> None:
    """What was needed to make the structure is no part of a call: Linux begins anew."""
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def alone(variant: str, edge: int, calls: int) -> dict:
    """Seconds of each call after the first, and MB over what there was before it."""
    step = step_of(variant, crystal(edge))
    forget()
    before, seconds = peak(), []
    for _ in range(calls + 1):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds[1:], "MB": max(1.0, peak() - before)}


def spawned(variant: str, edge: int, calls: int) -> dict:
    """What `alone` gives in a new process, or why it gives nothing."""
    command = [sys.executable, "-m", __spec__.name, variant, str(edge), str(calls)]
    ended = subprocess.run(command, capture_output=True, text=True)
    found = [line for line in ended.stdout.splitlines() if line.startswith("{")]
    if ended.returncode or not found:
        last = (ended.stderr.strip() or f"exit {ended.returncode}").splitlines()[-1]
        return {"status": "failing", "error": last}
    return json.loads(found[-1])


def prepare() -> Iterator[tuple[str, dict]]:
    """Compiles the package of the native lane, at this size."""
    found = spawned(COMPILED, EDGE, 1)
    if "error" in found:
        yield f"torch in JAX/{COMPILED}", found


def rows(name: str, rounds: int, quick: bool) -> Iterator[dict]:
    """Time and memory of each variant, both ways."""
    edge, calls, turns = (6, 1, 1) if quick else (EDGE, CALLS, min(TURNS, rounds))
    ways = {"torch in JAX": IN_JAX, "JAX in torch": IN_TORCH}
    for way, variants in ways.items():
        seen = {v: [] for v in variants if not (quick and v == COMPILED)}
        for turn in range(turns):
            for v in list(seen)[:: -1 if turn % 2 else 1]:
                if not any("error" in found for found in seen[v]):
                    seen[v].append(spawned(v, edge, calls))
        failed = {v: found[-1] for v, found in seen.items() if "error" in found[-1]}
        done = {v: found for v, found in seen.items() if v not in failed}
        times = {v: [1e6 * s for x in found for s in x["seconds"]] for v, found in done.items()}
        memory = {v: [x["MB"] for x in found] for v, found in done.items()}
        for what, unit, figures in (("time", "s", times), ("peak memory", "MB", memory)):
            case = Case(None, variants[:1], unit=unit)
            found = compared(f"{name}/{way}, {what}", case, figures, dict.fromkeys(figures, calls))
            yield from found.values()
            yield from (without(f"{name}/{way}, {what}", v, why) for v, why in failed.items())


if __name__ == "__main__":
    chosen, edge, calls = sys.argv[1:]
    try:
        print(json.dumps(alone(chosen, int(edge), int(calls))))
    except Exception as error:
        sys.exit(said(error))
