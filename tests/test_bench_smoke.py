"""The benchmark runs, prints JSON lines for all its cases, and writes only where it is told to. Timings are not judged."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CASES = {
    "empty": ["bare torch", "empty jax loop", "ffi", "host", "native pure_callback", "native buffer_callback", "native jax-tvm-ffi"],
    "sin64": ["bare torch", "pure jax", "ffi", "host"],
    "eager": ["bare torch", "jitted jax", "eager jax", "eager bridge", "jitted bridge"],
    "energy_and_forces": ["torch.autograd", "torch.func", "pure jax", "ffi", "host", "ffi, derivatives='autograd'"],
    "training_step": ["torch.autograd", "pure jax", "ffi", "host"],
    "tensor_to_jax": ["jax.dlpack", "bridge.to_jax"],
    "array_to_torch": ["torch.from_dlpack", "bridge.to_torch"],
    "acceptance": ["us that ffi adds to bare torch", "ffi / host"],
    "passes": ["energy_and_forces", "training_step"],
}


def bench(where, *options):
    command = [sys.executable, "-m", "benchmarks.bench", "--calls", "2", "--rounds", "1", *options]
    ended = subprocess.run(command, cwd=where, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=250)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return [line for line in ended.stdout.splitlines() if line.startswith("{")], ended.stdout


def test_every_case_is_one_json_line_and_one_row_of_the_table(tmp_path):
    lines, text = bench(tmp_path, "--out", str(tmp_path / "lines"))
    rows = {r["name"]: r for r in map(json.loads, lines)}
    assert len(rows) == len(lines)
    assert set(rows) == {"environment", *(f"{group}/{case}" for group, cases in CASES.items() for case in cases)}
    assert all(any(row.startswith(name) for row in text.splitlines()) for name in rows if name != "environment")
    assert (tmp_path / "lines").read_text().splitlines() == lines


def test_ratios_verdicts_and_counts_are_told(tmp_path):
    lines, _ = bench(tmp_path, "--only", "empty")
    rows = {r["name"]: r for r in map(json.loads, lines)}
    assert set(rows["empty/ffi"]["ratios"]) == {"bare torch", "host"} and rows["empty/ffi"]["us"] > 0
    for r in (rows[f"acceptance/{case}"] for case in CASES["acceptance"]):
        assert r["verdict"] == ("PASS" if r["value"] <= r["limit"] else "FAIL")
    assert (rows["passes/energy_and_forces"]["forward"], rows["passes/energy_and_forces"]["backward"]) == (1, 1)
    assert (rows["passes/training_step"]["forward"], rows["passes/training_step"]["backward"]) == (2, 1)
    assert not list(tmp_path.iterdir()), "it wrote something without --out"
