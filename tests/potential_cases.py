"""JAX potentials of three kinds, a triclinic and perturbed crystal, and what both look like in JAX and in torch."""

import itertools
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax_md import energy as jax_md_energy
from jax_md import space

import bridge
from jax_side.engines import jax_md as engine
from jax_side.models.nequip import NequIP
from torch_side.neighbors import neighbor_list

RNG = np.random.default_rng(0)
CELL = np.diag([6.0, 6.3, 5.8]) + 0.5 * RNG.uniform(-1, 1, (3, 3))
FRACTIONAL = np.array(list(itertools.product(range(2), repeat=3))) / 2 + 0.04 * RNG.normal(size=(8, 3))
IMAGES = jnp.array(list(itertools.product((-1, 0, 1), repeat=3)), float)
CUTOFF = 3.5
MORSE = dict(sigma=2.75, epsilon=0.5, alpha=1.25, r_onset=2.5, r_cutoff=2.875)  # exact in float32


def crystal(scale=1.0, n_systems=1, dtype=torch.float64):
    """A triclinic, perturbed crystal; several: at several volumes."""
    cells = [scale * 1.02**s * CELL for s in range(n_systems)]
    return {
        "pos": torch.tensor(np.concatenate([FRACTIONAL @ c for c in cells]), dtype=dtype),
        "cell": torch.tensor(np.stack(cells), dtype=dtype),
        "pbc": torch.ones(n_systems, 3, dtype=torch.bool),
        "batch": torch.arange(n_systems).repeat_interleave(8),
        "atomic_numbers": torch.tensor([29, 13] * 4 * n_systems),
    }


def pair(params, inputs):
    """Gaussians over 27 images, any number of systems."""
    pos, cell, batch = inputs["pos"], inputs["cell"], inputs["batch"]
    r = pos[None, :, None] - pos[:, None, None] + (IMAGES @ cell)[batch][:, None]
    each = jnp.exp(-params["a"] * (r**2).sum(-1)).sum(-1) * (batch[:, None] == batch)
    return params["e"] * jax.ops.segment_sum(each.sum(-1), batch, num_segments=len(cell))


def morse():
    displacement, _ = space.periodic_general(jnp.asarray(CELL.T), fractional_coordinates=True)
    return jax_md_energy.morse_pair(displacement, **MORSE)


@cache
def nequip(hidden="4x0e + 2x1o", harmonics="1x0e + 1x1o"):
    return NequIP([13, 29], CUTOFF, hidden=hidden, harmonics=harmonics, radial=4, neighbors=8, dtype="float64")


PAIR = pair, {"a": jnp.array(0.3), "e": jnp.array(1.7)}


@cache
def potentials(name):
    """(JAX energy of one dict, the module)"""
    if name in ("pair", "nequip"):
        apply, params = PAIR if name == "pair" else nequip()
        cutoff = CUTOFF if name == "nequip" else None
        return partial(apply, params), bridge.torch_potential(apply, params, gradients="autodiff", cutoff=cutoff).requires_grad_(False)
    energy = engine.model(morse(), name.split()[1])
    return energy, bridge.torch_potential(energy, gradients="autodiff")


NAMES = "pair", "jax-md box", "jax-md perturbation", "nequip"


def in_jax(inputs):
    edges = neighbor_list(*(inputs[k] for k in ("pos", "cell", "pbc")), CUTOFF, inputs["batch"])
    return {k: jnp.asarray(x.detach().numpy()) for k, x in (inputs | dict(zip(("edge_index", "cell_offsets"), edges))).items()}


def close(got, want, tolerance=1e-10):
    got, want = (np.asarray(x.detach() if isinstance(x, torch.Tensor) else x) for x in (got, want))
    assert got.shape == want.shape and abs(got - want).max() <= tolerance * abs(want).max(), abs(got - want).max() / abs(want).max()


def plain_morse(inputs):
    """jax-md's function of the distance, on minimum images by the plain formula."""
    pos, cell = inputs["pos"], inputs["cell"][0]
    s = (pos[:, None] - pos) @ jnp.linalg.inv(cell)
    r2 = ((pos[:, None] - pos - jax.lax.stop_gradient(jnp.round(s)) @ cell) ** 2).sum(-1) + jnp.eye(len(pos))
    f = jax_md_energy.multiplicative_isotropic_cutoff(jax_md_energy.morse, MORSE["r_onset"], MORSE["r_cutoff"])
    return {"energy": 0.5 * (f(jnp.sqrt(r2), *(MORSE[k] for k in ("sigma", "epsilon", "alpha"))) * (1 - jnp.eye(len(pos)))).sum()[None]}
