"""Neighbour lists against ase.neighborlist, on any crystal, and their error texts."""

import sys

import numpy as np
import pytest
import torch
from ase.geometry import complete_cell
from ase.neighborlist import primitive_neighbor_list
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from torch_side.potentials.neighbors import bonds, neighbor_list

TRUE = torch.ones(1, 3, dtype=torch.bool)
numbers = st.floats(-4, 4, width=32)


@st.composite
def crystals(draw):
    """(pos, cell, pbc): triclinic, small or large, atoms in any image, cell vectors of open axes
    sometimes zero."""
    cell = np.array(draw(st.lists(numbers, min_size=9, max_size=9))).reshape(3, 3)
    assume(
        abs(np.linalg.det(cell)) > 0.1 * np.prod(np.linalg.norm(cell, axis=1))
        and abs(np.linalg.det(cell)) > 1
    )
    n = draw(st.integers(1, 5))
    frac = np.array(draw(st.lists(st.floats(-2, 3), min_size=3 * n, max_size=3 * n))).reshape(n, 3)
    pbc = np.array(draw(st.tuples(*[st.booleans()] * 3)))
    pos = frac @ cell
    if draw(st.booleans()):
        cell[~pbc] = 0
    return pos, cell, pbc


def rows(i, j, offsets):
    return sorted(map(tuple, np.column_stack([i, j, offsets]).astype(int).tolist()))


def reference(quantities, pos, cell, pbc, cutoff):
    full = complete_cell(np.where(pbc[:, None], cell, 0))
    return primitive_neighbor_list(quantities, pbc, full, pos, cutoff)


def tensors(pos, cell, pbc):
    return torch.tensor(pos), torch.tensor(cell)[None], torch.tensor(pbc)[None]


def clear_of_the_cutoff(pos, cell, pbc, cutoff):
    """False where a pair lies at the cutoff up to rounding, and so on one side of it or the
    other."""
    distances = reference("d", pos, cell, pbc, cutoff + 0.01)
    return not np.any(abs(distances - cutoff) < 1e-9)


@settings(max_examples=150, deadline=None)
@given(crystals(), st.floats(0.5, 5))
def test_same_edges_as_ase(crystal, cutoff):
    assume(clear_of_the_cutoff(*crystal, cutoff))
    edges, offsets = neighbor_list(*tensors(*crystal), cutoff)
    assert edges.dtype == offsets.dtype == torch.int64
    assert rows(*edges.numpy(), offsets.numpy()) == rows(*reference("ijS", *crystal, cutoff))


@settings(max_examples=60, deadline=None)
@given(crystals(), st.floats(0.5, 5))
def test_vectors_are_short_and_come_in_both_directions(crystal, cutoff):
    pos, cell, pbc = tensors(*crystal)
    (i, j), offsets = neighbor_list(pos, cell, pbc, cutoff)
    r = pos[j] - pos[i] + offsets.double() @ cell[0]
    assert (r.norm(dim=-1) < cutoff + 1e-9).all()
    assert rows(i, j, offsets) == rows(j, i, -offsets)
    assert not offsets[:, ~pbc[0]].any()


@settings(max_examples=40, deadline=None)
@given(crystals(), st.floats(0.5, 4), st.sampled_from([0, 5, 2**40]), st.randoms())
def test_bonds_are_pairs_of_edges(crystal, cutoff, shift, random):
    """Each has two, one the reverse of the other, whatever the size of the offsets."""
    edges, offsets = neighbor_list(*tensors(*crystal), cutoff)
    moved = shift * torch.arange(len(crystal[0]))[:, None]  # as if atom i were in another cell
    offsets = offsets + moved[edges[0]] - moved[edges[1]]
    order = random.sample(range(len(offsets)), len(offsets))
    edges, offsets = edges[:, order], offsets[order]
    bond, edge_of_bond = bonds(edges, offsets)
    assert (bond[edge_of_bond] == torch.arange(len(edge_of_bond))).all()
    assert len(bond) == 2 * len(edge_of_bond)
    first = edge_of_bond[bond]
    same = (edges == edges[:, first]).all(0) & (offsets == offsets[first]).all(1)
    reverse = (edges == edges[:, first].flip(0)).all(0) & (offsets == -offsets[first]).all(1)
    assert (same ^ reverse).all() and same.sum() == reverse.sum()


@settings(max_examples=40, deadline=None)
@given(st.lists(crystals(), min_size=1, max_size=4), st.floats(0.5, 4))
def test_batch_is_the_sum_of_its_systems(systems, cutoff):
    single = [neighbor_list(*tensors(*s), cutoff) for s in systems]
    sizes = torch.tensor([len(s[0]) for s in systems])
    batch = torch.arange(len(systems)).repeat_interleave(sizes)
    pos, cell, pbc = (torch.cat(x) for x in zip(*(tensors(*s) for s in systems)))
    edges, offsets = neighbor_list(pos, cell, pbc, cutoff, batch)
    starts = sizes.cumsum(0) - sizes
    assert torch.equal(edges, torch.cat([e + a for (e, _), a in zip(single, starts)], 1))
    assert torch.equal(offsets, torch.cat([o for _, o in single]))


def test_systems_without_atoms_have_no_edges():
    cell, pbc = torch.eye(3).repeat(3, 1, 1), TRUE.repeat(3, 1)
    edges, offsets = neighbor_list(torch.zeros(1, 3), cell, pbc, 1.1, torch.tensor([1]))
    assert edges.shape == (2, 6) and offsets.shape == (6, 3)
    edges, offsets = neighbor_list(
        torch.zeros(0, 3), cell, pbc, 1.1, torch.zeros(0, dtype=torch.long)
    )
    assert edges.shape == (2, 0) and offsets.shape == (0, 3) and edges.dtype == torch.int64


def test_positions_that_require_grad_are_only_read():
    pos = torch.zeros(1, 3, requires_grad=True)
    edges, _ = neighbor_list(pos, torch.eye(3)[None], TRUE, 1.1)
    assert edges.shape == (2, 6)


def test_float32_and_float64_give_the_same_edges():
    pos, cell = torch.rand(6, 3, generator=torch.Generator().manual_seed(0)), 3 * torch.eye(3)[None]
    one, two = (
        neighbor_list(pos, cell, TRUE, 4.0),
        neighbor_list(pos.double(), cell.double(), TRUE, 4.0),
    )
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


BAD = {
    r"expected finite positions, got \[nan *0. *0.\] for atom 1": dict(
        pos=torch.tensor([[0.0, 0, 0], [float("nan"), 0, 0]])
    ),
    r"expected one dtype for pos and cell, got pos float32 and cell float64": dict(
        cell=torch.eye(3)[None].double()
    ),
    r"expected cell as float\[B,3,3\], got float32\[3,3\]; .*cell\[None\]": dict(cell=torch.eye(3)),
    r"expected pbc as bool\[1,3\], got bool\[3\]": dict(pbc=TRUE[0]),
    r"expected pbc as bool\[1,3\], got int64\[1,3\]": dict(pbc=TRUE.long()),
    r"independent cell vectors .* in system 0; .*pbc False": dict(cell=torch.zeros(1, 3, 3)),
    r"independent cell vectors": dict(cell=torch.ones(1, 3, 3)),
    r"independent cell vectors.*": dict(cell=torch.full((1, 3, 3), float("nan"))),
    r"expected a positive cutoff in Angstrom, got 0": dict(cutoff=0),
    r"positive cutoff in Angstrom, got inf": dict(cutoff=float("inf")),
    r"batch sorted, within 0..0, got \[1 0\]": dict(batch=torch.tensor([1, 0])),
    r"batch sorted, within 0..0, got \[0 1\]": dict(batch=torch.tensor([0, 1])),
    r"expected batch for several systems, got None for 2 cells": dict(
        cell=torch.eye(3).repeat(2, 1, 1), pbc=TRUE.repeat(2, 1)
    ),
}


@pytest.mark.parametrize("text", BAD)
def test_errors_say_what_came(text):
    good = dict(pos=torch.zeros(2, 3), cell=torch.eye(3)[None], pbc=TRUE, cutoff=1.0)
    with pytest.raises(ValueError, match=text):
        neighbor_list(**good | BAD[text])


def test_without_vesin_the_error_gives_the_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "vesin", None)
    with pytest.raises(ImportError, match="pip install vesin"):
        neighbor_list(torch.zeros(1, 3), torch.eye(3)[None], TRUE, 1.0)
