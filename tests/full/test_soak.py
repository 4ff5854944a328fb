"""A short soak of each lane, and one that is planted with leaks and a wrong number, which it must
tell (`make test-all`; the long one is `make soak`)."""

import json
import subprocess
import sys

import pytest

from tests.soak.__main__ import run
from tests.soak.lane import LANES

CALLS = 1000


@pytest.mark.timeout(900)  # the native lane compiles ten packages the first time
@pytest.mark.parametrize("lane", LANES)
def test_nothing_grows_and_every_number_is_right_x_lane(lane):
    *wrong, summary = run(lane, CALLS, seed=0)
    assert not wrong and summary["name"] == f"soak/{lane}", (wrong, summary)
    assert summary["calls"] >= CALLS and summary["faults"] >= 20


PLANTED = """
import os, sys, threading, time
import jax, torch
from tests.soak import into_torch, lane
leaked, good = [], into_torch.good
def leaking(rng, lane, case, n):
    leaked.append((b"x" * 5_000_000, jax.numpy.ones(3) + 1, torch.ones(3), open(os.devnull)))
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
    if len(leaked) == 7:
        case = case._replace(expected=lambda xs, w: 1.0001 * w * jax.numpy.sin(xs).sum(-1))
    return good(rng, lane, case, n)
into_torch.good = leaking
into_torch.CASES = {"energy": into_torch.CASES["energy"]._replace(dtypes=("float64",))}
into_torch.FAULTS = {}
sys.argv[1:] = ["torch", "1000", "0"]
sys.exit(lane.main())
"""


def test_planted_leaks_and_a_wrong_number_are_told():
    done = subprocess.run([sys.executable, "-c", PLANTED], stdout=subprocess.PIPE, text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 1
    assert {r["what"] for r in rows if r["name"] == "grown/torch"} >= {
        "MB",
        "arrays",
        "tensors",
        "files",
        "threads",
    }
    (wrong,) = [r for r in rows if r["name"] == "wrong/torch"]
    assert wrong["round"] == 6 and "off by" in wrong["error"]


def test_a_lane_that_dies_is_told(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert run("ffi", CALLS, 0) == [{"name": "died/ffi", "return code": 1}]
