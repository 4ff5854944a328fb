"""bridge.to_torch and bridge.module from eight threads at once: right answers, one compilation, no
deadlock."""

import copy
import faulthandler
import sys
import threading

import jax
import jax.numpy as jnp
import pytest
import torch

import bridge
from tests.calls.test_torch_module import chain, draw, layer

N = 8
PARAMS = {"layers": [layer(3, 16, "tanh", 0), layer(16, 2, "none", 2)], "scale": jnp.float64(2)}
close = torch.testing.assert_close


@pytest.fixture(autouse=True)
def fast_switching():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


def together(work, seconds=60):
    """work(k) in thread k, all begun at once. An exception in one, or a thread that doesn't end, is
    a failure here."""
    barrier, failed = threading.Barrier(N), []

    def run(k):
        try:
            barrier.wait(seconds)
            work(k)
        except Exception as e:
            failed.append(e)

    threads = [threading.Thread(target=run, args=(k,), daemon=True) for k in range(N)]
    [t.start() for t in threads]
    [t.join(seconds) for t in threads]
    if any(t.is_alive() for t in threads):
        faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        pytest.fail("a thread hangs: the stacks are in stderr")
    if failed:
        raise failed[0]


def energy(params, x):
    return jnp.sum(chain(params, x) ** 2)


MODES = {"forward": energy, "scalar": energy, "vector": chain}


def inputs(k, same):
    return draw(2 if same else k + 1, 3, seed=k)


def tensors(module):
    return [t for t in jax.tree.leaves(module.pytree()) if isinstance(t, torch.Tensor)]


def want(f, x):
    """(values, gradients of their sum with respect to the parameters and the input), by JAX."""
    leaves, structure = jax.tree.flatten(PARAMS)
    arrays = [i for i, a in enumerate(leaves) if isinstance(a, jax.Array)]

    def g(values, x):
        filled = dict(zip(arrays, values))
        return f(structure.unflatten([filled.get(i, a) for i, a in enumerate(leaves)]), x)

    params, x_grad = jax.grad(lambda *args: jnp.sum(g(*args)), (0, 1))(
        [leaves[i] for i in arrays], x
    )
    return [bridge.to_torch(a) for a in (f(PARAMS, x), *params, x_grad)]


@pytest.mark.matrix
@pytest.mark.parametrize("same", [True, False], ids=["one shape", "a shape each"])
@pytest.mark.parametrize("mode", MODES)
def test_values_and_compilations_x_module(mode, same):
    """The first call of all threads, then more of them: as many compilations as one thread
    makes."""
    f = MODES[mode]
    module, alone = bridge.module(f, PARAMS), bridge.module(f, PARAMS)
    leaves = [bridge.to_torch(inputs(k, same), copy=True).requires_grad_() for k in range(N)]
    wanted = [want(f, inputs(k, same)) for k in range(N)]

    def check(k, module=module, calls=20):
        for _ in range(calls):
            with torch.set_grad_enabled(mode != "forward"):
                y = module(leaves[k])
            got = [
                y.detach(),
                *(
                    torch.autograd.grad(y.sum(), [*tensors(module), leaves[k]])
                    if y.requires_grad
                    else ()
                ),
            ]
            close(got, wanted[k][: len(got)], rtol=1e-12, atol=1e-12)

    together(check)
    for k in range(N):
        check(k, alone, 1)
    assert module.compilations == alone.compilations


@pytest.mark.parametrize("f", [energy, chain])
def test_gradients_x_shared_parameters(f):
    """loss.backward() in each thread: torch adds up what all of them give to one set of parameters,
    and to own inputs."""
    module, wanted = bridge.module(f, PARAMS), [want(f, inputs(k, False)) for k in range(N)]
    leaves = [bridge.to_torch(inputs(k, False), copy=True).requires_grad_() for k in range(N)]
    together(lambda k: [module(leaves[k]).sum().backward() for _ in range(10)])
    close(
        [t.grad for t in tensors(module)],
        [10 * sum(w[i + 1] for w in wanted) for i in range(len(tensors(module)))],
        rtol=1e-11,
        atol=1e-11,
    )
    close([x.grad for x in leaves], [10 * w[-1] for w in wanted], rtol=1e-11, atol=1e-11)


# not forward mode, whose levels torch keeps in globals: of pure torch code it fails in threads too
TRANSFORMS = {
    "grad": torch.func.grad,
    "hessian": lambda f: torch.func.jacrev(torch.func.grad(f)),
    "vmap": torch.vmap,
    "double_backward": lambda f: lambda x: torch.autograd.functional.hessian(f, x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_values_x_transform(transform):
    f = bridge.to_torch(lambda x: jnp.sum(jnp.sin(x) ** 3))
    call, twin = (TRANSFORMS[transform](g) for g in (f, lambda x: (torch.sin(x) ** 3).sum()))
    xs = [bridge.to_torch(inputs(k, False), copy=True) for k in range(N)]
    together(lambda k: [close(call(xs[k]), twin(xs[k]), rtol=1e-12, atol=1e-12) for _ in range(5)])


def test_training_x_copies():
    """A deep copy for each thread, trained at once: each as if alone, on programs compiled once."""
    module = bridge.module(energy, PARAMS)
    x = bridge.to_torch(inputs(1, True), copy=True)

    def train(m, rate):
        optimiser = torch.optim.SGD(m.parameters(), lr=rate)
        for _ in range(20):
            optimiser.zero_grad()
            m(x).backward()
            optimiser.step()
        return [p.detach().clone() for p in m.parameters()]

    copies, results = [copy.deepcopy(module) for _ in range(N)], {}
    together(lambda k: results.update({k: train(copies[k], 1e-4 * k)}))
    compiled, alone = module.compilations, bridge.module(energy, PARAMS)
    for k in range(N):
        close(results[k], train(copy.deepcopy(alone), 1e-4 * k), rtol=1e-12, atol=1e-12)
    assert compiled == alone.compilations
