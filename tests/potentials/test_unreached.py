"""Energies that leave autograd have gradients of zero to torch: an error wherever the energy is no
constant, and nowhere else."""

import ase.build
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import bridge
from bridge.card import Card
from tests.model_cases import inputs
from torch_side.potentials.geometry import edge_vectors
from torch_side.potentials.model import Wrapped
from torch_side.potentials.strain import with_gradients

CUTOFF = 3.0
R = jnp.asarray(np.random.default_rng(0).random((4, 3)) * 4)
H = jnp.eye(3) * 4.0
NUMBERS = np.array([29] * 4)


def summed(x, terms, atoms):
    return terms.new_zeros(len(x["cell"])).index_add(0, x["batch"][atoms], terms)


def right(x):
    return summed(x, torch.exp(-edge_vectors(x).norm(dim=-1)), x["edge_index"][0])


def cut(name):
    return lambda x: right(x | {name: x[name].detach()})


@torch.no_grad()
def recorded_nothing(x):
    return right(x)


def bowl(x):
    """Of positions alone; it is minimal at zero."""
    return torch.from_numpy((x["pos"].detach().numpy() ** 2).sum(keepdims=True)[0])


CUT = {  # the energy, and what it is cut off from
    "no_grad": (recorded_nothing, "pos"),
    "item": (lambda x: x["pos"].new_tensor(right(x).tolist()), "pos"),
    "numpy": (lambda x: torch.from_numpy(right(x).detach().numpy()), "pos"),
    "detached pos": (cut("pos"), "pos"),
    "detached cell": (cut("cell"), "cell"),
    "one term": (lambda x: right(x).detach() + 0 * x["cell"].sum(), "pos"),
    "bowl": (bowl, "pos"),
}
CONSTANT = {
    "zeros": lambda x: x["pos"].new_zeros(len(x["cell"])),
    "a number of each element": lambda x: summed(
        x, x["atomic_numbers"].to(x["pos"].dtype), slice(None)
    ),
    "no edge": lambda x: 0 * right(x | {k: x[k][..., :0] for k in ("edge_index",)}
        | {"cell_offsets": x["cell_offsets"][:0]}),
    "of positions alone": lambda x: (x["pos"] ** 2).sum()[None],
}  # fmt: skip
WAYS = {
    "eager": lambda e: jax.grad(e),
    "jit": lambda e: jax.jit(jax.grad(e)),
    "energy alone": lambda e: jax.jit(e),
    "vmap": lambda e: lambda r, h: jax.vmap(jax.grad(e), (0, None))(jnp.stack([r, 2 * r]), h),
    "hessian": lambda e: jax.jit(jax.hessian(e)),
}


def bound(model, lane="auto"):
    options = dict(atomic_numbers=NUMBERS, gradients="autograd", cutoff=CUTOFF, lane=lane)
    return bridge.potential(model, **options)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CUT)
def test_error_x_energy_cut_off(name, way, lane):
    model, of = CUT[name]
    text = f"expected an energy that torch can differentiate in {of}, got one that changes with it"
    with pytest.raises(NotImplementedError, match=text), bridge.raising():
        jax.block_until_ready(WAYS[way](bound(model, lane))(R, H))


@pytest.mark.parametrize("name", CONSTANT)
def test_values_x_constant_energies(name, lane):
    model = CONSTANT[name]
    energy, gradient = jax.jit(jax.value_and_grad(bound(model, lane)))(R, H)
    want = 2 * R if name == "of positions alone" else 0 * R
    np.testing.assert_allclose(gradient, want)
    assert jnp.isfinite(energy)


@pytest.mark.parametrize("name", CUT)
def test_error_x_wrapped(name):
    """The same beneath torch's own engines."""
    model, of = CUT[name]
    potential = Wrapped(model, Card(cutoff=CUTOFF, neighbor_list="own"), "autograd")
    crystal = inputs(ase.build.bulk("Cu", "sc", a=2.5) * 2, dtype=torch.float64)
    crystal["pos"] = crystal["pos"] + 0.1 * torch.sin(torch.arange(24.0).view(8, 3))
    with pytest.raises(NotImplementedError, match=f"differentiate in {of}, got one that changes"):
        potential(crystal)


def test_a_constant_costs_one_more_evaluation_and_others_none():
    calls = []

    def counted(model):
        return lambda x: calls.append(1) or model(x)

    given = {"pos": torch.ones(2, 3), "cell": torch.eye(3)[None]}
    with_gradients(counted(lambda x: (x["pos"] ** 2).sum()[None]))(given)
    assert len(calls) == 1
    with_gradients(counted(lambda x: x["pos"].new_ones(1)))(given)
    assert len(calls) == 3


@pytest.mark.parametrize("transform", ["compile", "fake"])
def test_where_no_values_can_be_read_nothing_is_said(transform):
    """Shapes are found there, and nothing else."""
    model = with_gradients(lambda x: x["pos"].detach().square().sum()[None])
    given = {"pos": torch.ones(2, 3), "cell": torch.eye(3)[None]}
    forces = lambda pos: model(given | {"pos": pos})["position_gradients"]
    if transform == "compile":
        found = torch.compile(forces, backend="eager")(torch.ones(2, 3))
    else:
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode() as mode:
            given = {name: mode.from_tensor(x) for name, x in given.items()}
            found = forces(given["pos"])
    assert found.shape[-2:] == (2, 3)


@pytest.mark.parametrize("name", ["right", "no_grad", "detached pos", "detached cell", "one term"])
def test_shapes_x_given_edges(name):
    """Edges are values too: where shapes are found, nobody reads whether they cross the cell."""
    model = with_gradients(right if name == "right" else CUT[name][0])
    crystal = inputs(ase.build.bulk("Cu", "sc", a=2.5), dtype=torch.float64)
    edges = {"edge_index": torch.zeros(2, 3, dtype=torch.long), "cell_offsets": torch.eye(3).long()}
    given = {k: jnp.asarray(x.numpy()) for k, x in (crystal | edges).items()}
    found = jax.eval_shape(bridge.to_jax(model), given)
    assert found["energy"].shape == (1,) and found["cell_gradients"].shape == (1, 3, 3)
