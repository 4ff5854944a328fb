"""nvalchemi-toolkit: potentials as its models under its dynamics, and its models as potentials in
JAX."""

import functools
import importlib
import pickle
import sys
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import bridge
from bridge.card import Card
from tests.graph_cases import (
    CELL,
    CUTOFF,
    NUMBERS,
    POS,
    Embedded,
    close,
    embedded,
    joined,
    seen,
    system,
)
from torch_side.engines import nvalchemi as engine
from torch_side.models.d3 import D3
from torch_side.models.nvalchemi import Nvalchemi
from torch_side.potentials import strain
from torch_side.potentials.geometry import edge_vectors
from torch_side.potentials.model import Model


@pytest.fixture(scope="module", autouse=True)
def toolkit():
    """What nvalchemi-toolkit needs lies in a folder of its own (see the Makefile), for its zarr is
    not the one that torchani can use."""
    global data, dynamics, base, demo, lj, neighbors
    others = {
        name: sys.modules.pop(name) for name in [*sys.modules] if name.split(".")[0] == "zarr"
    }
    folder = str(Path(sys.prefix) / "nvalchemi")
    sys.path.insert(0, folder)
    parts = ("data", "dynamics", "models.base", "models.demo", "models.lj", "neighbors")
    data, dynamics, base, demo, lj, neighbors = (
        importlib.import_module(f"nvalchemi.{name}") for name in parts
    )
    sys.path.append(sys.path.pop(sys.path.index(folder)))
    for name in [name for name in sys.modules if name.split(".")[0] == "zarr"]:
        del sys.modules[name]
    sys.modules.update(others)
    yield
    sys.path.remove(folder)


ALL = {"energy", "forces", "stress"}
# atoms out of their cell
SECOND = system(POS[:3] + 5.0, CELL @ (np.eye(3) + 0.1 * np.triu(np.ones((3, 3)))), NUMBERS[:3])
PAIR = joined(system(), SECOND)
OPEN = system(cell=np.zeros((3, 3)), pbc=(False,) * 3)


def batch_of(inputs, **more):
    """nvalchemi's Batch of a dict of the contract."""
    counts, rows = torch.bincount(inputs["batch"]).tolist(), []
    for k, (pos, numbers) in enumerate(
        zip(inputs["pos"].split(counts), inputs["atomic_numbers"].split(counts))
    ):
        cell = (
            {"cell": inputs["cell"][k : k + 1], "pbc": inputs["pbc"][k : k + 1]}
            if inputs["cell"][k].any()
            else {}
        )
        rows.append(
            data.AtomicData(
                positions=pos.clone(),
                atomic_numbers=numbers,
                **cell,
                **{name: x.clone() for name, x in more.items()},
            )
        )
    return data.Batch.from_data_list(rows)


@functools.cache
def frozen():
    return Embedded().requires_grad_(False)


def wrapped(*active, potential=None):
    wrapper = engine.model(potential or frozen())
    wrapper.set_config("active_outputs", set(active))
    return wrapper


def stress_of(out, inputs):
    W = strain.virial(
        out["position_gradients"],
        out["cell_gradients"],
        inputs["pos"],
        inputs["batch"],
        inputs["cell"],
    )
    return strain.stress(W, inputs["cell"], inputs["pbc"])


def expected(inputs, model=None):
    out = (model or frozen())(inputs)
    return {
        "energy": out["energy"][:, None],
        "forces": -out["position_gradients"],
        "stress": stress_of(out, inputs),
    }


@pytest.mark.parametrize("listed", [None, CUTOFF, CUTOFF + 1])
def test_values_x_neighbour_lists(listed):
    batch = batch_of(PAIR)
    if listed:
        neighbors.compute_neighbors(batch, listed, format=base.NeighborListFormat.COO)
    seen.clear()
    out = wrapped(*ALL, "atomic_energies")(batch)
    assert len(seen) == 1 and list(out) == ["atomic_energies", "energy", "forces", "stress"]
    close({k: out[k] for k in ALL}, expected(PAIR))
    close(out["atomic_energies"], frozen()(PAIR)["node_energies"])
    assert not any(x.requires_grad for x in out.values())


def test_unused_slots_and_edges_beyond_the_cutoff_are_left_out():
    batch = batch_of(PAIR)
    neighbors.compute_neighbors(batch, CUTOFF + 1, format=base.NeighborListFormat.COO)
    batch.neighbor_list[::5] = batch.num_nodes
    found = engine.model(frozen()).adapt_input(batch)
    pairs = torch.linalg.vector_norm(edge_vectors(found), dim=1)
    assert (
        10 < len(pairs) < len(batch.neighbor_list) * 0.8
        and pairs.max() < CUTOFF
        and found["edge_index"].max() < batch.num_nodes
    )


def test_single_and_open_systems():
    single = data.AtomicData(
        positions=PAIR["pos"][:4],
        atomic_numbers=PAIR["atomic_numbers"][:4],
        cell=PAIR["cell"][:1],
        pbc=PAIR["pbc"][:1],
    )
    close({**wrapped(*ALL)(single)}, expected(system()))
    out = engine.model(frozen())(batch_of(OPEN))
    assert set(out) == {"energy", "forces"}
    close(out["forces"], -frozen()(OPEN)["position_gradients"])
    with pytest.raises(
        ValueError,
        match="expected a periodic system, got no periodic axis in system 0; it has no stress",
    ):
        wrapped(*ALL)(batch_of(OPEN))


def test_gradients_x_requires_grad():
    """Pipelines and training differentiate the outputs."""
    batch = batch_of(PAIR)
    batch.positions.requires_grad_()
    out = wrapped("energy", "forces")(batch)
    (g,) = torch.autograd.grad(out["energy"].sum(), batch.positions, retain_graph=True)
    close(g, -out["forces"].detach())
    assert out["forces"].requires_grad
    model = Embedded()
    engine.model(model)(batch_of(PAIR))["forces"].square().sum().backward()
    assert model.weight.grad != 0


def test_pipeline_of_a_sum():
    two = engine.model(frozen()) + engine.model(Embedded(0.5).requires_grad_(False))
    batch = batch_of(PAIR)
    neighbors.compute_neighbors(batch, config=two.model_config.neighbor_config)
    close(two(batch)["forces"], 1.5 * expected(PAIR)["forces"])


@pytest.mark.parametrize("listed", [False, True])
def test_a_sum_with_dispersion_x_its_terms(listed):
    """`model + D3()`, with each term's cutoff, beside direct calls of both."""
    d3, batch = D3("pbe", cutoff=8.0, dtype=torch.float64), batch_of(PAIR)
    wrapper = wrapped(*ALL, potential=frozen() + d3)
    if listed:
        neighbors.compute_neighbors(batch, config=wrapper.model_config.neighbor_config)
    out, one, other = {**wrapper(batch)}, expected(PAIR), expected(PAIR, d3)
    close(out, {name: x + other[name] for name, x in one.items()})
    assert wrapper.model_config.neighbor_config.cutoff == 8.0 and set(out) == ALL
    assert (other["energy"] < -0.1).all() and all(abs(x).max() > 1e-3 for x in other.values())


def pair_energies(x):
    """Lennard-Jones of argon in JAX, smooth at the cutoff."""
    i, j = x["edge_index"]
    n = len(x["pos"])
    used = i < n
    i, j = (jnp.where(used, k, 0) for k in (i, j))
    r = (
        x["pos"][j]
        - x["pos"][i]
        + jnp.einsum(
            "ea,eab->eb", x["cell_offsets"].astype(x["pos"].dtype), x["cell"][x["batch"][i]]
        )
    )
    r2 = jnp.where(used, (r**2).sum(-1), 30.0)
    s6 = (3.4**2 / r2) ** 3
    e = jnp.where(used, 0.02 * (s6**2 - s6) * jnp.clip(1 - r2 / 36.0, 0) ** 2, 0)
    return jax.ops.segment_sum(e, x["batch"][i], num_segments=len(x["cell"]))


@functools.cache
def argon():
    return bridge.torch_potential(pair_energies, gradients="autodiff", cutoff=6.0)


def crystals():
    """Two triclinic crystals of argon of unequal size, and velocities of some 60 K."""
    rng, fcc = np.random.default_rng(1), 2.7 * np.array([[0.0, 1, 1], [1, 0, 1], [1, 1, 0]])
    systems = []
    for k in (2, 3):
        cell = fcc * [[2], [2], [k]]
        grid = np.array([[a, b, c] for a in range(2) for b in range(2) for c in range(k)]) @ fcc
        systems.append(
            system(grid + 0.05 * rng.normal(size=grid.shape), cell, np.full(len(grid), 18))
        )
    inputs = joined(*systems)
    return inputs, torch.tensor(0.01 * rng.normal(size=inputs["pos"].shape))


def test_nve_x_jax_potential():
    """100 fs of NVE by nvalchemi, neighbours by its hook: velocity Verlet of the same potential,
    and energy conserved."""
    (inputs, v), model, steps, dt = crystals(), argon(), 25, 4.0
    batch = batch_of(inputs)
    zeros = {"velocities": v.clone(), "forces": torch.zeros_like(v)}
    for name, x in zeros.items():
        batch._atoms_group[name] = x
    batch.energy = torch.zeros(2, 1, dtype=torch.float64)
    wrapper = engine.model(model)
    nve = dynamics.NVE(wrapper, dt=dt, hooks=wrapper.make_neighbor_hooks())
    nve.compute(batch)
    m, tau = batch.atomic_masses.to(v.dtype)[:, None], dt / 10.180505710759414
    r, out = inputs["pos"].clone(), model(inputs)
    total = [out["energy"].sum() + (m * v**2).sum() / 2]
    nve.run(batch, n_steps=steps)
    for _ in range(steps):
        v = v - tau / 2 * out["position_gradients"] / m
        r = r + tau * v
        out = model(inputs | {"pos": r})
        v = v - tau / 2 * out["position_gradients"] / m
        total.append(out["energy"].sum() + (m * v**2).sum() / 2)
    close([batch.positions, batch.velocities, batch.energy[:, 0]], [r, v, out["energy"]], 1e-9)
    kinetic = (batch.atomic_masses[:, None] * batch.velocities**2).sum() / 2
    potential = expected(inputs, model)["energy"].sum()
    assert abs(batch.energy.sum() - potential) > 1e-2, "nothing moved"
    assert abs(batch.energy.sum() + kinetic - total[0]) < 2e-4 * abs(batch.energy.sum() - potential)


def test_stress_x_jax_potential():
    inputs, _ = crystals()
    close(
        wrapped(*ALL, potential=argon())(batch_of(inputs))["stress"],
        expected(inputs, argon())["stress"],
    )


class Featured(Model):
    """A potential with embeddings."""

    card = Card(
        outputs={*Card().outputs, "embeddings", "charges"}, sizes=(("F", 2),),
        required_inputs={*Card().required_inputs, "spin"}, optional_inputs={"charge"},
    )  # fmt: skip

    def energies(self, x):
        nodes = x["pos"].square().sum(1) + x.get("charge", x["spin"])[x["batch"]]
        energy = nodes.new_zeros(len(x["cell"])).index_add(0, x["batch"], nodes)
        return {
            "energy": energy,
            "embeddings": torch.stack([nodes, -nodes], 1),
            "charges": 2 * nodes,
        }


def test_embeddings_and_further_inputs():
    wrapper, inputs = (
        engine.model(Featured()),
        joined(OPEN, system(POS[:3], np.zeros((3, 3)), NUMBERS[:3], (False,) * 3)),
    )
    one = torch.ones(1, 1, dtype=torch.float64)
    batch = batch_of(inputs, charge=3 * one, spin=one)
    nodes = inputs["pos"].square().sum(1) + 3
    assert wrapper.embedding_shapes == {"node_embeddings": (2,), "graph_embeddings": (2,)}
    assert (
        wrapper.model_config.required_inputs == {"spin"}
        and "charge" in wrapper.model_config.optional_inputs
    )
    found = wrapper.compute_embeddings(batch)
    close(
        [found.node_embeddings[:, 1], found.graph_embeddings[:, 0]],
        [-nodes, torch.stack([nodes[:4].sum(), nodes[4:].sum()])],
    )
    wrapper.set_config("active_outputs", {"charges"})
    close({**wrapper(batch)}, {"charges": 2 * nodes})
    single = wrapper.compute_embeddings(
        data.AtomicData(positions=inputs["pos"], atomic_numbers=inputs["atomic_numbers"], spin=one)
    )
    assert single.graph_embeddings.shape == (1, 2) and single.node_embeddings.shape == (7, 2)
    with pytest.raises(KeyError, match="'spin' required"):
        wrapper(batch_of(inputs))


def test_round_trip():
    wrapper = engine.model(frozen())
    assert engine.potential(wrapper) is frozen()
    close(
        Nvalchemi(wrapper)(PAIR),
        {k: frozen()(PAIR)[k] for k in ("energy", "position_gradients", "cell_gradients")},
    )
    assert Nvalchemi(wrapper).card.cutoff == CUTOFF and wrapper.model_config.active_outputs == {
        "energy",
        "forces",
    }
    assert (
        Nvalchemi(wrapper)
        .asking("node_energies")(PAIR)["node_energies"]
        .equal(frozen()(PAIR)["node_energies"])
    )


@pytest.mark.parametrize("half", [False, True])
def test_lennard_jones_from_jax(half, maybe_jit):
    """Its Warp kernels: forces and stress of their own, over a MATRIX of neighbours, periodic
    images of an atom itself among them."""
    inputs, _ = crystals()
    wrapper = lj.LennardJonesModelWrapper(0.0104, 3.4, 8.0, switch_width=1.0, half_list=half)
    batch = batch_of(inputs)
    neighbors.compute_neighbors(batch, config=wrapper.model_config.neighbor_config)
    model = engine.potential(wrapper)
    energy = bridge.potential(
        model,
        atomic_numbers=inputs["atomic_numbers"].numpy(),
        batch=inputs["batch"].numpy(),
        n_systems=2,
    )
    R, H = jnp.asarray(inputs["pos"]), jnp.asarray(inputs["cell"])
    got = maybe_jit(lambda R, H: (energy(R, H)[:, None], energy.forces(R, H), energy.stress(R, H)))(
        R, H
    )
    assert wrapper.model_config.active_outputs == {"energy", "forces"}
    wrapper.set_config("active_outputs", ALL)
    own = wrapper(batch)
    close(got, [own[k] for k in ("energy", "forces", "stress")], 1e-9)
    assert abs(got[2]).max() > 1e-4 and model.card.derivative_order == 1


def test_lennard_jones_x_gradients_by_finite_differences():
    """One system periodic, one open; G of a cell at fixed positions, from a stress."""
    inputs, _ = crystals()
    inputs["cell"][1], inputs["pbc"][1] = 0, False
    model = engine.potential(lj.LennardJonesModelWrapper(0.0104, 3.4, 6.0, switch_width=1.0))
    out = model(inputs)
    assert not out["cell_gradients"][1].any() and out["cell_gradients"][0].abs().max() > 1e-3
    rng = np.random.default_rng(2)
    for name, key in (("pos", "position_gradients"), ("cell", "cell_gradients")):
        d = torch.tensor(rng.normal(size=inputs[name].shape)) * (
            1 if name == "pos" else inputs["pbc"][:, :1, None]
        )
        ends = [model(inputs | {name: inputs[name] + s * d})["energy"].sum() for s in (1e-4, -1e-4)]
        close((ends[0] - ends[1]) / 2e-4, (d * out[key]).sum(), 1e-6)


def test_demo_model_from_jax():
    torch.manual_seed(0)
    wrapper = demo.DemoModelWrapper(demo.DemoModel()).eval()
    inputs = joined(
        *(
            system(POS[:n], np.zeros((3, 3)), NUMBERS[:n], (False,) * 3, torch.float32)
            for n in (4, 3)
        )
    )
    own, model = wrapper(batch_of(inputs)), engine.potential(wrapper)
    energy = bridge.potential(
        model,
        atomic_numbers=inputs["atomic_numbers"].numpy(),
        batch=inputs["batch"].numpy(),
        n_systems=2,
    )
    R = jnp.asarray(inputs["pos"])
    close(
        jax.jit(lambda r: (energy(r)[:, None], energy.forces(r)))(R),
        [own["energy"].detach(), own["forces"]],
        1e-5,
    )
    H = jax.jit(jax.hessian(lambda r: energy(r).sum()))(R).reshape(21, 21)
    assert abs(H).max() > 1e-3 and abs(H - H.T).max() < 1e-4 * abs(H).max(), "second derivatives"
    assert (
        model.card.dtype == "float32"
        and not model.card.supports_pbc
        and wrapper.model_config.active_outputs == {"energy", "forces"}
    )


def sparse(detached=(), stress=True):
    """An nvalchemi model over COO neighbours, by autograd; with `detached` its energy does not
    reach what autograd would need."""

    class Sparse(torch.nn.Module, base.BaseModelMixin):
        embedding_shapes, compute_embeddings = {}, None

        def __init__(self):
            super().__init__()
            outputs = frozenset(ALL if stress else {"energy", "forces"})
            neighbor_config = base.NeighborConfig(cutoff=CUTOFF)
            self.calls = []
            self.model_config = base.ModelConfig(
                outputs=outputs,
                autograd_outputs=outputs - {"energy"},
                supports_pbc=True,
                neighbor_config=neighbor_config,
            )

        def forward(self, batch):
            active = set(self.model_config.active_outputs)
            self.calls.append(active)
            found = {
                "pos": batch.positions,
                "cell": batch.cell,
                "edge_index": batch.neighbor_list.long().T,
                "cell_offsets": batch.neighbor_list_shifts,
            }
            found |= {"batch": batch.batch_idx, "atomic_numbers": batch.atomic_numbers} | {
                name: found[name].detach() for name in detached
            }
            out = strain.with_gradients(embedded)(found) if "forces" in active else embedded(found)
            result = {"energy": out["energy"][:, None]}
            if "forces" in active:
                result["forces"] = -out["position_gradients"]
            if "stress" in active:
                result["stress"] = stress_of(out, found | {"pbc": batch.pbc})
            return result

    return Sparse()


@pytest.mark.parametrize("detached", [(), ("pos",), ("cell",), ("pos", "cell")])
def test_cell_gradients_x_reach_of_the_energy(detached):
    wrapper = sparse(detached)
    model = engine.potential(wrapper)
    want = frozen()(PAIR)
    for _ in range(2):
        got = model(PAIR)
        close(
            {k: got[k] for k in ("energy", "position_gradients", "cell_gradients")},
            {k: want[k] for k in ("energy", "position_gradients", "cell_gradients")},
        )
    assert wrapper.calls == [{"energy"}, *[{"energy"} if not detached else ALL] * 2], (
        "one to try, then one each"
    )
    if not detached:
        close(model.asking("hessian")(PAIR)["hessian"], frozen().asking("hessian")(PAIR)["hessian"])


def test_given_edges_are_used():
    edges = torch.tensor([[3, 0, 1], [0, 3, 9]]), torch.tensor([[0, 0, 0], [0, 0, 0], [0, 0, 0]])
    given = system() | dict(zip(("edge_index", "cell_offsets"), edges))
    close(engine.potential(sparse())(given)["energy"], frozen()(given)["energy"])


def test_no_stress_x_no_cell_gradients():
    model = engine.potential(sparse(stress=False))
    assert "cell_gradients" not in model.card.outputs and "cell_gradients" not in model(PAIR)
    energy = bridge.potential(model, atomic_numbers=NUMBERS)
    close(
        energy.forces(jnp.asarray(POS), jnp.asarray(CELL)),
        -frozen()(system())["position_gradients"],
    )
    with pytest.raises(
        NotImplementedError, match="expected a gradient of the energy in cell to differentiate with"
    ):
        energy.stress(jnp.asarray(POS), jnp.asarray(CELL))


def test_names_of_the_first_guide():
    """ModelCard and compute_... were there before nvalchemi-toolkit 0.1."""
    card = engine.model(frozen()).model_card
    assert (
        card.supports_energies
        and card.supports_stresses
        and card.supports_pbc
        and not card.forces_via_autograd
        and not card.supports_dipoles
    )
    assert (
        card.neighbor_config.cutoff == CUTOFF
        and not engine.model(frozen()).model_card.supports_node_embeddings
    )

    class Flags(base.BaseModel):
        compute_energies: bool = True
        compute_forces: bool = True
        compute_stresses: bool = False

    class Older(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.new, self.model_config, self.model_card = (
                sparse(),
                Flags(),
                engine.model(frozen()).model_card,
            )

        def forward(self, batch):
            self.new.model_config.active_outputs = (
                {"energy", "forces"} if self.model_config.compute_forces else {"energy"}
            )
            out = self.new(batch)
            return {"energies": out["energy"], **{k: x for k, x in out.items() if k == "forces"}}

    got = engine.potential(Older())(PAIR)
    close(
        [got["energy"], got["position_gradients"]],
        [frozen()(PAIR)[k] for k in ("energy", "position_gradients")],
    )


def test_stress_x_version(monkeypatch):
    inputs, out = batch_of(PAIR), expected(PAIR)["stress"]
    monkeypatch.setattr(metadata, "version", lambda name: {"nvalchemi-toolkit": "0.1.0"}[name])
    close(wrapped(*ALL)(inputs)["stress"], -out)
    close(Nvalchemi(wrapped(*ALL))(PAIR)["cell_gradients"], frozen()(PAIR)["cell_gradients"])


def test_export_and_pickle(tmp_path):
    wrapper = wrapped(*ALL)
    wrapper.export_model(tmp_path / "model.pt")
    close(
        torch.load(tmp_path / "model.pt", weights_only=False)(PAIR)["energy"],
        expected(PAIR)["energy"][:, 0],
    )
    wrapper.export_model(tmp_path / "state.pt", as_state_dict=True)
    assert torch.load(tmp_path / "state.pt") == frozen().state_dict()
    again = pickle.loads(pickle.dumps(wrapper))
    assert (
        type(again) is engine.Wrapper
        and isinstance(again, base.BaseModelMixin)
        and again.model_config.active_outputs == ALL
    )
    close({**again(batch_of(PAIR))}, {**wrapper(batch_of(PAIR))})


def test_configuration_from_the_card():
    config = engine.model(frozen()).model_config
    assert (
        config.outputs == {*ALL, "atomic_energies", "hessian"}
        and config.supports_pbc
        and not config.needs_pbc
        and not config.autograd_outputs
    )
    assert config.neighbor_config == base.NeighborConfig(
        cutoff=CUTOFF, format="coo"
    ) and engine.model(frozen()).input_data() == {"positions", "atomic_numbers"}
    assert (
        "neighbor_list"
        in engine.model(Embedded(card=Card(cutoff=CUTOFF, neighbor_list="given"))).input_data()
    )
    free = engine.model(Embedded(card=Card(supports_pbc=False)))
    assert (
        free.model_config.outputs == {"energy", "forces"}
        and free.model_config.neighbor_config is None
    )
    wrapper = wrapped("energy")
    assert set(wrapper(batch_of(PAIR))) == {"energy"}
    wrapper.set_config("active_outputs", None)
    assert wrapper.model_config.active_outputs == wrapper.model_config.outputs


def test_errors(monkeypatch):
    free, batch = engine.model(Embedded(card=Card(supports_pbc=False))), batch_of(PAIR)
    with pytest.raises(
        ValueError,
        match=r"expected active_outputs that this model has \(energy, forces\), got stress; ask for these",
    ):
        free.set_config("active_outputs", ALL)
    free.model_config.active_outputs = ALL
    seen.clear()
    with pytest.raises(ValueError, match="got stress"):
        free(batch)
    assert not seen
    with pytest.raises(
        NotImplementedError, match="expected a potential with embeddings on its card"
    ):
        free.compute_embeddings(batch)
    with pytest.raises(
        TypeError, match="expected a torch_side.potentials.model.Model, got a function; wrap it by"
    ):
        engine.model(embedded)
    with pytest.raises(
        TypeError, match=r"expected an nvalchemi model \(BaseModelMixin\), got a Linear"
    ):
        engine.potential(torch.nn.Linear(1, 1))
    neighbors.compute_neighbors(batch, CUTOFF - 1, format=base.NeighborListFormat.COO)
    with pytest.raises(
        ValueError,
        match="expected a neighbour list up to 3.0 Angstrom, got one up to 2.0; build it",
    ):
        engine.model(frozen())(batch)
    single = data.AtomicData(
        positions=PAIR["pos"][:4],
        atomic_numbers=PAIR["atomic_numbers"][:4],
        cell=PAIR["cell"][:1],
        neighbor_list=torch.tensor([[0, 1]]),
    )
    with pytest.raises(
        ValueError, match="expected pbc with a cell, got a cell alone; say which axes"
    ):
        engine.model(frozen())(single)
    single.pbc = PAIR["pbc"][:1]
    with pytest.raises(
        ValueError,
        match="expected neighbor_list_shifts with the neighbor_list of periodic systems, got none",
    ):
        engine.model(frozen())(single)
    wrapper = sparse()
    wrapper.model_config.required_inputs = frozenset({"node_attrs"})
    with pytest.raises(
        ValueError,
        match="a model that needs inputs of the contract only, got Sparse, which needs node_attrs",
    ):
        engine.potential(wrapper)
    wrapper.model_config.outputs = frozenset({"energy"})
    with pytest.raises(
        ValueError, match="expected an nvalchemi model with forces, got Sparse, which has energy"
    ):
        engine.potential(wrapper)
    with pytest.raises(AttributeError):
        engine.wrapper
    monkeypatch.setitem(sys.modules, "nvalchemi.models", None)
    with pytest.raises(ImportError, match="run: pip install nvalchemi-toolkit"):
        engine.model(frozen())
