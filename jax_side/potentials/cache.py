"""A cache of a potential's inputs and outputs that commits system by system: proposals accepted or
rejected, as in kUPS."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Bool, Int

from bridge.call import one_of
from bridge.contract import INPUTS, OUTPUTS, dtype_name
from bridge.errors import message, spec
from jax_side.potentials.derivatives import Inputs
from jax_side.potentials.potential_out import PotentialOut

tree = jax.tree_util
# for arrays outside of the contract: whether they have rows of atoms or of systems
Rows = Mapping[str, Literal["N", "B"]]


class Cache(NamedTuple):
    """The inputs of all systems, and what the potential gave for them. A proposal is one too."""

    inputs: Inputs
    out: Any  # a PotentialOut, or a dict of the contract


Selected = TypeVar("Selected", dict[str, Any], PotentialOut, Cache)


@partial(tree.register_dataclass, data_fields=("potential",), meta_fields=("rows",))
@dataclass(frozen=True)
class CachedPotential:
    """What `cached` returns; its docstring is the documentation."""

    potential: Callable[[Inputs], Any]
    rows: tuple[tuple[str, Literal["N", "B"]], ...] = ()

    def init(self, inputs: Inputs) -> Cache:
        """Returns a cache of these inputs, from one evaluation of the potential."""
        # The barrier has XLA compute the outputs once; else it may compute a second copy, which is
        # rounded otherwise.
        return Cache(dict(inputs), jax.lax.optimization_barrier(self.potential(inputs)))

    def propose(self, inputs: Inputs) -> tuple[Any, Cache]:
        """Returns (outputs, proposal) for these inputs, from one evaluation of the potential."""
        proposal = self.init(inputs)
        return proposal.out, proposal

    def commit(self, cache: Cache, proposal: Cache, accept: Bool[ArrayLike, " B"]) -> Cache:
        """Returns the cache with the proposal's rows for the systems that are accepted.

        Raises: ValueError as `select_systems`.
        """
        return select_systems(accept, proposal, cache, cache.inputs["batch"], dict(self.rows))


def cached(potential: Callable[[Inputs], Any], rows: Rows | None = None) -> CachedPotential:
    """Returns a potential with a cache of the inputs and outputs that were last accepted, system by
    system, for Monte Carlo.

    The potential takes inputs of the contract and returns a PotentialOut, or a dict of the
    contract.

        chains = cached(potential)
        # one evaluation; the cache has cache.inputs and cache.out
        cache = chains.init(inputs)
        # one evaluation
        out, proposal = chains.propose(cache.inputs | {"pos": moved})
        # no evaluation; accept is (B,) bool
        cache = chains.commit(cache, proposal, accept)

    After a commit, the inputs and every leaf of the output are the proposal's for the systems that
    were accepted. For those that were rejected they are the old ones, identical to the bit (signed
    zeros and NaN payloads too). So positions and energies can't come apart. All of it is pure, and
    works in jit, scan (the cache as carry) and vmap. `rows`, and which inputs may change, are as in
    select_systems.

    Raises: TypeError for a potential that is not callable; a commit raises as select_systems.

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


def select_systems(
    accept: Bool[ArrayLike, " B"],
    new: Selected,
    old: Selected,
    batch: Int[jax.Array, " N"],
    rows: Rows | None = None,
) -> Selected:
    """Returns the rows of `new` for the systems where `accept` is True, and those of `old` for the
    others, identical to the bit: jnp.where selects them, without arithmetic.

    accept is (B,) bool, and batch (N,) int the system of each atom in both. `new` and `old` are
    alike: dicts of the contract (inputs or outputs), PotentialOuts, or Caches. Arrays of N rows
    follow accept[batch], and those of B rows follow accept. Rows of atoms in no system (batch >= B)
    stay old. An array that is the same object in both is left as it is. For keys outside of the
    contract, `rows` says which rows their arrays have: rows={"velocities": "N", "keys": "B"}.

    Arrays without rows of systems (edge_index and cell_offsets, whose slots move from system to
    system) can only be selected where there is one system, or left as they are. NaNs in bfloat16
    lose their payload in XLA on the CPU.

    Raises: ValueError for an accept that is not bool (B,), for unlike keys, kinds, shapes or
    dtypes, and for arrays that can't be selected by systems.

    >>> r = select_systems(jnp.array([True, False]), {"pos": jnp.ones((3, 3))}, {"pos": jnp.zeros((3, 3))}, jnp.array([0, 1, 1]))
    >>> r["pos"][:, 0].tolist()
    [1.0, 0.0, 0.0]
    """
    return _select_any(jnp.asarray(accept), new, old, batch, rows)


def _select_any(accept: jax.Array, new: Any, old: Any, batch: jax.Array, rows: Rows | None) -> Any:
    """select_systems for each of its kinds."""
    if isinstance(old, Cache):
        pairs = zip(new, old, strict=True)
        return Cache(*(_select_any(accept, n, o, batch, rows) for n, o in pairs))
    if isinstance(old, PotentialOut):
        return _select_out(accept, new, old, batch)
    return _select_dict(accept, new, old, batch, rows)


def _select_dict(
    accept: jax.Array,
    new: dict[str, Any],
    old: dict[str, Any],
    batch: jax.Array,
    rows: Rows | None = None,
) -> dict[str, Any]:
    """select_systems for dicts."""
    if set(new) != set(old):
        raise ValueError(
            message(
                f"the keys {', '.join(sorted(old))}",
                ", ".join(sorted(new)),
                "propose from the inputs of the cache: cache.inputs | {...}",
            )
        )
    axes = {name: _rows(name, rows) for name in old}
    sizes = (x.shape[0] for name, x in old.items() if axes[name] == "B")
    masks = _masks(accept, batch, next(sizes, accept.size))
    return {name: _select(name, axes[name], masks, new[name], x) for name, x in old.items()}


def _select_out(
    accept: jax.Array, new: PotentialOut, old: PotentialOut, batch: jax.Array
) -> PotentialOut:
    """select_systems for PotentialOuts."""
    structure = tree.tree_structure(old)
    if tree.tree_structure(new) != structure:
        raise ValueError(
            message(
                f"outputs alike ({', '.join(old.named())})",
                ", ".join(new.named()),
                "propose with the potential that made the cache",
            )
        )
    selected = _select_dict(accept, new.named(), old.named(), batch)
    return structure.unflatten(selected.values())


def _masks(accept: jax.Array, batch: jax.Array, n_systems: int) -> dict[str, jax.Array]:
    """Which rows of `new` are taken, for arrays of systems, of atoms, and of neither."""
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


def _rows(name: str, rows: Rows | None) -> str | None:
    """ "N", "B", or "all" for what has no rows of systems; None if nobody knows."""
    if rows and name in rows:
        return one_of(f"rows of {name}", rows[name], ("N", "B"))
    known = INPUTS.get(name) or OUTPUTS.get(name)
    if known is None:
        return None
    axis = known[0][0]
    return str(axis) if axis in ("N", "B") else "all"


def _select(name: str, axis: str | None, masks: dict[str, jax.Array], new: Any, old: Any) -> Any:
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
