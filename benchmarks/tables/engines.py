"""Molecular dynamics and relaxation: milliseconds a step in jitted jax-md by each lane, under ASE
and in torch-sim."""

from __future__ import annotations

import ase.optimize
import jax
import jax.numpy as jnp
import torch
from jax_md import minimize, space

from benchmarks import engines
from benchmarks.engines import CASES, jax_md_energy, stepping, under_jax_md
from benchmarks.harness import Case, bare, late
from torch_side.engines import ase as ase_engine
from torch_side.engines import torch_sim as torch_engine

X64 = True
COMPILED = tuple(name for name in CASES if "216" not in name)  # each package takes minutes
RELAXED = {"SevenNet-0, 8 atoms", "SevenNet-0, 64 atoms", "pair, 256 atoms"}


def lanes(name, run) -> dict:
    """jax-md by each lane; the compiled one where its package is among COMPILED."""
    found = {f"jax-md, {lane}": late(lambda lane=lane: run(lane)) for lane in ("ffi", "host")}
    if name in COMPILED:
        found["jax-md, native"] = late(lambda: run("native"), True)
    return found


def dynamics(name) -> dict:
    """A step of NVE: the groups of benchmarks.engines, with all lanes."""
    model, atoms, dtype = engines.system(name)
    found = engines.variants(name)
    del found["jitted jax-md"]  # it is on the ffi lane
    return found | lanes(name, lambda lane: under_jax_md(model, atoms, dtype, lane))


def fire_in_jax_md(model, atoms, dtype, lane):
    """Steps of jax-md's FIRE at a fixed cell, in one jitted loop."""
    with jax.enable_x64(dtype == torch.float64):
        energy, box, real = jax_md_energy(model, atoms, dtype, lane)
        _, shift = space.periodic_general(box, fractional_coordinates=True)
        init, step = minimize.fire_descent(energy, shift)
        state = init(jnp.asarray(atoms.get_scaled_positions(), real))
        loop = jax.jit(lambda s, n: jax.lax.fori_loop(0, n, lambda _, s: step(s), s))
    return stepping(loop, state, dtype)


def fire_in_ase(calculator, atoms):
    atoms = atoms.copy()
    atoms.calc = calculator
    relaxation = ase.optimize.FIRE(atoms, logfile=None)
    return lambda n: relaxation.run(fmax=0.0, steps=n)


def fire_in_torch_sim(engine, atoms):
    import torch_sim
    from torch_sim.optimizers import fire

    init, step = fire(engine)
    state = [init(torch_sim.io.atoms_to_state([atoms], engine.device, engine.dtype))]

    def one():
        state[0] = step(state[0])

    return bare(one)


def relaxation(name) -> dict:
    model, atoms, dtype = engines.system(name)
    found = {
        "bare model": engines.bare_model(model, atoms, dtype),
        "ASE, bridge's calculator": late(
            lambda: fire_in_ase(ase_engine.calculator(model, outputs=()), atoms)
        ),
        "torch-sim, bridge's model": late(
            lambda: fire_in_torch_sim(torch_engine.model(model, compute_stress=False), atoms)
        ),
        **lanes(name, lambda lane: fire_in_jax_md(model, atoms, dtype, lane)),
    }
    if CASES[name][0] == "sevennet":
        from tests.model_cases import sevennet_calculator

        found["ASE, SevenNet's own calculator"] = late(
            lambda: fire_in_ase(sevennet_calculator(), atoms)
        )
    return found


def cases(quick: bool) -> dict[str, Case]:
    names = ["SevenNet-0, 8 atoms", "pair, 256 atoms"] if quick else CASES
    kinds = {"NVE": (dynamics, set(names)), "FIRE": (relaxation, RELAXED & set(names))}
    return {
        f"{kind}, {name}": Case(
            lambda make=make, name=name: make(name),
            ("bare model",),
            ("bare model",),
            unit="ms",
            rounds=5 if "216" in name else 9,
        )
        for kind, (make, chosen) in kinds.items()
        for name in names
        if name in chosen
    }
