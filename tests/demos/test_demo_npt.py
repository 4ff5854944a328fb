"""The NPT demo in small: one call into torch for a step at all temperatures, SevenNet's own
numbers, resumption, nonsense refused."""

import ase.io
import numpy as np
import pytest

from demos import npt, runs

SMALL = "--temperatures 200 400 --steps 6 --equilibrate 2 --chunk 2 --blocks 2 --out".split()
NONSENSE = {
    "--steps 15": "argument --steps: expected a multiple of --chunk 10, got 15; change it",
    "--steps 200": "argument --steps: expected at least --equilibrate 200 + --blocks 8, got 200; change it",
    "--temperatures 300 300": "argument --temperatures: expected different ones, got 300.0, 300.0; change it",
    "--temperatures 0": "argument --temperatures: expected a number (float) at least 1.0, got 0; give such a number",
    "--pressure nan": "argument --pressure: expected a number (float) from -5.0 to 100.0, got nan; give such a number",
    "--salt Unobtainium": "argument --salt: invalid choice: 'Unobtainium'",
    "--out a_file": "argument --out: expected a folder, got a_file; change it",
}


@pytest.mark.parametrize("args", NONSENSE)
def test_nonsense_is_refused_in_one_clear_line(args, refused_line):
    assert NONSENSE[args] in refused_line(npt.options, args)


@pytest.mark.full
def test_a_small_run_and_its_continuation(tmp_path, capsys, monkeypatch):
    from sevenn.calculator import SevenNetCalculator

    calls, forward = [], npt.SevenNet.forward
    monkeypatch.setattr(
        npt.SevenNet,
        "forward",
        lambda self, x, **k: calls.append(len(x["cell"])) or forward(self, x, **k),
    )
    assert npt.main([*SMALL, str(tmp_path)]) == 0
    # the relaxation; the start, one for all; six steps, all temperatures in one call each
    assert calls == [
        11,
        1,
        *[2] * 6,
    ]
    table = capsys.readouterr().out
    assert (
        "relaxed, no motion" in table
        and "1e-6/K" in table
        and (tmp_path / "npt.png").stat().st_size > 10_000
    )

    frames = ase.io.read(tmp_path / "npt-400K.extxyz", ":")
    assert len(frames) == 3 and len({f.get_volume() for f in frames}) == 3
    last = frames[-1].copy()
    last.calc = SevenNetCalculator("7net-0", device="cpu")
    assert abs(last.get_potential_energy() - frames[-1].get_potential_energy()) < 1e-4
    np.testing.assert_allclose(frames[-1].get_forces(), last.get_forces(), atol=1e-4)
    np.testing.assert_allclose(frames[-1].get_stress(), last.get_stress(), atol=1e-5)
    pressure = -last.get_stress(voigt=False, include_ideal_gas=True).trace() / 3
    assert abs(frames[-1].info["pressure"] - pressure) < 1e-5

    before = [
        (tmp_path / name).read_bytes()
        for name in ("npt-200K.extxyz", "npt-400K.extxyz", "npt.jsonl")
    ]
    with pytest.raises(ValueError, match="'seed': 1"):
        npt.main([*SMALL, str(tmp_path), "--resume", "--seed", "1"])
    checkpoint = (tmp_path / "npt.ckpt.npz").read_bytes()
    monkeypatch.setattr(npt, "picture", lambda *args: None)  # seen above
    shorter = [*SMALL, str(tmp_path / "parts")]
    shorter[shorter.index("6")] = "4"
    assert npt.main(shorter) == 0 == npt.main([*SMALL, str(tmp_path / "parts"), "--resume"])
    assert before == [
        (tmp_path / "parts" / name).read_bytes()
        for name in ("npt-200K.extxyz", "npt-400K.extxyz", "npt.jsonl")
    ]
    ours, theirs = (np.load(p / "npt.ckpt.npz") for p in (tmp_path, tmp_path / "parts"))
    assert (
        checkpoint
        and sorted(ours.files) == sorted(theirs.files)
        and all(np.array_equal(ours[k], theirs[k]) for k in ours.files)
    )


def test_averages_and_the_line_through_them():
    chosen = npt.options("--steps 800 --equilibrate 80 --temperatures 100 300 500".split())
    rng, T = np.random.default_rng(0), np.array(chosen.temperatures)
    a = 5.7 * (1 + 4e-5 * (T - 300)) + 0.01 * rng.normal(size=(800, 3))
    a[:80] = 9.0  # what is left out
    flat = np.ones((800, 3))
    seen = dict(
        volume=a**3,
        density=2.0 * flat,
        temperature=T * flat,
        pressure=0 * flat,
        conserved=-27 + 8e-3 * np.linspace(0, 3.2, 801)[1:, None] * flat,
    )
    found = npt.measured(seen, chosen, 1)
    alpha, error = found["alpha"]
    assert abs(alpha - 40) < 4 * error < 4 and abs(found["room"][0] - 5.7) < 0.002
    np.testing.assert_allclose(found["drift"], 1.0, rtol=1e-6)
    assert "expansion" in npt.table(found, 5.69, chosen, 1)


def test_an_interrupted_run_ends_with_the_shells_number(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "run", lambda *a, **k: runs.Run(a[1], 2, 6, {}))
    assert npt.main([*SMALL, str(tmp_path)]) == 130 and not (tmp_path / "npt.png").exists()
