"""Stress conventions: against the codes themselves where they are installed, and round trips of
asymmetric data."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.stress import full_3x3_to_voigt_6_stress, voigt_6_to_full_3x3_stress
from jax_md import quantity, space
from mace.modules.utils import compute_forces_virials, get_symmetric_displacement
from nvalchemi.models._utils import autograd_stresses, prepare_strain

from bridge.conventions import CONVENTIONS, cell_from, cell_to, from_, pressure, to
from jax_side.potentials import strain
from tests.model_cases import skewed
from tests.potential_cases import CELL, FRACTIONAL

RNG = np.random.default_rng(5)
IMAGES = np.array(list(itertools.product((-1, 0, 1), repeat=3)), float)
POS = FRACTIONAL @ CELL
VOLUME = abs(np.linalg.det(CELL))
TENSOR = partial(torch.tensor, dtype=torch.float64)
EYE = np.eye(3)
SHAPES = {"one": (), "batch": (4,)}


def pairs(pos, cell, xp, images):
    """Energy () of Gaussians over 27 images, invariant under rotation; arrays of torch or JAX."""
    r = pos[None, :, None] - pos[:, None, None] + (images @ cell)
    return xp.exp(-(r**2).sum(-1) / 4).sum()


def skew_pairs(vectors):
    """An energy of the vectors between atoms that rotation changes: its virial is not symmetric."""
    metric = jnp.array([[1.0, 0.3, 0], [0, 0.8, -0.2], [0, 0, 1.1]])
    return (
        jnp.exp(-jnp.einsum("...i,ij,...j", vectors, metric, vectors) / 4).sum()
        + jnp.sin(vectors[..., 0] * vectors[..., 2]).sum()
    )


def virial_of(energy):
    """W of energy(pos, cell) by automatic differentiation in the strain."""
    strained = lambda e: energy(jnp.asarray(POS) @ (EYE + e), jnp.asarray(CELL) @ (EYE + e))
    return np.asarray(jax.grad(strained)(jnp.zeros((3, 3))))


PAIRS = partial(pairs, xp=jnp, images=jnp.asarray(IMAGES))
W = virial_of(PAIRS)


def close(a, b, tolerance=1e-9):
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape and abs(a - b).max() <= tolerance * abs(b).max(), (
        abs(a - b).max() / abs(b).max()
    )


def test_the_virial_at_hand_is_large_and_has_shear():
    assert abs(W).min() > 0.01 and np.linalg.norm(W - np.diag(np.diag(W))) > 0.1


def test_ase_x_emt_on_an_asymmetric_strained_cell():
    atoms, h = skewed(bulk("Cu") * (2, 2, 1)), 1e-5
    atoms.calc = EMT()

    def energy(e):
        moved = atoms.copy()
        moved.calc = EMT()
        moved.set_cell(atoms.cell[:] @ (EYE + e), scale_atoms=True)
        return moved.get_potential_energy()

    steps = h * np.eye(9).reshape(9, 3, 3)
    found = np.array([energy(e) - energy(-e) for e in steps]).reshape(3, 3) / (2 * h)
    stress, cell = atoms.get_stress(), atoms.cell[:]
    assert len(np.unique(abs(stress).round(4))) == 6
    close(to("ase", found, cell), stress, 1e-6)
    close(to("ase matrix", found, cell), atoms.get_stress(voigt=False), 1e-6)
    close(from_("ase", stress, cell), found, 1e-6)
    close(pressure(found, cell), -stress[:3].mean(), 1e-6)
    close(cell_from("ase", atoms.cell[:]), atoms.cell.array)


def test_ase_x_its_voigt_helpers():
    matrix = W / VOLUME
    close(to("ase", W, CELL), full_3x3_to_voigt_6_stress(matrix))
    numbers = RNG.normal(size=6)
    close(from_("ase", numbers, CELL), VOLUME * voigt_6_to_full_3x3_stress(numbers))


def test_jax_md_x_quantity_stress_of_a_virial_that_is_not_symmetric():
    box = jnp.asarray(cell_to("jax-md", CELL))
    displacement, _ = space.periodic_general(box, fractional_coordinates=True)
    energy = lambda R, perturbation=None, **k: skew_pairs(
        space.map_product(partial(displacement, perturbation=perturbation))(R, R)
    )
    s = FRACTIONAL[:, None] - FRACTIONAL[None]
    whole = jnp.asarray(s - np.round(s)) @ CELL
    found = np.asarray(jax.grad(lambda e: skew_pairs(whole @ (EYE + e)))(jnp.zeros((3, 3))))
    assert abs(found - found.T).max() > 0.05 * abs(found).max()
    stress = quantity.stress(energy, jnp.asarray(FRACTIONAL), box)
    close(to("jax-md", found, CELL), stress, 1e-6)
    close(from_("jax-md", stress, cell_from("jax-md", box)), found, 1e-6)
    close(pressure(found, CELL), jnp.trace(stress) / 3, 1e-6)
    # the twin: indices the other way round
    assert abs(to("kups", found, CELL) - stress).max() > 0.01 * abs(stress).max()


def test_mace_x_its_own_displacement():
    pos, cell = (TENSOR(x, requires_grad=True) for x in (POS, CELL))
    edges = torch.zeros(2, 1, dtype=torch.int64)
    batch = torch.zeros(len(POS), dtype=torch.int64)
    moved, _, displacement = get_symmetric_displacement(
        pos,
        TENSOR(IMAGES[:1]),
        cell[None],
        edges,
        1,
        batch,
        torch.zeros(1, 3, 3, dtype=torch.float64).requires_grad_(),
    )
    strained = cell[None] @ (
        torch.eye(3, dtype=torch.float64) + 0.5 * (displacement + displacement.mT)
    )
    energy = pairs(moved, strained[0], torch, TENSOR(IMAGES))[None]
    forces, virials, stress = compute_forces_virials(
        energy, pos, displacement, cell[None], compute_stress=True
    )
    close(-forces.detach(), jax.grad(PAIRS)(jnp.asarray(POS), jnp.asarray(CELL)))
    close(to("mace virials", TENSOR(W)[None]), virials.detach())
    close(to("mace", TENSOR(W)[None], TENSOR(CELL)[None]), stress.detach())
    close(from_("mace", stress.detach()[0], CELL), W)


def test_nvalchemi_x_its_own_strain():
    pos, cell = TENSOR(POS, requires_grad=True), TENSOR(CELL)[None]
    moved, strained, displacement = prepare_strain(
        pos, cell, torch.zeros(len(POS), dtype=torch.int64)
    )
    energy = pairs(moved, strained[0], torch, TENSOR(IMAGES))
    stress = autograd_stresses(energy[None], displacement, cell, 1)
    close(to("nvalchemi", TENSOR(W)[None], cell), stress)
    close(-to("nvalchemi-0.1", TENSOR(W)[None], cell), stress)
    close(to("nvalchemi-virial", TENSOR(W)[None]), -stress * VOLUME)


def test_kups_x_its_formula():
    """-1/V sym[sum r g + h^T dE/dh], of kups.observables.stress."""
    g, G = jax.grad(PAIRS, (0, 1))(jnp.asarray(POS), jnp.asarray(CELL))
    total = POS.T @ np.asarray(g) + CELL.T @ np.asarray(G)
    close(to("kups", W, CELL), -(total + total.T) / (2 * VOLUME))
    assert cell_to("kups", CELL) is CELL


def test_torch_sim_x_its_formula():
    """Its pair models give sum over pairs of r_ij f_ij / V, f = dE/dr, with |det| of a cell of
    columns."""
    columns = cell_to("torch-sim", CELL)
    r = POS[None, :, None] - POS[:, None, None] + (columns @ IMAGES.T).T
    slope = -np.exp(-(r**2).sum(-1) / 4)[..., None] * r / 2
    close(
        to("torch-sim", W, CELL), np.einsum("abci,abcj->ij", r, slope) / abs(np.linalg.det(columns))
    )


def test_ours_x_strain():
    """W/V is that of jax_side.potentials.strain, with sign and pressure."""
    stress = np.asarray(
        strain.stress(jnp.asarray(W)[None], jnp.asarray(CELL)[None], jnp.ones((1, 3), bool))
    )[0]
    close(to("ase-matrix", W, CELL), stress)
    swelling = jax.grad(
        lambda v: PAIRS(jnp.asarray(FRACTIONAL) @ (CELL * v ** (1 / 3)), CELL * v ** (1 / 3))
    )(1.0)
    close(pressure(W, CELL), -swelling / VOLUME)


# Round trips

FRAMEWORKS = {
    "numpy": (np.asarray, lambda f: f),
    "torch": (torch.tensor, lambda f: f),
    "jax": (jnp.asarray, lambda f: f),
    "jit": (jnp.asarray, jax.jit),
}


def data(name, shape):
    """W, symmetric only where it must be, and a triclinic cell; one left-handed."""
    virial, cell = RNG.normal(size=(*shape, 3, 3)), 4 * EYE + RNG.uniform(-1, 1, (*shape, 3, 3))
    cell[(0,) * len(shape)] *= -1
    return (virial + virial.swapaxes(-1, -2) if CONVENTIONS[name].voigt else virial), cell


def there_and_back(name, virial, cell):
    value = to(name, virial, cell)
    theirs = cell_to(name, cell)
    return value, from_(name, value, cell), theirs, cell_from(name, theirs)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CONVENTIONS)
def test_round_trip(name, shape, framework):
    (array, compiled), (virial, cell) = FRAMEWORKS[framework], data(name, SHAPES[shape])
    value, virial_again, theirs, cell_again = compiled(partial(there_and_back, name))(
        array(virial), array(cell)
    )
    assert type(value) is type(array(virial)) and str(value.dtype).endswith("float64")
    close(value, to(name, virial, cell))
    close(virial_again, virial)
    close(cell_again, cell)
    close(np.linalg.det(theirs), np.linalg.det(cell))


@pytest.mark.parametrize("name", CONVENTIONS)
def test_numbers_of_each_convention(name):
    """Written out once: sign, volume and order by hand."""
    cell = np.array([[2.0, 0, 0], [1, 3, 0], [0.5, 0.25, 4]])
    virial = 24 * np.array([[1.0, 6, 5], [6, 2, 4], [5, 4, 3]]) + (
        0 if name == "ase" else 24 * np.triu(np.ones((3, 3)), 1)
    )
    want = {
        "ase": [1, 2, 3, 4, 5, 6],
        "jax-md": [[-1, -6, -5], [-7, -2, -4], [-6, -5, -3]],
        "mace-virials": [[-24, -168, -144], [-144, -48, -120], [-120, -96, -72]],
    }
    plus = np.array([[1.0, 7, 6], [6, 2, 5], [5, 4, 3]])
    want |= {"nvalchemi-virial": want["mace-virials"], "kups": -plus, "nvalchemi-0.1": -plus}
    close(to(name, virial, cell), np.array(want.get(name, plus), float))
    assert (cell_to(name, cell) is cell) == (name not in ("torch-sim", "jax-md"))
    close(cell_to(name, cell)[:, 1], cell[1] if name in ("torch-sim", "jax-md") else cell[:, 1])


def test_derivatives_and_vmap_pass_through():
    virial, cell = data("ase", (4,))
    for name in CONVENTIONS:
        close(
            jax.vmap(partial(to, name))(jnp.asarray(virial), jnp.asarray(cell)),
            to(name, virial, cell),
        )
        close(
            torch.func.vmap(partial(to, name))(torch.tensor(virial), torch.tensor(cell)),
            to(name, virial, cell),
        )
    gradient = jax.grad(lambda w: to("ase", w, cell)[:, 5].sum())(jnp.asarray(virial))
    close(gradient[:, 0, 1], 0.5 / abs(np.linalg.det(cell)))
    w = torch.tensor(virial, requires_grad=True)
    to("ase", w, torch.tensor(cell))[:, 5].sum().backward()
    close(w.grad, gradient)


# What is refused

TWISTED = W + np.array([[0, 0.05, 0], [-0.05, 0, 0], [0, 0, 0]])
FLAT = np.array([[1.0, 1, 1], [1, 2, 3], [2, 3, 4]])


def pair(a, b):
    return np.stack([a, b])


BAD = [
    (
        lambda: to("vasp", W, CELL),
        "expected a convention among ase, ase-matrix, .*, got 'vasp'; take one of these",
    ),
    (lambda: cell_to(None, CELL), "got None; take one of these"),
    (
        lambda: to("ase", W),
        "expected a cell for ase, which divides by the volume, got None; pass our cell",
    ),
    (
        lambda: to("ase", W, pair(CELL, CELL)),
        r"expected a cell as \[3, 3\], got float64\[2,3,3\]; give one cell for each virial",
    ),
    (
        lambda: to("mace", W[:2], CELL),
        r"expected virial as \[3, 3\] or \[B, 3, 3\], got float64\[2,3\]; give one system",
    ),
    (
        lambda: from_("ase", W, CELL),
        r"expected ase stress as \[6\] or \[B, 6\], got float64\[3,3\]",
    ),
    (
        lambda: from_("mace virials", np.ones(6)),
        r"expected mace virials virial as \[3, 3\] or \[B, 3, 3\], got float64\[6\]",
    ),
    (
        lambda: cell_from("ase", np.ones(3)),
        r"expected cell as \[3, 3\] or \[B, 3, 3\], got float64\[3\]",
    ),
    (
        lambda: pressure(W, 0 * CELL),
        "expected an invertible cell, got a singular cell in system 0; it has no stress; use the "
        "virial",
    ),
    (
        lambda: to("kups", pair(W, W), pair(CELL, FLAT)),
        "got a singular cell in system 1; it has no stress",
    ),
    (
        lambda: from_("kups", pair(W, W), pair(CELL, np.full((3, 3), np.nan))),
        "got a singular cell in system 1",
    ),
    (
        lambda: to("ase", TWISTED, CELL),
        "expected a symmetric virial, got an asymmetric one in system 0; look at how it was made",
    ),
    (
        lambda: to("ase", torch.tensor(pair(W, TWISTED)), torch.tensor(pair(CELL, CELL))),
        "asymmetric one in system 1",
    ),
    (
        lambda: to("ase", jnp.asarray(TWISTED), jnp.asarray(CELL)),
        'asymmetric one in system 0; .* or take "ase-matrix"',
    ),
]


@pytest.mark.parametrize("call, text", BAD, ids=range(len(BAD)))
def test_refused(call, text):
    with pytest.raises(ValueError, match=text):
        call()


@pytest.mark.parametrize(
    "traced", [jax.jit, jax.vmap, torch.func.vmap], ids=["jit", "vmap", "torch.func.vmap"]
)
def test_what_is_refused_is_nan_under_tracing(traced):
    array = torch.tensor if traced is torch.func.vmap else jnp.asarray
    for virial, cell in ((pair(W, TWISTED), pair(CELL, CELL)), (pair(W, W), pair(CELL, FLAT))):
        value = np.asarray(traced(partial(to, "ase"))(array(virial), array(cell)))
        close(value[0], to("ase", W, CELL))
        assert np.isnan(value[1]).all()


def test_rounding_is_averaged_over():
    noisy = W + 1e-6 * RNG.normal(size=(3, 3))
    close(
        to("ase", noisy.astype(np.float32), CELL.astype(np.float32)),
        full_3x3_to_voigt_6_stress(noisy / VOLUME),
        1e-6,
    )
    tiny = 1e-7 * RNG.normal(size=(3, 3))  # at rest
    close(to("ase", tiny, CELL), full_3x3_to_voigt_6_stress(tiny / VOLUME))
