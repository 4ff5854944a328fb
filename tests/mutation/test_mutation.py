"""The tool itself: what is a mutant, where it is put, and what its tests say of it."""

import builtins
import os
import subprocess
import sys

import pytest

from tests.mutation import covering, running
from tests.mutation.__main__ import interval
from tests.mutation.mutants import OPERATORS, File
from tests.mutation.rooms import FILES, ROOT
from tests.mutation.selection import Selection
from tests.mutation.site import sitecustomize

FILE = "jax_side/calls/nesting.py"
TEXT = '''"""A docstring with 1 + 1."""

from __future__ import annotations

__all__ = [*("f",)]
LIMIT = 3

def f(x: int | None, *, y: float = 2.0) -> int | None:
    """Another one."""
    if x is None:
        raise ValueError(message("an x", f"{1 + y}", "pass one"))
    here.depth = x
    check(x)
    return LIMIT
'''
MADE = [
    ("LIMIT = 3", "LIMIT = 4"),
    ("LIMIT = 3", "LIMIT = 2"),
    ("y: float = 2.0", "y: float = 3.0"),
    ("y: float = 2.0", "y: float = 1.0"),
    ("if x is None:", "if not x is None:"),
    ("if x is None:", "if x is not None:"),
    ("here.depth = x", "pass"),
    ("check(x)", "pass"),
]


def mutants(text):
    file = File(FILE, text)
    return [m for m in map(file.mutant, file.places) if m]


def test_mutants_of_a_text():
    found = [(m.before, m.after) for m in mutants(TEXT)]
    assert len(found) == len(MADE)
    for (old, new), (before, after) in zip(MADE, found):
        assert old in before and new in after


@pytest.mark.parametrize("name", OPERATORS)
def test_examples_of_operators(name):
    """cosmic-ray's own, and ours."""
    for example in type(OPERATORS[name]).examples():
        changed = [m.source for m in mutants(example.pre_mutation_code + "\n")]
        assert example.pre_mutation_code + "\n" not in changed


def test_processes_that_tests_start_see_the_mutant(tmp_path):
    mutant = tmp_path / "mutant.py"
    mutant.write_text("def message(*words): return 'mutated'")
    env = {
        **os.environ,
        sitecustomize.MODULE: "bridge.errors",
        sitecustomize.SOURCE: str(mutant),
        "PYTHONPATH": f"{ROOT / 'tests/mutation/site'}:{ROOT}",
    }
    program = "import bridge.errors; print(bridge.errors.message('a'))"
    told = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert told.stdout == "mutated\n"


def test_statements_note_that_they_were_reached(monkeypatch):
    hits = set()
    monkeypatch.setattr(builtins, covering.HITS, hits, raising=False)
    names = {}
    exec(covering.noting(TEXT, str(ROOT / FILE)), {"here": type("Here", (), {}), **names})
    first = 10_000 * covering.NAMES.index(FILE)
    assert hits == {first + n for n in (5, 6, 8)}


def test_a_run_tells_what_a_mutant_breaks(tmp_path):
    """In a process of its own: a parent of mutants has imported nothing of this project."""
    program = """if True:
        from tests.mutation import running
        running.OUT.mkdir(parents=True, exist_ok=True)
        text = open("bridge/errors.py").read()
        test = ["tests/calls/test_named.py"]
        for source in (text, "def broken(", text + "\\nimport os; os._exit(3)"):
            print(running.run("bridge/errors.py", source, [*test, "--collect-only"], 100).how)
        print(running.run("bridge/errors.py", text + "\\nwhile True: pass", test, 5).how)
    """
    told = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert told.stdout.split() == ["passed", "import", "crash", "time"], told.stderr


def test_no_test_is_an_error_of_the_tool(tmp_path):
    (tmp_path / "code").write_text(str(int(pytest.ExitCode.USAGE_ERROR)))
    (tmp_path / "log").write_text("not found: tests/nowhere.py")
    with pytest.raises(RuntimeError, match="nowhere"):
        running._ended(tmp_path)


def test_tests_of_a_line_one_of_each_function_first(monkeypatch):
    place = mutants((ROOT / FILE).read_text())[0]
    line = lambda test, seconds, lines: dict(
        test=test, seconds=seconds, passed=True, lines={FILE: lines}
    )
    tests = [line("a[1]", 2.0, [1, 33]), line("a[2]", 1.0, [33]), line("b", 9.0, [33])]
    monkeypatch.setattr("tests.mutation.selection.covered", lambda: {t["test"]: t for t in tests})
    first, second = Selection(5.0).waves(place)
    assert [test for _, test in first] == ["a[2]"] and [test for _, test in second] == ["a[1]"]


def test_wilsons_interval():
    """Of 85 in 100; by statsmodels' proportion_confint(85, 100, method="wilson")."""
    assert interval(85, 100) == pytest.approx((0.76719, 0.90693), abs=1e-4)


def test_every_room_has_files():
    assert all((ROOT / file).exists() for file in FILES) and len(set(FILES.values())) == 5
