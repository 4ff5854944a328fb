"""The checks of benchmarks.gpu_check, each for itself: what must hold on a CUDA GPU and can't be
seen on a CPU.

A check takes a JAX device and a dict for the values that it finds, and raises where something is
wrong. Those that make sense there run on a CPU device, too: tests/demos/test_gpu_check.py tries
their code so.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch

import bridge
from benchmarks.harness import bare, in_loop, measure, one_by_one
from torch_side.calls import buffers, export, running

# the slow kernel is a chain of STEPS matrix products; calls of the memory check
SIDE, STEPS, CALLS = (
    4096,
    50,
    10_000,
)
SMALL = 32, 3, 40  # of the same, in a rehearsal on a CPU


class Check(NamedTuple):
    """A check, the seconds that it may take, and whether it can't run on a CPU at all."""

    run: Callable[[Any, dict], None]
    limit: int
    card: bool


CHECKS: dict[str, Check] = {}


def check(limit: int = 40, card: bool = False):
    """Lists a function among the CHECKS."""

    def listed(f):
        CHECKS[f.__name__] = Check(f, limit, card)
        return f

    return listed


def expect(true, text: str) -> None:
    if not true:
        raise AssertionError(text)


def same(got, want, text: str) -> None:
    wrong = int((np.asarray(got) != np.asarray(want)).sum())
    expect(not wrong, f"{text}: {wrong} of {np.size(want)} values are wrong")


def place(gpu) -> torch.device:
    return torch.device("cpu" if gpu.platform == "cpu" else f"cuda:{gpu.local_hardware_id}")


@contextlib.contextmanager
def spied(**spies):
    """TorchFunction.<name> calls the spy first, with the same arguments; that of `run` sees calls
    by a `runner`, too."""
    names = {*spies, "runner"} if "run" in spies else {*spies}
    originals = {name: getattr(export.TorchFunction, name) for name in names}

    def both(spy, original):
        return staticmethod(lambda *args: (spy(*args), original(*args))[1])

    def runner(fn, ready):
        return both(functools.partial(spies["run"], fn), originals["runner"](fn, ready)).__func__

    try:
        for name, spy in spies.items():
            setattr(export.TorchFunction, name, both(spy, originals[name]))
        if "runner" in names:
            export.TorchFunction.runner = staticmethod(runner)
        yield
    finally:
        for name, original in originals.items():
            setattr(export.TorchFunction, name, staticmethod(original))


@check()
def pointers(gpu, values):
    """Inside an ffi call torch's memory is JAX's, for inputs and outputs; arrays cross without a
    copy, both ways."""
    x = jax.device_put(jnp.arange(1024.0), gpu)
    with spied(
        run=lambda fn, given, into: values.update(
            given=given[0].data_ptr(), into=into[0].data_ptr()
        )
    ):
        y = jax.jit(bridge.to_jax(lambda x: x * 2, lane="ffi"))(x).block_until_ready()
    t = torch.arange(1024.0, device=place(gpu))
    values |= {"x": x.unsafe_buffer_pointer(), "y": y.unsafe_buffer_pointer(), "t": t.data_ptr()}
    values |= {
        "to_torch(x)": bridge.to_torch(x).data_ptr(),
        "to_jax(t)": bridge.to_jax(t).unsafe_buffer_pointer(),
    }
    expect(values["given"] == values["x"], "the input was copied")
    expect(values["into"] == values["y"], "the output was copied")
    expect(
        values["to_torch(x)"] == values["x"] and values["to_jax(t)"] == values["t"],
        "an array was copied",
    )


@check(card=True)
def stream(gpu, values):
    """Inside a call torch's current stream is the one that XLA gives, and not the default one."""
    inside = lambda fn, given, into: values.update(
        inside=torch.cuda.current_stream(given[0].device).cuda_stream
    )
    with spied(
        run=inside,
        on_stream=lambda stream, tensors: values.update(given=stream, type=type(stream).__name__),
    ):
        jax.jit(bridge.to_jax(torch.sin, lane="ffi"))(
            jax.device_put(jnp.ones(8), gpu)
        ).block_until_ready()
    values["outside"] = torch.cuda.current_stream().cuda_stream
    expect(values["inside"] == values["given"], "torch is on another stream than XLA's")
    expect(
        values["given"] not in (0, torch.cuda.default_stream().cuda_stream),
        "XLA gave the default stream",
    )
    expect(
        values["outside"] == torch.cuda.default_stream().cuda_stream,
        "the caller's stream was left changed",
    )


def problem(gpu):
    """x of small integers, a cyclic permutation p, and what STEPS products with p make of x: exact
    in any precision."""
    x = np.arange(SIDE * SIDE).reshape(SIDE, SIDE) % 61
    p = np.roll(np.eye(SIDE), 1, axis=1)
    return *(jax.device_put(jnp.asarray(a, "float32"), gpu) for a in (x, p)), np.roll(
        x, STEPS, axis=1
    )


def chain(x, p):
    """Slow, in torch or JAX."""
    for _ in range(STEPS):
        x = x @ p
    return x


slow = jax.jit(chain)


@check()
def order_jit(gpu, values):
    """Slow kernels of XLA before, between and after bridged calls, in one program and in several:
    no synchronisation."""
    x, p, rolled = problem(gpu)
    f = bridge.to_jax(lambda x: x + 1, lane="ffi")
    step, jitted = jax.jit(lambda x: f(chain(f(chain(x, p)), p))), jax.jit(f)
    want = np.roll(rolled, STEPS, axis=1) + 2
    step(x).block_until_ready(), slow(jitted(x), p).block_until_ready()
    start = time.perf_counter()
    one = step(x)
    values["dispatch_ms"] = (time.perf_counter() - start) * 1e3
    one.block_until_ready()
    values["total_ms"] = (time.perf_counter() - start) * 1e3
    several = jitted(slow(jitted(slow(x, p)), p))
    same(one, want, "one program"), same(several, want, "several programs")
    expect(
        gpu.platform == "cpu" or values["dispatch_ms"] < values["total_ms"] / 2,
        "the host waited for the kernels",
    )


@check()
def order_eager(gpu, values):
    """Eager calls: a slow torch kernel still reads its input when JAX frees that memory and uses it
    again."""
    x, p, rolled = problem(gpu)
    f = bridge.to_jax(chain)
    for k in range(5):
        y = f(x + k, p)
        junk = [jnp.full_like(x, -1) for _ in range(4)]
        same(y, rolled + k, f"round {k}")
        del junk


@check()
def order_arrays(gpu, values):
    """to_jax and to_torch of arrays still being computed, and memory that is freed while the other
    side reads it."""
    x, p, rolled = problem(gpu)
    tp = bridge.to_torch(p)
    same((bridge.to_torch(slow(x, p)) + 1).cpu(), rolled + 1, "to_torch of a running computation")
    same(
        bridge.to_jax(chain(bridge.to_torch(x), tp)) + 1,
        rolled + 1,
        "to_jax of a running computation",
    )
    doubled = bridge.to_torch(lambda x: 2 * x)
    for k in range(5):
        # the result of a JAX function is freed here, too
        t = chain(doubled(bridge.to_torch(x) + k), tp)
        junk = [jnp.full_like(x, -1) for _ in range(4)]
        same(t.cpu(), 2 * (rolled + k), "the result of a JAX function, freed while torch reads it")
        y = slow(bridge.to_jax(bridge.to_torch(x) + k), p)
        junk += [torch.full((SIDE, SIDE), -1.0, device=place(gpu)) for _ in range(4)]
        same(y, rolled + k, "a tensor freed while XLA reads it")
        t = chain(bridge.to_torch(x + k), tp)
        junk += [jnp.full_like(x, -1) for _ in range(4)]
        same(t.cpu(), rolled + k, "an array freed while torch reads it")


@check(card=True)
def order_weights(gpu, values):
    """Weights that torch's own stream is still writing when the call begins, and writes again when
    it has been dispatched."""
    x, p, _ = problem(gpu)
    net, tp = torch.nn.Linear(SIDE, SIDE, bias=False, device=place(gpu)), bridge.to_torch(p)
    f = jax.jit(bridge.to_jax(net))
    f(x).block_until_ready()
    with torch.no_grad():
        for k in range(5):
            net.weight.copy_(chain(torch.eye(SIDE, device=place(gpu)), tp))
            y = f(slow(x, p))
            net.weight.zero_()
            same(y, x, f"round {k}")


@check()
def jax_in_torch(gpu, values):
    """A JAX function in torch: its input is still being written when it is called, its result read
    at once, and the input written again behind the call; value and gradient, and the host waits for
    nothing."""
    x, p, rolled = problem(gpu)
    tx, tp = bridge.to_torch(x), bridge.to_torch(p)
    f = bridge.to_torch(lambda x, p: 2 * chain(x, p))
    f(tx, tp)
    for k in range(5):
        given = chain(tx, tp) + k
        start = time.perf_counter()
        y = f(given, tp) + 1
        values["dispatch_ms"] = (time.perf_counter() - start) * 1e3
        given.zero_()
        same(y.cpu(), 2 * (np.roll(rolled, STEPS, axis=1) + k) + 1, f"round {k}")
        values["total_ms"] = (time.perf_counter() - start) * 1e3
    leaf = torch.zeros_like(tx, requires_grad=True)
    f(leaf, tp).backward(chain(tx, tp))
    same(leaf.grad.cpu(), 2 * np.asarray(x), "the gradient")  # backwards through the permutation
    expect(
        gpu.platform == "cpu" or values["dispatch_ms"] < values["total_ms"] / 2,
        "the host waited for the kernels",
    )


def energy(x):
    """Soft spheres, for torch tensors and JAX arrays."""
    eye = torch.eye(len(x), device=x.device) if isinstance(x, torch.Tensor) else jnp.eye(len(x))
    r2 = ((x[:, None] - x[None]) ** 2).sum(-1) + eye
    return ((1 - eye) / r2**3).sum() / 2


@check()
def numbers(gpu, values):
    """Values, gradients, Hessian-vector products and batches: both lanes on the GPU, the CPU and
    pure JAX agree."""
    x = jnp.asarray(np.random.default_rng(0).uniform(0, 6, (2, 16, 3)), "float32")
    sums = lambda f: (
        lambda x: (
            f(x[0]),
            jax.grad(f)(x[0]),
            jax.jvp(jax.grad(f), (x[0],), (x[1],))[1],
            jax.vmap(jax.grad(f))(x),
        )
    )
    cpu = jax.devices("cpu")[0]
    lanes = {
        f"{d.platform} {lane}": (bridge.to_jax(energy, lane=lane), d)
        for d in {cpu, gpu}
        for lane in ("ffi", "host")
    }
    want = jax.jit(sums(energy))(jax.device_put(x, cpu))
    for name, (f, device) in lanes.items():
        got = jax.jit(sums(f))(jax.device_put(x, device))
        values[name] = [
            float(np.abs(np.asarray(g) - w).max() / np.abs(w).max())
            for g, w in zip(got, map(np.asarray, want), strict=True)
        ]
    expect(max(map(max, values.values())) < 1e-4, "relative differences above 1e-4")


@check(card=True)
def graph(gpu, values):
    """XLA replays a CUDA graph over a torch call that allocates nothing, registered with
    allow_cuda_graph.

    While XLA captures, its stream can't wait for another (buffers.on_stream would make it)."""
    import jax_tvm_ffi
    import tvm_ffi

    n, calls, work = 1024, [], torch.ones(1024, device=place(gpu))

    def enter(stream, x, y):
        calls.append(stream)
        with (
            torch.no_grad(),
            torch.cuda.stream(buffers.external(stream, x.device.index))
            if x.is_cuda
            else contextlib.nullcontext(),
        ):
            torch.add(torch.mul(x, 0.5, out=work), 1.0, out=y)

    # loads the kernels before any capture
    torch.add(torch.mul(work, 0.5, out=work), 1.0, out=torch.empty_like(work))
    handler, platform = (
        tvm_ffi.convert_func(enter, tensor_cls=torch.Tensor),
        "cpu" if gpu.platform == "cpu" else "gpu",
    )
    spec = ["ctx.stream", "args", "rets"]
    jax_tvm_ffi.register_ffi_target(
        "gpu_check_graph",
        handler,
        spec,
        platform=platform,
        allow_cuda_graph=True,
        pass_owned_tensor=True,
    )
    bridged = jax.ffi.ffi_call("gpu_check_graph", jax.ShapeDtypeStruct((n,), jnp.float32))
    loop = lambda f: jax.jit(
        lambda x: jax.lax.fori_loop(0, STEPS, lambda _, x: f(jnp.cos(f(jnp.sin(f(x))))), x)
    )
    x = jax.device_put(jnp.linspace(0, 1, n, dtype="float32"), gpu)
    got, want = loop(bridged)(x), loop(lambda x: x * 0.5 + 1)(x)
    values |= {
        "difference": float(jnp.abs(got - want).max()),
        "calls": 3 * STEPS,
        "python_calls": len(calls),
        "streams": len(set(calls)),
    }
    expect(values["difference"] < 1e-5, "a replay gave wrong values")
    expect(
        values["python_calls"] < values["calls"] / 2,
        "XLA called Python at every step: no graph was replayed",
    )


@check(card=True)
def memory(gpu, values):
    """Both allocators, side by side, before and after 10^4 energies with forces."""
    f, suspected = jax.jit(jax.value_and_grad(bridge.to_jax(energy, lane="ffi"))), []
    accuse, running._accuse = running._accuse, lambda *args: (suspected.append(1), accuse(*args))[1]
    x = jax.device_put(jnp.linspace(0, 9, 192, dtype="float32").reshape(64, 3), gpu)
    for when, count in ("before", 100), ("after", CALLS):
        one_by_one(f, x)(count)
        ours, theirs = gpu.memory_stats(), torch.cuda.memory_stats(place(gpu))
        values[f"jax {when}"] = {
            k: ours[k] for k in ("bytes_in_use", "peak_bytes_in_use", "bytes_limit") if k in ours
        }
        values[f"torch {when}"] = {
            k: theirs[k] for k in ("allocated_bytes.all.current", "reserved_bytes.all.current")
        }
    values["calls suspected of keeping an input"] = len(suspected)
    running._accuse = accuse
    for side, key in ("jax", "bytes_in_use"), ("torch", "allocated_bytes.all.current"):
        expect(
            values[f"{side} after"][key] - values[f"{side} before"][key] < 100 * CALLS,
            f"the memory of {side} grew",
        )


@check()
def timing(gpu, values):
    """An empty call in a fori_loop, on both lanes, beside the bare Python call and an empty loop;
    microseconds, best of 7."""
    x, t, identity = (
        jax.device_put(jnp.ones(8, "float32"), gpu),
        torch.ones(8, device=place(gpu)),
        lambda x: x,
    )
    variants = {
        "bare torch": bare(identity, t),
        "empty jax loop": in_loop(jax.lax.optimization_barrier, x),
    }
    variants |= {lane: in_loop(bridge.to_jax(identity, lane=lane), x) for lane in ("ffi", "host")}
    values |= {name: min(us) for name, us in measure(variants, max(1, CALLS // 20), 7).items()}


@check(limit=150)
def native(gpu, values):
    """A compiled model gives eager torch's energy and gradient in a loop, with what XLA computes
    before and after each call, and NaN for positions that are not finite."""
    from bridge.card import Card
    from torch_side.potentials.model import Wrapped

    def pairs(x):
        r = x["pos"][x["edge_index"][1]] - x["pos"][x["edge_index"][0]]
        each = torch.exp(-r.square().sum(-1))
        centre = x["batch"][x["edge_index"][0]]
        return each.new_zeros(len(x["cell"])).index_add(0, centre, each)

    n = 64
    card = Card(cutoff=3.0, neighbor_list="given", batches=True)
    i, j = np.nonzero(~np.eye(n, dtype=bool))
    edges = {
        "edge_index": jnp.asarray(np.stack([i, j]), jnp.int32),
        "cell_offsets": jnp.zeros((len(i), 3), jnp.int32),
    }
    numbers = np.ones(n, np.int32)
    lattice = np.stack(np.meshgrid(*[range(4)] * 3), -1).reshape(-1, 3)
    x = jax.device_put(jnp.asarray(lattice + 0.01 * np.sin(lattice * 7.0), jnp.float32), gpu)
    found = {}
    for lane in ("ffi", "native"):
        energy = bridge.potential(
            Wrapped(pairs, card, "autograd"), atomic_numbers=numbers, lane=lane, **edges
        )
        step = lambda _, r: jnp.sin(jnp.arcsin(r / 9) * 1.0) * 9 - 1e-3 * jax.grad(energy)(r)
        loop = jax.jit(lambda x: jax.lax.fori_loop(0, 20, step, x))
        start = time.perf_counter()
        found[lane] = np.asarray(loop(x))
        values[f"first {lane} s"] = time.perf_counter() - start
        run = one_by_one(loop, x)
        values[f"us a step, {lane}"] = min(measure({lane: run}, 5, 5)[lane]) / 20
        calls: list = []
        jax.clear_caches()  # programs know how they call
        with spied(run=lambda *args, calls=calls: calls.append(1)):
            jax.block_until_ready(jax.jit(lambda x: jax.lax.fori_loop(0, 20, step, x))(x))
        values[f"Python calls in 20 steps, {lane}"] = len(calls)
        broken = x.at[3, 1].set(jnp.nan)
        if lane == "native" and gpu.platform != "cpu":
            values["energy of nan"] = float(jax.jit(energy)(broken))
            expect(np.isnan(values["energy of nan"]), "a wrong input gave a plausible energy")
    values["difference"] = float(np.abs(found["ffi"] - found["native"]).max())
    counts = [values[f"Python calls in 20 steps, {lane}"] for lane in found]
    expect(counts == [20, 0], f"{counts} calls of Python on the ffi lane and on the native one")
    expect(values["difference"] < 1e-4, "the native lane gave other positions than the ffi lane")
