"""Strain algebra against automatic differentiation in float64, on both sides, where sum r x g is
not zero."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jax_side.potentials import strain as jax_strain
from torch_side.potentials import strain as torch_strain

OFFSETS = np.array(list(itertools.product((-1, 0, 1), repeat=3)), float)
SIDES = ("torch", "jax")
STRAIN = {"torch": torch_strain, "jax": jax_strain}
NP = {"torch": torch, "jax": jnp}
ARRAY = {"torch": torch.tensor, "jax": jnp.asarray}


@st.composite
def batches(draw):
    """(pos, cell, batch) of one or two triclinic systems, atoms in any image."""
    numbers = st.floats(-1, 1)
    sizes = draw(st.sampled_from([[3], [4, 2]]))  # few shapes, for JAX compiles for each
    draws = lambda n: np.array(draw(st.lists(numbers, min_size=n, max_size=n)))
    cell = 3 * (np.eye(3) + 0.45 * draws(9 * len(sizes)).reshape(-1, 3, 3))
    assume((abs(np.linalg.det(cell)) > 8).all())
    batch = np.repeat(np.arange(len(sizes)), sizes)
    frac = np.arange(len(batch))[:, None] * [0.37, 0.23, 0.41] + 0.15 * draws(
        3 * len(batch)
    ).reshape(-1, 3)
    return np.einsum("ni,nij->nj", frac, cell[batch]), cell, batch


def pair_energy(pos, cell, batch, side):
    """(B,) energies of a pair potential over 27 images: invariant under rotation, with a net torque
    sum r x g."""
    xp, offsets = NP[side], ARRAY[side](OFFSETS)
    out = []
    for s in range(len(cell)):
        r = pos[batch == s]
        d2 = ((r[None, :, None] - r[:, None, None] + offsets @ cell[s]) ** 2).sum(-1)
        out.append((xp.exp(-d2 / 2) * xp.cos(d2 / 3)).sum())
    return xp.stack(out)


def derivatives(pos, cell, batch, side):
    """g, G and W = dE/de, each by automatic differentiation of the energy, as numpy arrays."""
    zero = np.zeros_like(cell)

    def energy(pos, cell, strain):
        deform = ARRAY[side](np.eye(3)) + strain
        return pair_energy((pos[:, None] @ deform[batch])[:, 0], cell @ deform, batch, side).sum()

    if side == "jax":
        return [
            np.asarray(x) for x in jax.grad(energy, (0, 1, 2))(*map(jnp.asarray, (pos, cell, zero)))
        ]
    variables = [torch.tensor(x, requires_grad=True) for x in (pos, cell, zero)]
    return [x.numpy() for x in torch.autograd.grad(energy(*variables), variables)]


def apply(side, name, *arrays):
    return np.asarray(getattr(STRAIN[side], name)(*(ARRAY[side](a) for a in arrays)))


def torque(pos, g):
    return abs(np.cross(pos, g).sum(0)).max()


def close(a, b, tolerance=1e-10):
    assert abs(a - b).max() <= tolerance * abs(b).max(), abs(a - b).max() / abs(b).max()


def crystal():
    """One fixed triclinic crystal with a large net torque."""
    rng = np.random.default_rng(3)
    cell = 3 * (np.eye(3) + 0.3 * rng.uniform(-1, 1, (1, 3, 3)))
    return rng.uniform(0, 1, (4, 3)) @ cell[0], cell, np.zeros(4, int)


@pytest.mark.parametrize("side", SIDES)
@settings(max_examples=8, deadline=None)
@given(batches())
def test_cell_gradient_from_virial(side, system):
    pos, cell, batch = system
    g, G, W = derivatives(*system, side)
    assume(torque(pos, g) > 1e-3 and abs(G).max() > 1e-3)
    close(apply(side, "lattice_gradient_from_virial", -g, pos, batch, cell, W), G)


@pytest.mark.parametrize("side", SIDES)
@settings(max_examples=8, deadline=None)
@given(batches())
def test_virial_is_the_derivative_in_the_strain(side, system):
    pos, cell, batch = system
    g, G, W = derivatives(*system, side)
    assume(abs(W).max() > 1e-3)
    found = apply(side, "virial", g, G, pos, batch, cell)
    close(found, W)
    close(found, found.swapaxes(1, 2))  # by the energy's invariance, not by any symmetrisation


@pytest.mark.parametrize("side", SIDES)
def test_the_symmetrised_formula_is_wrong(side):
    """(R^T g + g^T R) / 2 in place of R^T g: the planted error that the tests above must tell
    apart."""
    pos, cell, batch = crystal()
    g, G, W = derivatives(pos, cell, batch, side)
    assert torque(pos, g) > 0.1
    moment = pos.T @ g
    symmetrised = np.linalg.solve(cell[0].T, W[0] - (moment + moment.T) / 2)
    assert abs(symmetrised - G[0]).max() > 0.02 * abs(G).max()
    close(apply(side, "lattice_gradient_from_virial", -g, pos, batch, cell, W), G)


@pytest.mark.parametrize("side", SIDES)
def test_neither_term_of_the_virial_is_symmetric(side):
    pos, cell, batch = crystal()
    g, G, W = derivatives(pos, cell, batch, side)
    for term in (pos.T @ g, cell[0].T @ G[0]):
        assert abs(term - term.T).max() > 0.02 * abs(W).max()


@pytest.mark.parametrize("side", SIDES)
def test_gradient_at_fixed_fractional_coordinates(side):
    """dE/dh at fixed s is h^-T W."""
    pos, cell, batch = crystal()
    W = derivatives(pos, cell, batch, side)[2]
    s = pos @ np.linalg.inv(cell[0])
    fixed = jax.grad(lambda h: pair_energy(s @ h[0], h, batch, "jax").sum())(cell)
    close(np.linalg.solve(cell[0].T, W[0]), np.asarray(fixed)[0])


@pytest.mark.parametrize("side", SIDES)
def test_stress_is_the_virial_per_volume(side):
    pos, cell, batch = crystal()
    W = derivatives(pos, cell, batch, side)[2]
    close(apply(side, "stress", W, cell, np.ones((1, 3), bool)), W / abs(np.linalg.det(cell[0])))
    # left-handed
    close(apply(side, "stress", W, -cell, np.ones((1, 3), bool)), W / abs(np.linalg.det(cell[0])))
    close(
        apply(side, "stress", W, cell, np.array([[True, True, False]])),
        W / abs(np.linalg.det(cell[0])),
    )


@pytest.mark.parametrize("side", SIDES)
def test_a_molecule_has_a_virial(side):
    rng = np.random.default_rng(0)
    pos, g = rng.normal(size=(2, 3, 3))
    close(
        apply(side, "virial", g, np.zeros((1, 3, 3)), pos, np.zeros(3, int), np.zeros((1, 3, 3)))[
            0
        ],
        pos.T @ g,
    )


OPEN = (
    np.eye(3)[None].repeat(2, 0),
    np.array([[True] * 3, [False] * 3]),
    "expected a periodic system, got no periodic axis in system 1",
)
FLAT = (
    np.stack([np.eye(3), np.diag([1.0, 1, 0])]),
    np.ones((2, 3), bool),
    "expected an invertible cell, got a singular cell in system 1",
)
THIN = (
    np.array([[[1.0, 1, 1], [1, 2, 3], [2, 3, 4]]]).repeat(2, 0),
    np.ones((2, 3), bool),
    "a singular cell in system 0",
)
LOST = (np.full((2, 3, 3), np.nan), np.ones((2, 3), bool), "a singular cell in system 0")


@pytest.mark.parametrize("cell, pbc, text", [OPEN, FLAT, THIN, LOST])
@pytest.mark.parametrize("side", SIDES)
def test_what_has_no_stress_is_refused(side, cell, pbc, text):
    with pytest.raises(ValueError, match=f"{text}; it has no stress; use the virial"):
        apply(side, "stress", np.ones((2, 3, 3)), cell, pbc)


@pytest.mark.parametrize("side", SIDES)
def test_no_cell_gradient_from_the_virial_of_a_singular_cell(side):
    with pytest.raises(
        ValueError, match="got a singular cell in system 1; without one dE/dh does not follow"
    ):
        apply(
            side,
            "lattice_gradient_from_virial",
            np.ones((2, 3)),
            np.ones((2, 3)),
            np.array([0, 1]),
            FLAT[0],
            np.ones((2, 3, 3)),
        )


@pytest.mark.parametrize("size", [1e-2, 1.0, 1e2, 1e4])
@pytest.mark.parametrize("side", SIDES)
def test_a_determinant_that_is_rounding_is_none(side, size):
    """Whatever the size of the cell, and however small the angle of a sound one."""
    axes = np.random.default_rng(0).normal(size=(2, 3, 3))
    axes[1, 2] = axes[1, 0] / 3 - axes[1, 1] / 7
    sound = size * np.stack([axes[0], axes[1] + np.diag([0, 0, 1e-9])])
    W, pbc = np.ones((2, 3, 3)), np.ones((2, 3), bool)
    assert np.isfinite(apply(side, "stress", W, sound, pbc)).all()
    with pytest.raises(ValueError, match="got a singular cell in system 1"):
        apply(side, "stress", W, size * axes, pbc)


def test_under_tracing_what_has_no_stress_is_nan():
    W = jnp.ones((2, 3, 3))
    for cell, pbc, _ in (OPEN, FLAT):
        stress = jax.jit(jax_strain.stress)(W, cell, pbc)
        assert jnp.isfinite(stress[0]).all() and jnp.isnan(stress[1]).all()
    args = jnp.ones((2, 3)), jnp.ones((2, 3)), jnp.array([0, 1]), FLAT[0], W
    G = jax.jit(jax_strain.lattice_gradient_from_virial)(*args)
    assert jnp.isfinite(G[0]).all() and jnp.isnan(G[1]).all()


def test_derivatives_of_the_stress_pass_through():
    cell, pbc = jnp.asarray(crystal()[1]), jnp.ones((1, 3), bool)
    W = jnp.ones((1, 3, 3))
    volume = abs(jnp.linalg.det(cell[0]))
    close(
        jax.grad(lambda W: jax_strain.stress(W, cell, pbc).sum())(W), jnp.ones((1, 3, 3)) / volume
    )
    W = torch.ones(1, 3, 3, dtype=torch.float64, requires_grad=True)
    torch_strain.stress(
        W, torch.tensor(np.asarray(cell)), torch.ones(1, 3, dtype=torch.bool)
    ).sum().backward()
    close(W.grad.numpy(), np.ones((1, 3, 3)) / float(volume))


# with_gradients


def inputs(side, **more):
    pos, cell, batch = crystal()
    return {"pos": ARRAY[side](pos), "cell": ARRAY[side](cell), "batch": batch, **more}


@pytest.mark.parametrize("side", SIDES)
def test_with_gradients_gives_energy_and_gradients(side):
    model = STRAIN[side].with_gradients(
        lambda x: pair_energy(x["pos"], x["cell"], x["batch"], side)
    )
    out, (g, G, _) = model(inputs(side)), derivatives(*crystal(), side)
    assert set(out) == {"energy", "position_gradients", "cell_gradients"} and out[
        "energy"
    ].shape == (1,)
    close(np.asarray(out["position_gradients"]), g)
    close(np.asarray(out["cell_gradients"]), G)


@pytest.mark.parametrize("side", SIDES)
def test_with_gradients_of_what_is_not_reached_is_zero(side):
    for energy in (lambda x: x["pos"].sum()[None], lambda x: 0 * ARRAY[side](np.ones(1))):
        out = STRAIN[side].with_gradients(energy)(inputs(side))
        assert (
            out["cell_gradients"].shape == (1, 3, 3) and not np.asarray(out["cell_gradients"]).any()
        )


def torch_model():
    return torch_strain.with_gradients(
        lambda x: pair_energy(x["pos"], x["cell"], x["batch"], "torch")
    )


def test_torch_outputs_are_detached_unless_someone_differentiates_further():
    x = inputs("torch")
    assert not any(v.requires_grad for v in torch_model()(x).values())
    assert all(v.requires_grad for v in torch_model()(x, create_graph=True).values())
    x["pos"].requires_grad_()
    assert all(v.requires_grad for v in torch_model()(x).values())
    with torch.no_grad():
        assert not any(v.requires_grad for v in torch_model()(x).values())


def test_torch_inputs_keep_their_flags():
    x = inputs("torch")
    torch_model()(x)
    assert not x["pos"].requires_grad and not x["cell"].requires_grad and x["pos"].grad is None


def test_torch_second_derivatives():
    x = inputs("torch")
    pos = x["pos"].requires_grad_()
    g = torch_model()(x)["position_gradients"]
    rows = torch.stack([torch.autograd.grad(v, pos, retain_graph=True)[0] for v in g.flatten()])
    batch, cell = x["batch"], x["cell"]
    exact = torch.autograd.functional.hessian(
        lambda r: pair_energy(r, cell, batch, "torch").sum(), pos.detach()
    )
    close(rows.reshape(exact.shape).numpy(), exact.numpy())


def test_torch_gradients_in_the_cell_are_at_fixed_positions_even_where_positions_depend_on_it():
    x = inputs("torch")
    cell = x["cell"].clone().requires_grad_()
    s = (x["pos"] @ torch.linalg.inv(x["cell"][0])).detach()
    out = torch_model()(x | {"pos": s @ cell[0], "cell": cell})
    close(out["cell_gradients"].detach().numpy(), derivatives(*crystal(), "torch")[1])


def test_torch_energy_may_bring_more_outputs():
    model = torch_strain.with_gradients(
        lambda x: {"energy": x["pos"].sum()[None], "more": 2 * x["pos"]}
    )
    assert not model(inputs("torch"))["more"].requires_grad


def test_jax_models_of_equal_energies_are_equal():
    def energy(x):
        return x["pos"].sum()[None]

    a, b = jax_strain.with_gradients(energy), jax_strain.with_gradients(energy)
    assert (
        a == b
        and hash(a) == hash(b)
        and a != jax_strain.with_gradients(lambda x: x["pos"].sum()[None])
    )
