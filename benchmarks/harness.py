"""How benchmarks measure: variants of a group take turns, so that the drift of a busy machine hits
them all alike."""

from __future__ import annotations

import contextlib
import importlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import jax

GROUPS = {}


class Rival(NamedTuple):
    """Another package that offers the same, and may be absent or broken: make(its module) gives
    what can be run."""

    package: str
    install: str
    make: Callable


def then(x, f):
    """f(x); of a Rival, once there is what it gives."""
    return x._replace(make=lambda package: f(x.make(package))) if isinstance(x, Rival) else f(x)


def group(*baselines, share=1.0, judge=lambda times: [], rounds=None):
    """Register a group: a function that gives {variant: run(n calls), or a Rival}; one round takes
    `share` of --calls.

    judge(times) gives (what, value, limit), and perhaps why it is missed, for each goal; `rounds`
    is the most that a slow group takes."""
    return lambda make: (
        GROUPS.setdefault(make.__name__, (make, baselines, share, judge, rounds)) and make
    )


def goals(*asked):
    """The judge of ratios: (variant, baseline, limit) each, and why where it is known to be missed;
    without a figure where one of both couldn't be timed."""

    def judge(times):
        return [
            (f"{a} / {b}", ratio(times[a], times[b]) if a in times and b in times else None, *limit)
            for a, b, *limit in asked
        ]

    return judge


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


def one_by_one(f, *args, **kwargs):
    """n calls from Python, each waited for."""
    return bare(lambda: jax.block_until_ready(f(*args, **kwargs)))


def dispatched(f, *args):
    """n calls from Python, only the last one waited for."""

    def run(n):
        for _ in range(n):
            y = f(*args)
        jax.block_until_ready(y)

    return run


def attempt(rival: Rival):
    """The rival's run, seen to work; or why it can't be timed, to be reported in its place."""
    try:
        with contextlib.redirect_stdout(
            sys.stderr
        ):  # what it says of its own is not a line of ours
            run = rival.make(importlib.import_module(rival.package))
            run(2)
        return run
    except Exception as e:
        if isinstance(e, ModuleNotFoundError) and e.name == rival.package:
            return {"status": "not installed", "error": f"pip install {rival.install}"}
        return {
            "status": "failing",
            "error": f"{type(e).__name__}: {str(e).strip().partition(chr(10))[0]}",
        }


def rows_of(name: str, calls: int, rounds: int) -> list[dict]:
    """Measure a group: the figures of its variants, or why there are none, and its goals."""
    make, baselines, share, judge, most = GROUPS[name]
    rounds = min(rounds, most or rounds)
    variants = {v: attempt(run) if isinstance(run, Rival) else run for v, run in make().items()}
    times = measure(
        {v: run for v, run in variants.items() if callable(run)}, max(1, int(calls * share)), rounds
    )
    found = records(baselines, times)
    rows = [{"name": f"{name}/{v}", **(found.get(v, why))} for v, why in variants.items()]
    return rows + [
        verdict(f"acceptance/{name}: {what}", value, *limit) for what, value, *limit in judge(times)
    ]


def verdict(name: str, value: float | None, limit: float, why: str = "") -> dict:
    word = "no figure" if value is None else "PASS" if value <= limit else "FAIL"
    return {"name": name, "value": value, "limit": limit, "verdict": word} | (
        {"why": why} if word == "FAIL" and why else {}
    )


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


def records(baselines, times: dict) -> dict[str, dict]:
    ratios = {v: {b: ratio(t, times[b]) for b in baselines if b != v} for v, t in times.items()}
    return {
        v: {"us": min(t), "us_median": statistics.median(t), "ratios": ratios[v]}
        for v, t in times.items()
    }


def line(r: dict, width: int) -> str:
    """One row of the table."""
    name = f"{r['name']:{width}}"
    if "us" in r:
        return f"{name}{r['us']:11.2f}{r['us_median']:11.2f}   " + "   ".join(
            f"{v:.3g} x {b}" for b, v in r["ratios"].items()
        )
    if "status" in r:
        return f"{name}   {r['status']}: {r['error']}"
    return (
        name
        + "   "
        + "   ".join(
            f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}"
            for k, v in r.items()
            if k != "name"
        )
    )


def table(rows: list[dict]) -> str:
    """Figures first, goals and counts below them."""
    parts = [
        [r for r in rows if ("us" in r or "status" in r) is figures] for figures in (True, False)
    ]
    widths = [max([len(r["name"]) for r in part], default=0) + 1 for part in parts]
    lines = [line(r, width) for part, width in zip(parts, widths) for r in part]
    return "\n".join([f"{'':{widths[0]}}{'us, best':>11}{'median':>11}   ratios", *lines])
