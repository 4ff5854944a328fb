"""One lane, in a process of its own: `python -m tests.soak.lane ffi 10000 0` prints JSON lines."""

from __future__ import annotations

import faulthandler
import gc
import json
import sys
import time
import traceback
from collections import Counter, defaultdict
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from tests.soak import faults, into_jax, into_torch
from tests.soak.crossing import cross
from tests.soak.watch import growths, measured

LANES = (*into_jax.LANES, *into_torch.LANES)
ROUNDS = 250  # about: each compiles programs of its own
LEAST = 32  # rounds after those of the warm-up
AT_LEAST = 25  # calls of a round
CHECKPOINTS = 16
STUCK = 300  # seconds for a round, after which a lane ends with the stacks of all its threads
WRONG = 10  # rounds that may fail before a lane gives up


def soak(lane: str, calls: int, seed: int) -> list[dict[str, Any]]:
    """Rows: one for each round that failed, one for what has grown, and the last one for all."""
    side = into_jax if lane in into_jax.LANES else into_torch
    cases = side.cases(lane)
    wrongs = {name: f for name, (f, lanes) in side.FAULTS.items() if lane in lanes}
    each = max(AT_LEAST, calls // ROUNDS)
    warm = max(len(cases), 2 * len(wrongs))  # rounds in which each case and fault has come once
    rounds = max(LEAST, -(-calls // each) - warm)
    done, count, failed = 0, Counter(), []
    series = defaultdict(list)
    side.prepare(lane)
    gc.collect()
    gc.freeze()  # what was imported is no garbage, and takes a second to look through
    start = time.monotonic()
    bar = tqdm(total=calls, desc=lane, file=sys.stderr, mininterval=5)
    k = 0
    while done < calls or k < warm + rounds:
        rng = np.random.default_rng([seed, k])
        # all of them in turn, in an order of chance
        name = pick(cases, seed, k)
        fault = pick(wrongs, seed + 1, k // 2) if k % 2 and wrongs else None
        faulthandler.dump_traceback_later(STUCK, exit=True)
        try:
            n = side.good(rng, lane, cases[name], max(5, int(each * cases[name].share)))
            done += n
            bar.update(n)
            cross(rng)
            count[name] += n
            if fault:
                wrongs[fault](rng, lane)
                count[fault] += 1
        except BaseException as e:
            traceback.print_exc()
            text = f"{type(e).__name__}: {e}"[:2000]
            failed.append(
                {"name": f"wrong/{lane}", "round": k, "case": name, "fault": fault, "error": text}
            )
            if len(failed) == WRONG:
                break
        if k >= warm and (k - warm) % max(1, rounds // CHECKPOINTS) == 0:
            for what, x in measured().items():
                series[what].append(x)
        k += 1
    faulthandler.cancel_dump_traceback_later()
    bar.close()
    beyond = growths(series)
    return [
        *failed,
        *({"name": f"grown/{lane}", "what": what, **row} for what, row in beyond.items()),
        {
            "name": f"soak/{lane}",
            "calls": done,
            "rounds": k,
            "faults": sum(count[f] for f in wrongs),
            "wrong": len(failed),
            "grown": len(beyond),
            "interrupts": faults.interrupts,
            "seconds": round(time.monotonic() - start),
            "series": {what: told(series[what]) for what in ("MB", "arrays", "files", "threads")},
            "counts": dict(count),
        },
    ]


def pick(names: Any, seed: int, k: int) -> str:
    """The k-th of a series in which every name comes once in each turn, in an order of chance."""
    turn, place = divmod(k, len(names))
    return list(names)[np.random.default_rng([seed, turn]).permutation(len(names))[place]]


def told(values: list[float]) -> list[float]:
    """A series in a few figures."""
    return [round(x, 1) for x in values[:: max(1, len(values) // 8)]]


def main() -> int:
    """Prints the rows; 1 where something was wrong or has grown."""
    lane, calls, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    faulthandler.enable()
    faults.listen()
    jax.config.update("jax_enable_x64", True)
    rows = soak(lane, calls, seed)
    for row in rows:
        print(json.dumps(row), flush=True)
    return int(bool(rows[-1]["wrong"] or rows[-1]["grown"]))


if __name__ == "__main__":
    sys.exit(main())
