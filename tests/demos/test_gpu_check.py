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
import torch

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
    for name, size in zip(("SIDE", "STEPS", "CALLS"), module.SMALL):
        monkeypatch.setattr(module, name, size)
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


FAKES = {"good": good, "bad": bad}
LIMITS = {"good": 40, "bad": 40}
CARD = {"device": "NVIDIA H200"}


def made(gpu_check, names, folder, minutes=8, card=CARD, asked=None):
    """(did all pass, what the file says)"""

    def start(name, limit):
        if asked is not None:
            asked.append((name, limit))
        return gpu_check.attempt(FAKES[name], None)

    passed = gpu_check.report(names, LIMITS, start, minutes, gpu_check.keeper(card, folder))
    (path,) = folder.iterdir()
    date, name = path.stem[:10], path.stem[11:]
    assert gpu_check.datetime.date.fromisoformat(date) and path.suffix == ".json"
    assert name == "nvidia-h200"
    return passed, json.loads(path.read_text())


@pytest.mark.parametrize("names, passed", [(["good"], True), (["bad", "good"], False)])
def test_report_has_every_check_also_after_one_that_fails(
    gpu_check, tmp_path, capsys, names, passed
):
    found, written = made(gpu_check, names, tmp_path / "gpu")
    assert found is passed
    assert written["machine"] == CARD and list(written["checks"]) == names
    ok = {"status": "ok", "error": None, "seconds": 0, "values": {"answer": 42}}
    assert written["checks"]["good"] | {"seconds": 0} == ok
    if not passed:
        failed = {
            "status": "failed",
            "error": "ValueError: the input was copied",
            "seconds": 0,
            "values": {"found before": 1.5},
        }
        assert written["checks"]["bad"] | {"seconds": 0} == failed
        assert "the input was copied" in capsys.readouterr().out


def test_results_are_written_as_they_come_and_added_to_those_of_the_day(gpu_check, tmp_path):
    made(gpu_check, ["good"], tmp_path)
    _, written = made(gpu_check, ["bad"], tmp_path)
    assert list(written["checks"]) == ["good", "bad"]
    keep = gpu_check.keeper(CARD, tmp_path)

    def dies(name, limit):
        if name == "bad":
            raise SystemExit
        return gpu_check.failed("seen before the end")

    with pytest.raises(SystemExit):
        gpu_check.report(["good", "bad"], LIMITS, dies, 8, keep)
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text())["checks"]["good"]["error"] == "seen before the end"


def test_no_check_runs_beyond_its_limit_and_that_of_all(gpu_check, tmp_path):
    asked = []
    assert made(gpu_check, ["good", "bad"], tmp_path, minutes=0.5, asked=asked)[0] is False
    assert [name for name, _ in asked] == ["good", "bad"] and all(29 < s <= 30 for _, s in asked)
    asked.clear()
    passed, written = made(gpu_check, ["good"], tmp_path, minutes=0.1, asked=asked)
    assert not passed and not asked
    assert written["checks"]["good"]["status"] == "not run"
    assert written["checks"]["good"]["error"] == "no time left of 0.1 minutes"


@pytest.mark.parametrize("passed, code", [(True, 0), (False, 1)])
def test_exit_code_tells_whether_all_passed(gpu_check, checks, monkeypatch, tmp_path, passed, code):
    record = {"cuda": True, "status": "ok" if passed else "failed", "error": None, "values": {}}
    monkeypatch.setattr(gpu_check, "in_child", lambda *_: record | CARD)
    monkeypatch.setattr(gpu_check, "HERE", tmp_path)
    assert gpu_check.main([]) == code
    (path,) = (tmp_path / "gpu").iterdir()
    assert set(json.loads(path.read_text())["checks"]) == set(gpu_check.ORDER)
    assert gpu_check.main(["--only", "pointers"]) == code


def test_the_list_names_every_check_with_its_limit(gpu_check, checks, capsys):
    assert gpu_check.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == gpu_check.ORDER
    assert all(line.split()[1].isdigit() and len(line) > 40 for line in lines)
    with pytest.raises(SystemExit):
        gpu_check.main(["--only", "pointer"])
    assert "expected checks of --list, got pointer" in capsys.readouterr().err


def test_a_process_that_dies_or_hangs_is_a_failed_check(gpu_check, monkeypatch):
    assert "no end after 0 s" in gpu_check.in_child("machine", timeout=0.01)["error"]
    monkeypatch.setattr(gpu_check.sys, "executable", "false")
    assert gpu_check.in_child("pointers") == {
        "status": "failed",
        "error": "the process ended with code 1: ",
        "values": {},
    }


def test_a_rehearsal_runs_the_code_of_a_check_in_a_process_on_a_cpu(gpu_check, capsys):
    before = files()
    assert gpu_check.main(["--rehearse", "--only", "pointers", "stream"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["pointers", "ok"],
        ["stream", "skipped", "needs", "a", "card"],
    ]
    assert files() == before


def on_a_cpu():
    """The checks that a CPU can run, which a rehearsal does."""
    from benchmarks.gpu_check import checks

    return [name for name, check in checks().items() if not check.card]


@pytest.mark.parametrize("name", on_a_cpu())
def test_what_a_cpu_can_run_of_the_checks_passes_there(gpu_check, checks, name):
    record = gpu_check.attempt(checks.CHECKS[name].run, jax.devices("cpu")[0])
    assert record["status"] == "ok", record
    json.dumps(record)


def test_every_check_has_its_place_and_its_limit(gpu_check):
    known = gpu_check.checks()
    from benchmarks.gpu_checks import CHECKS

    assert {*gpu_check.ORDER} == {*CHECKS} and len(known) == len(gpu_check.ORDER)
    assert all(10 <= check.limit <= 240 and check.run.__doc__ for check in known.values())


READS = {
    "item": lambda x: x * x.sum().item(),
    "float": lambda x: x * float(x[0]),
    "if": lambda x: x if x.sum() > 0 else -x,
    "nonzero": lambda x: x[x.nonzero()[:, 0]],
    "mask": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "to the CPU": lambda x: x.double().to("cpu", torch.float32),
    "equal": lambda x: x if torch.equal(x, x) else -x,
    "unique": lambda x: x.unique(),
}


@pytest.mark.parametrize("name", READS)
def test_what_waits_for_the_device_is_refused(name):
    from benchmarks.gpu_steps import Refusing, Waiting

    x = torch.linspace(-1, 1, 6)
    READS[name](x)
    with pytest.raises(Waiting, match="waits for the device"), Refusing():
        READS[name](x)


def test_what_waits_for_nothing_is_not_refused():
    from benchmarks.gpu_steps import Refusing

    x = torch.linspace(-1, 1, 6, requires_grad=True)
    with Refusing():
        y = torch.where(x > 0, x, 0).index_select(0, torch.tensor([1, 2])).sum() + x[1:].sum()
        torch.autograd.grad(y, x)


def test_checks_fail_where_something_is_wrong(gpu_check, checks, monkeypatch):
    cpu, to_torch, chain = jax.devices("cpu")[0], checks.bridge.to_torch, checks.chain
    assert "no graph was replayed" in gpu_check.attempt(checks.CHECKS["graph"].run, cpu)["error"]
    monkeypatch.setattr(checks.bridge, "to_torch", lambda x: to_torch(x, copy=True))
    assert "an array was copied" in gpu_check.attempt(checks.CHECKS["pointers"].run, cpu)["error"]
    monkeypatch.setattr(checks, "chain", lambda x, p: chain(x, p) * (x != 5))
    assert "values are wrong" in gpu_check.attempt(checks.CHECKS["order_eager"].run, cpu)["error"]
