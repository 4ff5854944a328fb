"""potential(...) under JAX's transforms against the same energy differentiated by JAX; evaluations
counted; errors."""

import ase
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from bridge.contract import check_outputs, output_shapes
from jax_side.potentials import strain
from jax_side.potentials.potential import potential
from tests.matrices import a_few
from tests.potential_cases import Counted

rng = np.random.default_rng(0)
NUMBERS = np.array([1, 8, 6, 14])
R = jnp.asarray(rng.normal(size=(4, 3)))
H = jnp.asarray(3 * np.eye(3) + 0.4 * rng.normal(size=(3, 3)))
BATCH, CELLS = np.array([0, 2, 2, 2]), jnp.stack([H, 2 * H, 1.1 * H])  # the second system is empty


def energies(inputs):
    """(B,) of a smooth energy that couples the atoms of a system, its cell, its elements and its
    charge."""
    batch, pos = inputs["batch"], inputs["pos"]
    cell = inputs["cell"][batch]
    same = batch[:, None] == batch[None]
    d2 = ((pos[:, None] - pos[None]) ** 2).sum(-1)
    atoms = jnp.where(same, jnp.exp(-d2 / 3), 0).sum(-1) * inputs["atomic_numbers"]
    atoms += jnp.sin(jnp.einsum("ni,nij,nj->n", pos, cell, pos)) * (
        1 + inputs["pbc"][batch].sum(-1)
    )
    total = jax.ops.segment_sum(atoms, batch, num_segments=len(inputs["cell"]))
    return total * (1 + inputs.get("charge", 0.0))


MODEL = jax.jit(strain.with_gradients(energies))
ENERGY = potential(MODEL, atomic_numbers=NUMBERS)
BATCHED = potential(MODEL, atomic_numbers=NUMBERS, batch=BATCH, n_systems=3)


@jax.jit
def plain(r, h):
    """The same energy without any custom derivative."""
    pbc = jnp.ones((1, 3), bool)
    return energies(
        {
            "pos": r,
            "cell": h[None],
            "pbc": pbc,
            "batch": np.zeros(4, int),
            "atomic_numbers": NUMBERS,
        }
    )[0]


def close(a, b, tolerance=1e-11):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def walk(f):
    """A few steps down the gradient inside scan, and the energies on the way."""

    def run(r, h):
        step = lambda c, _: (c - 1e-3 * jax.grad(f)(c, h), f(c, h))
        r, out = lax.scan(step, r, None, length=3)
        return out.sum() + (r**2).sum()

    return run


TRANSFORMS = {
    "value": lambda f: f,
    "jit": jax.jit,
    "grad": lambda f: jax.grad(f, (0, 1)),
    "jit of grad": lambda f: jax.jit(jax.grad(f, (0, 1))),
    "grad of jit": lambda f: jax.grad(jax.jit(f), (0, 1)),
    "value_and_grad": lambda f: jax.jit(jax.value_and_grad(f, (0, 1))),
    "jvp": lambda f: lambda r, h: jax.jvp(f, (r, h), (2 * r, h)),
    "jvp in one argument": lambda f: lambda r, h: jax.jvp(lambda r: f(r, h), (r,), (2 * r,)),
    "linearize": lambda f: lambda r, h: jax.linearize(f, r, h)[1](r, 2 * h),
    "jacfwd": lambda f: jax.jacfwd(f, (0, 1)),
    "remat": lambda f: jax.jit(jax.grad(jax.checkpoint(f), (0, 1))),
    "vmap": lambda f: lambda r, h: jax.vmap(f)(jnp.stack([r, 2 * r]), jnp.stack([h, h])),
    "vmap of grad": lambda f: (
        lambda r, h: jax.jit(jax.vmap(jax.grad(f, (0, 1)), (0, None)))(jnp.stack([r, 2 * r]), h)
    ),
    "vmap over cells": lambda f: (
        lambda r, h: jax.vmap(jax.grad(f, 1), (None, 0))(r, jnp.stack([h, 2 * h]))
    ),
    "hessian": lambda f: jax.jit(jax.hessian(f, (0, 1))),
    "jacrev of jacrev": lambda f: jax.jit(jax.jacrev(jax.jacrev(f))),
    "vmap of hessian": lambda f: (
        lambda r, h: jax.jit(jax.vmap(jax.hessian(f), (0, None)))(jnp.stack([r, 2 * r]), h)
    ),
    "scan": lambda f: jax.jit(walk(f)),
    "grad of scan": lambda f: jax.jit(jax.grad(walk(f), (0, 1))),
    "third order": lambda f: (
        lambda r, h: jax.jit(jax.jacfwd(jax.hessian(lambda x: f(r * x[0] + x[1], h))))(jnp.ones(2))
    ),
}


@pytest.mark.parametrize("name", a_few(TRANSFORMS, 10))
def test_as_pure_jax(name):
    transform = TRANSFORMS[name]
    close(transform(ENERGY)(R, H), jax.jit(transform(plain))(R, H))


def test_gradients_are_the_models():
    g, G = jax.grad(ENERGY, (0, 1))(R, H)
    out = ENERGY.outputs(R, H)
    assert jnp.array_equal(g, out["position_gradients"]) and jnp.array_equal(
        G, out["cell_gradients"][0]
    )
    assert jnp.array_equal(ENERGY.forces(R, H), -g)


def test_stress_is_the_derivative_in_the_strain():
    W = jax.jit(jax.grad(lambda e: plain(R @ (jnp.eye(3) + e), H @ (jnp.eye(3) + e))))(
        jnp.zeros((3, 3))
    )
    close(ENERGY.stress(R, H), W / abs(jnp.linalg.det(H)))
    close(jax.jit(ENERGY.stress)(R, H), W / abs(jnp.linalg.det(H)))
    stress = BATCHED.stress(R, CELLS)
    assert stress.shape == (3, 3, 3)
    with pytest.raises(ValueError, match="no periodic axis in system 0; it has no stress"):
        ENERGY.stress(R)


def test_open_boundaries_need_no_cell():
    inputs = {
        "pos": R,
        "cell": jnp.zeros((1, 3, 3)),
        "pbc": jnp.zeros((1, 3), bool),
        "batch": np.zeros(4, int),
    }
    close(ENERGY(R), energies(inputs | {"atomic_numbers": NUMBERS})[0])
    close(jax.grad(ENERGY)(R), MODEL(inputs | {"atomic_numbers": NUMBERS})["position_gradients"])
    assert BATCHED(R).shape == (3,)


def test_batch_is_the_sum_of_its_systems():
    one = potential(MODEL, atomic_numbers=NUMBERS[:1])
    three = potential(MODEL, atomic_numbers=NUMBERS[1:])
    expected = jnp.stack([one(R[:1], CELLS[0]), jnp.zeros(()), three(R[1:], CELLS[2])])
    close(BATCHED(R, CELLS), expected)
    g, G = jax.grad(lambda r, h: BATCHED(r, h) @ jnp.array([1.0, 5.0, 2.0]), (0, 1))(R, CELLS)
    a, b = jax.grad(one, (0, 1))(R[:1], CELLS[0]), jax.grad(three, (0, 1))(R[1:], CELLS[2])
    close([g[:1], g[1:], G[0], G[1], G[2]], [a[0], 2 * b[0], a[1], jnp.zeros((3, 3)), 2 * b[1]])


def test_each_system_has_its_own_derivative():
    """dE[b] sums over the atoms of b alone."""
    change = jax.jvp(BATCHED, (R, CELLS), (R.at[0].set(0), CELLS.at[2].set(0)))[1]
    only = jax.jvp(lambda r: BATCHED(r, CELLS), (R,), (R.at[0].set(0),))[1]
    assert only[0] == 0 and only[2] != 0
    close(change[2], only[2])


def test_pbc_defaults_to_all_axes_with_a_cell():
    all_axes = potential(MODEL, atomic_numbers=NUMBERS, pbc=np.array([True] * 3))
    two_axes = potential(MODEL, atomic_numbers=NUMBERS, pbc=np.array([True, True, False]))
    assert ENERGY(R, H) == all_axes(R, H) != two_axes(R, H)


def test_extras_reach_the_model():
    charged = potential(MODEL, atomic_numbers=NUMBERS, charge=jnp.array([0.5]), spin=None)
    close(charged(R, H), 1.5 * ENERGY(R, H))
    close(jax.grad(charged)(R, H), 1.5 * jax.grad(ENERGY)(R, H))


def test_float32_stays_float32():
    r, h = R.astype(jnp.float32), H.astype(jnp.float32)
    value, (g, G) = jax.value_and_grad(ENERGY, (0, 1))(r, h)
    assert value.dtype == g.dtype == G.dtype == jnp.float32


def test_a_models_wider_energy_keeps_its_width():
    model = lambda x: {
        k: v.astype(jnp.float64) if k == "energy" else v for k, v in MODEL(x).items()
    }
    value, g = jax.value_and_grad(potential(model, atomic_numbers=NUMBERS))(R.astype(jnp.float32))
    assert value.dtype == jnp.float64 and g.dtype == jnp.float32


# Evaluations


ONCE = {
    "value": lambda f: f,
    "grad": lambda f: jax.grad(f, (0, 1)),
    "value_and_grad": lambda f: jax.value_and_grad(f, (0, 1)),
    "jvp": lambda f: lambda r, h: jax.jvp(f, (r, h), (r, h)),
    "outputs": lambda f: f.outputs,
    "forces": lambda f: f.forces,
    "stress": lambda f: f.stress,
}


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("name", ONCE)
def test_one_evaluation(name, jit):
    model = Counted(MODEL)
    f = ONCE[name](potential(model, atomic_numbers=NUMBERS))
    jax.block_until_ready((jax.jit(f) if jit else f)(R, H))
    assert model.calls == 1


def test_one_evaluation_for_each_pass_of_a_scan():
    model = Counted(MODEL)
    energy = potential(model, atomic_numbers=NUMBERS)

    def step(r, _):
        e, g = jax.value_and_grad(energy)(r, H)
        return r - 1e-3 * g, e

    jax.block_until_ready(jax.jit(lambda r: lax.scan(step, r, None, length=4))(R))
    assert model.calls == 4


def test_equal_energies_share_one_trace():
    traces = []

    def model(inputs):
        traces.append(1)
        return MODEL(inputs)

    run = jax.jit(lambda energy, r, h: energy(r, h), static_argnums=0)
    for numbers in (NUMBERS, NUMBERS.copy(), jnp.asarray(NUMBERS)):
        energy = potential(model, atomic_numbers=numbers, charge=np.array([1.0]))
        run(energy, R, H)
    assert len(traces) == 1
    for r in (R, R + 1):
        jax.jit(energy)(r, H)
    assert len(traces) == 2
    for other in (
        dict(charge=np.array([2.0])),
        dict(charge=None),
        dict(pbc=np.array([True, False, True])),
    ):
        assert (
            potential(model, atomic_numbers=NUMBERS, **{"charge": np.array([1.0]), **other})
            != energy
        )
    assert energy != "energy"


def test_an_energy_keeps_what_it_was_bound_to():
    numbers = NUMBERS.copy()
    energy = potential(MODEL, atomic_numbers=numbers)
    numbers[:] = 1
    assert energy == ENERGY and energy(R, H) == ENERGY(R, H)


def test_an_energy_bound_to_a_traced_charge():
    def f(charge, r):
        return potential(MODEL, atomic_numbers=NUMBERS, charge=charge)(r, H)

    charge = jnp.array([0.5])
    close(jax.jit(f)(charge, R), 1.5 * ENERGY(R, H))
    close(jax.jit(jax.grad(f, 1))(charge, R), 1.5 * jax.grad(ENERGY)(R, H))
    close(
        jax.vmap(f, (0, None))(jnp.array([[0.5], [1.0]]), R), jnp.array([1.5, 2.0]) * ENERGY(R, H)
    )


# Errors


@pytest.mark.parametrize("around", [lambda f: f, jax.jit])
def test_no_silent_zero_for_a_charge(around):
    def f(charge):
        return potential(MODEL, atomic_numbers=NUMBERS, charge=charge)(R, H)

    for derivative in (jax.grad(around(f)), around(jax.grad(f)), around(jax.jacfwd(f))):
        with pytest.raises(
            NotImplementedError, match="gradient of the energy in charge .*hold charge fixed"
        ):
            derivative(jnp.array([0.5]))


def test_no_silent_zero_for_a_cell():
    model = lambda x: {k: v for k, v in MODEL(x).items() if k != "cell_gradients"}
    energy = potential(model, atomic_numbers=NUMBERS)
    close(jax.grad(energy)(R, H), jax.grad(ENERGY)(R, H))
    with pytest.raises(
        NotImplementedError,
        match="in cell .*got outputs energy, position_gradients; .*return cell_gradients",
    ):
        jax.grad(energy, 1)(R, H)
    with pytest.raises(NotImplementedError, match="in cell"):
        energy.stress(R, H)


def test_an_energy_alone_has_no_forces():
    energy = potential(lambda x: {"energy": energies(x)}, atomic_numbers=NUMBERS)
    close(energy(R, H), ENERGY(R, H))
    for f in (energy.forces, jax.grad(energy)):
        with pytest.raises(
            NotImplementedError, match="in pos .*or let the model return position_gradients"
        ):
            f(R, H)


CALLS = {
    r"one dtype for pos and cell, got pos float64 and cell float32; cast one": lambda: ENERGY(
        R, H.astype(jnp.float32)
    ),
    r"expected cell as float64\[3,3\], got float64\[1,3,3\]; for several systems pass batch": lambda: (
        ENERGY(R, H[None])
    ),
    r"expected cell as float64\[3,3,3\], got float64\[3,3\]": lambda: BATCHED(R, H),
    r"expected pos as float\[N,3\], got float64\[3\]": lambda: ENERGY(R[0], H),
    r"expected pos as float\[4,3\], got int64\[4,3\]": lambda: ENERGY(R.astype(int), H.astype(int)),
    r"expected atomic_numbers as int\[3\], got int64\[4\]": lambda: ENERGY(R[:3], H),
    r"expected batch as int\[4\], got int64\[2\]": lambda: potential(
        MODEL, atomic_numbers=NUMBERS, batch=np.array([0, 0])
    )(R, H[None]),
    r"expected pbc as bool\[3\], got bool\[1,3\]": lambda: potential(
        MODEL, atomic_numbers=NUMBERS, pbc=np.ones((1, 3), bool)
    )(R, H),
    r"expected a cell, since pbc is set, got None": lambda: potential(
        MODEL, atomic_numbers=NUMBERS, pbc=np.ones(3, bool)
    )(R),
    r"expected batch for n_systems=2, got None": lambda: potential(
        MODEL, atomic_numbers=NUMBERS, n_systems=2
    ),
    r"expected no cell among the extras, got cell": lambda: potential(
        MODEL, atomic_numbers=NUMBERS, cell=H
    ),
    r"expected no outputs among the extras, got outputs; leave it out": lambda: potential(
        MODEL, atomic_numbers=NUMBERS, outputs=("dipole",)
    ),
    r"expected charge as float\[1\], got float64\[\]": lambda: potential(
        MODEL, atomic_numbers=NUMBERS, charge=jnp.ones(())
    )(R, H),
    r"expected the outputs energy, got only forces; let the model return energy": lambda: potential(
        lambda x: {"forces": x["pos"]}, atomic_numbers=NUMBERS
    )(R, H),
    r"expected energy as float\[1\], got float64\[\]": lambda: potential(
        lambda x: {"energy": jnp.zeros(())}, atomic_numbers=NUMBERS
    )(R, H),
    r"expected position_gradients as float\[4,3\], got float64\[3,4\]": lambda: potential(
        lambda x: MODEL(x) | {"position_gradients": R.T}, atomic_numbers=NUMBERS
    )(R, H),
}


@pytest.mark.parametrize("text", CALLS)
def test_errors_say_what_came(text):
    with pytest.raises(ValueError, match=text):
        CALLS[text]()


def test_ases_objects_are_named():
    atoms = ase.Atoms("HOCSi", positions=np.asarray(R), cell=np.asarray(H), pbc=True)
    for call, text in (
        (
            lambda: ENERGY(atoms, H),
            "positions as an array, got ASE's Atoms; pass NumPy's: atoms.pos",
        ),
        (lambda: ENERGY(R, atoms.cell), "cell as an array, got ASE's Cell"),
        (lambda: potential(MODEL, atomic_numbers=atoms), "atomic numbers, integers, got Atoms of"),
        (lambda: potential(MODEL, atomic_numbers=["H", "O"]), "atomic numbers, integers, got list"),
    ):
        with pytest.raises(TypeError, match=f"expected {text}"):
            call()
    assert potential(MODEL, atomic_numbers=NUMBERS.tolist())(R, H) == ENERGY(R, H)


def test_no_silent_narrowing_without_x64():
    with (
        jax.enable_x64(False),
        pytest.raises(
            ValueError,
            match="positions in a dtype that JAX keeps, got float64, narrowed to float32",
        ),
    ):
        ENERGY(np.asarray(R))


def test_contract_shapes():
    shapes = {
        "energy": (2,),
        "position_gradients": (5, 3),
        "cell_gradients": (2, 3, 3),
        "node_energies": (5,),
    }
    assert output_shapes(5, 2) == shapes
    outputs = {name: np.zeros(shape) for name, shape in shapes.items()}
    check_outputs(outputs, 5, 2, required=tuple(shapes))
    with pytest.raises(ValueError, match=r"expected node_energies as float\[5\], got int64\[5\]"):
        check_outputs(outputs | {"node_energies": np.zeros(5, int)}, 5, 2)
    with pytest.raises(
        ValueError,
        match="expected the outputs hessian, got only cell_gradients, energy, .*return hessian",
    ):
        check_outputs(outputs, 5, 2, required=("hessian",))
