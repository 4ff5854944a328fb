"""The demo of an exported simulation: the same trajectory in a process without Python's torch, and
its refusal of nonsense."""

import pytest

from demos import export

NONSENSE = {
    "--calls 0": "argument --calls: expected a number (int) at least 1, got 0; give such a number",
    "--repeat none": "argument --repeat: expected a number (int) at least 1, got none; give such",
}


@pytest.mark.parametrize("args", NONSENSE)
def test_nonsense_is_refused_in_one_clear_line(args, refused_line):
    assert NONSENSE[args] in refused_line(export.options, args)


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_two_processes_x_one_trajectory(tmp_path, capsys):
    export.main(["--calls", "2", "--out", str(tmp_path)])
    rows = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line[:5] == "torch" or line[:9] == "positions")  # fmt: skip
    assert [found for found in rows.values()] == ["no", "0"]
