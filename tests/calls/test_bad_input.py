"""Bad structures: an answer or an error that names the system and the atom, never a number that is
wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import bridge
from tests.graph_cases import (
    CARD,
    CELL,
    CUTOFF,
    MODEL,
    NUMBERS,
    POS,
    H,
    R,
    brute,
    close,
    embedded,
    joined,
    system,
)
from torch_side.potentials.model import Wrapped
from torch_side.potentials.neighbors import neighbor_list

NAN, INF = float("nan"), float("inf")
PLAIN = Wrapped(
    lambda x: {
        "energy": x["pos"]
        .new_zeros(len(x["cell"]))
        .index_add(0, x["batch"], 1 / x["pos"].norm(dim=-1))
    },
    bridge.Card(),
    "autograd",
)


def with_edges(inputs, change=lambda e: e):
    edges, offsets = neighbor_list(
        inputs["pos"], inputs["cell"], inputs["pbc"], CUTOFF, inputs["batch"]
    )
    return inputs | {"edge_index": change(edges), "cell_offsets": offsets}


def put(value, *at):
    def change(x):
        x = x.clone()
        x[at] = value
        return x

    return change


TWO = joined(system(), system(POS[:2] + 0.1, numbers=NUMBERS[:2]))
FLAT = CELL * [[1], [1], [0]]
BAD = {  # text: (model, inputs)
    r"finite positions, got \[.*nan.*\] for atom 4 of system 1": (MODEL, TWO | {"pos": put(NAN, 4, 1)(TWO["pos"])}),
    r"finite positions, got \[.*-inf.*\] for atom 0 of system 0": (MODEL, TWO | {"pos": put(-INF, 0, 2)(TWO["pos"])}),
    r"finite positions, got \[.*nan.*\] for atom 5 of system 1; look": (PLAIN, TWO | {"pos": put(NAN, 5, 0)(TWO["pos"])}),
    r"independent cell vectors on periodic axes, got .* in system 0": (MODEL, system(cell=FLAT)),
    r"independent cell vectors on periodic axes, got .*nan.* in system 1": (MODEL, TWO | {"cell": put(NAN, 1, 2, 0)(TWO["cell"])}),
    r"independent cell vectors on periodic axes, got \[\[0.0, 0.0, 0.0\]\] in system 0": (MODEL, system(cell=FLAT, pbc=(False, False, True))),
    r"atoms apart from one another, got atoms (4 and 5|5 and 4) of system 1 0 Angstrom apart": (MODEL, TWO | {"pos": TWO["pos"].index_copy(0, torch.tensor([5]), TWO["pos"][4:5])}),
    r"atoms apart from one another, got atoms . and . of system 0 .* apart": (MODEL, system(np.concatenate([POS[:3], POS[:1] + CELL[1]]))),
    r"one of the 89 elements of embedded, got Lr \(Z = 103\) for atom 5 of system 1": (MODEL, TWO | {"atomic_numbers": put(103, 5)(TWO["atomic_numbers"])}),
    r"one of the 89 elements of embedded, got no element \(Z = -1\) for atom 0 of system 0": (MODEL, TWO | {"atomic_numbers": put(-1, 0)(TWO["atomic_numbers"])}),
    r"atomic numbers of at least 0, got no element \(Z = -3\) for atom 4 of system 1": (PLAIN, TWO | {"atomic_numbers": put(-3, 4)(TWO["atomic_numbers"])}),
    r"batch sorted, within 0..1, got \[0 0 0 0 1 0\]": (MODEL, TWO | {"batch": put(0, 5)(TWO["batch"])}),
    r"batch sorted, within 0..1, got \[0 0 0 0 1 2\]": (MODEL, TWO | {"batch": put(2, 5)(TWO["batch"])}),
    r"edges between atoms, or slots marked unused by an index >= N, got \[-1, \d\] in slot 7; mark unused": (MODEL, with_edges(TWO, put(-1, 0, 7))),
    r"edges within one system, got atoms \d of system 0 and 5 of system 1 in slot 2": (MODEL, with_edges(TWO, put(5, 1, 2))),
    r"cell_offsets with edge_index, got edge_index alone": (MODEL, {k: x for k, x in with_edges(TWO).items() if k != "cell_offsets"}),
    r"a finite energy from <lambda>, got inf for system 0; look at its structure": (PLAIN, system(POS * [[0], [1], [1], [1]])),
    r"pos as float\[4,3\], got int64\[4,3\]": (MODEL, system() | {"pos": torch.ones(4, 3, dtype=int)}),
    r"one dtype for pos and cell, got pos float32 and cell float64": (MODEL, system() | {"pos": torch.ones(4, 3)}),
    r"pbc as bool\[1,3\], got float64\[1,3\]": (MODEL, system() | {"pbc": torch.ones(1, 3, dtype=torch.float64)}),
    r"edge_index as int\[2,\d+\], got float64\[2,\d+\]": (MODEL, with_edges(system(), lambda e: e.double())),
}  # fmt: skip


@pytest.mark.parametrize("text", BAD)
def test_an_error_in_torch(text):
    model, inputs = BAD[text]
    with pytest.raises(ValueError, match="expected " + text):
        model(inputs)


@pytest.mark.parametrize(
    "text", [t for t, (_, x) in BAD.items() if "edge" not in t and "apart" not in t]
)
def test_the_same_error_through_jax(text, lane, maybe_jit):
    """Whatever the values are, shapes are right: the error comes from the call, as it was."""
    model, x = BAD[text]
    given = {k: jnp.asarray(t.numpy()) for k, t in x.items()}
    bound = {k: np.asarray(given.pop(k)) for k in ("atomic_numbers", "batch", "pbc")}
    with pytest.raises(ValueError, match=text), bridge.raising():
        energy = bridge.potential(model, n_systems=len(x["cell"]), lane=lane, **bound)
        jax.block_until_ready(maybe_jit(energy)(given["pos"], given["cell"]))


def test_a_gradient_that_is_not_finite_names_the_atom():
    root = Wrapped(
        lambda x: {"energy": x["pos"].sqrt().sum().reshape(1)}, bridge.Card(), "autograd"
    )
    with pytest.raises(
        ValueError,
        match=r"a finite position_gradients from .*<lambda>, got \[inf, 0.5, 0.5\] for atom 1 of system 0",
    ):
        root(system(np.array([[1.0, 1, 1], [0, 1, 1]]), numbers=[1, 1]))


# Answers


def test_left_handed_cells_are_cells():
    mirror = np.diag([1.0, 1.0, -1.0])
    energy = bridge.potential(MODEL, atomic_numbers=NUMBERS)
    assert np.linalg.det(CELL) > 0 > np.linalg.det(CELL @ mirror)
    close(energy(R @ mirror, H @ mirror), energy(R, H))
    close(energy.stress(R @ mirror, H @ mirror), mirror @ energy.stress(R, H) @ mirror)


def test_one_atom_alone_and_with_its_images():
    one = bridge.potential(MODEL, atomic_numbers=NUMBERS[:1])
    close(one(R[:1]), -1 + 1 / 100)
    close(one(R[:1], 0.4 * H), brute(R[:1], 0.4 * H, NUMBERS[:1]))
    assert (
        not jax.grad(one)(R[:1], 0.4 * H).any()
        and abs(jax.grad(one, 1)(R[:1], 0.4 * H)).max() > 0.1
    )


def test_no_atoms_at_all(lane, maybe_jit):
    nothing = bridge.potential(MODEL, atomic_numbers=np.zeros(0, int), lane=lane)
    e, (g, G) = maybe_jit(jax.value_and_grad(nothing, (0, 1)))(jnp.zeros((0, 3)), H)
    assert e == 0 and g.shape == (0, 3) and not G.any()
    some = bridge.potential(
        MODEL, atomic_numbers=NUMBERS, batch=np.array([1, 1, 1, 1]), n_systems=3, lane=lane
    )
    close(maybe_jit(some)(R, jnp.stack([H, H, H])), jnp.array([0, brute(R, H, NUMBERS), 0]))


def test_atoms_far_outside_of_the_cell():
    """To rounding of the positions themselves, 1e-13 of 1e3 Angstrom."""
    far = R + jnp.array([[0, 0, 0], [250, 0, 0], [0, -250, 0], [1, 1, 1]]) @ H
    close(bridge.potential(MODEL, atomic_numbers=NUMBERS)(far, H), brute(R, H, NUMBERS), 1e-9)


def test_huge_edge_lists_that_repeat_nothing():
    """Slots in any order, unused ones between: the sum is the same."""
    energy = bridge.potential(Wrapped(embedded, CARD, "autograd"), atomic_numbers=NUMBERS)
    edges = bridge.edges(CUTOFF, 1000)(R, H)
    order = jax.random.permutation(jax.random.key(0), 1000)
    close(
        energy(
            R,
            H,
            edge_index=edges["edge_index"][:, order],
            cell_offsets=edges["cell_offsets"][order],
        ),
        energy(R, H),
    )
