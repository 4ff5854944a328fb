"""Are wrong lines found by the tests? `make mutate`: mutants of the core rooms, and which of them the
tests kill (ARGS="--help").

Each mutant is put in the place of its module in a process of its own, where the tests that reach it
run until one fails. Results are kept in build/mutation/results.jsonl, so that a run goes on where
another has ended; the mutants of a file that has changed are made and run anew.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from typing import Any

from tests.mutation import running
from tests.mutation.explained import reason
from tests.mutation.mutants import Mutant, sample
from tests.mutation.rooms import FILES, OUT, ROOMS, ROOT
from tests.mutation.selection import REACHING, Selection

RESULTS = OUT / "results.jsonl"
Line = dict[str, Any]


def options(arguments: list[str]) -> argparse.Namespace:
    """Returns what the command line asks for."""
    parser = argparse.ArgumentParser("python -m tests.mutation", description=__doc__)
    add = parser.add_argument
    add("--sample", type=int, default=300, help="so many mutants, chosen by chance; 0: all")
    add("--seed", type=int, default=0, help="another one gives another sample")
    add("--rooms", nargs="+", choices=[*ROOMS], default=[*ROOMS], help="of these rooms only")
    add("--files", nargs="+", choices=[*FILES], help="of these files only")
    add("--seconds", type=float, default=60, help="for each of two waves of tests of a mutant")
    add("--again", action="store_true", help="run survivors again, since tests are new")
    add("--record", action="store_true", help="record which tests reach which lines, and end")
    add("--report", action="store_true", help="run nothing, tell what is known")
    return parser.parse_args(arguments)


def known() -> dict[str, Line]:
    """Returns the last result of each mutant."""
    if not RESULTS.exists():
        return {}
    return {line["key"]: line for line in map(json.loads, RESULTS.read_text().splitlines())}


def tried(mutant: Mutant, selection: Selection) -> Line:
    """Runs the tests of a mutant until one fails, and returns the result."""
    outcome = None
    seconds = number = 0
    for tests in selection.waves(mutant):
        if tests and (outcome is None or outcome.how == "passed"):
            limit = 90 + 5 * sum(time for time, _ in tests)
            names = [test for _, test in tests]
            outcome = running.run(mutant.file, mutant.source, names, limit)
            if outcome.how == "crash" and not outcome.test:
                check_tests(names[:1])
            seconds += outcome.seconds
            number += len(tests)
    return dict(
        key=mutant.key,
        file=mutant.file,
        line=mutant.line,
        inside=mutant.inside,
        operator=mutant.operator,
        before=mutant.before,
        after=mutant.after,
        tests=number,
        seconds=round(seconds, 1),
        how=outcome.how if outcome else "no test",
        test=outcome.test if outcome else "",
        why=outcome.why if outcome else "",
    )


def check_tests(tests: list[str]) -> None:
    """Ends this program where tests can't even start without a mutant, which would be killed by it."""
    file = next(iter(FILES))
    if running.run(file, (ROOT / file).read_text(), tests, 300).how == "crash":
        raise SystemExit(f"{tests} can't start without a mutant either: is .venv as it was?")


def survives(line: Line) -> bool:
    """True for a mutant that no test has killed."""
    return line["how"] in ("passed", "no test")


def unfit(lines: list[Line]) -> list[Line]:
    """Returns the results that count for nothing: whose test fails without the mutant, too. The tests
    of a file are run together."""
    of_file: dict[str, set[str]] = defaultdict(set)
    for line in lines:
        if "::" in line["test"] and not survives(line):
            of_file[line["test"].split("::")[0]].add(line["test"])
    bad: set[str] = set()
    file = next(iter(FILES))
    for left in of_file.values():
        while left:
            limit = 120 + 60 * len(left)
            outcome = running.run(file, (ROOT / file).read_text(), sorted(left), limit)
            if outcome.how == "passed":
                break
            found = {outcome.test} & left or set(left)  # all of them where none can be named
            left -= found
            bad |= found
    return [line for line in lines if line["test"] in bad]


def interval(k: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of 95 % for k of n."""
    middle = (k + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
    return middle - half, middle + half


def report(lines: list[Line]) -> str:
    """Returns a table of the rooms, and the survivors that are not explained."""
    rows = [f"{'room':14} mutants killed survived explained  killed or explained (95 %)"]
    for room in [*ROOMS, "all"]:
        here = [line for line in lines if room in ("all", FILES[line["file"]])]
        alive = [line for line in here if survives(line)]
        fine = sum(bool(reason(x)) for x in alive)
        if n := len(here):
            k = n - len(alive) + fine
            low, high = interval(k, n)
            rows.append(
                f"{room:14} {n:7} {n - len(alive):6} {len(alive):8} {fine:9}"
                f"  {k / n:.1%} ({low:.1%} to {high:.1%})"
            )
    for x in sorted(lines, key=lambda x: (x["file"], x["line"])):
        if survives(x) and not reason(x):
            rows += [f"\n{x['file']}:{x['line']} {x['operator']} ({x['how']}, {x['tests']} tests)"]
            rows += [f"  - {x['before']}", f"  + {x['after']}"]
    ways = Counter(line["how"] for line in lines)
    mean = sum(line["seconds"] for line in lines) / max(len(lines), 1)
    return "\n".join([*rows, "", f"{dict(ways)}, {mean:.1f} s each"])


def main(arguments: list[str]) -> int:
    """Runs the sample, and returns 1 if fewer than 85 % are killed or explained."""
    args = options(arguments)
    if args.record:
        command = [sys.executable, "-m", "tests.mutation.covering", *REACHING]
        return subprocess.run(command, cwd=ROOT).returncode
    files = args.files or [file for file, room in FILES.items() if room in args.rooms]
    chosen = sample(files, args.sample, args.seed)
    done = known()
    if not args.report:
        selection = Selection(args.seconds)
        running.preload()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and ends the tests that run
        for i, mutant in enumerate(chosen):
            old = done.get(mutant.key)
            if old is None or (args.again and survives(old) and not reason(old)):
                done[mutant.key] = line = tried(mutant, selection)
                with open(RESULTS, "a") as file:
                    file.write(json.dumps(line) + "\n")
                print(f"{i + 1}/{len(chosen)} {line['how']:7} {line['seconds']:6} s  {mutant.file}")
    lines = [done[m.key] for m in chosen if m.key in done]
    bad = [] if args.report else unfit(lines)
    for line in bad:
        print(f"not counted, for {line['test']} fails without the mutant: {line['why']}")
    lines = [line for line in lines if line not in bad]
    print(report(lines))
    counted = [x for x in lines if not survives(x) or reason(x)]
    return int(len(counted) < 0.85 * len(lines))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
