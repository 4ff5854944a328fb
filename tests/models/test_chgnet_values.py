"""CHGNet against chgnet's own calculator and converter: all its outputs and weights; its graph;
what it refuses."""

import functools
import itertools
import sys

import pytest
import torch
from ase import Atoms
from ase.build import bulk

from tests.model_cases import CRYSTALS, MOLECULES, boxed, inputs, quiet, skewed
from torch_side.models.chgnet import CHGNet
from torch_side.potentials.neighbors import neighbor_list

F64 = torch.float64
SYSTEMS = {
    "fe": bulk(
        "Fe"
    ),  # one atom, 6 Angstrom over several cells: its bonds are all between its own images
    "iron oxide": skewed(bulk("FeO", "rocksalt", 4.3, cubic=True), rattle=0.05),
    "skewed": CRYSTALS["skewed"],
    "sparse": bulk("NaCl", "rocksalt", 7.0),  # bonds, but none short enough for an angle
    "ethanol": boxed(MOLECULES["ethanol"]),
}


@functools.cache
def model(version="0.3.0", dtype=torch.float32):
    return CHGNet(version, dtype=dtype).asking("magmoms", "embeddings")


@quiet
def own(version):
    from chgnet.model.model import CHGNet as Network

    return Network.load(model_name=version, use_device="cpu", verbose=False)


@quiet
def calculator(version="0.3.0"):
    from chgnet.model.dynamics import CHGNetCalculator

    return CHGNetCalculator(own(version), use_device="cpu", return_site_energies=True)


@pytest.mark.parametrize("version", ["0.3.0", "r2scan", "0.2.0"])
@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.filterwarnings("ignore:Converting a tensor")
def test_calculator_x_weights(version, system):
    atoms = SYSTEMS[system].copy()
    atoms.calc = calculator(version)
    out = model(version)(inputs(atoms))
    assert abs(out["energy"].item() - atoms.get_potential_energy()) < 1e-5 * len(atoms)
    # both are in float32, and each is up to 8e-5 eV/Angstrom off what float64 gives
    assert abs(-out["position_gradients"].numpy() - atoms.get_forces()).max() < 3e-4
    assert abs(out["magmoms"].numpy() - atoms.get_magnetic_moments()).max() < 1e-4
    assert abs(out["node_energies"].numpy() - atoms.calc.results["energies"]).max() < 1e-4
    assert abs(out["node_energies"].sum() - out["energy"][0]) < 1e-5 * len(atoms)


def test_magmoms_of_iron_oxide():
    """They are there, and not those of another layer."""
    assert 3 < model()(inputs(SYSTEMS["iron oxide"]))["magmoms"].max() < 5


def test_embeddings_x_own():
    from pymatgen.io.ase import AseAtomsAdaptor

    atoms = SYSTEMS["iron oxide"]
    found = model()(inputs(atoms))["embeddings"]
    wanted = own("0.3.0").predict_structure(
        AseAtomsAdaptor.get_structure(atoms), task="e", return_atom_feas=True
    )["atom_fea"]
    assert (
        found.shape == (len(atoms), dict(model().card.sizes)["F"])
        and abs(found.numpy() - wanted).max() < 1e-4
    )


@pytest.mark.filterwarnings("ignore:Converting a tensor")
def test_isolated_atoms_x_calculator(capsys):
    atoms = Atoms("FeO", positions=[[0, 0, 0], [0, 0, 10]], cell=[20] * 3, pbc=True)
    out = model()(inputs(atoms))
    assert not out["position_gradients"].any() and not out["cell_gradients"].any()
    atoms.calc = calculator()
    assert abs(out["energy"].item() - atoms.get_potential_energy()) < 1e-5
    assert "isolated atom" in capsys.readouterr().err
    alone = model()(inputs(Atoms("O")))["energy"][0]
    torch.testing.assert_close(out["node_energies"][1], alone)


def test_open_systems_need_no_cell():
    with_cell, without = (
        model("0.3.0", F64)(inputs(a, dtype=F64))
        for a in (SYSTEMS["ethanol"], MOLECULES["ethanol"])
    )
    assert not without["cell_gradients"].any()
    torch.testing.assert_close(with_cell, without, rtol=1e-12, atol=1e-12)


def test_supercell_is_extensive():
    for system in ("fe", "sparse"):
        atoms = SYSTEMS[system]
        one, many = (model("0.3.0", F64)(inputs(a, dtype=F64)) for a in (atoms, atoms * (3, 2, 1)))
        torch.testing.assert_close(many["energy"], 6 * one["energy"], rtol=1e-10, atol=0)
        torch.testing.assert_close(
            many["magmoms"][: len(atoms)], one["magmoms"], rtol=1e-8, atol=1e-10
        )


def edges_of(x, cutoff):
    return dict(
        zip(
            ("edge_index", "cell_offsets"),
            neighbor_list(x["pos"], x["cell"], x["pbc"], cutoff, x["batch"]),
        )
    )


def test_given_edges_x_skin_and_order():
    x = inputs(SYSTEMS["fe"], SYSTEMS["skewed"], dtype=F64)
    edges = edges_of(x, 7.0)
    order = torch.randperm(len(edges["cell_offsets"]), generator=torch.Generator().manual_seed(0))
    shuffled = {
        "edge_index": edges["edge_index"][:, order],
        "cell_offsets": edges["cell_offsets"][order],
    }
    torch.testing.assert_close(
        model("0.3.0", F64)(x | shuffled), model("0.3.0", F64)(x), rtol=1e-9, atol=1e-10
    )


WRONG = {
    "0 and 1": lambda k: k[1:],
    "1 and 2": lambda k: torch.cat([k, k[:1]]),
    "0 and 2": lambda k: torch.cat([k[1:], k[-1:]]),
}


@pytest.mark.parametrize("got", WRONG)
def test_given_edges_x_one_direction(got):
    """Of the first or the last edge one direction is missing, or there twice, or both."""
    x = inputs(SYSTEMS["fe"])
    edges = edges_of(x, 6.0)
    i, n = 0, edges["cell_offsets"]
    back = int((n == -n[i]).all(1).nonzero()[0])
    order = torch.tensor([i, *(k for k in range(len(n)) if k not in (i, back)), back])
    keep = WRONG[got](order)
    with pytest.raises(
        ValueError,
        match=f"expected each edge once in both directions, got {got} of the one between atoms 0 and 0 with offset",
    ):
        model()(x | {"edge_index": edges["edge_index"][:, keep], "cell_offsets": n[keep]})


def test_several_systems_are_one_forward():
    calls, x = [], inputs(*SYSTEMS.values())
    handle = model().network.atom_embedding.register_forward_hook(
        lambda *args: calls.append(len(args[2]))
    )
    model()(x)
    handle.remove()
    assert calls == [len(x["pos"])]


def test_weights_of_020_x_systems_without_angles():
    """There a bond that takes part in no angle is treated differently beside others: refused, not
    answered otherwise."""
    with pytest.raises(
        ValueError, match="angles in each system .*, got none in system 1; pass it alone"
    ):
        model("0.2.0")(inputs(SYSTEMS["fe"], SYSTEMS["sparse"]))
    both = model("0.2.0")(inputs(SYSTEMS["sparse"], SYSTEMS["sparse"]))["energy"]
    assert both[0] == both[1]


def random_network(**options):
    from chgnet.model.model import CHGNet as Network

    torch.manual_seed(0)
    options = {"n_conv": 3, **options}
    return Network(
        atom_fea_dim=8,
        bond_fea_dim=8,
        angle_fea_dim=8,
        num_radial=5,
        num_angular=5,
        atom_conv_hidden_dim=8,
        bond_conv_hidden_dim=8,
        mlp_hidden_dims=(8,),
        **options,
    )


@pytest.mark.parametrize("name", ["skewed", "ethanol"])
def test_virials_of_atoms_x_vectors_of_edges(name):
    """Finite differences in r_ij of the edges that end at an atom, each by itself, with the graph
    of chgnet's own converter, in which the length of a bond is the mean of both directions."""
    from chgnet.model.model import BatchedGraph
    from pymatgen.io.ase import AseAtomsAdaptor

    mine, atoms = model("0.3.0", F64), SYSTEMS[name]
    network, x = mine.network, inputs(atoms, dtype=F64)
    own_graph = network.graph_converter(AseAtomsAdaptor.get_structure(atoms))
    (i, j), bond = own_graph.atom_graph.T, own_graph.directed2undirected
    pos = own_graph.atom_frac_coord.double() @ x["cell"][0]
    edges = pos[j] - pos[i] + own_graph.neighbor_image.double() @ x["cell"][0]
    centre, first_bond, first, second_bond, second = own_graph.bond_graph.T

    def energy(r):
        length = r.norm(dim=1)
        of_bond = torch.zeros(int(bond.max()) + 1, dtype=F64).index_add(0, bond, length / 2)
        direction = r / length[:, None]
        graph = BatchedGraph(
            atomic_numbers=x["atomic_numbers"],
            atom_owners=x["batch"],
            bond_bases_ag=network.bond_basis_expansion.rbf_expansion_ag(of_bond),
            bond_bases_bg=network.bond_basis_expansion.rbf_expansion_bg(of_bond),
            angle_bases=network.angle_basis_expansion(direction[first], direction[second]),
            batched_atom_graph=own_graph.atom_graph,
            directed2undirected=bond,
            batched_bond_graph=torch.stack([centre, first_bond, second_bond], 1),
            atom_positions=(),
            strains=(),
            volumes=(),
        )
        return network._compute(graph)["e"].item() * len(atoms)

    found = mine.asking("node_virials")(x)["node_virials"]
    for atom in range(min(len(atoms), 4)):
        for a, b in itertools.product(range(3), range(3)):
            d = torch.zeros_like(edges)
            d[j == atom, b] = edges[j == atom, a]
            slope = (energy(edges + 1e-5 * d) - energy(edges - 1e-5 * d)) / 2e-5
            # chgnet has its positions in float32
            assert found[atom, a, b].item() == pytest.approx(slope, rel=1e-4, abs=1e-5)
    assert (found[0] - found[1]).abs().max() > 0.1


def test_virials_of_atoms_x_other_outputs():
    """All that has no derivative is what it is without them, to the bit."""
    mine, x = model("0.3.0", F64), inputs(*SYSTEMS.values(), dtype=F64)
    out, plain = mine.asking("node_virials")(x), mine(x)
    for name in plain:
        if "gradients" in name:
            torch.testing.assert_close(out[name], plain[name], rtol=1e-12, atol=1e-13)
        else:
            assert torch.equal(out[name], plain[name])


@pytest.mark.parametrize(
    "options",
    [
        dict(mlp_first=False, read_out="attn"),
        dict(mlp_first=False),
        dict(is_intensive=False),
        dict(composition_model=None),
        dict(update_bond=False, update_angle=False),
    ],
    ids=["attention", "average", "extensive", "alone", "no bond graph"],
)
def test_own_network_x_options(options):
    from pymatgen.io.ase import AseAtomsAdaptor

    network, atoms = random_network(**options), SYSTEMS["iron oxide"]
    mine = CHGNet(network, dtype=F64)
    assert (
        "node_energies" in mine.card.outputs
    ) == network.mlp_first and mine.card.receptive_field == 18
    # a copy was taken
    assert (
        next(network.parameters()).dtype == torch.float32
        and network.mlp.layers[0].weight.requires_grad
    )
    wanted = network.predict_structure(AseAtomsAdaptor.get_structure(atoms), task="ef")
    out = mine(inputs(atoms, SYSTEMS["skewed"], dtype=F64))
    energy = wanted["e"] * (len(atoms) if network.is_intensive else 1)
    assert out["energy"][0].item() == pytest.approx(float(energy), rel=1e-5)
    assert (
        abs(-out["position_gradients"][: len(atoms)].numpy() - wanted["f"]).max()
        < 1e-4 * abs(wanted["f"]).max()
    )


def test_checkpoint_x_file(tmp_path):
    network, x = random_network(), inputs(SYSTEMS["fe"])
    torch.save({"model": network.as_dict()}, tmp_path / "own.pth.tar")
    torch.testing.assert_close(CHGNet(str(tmp_path / "own.pth.tar"))(x), CHGNet(network)(x))


def test_weights_are_frozen_and_can_be_trained(capsys):
    mine, x = CHGNet(), inputs(SYSTEMS["iron oxide"])
    assert capsys.readouterr().out == ""
    assert not mine.training and not any(p.requires_grad for p in mine.parameters())
    mine.requires_grad_(True)
    mine(x)["position_gradients"].square().sum().backward()
    assert mine.network.atom_conv_layers[0].twoBody_atom.mlp_core.layers[0].weight.grad.any()


def test_card():
    card = CHGNet().card
    assert card.active_outputs == {"energy", "position_gradients", "cell_gradients"}
    assert (card.cutoff, card.receptive_field, len(card.elements), card.dtype, card.device) == (
        6.0,
        24.0,
        94,
        "float32",
        "cpu",
    )
    assert CHGNet("0.2.0").card.cutoff == 5.0


def test_receptive_field_x_chain():
    """Of a chain with a link shorter than the cutoff, an atom feels as many links as there are
    layers."""
    x = inputs(Atoms("Fe7", positions=[[0, 0, 4.5 * k] for k in range(7)]), dtype=F64)
    x["pos"].requires_grad_()
    felt = torch.autograd.grad(model("0.3.0", F64)(x)["node_energies"][0], x["pos"])[0].any(1)
    assert (
        felt.tolist() == [True] * 5 + [False] * 2
        and 4 * 4.5 < model().card.receptive_field == 4 * 6
    )


def test_errors():
    x = inputs(MOLECULES["water"], SYSTEMS["fe"])
    with pytest.raises(
        ValueError,
        match=r"one of the 94 elements of CHGNet, got Am \(Z = 95\) for atom 3 of system 1; take",
    ):
        model()(x | {"atomic_numbers": torch.tensor([8, 1, 1, 95])})
    with pytest.raises(ValueError, match="pos as float32, the model's dtype, got float64"):
        model()(inputs(SYSTEMS["fe"], dtype=F64))
    with pytest.raises(
        ValueError,
        match="one of the versions 0.3.0, r2scan, 0.2.0 or the path of a checkpoint, got '9.9.9'; pass",
    ):
        CHGNet("9.9.9")


def test_without_chgnet_the_error_gives_the_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "chgnet.model.model", None)
    with pytest.raises(ImportError, match="pip install chgnet"):
        CHGNet()
