"""The demo's main claim (one call into torch for each MD step, energies included) and its refusal
of nonsense."""

import ase.io
import numpy as np
import pytest

from demos import md
from tests.matrices import a_few

NONSENSE = {
    "--dt -1": "argument --dt: expected a number (float) from 0.01 to 10.0, got -1; give such a number",
    "--dt nan": "argument --dt: expected a number (float) from 0.01 to 10.0, got nan; give such a number",
    "--temperature 0": "argument --temperature: expected a number (float) at least 1.0, got 0; give such a number",
    "--temperature inf": "argument --temperature: expected a number (float) at least 1.0, got inf; give such a number",
    "--repeat 0": "argument --repeat: expected a number (int) at least 1, got 0; give such a number",
    "--nvt ten": "argument --nvt: expected a number (int) at least 1, got ten; give such a number",
    "--nve 15": "argument --nve: expected a multiple of --every 10, got 15; change one of them",
    "--crystal Unobtainium": "argument --crystal: invalid choice: 'Unobtainium'",
    "--out setup_is_a_file": "argument --out: expected a folder, got the file",
}


@pytest.mark.parametrize("args", NONSENSE)
def test_nonsense_is_refused_in_one_clear_line(args, refused_line):
    assert NONSENSE[args] in refused_line(md.options, args, file="setup_is_a_file")


@pytest.mark.parametrize("lane", a_few(["ffi", "host"], 1))
def test_one_md_step_is_one_call_into_torch(lane, tmp_path, capsys):
    md.main(
        [
            "--crystal",
            "Si",
            "--repeat",
            "1",
            "--nvt",
            "6",
            "--nve",
            "10",
            "--every",
            "2",
            "--lane",
            lane,
            "--out",
            str(tmp_path),
        ]
    )
    rows = [
        line.split()
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("jax-md NV")
    ]
    assert [row[1:3] for row in rows] == [["NVT,", "jitted"], ["NVE,", "jitted"]] and [
        row[6] for row in rows
    ] == ["1.00", "1.00"]
    frames = ase.io.read(tmp_path / "md.extxyz", ":")
    assert len(frames) == 8 and all(np.isfinite(f.get_forces()).all() for f in frames)
    total = [f.get_potential_energy() + f.get_kinetic_energy() for f in frames[3:]]
    assert np.ptp(total) < 0.02 < np.ptp([f.get_kinetic_energy() for f in frames[3:]])
    assert (tmp_path / "md.png").stat().st_size > 10_000


def test_energy_and_forces_of_a_frame_are_sevennets_own(tmp_path):
    from sevenn.calculator import SevenNetCalculator

    md.main(
        [
            "--crystal",
            "NaCl",
            "--repeat",
            "1",
            "--nvt",
            "2",
            "--nve",
            "2",
            "--every",
            "2",
            "--out",
            str(tmp_path),
        ]
    )
    last = ase.io.read(tmp_path / "md.extxyz", -1)
    energy, forces = last.get_potential_energy(), last.get_forces()
    last.calc = SevenNetCalculator("7net-0", device="cpu")
    assert abs(last.get_potential_energy() - energy) < 1e-4
    np.testing.assert_allclose(last.get_forces(), forces, atol=1e-4)
