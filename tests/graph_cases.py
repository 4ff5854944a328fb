"""A graph potential in torch that counts its calls, the same by brute force in JAX, and structures
for both."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import torch

from bridge.card import Card
from torch_side.potentials.geometry import edge_vectors
from torch_side.potentials.model import Model, Wrapped

CUTOFF = 3.0
CARD = Card(
    outputs={"energy", "position_gradients", "cell_gradients", "node_energies", "hessian"},
    cutoff=CUTOFF,
    neighbor_list="own",
    elements=range(1, 90),
    batches=True,
)
seen = []  # shapes of the inputs of each call


def embedded(inputs):
    """Square roots of sums over neighbours (so not a sum of pairs), each weighted by its
    element."""
    seen.append({name: tuple(x.shape) for name, x in inputs.items()})
    r2 = edge_vectors(inputs).square().sum(-1)
    numbers = inputs["atomic_numbers"].to(r2.dtype)
    i, j = inputs["edge_index"]
    density = (1 - r2 / CUTOFF**2) ** 3 * numbers[j]
    nodes = -torch.sqrt(1 + r2.new_zeros(len(numbers)).index_add(0, i, density)) + numbers / 100
    return {
        "energy": r2.new_zeros(len(inputs["cell"])).index_add(0, inputs["batch"], nodes),
        "node_energies": nodes,
    }


class Embedded(Model):
    """The same as a Model; its weight is a parameter."""

    def __init__(self, weight=1.0, card=CARD):
        super().__init__()
        self.weight, self.card = torch.nn.Parameter(torch.tensor(weight, dtype=torch.float64)), card

    def energies(self, inputs):
        return {name: self.weight * x for name, x in embedded(inputs).items()}


MODEL = Wrapped(embedded, CARD, "autograd")
IMAGES = np.array(list(itertools.product(range(-3, 4), repeat=3)))


def brute(pos, cell, numbers, pbc=(True, True, True)):
    """The energy of one system in JAX, over all images."""
    images = jnp.asarray(IMAGES[(np.array(pbc) | (IMAGES == 0)).all(-1)])
    r2 = ((pos[None, :, None] - pos[:, None, None] + images @ cell) ** 2).sum(-1)
    here = jnp.eye(len(pos), dtype=bool)[:, :, None] & (images == 0).all(-1)
    inside = ~here & (r2 < CUTOFF**2)
    density = (jnp.where(inside, 1 - jnp.where(inside, r2, 0) / CUTOFF**2, 0) ** 3).sum(
        -1
    ) @ jnp.asarray(numbers)
    return (-jnp.sqrt(1 + density) + jnp.asarray(numbers) / 100).sum()


rng = np.random.default_rng(0)
NUMBERS = np.array([1, 6, 8, 14])
CELL = 4 * np.eye(3) + 0.4 * rng.normal(size=(3, 3))
POS = rng.permutation(IMAGES[[171, 172, 178, 220]] * 0.5 + 0.04 * rng.normal(size=(4, 3))) @ CELL
R, H = jnp.asarray(POS), jnp.asarray(CELL)


def system(pos=POS, cell=CELL, numbers=NUMBERS, pbc=(True, True, True), dtype=torch.float64):
    """The contract's dict for one system."""
    return {
        "pos": torch.tensor(pos, dtype=dtype), "cell": torch.tensor(cell, dtype=dtype)[None], "pbc": torch.tensor([pbc]),
        "batch": torch.zeros(len(pos), dtype=torch.int64), "atomic_numbers": torch.tensor(numbers),
    }  # fmt: skip


def joined(*systems):
    """Several systems as one batch."""
    out = {name: torch.cat([s[name] for s in systems]) for name in systems[0]}
    return out | {"batch": torch.cat([s["batch"] + k for k, s in enumerate(systems)])}


def close(got, want, tolerance=1e-11):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)
