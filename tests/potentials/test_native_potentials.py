"""Graph potentials on the native lane, against brute force in JAX: padding atoms, an empty system,
slots that no edge is in, edges beyond the cutoff; what is wrong, as the other lanes say it."""

import jax
import jax.numpy as jnp
import pytest
import torch

import bridge
from bridge.card import Card
from tests.graph_cases import (
    CARD,
    CELL,
    CUTOFF,
    NUMBERS,
    POS,
    H,
    R,
    brute,
    close,
    embedded,
    joined,
    seen,
    system,
)
from tests.matrices import a_few
from torch_side.potentials.model import Wrapped
from torch_side.potentials.neighbors import Padded
from torch_side.potentials.strain import with_gradients

GIVEN = Card(
    outputs=CARD.outputs, cutoff=CUTOFF, neighbor_list="given", elements=range(1, 90), batches=True
)
MODEL = Wrapped(embedded, GIVEN, "autograd")
NATIVE = bridge.jax_potential(MODEL, lane="native")

# Four atoms, a padding atom, no atom, two atoms: three systems; 40 slots more than edges.
TWO = joined(system(), system(POS[:2] + 0.1, 1.1 * CELL, NUMBERS[:2]))
TWO = {
    "pos": torch.cat(
        [TWO["pos"][:4], torch.full((1, 3), 0.2, dtype=torch.float64), TWO["pos"][4:]]
    ),
    "cell": torch.cat([TWO["cell"][:1], TWO["cell"]]),
    "pbc": torch.ones(3, 3, dtype=torch.bool),
    "batch": torch.tensor([0, 0, 0, 0, 0, 2, 2]),
    "atomic_numbers": torch.tensor([*NUMBERS, 0, *NUMBERS[:2]]),
}
SLOTS = 160
TWO |= Padded(CUTOFF + 0.5, SLOTS)(TWO)
INPUTS = {key: jnp.asarray(x.numpy()) for key, x in TWO.items()}
BOUND = {key: INPUTS[key] for key in ("atomic_numbers", "batch", "pbc")}
EDGES = {key: INPUTS[key] for key in ("edge_index", "cell_offsets")}
POSITIONS, CELLS = INPUTS["pos"], INPUTS["cell"]


def pure(pos, cell):
    """Energies of the three systems."""
    first = brute(pos[:4], cell[0], NUMBERS)
    return jnp.stack([first, jnp.zeros(()), brute(pos[5:], cell[2], NUMBERS[:2])])


def energy(lane):
    bound = bridge.potential(MODEL, n_systems=3, lane=lane, **BOUND)
    return lambda pos, cell: bound(pos, cell, **EDGES)


def stress(pos, cell):
    """Of the two systems that have one."""
    strained = lambda e: pure(pos @ (jnp.eye(3) + e), cell @ (jnp.eye(3) + e))
    virial = jax.jacfwd(strained)(jnp.zeros((3, 3)))
    return virial / jnp.abs(jnp.linalg.det(cell))[:, None, None]


def test_the_inputs_hold_what_they_should():
    edges, n = TWO["edge_index"], len(TWO["pos"])
    used = int((edges[0] < n).sum())
    inside = int((Padded(CUTOFF, SLOTS)(TWO)["edge_index"][0] < n).sum())
    assert 0 < inside < used < SLOTS


def test_one_system_on_two_threads():
    """What is compiled for several threads is other code, and atoms of one system are a constant."""
    threads = torch.get_num_threads()
    one = bridge.potential(MODEL, atomic_numbers=NUMBERS, pbc=True, lane="native")
    edges = bridge.edges(CUTOFF, SLOTS)(R, H)
    torch.set_num_threads(2)
    try:
        found = jax.jit(jax.value_and_grad(one, (0, 1)))(R, H, **edges)
    finally:
        torch.set_num_threads(threads)
    close(found, jax.value_and_grad(lambda r, h: brute(r, h, NUMBERS), (0, 1))(R, H))


def test_outputs_of_the_model():
    found = jax.jit(NATIVE)(INPUTS)
    g, G = jax.grad(lambda *x: pure(*x).sum(), (0, 1))(POSITIONS, CELLS)
    want = {"energy": pure(POSITIONS, CELLS), "position_gradients": g, "cell_gradients": G}
    close(found, {key: want[key] for key in found})
    assert not found["position_gradients"][4].any() and abs(g).max() > 0.1


STACKED = lambda x: jnp.stack([x, x + 0.03 * jnp.sin(jnp.arange(x.size)).reshape(x.shape)])
DERIVED = {
    "energies": lambda f: f,
    "gradients": lambda f: jax.jacrev(lambda *x: f(*x).sum(), (0, 1)),
    "jvp": lambda f: lambda *x: jax.jvp(f, x, tuple(map(jnp.sin, x)))[1],
    "hvp": lambda f: lambda *x: jax.jvp(jax.grad(lambda *x: f(*x).sum(), (0, 1)), x, x)[1],
    "hessian": lambda f: jax.hessian(lambda *x: f(*x).sum()),
    "scan": lambda f: lambda pos, cell: jax.lax.scan(
        lambda r, _: (r - 1e-3 * jax.grad(lambda r: f(r, cell).sum())(r), f(r, cell)),
        pos, None, length=3,
    )[1],
    "vmap of gradients": lambda f: lambda pos, cell: jax.vmap(
        jax.value_and_grad(lambda r: f(r, cell).sum())
    )(STACKED(pos)),
}  # fmt: skip


@pytest.mark.parametrize("name", a_few(DERIVED, set(DERIVED) - {"hessian"}))
def test_derivatives_equal_brute_force(name):
    of = DERIVED[name]
    found = jax.jit(of(energy("native")))(POSITIONS, CELLS)
    close(found, jax.jit(of(pure))(POSITIONS, CELLS), 1e-9)


def test_stress_is_the_derivative_in_the_strain():
    bound = bridge.potential(MODEL, n_systems=3, lane="native", **BOUND)
    found = jax.jit(lambda pos, cell: bound.stress(pos, cell, **EDGES))(POSITIONS, CELLS)
    close(found, stress(POSITIONS, CELLS))


def test_no_call_of_the_model_once_it_is_compiled():
    program = jax.jit(NATIVE).lower(INPUTS).compile()
    seen.clear()
    for k in range(3):
        program(INPUTS | {"pos": POSITIONS + 0.01 * k})["energy"].block_until_ready()
    assert not seen


# Errors: those that eager torch raises, by its own text.


def put(key, value, *at):
    return INPUTS | {key: INPUTS[key].at[at].set(value)}


LAST = SLOTS - 1
BAD = {  # text: inputs
    r"finite positions, got \[.*nan.*\] for atom 5 of system 2": put("pos", jnp.nan, 5, 1),
    r"finite positions, got \[.*-inf.*\] for atom 0 of system 0": put("pos", -jnp.inf, 0, 2),
    r"one of the 89 elements of embedded, got Lr \(Z = 103\) for atom 6 of system 2": put("atomic_numbers", 103, 6),
    r"one of the 89 elements of embedded, got no element \(Z = -1\) for atom 0 of system 0": put("atomic_numbers", -1, 0),
    r"independent cell vectors on periodic axes, got .* in system 0": put("cell", 0.0, 0, 2),
    r"independent cell vectors on periodic axes, got .*nan.* in system 2": put("cell", jnp.nan, 2, 2, 0),
    r"atoms apart from one another, got atoms (4 and 5|5 and 4) of system 1 0 Angstrom apart": put("pos", POSITIONS[5], 6),
    r"batch sorted, within 0..2, got \[0 0 0 0 0 2 0\]": put("batch", 0, 6),
    r"batch sorted, within 0..2, got \[0 0 0 0 0 2 3\]": put("batch", 3, 6),
    r"edges between atoms, or slots marked unused by an index >= N, got \[-1, \d+\] in slot 7": put("edge_index", -1, 0, 7),
    r"edges within one system, got atoms 0 of system 0 and 5 of system 2 in slot 159": put("edge_index", jnp.array([0, 5]), slice(None), LAST),
}  # fmt: skip


@pytest.mark.parametrize("text", BAD)
def test_the_same_error_as_eager_torch(text):
    with pytest.raises(ValueError, match=text) as eager:
        NATIVE(BAD[text])
    program = jax.jit(NATIVE)
    with pytest.raises(ValueError) as raised, bridge.raising():
        jax.block_until_ready(program(BAD[text]))
    assert str(raised.value) == str(eager.value)
    # jit raises the latter where the program has run before (jax 0.10.2)
    with pytest.raises((jax.errors.JaxRuntimeError, ValueError)) as told:
        jax.block_until_ready(program(BAD[text]))
    assert f"ValueError: {eager.value}" in str(told.value)
    assert jnp.isfinite(program(INPUTS)["energy"]).all(), "the program goes on"


def test_an_energy_that_is_not_finite():
    """Charged atoms at the origin have an infinite energy, which is told for its system."""
    inverse = lambda x: {
        "energy": x["pos"].new_zeros(len(x["cell"])).index_add(0, x["batch"], 1 / x["pos"].norm(dim=-1))
    }  # fmt: skip
    model = bridge.jax_potential(
        inverse, gradients="autograd", card=Card(batches=True), lane="native"
    )
    x = {key: INPUTS[key] for key in ("pos", "cell", "pbc", "batch", "atomic_numbers")}
    x["pos"] = x["pos"].at[5].set(0.0)
    with pytest.raises(ValueError, match="got inf for system 2"), bridge.raising():
        jax.block_until_ready(jax.jit(model)(x))


# What can be told from the types is told before anything is compiled.


def test_a_graph_model_without_edges():
    bound = bridge.potential(
        embedded, atomic_numbers=NUMBERS, cutoff=CUTOFF, gradients="autograd", lane="native"
    )
    with pytest.raises(
        ValueError,
        match=r"expected edges for .*embedded, in a program that is compiled as a whole, got none; "
        r'make them with bridge.edges\(3, capacity\) .*lane="ffi"',
    ):
        jax.jit(bound)(R, H)


def mixing(x):
    """The energy of all systems, given to each of them."""
    total = embedded(x)["energy"].sum()
    return {"energy": total.repeat(len(x["cell"]))}


def test_gradients_without_a_graph():
    """Their derivative would be zero."""

    def cut(x):
        out = with_gradients(embedded)(x)
        return out | {"position_gradients": out["position_gradients"].detach()}

    bound = bridge.potential(Wrapped(cut, GIVEN, "model"), n_systems=3, lane="native", **BOUND)
    total = lambda r: bound(r, CELLS, **EDGES).sum()
    with pytest.raises(NotImplementedError, match="position_gradients of .* that can be differen"):
        jax.jit(jax.hessian(total)).lower(POSITIONS)


def test_a_graph_model_that_mixes_systems():
    mixed = Wrapped(
        mixing, Card(cutoff=CUTOFF, neighbor_list="given", elements=range(1, 90)), "autograd"
    )
    with pytest.raises(
        ValueError,
        match="expected mixing to keep systems of one call apart, as a compiled graph needs, got "
        "ValueError: expected systems of one call that don't see one another",
    ):
        jax.jit(bridge.jax_potential(mixed, lane="native"))(INPUTS)


def test_a_graph_model_that_no_pair_of_atoms_can_show():
    def needs_three(x):
        return {"energy": embedded(x)["energy"][:3].reshape(3)}

    model = Wrapped(
        needs_three, Card(cutoff=CUTOFF, neighbor_list="given", elements=range(1, 90)), "autograd"
    )
    with pytest.raises(
        ValueError, match=r"to keep systems of one call apart.*Card\(batches=True\)"
    ):
        jax.jit(bridge.jax_potential(model, lane="native"))(INPUTS)
