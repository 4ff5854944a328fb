"""Processes beside one in which programs run: started by spawn and by forkserver, forked, and by
subprocess in the middle of a call."""

import subprocess
import sys

import pytest

WORKERS = """
import multiprocessing, sys, threading, time
import jax, jax.numpy as jnp, numpy as np, torch, bridge

def sine(x):
    return jnp.sin(x)

def doubled(x):
    time.sleep(0.01)
    return 2 * x

def into_torch(function, k):
    "A JAX function in torch, which came by pickle, with its gradient."
    x = torch.full((3,), float(k), requires_grad=True)
    (slope,) = torch.autograd.grad(function(x).sum(), x)
    return function(x).detach().numpy(), slope.numpy()

def into_jax(lane, k):
    "A torch function in JAX, made in the worker."
    f = bridge.to_jax(doubled, lane=lane, outputs=lambda x: x)
    return np.asarray(jax.jit(f)(jnp.full(3, float(k))))

def failing(k):
    def broken(x):
        raise KeyError(f"in worker {k}")
    with bridge.raising():
        jax.jit(bridge.to_jax(broken, outputs=lambda x: x))(jnp.ones(3))

if __name__ == "__main__":
    how, lane = sys.argv[1:]
    # a program runs all the while
    f = bridge.to_jax(doubled, lane=lane, outputs=lambda x: x)
    program = jax.jit(lambda x: jax.lax.scan(lambda c, _: (f(c @ c * 0 + c) / 2, None), x, None, length=600)[0])
    running = threading.Thread(target=lambda: results.append(program(jnp.ones((100, 100)))))
    results = []
    running.start()
    function = bridge.to_torch(sine)
    with multiprocessing.get_context(how).Pool(2) as pool:
        found = pool.starmap_async(into_torch, [(function, k) for k in range(3)]).get(90)
        for k, (value, slope) in enumerate(found):
            np.testing.assert_allclose([value, slope], [[np.sin(k)] * 3, [np.cos(k)] * 3], rtol=1e-5, atol=1e-6)
        for k, y in enumerate(pool.starmap_async(into_jax, [(lane, k) for k in range(3)]).get(90)):
            np.testing.assert_array_equal(y, np.full(3, 2.0 * k))
        try:
            pool.apply_async(failing, (7,)).get(90)
        except KeyError as error:
            assert "in worker 7" in str(error)
        else:
            raise AssertionError("no error")
        pool.close(), pool.join()
    running.join()
    np.testing.assert_array_equal(results[0], np.ones((100, 100)))
    print("passed")
"""


@pytest.mark.parametrize(
    "how, lane",
    [
        ("spawn", "ffi"),
        pytest.param("forkserver", "host", marks=pytest.mark.full),
        pytest.param("forkserver", "ffi", marks=pytest.mark.full),
        pytest.param("spawn", "host", marks=pytest.mark.full),
    ],
)
def test_workers_while_a_program_runs(how, lane, tmp_path):
    """Nothing is said at the end: no semaphore is left to the resource tracker."""
    script = tmp_path / "workers.py"
    script.write_text(WORKERS)
    child = subprocess.run(
        [sys.executable, str(script), how, lane],
        capture_output=True, text=True, timeout=200, env=settings(),
    )  # fmt: skip
    assert (child.returncode, child.stdout, child.stderr) == (0, "passed\n", ""), child.stderr[
        -3000:
    ]


FORKED = """
import os, sys, time, warnings
import jax, jax.numpy as jnp, numpy as np, torch, bridge
warnings.simplefilter("ignore")  # JAX warns of every fork
lane = sys.argv[1]

def slow(x):
    time.sleep(0.01)
    return x * 1.0

f = bridge.to_jax(slow, lane=lane, outputs=lambda x: x)
program = jax.jit(lambda x: jax.lax.scan(lambda c, _: (f(c @ c * 0 + c), None), x, None, length=50)[0])
g = bridge.to_torch(jnp.sin)
x, t = jnp.ones((100, 100)), torch.ones(3)
program(x), g(t)
for k in range(3):
    y = program(x)  # which may still run
    child = os.fork()
    if not child:
        told = 0
        for call in (lambda: f(x), lambda: g(t)):
            try:
                call()
            except RuntimeError as error:
                told += "expected a process of its own for JAX, got a fork" in str(error)
        os._exit(told)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    np.testing.assert_array_equal(y, x)
    torch.testing.assert_close(g(t), t.sin())
print("passed")
"""


def test_forks_while_a_program_runs(lane):
    """A call in the fork is an error at once, and the parent goes on."""
    child = subprocess.run(
        [sys.executable, "-c", FORKED, lane], capture_output=True, text=True, timeout=100
    )
    assert child.stdout == "passed\n", child.stderr[-3000:]


SUBPROCESSES = """
import subprocess, sys, threading
import jax, jax.numpy as jnp, numpy as np, torch, bridge
lane = sys.argv[1]
answer = lambda k: int(subprocess.run([sys.executable, "-S", "-c", f"print({k} + 1)"], capture_output=True, text=True, check=True).stdout)

def counted(x):
    return torch.full_like(x, float(answer(int(x[0, 0]))))

f = bridge.to_jax(counted, lane=lane, outputs=lambda x: x)
program = jax.jit(lambda x: jax.lax.scan(lambda c, _: (f(c), c[0, 0]), x, None, length=10))
found = []
thread = threading.Thread(target=lambda: found.append(program(jnp.zeros((50, 50)))))
thread.start()
assert [answer(k) for k in range(10)] == [*range(1, 11)]  # while it runs
thread.join()
end, seen = found[0]
assert (end == 10).all() and seen.tolist() == [*range(10)]
print("passed")
"""


def test_subprocesses_while_a_program_runs(lane):
    """Beside a program, and in its calls."""
    child = subprocess.run(
        [sys.executable, "-c", SUBPROCESSES, lane], capture_output=True, text=True, timeout=100
    )
    assert child.stdout == "passed\n", child.stderr[-3000:]


def settings():
    """The environment of a script that lies elsewhere."""
    import os

    return {**os.environ, "PYTHONPATH": os.getcwd()}
