"""The house can be read: lines fit, every file says what it is, types are marked for users."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("bridge", "jax_side", "torch_side", "tests", "benchmarks", "demos")
COLUMNS = 100


def sources(part):
    return sorted((ROOT / part).rglob("*.py"))


def percentile_99(lengths):
    ordered = sorted(lengths)
    return ordered[int(0.99 * len(ordered))]


@pytest.mark.parametrize("part", PARTS)
def test_99_of_100_lines_fit(part):
    lengths = [len(line) for path in sources(part) for line in path.read_text().splitlines()]
    assert percentile_99(lengths) <= COLUMNS


def test_the_percentile_sees_two_long_lines_of_a_hundred():
    assert percentile_99([80] * 98 + [101] * 2) == 101


@pytest.mark.parametrize("part", PARTS)
def test_every_file_says_what_it_is(part):
    texts = {p: p.read_text() for p in sources(part)}
    silent = [
        p for p, text in texts.items() if text.strip() and not ast.get_docstring(ast.parse(text))
    ]
    assert not silent


@pytest.mark.parametrize("package", ["bridge", "jax_side", "torch_side"])
def test_types_of_the_package_are_for_users(package):
    assert (ROOT / package / "py.typed").exists()


def public(node, name=""):
    """(name, function) of what users see: nothing inside of functions, no leading underscore."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.ClassDef | ast.FunctionDef) or child.name[0] == "_":
            continue
        if isinstance(child, ast.ClassDef):
            yield from public(child, f"{name}{child.name}.")
        else:
            yield name + child.name, child


def untold(source):
    """Public functions without a docstring, or with an argument or a result without a type."""
    for name, function in public(ast.parse(source)):
        a = function.args
        several = [x for x in (a.vararg, a.kwarg) if x]
        arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs, *several]
        typed = [x.annotation for x in arguments if x.arg not in ("self", "cls")]
        if not ast.get_docstring(function) or None in (*typed, function.returns):
            yield name


@pytest.mark.parametrize("part", ["bridge", "jax_side", "torch_side"])
def test_every_public_function_says_its_types_and_what_it_does(part):
    found = {p: [*untold(p.read_text())] for p in (ROOT / part).rglob("*.py")}
    assert not {str(p): names for p, names in found.items() if names}


@pytest.mark.parametrize(
    "source",
    [
        'def f(x) -> int:\n    "Returns one."',
        'def f(x: int):\n    "Returns one."',
        "def f(x: int) -> int: ...",
        'def f(*x) -> int:\n    "Returns one."',
        'class A:\n    def f(self, x) -> int:\n        "Returns one."',
    ],
)
def test_a_function_that_does_not_is_found(source):
    assert len([*untold(source)]) == 1
    assert not [*untold('def f(self, x: int) -> int:\n    "Returns one."')]
