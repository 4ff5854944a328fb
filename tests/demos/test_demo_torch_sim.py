"""The torch-sim demo's main claim (the same trajectory in both engines, the energy that was
published) and its refusal of nonsense."""

import re

import pytest

from demos import torch_sim

NONSENSE = {
    "--repeat 3": "argument --repeat: expected a number (int) from 4 to 10, got 3; give such a number",
    "--dt 0": "argument --dt: expected a number (float) from 0.01 to 10.0, got 0; give such a number",
    "--temperature nan": "argument --temperature: expected a number (float) at least 1.0, got nan; give such a number",
    "--steps 30": "argument --steps: expected a multiple of --every 20, twice it or more, got 30; change one of them",
    "--steps 20": "argument --steps: expected a multiple of --every 20, twice it or more, got 20; change one of them",
    "--out a_file": "argument --out: expected a folder, got the file a_file; name another",
}


@pytest.mark.parametrize("args", NONSENSE)
def test_nonsense_is_refused_in_one_clear_line(args, refused_line):
    assert NONSENSE[args] in refused_line(torch_sim.options, args)


def test_both_engines_give_one_trajectory(tmp_path, capsys):
    torch_sim.main(["--steps", "40", "--every", "10", "--out", str(tmp_path)])
    text = capsys.readouterr().out
    rows = {
        name: re.search(rf"^{re.escape(name)} +(.*)$", text, re.M)[1].split()
        for name in ("torch-sim, JAX by bridge", "jax-md, jitted")
    }
    ours, theirs = ([float(x) for x in row] for row in rows.values())
    # potential energy at the start, total energy at the end
    assert ours[0] == theirs[0] == 40 and ours[2:4] == theirs[2:4]
    assert abs(ours[2] + 3.544) < 1e-3  # the cohesive energy that the parameters were fitted to
    far = [float(x) for x in re.findall(r"([\d.e+-]+) after", text)]
    assert len(far) == 2 and max(far) < 1e-11
    assert float(re.search(r"moved by ([\d.]+) Angstrom", text)[1]) > 0.05
    assert abs(ours[4]) < 1 and 100 < ours[5] < 600
    assert (tmp_path / "torch_sim.png").stat().st_size > 10_000
