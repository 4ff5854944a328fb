"""Neighbour lists in a fixed number of slots, as a JAX function of positions and cell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from bridge.contract import check_inputs
from bridge.errors import message
from jax_side.potentials.potential import array


@dataclass(frozen=True)
class Edges:
    """What bridge.edges returns; its docstring is the documentation. `find` takes the dict of the
    contract."""

    find: Callable

    def __call__(self, positions, cell=None, pbc=None, batch=None):
        pos = jax.lax.stop_gradient(array("positions", positions))
        systems = 1 if batch is None else None if cell is None else cell.shape[0]
        if systems is None:
            raise ValueError(
                message(
                    "a cell (B,3,3) for several systems",
                    "None",
                    "pass zeros and pbc=False for open ones",
                )
            )
        cell, given = (
            jnp.zeros((systems, 3, 3), pos.dtype)
            if cell is None
            else jax.lax.stop_gradient(array("cell", cell)),
            cell is not None,
        )
        pbc = jnp.broadcast_to(jnp.asarray(given if pbc is None else pbc), (systems, 3))
        cell = cell[None] if batch is None and given else cell
        batch = jnp.zeros(len(pos), jnp.int32) if batch is None else batch
        inputs = {"pos": pos, "cell": cell, "pbc": pbc, "batch": jnp.asarray(batch)}
        check_inputs(inputs, tuple(inputs))
        return self.find(inputs)
