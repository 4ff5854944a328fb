"""The GPU check: what it says without a GPU, how it reports, and its checks' own code on a CPU
device. No GPU is judged here."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.gpu_check")


@pytest.fixture
def checks(monkeypatch):
    """The checks, at a size for a CPU."""
    monkeypatch.syspath_prepend(str(ROOT))
    module = importlib.import_module("benchmarks.gpu_checks")
    monkeypatch.setattr(module, "SIDE", 32)
    monkeypatch.setattr(module, "STEPS", 3)
    monkeypatch.setattr(module, "CALLS", 40)
    return module


def files():
    return sorted(str(p) for p in (ROOT / "benchmarks").rglob("*") if "__pycache__" not in p.parts)


def test_without_a_gpu_it_says_so_plainly_and_writes_nothing():
    before = files()
    no_gpu = {**os.environ, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check"],
        cwd=ROOT,
        env=no_gpu,
        capture_output=True,
        text=True,
    )
    said = "no CUDA GPU seen by jax (devices: {}) and torch (cuda available: False): nothing was checked, nothing is written\n"
    assert ended.stdout in [said.format(name) for name in ("TFRT_CPU_0", "cpu:0")], ended.stderr[
        -3000:
    ]
    assert ended.returncode == 3
    assert files() == before


def good(gpu, values):
    values["answer"] = 42


def bad(gpu, values):
    values["found before"] = 1.5
    raise ValueError("the input was copied")


@pytest.mark.parametrize("names, passed", [(["good"], True), (["bad", "good"], False)])
def test_report_has_every_check_also_after_one_that_fails(
    gpu_check, tmp_path, capsys, names, passed
):
    fakes = {"good": good, "bad": bad}
    start = lambda name: gpu_check.attempt(fakes[name], None)
    assert gpu_check.report({"device": "a fake"}, names, start, tmp_path / "gpu") is passed
    (path,) = (tmp_path / "gpu").iterdir()
    assert gpu_check.datetime.date.fromisoformat(path.stem) and path.suffix == ".json"
    written = json.loads(path.read_text())
    assert written["machine"] == {"device": "a fake"} and list(written["checks"]) == names
    assert written["checks"]["good"] | {"seconds": 0} == {
        "status": "ok",
        "error": None,
        "seconds": 0,
        "values": {"answer": 42},
    }
    if not passed:
        failed = {
            "status": "failed",
            "error": "ValueError: the input was copied",
            "seconds": 0,
            "values": {"found before": 1.5},
        }
        assert written["checks"]["bad"] | {"seconds": 0} == failed
        assert "the input was copied" in capsys.readouterr().out


@pytest.mark.parametrize("passed, code", [(True, 0), (False, 1)])
def test_exit_code_tells_whether_all_passed(gpu_check, checks, monkeypatch, tmp_path, passed, code):
    record = {"cuda": True, "status": "ok" if passed else "failed", "error": None, "values": {}}
    monkeypatch.setattr(gpu_check, "in_child", lambda name: record)
    monkeypatch.setattr(gpu_check, "HERE", tmp_path)
    assert gpu_check.main([]) == code
    (path,) = (tmp_path / "gpu").iterdir()
    assert set(json.loads(path.read_text())["checks"]) == set(checks.CHECKS)


def test_a_process_that_dies_or_hangs_is_a_failed_check(gpu_check, monkeypatch):
    assert "no end after 0.01 s" in gpu_check.in_child("machine", timeout=0.01)["error"]
    monkeypatch.setattr(gpu_check.sys, "executable", "false")
    assert gpu_check.in_child("pointers") == {
        "status": "failed",
        "error": "the process ended with code 1: ",
        "values": {},
    }


@pytest.mark.parametrize(
    "name",
    [
        "pointers",
        "order_jit",
        "order_eager",
        "order_arrays",
        "jax_in_torch",
        "numbers",
        "timing",
        "native",
    ],
)
def test_what_a_cpu_can_run_of_the_checks_passes_there(gpu_check, checks, name):
    record = gpu_check.attempt(checks.CHECKS[name], jax.devices("cpu")[0])
    assert record["status"] == "ok", record
    json.dumps(record)


def test_checks_fail_where_something_is_wrong(gpu_check, checks, monkeypatch):
    cpu, to_torch, chain = jax.devices("cpu")[0], checks.bridge.to_torch, checks.chain
    assert "no graph was replayed" in gpu_check.attempt(checks.CHECKS["graph"], cpu)["error"]
    monkeypatch.setattr(checks.bridge, "to_torch", lambda x: to_torch(x, copy=True))
    assert "an array was copied" in gpu_check.attempt(checks.CHECKS["pointers"], cpu)["error"]
    monkeypatch.setattr(checks, "chain", lambda x, p: chain(x, p) * (x != 5))
    assert "values are wrong" in gpu_check.attempt(checks.CHECKS["order_eager"], cpu)["error"]
