"""bridge.testing.check_potential x wrong models: each is caught by the property named, and the
right one passes them all."""

import warnings

import ase
import pytest
import torch
from ase.build import bulk

from bridge.testing import ALL, Found, check_potential, run_checks
from tests.adapters import MODELS
from tests.matrices import a_few
from tests.model_cases import skewed
from tests.planted import (
    CONTINUOUS,
    CUTOFF,
    DIGITS,
    FINITE,
    GALLERY,
    nodes,
    per_system,
    radial,
    right,
    right_jax,
    structure,
)
from torch_side.potentials.geometry import edge_vectors

# for JAX, which compiles for each shape
FEW = [
    skewed(bulk("NaCl", "rocksalt", 5.0)),
    ase.Atoms("Si2", positions=[[0, 0, 0], [0.7, 1.5, 1.2]]),
]


def settings(wrong):
    return wrong.options | (
        {"structures": FEW}
        if wrong.options.get("kind") == "jax" or wrong.caught == CONTINUOUS
        else {}
    )


def rebuilt(text):
    """The structures that a failure gives, made again from what it prints."""
    return [
        eval(line, {"ase": ase}) for line in text.splitlines() if line.startswith("    ase.Atoms(")
    ]


def test_the_gallery_is_large_enough():
    assert len(GALLERY) >= 20 and {w.caught for w in GALLERY.values()} >= set(ALL) - {
        "lattice basis"
    }


@pytest.mark.parametrize("name", GALLERY)
def test_a_wrong_model_x_its_property(name):
    wrong = GALLERY[name]
    with pytest.raises(AssertionError, match=f"FAILED {wrong.caught}\n") as caught:
        check_potential(wrong.make(), checks=[wrong.caught], **settings(wrong))
    text = str(caught.value)
    assert (
        text.startswith(f"1 of 1 properties failed: {wrong.caught}\n")
        and "expected " in text
        and ", got " in text
    )
    found = rebuilt(text)
    assert len(found) == (
        1
        if wrong.caught not in ("batched equals single", "padding changes nothing")
        else len(found)
    ) and all(len(a) for a in found)
    with pytest.raises(AssertionError, match=f"FAILED {wrong.caught}\n"):
        check_potential(wrong.make(), found, checks=[wrong.caught], **wrong.options)


TORCH = {
    "graph": (right, {"gradients": "autograd", "cutoff": CUTOFF}),
    "structure": (structure, {}),
}


@pytest.mark.parametrize("name", TORCH)
def test_the_right_model_x_all_properties(name):
    model, options = TORCH[name]
    found = list(run_checks(model, kind="torch", **options))
    assert [f.name for f in found] == list(ALL) and not [f.failure for f in found if f.failure]
    assert [f.name for f in found if f.skipped] == (
        [] if name == "graph" else ["padding changes nothing"]
    )


NATIVE = "native lane agrees"


def native(model, **options):
    """What becomes of this property, which is checked where it is asked for."""
    assert NATIVE not in ALL
    (found,) = run_checks(model, kind="torch", checks=[NATIVE], n_atoms=(2, 2), **options)
    return found


def test_the_right_model_x_the_native_lane():
    model, options = TORCH["graph"]
    assert native(model, **options) == Found(NATIVE)


def test_a_model_that_is_another_one_compiled():
    """It asks whether it is traced."""

    def model(x):
        traced = isinstance(x["pos"], torch._subclasses.FakeTensor)
        return {"energy": right(x)["energy"] * (1.01 if traced else 1)}

    failure = native(model, **TORCH["graph"][1]).failure
    assert (
        "energy[0]: expected" in failure and "the model itself, got on the native lane" in failure
    )


def test_a_model_that_looks_at_values_x_the_native_lane():
    """It finds its neighbours itself."""
    failure = native(structure).failure
    assert ".numpy() is not supported" in failure and 'take lane="ffi"' in failure


def test_the_right_model_x_jax():
    found = list(
        run_checks(
            right_jax,
            kind="jax",
            gradients="autodiff",
            cutoff=CUTOFF,
            n_atoms=(1, 2),
            max_examples=8,
        )
    )
    assert not [f.failure for f in found if f.failure]
    assert [f.name for f in found if f.skipped] == ["lanes agree"]


def test_the_right_model_x_float32():
    checks = [
        c for c in ALL if c not in ("lanes agree", "transforms agree", "padding changes nothing")
    ]
    check_potential(structure, kind="torch", dtype="float32", checks=checks, max_examples=10)
    with pytest.raises(AssertionError, match=FINITE):
        check_potential(
            GALLERY["forces as gradients"].make(), kind="torch", dtype="float32", checks=[FINITE]
        )


def test_a_float32_model_x_its_card():
    """The card's dtype is taken, so that a model of float32 is no error; asked for in float64 it
    refuses, and that is told."""
    from bridge.card import Card
    from torch_side.potentials.model import Wrapped

    model = Wrapped(
        right, Card(cutoff=CUTOFF, neighbor_list="own", dtype="float32", elements={14}), "autograd"
    )
    check_potential(model, checks=[DIGITS, FINITE, "rotation"], max_examples=5)
    with pytest.raises(
        AssertionError, match="the check raised ValueError: expected pos as float32"
    ):
        check_potential(model, checks=["rotation"], dtype="float64", max_examples=2)


def test_a_kink_in_second_derivatives_is_a_warning():
    """(1 - r / cutoff)^2 has continuous forces, and a second derivative that ends at the cutoff."""
    options = dict(kind="torch", gradients="autograd", cutoff=CUTOFF, checks=[CONTINUOUS])
    with pytest.warns(
        UserWarning,
        match=f"{CONTINUOUS}: second derivatives jump by 0\\.\\d+ .* where a probe is .* Angstrom from atom",
    ):
        check_potential(radial(lambda r: (1 - r / CUTOFF) ** 2), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_potential(radial(lambda r: (1 - r / CUTOFF) ** 4), **options)


@pytest.mark.parametrize("name", a_few(MODELS, 1))
def test_continuity_x_adapters(name):
    case = MODELS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        check_potential(case.build(case.dtype), checks=[CONTINUOUS], max_examples=1)


def test_a_small_float32_error_x_digits():
    """One part in 10^7 of one term, which no test of symmetry sees."""
    model = lambda x: {
        "energy": right(x)["energy"]
        + 1e-3 * torch.sin(edge_vectors(x).float()).sum().to(x["pos"].dtype)
    }
    with pytest.raises(AssertionError, match="which needs all digits of float64"):
        check_potential(model, kind="torch", gradients="autograd", cutoff=CUTOFF, checks=[DIGITS])


def test_the_smallest_structure_x_size():
    """A model that is wrong from three atoms on fails with three, one that is wrong for all with
    one in a small cell."""

    def from_three(x):
        i, j = x["edge_index"]
        each = nodes(x["atomic_numbers"], i, j, edge_vectors(x).square().sum(-1))
        return {"energy": per_system(each, x) * (1 + (len(each) > 2) * x["pos"][:, 0].sum())}

    with pytest.raises(AssertionError) as caught:
        check_potential(
            from_three, kind="torch", gradients="autograd", cutoff=CUTOFF, checks=["translation"]
        )
    assert [len(a) for a in rebuilt(str(caught.value))] == [3]
    with pytest.raises(AssertionError) as caught:
        check_potential(
            GALLERY["a field"].make(), kind="torch", gradients="autograd", checks=["translation"]
        )
    (atoms,) = rebuilt(str(caught.value))
    assert len(atoms) == 1 and atoms.cell.lengths().max() < 2
