"""The Monte Carlo demo in small: the potential's own numbers, detailed counts, resumption, nonsense
refused."""

import functools
import json

import ase.data
import ase.io
import jax.numpy as jnp
import numpy as np
import pytest

from demos import alloy, mc, runs

SMALL = (
    "--repeat 2 --temperatures 400 900 --sweeps 4 --equilibrate 1 --chunk 2 --sizes 2 --out".split()
)
# Angstrom, eV/atom: Cleri and Rosato, Phys. Rev. B 48, 22 (1993), table I
PUBLISHED = {
    "Cu": (3.615, -3.544),
    "Au": (4.079, -3.779),
}
NONSENSE = {
    "--sweeps 15": "argument --sweeps: expected a multiple of --chunk 10, got 15; change it",
    "--sweeps 20": "argument --sweeps: expected more than --equilibrate 60, got 20; change it",
    "--temperatures 300 300": "argument --temperatures: expected different ones, got 300.0, 300.0; change it",
    "--temperatures nan": "argument --temperatures: expected a number (float) at least 1.0, got nan; give such a number",
    "--repeat 1": "argument --repeat: expected a number (int) from 2 to 12, got 1; give such a number",
    "--out a_file": "argument --out: expected a folder, got a_file; change it",
}


@pytest.mark.parametrize("args", NONSENSE)
def test_nonsense_is_refused_in_one_clear_line(args, refused_line):
    assert NONSENSE[args] in refused_line(mc.options, args)


def by_the_formula(atoms):
    """eV, in plain NumPy: every image of every pair."""
    images = (
        np.stack(np.meshgrid(*[np.arange(-2, 3)] * 3, indexing="ij"), -1).reshape(-1, 3)
        @ atoms.cell.array
    )
    total = 0.0
    for Zi, ri in zip(atoms.numbers, atoms.positions):
        repulsion = hopping = 0.0
        for Zj, rj in zip(atoms.numbers, atoms.positions):
            d = np.linalg.norm(rj - ri + images, axis=1)
            d = d[(d > 1e-9) & (d < alloy.CUTOFF)]
            A, xi, p, q, r0 = alloy.PAIRS[Zi, Zj]
            x = np.clip((d - alloy.ONSET) / (alloy.CUTOFF - alloy.ONSET), 0, 1)
            smooth = 1 - 10 * x**3 + 15 * x**4 - 6 * x**5
            repulsion += (smooth * A * np.exp(-p * (d / r0 - 1))).sum()
            hopping += (smooth * xi**2 * np.exp(-2 * q * (d / r0 - 1))).sum()
        total += repulsion - np.sqrt(hopping)
    return total


@functools.cache
def local(device="cpu"):
    """One for this file: its programs for 32 atoms are compiled once."""
    return alloy.potential(device)


def evaluated(atoms):
    return float(local().full(alloy.graph(atoms), alloy.layout_of(2)).energy)


def test_energy_x_plain_numpy():
    atoms = alloy.crystal(2, a=3.7)
    atoms.rattle(0.1, seed=0)
    np.testing.assert_allclose(evaluated(atoms), by_the_formula(atoms), rtol=1e-12)


def relaxed(numbers, around):
    """Lattice constant and energy of an atom, by a parabola of three energies."""
    grid = around * np.array([0.998, 1.0, 1.002])
    crystals = [alloy.crystal(2, a=a) for a in grid]
    for crystal in crystals:
        crystal.numbers = np.resize(numbers, 32)
    curve = np.polynomial.Polynomial.fit(grid, [evaluated(c) / 32 for c in crystals], 2)
    (a,) = curve.deriv().roots()
    return a, curve(a)


@pytest.mark.parametrize("element", PUBLISHED)
def test_lattice_constant_and_cohesive_energy_x_publication(element):
    a, energy = relaxed(ase.data.atomic_numbers[element], PUBLISHED[element][0])
    assert abs(a - PUBLISHED[element][0]) < 2e-3 and abs(energy - PUBLISHED[element][1]) < 1e-3


def test_the_ordered_alloy_is_bound_as_it_is_measured():
    """Formation energy of Cu3Au: -74 meV an atom; the model's lattice is 2.5 % narrower than the
    measured one."""
    a, energy = relaxed([alloy.AU, *3 * [alloy.CU]], alloy.LATTICE)
    assert abs(a - alloy.LATTICE) < 1e-3
    assert abs(energy - 0.75 * PUBLISHED["Cu"][1] - 0.25 * PUBLISHED["Au"][1] + 0.074) < 2e-3


class Numbers:
    def __init__(self, atoms):
        self.atomic_numbers = jnp.asarray(atoms.numbers)


def test_order_of_the_ordered_crystal_and_of_a_random_alloy():
    near = jnp.asarray(alloy.neighbors_of(alloy.crystal(5)))
    long, short = alloy.order(Numbers(alloy.crystal(5)), near)
    assert abs(long - 1) < 1e-6 and abs(short + 1 / 3) < 1e-6
    long, short = alloy.order(Numbers(alloy.crystal(5, "random")), near)
    assert long < 0.2 and abs(short) < 0.06


def test_a_small_run_and_its_continuation(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(mc, "WALK", 20)
    monkeypatch.setattr(mc, "potential", local)
    assert mc.main([*SMALL, str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "within 1e-10" in text and "accepted: displacement, exchange, volume" in text
    assert (tmp_path / "mc.png").stat().st_size > 10_000
    seen = {
        name: np.array([row[name] for row in map(json.loads, open(tmp_path / "mc.jsonl"))])
        for name in ("energy", "long", "tried", "accepted")
    }
    assert seen["tried"].shape == (4, 4, 3) and (seen["tried"][..., 2] == 1).all()
    assert (seen["tried"][..., :2].sum(-1) <= 64).all() and (
        seen["accepted"] <= seen["tried"]
    ).all()
    assert seen["accepted"].sum((0, 1)).min() > 0 and seen["long"][0, 0] > seen["long"][0, 1]
    frames = ase.io.read(tmp_path / "mc-900K-random.extxyz", ":")
    assert len(frames) == 2 and all((f.numbers == alloy.AU).sum() == 8 for f in frames)
    # eight digits in the file
    np.testing.assert_allclose(by_the_formula(frames[-1]) / 32, seen["energy"][-1, 3], atol=1e-6)

    with pytest.raises(ValueError, match="'seed': 1"):
        mc.main([*SMALL, str(tmp_path), "--resume", "--seed", "1"])
    before = (tmp_path / "mc.jsonl").read_bytes()
    monkeypatch.setattr(mc, "picture", lambda *args: None)  # seen above
    monkeypatch.setattr(mc, "speeds", lambda *args: [])
    # nothing is left to do; that what is left repeats its bits, test_demo_runs holds
    assert mc.main([*SMALL, str(tmp_path), "--resume"]) == 0
    again = capsys.readouterr().out
    assert (
        before == (tmp_path / "mc.jsonl").read_bytes()
        and [line for line in text.splitlines() if " random " in line][0] in again
    )


@pytest.mark.parametrize(
    "worst, ended, word", [(1e-12, 0, "within"), (2e-10, 1, "BEYOND"), (np.nan, 1, "BEYOND")]
)
def test_energies_that_part_fail_the_demo(worst, ended, word, capsys):
    assert mc.judged(worst) == ended and f"{word} 1e-10" in capsys.readouterr().out


def test_an_interrupted_run_ends_with_the_shells_number(tmp_path, monkeypatch):
    monkeypatch.setattr(mc, "simulation", lambda *a: [None] * 4)
    monkeypatch.setattr(runs, "run", lambda *a, **k: runs.Run(None, 2, 4, {}))
    assert mc.main([*SMALL, str(tmp_path)]) == 130 and not (tmp_path / "mc.png").exists()
