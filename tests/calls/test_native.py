"""The native lane alone: no Python in a step, memory, threads and devices, weights that change,
what can't be compiled."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest
import torch
from jax.sharding import PartitionSpec as P

import bridge
from jax_side.calls import native
from jax_side.calls.arrays import DTYPES
from tests.cases import ENERGIES, close, draw
from torch_side.calls.export import TorchFunction

CUBIC = ENERGIES["cubic"]
(X,) = draw(CUBIC)
ENERGY = bridge.to_jax(CUBIC.torch, lane="native")
GRAD = jax.jit(jax.grad(ENERGY))
WANT = jax.jit(jax.grad(CUBIC.jax))
# jit raises the latter where the program has run before (jax 0.10.2), with the same text
AT_RUN = (jax.errors.JaxRuntimeError, ValueError)


# A step


def test_no_python_in_a_step(monkeypatch):
    calls = []

    def counted(x):
        calls.append(1)
        return (torch.sin(x) ** 3).sum()

    f = bridge.to_jax(counted, lane="native")
    program = jax.jit(
        lambda x: jax.lax.scan(lambda x, _: (x - 0.1 * jax.grad(f)(x), f(x)), x, None, length=20)
    )
    compiled = program.lower(X).compile()
    assert calls, "it was traced"
    calls.clear()
    for name in ("run", "runner"):
        monkeypatch.setattr(TorchFunction, name, staticmethod(lambda *a, **k: calls.append(1)))
    found = [jax.block_until_ready(compiled(X + k)) for k in range(3)]
    monkeypatch.undo()
    assert not calls and len({float(e[-1]) for _, e in found}) == 3
    assert f(X).shape == () and calls, "an eager call runs torch"


def test_inputs_are_never_written():
    x = np.array(X)
    for k in range(5):
        close(GRAD(X * (1 + k)), WANT(X * (1 + k)), rtol=1e-11)
    assert np.array_equal(x, X)


def test_results_of_one_call_outlive_the_next():
    first = GRAD(X)
    kept = np.array(first)
    for k in range(20):
        GRAD(X + k).block_until_ready()
    assert np.array_equal(first, kept)


@pytest.mark.timeout(60, method="thread")
def test_threads_call_one_package_at_once():
    want = [np.array(GRAD(X + k)) for k in range(4)]

    def work(k):
        return all(np.array_equal(GRAD(X + k), want[k]) for _ in range(200))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


@pytest.mark.timeout(60, method="thread")
def test_threads_make_programs_at_once():
    """torch's tracer is one for all threads."""
    jax.jit(ENERGY)(X)  # the package is there
    want = float(ENERGY(X))

    def work(k):
        programs = [jax.jit(lambda x, i=i: ENERGY(x) + k + i) for i in range(10)]
        return [float(program(X)) for program in programs]

    with ThreadPoolExecutor(4) as pool:
        for k, found in enumerate(pool.map(work, range(4))):
            np.testing.assert_allclose(found, want + k + np.arange(10), rtol=1e-12)


@pytest.mark.parametrize("of", [lambda f: f, jax.grad], ids=["call", "grad"])
def test_two_devices_under_shard_map(of):
    mesh = jax.make_mesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jnp.concatenate([X, 1.5 * X])
    over = lambda f: jax.jit(
        jax.shard_map(lambda x: jax.lax.psum(f(x) ** 2, "i"), mesh=mesh, in_specs=P("i"), out_specs=P())
    )  # fmt: skip
    close(of(over(ENERGY))(x), of(over(CUBIC.jax))(x), rtol=1e-11)


@pytest.mark.parametrize("n", [2_000, pytest.param(100_000, marks=pytest.mark.full)])
def test_memory_x_many_calls(n):
    """Less than 2 MB, half of it for the heap that other tests have left in pieces."""
    loop = jax.jit(lambda x: jax.lax.fori_loop(0, n // 2, lambda i, x: x + 1e-9 * ENERGY(x), x))

    def rss():
        for _ in range(n // 2):
            y = GRAD(X)
        jax.block_until_ready((y, loop(X)))
        gc.collect()
        return psutil.Process().memory_info().rss

    rss()
    before = rss()
    assert rss() - before < 2 * 2**20


def test_code_is_mapped_once_x_program():
    """What is loaded stays mapped: one program after another of the same code adds nothing."""
    mapped = lambda: sum(".so" in line for line in Path("/proc/self/maps").read_text().splitlines())

    def again(k):
        module = Scaled(1.25)
        program = jax.jit(lambda x: bridge.to_jax(module, lane="native")(x) + k)
        (number,) = native.keys_in(program.lower(X).as_text())
        program(X).block_until_ready()
        del program, module
        gc.collect()
        bridge.to_jax(torch.sin)  # lets go of packages whose programs are gone
        assert number not in native.packages
        return mapped()

    assert again(0) == again(1) == again(2)


# Weights


class Scaled(torch.nn.Module):
    def __init__(self, weight=1.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(weight, dtype=torch.float64))

    def forward(self, x):
        return (self.weight * x).sin().sum()


def in_place(module):
    with torch.no_grad():
        module.weight.mul_(2.0)


def optimizer(module):
    module.weight.grad = torch.full_like(module.weight, -1.0)
    torch.optim.SGD(module.parameters(), lr=1.0).step()


def data(module):
    module.weight.data = torch.tensor(2.0, dtype=torch.float64)


def replaced(module):
    module.weight = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))


def loaded(module):
    module.load_state_dict({"weight": torch.tensor(2.0)})


CHANGES = [in_place, optimizer, data, replaced, loaded]
STALE = (
    "expected the weights that the program was compiled with, got some that have changed since; "
    "call bridge.to_jax or bridge.potential again"
)


@pytest.mark.parametrize("change", CHANGES)
def test_stale_weights_x_change(change):
    """1 becomes 2: a program that was compiled with 1 says so, and a new one has 2."""
    module = Scaled()
    f = bridge.to_jax(module, lane="native")
    program = jax.jit(f)
    close(program(X), jnp.sin(X).sum())
    change(module)
    gc.collect()
    for _ in range(2):
        with pytest.raises(AT_RUN, match=STALE):
            program(X).block_until_ready()
    again = bridge.to_jax(module, lane="native")
    assert again != f
    close(jax.jit(again)(X), jnp.sin(2 * X).sum())
    with pytest.raises(AT_RUN, match=STALE):
        program(X).block_until_ready()


def test_stale_weights_x_cast():
    """Of double(), which changes .data of each weight."""
    module = Scaled()
    program = jax.jit(bridge.to_jax(module, lane="native"))
    program(X).block_until_ready()
    module.float()
    with pytest.raises(AT_RUN, match=STALE):
        program(X).block_until_ready()
    module.double()
    with pytest.raises(AT_RUN, match=STALE):
        program(X).block_until_ready()
    close(jax.jit(bridge.to_jax(module, lane="native"))(X), jnp.sin(X).sum())


@pytest.mark.parametrize("change", [in_place, data, replaced])
def test_stale_weights_x_there_and_back(change):
    """What has the same weights again is compiled already, and runs, though the old program, which
    is still there, does not."""
    module = Scaled(2.0)
    program = jax.jit(bridge.to_jax(module, lane="native"))
    close(program(X), jnp.sin(2 * X).sum())
    if change is in_place:
        with torch.no_grad():
            module.weight.mul_(0.5)
    change(module)
    close(jax.jit(bridge.to_jax(module, lane="native"))(X), jnp.sin(2 * X).sum())
    with pytest.raises(AT_RUN, match=STALE):
        program(X).block_until_ready()


def test_equal_weights_of_two_modules_change_apart():
    one, other = Scaled(), Scaled()
    first, second = (jax.jit(bridge.to_jax(m, lane="native")) for m in (one, other))
    close(first(X), second(X))
    in_place(one)
    with pytest.raises(AT_RUN, match=STALE):
        first(X).block_until_ready()
    close(second(X), jnp.sin(X).sum())


def test_a_tensor_in_a_closure_that_changes():
    weight = torch.tensor(1.0, dtype=torch.float64)
    program = jax.jit(bridge.to_jax(lambda x: (weight * x).sin().sum(), lane="native"))
    close(program(X), jnp.sin(X).sum())
    weight.add_(1.0)
    with pytest.raises(AT_RUN, match=STALE):
        program(X).block_until_ready()


@pytest.mark.parametrize("held", ["module", "closure"])
def test_weights_of_inference_mode_are_refused(held):
    """They don't count their changes, so that nobody would notice one."""
    with torch.inference_mode():
        module, weight = Scaled(), torch.ones(3, dtype=torch.float64)
    f = module if held == "module" else lambda x: (weight * x).sum()
    with pytest.raises(ValueError, match="weights that count their changes, got one of shape"):
        jax.jit(bridge.to_jax(f, lane="native"))(X)


def test_a_module_lives_as_long_as_its_last_program():
    module = Scaled()
    alive, program = weakref.ref(module), jax.jit(bridge.to_jax(module, lane="native"))
    program(X).block_until_ready()
    known = len(native.packages)
    del module
    gc.collect()
    close(program(X), jnp.sin(X).sum())
    assert alive() is not None
    del program
    gc.collect()
    bridge.to_jax(torch.sin)  # any use of the bridge forgets what nobody can call
    gc.collect()
    assert alive() is None and len(native.packages) < known


# What can't be compiled


def item(x):
    return x * x.sum().item()


def nonzero(x):
    return x * x.nonzero().shape[0]


def numpy(x):
    return torch.from_numpy(np.sin(x.numpy()))


def branch(x):
    return x if x.sum() > 0 else -x


@torch.library.custom_op("bridge_tests::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


double.register_fake(lambda x: torch.empty_like(x))


def custom(x):
    return double(x)


inside = bridge.to_torch(jnp.sin)


def jax_inside(x):
    return inside(x)


SAME = lambda x: x


def test_a_size_that_depends_on_values():
    """Where no result has that size, a graph can carry it."""
    program = jax.jit(bridge.to_jax(nonzero, outputs=SAME, lane="native"))
    for x in (X, X.at[0].set(0.0)):
        close(program(x), bridge.to_jax(nonzero, outputs=SAME)(x))


@pytest.mark.parametrize("f", [item, numpy, branch, custom, jax_inside])
def test_untraceable_code_is_refused(f):
    """The error names the line, or the operator, and the lanes that run it."""
    program = jax.jit(bridge.to_jax(f, outputs=SAME, lane="native"))
    with pytest.raises(NotImplementedError, match='take lane="ffi" or "host"') as refused:
        program(X)
    text = str(refused.value)
    named = {custom: "bridge_tests.double", jax_inside: "bridge", item: "read by .item()"}
    assert named.get(f, f"in {f.__name__}: return") in text, text
    assert jax.jit(bridge.to_jax(f, outputs=SAME, lane="ffi"))(X).shape == X.shape


def no_grad(x):
    with torch.no_grad():
        return (x["pos"] ** 2).sum()[None]


def detached(x):
    return (x["pos"].detach() ** 2).sum()[None]


# What is changed in place: seen in the graph, before anything is compiled.

HOLDER = torch.ones(3, dtype=torch.float64)
ROW = jnp.arange(3.0)


def an_input(x):
    x[0].add_(1.0)
    return x.sum()


def a_tensor_that_it_holds(x):
    HOLDER.add_(1.0)
    return (x * HOLDER).sum()


class Scaling(torch.autograd.Function):
    """Its backward writes to the cotangent that it is given."""

    @staticmethod
    def forward(ctx, x):
        return 2.0 * x

    @staticmethod
    def backward(ctx, g):
        return g.mul_(2.0)


CHANGED = {
    "an input": (an_input, "leave its inputs as they are, got input argument 0 changed in place"),
    "a held tensor": (a_tensor_that_it_holds, "leave the tensors that it holds as they are"),
    "a cotangent": (Scaling.apply, "leave its inputs as they are, got input tangent 0 changed"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_what_is_changed_in_place_is_refused(name):
    f, text = CHANGED[name]
    like = (lambda x: x) if name == "a cotangent" else lambda x: jax.ShapeDtypeStruct((), x.dtype)
    bridged = bridge.to_jax(f, lane="native", outputs=like, derivatives="autograd")
    pulled = lambda x: jax.vjp(bridged, x)[1](jnp.ones(3))
    with pytest.raises(ValueError, match=text):
        jax.jit(pulled if name == "a cotangent" else bridged).lower(ROW)


@pytest.mark.parametrize("f", [no_grad, detached])
def test_forces_of_an_energy_that_is_cut_off_are_no_zeros(f):
    """The same error as eagerly, before anything is compiled."""
    numbers = np.array([1, 1])
    told = []
    for around in (lambda f: f, jax.jit):
        energy = bridge.potential(f, atomic_numbers=numbers, gradients="autograd", lane="native")
        with pytest.raises(
            NotImplementedError, match="energy that torch can differentiate"
        ) as found:
            around(jax.grad(energy))(X)
        told.append(str(found.value).splitlines()[0])
    assert told[0] == told[1]


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, cotangent):
        return 3 * ctx.saved_tensors[0] ** 2 * cotangent


def test_second_derivatives_of_a_function_that_has_one_are_no_zeros():
    f = bridge.to_jax(
        lambda x: Once.apply(x).sum(), lane="native", derivatives="autograd", batched="sequential"
    )
    with pytest.raises(
        NotImplementedError, match="backward of Once that can be differentiated again"
    ):
        jax.block_until_ready(jax.jit(jax.hessian(f))(X))


def test_a_package_that_is_dropped_while_another_program_takes_it():
    """The last program of a package goes just before a new one is lowered."""
    for _ in range(3):
        program = jax.jit(lambda x: 2 * ENERGY(x))
        close(program(X), 2 * CUBIC.jax(X))
        del program
        gc.collect()


def test_dtypes_that_the_handler_knows():
    """All that both sides have, but for floats of eight bits."""
    assert set(native.KNOWN) == {name for name in DTYPES if not name.startswith("float8")}
