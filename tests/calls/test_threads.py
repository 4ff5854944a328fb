"""Several threads at once: what torch and jax-tvm-ffi keep in globals of the process must not mix
them up."""

import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import pytest
import torch

import bridge
from torch_side.calls import inference

X = jnp.linspace(0.0, 1.0, 8)


@pytest.fixture
def fast_switching():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


TRANSFORMS = {
    "jvp": lambda f: lambda x: jax.jvp(f, (x,), (x,))[1],
    "hvp": lambda f: lambda x: jax.jvp(jax.grad(lambda x: f(x).sum()), (x,), (x,))[1],
    "hessian": lambda f: jax.hessian(lambda x: f(x).sum()),
    "grad": lambda f: jax.grad(lambda x: f(x).sum()),
}


@pytest.mark.matrix
@pytest.mark.timeout(120, method="thread")
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_in_threads(transform, lane, fast_switching):
    """torch keeps the levels of forward AD in globals: unguarded, 3 threads gave wrong tangents
    without a word."""
    f = bridge.to_jax(lambda x: torch.sin(x) * x**2, lane=lane)
    program = jax.jit(TRANSFORMS[transform](f))
    want = program(X)

    def work(_):
        return sum(not bool((program(X) == want).all()) for _ in range(150))

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(work, range(3))) == [0, 0, 0]


FIRST_COMPILATIONS = """
    import sys, threading
    import jax, jax.numpy as jnp, torch, bridge
    sys.setswitchinterval(1e-6)
    barrier, failed = threading.Barrier(4), []
    def first(k):
        barrier.wait()
        try:
            assert float(jax.jit(bridge.to_jax(lambda x: x * k))(jnp.ones(()))) == k
        except BaseException as e:
            failed.append(repr(e))
    threads = [threading.Thread(target=first, args=(k,)) for k in range(4)]
    [t.start() for t in threads], [t.join() for t in threads]
    print(failed or "all right")
"""


def test_first_compilations_in_threads():
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FIRST_COMPILATIONS)],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stdout.strip() == "all right", done.stdout + done.stderr[-1000:]


def test_shapes_found_in_two_threads_leave_torch_compile_on():
    """The thread that comes first leaves first: each restored what it had found, and torch.compile
    was off for the rest of the process."""
    torch._dynamo.reset()
    graphs, both, first_is_gone = [], threading.Barrier(2), threading.Event()

    def first():
        with inference.fake():
            both.wait(60)
        first_is_gone.set()

    def second():
        with inference.fake():
            both.wait(60)
            assert first_is_gone.wait(60)

    with ThreadPoolExecutor(2) as pool:
        came_first = pool.submit(first)
        while not (both.n_waiting or came_first.done()):
            time.sleep(0.001)
        for done in came_first, pool.submit(second):
            done.result()

    def backend(graph, _):
        graphs.append(graph)
        return graph

    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(3))
    assert len(graphs) == 1
