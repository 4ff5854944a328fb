"""Sums and scalings of direct potentials: linear, each term evaluated once, weights traced."""

import jax
import jax.numpy as jnp
import numpy as np

from jax_side.potentials.direct import EMPTY, Positions, PotentialOut, direct, sum_potentials
from jax_side.potentials.strain import with_gradients
from tests.cases import close
from tests.potentials.test_direct_potentials import (
    AT,
    HESSIAN,
    INPUTS,
    MODELS,
    PURE,
    WANT,
    analytical,
    counted,
    total,
)

spring = with_gradients(
    lambda x: jax.ops.segment_sum((x["pos"] ** 2).sum(-1), x["batch"], 2) + x["cell"].sum((1, 2))
)
A, B = direct(MODELS["torch"]), direct(spring)


def test_outputs_add_and_scale(maybe_jit):
    a, b = A(INPUTS), B(INPUTS)
    want = lambda f: jax.tree.map(f, a, b)
    close(maybe_jit(lambda a, b: a + b)(a, b), want(lambda a, b: a + b))
    close(maybe_jit(lambda a, b: a - b)(a, b), want(lambda a, b: a - b))
    for two in (2, 2.0, np.float64(2), np.float32(2), jnp.array(2), jnp.array(2.0, "float32")):
        close(two * a, want(lambda a, b: 2 * a))
        close(a * two, want(lambda a, b: 2 * a))
        narrow = PotentialOut(a.total_energies.astype("float32"))
        assert (two * narrow).total_energies.dtype == "float32"


def test_potentials_add_and_scale():
    mixed = 0.5 * A + B * 2 + sum_potentials(A, np.float64(-1) * B)
    close(mixed(INPUTS), 1.5 * A(INPUTS) + B(INPUTS))
    f, g = total(mixed), total(lambda x: 1.5 * PURE(x) + PotentialOut(spring(x)["energy"]))
    close(
        *(
            jax.jit(lambda *at, f=f: (jax.grad(f, (0, 1))(*at), jax.hessian(f)(*at)))(*AT)
            for f in (f, g)
        )
    )


def test_each_term_is_evaluated_once():
    (one, runs), (two, others) = counted(), counted()
    mixed = 0.3 * direct(one, derivative_order=1) + direct(two, derivative_order=1)
    jax.block_until_ready(mixed(INPUTS))  # eager: XLA would make one of two equal calls
    assert (len(runs), len(others)) == (1, 1)
    jax.block_until_ready(jax.jit(jax.value_and_grad(total(mixed), (0, 1)))(*AT))
    assert (len(runs), len(others)) == (2, 2)


def test_traced_weights_x_thermodynamic_integration():
    """dE/dw of (1-w) A + w B is E_B - E_A; one trace for all weights; a potential passes through
    jit, grad and vmap by its weights."""
    traces = []

    def interpolated(w):
        traces.append(1)
        return ((1 - w) * A + w * B)(INPUTS).total_energies

    a, b = A(INPUTS).total_energies, B(INPUTS).total_energies
    f = jax.jit(jax.value_and_grad(lambda w: interpolated(w).sum()))
    for w in (0.0, 0.25, 1.0):
        close(f(jnp.array(w)), (((1 - w) * a + w * b).sum(), (b - a).sum()))
    assert len(traces) == 1
    ws = jnp.linspace(0, 1, 3)
    close(jax.jit(jax.vmap(interpolated))(ws), a + ws[:, None] * (b - a))

    call = jax.jit(lambda p, x: traces.append(2) or p(x))
    for w in (0.5, 2.0):
        close(call(jnp.array(w) * A + B, INPUTS), w * A(INPUTS) + B(INPUTS))
    assert traces.count(2) == 1
    found = jax.grad(lambda p: p(INPUTS).total_energies.sum())(jnp.array(0.3) * A + B)
    close(found.potentials[0].scale, a.sum())


def test_forces_differentiate_in_weights():
    found = jax.jit(jax.jacfwd(lambda w: (w * A + B)(INPUTS).gradients.positions))(0.7)
    close(found, WANT["position_gradients"])


def test_narrowed():
    model = lambda x: analytical(x) | {"hessian": HESSIAN}
    full = direct(model, hessians="positions")
    close(
        full.narrowed("positions", "positions")(INPUTS),
        PotentialOut(WANT["energy"], Positions(WANT["position_gradients"]), Positions(HESSIAN)),
    )
    less = (2 * (full + full)).narrowed("positions")
    assert (less.gradients, less.hessians) == ("positions", None)
    close(
        (less + direct(spring, "positions"))(INPUTS).gradients.positions,
        4 * WANT["position_gradients"] + B(INPUTS).gradients.positions,
    )
    close(
        *(
            jax.jit(jax.grad(total(p), (0, 1)))(*AT)
            for p in (less.narrowed(None), 4 * full.narrowed("positions"))
        )
    )
    assert (
        direct(analytical) == direct(analytical)
        and hash(direct(analytical)) == hash(direct(analytical))
        and less.narrowed(None)(INPUTS).gradients == EMPTY
    )
