"""What is changed in a graph before it is compiled: products with small constant matrices, and what
is added into one entry."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

import bridge
from tests.calls.test_native import AT_RUN, STALE
from tests.cases import close
from torch_side.calls import rewriting

ROWS = rewriting._TALL
PRODUCT = torch.ops.aten.mm.default


def traced(f, *shapes, dtype=torch.float64):
    examples = [torch.empty(s, dtype=dtype) for s in shapes]
    return make_fx(f, tracing_mode="fake", _allow_non_fake_inputs=True)(*examples)


def written_out(graph):
    """The graph after the pass, and how many products it has left."""
    rewriting.write_out(graph)
    graph.graph.eliminate_dead_code()
    graph.graph.lint()
    graph.recompile()
    return graph, sum(n.target is PRODUCT for n in graph.graph.nodes)


def sparse(rows, columns, terms, seed, dtype):
    """A matrix with so many entries that are not zero, or as many as fit."""
    generator = np.random.default_rng(seed)
    entries = np.zeros(rows * columns)
    places = generator.permutation(rows * columns)[:terms]
    entries[places] = generator.normal(size=len(places))
    return torch.tensor(entries.reshape(rows, columns), dtype=dtype)


TOLERANCES = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-4},
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
}
SIZES = st.integers(1, 9)


@given(
    SIZES,
    SIZES,
    st.integers(1, rewriting._TERMS),
    st.integers(0, 99),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_products_are_sums_of_columns(inner, columns, terms, seed, dtype):
    matrix = sparse(inner, columns, terms, seed, dtype)
    graph, left = written_out(traced(lambda x: x @ matrix, (ROWS, inner), dtype=dtype))
    assert not left
    x = torch.randn(ROWS, inner, dtype=dtype)
    found = graph(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found, x @ matrix, **TOLERANCES[dtype])


def test_a_product_and_its_derivative_with_a_scaled_block():
    """As tensor products of e3nn have it: the matrix is a view of a scaled array, and the backward
    takes it transposed."""
    block = sparse(9, 5, 11, 0, torch.float64).reshape(3, 3, 5)

    def energy(x, y):
        x = x.requires_grad_()
        outer = (x[:, :, None] * y[:, None, :]).reshape(-1, 9)
        product = outer @ (block * 3**0.5).permute(0, 1, 2).reshape(9, 5)
        return torch.autograd.grad(product.sin().sum(), x)[0]

    graph = traced(energy, (ROWS, 3), (ROWS, 3))
    assert sum(n.target is PRODUCT for n in graph.graph.nodes) == 2
    graph, left = written_out(graph)
    assert not left
    x, y = torch.randn(2, ROWS, 3, dtype=torch.float64)
    torch.testing.assert_close(graph(x, y), energy(x, y), **TOLERANCES[torch.float64])


WEIGHT = torch.randn(3, 3, dtype=torch.float64)
NOTHING = torch.zeros(3, 3, dtype=torch.float64)
LEFT_ALONE = {  # what has as many terms that a library is faster, or values that nobody knows yet
    "few rows": (lambda x: x @ WEIGHT, (ROWS - 1, 3)),
    "many terms": (lambda x: x @ torch.ones(9, 9, dtype=x.dtype), (ROWS, 9)),
    "zeros": (lambda x: x @ torch.zeros(3, 3, dtype=x.dtype), (ROWS, 3)),
    "a weight of zeros": (lambda x: x @ NOTHING, (ROWS, 3)),
    "wide": (lambda x: x @ torch.eye(3, 65, dtype=x.dtype), (ROWS, 3)),
    "of the inputs": (lambda x: x @ x[:3], (ROWS, 3)),
    "random": (lambda x: x @ torch.rand_like(WEIGHT), (ROWS, 3)),
    "half": (lambda x: x.half() @ WEIGHT.half(), (ROWS, 3)),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_other_products_are_left_alone(name):
    f, shape = LEFT_ALONE[name]
    before = traced(f, shape)
    code = before.code
    graph, left = written_out(before)
    assert left == 1, code
    assert graph.code == code


def gathered(x):
    """The derivative of rows that are all the one that there is, counted from either end."""
    table = x[:1].clone().requires_grad_()
    rows = table[torch.tensor([0, -1, 0])] * x[:3]
    return torch.autograd.grad(rows.square().sum(), table)[0]


def added(*shape, axis=0, **kwargs):
    def f(x):
        index = torch.zeros(len(x), dtype=torch.int64)
        values = x.expand(*(len(x) if k == axis % len(shape) else n for k, n in enumerate(shape)))
        return torch.ones(shape, dtype=x.dtype).index_add(axis, index, values, **kwargs)

    return f


ADDED = {
    "energies of one system": (added(1), (5,)),
    "with a factor": (added(1, alpha=-0.5), (5,)),
    "rows": (added(1, 3), (5, 1)),
    "columns": (added(3, 1, axis=-1), (5,)),
    "none": (added(1), (0,)),
    "counts": (lambda x: added(1)(x.int() * 7), (5,)),
    "a gather": (gathered, (4, 2)),
}
ADDING = (torch.ops.aten.index_add.default, torch.ops.aten.index_put.default)


@pytest.mark.parametrize("name", ADDED)
def test_what_is_added_into_one_entry_is_a_sum(name):
    f, shape = ADDED[name]
    graph = traced(f, shape)
    assert any(n.target in ADDING for n in graph.graph.nodes)
    rewriting.sum_up(graph)
    graph.graph.lint()
    graph.recompile()
    assert not any(n.target in ADDING for n in graph.graph.nodes)
    x = 3 * torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(graph(x), f(x))


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", ["index_add", "index_put"])
def test_what_is_added_into_an_expanded_tensor(name, size):
    """It gets a place for each entry first, and whatever comes after knows what that gives."""
    index = torch.zeros(4, dtype=torch.int64)

    def f(x):
        into, rows = x.sum().expand(size, 2), x[:, None].expand(4, 2)
        if name == "index_add":
            return into.index_add(0, index, rows)
        return into.index_put((index,), rows, True)

    graph = traced(f, (4,))
    rewriting.unshare(graph)
    assert any(n.target is torch.ops.aten.clone.default and n.users for n in graph.graph.nodes)
    rewriting.sum_up(graph)
    graph.recompile()
    assert sum(n.target in ADDING for n in graph.graph.nodes) == (size == 2)
    x = torch.randn(4, dtype=torch.float64)
    torch.testing.assert_close(graph(x), f(x))


def test_a_wrong_index_into_one_entry_gives_nan():
    """Eager torch raises an IndexError; what is compiled may not give a number."""
    graph = traced(lambda x, i: x.new_zeros(1).index_add(0, i.long(), x), (3,), (3,))
    rewriting.sum_up(graph)
    graph.recompile()
    x = torch.ones(3, dtype=torch.float64)
    assert graph(x, torch.zeros(3)) == 3 and graph(x, torch.tensor([0.0, 0, 1])).isnan()


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x.new_zeros(2).index_add(0, torch.zeros(4, dtype=torch.int64), x),
        lambda x: x.new_zeros(1).index_put((torch.zeros(4, dtype=torch.int64),), x),
        lambda x: x.new_zeros(1).index_put((torch.ones(1, dtype=torch.bool),), x[:1], True),
        lambda x: x.new_zeros(1, 1).index_put((torch.zeros(4).long(),) * 2, x, True),
    ],
)
def test_what_is_added_elsewhere_is_left_alone(f):
    graph = traced(f, (4,))
    code = graph.code
    rewriting.sum_up(graph)
    graph.recompile()
    assert graph.code == code


def test_a_matrix_that_was_written_out_and_then_changes():
    """Its entries are in the program, and are watched as all weights are."""
    matrix = sparse(3, 5, 7, 0, torch.float64)
    energy = bridge.to_jax(lambda x: (x @ matrix).sin().sum(), lane="native")
    x = jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, 3)))
    program = jax.jit(jax.grad(energy))
    want = jax.grad(lambda x: jnp.sin(x @ jnp.asarray(matrix.numpy())).sum())
    close(program(x), want(x), rtol=1e-11)
    matrix.mul_(2)
    with pytest.raises(AT_RUN, match=STALE):
        program(x).block_until_ready()
    again = bridge.to_jax(lambda x: (x @ matrix).sin().sum(), lane="native")
    close(jax.jit(jax.grad(again))(x), want(x), rtol=1e-11)
