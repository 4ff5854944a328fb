"""Equal functions are compiled once, different ones never confused: in one process, in two, and
through jax.export."""

import json
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given

import bridge
from jax_side.calls import lanes
from jax_side.calls.signature import sign

ROOT = Path(__file__).resolve().parents[2]
X = jnp.arange(4.0)
COMPILED = {
    "/jax/core/compile/jaxpr_trace_duration": "traced",
    "/jax/core/compile/backend_compile_duration": "compiled",
}


@contextmanager
def counted():
    """How often JAX traces and compiles."""
    counts = Counter()

    def listen(event, *_, **__):
        counts[COMPILED.get(event, "other")] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield counts
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def double(x, scale=2):
    return x * scale


def declared(**dtypes):
    return bridge.to_jax(
        double, outputs={k: jax.ShapeDtypeStruct((4,), d) for k, d in dtypes.items()}
    )


MODULE = torch.nn.Linear(4, 4)
SAME = {
    "function": lambda: bridge.to_jax(double),
    "module": lambda: bridge.to_jax(MODULE),
    "bound_method": lambda: bridge.to_jax(MODULE.forward),
    "outputs": lambda: declared(y="float64"),
    "declared_by_function": lambda f=lambda x: x: bridge.to_jax(double, outputs=f),
    "batched_axis": lambda: bridge.to_jax(double, batched=1),
    "batched_dict": lambda: bridge.to_jax(double, batched={"x": 0, "return": 0}),
    "sequential": lambda: bridge.to_jax(double, batched="sequential"),
    "autograd": lambda: bridge.to_jax(double, derivatives="autograd"),
    "host": lambda: bridge.to_jax(double, lane="host"),
    "outputs_other_dtype": lambda: declared(y="float32"),
    "outputs_other_tree": lambda: declared(z="float64"),
    "batched_zero": lambda: bridge.to_jax(double, batched=0),
    "other_module": lambda m=torch.nn.Linear(4, 4): bridge.to_jax(m),
}


@pytest.mark.parametrize("name", SAME)
def test_equality_x_options(name):
    """to_jax(f, options) equals itself made anew, and nothing else in the table."""
    f = SAME[name]()
    assert [other for other, make in SAME.items() if make() == f and hash(make()) == hash(f)] == [
        name
    ]


def test_equality_x_callbacks_of_the_host_lane():
    """JAX finds a program again by them: those of other functions, or of another depth, must not be
    equal."""
    of = lambda f: bridge.to_jax(f).base(sign((X,), {})[0])
    a, b, other = (lanes.HostCall(of(f)) for f in (double, double, torch.sin))
    assert a == b and hash(a) == hash(b) and a != other and a != a.fn
    b.depth += 1
    assert a != b


@pytest.mark.parametrize(
    "wrap",
    [jax.jit, lambda f: jax.jit(jax.grad(lambda x: f(x).sum())), lambda f: jax.jit(jax.vmap(f))],
    ids=["jit", "grad", "vmap"],
)
def test_compilations_x_equal_functions(wrap, lane):
    calls = []
    f = lambda x: (calls.append(x.shape), torch.sin(x))[1]
    with counted() as counts:
        first, again = wrap(bridge.to_jax(f, lane=lane)), jax.jit(bridge.to_jax(f, lane=lane))
        jax.block_until_ready((first(X), again(X)))
        compiled, runs = counts["compiled"], len(calls)
        for _ in range(3):
            jax.block_until_ready((first(X), jax.jit(bridge.to_jax(f, lane=lane))(X)))
    assert counts["compiled"] == compiled > 0
    assert len(calls) - runs == 6  # each a real call: to trace again would be a fake one


def test_shape_inference_x_calls():
    """torch sees fake tensors once for each signature."""
    kinds = Counter()

    def f(x, y=None, scale=1):
        kinds[type(x).__name__] += 1
        return x * scale

    g = bridge.to_jax(f)
    for _ in range(3):
        for args in ((X,), (X[:2],), (X, X), (X, None, 2)):
            np.testing.assert_array_equal(g(*args), args[0] * (args[2] if len(args) > 2 else 1))
    assert kinds == {"FakeTensor": 4, "Tensor": 12}


KINDS = st.sampled_from(
    [0, 1, 0.0, -0.0, 1.0, True, False, "1", "", (), (1,), (1.0,), (True,), 1j, b"1"]
)


@given(st.lists(KINDS, min_size=2, max_size=6), st.booleans())
def test_static_arguments_x_type(values, jitted):
    """1, 1.0 and True are equal in Python, and so are 0.0 and -0.0; each arrives as it was
    given."""
    seen = []
    f = bridge.to_jax(
        lambda x, value: (seen.append(repr(value)), x + 1)[1], outputs=lambda x, value: x
    )
    for value in values:
        (jax.jit if jitted else partial)(lambda x, v=value: f(x, v))(X).block_until_ready()
    assert seen == [repr(v) for v in values]


def test_compilations_x_new_parameters(lane):
    """Parameters are inputs of the program: a training step is compiled once, whatever their
    values."""
    apply, params = bridge.functional(torch.nn.Linear(4, 1, dtype=torch.float64), lane=lane)

    @jax.jit
    def step(params, x):
        loss, grads = jax.value_and_grad(lambda p: (apply(p, x) ** 2).sum())(params)
        return loss, jax.tree.map(lambda p, g: p - 0.01 * g, params, grads)

    loss, params = step(params, X)
    with counted() as counts:
        for _ in range(5):
            new, params = step(params, X)
            assert float(new) < float(loss)
            loss = new
    assert not counts["traced"] and not counts["compiled"]


# Other processes.

START = """
import json, sys, jax, torch, bridge
jax.config.update("jax_enable_x64", True)
x = jax.numpy.arange(4.0)
"""
CACHED = (
    START
    + """
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
events, k = [], float(sys.argv[2])
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
y = jax.jit(jax.grad(lambda x, f=bridge.to_jax(lambda x: k * x.sin()): f(x).sum()))(x)
print(json.dumps([sum(e.endswith("cache_hits") for e in events), sum(e.endswith("cache_misses") for e in events), y.tolist()]))
"""
)


def python(code, *args):
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.full
def test_persistent_cache_x_two_processes(tmp_path):
    """The second process finds the program of the first, and calls its own function from it."""
    for k, expected in ((2, (0, 1)), (3, (1, 0))):
        hits, misses, y = python(CACHED, tmp_path, k)
        assert (hits, misses) == expected
        np.testing.assert_allclose(y, k * np.cos(X))


SHARED_OUT = """
import json, sys, jax, torch, bridge
jax.config.update("jax_enable_x64", True)
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", True)
f, k = bridge.to_jax(lambda x: k * x.sin()), float(sys.argv[2])
mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
x = jax.device_put(jax.numpy.arange(4.0), NamedSharding(mesh, P("d")))
print(json.dumps(jax.jit(jax.vmap(f))(x).tolist()))
"""


def test_persistent_cache_x_programs_over_devices(tmp_path):
    """What a device calls is known in one process alone, and no other one finds the program."""
    for k in (2, 3):
        np.testing.assert_allclose(python(SHARED_OUT, tmp_path, k), k * np.sin(X))


EXPORTED = """
f = jax.jit(bridge.to_jax(lambda x: {k} * x.sin(), lane="ffi"))
safe = [jax.export.DisabledSafetyCheck.custom_call("bridge_call")]
blob = jax.export.export(f, disabled_checks=safe)(jax.numpy.arange(4.0)).serialize(vjp_order=1)
"""


def test_export_x_same_process():
    """The blob alone calls the function, and its gradient: program and function are gone."""
    blobs = {2.0: {}, 3.0: {}}
    for k, names in blobs.items():
        exec(EXPORTED.format(k=k), {"jax": jax, "bridge": bridge}, names)
        names.pop("f")
    jax.clear_caches()
    for k, names in blobs.items():
        call = jax.export.deserialize(names["blob"]).call
        np.testing.assert_allclose(jax.jit(call)(X), k * np.sin(X))
        np.testing.assert_allclose(jax.grad(lambda x: call(x).sum())(X), k * np.cos(X))


IMPORTED = """
programs = [jax.jit(bridge.to_jax(f)).lower(*[x] * f.__code__.co_argcount).compile() for f in ({own} for k in range(20))]
try: print(json.dumps(["answer", jax.jit(jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read())).call)(x).tolist()]))
except Exception as e: print(json.dumps([type(e).__name__, str(e)]))
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "blob"
    python(START + EXPORTED.format(k=2.0) + "print(open(sys.argv[1], 'wb').write(blob))", path)
    return path


@pytest.mark.parametrize("own", ["lambda x, y: x + y + k"])
def test_export_x_other_process(own, exported):
    """A process that does not know the function says so and never calls one of its own instead,
    whatever their numbers."""
    kind, text = python(START + IMPORTED.format(own=own), exported)
    assert kind == "JaxRuntimeError" and "which this process does not know" in text, text


# Symbolic shapes.

SYMBOLIC = {
    "value": (lambda f: jax.vmap(f), lambda x: (x**3).sum(-1)),
    "gradients": (lambda f: jax.vmap(jax.grad(f)), lambda x: 3 * x**2),
    "of a sum": (lambda f: jax.grad(lambda x: jax.vmap(f)(x).sum()), lambda x: 3 * x**2),
    "hvp": (lambda f: lambda x: jax.jvp(jax.vmap(jax.grad(f)), (x,), (x,))[1], lambda x: 6 * x * x),
}


@pytest.mark.parametrize("batched", ["vmap", "sequential", 0])
@pytest.mark.parametrize("name", SYMBOLIC)
def test_export_x_a_symbol_of_examples(name, batched):
    """One exported program for any number of examples."""
    of, twin = SYMBOLIC[name]
    f = bridge.to_jax(lambda x: (x**3).sum(-1), lane="ffi", batched=batched)
    (b, _) = jax.export.symbolic_shape("b, 3")
    safe = [jax.export.DisabledSafetyCheck.custom_call("bridge_call")]
    like = jax.ShapeDtypeStruct((b, 3), X.dtype)
    exported = jax.export.export(jax.jit(of(f)), disabled_checks=safe)(like)
    for n in (1, 2, 5):
        x = jnp.arange(3.0 * n).reshape(n, 3)
        np.testing.assert_allclose(jax.jit(exported.call)(x), twin(x), rtol=1e-12)


def test_export_x_symbols_that_are_refused():
    safe = [jax.export.DisabledSafetyCheck.custom_call("bridge_call")]
    (n,) = jax.export.symbolic_shape("n")
    export = lambda f, shape: jax.export.export(jax.jit(f), disabled_checks=safe)(
        jax.ShapeDtypeStruct(shape, X.dtype)
    )
    f = bridge.to_jax(lambda x: x.sum(), lane="ffi")
    with pytest.raises(
        NotImplementedError, match=r"sizes that are numbers .* float64\[n,3\] as argument 0"
    ):
        export(f, (n, 3))
    for lane in ("host", "native"):
        f = bridge.to_jax(lambda x: x.sum(), lane=lane)
        with pytest.raises(NotImplementedError, match="the symbol n; take lane=.ffi."):
            export(jax.vmap(f), (n, 3))
