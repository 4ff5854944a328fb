"""kUPS's graphs as inputs of the contract and back, by stand-ins of kUPS's own types; kUPS itself:
tests/latest (make test-latest)."""

import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bridge
from jax_side.engines import kups as engine
from jax_side.potentials import potential as jax_potential
from jax_side.potentials import strain
from tests.graph_cases import CARD, CELL, CUTOFF, NUMBERS, POS, Embedded, brute, close

OTHER = POS[:3] + 0.1, 1.1 * CELL, NUMBERS[:3]
MODEL = bridge.jax_potential(Embedded())
ORDER = np.array([4, 0, 5, 1, 2, 6, 3])  # the atoms of two systems, shuffled


@dataclass
class Index:
    """Positions among keys; one beyond the last is padding."""

    keys: tuple
    indices: jax.Array

    @property
    def valid_mask(self):
        return self.indices < len(self.keys)

    def indices_in(self, keys):
        assert keys == self.keys
        return self.indices


def graph(pos, cells, numbers, system, pairs, shifts, periodic=(True, True, True)):
    """A kUPS graph, as far as the engine looks at one."""
    atoms, systems = tuple(range(len(pos))), tuple(range(len(cells)))
    data = SimpleNamespace(
        positions=jnp.asarray(pos),
        atomic_numbers=jnp.asarray(numbers),
        system=Index(systems, jnp.asarray(system)),
    )
    cell = SimpleNamespace(vectors=jnp.asarray(cells), periodic=periodic)
    return SimpleNamespace(
        particles=SimpleNamespace(keys=atoms, data=data),
        systems=SimpleNamespace(keys=systems, data=SimpleNamespace(cell=cell)),
        edges=SimpleNamespace(
            indices=Index(atoms, jnp.asarray(pairs)), shifts=jnp.asarray(shifts)[:, None]
        ),
    )


def shuffled(order=ORDER, systems=(0, 0, 0, 0, 1, 1, 1), unused=5, periodic=(True, True, True)):
    """Two systems whose atoms are in some order, edges with unused slots among them, and the sorted
    original."""
    pos, numbers = np.concatenate([POS, OTHER[0]]), np.concatenate([NUMBERS, OTHER[2]])
    cells, batch = np.stack([CELL, OTHER[1]]), np.array(systems)
    found = bridge.edges(CUTOFF, 800)(
        jnp.asarray(pos),
        jnp.asarray(cells),
        jnp.broadcast_to(jnp.array(periodic), (2, 3)),
        jnp.asarray(batch),
    )
    used = np.asarray(found["edge_index"][0]) < len(pos)
    place = np.argsort(order)
    pairs = place[np.asarray(found["edge_index"])[:, used].T]
    pairs = np.concatenate(
        [np.full((unused, 2), len(pos)), pairs, np.full((unused, 2), len(pos) + 3)]
    )
    shifts = np.concatenate(
        [
            np.ones((unused, 3), int),
            np.asarray(found["cell_offsets"])[used],
            np.zeros((unused, 3), int),
        ]
    )
    return graph(pos[order], cells, numbers[order], batch[order], pairs, shifts, periodic)


def alone(pos, cell, numbers):
    energy, (g, G) = jax.jit(lambda r, h: jax.value_and_grad(brute, (0, 1))(r, h, numbers))(
        pos, cell
    )
    return energy, g, G


def evaluate(graph, model=MODEL, **options):
    return engine.evaluate(model, SimpleNamespace(graph=graph, parameters=None), **options)


@pytest.mark.matrix
@pytest.mark.parametrize(
    "order", [np.arange(7), ORDER, np.arange(7)[::-1]], ids=["sorted", "shuffled", "reversed"]
)
def test_values_x_order(order, maybe_jit):
    """Energies by system and gradients in kUPS's order, whatever that is."""
    given = shuffled(order)
    energy, g, G = maybe_jit(lambda pos: evaluate(with_positions(given, pos)))(
        given.particles.data.positions
    )
    (e0, g0, G0), (e1, g1, G1) = alone(POS, CELL, NUMBERS), alone(*OTHER)
    close(
        (energy, g, G), (jnp.stack([e0, e1]), jnp.concatenate([g0, g1])[order], jnp.stack([G0, G1]))
    )


def with_positions(graph, pos):
    data = SimpleNamespace(**vars(graph.particles.data) | {"positions": pos})
    return SimpleNamespace(
        **vars(graph) | {"particles": SimpleNamespace(keys=graph.particles.keys, data=data)}
    )


def test_values_x_padding():
    """A particle of no system has no energy, no gradient and no part in the others', be its
    position a number or not."""
    whole = shuffled()
    system = whole.particles.data.system
    # the last is one of the first system
    system.indices = jnp.where(jnp.arange(7) == 6, 2, system.indices)
    energy, g, G = evaluate(
        with_positions(whole, whole.particles.data.positions.at[6].set(jnp.nan))
    )
    (e0, g0, _), (e1, g1, G1) = alone(POS[:3], CELL, NUMBERS[:3]), alone(*OTHER)
    close((energy, G[1]), (jnp.stack([e0, e1]), G1))
    close(g, jnp.concatenate([g0, jnp.zeros((1, 3)), g1])[ORDER])


def test_inputs_x_contract():
    given, place = engine.inputs(shuffled(periodic=(True, False, True)))
    assert bridge.Card(cutoff=CUTOFF, neighbor_list="given").check_bound(given, "kUPS") is None
    assert (
        given["pbc"].tolist() == [[True, False, True]] * 2
        and given["batch"].tolist() == [0] * 4 + [1] * 3
    )
    close(given["pos"][place], shuffled().particles.data.positions)
    used = np.asarray(given["edge_index"]) < 7
    assert (
        (used[0] == used[1]).all()
        and (~used[0]).sum() == 10
        and (np.asarray(given["edge_index"])[~used] == 7).all()
    )
    assert {str(given[k].dtype) for k in ("batch", "edge_index", "cell_offsets")} == {"int32"}


def test_values_x_kinds():
    """An energy of bridge.potential goes by its model and extras, its atoms are kUPS's; a JAX model
    needs no card."""

    def charged(x):
        return brute_batch(x) + x["charge"]

    want, model = evaluate(shuffled())[0], strain.with_gradients(charged)
    bound = jax_potential.potential(
        model,
        atomic_numbers=np.ones(1, int),
        batch=np.zeros(1, int),
        n_systems=2,
        charge=np.array([1.0, 2.0]),
    )
    given = shuffled()
    close(jax.jit(lambda: evaluate(given, bound)[0])(), want + np.array([1, 2]))
    close(
        jax.jit(
            lambda: evaluate(given, model, extras=lambda inp: {"charge": jnp.array([3.0, 4.0])})[0]
        )(),
        want + np.array([3, 4]),
    )


def brute_batch(x):
    (first, second) = (
        brute(x["pos"][a:b], x["cell"][k], n)
        for k, (a, b, n) in enumerate([(0, 4, NUMBERS), (4, 7, OTHER[2])])
    )
    return jnp.stack([first, second])


def positions_only(inputs):
    return {name: MODEL(inputs)[name] for name in ("energy", "position_gradients")}


def test_values_x_gradients():
    """Gradients that aren't asked for needn't be there."""
    energy, g, G = evaluate(shuffled(), positions_only, gradients="positions")
    assert G is None
    close((energy, g), evaluate(shuffled())[:2])


SINGLE = bridge.jax_potential(Embedded(card=replace(CARD, dtype="float32", device="cpu")))
WRONG = {
    "no cell gradients": (
        positions_only,
        shuffled(),
        "expected the outputs energy, position_gradients, cell_gradients, got only energy, "
        "position_gradients",
    ),
    "dtype": (SINGLE, shuffled(), "expected pos as float32, the model's dtype, got float64"),
    "charge": (
        bridge.jax_potential(
            Embedded(card=replace(CARD, required_inputs=CARD.required_inputs | {"charge"}))
        ),
        shuffled(),
        "got no charge",
    ),
    "periodic": (
        bridge.jax_potential(Embedded(card=replace(CARD, needs_pbc=True))),
        shuffled(periodic=(False,) * 3),
        "expected a periodic system for",
    ),
    "open": (
        bridge.jax_potential(Embedded(card=replace(CARD, supports_pbc=False))),
        shuffled(),
        "expected open boundaries",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_x_text(name):
    model, given, text = WRONG[name]
    with pytest.raises(ValueError, match=text):
        evaluate(given, model)


def test_kups_x_absent(monkeypatch):
    """Without kUPS: the pip line, and which Python it wants."""
    monkeypatch.setitem(sys.modules, "kups", None)
    for make in (engine.model, lambda model: engine.build(model, None)):
        with pytest.raises(
            ImportError,
            match="expected the package 'kups' for potentials in kUPS, on Python 3.12 or later, .*pip install kups",
        ):
            make(MODEL)


@pytest.mark.parametrize("call, error, text", [
    (lambda: engine.model(3), TypeError, "expected a JAX model of the contract, or an energy of bridge.potential, got int; pass bridge.jax_potential"),
    (lambda: engine.model(MODEL, gradients="cell"), ValueError, "expected gradients"),
    (lambda: engine.model(MODEL, gradients="positions", filter=3), ValueError, 'expected gradients="positions and cell" with a filter'),
    (lambda: engine.build(positions_only, None), ValueError, "expected a cutoff in Angstrom, by the card or by cutoff=, got none"),
    (lambda: engine.build(bridge.jax_potential(Embedded()), None, cutoff=2.5), ValueError, "expected a cutoff of at least 3 Angstrom, the potential's, got 2.5; leave"),
])  # fmt: skip
def test_arguments_x_text(call, error, text, monkeypatch):
    core = SimpleNamespace()
    monkeypatch.setattr(engine, "_kups", lambda: (core, core))
    with pytest.raises(error, match=text):
        call()


def test_equality_x_arguments(monkeypatch):
    """Equal for equal arguments: kUPS compiles once."""
    monkeypatch.setattr(engine, "_kups", lambda: (None, None))
    model = Embedded()
    first, again = (engine.model(bridge.jax_potential(model)) for _ in range(2))
    assert first == again and hash(first) == hash(again)
    assert first != engine.model(
        bridge.jax_potential(model), gradients="positions"
    ) and first != engine.model(bridge.jax_potential(Embedded()))
