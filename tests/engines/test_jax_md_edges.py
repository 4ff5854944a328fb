"""jax-md's neighbour lists as edges of a torch graph model, inside a jitted run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_md import partition, simulate, space

import bridge
from jax_side.engines import jax_md as engine
from tests.graph_cases import CUTOFF, MODEL, close, seen

rng = np.random.default_rng(1)
BOX = jnp.asarray(np.diag([9.0, 9.5, 9.2]) + np.triu(rng.normal(size=(3, 3)), 1) * 0.4)
R = jnp.asarray(
    (
        np.stack(np.meshgrid(*[np.arange(3)] * 3), -1).reshape(-1, 3)
        + 0.15 * rng.normal(size=(27, 3))
    )
    / 3
    % 1
)
ENERGY = bridge.potential(MODEL, atomic_numbers=rng.integers(1, 20, 27))
DISPLACEMENT, SHIFT = space.periodic_general(BOX, fractional_coordinates=True)
FIND = partition.neighbor_list(
    DISPLACEMENT,
    jnp.diag(BOX),
    CUTOFF,
    dr_threshold=0.3,
    fractional_coordinates=True,
    format=partition.Sparse,
)


def test_the_lists_edges_are_those_of_the_torch_side():
    energy, neighbor = engine.energy(ENERGY, BOX), FIND.allocate(R)
    seen.clear()
    got = jax.block_until_ready(
        jax.jit(lambda r, n: jax.value_and_grad(energy)(r, neighbor=n))(R, neighbor)
    )
    assert len(seen) == 1
    close(got, jax.value_and_grad(energy)(R))
    edges, own = engine.edges(neighbor, R, BOX), bridge.edges(CUTOFF, 2000)(R @ BOX.T, BOX.T)
    pairs = lambda e: {
        tuple(x)
        for x in np.concatenate([e["edge_index"].T, e["cell_offsets"]], 1).tolist()
        if x[0] < 27
    }
    # and those of the skin
    assert pairs(own) <= pairs(edges) and len(pairs(edges)) > len(pairs(own))


def test_a_run_that_updates_its_list():
    energy = engine.energy(ENERGY, BOX)
    init, step = simulate.nve(energy, SHIFT, 0.05)
    neighbor = FIND.allocate(R)
    start = lambda: init(jax.random.key(0), R, 0.05, mass=20.0)

    @jax.jit
    def listed(carry, _):
        state, n = carry
        n = n.update(state.position)
        return (step(state, neighbor=n), n), n.did_buffer_overflow

    (state, _), overflow = jax.lax.scan(listed, (start(), neighbor), None, length=40)
    plain = jax.lax.fori_loop(0, 40, lambda _, s: step(s), start())
    assert not overflow.any() and abs(state.position - R).max() > 0.01
    close(state.position, plain.position, 1e-9)


def test_real_positions_and_free_space():
    neighbor, r = FIND.allocate(R), R @ BOX.T
    real = engine.energy(ENERGY, BOX, fractional=False)
    close(real(r, neighbor=neighbor), real(r))
    free = partition.neighbor_list(
        space.free()[0], jnp.array(20.0), CUTOFF, format=partition.Sparse
    )
    close(engine.energy(ENERGY)(r, neighbor=free.allocate(r)), engine.energy(ENERGY)(r))


def test_other_formats_are_refused():
    find = partition.neighbor_list(DISPLACEMENT, jnp.diag(BOX), CUTOFF, fractional_coordinates=True)
    with pytest.raises(
        ValueError,
        match="expected a neighbour list of format partition.Sparse, got .*Dense; pass format=partition.Sparse",
    ):
        engine.edges(find.allocate(R), R, BOX)
