"""Supercells against ASE's, nearest images against a search through many, widths against the
definition."""

import itertools
from types import SimpleNamespace

import ase
import ase.build
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from bridge.card import Card
from jax_side.properties.supercells import (
    check_reach,
    half_width,
    lattice_points,
    matrix,
    nearest,
    supercell,
)

counts = st.tuples(*3 * [st.integers(1, 3)])
entries = st.lists(st.integers(-2, 2), min_size=9, max_size=9)
matrices = (
    entries.map(lambda x: np.reshape(x, (3, 3)))
    .filter(lambda p: 0 < abs(round(np.linalg.det(p))) <= 8)
    .map(lambda p: p.tolist())
)
seeds = st.integers(0, 100)


def random_crystal(seed, n=2):
    rng = np.random.default_rng(seed)
    cell = 3 * np.eye(3) + rng.normal(size=(3, 3))
    return rng.random((n, 3)) @ cell, cell


@given(counts, seeds)
def test_counts_x_ase(repeats, seed):
    positions, cell = random_crystal(seed)
    want = ase.Atoms(positions=positions, cell=cell, pbc=True) * repeats
    r, h = supercell(positions, cell, repeats)
    np.testing.assert_allclose(r, want.positions, atol=1e-12)
    np.testing.assert_allclose(h, want.cell.array, atol=1e-12)


@given(matrices, seeds)
def test_matrices_x_ase(p, seed):
    """The same atoms as ase.build.make_supercell, in whatever order."""
    positions, cell = random_crystal(seed)
    r, h = supercell(positions, cell, p)
    want = ase.build.make_supercell(ase.Atoms(positions=positions, cell=cell, pbc=True), p)
    apart = (np.asarray(r)[:, None] - want.positions) @ np.linalg.inv(h)
    same = (abs(apart - np.rint(apart)) < 1e-8).all(-1)
    assert same.shape == 2 * (2 * abs(round(np.linalg.det(p))),)
    assert (same.sum(0) == 1).all() and (same.sum(1) == 1).all()
    assert not lattice_points(p)[0].any()  # rows of force constants are those of the first cell


@given(matrices | counts, seeds)
def test_nearest_x_many_images(repeats, seed):
    positions, cell = random_crystal(seed)
    if seed % 2:  # a symmetric one, where images tie
        positions, cell = np.array([[0, 0, 0], [1.5, 1.5, 1.5]]), 3 * np.eye(3)
    vectors, weights = nearest(positions, cell, repeats)
    r, h = map(np.asarray, supercell(positions, cell, repeats))
    images = np.array(list(itertools.product(range(-9, 10), repeat=3))) @ h
    n = len(positions)
    np.testing.assert_allclose(weights.sum(-1), 1)
    for i, (k, to) in itertools.product(range(n), enumerate(r)):
        all_of_them = to - positions[i] + images
        distances = np.linalg.norm(all_of_them, axis=1)
        want = all_of_them[distances < distances.min() + 1e-3]
        here = np.s_[i, k // n, k % n]
        found = vectors[here][weights[here] > 0] @ cell
        assert len(found) == len(want)
        assert all(abs(want - x).max(1).min() < 1e-8 for x in found)
        np.testing.assert_allclose(weights[here][weights[here] > 0], 1 / len(want))


@given(matrices | counts, seeds)
def test_half_width_x_many_vectors(repeats, seed):
    cell = random_crystal(seed)[1]
    h = matrix(repeats) @ cell
    many = np.array(list(itertools.product(range(-9, 10), repeat=3))) @ h
    lengths = np.linalg.norm(many, axis=1)
    np.testing.assert_allclose(half_width(cell, repeats), np.sort(lengths)[1] / 2)


def test_supercells_differentiate():
    r, h = map(jnp.asarray, random_crystal(0))
    slope = jax.jit(lambda *x: jax.jvp(lambda r, h: supercell(r, h, (2, 1, 1)), x, x)[1])(r, h)
    np.testing.assert_allclose(slope[0], supercell(r, h, (2, 1, 1))[0])


def with_card(**card):
    return SimpleNamespace(card=Card(neighbor_list="own", **card))


def test_what_a_potential_reaches():
    cell = 2.5 * np.eye(3)
    unknown = lambda r, h: 0.0
    assert not check_reach(unknown, cell, (1, 1, 1), None)
    assert check_reach(unknown, cell, (2, 2, 2), 2.5)
    assert not check_reach(with_card(cutoff=2.5), cell, (2, 2, 2), None)
    assert not check_reach(with_card(cutoff=2.5, receptive_field=2.6), cell, (2, 2, 2), None)
    assert check_reach(with_card(cutoff=1.0, receptive_field=2.0), cell, (4, 4, 4), None)
    too_small = (
        r"expected a supercell whose lattice vectors are no shorter than 6.00 Angstrom, .*"
        r"got one of 5.00 Angstrom, 1.00 too short; take more repeats"
    )
    for energy, reach in ((unknown, 3.0), (with_card(cutoff=3.0), None)):
        with pytest.raises(ValueError, match=too_small):
            check_reach(energy, cell, (2, 3, 3), reach)
    assert check_reach(with_card(cutoff=3.0), cell, (2, 3, 3), 2.0)  # the caller knows better


POSITIONS = np.zeros((1, 3))
ERRORS = [
    (lambda: matrix((2, 2)), r"expected repeats as three positive int, .* got int64\[2\]"),
    (lambda: matrix((2.0, 2, 2)), r"got float64\[3\]; give counts as \(3, 3, 3\)"),
    (lambda: matrix((2, 0, 2)), r"got \[2, 0, 2\]"),
    (lambda: matrix((-2, 2, 2)), r"got \[-2, 2, 2\]"),
    (lambda: matrix([[1, 1, 0], [1, 1, 0], [0, 0, 1]]), r"got \[\[1, 1, 0\], \[1, 1, 0\]"),
    (
        lambda: supercell(POSITIONS, None, (1, 1, 1)),
        r"expected a cell as \[3, 3\], got None; .* phonons at q = 0 only",
    ),
    (lambda: supercell(POSITIONS, 0 * np.eye(3), (1, 1, 1)), "expected an invertible cell"),
    (lambda: supercell(POSITIONS, np.eye(3)[None], (1, 1, 1)), r"got float64\[1,3,3\]; give the"),
    (
        lambda: supercell(POSITIONS[0], np.eye(3), (1, 1, 1)),
        r"expected positions as \[N, 3\], got float64\[3\]; give one crystal",
    ),
]


@pytest.mark.parametrize(("call", "text"), ERRORS)
def test_errors(call, text):
    with pytest.raises(ValueError, match=text):
        call()
