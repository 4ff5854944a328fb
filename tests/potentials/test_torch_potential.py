"""bridge.torch_potential: a JAX potential as a torch module of the contract, by one JAX call,
differentiable as torch is."""

import copy
import pickle
import sys
from functools import cache

import jax
import jax.numpy as jnp
import pytest
import torch

import bridge
from jax_side.calls import programs
from tests.potential_cases import (
    CUTOFF,
    PARAMS,
    bonds,
    check_autograd,
    check_gradients,
    check_outputs,
    check_second_derivatives,
    check_training,
    close,
    crystal,
    lattice,
    pair,
    potentials,
)

NAMES = pytest.mark.parametrize("name", ["pair", "bonds"])


@NAMES
def test_outputs_x_two_systems(name):
    check_outputs(name, 2)


@NAMES
def test_gradients_x_finite_differences_and_autograd(name):
    check_gradients(name)
    check_autograd(potentials(name)[1], crystal())


def test_second_derivatives_x_double_backward_and_torch_func():
    """Without edges: tests/models/test_jax_models.py."""
    check_second_derivatives("bonds", potentials("bonds")[0])


@NAMES
def test_gradients_x_loss_on_forces(name):
    check_training(name)


@pytest.fixture
def calls(monkeypatch):
    """Runs of XLA programs, for modules made from here on."""
    made, seen = programs.Program.__init__, []

    def init(self, *args):
        made(self, *args)
        jitted = self._jitted
        self._jitted = lambda *groups: seen.append(self) or jitted(*groups)

    monkeypatch.setattr(programs.Program, "__init__", init)
    return seen


def test_one_jax_call_x_evaluation(calls):
    module, inputs = bridge.torch_potential(pair, PARAMS, gradients="autodiff"), crystal()
    with torch.no_grad():
        for n in (1, 2, 3):
            module(inputs | {"pos": inputs["pos"] + n})
            assert len(calls) == n and module.compilations == 1
    inputs["pos"].requires_grad_()
    for n in (1, 2):
        out = module(inputs)
        assert len(calls) == 3 + 2 * n - 1
        (out["energy"].sum() + out["position_gradients"].square().sum()).backward()
        assert len(calls) == 3 + 2 * n and module.compilations == 3


WIDE = bridge.Buckets(
    {"edge_index": "2 E", "cell_offsets": "E 3"}, fill={"edge_index": 99}, growth=4
)


def of_edges(buckets):
    return bridge.torch_potential(
        bonds, PARAMS, gradients="autodiff", cutoff=CUTOFF, buckets=buckets
    ).requires_grad_(False)


@cache
def twelve_numbers_of_edges():
    """(inputs, what a module gives that pads nothing) of crystals of several volumes."""
    plain, inputs = of_edges(False), crystal()
    several = [
        inputs | {name: (1 + 0.03 * k) * inputs[name] for name in ("pos", "cell")}
        for k in range(12)
    ]
    outputs = [plain(x) for x in several]
    assert 8 < plain.compilations <= 12
    return list(zip(several, outputs))


@pytest.mark.parametrize(
    "buckets, most", [pytest.param(None, 6, marks=pytest.mark.full), (WIDE, 3)]
)
def test_programs_x_numbers_of_edges(buckets, most):
    padded = of_edges(buckets)
    for inputs, outputs in twelve_numbers_of_edges():
        for key, x in padded(inputs).items():
            torch.testing.assert_close(x, outputs[key], rtol=1e-12, atol=1e-12)
    assert padded.compilations <= most


def test_a_batch_x_its_systems():
    module, inputs = potentials("bonds")[1], crystal(2)
    out = module(inputs)
    for s in (0, 1):
        own = inputs["batch"] == s
        one = {
            k: x[own] if k in ("pos", "atomic_numbers") else x[s : s + 1]
            for k, x in inputs.items()
            if k != "batch"
        }
        single = module(one | {"batch": torch.zeros(8, dtype=torch.int64)})
        close(out["energy"][s], single["energy"][0])
        close(out["position_gradients"][own], single["position_gradients"])
        close(out["cell_gradients"][s], single["cell_gradients"][0])


def test_small_cells_and_open_boundaries():
    module, cell = potentials("bonds")[1], 0.43 * crystal()["cell"][0]
    close(module(lattice(cell, 3))["energy"], 27 * module(lattice(cell))["energy"])
    slab = lattice(cell, 2) | {"pbc": torch.tensor([[True, True, False]])}
    close(
        module(slab | {"cell": slab["cell"] * torch.tensor([1.0, 1, 7])[:, None]})["energy"],
        module(slab)["energy"],
    )
    alone = lattice(cell) | {
        "pbc": torch.zeros(1, 3, dtype=torch.bool),
        "cell": torch.zeros(1, 3, 3, dtype=torch.float64),
    }
    assert not module(alone)["position_gradients"].any()  # no edges at all


def test_neighbours_x_torch_func():
    """The list is made of the values beneath grad and jvp; under vmap over positions there are
    none."""
    module, inputs = potentials("bonds")[1], crystal()
    energy = lambda pos: module(inputs | {"pos": pos})["energy"].sum()
    close(torch.func.grad(energy)(inputs["pos"]), module(inputs)["position_gradients"])
    close(
        torch.func.hessian(energy)(inputs["pos"]),
        torch.autograd.functional.hessian(energy, inputs["pos"]),
        1e-9,
    )
    with pytest.raises(
        ValueError, match="a batch of them under torch.func.vmap; make the edges outside"
    ):
        torch.func.vmap(energy)(inputs["pos"][None])


def given(params, inputs):
    """gradients="model": an energy that JAX can't differentiate in pos, with the gradients beside
    it; linear in k."""
    pos, fixed = inputs["pos"], jax.lax.stop_gradient(inputs["pos"])
    energy = params["k"] * jax.ops.segment_sum(
        (fixed**2).sum(-1), inputs["batch"], num_segments=len(inputs["cell"])
    )
    gradients = {
        "position_gradients": 2 * params["k"] * pos,
        "cell_gradients": jnp.zeros_like(inputs["cell"]),
    }
    return {"energy": energy, **gradients, "numbers": inputs["atomic_numbers"]}


def test_the_models_own_gradients_are_those_of_its_energy():
    module, inputs = bridge.torch_potential(given, {"k": jnp.array(2.0)}), crystal(2)
    pos, k = inputs["pos"].requires_grad_(), module.get_parameter("model.k")
    out, weights = module(inputs), torch.tensor([1.0, 3.0])
    g, dk = torch.autograd.grad((out["energy"] * weights).sum(), (pos, k), create_graph=True)
    close(g, 4 * weights[inputs["batch"]][:, None] * pos)
    close(dk, (weights[inputs["batch"]][:, None] * pos**2).sum())
    close(torch.autograd.grad(g.sum(), k)[0], (2 * weights[inputs["batch"]][:, None] * pos).sum())
    assert out["numbers"].tolist() == inputs["atomic_numbers"].tolist()


def test_copies_pickles_and_names():
    module, inputs = (
        bridge.torch_potential(bonds, PARAMS, gradients="autodiff", cutoff=CUTOFF),
        crystal(),
    )
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert (
            torch.equal(twin(inputs)["energy"], module(inputs)["energy"]) and twin.cutoff == CUTOFF
        )
    assert [n for n, _ in module.named_parameters()] == [
        "model.a",
        "model.e",
    ] and "cutoff=3.5" in repr(module)


def test_without_x64_integers_may_be_int64():
    with jax.enable_x64(False):
        module = bridge.torch_potential(
            bonds,
            {k: v.astype("float32") for k, v in PARAMS.items()},
            gradients="autodiff",
            cutoff=CUTOFF,
        )
        assert module(crystal(dtype=torch.float32))["position_gradients"].dtype == torch.float32
        with pytest.raises(ValueError, match="x64 is off"):
            module(crystal())


ERRORS = {
    "no pbc": (dict(pbc=None), "got no pbc"),
    "cell": (dict(cell=torch.eye(3, dtype=torch.float64)), "expected cell as float"),
    "dtype": (
        dict(cell=torch.eye(3)[None]),
        "one dtype for pos and cell, got pos float64 and cell float32",
    ),
    "edges": (
        dict(edge_index=torch.zeros(3, 2, dtype=torch.int64)),
        r"expected edge_index as int\[2,E\]",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_inputs_outside_the_contract_are_refused(case):
    change, text = ERRORS[case]
    with pytest.raises(ValueError, match=text):
        potentials("pair")[1](crystal() | change)


MODELS = {
    "no gradients": (
        lambda x: {"energy": x["pos"].sum()[None]},
        {},
        'cell_gradients from <lambda>, got energy; pass gradients="autodiff"',
    ),
    "no dict": (
        lambda x: x["pos"].sum()[None],
        {},
        'Tracer; pass gradients="autodiff" for a model that gives its energy alone',
    ),
    "a scalar": (
        lambda x: x["pos"].sum(),
        {"gradients": "autodiff"},
        r"expected energy as float\[1\], got float64\[\]",
    ),
    "no energy": (
        lambda x: {"e": x["pos"].sum()},
        {"gradients": "autodiff"},
        "expected the outputs energy, got only e",
    ),
    "gradients": (
        pair,
        {"gradients": "autograd"},
        "expected gradients as one of 'model', 'autodiff', got 'autograd'",
    ),
    "cutoffs": (
        bonds,
        {"cutoff": 3.0, "card": bridge.Card(cutoff=4.0, neighbor_list="own")},
        "expected one cutoff, got 3.0, and 4.0 on the card",
    ),
    "a mask": (
        bonds,
        {"buckets": bridge.Buckets({"edge_index": "2 E"}, mask={"E": "m"})},
        "expected buckets without a mask, got mask=",
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_models_outside_the_contract_are_refused(case):
    model, options, text = MODELS[case]
    with pytest.raises(ValueError, match=text):
        bridge.torch_potential(model, **options)(crystal())


def test_cutoff_x_without_vesin(monkeypatch):
    monkeypatch.setitem(sys.modules, "vesin", None)
    with pytest.raises(ImportError, match="pip install vesin"):
        potentials("bonds")[1](crystal())
