"""jax-md lists that lack edges (narrow boxes, no room, short lists): an error, NaN inside jit."""

from dataclasses import replace
from functools import cache

import ase.build
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax_md import energy as jax_md_energy
from jax_md import partition, simulate, space

import bridge
from jax_side.engines import images
from jax_side.engines import jax_md as engine
from tests.graph_cases import CUTOFF, MODEL, close

rng = np.random.default_rng(3)
SITES = (
    (
        np.stack(np.meshgrid(range(3), range(2), range(2)), -1).reshape(-1, 3)
        + 0.1 * rng.normal(size=(12, 3))
    )
    / [3, 2, 2]
    % 1
)
NUMBERS = rng.integers(1, 20, len(SITES))
ENERGY = bridge.potential(MODEL, atomic_numbers=NUMBERS)
SKEWED = np.array([[7.0, 3.0, -1.0], [0, 7.0, 2.0], [0, 0, 6.6]])  # columns
# columns longer than twice the cutoff, but not so far apart
THIN = np.array([[7.0, 4.0, -1.0], [0, 5.2, 2.0], [0, 0, 6.5]])
BOXES = {  # (fractional coordinates, dtype, wide enough, too narrow, its height)
    "number": (True, float, 6.5, 5.5, "5.5"),
    "vector": (True, float, np.array([6.5, 7, 7.5]), np.array([6.5, 7, 5.75]), "5.75"),
    "matrix": (True, float, SKEWED, THIN, "4.97"),
    "real": (False, float, SKEWED, THIN, "4.97"),
    "float32": (True, np.float32, SKEWED, THIN, "4.97"),
}
NARROW = (
    r"expected at least 6 Angstrom between opposite faces of the box, twice the cutoff of 3, "
    r"got {}\d*, where a jax-md list has one image of each pair alone; leave neighbor out "
    r"\(torch then finds all images\), or give the potential edges by bridge.edges"
)
OVERFLOWED = (
    r"expected a neighbour list that has all pairs, got one that overflowed "
    r"\(did_buffer_overflow\); allocate it anew \(neighbor_fn.allocate\)"
)


def lists(box, reach, fractional=True, skin=0.0, **options):
    displacement, _ = space.periodic_general(box, fractional_coordinates=fractional)
    options = (
        dict(dr_threshold=skin, fractional_coordinates=fractional, format=partition.Sparse)
        | options
    )
    return partition.neighbor_list(displacement, box, reach, **options)


def with_flags(neighbor, code):
    return replace(neighbor, error=partition.PartitionError(jnp.uint8(code)))


@cache
def case(name):
    """(energy of R, box and list, R, a wide box, a narrow one, a list)"""
    fractional, dtype, wide, narrow, _ = BOXES[name]
    wide, narrow = (jnp.asarray(box, dtype) for box in (wide, narrow))
    R = jnp.asarray(SITES if fractional else SITES @ SKEWED.T, dtype)
    energy_fn = engine.energy(ENERGY, wide, fractional)
    call = lambda R, box, neighbor: energy_fn(R, box=box, neighbor=neighbor)
    return call, R, wide, narrow, lists(wide, CUTOFF, fractional).allocate(R)


def all_of(f):
    """Energy, gradients and second derivatives of f(R, box, list)."""
    grad = lambda R, box, n: jax.value_and_grad(f, (0, 1))(R, box, n)
    along = lambda R, box, n: jax.jvp(lambda R: jax.grad(f)(R, box, n), (R,), (jnp.ones_like(R),))[
        1
    ]
    return lambda R, box, n: (grad(R, box, n), along(R, box, n))


def stacked(*trees):
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def nan(tree):
    return all(np.isnan(x).all() for x in jax.tree.leaves(tree))


SEEN = {
    "energy": lambda f: f,
    "grad": lambda f: jax.grad(f, (0, 1)),
    "vjp": lambda f: lambda *x: jax.vjp(f, *x),
    "hessian": lambda f: jax.hessian(f),
    "jit with all at hand": lambda f: lambda R, box, n: jax.jit(lambda R: f(R, box, n))(R),
}


@pytest.mark.matrix
@pytest.mark.parametrize("name", BOXES)
@pytest.mark.parametrize("way", SEEN)
def test_what_can_be_seen_is_an_error(name, way):
    f, R, wide, narrow, n = case(name)
    f = SEEN[way](f)
    with pytest.raises(ValueError, match=NARROW.format(BOXES[name][-1])):
        f(R, narrow, n)
    with pytest.raises(ValueError, match=OVERFLOWED):
        f(R, wide, with_flags(n, 1))


@pytest.mark.parametrize("name", BOXES)
def test_what_jit_hides_is_nan_in_all_derivatives(name):
    f, R, wide, narrow, n = case(name)
    run = jax.jit(all_of(f))
    tolerance = 1e-4 if R.dtype == jnp.float32 else 1e-10
    close(
        run(R, wide, n), jax.jit(all_of(lambda R, box, _: f(R, box, None)))(R, wide, n), tolerance
    )
    assert (
        nan(run(R, narrow, n))
        and nan(run(R, wide, with_flags(n, 1)))
        and nan(run(R, jnp.nan * wide, n))
    )


@pytest.mark.parametrize("name", BOXES)
def test_vmap_gives_nan_for_what_is_wrong_alone(name):
    f, R, wide, narrow, n = case(name)
    lists = stacked(n, n, with_flags(n, 1), n)
    boxes = jnp.stack([wide, narrow, wide, wide])
    both = jax.value_and_grad(f, (0, 1))
    found = jax.jit(jax.vmap(both, (None, 0, 0)))(R, boxes, lists)
    want = jax.jit(both)(R, wide, n)
    rows = [jax.tree.map(lambda x: x[k], found) for k in range(4)]
    assert nan(rows[1]) and nan(rows[2])
    tolerance = 1e-4 if R.dtype == jnp.float32 else 1e-10
    close(rows[0], want, tolerance)
    close(rows[3], want, tolerance)


@pytest.mark.parametrize("code, got", [
    (1, "one that overflowed (did_buffer_overflow)"),
    (2, "one that overflowed (did_buffer_overflow)"),
    (4, "one that its box has outgrown (cell_size_too_small)"),
    (12, "one that its box has outgrown"),
])  # fmt: skip
def test_flags_of_jax_md(code, got):
    f, R, wide, _, n = case("matrix")
    with pytest.raises(ValueError) as error:
        f(R, wide, with_flags(n, code))
    assert got in str(error.value)
    free = partition.neighbor_list(
        space.free()[0], jnp.array(20.0), CUTOFF, format=partition.Sparse
    ).allocate(R @ wide.T)
    with pytest.raises(ValueError) as error:
        engine.energy(ENERGY)(R @ wide.T, neighbor=with_flags(free, code))
    assert got in str(error.value)
    # jax-md sets it for boxes that are well formed
    assert np.isfinite(f(R, wide, with_flags(n, 8)))


def test_perturbation_counts():
    f = engine.energy(ENERGY, SKEWED)
    R, n = case("matrix")[1], case("matrix")[-1]
    call = lambda P: f(R, neighbor=n, perturbation=P)
    close(jax.jit(jax.grad(call))(jnp.eye(3)), jax.grad(lambda P: f(R, perturbation=P))(jnp.eye(3)))
    thin = jnp.diag(jnp.array([1.0, 1, 0.9]))
    for P in (0.9, jnp.asarray(0.9), thin):
        with pytest.raises(ValueError, match="expected at least 6 Angstrom"):
            jax.grad(call)(P) if hasattr(P, "ndim") else call(P)
    assert nan(jax.jit(jax.value_and_grad(call))(thin))


def test_a_run_that_overflows_goes_on_and_says_so():
    """The way of jax-md: look at the flag after the run, allocate anew, run again."""
    f, R, wide, _, n = case("matrix")
    energy_fn = engine.energy(ENERGY, wide)
    init, step = engine.observed(simulate.nve, energy_fn, space.periodic_general(wide)[1], 0.02)
    tight = lists(wide, CUTOFF, skin=0.0, capacity_multiplier=1.0).allocate(R)

    @jax.jit
    def run(state, n):
        def one(carry, _):
            state, n = carry
            n = n.update(state.position)
            state, energy = step(state, neighbor=n)
            return (state, n), (energy, n.did_buffer_overflow)

        return jax.lax.scan(one, (state, n), None, length=30)

    start = init(jax.random.key(0), R, 2.0, mass=1.0)[0]
    (_, n), (energies, flags) = run(start, tight)
    first = int(np.argmax(flags))
    assert 0 < first < 29 and n.did_buffer_overflow
    assert np.isfinite(energies[:first]).all() and np.isnan(energies[first:]).all()
    roomy = lists(wide, CUTOFF, capacity_multiplier=3.0).allocate(R)
    (_, n), (again, _) = run(start, roomy)
    assert not n.did_buffer_overflow and np.isfinite(again).all()
    close(again[:first], energies[:first])


def test_a_box_that_shrinks_in_a_run():
    wide = 7.0 * jnp.eye(3)
    shrinking = engine.energy(lambda r, cell, **edges: (cell**2).sum(), wide, cutoff=CUTOFF)
    n = lists(wide, CUTOFF).allocate(jnp.asarray(SITES))
    init, step = engine.fire_descent_box(shrinking, space.periodic_general(wide)[1])
    state = init(jnp.asarray(SITES), wide, neighbor=n)
    seen = []
    for _ in range(60):
        state = step(state, neighbor=n)
        seen.append((float(state.box[0, 0]), float(state.energy)))
    fine = [energy for width, energy in seen if width >= 6]
    gone = seen[len(fine) :]
    assert fine and gone and np.isfinite(fine).all() and nan([energy for _, energy in gone])
    with pytest.raises(ValueError, match="expected at least 6 Angstrom"):
        init(jnp.asarray(SITES), 0.8 * wide, neighbor=n)


def test_the_skin_counts_in_a_skewed_box():
    """An atom comes closer than the cutoff, in a box of 60 degrees; the list saw another image."""
    box = 8.0 * np.array([[1, 0.5, 0], [0, 0.75**0.5, 0], [0, 0, 1]])
    cutoff, skin = 3.46, 1.2
    pair = lambda y: jnp.array([[4, 1, 1], [4, 1 + y, 1]]) @ jnp.linalg.inv(box).T
    n = (
        lists(box, cutoff, skin=skin)
        .allocate(pair(cutoff + 0.1), extra_capacity=4)
        .update(pair(cutoff - 0.05))
    )
    inside = (
        engine.edges(replace(n, format=partition.Sparse), pair(cutoff - 0.05))["edge_index"] < 2
    )
    assert not inside.any()  # and it would be: this is what the error is for
    energy_fn = engine.energy(lambda r, cell, **edges: 0.0, box, cutoff=cutoff)
    expected = r"at least 9.32 .* the cutoff with its skin \(the box is skewed\) of 4.66, got 6.92"
    with pytest.raises(ValueError, match=expected):
        energy_fn(pair(cutoff - 0.05), neighbor=n)
    straight = 7.0 * np.eye(3)
    n = lists(straight, CUTOFF, skin=1.0).allocate(jnp.asarray(SITES))
    close(
        engine.energy(ENERGY, straight)(jnp.asarray(SITES), neighbor=n),
        engine.energy(ENERGY, straight)(jnp.asarray(SITES)),
    )


def test_a_list_in_cells_needs_them_wide_enough():
    """jax-md takes the diagonal of a lower triangular box for its widths."""
    lower = np.array([[12, 0, 0], [9, 12, 0], [7, 9, 12.0]])
    R = jnp.asarray(np.random.default_rng(0).uniform(size=(300, 3)))
    energy_fn = engine.energy(
        lambda r, cell, edge_index, cell_offsets: (edge_index[0] < len(r)).sum() / 1.0, cutoff=2.0
    )
    for box, fine in ((lower, False), (lower.T, True)):
        n = lists(jnp.asarray(box), 2.0).allocate(R)
        call = lambda box: energy_fn(R, box=box, neighbor=n)
        apart = R[:, None] - R
        pairs = (np.linalg.norm((apart - np.round(apart)) @ box.T, axis=-1) < 2).sum() - len(R)
        assert (pairs == (n.idx[0] < len(R)).sum()) == fine
        if fine:
            assert call(box) == jax.jit(call)(box) == pairs
            continue
        with pytest.raises(
            ValueError,
            match="at least 2 Angstrom wide, its cutoff, got cells of 1.59.*disable_cell_list=True",
        ):
            call(box)
        assert nan(jax.jit(call)(box))


def test_a_list_that_is_too_short():
    f, R, wide, _, _ = case("matrix")
    short = lists(wide, 2.5, skin=0.25).allocate(R)
    with pytest.raises(
        ValueError,
        match="cutoff of 3 Angstrom, got one up to 2.75, skin included; pass a longer r_cutoff",
    ):
        f(R, wide, short)
    with pytest.raises(ValueError, match="up to the potential's cutoff of 3 Angstrom"):
        jax.jit(f)(R, wide, short)
    with pytest.raises(ValueError, match="up to the potential's cutoff of 2.8 Angstrom"):
        engine.energy(lambda r, cell, **edges: 0.0, wide, cutoff=2.8)(R, neighbor=short)
    f(R, wide, lists(wide, np.float32(3 - 1e-7)).allocate(R))


def test_whose_cutoff_counts(monkeypatch):
    _, R, wide, narrow, n = case("matrix")
    plain = lambda r, cell, **edges: (r**2).sum()
    with pytest.raises(
        ValueError, match="expected one cutoff, got 4.0, and 3.0 on the card; leave cutoff out"
    ):
        engine.energy(ENERGY, wide, cutoff=4.0)
    engine.energy(ENERGY, wide, cutoff=3.0)
    for cutoff in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="expected a positive cutoff in Angstrom, got"):
            engine.energy(plain, wide, cutoff=cutoff)
    with pytest.raises(ValueError, match="twice the cutoff of 3, got"):  # the list's own
        engine.energy(plain, narrow)(R, neighbor=n)
    engine.energy(plain, narrow, cutoff=2.4)(R, neighbor=lists(narrow, 2.4).allocate(R))
    monkeypatch.setattr(images, "reach", lambda neighbor: None)  # a jax-md that keeps it elsewhere
    with pytest.raises(
        ValueError,
        match="the cutoff of a potential that is given a neighbour list, .* got none; pass cutoff",
    ):
        engine.energy(plain, wide)(R, neighbor=n)
    engine.energy(plain, wide, cutoff=3.0)(R, neighbor=n)
    engine.energy(plain)(R, neighbor=n)


def test_edges_that_are_missing():
    """They can't be NaN: they are -1, which models in torch refuse."""
    _, R, wide, narrow, n = case("matrix")
    with pytest.raises(ValueError, match="twice the cutoff of 3, got 4.97"):
        engine.edges(n, R, narrow)
    with pytest.raises(
        ValueError, match="up to the potential's cutoff of 3.5 Angstrom, got one up to 3"
    ):
        engine.edges(n, R, wide, cutoff=3.5)
    find = jax.jit(lambda box, n: engine.edges(n, R, box))
    close(find(wide, n), engine.edges(n, R, wide))
    for edges in (find(narrow, n), find(wide, with_flags(n, 1))):
        assert (edges["edge_index"] == -1).all()
        with pytest.raises(ValueError, match="expected edges between atoms"):
            ENERGY(R @ wide.T, wide.T, **edges)


def test_other_lists_are_refused():
    _, R, wide, _, n = case("matrix")
    for other, got in (
        (replace(n, format=partition.Dense), "NeighborListFormat.Dense"),
        (n.idx, "a ArrayImpl"),
    ):
        with pytest.raises(
            ValueError,
            match=f"list of format partition.Sparse, got {got}; pass format=partition.Sparse",
        ):
            engine.energy(ENERGY, wide)(R, neighbor=other)


# jax-md's own energies take minimum images as well.

MORSE = dict(sigma=2.75, epsilon=0.5, alpha=1.25, r_onset=2.5, r_cutoff=3.0)


def pairs(kind="box"):
    displacement = space.free()[0] if kind is None else space.periodic_general(jnp.eye(3))[0]
    return engine.model(
        jax_md_energy.morse_pair(displacement, **MORSE),
        kind,
        cutoff=None if kind is None else MORSE["r_cutoff"],
    )


def contract(box):
    cell = jnp.asarray(box).T
    return {"pos": jnp.asarray(SITES) @ cell, "cell": cell[None]}


@pytest.mark.parametrize("kind", ["box", "perturbation"])
def test_a_jax_md_energy_in_a_narrow_box(kind):
    model = pairs(kind)
    energy = lambda inputs: model(inputs)["energy"][0]
    narrow = r"at least 6 Angstrom .* the cutoff of 3, got 4.97\d*, where jax-md has one image"
    for way in (energy, jax.grad(energy), lambda inputs: jax.jit(lambda: energy(inputs))()):
        with pytest.raises(ValueError, match=narrow + ".*; repeat the structure"):
            way(contract(THIN))
    run = jax.jit(jax.value_and_grad(energy))
    close(
        run(contract(SKEWED))[0],
        jax.jit(model.energy_fn)(jnp.asarray(SITES), box=jnp.asarray(SKEWED)),
    )
    assert nan(run(contract(THIN)))
    found = jax.jit(jax.vmap(jax.value_and_grad(energy)))(stacked(contract(SKEWED), contract(THIN)))
    assert nan(jax.tree.map(lambda x: x[1], found)) and np.isfinite(found[0][0])


def test_a_jax_md_energy_in_torch():
    module = bridge.torch_potential(pairs(), gradients="autodiff")
    more = {
        "pbc": torch.ones(1, 3, dtype=torch.bool),
        "batch": torch.zeros(12, dtype=torch.int64),
        "atomic_numbers": torch.tensor(NUMBERS),
    }
    for box, fine in ((SKEWED, True), (THIN, False)):
        out = module({k: torch.from_numpy(np.array(x)) for k, x in contract(box).items()} | more)
        assert all(x.isfinite().all() if fine else x.isnan().all() for x in out.values())


def test_a_jax_md_energy_says_its_cutoff():
    energy_fn = jax_md_energy.morse_pair(space.periodic_general(jnp.eye(3))[0], **MORSE)
    for kind in ("box", "perturbation"):
        with pytest.raises(
            ValueError,
            match="cutoff=... of a jax-md energy with a box, .* pass its r_cutoff, or cell=None",
        ):
            engine.model(energy_fn, kind)
    with pytest.raises(ValueError, match="expected a positive cutoff in Angstrom, got 0"):
        engine.model(energy_fn, cutoff=0)
    free = pairs(None)(contract(THIN) | {"cell": jnp.zeros((1, 3, 3))})
    assert np.isfinite(free["energy"]).all()


def test_salt_with_sevennet():
    """README's crystal, in a box of one cutoff and a bit: -2.916 eV an atom by minimum images."""
    from torch_side.models.sevennet import SevenNet

    atoms = ase.build.bulk("NaCl", "rocksalt", a=5.64, cubic=True)
    box = jnp.asarray(atoms.cell.array.T, jnp.float32)
    R = jnp.asarray(atoms.get_scaled_positions(), jnp.float32)
    energy_fn = engine.energy(
        bridge.potential(SevenNet("7net-0"), atomic_numbers=atoms.numbers, pbc=True), box
    )
    n = lists(box, 5.0, skin=0.5).allocate(R)
    with pytest.raises(
        ValueError, match="expected at least 10 Angstrom .* twice the cutoff of 5, got 5.64"
    ):
        energy_fn(R, neighbor=n)
    assert abs(float(energy_fn(R)) / 8 + 3.3827) < 1e-3
