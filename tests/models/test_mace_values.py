"""MACE against mace-torch's own calculator and forward: float64, heads, dipoles, charges, virials;
what it refuses."""

import copy
import functools
import sys
import warnings

import numpy as np
import pytest
import scipy.constants
import torch
from ase import Atoms

from tests.model_cases import CRYSTALS, MOLECULES, inputs, mace_network
from torch_side.models.mace import MACE
from torch_side.potentials import strain

SYSTEMS = CRYSTALS | MOLECULES | {"lonely": Atoms("OH", positions=[[0, 0, 0], [0, 0, 9]])}
HEADS = ["pbe", "r2scan"]
EMBEDDED = {
    name: {"type": kind, "per": "graph", "emb_dim": 3, **sizes}
    for name, kind, sizes in [
        ("total_charge", "categorical", {"num_classes": 11, "offset": 5}),
        ("total_spin", "continuous", {"in_dim": 1}),
    ]
}
KINDS = {  # name: how the network is built, what the adapter and the calculator are told
    "scale-shift": ({}, {}, {}),
    "plain": ({"kind": "MACE"}, {}, {}),
    "repulsion": ({"pair_repulsion": True}, {}, {}),
    "heads": ({"heads": HEADS}, {"head": "r2scan"}, {"head": "r2scan"}),
    "dipoles": (
        {"kind": "EnergyDipolesMACE"},
        {},
        {"model_type": "EnergyDipoleMACE", "arrays_keys": {"charges": "fixed"}},
    ),
    "embedded": ({"embedding_specs": EMBEDDED, "use_embedding_readout": True}, {}, {}),
}


@functools.cache
def network(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return mace_network(**KINDS[kind][0])


@functools.cache
def model(kind="scale-shift", dtype=torch.float64):
    return MACE(network(kind), dtype=dtype, **KINDS[kind][1])


@functools.cache
def calculator(kind="scale-shift"):
    from mace.calculators import MACECalculator

    return MACECalculator(
        models=copy.deepcopy(network(kind)), device="cpu", default_dtype="float64", **KINDS[kind][2]
    )


def given(atoms, kind="scale-shift"):
    """The contract's dict, with charge -1 and spin 2 where the model wants them, and the atoms with
    the same."""
    atoms, x = atoms.copy(), inputs(atoms, dtype=torch.float64)
    if kind == "embedded":
        atoms.info |= {"charge": -1, "spin": 2}
        x |= {"charge": torch.tensor([-1.0]), "spin": torch.tensor([2.0])}
    atoms.calc = calculator(kind)
    return atoms, x


def own_virial(out, x):
    return strain.virial(
        out["position_gradients"], out["cell_gradients"], x["pos"], x["batch"], x["cell"]
    )


def test_node_energies_x_float32():
    """MACE's own are float64 in any dtype."""
    mine = MACE(network("scale-shift"), dtype=torch.float32).asking("node_energies")
    out = mine(inputs(CRYSTALS["skewed"]))
    assert out["node_energies"].dtype == torch.float32
    assert abs(out["node_energies"].sum() - out["energy"]) < 1e-3


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("kind", KINDS)
def test_values_x_own_calculator(kind, name):
    atoms, x = given(SYSTEMS[name], kind)
    out = model(kind)(x)
    assert abs(out["energy"].item() - atoms.get_potential_energy()) < 1e-9
    assert abs(-out["position_gradients"].numpy() - atoms.get_forces()).max() < 1e-9
    assert abs(out["node_energies"].numpy() - atoms.calc.results["energies"]).max() < 1e-9
    if atoms.pbc.any():
        # its own on open axes, and its stress is by the volume of that
        cell = atoms.calc._atoms_to_batch(atoms).cell
        assert (abs(np.linalg.det(cell)) != pytest.approx(atoms.get_volume())) == (name == "slab")
        wanted = atoms.get_stress(voigt=False) * abs(np.linalg.det(cell))
        assert abs(own_virial(out, x)[0].numpy() - wanted).max() < 1e-9 and abs(wanted).max() > 1e-5


def test_virial_x_mace_forward():
    """MACE's virials are -W, though R^T g and h^T G are far from symmetric here."""
    atoms, x = given(SYSTEMS["skewed"])
    out, graph = model()(x), calculator()._atoms_to_batch(atoms).to_dict()
    graph = {
        k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in graph.items()
    }
    W = own_virial(out, x)
    moment = x["pos"].T @ out["position_gradients"]
    assert (moment - moment.T).abs().max() > 1e-2 and W.abs().max() > 0.1
    assert (W + calculator().models[0](graph, compute_virials=True)["virials"]).abs().max() < 1e-9
    G = strain.lattice_gradient_from_virial(
        -out["position_gradients"], x["pos"], x["batch"], x["cell"], W
    )
    torch.testing.assert_close(G, out["cell_gradients"], rtol=1e-9, atol=1e-9)


def test_hessian_x_own_calculator():
    atoms, x = given(SYSTEMS["ethanol"])
    H = model().asking("hessian")(x)["hessian"]
    wanted = calculator().get_hessian(atoms).reshape(H.shape)
    assert abs(H.numpy() - wanted).max() < 1e-9 and abs(wanted).max() > 1


def test_embeddings_x_own_calculator():
    atoms, x = given(SYSTEMS["ethanol"])
    asked = model().asking("embeddings")
    assert asked.card.shapes(9, 1)["embeddings"] == (9, 20) and "embeddings" not in model()(x)
    wanted = calculator().get_descriptors(atoms, invariants_only=False)
    assert abs(asked(x)["embeddings"].numpy() - wanted).max() < 1e-12 and np.ptp(wanted) > 0.01


def test_dipole_x_own_calculator():
    atoms, x = given(SYSTEMS["ethanol"], "dipoles")
    asked = model("dipoles").asking("dipole")
    for charges in (None, np.linspace(-0.5, 0.4, 9)):
        if charges is not None:
            atoms.arrays["fixed"], x["charges"] = charges, torch.tensor(charges)
            atoms.calc.reset()
        wanted = atoms.get_dipole_moment() * 1e-11 / scipy.constants.c / scipy.constants.e  # Debye
        assert abs(asked(x)["dipole"][0].numpy() - wanted).max() < 1e-9 and abs(wanted).max() > 1e-4


def test_heads_x_values():
    x = inputs(SYSTEMS["skewed"], dtype=torch.float64)
    energies = [
        MACE(network("heads"), dtype=torch.float64, head=head)(x)["energy"].item() for head in HEADS
    ]
    assert abs(energies[0] - energies[1]) > 1


def test_charge_and_spin_x_values():
    """They are never guessed, and differ from system to system in one call."""
    x = inputs(SYSTEMS["water"], SYSTEMS["water"], dtype=torch.float64)
    with pytest.raises(ValueError, match="got no charge, spin; pass charge="):
        model("embedded")(x)
    out = model("embedded")(
        x | {"charge": torch.tensor([0.0, -1.0]), "spin": torch.tensor([1.0, 2.0])}
    )
    atoms, _ = given(SYSTEMS["water"], "embedded")
    assert out["energy"][1].item() == pytest.approx(atoms.get_potential_energy(), abs=1e-9)
    assert abs(out["energy"][0] - out["energy"][1]) > 1e-3


def test_edges_x_given():
    """A caller's list with a skin and in another order, narrow integers."""
    from torch_side.potentials.neighbors import neighbor_list

    x = inputs(SYSTEMS["skewed"], dtype=torch.float64)
    edges, offsets = neighbor_list(x["pos"], x["cell"], x["pbc"], model().cutoff + 0.7, x["batch"])
    order = torch.randperm(len(offsets), generator=torch.Generator().manual_seed(0))
    narrow = {
        "edge_index": edges[:, order].int(),
        "cell_offsets": offsets[order].int(),
        "batch": x["batch"].int(),
        "atomic_numbers": x["atomic_numbers"].int(),
    }
    for key, v in model()(x | narrow).items():
        torch.testing.assert_close(v, model()(x)[key], rtol=0, atol=1e-9)


def test_saved_file_x_module(tmp_path):
    path = tmp_path / "small.model"
    torch.save(network("scale-shift"), path)
    x = inputs(SYSTEMS["ethanol"])
    loaded = MACE(path, trust=True)
    assert loaded.card.dtype == "float32" and torch.equal(
        loaded(x)["position_gradients"], MACE(network("scale-shift"))(x)["position_gradients"]
    )


def test_module_of_the_caller_x_unchanged():
    """It is copied; the default dtype of torch stays."""
    mine, before = network("scale-shift"), torch.get_default_dtype()
    state = {k: v.clone() for k, v in mine.state_dict().items()}
    MACE(mine, dtype=torch.float64)(inputs(SYSTEMS["water"], dtype=torch.float64))
    assert (
        all(p.requires_grad and p.dtype == torch.float32 for p in mine.parameters())
        and mine.training
    )
    assert all(torch.equal(v, state[k]) for k, v in mine.state_dict().items())
    assert torch.get_default_dtype() == before == torch.float32


def test_positions_of_the_caller_x_requires_grad():
    """MACE sets it on what it is given."""
    x = inputs(SYSTEMS["water"], dtype=torch.float64)
    edges = torch.tensor([[0, 1, 0, 2], [1, 0, 2, 0]])
    model().energies(
        x | {"edge_index": edges, "cell_offsets": torch.zeros(4, 3, dtype=torch.int64)}
    )
    assert not x["pos"].requires_grad


def test_weights_x_trained():
    trained = MACE(network("scale-shift"), dtype=torch.float64).requires_grad_(True)
    x = inputs(SYSTEMS["water"], dtype=torch.float64)
    weight = trained.network.products[0].linear.weight
    loss = lambda: trained(x)["position_gradients"].square().sum()
    (slope,) = torch.autograd.grad(loss(), weight)
    with torch.no_grad():
        ends = []
        for step in (1e-5, -2e-5):
            weight[3] += step
            ends.append(loss().item())
    assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(slope[3].item(), rel=1e-5) and abs(
        slope[3]
    ) > 1e-3


def test_torch_func_x_refused():
    """MACE's forward calls requires_grad_: bridge.to_jax must be told derivatives="autograd"."""
    x = inputs(SYSTEMS["water"], dtype=torch.float64)
    evaluate = model()  # loaded outside of the transform
    with pytest.raises(RuntimeError, match="requires_grad_"):
        torch.func.grad(lambda pos: evaluate(x | {"pos": pos})["energy"].sum())(x["pos"])


# Errors


def test_heads_x_errors():
    with pytest.raises(
        ValueError, match="expected head to be one of pbe, r2scan, got None; pass head"
    ):
        MACE(network("heads"))
    with pytest.raises(ValueError, match="expected head to be one of Default, got 'pbe'"):
        MACE(network("scale-shift"), head="pbe")


def test_networks_x_errors(tmp_path):
    torch.save({"weight": torch.ones(1)}, tmp_path / "state.pt")
    with pytest.raises(
        TypeError, match="or the path of one saved whole, got a dict; pass a module of mace-torch"
    ):
        MACE(tmp_path / "state.pt", trust=True)
    with pytest.raises(TypeError, match="got a Linear"):
        MACE(torch.nn.Linear(2, 2))
    specs = {"elec_temp": {"type": "continuous", "per": "graph", "emb_dim": 3, "in_dim": 1}}
    with pytest.raises(
        ValueError, match="no more than total_charge, total_spin, got one that needs elec_temp"
    ):
        MACE(mace_network(embedding_specs=specs))


def test_elements_x_errors():
    with pytest.raises(
        ValueError, match=r"one of the 6 elements of MACE, got He \(Z = 2\) for atom 1 of system 0"
    ):
        model()(
            inputs(SYSTEMS["water"], dtype=torch.float64)
            | {"atomic_numbers": torch.tensor([8, 2, 1])}
        )


def test_without_mace_the_error_gives_the_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "mace.modules", None)
    with pytest.raises(ImportError, match="pip install mace-torch"):
        MACE("some.model")
