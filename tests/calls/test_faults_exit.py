"""A process that ends while a program runs: the right return code, within seconds, and nothing on
stderr but what Python itself says."""

import os
import subprocess
import sys
import time

import pytest

START = """
import atexit, sys, threading, time
import jax, jax.numpy as jnp, torch, bridge
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
lane = sys.argv[1]

def slow(x):
    time.sleep(0.02)
    return x * 1.0

same = lambda x: x
f = bridge.to_jax(torch.sin, lane=lane) if lane == "native" else bridge.to_jax(slow, lane=lane, outputs=same)
steps = 10**6 if lane == "native" else 3000  # a minute
scan = lambda f: jax.jit(lambda x: jax.lax.scan(lambda c, _: (f(c @ c * 0 + c), None), x, None, length=steps)[0])
program, x = scan(f), jnp.eye(300)  # which XLA runs in a thread of its own
program.lower(x).compile()

def begin():
    # on the host lane a program of one device runs in the thread that calls it
    threading.Thread(target=program, args=(x,), daemon=True).start() if lane == "host" else program(x)
"""
CASES = {
    "end": "begin()",
    "sys.exit": "begin()\nready()\nsys.exit(3)",
    "exception": "begin()\nready()\nraise KeyError('mine')",
    "kept": "y = [program(x)] if lane != 'host' else begin()",
    "devices": """
mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
y = jax.device_put(jnp.stack([x, x]), NamedSharding(mesh, P("d")))
jax.jit(lambda y: jax.lax.scan(lambda c, _: (jax.vmap(f)(c), None), y, None, length=steps)[0])(y)
""",
    "a sum over devices": """
mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
y = jax.device_put(jnp.stack([x, x]), NamedSharding(mesh, P("d")))
total = lambda c: c + 0 * c.sum()
jax.jit(lambda y: jax.lax.scan(lambda c, _: (total(jax.vmap(f)(c)), None), y, None, length=steps)[0])(y)
""",
    "a daemon thread": """
wait = lambda: jax.block_until_ready(program(x))
threading.Thread(target=wait, daemon=True).start()
""",
    "a daemon thread's own loop": """
def again_and_again():
    while True:
        try:
            jax.block_until_ready(program(x))
        except Exception:
            pass
threading.Thread(target=again_and_again, daemon=True).start()
""",
    "a thread that is gone": """
if lane != "host":
    thread = threading.Thread(target=program, args=(x,))
    thread.start(), thread.join()
""",
    "JAX in torch": """
g, z = bridge.to_torch(lambda x: jax.lax.fori_loop(0, 50, lambda i, c: jnp.tanh(c @ c), x)), torch.eye(300)
g(z)
def again_and_again():
    while True:
        g(z)
threading.Thread(target=again_and_again, daemon=True).start()
""",
}  # fmt: skip
READY = """
def ready():
    time.sleep(0.3)
    print("running", flush=True)
"""
CODES = {"sys.exit": 3, "exception": 1}
# a thread that is left says why it ends, and an exception of the user's is printed
TALK = {"a daemon thread", "exception", "JAX in torch", "a daemon thread's own loop"}


def ended(source, *arguments, limit=60):
    """(return code, stdout, stderr, seconds from "running" to the end) of a child."""
    settings = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0",
        "OMP_NUM_THREADS": "1",
    }
    child = subprocess.Popen(
        [sys.executable, "-c", source, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=settings,
    )  # fmt: skip
    try:
        first = child.stdout.readline()
        start = time.monotonic()
        said, complained = child.communicate(timeout=limit)
    finally:
        child.kill()
    own = [
        line
        for line in complained.splitlines()
        if not line.startswith(("bridge: compil", "bridge: build"))
    ]
    return child.returncode, first + said, "\n".join(own), time.monotonic() - start


# the others by `make test-all`: each is a process of its own
SHORT = {("sys.exit", "ffi"), ("devices", "ffi"), ("a daemon thread", "host"), ("end", "native")}


@pytest.mark.parametrize(
    "case, lane",
    [
        pytest.param(case, lane, marks=() if (case, lane) in SHORT else pytest.mark.full)
        for case in CASES
        for lane in ("ffi", "host", "native")
    ],
)
def test_a_process_ends_while_a_program_runs(case, lane):
    source = START + READY + CASES[case] + ("" if case in CODES else "\nready()")
    code, said, complained, seconds = ended(source, lane)
    assert (code, said) == (CODES.get(case, 0), "running\n"), complained[-3000:]
    assert seconds < 15, f"{seconds} s"
    if lane == "host" and case in ("end", "sys.exit", "kept"):
        return  # whose thread says why it ends
    assert complained == "" or case in TALK, complained[-3000:]
    for word in ("terminate called", "Fatal Python error", "atexit callback"):
        assert word not in complained, complained[-3000:]


STUCK = (
    START
    + READY
    + """
from jax_side.calls import ending
ending.LIMIT = 2.0
def slow(x):
    time.sleep(100)
    return x
f = bridge.to_jax(slow, lane=lane, outputs=same)
program = jax.jit(lambda x: f(x @ x))
begin()
ready()
sys.exit(5)
"""
)


@pytest.mark.parametrize("lane", ["ffi", "host"])
def test_a_call_that_does_not_return_is_left(lane):
    code, _, complained, seconds = ended(STUCK, lane)
    assert code == 5 and complained == "" and 1.9 < seconds < 15, (code, complained, seconds)


EFFECTS = (
    START
    + READY
    + """
import os
from jax.experimental import io_callback
seen = []
def step(c, i):
    io_callback(lambda i: seen.append(int(i)), None, i, ordered=True)
    return f(c), None
atexit.register(lambda: print("a handler", float(jax.jit(lambda x: f(x).sum())(jnp.ones(3)))))

class Last:
    def __del__(self, write=os.write, seen=seen):
        write(1, f"{len(seen)} effects".encode())

last = Last()
jax.jit(lambda x: jax.lax.scan(step, x, jnp.arange(30))[0])(x)
print("running", flush=True)
"""
)


@pytest.mark.parametrize("lane", ["ffi"])
def test_effects_in_order_and_handlers_at_exit_come_first(lane):
    """JAX promises the effects, and later handlers run before earlier ones."""
    code, said, complained, _ = ended(EFFECTS, lane)
    assert (code, complained) == (0, "") and said == "running\na handler 3.0\n30 effects", said


AFTER_AN_ERROR = (
    START
    + """
def broken(x):
    raise KeyError("no such species")
mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
x = jax.device_put(jnp.ones((2, 3)), NamedSharding(mesh, P("d")))
try:
    jax.block_until_ready(jax.jit(jax.vmap(bridge.to_jax(broken, lane=lane, outputs=same, batched="sequential")))(x))
except jax.errors.JaxRuntimeError as error:
    print("KeyError: 'no such species'" in str(error), flush=True)
"""
)


@pytest.mark.parametrize("lane", ["ffi", "host"])
def test_an_error_over_devices_is_not_said_again_at_exit(lane):
    code, said, complained, _ = ended(AFTER_AN_ERROR, lane)
    assert (code, said) == (0, "True\n") and "atexit callback" not in complained, complained[-3000:]
