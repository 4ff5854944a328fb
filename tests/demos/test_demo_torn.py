"""Runs that are killed at any moment, and disks that are full: the run goes on from a checkpoint, to
the same bits."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from demos import runs
from tests.calls.test_torn_files import files_of_at_most, left_over

ROOT = Path(__file__).resolve().parents[2]
STEPS = 3000
KILLED = f"""
import sys
import jax.numpy as jnp
from tests.demos.test_demo_torn import run
run(sys.argv[1], {STEPS})
"""


def run(path, steps=STEPS, **options):
    """A state of 80 kB, so that a checkpoint takes its time."""
    observe = lambda x, _: {"x": x[:40]}
    step = lambda x: x + jnp.sin(x)
    start = jnp.arange(1e4, dtype="float32")
    given = dict(chunk=3, path=path, observe=observe, resume=True, desc=None) | options
    return runs.run(step, start, steps, **given)


def test_a_run_x_kill_9(tmp_path):
    chance = random.Random(1)
    checkpoint = tmp_path / "run.ckpt.npz"
    for _ in range(2):
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path / "run")],
            cwd=ROOT,
            env={**os.environ, "JAX_ENABLE_X64": "0"},
        )
        while not checkpoint.exists() or checkpoint.stat().st_mtime_ns == before:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(0.5 * chance.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(left_over(tmp_path)) <= 1
        with np.load(checkpoint) as saved:
            done = int(saved["meta"].item().split('"done": ')[1].split(",")[0])
        assert 0 < done < STEPS
    killed = run(tmp_path / "run", done + 30)
    whole = run(tmp_path / "whole", done + 30)
    np.testing.assert_array_equal(killed.state, whole.state)
    np.testing.assert_array_equal(killed.observables["x"], whole.observables["x"])
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("size", [0, 3000, 5000, 20_000])
def test_a_run_x_a_full_disk(size, tmp_path):
    """Full in the middle of a line of observables, or of a checkpoint."""
    run(tmp_path / "run", 3)
    whole = run(tmp_path / "whole", 9)
    with files_of_at_most(size), pytest.raises(OSError, match=f"leave to write {tmp_path}/run"):
        run(tmp_path / "run", 9)
    killed = run(tmp_path / "run", 9)
    np.testing.assert_array_equal(killed.state, whole.state)
    np.testing.assert_array_equal(killed.observables["x"], whole.observables["x"])
    assert left_over(tmp_path) == []


HOSTILE = {
    "another file": ({"sizes": {"../victim": 0}}, "none of this run's"),
    "beside it": ({"sizes": {"victim": 0}}, "none of this run's"),
    "a negative size": ({"sizes": {"run.jsonl": -1}}, "-1 where a number of steps"),
    "no number": ({"done": "3"}, "'3' where a number of steps"),
    "no settings": ({"settings": []}, "settings that are no dict"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_checkpoint_that_names_other_files_is_refused(case, tmp_path):
    """It says to which size files are cut."""
    change, text = HOSTILE[case]
    (place := tmp_path / "runs").mkdir()
    for victim in (tmp_path / "victim", place / "victim"):
        victim.write_text("keep me")
    files = runs.Files(place / "run", {"chunk": 3})
    files.begin([])
    meta = dict(done=3, settings={"chunk": 3}, sizes={"run.jsonl": 0}) | change
    with open(files.checkpoint, "wb") as opened:
        np.savez(opened, meta=np.array(runs.json.dumps(meta)), leaf_0=np.zeros(3))
    with pytest.raises(ValueError, match=f"{files.checkpoint}, which can't be read .*{text}"):
        files.load([np.zeros(3)], 9)
    assert (tmp_path / "victim").read_text() == (place / "victim").read_text() == "keep me"


@pytest.mark.parametrize("line", ["[1]", "{}", '{"x": [', "[" * 100_000])
def test_observables_that_are_none_name_the_file(line, tmp_path):
    files = runs.Files(tmp_path / "run", {})
    files.lines.write_text('{"x": 1.0}\n' + line + "\n")
    with pytest.raises(ValueError, match=f"expected observables of runs.run in {files.lines}, got"):
        files.observables()
