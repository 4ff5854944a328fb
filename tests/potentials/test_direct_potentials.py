"""jax_side.potentials.direct: potentials that carry their own gradients, in JAX and in torch,
against JAX's derivatives of the energy alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import bridge
from bridge.card import Card
from jax_side.potentials.direct import (
    EMPTY,
    Positions,
    PositionsAndCell,
    PotentialOut,
    cached,
    direct,
    sum_potentials,
)
from jax_side.potentials.potential_out import KINDS
from jax_side.potentials.strain import with_gradients
from tests.cases import close
from torch_side.potentials.model import Wrapped

rng = np.random.default_rng(0)
C = np.array([0.3, -0.2, 0.5])
INPUTS = {
    "pos": jnp.asarray(rng.normal(size=(5, 3))),
    "cell": jnp.asarray(2 * np.eye(3) + 0.4 * rng.normal(size=(2, 3, 3))),
    "pbc": jnp.ones((2, 3), bool),
    "batch": jnp.array([0, 0, 1, 1, 1]),
    "atomic_numbers": jnp.array([1, 8, 6, 14, 1]),
    "charge": jnp.array([0.7, -1.3]),
}


def energy(x):
    """Gaussian pairs within a system, a wave along the cell, a charge: (B,)."""
    pos, batch = x["pos"], x["batch"]
    r2 = ((pos[:, None] - pos) ** 2).sum(-1)
    wave = x["charge"][batch] * jnp.sin(jnp.einsum("ni,nij,j->n", pos, x["cell"][batch], C))
    return jax.ops.segment_sum(
        (jnp.exp(-r2) * (batch[:, None] == batch)).sum(-1) + wave, batch, num_segments=2
    )


def analytical(x):
    """The same with gradients by hand."""
    pos, batch = x["pos"], x["batch"]
    r = pos[:, None] - pos
    pairs = jnp.exp(-(r**2).sum(-1)) * (batch[:, None] == batch)
    along = jnp.einsum("nij,j->ni", x["cell"][batch], C)
    slope = x["charge"][batch] * jnp.cos((pos * along).sum(-1))
    g = -4 * (pairs[..., None] * r).sum(1) + slope[:, None] * along
    G = jax.ops.segment_sum(slope[:, None, None] * pos[:, :, None] * C, batch, num_segments=2)
    return {"energy": energy(x), "position_gradients": g, "cell_gradients": G}


def as_out(x):
    """The same as a PotentialOut."""
    out = analytical(x)
    return PotentialOut(
        out["energy"], PositionsAndCell(out["position_gradients"], out["cell_gradients"])
    )


class Torch(torch.nn.Module):
    """The same in torch, where each forward with values is counted."""

    forwards = 0

    def forward(self, x):
        Torch.forwards += not isinstance(x["pos"], torch._subclasses.FakeTensor)
        pos, batch, c = x["pos"], x["batch"].long(), x["pos"].new_tensor(C)
        r = pos[:, None] - pos
        pairs = torch.exp(-(r**2).sum(-1)) * (batch[:, None] == batch)
        along = torch.einsum("nij,j->ni", x["cell"][batch], c)
        phase = (pos * along).sum(-1)
        slope = x["charge"][batch] * torch.cos(phase)
        sums = lambda a: a.new_zeros(2, *a.shape[1:]).index_add(0, batch, a)
        return {
            "energy": sums(pairs.sum(-1) + x["charge"][batch] * torch.sin(phase)),
            "position_gradients": -4 * (pairs[..., None] * r).sum(1) + slope[:, None] * along,
            "cell_gradients": sums(slope[:, None, None] * pos[:, :, None] * c),
        }


MODELS = {
    "JAX": analytical,
    "JAX PotentialOut": as_out,
    "torch": bridge.to_jax(Torch(), batched="sequential"),
}


def counted(outputs=("energy", *KINDS["positions and cell"])):
    """An opaque model on the host, and a list that grows each time it runs."""
    runs = []

    def run(x):
        runs.append(1)
        return {n: np.asarray(a) for n, a in exact(x).items()}

    exact = jax.jit(lambda x: {n: a for n, a in analytical(x).items() if n in outputs})

    def model(x):
        return jax.pure_callback(run, jax.eval_shape(exact, x), x, vmap_method="sequential")

    return model, runs


def total(potential, inputs=INPUTS):
    """Energy as a function of positions and cells, weighted so that no system is like another."""
    return lambda pos, cell: (
        jnp.array([1.0, -2.5]) * potential(inputs | {"pos": pos, "cell": cell}).total_energies
    ).sum()


PURE = lambda x: PotentialOut(energy(x))
WANT = jax.jit(with_gradients(energy))(INPUTS)
HESSIAN = jax.jit(jax.hessian(lambda pos: energy(INPUTS | {"pos": pos}).sum()))(INPUTS["pos"])
AT = INPUTS["pos"], INPUTS["cell"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_x_kinds_of_gradients(name, kind, maybe_jit):
    out = maybe_jit(direct(MODELS[name], kind))(INPUTS)
    want = {
        "positions and cell": PositionsAndCell(WANT["position_gradients"], WANT["cell_gradients"]),
        "positions": Positions(WANT["position_gradients"]),
    }
    close(out, PotentialOut(WANT["energy"], want.get(kind, EMPTY), EMPTY))
    assert isinstance(out.gradients, type(want.get(kind, EMPTY)))
    assert min(abs(WANT[n]).max() for n in WANT) > 0.1


def test_cell_gradients_x_finite_differences():
    """At fixed Cartesian positions."""
    p, h = direct(analytical), 1e-5
    steps = h * jnp.eye(9).reshape(9, 3, 3)
    found = jax.jit(
        jax.vmap(
            lambda d: (
                (
                    p(INPUTS | {"cell": AT[1] + d}).total_energies
                    - p(INPUTS | {"cell": AT[1] - d}).total_energies
                )
                / (2 * h)
            )
        )
    )(steps)
    np.testing.assert_allclose(found.T.reshape(2, 3, 3), p(INPUTS).gradients.cell, atol=1e-8)


def test_hessians():
    out = direct(lambda x: analytical(x) | {"hessian": HESSIAN}, "positions", "positions")(INPUTS)
    close(out.hessians, Positions(HESSIAN))
    again = direct(lambda x: out, "positions", "positions")(INPUTS)
    close(again, out)


TRANSFORMS = {
    "value_and_grad": lambda f: jax.value_and_grad(f, (0, 1)),
    "jvp": lambda f: lambda *at: jax.jvp(f, at, jax.tree.map(jnp.cos, at)),
    "hessian": lambda f: jax.hessian(f, (0, 1)),
    "vmap": lambda f: (
        lambda r, h: jax.vmap(jax.value_and_grad(f), (0, None))(jnp.stack([r, 1.1 * r]), h)
    ),
    "virial": lambda f: lambda r, h: jax.grad(lambda s: f(r @ s, h @ s))(jnp.eye(3)),
    "scan": lambda f: (
        lambda r, h: jax.lax.scan(lambda r, _: (r - 0.1 * jax.grad(f)(r, h), f(r, h)), r, length=3)
    ),
    "grad of scan": lambda f: jax.grad(
        lambda r, h: jax.lax.scan(lambda r, _: (r - 0.1 * jax.grad(f)(r, h), f(r, h)), r, length=2)[
            1
        ].sum()
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_derivatives_equal_those_of_the_energy(transform):
    of = TRANSFORMS[transform]
    want = jax.jit(of(total(PURE)))(*AT)
    for name in ("JAX", "torch"):
        close(jax.jit(of(total(direct(MODELS[name]))))(*AT), want, rtol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_the_energy_differentiates_by_the_gradients_returned(kind):
    """Asked for or not: shown by a model whose gradients are not those of its energy."""

    def wrong(x):
        out = as_out(x)
        return PotentialOut(out.total_energies, jax.tree.map(lambda g: 3 * g + 1, out.gradients))

    g, G = jax.jit(
        jax.grad(
            lambda *at: direct(wrong, kind)(
                INPUTS | dict(zip(("pos", "cell"), at))
            ).total_energies.sum(),
            (0, 1),
        )
    )(*AT)
    close((g, G), (3 * WANT["position_gradients"] + 1, 3 * WANT["cell_gradients"] + 1))


def test_gradients_returned_differentiate():
    loss = lambda out: (out.gradients.positions**2).sum() + out.total_energies[0]
    slope = jax.jit(
        jax.grad(lambda pos, potential: loss(potential(INPUTS | {"pos": pos}))), static_argnums=1
    )
    close(slope(AT[0], direct(MODELS["torch"])), slope(AT[0], direct(with_gradients(energy))))


def test_other_inputs_and_parameters_are_differentiated_by_jax():
    scaled = lambda x: {
        n: x["params"]["w"] * a
        for n, a in MODELS["torch"]({k: v for k, v in x.items() if k != "params"}).items()
    }
    inputs = INPUTS | {"params": {"w": jnp.array(2.0), "n": jnp.array(3)}, "spin": None}

    def f(potential):
        return lambda w, charge, pos: potential(
            inputs | {"params": {"w": w, "n": 3}, "charge": charge, "pos": pos}
        ).total_energies.sum()

    pure = lambda x: PotentialOut(x["params"]["w"] * energy(x))
    at = jnp.array(2.0), INPUTS["charge"], AT[0]
    for which in ((0, 1, 2), (0, 1), (2,)):
        close(*(jax.jit(jax.grad(f(p), which))(*at) for p in (direct(scaled), pure)))


def test_a_model_without_gradients_is_differentiated_by_jax():
    potential = direct(lambda x: {"energy": energy(x)}, None)
    close(*(jax.jit(jax.grad(total(p), (0, 1)))(*AT) for p in (potential, PURE)))


def test_one_evaluation(maybe_jit):
    def both(pos, cell):
        out = direct(MODELS["torch"])(INPUTS | {"pos": pos, "cell": cell})
        return out.total_energies.sum(), out

    steps = {
        "outputs": lambda *at: both(*at)[1],
        "gradients and outputs": jax.value_and_grad(both, (0, 1), has_aux=True),
    }
    for what, step in steps.items():
        step = maybe_jit(step)
        jax.block_until_ready(step(*AT))
        before = Torch.forwards
        jax.block_until_ready(step(*AT))
        assert Torch.forwards == before + 1, what


def test_models_that_cannot_be_differentiated():
    model, runs = counted()
    potential = direct(model, derivative_order=1)
    found = jax.jit(jax.grad(total(potential), (0, 1)))(*AT)
    assert len(runs) == 1
    close(found, jax.jit(jax.grad(total(PURE), (0, 1)))(*AT))
    assert jnp.isnan(
        jax.jit(jax.grad(lambda pos: potential(INPUTS | {"pos": pos}).gradients.positions.sum()))(
            AT[0]
        )
    ).all()
    assert jnp.isnan(jax.jit(jax.hessian(total(potential)))(*AT)).all()
    text = "expected a gradient of the energy in charge to differentiate with, got outputs cell_gradients, .* of model; hold charge fixed"
    with pytest.raises(NotImplementedError, match=text):
        jax.grad(lambda q: potential(INPUTS | {"charge": q}).total_energies.sum())(INPUTS["charge"])
    with pytest.raises(ValueError, match="do not support JVP"):
        jax.grad(total(direct(model)))(*AT)


def test_the_card_of_a_bridged_model():
    card = Card(outputs={"energy", "position_gradients", "hessian"}, derivative_order=1)
    model = bridge.to_jax(
        Wrapped(Torch(), card, "model"),
        outputs=lambda x: {"energy": jax.ShapeDtypeStruct((2,), "float64")},
    )
    assert (
        direct(model, "positions").derivative_order == 1
        and direct(model, "positions", derivative_order=2).derivative_order == 2
    )
    with pytest.raises(
        ValueError,
        match=r"outputs that Wrapped has \(energy, hessian, position_gradients\), got cell_gradients; ask for these",
    ):
        direct(model)
    with pytest.raises(
        ValueError,
        match=r"expected hessian among the active outputs of Wrapped, got a card without; pass model.asking\('hessian'\)",
    ):
        direct(model, "positions", "positions")


def test_what_a_model_does_not_give_is_refused_before_it_runs():
    model, runs = counted(("energy", "position_gradients"))
    text = "cell_gradients from model, as gradients='positions and cell', hessians=None ask, got only energy, position_gradients; ask for what it gives"
    with pytest.raises(ValueError, match=text):
        jax.jit(direct(model))(INPUTS)
    text = "a gradient of the energy in cell to differentiate with, got outputs energy, position_.* of model; hold cell fixed .*, or let the model return"
    with pytest.raises(NotImplementedError, match=text):
        jax.jit(jax.grad(total(direct(model, "positions", derivative_order=1)), 1))(*AT)
    assert not runs
    jax.block_until_ready(jax.jit(direct(model, "positions"))(INPUTS))
    assert len(runs) == 1


@pytest.mark.parametrize(
    "error, text, f",
    [
        (
            TypeError,
            r"expected a callable model\(inputs\), got 3; pass the model's function",
            lambda: direct(3),
        ),
        (
            ValueError,
            "expected gradients as one of 'positions and cell', 'positions', None, got 'cell'",
            lambda: direct(analytical, "cell"),
        ),
        (
            ValueError,
            "expected hessians as one of 'positions', None, got 'cell'",
            lambda: direct(analytical, hessians="cell"),
        ),
        (
            TypeError,
            "expected a dict of the contract or a PotentialOut from energy, got a .*; wrap an "
            "energy",
            lambda: direct(energy, None)(INPUTS),
        ),
        (
            ValueError,
            "got only other outputs; ask for what it gives",
            lambda: direct(lambda x: {"forces": x["pos"]}, None)(INPUTS),
        ),
        (
            ValueError,
            r"expected energy as float\[2\], got float64\[2,1\]",
            lambda: direct(lambda x: {"energy": energy(x)[:, None]}, None)(INPUTS),
        ),
        (
            ValueError,
            "expected the inputs pos, .*, got no batch",
            lambda: direct(analytical)({k: v for k, v in INPUTS.items() if k != "batch"}),
        ),
        (
            ValueError,
            "expected at least one potential, got none; pass those to add",
            lambda: sum_potentials(),
        ),
        (
            TypeError,
            "expected potentials to add, got a function; wrap it by "
            "jax_side.potentials.direct.direct",
            lambda: sum_potentials(analytical),
        ),
        (
            ValueError,
            r"expected a scalar weight, got shape \(2,\); use jax.vmap over the weights",
            lambda: direct(analytical) * jnp.ones(2),
        ),
        (
            ValueError,
            r"the same gradients and hessians of all terms \(gradients='positions and cell', hessians=None\), got gradients='positions', hess.*; narrow one",
            lambda: direct(analytical) + 2 * direct(analytical, "positions"),
        ),
        (
            ValueError,
            "expected gradients as one of 'positions', None, got 'pos.*ll'",
            lambda: direct(analytical, "positions").narrowed("positions and cell"),
        ),
        (
            ValueError,
            "expected hessians as one of None, got 'positions'",
            lambda: (2 * direct(analytical)).narrowed("positions", "positions"),
        ),
        (
            ValueError,
            r"expected outputs alike \(energy float64\[2\], position_gradients float64\[5,3\]\), got energy float64\[2\]; narrow the gradients",
            lambda: direct(analytical, "positions")(INPUTS) + PURE(INPUTS),
        ),
        (
            ValueError,
            r"expected outputs alike \(energy float64\[2\]\), got energy float32\[1\]; ",
            lambda: PURE(INPUTS) - PotentialOut(jnp.ones(1, "float32")),
        ),
        (TypeError, "unsupported operand", lambda: direct(analytical) * None),
        (TypeError, "unsupported operand", lambda: direct(analytical) + analytical),
        (TypeError, "unsupported operand", lambda: PURE(INPUTS) + 1),
        (
            TypeError,
            "expected a potential, or another callable of inputs, got 3; make one by "
            "jax_side.potentials.direct.direct",
            lambda: cached(3),
        ),
    ],
)
def test_errors(error, text, f):
    with pytest.raises(error, match=text):
        f()
