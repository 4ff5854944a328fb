"""make bench-full: what makes its rows and its page. The tables themselves are run where that takes
seconds; times are not judged."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import full, page
from benchmarks.harness import OURS, Case, Rival, bare, case_rows, compared, late, way

ROOT = Path(__file__).resolve().parents[2]


def of(row):
    return {k: row[k] for k in ("status", "error")}


def planted(**times):
    """Rows of a case from times in microseconds."""
    case = Case(None, ("peer",), controls=("empty loop",))
    return compared("t/c", case, times, dict.fromkeys(times, 1))


def test_a_row_has_median_quartiles_and_ratios_round_by_round():
    row = planted(ffi=[2.0, 4.0, 9.0], peer=[1.0, 2.0, 3.0])["ffi"]
    assert (row["name"], row["unit"], row["median"], row["quartiles"]) == ("t/c/ffi", "us", 4.0, [3.0, 6.5])  # fmt: skip
    assert row["ratios"] == {"peer": [2.0, 2.0, 2.5]} and row["behind"] == ["peer"]
    assert (row["ours"], row["rounds"], row["baselines"]) == (True, 3, ["peer"])


@pytest.mark.parametrize(
    "ours, other, behind",
    [
        ([2.0, 2.0, 2.0], {"peer": [1.0, 1.0, 1.0]}, True),
        ([1.0, 1.0, 1.0], {"peer": [2.0, 2.0, 2.0]}, False),
        # not seen in half of the rounds
        ([2.0, 2.0, 1.0, 1.0], {"peer": [1.0, 1.0, 2.0, 2.0]}, False),
        ([1.04, 1.04, 1.04], {"peer": [1.0, 1.0, 1.0]}, False),
        ([2.0, 2.0, 2.0], {"empty loop": [1.0, 1.0, 1.0]}, False),
        ([2.0, 2.0, 2.0], {"host": [1.0, 1.0, 1.0]}, False),
        ([2.0, 2.0, 2.0], {"peer, requires_grad": [1.0, 1.0, 1.0]}, False),
    ],
)
def test_behind_is_a_peer_that_is_quicker_in_what_it_is_asked_for(ours, other, behind):
    assert bool(planted(ffi=ours, **other)["ffi"]["behind"]) is behind


def test_units_and_parts_of_a_call():
    case = Case(None, unit="ms", per=4)
    assert compared("t", case, {"ffi": [8000.0]}, {"ffi": 1})["ffi"]["median"] == 2.0


@pytest.mark.parametrize(
    "variant, ours",
    [
        *[(v, True) for v in ("ffi", "native", "host", "jax-md, native", "ffi, one by one")],
        *[(v, True) for v in ("bridge, jax.hessian", "jitted bridge", "ASE, bridge's calculator")],
        *[(v, False) for v in ("native pure_callback", "native jax-tvm-ffi", "wrap-torch2jax")],
        *[(v, False) for v in ("jax-tvm-ffi, copy_", "jax-tvm-ffi by hand", "bare torch")],
    ],
)
def test_whose_a_variant_is(variant, ours):
    assert bool(OURS.search(variant)) is ours


def test_ways():
    assert way("bridge, .backward()") == way("x, y, .backward()") != way("bridge") == ""


def raising(_=None):
    raise ValueError("first line\nsecond")


def test_what_fails_is_a_row_with_its_error():
    made = {
        "peer": Rival("json", "json", lambda package: bare(package.dumps, 1)),
        "broken": Rival("json", "json", raising),
        "absent": Rival("a_package_that_nobody_has", "that", raising),
        "ffi": late(raising),
        "host": lambda n: None,
    }
    rows = {r["name"]: r for r in case_rows("t/c", Case(lambda: made), 2)}
    assert list(rows) == [f"t/c/{v}" for v in made]
    assert rows["t/c/peer"]["median"] > 0 and rows["t/c/host"]["median"] > 0
    for v, ours in (("broken", False), ("ffi", True)):
        assert of(rows[f"t/c/{v}"]) == {"status": "failing", "error": "ValueError: first line"}
        assert rows[f"t/c/{v}"]["ours"] is ours
    assert rows["t/c/absent"]["status"] == "not installed"


def test_a_case_that_can_not_be_made_is_a_row():
    (row,) = case_rows("t/c", Case(raising), 2)
    assert row == {"name": "t/c", "ours": True, "status": "failing", "error": "ValueError: first line"}  # fmt: skip


def test_a_round_is_as_long_as_asked_for_and_what_takes_too_long_is_not_timed():
    calls = {"quick": [], "slow": []}
    made = {v: calls[v].append for v in calls}
    case = Case(lambda: made, seconds=1e9, calls=7, longest=-1.0)
    rows = case_rows("t/c", case, 2)
    assert all(r["status"] == "not timed" for r in rows) and calls["quick"] == [1, 1]
    case_rows("t/c", case._replace(longest=10.0), 2)
    assert calls["slow"] == [1, 1, 1, 1, 7, 7]


def test_what_compiles_is_left_out_of_a_quick_run():
    rows = case_rows("t/c", Case(lambda: {"native": late(raising, True)}), 9, quick=True)
    assert rows[0]["status"] == "left out"


ROWS = [
    {"name": "environment", "seconds": {"calls": 1.0}, "date": "today", "cpu": "one", "cores": 2}
    | {"threads": 1, "load": 0.1, "python": "3", "versions": {"jax": "0"}},
    *planted(ffi=[2.0, 2.0], peer=[1.0, 1.0]).values(),
]


def named(table):
    return [
        ROWS[0],
        *({**r, "name": f"{table}/a case/{r['name'].split('/')[2]}"} for r in ROWS[1:]),
    ]


def test_rows_behind_without_a_reason_are_listed_and_those_with_one_tell_it():
    unknown, known = named("nothing"), named("threads")
    assert "nothing/a case/ffi: 2 (2 to 2) of peer" in page.report(unknown)
    assert page.report(known) == "" and page.reason(known[1]) in page.text(known)
    assert "2 of peer: " in page.text(known)


def test_the_page_tells_errors():
    why = {"status": "failing", "error": "TypeError: a|b"}
    row = {"name": "calls/a case/peer", "ours": False, **why}
    assert r"| failing: TypeError: a\|b |" in page.text([ROWS[0], row])


def test_tables_that_are_measured_again_replace_the_old_ones():
    old, new = [*named("calls"), *named("mc")[1:]], named("calls")[:2]
    rows = full.merged(old, new, ["calls"])
    assert [r["name"] for r in rows] == ["environment", "calls/a case/ffi", "mc/a case/ffi", "mc/a case/peer"]  # fmt: skip


def kept():
    return max((ROOT / "benchmarks/results").glob("*.jsonl"), default=None)


def test_the_page_in_docs_is_what_the_results_give():
    rows = full.read(kept()) if kept() else []
    assert (ROOT / "docs/benchmarks.md").read_text() == page.text(rows)
    pictures = re.findall(r"\((figures/bench-.*?)\)", page.text(rows))
    assert all((ROOT / "docs" / p).stat().st_size < 60_000 for p in pictures)


def test_every_table_has_a_file_and_every_file_is_a_table():
    files = {path.stem for path in (ROOT / "benchmarks/tables").glob("[!_]*.py")}
    assert files == set(full.TABLES)


def test_a_picture_of_each_kind_is_small(tmp_path):
    sizes = [
        {**r, "name": f"models/M, {n} atoms/{r['name'][-4:]}"} for n in (8, 64) for r in ROWS[1:]
    ]
    for rows in (named("calls")[1:], sizes):
        page.draw("A title", rows, tmp_path / "x.png")
        assert 1_000 < (tmp_path / "x.png").stat().st_size < 60_000


CHEAP = ("calls", "in_torch", "batches")


@pytest.mark.parametrize("table", CHEAP)
def test_a_table_runs_from_end_to_end(table, tmp_path, capsys):
    """Each in its process; the others take minutes, and are run by make bench-full --quick."""
    out = tmp_path / "results.jsonl"
    assert full.main(["--quick", "--only", table, "--out", str(out)]) == 0
    rows = full.read(out)
    assert rows[0]["name"] == "environment" and rows[0]["seconds"][table] > 0
    assert all(r["name"].startswith(f"{table}/") for r in rows[1:]) and len(rows) > 10
    failing = [r for r in rows[1:] if r.get("status") == "failing"]
    assert not any(r["ours"] for r in failing)
    assert any("median" in r and r["ours"] for r in rows[1:])
    assert json.dumps(rows[1]) in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, error",
    [(["--rounds", "0"], "expected --rounds of 1 or more"), (["--only", "nothing"], "invalid choice")],
)  # fmt: skip
def test_wrong_arguments_are_errors(arguments, error, capsys):
    with pytest.raises(SystemExit):
        full.main(arguments)
    assert error in capsys.readouterr().err


def test_a_table_that_ends_early_is_a_row(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(full, "ROOT", tmp_path)  # there is no package here
    out = tmp_path / "results.jsonl"
    monkeypatch.setenv("PYTHONPATH", "")
    assert full.main(["--quick", "--only", "mc", "--out", str(out)]) == 1
    assert full.read(out)[1]["error"].startswith("its process ended early")
    assert "failing: mc" in capsys.readouterr().err
