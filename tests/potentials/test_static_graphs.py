"""Graphs of fixed sizes, on a model of a few lines: what it sees, what comes back, what is noted.
The same of the models of packages is in tests/models/test_static_models.py."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.graph_cases import CARD, CUTOFF, POS, embedded, joined, system
from torch_side.calls import status
from torch_side.potentials.model import Wrapped
from torch_side.potentials.neighbors import Padded
from torch_side.potentials.static import _check_finite

F64 = torch.float64
seen = []


def model_of(energies=embedded, **options):
    """As a Model that keeps what it is called with."""

    def model(inputs):
        seen.append(inputs)
        return energies(inputs)

    model.__qualname__ = "model"
    card = replace(CARD, **options)
    return Wrapped(model, card, "autograd").asking(*card.outputs - {"hessian"})


def with_edges(x, slots=5, skin=0.4):
    """With more slots than edges, up to a bit more than the cutoff."""
    found = Padded(CUTOFF + skin, 4000)(x)
    n = int((found["edge_index"][0] < len(x["pos"])).sum())
    return x | Padded(CUTOFF + skin, n + slots)(x)


def without(x, *places):
    """With these atoms turned into padding."""
    numbers = x["atomic_numbers"].clone()
    numbers[list(places)] = 0
    return x | {"atomic_numbers": numbers}


def static(model, x):
    """The outputs and the text of what is wrong (None if nothing is)."""
    with status.collecting() as found:
        out = model(x)
        row = found.row()
    return out, found.text(row.tolist())


TWO = joined(system(), system(POS * 1.05, pbc=(True, False, True)))
STRUCTURES = {
    "one": system(),
    "one with padding": without(system(), 2),
    "two": TWO,
    "padding at the ends": without(TWO, 0, 7),
    "padding in between": without(TWO, 2, 4, 5),
    "a system of padding": without(TWO, 4, 5, 6, 7),
    "an open axis without a vector": system(cell=np.diag([4, 4, 0]), pbc=(True, True, False)),
    "an open axis, others in a plane": system(cell=np.array([[0, 4, 0], [0, 0, 0], [0, 0, 4]]), pbc=(True, False, True)),
    "an open axis along another one": system(cell=4 * np.eye(3)[[0, 1, 1]], pbc=(True, True, False)),
    "an open axis along the next one": system(cell=4 * np.eye(3)[[1, 1, 2]], pbc=(False, True, True)),
    "an open axis along the first one": system(cell=4 * np.eye(3)[[0, 1, 0]], pbc=(True, True, False)),
    "no axis": system(cell=np.zeros((3, 3)), pbc=(False, False, False)),
}  # fmt: skip


@pytest.mark.parametrize("slots", [0, 4, 5])
@pytest.mark.parametrize("name", STRUCTURES)
def test_outputs_x_structure(name, slots):
    x, model = with_edges(STRUCTURES[name], slots), model_of()
    out, text = static(model, x)
    assert text is None
    torch.testing.assert_close(out, model(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("elements", [range(1, 90), None])
@pytest.mark.parametrize("name", STRUCTURES)
def test_what_the_model_sees(name, elements):
    """Sizes of the inputs and one system more; edges inside of the cutoff, each in both directions,
    those of real atoms among themselves, all others within the system that is added."""
    x, model = with_edges(STRUCTURES[name]), model_of(elements=elements)
    seen.clear()
    static(model, x)
    (got,) = seen
    n, b = len(x["pos"]), len(x["cell"])
    real = x["atomic_numbers"] > 0
    k = int(real.sum())
    assert len(got["pos"]) == n + 2 and len(got["cell"]) == b + 1 == len(got["pbc"])
    assert torch.equal(got["pos"][:k], x["pos"][real])
    assert torch.equal(got["atomic_numbers"][:k], x["atomic_numbers"][real])
    assert torch.equal(got["batch"][:k], x["batch"][real]) and (got["batch"][k:] == b).all()
    assert (got["atomic_numbers"][k:] > 0).all() and not got["pbc"][b].any()
    assert torch.equal(got["cell"][b], 2 * CUTOFF * torch.eye(3, dtype=F64))
    i, j = got["edge_index"]
    assert len(i) == x["edge_index"].shape[1]
    shifts = (got["cell_offsets"][:, :, None] * got["cell"][got["batch"][i]]).sum(1)
    length = (got["pos"][j] - got["pos"][i] + shifts).norm(dim=-1)
    ghosts = (i >= n) & (j >= n)
    assert ((i < k) == (j < k)).all() and (ghosts | (i < k)).all() and (length < CUTOFF).all()
    torch.testing.assert_close(length[ghosts], torch.full_like(length[ghosts], CUTOFF / 2))
    slots = torch.arange(len(i))[ghosts]
    assert torch.equal(i[ghosts], n + slots % 2) and torch.equal(j[ghosts], n + (slots + 1) % 2)
    lone = torch.cdist(got["pos"][k:n], got["pos"][k:]) + 1e3 * torch.eye(n - k, n + 2 - k)
    assert (lone > CUTOFF).all()


EDGELESS = {
    "cutoff": None,
    "neighbor_list": None,
    "outputs": {"energy", "position_gradients", "cell_gradients"},
}


def springs(x):
    nodes = x["pos"].square().sum(-1)
    return {"energy": nodes.new_zeros(len(x["cell"])).index_add(0, x["batch"], nodes)}


@pytest.mark.parametrize("name", STRUCTURES)
def test_outputs_x_no_edges(name):
    x, model = STRUCTURES[name], model_of(springs, **EDGELESS)
    out, text = static(model, x)
    assert text is None
    torch.testing.assert_close(out, model(x), rtol=1e-11, atol=1e-11)


def test_note_x_padding_for_a_model_of_one_structure():
    """It has no edges, and no second system in which padding could be."""
    model = model_of(springs, **EDGELESS, batches=False)
    x = system()
    torch.testing.assert_close(static(model, x)[0], model(x))
    _, text = static(model, without(x, 2))
    assert text.startswith("expected no padding atoms for model, which has no edges, got atom 2")


def changed(x, **changes):
    """With single entries replaced: key=(place, value)."""
    x = {key: value.clone() for key, value in x.items()}
    for key, (place, value) in changes.items():
        x[key][place] = value
    return x


E = with_edges(TWO)
FLAT = torch.tensor([[4, 0, 0], [0, 4, 0], [4, 4, 0]], dtype=F64)
# what is wrong of two systems of four atoms
WRONG = {
    "unsorted": changed(E, batch=(1, 1)),
    "a negative system": changed(E, batch=(0, -1)),
    "a system too many": changed(E, batch=(7, 2)),
    "an element": changed(E, atomic_numbers=(5, 95)),
    "a negative element": changed(E, atomic_numbers=(5, -3)),
    "a position": changed(E, pos=((6, 1), torch.nan)),
    "a flat cell": changed(E, cell=(0, FLAT)),
    "a flat cell across an open axis": changed(E, cell=(1, FLAT[[0, 1, 0]])),
    "a cell": changed(E, cell=((0, 2, 1), torch.inf)),
    "an edge between systems": changed(E, edge_index=((1, 3), 6)),
    "a negative edge": changed(E, edge_index=((0, 4), -1)),
    "atoms at one place": changed(E, pos=(2, E["pos"][1])),
}  # fmt: skip
TEXTS = {
    "unsorted": "batch sorted, within 0..1, got system 0 for atom 2",
    "a negative system": "batch sorted, within 0..1, got system -1 for atom 0",
    "a system too many": "batch sorted, within 0..1, got system 2 for atom 7",
    "an element": "one of the 89 elements of model, got Z = 95 for atom 5 of system 1",
    "a negative element": "one of the 89 elements of model, got Z = -3 for atom 5 of system 1",
    "a position": "finite positions, got (",
    "a flat cell": "independent cell vectors on periodic axes, got other ones in system 0",
    "a flat cell across an open axis": "independent cell vectors on periodic axes, got other ones in system 1",
    "a cell": "independent cell vectors on periodic axes, got other ones in system 0",
    "an edge between systems": "edges within one system, or slots marked unused by an index >= N, got atoms",
    "a negative edge": "edges within one system, or slots marked unused by an index >= N, got atoms",
    "atoms at one place": "atoms apart from one another, got atoms",
}
PLACES = {
    "a position": "for atom 6 of system 1",
    "an edge between systems": "and 6 of system 1, or a negative index, in slot 3",
    "a negative edge": "or a negative index, in slot 4",
    "atoms at one place": "of system 0 0 Angstrom apart",
}


@pytest.mark.parametrize("name", WRONG)
def test_note_x_structure(name):
    out, text = static(model_of(), WRONG[name])
    assert text.startswith(f"expected {TEXTS[name]}") and PLACES.get(name, "") in text
    assert all(x.isnan().all() for x in out.values())


@pytest.mark.parametrize("key", ["energy", "position_gradients", "cell_gradients"])
def test_note_x_outputs_that_are_not_finite(key):
    """Each by itself, for a model may be asked for some of them."""
    shape = {"energy": (2,), "position_gradients": (4, 3), "cell_gradients": (2, 3, 3)}[key]
    found = torch.zeros(shape, dtype=F64)
    found[1] = torch.nan
    with status.collecting() as noted:
        _check_finite({key: found}, torch.tensor([0, 1, 1, 1]), "model", noted)
        text = noted.text(noted.row().tolist())
    where = "atom 1 of system 1" if key == "position_gradients" else "system 1"
    assert text.startswith(f"expected a finite {key} from model, got another one for {where}")


def test_the_first_thing_that_is_wrong_is_told():
    _, text = static(model_of(), changed(WRONG["a position"], atomic_numbers=(5, 95)))
    assert "Z = 95" in text


@pytest.mark.parametrize(
    "card, text",
    [
        (
            {"supports_pbc": False},
            "open boundaries, which is all that model has, got a periodic axis in system 0",
        ),
        ({"needs_pbc": True}, "a periodic system for model, got no periodic axis in system 1"),
    ],
)
def test_note_x_boundaries(card, text):
    x = with_edges(joined(system(), system(pbc=(False, False, False))))
    assert static(model_of(**card), x)[1].startswith(f"expected {text}")


@pytest.mark.parametrize("number", [2, 5, 13, 15, 100])
def test_note_x_elements_with_gaps(number):
    model = model_of(elements=[1, 6, 7, 8, 14])
    assert static(model, E)[1] is None
    _, text = static(model, changed(E, atomic_numbers=(5, number)))
    assert text.startswith(f"expected one of the 5 elements of model, got Z = {number} for atom 5")


def test_note_x_charge():
    _, text = static(model_of(), E | {"charge": torch.tensor([0.0, 2.0], dtype=F64)})
    assert "no charge, or zero, since model has no use for one, got charge 2 in system 1" in text


def of_root(x):
    return x["pos"][:, 0].sqrt()


def of_cusp(x):
    """Zero, with an infinite slope for atom 5."""
    p = x["pos"][5:6, 0]
    return torch.nn.functional.pad((p - p.detach()).abs().sqrt(), (5, len(x["pos"]) - 6))


POSITIVE = E["pos"].abs() + 0.1
RESULTS = {
    "energy": (of_root, POSITIVE * torch.tensor([1] * 4 + [-1] * 4)[:, None], "another one for system 1"),
    "position_gradients": (of_cusp, POSITIVE, "another one for atom 5 of system 1"),
}  # fmt: skip


@pytest.mark.parametrize("key", RESULTS)
def test_note_x_results(key):
    of_atoms, pos, got = RESULTS[key]

    def energies(x):
        nodes = of_atoms(x)
        return {"energy": nodes.new_zeros(len(x["cell"])).index_add(0, x["batch"], nodes)}

    outputs = {"energy", "position_gradients", "cell_gradients"}
    out, text = static(model_of(energies, outputs=outputs), E | {"pos": pos})
    assert text.startswith(f"expected a finite {key} from model, got {got}; look at its structure")
    assert all(x.isnan().all() for x in out.values())


@pytest.mark.parametrize(
    "change, options, text",
    [
        (lambda x: x, {"required_inputs": {"charge"}}, "inputs that model needs .charge., got no charge"),
        (lambda x: {k: v for k, v in x.items() if k != "edge_index"}, {}, "edges for model, in a program that is compiled as a whole, got none"),
        (lambda x: {k: v for k, v in x.items() if k != "cell_offsets"}, {}, "cell_offsets"),
        (lambda x: x | {"octarine": torch.zeros(3)}, {}, "inputs of the contract for a compiled graph, got octarine"),
    ],
)  # fmt: skip
def test_error_x_inputs(change, options, text):
    with pytest.raises(ValueError, match=text):
        static(model_of(**options), change(E))


def test_error_x_output_outside_of_the_contract():
    model = model_of(lambda x: embedded(x) | {"gap": x["pos"].sum()})
    with pytest.raises(ValueError, match="outputs of the contract from a compiled graph, got gap"):
        static(model, E)
