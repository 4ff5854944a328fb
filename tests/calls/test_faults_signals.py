"""Ctrl-C and handlers of signals while programs run: they arrive within bounded time, and the process
goes on with right numbers. Each lane in a process of its own, since a fault might end it."""

import subprocess
import sys

import pytest

SOURCE = """
import faulthandler, os, signal, sys, threading, time
faulthandler.dump_traceback_later(190, exit=True)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background has it ignored
import jax, jax.numpy as jnp, numpy as np, torch, bridge
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
lane = sys.argv[1]

def slow(x):
    time.sleep(0.01)
    return x * 1.0

same = lambda x: x
f = bridge.to_jax(torch.sin if lane == "native" else slow, lane=lane, outputs=same)
twin = jnp.sin if lane == "native" else same
steps = 10**5 if lane == "native" else 400  # some seconds
scan = lambda f, n: jax.jit(lambda x: jax.lax.scan(lambda c, _: (f(c @ c * 0 + c), None), x, None, length=n)[0])
main = threading.main_thread().ident
short, plain = scan(f, 3), scan(twin, 3)

def compiled(program, x):  # beforehand: an interrupt of a compilation is another thing
    program = program.lower(x).compile()
    return lambda: jax.block_until_ready(program(x))

def after(seconds, number):
    threading.Timer(seconds, signal.pthread_kill, (main, number)).start()

SMALL = [jnp.linspace(0, 1, n * n).reshape(n, n) for n in (2, 64)]

def interrupted(run, limit=10.0):
    after(0.3, signal.SIGINT)
    start = time.monotonic()
    try:
        with bridge.raising():  # without it, one between two calls is an error of XLA's
            run()
            time.sleep(1.0)  # one may arrive when the program has ended
    except KeyboardInterrupt:
        waited = time.monotonic() - start
        assert 0.2 < waited < limit, waited
    else:
        raise AssertionError("no KeyboardInterrupt")
    for x in SMALL:
        np.testing.assert_allclose(short(x), plain(x), rtol=1e-6)
"""
SCENES = {
    # in the thread that waits, in a thread of XLA, over devices
    "a long scan": "interrupted(compiled(scan(f, steps), jnp.eye(2)))",
    "a long scan elsewhere": 'interrupted(compiled(scan(f, steps if lane != "native" else 5000), jnp.eye(200)))',
    "two devices": """
mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
y = jax.device_put(jnp.ones((2, 20, 20)), NamedSharding(mesh, P("d")))
mapped = jax.jit(lambda y: jax.lax.scan(lambda c, _: (jax.vmap(f)(c), None), y, None, length=steps)[0])
interrupted(compiled(mapped, y), 20.0)
""",
    "JAX in a loop of torch": """
g, x = bridge.to_torch(lambda x: jnp.tanh(x @ x)), torch.ones(50, 50)
def loop():
    while True:
        y = g(x.requires_grad_())
        torch.autograd.grad(y.sum(), x)
interrupted(loop, 3.0)
torch.testing.assert_close(g(x), torch.tanh(x @ x))
""",
}
# Handlers run in the main thread, when it is in Python: on the lanes ffi and host in the call itself.
HANDLERS = {
    "a handler that counts": """
seen = []
signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
signal.setitimer(signal.ITIMER_REAL, 0.003, 0.003)
x = jnp.linspace(0, 1, 4).reshape(2, 2)
np.testing.assert_allclose(scan(f, 40)(x), scan(twin, 40)(x), rtol=1e-5)
signal.setitimer(signal.ITIMER_REAL, 0)
assert len(seen) > 5, seen
""",
    "a handler that calls": """
found, within, eager = [], [], bridge.to_jax(torch.cos, lane=lane)
jitted, back = jax.jit(eager), bridge.to_torch(jnp.sin)
points = [jnp.arange(3.0) + k for k in range(5)]
eager(points[0]), jitted(points[0]), back(torch.ones(3))
def handler(*_):
    if within:
        return  # JAX refuses a jitted function that interrupts itself
    k = len(found)
    within.append(k)
    found.append((eager(points[k]), jitted(points[k]), back(torch.arange(3.0) + k)))
    within.clear()
signal.signal(signal.SIGUSR1, handler)
for k in range(5):
    after(0.05 * k, signal.SIGUSR1)
x = jnp.linspace(0, 1, 4).reshape(2, 2)
np.testing.assert_allclose(scan(f, 40)(x), scan(twin, 40)(x), rtol=1e-5)
time.sleep(0.5)
assert found
for k, (a, b, c) in enumerate(found):
    np.testing.assert_allclose([a, b, c], [np.cos(points[k])] * 2 + [np.sin(points[k])], rtol=1e-4)
""",
    "a handler that raises": """
class TooLate(Exception): pass
def handler(*_):
    raise TooLate("in the handler")
signal.signal(signal.SIGALRM, handler)
program = scan(f, steps)
def raised(size, seconds):
    # Whether the exception arrives as it is. Where the signal meets Python code of JAX around a call,
    # it is an error of XLA's; and what meets the garbage collector is lost, as everywhere in Python.
    signal.setitimer(signal.ITIMER_REAL, seconds)
    start = time.monotonic()
    try:
        with bridge.raising():
            jax.block_until_ready(program(jnp.eye(size)))
    except TooLate as error:
        assert "in the handler" in str(error) and time.monotonic() - start < 10
        return True
    except jax.errors.JaxRuntimeError as error:
        assert "TooLate" in str(error) or str(error) == "INTERNAL: ", error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return False
for size in (2, 200) if lane != "native" else (2,):
    assert any(raised(size, 0.3 / 2**k) for k in range(8)), "nothing was raised"
    x = jnp.linspace(0, 1, 4).reshape(2, 2)
    np.testing.assert_allclose(short(x), plain(x), rtol=1e-6)
""",
}


@pytest.mark.parametrize(
    "lane, scenes",
    [
        pytest.param("ffi", SCENES, id="ffi interrupts"),
        pytest.param("host", SCENES, id="host interrupts", marks=pytest.mark.full),
        pytest.param("native", SCENES, id="native interrupts", marks=pytest.mark.full),
        pytest.param("ffi", HANDLERS, id="ffi handlers", marks=pytest.mark.full),
        pytest.param("host", HANDLERS, id="host handlers"),
        pytest.param("native", HANDLERS, id="native handlers", marks=pytest.mark.full),
    ],
)
def test_signals(lane, scenes, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    said = "".join(f"{scene}\nprint({name!r}, flush=True)\n" for name, scene in scenes.items())
    child = subprocess.run(
        [sys.executable, "-c", SOURCE + said, lane], capture_output=True, text=True, timeout=200
    )
    assert child.stdout.splitlines() == [*scenes], child.stderr[-3000:]
    assert child.returncode == 0, child.stderr[-3000:]
