"""Models evaluated at fixed sizes without a look at any value, against their normal evaluation:
outputs, derivatives, padding; a traced graph; what is noted instead of raised."""

import copy
import functools
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from ase import Atoms
from torch.fx.experimental.proxy_tensor import make_fx

from benchmarks.gpu_steps import Refusing, Waiting
from tests import franken_cases
from tests.model_cases import CRYSTALS, MODELS, MOLECULES, ani, boxed, inputs
from tests.models.test_chgnet_values import random_network
from torch_side.calls import status
from torch_side.models.chgnet import CHGNet
from torch_side.models.d3 import D3
from torch_side.models.torchani import TorchANI
from torch_side.potentials.neighbors import Padded

F64 = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore:The extensions")  # torchani's CUDA parts
WATER, ETHANOL = boxed(MOLECULES["water"]), boxed(MOLECULES["ethanol"])
ORGANIC = [WATER, CRYSTALS["si"], ETHANOL]
ALLOYS = [franken_cases.SYSTEMS[name] for name in ("gold", "skewed", "trimer")]


@functools.cache
def chgnet(version="0.3.0", **options):
    return CHGNet(version, dtype=F64, **options)


@functools.cache
def torchani(kind="simple_ani", **options):
    return TorchANI(ani(kind, **options), dtype=F64)


@functools.cache
def with_pair_potential():
    """A user's own potential beside torchani's, with a shorter cutoff than these."""
    from torchani.potentials import PairPotential

    class Spring(PairPotential):
        pair_elem_tensors = ["k"]

        def pair_energies(self, elements, neighbors):
            k = self.to_pair_values(self.k, elements.view(-1)[neighbors.indices])
            return k * (neighbors.distances - 2) ** 2

    network = copy.deepcopy(ani())
    k = [0.01 * n for n in range(21)]  # of 6 elements
    network.potentials["spring"] = Spring(network.symbols, cutoff=4.0, k=k)
    return TorchANI(network, dtype=F64)


BUILD = {
    "sevennet": (lambda: MODELS["sevennet"].build(F64), ORGANIC),
    "mace": (lambda: MODELS["mace"].build(F64), ORGANIC),
    "franken": (lambda: franken_cases.model(F64), ALLOYS),
    "chgnet": (chgnet, ORGANIC),
    "torchani": (torchani, ORGANIC),
    "torchani, members": (lambda: torchani(ensemble_size=2), ORGANIC),
    "torchani, dispersion": (lambda: torchani(dispersion=True, cutoff_fn="cosine"), ORGANIC),
    "torchani, charges": (lambda: torchani("simple_aniq"), ORGANIC),
    "torchani, merged": (lambda: torchani("simple_aniq", merge_charge_networks=True), ORGANIC),
    "torchani, pairs": (with_pair_potential, ORGANIC),
    "torchani, shared": (lambda: torchani(container="SingleNN"), ORGANIC),
    "d3": (lambda: D3(cutoff=7.0, dtype=F64), ORGANIC),
    # with bonds in both directions
    "chgnet, virials": (lambda: CHGNet(random_network(), dtype=F64), ORGANIC),
    "chgnet, one layer, virials": (lambda: CHGNet(random_network(n_conv=1), dtype=F64), ORGANIC),
    "torchani, virials": (torchani, ORGANIC),
    "torchani, charges, virials": (lambda: torchani("simple_aniq"), ORGANIC),
    "torchani, dispersion, virials": (lambda: torchani(dispersion=True), ORGANIC),
}
TRACED = (
    "sevennet",
    "mace",
    "chgnet",
    "torchani",
    "torchani, pairs",
    "d3",
)  # franken reads a value


def built(name):
    """The model with all of its outputs but the Hessian active, and structures for it. Models
    that take a bond once have virials of atoms where their name here says so."""
    build, systems = BUILD[name]
    model = build()
    once = name.startswith(("chgnet", "torchani")) and not name.endswith("virials")
    left = {"hessian", "node_virials"} if once else {"hessian"}
    return model.asking(*model.card.outputs - left), systems


def with_edges(x, model, spare=7, skin=0.5):
    """With edges in more slots than there are edges, up to a bit more than the cutoff."""
    cutoff = model.card.cutoff + skin
    found = Padded(cutoff, 20_000)(x)
    edges = int((found["edge_index"][0] < len(x["pos"])).sum())
    return x | Padded(cutoff, edges + spare)(x)


def padded(x):
    """With a padding atom in front, one in between and one at the end, and an empty system."""
    n = len(x["pos"])
    place = torch.tensor([n, *range(n - 2), n, n - 2, n - 1, n])
    rows = lambda a, fill: torch.cat([a, torch.full_like(a[:1], fill)])[place]
    empty = lambda a: torch.cat([a, a[:1]])
    batch = torch.cat([x["batch"], x["batch"][-1:]])[place]
    batch[0] = 0
    return {
        "pos": rows(x["pos"], 0.3),
        "atomic_numbers": rows(x["atomic_numbers"], 0),
        "batch": batch,
        "cell": empty(x["cell"]),
        "pbc": empty(x["pbc"]),
    }


def static(model, x):
    """The outputs and the text of what is wrong (None if nothing is)."""
    with status.collecting() as found:
        out = model(x)
        row = found.row()
    return out, found.text(row.tolist())


def assert_equal(model, x, tolerance=1e-10):
    out, text = static(model, x)
    assert text is None
    torch.testing.assert_close(out, model(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", BUILD)
def test_outputs_x_several_systems_and_padding(name):
    """Atoms, a system and slots that are padding, edges beyond the cutoff, in an odd number of
    slots as well as in an even one."""
    model, systems = built(name)
    x = padded(inputs(*systems, dtype=F64))
    assert_equal(model, with_edges(x, model, 7))
    assert_equal(model, with_edges(x, model, 8))


# torchani's container puts values by a mask; sevenn's one_hot within franken looks, on a CPU alone
WAITS = {"torchani, shared", "franken"}


def test_a_step_on_another_device():
    """In a process in which torch has a device without values: no tensor is left on the CPU, none
    is copied from there, no value is read; the gradients and their derivatives as well."""
    found = subprocess.run(
        [sys.executable, "-m", "tests.models.elsewhere"], capture_output=True, text=True
    )
    assert not found.returncode, found.stderr
    told = dict(line.split(": ", 1) for line in found.stdout.splitlines())
    waits = {"torchani, shared": "Waiting: index_put_ waits for the device"}
    assert told == {name: waits.get(name, "ok") for name in BUILD}


@pytest.mark.parametrize("name", BUILD)
def test_a_step_reads_no_value_on_the_host(name):
    """On a GPU it would wait for that. What is looked up once, in the first call, may."""
    model, systems = built(name)
    x = with_edges(padded(inputs(*systems, dtype=F64)), model, 7)
    with status.collecting():
        model(x)
        with pytest.raises(Waiting) if name in WAITS else nullcontext(), Refusing():
            model(x)


@pytest.mark.parametrize("name", BUILD)
def test_outputs_x_one_system_and_slots(name):
    """As many slots as edges, slots alone, and none at all."""
    model, systems = built(name)
    x = inputs(systems[1], dtype=F64)
    assert_equal(model, with_edges(x, model, 0, skin=1e-9))
    alone = inputs(Atoms(systems[0][:1]), dtype=F64)
    for slots in (5, 0):
        empty = torch.full((2, slots), 1), torch.zeros(slots, 3, dtype=torch.int64)
        assert_equal(model, alone | dict(zip(("edge_index", "cell_offsets"), empty)))


SECOND = ["chgnet", "torchani, members", "torchani, dispersion", "chgnet, virials"]


@pytest.mark.parametrize("name", [*SECOND, "torchani, charges, virials"])
def test_second_derivatives_x_padding(name):
    """The Hessian, and the gradient of the energy and of gradients in positions and cells."""
    model, systems = built(name)
    x = with_edges(padded(inputs(*systems[:2], dtype=F64)), model)
    assert_equal(model.asking("hessian"), x)
    found = []
    for evaluate in (lambda y: static(model, y)[0], model):
        pos, cell = (x[key].clone().requires_grad_() for key in ("pos", "cell"))
        out = evaluate(x | {"pos": pos, "cell": cell})
        loss = out["energy"].sum() + out["position_gradients"].square().sum()
        loss = loss + out["cell_gradients"].sum()
        found.append(torch.autograd.grad(loss, (pos, cell)))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", TRACED)
def test_traced_graph_x_other_inputs(name):
    """Traced on one structure, run on another one of the same sizes."""
    build, systems = BUILD[name]
    model = build()
    one, other = systems[0], systems[-1][: len(systems[0])]
    other = Atoms(other.symbols, positions=other.positions + 0.01, cell=one.cell, pbc=one.pbc)
    made = [inputs(atoms, dtype=F64) for atoms in (one, other)]
    made = [x | Padded(model.card.cutoff, 150)(x) for x in made]

    def call(values):
        with status.collecting() as found:
            out = model(dict(zip(made[0], values)))
            return out, found.row()

    traced = make_fx(call, tracing_mode="fake", _allow_non_fake_inputs=True)
    graph = traced([x.clone() for x in made[0].values()])
    out, row = graph(list(made[1].values()))
    assert not row.any()
    torch.testing.assert_close(out, model(made[1]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["chgnet", "torchani"])
@pytest.mark.parametrize("wrong", ["missing", "twice", "offset"])
def test_note_x_one_direction(name, wrong):
    model, _ = built(name)
    x = with_edges(inputs(CRYSTALS["skewed"], dtype=F64), model, 4, skin=1e-9)
    slot = int((x["edge_index"][0] == 1).nonzero()[3])
    edges, offsets = x["edge_index"].clone(), x["cell_offsets"].clone()
    if wrong == "missing":
        edges[:, slot] = len(x["pos"])
    elif wrong == "twice":
        edges[:, -1], offsets[-1] = edges[:, slot], offsets[slot]
    else:
        edges[:, slot], offsets[slot] = edges[:, slot + 1], offsets[slot + 1]
    out, text = static(model, x | {"edge_index": edges, "cell_offsets": offsets})
    expected = "expected each edge once in both directions, got another number of the one between"
    assert text.startswith(expected) and out["energy"].isnan().all()


@pytest.mark.parametrize("name", ["chgnet", "torchani"])
def test_note_x_angles(name):
    """As many as there are fit; with one place less for each atom they don't."""
    x = inputs(CRYSTALS["si"], dtype=F64)  # 4 neighbours below 3 Angstrom, 6 angles
    build = {"chgnet": chgnet, "torchani": functools.partial(TorchANI, ani(), dtype=F64)}[name]
    enough, few = (build(angles_per_atom=n) for n in (6, 5))
    assert_equal(enough, with_edges(x, enough))
    _, text = static(few, with_edges(x, few))
    assert text == (
        "expected at most 10 angles, angles_per_atom=5 for each of 2 atoms, got 12; "
        "pass angles_per_atom=6 or more to the model, with some room to spare"
    )
    few(x)  # which has no such limit


def test_note_x_charge():
    model, systems = built("torchani")
    x = with_edges(inputs(*systems, dtype=F64), model)
    assert_equal(model, x | {"charge": torch.zeros(3, dtype=F64)})
    _, text = static(model, x | {"charge": torch.tensor([0.0, -1.0, 0.0], dtype=F64)})
    assert text == (
        "expected neutral systems, which is all that torchani has, got charge -1 in system 1; "
        "pass none, or take another model"
    )


def test_note_x_weights_of_020_and_systems_without_angles():
    model = chgnet("0.2.0")
    assert_equal(model, with_edges(padded(inputs(WATER, ETHANOL, dtype=F64)), model))
    pair = Atoms("CO", positions=[[0, 0, 0], [0, 0, 1.2]])
    _, text = static(model, with_edges(inputs(WATER, pair, dtype=F64), model))
    assert "angles in each system of this CHGNet" in text and "none in system 1" in text


def test_refused_parts_x_torchani():
    from torchani.potentials import DummyPotential

    model = TorchANI(ani(), dtype=F64)
    x = with_edges(inputs(WATER, dtype=F64), model)
    model.network.potentials["dummy"] = DummyPotential(("H", "O"), cutoff=5.2)
    with pytest.raises(NotImplementedError, match="got a DummyPotential; take lane"):
        static(model, x)


def test_refused_readout_x_chgnet():
    model = CHGNet(random_network(mlp_first=False, read_out="attn"), dtype=F64)
    with pytest.raises(NotImplementedError, match="got a readout by attention; take lane"):
        static(model, with_edges(inputs(WATER, dtype=F64), model))
    average = CHGNet(random_network(mlp_first=False), dtype=F64)
    assert_equal(average, with_edges(padded(inputs(WATER, ETHANOL, dtype=F64)), average))
