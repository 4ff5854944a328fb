"""Local potentials, one round of messages, whose energy follows a change of a few atoms at a cost
that knows no N (DESIGN section 6)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np

from bridge.card import Card
from bridge.contract import GRAPH, check_inputs
from bridge.errors import message
from jax_side.montecarlo import cells as lists
from jax_side.montecarlo import states
from jax_side.montecarlo.cells import Layout
from jax_side.montecarlo.states import Cache, Change, Proposal
from jax_side.montecarlo.summing import plus, total
from jax_side.potentials.outputs import check_unused, marked

__all__ = ["Cache", "Change", "Layout", "LocalPotential", "Proposal"]


@dataclass(frozen=True)
class LocalPotential:
    """A potential of one round of messages: E = sum_i readout(node_i, sum_j edge(node_i, node_j,
    r_ij)), node_i = init(Z_i), eV.

    Three functions of rows (n, the same for all arguments of a call, changes from call to call)
    that know no other row:

        init(Z (n,) int32) -> node (n,F)
        edge(node_i (n,F), node_j (n,F), r_ij (n,3)) -> message to i (n,M);  r_ij = r_j - r_i in
        Angstrom, every image within the cutoff readout(node (n,F), sum of messages (n,M)) -> energy
        (n,) eV

    each a JAX function or a torch callable by bridge.to_jax (under vmap of chains torch.func.vmap
    serves them, or say batched=); trailing axes may be more than one. An edge of zero length never
    comes, nor does one beyond the cutoff (what a potential does there is its own affair: let
    messages end smoothly, if forces are asked for).

        layout = local.allocate(graph, capacity=...)     # sizes, once, outside of jit
        cache = local.full(graph, layout)                # evaluates all
        energy, change, proposal = local.update(cache, moves.moved(i, pos))    # what the change
        touches alone cache = local.commit(cache, proposal, accept)    # in a lax.scan the arrays
        are changed in place: a move costs the same at any N

    B independent chains: jax.vmap of these, with a cache of stacked chains, their own changes,
    their own `accept` (B,); each function is called once for all of them. The functions are called
    with rows that mean nothing as well (r_ij = (0.75 cutoff, 0, 0)), whose results are dropped. A
    potential is also a model of bridge.contract: local(inputs) with edges gives energy (B,) and
    node_energies (N,), so jax_side.potentials.strain.with_gradients(local) has forces and virial.

    Rounding. Message sums and the energy are kept as pairs of floats (two-sum, Knuth 4.2.2), and
    the messages of an atom that moves are summed anew: in float32 the energy after 10^5 accepted
    moves is that of `full` to 1e-6. What is left is that a message may round otherwise in a call of
    another size; `cache = local.full(...)` of cache.pos and cache.atomic_numbers refreshes all.

    Method: a cache of node embeddings and message sums as in kUPS's local potentials; the cell list
    as in Allen and Tildesley, Computer Simulation of Liquids.

    Raises: TypeError for what is no function, and for a torch callable that was not bridged;
    ValueError for a cutoff that is not above 0 and, as they are traced, for functions whose results
    are not one row for each row.

    >>> spring = lambda a, b, r: (3 - jnp.linalg.norm(r, axis=-1, keepdims=True)) ** 2
    >>> springs = LocalPotential(lambda Z: jnp.ones((Z.shape[0], 1)), spring, lambda a, s: s[:, 0] / 2, 3.0)
    >>> graph = {"pos": jnp.array([[0.0, 0, 0], [2, 0, 0]]), "atomic_numbers": jnp.array([1, 1])}
    >>> cache = springs.full(graph)
    >>> energy, change, proposal = springs.update(cache, Change(jnp.array([1]), jnp.array([[2.5, 0, 0]])))
    >>> float(cache.energy), float(change), float(springs.commit(cache, proposal, True).energy)
    (1.0, -0.75, 0.25)
    """

    init: Callable
    edge: Callable
    readout: Callable
    cutoff: float

    def __post_init__(self):
        for name in ("init", "edge", "readout"):
            f = getattr(self, name)
            if not callable(f) or any(
                c.__module__.split(".")[0] == "torch" for c in type(f).__mro__
            ):
                raise TypeError(
                    message(
                        f"a JAX function as {name}",
                        f"{f!r:.60}",
                        "wrap a torch callable by bridge.to_jax",
                    )
                )
        if not self.cutoff > 0:
            raise ValueError(message("a cutoff above 0 Angstrom", repr(self.cutoff), "give one"))

    def allocate(self, *graphs, capacity=None, per_cell=None, neighbors=None, chunk=4096) -> Layout:
        """The sizes that compiled programs need, for systems like the `graphs` given (dicts of pos
        (N,3), atomic_numbers (N,), cell (3,3) or (1,3,3) by rows, pbc), with a third of room: at
        least `capacity` atoms, `per_cell` in a cell of the list, `neighbors` of an atom, where
        given. `chunk` atoms are evaluated at once by `full`, which bounds its memory. A cost in all
        of them: the fewer, the faster. An atom with atomic number 0 is absent. One pbc and one kind
        of cell for all; cells may change in `full`, unless they get too narrow.

        Raises: ValueError inside of jit, for several pbc, and for a capacity below the atoms given.
        """
        systems, periodic = [states.system(g) for g in graphs], {states.periodic(g) for g in graphs}
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
        pos, numbers, cell = (
            np.stack([np.asarray(s[k]) for s in (states.padded(*s, max(most, 1)) for s in systems)])
            for k in range(3)
        )
        fits = lists.layout_of(pos, numbers > 0, cell, *periodic, self.cutoff, chunk)
        atoms = max(capacity or most, 1)
        grown = lambda n: int(1.3 * n * atoms / max((numbers > 0).sum(-1).max(), 1)) + 6
        return replace(
            fits,
            atoms=atoms,
            per_cell=per_cell or min(grown(fits.per_cell), atoms),
            neighbors=neighbors or grown(fits.neighbors),
        )

    def full(self, graph, layout=None) -> Cache:
        """Evaluate a system (a dict as in `allocate`) from nothing: its cache, with .energy in eV.

        Differentiable: jax.grad of local.full(graph, layout).energy in pos and cell is g and G of
        bridge.contract. layout=None makes one, outside of jit only. Raises ValueError where the
        system does not fit the layout; where that can't be seen (inside jit) the energy is NaN and
        `check` raises later.
        """
        layout = self.allocate(graph) if layout is None else layout
        states.check_periodic(graph, layout)
        return states.seen(
            self._compiled["full"](states.padded(*states.system(graph), layout.atoms), layout),
            layout,
        )

    def _full(self, system, layout):
        pos, numbers, cell = system
        here = numbers > 0
        space, pos, cells, fullest = lists.build(cell, pos, here, layout, self.cutoff)
        nodes = self._nodes(numbers, here)

        def part(i):
            found = lists.neighbors(space, layout, self.cutoff, pos, here, cells, i)
            there = jnp.take(nodes, found.j, axis=0, mode="clip")
            sums = self._messages(
                jnp.broadcast_to(nodes[i][:, None], there.shape), there, found.r, found.used
            ).sum(1)
            return sums, self._energies(nodes[i], sums, here[i]), found.count.max()

        sums, energies, most = _in_chunks(part, layout.atoms, layout.chunk)
        narrow = np.array(layout.periodic) & (
            lists.widths(space) * np.array(layout.reach) < self.cutoff
        )
        return Cache(
            pos, numbers, nodes, jnp.stack([sums, jnp.zeros_like(sums)], 1), energies, total(energies), here.sum().astype(jnp.int32),
            space, cells, states.needed_of(states.beyond(fullest, layout.per_cell), states.beyond(most, layout.neighbors), narrow=narrow.any()), layout,
        )  # fmt: skip

    def update(self, cache, change):
        """The energy after a change of K atoms and the change of energy, scalars in eV, and what
        `commit` takes.

        `change` is a states.Change, as jax_side.montecarlo.moves makes them: positions, elements,
        insertions, deletions. The cost grows with K and the layout's sizes, not with N: `edge` is
        called once with 3 K neighbors rows, `readout` with K + 2 K neighbors, `init` with K where
        elements change.

        Raises: ValueError for arrays that don't fit, and for what the layout has no room for: too
        many atoms in a cell or neighbours, an index beyond the capacity (an insertion without a
        free slot), an atom twice, an insertion without a position. Inside jit, where values can't
        be seen, the energies are NaN (so that a Metropolis test rejects), nothing is committed, the
        cache's energy is NaN from then on and `check` says why.
        """
        energy, change_of_energy, proposal = self._compiled["update"](cache, change)
        return energy, change_of_energy, states.seen(proposal, cache.layout)

    def _update(self, cache, change):
        c, n = states.changed(cache, change), cache.layout.atoms
        mutated = change.atomic_numbers is not None
        was = jnp.take(cache.nodes, c.index, axis=0, mode="clip")
        now = self._nodes(c.now, c.now > 0) if mutated else was
        old, new = self._before(cache, c), self._after(cache, c)
        own, ends, messages = self._exchanged(cache, old, new, was, now)
        felt, more = _gathered(ends, messages, n)
        sums = jnp.stack(
            plus(*jnp.moveaxis(jnp.take(cache.sums, felt, axis=0, mode="clip"), 1, 0), more), 1
        )
        sums = jnp.concatenate([jnp.stack([own, jnp.zeros_like(own)], 1), sums])
        nodes = jnp.concatenate([now, jnp.take(cache.nodes, felt, axis=0, mode="clip")])
        energies = self._energies(nodes, sums[:, 0], jnp.concatenate([c.now > 0, felt < n]))
        felt = jnp.concatenate([c.index, felt])
        change_of_energy = total(
            jnp.concatenate(
                [energies, -jnp.take(cache.node_energies, felt, mode="fill", fill_value=0)]
            )
        )
        after = plus(*plus(*cache.total, change_of_energy[0]), change_of_energy[1])
        moves = mutated or change.pos is not None
        *slots, crowded = (
            lists.place(cache.space, cache.layout, cache.cells, c.index, c.pos, c.now > 0)
            if moves
            else (None, None, 0)
        )
        end = cache.layout.cells * cache.layout.per_cell
        lost = (slots[0] >= end) & (c.was > 0) if moves else jnp.zeros(1, bool)
        needed = states.needed_of(
            crowded,
            states.beyond(new.count.max(), cache.layout.neighbors),
            *states.misused(change, c, n, lost),
        )
        needed = jnp.maximum(cache.needed, needed)
        count = cache.count + (
            (c.now > 0).sum(dtype=jnp.int32) - (slots[0] < end).sum(dtype=jnp.int32)
            if mutated
            else 0
        )
        proposal = Proposal(
            c.index, c.pos if moves else None, c.now if mutated else None, now if mutated else None, *slots, felt, sums, energies, after, count, needed
        )  # fmt: skip
        bad = needed.any()
        return (
            jnp.where(bad, jnp.nan, sum(after)),
            jnp.where(bad, jnp.nan, sum(change_of_energy)),
            proposal,
        )

    def commit(self, cache, proposal, accept) -> Cache:
        """The proposal's rows where `accept` (a bool scalar, traced or not) is True; else the
        cache, the same to the bit."""
        return self._compiled["commit"](cache, proposal, accept)

    def check(self, cache):
        """ValueError that says what did not fit and what to allocate, if anything did not; for a
        cache or stacked caches, outside of jit."""
        states.check(cache.needed, cache.layout)

    def __call__(self, inputs):
        """The contract's dict, with edges -> energy (B,) and node_energies (N,)."""
        check_inputs(inputs, GRAPH)
        traced = check_unused(self.card, inputs, type(self).__name__)
        pos, numbers, (i, j) = (
            inputs["pos"],
            inputs["atomic_numbers"].astype(jnp.int32),
            inputs["edge_index"],
        )
        here = numbers > 0
        used = (i < len(pos)) & (j < len(pos))
        i, j = jnp.where(used, i, 0), jnp.where(used, j, 0)
        r = (
            pos[j]
            - pos[i]
            + jnp.einsum(
                "ea,eab->eb",
                inputs["cell_offsets"].astype(pos.dtype),
                inputs["cell"][inputs["batch"][i]],
            )
        )
        used &= ((r**2).sum(-1) < self.cutoff**2) & here[i] & here[j]
        nodes = self._nodes(numbers, here)
        sums = jax.ops.segment_sum(self._messages(nodes[i], nodes[j], r, used), i, len(pos))
        energies = self._energies(nodes, sums, here)
        each = jax.ops.segment_sum(energies, inputs["batch"], len(inputs["cell"]))
        return marked({"energy": each, "node_energies": energies}, inputs, traced)

    card = property(
        lambda self: Card(
            outputs={"energy", "node_energies"}, cutoff=self.cutoff, neighbor_list="given"
        )
    )

    @cached_property
    def _compiled(self):
        """Of this object, so that they end with it."""
        return {
            "full": jax.jit(self._full, static_argnums=1),
            "update": jax.jit(self._update),
            "commit": jax.jit(_commit),
        }

    def _before(self, cache, c):
        """Neighbours (K, ...) of the changed atoms where they were, but for one another."""
        one = lambda i, r: lists.near(
            cache.space, cache.layout, self.cutoff, cache.pos, cache.cells.slots, r, i, c.index
        )
        return _masked(jax.vmap(one)(c.index, c.old_pos), c.was > 0)

    def _after(self, cache, c):
        """And where they come to be, one another included: an atom N + k is the k-th of the
        change."""
        images = jnp.asarray(cache.layout.images(len(c.index)))
        k = jnp.arange(len(c.index))
        other, image = (
            x.reshape(-1) for x in jnp.meshgrid(k, jnp.arange(len(images)), indexing="ij")
        )

        def one(k, i, r):
            between = c.pos[other] - r + images[image].astype(r.dtype) @ cache.space.cell
            used = (
                (c.now[other] > 0)
                & ((between**2).sum(-1) < self.cutoff**2)
                & ~((other == k) & (images[image] == 0).all(-1))
            )
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

    def _exchanged(self, cache, old, new, was, now):
        """Sums of messages to the changed atoms (K,M); ends (L,) and messages (L,M), + new and -
        old, to the others."""
        n, mutual = cache.layout.atoms, new.j >= cache.layout.atoms
        nodes = lambda j: jnp.take(cache.nodes, j, axis=0, mode="clip")
        there = _where(mutual, jnp.take(now, new.j - n, axis=0, mode="clip"), nodes(new.j))
        wide = lambda x: jnp.broadcast_to(x[:, None], there.shape)
        rows = [  # centre, neighbour, r from one to the other, which
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

    def _nodes(self, numbers, here):
        spare = jnp.max(numbers, initial=0)  # an element that is known, where there is no atom
        nodes = _result("init", self.init(jnp.where(here, numbers, spare)), len(numbers))
        return _where(here, nodes, 0)

    def _messages(self, centre, neighbour, r, used):
        """Masked, of any leading shape: one call of `edge` for all."""
        shape = used.shape
        rows = lambda x: x.reshape(-1, *x.shape[len(shape) :])
        spare = jnp.array([0.75 * self.cutoff, 0, 0], r.dtype)  # where there is no neighbour
        messages = _result(
            "edge",
            self.edge(rows(centre), rows(neighbour), rows(_where(used, r, spare))),
            used.size,
        )
        return _where(used, messages.reshape(*shape, *messages.shape[1:]), 0)

    def _energies(self, nodes, sums, here):
        return jnp.where(here, _result("readout", self.readout(nodes, sums), len(here), ()), 0)


def _commit(cache, proposal, accept):
    p, n = proposal, cache.layout.atoms
    yes = jnp.asarray(accept) & ~p.needed.any()
    i, felt = jnp.where(yes, p.index, n), jnp.where(yes, p.felt, n)
    set_ = lambda x, at, rows: x if rows is None else x.at[at].set(rows, mode="drop")
    new = dict(
        pos=set_(cache.pos, i, p.pos), atomic_numbers=set_(cache.atomic_numbers, i, p.atomic_numbers), nodes=set_(cache.nodes, i, p.nodes),
        sums=set_(cache.sums, felt, p.sums), node_energies=set_(cache.node_energies, felt, p.node_energies),
        total=tuple(jnp.where(yes, a, b) for a, b in zip(p.total, cache.total)), count=jnp.where(yes, p.count, cache.count), needed=p.needed,
    )  # fmt: skip
    if p.slot is not None:
        new["cells"] = lists.move(cache.layout, cache.cells, p.index, p.old_slot, p.slot, yes)
    return replace(cache, **new)


def _gathered(ends, rows, n):
    """Rows (L, ...) summed by their end: ends, each once and else n, and the sums."""
    order = jnp.argsort(ends)
    ends = ends[order]
    first = jnp.concatenate([jnp.ones(1, bool), ends[1:] != ends[:-1]])
    group = jnp.cumsum(first) - 1
    sums = jax.ops.segment_sum(rows[order], group, len(ends), indices_are_sorted=True)
    return jnp.full(len(ends), n, ends.dtype).at[group].set(ends, indices_are_sorted=True), sums


def _in_chunks(part, n, size):
    """part(indices) -> arrays by row, over all n indices, `size` at a time."""
    if n <= size:
        *rows, worst = part(jnp.arange(n))
        return *rows, worst
    parts = -(-n // size)
    *rows, worst = jax.lax.map(
        part, jnp.minimum(jnp.arange(parts * size), n - 1).reshape(parts, size)
    )
    return *(x.reshape(-1, *x.shape[2:])[:n] for x in rows), worst.max()


def _masked(found, here):
    return found._replace(used=found.used & here[:, None], count=jnp.where(here, found.count, 0))


def _where(mask, x, other):
    return jnp.where(mask.reshape(mask.shape + (1,) * (jnp.ndim(x) - mask.ndim)), x, other)


def _result(name, x, rows, rest=None):
    """What a function returned, if it is an array of as many rows as it was given."""
    if not isinstance(x, jax.Array):
        raise TypeError(
            message(f"an array from {name}", f"a {type(x).__name__}", "return one array")
        )
    if (
        x.ndim < 1
        or len(x) != rows
        or (rest is not None and x.shape[1:] != rest)
        or (rest is None and x.ndim < 2)
    ):
        want = f"({rows},)" if rest == () else f"({rows}, features)"
        raise ValueError(
            message(
                f"{want} from {name} for {rows} rows",
                str(x.shape),
                "return a row for each row given",
            )
        )
    return x
