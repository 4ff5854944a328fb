"""What a bridged call costs on the CPU, beside its controls and the native ways, in one process:
`python -m benchmarks.bench`.

Here torch in JAX; JAX in torch, with the packages that offer the same, is in
benchmarks/jax_in_torch.py, potentials in benchmarks/potentials.py.

Prints one JSON line for each case, then a table. The variants of a group take turns, round by
round, so that the drift of a busy machine hits them all: `us` is the quickest round, a ratio is the
median over rounds of this / that in the same round. Only ratios travel from one machine to another.
Nothing is written unless --out FILE is given.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import torch
from tqdm import tqdm

import benchmarks.potentials  # noqa: F401  (it adds its groups)
import bridge
from benchmarks.harness import (
    GROUPS,
    Rival,
    bare,
    goals,
    group,
    in_loop,
    one_by_one,
    ratio,
    rows_of,
    table,
)
from benchmarks.jax_in_torch import ATOMS, soft_spheres  # and its groups
from benchmarks.machine import installed

ADDED_US, OF_HOST = 5.0, 0.1
PACKAGES = (
    "jax",
    "torch",
    "jax-tvm-ffi",
    "apache-tvm-ffi",
    "wrap-torch2jax",
    "torch-jax-interop",
    "jax2torch",
)
COPY, OUT, WRAP, CALLBACK = (
    "jax-tvm-ffi, copy_",
    "buffer_callback, out=",
    "wrap-torch2jax",
    "native pure_callback",
)
HOST = "torch's first operations in a callback run on cold caches: two views and a copy, unchecked, take 1.38; the guards 0.15"


def lanes(run, f, *args, wrap=lambda f: f):
    return {lane: run(wrap(bridge.to_jax(f, lane=lane)), *args) for lane in ("ffi", "host")}


def silent(f):
    """f without a result, as both want it."""

    def call(*buffers):
        f(*buffers)

    return call


def tvm(name: str, f, like):
    """A JAX function by jax-tvm-ffi alone: f(*inputs, output) on torch tensors over XLA's
    buffers."""
    import jax_tvm_ffi
    import tvm_ffi

    handler = tvm_ffi.convert_func(silent(f), tensor_cls=torch.Tensor)
    jax_tvm_ffi.register_ffi_target(
        name, handler, ["args", "rets"], platform="cpu", pass_owned_tensor=True
    )
    return jax.ffi.ffi_call(name, like)


def native(x) -> dict:
    """What JAX itself offers for a call into Python, and a torch user writes for it by hand;
    nothing is checked."""
    from jax.experimental.buffer_callback import buffer_callback

    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return {
        CALLBACK: lambda x: jax.pure_callback(lambda x: x, like, x),
        "native buffer_callback": buffer_callback(lambda ctx, out, x: None, like),
        "native jax-tvm-ffi": tvm("bench_noop", lambda *_: None, like),
        COPY: tvm("bench_copy", lambda x, out: out.copy_(x), like),
    }


def wrapped(f, example, run, *args, wrap=lambda f: f):
    """f by wrap-torch2jax, which finds the outputs' types by a call on an example."""
    return Rival(
        "wrap_torch2jax",
        "wrap-torch2jax",
        lambda package: run(wrap(package.torch2jax(f, example)), *args),
    )


def acceptance(times: dict) -> list[tuple]:
    """At most 5 us over the bare Python call, and at most a tenth of the host lane."""
    added, part = min(times["ffi"]) - min(times["bare torch"]), ratio(times["ffi"], times["host"])
    return [("us that ffi adds to bare torch", added, ADDED_US), ("ffi / host", part, OF_HOST)]


@group(
    "bare torch",
    "host",
    COPY,
    judge=lambda times: (
        acceptance(times)
        + goals(("ffi", COPY, 2.2), ("ffi", WRAP, 1.0), ("host", CALLBACK, 1.4, HOST))(times)
    ),
)
def empty():
    """The identity of 64 float32 in a fori_loop."""
    x, identity = jnp.ones(64), lambda x: x
    control = {
        "bare torch": bare(identity, torch.ones(64)),
        "empty jax loop": in_loop(jax.lax.optimization_barrier, x),
    }
    rivals = {name: in_loop(f, x) for name, f in native(x).items()} | {
        WRAP: wrapped(identity, torch.ones(64), in_loop, x)
    }
    return {**control, **lanes(in_loop, identity, x), **rivals}


@group("bare torch", "host", OUT, judge=goals(("ffi", OUT, 1.0), ("ffi", WRAP, 1.0)))
def sin64():
    """One small torch op in a fori_loop."""
    from jax.experimental.buffer_callback import buffer_callback

    x, example = jnp.ones(64), torch.ones(64)
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    into = lambda ctx, out, x: torch.sin(torch.from_dlpack(x), out=torch.from_dlpack(out))
    by_hand = {
        OUT: buffer_callback(silent(into), like),
        "jax-tvm-ffi, copy_(sin)": tvm("bench_sin", lambda x, out: out.copy_(torch.sin(x)), like),
    }
    rivals = {name: in_loop(f, x) for name, f in by_hand.items()} | {
        WRAP: wrapped(torch.sin, example, in_loop, x)
    }
    return {
        "bare torch": bare(torch.sin, example),
        "pure jax": in_loop(jnp.sin, x),
        **lanes(in_loop, torch.sin, x),
        **rivals,
    }


@group(
    "bare torch",
    "jitted jax",
    judge=goals(("eager bridge", "jitted jax", 6.0), ("jitted bridge", f"jitted {WRAP}", 1.0)),
)
def eager():
    """sin of 64, called from Python outside jit; and the price of a jit dispatch."""
    x, sin = jnp.ones(64), bridge.to_jax(torch.sin)
    calls = {
        "jitted jax": jax.jit(jnp.sin),
        "eager jax": jnp.sin,
        "eager bridge": sin,
        "jitted bridge": jax.jit(sin),
    }
    rival = {f"jitted {WRAP}": wrapped(torch.sin, torch.ones(64), one_by_one, x, wrap=jax.jit)}
    return {
        "bare torch": bare(torch.sin, torch.ones(64)),
        **{name: one_by_one(f, x) for name, f in calls.items()},
        **rival,
    }


def and_grad(f):
    return jax.jit(jax.value_and_grad(f))


@group("torch.autograd", "pure jax", share=0.1, judge=goals(("ffi", WRAP, 1.0)))
def energy_and_forces():
    """value_and_grad of a scalar energy of 64 atoms: one forward and one backward."""
    x = jnp.asarray(np.random.default_rng(0).uniform(0, 8, (ATOMS, 3)), "float32")
    energy, t = soft_spheres(torch.eye(ATOMS)), bridge.to_torch(x, copy=True).requires_grad_()
    return {
        "torch.autograd": bare(lambda: torch.autograd.grad(energy(t), t)),
        "torch.func": bare(torch.func.grad_and_value(energy), t.detach()),
        "pure jax": one_by_one(and_grad(soft_spheres(jnp.eye(ATOMS))), x),
        **lanes(one_by_one, energy, x, wrap=and_grad),
        "ffi, derivatives='autograd'": one_by_one(
            and_grad(bridge.to_jax(energy, derivatives="autograd")), x
        ),
        WRAP: wrapped(energy, t.detach(), one_by_one, x, wrap=and_grad),
    }


def perceptron(*last):
    return torch.nn.Sequential(
        torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 16), *last
    )


def mse(apply, x, y):
    return and_grad(lambda p: jnp.mean((apply(p, x) - y) ** 2))


@group("torch.autograd", "pure jax", share=0.1)
def training_step():
    """Loss (in JAX) and weight gradients of a small network; the loss needs the outputs: two
    forwards, one backward."""
    net = perceptron()
    x, y = jax.random.normal(jax.random.key(0), (2, 64, 16))
    tx, ty = bridge.to_torch([x, y])
    dense = lambda p, x: jnp.tanh(x @ p["0.weight"].T + p["0.bias"]) @ p["2.weight"].T + p["2.bias"]
    variants = {
        "torch.autograd": bare(
            lambda: torch.autograd.grad(((net(tx) - ty) ** 2).mean(), tuple(net.parameters()))
        ),
        "pure jax": one_by_one(mse(dense, x, y), bridge.functional(net)[1]),
    }
    for lane in ("ffi", "host"):
        apply, params = bridge.functional(net, lane=lane)
        variants[lane] = one_by_one(mse(apply, x, y), params)
    return variants


@group("jax.dlpack")
def tensor_to_jax():
    return {
        "jax.dlpack": bare(jax.dlpack.from_dlpack, torch.ones(64)),
        "bridge.to_jax": bare(bridge.to_jax, torch.ones(64)),
    }


@group("torch.from_dlpack")
def array_to_torch():
    return {
        "torch.from_dlpack": bare(torch.from_dlpack, jnp.ones(64)),
        "bridge.to_torch": bare(bridge.to_torch, jnp.ones(64)),
    }


class Counted(torch.autograd.Function):
    """The identity; counts how often a model is run forward and backward."""

    passes = {"forward": 0, "backward": 0}
    setup_context = staticmethod(lambda ctx, inputs, output: None)
    forward = staticmethod(lambda x: Counted.add("forward", x.clone()))
    backward = staticmethod(lambda ctx, g: Counted.add("backward", g))

    @classmethod
    def add(cls, which, x):
        cls.passes[which] += 1
        return x


def pass_counts() -> list[dict]:
    """How often torch runs the model for one value_and_grad: of a scalar, and of outputs that a
    loss in JAX needs."""
    last = torch.nn.Module()
    last.forward = Counted.apply
    apply, params = bridge.functional(perceptron(last))
    energy, x = (
        bridge.to_jax(lambda x: soft_spheres(torch.eye(ATOMS))(Counted.apply(x))),
        jnp.ones((64, 16)),
    )
    rows = []
    for name, step, arg in (
        ("energy_and_forces", and_grad(energy), x[:, :3]),
        ("training_step", mse(apply, x, x), params),
    ):
        jax.block_until_ready(step(arg))
        Counted.passes.update(forward=0, backward=0)
        jax.block_until_ready(step(arg))
        rows.append({"name": f"passes/{name}", **Counted.passes})
    return rows


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=__doc__)
    parser.add_argument(
        "--calls", type=int, default=2000, help="calls in one round of a cheap case"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="torch's threads; a second pool beside XLA's would measure their fight",
    )
    parser.add_argument("--only", choices=GROUPS, nargs="*", default=list(GROUPS))
    parser.add_argument("--out", help="write the JSON lines here, too")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    packages = {p: installed(p) for p in PACKAGES}
    rows = [
        {
            "name": "environment",
            **packages,
            "cpus": os.cpu_count(),
            "load": os.getloadavg()[0],
            **vars(args),
        }
    ]
    with jax.default_device(jax.devices("cpu")[0]):
        for name in tqdm(args.only, disable=None):
            rows += rows_of(name, args.calls, args.rounds)
        rows += pass_counts()
    text = "\n".join(map(json.dumps, rows))
    print(text, "", table(rows[1:]), sep="\n")
    if args.out:
        with open(args.out, "w") as f:
            f.write(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
