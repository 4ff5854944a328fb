"""The demo of phonons: what SevenNet-0 makes of NaCl, by JAX's derivatives."""

import numpy as np
import pytest

from demos import phonons

NONSENSE = {
    "--repeat 0": "argument --repeat: expected a number (int) at least 1, got 0; give such a number",
    "--volumes 3": "argument --volumes: expected 0 or at least 4, got 3; give one of these",
    "--crystal Unobtainium": "argument --crystal: invalid choice: 'Unobtainium'",
    "--out a_file": "argument --out: expected a folder, got the file",
}


@pytest.mark.parametrize("args", NONSENSE)
def test_nonsense_is_refused_in_one_clear_line(args, refused_line):
    assert NONSENSE[args] in refused_line(phonons.options, args)


@pytest.mark.full
def test_bands_of_a_salt(tmp_path, capsys):
    found = phonons.main(["--mesh", "6", "--points", "40", "--out", str(tmp_path)])
    f, axis = found["frequencies"], found["axis"]
    assert f.shape == (40, 6) and abs(f[0, :3]).max() < 0.05 and 3 < f[0, 3] < 6  # 4.9 THz measured
    assert f.min() > -0.1 and found["phonons"].drift < 1e-6
    assert abs(found["dos"].sum() * (axis[1] - axis[0]) - 6) < 0.2
    moving = f > 0.5
    assert np.isfinite(found["gruneisen"][moving]).all()
    assert 0.5 < np.median(found["gruneisen"][moving]) < 4
    text = capsys.readouterr().out
    assert "Born's eigenvalues all positive" in text and "4.9 THz" in text
    assert (tmp_path / "phonons.png").stat().st_size > 20_000


@pytest.mark.full
def test_a_supercell_that_is_too_small_says_by_how_much(tmp_path):
    with pytest.raises(ValueError, match=r"no shorter than 10.00 Angstrom, .* too short"):
        phonons.main(["--repeat", "2", "--out", str(tmp_path)])
