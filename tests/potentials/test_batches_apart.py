"""A model that does not keep the systems of one call apart is an error at its first call with
several of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import bridge
from bridge.card import Card
from tests.adapters import MODELS
from torch_side.potentials.committee import Committee
from torch_side.potentials.model import Wrapped

R = jnp.array([[0.0, 0, 0], [1, 0, 0], [0, 1.5, 0]])
MANY = jnp.stack([R, 2 * R])
NUMBERS = np.array([1, 6, 8])


def spread(x):
    """Sum of squared distances over all pairs of all systems: it does not look at batch."""
    return ((x["pos"][:, None] - x["pos"][None]) ** 2).sum()


def nodes(x):
    return x["pos"].new_zeros(len(x["cell"])).index_add(0, x["batch"], (x["pos"] ** 2).sum(-1))


WRONG = {
    "one sum for all": lambda x: spread(x).expand(len(x["cell"])),
    "the first system's": lambda x: nodes(x)[:1].expand(len(x["cell"])),
    "a share of the total": lambda x: nodes(x).sum().expand(len(x["cell"])) / len(x["cell"]),
    "only large batches": lambda x: nodes(x) + (len(x["cell"]) > 1) * 1e-2,
}
WAYS = {
    "vmap": lambda e: jax.vmap(e)(MANY),
    "vmap of grad": lambda e: jax.vmap(jax.grad(e))(MANY),
    "vmap of hessian": lambda e: jax.vmap(jax.hessian(e))(MANY),
    "jit": lambda e: jax.jit(jax.vmap(e))(MANY),
    "scan of chains": lambda e: jax.lax.scan(
        lambda r, _: (r, jax.vmap(e)(r)), MANY, None, length=2
    )[1],
}
TEXT = r"expected systems of one call that don't see one another in .*, got .* eV for system 1 in the call, .* eV alone; .*batched=\"sequential\""


def bound(model, **options):
    return bridge.potential(model, atomic_numbers=NUMBERS, gradients="autograd", **options)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", WRONG)
def test_error_x_wrong_models(model, way):
    energy = bound(WRONG[model])
    energy(R)
    with pytest.raises(ValueError, match=TEXT), bridge.raising():
        jax.block_until_ready(WAYS[way](energy))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_error_x_dtypes_and_lanes(dtype, lane):
    energy = bound(WRONG["one sum for all"], lane=lane)
    with pytest.raises(ValueError, match=TEXT), bridge.raising():
        jax.block_until_ready(jax.jit(jax.vmap(energy))(MANY.astype(dtype)))


@pytest.mark.parametrize("model", WRONG)
def test_error_x_systems_of_one_call(model):
    """The second of three systems has no atoms; the caller's number is named."""
    energy = bridge.potential(
        WRONG[model],
        atomic_numbers=np.array([1, 1, 6, 8]),
        batch=np.array([0, 2, 2, 2]),
        n_systems=3,
        gradients="autograd",
    )
    with pytest.raises(ValueError, match="for system 2 in the call"):
        energy(jnp.concatenate([R[1:2], R + 0.1]))


def test_error_x_given_edges():
    def pairs(x):
        i, j = x["edge_index"]
        return (x["pos"][j] - x["pos"][i]).square().sum().expand(len(x["cell"]))

    energy = bound(pairs, cutoff=2.5)
    with pytest.raises(ValueError, match=TEXT):
        jax.vmap(energy)(MANY)


@pytest.mark.parametrize("own", [False, True], ids=["autograd", "own gradients"])
def test_error_x_committees(own):
    def member(k):
        energies = lambda x: k * WRONG["one sum for all"](x)
        if not own:
            return Wrapped(energies, Card(), "autograd")
        zeros = lambda x: {"position_gradients": 0 * x["pos"], "cell_gradients": 0 * x["cell"]}
        return Wrapped(lambda x: {"energy": energies(x)} | zeros(x), Card(), "model")

    energy = bridge.potential(
        Committee([member(1.0), member(2.0)], vmap=False), atomic_numbers=NUMBERS
    )
    with pytest.raises(ValueError, match=TEXT):
        jax.vmap(energy)(MANY)


def test_error_x_jax_models_in_torch():
    model = bridge.torch_potential(
        lambda x: jnp.full(len(x["cell"]), (x["pos"] ** 2).sum()), gradients="autodiff"
    )
    inputs = {
        "pos": torch.arange(12.0, dtype=torch.float64).reshape(4, 3), "cell": torch.zeros(2, 3, 3, dtype=torch.float64), "pbc": torch.zeros(2, 3, dtype=torch.bool),
        "batch": torch.tensor([0, 0, 1, 1]), "atomic_numbers": torch.ones(4, dtype=torch.int64),
    }  # fmt: skip
    with pytest.raises(
        ValueError, match=r"in a JAX potential, got 506 eV for system 1 in the call, .* alone"
    ):
        model(inputs)


def test_evaluations_x_jax_models_with_unused_slots():
    """Edges that point nowhere belong to no system."""

    def bonds(x):
        (i, j), n = x["edge_index"], len(x["pos"])
        each = jnp.where(
            i < n,
            ((x["pos"][jnp.minimum(j, n - 1)] - x["pos"][jnp.minimum(i, n - 1)]) ** 2).sum(-1),
            0,
        )
        nodes = jax.ops.segment_sum(each, jnp.minimum(i, n - 1), num_segments=n)
        return jax.ops.segment_sum(nodes, x["batch"], num_segments=len(x["cell"]))

    model = bridge.torch_potential(bonds, gradients="autodiff", cutoff=2.0)
    inputs = {
        "pos": torch.arange(12.0, dtype=torch.float64).reshape(4, 3), "cell": torch.zeros(2, 3, 3, dtype=torch.float64), "pbc": torch.zeros(2, 3, dtype=torch.bool),
        "batch": torch.tensor([0, 0, 1, 1]), "atomic_numbers": torch.ones(4, dtype=torch.int64),
        "edge_index": torch.tensor([[0, 1, 9, 2, 3, 4], [1, 0, 9, 3, 2, 4]]), "cell_offsets": torch.zeros(6, 3, dtype=torch.int64),
    }  # fmt: skip
    assert model(inputs)["energy"].tolist() == [54, 54]


@pytest.mark.parametrize("way", WAYS)
def test_sequential_x_a_model_that_ignores_batch(way):
    """What the error advises is right."""
    got = WAYS[way](bound(WRONG["one sum for all"], batched="sequential"))
    pure = lambda r: ((r[:, None] - r[None]) ** 2).sum()
    np.testing.assert_allclose(got, WAYS[way](pure), rtol=1e-12)


def test_evaluations_x_right_models():
    """One more in the first call of several systems, none after it, none where the card vouches."""
    seen = []

    def model(x):
        seen.append(len(x["cell"]))
        return nodes(x)

    energy = bound(model)
    energy(R)
    assert seen == [1]
    jax.block_until_ready(jax.vmap(energy)(MANY))
    assert seen == [1, 2, 1]
    jax.block_until_ready(jax.vmap(energy)(MANY))
    assert seen == [1, 2, 1, 2]
    seen.clear()
    jax.block_until_ready(jax.vmap(bound(model, card=Card(batches=True)))(MANY))
    assert seen == [2]


def test_a_sum_vouches_where_all_terms_do():
    assert (Card(batches=True) + Card(batches=True)).batches and not (
        Card(batches=True) + Card()
    ).batches


@pytest.mark.parametrize("name", MODELS)
def test_vouching_x_adapters(name):
    """That they may is held by test_models_vmap and the files of their values."""
    assert MODELS[name].build(MODELS[name].dtype).card.batches
