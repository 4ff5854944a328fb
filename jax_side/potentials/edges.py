"""Neighbour lists in a fixed number of slots, as a JAX function of positions and cell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from bridge.contract import check_inputs
from bridge.errors import message
from jax_side.potentials.derivatives import Named
from jax_side.potentials.potential import array


@dataclass(frozen=True)
class Edges:
    """What bridge.edges returns; its docstring is the documentation.

    `find` takes pos, cell, pbc and batch of the contract and returns edge_index and cell_offsets.
    """

    find: Callable[[Named], Named]

    def __call__(
        self,
        positions: Float[ArrayLike, "N 3"],
        cell: Float[ArrayLike, "*B 3 3"] | None = None,
        pbc: Bool[ArrayLike, "*B #3"] | None = None,
        batch: Int[ArrayLike, " N"] | None = None,
    ) -> Named:
        pos = jax.lax.stop_gradient(array("positions", positions))
        if batch is not None and cell is None:
            raise ValueError(
                message(
                    "a cell (B,3,3) for several systems",
                    "None",
                    "pass zeros and pbc=False for open ones",
                )
            )
        if cell is None:
            cells = jnp.zeros((1, 3, 3), pos.dtype)
        else:
            cells = jax.lax.stop_gradient(array("cell", cell))
            cells = cells[None] if batch is None else cells
        periodic = (cell is not None) if pbc is None else pbc
        inputs = {
            "pos": pos,
            "cell": cells,
            "pbc": jnp.broadcast_to(jnp.asarray(periodic), (len(cells), 3)),
            "batch": jnp.zeros(len(pos), jnp.int32) if batch is None else jnp.asarray(batch),
        }
        check_inputs(inputs, tuple(inputs))
        return self.find(inputs)
