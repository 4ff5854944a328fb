"""Local potentials as twins in NumPy, JAX and torch, systems, and energies by brute force over all
images, in NumPy and float64."""

import itertools
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import torch

import bridge
from jax_side.montecarlo.local import LocalPotential

CUTOFF = 3.0


def known(**options):
    """Those options that this version of XLA has: they come and go."""

    def has(option, value):
        try:
            jax.jit(lambda x: x, compiler_options={option: value})(0.0)
        except jax.errors.JaxRuntimeError as error:
            assert "No such compile option" in str(error), error
            return False
        return True

    return {option: value for option, value in options.items() if has(option, value)}


# Compiles four times faster.
quick = partial(
    jax.jit,
    compiler_options=known(xla_backend_optimization_level=0, xla_cpu_use_fusion_emitters=False),
)
_rng = np.random.default_rng(6)
TABLE, W, V = _rng.normal(size=(20, 4)), _rng.normal(size=(4, 4)), _rng.normal(size=4)


def functions(xp, array):
    """(init, edge, readout) of one library; `array` makes its arrays. Neither the edge nor the
    readout is symmetric, linear or bounded."""
    table, w, v = array(TABLE), array(W), array(V)

    def edge(a, b, r):
        d2 = (r**2).sum(-1)[:, None]
        return xp.tanh(a @ w + b + r[:, :1] * 0.3 + d2 * 0.1) * (1 - d2 / CUTOFF**2) ** 3

    return lambda Z: table[Z], edge, lambda a, s: xp.tanh(a + s) @ v + (s**2).sum(-1) * 0.1


REFERENCE = functions(np, np.asarray)


@cache
def potential(bridged=(False, False, False), dtype="float64"):
    """A LocalPotential of those three, each of JAX, or of torch where `bridged`; one object, so
    that its programs are shared."""
    of_jax = functions(jnp, lambda x: jnp.asarray(x, dtype))
    of_torch = map(
        bridge.to_jax, functions(torch, lambda x: torch.tensor(x, dtype=getattr(torch, dtype)))
    )
    return LocalPotential(
        *(t if yes else j for j, t, yes in zip(of_jax, of_torch, bridged)), CUTOFF
    )


def pairs(pos, cell, numbers, pbc):
    """Indices i, j and images of every pair below the cutoff, by looking at all."""
    inverse = np.linalg.pinv(cell)
    most = [
        int(CUTOFF * np.linalg.norm(inverse[:, a]) + np.ptp(pos @ inverse[:, a])) + 2
        if p and len(pos)
        else 0
        for a, p in enumerate(pbc)
    ]
    images = np.array(list(itertools.product(*(range(-m, m + 1) for m in most))))
    r = pos[None, :, None] - pos[:, None, None] + images @ cell
    itself = np.eye(len(pos), dtype=bool)[:, :, None] & (images == 0).all(-1)
    present = (numbers[:, None] > 0) & (numbers > 0)
    i, j, m = np.nonzero(((r**2).sum(-1) < CUTOFF**2) & ~itself & present[:, :, None])
    return i, j, images[m]


def brute(pos, cell, numbers, pbc):
    """Energies of atoms (N,), in NumPy."""
    pos, cell, numbers = (
        np.asarray(pos, np.float64),
        np.asarray(cell, np.float64),
        np.asarray(numbers),
    )
    (init, edge, readout), (i, j, images) = REFERENCE, pairs(pos, cell, numbers, pbc)
    nodes, sums = init(numbers), np.zeros((len(pos), 4))
    np.add.at(sums, i, edge(nodes[i], nodes[j], pos[j] - pos[i] + images @ cell))
    return np.where(numbers > 0, readout(nodes, sums), 0)


def differentiable(graph):
    """Energy (pos, cell) of JAX for the pairs that the graph has now."""
    numbers, (init, edge, readout) = graph["atomic_numbers"], functions(jnp, jnp.asarray)
    i, j, images = pairs(*(np.asarray(graph[k]) for k in ("pos", "cell", "atomic_numbers", "pbc")))

    def energy(pos, cell):
        nodes = init(numbers)
        messages = edge(nodes[i], nodes[j], pos[j] - pos[i] + images @ cell)
        return jnp.where(
            numbers > 0, readout(nodes, jax.ops.segment_sum(messages, i, len(pos))), 0
        ).sum()

    return energy


# rows of the cell, pbc, atoms that are present; open axes have zeros, or something that nobody
# looks at
CELLS = {
    "triclinic": ([[7.2, 0, 0], [2.9, 6.8, 0], [-1.8, 2.3, 7.1]], (1, 1, 1), 12),
    "wide": ([[13.0, 0, 0], [1.1, 12.5, 0], [0.4, -0.7, 9.9]], (1, 1, 1), 12),
    "small": ([[1.4, 0, 0], [0.3, 1.3, 0], [-0.2, 0.4, 1.45]], (1, 1, 1), 2),
    "flat": ([[1.4, 0, 0], [0.3, 7.0, 0], [-0.2, 0.4, 11.0]], (1, 1, 1), 6),
    "slab": ([[5.0, 0.5, 0], [1.0, 2.8, 1.1], [0, 0, 0]], (1, 1, 0), 8),
    "wire": ([[0, 0, 0], [1.0, 2.8, 1.1], [9, 9, 9]], (0, 1, 0), 8),
    "open": ([[0, 0, 0]] * 3, (0, 0, 0), 11),
    "one": ([[0, 0, 0]] * 3, (0, 0, 0), 1),
    "none": ([[4.0, 0, 0], [0, 4, 0], [0, 0, 4]], (1, 1, 1), 0),
}


def system(name, seed=0, dtype="float64", atoms=12):
    """A graph of CELLS: atoms anywhere near, in any image; the rest of `atoms` are absent, anywhere
    among them."""
    rng, (cell, pbc, present) = np.random.default_rng(seed), CELLS[name]
    pos = rng.uniform(-1, 9, size=(atoms, 3)) + rng.integers(-2, 3, size=(atoms, 3)) @ (
        np.array(cell) * np.array(pbc)[:, None]
    )
    numbers = np.where(rng.permutation(atoms) < present, rng.integers(1, 20, size=atoms), 0)
    return {
        "pos": jnp.asarray(pos, dtype),
        "atomic_numbers": jnp.asarray(numbers),
        "cell": jnp.asarray(cell, dtype),
        "pbc": np.array(pbc, bool),
    }


def arrays(graph):
    """pos, cell, atomic numbers, pbc, as `brute` takes them."""
    return tuple(np.asarray(graph[k]) for k in ("pos", "cell", "atomic_numbers", "pbc"))


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def close(got, wanted, rtol=1e-10):
    np.testing.assert_allclose(got, wanted, rtol=rtol, atol=rtol)
