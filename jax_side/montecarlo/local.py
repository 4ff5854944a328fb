"""Local potentials, one round of messages, whose energy follows a change of a few atoms at a cost
that knows no N."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from bridge.card import Card
from bridge.contract import GRAPH, check_inputs
from bridge.errors import message
from jax_side.montecarlo import cells as lists
from jax_side.montecarlo import states
from jax_side.montecarlo.cells import Layout, Near
from jax_side.montecarlo.states import Cache, Change, Changed, Graph, Proposal, System
from jax_side.montecarlo.summing import plus, total
from jax_side.potentials.outputs import check_unused, marked

__all__ = ["Cache", "Change", "Layout", "LocalPotential", "Proposal"]

Row = Callable[..., Any]  # a function of arrays of rows, which knows no other row


@dataclass(frozen=True)
class LocalPotential:
    """A potential of one round of messages: E = sum_i readout(node_i, sum_j edge(node_i, node_j,
    r_ij)), node_i = init(Z_i), eV.

    It consists of three functions of arrays of n rows. n is the same for all arguments of a call
    and changes from call to call, and the result for a row depends on that row alone:

        init(Z (n,) int32) -> node (n,F)
        edge(node_i (n,F), node_j (n,F), r_ij (n,3)) -> message to i (n,M)
        readout(node (n,F), sum of messages (n,M)) -> energy (n,) eV

    Here r_ij = r_j - r_i in Angstrom, for every periodic image within the cutoff. There may be
    several trailing axes in the place of F and of M. Each function is a JAX function or a torch
    callable by bridge.to_jax (under vmap of chains torch.func.vmap serves it, or pass batched=).
    `edge` is never given an edge of zero length, nor one beyond the cutoff. For forces, messages
    should go to zero smoothly at the cutoff.

        layout = local.allocate(graph, capacity=...)     # sizes, once, outside of jit
        cache = local.full(graph, layout)                # evaluates all
        energy, change, proposal = local.update(cache, moves.moved(i, pos))    # the change alone
        cache = local.commit(cache, proposal, accept)

    In a lax.scan, `commit` changes the arrays in place, so that a move costs the same at any N.

    For B independent chains, take jax.vmap of these methods, with a cache of stacked chains and a
    change and an `accept` for each. Each function is then called once for all of them. Functions
    are also called with rows that mean nothing (r_ij = (0.75 cutoff, 0, 0)), whose results are
    dropped. A potential is also a model of bridge.contract: local(inputs) with edges gives energy
    (B,) and node_energies (N,), so that jax_side.potentials.strain.with_gradients(local) has forces
    and virial.

    Rounding. Message sums and the energy are kept as pairs of floats (two-sum, Knuth 4.2.2), and
    the messages of an atom that moves are summed anew. In float32 the energy after 10^5 accepted
    moves is that of `full` to 1e-6. The remaining error is that a message may round otherwise in a
    call of another size. `cache = local.full(...)` of cache.pos and cache.atomic_numbers removes it.

    Method. The cache of node embeddings and message sums is that of kUPS's local potentials. The
    cell list is that of Allen and Tildesley, Computer Simulation of Liquids.

    Raises: TypeError for what can't be called, and for a torch callable that was not bridged;
    ValueError for a cutoff that is not above 0, and, as the functions are traced, for results that
    are not one row for each row.

    >>> spring = lambda a, b, r: (3 - jnp.linalg.norm(r, axis=-1, keepdims=True)) ** 2
    >>> springs = LocalPotential(lambda Z: jnp.ones((Z.shape[0], 1)), spring, lambda a, s: s[:, 0] / 2, 3.0)
    >>> graph = {"pos": jnp.array([[0.0, 0, 0], [2, 0, 0]]), "atomic_numbers": jnp.array([1, 1])}
    >>> cache = springs.full(graph)
    >>> energy, change, proposal = springs.update(cache, Change(jnp.array([1]), jnp.array([[2.5, 0, 0]])))
    >>> float(cache.energy), float(change), float(springs.commit(cache, proposal, True).energy)
    (1.0, -0.75, 0.25)
    """

    init: Row
    edge: Row
    readout: Row
    cutoff: float

    def __post_init__(self) -> None:
        for name in ("init", "edge", "readout"):
            f = getattr(self, name)
            of_torch = any(c.__module__.split(".")[0] == "torch" for c in type(f).__mro__)
            if not callable(f) or of_torch:
                raise TypeError(
                    message(
                        f"a JAX function as {name}",
                        f"{f!r:.60}",
                        "wrap a torch callable by bridge.to_jax",
                    )
                )
        if not self.cutoff > 0:
            raise ValueError(message("a cutoff above 0 Angstrom", repr(self.cutoff), "give one"))

    def allocate(
        self,
        *graphs: Graph,
        capacity: int | None = None,
        per_cell: int | None = None,
        neighbors: int | None = None,
        chunk: int = 4096,
    ) -> Layout:
        """Returns the sizes that compiled programs need, for systems like the `graphs` given, with
        a third of room.

        Graphs are dicts of pos (N,3), atomic_numbers (N,), cell (3,3) or (1,3,3) by rows, and pbc.
        An atom with atomic number 0 is absent. All graphs have the same pbc and the same kind of
        cell. Cells may change in `full`, unless they get too narrow.

        capacity    at least so many atoms have a slot
        per_cell    slots for atoms in each cell of the list, in place of an estimate
        neighbors   slots for neighbours of each atom, in place of an estimate
        chunk       `full` evaluates so many atoms at once, which bounds its memory

        Smaller sizes make a faster program.

        Raises: ValueError inside of jit, for several pbc, and for a capacity below the atoms given.
        """
        systems = [states.system(g) for g in graphs]
        periodic = {states.periodic(g) for g in graphs}
        most = max(len(pos) for pos, _, _ in systems)
        if len(periodic) != 1:
            raise ValueError(
                message(
                    "one pbc for all graphs",
                    " and ".join(map(str, sorted(periodic))),
                    "allocate for each kind of boundary",
                )
            )
        if capacity is not None and capacity < most:
            raise ValueError(
                message(f"capacity of at least the {most} atoms given", str(capacity), "raise it")
            )
        same_size = [states.padded(*s, max(most, 1)) for s in systems]
        pos, numbers, cell = (np.stack([np.asarray(x) for x in xs]) for xs in zip(*same_size))
        (axes,) = periodic
        fits = lists.layout_of(pos, numbers > 0, cell, axes, self.cutoff, chunk)
        atoms = max(capacity or most, 1)
        present = max((numbers > 0).sum(-1).max(), 1)
        grown = lambda n: int(1.3 * n * atoms / present) + 6
        return replace(
            fits,
            atoms=atoms,
            per_cell=per_cell or min(grown(fits.per_cell), atoms),
            neighbors=neighbors or grown(fits.neighbors),
        )

    def full(self, graph: Graph, layout: Layout | None = None) -> Cache:
        """Returns the cache of a system (a dict as in `allocate`), evaluated from nothing, with
        .energy in eV.

        Differentiable: jax.grad of local.full(graph, layout).energy in pos and cell is g and G of
        bridge.contract. layout=None makes one, which is possible outside of jit only.

        Raises: ValueError where the system does not fit the layout. Where that can't be seen
        (inside jit) the energy is NaN instead, and `check` says why.
        """
        layout = self.allocate(graph) if layout is None else layout
        states.check_periodic(graph, layout)
        system = states.padded(*states.system(graph), layout.atoms)
        return states.seen(self._compiled["full"](system, layout), layout)

    def _full(self, system: System, layout: Layout) -> Cache:
        """`full`, of a padded system."""
        pos, numbers, cell = system
        here = numbers > 0
        space, pos, cells, fullest = lists.build(cell, pos, here, layout, self.cutoff)
        nodes = self._nodes(numbers, here)

        def part(i):
            found = lists.neighbors(space, layout, self.cutoff, pos, here, cells, i)
            there = jnp.take(nodes, found.j, axis=0, mode="clip")
            centre = jnp.broadcast_to(nodes[i][:, None], there.shape)
            sums = self._messages(centre, there, found.r, found.used).sum(1)
            return sums, self._energies(nodes[i], sums, here[i]), found.count.max()

        sums, energies, most = _in_chunks(part, layout.atoms, layout.chunk)
        reached = lists.widths(space) * np.array(layout.reach)
        narrow = np.array(layout.periodic) & (reached < self.cutoff)
        needed = states.needed_of(
            states.beyond(fullest, layout.per_cell),
            states.beyond(most, layout.neighbors),
            narrow=narrow.any(),
        )
        return Cache(
            pos=pos,
            atomic_numbers=numbers,
            nodes=nodes,
            sums=jnp.stack([sums, jnp.zeros_like(sums)], 1),
            node_energies=energies,
            total=total(energies),
            count=here.sum().astype(jnp.int32),
            space=space,
            cells=cells,
            needed=needed,
            layout=layout,
        )

    def update(
        self, cache: Cache, change: Change
    ) -> tuple[Float[jax.Array, ""], Float[jax.Array, ""], Proposal]:
        """Returns the energy after a change of K atoms, the change of energy, both scalars in eV,
        and the proposal that `commit` takes.

        `change` is a states.Change, as jax_side.montecarlo.moves makes them: positions, elements,
        insertions, deletions. The cost grows with K and the layout's sizes, not with N: `edge` is
        called once with 3 K neighbors rows, `readout` with K + 2 K neighbors, and `init` with K
        rows where elements change.

        Raises: ValueError for arrays that don't fit, and for what the layout has no room for: too
        many atoms in a cell or neighbours, an index beyond the capacity (an insertion without a
        free slot), an atom twice, an insertion without a position. Inside jit, where values can't
        be seen, the energies are NaN instead (so that a Metropolis test rejects) and nothing is
        committed. The cache's energy is NaN from then on, and `check` says why.
        """
        energy, change_of_energy, proposal = self._compiled["update"](cache, change)
        return energy, change_of_energy, states.seen(proposal, cache.layout)

    def _update(
        self, cache: Cache, change: Change
    ) -> tuple[Float[jax.Array, ""], Float[jax.Array, ""], Proposal]:
        """`update`, as it is compiled."""
        c, n = states.changed(cache, change), cache.layout.atoms
        mutated = change.atomic_numbers is not None
        was = jnp.take(cache.nodes, c.index, axis=0, mode="clip")
        now = self._nodes(c.now, c.now > 0) if mutated else was
        old, new = self._before(cache, c), self._after(cache, c)
        own, ends, messages = self._exchanged(cache, old, new, was, now)
        others, more = _gathered(ends, messages, n)
        high, low = jnp.moveaxis(jnp.take(cache.sums, others, axis=0, mode="clip"), 1, 0)
        sums = jnp.stack(plus(high, low, more), 1)
        sums = jnp.concatenate([jnp.stack([own, jnp.zeros_like(own)], 1), sums])
        nodes = jnp.concatenate([now, jnp.take(cache.nodes, others, axis=0, mode="clip")])
        energies = self._energies(nodes, sums[:, 0], jnp.concatenate([c.now > 0, others < n]))
        felt = jnp.concatenate([c.index, others])
        before = jnp.take(cache.node_energies, felt, mode="fill", fill_value=0)
        rise, rounding = total(jnp.concatenate([energies, -before]))
        after = plus(*plus(*cache.total, rise), rounding)
        old_slot, slot, crowded, lost = self._replaced(cache, change, c)
        beyond, misused = states.misused(change, c, n, lost)
        crowd = states.beyond(new.count.max(), cache.layout.neighbors)
        needed = jnp.maximum(cache.needed, states.needed_of(crowded, crowd, beyond, misused))
        count = cache.count
        if mutated and old_slot is not None:
            end = cache.layout.cells * cache.layout.per_cell
            present = (c.now > 0).sum(dtype=jnp.int32)
            count += present - (old_slot < end).sum(dtype=jnp.int32)
        proposal = Proposal(
            index=c.index,
            pos=None if slot is None else c.pos,
            atomic_numbers=c.now if mutated else None,
            nodes=now if mutated else None,
            old_slot=old_slot,
            slot=slot,
            felt=felt,
            sums=sums,
            node_energies=energies,
            total=after,
            count=count,
            needed=needed,
        )
        bad = needed.any()
        return (
            jnp.where(bad, jnp.nan, sum(after)),
            jnp.where(bad, jnp.nan, rise + rounding),
            proposal,
        )

    def _replaced(
        self, cache: Cache, change: Change, c: Changed
    ) -> tuple[jax.Array | None, jax.Array | None, ArrayLike, Bool[jax.Array, " K"]]:
        """Slots of the changed atoms before and after, None where no atom moves; the slots that a
        full cell would need, else 0; and which atoms are missing in the list."""
        if change.pos is None and change.atomic_numbers is None:
            return None, None, 0, jnp.zeros(1, bool)
        old_slot, slot, crowded = lists.place(
            cache.space, cache.layout, cache.cells, c.index, c.pos, c.now > 0
        )
        end = cache.layout.cells * cache.layout.per_cell
        return old_slot, slot, crowded, (old_slot >= end) & (c.was > 0)

    def commit(self, cache: Cache, proposal: Proposal, accept: Bool[ArrayLike, ""]) -> Cache:
        """Returns the cache with the proposal's rows where `accept` (a bool scalar, traced or not)
        is True; else the cache, the same to the bit."""
        return self._compiled["commit"](cache, proposal, accept)

    def check(self, cache: Cache) -> None:
        """ValueError that says what did not fit and what to allocate, if anything did not; for a
        cache or stacked caches, outside of jit."""
        states.check(cache.needed, cache.layout)

    def __call__(self, inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns energy (B,) and node_energies (N,) in eV, for the contract's dict with edges.

        Raises: ValueError for inputs outside of the contract or without edges, and for a charge or
        spin that is not zero."""
        check_inputs(inputs, GRAPH)
        traced = check_unused(self.card, inputs, type(self).__name__)
        pos, numbers = inputs["pos"], inputs["atomic_numbers"].astype(jnp.int32)
        i, j = inputs["edge_index"]
        here = numbers > 0
        used = (i < len(pos)) & (j < len(pos))
        i, j = jnp.where(used, i, 0), jnp.where(used, j, 0)
        offsets, cells = inputs["cell_offsets"].astype(pos.dtype), inputs["cell"]
        r = pos[j] - pos[i] + jnp.einsum("ea,eab->eb", offsets, cells[inputs["batch"][i]])
        used &= ((r**2).sum(-1) < self.cutoff**2) & here[i] & here[j]
        nodes = self._nodes(numbers, here)
        sums = jax.ops.segment_sum(self._messages(nodes[i], nodes[j], r, used), i, len(pos))
        energies = self._energies(nodes, sums, here)
        each = jax.ops.segment_sum(energies, inputs["batch"], len(inputs["cell"]))
        return marked({"energy": each, "node_energies": energies}, inputs, traced)

    @property
    def card(self) -> Card:
        """The card of this model: energy and node_energies, with edges given up to the cutoff."""
        outputs = frozenset({"energy", "node_energies"})
        return Card(outputs=outputs, cutoff=self.cutoff, neighbor_list="given")

    @cached_property
    def _compiled(self) -> dict[str, Callable[..., Any]]:
        """The jitted methods. They belong to this object, so that their programs end with it."""
        return {
            "full": jax.jit(self._full, static_argnums=1),
            "update": jax.jit(self._update),
            "commit": jax.jit(_commit),
        }

    def _before(self, cache: Cache, c: Changed) -> Near:
        """Neighbours (K, ...) of the changed atoms where they were, except for one another."""
        one = lambda i, r: lists.near(
            cache.space, cache.layout, self.cutoff, cache.pos, cache.cells.slots, r, i, c.index
        )
        return _masked(jax.vmap(one)(c.index, c.old_pos), c.was > 0)

    def _after(self, cache: Cache, c: Changed) -> Near:
        """Neighbours (K, ...) of the changed atoms where they come to be, one another included: an
        atom N + k is the k-th of the change."""
        images = jnp.asarray(cache.layout.images(len(c.index)))
        k = jnp.arange(len(c.index))
        grid = jnp.meshgrid(k, jnp.arange(len(images)), indexing="ij")
        other, image = grid[0].reshape(-1), grid[1].reshape(-1)

        def one(k, i, r):
            between = c.pos[other] - r + images[image].astype(r.dtype) @ cache.space.cell
            itself = (other == k) & (images[image] == 0).all(-1)
            near = (between**2).sum(-1) < self.cutoff**2
            used = (c.now[other] > 0) & near & ~itself
            more = (cache.layout.atoms + other.astype(jnp.int32), between, used)
            return lists.near(
                cache.space,
                cache.layout,
                self.cutoff,
                cache.pos,
                cache.cells.slots,
                r,
                i,
                c.index,
                more,
            )

        return _masked(jax.vmap(one)(k, c.index, c.pos), c.now > 0)

    def _exchanged(
        self, cache: Cache, old: Near, new: Near, was: jax.Array, now: jax.Array
    ) -> tuple[Float[jax.Array, " K *M"], Int[jax.Array, " L"], Float[jax.Array, " L *M"]]:
        """Sums of messages to the changed atoms (K,M); ends (L,) and messages (L,M) to the others,
        with + for new messages and - for old ones."""
        n, mutual = cache.layout.atoms, new.j >= cache.layout.atoms
        nodes = lambda j: jnp.take(cache.nodes, j, axis=0, mode="clip")
        there = _where(mutual, jnp.take(now, new.j - n, axis=0, mode="clip"), nodes(new.j))
        wide = lambda x: jnp.broadcast_to(x[:, None], there.shape)
        # centre, neighbour, r from one to the other, which of them are meant
        rows = [
            (wide(now), there, new.r, new.used),
            (there, wide(now), -new.r, new.used & ~mutual),
            (nodes(old.j), wide(was), -old.r, old.used),
        ]
        own, come, gone = jnp.split(self._messages(*(jnp.concatenate(x) for x in zip(*rows))), 3)
        ends = [jnp.where(new.used & ~mutual, new.j, n), jnp.where(old.used, old.j, n)]
        return (
            own.sum(1),
            jnp.concatenate(ends).reshape(-1),
            jnp.concatenate([come, -gone]).reshape(-1, *own.shape[2:]),
        )

    def _nodes(self, numbers: Int[jax.Array, " n"], here: Bool[jax.Array, " n"]) -> jax.Array:
        """Node embeddings (n,F), zeros for absent atoms."""
        spare = jnp.max(numbers, initial=0)  # an element that is known, where there is no atom
        nodes = _result("init", self.init(jnp.where(here, numbers, spare)), len(numbers))
        return _where(here, nodes, 0)

    def _messages(
        self, centre: jax.Array, neighbour: jax.Array, r: jax.Array, used: jax.Array
    ) -> jax.Array:
        """Messages where `used`, else zeros, of any leading shape, by one call of `edge`."""
        shape = used.shape
        rows = lambda x: x.reshape(-1, *x.shape[len(shape) :])
        spare = jnp.array([0.75 * self.cutoff, 0, 0], r.dtype)  # where there is no neighbour
        found = self.edge(rows(centre), rows(neighbour), rows(_where(used, r, spare)))
        messages = _result("edge", found, used.size)
        return _where(used, messages.reshape(*shape, *messages.shape[1:]), 0)

    def _energies(
        self, nodes: jax.Array, sums: jax.Array, here: Bool[jax.Array, " n"]
    ) -> Float[jax.Array, " n"]:
        """Energies in eV, zeros for absent atoms."""
        energies = _result("readout", self.readout(nodes, sums), len(here), ())
        return jnp.where(here, energies, 0)


def _commit(cache: Cache, proposal: Proposal, accept: Bool[ArrayLike, ""]) -> Cache:
    """`commit`, as it is compiled."""
    p, n = proposal, cache.layout.atoms
    yes = jnp.asarray(accept) & ~p.needed.any()
    i, felt = jnp.where(yes, p.index, n), jnp.where(yes, p.felt, n)

    def written(x, at, rows):
        """x with these rows; without rows, x itself."""
        return x if rows is None else x.at[at].set(rows, mode="drop")

    cells = cache.cells
    if p.slot is not None and p.old_slot is not None:
        cells = lists.move(cache.layout, cells, p.index, p.old_slot, p.slot, yes)
    high, low = (jnp.where(yes, new, old) for new, old in zip(p.total, cache.total))
    return replace(
        cache,
        pos=written(cache.pos, i, p.pos),
        atomic_numbers=written(cache.atomic_numbers, i, p.atomic_numbers),
        nodes=written(cache.nodes, i, p.nodes),
        sums=written(cache.sums, felt, p.sums),
        node_energies=written(cache.node_energies, felt, p.node_energies),
        total=(high, low),
        count=jnp.where(yes, p.count, cache.count),
        cells=cells,
        needed=p.needed,
    )


def _gathered(
    ends: Int[jax.Array, " L"], rows: Float[jax.Array, " L *M"], n: int
) -> tuple[Int[jax.Array, " L"], Float[jax.Array, " L *M"]]:
    """Rows (L, ...) summed by their end: the ends, each of them once and `n` in what is left, and
    the sums."""
    order = jnp.argsort(ends)
    ends = ends[order]
    first = jnp.concatenate([jnp.ones(1, bool), ends[1:] != ends[:-1]])
    group = jnp.cumsum(first) - 1
    sums = jax.ops.segment_sum(rows[order], group, len(ends), indices_are_sorted=True)
    return jnp.full(len(ends), n, ends.dtype).at[group].set(ends, indices_are_sorted=True), sums


def _in_chunks(
    part: Callable[[jax.Array], tuple[jax.Array, ...]], n: int, size: int
) -> tuple[jax.Array, ...]:
    """The arrays by row that part(indices) gives, over all n indices, `size` at a time; the last of
    its results is a scalar, whose maximum is kept."""
    if n <= size:
        *rows, worst = part(jnp.arange(n))
        return *rows, worst
    parts = -(-n // size)
    indices = jnp.minimum(jnp.arange(parts * size), n - 1).reshape(parts, size)
    *rows, worst = jax.lax.map(part, indices)
    return *(x.reshape(-1, *x.shape[2:])[:n] for x in rows), worst.max()


def _masked(found: Near, here: Bool[jax.Array, " K"]) -> Near:
    """The neighbours of the atoms `here`; the others have none."""
    return found._replace(used=found.used & here[:, None], count=jnp.where(here, found.count, 0))


def _where(mask: jax.Array, x: jax.Array, other: ArrayLike) -> jax.Array:
    """jnp.where, with a mask of the leading axes of x."""
    return jnp.where(mask.reshape(mask.shape + (1,) * (jnp.ndim(x) - mask.ndim)), x, other)


def _result(name: str, x: Any, rows: int, rest: tuple[int, ...] | None = None) -> jax.Array:
    """What a function returned; TypeError or ValueError unless it is an array of `rows` rows, each
    of the shape `rest` (None: of one or more axes)."""
    if not isinstance(x, jax.Array):
        raise TypeError(
            message(f"an array from {name}", f"a {type(x).__name__}", "return one array")
        )
    of_rows = x.ndim >= 1 and len(x) == rows
    fits = x.ndim >= 2 if rest is None else x.shape[1:] == rest
    if not (of_rows and fits):
        want = f"({rows},)" if rest == () else f"({rows}, features)"
        raise ValueError(
            message(
                f"{want} from {name} for {rows} rows",
                str(x.shape),
                "return a row for each row given",
            )
        )
    return x
