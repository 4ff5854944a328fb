"""Energy, forces and stress of real models: from JAX by each lane, beside the model in torch alone,
under torch.compile, in its own calculator of ASE and in torch-sim.

NaCl, float32, neighbours found anew in each call. A MACE of random weights stands for its family,
since none is trained here."""

from __future__ import annotations

import ase.calculators.calculator
import jax
import jax.numpy as jnp
import torch

import bridge
from benchmarks.engines import dict_of, room, salt
from benchmarks.harness import Case, Rival, bare, late, one_by_one
from bridge.contract import ENERGY_AND_GRADIENTS
from jax_side.potentials import strain as jax_strain
from tests import model_cases
from torch_side.potentials import strain

SIZES = {8: 1, 64: 2, 216: 3, 1000: 5}  # atoms: cells along each axis
ROUNDS = {8: 9, 64: 9, 216: 5, 1000: 3}
# (model, its calculator, the sizes at which it is compiled: each package takes minutes)
FAMILIES = {
    "SevenNet-0": (model_cases.sevennet, model_cases.sevennet_calculator, (8, 64)),
    "MACE, small": (model_cases.mace, model_cases.mace_calculator, (8, 64, 216, 1000)),
    "CHGNet": (model_cases.chgnet, model_cases.chgnet_calculator, (64,)),
}


def in_torch(model, inputs):
    """Energy, forces and stress of one structure, all by torch."""

    def call():
        out = model(inputs)
        found = (out[key] for key in ENERGY_AND_GRADIENTS[1:])
        virial = strain.virial(*found, *(inputs[key] for key in ("pos", "batch", "cell")))
        return out["energy"], strain.stress(virial, inputs["cell"], inputs["pbc"])

    return bare(call)


def compiled(model):
    """The same model with its energies under torch.compile; torch.autograd compiles the backward
    with them."""
    other = model.asking()
    other.energies = torch.compile(model.energies, dynamic=False)
    return other


def in_jax(model, atoms, lane, find=None):
    """Energy, forces and stress, jitted, with the neighbours of `find` or of torch."""
    pos, cell = (jnp.asarray(x, jnp.float32) for x in (atoms.positions, atoms.cell.array))
    energy = bridge.potential(model, atomic_numbers=atoms.numbers, pbc=True, lane=lane)
    batch, pbc = jnp.zeros(len(pos), jnp.int32), jnp.ones((1, 3), bool)

    @jax.jit
    def call(r, h):
        edges = find(r, h) if find else {}
        e, (g, G) = jax.value_and_grad(energy, (0, 1))(r, h, **edges)
        virial = jax_strain.virial(g, G[None], r, batch, h[None])
        return e, -g, jax_strain.stress(virial, h[None], pbc)

    return one_by_one(call, pos, cell)


def native(model, atoms):
    """The compiled model, and its neighbours by bridge.edges in the same program."""
    cutoff = model.card.cutoff
    return in_jax(model, atoms, "native", bridge.edges(cutoff, room(atoms, cutoff)))


def under_ase(calculator, atoms):
    wanted, changes = ["energy", "forces", "stress"], ase.calculators.calculator.all_changes
    return bare(lambda: calculator.calculate(atoms, wanted, changes))


def in_torch_sim(model, atoms):
    import torch_sim

    state = torch_sim.io.atoms_to_state([atoms], torch.device("cpu"), torch.float32)
    return bare(lambda: model(state))


def torch_sims_own(name, atoms) -> Rival:
    """What torch-sim has of itself for a model."""

    def sevennet(package):
        return in_torch_sim(package.SevenNetModel("7net-0", device="cpu"), atoms)

    def mace(package):
        network, device = model_cases.mace_network(), torch.device("cpu")
        return in_torch_sim(package.MaceModel(network, device=device, dtype=torch.float32), atoms)

    def chgnet(package):
        raise NotImplementedError("torch-sim has no CHGNet")

    make, module = {
        "SevenNet-0": (sevennet, "sevenn.torchsim"),
        "MACE, small": (mace, "torch_sim.models.mace"),
        "CHGNet": (chgnet, "torch_sim"),
    }[name]
    return Rival(module, "torch-sim-atomistic", make)


def variants(name, size) -> dict:
    make, calculator, packages = FAMILIES[name]
    model, atoms = make(torch.float32), salt(SIZES[size])
    atoms.rattle(0.02, seed=0)  # as in benchmarks.engines: the same package serves both tables
    inputs = dict_of(atoms, torch.float32)
    found = {
        "bare torch": in_torch(model, inputs),
        "torch.compile": late(lambda: in_torch(compiled(model), inputs), True),
        "ASE, its own calculator": late(lambda: under_ase(calculator(), atoms)),
        "torch-sim, its own model": torch_sims_own(name, atoms),
        "ffi": in_jax(model, atoms, "ffi"),
        "host": in_jax(model, atoms, "host"),
    }
    if size > 64 or (name == "CHGNet" and size != 64):
        del found["torch.compile"]
    if size in packages:
        found["native"] = late(lambda: native(model, atoms), True)
    return found


def cases(quick: bool) -> dict[str, Case]:
    sizes = [8] if quick else SIZES
    return {
        f"{name}, {size} atoms": Case(
            lambda name=name, size=size: variants(name, size),
            ("bare torch",),
            unit="ms",
            rounds=ROUNDS[size],
        )
        for name in FAMILIES
        for size in sizes
    }
