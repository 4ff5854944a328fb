"""Arrays and tensors that cross, of all dtypes and layouts, dropped in any order."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import torch

import bridge
from tests.soak.values import ALL, draw

LAYOUTS = {
    "dense": lambda t: t,
    "transposed": lambda t: t.T,
    "rows": lambda t: t[1:],
    "columns": lambda t: t[:, ::2],
    "expanded": lambda t: t[:1].expand(4, -1),
}


def cross(rng: np.random.Generator) -> None:
    """A tensor to JAX and back, an array to torch and back, and what came is compared with what
    went, after the first owner is gone."""
    dtype = ALL[rng.integers(len(ALL))]
    x = draw(rng, dtype, tuple(rng.integers(1, 40, size=2)))
    array = jnp.asarray(x)
    tensor = LAYOUTS[rng.choice(list(LAYOUTS))](bridge.to_torch(array, copy=True))
    want = bits(tensor.contiguous().clone())
    copy = (None, True)[rng.integers(2)]
    there = bridge.to_jax({"x": [tensor]}, copy=copy)["x"][0]
    del tensor
    back = bridge.to_torch(there, copy=copy)
    del there
    assert bits(back.contiguous()) == want, f"{dtype} is not what it was"
    again = bridge.to_jax(bridge.to_torch(array))
    del array
    assert np.asarray(again).tobytes() == x.tobytes(), f"{dtype} is not what it was"
    assert jax.numpy.shape(again) == x.shape


def bits(t: torch.Tensor) -> bytes:
    """What a dense tensor holds."""
    return t.reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b""
