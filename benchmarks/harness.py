"""How benchmarks measure: variants of a group take turns, so that the drift of a busy machine hits
them all alike."""

from __future__ import annotations

import contextlib
import importlib
import re
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import jax

GROUPS = {}


class Rival(NamedTuple):
    """Another package that offers the same, and may be absent or broken: make(its module) gives
    what can be run. `compiles` marks one that compiles for seconds to minutes where nothing is
    kept of it on the disk."""

    package: str
    install: str
    make: Callable
    compiles: bool = False


class Case(NamedTuple):
    """One comparison of a table: make() gives {variant: run(n calls), or a Rival}.

    The first of the `baselines` is what one would have without the bridge; `controls` are what
    nobody could have in its place, such as an empty loop. A figure is the time of a call / per, in
    `unit`. A round of a variant takes about `seconds` or `calls`, whichever is less, and a variant
    whose call takes `longest` seconds isn't timed."""

    make: Callable
    baselines: tuple = ()
    controls: tuple = ()
    unit: str = "us"
    per: float = 1
    calls: int = 1000
    seconds: float = 0.25
    rounds: int = 99
    longest: float = 12.0


WAY = re.compile(r"(, (requires_grad|\.backward\(\)|loss in JAX))?$")  # each is asked of several
UNITS = {"us": 1.0, "ms": 1e-3, "s": 1e-6, "MB": 1.0}  # of what is measured: microseconds, MB
OURS = re.compile(
    r"bridge|(?<![\w-])(ffi|host|native)(,|$)"
)  # a variant of this package, by its name


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


def late(make, compiles=False):
    """A variant of our own that is made when its turn comes, and whose failure is a row."""
    return Rival("benchmarks.harness", "", lambda _: make(), compiles)


def attempt(rival: Rival, calls: int = 2):
    """The rival's run, seen to work; or why it can't be timed, to be reported in its place."""
    try:
        with contextlib.redirect_stdout(
            sys.stderr
        ):  # what it says of its own is not a line of ours
            run = rival.make(importlib.import_module(rival.package))
            run(calls)
        return run
    except Exception as e:
        if isinstance(e, ModuleNotFoundError) and e.name == rival.package:
            return {"status": "not installed", "error": f"pip install {rival.install}"}
        return {"status": "failing", "error": said(e)}


def said(e: Exception) -> str:
    return f"{type(e).__name__}: {str(e).strip().partition(chr(10))[0]}"


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


def case_rows(name: str, case: Case, rounds: int, quick: bool = False) -> list[dict]:
    """Measure a case of a table: a row for each of its variants, figures or why there are none."""
    try:
        made = case.make()
    except Exception as e:
        return [{"name": name, "ours": True, "status": "failing", "error": said(e)}]
    left = {v: run for v, run in made.items() if quick and isinstance(run, Rival) and run.compiles}
    runs = {v: NOT_QUICK if v in left else attempt(as_rival(run), 1) for v, run in made.items()}
    once = {v: seconds_of(run) for v, run in runs.items() if callable(run)}
    slow = {v: too_slow(s, case.longest) for v, s in once.items() if s > case.longest}
    calls = {v: max(1, min(case.calls, int(case.seconds / s))) for v, s in once.items()}
    timed = {v: run for v, run in runs.items() if callable(run) and v not in slow}
    rounds, calls = (1, dict.fromkeys(calls, 1)) if quick else (min(rounds, case.rounds), calls)
    found = compared(name, case, measure(timed, calls, rounds, warm=False), calls)
    return [found.get(v) or without(name, v, slow.get(v) or runs[v]) for v in made]


def without(name: str, variant: str, why: dict) -> dict:
    """The row of a variant without figures."""
    return {"name": f"{name}/{variant}", "ours": bool(OURS.search(variant)), **why}


NOT_QUICK = {"status": "left out", "error": "it compiles, and this was --quick"}


def prepare(case: Case) -> dict[str, dict]:
    """What a case compiles and keeps on the disk, compiled: {variant: what failed}."""
    made = {v: run for v, run in case.make().items() if isinstance(run, Rival) and run.compiles}
    return {v: run for v, run in ((v, attempt(r, 1)) for v, r in made.items()) if not callable(run)}


def as_rival(run) -> Rival:
    return run if isinstance(run, Rival) else late(lambda: run)


def seconds_of(run) -> float:
    start = time.perf_counter()
    run(1)
    return time.perf_counter() - start


def too_slow(seconds: float, limit: float) -> dict:
    return {"status": "not timed", "error": f"a call takes {seconds:.0f} s, over {limit:.0f} s"}


def quartiles(xs: list[float]) -> list[float]:
    """The first, the second (the median) and the third."""
    return statistics.quantiles(xs, n=4, method="inclusive") if len(xs) > 1 else [xs[0]] * 3


def compared(name: str, case: Case, times: dict, calls: dict) -> dict[str, dict]:
    """{variant: its row}, from microseconds a call in each round: median and quartiles, and ratios
    to the others, taken round by round, [first quartile, median, third].

    `behind` are those of the ratios, for a variant of ours, that say that another is ahead."""
    scale = UNITS[case.unit] / case.per
    rows = {}
    for v, ts in times.items():
        first, middle, last = (t * scale for t in quartiles(ts))
        against = {
            b: quartiles([x / y for x, y in zip(ts, times[b], strict=True)])
            for b in times
            if b != v and (b in case.baselines or not OURS.search(b))
        }
        rows[v] = {
            "name": f"{name}/{v}",
            "unit": case.unit,
            "median": middle,
            "quartiles": [first, last],
            "rounds": len(ts),
            "calls": calls[v],
            "ours": bool(OURS.search(v)),
            "baselines": [b for b in case.baselines if b in against],
            "ratios": against,
            "behind": [
                b
                for b, (low, ratio, _) in against.items()
                if OURS.search(v)
                and not (OURS.search(b) or b in case.controls)
                and way(v) == way(b)
                and low > 1
                and ratio > AHEAD
            ],
        }
    return rows


def way(variant: str) -> str:
    """How a variant is called, where a case has several ways: only like is compared with like."""
    return WAY.search(variant).group()


AHEAD = 1.05  # the least ratio that is told as one


def measure(variants: dict, calls: int | dict, rounds: int, warm=True) -> dict[str, list[float]]:
    """Microseconds a call, for each round; every other round goes in the opposite order. `calls` of
    a round may differ, {variant: calls}. `warm` tells that nothing was compiled yet."""
    times = {name: [] for name in variants}
    for k in range(-1 if warm else 0, rounds):  # the first one compiles
        for name in list(variants)[:: -1 if k % 2 else 1]:
            each = calls[name] if isinstance(calls, dict) else calls
            start, n = time.perf_counter(), each if k >= 0 else 2
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
