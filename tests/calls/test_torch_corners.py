"""bridge.to_torch where torch or JAX is unusual: dropped outputs, loss scaling, odd residuals,
hooks, modes, batched gradients."""

import jax
import jax.numpy as jnp
import pytest
import torch
from torch._vmap_internals import _vmap  # what torch.autograd batches by
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import bridge
from tests.calls.test_torch_memory import tensor
from tests.calls.test_torch_module import make

close = torch.testing.assert_close
grad = torch.autograd.grad


def sines(x):
    return jnp.sin(x) ** 2


def twin(x):
    return torch.sin(x) ** 2


WAYS = {
    "backward": lambda f, x: grad(f(x), x)[0],
    "create_graph": lambda f, x: grad(f(x), x, create_graph=True)[0].detach(),
    "func": lambda f, x: torch.func.grad(f)(x),
    "compile": lambda f, x: (
        torch._dynamo.reset(),
        grad(torch.compile(f, fullgraph=True, backend="aot_eager")(x), x)[0],
    )[1],
}


@pytest.mark.parametrize("way", WAYS)
def test_gradients_x_dropped_output(way):
    """An output that nobody uses has no part in the gradient, also where its derivative is infinite
    (0 * inf)."""
    f = bridge.to_torch(lambda x: {"root": jnp.sqrt(x), "sum": x.sum()})
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    assert WAYS[way](lambda x: f(x)["sum"] * 1, x).tolist() == [1, 1, 1]


@jax.custom_vjp
def clipped(x):
    return x


clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -1, 1),))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("total", [jnp.sum, lambda y: y], ids=["scalar", "vector"])
def test_gradients_x_rule_that_is_not_linear(total, way):
    """A custom_vjp that clips gradients sees the whole cotangent, as in JAX."""
    f, x = bridge.to_torch(lambda x: total(clipped(x))), tensor(3)
    assert WAYS[way](lambda x: f(x).sum() * 10, x).tolist() == [1, 1, 1]


LOSSES = {  # of a float16 x: a float32 loss, a float16 one
    "float32": (
        lambda x: (x.astype("float32") ** 2).sum() * 1e-8,
        lambda x: (x.float() ** 2).sum() * 1e-8,
        2.0**16,
    ),
    "float16": (
        lambda x: ((x * jnp.float16(1e-3)) * jnp.float16(1e-4)).sum(),
        lambda x: ((x * 1e-3) * 1e-4).sum(),
        2.0**14,
    ),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_gradients_x_loss_scaling(kind):
    """What torch.amp.GradScaler does: the scale goes through the backward, so that float16 neither
    under- nor overflows."""
    f, want, scale = LOSSES[kind]
    x = torch.full((3,), 0.5, dtype=torch.float16, requires_grad=True)
    close(*(grad(g(x) * scale, x)[0] for g in (bridge.to_torch(f), want)), rtol=1e-2, atol=0)


def with_key(x):
    key = jax.random.fold_in(jax.random.key(0), 3)
    return jax.checkpoint(lambda x, k: jnp.sin(x * jax.random.normal(k, x.shape)))(x, key)


def with_int4(x):
    return jax.checkpoint(lambda x, n: jnp.sin(x * n.astype(x.dtype)))(
        x, jnp.argmax(x).astype("int4")
    )


@pytest.mark.parametrize("f", [with_key, with_int4])
def test_gradients_x_residual_of_a_foreign_dtype(f):
    x = tensor(4)
    want = jax.grad(lambda x: f(x).sum())(bridge.to_jax(x.detach()))
    close(grad(bridge.to_torch(f)(x).sum(), x)[0], bridge.to_torch(want))


def test_errors_x_output_of_a_foreign_dtype():
    with pytest.raises(TypeError, match="got key<fry>"):
        bridge.to_torch(lambda x: jax.random.key(0))(tensor(3))


BATCHED = {
    "is_grads_batched": lambda f, x: grad(
        f(x), x, torch.eye(4, dtype=x.dtype), is_grads_batched=True
    )[0],
    "create_graph": lambda f, x: grad(
        f(x), x, torch.eye(4, dtype=x.dtype), is_grads_batched=True, create_graph=True
    )[0].detach(),
    "jacobian": lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True),
    "jacobian_forward": lambda f, x: torch.autograd.functional.jacobian(
        f, x, vectorize=True, strategy="forward-mode"
    ),
    "hessian": lambda f, x: torch.autograd.functional.hessian(
        lambda x: f(x).sum(), x, vectorize=True
    ),
    "jacobian of jacobian": lambda f, x: torch.autograd.functional.jacobian(
        lambda x: torch.autograd.functional.jacobian(f, x, vectorize=True, create_graph=True),
        x,
        vectorize=True,
    ),
    "batch of batches": lambda f, x: _vmap(
        lambda c: grad(f(x), x, c * torch.eye(4, dtype=x.dtype), is_grads_batched=True)[0]
    )(torch.arange(1, 4, dtype=x.dtype)),
    "batch outside of a batch": lambda f, x: _vmap(
        lambda c: _vmap(lambda n: n * grad(f(x), x, c.expand(4))[0])(torch.arange(1, 3))
    )(torch.arange(1, 4, dtype=x.dtype)),
}


@pytest.mark.parametrize("how", BATCHED)
def test_gradients_x_batched_cotangents(how):
    """torch.autograd batches these by the predecessor of torch.func.vmap."""
    x = tensor(4)
    close(BATCHED[how](bridge.to_torch(sines), x), BATCHED[how](twin, x))


HOOKS = {
    "numpy": saved_tensors_hooks(lambda t: t.detach().numpy().copy(), torch.from_numpy),
    "rounded": saved_tensors_hooks(lambda t: t.float(), lambda t: t.double()),
    "strided": saved_tensors_hooks(lambda t: t, lambda t: torch.stack([t, t], -1)[..., 0]),
    "cpu": save_on_cpu(),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_gradients_x_saved_tensor_hooks(hook):
    x = tensor(4)
    with HOOKS[hook]:
        y = bridge.to_torch(sines)(x)
    close(grad(y.sum(), x)[0], grad(twin(x).sum(), x)[0], rtol=1e-5, atol=1e-5)


def flops(f, x):
    with FlopCounterMode(display=False):
        return f(x)


def on_meta(f, x):
    with torch.device("meta"):
        return f(x)


def anomaly(f, x):
    with torch.autograd.detect_anomaly():
        return f(x)


MODES = {
    "flop_counter": flops,
    "default_device": on_meta,
    "autocast": lambda f, x: torch.autocast("cpu", torch.bfloat16)(f)(x),
    "anomaly": anomaly,
    "checkpoint": lambda f, x: checkpoint(f, x, use_reentrant=False),
    "reentrant": lambda f, x: checkpoint(f, x, use_reentrant=True),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("mode", MODES)
def test_gradients_x_mode(mode):
    f, x = bridge.to_torch(sines), tensor(4)
    MODES[mode](f, x).sum().backward()
    close(x.grad, grad(twin(x).sum(), x)[0])


def test_tensors_x_resize():
    """A call leaves no mark on its inputs: FSDP frees parameters by a resize of their storage."""
    x = torch.rand(4)
    bridge.to_torch(sines)(x)
    assert x.resize_(100).shape == (100,)


FORCES = {
    "autograd": lambda m, x: grad(m(x).sum(), x, create_graph=True)[0],
    "func": lambda m, x: torch.func.grad(lambda x: m(x).sum())(x),
    "vmap": lambda m, x: torch.vmap(torch.func.grad(lambda x: m(x).sum()))(x),
    "jvp": lambda m, x: torch.func.jvp(m, (x,), (torch.ones_like(x),))[1],
}


@pytest.mark.parametrize("how", FORCES)
def test_gradients_of_parameters_x_forces(how):
    """A loss of derivatives trains the parameters."""
    _, _, module, x = make()
    model = torch.nn.Module()
    model.w, model.b = (torch.nn.Parameter(p.detach().clone()) for p in (module.w, module.b))
    for f in (module, lambda x: torch.tanh(x @ model.w + model.b) * 3):
        (FORCES[how](f, x.clone().requires_grad_()) ** 2).sum().backward()
    close([module.w.grad, module.b.grad], [model.w.grad, model.b.grad], rtol=1e-12, atol=1e-12)


SPARSE = pytest.raises(TypeError, match="layout torch.sparse_coo; pass tensor.to_dense")


def test_errors_x_sparse():
    f, x = bridge.to_torch(jnp.exp), tensor(3)
    with SPARSE:
        f(x.detach().to_sparse())
    with SPARSE:
        grad(f(x), x, torch.ones(3, dtype=torch.float64).to_sparse())
