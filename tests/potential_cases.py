"""JAX potentials of three kinds, a triclinic and perturbed crystal, and what both look like in JAX
and in torch."""

import itertools
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax_md import energy as jax_md_energy
from jax_md import space

import bridge
from bridge.card import Card
from bridge.contract import GRADIENTS
from jax_side.engines import jax_md as engine
from jax_side.models.nequip import NequIP
from jax_side.potentials.strain import with_gradients
from torch_side.potentials.neighbors import neighbor_list

RNG = np.random.default_rng(0)
CELL = np.diag([6.0, 6.3, 5.8]) + 0.5 * RNG.uniform(-1, 1, (3, 3))
FRACTIONAL = np.array(list(itertools.product(range(2), repeat=3))) / 2 + 0.04 * RNG.normal(
    size=(8, 3)
)
IMAGES = jnp.array(list(itertools.product((-1, 0, 1), repeat=3)), float)
CUTOFF = 3.5
MORSE = dict(sigma=2.75, epsilon=0.5, alpha=1.25, r_onset=2.5, r_cutoff=2.875)  # exact in float32


def crystal(n_systems=1, dtype=torch.float64):
    """A triclinic, perturbed crystal; several: at several volumes."""
    cells = [1.02**s * CELL for s in range(n_systems)]
    return {
        "pos": torch.tensor(np.concatenate([FRACTIONAL @ c for c in cells]), dtype=dtype),
        "cell": torch.tensor(np.stack(cells), dtype=dtype),
        "pbc": torch.ones(n_systems, 3, dtype=torch.bool),
        "batch": torch.arange(n_systems).repeat_interleave(8),
        "atomic_numbers": torch.tensor([29, 13] * 4 * n_systems),
    }


def lattice(cell, n=1):
    """One atom in a cell, repeated n times along each axis."""
    sites = torch.tensor(list(itertools.product(range(n), repeat=3)), dtype=torch.float64) @ cell
    pbc, batch = torch.ones(1, 3, dtype=torch.bool), torch.zeros(n**3, dtype=torch.int64)
    return {
        "pos": sites,
        "cell": n * cell[None],
        "pbc": pbc,
        "batch": batch,
        "atomic_numbers": torch.full((n**3,), 29),
    }


def pair(params, inputs):
    """Gaussians over 27 images, any number of systems."""
    pos, cell, batch = inputs["pos"], inputs["cell"], inputs["batch"]
    r = pos[None, :, None] - pos[:, None, None] + (IMAGES @ cell)[batch][:, None]
    each = jnp.exp(-params["a"] * (r**2).sum(-1)).sum(-1) * (batch[:, None] == batch)
    return params["e"] * jax.ops.segment_sum(each.sum(-1), batch, num_segments=len(cell))


def bonds(params, inputs):
    """A smooth pair potential over the edges, any number of systems; unused slots and long edges
    add nothing."""
    pos, cell, batch, (i, j) = inputs["pos"], inputs["cell"], inputs["batch"], inputs["edge_index"]
    used = i < len(pos)
    i, j = jnp.where(used, i, 0), jnp.where(used, j, 0)
    r = (
        pos[j]
        - pos[i]
        + jnp.einsum("ea,eab->eb", inputs["cell_offsets"].astype(pos.dtype), cell[batch[i]])
    )
    each = jnp.where(used, jnp.maximum(1 - (r**2).sum(-1) / CUTOFF**2, 0) ** 3, 0) * jnp.cos(
        params["a"] * (r**2).sum(-1)
    )
    nodes = params["e"] * jax.ops.segment_sum(each, i, num_segments=len(pos))
    return {
        "energy": jax.ops.segment_sum(nodes, batch, num_segments=len(cell)),
        "node_energies": nodes,
    }


def morse():
    displacement, _ = space.periodic_general(jnp.asarray(CELL.T), fractional_coordinates=True)
    return jax_md_energy.morse_pair(displacement, **MORSE)


PARAMS = {"a": jnp.array(0.3), "e": jnp.array(1.7)}


@cache
def trainable(name):
    """(apply, params)"""
    small = dict(hidden="4x0e + 2x1o", radial=4, neighbors=8, dtype="float64")
    return {"pair": (pair, PARAMS), "bonds": (bonds, PARAMS)}.get(name) or NequIP(
        [13, 29], CUTOFF, **small
    )


@cache
def potentials(name):
    """(JAX energy of one dict, the module)"""
    if name.startswith("jax-md"):
        energy = engine.model(morse(), name.split()[1], cutoff=MORSE["r_cutoff"])
        return energy, bridge.torch_potential(energy, gradients="autodiff")
    apply, params = trainable(name)
    cutoff = None if name == "pair" else CUTOFF
    return partial(apply, params), bridge.torch_potential(
        apply, params, gradients="autodiff", cutoff=cutoff
    ).requires_grad_(False)


def total(energy, inputs):
    """The sum of energies that a JAX model gives, alone or in a dict."""
    out = energy(inputs)
    return (out["energy"] if isinstance(out, dict) else out).sum()


def in_jax(inputs):
    """The same in JAX, edges included."""
    edges = neighbor_list(*(inputs[k] for k in ("pos", "cell", "pbc")), CUTOFF, inputs["batch"])
    return {
        k: jnp.asarray(x.detach().numpy())
        for k, x in (inputs | dict(zip(("edge_index", "cell_offsets"), edges))).items()
    }


def close(got, want, tolerance=1e-10):
    got, want = (np.asarray(x.detach() if isinstance(x, torch.Tensor) else x) for x in (got, want))
    assert got.shape == want.shape and abs(got - want).max() <= tolerance * abs(want).max(), (
        abs(got - want).max() / abs(want).max()
    )


def plain_morse(inputs):
    """jax-md's function of the distance, on minimum images by the plain formula."""
    pos, cell = inputs["pos"], inputs["cell"][0]
    s = (pos[:, None] - pos) @ jnp.linalg.inv(cell)
    r2 = ((pos[:, None] - pos - jax.lax.stop_gradient(jnp.round(s)) @ cell) ** 2).sum(-1) + jnp.eye(
        len(pos)
    )
    f = jax_md_energy.multiplicative_isotropic_cutoff(
        jax_md_energy.morse, MORSE["r_onset"], MORSE["r_cutoff"]
    )
    return {
        "energy": 0.5
        * (
            f(jnp.sqrt(r2), *(MORSE[k] for k in ("sigma", "epsilon", "alpha")))
            * (1 - jnp.eye(len(pos)))
        ).sum()[None]
    }


def check_outputs(name, n_systems, tolerance=1e-10):
    """The module gives what JAX gives."""
    (energy, module), inputs = potentials(name), crystal(n_systems)
    out, want = module(inputs), jax.jit(with_gradients(energy))(in_jax(inputs))
    assert (
        set(out) == set(want)
        and {"energy", *GRADIENTS.values()} <= set(out)
        and not any(x.requires_grad for x in out.values())
    )
    for key, x in out.items():
        close(x, want[key], tolerance)
    assert min(abs(np.asarray(want[k])).max() for k in ("energy", *GRADIENTS.values())) > 1e-3


def check_gradients(name, h=1e-4):
    """g and G are those of finite differences."""
    module, inputs = potentials(name)[1], crystal()
    out = module(inputs)
    for key, gradient in GRADIENTS.items():
        steps = h * torch.eye(inputs[key].numel(), dtype=torch.float64)[::3].reshape(
            -1, *inputs[key].shape
        )
        found = [
            sum(s * module(inputs | {key: inputs[key] + s * d})["energy"][0] for s in (1, -1))
            / (2 * h)
            for d in steps
        ]
        close(torch.stack(found), out[gradient].flatten()[::3], 1e-6)


def check_autograd(module, inputs):
    """g and G are those of torch.autograd. (what the module gives)"""
    leaves = {k: inputs[k].clone().requires_grad_() for k in GRADIENTS}
    out = module(inputs | leaves)
    for found, gradient in zip(
        torch.autograd.grad(3 * out["energy"].sum(), leaves.values()), GRADIENTS.values()
    ):
        close(found, 3 * out[gradient])
    return out


@cache
def second_derivatives(energy):
    """Of a JAX energy in positions and cell."""
    fixed = in_jax(crystal())
    gradient = jax.grad(lambda pos, cell: total(energy, fixed | {"pos": pos, "cell": cell}), (0, 1))
    return jax.jit(jax.jacrev(gradient, (0, 1)))(fixed["pos"], fixed["cell"])


def check_second_derivatives(name, reference, names=("pos", "cell")):
    """By double backward and torch.func, those that JAX gives of the reference."""
    module, inputs = potentials(name)[1], crystal()
    xs, want = (
        tuple(inputs[n] for n in names),
        [row[: len(names)] for row in second_derivatives(reference)[: len(names)]],
    )
    inputs |= {
        k: torch.tensor(np.asarray(in_jax(inputs)[k])) for k in ("edge_index", "cell_offsets")
    }
    f = lambda *xs: module(inputs | dict(zip(names, xs)))["energy"].sum()
    for got, expected in zip(
        jax.tree.leaves(torch.autograd.functional.hessian(f, xs)),
        jax.tree.leaves(want),
        strict=True,
    ):
        close(got, expected, 1e-9)
    for hessian in (torch.func.hessian(f), torch.func.jacfwd(torch.func.jacfwd(f))):
        close(hessian(*xs), want[0][0], 1e-9)


def check_training(name):
    """What the module gives, and the gradient of a loss on energies, forces and cell gradients in
    all there is, are those of pure JAX."""
    apply, params = trainable(name)
    card = (
        Card(batches=True)
        if name == "pair"
        else Card(cutoff=CUTOFF, neighbor_list="own", batches=True)
    )
    module, inputs = (
        bridge.torch_potential(apply, params, gradients="autodiff", cutoff=card.cutoff, card=card),
        crystal(2),
    )

    def loss(out):
        return out["energy"].sum() + (out["position_gradients"] ** 2).sum() + (
            out["cell_gradients"] ** 2
        ).sum(), out

    leaves = {k: inputs[k].clone().requires_grad_() for k in GRADIENTS}
    before, out = loss(module(inputs | leaves))
    before.backward()
    fixed = in_jax(inputs)
    in_all = jax.grad(
        lambda p, pos, cell: loss(
            with_gradients(partial(apply, p))(fixed | {"pos": pos, "cell": cell})
        ),
        (0, 1, 2),
        has_aux=True,
    )
    want, outputs = jax.jit(in_all)(params, fixed["pos"], fixed["cell"])
    for key in outputs | out:
        close(out[key], outputs[key])
    found = [*jax.tree.leaves(module.model.pytree()), *leaves.values()]
    assert len(found) > 3
    for t, g in zip(found, jax.tree.leaves(want), strict=True):
        close(t.grad, g, 1e-9)
    torch.optim.Adam(module.parameters(), 1e-3).step()
    assert loss(module(inputs | leaves))[0] < before and module.compilations == 2


class Counted:
    """A model beside a pure_callback that counts its evaluations; XLA never merges two of
    those."""

    def __init__(self, model):
        self.model, self.calls = model, 0

    def _count(self, *_):
        self.calls += 1
        return np.zeros(())

    def __call__(self, inputs):
        args = inputs["pos"], inputs["cell"]
        zero = jax.pure_callback(
            self._count, jax.ShapeDtypeStruct((), jnp.float64), *args, vmap_method="sequential"
        )
        return jax.tree.map(lambda x: x + zero, self.model(inputs))
