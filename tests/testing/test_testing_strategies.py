"""The strategies of bridge.testing: what they draw obeys the contract, reaches the corners that are
promised, and shrinks."""

import itertools
import warnings

import hypothesis
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample

from bridge.contract import GRAPH, check_inputs
from bridge.testing import arrays, batches, crystals, graphs, molecules
from bridge.testing.strategies import concatenate, distances, laid_out, of_ase, pad

many = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
smallest = settings(many, max_examples=200, derandomize=True, database=None)
first = settings(smallest, phases=[hypothesis.Phase.generate])


def find(strategy, condition, settings=first):
    """The first, or the smallest, the same each time."""
    return hypothesis.find(strategy, condition, settings=settings)


def apart(s):
    """The shortest distance in a structure, by brute force over images."""
    images = np.array(list(itertools.product(range(-3, 4), repeat=3))) * s["pbc"][0]
    r = np.linalg.norm(
        s["pos"][None, :, None] - s["pos"][:, None, None] + images @ s["cell"][0], axis=-1
    )
    return r[r > 1e-9].min(initial=np.inf)


@many
@given(
    st.data(),
    st.sampled_from([1.2, 1.6, 2.5]),
    st.sampled_from([(1, 4), (2, 6), (3, 3)]),
    st.booleans(),
)
def test_structures_x_contract_distance_number_elements(data, distance, number, periodic):
    s = data.draw((crystals if periodic else molecules)((3, 17), number, min_distance=distance))
    assert check_inputs(s) == (len(s["pos"]), 1)
    assert number[0] <= len(s["pos"]) <= number[1] and set(s["atomic_numbers"]) <= {3, 17}
    assert apart(s) >= distance * (1 - 1e-9) and s["pbc"].any() == periodic
    assert periodic or not s["cell"].any()
    assert not periodic or abs(np.linalg.det(s["cell"][0])) > distance**3
    if len(s["pos"]) > 1:
        assert abs(distances(s["pos"], s["cell"][0], s["pbc"][0]).min() - apart(s)) < 1e-9


CORNERS = {
    "triclinic": lambda s: np.count_nonzero(s["cell"]) == 6,
    "left-handed": lambda s: np.linalg.det(s["cell"][0]) < 0,
    "not lower triangular": lambda s: np.triu(s["cell"][0], 1).any(),
    "smaller than a cutoff": lambda s: (
        s["pbc"].all() and np.linalg.norm(s["cell"][0], axis=1).max() < 3
    ),
    "one atom": lambda s: len(s["pos"]) == 1,
    "all atoms": lambda s: len(s["pos"]) == 4,
    "two elements": lambda s: len(set(s["atomic_numbers"])) == 2,
    "a slab": lambda s: s["pbc"].sum() == 2,
    "a wire": lambda s: s["pbc"].sum() == 1,
    "all axes": lambda s: s["pbc"].all(),
    "longer than a cutoff": lambda s: np.linalg.norm(s["cell"][0], axis=1).max() > 4,
}


@pytest.mark.parametrize("corner", CORNERS)
def test_crystals_x_corner(corner):
    """Met among the first sixty."""
    s = find(crystals(), CORNERS[corner], settings=settings(first, max_examples=60))
    assert CORNERS[corner](s)


def test_crystals_x_arguments():
    assert find(crystals(pbc=(True, False, True)), lambda s: True)["pbc"].tolist() == [
        [True, False, True]
    ]
    assert find(crystals(dtype="float32"), lambda s: True)["cell"].dtype == np.float32
    with pytest.raises(NoSuchExample):
        find(
            crystals(pbc=(True,) * 3, lengths=(6.0, 7.0), n_atoms=1),
            lambda s: np.linalg.norm(s["cell"][0], axis=1).min() < 6 - 0.01,
        )


@pytest.mark.full
def test_structures_x_shrinking():
    s = find(crystals(), lambda s: True, smallest)
    assert (
        s["pos"].tolist() == [[0, 0, 0]]
        and s["atomic_numbers"].tolist() == [8]
        and s["pbc"].all()
        and np.count_nonzero(s["cell"]) == 3
    )
    s = find(crystals((8, 14)), lambda s: len(s["pos"]) > 1 and 14 in s["atomic_numbers"], smallest)
    assert sorted(s["atomic_numbers"]) == [8, 14] and np.count_nonzero(s["cell"]) == 3
    assert len(find(batches(n_atoms=(1, 2)), lambda s: s["pbc"].any(), smallest)["pos"]) == 1
    assert find(molecules(), lambda s: len(s["pos"]) > 2, smallest)["atomic_numbers"].tolist() == [
        8,
        8,
        8,
    ]


@many
@given(batches(n_systems=(1, 4)))
def test_batches_x_contract(s):
    assert check_inputs(s)[1] == len(s["cell"]) <= 4
    assert (np.diff(s["batch"]) >= 0).all() and set(s["batch"]) == set(range(len(s["cell"])))


@pytest.mark.full
def test_batches_x_corners():
    unequal = find(
        batches(molecules(n_atoms=(1, 3)), 2),
        lambda s: len(set(np.bincount(s["batch"]))) == 2,
        smallest,
    )
    assert sorted(np.bincount(unequal["batch"])) == [1, 2]
    assert len(find(batches(molecules(), 2), lambda s: True)["cell"]) == 2
    mixed = find(batches(n_systems=2), lambda s: s["pbc"].any() and not s["pbc"].any(1).all())
    assert len(mixed["cell"]) == 2


@settings(many, max_examples=25)
@given(graphs(cutoff=3.0))
def test_graphs_x_brute_force(s):
    """Edges are all pairs within the cutoff, and only these; the rest is padding."""
    n, b = check_inputs(s, GRAPH)
    real, (i, j) = np.flatnonzero(s["atomic_numbers"]), s["edge_index"]
    used = (i < n) & (j < n)
    assert set(real) == set(range(len(real))) and (s["batch"][len(real) :] == b - 1).all()
    assert (i < n).tolist() == (j < n).tolist() and i[used].max(initial=-1) < len(real)
    r = (
        s["pos"][j[used]]
        - s["pos"][i[used]]
        + np.einsum("ea,eab->eb", s["cell_offsets"][used], s["cell"][s["batch"][i[used]]])
    )
    assert (np.linalg.norm(r, axis=1) < 3.0).all() and (
        s["batch"][i[used]] == s["batch"][j[used]]
    ).all()
    images = np.array(list(itertools.product(range(-3, 4), repeat=3)))
    expected = 0
    for system in range(b):
        pos = s["pos"][: len(real)][s["batch"][: len(real)] == system]
        shifts = np.unique(images * s["pbc"][system], axis=0) @ s["cell"][system]
        d = np.linalg.norm(pos[None, :, None] - pos[:, None, None] + shifts, axis=-1)
        expected += ((d < 3.0) & (d > 1e-9)).sum()
    assert used.sum() == expected


def test_graphs_x_padding():
    s = find(
        graphs(cutoff=3.0, padding=(0, 5)),
        lambda s: (s["edge_index"] >= len(s["pos"])).any() and 0 in s["atomic_numbers"],
    )
    assert (
        1 <= (s["atomic_numbers"] == 0).sum() <= 5
        and 1 <= (s["edge_index"] >= len(s["pos"])).all(0).sum() <= 5
    )
    assert find(graphs(padding=0), lambda s: True)["atomic_numbers"].all()
    assert find(graphs(padding=3), lambda s: True)["atomic_numbers"].tolist().count(0) == 3


def test_padding_x_values():
    s = find(graphs(molecules(n_atoms=2), cutoff=9.0, padding=0), lambda s: True)
    padded = pad(s, 2, 5, seed=1)
    assert (
        padded["pos"].shape == (4, 3)
        and padded["batch"].tolist() == [0] * 4
        and padded["edge_index"].shape == (2, 7)
        and padded["cell_offsets"].shape == (7, 3)
    )
    assert sorted(padded["edge_index"][0].tolist()) == [0, 1, 4, 4, 4, 4, 4] and s["pos"].shape == (
        2,
        3,
    )


def test_concatenate_x_batches_of_batches():
    one = find(molecules(n_atoms=2), lambda s: True)
    assert concatenate([concatenate([one, one]), one])["batch"].tolist() == [0, 0, 1, 1, 2, 2]


LAYOUTS = {
    "C": lambda a: a.flags.c_contiguous and a.ndim == 2 and a.size > 1,
    "F": lambda a: a.flags.f_contiguous and not a.flags.c_contiguous,
    "strided": lambda a: a.ndim == 1 and a.size > 1 and a.strides[0] == 2 * a.itemsize,
    "reversed": lambda a: a.ndim == 2 and a.strides[0] < 0 and a.strides[1] < 0,
    "broadcast": lambda a: a.ndim > 0 and a.size > 1 and a.strides[0] == 0,
    "offset": lambda a: (
        a.base is not None
        and a.size > 1
        and a.flags.c_contiguous
        and a.ctypes.data - a.base.ctypes.data == a.itemsize
    ),
    "0-d": lambda a: a.ndim == 0,
    "zero-size": lambda a: a.size == 0 and a.ndim == 2,
    "three axes": lambda a: a.ndim == 3 and a.size,
    **{
        dtype: lambda a, dtype=dtype: a.dtype == dtype
        for dtype in (
            "float32",
            "float64",
            "int32",
            "int64",
            "bool",
            "uint8",
            "float16",
            "complex64",
            "complex128",
        )
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_arrays_x_layout_and_dtype(layout):
    found = find(arrays(), LAYOUTS[layout], settings=settings(smallest, max_examples=1000))
    assert not found.any()  # it shrinks to zeros


@many
@given(arrays(("float32", "int64"), st.just((2, 3)), ("F", "reversed")))
def test_arrays_x_arguments(a):
    assert (
        a.shape == (2, 3)
        and a.dtype in (np.float32, np.int64)
        and (a.flags.f_contiguous or a.strides[0] < 0)
    )


@many
@given(arrays(layouts=("C",)), st.sampled_from(["F", "strided", "reversed", "offset"]))
def test_layouts_x_values(a, layout):
    b = laid_out(a, layout)
    assert b.dtype == a.dtype and b.shape == a.shape and (a == b).all()


@pytest.mark.parametrize(
    "make, text",
    [
        (
            lambda: crystals(()),
            "expected at least one element and a positive min_distance, got elements ()",
        ),
        (
            lambda: crystals(min_distance=0.0),
            "expected at least one element and a positive min_distance",
        ),
        (lambda: crystals(n_atoms=(4, 1)), "expected a number, or (least, most), got (4, 1)"),
        (lambda: molecules(n_atoms=0), "expected at least one atom, got n_atoms=0"),
        (
            lambda: crystals(lengths=(1.0, 2.0)),
            "expected lengths (least, most) from min_distance=1.6 up, got (1.0, 2.0)",
        ),
        (lambda: batches(n_systems=(2, 1)), "expected a number, or (least, most), got (2, 1)"),
    ],
)
def test_arguments_x_errors(make, text):
    with pytest.raises(ValueError) as caught:
        make()
    assert text in str(caught.value)


def test_ase_atoms_x_contract():
    import ase

    s = of_ase(
        ase.Atoms("OH", positions=[[0, 0, 0], [0, 0, 1]], cell=[3, 4, 5], pbc=[True, False, False])
    )
    assert (
        check_inputs(s) == (2, 1)
        and s["pbc"].tolist() == [[True, False, False]]
        and s["cell"][0].diagonal().tolist() == [3, 4, 5]
    )
    assert not of_ase(ase.Atoms("O", cell=[3, 4, 5]))["cell"].any()


def test_drawing_x_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find(graphs(), lambda s: len(s["pos"]) > 2)
