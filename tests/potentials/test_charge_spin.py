"""A charge or spin that a potential has no use for is an error, unless it is zero; never passed
over."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from ase import Atoms

import bridge
from bridge.card import Card, shared_out
from jax_side.engines import ase as in_jax
from jax_side.engines import kups
from jax_side.montecarlo.local import LocalPotential
from jax_side.potentials import potential as jax_side_potential
from jax_side.potentials.direct import direct
from jax_side.potentials.strain import with_gradients
from tests.adapters import MODELS
from tests.engines.test_kups_engine import shuffled
from tests.model_cases import inputs
from torch_side.engines import ase as in_torch
from torch_side.engines import torch_sim
from torch_side.potentials.committee import Committee
from torch_side.potentials.model import Wrapped

R = jnp.array([[0.0, 0, 0], [1, 0, 0]])
NUMBERS = np.array([1, 1])
PLAIN = Card(batches=True)
ION = Card(optional_inputs={"charge"}, batches=True)


def spring(x):
    energy = x["pos"].new_zeros(len(x["cell"])).index_add(0, x["batch"], (x["pos"] ** 2).sum(-1))
    return energy * (1 + x["charge"]) if "charge" in x else energy


def structure(systems=1):
    n = 2 * systems
    return {
        "pos": torch.arange(3.0 * n, dtype=torch.float64).reshape(n, 3),
        "cell": torch.zeros(systems, 3, 3, dtype=torch.float64),
        "pbc": torch.zeros(systems, 3, dtype=torch.bool),
        "batch": torch.arange(n) // 2,
        "atomic_numbers": torch.ones(n, dtype=torch.int64),
    }


def text(name, value, who=".*", system=0):
    return rf"expected no {name}, or zero, since {who} has no use for one, got {name} {value} in system {system}; leave it out, .*optional_inputs={{'{name}'}}"


@pytest.mark.parametrize("key", ["charge", "spin"])
@pytest.mark.parametrize("name", MODELS)
def test_error_x_adapters(name, key):
    case = MODELS[name]
    model = case.build(case.dtype)
    atoms = next(iter(case.systems.values()))
    given = inputs(atoms, atoms, dtype=case.dtype)
    want = model(given)["energy"]
    zero = torch.zeros(2, dtype=case.dtype)
    torch.testing.assert_close(model(given | {key: zero})["energy"], want)
    own = name == "torchani" and key == "charge"  # it takes a charge, and has an error of its own
    with pytest.raises(ValueError, match="neutral systems" if own else text(key, 2, system=1)):
        model(given | {key: zero + torch.tensor([0, 2])})


WAYS = {
    "bound": lambda model, value: bridge.potential(model, atomic_numbers=NUMBERS, charge=value),
    "bound, by a card": lambda model, value: bridge.potential(spring, atomic_numbers=NUMBERS, charge=value, card=PLAIN, gradients="autograd"),
    "in the call": lambda model, value: bridge.potential(model, atomic_numbers=NUMBERS)(R, charge=value),
    "jit": lambda model, value: jax.block_until_ready(jax.jit(lambda q: bridge.potential(model, atomic_numbers=NUMBERS)(R, charge=q))(value)),
    "jax potential": lambda model, value: jax_side_potential.potential(with_gradients(lambda x: (x["pos"] ** 2).sum()[None]), atomic_numbers=NUMBERS, charge=value, card=PLAIN),
    "torch": lambda model, value: model(structure() | {"charge": torch.tensor(np.array(value))}),
    "jax model in torch": lambda model, value: Wrapped(bridge.torch_potential(lambda x: (x["pos"] ** 2).sum()[None], gradients="autodiff"), PLAIN, "model")(
        structure() | {"charge": torch.tensor(np.array(value))}
    ),
    "committee": lambda model, value: Committee([model, model], vmap=False)(structure() | {"charge": torch.tensor(np.array(value))}),
    "sum": lambda model, value: (model + model)(structure() | {"charge": torch.tensor(np.array(value))}),
}  # fmt: skip


def carded(energies, card):
    """A JAX model that carries its card."""
    whole = with_gradients(energies)

    def model(x):
        return whole(x)

    model.card = card
    return model


def springs(x):
    return jax.ops.segment_sum((x["pos"] ** 2).sum(-1), x["batch"], num_segments=len(x["cell"]))


PURE = carded(springs, PLAIN)
CHARGED = carded(lambda x: springs(x) * (1 + x["charge"]), ION)
IN_TORCH = bridge.torch_potential(PURE, card=PLAIN)
LOCAL = LocalPotential(
    lambda z: jnp.ones((len(z), 1)),
    lambda a, b, r: (r**2).sum(-1, keepdims=True),
    lambda a, s: s[:, 0],
    6.0,
)
EDGES = {
    "edge_index": jnp.array([[0, 1, 2, 3], [1, 0, 3, 2]]),
    "cell_offsets": jnp.zeros((4, 3), int),
}


def arrays(charge):
    """As many systems of two atoms as there are charges."""
    return {name: jnp.asarray(x.numpy()) for name, x in structure(len(charge)).items()} | {
        "charge": charge
    }


def tensors(charge):
    return structure(len(charge)) | {"charge": torch.tensor(np.array(charge))}


def in_kups(charge, graph):
    return kups.evaluate(
        PURE,
        SimpleNamespace(graph=graph, parameters=charge),
        extras=lambda inp: {"charge": inp.parameters},
    )


WAYS |= {
    "jax, in the call": lambda model, value: jax_side_potential.potential(
        PURE, atomic_numbers=NUMBERS
    )(R, charge=value),
    "direct": lambda model, value: direct(PURE)(arrays(value)),
    "direct, in a sum": lambda model, value: (2 * direct(PURE) + direct(PURE))(arrays(value)),
    "local": lambda model, value: LOCAL(arrays(value) | EDGES),
    "kups": lambda model, value: in_kups(jnp.append(value, 0.0), shuffled()),
    "torch_potential": lambda model, value: IN_TORCH(tensors(value)),
    "torch_potential, in a sum": lambda model, value: (IN_TORCH + model)(tensors(value)),
    "torch_sim": lambda model, value: torch_sim.model(model, charge=float(value[0])),
}


@pytest.mark.parametrize("way", WAYS)
def test_error_x_ways(way):
    model = Wrapped(spring, PLAIN, "autograd")
    WAYS[way](model, jnp.zeros(1))
    with pytest.raises(ValueError, match=text("charge", -1)), bridge.raising():
        WAYS[way](model, jnp.array([-1.0]))


def energy_of_two(**options):
    return jax_side_potential.potential(
        PURE, atomic_numbers=np.ones(4, int), batch=np.arange(4) // 2, n_systems=2, **options
    )


def in_call(charge):
    energy = lambda r: energy_of_two()(r, charge=charge)
    r = jnp.asarray(structure(2)["pos"].numpy())
    return energy(r), jax.grad(lambda r: energy(r).sum())(r)


def in_bound(charge):
    energy, r = energy_of_two(charge=charge), jnp.asarray(structure(2)["pos"].numpy())
    return energy(r), energy.outputs(r)["position_gradients"]


def in_direct(charge):
    out = (direct(PURE) + direct(PURE))(arrays(charge))
    return out.total_energies, out.gradients.positions


def in_local(charge):
    out = with_gradients(LOCAL)(arrays(charge) | EDGES)
    return out["energy"], out["position_gradients"]


def in_engine(charge):
    energy, g, _ = in_kups(charge, GRAPH)
    return energy, g


GRAPH = shuffled()  # of two systems, the first of four atoms
TRACED = {
    "in the call": in_call,
    "bound": in_bound,
    "direct": in_direct,
    "local": in_local,
    "kups": in_engine,
}
CHARGED_ATOMS = {"kups": np.asarray(GRAPH.particles.data.system.indices) == 1}


@pytest.mark.parametrize("way", TRACED)
def test_traced_x_ways(way):
    """Nobody sees the value while it is traced: energy and gradients are NaN in those systems, and
    in no other."""
    run = jax.jit(TRACED[way])
    energy, g = run(jnp.zeros(2))
    assert jnp.isfinite(energy).all() and jnp.isfinite(g).all()
    energy_2, g_2 = run(jnp.array([0.0, 2.0]))
    wrong = CHARGED_ATOMS.get(way, np.arange(4) >= 2)
    np.testing.assert_array_equal(energy_2, np.where([False, True], np.nan, energy))
    np.testing.assert_array_equal(g_2, np.where(wrong[:, None], np.nan, g))


def test_no_charge_in_direct():
    """None is no charge."""
    run = jax.jit(
        lambda pos: direct(PURE)(arrays(jnp.zeros(1)) | {"pos": pos, "charge": None}).total_energies
    )
    assert run(R) == 1


def test_traced_in_torch():
    def energy(q):
        return IN_TORCH(structure(2) | {"charge": q})["energy"]

    charges = torch.tensor([[0.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    plain = IN_TORCH(structure(2))["energy"]
    want = torch.stack([plain, torch.where(charges[1] == 0, plain, torch.nan)])
    torch.testing.assert_close(
        torch.func.vmap(energy)(charges), want, equal_nan=True, rtol=0, atol=0
    )


def test_info_x_banks():
    """ASE: atoms.info is read where the model has a use for it, or nobody has said; elsewhere it is
    a note of someone else's."""
    atoms = Atoms("H2", np.asarray(R), info={"charge": 2})
    told = [in_torch.calculator(Wrapped(spring, ION, "autograd")), in_jax.calculator(CHARGED)]
    untold = in_jax.calculator(with_gradients(lambda x: springs(x) * (1 + x["charge"])))
    plain = [in_torch.calculator(Wrapped(spring, PLAIN, "autograd")), in_jax.calculator(PURE)]
    for calculators, want in ((told, 3), ([untold], 3), (plain, 1)):
        for atoms.calc in calculators:
            assert atoms.get_potential_energy() == want
    atoms.info["charge"] = "a cation"
    for atoms.calc in [*told, untold]:
        with pytest.raises(
            ValueError,
            match=r"expected a number as atoms.info\['charge'\], got 'a cation'; set one, or take it out",
        ):
            atoms.get_potential_energy()


def test_direct_x_sums():
    """The term that uses a charge gets it, the other is not asked to."""
    want = 4 * springs(arrays(jnp.zeros(1)))
    for total in (
        direct(CHARGED) + direct(PURE),
        direct(PURE) + 1.0 * direct(CHARGED),
        direct(PURE) + (direct(CHARGED) + direct(PURE).scaled(0.0)),
    ):
        np.testing.assert_array_equal(total(arrays(jnp.array([2.0]))).total_energies, want)


def test_a_model_that_nobody_described_gets_what_is_given():
    """Without a card it may use a charge, and here it does."""
    energy = bridge.potential(
        spring, atomic_numbers=NUMBERS, charge=jnp.array([2.0]), gradients="autograd"
    )
    assert (
        energy(R)
        == 3 * bridge.potential(spring, atomic_numbers=NUMBERS, gradients="autograd")(R)
        == 3
    )
    pure = lambda x: (x["pos"] ** 2).sum()[None] * (1 + x["charge"])
    assert (
        jax_side_potential.potential(
            with_gradients(pure), atomic_numbers=NUMBERS, charge=jnp.array([2.0])
        )(R)
        == 3
    )


def test_values_x_sums():
    """The term that uses a charge gets it, the other is not asked to."""
    one, other = (
        Wrapped(spring, ION, "autograd"),
        Wrapped(lambda x: spring({k: v for k, v in x.items() if k != "charge"}), PLAIN, "autograd"),
    )
    given = structure() | {"charge": torch.tensor([2.0], dtype=torch.float64)}
    want = 4 * spring(structure())
    torch.testing.assert_close((one + other)(given)["energy"], want)
    bound = [
        bridge.potential(m, atomic_numbers=NUMBERS, charge=jnp.array([2.0]))
        for m in (one, one + other)
    ]
    assert bound[0](R) == 3 and bound[1](R) == 4
    separate = bridge.potential(one, atomic_numbers=NUMBERS) + bridge.potential(
        other, atomic_numbers=NUMBERS
    )
    assert separate(R, charge=jnp.array([2.0])) == 4


def test_what_each_term_is_given():
    given = {"pos": 1, "charge": 2, "spin": 3}
    both = Card(optional_inputs={"charge", "spin"})
    assert shared_out(given, [ION, PLAIN]) == [
        {"pos": 1, "charge": 2, "spin": 3},
        {"pos": 1, "spin": 3},
    ]
    assert shared_out(given, [both, PLAIN]) == [given, {"pos": 1}]
    assert shared_out(given, [PLAIN, PLAIN]) == [given, given]
