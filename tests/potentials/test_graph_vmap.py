"""vmap over systems is one batched graph call; Hessians evaluate the forward once; against brute
force in JAX."""

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
    Embedded,
    H,
    R,
    brute,
    close,
    embedded,
    seen,
)
from torch_side.potentials.model import Wrapped

ENERGY = bridge.potential(MODEL, atomic_numbers=NUMBERS)
PURE = lambda r, h: brute(r, h, NUMBERS)
RS, HS = jnp.stack([R, 1.01 * R, R + 0.05 * jnp.sin(R)]), jnp.stack([H, 1.02 * H, H.T])
AXES = {"both": (0, 0), "positions": (0, None), "cells": (None, 0), "cells last": (0, 2)}


def args(axes):
    return tuple(x[0] if a is None else jnp.moveaxis(x, 0, a) for x, a in zip((RS, HS), axes))


DERIVED = {
    "value": lambda f: f,
    "grad": lambda f: jax.grad(f, (0, 1)),
    "value_and_grad": lambda f: jax.value_and_grad(f, (0, 1)),
    "jvp": lambda f: lambda r, h: jax.jvp(f, (r, h), (jnp.sin(r), h)),
    "hvp": lambda f: lambda r, h: jax.jvp(jax.grad(f, (0, 1)), (r, h), (jnp.sin(r), h)),
    "hessian": lambda f: jax.hessian(f, (0, 1)),
    "jacrev of grad": lambda f: jax.jacrev(jax.grad(f)),
}


@pytest.mark.matrix
@pytest.mark.parametrize("derived", DERIVED)
@pytest.mark.parametrize("axes", AXES)
def test_one_call_for_all_systems(axes, derived):
    axes, transform = AXES[axes], DERIVED[derived]
    seen.clear()
    got = jax.block_until_ready(jax.jit(jax.vmap(transform(ENERGY), axes))(*args(axes)))
    assert [s["pos"] for s in seen] == [(12, 3)] * (2 if derived == "hvp" else 1) and seen[0][
        "cell"
    ] == (3, 3, 3)
    close(got, jax.jit(jax.vmap(transform(PURE), axes))(*args(axes)), 1e-9)


@pytest.mark.parametrize("transform", [jax.jacfwd, jax.jacrev])
def test_a_hessian_evaluates_the_forward_once(transform, lane):
    energy = bridge.potential(MODEL, atomic_numbers=NUMBERS, lane=lane)
    seen.clear()
    hessian = jax.block_until_ready(jax.jit(transform(jax.grad(energy)))(R, H))
    assert len(seen) == 1
    close(hessian, jax.hessian(PURE)(R, H), 1e-9)


def test_grad_of_vmap_and_nested_vmaps():
    total = lambda f: lambda r, h: (jax.vmap(f, (0, None))(r, h) ** 2).sum()
    close(jax.grad(total(ENERGY), (0, 1))(RS, H), jax.grad(total(PURE), (0, 1))(RS, H))
    twice = lambda f: jax.jit(
        jax.vmap(jax.vmap(jax.value_and_grad(f, (0, 1)), (0, None)), (None, 0))
    )
    seen.clear()
    got = jax.block_until_ready(twice(ENERGY)(RS, HS))
    assert [s["cell"] for s in seen] == [(9, 3, 3)]
    close(got, twice(PURE)(RS, HS))


def test_vmap_over_batches_of_unequal_systems():
    batch = np.array([0, 2, 2, 2])
    energy = bridge.potential(MODEL, atomic_numbers=NUMBERS, batch=batch, n_systems=3)
    many = jnp.stack([HS, 1.1 * HS])
    got = jax.vmap(energy, (None, 0))(R, many)
    seen.clear()
    assert got.shape == (2, 3) and jax.vmap(jax.vmap(energy, (None, 0)), (0, None))(
        RS, many
    ).shape == (3, 2, 3)
    # six times two systems; the empty ones are not shown
    assert [s["cell"] for s in seen] == [(12, 3, 3)]
    for row, cells in zip(got, many):
        close(row, energy(R, cells))


def test_vmap_with_given_edges():
    find = bridge.edges(CUTOFF + 0.5, 300)
    energy = bridge.potential(Wrapped(embedded, CARD, "autograd"), atomic_numbers=NUMBERS)
    edges = jax.vmap(find)(RS, HS)
    seen.clear()
    got = jax.block_until_ready(
        jax.jit(jax.vmap(jax.value_and_grad(lambda r, h, e: energy(r, h, **e), (0, 1))))(
            RS, HS, edges
        )
    )
    assert len(seen) == 1
    close(got, jax.vmap(jax.value_and_grad(PURE, (0, 1)))(RS, HS))


def test_all_outputs_under_vmap():
    energy = bridge.potential(MODEL, atomic_numbers=NUMBERS, outputs=("node_energies", "hessian"))
    out = jax.jit(jax.vmap(energy.outputs))(RS, HS)
    alone = [energy.outputs(r, h) for r, h in zip(RS, HS)]
    for name, x in out.items():
        close(x, jnp.stack([o[name] for o in alone]), 1e-10)
    assert out["hessian"].shape == (3, 4, 3, 4, 3)


def test_sequential_calls_one_after_another():
    energy = bridge.potential(MODEL, atomic_numbers=NUMBERS, batched="sequential")
    seen.clear()
    got = jax.block_until_ready(jax.jit(jax.vmap(jax.value_and_grad(energy, (0, 1))))(RS, HS))
    assert [s["pos"] for s in seen] == [(4, 3)] * 3
    close(got, jax.vmap(jax.value_and_grad(PURE, (0, 1)))(RS, HS))
    with pytest.raises(ValueError, match="batched as one of 'graph', 'sequential', got 'vmap'"):
        bridge.potential(MODEL, atomic_numbers=NUMBERS, batched="vmap")


def test_a_batch_index_of_another_call_is_refused():
    """Shifted by the systems before it, it would be a valid index of the wrong system."""
    energy = lambda b, r: bridge.potential(MODEL, atomic_numbers=NUMBERS, batch=b, n_systems=2)(
        r, HS[:2]
    )
    with pytest.raises(ValueError, match=r"expected batch within 0..1, got 2 in call 0"):
        jax.vmap(energy, (None, 0))(np.array([0, 0, 1, 2]), RS)


@pytest.mark.parametrize("call", [0, 1])
def test_a_negative_edge_of_one_call_is_refused(call):
    """Shifted by the atoms before it, it would be a valid index of an atom of another call."""
    energy = bridge.potential(MODEL, atomic_numbers=NUMBERS)
    edges = jax.vmap(bridge.edges(MODEL.card.cutoff, 400))(RS[:2], HS[:2])
    edges["edge_index"] = edges["edge_index"].at[call, 1, 0].set(-1)
    of = jax.vmap(lambda r, h, e: energy(r, h, **e))
    with pytest.raises(jax.errors.JaxRuntimeError, match="-1"):
        jax.block_until_ready(jax.jit(of)(RS[:2], HS[:2], edges))


def test_graph_batching_of_other_callables_is_refused():
    f = bridge.to_jax(lambda x: x.sum(), batched="graph")
    with pytest.raises(
        TypeError,
        match='expected one dict of the contract as argument of .*batched="graph", got 0; use these keys, or batched="sequential"',
    ):
        f(R)
    structure = {"pos": R, "cell": H[None]}
    two = bridge.to_jax(lambda x, y: {"energy": (x["pos"] + y["pos"]).sum()[None]}, batched="graph")
    by_name = bridge.to_jax(
        lambda x, scale: {"energy": scale * x["pos"].sum()[None]}, batched="graph"
    )
    for call in (lambda: two(structure, structure), lambda: by_name(structure, scale=R[0, :1])):
        with pytest.raises(TypeError, match="one dict of the contract as argument of"):
            call()
    g = bridge.to_jax(
        lambda x: {"energy": x["pos"].sum()[None], "gap": x["pos"].sum()[None]}, batched="graph"
    )
    with pytest.raises(TypeError, match="as result of .*got energy, gap"):
        g({"pos": R, "cell": H[None]})


def test_parameters_travel_beside_the_graph():
    """functional(model) is a JAX function of weights and dict; weights are differentiated, and
    vmapped one after another."""
    apply, params = bridge.functional(
        Embedded(), derivatives="autograd", batched="sequential", outputs=_like
    )
    inputs = {
        "pos": R,
        "cell": H[None],
        "pbc": jnp.ones((1, 3), bool),
        "batch": jnp.zeros(4, int),
        "atomic_numbers": jnp.asarray(NUMBERS),
    }
    loss = lambda p, x: (apply(p, x)["position_gradients"] ** 2).sum()
    close(jax.grad(loss)(params, inputs)["weight"], 2 * loss(params, inputs))
    stacked = {"weight": jnp.array([1.0, 2.0])}
    close(
        jax.vmap(apply, (0, None))(stacked, inputs)["energy"],
        jnp.outer(stacked["weight"], apply(params, inputs)["energy"]),
    )


def _like(params, inputs):
    n, b = len(inputs["pos"].shape) and inputs["pos"].shape[0], inputs["cell"].shape[0]
    shapes = {
        "energy": (b,),
        "node_energies": (n,),
        "position_gradients": (n, 3),
        "cell_gradients": (b, 3, 3),
    }
    return {k: jax.ShapeDtypeStruct(s, inputs["pos"].dtype) for k, s in shapes.items()}


def test_float32_and_other_cells():
    energy = bridge.potential(MODEL, atomic_numbers=NUMBERS)
    got = jax.vmap(energy)(RS.astype("float32"), HS.astype("float32"))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, jax.vmap(PURE)(RS, HS), rtol=1e-5)
    assert torch.get_default_dtype() is torch.float32 and CELL.shape == (3, 3)
