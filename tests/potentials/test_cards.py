"""What is not on the card is refused before anything runs; sums of potentials on both banks."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import bridge
from bridge.card import Card
from bridge.contract import OUTPUTS, output_shapes
from jax_side.potentials import strain
from jax_side.potentials.direct import direct
from jax_side.potentials.potential import potential
from tests.graph_cases import (
    CARD,
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
    system,
)
from torch_side.potentials.model import Model, Sum, Wrapped


class Charged(Model):
    """Springs between atoms and their charges, which it gives; it needs the total charge."""

    card = Card(
        outputs={"energy", "position_gradients", "cell_gradients", "charges", "dipole"},
        active_outputs={"energy", "position_gradients", "cell_gradients", "charges"},
        # fmt: skip
        required_inputs={"pos", "atomic_numbers", "cell", "pbc", "batch", "charge"},
        supports_pbc=False,
        elements={1, 6, 8, 14},
    )

    def energies(self, inputs):
        pos, batch, b = inputs["pos"], inputs["batch"], len(inputs["cell"])
        q = inputs["atomic_numbers"].to(pos.dtype) * inputs["charge"][batch]
        return {
            "energy": pos.new_zeros(b).index_add(0, batch, q * pos.square().sum(-1)),
            "charges": q,
            "dipole": pos.new_zeros(b, 3).index_add(0, batch, q[:, None] * pos),
        }


def refused(text, call, *args, kind=ValueError, **kwargs):
    seen.clear()
    with pytest.raises(kind, match=text):
        call(*args, **kwargs)
    assert not seen


def test_outputs_that_are_not_on_the_card():
    refused(
        r"outputs that this model has \(cell_gradients, energy, hessian, .*got charges; ask for these",
        bridge.potential,
        MODEL,
        atomic_numbers=NUMBERS,
        outputs=("charges",),
    )
    refused("outputs that this model has", Embedded().asking, "magmoms")
    refused("outputs of the contract .*got forces", Card, outputs={"energy", "forces"})
    refused("energy among the outputs, got charges", Card, outputs={"charges"})
    refused("outputs that this card has", Card, outputs={"energy"}, active_outputs={"charges"})


@pytest.mark.parametrize("under", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_elements_boundaries_inputs_and_dtypes(under):
    refused(
        r"one of the 89 elements of <?.*, got Lr \(Z = 103\) for atom 1 of system 0",
        bridge.potential,
        MODEL,
        atomic_numbers=np.array([1, 103]),
    )
    refused(
        r"open boundaries, which is all that .*got pbc \(True, True, False\) in system 0",
        bridge.potential,
        Charged(),
        atomic_numbers=NUMBERS,
        pbc=np.array([True, True, False]),
    )
    energy = bridge.potential(Charged(), atomic_numbers=NUMBERS)
    refused(
        "open boundaries, which is all that Charged has",
        under(lambda r, h: energy(r, h, charge=jnp.ones(1))),
        R,
        H,
    )
    refused(
        r"expected the inputs that Charged needs .*got no charge; pass charge=... \(total charge in e, passed on as given\)",
        under(energy),
        R,
    )
    needs = bridge.potential(
        Wrapped(embedded, dataclasses.replace(CARD, needs_pbc=True), "autograd"),
        atomic_numbers=NUMBERS,
    )
    refused(
        "expected a periodic system for embedded, got no periodic axis in system 0", under(needs), R
    )
    narrow = bridge.potential(
        Wrapped(embedded, dataclasses.replace(CARD, dtype="float32"), "autograd"),
        atomic_numbers=NUMBERS,
    )
    refused(
        "expected pos as float32, the model's dtype, got float64; cast pos and cell",
        under(narrow),
        R,
        H,
    )


def test_a_device_without_a_number_is_any_of_its_kind():
    for mine, given in (("cuda", "cuda:1"), ("cuda:1", "cuda:1"), (None, "cuda:0")):
        Card(device=mine).check_home(R, given)
    for mine, given in (("cuda:0", "cuda:1"), ("cpu", "cuda:0")):
        with pytest.raises(
            ValueError, match=f"expected pos on {mine}, the model's device, got {given}"
        ):
            Card(device=mine).check_home(R, given)


def test_second_derivatives_of_a_first_order_model():
    energy = bridge.potential(
        Wrapped(embedded, dataclasses.replace(CARD, derivative_order=1), "autograd"),
        atomic_numbers=NUMBERS,
    )
    close(
        jax.jit(jax.value_and_grad(energy, (0, 1)))(R, H),
        jax.value_and_grad(lambda r, h: brute(r, h, NUMBERS), (0, 1))(R, H),
    )
    close(energy.stress(R, H), bridge.potential(MODEL, atomic_numbers=NUMBERS).stress(R, H))
    refused(
        "first derivatives of .*derivative_order=1, got a second derivative; take finite",
        jax.jit(jax.hessian(energy)),
        R,
        H,
        kind=NotImplementedError,
    )


def test_a_charge_is_passed_on_and_extra_outputs_come_by_name():
    energy = bridge.potential(
        Charged(), atomic_numbers=NUMBERS, charge=jnp.array([0.5]), outputs=("dipole",)
    )
    out = jax.jit(energy.outputs)(R)
    q = 0.5 * NUMBERS
    close(out["charges"], q)
    close(out["dipole"], (q[:, None] * R).sum(0)[None])
    close(out["energy"][0], (q * (R**2).sum(-1)).sum())
    later = bridge.potential(Charged(), atomic_numbers=NUMBERS)
    close(jax.jit(lambda c: later(R, charge=c))(jnp.array([0.5])), out["energy"][0])
    assert set(out) == {"energy", "position_gradients", "cell_gradients", "charges", "dipole"}
    assert set(later.outputs(R, charge=jnp.array([1.0]))) == set(out) - {"dipole"}


def test_every_extra_output_crosses_with_its_shape():
    """A model that gives all of the contract's outputs; sizes of features and members are on the
    card."""
    shapes = output_shapes(4, 1, list(OUTPUTS), F=5, M=3)
    of = lambda x: output_shapes(len(x["pos"]), len(x["cell"]), list(OUTPUTS), F=5, M=3)
    give = lambda x: {k: x["pos"].new_full(s, 1.0 + i) for i, (k, s) in enumerate(of(x).items())}
    model = Wrapped(give, Card(outputs=shapes, sizes=(("F", 5), ("M", 3))), "model")
    energy = bridge.potential(model, atomic_numbers=NUMBERS, outputs=tuple(shapes))
    out = jax.jit(energy.outputs)(R)
    assert {k: x.shape for k, x in out.items()} == shapes and all(
        (x == 1.0 + i).all() for i, x in enumerate(out[k] for k in shapes)
    )
    many = jax.vmap(energy.outputs)(jnp.stack([R, R]))
    assert {k: x.shape for k, x in many.items()} == {k: (2, *s) for k, s in shapes.items()}
    assert all((x == out[k]).all() for k, x in many.items())


# Sums


def springs(card=Card(outputs={"energy", "position_gradients", "cell_gradients", "node_energies"})):
    """Each atom tied to the origin."""

    def energies(inputs):
        nodes = inputs["pos"].square().sum(-1)
        return {
            "energy": nodes.new_zeros(len(inputs["cell"])).index_add(0, inputs["batch"], nodes),
            "node_energies": nodes,
        }

    return Wrapped(energies, card, "autograd")


def test_a_sum_in_torch_is_the_sum_of_its_terms():
    a, b = Embedded(2.0).asking("node_energies"), springs()
    total, x = a + b, system()
    assert (
        isinstance(total, Sum)
        and total.card.cutoff == CUTOFF
        and total.card.active_outputs == a.card.active_outputs | b.card.active_outputs
    )
    out, first, second = total(x), a(x), b(x)
    assert set(out) == set(second)
    for name in second:
        close(out[name].detach(), (first[name] + second[name]).detach())
    assert len((total + springs()).terms) == 3
    energy = bridge.potential(total, atomic_numbers=NUMBERS)
    pure = lambda r, h: 2 * brute(r, h, NUMBERS) + (r**2).sum()
    close(jax.jit(jax.value_and_grad(energy, (0, 1)))(R, H), jax.value_and_grad(pure, (0, 1))(R, H))
    close(jax.jit(jax.hessian(energy))(R, H), jax.hessian(pure)(R, H), 1e-9)


def test_cutoffs_are_told_apart():
    """A list for the longer cutoff serves both; each term sees its own edges."""
    short = Embedded(card=dataclasses.replace(CARD, cutoff=2.5))
    energy = bridge.potential(Embedded() + short, atomic_numbers=NUMBERS)
    edges = bridge.edges(CUTOFF, 300)(R, H)
    alone = [bridge.potential(m, atomic_numbers=NUMBERS)(R, H) for m in (Embedded(), short)]
    close(energy(R, H, **edges), sum(alone))
    close(energy(R, H), sum(alone))
    seen.clear()
    energy(R, H, **edges)
    counts = [s["edge_index"][1] for s in seen]
    assert len(counts) == 2 and counts[0] > counts[1] > 0


def test_what_does_not_add_is_refused():
    refused(
        "outputs that all terms of a sum have, since they add, got hessian active in one",
        Embedded().asking("hessian").__add__,
        springs(),
    )
    refused(
        "expected outputs that add, .*got charges; ask one term for it",
        Charged().__add__,
        Charged(),
    )
    out = (springs() + Charged())(
        system(pbc=(False, False, False)) | {"charge": torch.ones(1, dtype=torch.float64)}
    )
    assert "node_energies" not in out and (out["charges"] == torch.tensor(NUMBERS)).all()
    refused(
        r"expected one units for all terms of a sum, got \(eV, Angstrom\) and \(Hartree, Bohr\)",
        springs().__add__,
        springs(Card(units=("Hartree", "Bohr"))),
    )
    refused(
        "expected one device for all terms of a sum, got cpu and cuda",
        springs(Card(device="cpu")).__add__,
        springs(Card(device="cuda")),
    )
    refused(
        "expected one dtype for all terms of a sum, got float32 and float64",
        springs(Card(dtype="float32")).__add__,
        springs(Card(dtype="float64")),
    )
    refused(
        "one that needs pbc and one that has none", Charged().__add__, springs(Card(needs_pbc=True))
    )
    with pytest.raises(TypeError):
        Embedded() + 1.0
    refused(
        "expected models of the contract as terms, got a function",
        Sum,
        [Embedded(), embedded],
        kind=TypeError,
    )


def test_the_card_of_a_sum():
    a = Card(
        cutoff=3.0,
        neighbor_list="own",
        receptive_field=6.0,
        elements={1, 6},
        derivative_order=1,
        sizes=(("F", 3),),
    )
    b = Card(
        cutoff=5.0, neighbor_list="given", receptive_field=5.0, elements={1, 8}, supports_pbc=False
    )
    both = a + b
    assert (
        both.cutoff,
        both.neighbor_list,
        both.receptive_field,
        both.elements,
        both.derivative_order,
    ) == (5.0, "given", 6.0, {1}, 1)
    assert (
        not both.supports_pbc
        and both.sizes == (("F", 3),)
        and (a + Card()).receptive_field is None
        and a + b == b + a
        and hash(both)
    )


def test_a_sum_of_energies_in_jax():
    """A torch potential and one in JAX, of the same atoms."""
    pure = strain.with_gradients(
        lambda x: jax.ops.segment_sum(
            (x["pos"] ** 2).sum(-1), x["batch"], num_segments=len(x["cell"])
        )
    )
    a, b = bridge.potential(MODEL, atomic_numbers=NUMBERS), potential(pure, atomic_numbers=NUMBERS)
    total = a + b
    close(
        jax.jit(jax.value_and_grad(total, (0, 1)))(R, H),
        jax.value_and_grad(lambda r, h: brute(r, h, NUMBERS) + (r**2).sum(), (0, 1))(R, H),
    )
    close(total.stress(R, H), a.stress(R, H) + b.stress(R, H))
    assert total == a + b and hash(total) == hash(a + b) and total.card.cutoff == CUTOFF
    refused(
        "energies of the same atoms as terms of a sum, got two that differ in atomic_numbers",
        a.__add__,
        potential(pure, atomic_numbers=NUMBERS[::-1]),
    )
    with pytest.raises(TypeError):
        a + 1.0


def test_a_sum_in_torch_of_torch_and_jax():
    pure = lambda x: jax.ops.segment_sum(
        (x["pos"] ** 2).sum(-1), x["batch"], num_segments=len(x["cell"])
    )
    a, b, x = MODEL, bridge.torch_potential(pure, gradients="autodiff"), system()
    total = a + b
    assert total.card.cutoff == CUTOFF and b.card == Card(
        optional_inputs={"charge", "spin", "field"}
    )
    for name, y in total(x).items():
        close(y, a(x)[name] + b(x)[name])
    assert abs(b(x)["position_gradients"]).max() > 0.1


def test_a_torch_model_as_a_jax_model_of_the_contract():
    """By its card jax_side.potentials.direct and jax_side.potentials.potential know what it has;
    equal for equal models, so that jit caches hit."""
    model = bridge.jax_potential(MODEL, outputs=("node_energies",))
    assert model == bridge.jax_potential(MODEL, outputs=("node_energies",)) != bridge.jax_potential(
        MODEL
    ) and hash(model)
    assert model.card.active_outputs == {
        "energy",
        "position_gradients",
        "cell_gradients",
        "node_energies",
    }
    inputs = {
        "pos": R,
        "cell": H[None],
        "pbc": jnp.ones((1, 3), bool),
        "batch": jnp.zeros(4, int),
        "atomic_numbers": jnp.asarray(NUMBERS),
    }
    seen.clear()
    out = jax.block_until_ready(jax.jit(direct(model))(inputs))
    assert len(seen) == 1
    e, (g, G) = jax.value_and_grad(lambda r, h: brute(r, h, NUMBERS), (0, 1))(R, H)
    close([out.total_energies[0], out.gradients.positions, out.gradients.cell[0]], [e, g, G])
    assert potential(model, atomic_numbers=NUMBERS).card is model.card
    refused("got hessian|hessian among the active outputs", direct, model, hessians="positions")


def test_cards_of_models_and_what_contradicts_them():
    refused(
        "no cutoff and no card for Embedded, got one of them; it carries",
        bridge.potential,
        Embedded(),
        atomic_numbers=NUMBERS,
        cutoff=3.0,
    )
    refused(
        "expected one cutoff, got 2.0, and 3.0 on the card",
        bridge.potential,
        embedded,
        atomic_numbers=NUMBERS,
        cutoff=2.0,
        card=CARD,
    )
    refused("neighbor_list .*got neighbor_list=None and cutoff=3.0", Card, cutoff=3.0)
    refused("a positive cutoff in Angstrom, got -1.0", Card, cutoff=-1.0, neighbor_list="own")
    refused("required_inputs of the contract .*got forces", Card, required_inputs={"forces"})
    moved = Embedded(card=dataclasses.replace(CARD, dtype="float64", device="cpu")).to(
        torch.float32
    )
    assert (
        moved.card.dtype == "float32"
        and "torch" not in Card.__module__
        and sys.modules["bridge.card"].Card is bridge.Card
    )
