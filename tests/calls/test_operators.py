"""First and second derivatives of the operators that potentials are made of, each by every way; the
others in tests/full."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import bridge
from jax_side.potentials import second
from tests.matrices import a_few
from tests.operator_cases import POTENTIALS
from tests.operator_checks import SECOND, check

SUSPECTED = ["det", "slogdet", "solve a matrix", "scatter prod"]  # a few more ways for these


CHOSEN = {*SUSPECTED, *sorted(POTENTIALS)[::3]}


@pytest.mark.parametrize("name", a_few(POTENTIALS, CHOSEN))
def test_derivatives_x_operators(name):
    check(name, "func")


@pytest.mark.parametrize("name", [*SUSPECTED, "silu", "norm", "index_add", "softmax"])
def test_derivatives_by_autograd_x_operators(name):
    check(name, "autograd")


# Where it is reached from: runs, lanes, functional, dtypes; and cubic cells, whose singular values
# are equal.

det_hessian = jax.hessian(jnp.linalg.det)
CELLS = jnp.stack([2 * jnp.eye(3), jnp.diag(jnp.array([2.0, 2.0, 3.0])), 1.5 * jnp.eye(3) + 0.2])


class Volume(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, cell):
        return self.w * torch.det(cell)


@pytest.mark.matrix
@pytest.mark.parametrize("run", ["eager", "ffi", "host"])
@pytest.mark.parametrize("way", SECOND)
def test_cubic_cells_x_ways(way, run):
    """det by reverse over reverse is NaN in torch.func where singular values are equal."""
    f = bridge.to_jax(torch.det, lane="auto" if run == "eager" else run)
    maybe = (lambda f: f) if run == "eager" else jax.jit
    want = jax.vmap(SECOND[way](jnp.linalg.det))(CELLS)
    np.testing.assert_allclose(
        jnp.stack([maybe(SECOND[way](f))(cell) for cell in CELLS]), want, atol=1e-9
    )
    np.testing.assert_allclose(maybe(jax.vmap(SECOND[way](f)))(CELLS), want, atol=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_functional_x_dtypes(dtype):
    apply, params = bridge.functional(Volume().to(getattr(torch, dtype)))
    cells = CELLS.astype(dtype)
    got = jax.jit(jax.vmap(jax.hessian(lambda h: apply(params, h))))(cells)
    assert got.dtype == dtype
    np.testing.assert_allclose(
        got, 2 * jax.vmap(det_hessian)(CELLS), atol=1e-4 if dtype == "float32" else 1e-10
    )


@pytest.mark.parametrize("layer", ["SiLU", "Mish", "GELU"])
def test_the_readmes_first_example_x_activations(layer):
    act = getattr(torch.nn, layer)()
    net = (
        torch.nn.Sequential(
            torch.nn.Linear(3, 16), act, torch.nn.GroupNorm(2, 16), torch.nn.Linear(16, 1)
        )
        .eval()
        .double()
    )
    energy = lambda r: net(r).sum()
    r = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)
    want = torch.func.hessian(energy)(r).detach()
    R = jnp.asarray(r.numpy())
    np.testing.assert_allclose(
        jax.vmap(jax.hessian(bridge.to_jax(energy)))(jnp.stack([R, R]))[1], want, atol=1e-10
    )


def test_elastic_constants_of_an_energy_with_det():
    """All NaN before: a pressure, whose stiffness is known."""
    pure = lambda r, h: jnp.linalg.det(h) ** 2 + (r**2).sum()
    bridged = bridge.to_jax(lambda r, h: torch.det(h) ** 2 + (r**2).sum())
    potential = bridge.potential(
        lambda x: torch.det(x["cell"]) ** 2 + (x["pos"] ** 2).sum(),
        atomic_numbers=np.array([1]),
        pbc=True,
        gradients="autograd",
    )
    r, h = jnp.zeros((1, 3)), 2 * jnp.eye(3)
    want = second.elastic_constants(pure, r, h, relaxed=False)
    for energy in (bridged, potential):
        np.testing.assert_allclose(
            second.elastic_constants(energy, r, h, relaxed=False), want, atol=1e-9
        )


def test_dtypes_of_tangents():
    """In forward mode torch gives float64 for the tangent of a float32 energy times a number."""
    f = bridge.to_jax(lambda x: (torch.sin(x) ** 2).sum() * 1.0)
    x = jnp.arange(3, dtype="float32")
    assert jax.hessian(f)(x).dtype == "float32"
    np.testing.assert_allclose(jax.hessian(f)(x), jnp.diag(2 * jnp.cos(2 * x)), atol=1e-6)


def test_torch_is_still_wrong_where_it_is_not_trusted():
    """Or operators.py may trust it again: lu_solve with factors that have fewer batch axes, by
    torch alone."""
    random = torch.Generator().manual_seed(0)
    a, b = (
        torch.randn(4, 3, 3, generator=random, dtype=torch.float64),
        torch.randn(4, 5, 3, 2, generator=random, dtype=torch.float64),
    )
    lu, pivots = torch.linalg.lu_factor(a)
    off = torch.linalg.lu_solve(lu[:, None], pivots[:, None], b) - torch.linalg.solve(a[:, None], b)
    assert off.abs().max() > 1
