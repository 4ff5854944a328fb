"""A state machine over arrays: made, crossed, sliced, written to, donated, dropped; NumPy says what
each of them must hold, and which of them share memory."""

import ctypes
import gc
import itertools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import torch
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from jax.experimental.layout import Format, Layout

import bridge
from jax_side.calls.arrays import DTYPES
from torch_side.calls.arrays import DTYPES as OF_TORCH
from torch_side.calls.arrays import dtype_name

# Few, so that JAX compiles few programs.
SHAPES = [(), (0,), (1,), (16,), (64,), (4, 4), (16, 4), (4, 0), (1, 16), (2, 4, 8), (4, 1, 4)]
MOST = 6  # arrays at once
GRAD = ("float", "bfloat", "complex")

which = st.integers(0, MOST - 1)
seeds = st.integers(0, 255)
copies = st.sampled_from([None, True, False])


class Held:
    """An array of one side, and a NumPy view of the model's memory with what it must hold.

    `conj` and `neg` are torch's bits, which NumPy has not."""

    def __init__(self, array, view, conj=False, neg=False):
        self.array, self.view, self.conj, self.neg = array, view, conj, neg

    @property
    def of_torch(self):
        return isinstance(self.array, torch.Tensor)

    def values(self):
        """A copy of what the array must hold."""
        return self.stored(np.array(self.view, order="C"))

    def stored(self, x):
        """x as the memory holds it where the array holds x; and the other way round."""
        x = np.conj(x) if self.conj else x
        return np.negative(x) if self.neg else x


def raw(dtype, shape, seed):
    """A NumPy array of random bits, NaN payloads and all."""
    dtype, rng = DTYPES[dtype], np.random.default_rng(seed)
    n = int(np.prod(shape))
    if dtype.kind == "b":
        return rng.integers(0, 2, n).astype(bool).reshape(shape)
    return np.frombuffer(rng.bytes(n * dtype.itemsize), dtype).reshape(shape).copy()


def beside_a_boundary(x, offset):
    """A copy in memory of NumPy's that begins so many bytes after a 64-byte boundary: always the
    same, since what happens in an example must not depend on where memory lies."""
    room = np.zeros(x.nbytes + 128, np.uint8)
    first = -room.ctypes.data % 64 + offset
    own = room[first : first + x.nbytes].view(x.dtype).reshape(x.shape)
    own[...] = x
    return own


def as_tensor(x):
    """A tensor over the memory of a NumPy array, of dtypes that NumPy does not know, too. To torch
    it is no view of another one."""
    flat = torch.from_numpy(x.reshape(-1).view(np.uint8))
    return flat.view(OF_TORCH[x.dtype.name]).view(x.shape).data


def read(x):
    """The bytes that an array holds, in row-major order, read with little of either side."""
    if isinstance(x, torch.Tensor):
        x = x.detach().resolve_conj().resolve_neg().contiguous()
        return ctypes.string_at(x.data_ptr(), x.numel() * x.itemsize) if x.numel() else b""
    if not x.size:
        return b""
    order = x.format.layout.major_to_minor
    memory = ctypes.string_at(x.unsafe_buffer_pointer(), x.nbytes)
    stored = np.frombuffer(memory, x.dtype).reshape([x.shape[axis] for axis in order])
    return stored.transpose(np.argsort(order)).tobytes()


def addresses(x):
    """(first, last) byte of its memory; None where it has none."""
    if isinstance(x, torch.Tensor):
        far = sum((n - 1) * s for n, s in zip(x.shape, x.stride()))
        return (x.data_ptr(), x.data_ptr() + (far + 1) * x.itemsize) if x.numel() else None
    first = x.unsafe_buffer_pointer() if x.size else 0
    return (first, first + x.nbytes) if x.size else None


def every_byte(x):
    """The addresses of all bytes that it shows."""
    if not isinstance(x, torch.Tensor):
        return set(range(*addresses(x)))
    places = itertools.product(*map(range, x.shape))
    first = [x.data_ptr() + x.itemsize * sum(map(int.__mul__, p, x.stride())) for p in places]
    return {byte for start in first for byte in range(start, start + x.itemsize)}


def can_be_lent(t):
    """What docs/traps.md and to_jax promise, by looking at every element."""
    if t.requires_grad or t.is_conj() or t.is_neg():
        return False
    if not t.numel():
        return True
    places = itertools.product(*map(range, t.shape))
    offsets = sorted(sum(i * s for i, s in zip(place, t.stride())) for place in places)
    return offsets == list(range(t.numel())) and t.data_ptr() % 64 == 0


@jax.jit
def turned_over(x):
    return jnp.flip(x)


donated = jax.jit(jnp.flip, donate_argnums=0)
SLICES = {  # of tensors with an axis of at least 2, as torch and NumPy both write them
    "first": lambda x: x[0, ...],
    "half": lambda x: x[: x.shape[0] // 2],
    "rest": lambda x: x[x.shape[0] // 2 :],
    "odd": lambda x: x[1:],
    "every second": lambda x: x[::2],
    "nothing": lambda x: x[:0],
    "inner": lambda x: x[..., 1:],
    "inner half": lambda x: x[..., x.shape[-1] // 2 :],
}
OF_JAX = {
    "flip": (turned_over, np.flip),
    "transpose": (jax.jit(jnp.transpose), np.transpose),
    "ravel": (jax.jit(jnp.ravel), np.ravel),
    "rest": (jax.jit(SLICES["rest"]), SLICES["rest"]),
}
BRIDGED = {  # of torch, JAX and NumPy: their input, or a view of it
    "same": lambda x: x,
    "view": lambda x: x.T if x.ndim == 2 else x.reshape(-1),
    "part": lambda x: x[x.shape[0] // 2 :] if x.ndim else x,
}
IN_JAX = {name: bridge.to_jax(f) for name, f in BRIDGED.items()}
IN_TORCH = {name: bridge.to_torch(f) for name, f in BRIDGED.items()}


MADE = {
    "side": st.sampled_from(["torch", "numpy", "jax", "jax F"]),
    "dtype": st.sampled_from(list(DTYPES)),
    "shape": st.sampled_from(SHAPES),
    "seed": seeds,
}


class Arrays(RuleBasedStateMachine):
    """Up to MOST arrays of both sides."""

    def __init__(self):
        super().__init__()
        self.pool, self.deleted = [], []

    def add(self, array, view, **bits):
        if len(self.pool) == MOST:
            del self.pool[0]
        self.pool.append(Held(array, view, **bits))

    def some(self, i, of_torch=None):
        """The i-th array (of one side), None where there is none."""
        pool = [x for x in self.pool if of_torch is None or x.of_torch == of_torch]
        return pool[i % len(pool)] if pool else None

    @initialize(**MADE)
    def begin(self, **made):
        self.make(**made)

    @rule(**MADE)
    def make(self, side, dtype, shape, seed):
        x = raw(dtype, shape, seed)
        if side == "torch":
            self.add(as_tensor(x).clone(), x)
        elif side == "numpy":
            self.add(as_tensor(beside_a_boundary(x, 16 * (seed % 4))), x)
        else:
            a = jnp.array(x)
            if side == "jax F" and a.ndim > 1:
                a = jax.device_put(a, Format(Layout(range(a.ndim)[::-1]), a.sharding))
            self.add(a, x)

    @rule(i=which, copy=copies)
    def cross(self, i, copy):
        """To the other side, with memory shared or not as promised."""
        x = self.some(i)
        if x is None:
            return
        cross = bridge.to_jax if x.of_torch else bridge.to_torch
        lent = can_be_lent(x.array) if x.of_torch else True
        if copy is False and not lent:
            self.refuses(lambda: cross(x.array, copy=False))
            return
        self.crossed(x, cross(x.array, copy=copy), copy is not True and lent)

    def crossed(self, x, y, shared):
        """Adds what came of x, which must share its memory or not."""
        if x.view.size:
            same = addresses(y) == addresses(x.array)
            assert same == shared, f"shared: {same}, promised: {shared}"
        assert tuple(y.shape) == x.view.shape
        if isinstance(y, torch.Tensor):
            assert not (y.requires_grad or y.is_conj() or y.is_neg())
        assert (dtype_name(y.dtype) if isinstance(y, torch.Tensor) else y.dtype.name) == (
            x.view.dtype.name
        )
        self.add(y, x.view if shared else x.values())

    def refuses(self, call):
        """`call` is an error of the bridge's own."""
        try:
            call()
        except ValueError as error:
            assert "expected" in str(error) and "; " in str(error), error
        else:
            raise AssertionError("crossed with copy=False, though it can't be shared")

    @rule(i=which, j=which, copy=copies, of_torch=st.booleans())
    def cross_tree(self, i, j, copy, of_torch):
        """Two in one pytree, the first of them twice."""
        x, y = self.some(i, of_torch), self.some(j, of_torch)
        if x is None:
            return
        cross = bridge.to_jax if of_torch else bridge.to_torch
        tree = {"x": [x.array, (y.array,)], "again": x.array}
        lent = [can_be_lent(z.array) if of_torch else True for z in (x, y)]
        if copy is False and not all(lent):
            self.refuses(lambda: cross(tree, copy=False))
            return
        got = cross(tree, copy=copy)
        assert set(got) == set(tree) and isinstance(got["x"][1], tuple)
        shared = [copy is not True and z for z in lent]
        for z, out, same in (
            (x, got["x"][0], shared[0]),
            (y, got["x"][1][0], shared[1]),
            (x, got["again"], shared[0]),
        ):
            self.crossed(z, out, same)

    @rule(i=which, name=st.sampled_from(list(SLICES)))
    def slice(self, i, name):
        x = self.some(i, of_torch=True)
        if x is None or not x.view.ndim or min(x.view.shape[0], x.view.shape[-1]) < 2:
            return
        cut = SLICES[name]
        self.add(cut(x.array), cut(x.view), conj=x.conj, neg=x.neg)

    @rule(i=which, kind=st.sampled_from(["T", "move", "flat", "square", "expand", "unsqueeze"]))
    def view(self, i, kind):
        """Another view of a tensor's memory."""
        x = self.some(i, of_torch=True)
        if x is None:
            return
        t, v = x.array, x.view
        # a JAX array may lie in another order than the model's
        plain = t.is_contiguous() and v.flags.c_contiguous
        if kind == "T":
            axes = tuple(range(v.ndim))[::-1]
            t, v = t.permute(axes), v.transpose(axes)
        elif kind == "move" and v.ndim > 1:
            t, v = t.movedim(0, -1), np.moveaxis(v, 0, -1)
        elif kind == "flat" and plain:
            t, v = t.view(-1), v.reshape(-1)
        elif kind == "square" and plain and v.size % 4 == 0:
            t, v = t.view(4, -1) if v.size else t.view(4, 0), v.reshape(4, v.size // 4)
        elif kind == "expand" and v.ndim < 3:
            t, v = t.expand(2, *t.shape), np.broadcast_to(v, (2, *v.shape))
        elif kind == "unsqueeze" and v.ndim < 3:
            t, v = t.unsqueeze(0), v[None]
        assert not v.size or np.shares_memory(v, x.view)
        self.add(t, v, conj=x.conj, neg=x.neg)

    @rule(i=which, dtype=st.sampled_from(["uint8", "int16", "float32", "float8_e4m3fn", "int64"]))
    def other_dtype(self, i, dtype):
        """The same bytes as elements of another size."""
        x = self.some(i, of_torch=True)
        if x is None or not x.view.ndim or x.conj or x.neg or not x.view.size:
            return
        t, v, wanted = x.array, x.view, DTYPES[dtype]
        fits = v.shape[-1] * v.dtype.itemsize % wanted.itemsize == 0
        dense = t.stride() == torch.empty(t.shape, device="meta").stride()
        if v.dtype.kind == "b" or not (fits and v.flags.c_contiguous and dense):
            return
        if t.requires_grad or t.storage_offset() * t.itemsize % wanted.itemsize:
            return
        self.add(t.view(OF_TORCH[dtype]), v.view(wanted))

    @rule(i=which, kind=st.sampled_from(["conj", "imag", "requires_grad", "detach"]))
    def mark(self, i, kind):
        """What keeps a tensor from being lent, though its memory would do. The imaginary part of a
        conjugate is a view with torch's neg bit."""
        x = self.some(i, of_torch=True)
        if x is None:
            return
        if kind == "requires_grad":
            # Once one writes to a view of a view that requires grad, torch 2.13 fails at each use of
            # it with an INTERNAL ASSERT, without us too.
            leaf = x.array.is_leaf and not x.array._is_view()
            if leaf and x.view.dtype.name.startswith(GRAD):
                x.array.requires_grad_()
        elif kind == "detach":
            self.add(x.array.detach(), x.view, conj=x.conj, neg=x.neg)
        elif x.array.is_complex():
            if kind == "conj":
                self.add(x.array.conj(), x.view, conj=not x.conj)
            else:
                self.add(x.array.imag, x.view.imag, neg=x.conj)

    @rule(i=which, seed=seeds)
    def write(self, i, seed):
        """In place, in torch: all that shares the memory sees it, and nothing else."""
        x = self.some(i, of_torch=True)
        if x is None or not x.view.flags.writeable:  # an expanded one
            return
        new = raw(x.view.dtype.name, x.view.shape, seed)
        with torch.no_grad():
            x.array.copy_(as_tensor(new))
        x.view[...] = x.stored(new)

    @rule(i=which, name=st.sampled_from(list(OF_JAX)))
    def compute(self, i, name):
        """In JAX, from what the array holds now; the result has memory of its own."""
        x = self.some(i, of_torch=False)
        if x is None or (name == "rest" and not x.view.ndim):
            return
        f, wanted = OF_JAX[name]
        self.add(jax.block_until_ready(f(x.array)), np.array(wanted(x.view), order="C"))

    @rule(i=which, name=st.sampled_from(list(BRIDGED)))
    def call(self, i, name):
        """A bridged function that gives its input or a view of it: a result with memory of its
        own."""
        x = self.some(i)
        if x is None:
            return
        f = (IN_TORCH if x.of_torch else IN_JAX)[name]
        y = f(x.array)
        y = y.detach() if x.of_torch else y.block_until_ready()
        self.add(y, np.array(BRIDGED[name](x.values()), order="C"))

    @rule(i=which, donate=st.booleans())
    def delete(self, i, donate):
        """A JAX array ends; whoever shares its memory keeps it as it was."""
        x = self.some(i, of_torch=False)
        if x is None or self.twice(x.array):
            return
        self.pool.remove(x)
        if donate:
            self.add(donated(x.array).block_until_ready(), np.array(np.flip(x.view), order="C"))
        if not x.array.is_deleted():
            x.array.delete()
        self.deleted.append(x.array)

    def twice(self, array):
        return sum(x.array is array for x in self.pool) > 1

    @precondition(lambda self: self.deleted)
    @rule(copy=copies)
    def cross_deleted(self, copy):
        try:
            bridge.to_torch(self.deleted[-1], copy=copy)
        except ValueError as error:
            assert "deleted or donated" in str(error), error
        else:
            raise AssertionError("a deleted array crossed")

    @rule(i=which, collect=st.booleans())
    def drop(self, i, collect):
        """References go; memory that nobody holds is filled with something else."""
        x = self.some(i)
        if x is None:
            return
        self.pool.remove(x)
        shape, dtype = x.view.shape, x.view.dtype
        del x
        if collect:
            gc.collect(0)
        for n in (0xA5, 0x5A):
            filled = np.full(int(np.prod(shape)) * dtype.itemsize, n, np.uint8)
            torch.from_numpy(filled).clone(), jnp.array(filled)

    @invariant()
    def holds_what_it_must(self):
        for x in self.pool:
            got, want = read(x.array), x.values().tobytes()
            assert got == want, (x.array, x.values())

    @invariant()
    def shares_as_promised(self):
        """Memory is shared where the model's is, and nowhere else."""
        spans = [(addresses(x.array), x) for x in self.pool if x.view.size]
        for (a, x), (b, y) in itertools.combinations(spans, 2):
            overlap = a[0] < b[1] and b[0] < a[1]
            model = np.shares_memory(x.view, y.view)
            if overlap and not model:  # they may lie between one another
                overlap = bool(every_byte(x.array) & every_byte(y.array))
            assert overlap == model, (overlap, model, x.array, y.array)


def test_arrays(fuzz):
    fuzz(Arrays)
