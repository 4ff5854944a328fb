"""bridge.functional: weights as a JAX pytree, trained with optax as torch trains them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import bridge
from tests.cases import close
from torch_side.calls import compiling
from torch_side.calls.export import TorchFunction


class Net(torch.nn.Module):
    """A float buffer, an integer buffer, a frozen parameter: what must not be trained by
    accident."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(3, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)
        ).to(dtype)
        self.register_buffer("shift", torch.tensor(0.5, dtype=dtype))
        self.register_buffer("steps", torch.tensor(3))
        self.scale = torch.nn.Parameter(torch.tensor(2.0, dtype=dtype), requires_grad=False)

    def forward(self, x):
        return self.scale * self.layers(x)[..., 0] + self.shift


def data(n=64):
    x = np.random.default_rng(0).uniform(-1, 1, (n, 3))
    return x, np.sin(2 * x[:, 0]) + x[:, 1] * x[:, 2]


def test_params_have_the_names_of_the_state_dict_and_own_their_memory():
    net = Net()
    apply, params = bridge.functional(net)
    assert set(params) == {n for n, t in net.state_dict().items() if t.is_floating_point()}
    before = {n: np.asarray(p).copy() for n, p in params.items()}
    with torch.no_grad():
        for t in net.parameters():
            t.add_(1.0)
    assert all((np.asarray(p) == before[n]).all() for n, p in params.items())


def test_copy_false_shares_the_memory_of_the_module():
    net = Net()
    _, params = bridge.functional(net, copy=False)
    assert params["layers.0.weight"].unsafe_buffer_pointer() == net.layers[0].weight.data_ptr()


def test_apply_equals_the_module_and_leaves_it_alone(lane, maybe_jit):
    net = Net()
    apply, params = bridge.functional(net, lane=lane)
    x = data()[0]
    close(
        maybe_jit(apply)(params, jnp.asarray(x)), jnp.asarray(net(torch.tensor(x)).detach().numpy())
    )
    assert all(t.grad is None for t in net.parameters())


@pytest.mark.parametrize("gradients", ["trainable", "all"])
def test_gradients_equal_torch_and_follow_requires_grad(lane, gradients):
    net = Net()
    apply, params = bridge.functional(net, lane=lane, gradients=gradients)
    x, y = map(jnp.asarray, data())
    grads = jax.jit(jax.grad(lambda p: jnp.mean((apply(p, x) - y) ** 2)))(params)
    net.scale.requires_grad_(True)
    net.shift.requires_grad_(True)
    ((net(torch.tensor(np.asarray(x))) - torch.tensor(np.asarray(y))) ** 2).mean().backward()
    for name, t in (*net.named_parameters(), ("shift", net.shift)):
        frozen = gradients == "trainable" and name in ("scale", "shift")
        close(
            grads[name],
            jnp.zeros_like(params[name]) if frozen else jnp.asarray(t.grad.numpy()),
            rtol=1e-12,
        )


@pytest.mark.parametrize("lane", ["ffi", "host", "native"])
def test_training_with_optax_reaches_the_loss_that_torch_reaches(lane, monkeypatch):
    """Same seed, same data, same optimiser: 100 steps of Adam, to 1e-6 relative. On the native lane
    the weights are inputs of a package."""
    asked = []
    real = compiling.compiled
    counted = lambda fn, device: (asked.append(str(fn)), real(fn, device))[1]
    monkeypatch.setattr(TorchFunction, "compiled", staticmethod(counted))
    x, y = data()
    net = Net()
    apply, params = bridge.functional(net, lane=lane)
    xj, yj = jnp.asarray(x), jnp.asarray(y)
    optimiser = optax.adam(1e-2)
    traces = []

    @jax.jit
    def step(params, state):
        traces.append(1)
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((apply(p, xj) - yj) ** 2))(params)
        updates, state = optimiser.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    state, losses, of_each = optimiser.init(params), [], []
    for _ in range(100):
        params, state, loss = step(params, state)
        losses.append(float(loss))
        of_each.append(len(asked))

    adam = torch.optim.Adam([t for t in net.parameters() if t.requires_grad], lr=1e-2)
    reference = []
    for _ in range(100):
        adam.zero_grad()
        loss = ((net(torch.tensor(x)) - torch.tensor(y)) ** 2).mean()
        loss.backward()
        adam.step()
        reference.append(loss.item())
    np.testing.assert_allclose(losses, reference, rtol=1e-6)
    assert losses[-1] < 0.1 * losses[0]
    assert len(traces) == 1, "an update of the weights must not recompile"
    # JAX lowers once more in the second step, for arrays that are committed to a device
    assert len(set(asked)) == (2 if lane == "native" else 0) and of_each[1] == of_each[-1]
    assert float(params["shift"]) == 0.5 and float(params["scale"]) == 2.0


def test_second_order_through_the_weights(lane):
    net = Net()
    apply, params = bridge.functional(net, lane=lane)
    x = jnp.asarray(data(4)[0])
    hvp = jax.jit(
        lambda p: jax.jvp(
            jax.grad(lambda p: (apply(p, x) ** 2).sum()), (p,), (jax.tree.map(jnp.ones_like, p),)
        )[1]
    )(params)
    trainable = [n for n, t in net.named_parameters() if t.requires_grad]
    tensors = [dict(net.named_parameters())[n] for n in trainable]
    grads = torch.autograd.grad(
        (net(torch.tensor(np.asarray(x))) ** 2).sum(), tensors, create_graph=True
    )
    want = torch.autograd.grad(sum(g.sum() for g in grads), tensors)
    for n, w in zip(trainable, want):
        close(hvp[n], jnp.asarray(w.numpy()), rtol=1e-11)


def test_a_committee_is_one_vmap_over_stacked_weights(lane):
    net = Net()
    apply, params = bridge.functional(net, lane=lane)
    stacked = jax.tree.map(lambda p: jnp.stack([p, 2 * p, -p]), params)
    x = jnp.asarray(data(5)[0])
    many = jax.jit(jax.vmap(apply, (0, None)))(stacked, x)
    for i in range(3):
        close(many[i], apply(jax.tree.map(lambda p: p[i], stacked), x), rtol=1e-12)


def test_equal_modules_find_the_same_program(lane):
    net = Net()
    (a, params), (b, _) = bridge.functional(net, lane=lane), bridge.functional(net, lane=lane)
    x = jnp.asarray(data(4)[0])
    close(jax.jit(a)(params, x), jax.jit(b)(params, x))


def test_no_module_is_a_type_error():
    with pytest.raises(
        TypeError, match=r"expected a torch.nn.Module, got function; use bridge.to_jax"
    ):
        bridge.functional(torch.sin.__class__ and (lambda x: x))


def test_batched_names_the_modules_own_arguments(lane):
    apply, params = bridge.functional(Net(), lane=lane, batched={"x": 0})
    x = jnp.asarray(data(6)[0]).reshape(2, 3, 3)
    close(
        jax.jit(jax.vmap(apply, (None, 0)))(params, x),
        jnp.stack([apply(params, x[0]), apply(params, x[1])]),
        rtol=1e-12,
    )
