"""buckets=: padded calls equal plain ones, their padding shows nowhere, and a few programs serve
every size."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest
import torch
from hypothesis import given, settings

import bridge

MASKED = {"edge_index": "2 E", "shift": "E 3"}


def masked(pos, edge_index, shift, edge_mask):
    """Total, edge and atom energies; padding is told by the mask."""
    i, j = edge_index
    r2 = ((pos[j] - pos[i] + shift) ** 2).sum(-1)
    e = jnp.where(edge_mask, jnp.exp(-jnp.where(edge_mask, r2, 1.0)), 0.0)
    return {"total": e.sum(), "edges": e, "atoms": jax.ops.segment_sum(e, i, num_segments=len(pos))}


def dropped(inputs):
    """The same; padded edges start at an atom that is not there, so that JAX's scatter drops
    them."""
    pos, (i, j) = inputs["pos"], inputs["edge_index"]
    e = jnp.exp(-((pos[j] - pos[i] + inputs["shift"]) ** 2).sum(-1)) * (i < len(pos))
    return {"total": e.sum(), "edges": e, "atoms": jax.ops.segment_sum(e, i, num_segments=len(pos))}


def by_torch(pos, edge_index, shift):
    i, j = edge_index
    e = torch.exp(-((pos[j] - pos[i] + shift) ** 2).sum(-1))
    return {
        "total": e.sum(),
        "edges": e,
        "atoms": torch.zeros(len(pos), dtype=e.dtype).index_add(0, i, e),
    }


def graph(n_atoms, n_edges, seed=0):
    g = torch.Generator().manual_seed(seed)
    edges = torch.randint(0, max(n_atoms, 1), (2, n_edges), generator=g)
    return (
        torch.rand(n_atoms, 3, generator=g, dtype=torch.float64),
        edges,
        torch.rand(n_edges, 3, generator=g, dtype=torch.float64),
    )


WITH_MASK = bridge.to_torch(masked, buckets=bridge.Buckets(MASKED, mask={"E": "edge_mask"}))
DICT = bridge.to_torch(
    dropped, buckets=bridge.Buckets({"pos": "N 3", **MASKED}, fill={"edge_index": "N"})
)
FUNCTIONS = {
    "mask": WITH_MASK,
    "fill, atoms too": lambda pos, edges, shift: DICT(
        {"pos": pos, "edge_index": edges, "shift": shift}
    ),
}


def same(got, want, keys=("total", "edges", "atoms")):
    for key in keys:
        assert got[key].shape == want[key].shape
        torch.testing.assert_close(got[key], want[key], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("f", FUNCTIONS.values(), ids=FUNCTIONS)
@settings(max_examples=8)
@given(st.integers(1, 40), st.integers(0, 70), st.integers(0, 99))
def test_values_and_gradients_x_sizes(f, n_atoms, n_edges, seed):
    """All results, the first and the second derivative; zero edges included."""
    pos, edges, shift = graph(n_atoms, n_edges, seed)
    pos.requires_grad_(), shift.requires_grad_()
    got, want = f(pos, edges, shift), by_torch(pos, edges, shift)
    same(got, want)
    weights = torch.rand(n_atoms, dtype=torch.float64)
    first = [
        torch.autograd.grad(
            (r["atoms"] * weights).sum() + r["edges"].sum(), (pos, shift), create_graph=True
        )
        for r in (got, want)
    ]
    torch.testing.assert_close(*first)
    if n_edges:
        second = [torch.autograd.grad(g[0].pow(2).sum(), (pos, shift)) for g in first]
        torch.testing.assert_close(*second)


@pytest.mark.parametrize("f", FUNCTIONS.values(), ids=FUNCTIONS)
def test_vmap_x_shared_padding(f):
    pos, edges, shift = graph(5, 20)
    many = torch.stack([pos, 2 * pos, 3 * pos])
    got = torch.func.vmap(torch.func.grad(lambda r: f(r, edges, shift)["total"]))(many)
    want = torch.func.vmap(torch.func.grad(lambda r: by_torch(r, edges, shift)["total"]))(many)
    torch.testing.assert_close(got, want)


def test_a_thousand_edge_counts_compile_at_most_eight_times():
    f = bridge.to_torch(masked, buckets=bridge.Buckets(MASKED, mask={"E": "edge_mask"}))
    for k in range(1000):
        n = (k * 387) % 1000 + 1  # each of 1..1000 once, in no order
        args = graph(10, n, k)
        if k % 50:
            f(*args)
        else:
            same(f(*args), by_torch(*args))
    assert f.compilations <= 8


def test_a_trajectory_with_gradients_compiles_at_most_eight_times():
    """As molecular dynamics has it: the count wanders about a mean, and each step has a
    backward."""
    f = bridge.to_torch(masked, buckets=bridge.Buckets(MASKED, mask={"E": "edge_mask"}))
    for n in range(1500, 2500, 7):
        pos, edges, shift = graph(50, n)
        f(pos.requires_grad_(), edges, shift)["total"].backward()
    assert f.compilations <= 8 and f.compilations % 2 == 0


def test_the_same_rung_is_the_same_program():
    f = bridge.to_torch(lambda x: 2 * x, buckets={"x": "N"})
    assert (
        f(torch.ones(3)).tolist() == [2.0] * 3
        and f(torch.ones(16)).shape == (16,)
        and f.compilations == 1
    )
    assert f(torch.ones(17)).shape == (17,) and f.compilations == 2


@given(st.integers(0, 5000), st.integers(1, 20), st.floats(1.1, 4))
def test_the_ladder(n, start, growth):
    """A rung holds its size, is no longer than growth times it, and is a rung itself."""
    b = bridge.Buckets({"x": "N"}, start=start, growth=growth)
    rung = b.rung(n)
    assert n <= rung and (rung == start or rung <= growth * n + 1) and b.rung(rung) == rung


def test_equality_x_buckets():
    """Padded callables are equal where the callable and the buckets are, and never to one without
    buckets."""
    f = lambda shapes, **options: bridge.to_torch(masked, buckets=bridge.Buckets(shapes, **options))
    a, b = f(MASKED, mask={"E": "edge_mask"}), f(MASKED, mask={"E": "edge_mask"})
    assert a == b and hash(a) == hash(b)
    for other in (
        f(MASKED, mask={"E": "edge_mask"}, growth=1.5),
        f({"shift": "E 3"}, mask={"E": "edge_mask"}),
        bridge.to_torch(masked),
        bridge.to_torch(by_torch, buckets=bridge.Buckets(MASKED, mask={"E": "edge_mask"})),
    ):
        assert a != other and other != a


def test_module_x_buckets():
    def apply(params, x, mask):
        return ((x @ params["w"]) * mask[:, None]).sum(0)

    net = bridge.module(
        apply, {"w": jnp.ones((3, 2))}, buckets=bridge.Buckets({"x": "N 3"}, mask={"N": "mask"})
    )
    for n in (1, 5, 9, 16):
        net.zero_grad()
        net(torch.ones(n, 3, dtype=torch.float64)).sum().backward()
        assert net.get_parameter("w").grad.tolist() == [[float(n)] * 2] * 3
    assert net.compilations == 2


SHAPES = {"x": "N 3"}
BAD = {
    "no such input": (
        lambda: bridge.to_torch(lambda y: y, buckets=SHAPES)(torch.ones(2, 3)),
        "expected inputs named x, as buckets= says, got none named x; name some of y",
    ),
    "another rank": (
        lambda: bridge.to_torch(lambda x: x, buckets=SHAPES)(torch.ones(2)),
        "expected x as a tensor with axes 'N 3', got torch.float32",
    ),
    "no tensor": (
        lambda: bridge.to_torch(lambda x: x, buckets=SHAPES)(1.0),
        "expected x as a tensor with axes 'N 3', got float",
    ),
    "sizes that differ": (
        lambda: bridge.to_torch(lambda x, y: x, buckets={"x": "N", "y": "N"})(
            torch.ones(2), torch.ones(3)
        ),
        "axis N of 2 in every input, got 3 in y",
    ),
    "an output of another size": (
        lambda: bridge.to_torch(lambda x: jnp.concatenate([x, x]), buckets={"x": "N"})(
            torch.ones(2)
        ),
        "whose sizes are N or don't depend on it",
    ),
    "a ladder that stands": (
        lambda: bridge.Buckets(SHAPES, growth=1.0),
        "expected start >= 1 and growth > 1, got start=16, growth=1.0",
    ),
    "fill of nothing": (
        lambda: bridge.Buckets(SHAPES, fill={"y": 0}),
        "expected fill for x, got y",
    ),
    "fill with nothing": (
        lambda: bridge.Buckets(SHAPES, fill={"x": "M"}),
        "expected fill as a number or one of the axes N, got M",
    ),
    "mask of nothing": (
        lambda: bridge.Buckets(SHAPES, mask={"M": "m"}),
        "expected mask for N, got M",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_buckets_are_refused(case):
    call, text = BAD[case]
    with pytest.raises(ValueError) as e:
        call()
    assert text in str(e.value)


def test_torch_compile_is_refused():
    f = bridge.to_torch(lambda x: x, buckets=SHAPES)
    with pytest.raises(Exception, match="buckets= under torch.compile|Unsupported|dynamo"):
        torch.compile(lambda x: f(x), fullgraph=True, backend="eager")(torch.ones(2, 3))
