"""python -m bridge check: a line for each property, the failure's text, and its exit code."""

import subprocess
import sys

import pytest

import bridge.__main__ as entry
from bridge.testing import ALL

MODELS = """
import torch
from tests.planted import right, structure, GALLERY, right_jax

def factory():
    return structure

def wrong():
    return GALLERY["mean over atoms"].make()

class Stale(GALLERY["stale cache"].make):
    pass

class Parametrised:
    def __init__(self, cutoff):
        pass

def broken():
    import a_package_that_is_not_there

class Inner:
    model = staticmethod(structure)
"""


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    """Runs the command where models_here.py lies: (exit code, lines printed, errors)."""
    (tmp_path / "models_here.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.delitem(sys.modules, "models_here", raising=False)

    def run(*arguments):
        code = entry.main(["check", *arguments])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    yield run
    sys.modules.pop("models_here", None)


def test_a_right_model_x_a_process(tmp_path):
    """From another directory, without x64: one line for each property."""
    (tmp_path / "models_here.py").write_text(MODELS)
    command = [
        sys.executable,
        "-m",
        "bridge",
        "check",
        "models_here:factory",
        "--kind",
        "torch",
        "--examples",
        "3",
        "--elements",
        "Si,O",
    ]
    root = str(entry.__file__).rsplit("/bridge/", 1)[0]
    out = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=200,
        cwd=tmp_path,
        env={**__import__("os").environ, "PYTHONPATH": root},
    )
    assert out.returncode == 0, out.stdout + out.stderr
    lines = out.stdout.splitlines()
    assert [line[7:] for line in lines if line.startswith("ok ")] == [
        c for c in ALL if c != "padding changes nothing"
    ]
    assert [line for line in lines if not line.startswith("ok ")] == [
        "--     padding changes nothing (the model takes no edges)"
    ]


def test_a_wrong_model_x_exit_code_and_text(check):
    code, lines, _ = check(
        "models_here:wrong", "--kind", "torch", "--gradients", "autograd", "--examples", "5"
    )
    assert code == 1 and [line for line in lines if line.startswith("FAILED")] == [
        "FAILED extensive"
    ]
    after = lines[lines.index("FAILED extensive") + 1 :]
    assert (
        "energy[0]: expected " in after[0]
        and "smallest structure found:" in after[1]
        and "ase.Atoms(numbers=" in after[2]
    )
    assert len([line for line in lines if line[:2] in ("ok", "--", "FA")]) == len(ALL)


def test_classes_and_models_x_called_or_taken(check):
    assert check("models_here:Stale", "--kind", "torch", "--examples", "4")[0] == 1
    for name in ("right", "Inner.model"):
        code, lines, _ = check(
            f"models_here:{name}",
            "--kind",
            "torch",
            "--examples",
            "1",
            *(["--gradients", "autograd", "--cutoff", "3"] if name == "right" else []),
        )
        assert code == 0 and len(lines) == len(ALL)


@pytest.mark.full
def test_a_jax_model_x_float32(check):
    """What is asked for goes through: the kind, the dtype."""
    code, lines, _ = check(
        "models_here:right_jax",
        "--kind",
        "jax",
        "--gradients",
        "autodiff",
        "--cutoff",
        "3",
        "--examples",
        "1",
        "--dtype",
        "float32",
    )
    assert code == 0 and "--     lanes agree (lanes are for torch models)" in lines


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["models_here"], "expected module:factory, got 'models_here'; write the module, a colon"),
        (["models_here:"], "expected module:factory, got 'models_here:'"),
        (["no_such_module:model"], "No module named 'no_such_module'"),
        (["models_here:nothing"], "expected 'nothing' in models_here, got only "),
        (
            ["models_here:broken", "--kind", "torch"],
            "No module named 'a_package_that_is_not_there'",
        ),
        (
            ["models_here:Parametrised"],
            "expected a class of no arguments, got Parametrised: missing a required argument: "
            "'cutoff'",
        ),
        (
            ["models_here:factory"],
            "expected --kind torch or --kind jax, got a function, which may be either; say which "
            "framework",
        ),
        (
            ["models_here:factory", "--elements", "Si,Qq"],
            "expected symbols of elements, got Qq; write them as Si,O",
        ),
        (["models_here:factory", "--kind", "tf"], "invalid choice: 'tf'"),
        (["models_here:factory", "--cutoff", "far"], "invalid float value: 'far'"),
        ([], "the following arguments are required: model"),
    ],
)
def test_bad_arguments_x_code_two(check, arguments, text):
    code, lines, err = check(*arguments)
    assert code == 2 and text in err and not lines


def test_elements_x_numbers():
    assert entry._parsed(["m:f", "--elements", "Si,O,79"]).elements == (14, 8, 79)


def test_usage_x_both_commands(capsys):
    assert entry.main([]) == 2
    assert (
        "python -m bridge doctor" in (err := capsys.readouterr().err)
        and "python -m bridge check module:factory" in err
    )
