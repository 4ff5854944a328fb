"""What crosses the lanes arrives bit by bit: every dtype x shape x layout, the lanes against each
other, and no copies."""

from functools import partial

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from jax.experimental.layout import Format, Layout
from torch.utils._python_dispatch import TorchDispatchMode

import bridge
from jax_side.calls import arrays as jax_arrays
from jax_side.calls.native import KNOWN
from torch_side.calls import arrays as torch_arrays
from torch_side.calls import export

DTYPES = sorted(set(jax_arrays.DTYPES) & set(torch_arrays.DTYPES))
SHAPES = [(), (1,), (0,), (0, 3), (3, 0), (2, 0, 3), (7,), (2, 3, 4)]
MODES = {
    "eager": lambda f: bridge.to_jax(f),
    "ffi": lambda f: jax.jit(bridge.to_jax(f, lane="ffi")),
    "host": lambda f: jax.jit(bridge.to_jax(f, lane="host")),
}
LAYOUTS = {  # torch functions, by how the memory of what they return lies
    "input": lambda x: x,
    "view_of_input": lambda x: x.reshape(-1)[x.numel() // 2 :],
    "new_axis": lambda x: x[None],
    "conj_of_input": lambda x: x.conj(),
    "contiguous": lambda x: x.clone(),
    "stacked": lambda x: torch.stack([x, torch.zeros_like(x)]),
    "transposed": lambda x: torch.stack([x, x]).permute(*reversed(range(x.dim() + 1))),
    "column_major": lambda x: torch.stack([x, x], -1).movedim(-1, 0),
    "strided": lambda x: torch.stack([x, x], -1)[..., 1],
    "every_second": lambda x: x.clone().reshape(-1)[::2],
    "unaligned": lambda x: x.clone().reshape(-1)[min(1, x.numel()) :],
    "expanded": lambda x: x.clone().expand(3, *x.shape),
    "conj": lambda x: x.clone().conj(),
    "neg": lambda x: x.clone().conj().imag if x.is_complex() else x[None],
    "same_twice": lambda x: (x.clone(),) * 2,
    "two_views": lambda x: (y := x.clone(), y[None]),
}


@pytest.fixture(params=MODES)
def mode(request):
    return MODES[request.param]


def raw(dtype, shape, seed=0):
    """Random bits, hence NaNs with payloads, as (torch tensor, JAX array)."""
    t = torch.empty(int(np.prod(shape)), dtype=torch_arrays.DTYPES[dtype])
    data = t.view(torch.uint8).numpy()
    data[:] = np.random.default_rng(seed).integers(0, 2 if dtype == "bool" else 256, data.shape)
    return t.reshape(shape), jnp.asarray(data.view(jnp.dtype(dtype)).reshape(shape).copy())


def described(x):
    """Shape, dtype and the bytes of the elements in row-major order, of either side's array."""
    if isinstance(x, torch.Tensor):
        flat = (
            x.detach()
            .resolve_conj()
            .resolve_neg()
            .clone(memory_format=torch.contiguous_format)
            .reshape(-1)
        )
        return (
            tuple(x.shape),
            torch_arrays.dtype_name(x.dtype),
            flat.view(torch.uint8).numpy().tobytes() if x.numel() else b"",
        )
    return x.shape, x.dtype.name, np.asarray(x).tobytes()


def all_described(tree):
    return jax.tree.map(described, tree, is_leaf=torch.is_tensor)


@pytest.mark.matrix
@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_x_dtype_shape_layout(dtype, mode):
    def every_layout(x):
        return {name: f(x) for name, f in LAYOUTS.items()}

    for seed, shape in enumerate(SHAPES):
        t, x = raw(dtype, shape, seed)
        assert all_described(mode(every_layout)(x)) == all_described(every_layout(t)), shape


# One package for all dtypes: what the native lane compiles takes 10 s.
OF_NATIVE = ["input", "transposed", "strided", "expanded", "conj"]


def layouts(xs):
    """Of a dict {dtype and shape: tensor}."""
    return {key: {name: LAYOUTS[name](x) for name in OF_NATIVE} for key, x in xs.items()}


@pytest.fixture(scope="module")
def arrived():
    """{dtype and shape: (what torch gives, what arrived on the native lane)}"""
    made = {f"{d} {s}": raw(d, s, i) for d in KNOWN for i, s in enumerate([(), (0, 3), (2, 3)])}
    torches, arrays = ({key: pair[k] for key, pair in made.items()} for k in (0, 1))
    found = all_described(jax.jit(bridge.to_jax(layouts, lane="native"))(arrays))
    want = all_described(layouts(torches))
    return {key: (want[key], found[key]) for key in made}


def test_dtypes_of_native_are_those_of_both_sides_but_float8():
    assert sorted(KNOWN) == [d for d in DTYPES if not d.startswith("float8")]


@pytest.mark.parametrize("dtype", KNOWN)
def test_bytes_x_dtype_on_native(dtype, arrived):
    cells = {key: pair for key, pair in arrived.items() if key.split()[0] == dtype}
    assert len(cells) == 3
    for key, (want, found) in cells.items():
        assert found == want, key


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.startswith("float8")])
def test_float8_on_native_is_refused(dtype):
    x = raw(dtype, (2,))[1]
    for f in (lambda x: x.clone(), lambda x: x.float()):
        with pytest.raises(
            NotImplementedError, match=f'complex128.* for lane="native", got {dtype}'
        ):
            jax.jit(bridge.to_jax(f, lane="native"))(x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_x_layout_alone(layout):
    """Eager calls hand over the tensor itself where they can: here with no other output on the same
    memory."""
    for dtype in ("float32", "complex64", "bfloat16"):
        for shape in SHAPES:
            t, x = raw(dtype, shape)
            assert all_described(bridge.to_jax(LAYOUTS[layout])(x)) == all_described(
                LAYOUTS[layout](t)
            ), (dtype, shape)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
@pytest.mark.parametrize("dtype", ["float32", "complex128", "bool"])
def test_bytes_x_layout_of_the_input(dtype, order, mode):
    t, x = raw(dtype, (2, 3, 4))
    x = jax.device_put(x, Format(Layout(order), x.sharding))
    double = lambda x: torch.cat([x, x.flip(0)], 1)
    assert described(mode(double)(x)) == described(double(t))


@pytest.mark.parametrize("name", ["kept", "parameter", "buffer", "view", "in_a_list"])
def test_memory_of_the_module_x_output(name, mode):
    """An output that the module keeps is a copy: a later change of the module does not change the
    JAX array."""
    module = torch.nn.Linear(4, 4)
    module.register_buffer("buffer", torch.ones(64))
    module.kept, module.list, module.parameter = (
        torch.ones(64),
        [torch.ones(64)],
        torch.nn.Parameter(torch.ones(64)),
    )
    pick = {"view": lambda: module.kept[:32], "in_a_list": lambda: module.list[0]}.get(
        name, lambda: getattr(module, name)
    )
    y = mode(lambda x: pick() if x.dim() else x)(jnp.ones(3))
    before = np.array(y)
    pick().detach().zero_()
    np.testing.assert_array_equal(np.array(y), before)


FUNCTIONS = {
    "sin": lambda x, i: torch.sin(x),
    "matmul": lambda x, i: x @ x.mT,
    "cumsum": lambda x, i: torch.cumsum(x, 0),
    "softmax": lambda x, i: torch.softmax(x.real if x.is_complex() else x, -1),
    "index_select": lambda x, i: torch.index_select(x, 0, i),
    "where": lambda x, i: torch.where(i[:, None] > 0, x[:1], 2 * x[:1]),
    "einsum": lambda x, i: torch.einsum("ab,ac,a->bc", x, x, x[:, 0]),
    "two": lambda x, i: (torch.exp(x).T, x.abs().sum(1)),
}


def tangent(x):
    return jnp.cos(jnp.arange(x.size)).reshape(x.shape).astype(x.dtype) * (
        1 if x.dtype.kind == "f" else 1 - 2j
    )


def pulled(f, x, i):
    y, pull = jax.vjp(lambda x: f(x, i), x)
    return y, pull(jax.tree.map(tangent, y))


TRANSFORMS = {
    "value": lambda f, x, i: f(x, i),
    "jvp": lambda f, x, i: jax.jvp(lambda x: f(x, i), (x,), (tangent(x),)),
    "vjp": pulled,
    "vmap": lambda f, x, i: jax.vmap(f, (0, None))(jnp.stack([x, 2 * x]), i),
    "vmap_jvp": lambda f, x, i: jax.vmap(lambda v: jax.jvp(lambda x: f(x, i), (x,), (v,)))(
        jnp.stack([tangent(x), x])
    ),
    "vmap_vjp": lambda f, x, i: jax.vmap(lambda x: pulled(f, x, i))(jnp.stack([x, 2 * x])),
}


@given(
    st.sampled_from(sorted(FUNCTIONS)),
    st.sampled_from(sorted(TRANSFORMS)),
    st.sampled_from(["float32", "float64", "complex64", "complex128"]),
    st.tuples(st.integers(1, 9), st.integers(1, 33)),
    st.integers(0, 99),
)
def test_lanes_agree_x_transform(name, transform, dtype, shape, seed):
    random = np.random.default_rng(seed)
    x = jnp.asarray(
        random.normal(size=shape) + (1j * random.normal(size=shape) if dtype[0] == "c" else 0),
        dtype,
    )
    i = jnp.asarray(random.integers(0, shape[0], 5))
    with_lane = {
        lane: partial(TRANSFORMS[transform], bridge.to_jax(FUNCTIONS[name], lane=lane))
        for lane in ("ffi", "host")
    }
    results = [
        all_described(f(x, i))
        for f in (jax.jit(with_lane["ffi"]), jax.jit(with_lane["host"]), with_lane["ffi"])
    ]
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_address_x_input(dtype):
    """torch reads JAX's own memory: eager with every dtype, ffi with all that DLPack and
    jax-tvm-ffi both have a name for."""
    seen = []
    f = bridge.to_jax(lambda x: (seen.append(x.data_ptr()), x)[1], outputs=lambda x: x, lane="ffi")
    x = raw(dtype, (8, 8))[1]
    f(x).block_until_ready()
    assert seen == [x.unsafe_buffer_pointer()]
    jax.jit(f)(x).block_until_ready()
    assert (seen[0] == seen[1]) is not dtype.startswith(("complex", "float8")), (
        "else say so in docs/traps.md"
    )


class Recorded(TorchDispatchMode):
    """The torch operations of a stretch of code."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "lane, expected", [(None, ["sin"]), ("ffi", ["sin", "copy_"]), ("host", ["sin", "copy_"])]
)
def test_copies_x_output(lane, expected, monkeypatch):
    """Eager gives torch's own memory to JAX; the lanes write once, ffi into the buffer that becomes
    the JAX array."""
    base, ops, written = export.TorchFunction, Recorded(), []
    run, runner = base.run, base.runner

    def recorded(run, given, into=None):
        with ops:
            results = run(given, into)
        # a host call's are capsules
        written.extend(b.data_ptr() for b in into or results if isinstance(b, torch.Tensor))
        return results

    monkeypatch.setattr(
        base, "run", staticmethod(lambda fn, *buffers: recorded(partial(run, fn), *buffers))
    )
    monkeypatch.setattr(
        base, "runner", staticmethod(lambda fn, ready: partial(recorded, runner(fn, ready)))
    )
    f = bridge.to_jax(torch.sin, lane=lane or "auto")
    y = (jax.jit(f) if lane else f)(jnp.ones((8, 16), jnp.float32)).block_until_ready()
    assert [n for n in ops.names if n != "detach"] == expected
    assert written == ([] if lane == "host" else [y.unsafe_buffer_pointer()])
