"""Every peer in one table, table by table: `python -m benchmarks.full`.

A table is one process, in which the variants of a case take turns, on one thread of torch. A row is
the median over rounds with its quartiles, and its ratios to the others, taken round by round. A
variant that fails is a row with its error. The first line says where and when. The rows of all
tables go to benchmarks/results/<date>-<machine>.jsonl, and from there, with a picture for each
table, to docs/benchmarks.md (benchmarks/page.py). --only measures some tables again and leaves the
others of that file as they are. --prepare compiles what the tables want compiled, into build/, and
measures nothing; what it has not compiled, a table compiles before it measures. --quick proves that
everything runs, and its times mean nothing.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.machine import cpu, installed, machine
from benchmarks.tables import TABLES

ROOT = Path(__file__).resolve().parents[1]
RESULTS, QUICK = ROOT / "benchmarks/results", ROOT / "benchmarks/out/quick.jsonl"
TIMEOUT, PREPARING = 1200, 7200  # seconds for a table, and for all that it wants compiled
PACKAGES = tuple(
    "jax jaxlib torch jax-tvm-ffi numpy wrap-torch2jax torch-jax-interop jax2torch jax-md ase "
    "torch-sim-atomistic sevenn mace-torch chgnet vesin".split()
)


def environment(options) -> dict:
    """The first line of a file of results."""
    return {
        "name": "environment",
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "threads": 1,
        "rounds": options.rounds,
        "quick": options.quick,
        "versions": {package: installed(package) for package in PACKAGES},
        "seconds": {},
    }


def settings() -> dict[str, str]:
    """The environment of a table's process: one thread, and what is compiled is kept."""
    kept = {"BRIDGE_CACHE": "build/native", "TORCHINDUCTOR_CACHE_DIR": "build/inductor"}
    folders = {name: os.environ.get(name, str(ROOT / path)) for name, path in kept.items()}
    return os.environ | {"OMP_NUM_THREADS": "1"} | folders


def rows_of(table: str, options) -> Iterator[dict]:
    """Measures a table in a process of its own; its rows as they come."""
    command = [sys.executable, "-m", "benchmarks.full", "--child", table]
    command += ["--rounds", str(options.rounds)] + ["--quick"] * options.quick
    command += ["--prepare"] * options.prepare
    limit = PREPARING if options.prepare else TIMEOUT
    with subprocess.Popen(
        ["timeout", str(limit), *command],
        cwd=ROOT,
        env=settings(),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield from map(json.loads, process.stdout)
    if process.returncode:
        why = f"over {limit} s" if process.returncode == 124 else f"exit {process.returncode}"
        error = f"its process ended early: {why}"
        yield {"name": table, "ours": True, "status": "failing", "error": error}


def child(options) -> None:
    """One table, in this process: a JSON line for each row on stdout, and all else on stderr."""
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import warnings

    import jax
    import torch

    from benchmarks import harness

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    name = options.child
    module = importlib.import_module(f"benchmarks.tables.{name}")
    # for all threads: XLA's, which serve the host lane, do not see a `with jax.enable_x64`
    jax.config.update("jax_enable_x64", getattr(module, "X64", False))
    with jax.default_device(jax.devices("cpu")[0]):
        if options.prepare:
            found = prepared(module, name)
        elif hasattr(module, "rows"):
            found = module.rows(name, options.rounds, options.quick)
        else:
            found = (
                row
                for title, case in module.cases(options.quick).items()
                for row in harness.case_rows(f"{name}/{title}", case, options.rounds, options.quick)
            )
        for row in found:
            print(json.dumps(row), file=lines, flush=True)


def prepared(module, name: str) -> Iterator[dict]:
    """Compiles what the cases of a table want compiled."""
    from benchmarks.harness import prepare, without

    for title, case in (module.cases(False) if hasattr(module, "cases") else {}).items():
        for variant, why in prepare(case).items():
            yield without(f"{name}/{title}", variant, why)
    if hasattr(module, "prepare"):
        for variant, why in module.prepare():
            yield without(name, variant, why)


def read(path: Path) -> list[dict]:
    """The rows of a file of results.

    Raises: ValueError for a file that is not one; OSError for one that is not there."""
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"expected JSON lines in {path}, got {error}; pass a result of make bench-full"
        ) from error
    if not rows or not all(isinstance(r, dict) and isinstance(r.get("name"), str) for r in rows):
        raise ValueError(
            f"expected JSON lines with names in {path}, got others; pass a result of make bench-full"
        )
    return rows


def merged(old: list[dict], new: list[dict], tables) -> list[dict]:
    """The environment of the new rows, and the rows of `tables` in place of the old ones."""
    seconds = (old[0].get("seconds", {}) if old else {}) | new[0]["seconds"]
    kept = [r for r in old[1:] if r["name"].split("/")[0] not in tables] + new[1:]
    order = list(TABLES)
    return [
        new[0] | {"seconds": seconds},
        *sorted(kept, key=lambda r: order.index(r["name"].split("/")[0])),
    ]


def run(options) -> int:
    """Measures, keeps and shows; the exit status is 1 where one of our own variants has no figure."""
    from benchmarks import page

    path, failed = options.out, []
    began = environment(options)
    old = read(path) if path.exists() and not options.quick else []
    fresh = [began]
    for table in options.only:
        start = time.perf_counter()
        rows = list(rows_of(table, options))
        began["seconds"][table] = round(time.perf_counter() - start, 1)
        print(f"{table}: {began['seconds'][table]} s", file=sys.stderr, flush=True)
        print("\n".join(map(json.dumps, rows)), flush=True)
        failed += [r for r in rows if r.get("status") == "failing" and r["ours"]]
        fresh += rows
        if options.prepare:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(map(json.dumps, merged(old, fresh, options.only))) + "\n")
    for r in failed:
        print(f"failing: {r['name']}: {r['error']}", file=sys.stderr)
    if not options.prepare:
        if path.parent == RESULTS:
            page.write(read(path))
        print("", page.text_table(fresh[1:]), page.report(fresh[1:]), sep="\n")
    return 1 if failed else 0


def arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.full",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", choices=TABLES, nargs="+", default=list(TABLES))
    parser.add_argument("--rounds", type=int, default=11, help="at most, for each case")
    parser.add_argument("--quick", action="store_true", help="once each, small, nothing compiled")
    parser.add_argument("--prepare", action="store_true", help="compile, and measure nothing")
    parser.add_argument("--docs", action="store_true", help="write the page of --out, no more")
    parser.add_argument("--out", type=Path, help="the file of results")
    parser.add_argument("--child", choices=TABLES, help=argparse.SUPPRESS)
    chosen = parser.parse_args(argv)
    if chosen.rounds < 1:
        parser.error(f"expected --rounds of 1 or more, got {chosen.rounds}")
    if chosen.out is None and chosen.docs:
        chosen.out = max(RESULTS.glob("*.jsonl"), default=None)
        if chosen.out is None:
            parser.error(f"expected results in {RESULTS}, got none; run make bench-full")
    today = f"{datetime.date.today().isoformat()}-{machine()}.jsonl"
    chosen.out = chosen.out or (QUICK if chosen.quick else RESULTS / today)
    return chosen


def main(argv=None) -> int:
    options = arguments(argv)
    if options.child:
        child(options)
        return 0
    if options.docs:
        from benchmarks import page

        page.write(read(options.out))
        return 0
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
