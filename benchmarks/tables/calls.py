"""What a call of torch in JAX costs: the lanes beside the packages and the ways by hand that offer
the same; forward and value_and_grad."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import torch

import bridge
from benchmarks import bench
from benchmarks.bench import CALLBACK, COPY, OUT, WRAP, and_grad, tvm, wrapped
from benchmarks.harness import Case, bare, in_loop, late, one_by_one
from benchmarks.jax_in_torch import ATOMS, positions, soft_spheres

HAND = {  # the ways of benchmarks.bench, whose names are not to be taken for the native lane's
    CALLBACK: "pure_callback by hand",
    "native buffer_callback": "buffer_callback that does nothing",
    "native jax-tvm-ffi": "jax-tvm-ffi that does nothing",
}
NOTHING = ("bare torch", "empty jax loop", *list(HAND.values())[1:])  # they carry nothing over


def native(run, f, *args, wrap=lambda f: f):
    return {"native": late(lambda: run(wrap(bridge.to_jax(f, lane="native")), *args), True)}


def called_back(f, x):
    """A function of arrays by jax.pure_callback."""
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return lambda x: jax.pure_callback(lambda x: f(torch.tensor(np.asarray(x))).numpy(), like, x)


def empty():
    found = {HAND.get(name, name): run for name, run in bench.empty().items()}
    return found | native(in_loop, lambda x: x, jnp.ones(64))


def sine():
    x = jnp.ones(64)
    return (
        bench.sin64()
        | native(in_loop, torch.sin, x)
        | {HAND[CALLBACK]: in_loop(called_back(torch.sin, x), x)}
    )


def alone(energy):
    """(E,) of a tensor."""
    return lambda x: (energy(x),)


def with_gradient(energy):
    """(E, dE/dx) of a tensor, by torch.autograd."""

    def both(x):
        x = x.detach().requires_grad_()
        e = energy(x)
        return e.detach(), *torch.autograd.grad(e, x)

    return both


def differentiable(evaluate):
    """A JAX function of what gives (E, dE/dx), as one writes it by hand."""
    energy = jax.custom_vjp(lambda x: evaluate(x)[0])
    energy.defvjp(evaluate, lambda g, tangent: (tangent * g,))
    return energy


def by_hand(f, x, like) -> dict:
    """Three ways for the outputs of f(tensor), of the types `like`, by one call into Python;
    nothing is checked."""
    from jax.experimental.buffer_callback import buffer_callback

    def back(x):
        return tuple(t.numpy() for t in f(torch.tensor(np.asarray(x))))

    def into(x, *out):
        for buffer, found in zip(out, f(x), strict=True):
            buffer.copy_(found)

    def buffers(_, out, x):
        into(torch.from_dlpack(x), *map(torch.from_dlpack, out))

    return {
        "pure_callback by hand": lambda x: jax.pure_callback(back, like, x),
        "buffer_callback by hand": lambda x: buffer_callback(buffers, like)(x),
        "jax-tvm-ffi by hand": tvm(f"bench_{len(like)}", into, like),
    }


def of_atoms(derived: bool):
    """The energy of 64 atoms, all pairs, jitted; or with its gradient."""
    x, energy = jnp.asarray(positions()), soft_spheres(torch.eye(ATOMS))
    t, wrap = torch.tensor(positions()), and_grad if derived else jax.jit
    f = (with_gradient if derived else alone)(energy)
    like = jax.ShapeDtypeStruct((), x.dtype), jax.ShapeDtypeStruct(x.shape, x.dtype)
    hands = by_hand(f, x, like[: 1 + derived])
    finish = differentiable if derived else lambda way: lambda x: way(x)[0]
    ways = {name: late(lambda w=w: one_by_one(wrap(finish(w)), x)) for name, w in hands.items()}
    return {
        "bare torch": bare(f, t),
        "pure jax": one_by_one(wrap(soft_spheres(jnp.eye(ATOMS))), x),
        **bench.lanes(one_by_one, energy, x, wrap=wrap),
        **native(one_by_one, energy, x, wrap=wrap),
        **ways,
        WRAP: wrapped(energy, t, one_by_one, x, wrap=wrap),
    }


def cases(quick: bool) -> dict[str, Case]:
    pure = ("pure jax",)
    return {
        "an empty call in a loop": Case(
            empty, ("bare torch", COPY, HAND[CALLBACK]), NOTHING, calls=4000
        ),
        "sin of 64 numbers in a loop": Case(sine, ("bare torch", OUT), pure, calls=4000),
        "sin of 64 numbers from Python": Case(
            bench.eager, ("bare torch", "jitted jax"), ("jitted jax", "eager jax")
        ),
        "energy of 64 atoms": Case(lambda: of_atoms(False), ("bare torch",), pure),
        "energy and gradient of 64 atoms": Case(lambda: of_atoms(True), ("bare torch",), pure),
        "a training step of a small network": Case(bench.training_step, ("torch.autograd",), pure),
    }
