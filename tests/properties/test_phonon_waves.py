"""jax_side.properties.phonons against phonopy, finite differences and larger cells, for a torch
model and for pure JAX."""

import warnings
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import phonopy
import pytest
from phonopy import PhonopyGruneisen
from phonopy.structure.atoms import PhonopyAtoms

import bridge
from bridge.card import Card
from jax_side.engines.phonopy import phonopy as as_phonopy
from jax_side.potentials import second
from jax_side.potentials.potential import potential
from jax_side.properties.phonons import (
    centred,
    force_constants,
    grid,
    phonons,
    volume_slope,
)
from tests.cases import close
from tests.phonon_cases import (
    ANION,
    CUTOFF,
    ENERGIES,
    Ions,
    arrays,
    crystal,
    jax_energy,
    torch_energy,
    waves,
)

REPEATS = {"rocksalt": (3, 3, 3), "layers": (3, 3, 1)}
Q = waves()


def supercell_of(structure):
    return crystal(structure) * REPEATS[structure]


def of(kind, structure, lane="ffi"):
    """The energy of the supercell, and its phonons: once for each lane of a torch model."""
    return _of(kind, structure, lane if kind == "torch" else "ffi")


@cache
def _of(kind, structure, lane):
    atoms = crystal(structure)
    options = {"lane": lane} if kind == "torch" else {}
    energy = ENERGIES[kind](supercell_of(structure).numbers, **options)
    return energy, phonons(
        energy, *arrays(atoms), atoms.get_masses(), REPEATS[structure], reach=CUTOFF
    )


@cache
def displaced(structure):
    """phonopy's own phonons, from forces of displaced atoms."""
    atoms = crystal(structure)
    made = phonopy.Phonopy(
        PhonopyAtoms(atoms.symbols, cell=atoms.cell, scaled_positions=atoms.get_scaled_positions()),
        np.diag(REPEATS[structure]),
        primitive_matrix=np.eye(3),
    )
    made.generate_displacements(distance=1e-3, is_plusminus=True)
    energy = jax_energy(made.supercell.numbers)
    forces = jax.jit(lambda r, h: -jax.grad(energy)(r, h))
    made.forces = [
        np.asarray(forces(jnp.array(x.positions), jnp.array(x.cell)))
        for x in made.supercells_with_displacements
    ]
    made.produce_force_constants()
    made.symmetrize_force_constants()
    return made


@pytest.mark.parametrize("structure", REPEATS)
@pytest.mark.parametrize("kind", ENERGIES)
def test_frequencies_x_phonopys_displacements(kind, structure):
    theirs = displaced(structure)
    theirs.masses = crystal(structure).get_masses()
    theirs.run_qpoints(Q)
    found = np.asarray(of(kind, structure)[1].frequencies(Q))
    assert found.min() > -1e-5 and found.max() > 8
    np.testing.assert_allclose(found, theirs.qpoints.frequencies, rtol=1e-5, atol=2e-3)


@pytest.mark.parametrize("structure", REPEATS)
def test_torch_x_jax(structure, lane):
    close(of("torch", structure, lane)[1].constants, of("jax", structure)[1].constants)


def test_one_cell_x_the_hessian_of_all_atoms():
    energy, found = of("torch", "rocksalt")
    atoms, n = supercell_of("rocksalt"), 2
    whole = jax.jit(partial(second.hessian, energy))(*arrays(atoms))
    close(found.constants, whole[:n].reshape(found.constants.shape))
    some = jax.jit(partial(force_constants, energy, repeats=(3, 3, 3), chunk=2))
    some = some(*arrays(crystal()))
    close(some, whole[:n].reshape(some.shape))


def test_commensurate_waves_x_the_supercell_at_rest():
    """At wave vectors that the supercell holds, nothing is interpolated."""
    energy, found = of("torch", "rocksalt")
    atoms = supercell_of("rocksalt")
    points = np.stack(np.meshgrid(*3 * [np.arange(3) / 3], indexing="ij"), -1).reshape(-1, 3)
    folded = np.sort(np.asarray(found.frequencies(points)).ravel())
    want = second.frequencies(energy, *arrays(atoms), atoms.get_masses())
    np.testing.assert_allclose(folded, want, atol=1e-5)


def test_a_larger_supercell_says_the_same():
    """The cutoff ends all force constants within it."""
    atoms = crystal()
    larger = (atoms * (4, 3, 3)).numbers
    found = phonons(torch_energy(larger), *arrays(atoms), atoms.get_masses(), (4, 3, 3))
    close(found.frequencies(Q), of("torch", "rocksalt")[1].frequencies(Q), 1e-6)


def test_supercells_by_a_matrix():
    """The cubic supercell of 8 and more cells; atoms in the order of supercells.supercell."""
    atoms, p = crystal(), 2 * np.array([[-1, 1, 1], [1, -1, 1], [1, 1, -1]])
    energy = jax_energy(np.tile(atoms.numbers, 32))
    found = phonons(energy, *arrays(atoms), atoms.get_masses(), p, reach=CUTOFF)
    close(found.frequencies(Q), of("jax", "rocksalt")[1].frequencies(Q), 1e-6)


def test_dynamical_matrices_x_frequencies_and_modes():
    _, found = of("jax", "layers")
    d = np.asarray(jax.jit(found.dynamical_matrices)(Q))
    assert d.shape == (len(Q), 18, 18)
    close(d, d.conj().swapaxes(1, 2))
    f, e = found.modes(Q)
    close(f, found.frequencies(Q), 1e-6)
    squares = (np.asarray(f) / second.THZ) ** 2 * np.sign(f)
    np.testing.assert_allclose(d @ e, e * squares[:, None], atol=1e-9)
    np.testing.assert_allclose(found.frequencies(Q, unit="meV"), f * 4.13566770, rtol=1e-8)
    close(found.frequencies(Q[:4].reshape(2, 2, 3)), f[:4].reshape(2, 2, 18), 1e-6)
    close(found.frequencies(Q[0]), f[0], 1e-6)
    close(found.frequencies(Q + np.array([1, -2, 3])), f, 1e-6)
    waves = jax.jit(lambda p, q: p.frequencies(q))(found, Q)  # a pytree
    close(waves, f, 1e-6)


@pytest.mark.parametrize(
    ("kind", "structure", "relaxed"),
    [("torch", "layers", True), ("torch", "layers", False), ("jax", "rocksalt", True)],
)
def test_gruneisen_x_finite_differences(kind, structure, relaxed):
    energy, at = of(kind, structure)
    found = at.gruneisen(Q, volume_slope(energy, at, relaxed=relaxed))
    atoms, h = crystal(structure), 1e-4
    own = jax_energy(atoms.numbers, 3)
    frequencies = []
    for change in (-h, h):
        r, cell = (x * (1 + change) ** (1 / 3) for x in arrays(atoms))
        for _ in range(3 * relaxed):
            r = r - second.respond(second.hessian(own, r, cell), jax.grad(own)(r, cell))
        there = phonons(energy, r, cell, atoms.get_masses(), REPEATS[structure], reach=CUTOFF)
        frequencies.append(np.asarray(there.frequencies(Q)))
    want = -(frequencies[1] - frequencies[0]) / (2 * h) / np.asarray(at.frequencies(Q))
    moving = np.asarray(at.frequencies(Q)) > 0.1
    assert moving.mean() > 0.9
    np.testing.assert_allclose(np.asarray(found)[moving], want[moving], rtol=1e-4, atol=1e-4)
    assert np.isnan(found[0, :3]).all() and np.isfinite(found[0, 3:]).all()


def test_relaxation_makes_a_difference_where_atoms_are_free():
    energy, at = of("torch", "layers")
    both = [at.gruneisen(Q[5:], volume_slope(energy, at, relaxed=x)) for x in (True, False)]
    assert abs(both[0] - both[1]).max() > 0.01


def test_gruneisen_x_phonopy():
    energy, at = of("jax", "rocksalt")
    atoms, h = crystal(), 1e-3
    made = []
    for change in (1, 1 + h, 1 - h):
        r, cell = (x * change ** (1 / 3) for x in arrays(atoms))
        there = phonons(energy, r, cell, atoms.get_masses(), (3, 3, 3), reach=CUTOFF)
        made.append(as_phonopy(there, atoms.numbers))
    theirs = PhonopyGruneisen(*made)
    theirs.set_mesh((3, 3, 3), is_gamma_center=True, is_mesh_symmetry=False)
    q, _, _, _, want = theirs.get_mesh()
    found = np.asarray(at.gruneisen(q, volume_slope(energy, at)))
    order = lambda x: np.sort(x, axis=-1)
    away = np.linalg.norm(q, axis=1) > 1e-6
    np.testing.assert_allclose(order(found[away]), order(want[away]), rtol=1e-3, atol=1e-3)


def test_density_of_states_x_phonopy():
    _, at = of("jax", "layers")
    f = np.linspace(-1, 13, 200)
    theirs = as_phonopy(at, crystal("layers").numbers)
    theirs.run_mesh((5, 4, 3), is_gamma_center=True, is_mesh_symmetry=False)
    theirs.run_total_dos(
        sigma=0.3,
        freq_min=f[0],
        freq_max=f[-1],
        freq_pitch=f[1] - f[0],
        use_tetrahedron_method=False,
    )
    found = at.dos((5, 4, 3), f, width=0.3)
    n = len(theirs.total_dos.dos)
    np.testing.assert_allclose(theirs.total_dos.frequency_points, f[:n], atol=1e-9)
    np.testing.assert_allclose(found[:n], theirs.total_dos.dos, atol=1e-4)
    assert abs(found.sum() * (f[1] - f[0]) - 18) < 1e-3


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 3, 4), (5, 1, 2)])
def test_meshes(mesh, shifted):
    """All points of the mesh, each as itself or as its opposite."""
    q, weights = grid(mesh, shifted=shifted)
    np.testing.assert_allclose(weights.sum(), 1)
    steps = np.array(mesh)
    index = lambda q: {tuple(x) for x in np.rint(q * steps - shifted / 2).astype(int) % steps}
    both = index(q) | index(-q)
    assert len(both) == steps.prod()
    assert len(index(q) & index(-q)) == round((weights * steps.prod() == 1).sum())
    f = lambda q: np.asarray(of("jax", "rocksalt")[1].frequencies(q))
    every = np.stack(np.meshgrid(*map(np.arange, mesh), indexing="ij"), -1).reshape(-1, 3)
    np.testing.assert_allclose(weights @ f(q), f((every + shifted / 2) / steps).mean(0), atol=1e-6)


# The sum rule, and warnings


def test_sum_rule_x_a_crystal_that_is_held():
    """Each atom on a spring of its own: moved as a whole it resists, and one is told how much."""
    atoms, masses = crystal(), crystal().get_masses()
    free = jax_energy(supercell_of("rocksalt").numbers)
    sites = jnp.array(supercell_of("rocksalt").positions)
    held = lambda r, h: free(r, h) + 0.2 * ((r - sites) ** 2).sum()
    text = r"expected force constants that are symmetric, .* rows that sum to 0.05"
    with pytest.warns(UserWarning, match=text):
        found = phonons(held, *arrays(atoms), masses, (3, 3, 3), reach=CUTOFF)
    raw = phonons(held, *arrays(atoms), masses, (3, 3, 3), reach=CUTOFF, sum_rule=False)
    largest = abs(raw.constants).max()
    np.testing.assert_allclose(found.drift * largest, 0.4, rtol=1e-6)
    assert raw.drift == found.drift
    assert abs(found.frequencies(np.zeros(3))[:3]).max() < 1e-5
    assert raw.frequencies(np.zeros(3))[0] > 1
    again = centred(found.constants)
    close(again, found.constants)


def test_the_sum_rule_is_the_nearest_one():
    """centred projects the matrix of the whole supercell."""
    rng = np.random.default_rng(0)
    raw = of("jax", "rocksalt")[1].constants
    noise = rng.normal(size=(54, 3, 54, 3))
    where = np.arange(27).reshape(3, 3, 3)
    moved = lambda x, n: np.roll(x.reshape(3, 3, 3, -1), n, (0, 1, 2)).reshape(27, -1)
    whole = np.zeros((54, 3, 54, 3))
    for n in np.ndindex(3, 3, 3):  # with the lattice's symmetry
        order = (2 * moved(where.reshape(27, 1), n) + np.arange(2)).ravel()
        whole += noise[order][:, :, order] / 27
    whole = whole + whole.transpose(2, 3, 0, 1)
    center = np.eye(54) - 1 / 54
    want = np.einsum("ij,jakb,kl->ialb", center, whole, center)
    found = centred(jnp.asarray(whole[:2].reshape(raw.shape)))
    close(found, want[:2].reshape(raw.shape), 1e-9)


def test_forces_that_are_no_gradient_are_told():
    """A model whose own gradients are those of no energy."""

    def model(x):
        pos, cell = x["pos"], x["cell"]
        swirl = 0.5 * jnp.roll(pos, 1, 0)
        return {
            "energy": jnp.zeros(1, pos.dtype) + 0.0 * pos.sum(),
            "position_gradients": pos - swirl,
            "cell_gradients": jnp.zeros_like(cell),
        }

    energy = potential(model, atomic_numbers=np.ones(27, int))
    with pytest.warns(UserWarning, match="of the largest without symmetry"):
        found = phonons(
            energy, jnp.zeros((1, 3)), 3 * jnp.eye(3), [1.0], (3, 3, 3), reach=0.0, sum_rule=False
        )
    assert found.asymmetry > 0.1


def test_a_supercell_that_may_be_too_small_is_warned_of():
    """No card, and force constants of neighbours at the border; one cell, where nobody can see."""
    atoms, masses = crystal(), crystal().get_masses()
    small = jax_energy((atoms * (2, 2, 2)).numbers, 2)
    text = (
        r"expected force constants that end within 2.86 Angstrom, .* of the largest at its border"
    )
    with pytest.warns(UserWarning, match=text):
        found = phonons(small, *arrays(atoms), masses, (2, 2, 2))
    assert 1e-3 < found.border < 1
    spring = lambda r, h: (r**2).sum()
    with pytest.warns(UserWarning, match="got nan of the largest"):
        one = phonons(spring, jnp.zeros((1, 3)), jnp.eye(3), [1.0], (1, 1, 1), sum_rule=False)
    assert np.isnan(one.border)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        phonons(small, *arrays(atoms), masses, (2, 2, 2), reach=2.0)
        large = jax_energy(supercell_of("rocksalt").numbers)
        found = phonons(large, *arrays(atoms), masses, (3, 3, 3))
    assert found.border < 1e-3


def test_the_card_knows_how_far_a_potential_reaches():
    atoms = crystal()
    energy = torch_energy((atoms * (2, 2, 2)).numbers)
    text = r"no shorter than 8.00 Angstrom, .* got one of 5.73 Angstrom, 2.27 too short"
    with pytest.raises(ValueError, match=text):
        phonons(energy, *arrays(atoms), atoms.get_masses(), (2, 2, 2))


# Dtypes, lanes, errors


def test_float32():
    atoms = crystal()
    r, h = (x.astype("float32") for x in arrays(atoms))
    energy = torch_energy(supercell_of("rocksalt").numbers)
    found = phonons(energy, r, h, atoms.get_masses(), (3, 3, 3))
    f = found.frequencies(Q)
    assert f.dtype == "float32" and found.drift < 1e-5 and found.asymmetry < 1e-5
    assert found.weights.shape == of("torch", "rocksalt")[1].weights.shape  # the same ties
    np.testing.assert_allclose(f, of("torch", "rocksalt")[1].frequencies(Q), atol=5e-3)
    slope = volume_slope(energy, found)
    want = of("jax", "rocksalt")
    want = want[1].gruneisen(Q[5:], volume_slope(*want))
    np.testing.assert_allclose(found.gruneisen(Q[5:], slope), want, rtol=2e-3, atol=2e-3)


@pytest.mark.full
def test_native_lane():
    """A compiled model, its edges given."""
    atoms, large = crystal(), supercell_of("rocksalt")
    card = Card(
        outputs={"energy", "position_gradients", "cell_gradients"},
        cutoff=CUTOFF,
        neighbor_list="given",
        batches=True,
    )
    bound = bridge.potential(
        Ions(),
        atomic_numbers=large.numbers,
        pbc=True,
        card=card,
        gradients="autograd",
        lane="native",
    )
    edges = bridge.edges(CUTOFF, 3000)(*arrays(large))
    energy = lambda r, h: bound(r, h, **edges)
    found = phonons(energy, *arrays(atoms), atoms.get_masses(), (3, 3, 3), reach=CUTOFF)
    close(found.constants, of("jax", "rocksalt")[1].constants)


def test_one_call_into_torch():
    """All rows from one record of the forward."""
    calls = []

    class Counted(Ions):
        def forward(self, x):
            calls.append(1)
            return super().forward(x)

    atoms = crystal()
    energy = bridge.potential(
        Counted(),
        atomic_numbers=supercell_of("rocksalt").numbers,
        cutoff=CUTOFF,
        gradients="autograd",
    )
    f = jax.jit(lambda r, h: force_constants(energy, r, h, (3, 3, 3)))
    compiled = f.lower(*arrays(atoms)).compile()
    calls.clear()
    jax.block_until_ready(compiled(*arrays(atoms)))
    assert len(calls) == 1


def test_gradients_of_frequencies_in_masses():
    """What comes of phonons differentiates: isotopes."""
    _, at = of("jax", "rocksalt")

    def highest(masses):
        return replace(at, masses=masses).frequencies(np.array([0.1, 0.2, 0.3]))[-1]

    m, h = at.masses, 1e-4
    found = jax.grad(highest)(m)
    want = [(highest(m.at[i].add(h)) - highest(m.at[i].add(-h))) / (2 * h) for i in range(2)]
    np.testing.assert_allclose(found, want, rtol=1e-6)


def simple(**changed):
    given = {
        "positions": np.zeros((1, 3)),
        "cell": np.eye(3),
        "masses": [1.0],
        "repeats": (1, 1, 1),
        **changed,
    }
    return phonons(lambda r, h: (r**2).sum(), *given.values(), reach=0.0, sum_rule=False)


ERRORS = [
    (lambda: simple(masses=[1.0, 2.0]), r"expected masses as \[1\], positive, got .*\[2\]"),
    (lambda: simple(masses=[0.0]), r"expected masses as \[1\], positive"),
    (lambda: simple(positions=[[np.nan, 0, 0]]), r"expected finite positions, got .* for atom 0;"),
    (
        lambda: phonons(lambda r, h: 0 * r.sum(), np.zeros((1, 3)), np.eye(3), [1.0], (1, 1, 1)),
        "expected force constants that are not all zero, got 0.0; look at the cell",
    ),
    (lambda: simple().dos((2, 2, 2), 20), r"expected frequencies as \[F\], in THz"),
    (lambda: as_phonopy(simple(), ["Cu"]), r"expected atomic numbers as \[1\], got \[1\] of <U2"),
    (lambda: simple(cell=None), r"expected a cell as \[3, 3\], got None"),
    (lambda: simple(repeats=(1, 1)), "expected repeats as three positive int"),
    (lambda: simple(positions=np.zeros((2, 1, 3))), r"expected positions as \[N, 3\]"),
    (lambda: simple().frequencies([0.5]), r"expected wave vectors as \[..., 3\], got .*\[1\]"),
    (lambda: simple().frequencies(Q, unit="Hz"), "expected a unit among .*, got 'Hz'"),
    (lambda: grid((2, 2)), r"expected a mesh of three positive int, got \(2, 2\)"),
    (lambda: grid((2, 0, 2)), r"got \(2, 0, 2\); give counts as"),
    (lambda: grid((2.0, 2, 2)), "expected a mesh of three positive int"),
    (
        lambda: as_phonopy(simple(), [ANION, ANION]),
        r"expected atomic numbers as \[1\], got \[2\]; give those of the crystal",
    ),
]


@pytest.mark.parametrize(("call", "text"), ERRORS)
def test_errors(call, text):
    with pytest.raises(ValueError, match=text):
        call()
