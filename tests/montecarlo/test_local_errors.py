"""What a local potential refuses: at once where values can be seen, by NaN energies and `check`
inside jit."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jax_side.montecarlo import moves
from jax_side.montecarlo.local import Change, LocalPotential
from tests.local_cases import bits, quick

PLAIN = {
    "init": lambda Z: jnp.ones((len(Z), 1)),
    "edge": lambda a, b, r: a * (1 - (r**2).sum(-1)[:, None]),
    "readout": lambda a, s: s[:, 0],
}


@cache
def chain():
    """Five atoms in a row along x in a box, the last of six slots free."""
    local = LocalPotential(*PLAIN.values(), 1.0)
    pos = jnp.array([[0.5, 0, 0], [1.2, 0, 0], [1.9, 0, 0], [4.1, 0, 0], [6.0, 0, 0]])
    graph = {"pos": pos, "atomic_numbers": jnp.arange(1, 6), "cell": 8 * jnp.eye(3)}
    return local, graph, replace(local.allocate(graph, capacity=6), per_cell=4, neighbors=2)


# in one cell of the list, none within the cutoff
SPREAD = jnp.array(
    [[5.5, 5.5, 5.5], [7.5, 5.5, 5.5], [5.5, 7.5, 5.5], [7.5, 7.5, 7.5], [5.5, 5.5, 7.5]]
)
TWICE = "each atom once in a change, and a position for each that is inserted, got an atom twice, or without; mend the change"
MISUSES = {  # name: (change, text)
    "crowded": (
        lambda: moves.moved(range(5), SPREAD),
        "at most 4 atoms in a cell of the list, got 5; allocate with per_cell=5 or more",
    ),
    "neighbors": (
        lambda: moves.moved([3], jnp.array([[1.2, 0.05, 0]])),
        "at most 2 neighbours of an atom, got 3; allocate with neighbors=3 or more",
    ),
    "capacity": (
        lambda: moves.inserted([6], jnp.zeros((1, 3)), [1]),
        "an index below the capacity of 6 atoms, got one that needs 7; allocate with capacity=7 or "
        "more",
    ),
    "twice": (lambda: moves.moved([1, 1], jnp.zeros((2, 3))), TWICE),
    "nowhere": (lambda: moves.mutated([5], [3]), TWICE),
}


def five(change):
    """With five rows, which share a program."""
    k = 5 - len(change.index)
    padded = lambda x: x if x is None else jnp.pad(jnp.asarray(x), [(0, k), (0, 0)][: jnp.ndim(x)])
    return Change(
        jnp.pad(change.index, (0, k), constant_values=-1),
        padded(change.pos),
        padded(change.atomic_numbers),
    )


@quick
def carried_on(cache, change):
    """Energy, change, and caches after this change and after a good one."""
    local = chain()[0]
    energy, difference, proposal = local.update(cache, change)
    after = local.commit(cache, proposal, True)
    good = local.update(after, five(moves.moved([0], jnp.array([[0.4, 0, 0]]))))[2]
    return energy, difference, after, local.commit(after, good, True)


@pytest.mark.parametrize("name", MISUSES)
def test_misuse_x_eager_and_jit(name):
    local, graph, layout = chain()
    first, (change, text) = local.full(graph, layout), MISUSES[name]
    with pytest.raises(ValueError) as at_once:
        local.update(first, five(change()))
    assert str(at_once.value) == "expected " + text
    energy, difference, after, later = carried_on(first, five(change()))
    assert np.isnan([energy, difference, after.energy, later.energy]).all()
    for cache_ in (after, later):
        assert bits((cache_.pos, cache_.atomic_numbers, cache_.cells, cache_.sums)) == bits(
            (first.pos, first.atomic_numbers, first.cells, first.sums)
        )
        with pytest.raises(ValueError) as checked:
            local.check(cache_)
        assert str(checked.value) == "expected " + text


@pytest.mark.parametrize(
    "name, more",
    [("crowded", {"per_cell": 5}), ("neighbors", {"neighbors": 3}), ("capacity", {"atoms": 7})],
)
def test_misuse_x_allocated_as_told(name, more):
    local, graph, layout = chain()
    roomy = replace(layout, **more)
    energy, change, proposal = quick(
        lambda pos: local.update(local.full(graph | {"pos": pos}, roomy), MISUSES[name][0]())
    )(graph["pos"])
    assert np.isfinite([energy, change]).all()
    assert not proposal.needed.any()


@pytest.mark.parametrize("name, enough", [("per_cell", 3), ("neighbors", 2)])
def test_full_x_too_small_a_layout(name, enough):
    local, graph, layout = chain()
    small = replace(layout, **{name: 1})
    with pytest.raises(ValueError, match=f"got {enough}; allocate with {name}={enough} or more"):
        local.full(graph, small)
    found = quick(lambda pos: local.full(graph | {"pos": pos}, small))(graph["pos"])
    assert np.isnan(found.energy)
    with pytest.raises(ValueError, match=f"got {enough}; allocate with {name}={enough} or more"):
        local.check(jax.tree.map(lambda x: jnp.stack([x, x]), found))
    assert np.isfinite(
        quick(
            lambda pos: local.full(graph | {"pos": pos}, replace(layout, **{name: enough})).energy
        )(graph["pos"])
    )


def test_full_x_narrower_cell():
    local, graph, layout = chain()
    layout, squeezed = (
        replace(layout, per_cell=6, neighbors=9),
        graph | {"cell": graph["cell"] * 0.31},
    )
    with pytest.raises(
        ValueError,
        match="a cell as wide as the layout was made for, got a narrower one; allocate for this cell",
    ):
        local.full(squeezed, layout)
    assert np.isnan(
        quick(lambda cell: local.full(graph | {"cell": cell}, layout).energy)(squeezed["cell"])
    )
    assert np.isfinite(local.full(squeezed, local.allocate(squeezed)).energy)


@pytest.mark.parametrize(
    "change, text",
    [
        (
            lambda: Change(jnp.array([1, 2]), jnp.zeros((1, 3))),
            r"expected pos \(2, 3\) in a change of 2 atoms, got \(1, 3\); give a row for each index",
        ),
        (
            lambda: Change(jnp.array([1]), jnp.zeros(3)),
            r"expected pos \(1, 3\) in a change of 1 atoms, got \(3,\)",
        ),
        (
            lambda: Change(jnp.array([1]), None, jnp.array([1, 2])),
            r"expected atomic_numbers \(1,\) in a change of 1 atoms, got \(2,\)",
        ),
        (
            lambda: Change(jnp.array([1]), jnp.zeros((1, 3), "float32")),
            "expected positions of a change as float64, like the cache's, got float32; cast them",
        ),
        (
            lambda: Change(jnp.array(1), jnp.zeros((1, 3))),
            r"expected index as int\[K\], got int64\[\]; give the atoms that change",
        ),
        (
            lambda: Change(jnp.array([1.0]), jnp.zeros((1, 3))),
            r"expected index as int\[K\], got float64\[1\]; give the atoms that change",
        ),
        (
            lambda: Change(jnp.array([1]), None, jnp.array([1.5])),
            r"expected atomic_numbers as int\[K\], got float64\[1\]",
        ),
    ],
)
def test_change_x_shapes_and_dtypes(change, text):
    local, graph, layout = chain()
    with pytest.raises(ValueError, match=text):
        local.update(local.full(graph, layout), change())


@pytest.mark.parametrize(
    "name, f, error, text",
    [
        (
            "init",
            lambda Z: jnp.ones(len(Z)),
            ValueError,
            r"expected \(6, features\) from init for 6 rows, got \(6,\); return a row for each row given",
        ),
        (
            "edge",
            lambda a, b, r: jnp.ones((1, 1)),
            ValueError,
            r"expected \(12, features\) from edge for 12 rows, got \(1, 1\)",
        ),
        (
            "readout",
            lambda a, s: s,
            ValueError,
            r"expected \(6,\) from readout for 6 rows, got \(6, 1\)",
        ),
        (
            "readout",
            lambda a, s: s.sum(),
            ValueError,
            r"expected \(6,\) from readout for 6 rows, got \(\)",
        ),
        (
            "edge",
            lambda a, b, r: (a, b),
            TypeError,
            "expected an array from edge, got a tuple; return one array",
        ),
    ],
)
def test_functions_x_what_they_return(name, f, error, text):
    _, graph, layout = chain()
    with pytest.raises(error, match=text):
        LocalPotential(**PLAIN | {name: f}, cutoff=1.0).full(graph, layout)


@pytest.mark.parametrize("f", [torch.nn.Linear(1, 1), torch.nn.functional, 3])
def test_functions_x_kind(f):
    with pytest.raises(
        TypeError,
        match="expected a JAX function as edge, got .*; wrap a torch callable by bridge.to_jax",
    ):
        LocalPotential(**PLAIN | {"edge": f}, cutoff=1.0)


@pytest.mark.parametrize("cutoff", [0, -1.0, float("nan")])
def test_cutoff_x_values(cutoff):
    with pytest.raises(ValueError, match="expected a cutoff above 0 Angstrom, got"):
        LocalPotential(**PLAIN, cutoff=cutoff)


def test_allocate_x_errors():
    local, graph, layout = chain()
    with pytest.raises(
        ValueError,
        match=r"expected one pbc for all graphs, got \(False, False, True\) and \(True, True, True\)",
    ):
        local.allocate(graph, graph | {"pbc": np.array([False, False, True])})
    with pytest.raises(
        ValueError, match="expected capacity of at least the 5 atoms given, got 4; raise it"
    ):
        local.allocate(graph, capacity=4)
    with pytest.raises(
        ValueError,
        match="expected at most 4 atoms, the layout's, got 5; allocate with capacity=5 or more",
    ):
        local.full(graph, replace(layout, atoms=4))
    with pytest.raises(
        ValueError, match="expected a layout inside of jit, vmap or scan, got None; make one before"
    ):
        jax.jit(lambda pos: local.full(graph | {"pos": pos}).energy)(graph["pos"])
    with pytest.raises(
        ValueError,
        match="expected a graph with pos and atomic_numbers, got no atomic_numbers; add what is missing",
    ):
        local.full({"pos": graph["pos"]}, layout)
    with pytest.raises(
        ValueError,
        match=r"expected the layout's pbc \(True, True, True\), got \(False, True, True\)",
    ):
        local.full(graph | {"pbc": np.array([False, True, True])}, layout)
