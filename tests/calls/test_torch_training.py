"""bridge.module in use: torch.optim against optax, frozen parts, torch.func, bigger models,
torch.compile."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch.func import functional_call, stack_module_state
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters

import bridge
from tests.calls.test_torch_module import draw, loss, make

close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    yield
    torch._dynamo.reset()


def reference(module, x, w=None):
    """The model "dict" in torch."""
    return torch.tanh(x @ (module.w if w is None else w) + module.b) * module.n


def gradients(module):
    return {n: p.grad for n, p in module.named_parameters()}


def regression(p, x):
    return (jnp.tanh(jnp.tanh(x @ p["w0"] + p["b0"]) @ p["w1"] + p["b1"]) @ p["w2"])[:, 0]


TRAINERS = {
    "adam": (lambda ps: torch.optim.Adam(ps, lr=1e-2), optax.adam(1e-2)),
    "momentum": (
        lambda ps: torch.optim.SGD(ps, lr=5e-2, momentum=0.9),
        optax.sgd(5e-2, momentum=0.9),
    ),
}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_losses_x_trainer(trainer):
    """The same start, data and hyperparameters: 200 steps through torch.optim and through optax
    agree."""
    params = {
        "w0": draw(3, 16) / 2,
        "b0": jnp.zeros(16),
        "w1": draw(16, 16, seed=1) / 4,
        "b1": jnp.zeros(16),
        "w2": draw(16, 1, seed=2) / 4,
    }
    x = draw(64, 3, seed=3)
    y = jnp.sin(2 * x[:, 0]) + x[:, 1] * x[:, 2]
    optimiser, tx = TRAINERS[trainer]
    module, xt, yt = bridge.module(regression, params), bridge.to_torch(x), bridge.to_torch(y)
    optimiser, state, got, want = optimiser(module.parameters()), tx.init(params), [], []

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(lambda p: jnp.mean((regression(p, x) - y) ** 2))(params)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    for _ in range(200):
        optimiser.zero_grad()
        value = ((module(xt) - yt) ** 2).mean()
        value.backward()
        optimiser.step()
        got.append(value.item())
        params, state, value = step(params, state)
        want.append(float(value))
    np.testing.assert_allclose(got, want, rtol=1e-4)
    assert got[-1] < 0.2 * got[0] and module.compilations == 2, (got[0], got[-1])


OPTIMISERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=1e-2),
    "adam_fused": lambda ps: torch.optim.Adam(ps, lr=1e-2, fused=True),
    "lbfgs": lambda ps: torch.optim.LBFGS(ps, lr=0.5),
}


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_loss_x_optimiser(optimiser):
    """Ten steps lower it, on the two programs that the first one compiled."""
    _, _, module, x = make("nested")
    optimiser = OPTIMISERS[optimiser](module.parameters())

    def closure():
        optimiser.zero_grad()
        value = loss(module, x)
        value.backward()
        return value

    values = [optimiser.step(closure).item() for _ in range(10)]
    assert values[-1] < 0.9 * values[0] and module.compilations == 2


def test_gradients_x_frozen():
    _, _, module, x = make("nested")
    module.requires_grad_(False)
    assert not module(x).requires_grad and module.compilations == 1
    module.get_parameter("layers.1.w").requires_grad_(True)
    loss(module, x).backward()
    assert [n for n, g in gradients(module).items() if g is not None] == ["layers.1.w"]


def test_gradients_x_utilities():
    _, _, module, x = make()
    loss(module, x).backward()
    assert clip_grad_norm_(module.parameters(), 0.5) > 0.5
    close(
        torch.stack([(g**2).sum() for g in gradients(module).values()]).sum().sqrt(),
        torch.tensor(0.5, dtype=torch.float64),
        rtol=1e-5,
    )
    vector = parameters_to_vector(module.parameters())
    vector_to_parameters(2 * vector, module.parameters())  # views, no longer on 64 bytes
    close(module(x), reference(module, x))
    close(parameters_to_vector(module.parameters()), 2 * vector)


def test_gradients_x_functional_call():
    _, _, module, x = make()
    w = bridge.to_torch(draw(3, 2, seed=5))
    close(functional_call(module, {"w": w}, (x,)), reference(module, x, w))
    got = torch.func.grad(lambda w: functional_call(module, {"w": w}, (x,)).sum())(w)
    close(got, torch.func.grad(lambda w: reference(module, x, w).sum())(w))
    hessian = torch.func.hessian(lambda w: functional_call(module, {"w": w}, (x,)).sum())(w)
    close(hessian, torch.func.hessian(lambda w: reference(module, x, w).sum())(w))
    assert all(g is None for g in gradients(module).values())


def test_ensemble_x_vmap():
    """Stacked parameters, one vmap, each member's own gradient."""
    modules = [make()[2] for _ in range(3)]
    x = make()[3]
    for k, m in enumerate(modules):
        m.w.data.mul_(k + 1)
    params, buffers = stack_module_state(modules)
    many = torch.vmap(lambda p, b, x: functional_call(modules[0], (p, b), (x,)), (0, 0, None))(
        params, buffers, x
    )
    many.sum().backward()
    for k, m in enumerate(modules):
        close(many[k], m(x))
        m(x).sum().backward()
        close({n: params[n].grad[k] for n in params}, gradients(m))


def bigger(module):
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(3, 3).double(), module, torch.nn.Tanh(), torch.nn.Linear(2, 1).double()
    )


def test_gradients_x_sequential():
    _, _, module, x = make()
    model, inner = bigger(module), bigger(make()[2])
    inner[1].forward = partial(reference, inner[1])
    for m in (model, inner):
        loss(m, x).backward()
    close(gradients(model), gradients(inner))
    assert {"1.w", "1.b", "1.n"} < set(model.state_dict())


def same_as_compiled(model, compiled, x):
    """Values and gradients."""
    close(compiled(x), model(x))
    found = []
    for f in (model, compiled):
        model.zero_grad()
        loss(f, x).backward()
        found.append(gradients(model))
    close(*found)


any_size = pytest.mark.parametrize("inside", [False, True], ids=["alone", "inside"])


@any_size
@pytest.mark.parametrize("name", ["dict", "nested", "equinox_apply"])
def test_gradients_x_compile(name, inside):
    """Also after a step of an optimiser."""
    _, _, module, x = make(name)
    model = bigger(module) if inside else module
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        same_as_compiled(model, compiled, x)
        torch.optim.SGD(model.parameters(), lr=0.1).step()


@any_size
def test_gradients_x_compile_x_shapes(inside):
    """torch.compile makes a size that changes a symbol; the bridge needs its value."""
    _, _, module, x = make()
    model = bigger(module) if inside else module
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for n in (4, 3, 2):
        same_as_compiled(model, compiled, x[:n])


def test_values_x_compile_x_modules():
    """Modules share the code of forward, not what was compiled of it."""
    for n in (3, 2, 5):
        module = bridge.module(lambda p, x: x @ p["w"], {"w": draw(n, 2)})
        x = torch.ones(4, n, dtype=torch.float64)
        close(torch.compile(module, fullgraph=True, backend="aot_eager")(x), module(x))
