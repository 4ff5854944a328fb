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
