"""Virials of atoms: against a closed form, ASE and MACE; on every lane, in both banks; what can't
have them is refused."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.lj import LennardJones
from hypothesis import given, settings
from hypothesis import strategies as st

import bridge
from jax_side.engines import ase as in_jax
from jax_side.potentials.potential import potential
from jax_side.potentials.strain import with_gradients
from tests import graph_cases as cases
from tests.graph_cases import CUTOFF, H, R, close
from tests.model_cases import (
    CRYSTALS,
    MOLECULES,
    chgnet,
    d3,
    inputs,
    mace,
    mace_network,
    sevennet,
    torchani,
)
from tests.models.test_chgnet_values import random_network
from torch_side.engines import ase as in_torch
from torch_side.models.chgnet import CHGNet
from torch_side.potentials import strain, virials
from torch_side.potentials.committee import Committee
from torch_side.potentials.geometry import edge_vectors
from torch_side.potentials.model import Wrapped

NAMES = ("node_energies", "node_virials")
CARD = replace(cases.CARD, outputs=cases.CARD.outputs | {"node_virials"})
MODEL = Wrapped(cases.embedded, CARD.asking(*NAMES), "autograd")
BOUNDARIES = list(itertools.product([True, False], repeat=3))


def by_hand(x):
    """The potential of graph_cases, with r_ij as the contract says it."""
    i, j = x["edge_index"].long()
    shifts = torch.einsum(
        "ek,ekc->ec", x["cell_offsets"].to(x["cell"].dtype), x["cell"][x["batch"][i].long()]
    )
    r2 = (x["pos"][j] - x["pos"][i] + shifts).square().sum(-1)
    numbers = x["atomic_numbers"].to(r2.dtype)
    density = (1 - r2 / CUTOFF**2) ** 3 * numbers[j]
    nodes = -torch.sqrt(1 + r2.new_zeros(len(numbers)).index_add(0, i, density)) + numbers / 100
    return r2.new_zeros(len(x["cell"])).index_add(0, x["batch"].long(), nodes)


def in_jax_too(x):
    """The same in JAX, which sees unused slots."""
    n_atoms, n_systems = len(x["pos"]), len(x["cell"])
    i, j = x["edge_index"]
    near = (i < n_atoms) & (j < n_atoms)
    i, j = jnp.where(near, i, 0), jnp.where(near, j, 0)
    offsets = x["cell_offsets"].astype(x["cell"].dtype)
    vectors = (
        x["pos"][j] - x["pos"][i] + jnp.einsum("ek,ekc->ec", offsets, x["cell"][x["batch"][i]])
    )
    numbers = x["atomic_numbers"].astype(vectors.dtype)
    density = (1 - (vectors**2).sum(-1) / CUTOFF**2) ** 3 * numbers[j]
    density = jax.ops.segment_sum(jnp.where(near, density, 0), i, n_atoms)
    nodes = -jnp.sqrt(1 + density) + numbers / 100
    energy = jax.ops.segment_sum(nodes, x["batch"], n_systems)
    return {"energy": energy, "node_energies": nodes}


def wanted(pos, cell, numbers, pbc):
    """w_j = sum of r_ij (dE_i/dr_ij)^T in NumPy, over all images."""
    images = cases.IMAGES[(np.array(pbc) | (cases.IMAGES == 0)).all(-1)]
    r = pos[None, :, None] - pos[:, None, None] + images @ cell  # from i to j
    r2 = (r**2).sum(-1)
    near = (r2 < CUTOFF**2) & (r2 > 1e-12)
    inside = np.where(near, 1 - r2 / CUTOFF**2, 0)
    z = numbers[None, :, None]
    density = (inside**3 * z).sum((1, 2))
    slope = -0.5 / np.sqrt(1 + density)[:, None, None] * 3 * inside**2 * z * -2 / CUTOFF**2
    return np.einsum("ijk,ijka,ijkb->jab", slope, r, r)


def total(out, pos, cell):
    return pos.T @ out["position_gradients"] + cell.T @ out["cell_gradients"][0]


structures = st.integers(0, 10**6).map(np.random.default_rng)


@settings(max_examples=12)
@given(structures, st.sampled_from(BOUNDARIES), st.booleans())
def test_virials_of_atoms_are_those_of_a_closed_form_and_add_up(rng, pbc, none_given):
    pos = cases.POS + 0.1 * rng.normal(size=cases.POS.shape)
    cell = cases.CELL + 0.2 * rng.normal(size=(3, 3))
    want = wanted(pos, cell, cases.NUMBERS, pbc)
    given = np.where(np.array(pbc)[:, None] | (not none_given), cell, 0)  # without open axes
    x = cases.system(pos, given, pbc=pbc)
    for model in (MODEL, Wrapped(by_hand, CARD.asking("node_virials"), "autograd")):
        out = model(x)
        close(out["node_virials"], want)
        close(out["node_virials"].sum(0), total(out, x["pos"], x["cell"][0]))
    edges = virials_edges(x)
    energy = potential(
        with_gradients(in_jax_too, node_virials=True),
        atomic_numbers=cases.NUMBERS,
        pbc=np.array(pbc),
    )
    for f in (energy.outputs, jax.jit(energy.outputs)):
        close(f(jnp.asarray(pos), jnp.asarray(given), **edges)["node_virials"], want)


def virials_edges(x):
    """Edges with three unused slots, as JAX has them."""
    from torch_side.potentials.neighbors import neighbor_list

    edges, offsets = neighbor_list(x["pos"], x["cell"], x["pbc"], CUTOFF, x["batch"])
    edges = torch.nn.functional.pad(edges, (0, 3), value=len(x["pos"]))
    offsets = torch.nn.functional.pad(offsets, (0, 0, 0, 3), value=7)
    return {"edge_index": jnp.asarray(edges.numpy()), "cell_offsets": jnp.asarray(offsets.numpy())}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batches_and_padding(dtype):
    numbers = np.array([6, 0, 8, 14])  # a padding atom
    one, two = (
        cases.system(dtype=dtype),
        cases.system(cases.POS + 0.1, numbers=numbers, pbc=(True, False, True), dtype=dtype),
    )
    out, alone = MODEL(cases.joined(one, two)), [MODEL(one), MODEL(two)]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-11
    close(out["node_virials"], torch.cat([a["node_virials"] for a in alone]), tolerance)
    assert out["node_virials"].dtype == dtype and not out["node_virials"][5].any()


def test_lanes(lane):
    want = wanted(cases.POS, cases.CELL, cases.NUMBERS, (True,) * 3)
    energy = bridge.potential(MODEL, atomic_numbers=cases.NUMBERS, lane=lane)
    close(jax.jit(energy.outputs)(R, H)["node_virials"], want)
    given = energy.outputs(R, H, **bridge.edges(CUTOFF + 0.5, 400)(R, H))
    close(given["node_virials"], want)
    several = jax.vmap(lambda r: energy.outputs(r, H)["node_virials"])(jnp.stack([R, R + 0.1]))
    close(several, np.stack([want, want]), 1e-9)


def test_the_native_lane():
    find = bridge.edges(CUTOFF, 200)
    energy = bridge.potential(MODEL, atomic_numbers=cases.NUMBERS, lane="native")
    out = jax.jit(lambda r, h: energy.outputs(r, h, **find(r, h)))(R, H)
    close(out["node_virials"], wanted(cases.POS, cases.CELL, cases.NUMBERS, (True,) * 3), 1e-9)


def test_derivatives_of_virials():
    energy = bridge.potential(MODEL, atomic_numbers=cases.NUMBERS)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(4, 3, 3)))
    f = lambda r, h: (weights * energy.outputs(r, h)["node_virials"]).sum()
    dr, dh = jax.grad(f, (0, 1))(R, H)
    rng = np.random.default_rng(2)
    for d, x in ((dr, 0), (dh, 1)):
        v, step = rng.normal(size=d.shape), 1e-5
        at = lambda t: f(*[y + t * v * (x == k) if x == k else y for k, y in enumerate((R, H))])
        close((d * v).sum(), (at(step) - at(-step)) / (2 * step), 1e-6)


def test_a_jax_model_in_torch():
    module = bridge.torch_potential(
        in_jax_too, gradients="autodiff", outputs=["node_virials"], cutoff=CUTOFF
    )
    x = cases.system()
    close(module(x)["node_virials"], wanted(cases.POS, cases.CELL, cases.NUMBERS, (True,) * 3))
    assert "node_virials" in module.card.active_outputs


@pytest.mark.parametrize("bank", ["torch", "jax"])
def test_stresses_of_atoms_as_ase_has_them(bank):
    own = LennardJones(sigma=2.3, epsilon=0.3, rc=4.0, smooth=False)
    atoms = CRYSTALS["skewed"].copy()

    def energies(xp, r, shape):
        s6 = (2.3 / r) ** 6
        return 0.5 * (4 * 0.3 * (s6 * s6 - s6) - 4 * 0.3 * ((2.3 / 4) ** 12 - (2.3 / 4) ** 6))

    def model(x):
        each = energies(torch, edge_vectors(x).norm(dim=-1), None)
        return each.new_zeros(1).index_add(0, x["batch"][x["edge_index"][0]], each)

    wrapped = Wrapped(
        model, replace(CARD, cutoff=4.0, elements=None).asking("node_virials"), "autograd"
    )
    if bank == "torch":
        atoms.calc = in_torch.calculator(wrapped, outputs=["node_virials"])
    else:
        atoms.calc = in_jax.calculator(bridge.jax_potential(wrapped))
    reference = atoms.copy()
    reference.calc = own
    close(atoms.get_stresses(), reference.get_stresses(), 1e-9)
    close(atoms.get_stresses().sum(0), atoms.get_stress(), 1e-12)


def test_the_virials_of_mace_halved_between_both_ends():
    """MACE's own atomic_virials are minus the symmetric part of the mean over both ends of an edge."""
    model, x = (
        mace(torch.float64).asking("node_virials"),
        inputs(CRYSTALS["skewed"], dtype=torch.float64),
    )
    out = model(x)
    from torch_side.potentials.neighbors import neighbor_list

    edges, offsets = neighbor_list(x["pos"], x["cell"], x["pbc"], model.card.cutoff, x["batch"])
    given = virials.by_edges(x | {"edge_index": edges, "cell_offsets": offsets})
    energy = model.energies(given)["energy"].sum()
    (slopes,) = torch.autograd.grad(energy, given["cell_offsets"])
    ends = virials.node_virials(given, slopes)
    close(ends.detach(), out["node_virials"], 1e-9)
    flipped = given | {"edge_index": edges.flip(0), "cell_offsets": -given["cell_offsets"]}
    starts = virials.node_virials(flipped, -slopes)
    own = mace_network().double()
    graph = {
        k: v for k, v in model._graph(x | {"edge_index": edges, "cell_offsets": offsets}).items()
    }
    graph["positions"] = graph["positions"].clone().requires_grad_()
    found = own(
        graph,
        compute_force=True,
        compute_stress=True,
        compute_edge_forces=True,
        compute_atomic_stresses=True,
    )
    half = (ends + starts) / 2
    close(found["atomic_virials"].detach(), -((half + half.mT) / 2).detach(), 1e-8)


ADAPTERS = {"sevennet": sevennet, "mace": mace, "chgnet": chgnet, "torchani": torchani}


@pytest.mark.parametrize("build", ADAPTERS.values(), ids=ADAPTERS)
def test_adapters(build):
    model = build(torch.float64).asking("node_virials")
    x = inputs(CRYSTALS["skewed"], dtype=torch.float64)
    out = model(x)
    close(out["node_virials"].sum(0), total(out, x["pos"], x["cell"][0]), 1e-9)
    q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    q = torch.tensor(q)
    turned = model(x | {"pos": x["pos"] @ q.T, "cell": x["cell"] @ q.T})
    close(turned["node_virials"], q @ out["node_virials"] @ q.T, 1e-6)
    close(model.asking("hessian")(x)["node_virials"], out["node_virials"], 1e-9)


SYSTEMS = [MOLECULES["ethanol"], CRYSTALS["skewed"], Atoms("O"), CRYSTALS["si"]]


# models that take each bond once where no virials are asked for
PAIRED = pytest.mark.parametrize("build", [chgnet, torchani], ids=["chgnet", "torchani"])


@pytest.mark.parametrize("build", [chgnet, torchani, d3], ids=["chgnet", "torchani", "d3"])
def test_adapters_in_batches(build):
    """They add up to W of each system, open ones among them, and are those of a call for each."""
    model = build(torch.float64).asking("node_virials")
    x = inputs(*SYSTEMS, dtype=torch.float64)
    out = model(x)
    alone = [model(inputs(a, dtype=torch.float64))["node_virials"] for a in SYSTEMS]
    close(out["node_virials"], torch.cat(alone), 1e-9)
    W = strain.virial(
        out["position_gradients"], out["cell_gradients"], x["pos"], x["batch"], x["cell"]
    )
    close(torch.zeros_like(W).index_add(0, x["batch"], out["node_virials"]), W, 1e-9)
    pair = inputs(SYSTEMS[3], MOLECULES["water"], dtype=torch.float64)
    H = [m.asking("hessian")(pair)["hessian"] for m in (model, build(torch.float64))]
    close(*H, 1e-8)
    single = build(torch.float32).asking("node_virials")(inputs(*SYSTEMS))["node_virials"]
    assert single.dtype == torch.float32
    close(single, out["node_virials"], 2e-4)


@PAIRED
def test_models_that_take_a_bond_once_x_lanes(build, lane):
    model, atoms = build(torch.float64).asking(*NAMES), CRYSTALS["skewed"]
    r, h = jnp.asarray(atoms.positions), jnp.asarray(atoms.cell.array)
    want = model(inputs(atoms, dtype=torch.float64))["node_virials"]
    energy = bridge.potential(model, atomic_numbers=atoms.numbers, lane=lane)
    close(jax.jit(energy.outputs)(r, h)["node_virials"], want, 1e-9)
    edges = bridge.edges(model.card.cutoff + 0.3, 900)(r, h)
    close(energy.outputs(r, h, **edges)["node_virials"], want, 1e-9)
    several = jax.vmap(lambda r: energy.outputs(r, h)["node_virials"])(jnp.stack([r, r + 0.1]))
    close(several, jnp.stack([want.numpy()] * 2), 1e-9)


@pytest.mark.full  # compiles for a minute; tests/models/test_static_models.py has the fixed sizes
@pytest.mark.parametrize("name", ["chgnet", "torchani"])
def test_models_that_take_a_bond_once_x_the_native_lane(name):
    small = CHGNet(random_network(n_conv=2), dtype=torch.float64, angles_per_atom=40)
    model = (small if name == "chgnet" else torchani(torch.float64)).asking(*NAMES)
    atoms = CRYSTALS["skewed"]
    r, h = jnp.asarray(atoms.positions), jnp.asarray(atoms.cell.array)
    want = model(inputs(atoms, dtype=torch.float64))["node_virials"]
    energy = bridge.potential(model, atomic_numbers=atoms.numbers, lane="native")
    find = bridge.edges(model.card.cutoff, 900)
    out = jax.jit(lambda r, h: energy.outputs(r, h, **find(r, h)))(r, h)
    close(out["node_virials"], want, 1e-9)


def test_a_chgnet_among_others():
    """Sums, committees whose members are called one by one, and stresses of atoms in ASE."""
    model, atoms = chgnet(torch.float64), CRYSTALS["skewed"].copy()
    x = inputs(atoms, dtype=torch.float64)
    want = model.asking("node_virials")(x)["node_virials"]
    other = d3(torch.float64)
    both = (model + other).asking("node_virials")(x)["node_virials"]
    close(both, want + other.asking("node_virials")(x)["node_virials"], 1e-9)
    committee = Committee([model, model], vmap=False).asking("node_virials")
    close(committee(x)["node_virials"].detach(), want, 1e-9)
    atoms.calc = in_torch.calculator(model, outputs=["node_virials"])
    close(atoms.get_stresses().sum(0), atoms.get_stress(), 1e-9)
    close(atoms.get_stresses()[:, 0] * atoms.get_volume(), want[:, 0, 0], 1e-9)


def test_sums_and_committees():
    x = cases.system()
    close((MODEL + MODEL)(x)["node_virials"], 2 * MODEL(x)["node_virials"])
    members = [cases.Embedded(w, CARD) for w in (1.0, 2.0)]
    one_by_one = Committee(members, vmap=False).asking("node_virials")
    close(one_by_one(x)["node_virials"].detach(), 1.5 * MODEL(x)["node_virials"])
    with pytest.raises(ValueError, match="expected outputs that this model has .*got node_virials"):
        Committee(members).asking("node_virials")


def test_a_virial_that_no_edge_has_is_refused():
    x = cases.system()
    more = lambda x: cases.embedded(x)["energy"] + torch.linalg.det(x["cell"]).abs()
    model = Wrapped(more, CARD.asking("node_virials"), "autograd")
    text = (
        "expected a virial that is made of edges alone .*got [0-9.]+ eV of another kind in system 1"
    )
    second = lambda x: (
        cases.embedded(x)["energy"] + x["cell"][:, 0, 0] * torch.arange(len(x["cell"]))
    )
    with pytest.raises(ValueError, match=text):
        Wrapped(second, CARD.asking("node_virials"), "autograd")(cases.joined(x, x))
    with pytest.raises(ValueError, match="of another kind in system 0"):
        bridge.potential(model, atomic_numbers=cases.NUMBERS).outputs(R, H)
    energy = bridge.potential(model, atomic_numbers=cases.NUMBERS, lane="native")
    with pytest.raises(Exception, match="of another kind in system 0"):
        find = bridge.edges(CUTOFF, 200)
        jax.block_until_ready(jax.jit(lambda r, h: energy.outputs(r, h, **find(r, h)))(R, H))


def test_in_jax_it_is_an_error_where_values_are_seen_and_nan_where_not():
    more = lambda x: in_jax_too(x)["energy"] + jnp.linalg.det(x["cell"])
    energy = potential(with_gradients(more, node_virials=True), atomic_numbers=cases.NUMBERS)
    edges = virials_edges(cases.system())
    with pytest.raises(ValueError, match="of another kind in system 0"):
        energy.outputs(R, H, **edges)
    out = jax.jit(energy.outputs)(R, H, **edges)
    assert np.isnan(out["node_virials"]).all() and np.isfinite(out["position_gradients"]).all()
    with pytest.raises(
        ValueError, match="expected edges, to which virials of atoms belong, got none"
    ):
        springs = lambda x: (x["pos"] ** 2).sum()[None]
        potential(with_gradients(springs, node_virials=True), atomic_numbers=cases.NUMBERS).outputs(
            R, H
        )


def test_a_model_of_its_own_virials_keeps_them():
    own = lambda x: cases.embedded(x) | {"node_virials": x["pos"].new_ones(len(x["pos"]), 3, 3)}
    assert (
        Wrapped(own, CARD.asking("node_virials"), "autograd")(cases.system())["node_virials"] == 1
    ).all()
