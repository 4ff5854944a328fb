"""Torch potentials compiled ahead of time for the sizes of a structure: `python -m bridge compile`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import torch

from bridge.join.native import Report, compile
from bridge.join.potentials import edges, jax_potential
from jax_side.engines import ase
from torch_side.potentials.neighbors import neighbor_list

ROOM = 1.25  # slots of edges for each edge that the structure has


def compile_potential(
    model: Any,
    structure: str,
    *,
    gradients: Literal["model", "autograd"] = "model",
    cutoff: float | None = None,
    capacity: int | None = None,
    dtype: Literal["float32", "float64"] = "float32",
    hvp: bool = False,
    folder: str | None = None,
) -> Iterator[Report]:
    """Compiles a torch potential of the contract, with its gradients, for the sizes of a structure.

    `structure` is a file that ase.io.read reads. `capacity` is the number of slots of edges; None
    takes a quarter more than the structure has. `hvp` adds products of the Hessian with a vector.
    `gradients` and `cutoff` are those of bridge.jax_potential, `folder` is that of
    bridge.native.compile. It sets jax_enable_x64 as `dtype` needs it. Gives a Report for each
    function.

    Raises: ValueError for a file that ASE can't read; and what jax_potential and compile raise."""
    jax.config.update("jax_enable_x64", dtype == "float64")
    bridged = jax_potential(model, gradients=gradients, cutoff=cutoff, lane="native")
    inputs = {name: jnp.asarray(x) for name, x in ase.structure(structure, dtype).items()}
    cutoff = bridged.card.cutoff
    if cutoff is not None:
        find = edges(cutoff, capacity or _room(inputs, cutoff))
        inputs |= find(inputs["pos"], inputs["cell"][0], inputs["pbc"][0])
    yield compile(bridged, inputs, folder=folder)
    if hvp:
        energy = lambda pos: bridged(inputs | {"pos": pos})["energy"].sum()
        product = lambda pos: jax.jvp(jax.grad(energy), (pos,), (jnp.ones_like(pos),))[1]
        yield compile(product, inputs["pos"], folder=folder)


def _room(inputs: dict[str, jax.Array], cutoff: float) -> int:
    """Slots for the edges of a structure, and some more."""
    pos, cell, pbc = (torch.from_numpy(np.array(inputs[key])) for key in ("pos", "cell", "pbc"))
    return int(ROOM * neighbor_list(pos, cell, pbc, cutoff)[0].shape[1]) + 1
