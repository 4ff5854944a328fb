"""python -m bridge doctor: it runs, tells what it found, and fails where something is wrong."""

import subprocess
import sys

import pytest
import torch

import bridge.__main__ as entry
from bridge.join import calls
from jax_side import doctor as jax_doctor
from jax_side.calls import lanes
from torch_side import doctor as torch_doctor


def test_the_command_finds_all_well():
    out = subprocess.run(
        [sys.executable, "-m", "bridge", "doctor"], capture_output=True, text=True, timeout=120
    )
    assert out.returncode == 0, out.stdout + out.stderr
    lines = out.stdout.splitlines()
    assert all(line.startswith("ok  ") for line in lines)
    for what in (
        "jax ",
        "torch ",
        "lanes",
        "64-bit dtypes",
        "asynchronous dispatch",
        "compilation cache",
        "small reductions on the CPU",
        "JAX in torch in JAX, ffi lane, its gradient",
        "torch in JAX in torch, a batch",
    ):
        assert any(line[4:].startswith(what) for line in lines), what
    assert (
        'jax.config.update("jax_cpu_enable_async_dispatch", False) right after import jax'
        in out.stdout
    )


@pytest.mark.parametrize("arguments", [[], ["nurse"], ["doctor", "now"]])
def test_what_is_no_command_says_what_is(arguments, capsys):
    assert entry.main(arguments) == 2
    assert "usage: python -m bridge doctor" in capsys.readouterr().err


def test_a_wrong_number_and_an_exception_are_seen(monkeypatch, capsys):
    def broken(x):
        raise OSError("no disk")

    for rows in (
        jax_doctor.checks(lambda lane: lambda x: 2 * x),
        torch_doctor.checks(lambda x: 2 * x),
    ):
        assert (
            rows
            and not any(well for _, well, _ in rows)
            and all(found.startswith("wrong") for *_, found in rows)
        )
    for rows in (jax_doctor.checks(lambda lane: broken), torch_doctor.checks(broken)):
        assert {found for *_, found in rows} == {"OSError: no disk"}
    monkeypatch.setattr(calls, "diagnosis", lambda: [("all", True, "fine"), ("one", False, "not")])
    assert entry.main(["doctor"]) == 1
    assert capsys.readouterr().out.splitlines() == ["ok  all  fine", "!!  one  not"]


def test_what_is_missing_says_what_to_do(monkeypatch):
    monkeypatch.setattr(lanes, "has_ffi", lambda: False)
    rows = {what: (well, found) for what, well, found in jax_doctor.facts()}
    assert rows["lanes"] == (False, "host alone, slower: pip install jax-tvm-ffi")
    assert not any("ffi" in what for what, *_ in jax_doctor.checks(lambda lane: lambda x: 3 * x))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 999)
    assert [well for what, well, _ in torch_doctor.facts() if what == "threads of torch"] == [False]


def rows_of(facts):
    return {what: (well, found) for what, well, found in facts}


def test_small_reductions_x_what_was_measured(monkeypatch):
    """The ratio is measured; what it means is told, with the option that cures it."""

    def timed(slow):
        answers = iter([9.0, 9.0] + [slow, 1.0] * 7)  # the first round compiles
        monkeypatch.setattr(jax_doctor, "_seconds", lambda call, x: next(answers))
        return rows_of(jax_doctor.facts())["small reductions on the CPU"]

    assert timed(1.2) == (True, "1.2 times the time of XLA's own code: fine")
    well, found = timed(11.0)
    assert well and found.startswith("11 times slower than XLA's own code (YNNPACK)")
    assert "compiler_options={'xla_cpu_experimental_ynn_fusion_type': ''}" in found


def test_small_reductions_x_an_option_that_is_gone(monkeypatch):
    monkeypatch.setattr(jax_doctor, "XLAS_OWN", {"xla_no_such_option": ""})
    assert rows_of(jax_doctor.facts())["small reductions on the CPU"] == (
        True,
        "by XLA's own code: this jaxlib does not know the option that changes it",
    )


def test_compilation_cache_x_on_and_off(monkeypatch):
    class Config:
        jax_compilation_cache_dir, jax_enable_compilation_cache = None, True
        jax_persistent_cache_min_compile_time_secs = 1.0

    monkeypatch.setattr(jax_doctor.jax, "config", Config, raising=True)
    assert jax_doctor._cache().startswith(
        'off, each process compiles anew: jax.config.update("jax_compilation_cache_dir"'
    )
    Config.jax_compilation_cache_dir = "/a/folder"
    assert (
        jax_doctor._cache()
        == "on, in /a/folder, for what takes 1 s or more to compile (jax_persistent_cache_min_compile_time_secs)"
    )
    Config.jax_enable_compilation_cache = False
    assert jax_doctor._cache().startswith("off")


def test_version_of_the_package(capsys):
    from importlib.metadata import version

    from bridge.__main__ import main

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"jax-torch-bridge {version('jax-torch-bridge')}\n"
