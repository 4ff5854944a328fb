"""Arrays over the bridge: one table of direction x dtype x layout x copy, then lifetimes, races and
every error text."""

import doctest
import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from jax.experimental.layout import Format, Layout
from torch._subclasses.fake_tensor import FakeTensorMode

from jax_side.calls import arrays as jax_arrays
from torch_side.calls import arrays as torch_arrays

DTYPES = list(torch_arrays.DTYPES)
WIDE = ["int64", "uint64", "float64", "complex128"]
EXACT = settings(deadline=None, max_examples=200, derandomize=True, database=None)


# ---- the span under test, and independent ways to look at it


def to_jax(t, copy=None):
    return jax_arrays.import_(torch_arrays.export(t, copy, "JAX"), torch_arrays.dtype_name(t.dtype))


def to_torch(a, copy=None):
    return torch_arrays.import_(jax_arrays.export(a, copy))


def address(x):
    return x.data_ptr() if isinstance(x, torch.Tensor) else x.unsafe_buffer_pointer()


def bits(x):
    """The elements' bytes in row-major order."""
    if isinstance(x, torch.Tensor):
        x = (
            x.detach()
            .resolve_conj()
            .resolve_neg()
            .clone(memory_format=torch.contiguous_format)
            .reshape(-1)
        )
        return bytes(x.view(torch.uint8).tolist()) if x.numel() else b""
    return np.asarray(x).tobytes()


def described(x):
    return tuple(x.shape), torch_arrays.dtype_name(x.dtype) if isinstance(
        x, torch.Tensor
    ) else x.dtype.name


def raw(dtype, n, seed=0):
    """n elements with random bits, hence with NaN payloads: a row-major tensor on a 64-byte
    boundary."""
    dtype = torch_arrays.DTYPES[dtype]
    top = 2 if dtype is torch.bool else 256
    data = torch.randint(
        0,
        top,
        (n * dtype.itemsize,),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(seed),
    )
    return data.view(dtype)


def raw_jax(dtype, shape, order=None):
    data = raw(dtype, int(np.prod(shape))).view(torch.uint8).numpy()
    array = jnp.asarray(data.view(jax_arrays.DTYPES[dtype]).reshape(shape))
    return array if order is None else jax.device_put(array, Format(Layout(order), array.sharding))


# ---- the table

# layout of the source -> (how to make it, what is said if it can't be shared)
FROM_TORCH = {
    "0d": (lambda d: raw(d, 1)[0], None),
    "vector": (lambda d: raw(d, 7), None),
    "row-major": (lambda d: raw(d, 24).view(2, 3, 4), None),
    "empty": (lambda d: raw(d, 0), None),
    "empty with axes": (lambda d: raw(d, 24).view(2, 3, 4)[:, 3:], None),
    "empty transposed": (lambda d: raw(d, 0).view(3, 0, 2).permute(2, 0, 1), None),
    "empty at an odd offset": (lambda d: raw(d, 5)[1:1], None),
    "transposed": (lambda d: raw(d, 6).view(2, 3).T, None),
    "permuted": (lambda d: raw(d, 24).view(2, 3, 4).permute(2, 0, 1), None),
    "channels_last": (lambda d: raw(d, 120).view(2, 4, 5, 3).permute(0, 3, 1, 2), None),
    "axis of size 1 with any stride": (
        lambda d: raw(d, 12).as_strided((4, 1, 3), (3, 100, 1)),
        None,
    ),
    "permuted axis of size 1": (lambda d: raw(d, 12).as_strided((4, 1, 3), (1, 100, 4)), None),
    "axis of size 1 with stride 0": (lambda d: raw(d, 12).as_strided((4, 1, 3), (1, 0, 4)), None),
    "aligned slice": (lambda d: raw(d, 80)[64:], None),
    "strided": (lambda d: raw(d, 12)[::2], r"strides \(2,\), not dense"),
    "strided, axis of size 1 with stride 0": (
        lambda d: raw(d, 12).as_strided((1, 6), (0, 2)),
        r"strides \(0, 2\), not dense",
    ),
    "inner slice": (lambda d: raw(d, 12).view(3, 4)[:, :3], r"strides \(4, 1\), not dense"),
    "overlapping": (lambda d: raw(d, 9).as_strided((3, 3), (1, 1)), r"strides \(1, 1\), not dense"),
    "stride 0": (lambda d: raw(d, 3).expand(2, 3), "stride 0"),
    "stride 0 of a scalar": (lambda d: raw(d, 1)[0].expand(4), "stride 0"),
    "unaligned": (lambda d: raw(d, 8)[1:], r"unaligned offset of {itemsize} bytes"),
    "unaligned 0d": (lambda d: raw(d, 8)[3], r"unaligned offset of {itemsize3} bytes"),
    "requires_grad": (lambda d: raw(d, 6).view(2, 3).requires_grad_(), "requires_grad"),
    "requires_grad, not a leaf": (
        lambda d: raw(d, 6).requires_grad_().view(2, 3).T,
        "requires_grad",
    ),
    "conj": (lambda d: raw(d, 6).view(2, 3).conj(), "the conj bit"),
    "conj transposed": (lambda d: raw(d, 6).view(2, 3).mH, "the conj bit"),
    "neg": (lambda d: torch._neg_view(raw(d, 6).view(2, 3)), "the neg bit"),
    "zeros": (
        lambda d: torch._efficientzerotensor((2, 3), dtype=torch_arrays.DTYPES[d]),
        "zeros that torch keeps without memory",
    ),
}
FROM_JAX = {
    "0d": lambda d: raw_jax(d, ()),
    "vector": lambda d: raw_jax(d, (7,)),
    "row-major": lambda d: raw_jax(d, (2, 3, 4)),
    "empty": lambda d: raw_jax(d, (0,)),
    "empty with axes": lambda d: raw_jax(d, (3, 0, 2)),
    "layout (2,0,1)": lambda d: raw_jax(d, (2, 3, 4), (2, 0, 1)),
    "layout (1,0)": lambda d: raw_jax(d, (2, 3), (1, 0)),
    "imported transposed": lambda d: to_jax(raw(d, 24).view(2, 3, 4).permute(2, 0, 1)),
}


def applies(layout, dtype):
    """requires_grad needs an inexact dtype, the conj bit a complex one, and a neg bit one with a
    sign to flip."""
    if layout.startswith("requires_grad") or layout == "zeros":  # these are tangents
        return dtype.startswith(("float", "bfloat", "complex"))
    if layout.startswith("conj"):
        return dtype.startswith("complex")
    return layout != "neg" or dtype in (
        "float16",
        "bfloat16",
        "float32",
        "float64",
        "complex64",
        "complex128",
    )


TABLE = [("to_jax", d, layout) for layout in FROM_TORCH for d in DTYPES if applies(layout, d)]
TABLE += [("to_torch", d, layout) for layout in FROM_JAX for d in DTYPES]


def source(direction, dtype, layout):
    """(array, why it can't be shared)."""
    if direction == "to_torch":
        return FROM_JAX[layout](dtype), None
    make, why = FROM_TORCH[layout]
    x = make(dtype)
    return x, why and why.replace("{itemsize}", str(x.itemsize)).replace(
        "{itemsize3}", str(3 * x.itemsize)
    )


@pytest.mark.parametrize("direction,dtype,layout", TABLE)
def test_values_shape_dtype_and_memory(direction, dtype, layout):
    x, why = source(direction, dtype, layout)
    convert = {"to_jax": to_jax, "to_torch": to_torch}[direction]
    for copy in (None, True, False):
        if copy is False and why:
            with pytest.raises(
                ValueError,
                match=f"a tensor whose memory JAX can share, got {dtype}.*with {why} and copy=False",
            ):
                convert(x, copy)
            continue
        y = convert(x, copy)
        assert isinstance(y, jax.Array if direction == "to_jax" else torch.Tensor)
        assert described(y) == described(x) and described(x)[1] == dtype
        assert bits(y) == bits(x)
        if 0 not in x.shape:
            assert (address(y) == address(x)) == (copy is not True and why is None)
    assert not getattr(y, "requires_grad", False)


@pytest.mark.parametrize(
    "direction,dtype,layout", [r for r in TABLE if r[1] == "float32" and r[2] != "zeros"]
)  # these have no memory to write to
def test_copies_are_independent_and_shared_memory_is_one(direction, dtype, layout):
    """The torch end is written to: a copy keeps its bits, shared memory follows."""
    for copy in (True, None):
        x, why = source(direction, dtype, layout)
        # of a twin: NumPy's view of x would be cached in x
        before = bits(source(direction, dtype, layout)[0])
        y = to_jax(x, copy) if direction == "to_jax" else to_torch(x, copy)
        written, other = (x, y) if direction == "to_jax" else (y, x)
        written.untyped_storage().fill_(0x42)
        kept = bool(copy or why or 0 in x.shape)
        assert bits(other) == (before if kept else b"\x42" * len(before))


def test_copies_are_row_major_and_lent_tensors_are_passed_through():
    t = raw("float32", 24).view(2, 3, 4).permute(2, 0, 1)
    assert torch_arrays.export(t, True).is_contiguous() and torch_arrays.export(t) is t
    a = raw_jax("float32", (2, 3), (1, 0))
    assert to_torch(a, True).is_contiguous() and jax_arrays.export(a) is a


def test_round_trips_return_to_the_same_memory():
    for x in (raw("float32", 24).view(2, 3, 4).permute(2, 0, 1), torch.tensor(1.5)):
        back = to_torch(to_jax(x, False), False)
        assert (address(back), back.stride()) == (address(x), x.stride())
    a = raw_jax("bfloat16", (3, 4), (1, 0))
    assert address(to_jax(to_torch(a, False), False)) == address(a)


# ---- properties


@EXACT
@given(
    shape=st.lists(st.integers(0, 3), max_size=4),
    strides=st.lists(st.sampled_from([0, 1, 1, 2, 3, 3, 4, 6, 9]), min_size=4, max_size=4),
    offset=st.sampled_from([0, 0, 0, 1, 4, 15, 16, 32]),
)
def test_any_strides_are_judged_as_xla_judges_them(shape, strides, offset):
    """export says "shareable" exactly where jaxlib, asked with copy=False, shares; and copy=None
    always has the values."""
    t = torch.arange(128.0, dtype=torch.float32).as_strided(shape, strides[: len(shape)], offset)
    try:
        shares = t.numel() == 0 or address(jax.dlpack.from_dlpack(t, copy=False)) == address(t)
    except (ValueError, RuntimeError):
        shares = False
    if shares:
        assert torch_arrays.export(t, False) is t
    else:
        with pytest.raises(ValueError, match="copy=None to let it be copied"):
            torch_arrays.export(t, False)
    assert (torch_arrays.export(t) is t) == shares
    assert bits(to_jax(t)) == bits(t)


@EXACT
@given(
    data=st.data(),
    dtype=st.sampled_from([d for d in DTYPES if d != "bool"]),
    n=st.lists(st.integers(0, 3), max_size=3),
)
def test_every_bit_pattern_survives_the_round_trip(data, dtype, n):
    size = int(np.prod(n)) * torch_arrays.DTYPES[dtype].itemsize
    content = data.draw(st.binary(min_size=size, max_size=size))
    t = torch.tensor(list(content), dtype=torch.uint8).view(torch_arrays.DTYPES[dtype]).reshape(n)
    t = t.permute(data.draw(st.permutations(range(len(n)))))
    copy = data.draw(st.sampled_from([None, True, False]))
    assert bits(to_jax(t, copy)) == bits(t)
    assert bits(to_torch(to_jax(t, copy), copy)) == bits(t)


@pytest.mark.parametrize(
    "dtype,pattern",
    [
        ("float16", 0x7E2A),
        ("bfloat16", 0xFFC5),
        ("float32", 0xFFC12345),
        ("float32", 0x7F812345),
        ("float64", 0x7FF8DEADBEEF0001),
    ],
)
def test_nan_payloads_and_negative_zero(dtype, pattern):
    size = torch_arrays.DTYPES[dtype].itemsize
    content = pattern.to_bytes(size, "little") + (1 << 8 * size - 1).to_bytes(size, "little")
    t = torch.tensor(list(content), dtype=torch.uint8).view(torch_arrays.DTYPES[dtype])
    assert torch.isnan(t[0]) and t[1] == 0 and torch.signbit(t[1])
    for copy in (None, True, False):
        assert bits(to_jax(t, copy)) == content
        assert bits(to_torch(to_jax(t), copy)) == content


# ---- dtypes


def test_both_banks_list_the_same_dtypes_and_miss_none():
    assert list(jax_arrays.DTYPES) == DTYPES
    names = {
        str(d).removeprefix("torch.") for d in vars(torch).values() if isinstance(d, torch.dtype)
    }
    both = {n for n in names if hasattr(jnp, n)}
    # torch only names these: no values
    assert both - set(DTYPES) <= {
        "int1",
        "uint1",
        "int2",
        "uint2",
        "int4",
        "uint4",
    }
    assert set(DTYPES) <= both


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("copy", [None, True, False])
def test_x64_off_is_an_error_and_never_a_narrowing(dtype, copy):
    t, narrow = (
        raw(dtype, 4),
        {"i": "int32", "u": "uint32", "f": "float32", "c": "complex64"}[dtype[0]],
    )
    with jax.enable_x64(False):
        with pytest.raises(ValueError) as e:
            to_jax(t, copy)
        assert to_jax(raw(narrow, 4), copy).dtype.name == narrow
    text = str(e.value)
    assert text.startswith(
        f"expected a dtype that JAX holds while x64 is off ({narrow}), got {dtype};"
    )
    assert (
        'jax.config.update("jax_enable_x64", True)' in text
        and f"cast to {narrow} on the producing side" in text
    )


@pytest.mark.parametrize("copy", [None, True, False])
def test_64_bit_arrays_leave_jax_whole_while_x64_is_off(copy):
    a = raw_jax("float64", (5,))
    with jax.enable_x64(False):
        t = to_torch(a, copy)
    assert t.dtype is torch.float64 and bits(t) == bits(a)


@pytest.mark.parametrize("x64", [True, False])
@pytest.mark.parametrize("layout", ["vector", "unaligned"])
@pytest.mark.parametrize("lane", ["private", "public"])
def test_a_wrongly_announced_dtype_is_an_error_not_a_cast(x64, layout, lane, monkeypatch):
    if lane == "public":
        monkeypatch.setattr(jax_arrays, "_cpu_view", lambda depth: None)
    t = FROM_TORCH[layout][0]("float64")
    with (
        jax.enable_x64(x64),
        pytest.raises(
            TypeError, match="memory of dtype float32, as announced, got float64; announce"
        ),
    ):
        jax_arrays.import_(t, "float32")


# ---- the private lane of import_


def test_this_jaxlib_has_the_fast_lane_and_it_is_taken(monkeypatch):
    assert jax_arrays._cpu_view(0) is not None
    monkeypatch.setattr(jax_arrays, "_public", None)
    assert address(to_jax(t := raw("float32", 5))) == address(t)


def test_the_public_lane_is_taken_where_the_private_one_is_gone(monkeypatch):
    from jaxlib import _jax

    with monkeypatch.context() as m:
        m.delattr(_jax, "dlpack_managed_tensor_to_buffer")
        jax_arrays._cpu_view.cache_clear()
        assert jax_arrays._cpu_view(0) is None
    assert address(to_jax(t := raw("float32", 5))) == address(t)
    jax_arrays._cpu_view.cache_clear()


@pytest.mark.parametrize("layout", FROM_TORCH)
def test_both_lanes_agree(layout, monkeypatch):
    dtype = "complex64" if layout.startswith("conj") else "float32"
    t, why = source("to_jax", dtype, layout)
    fast = to_jax(t)
    monkeypatch.setattr(jax_arrays, "_cpu_view", lambda depth: None)
    slow = to_jax(t)
    assert bits(slow) == bits(fast)
    assert (fast.committed, fast.weak_type, fast.sharding) == (
        slow.committed,
        slow.weak_type,
        slow.sharding,
    )
    if fast.size and not why:
        assert address(slow) == address(fast) == address(t)


# ---- import_ alone, from producers that have not been through export


def numpy_at(offset, n=8):
    """float32 zeros that start `offset` elements after a 64-byte boundary."""
    data = np.zeros(n + 32, np.float32)
    start = -data.ctypes.data % 64 // 4 + offset
    return data[start : start + n]


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("copy", [None, True, False])
@pytest.mark.parametrize("lane", ["private", "public"])
def test_import_into_jax_keeps_copy_for_any_producer(offset, copy, lane, monkeypatch):
    if lane == "public":
        monkeypatch.setattr(jax_arrays, "_cpu_view", lambda depth: None)
    n = numpy_at(offset)
    if offset and copy is False:
        with pytest.raises(
            ValueError,
            match="dense memory on a 64-byte boundary, .*not aligned to 64 bytes.*copy it to such a place",
        ):
            jax_arrays.import_(n, "float32", copy)
        return
    a = jax_arrays.import_(n, "float32", copy)
    assert (address(a) == n.ctypes.data) == (copy is not True and not offset)
    assert bits(a) == bits(n)


@pytest.mark.parametrize("copy", [None, True, False])
def test_strided_memory_is_refused_by_import_alone(copy):
    with pytest.raises(
        ValueError, match=r"dense memory on a 64-byte boundary.*ndarray: .*strides were \[2\]"
    ):
        jax_arrays.import_(np.zeros(8, np.float32)[::2], "float32", copy)


@pytest.mark.parametrize("copy", [None, True, False])
def test_import_into_torch_keeps_copy_for_any_producer(copy):
    n = np.arange(6.0).reshape(2, 3)[:, ::2]
    t = torch_arrays.import_(n, copy)
    assert (t.data_ptr() == n.ctypes.data) == (copy is not True) and bits(t) == bits(n)


@pytest.mark.parametrize("copy,asked", [(None, None), (False, False), (True, None)])
def test_import_into_torch_copies_once(copy, asked):
    """A producer that copied on demand would copy a second time; copy=False is passed on, so that
    it doesn't."""
    n, seen = np.ones(3), []

    def lend(**options):
        seen.append(options.get("copy"))
        return n.__dlpack__(max_version=(1, 0))

    t = torch_arrays.import_(
        SimpleNamespace(__dlpack__=lend, __dlpack_device__=n.__dlpack_device__), copy
    )
    assert seen == [asked] and bits(t) == bits(n)


@pytest.mark.parametrize("case", ["unaligned", "copy=True", "through export"])
def test_the_producer_may_be_written_to_as_soon_as_a_copy_is_returned(case):
    """While XLA is busy it copies later: jax.dlpack.from_dlpack(unaligned) and array.copy() then
    gave the NEW values."""
    n = numpy_at(0 if case == "copy=True" else 1, 4_000_000)
    n[:] = 0  # touch the pages
    work = jax.jit(lambda x: jax.lax.fori_loop(0, 10, lambda i, y: jnp.tanh(y @ y), x))
    work(ones := jnp.ones((300, 300))).block_until_ready()
    busy = [work(ones) for _ in range(8)]
    a = (
        to_jax(torch.from_numpy(n))
        if case == "through export"
        else jax_arrays.import_(n, "float32", case == "copy=True" or None)
    )
    n[:] = 7
    assert float(a.max()) == 0.0 and jax.block_until_ready(busy)


def test_a_running_computation_is_waited_for():
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 100, lambda i, y: jnp.sin(y) + 1, x))
    a = slow(jnp.ones(300_000))
    assert bits(to_torch(a)) == bits(slow(jnp.ones(300_000)))


# ---- who keeps the memory alive


def churn():
    """Reuse whatever was freed."""
    gc.collect()
    for _ in range(50):
        torch.full((4096,), 9.0)
        jnp.full(4096, 9.0).block_until_ready()


@pytest.mark.parametrize("copy", [None, True, False])
def test_results_outlive_their_sources(copy):
    t = torch.arange(4096.0)
    a, want = to_jax(t, copy), bits(t)
    del t
    churn()
    assert bits(a) == want
    b = to_torch(a, copy)
    a.delete()
    del a
    churn()
    assert bits(b) == want


def test_shared_memory_is_held_exactly_as_long_as_it_is_used():
    n = numpy_at(0, 4096)
    alive = weakref.ref(n)
    a = to_jax(torch.from_numpy(n), False)
    del n
    b = to_torch(a, False)
    gc.collect()
    assert alive() is not None
    del a
    gc.collect()
    assert alive() is not None and float(b.sum()) == 0.0
    del b
    gc.collect()
    assert alive() is None


def test_a_copy_does_not_hold_its_source():
    n = numpy_at(0, 4096)
    alive = weakref.ref(n)
    kept = to_jax(torch.from_numpy(n), True), to_torch(to_jax(torch.from_numpy(n)), True)
    del n
    gc.collect()
    assert alive() is None and all(bits(k) == bytes(4 * 4096) for k in kept)


def test_donation_never_writes_to_lent_memory():
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    t = torch.arange(4096.0)
    assert float(step(to_jax(t, False))[0]) == 1.0
    assert bits(t) == bits(torch.arange(4096.0))
    a = jnp.arange(4096.0)
    t = to_torch(a, False)
    step(a).block_until_ready()
    assert bits(t) == bits(np.arange(4096.0))


# ---- inside transforms


@pytest.mark.parametrize("copy", [None, True, False])
def test_concrete_arrays_cross_while_jax_traces(copy):
    t, a, odd, seen = raw("float32", 4), raw_jax("float32", (4,)), numpy_at(1), []

    def f(x):
        seen.extend((to_jax(t, copy), to_torch(a, copy), jax_arrays.import_(t, "float32", copy)))
        seen.append(jax_arrays.import_(odd, "float32", copy or None))
        return x

    jax_arrays._cpu_view.cache_clear()
    jax.jit(f)(1.0)
    assert jax_arrays._cpu_view(0) is not None and not any(
        isinstance(y, jax.core.Tracer) for y in seen
    )
    assert (
        bits(seen[0]) == bits(seen[2]) == bits(t)
        and bits(seen[1]) == bits(a)
        and bits(seen[3]) == bits(odd)
    )
    assert (address(seen[2]) == address(t)) == (copy is not True)


@pytest.mark.parametrize("transform", [jax.jit, jax.grad, jax.vmap])
def test_tracers_are_refused(transform):
    with pytest.raises(
        TypeError,
        match=r"a concrete array, .*float64\[.*as a tracer .*Tracer.*bridge.to_jax\(function\)",
    ):
        transform(lambda x: jax_arrays.export(x).sum())(
            jnp.ones(3) if transform is jax.vmap else 1.0
        )


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp", "functionalize"])
def test_tensors_inside_torch_func_are_refused(transform):
    def f(x):
        torch_arrays.export(x)
        return x.sum()

    call = {
        "vmap": lambda: torch.func.vmap(f)(torch.ones(2, 3)),
        "grad": lambda: torch.func.grad(f)(torch.ones(3)),
        "jvp": lambda: torch.func.jvp(f, (torch.ones(3),), (torch.ones(3),)),
        "functionalize": lambda: torch.func.functionalize(f)(torch.ones(3)),
    }[transform]
    with pytest.raises(
        TypeError,
        match="a tensor with memory of its own, got a traced or wrapped one.*bridge.to_torch",
    ):
        call()


# ---- error texts


def fake():
    with FakeTensorMode():
        return torch.ones(3)


def nested(layout):
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)


TORCH_REFUSES = {
    "list": (lambda: [1.0], "a torch.Tensor, got list; make one with torch.as_tensor"),
    "meta": (
        lambda: torch.ones(3, device="meta"),
        "a meta tensor, which has no memory; move the model or tensor",
    ),
    "sparse": (
        lambda: torch.eye(3).to_sparse(),
        r"layout torch.sparse_coo; pass tensor.to_dense\(\)",
    ),
    "sparse rows": (
        lambda: torch.eye(3).to_sparse_csr(),
        r"layout torch.sparse_csr; pass tensor.to_dense\(\)",
    ),
    "nested": (lambda: nested(torch.strided), "a nested tensor; pass its parts"),
    "jagged": (lambda: nested(torch.jagged), "a nested tensor; pass its parts"),
    "quantized": (
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        r"quantized tensor \(torch.qint8\); pass tensor.deq",
    ),
    "complex32": (
        lambda: torch.zeros(3, dtype=torch.complex32),
        "both sides know, got torch.complex32, which only torch knows; cast it",
    ),
    "int4": (
        lambda: torch.zeros(3, dtype=torch.uint8).view(torch.int4),
        "got torch.int4, which only torch knows; cast it to one of bool",
    ),
    "fake": (fake, "a tensor with memory of its own, got a traced or wrapped one"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("copy", [None, True, False])
@pytest.mark.parametrize("case", TORCH_REFUSES)
def test_tensors_that_no_copy_can_save(case, copy):
    make, text = TORCH_REFUSES[case]
    with pytest.raises(TypeError, match=text):
        torch_arrays.export(make(), copy)


CURES = {
    "requires_grad": "detach()",
    "conj": "resolve_conj()",
    "neg": "resolve_neg()",
    "zeros": "clone()",
    "strided": "contiguous()",
    "stride 0": "contiguous()",
    "unaligned": "clone()",
}


@pytest.mark.parametrize("layout", CURES)
def test_the_cure_that_an_error_names_works(layout):
    t = FROM_TORCH[layout][0]("complex64")
    with pytest.raises(ValueError) as e:
        torch_arrays.export(t, False)
    cure = CURES[layout]
    assert f"; pass tensor.{cure}" in str(e.value) and str(e.value).endswith(
        ", or copy=None to let it be copied"
    )
    assert bits(to_jax(getattr(t, cure[:-2])(), False)) == bits(t)


def test_the_consumer_is_named():
    with pytest.raises(ValueError, match="a tensor whose memory the consumer can share"):
        torch_arrays.export(torch.ones(4)[::2], False)


def deleted():
    a = jnp.ones(3)
    a.delete()
    return a


JAX_REFUSES = {
    "numpy": (
        lambda: np.ones(3),
        TypeError,
        "a jax.Array, got ndarray; make one with jax.numpy.asarray",
    ),
    "ref": (lambda: jax.new_ref(jnp.ones(3)), TypeError, "a jax.Array, got Ref"),
    "key": (
        lambda: jax.random.key(0),
        TypeError,
        r"typed PRNG keys key<fry>\[\]; pass jax.random.key_data\(keys\)",
    ),
    "int4": (
        lambda: jnp.ones(3, "int4"),
        TypeError,
        r"both sides know, got int4\[3\], which only JAX knows; cast it to one of bool",
    ),
    "float8": (
        lambda: jnp.ones(3, jnp.float8_e3m4),
        TypeError,
        r"got float8_e3m4\[3\], which only JAX knows",
    ),
    "float4": (
        lambda: jnp.ones(3, jnp.float4_e2m1fn),
        TypeError,
        r"got float4_e2m1fn\[3\], which only JAX knows",
    ),
    "deleted": (
        deleted,
        ValueError,
        r"a live array, got float64\[3\], deleted or donated; copy it before it is donated",
    ),
}


@pytest.mark.parametrize("copy", [None, True, False])
@pytest.mark.parametrize("case", JAX_REFUSES)
def test_arrays_that_no_copy_can_save(case, copy):
    make, error, text = JAX_REFUSES[case]
    with pytest.raises(error, match=text):
        jax_arrays.export(make(), copy)


def test_the_cures_for_keys_and_odd_dtypes_work():
    key = jax.random.key(7)
    assert bits(to_torch(jax.random.key_data(key))) == bits(jax.random.key_data(key))
    assert to_torch(jnp.ones(3, "int4").astype("int8")).tolist() == [1, 1, 1]


MANY = """
import jax, jax.numpy as jnp, torch
from jax.sharding import NamedSharding, PartitionSpec
from jax_side.calls import arrays
from torch_side.calls.arrays import import_
mesh = jax.make_mesh((4,), ("x",))
for spec in (PartitionSpec("x"), PartitionSpec()):
    a = jax.device_put(jnp.arange(8, dtype="float32"), NamedSharding(mesh, spec))
    try:
        arrays.export(a)
    except ValueError as e:
        print(e)
    cured = jax.device_put(a, jax.local_devices()[0])
    print(import_(arrays.export(cured)).tolist() == list(range(8)))
one = jax.device_put(jnp.arange(8), jax.devices()[2])
print(import_(arrays.export(one, False)).data_ptr() == one.unsafe_buffer_pointer())
"""


def test_arrays_on_several_devices_are_refused_and_other_single_devices_are_not():
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
    }
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", MANY], capture_output=True, text=True, env=env, cwd=root, check=False
    )
    error = (
        "expected an array on exactly one device of this process, got float32[8] on 4 device(s), "
        "fully addressable: True; "
        "gather it with jax.device_put(array, jax.local_devices()[0]), or hand over its "
        "addressable_shards"
    )
    assert done.stdout.splitlines() == [error, "True", error, "True", "True"], done.stderr


def test_an_array_of_another_process_is_refused(monkeypatch):
    a = jnp.ones(3)
    monkeypatch.setattr(type(a), "is_fully_addressable", property(lambda self: False))
    with pytest.raises(ValueError, match=r"on 1 device\(s\), fully addressable: False"):
        jax_arrays.export(a)


def test_dtypes_that_jax_does_not_know():
    with pytest.raises(
        TypeError,
        match="a dtype that both sides know, got complex32, which JAX doesn't know; cast it to one of bool",
    ):
        jax_arrays.import_(torch.zeros(2), "complex32")


def producer(device, error):
    def lend(**_):
        raise error

    return SimpleNamespace(__dlpack_device__=lambda: (device, 0), __dlpack__=lend)


@pytest.mark.parametrize(
    "device,text",
    [(99, "unsupported device type"), (1, "the producer says no")],
)
@pytest.mark.parametrize("copy", [None, True, False])
def test_import_into_jax_passes_on_why_memory_was_not_lent(device, text, copy):
    with pytest.raises(
        ValueError,
        match=f"on a device that JAX has, got SimpleNamespace: .*{text}.*; copy it to such a place first",
    ):
        jax_arrays.import_(producer(device, BufferError("the producer says no")), "float32", copy)


def test_import_into_torch_passes_on_why_memory_was_not_lent():
    with pytest.raises(
        ValueError,
        match="memory that torch can share, got SimpleNamespace: the producer says no; make a dense copy",
    ):
        torch_arrays.import_(producer(1, BufferError("the producer says no")))
    with pytest.raises(
        ValueError,
        match="memory that torch can share, got ArrayImpl: .*; make a dense copy in a dtype",
    ):
        torch_arrays.import_(jnp.ones(3, jnp.float8_e3m4))


def test_what_lends_a_capsule_of_the_cpu_says_so():
    """(kDLCPU, 0), as the standard of the array API has it."""
    from jax_side.calls.arrays import _Capsule
    from torch_side.calls.buffers import _Loan

    for lender in (_Capsule(None), _Loan(torch.ones(2))):
        assert lender.__dlpack_device__() == (1, 0)


@pytest.mark.parametrize(
    "import_", [torch_arrays.import_, lambda x: jax_arrays.import_(x, "float32")]
)
def test_objects_without_dlpack_are_refused(import_):
    with pytest.raises(
        TypeError, match="an object with __dlpack__, got list; make an array of it first"
    ):
        import_([1.0])


@pytest.mark.parametrize("module", [torch_arrays, jax_arrays])
def test_the_examples_run(module):
    done = doctest.testmod(module)
    assert done.attempted >= 4 and done.failed == 0


class Event:
    """A mark in a stream that is passed when a test says so."""

    passed = False

    def query(self):
        return self.passed


class Owner:
    """Someone whose memory is lent."""


@pytest.mark.parametrize("passed", [True, False])
def test_memory_of_a_gpu_stays_with_the_tensor_until_the_stream_has_read_it(monkeypatch, passed):
    """The event and the owner stand in for a CUDA stream and a JAX buffer; on a card:
    benchmarks.gpu_check order_arrays."""
    from torch_side.calls import arrays

    event, owner, tensor = Event(), Owner(), torch.zeros(8)
    event.passed = passed
    monkeypatch.setattr(arrays, "_mark", lambda device: event)
    arrays._outlive(tensor, owner)
    alive = weakref.ref(owner)
    view = tensor[2:]
    del owner, tensor
    assert alive() is not None  # a view holds the storage
    del view
    assert (alive() is None) is passed  # the storage is gone; kernels may still read the memory
    event.passed = True
    arrays._outlive(torch.zeros(1), None)
    assert alive() is None
