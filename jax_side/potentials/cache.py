"""A cache of a potential's inputs and outputs that commits system by system: proposals accepted or
rejected, as in kUPS."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bridge.call import one_of
from bridge.contract import INPUTS, OUTPUTS, dtype_name
from bridge.errors import message, spec
from jax_side.potentials.potential_out import PotentialOut

tree = jax.tree_util


class Cache(NamedTuple):
    """The inputs of all systems and what the potential gave for them; a proposal looks the same."""

    inputs: dict
    out: PotentialOut


@partial(tree.register_dataclass, data_fields=("potential",), meta_fields=("rows",))
@dataclass(frozen=True)
class CachedPotential:
    potential: Any
    rows: tuple = ()

    def init(self, inputs) -> Cache:
        # computed once: XLA may else make a second copy, rounded otherwise
        return Cache(dict(inputs), jax.lax.optimization_barrier(self.potential(inputs)))

    def propose(self, inputs) -> tuple[PotentialOut, Cache]:
        proposal = self.init(inputs)
        return proposal.out, proposal

    def commit(self, cache, proposal, accept) -> Cache:
        return select_systems(accept, proposal, cache, cache.inputs["batch"], dict(self.rows))


def cached(potential, rows=None) -> CachedPotential:
    """A potential (inputs -> PotentialOut) with a cache of the inputs and outputs last accepted,
    system by system, for Monte Carlo.

        chains = cached(potential)
        cache = chains.init(inputs)                              # one evaluation; cache.inputs,
        cache.out out, proposal = chains.propose(cache.inputs | {"pos": moved})   # one evaluation
        cache = chains.commit(cache, proposal, accept)           # none; accept (B,) bool

    After a commit the inputs and every leaf of the output are the proposal's for systems accepted,
    and the old ones, identical to the bit (signed zeros and NaN payloads too), for those rejected:
    positions and energies can't come apart. Pure: works in jit, scan (the cache as carry) and vmap.
    `rows`, which inputs may change, and errors: as in select_systems. Raises TypeError for a
    potential that is not callable.

    >>> from jax_side.potentials.direct import direct
    >>> chains = cached(direct(lambda x: {"energy": jax.ops.segment_sum((x["pos"] ** 2).sum(-1), x["batch"], 2)}, None))
    >>> cache = chains.init({"pos": jnp.ones((2, 3)), "cell": jnp.zeros((2, 3, 3)), "pbc": jnp.zeros((2, 3), bool),
    ...                      "batch": jnp.arange(2), "atomic_numbers": jnp.ones(2, int)})
    >>> out, proposal = chains.propose(cache.inputs | {"pos": 2 * cache.inputs["pos"]})
    >>> chains.commit(cache, proposal, jnp.array([True, False])).out.total_energies.tolist()
    [12.0, 3.0]
    """
    if not callable(potential):
        raise TypeError(
            message(
                "a potential, or another callable of inputs",
                f"{potential!r:.60}",
                "make one by jax_side.potentials.direct.direct",
            )
        )
    return CachedPotential(potential, tuple((rows or {}).items()))


def select_systems(accept, new, old, batch, rows=None):
    """Where accept[system], the rows of `new`, else those of `old`, identical to the bit:
    jnp.where, no arithmetic.

    accept (B,) bool; batch (N,) int, the system of each atom in both. `new` and `old` are alike:
    dicts of the contract (inputs or outputs), PotentialOuts, or Caches. Arrays of N rows follow
    accept[batch], those of B rows follow accept; rows of atoms in no system (batch >= B) stay old.
    An array that is the same object in both is left as it is. Keys outside of the contract need a
    word: rows={"velocities": "N", "keys": "B"}. Arrays without rows of systems (edge_index and
    cell_offsets, whose slots move from system to system) can only be selected where there is one
    system, or left as they are. NaNs in bfloat16 lose their payload in XLA on the CPU.

    Raises: ValueError for an accept that is not bool (B,), for unlike keys, kinds, shapes or
    dtypes, and for arrays that can't be selected by systems.

    >>> r = select_systems(jnp.array([True, False]), {"pos": jnp.ones((3, 3))}, {"pos": jnp.zeros((3, 3))}, jnp.array([0, 1, 1]))
    >>> r["pos"][:, 0].tolist()
    [1.0, 0.0, 0.0]
    """
    accept = jnp.asarray(accept)
    if isinstance(old, Cache):
        return Cache(
            *(select_systems(accept, n, o, batch, rows) for n, o in zip(new, old, strict=True))
        )
    if isinstance(old, PotentialOut):
        return _select_out(accept, new, old, batch)
    if set(new) != set(old):
        raise ValueError(
            message(
                f"the keys {', '.join(sorted(old))}",
                ", ".join(sorted(new)),
                "propose from the inputs of the cache: cache.inputs | {...}",
            )
        )
    masks = _masks(
        accept,
        batch,
        next((x.shape[0] for name, x in old.items() if _rows(name, rows) == "B"), accept.size),
    )
    return {name: _select(name, _rows(name, rows), masks, new[name], x) for name, x in old.items()}


def _select_out(accept, new, old, batch):
    """The same for PotentialOuts."""
    kinds = [tree.tree_structure(x) for x in (new, old)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            message(
                f"outputs alike ({', '.join(old.named())})",
                ", ".join(new.named()),
                "propose with the potential that made the cache",
            )
        )
    return tree.tree_unflatten(
        kinds[1], select_systems(accept, new.named(), old.named(), batch).values()
    )


def _masks(accept, batch, n_systems):
    """Rows to be taken, for arrays of systems, of atoms, and of neither."""
    if accept.shape != (n_systems,) or accept.dtype != bool:
        raise ValueError(
            message(
                f"accept as {spec((n_systems,), 'bool')}",
                spec(accept.shape, dtype_name(accept)),
                "give one boolean for each system",
            )
        )
    masks = {"B": accept, "N": accept.at[batch].get(mode="fill", fill_value=False)}
    return masks | {"all": accept[0]} if n_systems == 1 else masks


def _rows(name, rows):
    """N, B, or "all" for what has no rows of systems; None if nobody knows."""
    if name in (rows or {}):
        return one_of(f"rows of {name}", rows[name], ("N", "B"))
    shape = (INPUTS | OUTPUTS).get(name, [None])[0]
    return shape and (shape[0] if shape[0] in ("N", "B") else "all")


def _select(name, axis, masks, new, old):
    if new is old:
        return old
    if axis not in masks:
        do = (
            f'say rows={{"{name}": "N"}} or "B"'
            if axis is None
            else "make it inside of the model, or hold it fixed (the same object in both)"
        )
        raise ValueError(
            message("arrays with rows of atoms or of systems where they change", name, do)
        )

    def choose(new, old):
        if (new.shape, new.dtype) != (old.shape, old.dtype):
            got, do = (
                spec(new.shape, dtype_name(new)),
                "keep shapes and dtypes from proposal to proposal",
            )
            raise ValueError(message(f"{name} as {spec(old.shape, dtype_name(old))}", got, do))
        mask = masks[axis]
        return jnp.where(mask.reshape(mask.shape + (1,) * (old.ndim - mask.ndim)), new, old)

    return jax.tree.map(choose, new, old)
