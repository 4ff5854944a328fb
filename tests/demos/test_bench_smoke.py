"""The benchmark runs, prints JSON lines for all its cases, and writes only where it is told to.
Timings are not judged."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
import torch

from benchmarks.bench import GROUPS, main

ROOT = Path(__file__).resolve().parents[2]
RIVALS, SCALAR, WAYS = (
    ("torch_jax_interop.WrappedJaxFunction", "jax2torch"),
    "torch_jax_interop.WrappedJaxScalarFunction",
    ("", ", .backward()"),
)


BARE = "autograd.Function by hand, unchecked"
# minutes, which make bench alone takes
LARGE = (
    "potential_list_97336",
    "potential_list_1000000",
    "edges_of_a_million",
)


def both(*names):
    return [name + how for name in names for how in WAYS]


CASES = {
    "empty": [
        *(
            "bare torch",
            "empty jax loop",
            "ffi",
            "host",
            "native pure_callback",
            "native buffer_callback",
            "native jax-tvm-ffi",
        ),
        *("jax-tvm-ffi, copy_", "wrap-torch2jax"),
    ],
    "sin64": [
        "bare torch",
        "pure jax",
        "ffi",
        "host",
        "buffer_callback, out=",
        "jax-tvm-ffi, copy_(sin)",
        "wrap-torch2jax",
    ],
    "eager": [
        "bare torch",
        "jitted jax",
        "eager jax",
        "eager bridge",
        "jitted bridge",
        "jitted wrap-torch2jax",
    ],
    "energy_and_forces": [
        "torch.autograd",
        "torch.func",
        "pure jax",
        "ffi",
        "host",
        "ffi, derivatives='autograd'",
        "wrap-torch2jax",
    ],
    "training_step": ["torch.autograd", "pure jax", "ffi", "host"],
    "tensor_to_jax": ["jax.dlpack", "bridge.to_jax"],
    "array_to_torch": ["torch.from_dlpack", "bridge.to_torch"],
    "to_torch_forward": [
        *("bare jit dispatch", "jit, waited for", "torch_jax_interop.jax_to_torch"),
        *(
            name + how
            for name in ("pure torch", "bridge", *RIVALS)
            for how in ("", ", requires_grad")
        ),
    ],
    "to_torch_backward": [
        "jitted jax.vjp",
        "jitted jax.vjp, waited for",
        *both("pure torch", "bridge", BARE, *RIVALS),
    ],
    "to_torch_energy": [
        "jitted value_and_grad",
        "jitted value_and_grad, waited for",
        *both("pure torch", "bridge", *RIVALS, SCALAR),
    ],
    "to_torch_training": [
        *(
            "jitted value_and_grad",
            "jitted value_and_grad, waited for",
            "pure torch",
            "bridge.module",
            "bridge.module, loss in JAX",
        ),
        *(*RIVALS, f"{SCALAR}, loss in JAX"),
    ],
    "potential_step": ["bare torch", "ffi", "host"],
    "potential_hessian": [
        "torch.autograd, forward once",
        "jax.hessian",
        "jacrev of grad",
        "row by row in lax.map",
    ],
    "potential_replicas": ["vmap, one graph", 'vmap, batched="sequential"'],
    **{
        f"potential_list_{n}": ["by hand", "with_gradients, without skin", "bridge"]
        for n in (64, 1000)
    },
    "acceptance": [
        *(
            "empty: us that ffi adds to bare torch",
            "empty: ffi / host",
            "to_torch_forward: bridge / bare jit dispatch",
        ),
        *(
            "empty: ffi / jax-tvm-ffi, copy_",
            "empty: ffi / wrap-torch2jax",
            "empty: host / native pure_callback",
        ),
        *(
            "sin64: ffi / buffer_callback, out=",
            "sin64: ffi / wrap-torch2jax",
            "energy_and_forces: ffi / wrap-torch2jax",
        ),
        *(
            "eager: eager bridge / jitted jax",
            "eager: jitted bridge / jitted wrap-torch2jax",
            "to_torch_backward: bridge / pure torch",
        ),
        *(
            f"to_torch_forward: bridge / {rival}"
            for rival in ("torch_jax_interop.jax_to_torch", "jax2torch")
        ),
        *(f"to_torch_forward: bridge, requires_grad / {rival}, requires_grad" for rival in RIVALS),
        *(f"to_torch_backward: bridge{how} / {rival}{how}" for rival in RIVALS for how in WAYS),
        *(
            f"to_torch_energy: bridge{how} / {rival}{how}"
            for rival in (*RIVALS, SCALAR)
            for how in WAYS
        ),
        *(f"to_torch_training: bridge.module / {rival}" for rival in RIVALS),
        f"to_torch_training: bridge.module, loss in JAX / {SCALAR}, loss in JAX",
        *("potential_list_64: bridge / by hand", "potential_list_1000: bridge / by hand"),
        *(
            "potential_hessian: jax.hessian / torch.autograd, forward once",
            'potential_replicas: vmap, one graph / vmap, batched="sequential"',
        ),
    ],
    "passes": ["energy_and_forces", "training_step"],
}


def bench(where, *options):
    command = [sys.executable, "-m", "benchmarks.bench", "--calls", "2", "--rounds", "1", *options]
    ended = subprocess.run(
        command,
        cwd=where,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return [line for line in ended.stdout.splitlines() if line.startswith("{")], ended.stdout


def test_every_case_is_one_json_line_and_one_row_of_the_table(tmp_path):
    small = [name for name in CASES if name not in ("acceptance", "passes")]
    assert set(GROUPS) == {*small, *LARGE}
    lines, text = bench(tmp_path, "--out", str(tmp_path / "lines"), "--only", *small)
    rows = {r["name"]: r for r in map(json.loads, lines)}
    assert len(rows) == len(lines)
    assert set(rows) == {
        "environment",
        *(f"{group}/{case}" for group, cases in CASES.items() for case in cases),
    }
    assert all(
        any(row.startswith(name) for row in text.splitlines())
        for name in rows
        if name != "environment"
    )
    assert (tmp_path / "lines").read_text().splitlines() == lines
    # other packages, as they are installed here or not
    told = {name for name, r in rows.items() if "status" in r}
    assert all(
        name.split("/")[1].startswith(
            ("torch_jax_interop.", "jax2torch", "wrap-torch2jax", "jitted wrap-torch2jax")
        )
        for name in told
    )
    assert all(
        r["verdict"] == "no figure"
        for name, r in rows.items()
        if name.startswith("acceptance/") and r["value"] is None
    )


def test_ratios_verdicts_and_counts_are_told(tmp_path):
    lines, _ = bench(tmp_path, "--only", "empty")
    rows = {r["name"]: r for r in map(json.loads, lines)}
    assert (
        set(rows["empty/ffi"]["ratios"]) == {"bare torch", "host", "jax-tvm-ffi, copy_"}
        and rows["empty/ffi"]["us"] > 0
    )
    for r in (rows[f"acceptance/{case}"] for case in CASES["acceptance"][:2]):
        assert r["verdict"] == ("PASS" if r["value"] <= r["limit"] else "FAIL")
    assert (
        rows["passes/energy_and_forces"]["forward"],
        rows["passes/energy_and_forces"]["backward"],
    ) == (1, 1)
    assert (rows["passes/training_step"]["forward"], rows["passes/training_step"]["backward"]) == (
        2,
        1,
    )
    assert not list(tmp_path.iterdir()), "it wrote something without --out"


def doubled_sine(_):
    return lambda x: 2 * torch.sin(x)


def raising(text):
    def wrap(f):
        raise ValueError(text)

    return wrap


def forward_beside(monkeypatch, capsys, **modules):
    """The rows of the forward group and the table, with these modules in place of the other
    packages; without one: absent."""
    for name in ("torch_jax_interop", "jax2torch"):
        monkeypatch.setitem(sys.modules, name, modules.get(name))
        if modules.get(name) == "as found":  # set first, so that it's put back
            del sys.modules[name]
    threads = torch.get_num_threads()
    with jax.enable_x64(False):
        assert main(["--calls", "2", "--rounds", "1", "--only", "to_torch_forward"]) == 0
    torch.set_num_threads(threads)
    text = capsys.readouterr().out
    return {
        r["name"]: r
        for r in map(json.loads, filter(lambda line: line.startswith("{"), text.splitlines()))
    }, text


def assert_told(rows, text, variant, status, error):
    found = rows[f"to_torch_forward/{variant}"]
    assert found["status"] == status and found["error"].startswith(error) and "us" not in found
    assert any(
        line.startswith(found["name"]) and f"{status}: {found['error']}" in line
        for line in text.splitlines()
    )
    verdicts = [
        r
        for name, r in rows.items()
        if name.startswith("acceptance/") and name.endswith(f" / {variant}")
    ]
    assert verdicts and all((r["value"], r["verdict"]) == (None, "no figure") for r in verdicts)


def test_packages_that_are_not_installed_are_reported(monkeypatch, capsys):
    rows, text = forward_beside(monkeypatch, capsys)
    for variant in RIVALS[1], f"{RIVALS[1]}, requires_grad":
        assert_told(rows, text, variant, "not installed", "pip install jax2torch")
    for variant in "torch_jax_interop.jax_to_torch", f"{RIVALS[0]}, requires_grad":
        assert_told(rows, text, variant, "not installed", "pip install torch-jax-interop chex")
    assert rows["to_torch_forward/bridge"]["us"] > 0


@pytest.mark.parametrize(
    "wrap, error",
    [
        (raising("first line\nsecond line"), "ValueError: first line"),
        (raising(""), "ValueError: "),
        (lambda f: lambda x: x, "ValueError: it gives (64, 3)"),
        (lambda f: lambda x: 2 * torch.sin(x[:1]), "ValueError: it gives (1, 3)"),
        (lambda f: lambda x: None, "ValueError: "),
    ],
    ids=["raises", "raises without text", "wrong values", "wrong shape", "no result"],
)
def test_a_package_that_fails_is_reported(monkeypatch, capsys, wrap, error):
    rows, text = forward_beside(monkeypatch, capsys, jax2torch=SimpleNamespace(jax2torch=wrap))
    assert_told(rows, text, "jax2torch", "failing", error)
    assert "second line" not in text


def test_a_package_without_one_that_it_imports_is_failing_not_absent(monkeypatch, capsys, tmp_path):
    (tmp_path / "jax2torch.py").write_text("import a_package_that_nobody_has")
    monkeypatch.syspath_prepend(tmp_path)
    rows, text = forward_beside(monkeypatch, capsys, jax2torch="as found")
    assert_told(
        rows,
        text,
        "jax2torch",
        "failing",
        "ModuleNotFoundError: No module named 'a_package_that_nobody_has'",
    )


def test_a_package_that_works_has_figures_and_a_verdict(monkeypatch, capsys):
    rows, _ = forward_beside(monkeypatch, capsys, jax2torch=SimpleNamespace(jax2torch=doubled_sine))
    assert rows["to_torch_forward/jax2torch"]["us"] > 0
    r = rows["acceptance/to_torch_forward: bridge / jax2torch"]
    assert r["verdict"] == ("PASS" if r["value"] <= r["limit"] else "FAIL")
