"""A local potential in JAX and the same in torch, written to files once for all tests of them."""

import functools
import tempfile
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jax_side.montecarlo import files as local_files
from jax_side.montecarlo.local import LocalPotential
from torch_side.montecarlo import files as torch_files

rng = np.random.default_rng(3)
TABLE, W, V, U = (rng.normal(size=s) for s in ((20, 4), (4, 5), (3, 5), 9))
CUTOFF, POS, NUMBERS = 3.0, 3 * rng.random((5, 3)), np.array([1, 6, 8, 6, 1])
PAIRS = np.array([(i, j) for i in range(5) for j in range(5) if i != j]).T


@functools.cache
def potential(dtype="float64"):
    t, w, v, u = (x.astype(dtype) for x in (TABLE, W, V, U))

    def edge(a, b, r):
        d2 = (r**2).sum(-1, keepdims=True)
        return jnp.tanh(a @ w + 2 * (b @ w) + r @ v) * (1 - d2 / CUTOFF**2) ** 3

    return LocalPotential(
        lambda Z: jnp.asarray(t)[Z],
        edge,
        lambda a, s: jnp.tanh(jnp.concatenate([a, s], 1)) @ u,
        CUTOFF,
    )


class Net(torch.nn.Module):
    """The same, in torch."""

    def __init__(self, dtype="float64"):
        super().__init__()
        self.t, self.w, self.v, self.u = (
            torch.nn.Parameter(torch.tensor(x.astype(dtype))) for x in (TABLE, W, V, U)
        )

    def init(self, Z):
        return self.t[Z]

    def edge(self, a, b, r):
        d2 = (r**2).sum(-1, keepdim=True)
        return torch.tanh(a @ self.w + 2 * (b @ self.w) + r @ self.v) * (1 - d2 / CUTOFF**2) ** 3

    def readout(self, a, s):
        return torch.tanh(torch.cat([a, s], 1)) @ self.u


class Init(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, Z):
        return self.net.init(Z)


def graph(pos, numbers=NUMBERS):
    cell, none = jnp.zeros((1, 3, 3), pos.dtype), jnp.zeros((PAIRS.shape[1], 3), int)
    rest = {
        "pbc": jnp.zeros((1, 3), bool),
        "batch": jnp.zeros(len(pos), int),
        "edge_index": jnp.asarray(PAIRS),
        "cell_offsets": none,
    }
    return {"pos": pos, "cell": cell, "atomic_numbers": jnp.asarray(numbers), **rest}


def energy(local):
    return lambda pos: local(graph(pos))["energy"][0]


@functools.cache
def wanted(kind, dtype="float64"):
    transform = {
        "energy": lambda f: f,
        "gradient": jax.grad,
        "hessian": lambda f: jax.jacrev(jax.jacrev(f)),
    }[kind]
    return jax.jit(transform(energy(potential(dtype))))(jnp.asarray(POS, dtype))


FOLDER = tempfile.TemporaryDirectory()


@functools.cache
def saved(dtype="float64", order=1, platforms=None):
    path = Path(FOLDER.name) / f"{dtype}-{order}-{platforms and len(platforms)}.zip"
    local_files.save(
        path, potential(dtype), precision=dtype[-2:] + "bit", order=order, platforms=platforms
    )
    return path


@functools.cache
def torch_saved(dtype="float64"):
    path, net = Path(FOLDER.name) / f"torch-{dtype}.zip", Net(dtype)
    torch_files.save(path, Init(net), net.edge, net.readout, CUTOFF, precision=dtype[-2:] + "bit")
    return path


def entries(path):
    with zipfile.ZipFile(path) as z:
        return {n: z.read(n) for n in z.namelist()}
