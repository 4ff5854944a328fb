"""bridge.to_torch and bridge.module: changes between forward and backward, second backwards, calls
without a graph."""

import jax.numpy as jnp
import pytest
import torch

import bridge
from tests.calls.test_torch_memory import build, saving, tensor
from tests.calls.test_torch_module import dense, make


def change_parameter():
    _, _, module, x = make()
    y, module.w.grad = module(x), torch.ones_like(module.w)
    torch.optim.SGD([module.w], lr=0.1).step()
    return y, module(x), torch.tanh(x @ module.w + module.b) * module.n, module.w


def change(f, twin, view=lambda x: x, output=False):
    """Of what `f` read, or of what it gave: (output before, output after, what torch says, the
    leaf)."""
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
    torch.testing.assert_close(
        *(torch.autograd.grad(y.sum(), leaf, retain_graph=True)[0] for y in (fresh, want))
    )


def test_gradients_x_second_backward():
    for f in (build("sin_sum")[0], torch.sin):
        x = tensor(5)
        y = f(x).sum()
        y.backward(retain_graph=True), y.backward()
        torch.testing.assert_close(x.grad, 2 * torch.cos(x))
        with pytest.raises(
            RuntimeError, match="Trying to backward through the graph a second time"
        ):
            y.backward()


NO_GRAPH = {
    "no_grad": lambda m, x: torch.no_grad()(m)(x.requires_grad_()),
    "inference_mode": lambda m, x: torch.inference_mode()(m)(x),
    "inference_tensor": lambda m, x: m.requires_grad_(False)(torch.inference_mode()(x.clone)()),
    "frozen": lambda m, x: m.requires_grad_(False)(x),
    "detached": lambda m, x: bridge.to_torch(dense)(
        {k: v.detach() for k, v in m.state_dict().items()}, x
    ),
    "integer output": lambda m, x: bridge.to_torch(jnp.argmax)(x.requires_grad_()),
}


@pytest.mark.parametrize("how", NO_GRAPH)
def test_residuals_x_no_graph(how):
    """Nothing is saved, and only the plain program is compiled."""
    _, _, module, x = make()
    out, saved = saving(lambda: NO_GRAPH[how](module, x))
    assert not saved and not out.requires_grad and module.compilations <= 1
