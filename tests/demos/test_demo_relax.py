"""The demo of a relaxation: jitted JAX finds the lattice constants that the model's own calculator
finds under ASE."""

import ase.units
import numpy as np
import pytest

from demos import relax

NONSENSE = {
    "--fmax 0": "argument --fmax: expected a number (float) at least 0.0005, got 0; give such a number",
    "--strain 1": "argument --strain: expected a number (float) from 0.0 to 0.1, got 1; give such a number",
    "--crystal Unobtainium": "argument --crystal: invalid choice: 'Unobtainium'",
    "--out a_file": "argument --out: expected a folder, got the file",
}


@pytest.mark.parametrize("args", NONSENSE)
def test_nonsense_is_refused_in_one_clear_line(args, refused_line):
    assert NONSENSE[args] in refused_line(relax.options, args)


CHOSEN = ["--crystal", "NaCl", "--strain", "0.02", "--rattle", "0.03", "--fmax", "0.006"]


@pytest.mark.full
def test_all_relaxations_end_in_one_lattice(tmp_path, capsys):
    rows = relax.main([*CHOSEN, "--out", str(tmp_path)])
    cells = {name: row.atoms.cell.cellpar() for name, row in rows.items()}
    own = cells["ASE BFGS, SevenNet's own"]
    begun = relax.start(relax.options(CHOSEN))
    assert abs(begun.cell.cellpar() - own)[:3].max() > 0.05  # there was something to relax
    for name, row in rows.items():
        # one call of the model for each evaluation
        assert row.converged and row.calls == len(row.energies) == len(row.volumes)
        np.testing.assert_allclose(cells[name][:3], own[:3], atol=5e-3, err_msg=name)
        np.testing.assert_allclose(cells[name][3:], 90, atol=0.2, err_msg=name)
        assert (
            row.energies[0] - row.energies[-1] > 0.01 and abs(row.energies[-1] - row.energy) < 1e-4
        )
        assert (
            abs(row.stress).max() / ase.units.GPa < 0.1
            and np.linalg.norm(row.force, axis=1).max() < 0.007
        )
    text = capsys.readouterr().out
    assert text.count("lattice constants within") == 2 and "not converged" not in text
    assert (tmp_path / "relax.png").stat().st_size > 10_000
    rows["jax-md FIRE, jitted"].converged = False
    assert relax.table(rows, relax.options(CHOSEN)).count("not converged") == 1
