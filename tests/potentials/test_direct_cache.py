"""jax_side.potentials.cache: outputs and inputs that commit system by system, identical to the bit
where a system is rejected."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings

import bridge
from jax_side.potentials.direct import (
    EMPTY,
    Cache,
    Positions,
    PositionsAndCell,
    PotentialOut,
    cached,
    direct,
    select_systems,
    sum_potentials,
)
from jax_side.potentials.strain import with_gradients
from tests.cases import close

SIZES = (3, 1, 4, 2)  # atoms of each chain; then one padding atom of the last and one of no system
BATCH = jnp.array([0] * 3 + [1] + [2] * 4 + [3] * 2 + [3] + [4])
B, N = len(SIZES), len(BATCH)
rng = np.random.default_rng(1)
START = {
    "pos": jnp.asarray(rng.normal(size=(N, 3))),
    "cell": jnp.asarray(3 * np.eye(3) + 0.3 * rng.normal(size=(B, 3, 3))),
    "pbc": jnp.ones((B, 3), bool),
    "batch": BATCH,
    "atomic_numbers": jnp.array([6] * sum(SIZES) + [0, 0]),
}
KT = 0.3


def by_system(per_atom):
    return jax.ops.segment_sum(per_atom, BATCH, num_segments=B)


def wells(x):
    """A spring for each atom, repulsion within a system, springs on the cell; padding feels
    nothing."""
    pos, real = x["pos"], x["atomic_numbers"] > 0
    near = (
        jnp.exp(-((pos[:, None] - pos) ** 2).sum(-1)) * (x["batch"][:, None] == x["batch"]) * real
    )
    return by_system(real * (0.5 * (pos**2).sum(-1) + near.sum(-1))) + 0.5 * (
        (x["cell"] - 3 * jnp.eye(3)) ** 2
    ).sum((1, 2))


def with_hessian(x):
    return with_gradients(wells)(x) | {
        "hessian": jax.hessian(lambda pos: wells(x | {"pos": pos}).sum())(x["pos"])
    }


class Torch(torch.nn.Module):
    """Springs in torch; each forward with values is counted."""

    forwards = 0

    def forward(self, x):
        Torch.forwards += not isinstance(x["pos"], torch._subclasses.FakeTensor)
        pos = x["pos"] * (x["atomic_numbers"] > 0)[:, None]
        sums = pos.new_zeros(B + 1).index_add(0, x["batch"].long(), 0.5 * pos.square().sum(-1))
        return {"energy": sums[:B], "position_gradients": pos}


POTENTIALS = {
    "JAX": direct(with_gradients(wells)),
    "with hessians": direct(with_hessian, hessians="positions"),
    "no gradients": direct(with_gradients(wells), None),
    "a weighted sum": sum_potentials(
        0.7 * direct(with_gradients(wells), "positions"),
        direct(bridge.to_jax(Torch()), "positions"),
    ),
}


def bits(tree):
    """The leaves as unsigned integers."""
    return [
        np.asarray(x).view(f"u{x.dtype.itemsize}") if x.dtype != bool else np.asarray(x)
        for x in jax.tree.leaves(tree)
    ]


def rows(accept):
    """What accept means for an array by its number of rows: atoms in no system are never
    accepted."""
    return {B: np.asarray(accept), N: np.append(np.asarray(accept), False)[np.asarray(BATCH)]}


def check_committed(got, new, old, accept):
    """Rows are those of new where accepted and of old elsewhere, bit by bit."""
    for g, n, o in zip(bits(got), bits(new), bits(old), strict=True):
        take = rows(accept)[len(g)]
        np.testing.assert_array_equal(g[take], n[take])
        np.testing.assert_array_equal(g[~take], o[~take])


def moved(inputs, key, size=0.4):
    a, b = jax.random.split(key)
    step = {"pos": jax.random.normal(a, (N, 3)), "cell": 0.3 * jax.random.normal(b, (B, 3, 3))}
    return inputs | {name: inputs[name] + size * d for name, d in step.items()}


def metropolis(chains, start, key, steps, size=0.4):
    """B independent chains; each step: (cache before, proposal, accept, cache after)."""

    def step(cache, key):
        key, draw = jax.random.split(key)
        out, proposal = chains.propose(moved(cache.inputs, key, size))
        accept = (
            jnp.log(jax.random.uniform(draw, (B,)))
            < (cache.out.total_energies - out.total_energies) / KT
        )
        after = chains.commit(cache, proposal, accept)
        return after, (cache, proposal, accept, after)

    return jax.lax.scan(step, chains.init(start), jax.random.split(key, steps))


@pytest.mark.parametrize("name", POTENTIALS)
def test_metropolis_x_bits_and_recomputed_energies(name):
    """40 steps of four chains in one scan: what is cached is what is there."""
    potential, steps = POTENTIALS[name], 40
    last, history = jax.jit(lambda key: metropolis(cached(potential), START, key, steps))(
        jax.random.key(0)
    )
    before, proposal, accept, after = jax.device_get(history)
    assert 20 < accept.sum() < 4 * steps - 20 and accept.any(0).all() and not accept.all(0).any()
    for i in range(steps):
        at = lambda tree: jax.tree.map(lambda x: x[i], tree)
        check_committed(at(after), at(proposal), at(before), accept[i])
    again = jax.jit(lambda caches: jax.lax.map(potential, caches.inputs))(after)
    for got, want in zip(jax.tree.leaves(after.out), jax.tree.leaves(again), strict=True):
        real = [slice(None)] * 2 if got.shape[1] == B else [slice(None), slice(N - 2)]
        np.testing.assert_allclose(got[tuple(real)], want[tuple(real)], rtol=0, atol=1e-10)
    assert all(map(np.array_equal, bits(last), bits(jax.tree.map(lambda x: x[-1], after))))


def test_metropolis_x_temperature():
    """Free springs: kT/2 for each degree of freedom, and the cell's nine are free too."""

    def free(x):
        return {
            "energy": by_system((x["atomic_numbers"] > 0) * 0.5 * (x["pos"] ** 2).sum(-1))
            + 0.5 * (x["cell"] ** 2).sum((1, 2))
        }

    springs = direct(free, None)
    run = jax.jit(
        lambda key: (
            metropolis(cached(springs), START, key, 40_000, 0.3)[1][3]
            .out.total_energies[2000:]
            .mean(0)
        )
    )
    np.testing.assert_allclose(
        run(jax.random.key(1)), KT / 2 * (3 * np.array(SIZES) + 9), rtol=0.05
    )


def test_one_evaluation_for_each_proposal_none_for_commits(lane, maybe_jit):
    chains = cached(direct(bridge.to_jax(Torch(), lane=lane), "positions"))
    propose, commit = maybe_jit(chains.propose), maybe_jit(chains.commit)
    cache = maybe_jit(chains.init)(START)
    out, proposal = propose(START)
    jax.block_until_ready((cache, out, commit(cache, proposal, jnp.ones(B, bool))))
    Torch.forwards = 0
    for i in range(3):
        out, proposal = propose(moved(cache.inputs, jax.random.key(i)))
        cache = jax.block_until_ready(commit(cache, proposal, jnp.arange(B) % 2 == 0))
        assert Torch.forwards == i + 1
    close(out, proposal.out)
    Torch.forwards = 0
    jax.block_until_ready(
        jax.jit(lambda key: metropolis(chains, START, key, 7)[0])(jax.random.key(0))
    )
    assert Torch.forwards == 8


OUT = PotentialOut(
    np.zeros(B),
    PositionsAndCell(np.zeros((N, 3)), np.zeros((B, 3, 3))),
    Positions(np.zeros((N, 3, N, 3))),
)
WAYS = {
    "eager": select_systems,
    "jit": jax.jit(select_systems),
    "scan": jax.jit(
        lambda accept, new, old, batch: jax.lax.scan(
            lambda c, a: (select_systems(a, new, c, batch), None), old, accept[None]
        )[0]
    ),
    "vmap": jax.jit(
        lambda accept, *rest: jax.tree.map(
            lambda x: x[1],
            jax.vmap(select_systems, (0, None, None, None))(jnp.stack([~accept, accept]), *rest),
        )
    ),
}
PLANTED = {
    "float64": [0x7FF0000000000001, 0xFFF8000000001234, 1 << 63, 1],
    "float32": [0x7F800001, 0xFFC01234, 1 << 31, 1],
    "float16": [0x7C01, 0xFE12, 1 << 15, 1],
}


def drawn(seed, dtype):
    """An output whose bits are random; signalling and quiet NaNs with payloads, -0.0 and a
    subnormal number among them."""
    rng = np.random.default_rng(seed)

    def fill(x):
        unsigned = f"u{np.dtype(dtype).itemsize}"
        raw = rng.integers(0, np.iinfo(unsigned).max, x.shape, unsigned, endpoint=True).reshape(
            len(x), -1
        )
        raw[:, rng.integers(raw.shape[1])] = rng.permuted(
            np.resize(np.array(PLANTED[dtype], unsigned), len(x))
        )
        return jnp.asarray(raw.reshape(x.shape).view(dtype))

    return jax.tree.map(fill, OUT)


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=15)
@given(
    st.integers(0, 2**32),
    st.lists(st.booleans(), min_size=B, max_size=B),
    st.sampled_from(list(PLANTED)),
)
def test_rejected_rows_are_identical_to_the_bit(way, seed, accept, dtype):
    new, old, accept = drawn(seed, dtype), drawn(seed + 1, dtype), jnp.array(accept)
    check_committed(WAYS[way](accept, new, old, BATCH), new, old, accept)


def test_the_check_of_bits_can_fail():
    """Arithmetic in place of select loses signs of zero and NaN payloads."""
    new, old, accept = drawn(0, "float64"), drawn(1, "float64"), jnp.zeros(B, bool)
    with pytest.raises(AssertionError, match="not equal"):
        check_committed(jax.tree.map(lambda n, o: 0.0 * n + o, new, old), new, old, accept)
    with pytest.raises(AssertionError, match="not equal"):
        check_committed(select_systems(~accept, new, old, BATCH), new, old, accept)


def test_replicas_by_vmap():
    """Replicas of all chains: as one after another."""
    chains, keys = cached(POTENTIALS["JAX"]), jax.random.split(jax.random.key(3), 3)

    def run(key):
        last, (_, _, accept, _) = metropolis(chains, START, key, 5)
        return last.inputs["pos"], last.out, accept

    got, want = jax.device_get(
        (jax.jit(jax.vmap(run))(keys), jax.jit(lambda keys: jax.lax.map(run, keys))(keys))
    )
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=1e-10)
    assert got[2].any() and not got[2].all()


def test_a_cached_potential_passes_through_jit():
    """Its weights are leaves: one trace for all of them."""
    traces = []

    @jax.jit
    def start(chains, inputs):
        traces.append(1)
        return chains.init(inputs).out

    outs = [
        start(cached(jnp.array(w) * POTENTIALS["JAX"], {"time": "B"}), START) for w in (1.0, 2.0)
    ]
    close(2 * outs[0], outs[1])
    assert len(traces) == 1


def test_commits_differentiate():
    accept = jnp.array([True, False, True, False])
    pair = lambda f: jax.jit(jax.grad(f, (0, 1)))(START["pos"], 2 * START["pos"])
    new, old = pair(
        lambda n, o: (select_systems(accept, {"pos": n}, {"pos": o}, BATCH)["pos"] ** 2).sum()
    )
    take = rows(accept)[N][:, None]
    close((new, old), (jnp.where(take, 2 * START["pos"], 0), jnp.where(take, 0, 4 * START["pos"])))


EDGES = {"edge_index": jnp.array([[0, 1], [1, 0]]), "cell_offsets": jnp.zeros((2, 3), int)}
YES = jnp.array([True, False, True, False])


def test_all_inputs_commit():
    """Atomic numbers (an insertion is 0 -> 6), cells, pbc, charges; edges that stay the same; the
    user's own rows; None."""
    velocities, keys = jnp.ones((N, 3)), jax.random.split(jax.random.key(0), B)
    old = (
        START
        | EDGES
        | {
            "charge": jnp.zeros(B),
            "spin": None,
            "velocities": {"v": velocities},
            "keys": keys,
            "fixed": "a name",
        }
    )
    changed = {name: START[name] + 1 for name in ("pos", "cell", "atomic_numbers")} | {
        "pbc": ~START["pbc"],
        "charge": jnp.ones(B),
    }
    new = (
        old
        | changed
        | {"velocities": {"v": 2 * velocities}, "keys": jax.random.split(jax.random.key(1), B)}
    )
    got = select_systems(YES, new, old, BATCH, {"velocities": "N", "keys": "B"})
    for name in (*changed, "velocities"):
        check_committed(got[name], new[name], old[name], YES)
    check_committed(
        jax.random.key_data(got["keys"]),
        jax.random.key_data(new["keys"]),
        jax.random.key_data(keys),
        YES,
    )
    assert all(
        got[name] is old[name] for name in ("edge_index", "cell_offsets", "batch", "spin", "fixed")
    ) and set(got) == set(old)


def test_edges_of_a_single_system():
    commit = lambda yes: select_systems(
        jnp.array([yes]), jax.tree.map(lambda x: x + 1, EDGES), EDGES, jnp.zeros(2, int)
    )
    assert (
        commit(True)["edge_index"].tolist() == [[1, 2], [2, 1]]
        and commit(True)["cell_offsets"].all()
    )
    assert (
        commit(False)["edge_index"].tolist() == [[0, 1], [1, 0]]
        and not commit(False)["cell_offsets"].any()
    )


def test_dicts_of_the_contract_are_cached_as_well():
    chains = cached(jax.jit(with_gradients(wells)), {"time": "B"})
    cache = chains.init(START | {"time": jnp.zeros(B)})
    out, proposal = chains.propose(moved(cache.inputs, jax.random.key(0)) | {"time": jnp.ones(B)})
    after = chains.commit(cache, proposal, YES)
    assert isinstance(after, Cache) and after.inputs["time"].tolist() == [1, 0, 1, 0]
    check_committed(after.out, out, cache.out, YES)


def select(**some):
    """select_systems with something else than what it wants."""
    call = {"accept": YES, "new": {"pos": START["pos"] + 1}, "old": {"pos": START["pos"]}} | some
    return select_systems(call["accept"], call["new"], call["old"], BATCH, call.get("rows"))


@pytest.mark.parametrize(
    "text, f",
    [
        (
            r"expected accept as bool\[4\], got float64\[4\]; give one boolean for each system",
            lambda: select(accept=jnp.ones(B)),
        ),
        (
            r"expected accept as bool\[4\], got bool\[3\]",
            lambda: select(accept=YES[:3], new=START, old=START),
        ),
        (r"expected accept as bool\[1\], got bool\[\]", lambda: select(accept=True)),
        (
            r"expected accept as bool\[4\], got bool\[1\]",
            lambda: select(accept=YES[:1], new=OUT, old=OUT),
        ),
        (
            "expected the keys pos, got atomic_numbers, batch, cell, pbc, pos; propose from the "
            "inputs of the cache",
            lambda: select(new=START),
        ),
        (
            r"expected pos as float64\[12,3\], got float32\[12,3\]; keep shapes and dtypes",
            lambda: select(new={"pos": START["pos"].astype("float32")}),
        ),
        (
            r"expected pos as float64\[12,3\], got float64\[3\]; keep shapes and dtypes",
            lambda: select(new={"pos": START["pos"][0]}),
        ),
        (
            "expected arrays with rows of atoms or of systems where they change, got edge_index; "
            "make it inside of the model, or hold it fixed",
            lambda: select(new=jax.tree.map(jnp.copy, EDGES), old=EDGES),
        ),
        (
            'expected arrays with rows of atoms or of systems where they change, got time; say rows={"time": "N"} or "B"',
            lambda: select(new={"time": jnp.ones(B)}, old={"time": jnp.zeros(B)}),
        ),
        (
            "expected rows of time as one of 'N', 'B', got 'E'",
            lambda: select(new={"time": YES}, old={"time": YES}, rows={"time": "E"}),
        ),
        (
            r"expected outputs alike \(energy, position_gradients, cell_gradients, hessian\), got energy; propose with the potential that made the cache",
            lambda: select(new=PotentialOut(OUT.total_energies, EMPTY), old=OUT),
        ),
    ],
)
def test_errors(text, f):
    with pytest.raises(ValueError, match=text):
        f()
