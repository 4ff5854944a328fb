"""How benchmarks measure: variants of a group take turns, so that the drift of a busy machine hits them all alike."""

from __future__ import annotations

import statistics
import time

import jax

GROUPS = {}


def group(*baselines, share=1.0):
    """Register a group: a function that gives {variant: run(n calls)}; one round takes `share` of --calls."""
    return lambda make: GROUPS.setdefault(make.__name__, (make, baselines, share)) and make


def in_loop(body, x):
    """n calls inside one compiled lax.fori_loop."""
    loop = jax.jit(lambda x, n: jax.lax.fori_loop(0, n, lambda _, y: body(y), x))
    return lambda n: loop(x, n).block_until_ready()


def bare(f, *args):
    """n calls of something that waits by itself."""

    def run(n):
        for _ in range(n):
            f(*args)

    return run


def one_by_one(f, *args):
    """n calls from Python, each waited for."""
    return bare(lambda: jax.block_until_ready(f(*args)))


def measure(variants: dict, calls: int, rounds: int) -> dict[str, list[float]]:
    """Microseconds a call, for each round; every other round goes in the opposite order."""
    times = {name: [] for name in variants}
    for k in range(-1, rounds):  # the first one compiles
        for name in list(variants)[:: -1 if k % 2 else 1]:
            start, n = time.perf_counter(), calls if k >= 0 else 2
            variants[name](n)
            times[name] += [(time.perf_counter() - start) / n * 1e6] * (k >= 0)
    return times


def ratio(a: list[float], b: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def records(name: str, baselines, times: dict) -> list[dict]:
    ratios = {v: {b: ratio(t, times[b]) for b in baselines if b != v} for v, t in times.items()}
    return [{"name": f"{name}/{v}", "us": min(t), "us_median": statistics.median(t), "ratios": ratios[v]} for v, t in times.items()]


def line(r: dict) -> str:
    """One row of the table."""
    if "us" in r:
        return f"{r['name']:46}{r['us']:11.2f}{r['us_median']:11.2f}   " + "   ".join(f"{v:.3g} x {b}" for b, v in r["ratios"].items())
    return f"{r['name']:46}" + "   ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in r.items() if k != "name")
