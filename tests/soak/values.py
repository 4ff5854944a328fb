"""Functions with closed forms, in torch and in JAX; what to call them with, and what must come of
it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import torch

from bridge.card import Card
from bridge.testing.comparing import EPS
from torch_side.calls.arrays import DTYPES

FLOATS = ("float32", "float64", "float16", "bfloat16")
WIDE = ("float32", "float64")  # in which a second derivative is worth comparing
COMPLEX = ("complex64", "complex128")
ALL = tuple(DTYPES)  # those that can cross
SIZES = range(1, 33)
ATOMS = 4
CARD = Card(batches=True)


class Sine(torch.nn.Module):
    """w sum(sin x); `meanwhile(x)` is what else happens in a call."""

    def __init__(self, weight: float, meanwhile=None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(weight, dtype=torch.float64))
        self.meanwhile = meanwhile

    def forward(self, x):
        if self.meanwhile is not None:
            self.meanwhile(x)
        return self.weight.to(x.dtype) * torch.sin(x).sum()


def sine(weight):
    """The same in JAX."""
    return lambda x: jnp.asarray(weight, x.dtype) * jnp.sin(x).sum()


SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


def mirror(x):
    """x from behind, of any dtype: as one of the same size where torch has no operation for it."""
    known = torch.uint8 if x.dtype.itemsize == 1 else SIGNED.get(x.dtype, x.dtype)
    return x.view(known).flip(0).view(x.dtype)


class Springs(torch.nn.Module):
    """w/4 sum over all pairs of atoms of |r_i - r_j|^2, as a potential of the contract."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(weight, dtype=torch.float64))

    def forward(self, inputs):
        r, batch = inputs["pos"], inputs["batch"]
        n, n_systems = torch.ones_like(r[:, 0]), len(inputs["cell"])
        per = lambda x: x.new_zeros((n_systems, *x.shape[1:])).index_add(0, batch, x)
        energy = per(n) * per((r * r).sum(-1)) - (per(r) ** 2).sum(-1)
        return {"energy": 0.5 * self.weight.to(r.dtype) * energy}


def springs(weight):
    """The same in JAX, for one system."""

    def energy(inputs):
        r = inputs["pos"]
        e = len(r) * (r * r).sum() - (r.sum(0) ** 2).sum()
        return {"energy": 0.5 * jnp.asarray(weight, r.dtype) * e[None]}

    return energy


def springs_expected(xs, w):
    """(energies, gradients) of the springs, for calls with positions (3 ATOMS,)."""
    r = xs.reshape(len(xs), -1, 3)
    total = r.sum(1, keepdims=True)
    energy = 0.5 * w * (r.shape[1] * (r * r).sum((1, 2)) - (total**2).sum((1, 2)))
    return energy, w * (r.shape[1] * r - total)


def system(n: int) -> dict[str, np.ndarray]:
    """One open system of n atoms, but for its positions and its cell."""
    return {
        "pbc": np.zeros((1, 3), bool),
        "batch": np.zeros(n, np.int32),
        "atomic_numbers": np.full(n, 18, np.int32),
    }


def draw(rng: np.random.Generator, dtype: str, shape) -> np.ndarray:
    """Random values of a dtype (of ml_dtypes, where NumPy has none)."""
    kind = jnp.dtype(dtype)
    if dtype.startswith("complex"):
        return (rng.uniform(-2, 2, shape) + 1j * rng.uniform(-2, 2, shape)).astype(kind)
    if kind.kind in "iub" or kind.itemsize == 1:
        return np.frombuffer(
            (rng.integers(0, 2, shape) if dtype == "bool" else rng.integers(0, 120, shape))
            .astype(kind if kind.kind in "iub" else np.uint8)
            .tobytes(),
            kind,
        ).reshape(shape)
    return rng.uniform(-2, 2, shape).astype(kind)


def rounded(weight: float, dtype: str) -> float:
    """The weight as a function of a float dtype has it."""
    return float(np.asarray(weight, jnp.dtype(dtype))) if dtype in FLOATS else weight


def compare(got, want, dtype: str) -> None:
    """AssertionError unless both are equal, to rounding of a dtype that has some."""
    leaves = [np.asarray(x) for x in jax.tree.leaves(got)]
    wanted = want if isinstance(want, tuple) else (want,)
    assert len(leaves) == len(wanted), (len(leaves), len(wanted))
    for a, b in zip(leaves, wanted):
        assert a.shape == b.shape, (a.shape, b.shape)
        if (
            a.dtype.kind not in "fc" and a.dtype.name != "bfloat16"
        ):  # float8 too: moved, not computed
            assert a.tobytes() == np.asarray(b).astype(a.dtype).tobytes(), (dtype, "not equal")
            continue
        wide = np.complex128 if a.dtype.kind == "c" else np.float64
        off = np.abs(a.astype(wide) - b).max(initial=0.0)
        scale = 1.0 + np.abs(b).max(initial=0.0)
        limit = 8 * EPS.get(dtype, 2.3e-16) * scale
        assert off <= limit, f"{dtype}: off by {off:.3g}, allowed are {limit:.3g}"
