"""The demo over devices and processes in small: the same crystals whoever relaxes them, resumption
on other devices, nonsense refused."""

import os
import subprocess
import sys

import ase.io
import numpy as np
import pytest

from demos import alloy, distributed

SMALL = "--crystals 8 --chunk 5 --timed --out".split()
NONSENSE = {
    "--crystals 10": "argument --crystals: expected a multiple of 1, 2, 4, got 10; change it",
    "--crystals 12 --processes 2 --devices 4": "argument --crystals: expected a multiple of 8, got 12; change it",
    "--steps 15": "argument --steps: expected a multiple of --chunk 10, got 15; change it",
    "--devices 0": "argument --devices: expected a number (int) at least 1, got 0; give such a number",
    "--out a_file": "argument --out: expected a folder, got a_file; change it",
}


@pytest.mark.parametrize("args", NONSENSE)
def test_nonsense_is_refused_in_one_clear_line(args, refused_line):
    assert NONSENSE[args] in refused_line(distributed.options, args)


def demo(out, *arguments):
    """What a process of the demo prints; JAX in this one has its devices already."""
    settings = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, "-m", "demos.distributed", *SMALL, str(out), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, env=settings)
    assert not ended.returncode, ended.stderr[-3000:]
    return ended.stdout


def relaxed(out):
    atoms = ase.io.read(out / "distributed.extxyz", ":")
    return np.array([a.positions for a in atoms]), np.array([a.cell.array for a in atoms])


def state(out):
    with np.load(out / "distributed.ckpt.npz", allow_pickle=False) as file:
        return {name: file[name] for name in file.files if file[name].dtype == np.float64}


def test_devices_processes_and_resumption(tmp_path):
    """Two devices of one process, of two processes, and stopped and continued on four: the same
    crystals; and to the same bits where it is continued on as many devices as before."""
    one, two, stopped = tmp_path / "one", tmp_path / "two", tmp_path / "stopped"
    said = demo(one, "--steps", "20", "--devices", "2")
    assert "8 crystals of Cu3Au, 32 atoms each; 2 devices of 1 process(es)" in said
    demo(two, "--steps", "20", "--devices", "1", "--processes", "2")
    demo(stopped, "--steps", "10", "--devices", "2")
    kept = (
        (stopped / "distributed.ckpt.npz").read_bytes(),
        (stopped / "distributed.jsonl").read_bytes(),
    )
    demo(stopped, "--steps", "20", "--devices", "2", "--resume")
    for name, x in state(one).items():
        np.testing.assert_array_equal(state(stopped)[name], x)
    (stopped / "distributed.ckpt.npz").write_bytes(kept[0])
    (stopped / "distributed.jsonl").write_bytes(kept[1])
    demo(stopped, "--steps", "20", "--devices", "4", "--resume")
    for out in (two, stopped):
        for ours, theirs in zip(relaxed(out), relaxed(one)):
            np.testing.assert_allclose(ours, theirs, atol=1e-7)


def test_the_crystals_are_those_that_they_say():
    chosen = distributed.options(["--crystals", "4"])
    positions, cells, numbers = distributed.crystals(chosen)
    assert positions.shape == (4, 32, 3) and (numbers == alloy.AU).sum() == 8
    volume = np.linalg.det(cells) / 32
    assert np.allclose(volume, alloy.LATTICE**3 / 4, rtol=0.2)
    apart = np.linalg.norm(positions[:, :, None] - positions[:, None], axis=-1)
    assert (apart + 10 * np.eye(32)).min() > 1.5
