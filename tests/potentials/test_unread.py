"""Potentials as they run on a GPU, where a step reads no value: here on the CPU, under a mode that
refuses to read; errors that are raised later; what has to read all the same."""

import jax
import jax.numpy as jnp
import pytest
import torch

import bridge
from benchmarks.gpu_steps import as_on_a_gpu
from bridge.card import Card
from tests.graph_cases import CUTOFF, NUMBERS, H, R, brute, close, embedded
from tests.potentials.test_native_potentials import (
    BOUND,
    CELLS,
    DERIVED,
    EDGES,
    GIVEN,
    INPUTS,
    MODEL,
    POSITIONS,
    energy,
    pure,
)
from torch_side.calls import late
from torch_side.potentials import graph
from torch_side.potentials.model import Wrapped

ONE = bridge.potential(MODEL, atomic_numbers=NUMBERS, pbc=True, lane="ffi")
FEW = bridge.edges(CUTOFF, 120)(R, H)
TOUCHING = R.at[1].set(R[0])


@pytest.fixture
def ahead():
    """Calls run as on a GPU, where reading a value is an error."""
    with as_on_a_gpu():
        yield


@pytest.fixture
def reading():
    """Calls run as on a GPU, and may read."""
    with as_on_a_gpu(refusing=False):
        yield


@pytest.mark.parametrize("name", DERIVED)
def test_no_value_is_read(ahead, name):
    of = DERIVED[name]
    close(jax.jit(of(energy("ffi")))(POSITIONS, CELLS), of(pure)(POSITIONS, CELLS))
    late.check()


def test_an_error_is_raised_by_a_later_call(ahead):
    """Until then all results are NaN."""
    step = jax.jit(jax.value_and_grad(ONE))
    fine = step(R, H, **FEW)
    found = jax.block_until_ready(step(TOUCHING, H, **FEW))
    assert all(jnp.isnan(x).all() for x in found)
    with pytest.raises(
        Exception, match="atoms apart from one another, got atoms (0 and 1|1 and 0) "
    ):
        jax.block_until_ready(step(R, H, **FEW))
    close(step(R, H, **FEW), fine)  # it is raised once


def test_raising_waits_for_it(ahead):
    step = jax.jit(jax.grad(ONE))
    with pytest.raises(ValueError, match="finite positions, got") as error, bridge.raising():
        step(R.at[2, 1].set(jnp.inf), H, **FEW)
    assert "an earlier call of" in error.value.__notes__[0]
    with bridge.raising():
        step(R, H, **FEW)


def test_the_first_of_a_scan_is_raised(ahead):
    """What came after it came of it."""
    energy = lambda r: ONE(r, H, **FEW)
    step = lambda r, _: (r - 1e-3 * jax.grad(energy)(r), None)
    scan = jax.jit(lambda r: jax.lax.scan(step, r, length=5))
    told = pytest.raises(ValueError, match=r"finite positions, got \(nan, .*for atom 1")
    with told, bridge.raising():
        scan(R.at[1, 0].set(jnp.nan))


def test_an_eager_call_raises_at_once(ahead):
    with pytest.raises(ValueError, match="atoms (0 and 1|1 and 0) of system 0"):
        ONE.check(TOUCHING, H, **FEW)
    ONE.check(R, H, **FEW)


def test_calls_that_read(reading):
    """Edges that are not given, no atoms, a model that vouches for nothing."""
    want = brute(R, H, NUMBERS)
    own = Wrapped(embedded, Card(cutoff=CUTOFF, neighbor_list="own", batches=True), "autograd")
    found = bridge.potential(own, atomic_numbers=NUMBERS, pbc=True, lane="ffi")
    close(jax.jit(found)(R, H), want)
    alone = lambda x: {"energy": embedded(x)["energy"].sum()[None]}  # one system and no more
    for card in (Card(cutoff=CUTOFF, neighbor_list="given"), None):
        cutoff = None if card else CUTOFF
        model = bridge.potential(
            alone, atomic_numbers=NUMBERS, pbc=True, gradients="autograd", card=card, cutoff=cutoff
        )
        close(jax.jit(model)(R, H, **FEW), want)
    nothing = {key: INPUTS[key][:0] for key in ("atomic_numbers", "batch")}
    empty = bridge.potential(MODEL, n_systems=3, lane="ffi", pbc=BOUND["pbc"], **nothing)
    edges = {key: x.at[:].set(0) if key == "cell_offsets" else x for key, x in EDGES.items()}
    assert not jax.jit(empty)(POSITIONS[:0], CELLS, **edges).any()
    late.check()


def test_a_model_that_refuses_reads(reading):
    """It is asked once, and what it had noted is gone."""
    calls = []

    def model(inputs):
        calls.append(len(inputs["cell"]))
        if len(inputs["cell"]) > 1:
            raise NotImplementedError("one system alone")
        return embedded(inputs)

    wrapped = Wrapped(model, GIVEN, "autograd")
    bound = bridge.potential(wrapped, atomic_numbers=NUMBERS, pbc=True, lane="ffi")
    step = jax.jit(jax.value_and_grad(bound))
    for _ in range(3):
        close(step(R, H, **FEW)[0], brute(R, H, NUMBERS))
    assert calls.count(2) == 1 and calls.count(1) >= 3 and wrapped in graph._reads
    with pytest.raises(Exception, match="atoms (0 and 1|1 and 0) of system 0"):
        jax.block_until_ready(step(TOUCHING, H, **FEW))


def test_gradients_without_a_graph(reading):
    """Their derivative would be zero."""

    def model(inputs):
        pos = inputs["pos"].detach().requires_grad_()
        with torch.enable_grad():
            (g,) = torch.autograd.grad((pos**4).sum(), pos)
        energy = inputs["pos"].new_zeros(len(inputs["cell"]))
        energy = energy.index_add(0, inputs["batch"], (inputs["pos"] ** 4).sum(1))
        return {
            "energy": energy,
            "position_gradients": g,
            "cell_gradients": torch.zeros_like(inputs["cell"]),
        }

    bound = bridge.potential(
        model, atomic_numbers=NUMBERS, card=Card(batches=True), gradients="model", lane="ffi"
    )
    close(jax.jit(jax.grad(bound))(R), 4 * R**3)
    with pytest.raises(Exception, match="position_gradients of .* that can be differentiated"):
        jax.block_until_ready(jax.jit(jax.hessian(bound))(R))
