"""jax_side.potentials.second against JAX's own Hessian, finite differences of stresses, jax-md, and
torch potentials against their JAX twin."""

import itertools
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax_md import elasticity, space
from jax_md import energy as jax_md_energy

import bridge
from jax_side.potentials import strain
from jax_side.potentials.potential import potential
from jax_side.potentials.second import (
    STIFFNESSES,
    dynamical_matrix,
    elastic_constants,
    frequencies,
    hessian,
    hessian_rows,
    hvp,
)
from tests.cases import close
from torch_side.potentials import strain as torch_strain

NUMBERS = np.array([1, 2, 2])  # species: A, B, B
IMAGES = np.array(list(itertools.product((-1, 0, 1), repeat=3)), float)
# the cell, nearly without stress
AT_REST = jnp.array([[1.62, 0.01, -0.33], [-0.26, 2.29, -0.76], [0.57, -0.33, 2.34]])
CELL = AT_REST @ jnp.array([[1.02, 0.01, 0.0], [0.01, 0.98, 0.03], [0.0, 0.03, 1.01]])
START = jnp.array([[0.42, 0.28, 0.17], [0.15, 0.6, 0.83], [0.69, 0.94, 0.49]]) @ CELL
MASSES = np.array([1.0, 12.0, 16.0])
VOIGT = [(0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)]


def pairs(np_, array, by_system):
    """One text for both frameworks: Gaussians of 27 images, repulsive and attractive by species."""

    def energy(x):
        pos, cell, z, batch = (x[k] for k in ("pos", "cell", "atomic_numbers", "batch"))
        r = (
            pos[None, :, None]
            - pos[:, None, None]
            + (array(IMAGES, pos.dtype) @ cell)[batch][:, None]
        )
        d2, a = (r**2).sum(-1), (z[:, None] * z[None])[..., None]
        both = (12 * a * np_.exp(-2 * d2) - np_.exp(-d2 / 3)).sum(-1) * (
            batch[:, None] == batch[None]
        )
        return by_system(both.sum(-1) / 2, batch, cell)

    return energy


in_jax = pairs(
    jnp, jnp.asarray, lambda x, batch, cell: jax.ops.segment_sum(x, batch, num_segments=len(cell))
)
in_torch = pairs(
    torch,
    lambda x, dtype: torch.as_tensor(x, dtype=dtype),
    lambda x, batch, cell: x.new_zeros(len(cell)).index_add(0, batch.long(), x),
)


class Direct(torch.nn.Module):
    """Returns its own gradients, and counts its calls."""

    calls = 0

    def forward(self, x):
        type(self).calls += 1
        return torch_strain.with_gradients(in_torch)(x)


MODELS = {
    "energy only": (lambda x: {"energy": in_torch(x)}, "autograd"),
    "direct": (Direct(), "model"),
}
TWIN = potential(strain.with_gradients(in_jax), atomic_numbers=NUMBERS)


@jax.jit
def pure(positions, cell):
    """The same without a contract."""
    return in_jax(
        {"pos": positions, "cell": cell[None], "atomic_numbers": NUMBERS, "batch": np.zeros(3, int)}
    )[0]


def bridged(kind, lane="auto"):
    model, gradients = MODELS[kind]
    return bridge.potential(model, atomic_numbers=NUMBERS, gradients=gradients, lane=lane)


def relax(positions, cell, steps=12):
    """Newton steps in the internal coordinates."""
    for _ in range(steps):
        h = step_hessian(positions, cell).reshape(positions.size, -1)
        positions = positions - (
            jnp.linalg.pinv(h, rtol=1e-8, hermitian=True) @ step_gradient(positions, cell).ravel()
        ).reshape(-1, 3)
    return positions


step_hessian, step_gradient = jax.jit(partial(hessian, pure)), jax.jit(jax.grad(pure))
stress_of = jax.jit(TWIN.stress)


@cache
def crystal():
    """At rest in its cell: stable, under a large stress that is no pressure."""
    positions = relax(START, CELL)
    assert abs(step_gradient(positions, CELL)).max() < 1e-10
    assert np.linalg.eigvalsh(step_hessian(positions, CELL).reshape(9, 9))[3] > 0.1
    s = np.asarray(stress_of(positions, CELL))
    assert np.ptp(np.diag(s)) > 0.01 and abs(s[0, 1]) > 1e-3
    return positions, CELL


@cache
def jax_hessian():
    return jax.jit(jax.hessian(pure))(START, CELL)


# Hessian, rows, products


@pytest.mark.parametrize("energy", [pure, TWIN], ids=["pure", "contract"])
def test_hessian_x_jax(energy):
    for chunk in (None, 4):
        close(jax.jit(partial(hessian, energy, chunk=chunk))(START, CELL), jax_hessian())


def test_rows_and_products_x_jax():
    want, rows = jax_hessian(), np.array([7, 0, 7])
    given = (rows, jnp.array(rows), np.stack([rows // 3, rows % 3], 1), [(2, 1), (0, 0), (2, 1)])
    found = jax.jit(lambda r: [hessian_rows(pure, r, CELL, g) for g in given])(START)
    close(found, 4 * [want.reshape(9, 3, 3)[rows]])
    close(
        jax.jit(partial(hessian_rows, pure, chunk=2))(START, CELL, rows),
        want.reshape(9, 3, 3)[rows],
    )
    v = jnp.sin(jnp.arange(18.0)).reshape(2, 3, 3)
    close(jax.jit(partial(hvp, pure))(START, CELL, v), jnp.einsum("iajb,kjb->kia", want, v))
    close(hvp(pure, START, CELL, v[1]), jnp.einsum("iajb,jb->ia", want, v[1]))  # without jit


def test_without_a_cell():
    energy = lambda r, cell=None: pure(r, 50 * jnp.eye(3))
    close(jax.jit(partial(hessian, energy))(START), jax.jit(jax.hessian(energy))(START))
    f = jax.jit(lambda r: frequencies(energy, r, None, MASSES))(START)
    assert (abs(f) > 1e-2).sum() <= 9 - 3


def test_vmap_over_structures():
    many, cells = jnp.stack([START, 1.05 * START]), jnp.stack([CELL, 1.02 * CELL])
    for f in (partial(elastic_constants, pure), lambda r, h: frequencies(pure, r, h, MASSES)):
        single = jax.jit(f)
        want = jnp.stack([single(r, h) for r, h in zip(many, cells)])
        close(jax.jit(jax.vmap(f))(many, cells), want, 1e-7)


def test_third_derivatives():
    """What is made of second derivatives differentiates."""
    f, v, h = jax.jit(lambda r: elastic_constants(pure, r, CELL)[0, 4]), jnp.cos(START), 1e-5
    close(
        jax.jit(lambda r: jax.jvp(f, (r,), (v,))[1])(START),
        (f(START + h * v) - f(START - h * v)) / (2 * h),
        1e-6,
    )


# Torch potentials


@pytest.mark.parametrize("kind", MODELS)
def test_bridged_hessian_x_pure_twin(kind, lane, maybe_jit):
    energy = bridged(kind, lane)
    close(maybe_jit(partial(hessian, energy))(START, CELL), jax_hessian())


def all_of_it(energy, r, h):
    v = jnp.sin(jnp.arange(18.0)).reshape(2, 3, 3)
    return {
        "rows": hessian_rows(energy, r, h, [8, 2]),
        "hvp": hvp(energy, r, h, v),
        "clamped": elastic_constants(energy, r, h, False),
        "relaxed": elastic_constants(energy, r, h, stiffness="stress"),
        "frequencies": frequencies(energy, r, h, MASSES)[3:],
        "vmap": jax.vmap(lambda r: hvp(energy, r, h, v))(jnp.stack([r, START])),
    }


@cache
def all_of_the_twin():
    return jax.jit(partial(all_of_it, pure))(*crystal())


@pytest.mark.parametrize("kind", MODELS)
def test_bridged_rows_products_and_moduli_x_pure_twin(kind):
    close(jax.jit(partial(all_of_it, bridged(kind)))(*crystal()), all_of_the_twin(), 1e-8)


def test_torch_runs_once_for_all_rows():
    energy, Direct.calls = bridged("direct"), 0
    compiled = jax.jit(partial(hessian, energy)).lower(START, CELL).compile()
    Direct.calls = 0
    jax.block_until_ready(compiled(START, CELL))
    assert Direct.calls == 1


# Elastic constants


def differences(f, h=1e-4):
    """df/deta (len(f), 6) for the Voigt components of a symmetric strain."""
    columns = []
    for i, j in VOIGT:
        e = np.zeros((3, 3))
        e[i, j] += h / 2
        e[j, i] += h / 2
        columns.append((np.asarray(f(e)) - np.asarray(f(-e))) / (2 * h))
    return np.stack(columns, -1)


def voigt(matrix):
    return np.array([matrix[ij] for ij in VOIGT])


def strained(e, relaxed):
    r, h = crystal()
    r, h = r @ (np.eye(3) + e), h @ (np.eye(3) + e)
    return (relax(r, h, 4) if relaxed else r), h


def conjugate(stiffness, relaxed):
    """The stress that belongs to each measure of strain, as a function of a strain in that
    measure."""
    volume = abs(np.linalg.det(CELL))
    slope = jax.jit(jax.grad(lambda e, r, h: pure(r @ (jnp.eye(3) + e), h @ (jnp.eye(3) + e))))

    def cauchy(e):
        return voigt(np.asarray(stress_of(*strained(e, relaxed))))

    def of_energy(e):
        r, h = strained(e, relaxed)
        back = np.linalg.inv(np.eye(3) + e)
        g = np.asarray(slope(e, r @ back, h @ back))
        return voigt((g + g.T) / 2) / volume

    def second_piola(green):
        w, v = np.linalg.eigh(np.eye(3) + 2 * green)
        f = v @ np.diag(np.sqrt(w)) @ v.T  # symmetric stretch
        s = np.asarray(stress_of(*strained(f - np.eye(3), relaxed)))
        return voigt(np.linalg.det(f) * np.linalg.inv(f) @ s @ np.linalg.inv(f))

    return {"stress": cauchy, "energy": of_energy, "lagrangian": second_piola}[stiffness]


@cache
def moduli(relaxed, stiffness):
    return jax.jit(partial(elastic_constants, TWIN, relaxed=relaxed, stiffness=stiffness))


@pytest.mark.parametrize("stiffness", STIFFNESSES)
@pytest.mark.parametrize("relaxed", [False, True], ids=["clamped", "relaxed"])
def test_elastic_constants_x_finite_differences_of_stresses(relaxed, stiffness):
    r, h = crystal()
    found = moduli(relaxed, stiffness)(r, h)
    want = differences(conjugate(stiffness, relaxed))
    close(found, want, 1e-6)
    others = [moduli(relaxed, s)(r, h) for s in STIFFNESSES if s != stiffness]
    others.append(moduli(not relaxed, stiffness)(r, h))
    # none of the others would pass
    assert min(abs(x - found).max() for x in others) > 0.01 * abs(found).max()


def test_stiffnesses_agree_without_stress_and_the_newton_step_finds_it():
    """Steps by the relaxed constants take the cell to zero stress, quadratically."""
    r, h = crystal()
    for _ in range(8):
        k, s = moduli(True, "stress")(r, h), voigt(np.asarray(stress_of(r, h)))
        eta = np.clip(-np.linalg.solve(k, s), -0.03, 0.03)
        e = np.array(
            [
                [eta[0], eta[5] / 2, eta[4] / 2],
                [eta[5] / 2, eta[1], eta[3] / 2],
                [eta[4] / 2, eta[3] / 2, eta[2]],
            ]
        )
        r, h = r @ (np.eye(3) + e), h @ (np.eye(3) + e)
        r = relax(r, h, 4)
    assert abs(stress_of(r, h)).max() < 1e-10
    k, *others = (moduli(True, s)(r, h) for s in STIFFNESSES)
    for other in others:
        close(other, k, 1e-7)
    assert (
        np.linalg.eigvalsh(k).min() > 0
        and abs(k - moduli(False, "energy")(r, h)).max() > 0.01 * abs(k).max()
    )


def test_elastic_constants_x_x64_switched():
    """Of a program that was compiled with x64 on, JAX keeps index arrays of 64 bits."""

    def spring(x):
        return (x["cell"] ** 2).sum((1, 2)) + (x["pos"] ** 2).sum()

    constants = partial(
        elastic_constants, potential(strain.with_gradients(spring), atomic_numbers=np.array([1]))
    )
    wide = jax.jit(constants)(jnp.zeros((1, 3)), jnp.eye(3))
    with jax.enable_x64(False):
        narrow = constants(jnp.zeros((1, 3)), jnp.eye(3))
    assert wide.dtype == "float64" and narrow.dtype == "float32"
    np.testing.assert_allclose(narrow, wide, atol=1e-5)


def test_elastic_constants_x_jax_md():
    """athermal_moduli of its own pair potential, 32 atoms, triclinic and rattled: not at rest, but
    the formula is the same."""
    sites = (
        np.array(list(itertools.product((0, 0.5), repeat=3)))[:, None]
        + np.array([[0, 0, 0], [1, 1, 0], [1, 0, 1], [0, 1, 1]]) / 4
    )
    sites = jnp.asarray(sites.reshape(-1, 3) + 0.01 * np.random.default_rng(1).normal(size=(32, 3)))
    box = 3.2 * jnp.array([[1, 0.05, -0.04], [0, 1.02, 0.06], [0, 0, 0.97]])  # columns
    spheres = partial(jax_md_energy.soft_sphere_pair, sigma=1.25, alpha=3.0)  # exact in float32
    r = sites @ box.T
    native = spheres(space.periodic_general(box, fractional_coordinates=False)[0])
    C, converged = jax.jit(
        elasticity.athermal_moduli(native, cg_tol=1e-12, check_convergence=True)
    )(r, box)

    def ours(r, cell):
        def nearest(a, b, **_):
            s = (a - b) @ jnp.linalg.inv(cell)
            return (s - jnp.round(s)) @ cell

        return spheres(nearest)(r)

    i, j = np.array(VOIGT).T
    assert converged
    close(jax.jit(partial(elastic_constants, ours))(r, box.T), C[i, j][:, i, j], 1e-8)


# Units, masses, errors


def test_frequencies_of_a_diatomic_molecule():
    """omega = sqrt(k / mu): carbon monoxide's force constant gives its 2143 cm^-1 harmonic wave
    number within 2 %."""
    k = 1902.0 / 16.02176634  # N/m in eV/Angstrom^2
    spring = lambda r, cell: 0.5 * k * (jnp.linalg.norm(r[1] - r[0]) - 1.128) ** 2
    r, masses = jnp.array([[0.0, 0, 0], [0, 0, 1.128]]), np.array([12.011, 15.999])
    omega = np.sqrt(1902.0 / (masses.prod() / masses.sum() * 1.66053906660e-27))
    compiled = jax.jit(
        lambda r, unit: frequencies(spring, r, None, masses, unit=unit), static_argnums=1
    )
    for unit, scale in {
        "THz": 1e-12,
        "cm^-1": 1e-2 / 299792458,
        "meV": 6.62607015e-34 / 1.602176634e-19 * 1e3,
    }.items():
        close(compiled(r, unit)[-1], omega / (2 * np.pi) * scale, 1e-6)
    assert compiled(r, "cm^-1")[-1] == pytest.approx(2143, rel=0.02)
    # imaginary
    assert jax.jit(lambda r: frequencies(lambda r, h: -spring(r, h), r, None, masses))(r)[0] < -60


def test_dynamical_matrix_x_masses():
    want = np.asarray(jax_hessian()).reshape(9, 9) / np.sqrt(np.outer(*2 * [np.repeat(MASSES, 3)]))
    close(jax.jit(lambda r: dynamical_matrix(pure, r, CELL, MASSES))(START).reshape(9, 9), want)


BATCHED = potential(strain.with_gradients(in_jax), atomic_numbers=NUMBERS, batch=np.zeros(3, int))
ERRORS = [
    (
        lambda: hessian(BATCHED, START, CELL[None]),
        r"expected a scalar energy, got float64\[1\]; bind the potential to one system",
    ),
    (
        lambda: hessian(pure, START[None], CELL),
        r"expected positions as \[N, 3\], got float64\[1,3,3\]; .* use jax.vmap",
    ),
    (
        lambda: hvp(pure, START, CELL, START[0]),
        r"expected vectors as float64\[3,3\] or float64\[K,3,3\], got float64\[3\]; give one vector",
    ),
    (
        lambda: hvp(pure, START, CELL, np.ones((3, 3), np.float32)),
        r"got float32\[3,3\]; .* in the dtype of the positions",
    ),
    (
        lambda: hessian_rows(pure, START, CELL, [0, 9]),
        "expected rows of 3 atoms and 3 axes, got 9; count from 0",
    ),
    (lambda: hessian_rows(pure, START, CELL, [-1]), "got -1; count from 0"),
    (lambda: hessian_rows(pure, START, CELL, [(2, 0), (0, 3)]), r"got \[0, 3\]; count from 0"),
    (
        lambda: hessian_rows(pure, START, CELL, [0.5]),
        r"expected rows as int \[K\] or \[K, 2\], got float64\[1\]; give 3 atom",
    ),
    (
        lambda: elastic_constants(pure, START, None),
        r"expected a cell as \[3, 3\], got None; .* has no elastic constants",
    ),
    (
        lambda: elastic_constants(pure, START, 0 * CELL),
        "expected an invertible cell, got a singular one",
    ),
    (
        lambda: elastic_constants(pure, START, CELL, stiffness="bulk"),
        "expected stiffness to be one of energy, lagrangian, stress, got 'bulk'",
    ),
    (
        lambda: dynamical_matrix(pure, START, CELL, MASSES[:2]),
        r"expected masses as \[3\], positive, got float64\[2\]; give one mass in amu",
    ),
    (
        lambda: frequencies(pure, START, CELL, MASSES, unit="eV"),
        "expected a unit among THz, cm.-1, meV, got 'eV'",
    ),
]


@pytest.mark.parametrize("call, text", ERRORS, ids=range(len(ERRORS)))
def test_refused(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_what_is_refused_is_nan_under_tracing():
    rows = jax.jit(lambda rows: hessian_rows(pure, START, CELL, rows))
    assert (
        jnp.isnan(rows(jnp.array([9, 0]))[0]).all()
        and jnp.isfinite(rows(jnp.array([9, 0]))[1]).all()
    )
    assert (
        jnp.isnan(rows(jnp.array([(0, 3), (0, 0)]))[0]).all()
        and jnp.isfinite(rows(jnp.array([(0, 3), (0, 0)]))[1]).all()
    )
    assert jnp.isnan(
        jax.jit(partial(elastic_constants, pure, relaxed=False))(START, 0 * CELL)
    ).all()
