"""A new shape at each call: what it costs to trace and compile, or to find that nothing need be
compiled."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import torch

import bridge
from benchmarks.bench import WRAP
from benchmarks.harness import Case, Rival, late
from benchmarks.jax_in_torch import interop, jax2torch
from benchmarks.tables.calls import called_back

SHAPES = 1000


def energies(xp):
    return lambda x: (xp.sin(x) ** 2).sum()


def through(call, make):
    """n calls, each with an array of a length that was never seen; from the start again after
    SHAPES of them.

    Arrays are made before: torch and XLA would have to be asked for each."""
    arrays = itertools.cycle([make(np.ones(n + 1, "float32")) for n in range(SHAPES)])

    def run(n):
        for x in itertools.islice(arrays, n):
            jax.block_until_ready(call(x))

    return run


def torch_in_jax() -> dict:
    f = energies(torch)

    def wrapped(package):
        # its outputs' types are those of one example, so that each shape is a function of its own
        each = lambda x: jax.jit(package.torch2jax(f, torch.ones(x.shape)))(x)
        return through(each, jnp.asarray)

    def by_hand(x):
        scalar = lambda t: f(t).reshape(1).expand(t.shape).contiguous()
        return jax.jit(called_back(scalar, x))(x)

    ways = {
        "bare torch": lambda: through(f, torch.tensor),
        "pure jax, jitted": lambda: through(jax.jit(energies(jnp)), jnp.asarray),
        "bridge, eager": lambda: through(bridge.to_jax(f), jnp.asarray),
        "bridge, jitted": lambda: through(jax.jit(bridge.to_jax(f)), jnp.asarray),
        "host, jitted": lambda: through(jax.jit(bridge.to_jax(f, lane="host")), jnp.asarray),
        "pure_callback by hand": lambda: through(by_hand, jnp.asarray),
    }
    found = {name: late(make) for name, make in ways.items()}
    return found | {f"{WRAP}, jitted": Rival("wrap_torch2jax", "wrap-torch2jax", wrapped)}


def jax_in_torch() -> dict:
    f, masked = energies(jnp), bridge.to_torch(energies(jnp), buckets={"x": "N"})
    wrapped = lambda p: p.WrappedJaxFunction(jax.jit(lambda _, x: f(x)), ())
    return {
        "pure torch": through(energies(torch), torch.tensor),
        "pure jax, jitted": through(jax.jit(f), jnp.asarray),
        "bridge": late(lambda: through(bridge.to_torch(f), torch.tensor)),
        "bridge, buckets=": late(lambda: through(masked, torch.tensor)),
        "torch_jax_interop": interop(lambda p: through(wrapped(p), torch.tensor)),
        "jax2torch": jax2torch(lambda p: through(p.jax2torch(jax.jit(f)), torch.tensor)),
    }


def cases(quick: bool) -> dict[str, Case]:
    each = dict(unit="ms", calls=SHAPES // 10, seconds=1.5, rounds=9)
    pure = ("pure jax, jitted",)
    return {
        "torch in JAX": Case(torch_in_jax, ("bare torch", *pure), pure, **each),
        "JAX in torch": Case(jax_in_torch, ("pure torch", *pure), pure, **each),
    }
