"""Padding never reaches a model: unused edges, padding atoms, phantom systems; edges of any list;
capacity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bridge
from bridge.card import Card
from jax_side.potentials.strain import with_gradients
from tests.graph_cases import (
    CARD,
    CELL,
    CUTOFF,
    MODEL,
    NUMBERS,
    POS,
    Embedded,
    H,
    R,
    brute,
    close,
    embedded,
    joined,
    seen,
    system,
)
from torch_side.potentials.model import Wrapped
from torch_side.potentials.neighbors import neighbor_list

OWN = bridge.potential(MODEL, atomic_numbers=NUMBERS)
GIVEN = bridge.potential(
    Wrapped(embedded, Card(outputs=CARD.outputs, cutoff=CUTOFF, neighbor_list="given"), "autograd"),
    atomic_numbers=NUMBERS,
)
WANT = jax.value_and_grad(lambda r, h: brute(r, h, NUMBERS), (0, 1))


def test_energy_and_gradients_are_those_of_all_images():
    close(jax.jit(jax.value_and_grad(OWN, (0, 1)))(R, H), WANT(R, H))
    assert abs(WANT(R, H)[1][1]).max() > 0.1


@pytest.mark.parametrize("scale", [0.3, 0.5, 1.0, 3.0])
@pytest.mark.parametrize(
    "pbc", [(True, True, True), (True, False, True), (False, True, False), (False, False, False)]
)
def test_small_cells_and_mixed_boundaries(scale, pbc):
    shape = np.diag([1, 1, 1 / scale]) if scale < 0.5 else np.eye(3)
    pos, cell = (
        POS * [scale if p else 1 for p in pbc] + np.arange(4)[:, None] * 0.3,
        np.asarray(shape @ CELL) * scale,
    )
    energy = bridge.potential(MODEL, atomic_numbers=NUMBERS, pbc=np.array(pbc))
    images = lambda r, h: brute(r, jnp.where(jnp.array(pbc)[:, None], h, 0), NUMBERS, pbc)
    close(energy(pos, cell), images(jnp.asarray(pos), jnp.asarray(cell)))
    close(
        jax.grad(energy, (0, 1))(pos, cell),
        jax.grad(images, (0, 1))(jnp.asarray(pos), jnp.asarray(cell)),
        1e-9,
    )


def padded(inputs, edges, extra_edges, extra_atoms, extra_systems, cutoff):
    """Inputs with given edges, among unused slots, with padding atoms in phantom systems behind."""
    n, b = len(inputs["pos"]), len(inputs["cell"])
    index, offsets = neighbor_list(
        inputs["pos"], inputs["cell"], inputs["pbc"], cutoff, inputs["batch"]
    )
    order = torch.randperm(
        index.shape[1] + extra_edges, generator=torch.Generator().manual_seed(edges)
    )
    spare = (
        torch.full((2, extra_edges), n + extra_atoms)
        + torch.arange(2 * extra_edges).reshape(2, -1) % 3
    )
    if extra_atoms:
        spare[0] -= 1 + torch.arange(extra_edges) % extra_atoms % 2  # some slots name padding atoms
    wide = lambda x, *shape: torch.cat([x, torch.zeros(*shape, dtype=x.dtype)])
    return {
        "pos": wide(inputs["pos"], extra_atoms, 3), "cell": wide(inputs["cell"], extra_systems, 3, 3), "pbc": wide(inputs["pbc"], extra_systems, 3),
        "batch": torch.cat([inputs["batch"], torch.full((extra_atoms,), b + extra_systems - 1)]), "atomic_numbers": wide(inputs["atomic_numbers"], extra_atoms),
        "edge_index": torch.cat([index, spare], 1)[:, order], "cell_offsets": torch.cat([offsets, torch.ones(extra_edges, 3, dtype=int)])[order],
    }  # fmt: skip


@given(
    st.integers(0, 9),
    st.integers(0, 20),
    st.integers(0, 3),
    st.integers(0, 2),
    st.sampled_from([CUTOFF, 4.5]),
)
def test_outputs_with_padding_are_those_without(
    seed, extra_edges, extra_atoms, extra_systems, cutoff
):
    inputs = joined(
        system(), system(POS[:2] * 1.02, numbers=NUMBERS[:2]), system(POS[:1], numbers=[3])
    )
    model, n, b = Wrapped(embedded, CARD, "autograd").asking("hessian", "node_energies"), 7, 3
    want, (real, unseen) = model(inputs), (7, 3)
    seen.clear()
    out = model(padded(inputs, seed, extra_edges, extra_atoms, extra_systems, cutoff))
    assert seen[0]["pos"] == (real, 3) and seen[0]["cell"][0] == unseen and set(out) == set(want)
    sizes = {"node_energies": (n,), "position_gradients": (n,), "hessian": (n, 3, n)}
    for name, x in out.items():
        inner = x[tuple(slice(k) for k in sizes.get(name, (b,)))]
        close(inner, want[name])
        assert abs(x).sum() == pytest.approx(abs(inner).sum().item(), rel=1e-12)  # zeros elsewhere


def test_a_model_that_asks_sees_empty_systems():
    inputs = joined(system(), system(np.zeros((0, 3)), numbers=np.zeros(0, int)))
    for asks, size in ((False, 1), (True, 2)):
        seen.clear()
        out = Wrapped(
            embedded, Card(cutoff=CUTOFF, neighbor_list="own", empty_systems=asks), "autograd"
        )(inputs)
        assert seen[0]["cell"][0] == size and out["energy"].shape == (2,) and out["energy"][1] == 0


def test_gradients_pass_through_padding():
    inputs = padded(system(), 0, 5, 2, 1, CUTOFF)
    model = Embedded()
    inputs["pos"].requires_grad_()
    g = model(inputs)["position_gradients"]
    g.square().sum().backward()
    plain = system()
    plain["pos"].requires_grad_()
    model(plain)["position_gradients"].square().sum().backward()
    close(inputs["pos"].grad[:4], plain["pos"].grad)
    assert not inputs["pos"].grad[4:].any() and model.weight.grad != 0


@pytest.mark.parametrize("skin", [0.0, 1.0])
def test_edges_in_jax_with_a_capacity(skin, lane):
    find = bridge.edges(CUTOFF + skin, 400, lane=lane)
    step = jax.jit(jax.value_and_grad(lambda r, h: GIVEN(r, h, **find(r, h)), (0, 1)))
    close(step(R, H), WANT(R, H))
    edges = find(R, H)
    assert (
        edges["edge_index"].shape == (2, 400)
        and edges["edge_index"].dtype == jnp.int32
        and edges["cell_offsets"].shape == (400, 3)
    )
    close(
        jax.jit(GIVEN)(R * 1.01, H * 1.01, **edges),
        WANT(R * 1.01, H * 1.01)[0],
        1e-11 if skin else 1,
    )


def test_edges_of_several_systems_and_under_vmap():
    find, cells, batch = bridge.edges(CUTOFF, 300), jnp.stack([H, 1.1 * H]), np.array([0, 0, 0, 1])
    energy = bridge.potential(MODEL, atomic_numbers=NUMBERS, batch=batch, n_systems=2)
    close(energy(R, cells, **find(R, cells, batch=batch)), energy(R, cells))
    many = jnp.stack([R, 1.02 * R])
    alone = [find(r, H) for r in many]
    assert all(
        (x == jnp.stack(ys)).all()
        for x, *ys in zip(
            jax.tree.leaves(jax.vmap(find, (0, None))(many, H)), *map(jax.tree.leaves, alone)
        )
    )


def test_too_small_a_capacity_says_how_many_are_needed():
    needed = int((bridge.edges(CUTOFF, 999)(R, H)["edge_index"][0] < 4).sum())
    with pytest.raises(
        ValueError,
        match=rf"expected at most 5 edges, the capacity, got {needed} edges shorter than 3.0 Angstrom; pass capacity={needed} or more",
    ):
        bridge.edges(CUTOFF, 5)(R, H)
    with pytest.raises(ValueError, match=f"pass capacity={needed}"), bridge.raising():
        jax.block_until_ready(jax.jit(bridge.edges(CUTOFF, 5))(R, H))
    assert bridge.edges(CUTOFF, needed)(R, H)["edge_index"].max() < 4


def test_a_model_that_takes_edges_asks_for_them():
    with pytest.raises(
        ValueError,
        match=r"expected the inputs that .* needs .*got no cell_offsets, edge_index; pass cell_offsets=.*and pass edge_index",
    ):
        GIVEN(R, H)
    with pytest.raises(
        ValueError, match="expected inputs either bound or given in the call, got batch in both"
    ):
        bridge.potential(MODEL, atomic_numbers=NUMBERS, batch=np.zeros(4, int), n_systems=1)(
            R, H[None], batch=np.zeros(4, int)
        )


def test_an_own_module_in_ten_lines():
    """As README shows it: energies by edges, and nothing else."""
    energy = bridge.potential(
        embedded,
        atomic_numbers=NUMBERS,
        cutoff=CUTOFF,
        gradients="autograd",
        outputs=("node_energies",),
    )
    close(jax.value_and_grad(energy, (0, 1))(R, H), WANT(R, H))
    close(energy.outputs(R, H)["node_energies"].sum(), energy(R, H))
    twin = with_gradients(lambda x: brute(x["pos"], x["cell"][0], NUMBERS)[None])
    assert set(energy.outputs(R, H)) - set(twin({"pos": R, "cell": H[None]})) == {"node_energies"}
