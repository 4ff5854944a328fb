"""What goes wrong on every lane by the values of its inputs, its twin in JAX, and what must be left
as it was."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import bridge
from jax_side.calls import registry

LANES = ["ffi", "host", pytest.param("native", marks=pytest.mark.full)]
# jit raises the latter where the program has run before (jax 0.10.2), with the same text
AT_RUN = (jax.errors.JaxRuntimeError, ValueError)
TABLE = torch.arange(5.0, dtype=torch.float64) ** 2
GOOD, BAD = jnp.array([0.5, 1.5, 2.5, 3.5]), jnp.array([0.5, 1.5, 2.5, 7.5])


def picked(x):
    """IndexError where an element is 5 or more: in eager torch by itself, in what is compiled by the
    eager call that explains an error."""
    return TABLE[x.long().reshape(-1)].reshape(x.shape) * x


def twin(x):
    return jnp.asarray(TABLE.numpy())[x.astype(int)] * x


TEXT = "index 7 is out of bounds for dimension 0 with size 5"


def counts():
    """How many Functions the registries hold, and how many arrays live, once all that nobody can
    call is forgotten."""
    gc.collect()
    bridge.to_jax(torch.sin)
    names = ("functions", "_numbers", "_owners", "_retired")
    held = [len(getattr(registry, name)) for name in names]
    return np.array([*held, len(jax.live_arrays())])
