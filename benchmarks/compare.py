"""Two files of results beside one another: `python -m benchmarks.compare OLD NEW`.

A ratio is new / old of the medians, with what the quartiles of both leave open: the most
favourable and the least. A row is slower if its ratio is beyond the bound, and its quartiles lie
wholly above the old ones. Prints the rows by their change, the largest first, and those that are in
one file only. The exit status is 1 where a row is slower, or where one of this package's own has no
figure any more.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.full import read

BOUND = 1.25


def compared(old: list[dict], new: list[dict], bound: float) -> list[dict]:
    """A dict for each row that has figures in both: name, ratio, [least, most], slower; by ratio,
    the largest first.

    Raises: ValueError where no row is in both, or where the units of one differ."""
    before, after = measured(old), measured(new)
    found = []
    for name in before.keys() & after.keys():
        a, b = before[name], after[name]
        if a["unit"] != b["unit"]:
            raise ValueError(
                f"expected one unit for {name}, got {a['unit']} and {b['unit']}; compare files of one version"
            )
        open_to = [b["quartiles"][0] / a["quartiles"][1], b["quartiles"][1] / a["quartiles"][0]]
        ratio = b["median"] / a["median"]
        slower = ratio > bound and open_to[0] > 1
        found.append({"name": name, "ratio": ratio, "open": open_to, "slower": slower})
    if not found:
        raise ValueError(
            "expected rows that are in both files, got none; pass two results of the same tables"
        )
    return sorted(found, key=lambda r: (-r["ratio"], r["name"]))


def measured(rows: list[dict]) -> dict[str, dict]:
    return {r["name"]: r for r in rows if "median" in r}


def lost(old: list[dict], new: list[dict]) -> list[dict]:
    """Rows of this package's own that had a figure, and now have an error in its place."""
    before = measured(old)
    return [r for r in new if r["name"] in before and r.get("status") == "failing" and r["ours"]]


def table(found: list[dict], old: list[dict], new: list[dict], bound: float) -> str:
    width = max(len(r["name"]) for r in found) + 2
    lines = [f"{'new / old':{width}}{'ratio':>8}   open to"]
    for r in found:
        low, high = r["open"]
        word = f"   SLOWER, beyond {bound:g}" if r["slower"] else ""
        lines.append(f"{r['name']:{width}}{r['ratio']:8.3f}   {low:.3f} to {high:.3f}{word}")
    before, after = measured(old), measured(new)
    lines += [f"in the old one only: {name}" for name in before if name not in after]
    lines += [f"in the new one only: {name}" for name in after if name not in before]
    lines += [f"no figure any more: {r['name']}: {r['error']}" for r in lost(old, new)]
    return "\n".join(lines)


def other_place(old: list[dict], new: list[dict]) -> str:
    """What differs between the machines and settings of both, since then ratios mean little."""
    keys = ("cpu", "cores", "python", "threads", "quick")
    differing = [k for k in keys if old[0].get(k) != new[0].get(k)]
    told = ", ".join(f"{k}: {old[0].get(k)} and {new[0].get(k)}" for k in differing)
    return f"these are not of one machine and kind: {told}" if told else ""


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--bound", type=float, default=BOUND, help="of a ratio that is no slower")
    chosen = parser.parse_args(argv)
    if not chosen.bound > 0:
        parser.error(f"expected a bound above 0, got {chosen.bound}")
    try:
        old, new = read(chosen.old), read(chosen.new)
        found = compared(old, new, chosen.bound)
    except OSError as error:
        parser.error(f"expected a file of results, got {error}")
    except ValueError as error:
        parser.error(str(error))
    if differing := other_place(old, new):
        print(differing)
    print(table(found, old, new, chosen.bound))
    return 1 if any(r["slower"] for r in found) or lost(old, new) else 0


if __name__ == "__main__":
    sys.exit(main())
