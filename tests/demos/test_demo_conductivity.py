"""The demo of the heat flux: both potentials give the same fluxes, and the table and the picture
are there. That 0.29 W/m/K comes out takes minutes, and is shown in docs/heat.md."""

import numpy as np
import pytest

from demos import conductivity

NONSENSE = {
    "--lag 3 --ps 4": "argument --lag: expected at most half of --ps 4, got 3; change one of them",
    "--temperature 200": "argument --temperature: expected a number (float) from 1.0 to 85.0",
    "--potentials emt": "argument --potentials: invalid choice: 'emt'",
    "--out a_file": "argument --out: expected a folder, got the file",
}


@pytest.mark.parametrize("args", NONSENSE)
def test_nonsense_is_refused_in_one_clear_line(args, refused_line):
    assert NONSENSE[args] in refused_line(conductivity.options, args)


def test_both_potentials_give_the_same_run(tmp_path, capsys):
    short = "--repeat 3 --ps 0.4 --lag 0.08 --seeds 2 --cutoff 6 --lane ffi".split()
    found = conductivity.main([*short, "--out", str(tmp_path)])
    np.testing.assert_allclose(found["torch"].kappa, found["jax"].kappa, rtol=1e-6, atol=1e-9)
    for result in found.values():
        assert result.kappa.shape == (2, 3) and result.drift < 1e-4
        assert (result.kelvin > 20).all() and (result.kelvin < 140).all()
        assert result.kappa[0, -1] != result.kappa[1, -1]
    out = capsys.readouterr().out
    assert "LAMMPS's documentation (70 K, cutoff 13 Angstrom): 0.29" in out
    assert (tmp_path / "conductivity.png").stat().st_size > 5_000
