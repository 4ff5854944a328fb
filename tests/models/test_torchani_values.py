"""TorchANI models of random weights against torchani's own entry points: atoms, charges, ensembles,
potentials; what it refuses."""

import functools
import sys

import ase.units
import numpy as np
import pytest
import torch
from ase import Atoms

from tests.model_cases import CRYSTALS, MOLECULES, ani, inputs, skewed
from torch_side.models.torchani import TorchANI
from torch_side.potentials.neighbors import neighbor_list

F64 = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore:The extensions")  # torchani's CUDA parts
SYSTEMS = [
    MOLECULES["water"],
    Atoms("O"),
    MOLECULES["ethanol"],
    Atoms("HH", positions=[[0, 0, 0], [0, 0, 20]]),
]


@functools.cache
def model(kind="simple_ani", **options):
    return TorchANI(ani(kind, **options), dtype=F64)


def own(network, atoms, **options):
    """torchani's answer for one molecule or crystal, by its own neighbour list."""
    numbers, pos = torch.tensor(atoms.numbers)[None], torch.tensor(atoms.positions)[None]
    box = (
        (torch.tensor(atoms.cell[:]), torch.tensor(atoms.pbc)) if atoms.pbc.any() else (None, None)
    )
    return network((numbers, pos), *box, **options)


def test_unit_is_that_of_ase():
    alone, energy = model()(inputs(SYSTEMS[1], dtype=F64)), own(ani(), SYSTEMS[1]).energies
    assert alone["energy"].item() == pytest.approx(energy.item() * ase.units.Hartree, rel=1e-14)
    assert not alone["position_gradients"].any() and not alone["cell_gradients"].any()


def test_node_energies_x_own():
    out = model()(inputs(*SYSTEMS, dtype=F64))
    wanted = torch.cat([own(ani(), a, atomic=True).energies[0] for a in SYSTEMS])
    torch.testing.assert_close(
        out["node_energies"], wanted * ase.units.Hartree, rtol=1e-12, atol=1e-8
    )


@pytest.mark.parametrize(
    "options",
    [
        dict(dispersion=True),
        dict(repulsion=False),
        dict(cutoff_fn="cosine"),
        dict(neighborlist="adaptive"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["skewed", "ethanol"])
def test_calculator_x_potentials(options, name):
    atoms = (CRYSTALS | MOLECULES)[name].copy()
    atoms.calc = ani(**options).ase()
    mine = model(**options)
    out = mine(inputs(atoms, dtype=F64))
    assert abs(out["energy"].item() - atoms.get_potential_energy()) < 1e-6
    assert abs(-out["position_gradients"].numpy() - atoms.get_forces()).max() < 1e-8
    assert (mine.card.cutoff, mine.card.receptive_field) == (
        (8.0, None) if "dispersion" in options else (5.2, 5.2)
    )


def test_calculator_x_float32():
    atoms, single = MOLECULES["ethanol"].copy(), TorchANI(ani())
    atoms.calc = ani().ase()
    out = single(inputs(atoms))
    assert out["energy"].item() == pytest.approx(atoms.get_potential_energy(), rel=5e-7)
    assert abs(-out["position_gradients"].numpy() - atoms.get_forces()).max() < 1e-4


@pytest.mark.parametrize("merged", [False, True])
def test_charges_x_own(merged):
    """Normalised system by system, though all are in one call."""
    mine = model("simple_aniq", merge_charge_networks=merged).asking("charges")
    network = ani("simple_aniq", merge_charge_networks=merged)
    systems = [*SYSTEMS, CRYSTALS["skewed"]]
    x = inputs(*systems, dtype=F64)
    out = mine(x)
    wanted = [own(network, a) for a in systems]
    torch.testing.assert_close(
        out["charges"], torch.cat([w.atomic_charges[0] for w in wanted]), rtol=1e-9, atol=1e-10
    )
    torch.testing.assert_close(
        out["energy"],
        torch.cat([w.energies for w in wanted]) * ase.units.Hartree,
        rtol=1e-12,
        atol=1e-8,
    )
    assert out["charges"].abs().max() > 1e-3
    total = torch.zeros(len(systems), dtype=F64).index_add(0, x["batch"], out["charges"])
    assert merged or total.abs().max() < 1e-9


def test_members_x_own():
    mine = model(ensemble_size=3)
    x = inputs(*SYSTEMS, dtype=F64)
    out, plain = mine.asking("member_energies")(x), mine(x)
    wanted = (
        torch.cat([own(ani(ensemble_size=3), a, ensemble_values=True).energies for a in SYSTEMS], 1)
        * ase.units.Hartree
    )
    torch.testing.assert_close(out.pop("member_energies"), wanted, rtol=1e-12, atol=1e-8)
    assert (wanted.std(0) > 1e-3).all() and dict(mine.card.sizes) == {"M": 3}
    torch.testing.assert_close(out, plain, rtol=1e-10, atol=1e-9)
    assert "member_energies" not in model().card.outputs


@pytest.mark.parametrize("kind", ["simple_ani", "simple_aniq"])
@pytest.mark.parametrize("name", ["skewed", "slab", "ethanol"])
def test_virials_of_atoms_x_own_clusters(kind, name):
    """Each atom alone with its neighbours is a molecule of torchani, whose energy of that atom has
    the derivatives of the edges that start there, and of no others."""
    atoms, network = (CRYSTALS | MOLECULES)[name], ani(kind)
    x = inputs(atoms, dtype=F64)
    (i, j), offsets = neighbor_list(x["pos"], x["cell"], x["pbc"], 5.2)
    vectors = x["pos"][j] - x["pos"][i] + offsets.double() @ x["cell"][0]
    wanted = torch.zeros(len(atoms), 3, 3, dtype=F64)
    for atom in range(len(atoms)):
        ends, r = j[i == atom], vectors[i == atom].requires_grad_()
        numbers = x["atomic_numbers"][torch.cat([torch.tensor([atom]), ends])]
        pos = torch.cat([torch.zeros(1, 3, dtype=F64), r])
        energy = network((numbers[None], pos[None]), atomic=True).energies[0, 0]
        (slopes,) = torch.autograd.grad(energy * ase.units.Hartree, r)
        wanted.index_add_(0, ends, (r[:, :, None] * slopes[:, None]).detach())
    both = inputs(MOLECULES["water"], atoms, dtype=F64)
    found = model(kind).asking("node_virials")(both)["node_virials"][3:]
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert wanted.abs().max() > 0.1


def test_virials_of_atoms_x_other_outputs():
    mine, x = model("simple_aniq").asking("charges"), inputs(*SYSTEMS, dtype=F64)
    out, plain = mine.asking("node_virials")(x), mine(x)
    assert out.pop("node_virials").shape == (len(x["pos"]), 3, 3)
    torch.testing.assert_close(out, plain, rtol=1e-12, atol=1e-12)


def test_several_systems_are_one_forward():
    calls, x = [], inputs(*SYSTEMS, dtype=F64)
    handle = model().network.neural_networks.register_forward_hook(
        lambda *args: calls.append(args[1][0].shape)
    )
    model()(x)
    handle.remove()
    assert calls == [(1, len(x["pos"]))]


def test_given_edges_x_skin_and_order():
    x = inputs(CRYSTALS["si"], CRYSTALS["skewed"], dtype=F64)
    edges, offsets = neighbor_list(x["pos"], x["cell"], x["pbc"], 7.0, x["batch"])
    order = torch.randperm(len(offsets), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        model()(x | {"edge_index": edges[:, order], "cell_offsets": offsets[order]}),
        model()(x),
        rtol=1e-11,
        atol=1e-9,
    )


WRONG = {  # as many edges in one direction as in the other, in all but the first
    "0 and 1": lambda there, back: there,
    "2 and 2": lambda there, back: torch.cat([there, there, back, back]),
    "0 and 1 of each": lambda there, back: torch.cat([there[:1], back[1:2]]),
}


@pytest.mark.parametrize("got", WRONG)
def test_given_edges_x_one_direction(got):
    x = inputs(CRYSTALS["si"], dtype=F64)
    edges, offsets = neighbor_list(x["pos"], x["cell"], x["pbc"], 7.0, x["batch"])
    ends = torch.cat([edges.T, offsets], 1)
    reverse = torch.cat([edges.flip(0).T, -offsets], 1)
    there = (edges[0] < edges[1]).nonzero()[:, 0]
    back = torch.stack([(reverse == ends[k]).all(1).nonzero()[0, 0] for k in there])
    keep = WRONG[got](there, back)
    ways = " and ".join(got.split()[:3:2])
    expected = f"each edge once in both directions, got {ways} of the one between atoms"
    with pytest.raises(ValueError, match=expected):
        model()(x | {"edge_index": edges[:, keep], "cell_offsets": offsets[keep]})


def test_the_model_given_is_left_alone():
    network = ani()
    mine = TorchANI(network)
    assert (
        next(network.parameters()).dtype == F64 and next(mine.parameters()).dtype == torch.float32
    )
    assert not any(p.requires_grad for p in mine.parameters()) and all(
        p.requires_grad for p in network.parameters()
    )
    mine.requires_grad_(True)
    mine(inputs(MOLECULES["water"]))["position_gradients"].square().sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in mine.parameters())


def test_names_x_torchani_models(monkeypatch):
    import torchani.models

    monkeypatch.setattr(torchani.models, "ANI2x", ani)  # its weights can only be downloaded
    x = inputs(MOLECULES["water"])
    assert torch.equal(TorchANI("ANI2x")(x)["energy"], TorchANI(ani())(x)["energy"])
    with pytest.raises(
        ValueError,
        match="the name of a model of torchani.models, as ANI2x, got 'nonsense'; pass one",
    ):
        TorchANI("nonsense")
    with pytest.raises(
        TypeError, match="a torchani.arch.ANI or ANIq, or a name, got a Linear; build one"
    ):
        TorchANI(torch.nn.Linear(1, 1))


def test_receptive_field_x_chain():
    x = inputs(Atoms("C4", positions=[[0, 0, 3.0 * k] for k in range(4)]), dtype=F64)
    x["pos"].requires_grad_()
    felt = torch.autograd.grad(model()(x)["node_energies"][0], x["pos"])[0].any(1)
    assert felt.tolist() == [True, True, False, False] and 3 < model().card.receptive_field == 5.2


def test_errors():
    x = inputs(MOLECULES["water"], skewed(Atoms("CO", positions=np.eye(3)[:2])), dtype=F64)
    with pytest.raises(
        ValueError,
        match=r"one of the 6 elements of TorchANI, got N \(Z = 7\) for atom 4 of system 1; take",
    ):
        model()(x | {"atomic_numbers": torch.tensor([8, 1, 1, 6, 7])})
    with pytest.raises(
        ValueError,
        match="neutral systems, which is all that torchani has, got charge -1.0 in system 1; pass none",
    ):
        model()(x | {"charge": torch.tensor([0.0, -1.0], dtype=F64)})
    assert torch.equal(
        model()(x | {"charge": torch.zeros(2, dtype=F64)})["energy"], model()(x)["energy"]
    )
    with pytest.raises(
        ValueError, match="potentials that all have a cutoff, got none for repulsion_xtb; build"
    ):
        TorchANI(ani(repulsion_cutoff=False))


def test_without_torchani_the_error_gives_the_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchani", None)
    with pytest.raises(ImportError, match="pip install torchani"):
        TorchANI("ANI2x")
