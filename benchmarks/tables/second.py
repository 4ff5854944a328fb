"""Hessians, and products of them with a vector, beside torch.autograd and torch.func."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import torch

import bridge
from benchmarks.engines import salt
from benchmarks.harness import Case, bare, late, one_by_one
from benchmarks.native import rattled, structure, with_edges
from benchmarks.potentials import CUTOFF, bound, crystal, dict_of, embedded, wide
from jax_side.potentials.second import hvp
from tests import model_cases
from torch_side.potentials.neighbors import neighbor_list

X64 = True
ROWS = "torch.autograd, row by row"
MODELS = {"MACE, small": (model_cases.mace, True), "SevenNet-0": (model_cases.sevennet, False)}


def of_torch(pos, cell):
    """The energy of a crystal as a function of positions, on the edges of `pos`."""
    x = dict_of(pos, cell)
    edges, offsets = neighbor_list(x["pos"], x["cell"], x["pbc"], CUTOFF)
    x |= {"edge_index": edges, "cell_offsets": offsets}
    return lambda p: embedded(x | {"pos": p}).sum(), x["pos"]


def hessians(repeats: int) -> dict:
    """All rows; torch's do not look for neighbours."""
    with jax.enable_x64(True):
        pos, cell = crystal(repeats)
        energy, p = of_torch(pos, cell)
        ours, r, h = bound(len(pos)), jnp.asarray(pos), jnp.asarray(cell)

        def rows():
            x = p.clone().requires_grad_()
            (g,) = torch.autograd.grad(energy(x), x, create_graph=True)
            return [torch.autograd.grad(y, x, retain_graph=True) for y in g.flatten()]

        ways = {
            "bridge, jax.hessian": jax.hessian(ours),
            "bridge, jacrev of grad": jax.jacrev(jax.grad(ours)),
        }
        return {
            ROWS: bare(rows),
            "torch.func.hessian": late(lambda: bare(torch.func.hessian(energy), p)),
            "torch.autograd.functional.hessian, vectorize": late(
                lambda: bare(lambda: torch.autograd.functional.hessian(energy, p, vectorize=True))
            ),
            **{name: wide(one_by_one(jax.jit(f), r, h)) for name, f in ways.items()},
        }


def products(repeats: int) -> dict:
    """H v of the same crystals."""
    with jax.enable_x64(True):
        pos, cell = crystal(repeats)
        energy, p = of_torch(pos, cell)
        r, h, v = jnp.asarray(pos), jnp.asarray(cell), torch.ones_like(p)

        def double():
            x = p.clone().requires_grad_()
            (g,) = torch.autograd.grad(energy(x), x, create_graph=True)
            return torch.autograd.grad((g * v).sum(), x)

        def ours(lane):
            force = jax.grad(bound(len(pos), lane=lane))
            along = lambda r, h: jax.jvp(lambda r: force(r, h), (r,), (jnp.ones_like(r),))[1]
            return wide(one_by_one(jax.jit(along), r, h))

        def pulled():
            energy = bound(len(pos), lane="ffi")
            return wide(one_by_one(jax.jit(lambda r, h: hvp(energy, r, h, jnp.ones_like(r))), r, h))

        along = lambda p: torch.func.jvp(torch.func.grad(energy), (p,), (v,))[1]
        return {
            "torch.autograd, backward twice": bare(double),
            "torch.func.jvp of grad": late(lambda: bare(along, p)),
            "ffi": ours("ffi"),
            "ffi, second.hvp": pulled(),
            "host": ours("host"),
        }


def of_model(name: str) -> dict:
    """H v of a real model of 64 atoms, on a given list."""
    make, compiles = MODELS[name]
    model = make(torch.float32)
    exact, padded = with_edges(structure(rattled(salt(2))), model.card.cutoff)
    v = torch.ones_like(exact["pos"])
    given = {k: jnp.asarray(x) for k, x in padded.items()}
    edges = {key: given[key] for key in ("edge_index", "cell_offsets")}

    def double():
        pos = exact["pos"].clone().requires_grad_()
        g = model(exact | {"pos": pos})["position_gradients"]
        return torch.autograd.grad((g * v).sum(), pos)

    def functional():
        energy = lambda p: model.energies(exact | {"pos": p})["energy"].sum()
        return bare(lambda: torch.func.jvp(torch.func.grad(energy), (exact["pos"],), (v,)))

    def ours(lane):
        energy = bridge.potential(
            model, atomic_numbers=given["atomic_numbers"], pbc=True, lane=lane, **edges
        )
        force = jax.grad(energy)
        along = lambda r, h: jax.jvp(lambda r: force(r, h), (r,), (jnp.asarray(v),))[1]
        return one_by_one(jax.jit(along), given["pos"], given["cell"][0])

    def pulled():
        energy = bridge.potential(model, atomic_numbers=given["atomic_numbers"], pbc=True, **edges)
        along = lambda r, h: hvp(energy, r, h, jnp.asarray(v))
        return one_by_one(jax.jit(along), given["pos"], given["cell"][0])

    found = {
        "torch.autograd, backward twice": bare(double),
        "torch.func.jvp of grad": late(functional),
        "ffi": late(lambda: ours("ffi")),
        "ffi, second.hvp": late(pulled),
        "host": late(lambda: ours("host")),
    }
    return found | ({"native": late(lambda: ours("native"), True)} if compiles else {})


def cases(quick: bool) -> dict[str, Case]:
    sizes = {27: 3} if quick else {27: 3, 64: 4, 125: 5}
    rows = {
        f"Hessian, {n} atoms": Case(
            lambda k=k: hessians(k), (ROWS,), unit="ms", rounds=5, seconds=0.5
        )
        for n, k in sizes.items()
    }
    twice = ("torch.autograd, backward twice",)
    rows |= {
        f"H v, {n} atoms": Case(lambda k=k: products(k), twice, unit="ms") for n, k in sizes.items()
    }
    for name in [] if quick else MODELS:
        rows[f"H v, {name}, 64 atoms"] = Case(
            lambda name=name: of_model(name), twice, unit="ms", rounds=7
        )
    return rows
