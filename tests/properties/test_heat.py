"""Heat fluxes: against the time derivative of a cluster's moment of energy, supercells, and one
another; conductivities against sums by hand."""

import dataclasses
import re

import ase.build
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bridge
from bridge.card import Card
from jax_side.potentials.potential import potential
from jax_side.potentials.strain import with_gradients
from jax_side.properties import heat
from tests.graph_cases import close
from tests.model_cases import CRYSTALS, MOLECULES, ani
from tests.models.test_chgnet_values import random_network
from tests.potentials.test_node_virials import in_jax_too
from torch_side.models.chgnet import CHGNet
from torch_side.models.torchani import TorchANI
from torch_side.potentials.geometry import edge_vectors

CUTOFF = 3.0
NAMES = ("node_energies", "node_virials")
random = st.integers(0, 10**6).map(np.random.default_rng)


def messages(layers):
    """Energies of atoms that feel one another over so many cutoffs."""

    def model(x):
        i, j = x["edge_index"].long()
        r = edge_vectors(x).norm(dim=-1)
        weight = (1 - (r / CUTOFF) ** 2) ** 3
        h = r.new_ones(len(x["pos"]))
        for k in range(layers):
            h = torch.tanh(0.3 * torch.zeros_like(h).index_add(0, i, weight * h[j] * (1 + k / 10)))
        nodes = h**2
        return {
            "energy": r.new_zeros(len(x["cell"])).index_add(0, x["batch"].long(), nodes),
            "node_energies": nodes,
        }

    return model


def card(layers, neighbor_list="own"):
    names = {"energy", "position_gradients", "cell_gradients", *NAMES}
    return Card(
        outputs=names,
        cutoff=CUTOFF,
        neighbor_list=neighbor_list,
        batches=True,
        receptive_field=CUTOFF * layers,
    )


def bound(layers, n_atoms, neighbor_list="own", **options):
    return bridge.potential(
        messages(layers),
        atomic_numbers=np.ones(n_atoms, int),
        outputs=NAMES,
        gradients="autograd",
        **{"card": card(layers, neighbor_list), **options},
    )


def crystal(rng):
    """Four atoms of a skewed cell, some of them in other images of it."""
    atoms = ase.build.bulk("Ar", "fcc", a=3.6, cubic=True)
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + 0.1 * rng.normal(size=(3, 3))), scale_atoms=True)
    atoms.positions += (
        0.1 * rng.normal(size=(4, 3)) + rng.integers(-1, 2, (4, 3)) @ atoms.cell.array
    )
    return atoms, rng.normal(size=(4, 3)), rng.uniform(1, 4, 4)


def growth(energy, R, V, m):
    """d/dt sum_i r_i (E_i + m_i v_i^2 / 2) in NVE, by finite differences."""
    acceleration = np.asarray(energy.forces(R)) / m[:, None]

    def moment(t):
        r, v = R + V * t + acceleration * t * t / 2, V + acceleration * t
        return (energy.outputs(r)["node_energies"] + m * (v * v).sum(-1) / 2) @ r

    return (moment(1e-4) - moment(-1e-4)) / 2e-4


@settings(max_examples=6)
@given(random, st.sampled_from([1, 2, 3]))
def test_the_flux_of_a_cluster_is_how_fast_its_moment_of_energy_grows(rng, layers):
    """d/dt sum_i r_i (E_i + m_i v_i^2 / 2) in NVE, which is what a heat flux is made from."""
    R = 1.6 * rng.normal(size=(8, 3))
    V, m = 0.3 * rng.normal(size=(8, 3)), rng.uniform(1, 4, 8)
    energy = bound(layers, 8)
    want = growth(energy, R, V, m)
    far = (np.ptp(R) + 3 * CUTOFF * layers + 5) * np.eye(3)  # no image is felt
    unfolded = heat.Unfolded(energy, R, far)
    assert unfolded.atoms == 8
    close(sum(unfolded(R, V, m)), want, 1e-6)
    if layers == 1:
        close(sum(heat.by_virials(energy, R, None, V, m)), want, 1e-6)


def one_layer(name):
    """A model whose package takes each bond once, without messages beyond one cutoff."""
    if name == "torchani":
        model = TorchANI(ani(), dtype=torch.float64)
        model.network.set_enabled("energy_shifter", False)  # of thousands of eV
        return model
    return CHGNet(random_network(n_conv=1), dtype=torch.float64)


@pytest.mark.parametrize("name", ["torchani", "chgnet"])
@pytest.mark.filterwarnings("ignore:The extensions")  # torchani's CUDA parts
def test_the_flux_of_models_that_take_a_bond_once(name):
    """An atom's energy depends on the edges that start there, and on no others: in the cluster
    above, and beside Unfolded in a crystal."""
    rng, atoms = np.random.default_rng(0), MOLECULES["ethanol"]
    V, m = 0.1 * rng.normal(size=(9, 3)), rng.uniform(1, 4, 9)
    model = one_layer(name).asking(*NAMES)
    energy = bridge.potential(model, atomic_numbers=atoms.numbers)
    found = heat.by_virials(energy, atoms.positions, None, V, m)
    close(sum(found), growth(energy, atoms.positions, V, m), 1e-6)
    atoms = CRYSTALS["skewed"]
    energy = bridge.potential(model, atomic_numbers=atoms.numbers)
    given = atoms.positions, atoms.cell.array
    unfolded = heat.Unfolded(energy, *given)(atoms.positions, V[:4], m[:4])
    close(heat.by_virials(energy, *given, V[:4], m[:4]), unfolded, 1e-8)


def test_the_flux_of_chgnet_needs_its_images():
    atoms, V, m = crystal(np.random.default_rng(0))
    model = CHGNet(random_network(), dtype=torch.float64).asking(*NAMES)
    energy = bridge.potential(model, atomic_numbers=atoms.numbers)
    with pytest.raises(ValueError, match="got a receptive field of 18.0 and a cutoff of 6.0"):
        heat.by_virials(energy, atoms.positions, atoms.cell.array, V, m)


@settings(max_examples=4)
@given(random, st.sampled_from([1, 2]))
def test_a_crystal_and_its_supercell(rng, layers):
    atoms, V, m = crystal(rng)
    unfolded = heat.Unfolded(bound(layers, 4), atoms.positions, atoms.cell.array)
    one = jax.jit(unfolded)(jnp.asarray(atoms.positions), V, m)
    twice = atoms * (2, 1, 1)
    V, m = np.tile(V, (2, 1)), np.tile(m, 2)
    larger = heat.Unfolded(bound(layers, 8), twice.positions, twice.cell.array)
    for a, b in zip(larger(twice.positions, V, m), one):
        close(a, 2 * b, 1e-9)
    if layers == 1:
        wrapped = atoms.copy()
        wrapped.wrap()  # fluxes know nothing of the images that positions are in
        for each in (atoms, wrapped):
            found = heat.by_virials(bound(1, 4), each.positions, each.cell.array, V[:4], m[:4])
            close(found, one, 1e-9)


def test_lanes_given_edges_and_vmap(lane):
    atoms, V, m = crystal(np.random.default_rng(3))
    R, H = jnp.asarray(atoms.positions), jnp.asarray(atoms.cell.array)
    want = heat.by_virials(bound(1, 4), R, H, V, m)
    energy = bound(1, 4, "given", lane=lane)
    find = bridge.edges(CUTOFF, 400)
    flux = jax.jit(lambda r, v: heat.by_virials(energy, r, H, v, m, **find(r, H)))
    close(flux(R, V), want, 1e-9)
    unfolded = heat.Unfolded(energy, R, H, find=bridge.edges(CUTOFF, 4000))
    close(jax.jit(unfolded)(R, V, m), want, 1e-9)
    both = jax.vmap(lambda v: unfolded(R, v, m))(jnp.stack([jnp.asarray(V), -jnp.asarray(V)]))
    close(both.virial, jnp.stack([want.virial, -want.virial]), 1e-9)


def test_a_jax_potential():
    atoms, V, m = crystal(np.random.default_rng(4))
    R, H = jnp.asarray(atoms.positions), jnp.asarray(atoms.cell.array)
    model = with_gradients(in_jax_too, node_virials=True)
    energy = potential(model, atomic_numbers=np.ones(4, int), card=card(1, "given").asking(*NAMES))
    found = heat.by_virials(energy, R, H, V, m, **bridge.edges(CUTOFF, 400)(R, H))
    unfolded = heat.Unfolded(energy, R, H, find=bridge.edges(CUTOFF, 4000))
    close(jax.jit(unfolded)(R, V, m), found, 1e-9)


def test_atoms_that_moved_too_far_are_nan_and_those_that_did_not_are_not():
    atoms, V, m = crystal(np.random.default_rng(5))
    unfolded = heat.Unfolded(bound(2, 4), atoms.positions, atoms.cell.array, skin=0.4)
    far = atoms.positions + np.array([0.21, 0, 0]) * (np.arange(4) == 2)[:, None]
    assert np.isnan(unfolded(far, V, m).virial).all()
    near = atoms.positions + np.array([0.19, 0, 0]) * (np.arange(4) == 2)[:, None]
    fresh = heat.Unfolded(bound(2, 4), near, atoms.cell.array)
    close(unfolded(near, V, m), fresh(near, V, m), 1e-9)


def test_conductivity_by_hand():
    rng = np.random.default_rng(0)
    J = np.cumsum(rng.normal(size=(20, 3)), 0)
    lags = [sum(J[t] * J[t + k] for t in range(20 - k)) / (20 - k) for k in range(10)]
    want = [
        sum((lags[n] + lags[n + 1]) / 2 * 0.5 for n in range(k)) + np.zeros(3) for k in range(10)
    ]
    kB, second, metre = 1.380649e-23, 1.0180505710774743e-14, 1e-10
    eV = 1.602176634e-19
    # J in eV Angstrom / time, the integral in (J m / s)^2 s
    si = np.array(want) * (eV * metre / second) ** 2 * second / (500 * metre**3 * kB * 300**2)
    got = heat.conductivity(J, 0.5, 500.0, 300.0)
    close(got[1:], si[1:], 1e-8)
    assert not got[0].any()


def test_what_can_not_be_is_refused():
    R, H, V, m = np.eye(3)[:2], 5 * np.eye(3), np.zeros((2, 3)), np.ones(2)
    refused = lambda text: pytest.raises(ValueError, match=re.escape(text))
    two_layers = bound(2, 2)
    with refused(
        "expected energies of atoms that depend on their own edges alone, got a receptive field of 6.0 and a cutoff of 3.0 Angstrom"
    ):
        heat.by_virials(two_layers, R, H, V, m)
    # a sum whose cutoff is that of its other term
    short = dataclasses.replace(card(2), cutoff=CUTOFF / 2, receptive_field=CUTOFF)
    assert not (card(1) + card(1)).messages
    for hidden in (short + card(1), card(1) + short, card(1) + (short + card(1))):
        assert hidden.receptive_field == hidden.cutoff
        with refused("a cutoff of 3.0 Angstrom, and messages in one term"):
            heat.by_virials(bound(1, 2, card=hidden), R, H, V, m)
    plain = bridge.potential(
        messages(1), atomic_numbers=np.ones(2, int), card=card(1), gradients="autograd"
    )
    with refused(
        "expected a potential with node_energies, node_virials, got no 'node_energies', 'node_virials'; bind it with outputs="
    ):
        heat.by_virials(plain, R, H, V, m)
    several = bound(1, 2, batch=np.array([0, 1]), n_systems=2)
    for make in (
        lambda: heat.by_virials(several, R, H, V, m),
        lambda: heat.Unfolded(several, R, H),
    ):
        with refused("expected a potential of one system, got 2"):
            make()
    for v, masses, text in (
        (V[:1], m, "expected velocities as float64[2,3], got float64[1,3]"),
        (V, m[None], "expected masses as float64[2], got float64[1,2]"),
    ):
        with refused(text):
            heat.by_virials(bound(1, 2), R, H, v, masses)
    with refused("expected a cell with a volume"):
        heat.Unfolded(two_layers, R, np.zeros((3, 3)))
    with refused("expected the distance at which atoms are felt, got None, skin 1.0"):
        unknown = Card(outputs=card(1).outputs, cutoff=CUTOFF, neighbor_list="own", batches=True)
        heat.Unfolded(
            bridge.potential(
                messages(1),
                atomic_numbers=np.ones(2, int),
                card=unknown,
                outputs=NAMES,
                gradients="autograd",
            ),
            R,
            H,
        )
    with refused("expected a model that makes do without pbc, got one that needs it"):
        periodic = Card(
            outputs=card(1).outputs,
            cutoff=CUTOFF,
            neighbor_list="own",
            receptive_field=3.0,
            needs_pbc=True,
        )
        heat.Unfolded(
            bridge.potential(
                messages(1),
                atomic_numbers=np.ones(2, int),
                pbc=True,
                card=periodic,
                outputs=NAMES,
                gradients="autograd",
            ),
            R,
            H,
        )
    with refused("expected positions as float64[2,3], got float64[1,3]"):
        heat.Unfolded(two_layers, R, H)(R[:1], V, m)
    with refused("expected fluxes as float[T,3], got float64[3]"):
        heat.conductivity(np.ones(3), 1.0, 1.0, 1.0)
    with refused("expected a positive volume, got 0.0"):
        heat.conductivity(np.ones((4, 3)), 1.0, 0.0, 1.0)
    with refused("expected finite fluxes, got another one in row 1"):
        heat.conductivity(np.array([[0.0] * 3, [0, np.nan, 0]]), 1.0, 1.0, 1.0)
    for call in (
        lambda: heat.by_virials(lambda r, h: (r**2).sum(), R, H, V, m),
        lambda: heat.Unfolded(lambda r, h: (r**2).sum(), R, H),
    ):
        with pytest.raises(TypeError, match="expected a potential with energies of atoms, got <la"):
            call()
    with pytest.raises(TypeError, match=r"expected fluxes in one array, .*virial \+ fluxes.conv"):
        heat.conductivity(heat.HeatFlux(np.ones(3), np.ones(3)), 0.5, 500.0, 300.0)
