"""make bench-compare: ratios by their change, an exit status that can fail, and errors for files that
are none."""

import json
from pathlib import Path

import pytest

from benchmarks.compare import main

ENVIRONMENT = {"name": "environment", "cpu": "one", "cores": 2}


def row(name, median, spread=0.05, **more):
    around = [median * (1 - spread), median * (1 + spread)]
    return {"name": name, "unit": "us", "median": median, "quartiles": around, "ours": True} | more


def failing(name, ours=True):
    return {"name": name, "ours": ours, "status": "failing", "error": "ValueError: gone"}


@pytest.fixture
def compare(tmp_path, capsys):
    def run(old, new, *options):
        paths = []
        for name, rows in {"old": old, "new": new}.items():
            paths.append(tmp_path / name)
            paths[-1].write_text("\n".join(map(json.dumps, [ENVIRONMENT, *rows])) + "\n")
        return main([*map(str, paths), *options]), capsys.readouterr().out

    return run


@pytest.mark.parametrize(
    "old, new, options, status",
    [
        (row("a", 100), row("a", 124), [], 0),
        (row("a", 100), row("a", 126), [], 1),
        (row("a", 100), row("a", 20), [], 0),
        # beyond the bound, but the quartiles of both overlap
        (row("a", 100, 0.2), row("a", 150, 0.3), [], 0),
        (row("a", 100), row("a", 126), ["--bound", "1.3"], 0),
        (row("a", 100), row("a", 112), ["--bound", "1.1"], 1),
    ],
)
def test_a_row_is_slower_beyond_the_bound_and_outside_of_both_spreads(
    compare, old, new, options, status
):
    found, out = compare([old], [new], *options)
    assert found == status and ("SLOWER" in out) == bool(status)


def test_rows_come_by_their_change_with_what_the_quartiles_leave_open(compare):
    old = [row("same", 10), row("slower", 10), row("faster", 10)]
    status, out = compare(old, [row("same", 10), row("slower", 30, 0), row("faster", 5)])
    lines = out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["slower", "same", "faster"] and status == 1
    assert lines[0].split()[1:5] == ["3.000", "2.857", "to", "3.158"]


def test_rows_of_one_file_alone_are_named(compare):
    status, out = compare([row("both", 1), row("gone", 1)], [row("both", 1), row("come", 1)])
    assert "old one only: gone" in out and "new one only: come" in out and status == 0


@pytest.mark.parametrize("ours, status", [(True, 1), (False, 0)])
def test_a_figure_that_became_an_error_fails_where_it_is_ours(compare, ours, status):
    new = [row("a", 1), failing("b", ours)]
    found, out = compare([row("a", 1), row("b", 1)], new)
    assert found == status and ("no figure any more: b: ValueError: gone" in out) == ours


def test_files_of_other_machines_are_told(tmp_path, capsys):
    for name, cores in (("old", 2), ("new", 8)):
        lines = [ENVIRONMENT | {"cores": cores}, row("a", 1)]
        (tmp_path / name).write_text("\n".join(map(json.dumps, lines)))
    assert main([str(tmp_path / "old"), str(tmp_path / "new")]) == 0
    assert "cores: 2 and 8" in capsys.readouterr().out


@pytest.mark.parametrize(
    "written, error",
    [
        (None, "expected a file of results"),
        ("no json", "expected JSON lines"),
        ("\x00", "expected JSON lines"),
        ("", "expected JSON lines with names"),
        ("[1]", "expected JSON lines with names"),
        ('{"us": 1}', "expected JSON lines with names"),
        (json.dumps(row("other", 1)), "expected rows that are in both files"),
        (json.dumps(row("a", 1, unit="ms")), "expected one unit for a, got us and ms"),
    ],
)
def test_files_that_are_none_are_errors(tmp_path, capsys, written, error):
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text(json.dumps(row("a", 1)))
    if written is not None:
        new.write_text(written)
    with pytest.raises(SystemExit) as ended:
        main([str(old), str(new)])
    assert ended.value.code == 2 and error in capsys.readouterr().err


def test_a_bound_is_positive(capsys):
    with pytest.raises(SystemExit):
        main(["old", "new", "--bound", "nan"])
    assert "expected a bound above 0" in capsys.readouterr().err


def test_the_results_that_are_kept_compare_with_themselves():
    for path in (Path(__file__).parents[2] / "benchmarks/results").glob("*.jsonl"):
        assert main([str(path), str(path)]) == 0
