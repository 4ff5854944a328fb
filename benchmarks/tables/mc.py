"""Monte Carlo: the time of a move at 1,000 to 100,000 atoms, beside the full evaluation that it
would cost without a cache, and the random numbers alone (benchmarks/mc.py)."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from benchmarks import mc
from benchmarks.harness import Case, bare, compared, measure

MOVES = 500  # in a scan, which is one call
CONTROL = "random numbers alone"


def full(local, graph, layout):
    return bare(lambda: jax.block_until_ready(local.full(graph, layout)))


def rows(name: str, rounds: int, quick: bool) -> Iterator[dict]:
    """A case for each model, all of its sizes in turn."""
    sizes, moves = ((27,), 3) if quick else (mc.SIZES, MOVES)
    systems = {n: mc.fluid(n) for n in sizes}
    rooms = mc.layouts(systems)
    for model, make in mc.MODELS.items():
        local, runs, whole = make(), {}, {}
        for n, graph in systems.items():
            cache, _ = mc.timed_full(local, graph, rooms[n])
            step = lambda cache, key, local=local: mc.step(local, cache, key)
            runs[f"bridge, a move of {n:,} atoms"] = mc.Scans(step, cache, moves, n)
            whole[f"a full evaluation of {n:,} atoms"] = full(local, graph, rooms[n])
        start = jnp.zeros((), jnp.float32)
        runs[CONTROL] = mc.Scans(mc.chance_alone(sizes[0]), start, moves, 0)
        times = measure(runs | whole, 1, 1 if quick else min(rounds, 7))
        times |= {v: [t / moves for t in times[v]] for v in runs}
        case = Case(None, (f"bridge, a move of {sizes[0]:,} atoms", CONTROL), (CONTROL,))
        calls = dict.fromkeys(runs, moves) | dict.fromkeys(whole, 1)
        yield from compared(f"{name}/{model}", case, times, calls).values()
