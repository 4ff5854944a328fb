"""Very many calls on each lane, with faults among them, beneath which nothing may grow and every
number is right: `python -m tests.soak`, or `make soak`.

Each lane has a process of its own, one after another: what ends one is told, and the others go on.
Prints JSON lines, then a table. A round draws a function, a dtype, a shape and a transform, calls it
in a scan, jitted and eagerly (or in a loop, in torch), and compares every value with a closed form;
after every second round something goes wrong on purpose. Sixteen times memory, arrays, tensors, all
that the packages keep, files and threads are measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

from tests.soak.lane import LANES


def run(lane: str, calls: int, seed: int) -> list[dict[str, Any]]:
    """The rows of one lane; where its process dies, a row that says how."""
    command = [sys.executable, "-m", "tests.soak.lane", lane, str(calls), str(seed)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if not rows or rows[-1]["name"] != f"soak/{lane}":
        rows.append({"name": f"died/{lane}", "return code": done.returncode})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """One line for each lane."""
    lines = [
        f"{'lane':10}{'calls':>10}{'faults':>8}{'wrong':>7}{'grown':>7}{'MB':>16}{'seconds':>9}"
    ]
    for row in rows:
        kind, lane = row["name"].split("/")
        if kind == "died":
            lines.append(f"{lane:10}{'died':>10}, return code {row['return code']}")
        elif kind == "soak":
            memory = f"{row['series']['MB'][0]:.0f} -> {row['series']['MB'][-1]:.0f}"
            lines.append(
                f"{lane:10}{row['calls']:10}{row['faults']:8}{row['wrong']:7}{row['grown']:7}"
                f"{memory:>16}{row['seconds']:9}"
            )
    return "\n".join(lines)


def main(argv=None) -> int:
    """Returns 1 where something was wrong, has grown, or died. What grows in the control is not ours."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--calls", type=int, default=1_000_000, help="on each lane")
    parser.add_argument("--lanes", choices=LANES, nargs="+", default=[*LANES])
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(argv)
    found = []
    for lane in chosen.lanes:
        for row in run(lane, chosen.calls, chosen.seed):
            print(json.dumps(row), flush=True)
            found.append(row)
    print(table(found))
    ours = [r for r in found if r["name"] != "grown/control"]
    return int(any(not r["name"].startswith("soak/") for r in ours))


if __name__ == "__main__":
    sys.exit(main())
