"""The native lane: no Python in a step, weights that are never silently stale, threads and devices,
and what is refused."""

import gc
import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import bridge

X = jnp.linspace(-1.0, 1.0, 6).reshape(2, 3)


class Net(torch.nn.Module):
    """One layer, and how often Python called it."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.layer = torch.nn.Linear(3, 2).double()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return torch.tanh(self.layer(x)).sum()


def native(f, **options):
    return bridge.to_jax(f, lane="native", **options)


def test_no_python_in_a_step():
    net = Net()
    run = jax.jit(
        lambda x: jax.lax.fori_loop(0, 5, lambda _, x: x - 0.1 * jax.grad(native(net))(x), x)
    )
    run = run.lower(X).compile()
    before = net.calls
    found = run(X)
    assert net.calls == before
    want = X
    for _ in range(5):
        want = want - 0.1 * jax.grad(bridge.to_jax(net))(want)
    np.testing.assert_allclose(found, want, rtol=1e-12)


def test_inputs_are_not_written():
    x = X + 0.0
    kept = np.array(x)
    jax.block_until_ready(jax.jit(native(Net()))(x))
    assert np.array_equal(x, kept)


def test_threads_x_one_package():
    run, wrong = jax.jit(native(Net())), []
    want = [float(bridge.to_jax(Net())(k * X)) for k in range(4)]
    run(X)

    def work(k):
        for _ in range(50):
            if abs(float(run(k * X)) - want[k]) > 1e-12:
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_two_devices_under_shard_map():
    f = native(Net())
    mesh = Mesh(np.array(jax.devices("cpu")[:2]), "b")
    each = jax.shard_map(
        lambda xs: jax.lax.map(f, xs), mesh=mesh, in_specs=P("b"), out_specs=P("b")
    )
    xs = jnp.stack([k * X for k in range(4)])
    want = [float(bridge.to_jax(Net())(x)) for x in xs]
    np.testing.assert_allclose(jax.jit(each)(xs), want, rtol=1e-12)


def in_place(net):
    with torch.no_grad():
        net.layer.weight.mul_(2.0)


def by_data(net):
    net.layer.weight.data = 2.0 * net.layer.weight.data


def replaced(net):
    net.layer.weight = torch.nn.Parameter(2.0 * net.layer.weight.detach())


def by_optimizer(net):
    net.layer.weight.grad = torch.ones_like(net.layer.weight)
    torch.optim.SGD(net.parameters(), lr=0.1).step()


CHANGES = [in_place, by_data, replaced, by_optimizer]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_changed_weights_x_refused_and_seen_anew(change):
    """The values that are compiled anew are left to in_place and by_data: of one package."""
    net = Net()
    run = jax.jit(native(net))
    run(X)
    change(net)
    with pytest.raises(Exception, match=r"expected the weights .* some that have changed since"):
        jax.block_until_ready(run(X))
    if change is not by_optimizer:  # the others double the same weight
        found = jax.jit(native(net))(X)
        assert abs(float(found) - float(bridge.to_jax(net)(X))) < 1e-12


def test_equal_weights_x_each_module_has_its_own_changes():
    one, other = Net(), Net()
    of_one, of_other = jax.jit(native(one)), jax.jit(native(other))
    want = float(of_one(X))
    assert float(of_other(X)) == want
    in_place(one)
    assert float(of_other(X)) == want
    with pytest.raises(Exception, match="changed since"):
        jax.block_until_ready(of_one(X))


def test_a_module_that_is_dropped_is_freed():
    net = Net()
    gone = weakref.ref(net)
    run = jax.jit(native(net))
    run(X)
    del net, run
    jax.clear_caches()
    gc.collect()
    native(torch.sin)  # what is gone is forgotten at the next use
    assert gone() is None


# What is refused: seen as it is traced, before anything is compiled.


def branch(x):
    return x.sum() if x.sum() > 0 else -x.sum()


def by_numpy(x):
    return torch.from_numpy(np.sin(x.detach().numpy())).sum()


def sized(x):
    return torch.zeros(int(x.sum())).sum() + x.sum()


HOLDER = torch.ones(3, dtype=torch.float64)


def changing(x):
    HOLDER.add_(1.0)
    return (x * HOLDER).sum()


def writing(x):
    x.add_(1.0)
    return x.sum()


@torch.library.custom_op("tests_native::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


@twice.register_fake
def _(x):
    return torch.empty_like(x)


JAX_INSIDE = bridge.to_torch(lambda x: (x**2).sum())
SCALAR = lambda x: jax.ShapeDtypeStruct((), x.dtype)
REFUSED = {
    "a branch": (branch, NotImplementedError, r"don't depend on values.*x\.sum\(\) > 0"),
    "NumPy": (by_numpy, NotImplementedError, r"don't depend on values.*numpy"),
    "a size": (sized, NotImplementedError, r"don't depend on values.*torch\.zeros"),
    "a Python operator": (twice, NotImplementedError, r"tests_native.*take lane=\"ffi\""),
    "JAX inside": (JAX_INSIDE, NotImplementedError, r"bridge.*take lane=\"ffi\""),
    "a held tensor changed": (changing, ValueError, "tensors that it holds as they are"),
    "an input changed": (writing, ValueError, "leave its inputs as they are"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_compiled_is_refused(name):
    f, kind, text = REFUSED[name]
    outputs = (lambda x: x) if f is twice else SCALAR
    with pytest.raises(kind, match=text):
        jax.jit(native(f, outputs=outputs)).lower(X)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


def test_second_derivatives_that_are_cut_off_are_refused():
    f = native(lambda x: Once.apply(x).sum(), outputs=SCALAR, derivatives="autograd")
    f_sequential = native(
        lambda x: Once.apply(x).sum(), outputs=SCALAR, derivatives="autograd", batched="sequential"
    )
    for g in (f, f_sequential):
        hvp = lambda x: jax.jvp(jax.grad(g), (x,), (x,))[1]
        with pytest.raises(NotImplementedError, match="Once that can be differentiated again"):
            jax.jit(hvp).lower(X)


@pytest.mark.parametrize("cut", ["detach", "no_grad"])
def test_an_energy_that_leaves_autograd_is_refused(cut):
    def energy(inputs):
        pos = inputs["pos"].detach() if cut == "detach" else inputs["pos"]
        with torch.set_grad_enabled(cut != "no_grad"):
            return (pos**2).sum()[None]

    bound = bridge.potential(
        energy, atomic_numbers=np.ones(2, int), gradients="autograd", lane="native"
    )
    with pytest.raises(NotImplementedError, match="energy that torch can differentiate in pos"):
        jax.jit(jax.grad(bound)).lower(X)


def test_a_platform_without_the_lane_is_refused():
    exporter = jax.export.export(jax.jit(native(Net())), platforms=["tpu"])
    with pytest.raises(NotImplementedError, match="for lane='native'"):
        exporter(X)


@pytest.mark.full
def test_memory_x_many_calls():
    import psutil

    run = jax.jit(lambda x, n: jax.lax.fori_loop(0, n, lambda _, x: x + 0 * native(Net())(x), x))
    jax.block_until_ready(run(X, 10_000))
    before = psutil.Process().memory_info().rss
    jax.block_until_ready(run(X, 100_000))
    assert psutil.Process().memory_info().rss - before < 2e6
