"""bridge.to_torch and bridge.module: what is shared, what is copied, what a backward keeps."""

import jax
import jax.numpy as jnp
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import bridge
from jax_side.calls import programs
from tests.calls.test_torch_module import draw


def tensor(*shape, seed=0, grad=True):
    return bridge.to_torch(draw(*shape, seed=seed), copy=True).requires_grad_(grad)


FUNCTIONS = {  # function, shapes, how many arrays the forward keeps beside inputs and outputs
    "sin_sum": (lambda x: jnp.sin(x).sum(), [(64,)], 1),
    "exp": (jnp.exp, [(64,)], 0),
    "matmul": (lambda x, w: x @ w, [(8, 4), (4, 2)], 0),
    "tanh_matmul": (lambda x, w: jnp.tanh(x @ w), [(8, 4), (4, 2)], 1),
    "two_outputs": (lambda x: {"a": jnp.exp(x), "b": x * 2}, [(16,)], 0),
    "identity": (lambda x: x, [(16,)], 0),
    "donated": (jax.jit(lambda x: jnp.exp(x), donate_argnums=0), [(16,)], 0),
    "scalar": (lambda x: x**3, [()], 1),
}
any_function = pytest.mark.parametrize("name", FUNCTIONS)


def build(name, seed=0):
    f, shapes, kept = FUNCTIONS[name]
    return bridge.to_torch(f), [tensor(*s, seed=seed + i) for i, s in enumerate(shapes)], kept


def leaves(outs):
    return jax.tree.leaves(outs)


def saving(call):
    """(result, the tensors that it saved for a backward)."""
    saved = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        return call(), saved


def pointers(tensors):
    return {t.data_ptr() for t in tensors}


@pytest.fixture
def given(monkeypatch):
    """Addresses of what compiled programs give."""
    left, lend = set(), programs.lend

    def noting(arrays):
        left.update(a.unsafe_buffer_pointer() for a in arrays)
        return lend(arrays)

    monkeypatch.setattr(programs, "lend", noting)
    return left


class Reader:
    """`reader(x)` is x inside a JAX function; the addresses that XLA reads it from are in
    `read`."""

    def __init__(self):
        self.read = set()
        self._call = bridge.to_jax(
            lambda x: self.read.add(x.data_ptr()) or x.clone(), outputs=lambda x: x, lane="ffi"
        )

    def __call__(self, x):
        return self._call(x)


def watched(seen):
    """exp(x) w with residuals of all kinds: an input, an output, an array of its own."""

    @jax.custom_vjp
    def f(x, w):
        return jnp.exp(seen(x)), seen(w).sum()

    def forward(x, w):
        y = jnp.exp(seen(x))
        return (y, seen(w).sum()), (w, y, jnp.sin(x))

    def backward(kept, cotangents):
        w, y, sin = map(seen, kept)
        return cotangents[0] * y + sin, w * seen(cotangents[1])

    f.defvjp(forward, backward)
    return bridge.to_torch(f)


# Zero copies


def test_addresses_x_pair(given):
    """Inputs, residuals and cotangents are read where they lie; outputs, residuals and gradients
    are the programs' own buffers."""
    seen = Reader()
    f, inputs = watched(seen), [tensor(64), tensor(16)]
    with torch.no_grad():
        out = f(*inputs)
    assert (seen.read, given) == (pointers(inputs), pointers(out))
    given.clear(), seen.read.clear()
    out, saved = saving(lambda: f(*inputs))
    own = pointers(saved) - pointers((*inputs, *out))
    assert (seen.read, given) == (pointers(inputs), pointers(out) | own) and len(own) == 1
    given.clear(), seen.read.clear()
    cotangents = [torch.ones_like(o) for o in out]
    gradients = torch.autograd.grad(out, inputs, cotangents)
    assert seen.read == own | pointers([inputs[1], out[0], cotangents[1]]) and given == pointers(
        gradients
    )


@any_function
def test_addresses_x_result(name, given):
    """No output or gradient is the memory of another tensor."""
    f, inputs, _ = build(name)
    out = leaves(f(*inputs))
    cotangents = [torch.ones_like(o) for o in out]
    gradients = torch.autograd.grad(out, inputs, cotangents)
    held = [t.data_ptr() for t in (*inputs, *out, *cotangents, *gradients)]
    assert len(set(held)) == len(held) and pointers(out) <= given


@any_function
def test_residuals_x_function(name):
    """An input or output that the backward needs is saved as itself; then at most one array of the
    input's size remains."""
    f, inputs, kept = build(name)
    out, saved = saving(lambda: leaves(f(*inputs)))
    own = [t.nbytes for t in saved if t.data_ptr() not in pointers(inputs) | pointers(out)]
    assert sum(own) <= kept * max(t.nbytes for t in (*inputs, *out)) + 8  # 8: a constant


LAYOUTS = {  # a view of 24 float64, and whether it is copied (or there is nothing to read)
    "row-major": (lambda x: x.view(4, 6), False),
    "flat": (lambda x: x, False),
    "offset of 64 bytes": (lambda x: x[8:], False),
    "offset of 8 bytes": (lambda x: x[1:], True),
    "transposed": (lambda x: x.view(4, 6).T, True),
    "columns": (lambda x: x.view(4, 6)[:, :3], True),
    "reversed axes": (lambda x: x.view(2, 3, 4).permute(2, 1, 0), True),
    "one column": (lambda x: x.view(24, 1).T, False),
    "expanded": (lambda x: x[:1].expand(5), True),
    "overlapping": (lambda x: x.as_strided((5, 4), (1, 1)), True),
    "conj": (lambda x: torch.view_as_complex(x.view(12, 2)).conj(), True),
    "neg": (lambda x: torch.view_as_complex(x.view(12, 2)).conj().imag, True),
    "empty": (lambda x: x[:0], True),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_addresses_x_layout(layout):
    view, copied = LAYOUTS[layout]
    x, seen = tensor(24), Reader()
    y, f = view(x), bridge.to_torch(lambda y: (jnp.sin(y) * y.conj()).real)
    with torch.no_grad():
        bridge.to_torch(seen)(y)
    # complex: what XLA hands to a custom call is repacked
    assert (y.data_ptr() not in seen.read) is (copied or y.is_complex())
    out, want = f(y), (torch.sin(y) * y.conj()).real
    torch.testing.assert_close(out, want, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(
        *(torch.autograd.grad(o.sum(), x, retain_graph=True)[0] for o in (out, want)),
        rtol=1e-13,
        atol=1e-13,
    )


@any_function
def test_inputs_x_call(name):
    """Neither values nor version counters of what the caller holds change."""
    f, inputs, _ = build(name)
    before = [t.detach().clone() for t in inputs]
    out = leaves(f(*inputs))
    after = [t.detach().clone() for t in out]
    cotangents = [torch.ones_like(o) for o in out]
    torch.autograd.grad(out, inputs, cotangents, retain_graph=True)
    torch.func.vjp(f, *(t.detach() for t in inputs))
    assert all(t._version == 0 for t in (*inputs, *out, *cotangents))
    assert all(map(torch.equal, (*before, *after), (*inputs, *out))) and all(
        (c == 1).all() for c in cotangents
    )
