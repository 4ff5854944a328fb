"""What a bridged call costs, beside its controls and the native ways, in one process: `python -m benchmarks.bench`.

Prints one JSON line for each case and a table. The variants of a group take turns, round by round, so that the drift of a
busy machine hits all of them: `us` is the quickest round, `ratios` are medians over rounds of (this / that, same round).
Only ratios travel from one machine to another. Nothing is written unless --out FILE is given.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import torch
from tqdm import tqdm

import bridge

ATOMS, ADDED_US, OF_HOST = 64, 5.0, 0.1
GROUPS = {}


def group(*baselines, share=1.0):
    """Register a group: a function that gives {variant: run(n calls)}; `share` of --calls is what one round takes."""
    return lambda make: GROUPS.setdefault(make.__name__, (make, baselines, share)) and make


def in_loop(body, x):
    """n calls inside one compiled lax.fori_loop."""
    loop = jax.jit(lambda x, n: jax.lax.fori_loop(0, n, lambda _, y: body(y), x))
    return lambda n: loop(x, n).block_until_ready()


def one_by_one(f, *args):
    """n calls from Python, each waited for."""

    def run(n):
        for _ in range(n):
            jax.block_until_ready(f(*args))

    return run


def python_loop(f, *args):
    """n calls of something that waits by itself."""

    def run(n):
        for _ in range(n):
            f(*args)

    return run


def lanes(run, f, *args, wrap=lambda f: f):
    return {lane: run(wrap(bridge.to_jax(f, lane=lane)), *args) for lane in ("ffi", "host")}


def native():
    """What JAX offers by itself for a call into Python: nothing is computed, and where possible nothing is returned."""
    import jax_tvm_ffi
    import tvm_ffi
    from jax.experimental.buffer_callback import buffer_callback

    like = jax.ShapeDtypeStruct((8,), jnp.float32)
    handler = tvm_ffi.convert_func(lambda *buffers: None, tensor_cls=torch.Tensor)
    jax_tvm_ffi.register_ffi_target("bench_noop", handler, ["args", "rets"], platform="cpu", pass_owned_tensor=True)
    return {
        "native pure_callback": lambda x: jax.pure_callback(lambda x: x, like, x),
        "native buffer_callback": buffer_callback(lambda ctx, out, x: None, like),
        "native jax-tvm-ffi": jax.ffi.ffi_call("bench_noop", like),
    }


@group("bare torch", "host")
def empty():
    """The identity of 8 float32 in a fori_loop."""

    def identity(x):
        return x

    x = jnp.ones(8)
    return {
        "bare torch": python_loop(identity, torch.ones(8)),
        "empty jax loop": in_loop(jax.lax.optimization_barrier, x),
        **lanes(in_loop, identity, x),
        **{name: in_loop(f, x) for name, f in native().items()},
    }


@group("bare torch", "host")
def sin64():
    """One small torch op in a fori_loop."""
    x = jnp.ones(64)
    return {"bare torch": python_loop(torch.sin, torch.ones(64)), "pure jax": in_loop(jnp.sin, x), **lanes(in_loop, torch.sin, x)}


@group("bare torch", "jitted jax")
def eager():
    """sin of 64, called from Python outside jit; and the price of a jit dispatch."""
    x, sin = jnp.ones(64), bridge.to_jax(torch.sin)
    jitted = {"jitted jax": one_by_one(jax.jit(jnp.sin), x), "ffi under jit": one_by_one(jax.jit(sin), x)}
    return {"bare torch": python_loop(torch.sin, torch.ones(64)), "eager bridge": one_by_one(sin, x), "eager jax": one_by_one(jnp.sin, x), **jitted}


def soft_spheres(eye):
    """All-pairs energy of atoms, for torch tensors and JAX arrays alike."""

    def energy(x):
        r2 = ((x[:, None] - x[None]) ** 2).sum(-1) + eye
        return ((1 - eye) / r2**6).sum() / 2

    return energy


@group("torch.autograd", "pure jax", share=0.1)
def energy_and_forces():
    """value_and_grad of a scalar energy of 64 atoms: one forward and one backward."""
    x = np.random.default_rng(0).uniform(0, 8, (ATOMS, 3)).astype("float32")
    energy = soft_spheres(torch.eye(ATOMS))
    position = torch.tensor(x, requires_grad=True)
    grad = lambda f: jax.jit(jax.value_and_grad(f))  # noqa: E731
    func = torch.func.grad_and_value(energy)
    return {
        "torch.autograd": python_loop(lambda: torch.autograd.grad(energy(position), position)),
        "torch.func": python_loop(func, position.detach()),
        "pure jax": one_by_one(grad(soft_spheres(jnp.eye(ATOMS))), jnp.asarray(x)),
        **lanes(one_by_one, energy, jnp.asarray(x), wrap=grad),
        "ffi, derivatives='autograd'": one_by_one(grad(bridge.to_jax(energy, derivatives="autograd")), jnp.asarray(x)),
    }


class Counted(torch.autograd.Function):
    """The identity; counts how often a model is run forward and backward."""

    passes = {"forward": 0, "backward": 0}

    @staticmethod
    def forward(x):
        Counted.passes["forward"] += 1
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        Counted.passes["backward"] += 1
        return g


def passes(step, *args) -> dict:
    """Forwards and backwards of one compiled step."""
    jax.block_until_ready(step(*args))
    Counted.passes.update(forward=0, backward=0)
    jax.block_until_ready(step(*args))
    return dict(Counted.passes)


def mse(apply, x, y):
    return jax.jit(jax.value_and_grad(lambda p: jnp.mean((apply(p, x) - y) ** 2)))


def perceptron(*last):
    return torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 16), *last)


class Count(torch.nn.Module):
    def forward(self, x):
        return Counted.apply(x)


@group("torch.autograd", "pure jax", share=0.1)
def training_step():
    """Loss and weight gradients of a small network whose outputs the loss (in JAX) needs: two forwards, one backward."""
    torch.manual_seed(0)
    net = perceptron()
    x, y = jax.random.normal(jax.random.key(0), (2, 64, 16))
    tx, ty = bridge.to_torch(x), bridge.to_torch(y)
    variants = {"torch.autograd": python_loop(lambda: torch.autograd.grad(((net(tx) - ty) ** 2).mean(), tuple(net.parameters())))}
    dense = lambda p, x: jnp.tanh(x @ p["0.weight"].T + p["0.bias"]) @ p["2.weight"].T + p["2.bias"]  # noqa: E731
    variants["pure jax"] = one_by_one(mse(dense, x, y), bridge.functional(net)[1])
    for lane in ("ffi", "host"):
        apply, params = bridge.functional(net, lane=lane)
        variants[lane] = one_by_one(mse(apply, x, y), params)
    return variants


@group("jax.dlpack.from_dlpack")
def tensor_to_jax():
    t = torch.ones(64)
    return {"jax.dlpack.from_dlpack": python_loop(jax.dlpack.from_dlpack, t), "bridge.to_jax": python_loop(bridge.to_jax, t)}


@group("torch.from_dlpack")
def array_to_torch():
    x = jnp.ones(64)
    return {"torch.from_dlpack": python_loop(torch.from_dlpack, x), "bridge.to_torch": python_loop(bridge.to_torch, x)}


def measure(variants: dict, calls: int, rounds: int) -> dict[str, list[float]]:
    """Microseconds a call, for each round; the order turns round from one round to the next."""
    for run in variants.values():
        run(2)
    times = {name: [] for name in variants}
    for k in range(rounds):
        for name in list(variants)[:: -1 if k % 2 else 1]:
            start = time.perf_counter()
            variants[name](calls)
            times[name].append((time.perf_counter() - start) / calls * 1e6)
    return times


def ratio(a: list[float], b: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def records(name: str, baselines, times: dict) -> list[dict]:
    row = lambda v, t: {"us": min(t), "us_median": statistics.median(t), "ratios": {b: ratio(t, times[b]) for b in baselines if b != v}}  # noqa: E731
    return [{"name": f"{name}/{v}", **row(v, t)} for v, t in times.items()]


def acceptance(times: dict) -> list[dict]:
    """The criterion: at most 5 us over the bare Python call, and at most a tenth of the host lane."""
    added, part = min(times["ffi"]) - min(times["bare torch"]), ratio(times["ffi"], times["host"])
    rows = ("us that ffi adds to the bare Python call", added, ADDED_US), ("ffi / host", part, OF_HOST)
    return [{"name": f"acceptance/{what}", "value": v, "limit": limit, "verdict": "PASS" if v <= limit else "FAIL"} for what, v, limit in rows]


def pass_counts() -> list[dict]:
    """How often torch runs the model for one value_and_grad: a scalar output, and outputs that a loss in JAX needs."""
    energy = lambda x: soft_spheres(torch.eye(ATOMS))(Counted.apply(x))  # noqa: E731
    apply, params = bridge.functional(perceptron(Count()))
    x = jnp.linspace(0, 9, 3 * ATOMS).reshape(ATOMS, 3)
    scalar = passes(jax.jit(jax.value_and_grad(bridge.to_jax(energy))), x)
    training = passes(mse(apply, jnp.ones((64, 16)), jnp.ones((64, 16))), params)
    return [{"name": "passes/energy_and_forces", **scalar}, {"name": "passes/training_step", **training}]


def environment(args) -> dict:
    packages = {p: version(p) for p in ("jax", "torch", "jax-tvm-ffi", "apache-tvm-ffi")}
    return {"name": "environment", "python": platform.python_version(), **packages, "cpus": os.cpu_count(), "load": os.getloadavg()[0], **vars(args)}


def line(r: dict) -> str:
    """One row of the table."""
    if "us" in r:
        return f"{r['name']:48}{r['us']:11.2f}{r['us_median']:11.2f}   " + "  ".join(f"{v:.3g} x {b}" for b, v in r["ratios"].items())
    if "limit" in r:
        return f"{r['name']:48}{r['value']:11.3g}  limit {r['limit']:g}: {r['verdict']}"
    return f"{r['name']:48}{r['forward']:>11} forward, {r['backward']} backward"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=__doc__)
    parser.add_argument("--calls", type=int, default=2000, help="calls in one round of a cheap case")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="torch's threads; two pools that fight would measure the fight")
    parser.add_argument("--only", choices=GROUPS, nargs="*", default=list(GROUPS))
    parser.add_argument("--out", help="also write the JSON lines here")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    rows = [environment(args)]
    for name in tqdm(args.only, disable=None):
        make, baselines, share = GROUPS[name]
        times = measure(make(), max(1, int(args.calls * share)), args.rounds)
        rows += records(name, baselines, times) + (acceptance(times) if name == "empty" else [])
    rows += pass_counts()
    print(*map(json.dumps, rows), sep="\n")
    print(f"\n{'':48}{'us (best)':>11}{'(median)':>11}   ratios of the same round", *map(line, rows[1:]), sep="\n")
    if args.out:
        with open(args.out, "w") as f:
            print(*map(json.dumps, rows), sep="\n", file=f)
    return 0


if __name__ == "__main__":
    sys.exit(main())
