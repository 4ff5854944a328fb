"""JAX in torch: bridge.to_torch beside the packages that offer the same and an autograd.Function by
hand; forward, forward and backward, and under torch.compile."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import torch

import bridge
from benchmarks import jax_in_torch as groups
from benchmarks.harness import Case, Rival, bare, dispatched, late, then
from benchmarks.jax_in_torch import ATOMS, BARE, doubled_sine, positions, soft_spheres

JITTED = ("bare jit dispatch", "jit, waited for")
PULLED = ("jitted jax.vjp", "jitted jax.vjp, waited for")
BOTH = ("jitted value_and_grad", "jitted value_and_grad, waited for")


def compiling(functions: dict, x, derived: bool) -> dict:
    """Each function as torch.compile takes it, with one operation of torch's own before and after.

    Graph breaks are allowed."""

    def under(f):
        whole = torch.compile(lambda x: f(x * 1.0) * 2.0, dynamic=False)
        step = (lambda: torch.autograd.grad(whole(x).sum(), x)) if derived else (lambda: whole(x))
        return dispatched(step)

    found = {}
    for name, f in functions.items():
        run = then(f, under) if isinstance(f, Rival) else late(lambda f=f: under(f), True)
        found[name] = run._replace(compiles=True)
    return found


def compiled_sine(derived: bool):
    def make():
        f, x = doubled_sine(jnp), torch.tensor(positions(), requires_grad=derived)
        functions = {"pure torch": doubled_sine(torch), "bridge": bridge.to_torch(f)}
        return compiling(functions | groups.rivals(f), x, derived)

    return make


def compiled_energy():
    eye = jnp.eye(ATOMS, dtype="float32")
    f, x = soft_spheres(eye), torch.tensor(positions(), requires_grad=True)
    functions = {"pure torch": soft_spheres(torch.eye(ATOMS)), "bridge": bridge.to_torch(f)}
    return compiling(functions | groups.rivals(f), x, True)


def to_jax():
    """A tensor of 64 numbers."""
    x = torch.ones(64)
    ways = {"dlpack": jax.dlpack.from_dlpack, "bridge.to_jax": bridge.to_jax}
    rival = groups.interop(lambda package: bare(package.torch_to_jax, x))
    return {name: bare(f, x) for name, f in ways.items()} | {"torch_jax_interop": rival}


def to_torch():
    """An array of 64 numbers."""
    x = jnp.ones(64)
    ways = {"dlpack": torch.from_dlpack, "bridge.to_torch": bridge.to_torch}
    rival = groups.interop(lambda package: bare(package.jax_to_torch, x))
    return {name: bare(f, x) for name, f in ways.items()} | {"torch_jax_interop": rival}


def cases(quick: bool) -> dict[str, Case]:
    pure = ("pure torch",)
    return {
        "2 sin(x) of (64, 3), forward": Case(groups.to_torch_forward, pure, JITTED),
        "2 sin(x) of (64, 3), forward and backward": Case(
            groups.to_torch_backward, ("pure torch", BARE), PULLED
        ),
        "energy of 64 atoms, forward and backward": Case(groups.to_torch_energy, pure, BOTH),
        "a training step of a perceptron": Case(groups.to_torch_training, pure, BOTH),
        "2 sin(x) under torch.compile, forward": Case(compiled_sine(False), pure),
        "2 sin(x) under torch.compile, forward and backward": Case(compiled_sine(True), pure),
        "energy of 64 atoms under torch.compile, forward and backward": Case(compiled_energy, pure),
        "64 numbers to JAX": Case(to_jax, ("dlpack",)),
        "64 numbers to torch": Case(to_torch, ("dlpack",)),
    }
