"""bridge.to_torch and bridge.module: what is shared, what is copied, what a backward keeps, and how torch guards it."""

import jax
import jax.numpy as jnp
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import bridge
from jax_side import programs
from tests.test_torch_module import dense, draw, make


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
def spied(monkeypatch):
    """Addresses of what enters and what leaves compiled programs."""
    entered, left, borrow, lend = set(), set(), programs.borrow, programs.lend

    def noting(addresses, arrays):
        addresses.update(a.unsafe_buffer_pointer() for a in arrays)
        return arrays

    monkeypatch.setattr(programs, "borrow", lambda lent: noting(entered, borrow(lent)))
    monkeypatch.setattr(programs, "lend", lambda arrays: lend(noting(left, arrays)))
    return entered, left


# Zero copies


@any_function
def test_addresses_x_forward(name, spied):
    f, inputs, _ = build(name)
    with torch.no_grad():
        out = leaves(f(*inputs))
    assert spied == (pointers(inputs), pointers(out)) and not pointers(inputs) & pointers(out)


@any_function
def test_addresses_x_backward(name, spied):
    """Inputs, residuals and cotangents are read where they lie; outputs and gradients are the programs' own buffers."""
    f, inputs, kept = build(name)
    out, saved = saving(lambda: leaves(f(*inputs)))
    assert spied[0] == pointers(inputs) and spied[1] == pointers(out) | (pointers(saved) - pointers(inputs))
    cotangents = [torch.ones_like(o) for o in out]
    spied[0].clear(), spied[1].clear()
    gradients = torch.autograd.grad(out, inputs, cotangents)
    assert spied[0] == pointers(saved) | pointers(cotangents) and spied[1] == pointers(gradients)


@any_function
def test_residuals_x_function(name):
    """An input or output that the backward needs is saved as itself; then at most one array of the input's size remains."""
    f, inputs, kept = build(name)
    out, saved = saving(lambda: leaves(f(*inputs)))
    own = [t.nbytes for t in saved if t.data_ptr() not in pointers(inputs) | pointers(out)]
    assert sum(own) <= kept * max(t.nbytes for t in (*inputs, *out)) + 8  # 8: a constant


LAYOUTS = {  # a view of 24 float64, and whether it is copied
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
    "empty": (lambda x: x[:0], False),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_addresses_x_layout(layout, spied):
    view, copied = LAYOUTS[layout]
    x = tensor(24)
    y, f = view(x), bridge.to_torch(lambda y: (jnp.sin(y) * y.conj()).real)
    out = f(y)
    assert (y.data_ptr() not in spied[0]) is copied
    torch.testing.assert_close(out, want := (torch.sin(y) * y.conj()).real, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(*(torch.autograd.grad(o.sum(), x, retain_graph=True)[0] for o in (out, want)), rtol=1e-13, atol=1e-13)


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
    assert all(map(torch.equal, (*before, *after), (*inputs, *out))) and all((c == 1).all() for c in cotangents)


# Changes between forward and backward


def change_parameter():
    _, _, module, x = make()
    y, module.w.grad = module(x), torch.ones_like(module.w)
    torch.optim.SGD([module.w], lr=0.1).step()
    return y, module(x), torch.tanh(x @ module.w + module.b) * module.n, module.w


def change(f, twin, view=lambda x: x, output=False):
    """Of what `f` read, or of what it gave: (output before, output after, what torch says, the leaf)."""
    x = tensor(16)
    h = x * 1
    y = f(view(h))
    (y if output else h).mul_(2)
    return y, f(view(h)), twin(view(h)), x


EXP, SIN = bridge.to_torch(jnp.exp), bridge.to_torch(jnp.sin)
CHANGES = {
    "parameter": change_parameter,
    "input": lambda: change(SIN, torch.sin),
    "base of the input": lambda: change(SIN, torch.sin, lambda h: h[:8]),
    "base of a copied input": lambda: change(SIN, torch.sin, lambda h: h[1:5]),
    "output": lambda: change(EXP, torch.exp, output=True),
}


@pytest.mark.parametrize("what", CHANGES)
def test_gradients_x_change_in_place(what):
    """A stale backward is torch's own error; the next forward sees the change."""
    stale, fresh, want, leaf = CHANGES[what]()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.sum().backward(retain_graph=True)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), leaf, retain_graph=True)[0] for y in (fresh, want)))


def test_gradients_x_second_backward():
    for f in (build("sin_sum")[0], torch.sin):
        x = tensor(5)
        y = f(x).sum()
        y.backward(retain_graph=True), y.backward()
        torch.testing.assert_close(x.grad, 2 * torch.cos(x))
        with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
            y.backward()


# Without a graph


NO_GRAPH = {
    "no_grad": lambda m, x: torch.no_grad()(m)(x.requires_grad_()),
    "inference_mode": lambda m, x: torch.inference_mode()(m)(x),
    "inference_tensor": lambda m, x: m.requires_grad_(False)(torch.inference_mode()(x.clone)()),
    "frozen": lambda m, x: m.requires_grad_(False)(x),
    "detached": lambda m, x: bridge.to_torch(dense)({k: v.detach() for k, v in m.state_dict().items()}, x),
    "integer output": lambda m, x: bridge.to_torch(jnp.argmax)(x.requires_grad_()),
}


@pytest.mark.parametrize("how", NO_GRAPH)
def test_residuals_x_no_graph(how):
    """Nothing is saved, and only the plain program is compiled."""
    _, _, module, x = make()
    out, saved = saving(lambda: NO_GRAPH[how](module, x))
    assert not saved and not out.requires_grad and module.compilations <= 1
