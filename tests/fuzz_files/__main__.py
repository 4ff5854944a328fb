"""`python -m tests.fuzz_files --examples 100000`: mutated files at every door that promises to be
safe. No file may end the process that loads it, run anything, hang, or take much memory; each loads
to something of the right types, or is refused by a ValueError that names it.

Each worker is a process. Where one ends or hangs, that is counted, and another goes on behind the
example. Exit code 1 says that there were failures; `--one N` loads example N alone.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

from jax_side.montecarlo import fence
from tests.fuzz_files.doors import DOORS

MEMORY = 2**34  # bytes of address space of a worker
SECONDS = 120.0  # for one example
PROGRAM = 20.0  # for one program of JAX, in place of minutes: a changed one may be without an end
ROOT = Path(__file__).resolve().parents[2]


def example(seed, number, doors=None):
    """(name of the door, its random generator) of an example."""
    chance = random.Random(f"{seed} {number}")
    doors = doors or {name: door.share for name, door in DOORS.items()}
    return chance.choices(list(doors), list(doors.values()))[0], chance


def tried(name, chance, folder, doors=DOORS):
    """What becomes of an example: "loaded", "refused", or what is wrong, in words."""
    door, canary = doors[name], folder / "canary"
    place = folder / "example"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    path = place / door.file
    original = door.make()
    data = original
    while data == original:
        data = door.change(original, chance, canary)
    path.write_bytes(data)
    outcome = "loaded"
    try:
        door.load(path)
    except ValueError as error:
        outcome = "refused"
        if str(place) not in str(error):
            outcome = f"an error without the name of the file: {error!r:.300}"
    except Exception as error:
        outcome = f"another error: {error!r:.300}"
    if canary.exists():
        canary.unlink()
        return "a pickle was run"
    return outcome


def work(seed, first, step, end, only, folder, report):
    """Examples first, first + step, ...; a line for each is written to `report`."""
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    fence.SECONDS = PROGRAM
    doors = {only: 1.0} if only else None
    with open(report, "ab", buffering=0) as lines:
        for number in range(first, end, step):
            name, chance = example(seed, number, doors)
            lines.write(f"{number} {name}\t".encode())
            lines.write(f"{tried(name, chance, folder)!r}\n".encode(errors="replace"))


class Worker:
    """A process that tries every `step`th example."""

    def __init__(self, args, rank, folder):
        self.args, self.next = args, rank
        self.folder, self.report = folder / str(rank), folder / f"{rank}.txt"
        self.folder.mkdir()
        self.report.touch()
        self.read, self.since, self.counts = 0, time.monotonic(), Counter()
        self.failures = []
        self.start()

    def start(self):
        env = {**os.environ, "BRIDGE_CACHE": str(self.folder / "cache"), "OMP_NUM_THREADS": "1"}
        env.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.process = subprocess.Popen(self.command(), cwd=ROOT, env=env, **quiet)

    def command(self):
        a = self.args
        given = [a.seed, self.next, a.workers, a.examples, a.only or "", self.folder, self.report]
        code = (
            "import sys; from pathlib import Path; from tests.fuzz_files.__main__ import work; "
            "s, f, n, e, o, d, r = sys.argv[1:]; "
            "work(int(s), int(f), int(n), int(e), o, Path(d), r)"
        )
        return [sys.executable, "-c", code, *map(str, given)]

    def look(self):
        """Takes in what was reported. Returns False once all is done."""
        code = self.process.poll()
        whole, _, part = self.report.read_text()[self.read :].rpartition("\n")
        for line in whole.splitlines():
            self._note(line)
            self.since = time.monotonic()
        self.read += len(whole) + bool(whole)
        if code is None and time.monotonic() - self.since > SECONDS:
            self.process.kill()
            code = self.process.wait()
            part = part or f"{self.next} start\t"
            self._failed(part, f"more than {SECONDS:.0f} s")
        elif code is None:
            return True
        elif code:
            self._failed(part or f"{self.next} start\t", f"the process ended ({code})")
        if code and self.next < self.args.examples:
            self.since = time.monotonic()
            self.report.write_text("")
            self.read = 0
            self.start()
            return True
        return False

    def _note(self, line):
        head, _, outcome = line.partition("\t")
        number, _, name = head.partition(" ")
        self.next = int(number) + self.args.workers
        outcome = outcome.strip("'\"")
        if outcome in ("loaded", "refused"):
            self.counts[name, outcome] += 1
        else:
            self.counts[name, "failed"] += 1
            self.failures.append(f"{number} ({name}): {outcome}")

    def _failed(self, part, what):
        self._note(f"{part.partition(chr(9))[0]}\t{what}")


def parsed(argv):
    parser = argparse.ArgumentParser(prog="tests.fuzz_files", description=__doc__)
    parser.add_argument("--examples", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(DOORS), help="one door")
    parser.add_argument("--one", type=int, help="the number of one example, loaded in this process")
    return parser.parse_args(argv)


def main(argv=None):
    args = parsed(argv)
    with tempfile.TemporaryDirectory(prefix="fuzz-files-") as made:
        folder = Path(made)
        if args.one is not None:
            name, chance = example(args.seed, args.one, {args.only: 1.0} if args.only else None)
            print(name, tried(name, chance, folder))
            return 0
        workers = [Worker(args, rank, folder) for rank in range(args.workers)]
        began = said = time.monotonic()
        try:
            while any(w.look() for w in workers):
                time.sleep(0.2)
                if time.monotonic() - said > 30:
                    said = time.monotonic()
                    done = sum(sum(w.counts.values()) for w in workers)
                    print(f"{done} of {args.examples} after {said - began:.0f} s", flush=True)
        finally:
            for w in workers:
                with contextlib.suppress(ProcessLookupError):
                    w.process.kill()
    counts = sum((w.counts for w in workers), Counter())
    failures = [f for w in workers for f in w.failures]
    print(f"{'door':14} {'refused':>8} {'loaded':>8} {'failed':>8}")
    for name in sorted({name for name, _ in counts}):
        row = [counts[name, outcome] for outcome in ("refused", "loaded", "failed")]
        print(f"{name:14} {row[0]:8} {row[1]:8} {row[2]:8}")
    print(f"{sum(counts.values())} files in {time.monotonic() - began:.0f} s")
    for failure in failures[:50]:
        print(failure)
    return 1 if failures or sum(counts.values()) < args.examples else 0


if __name__ == "__main__":
    sys.exit(main())
