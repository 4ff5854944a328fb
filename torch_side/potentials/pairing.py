"""Bonds and angles of a graph in fixed numbers of slots, found without a look at any value.

The graphs are those that `static` makes: the last atoms are its ghosts, and what is no edge of the
model leads from one ghost to the other. `neighbors.bonds` finds the same bonds, in as many slots as
there are bonds.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int

from bridge.errors import message
from torch_side.calls.status import Status
from torch_side.potentials import padding
from torch_side.potentials.neighbors import one_way
from torch_side.potentials.static import GHOSTS

_WIDE = 2**20  # three offsets and a bit fit in 64 bits; larger ones count as edges without partners


def bonds(
    edges: Int[torch.Tensor, "2 E"], offsets: Int[torch.Tensor, "E 3"], n_atoms: int, found: Status
) -> tuple[Int[torch.Tensor, " E"], Int[torch.Tensor, " bonds"]]:
    """Returns the bond (undirected edge) of each directed edge, and one directed edge of each bond,
    which is the edge that neighbors.bonds takes.

    There are E/2 bonds, rounded up. Edges between ghosts are bonds as they come, after the others.
    An edge that is not there exactly once in both directions is noted in `found`."""
    flipped, rows = one_way(edges.long(), offsets.long())
    i, j, a, b, c = rows.T
    # the two directions of an edge lie next to each other, the one that is not flipped first
    order = (((a * _WIDE + b) * _WIDE + c) * 2 + flipped).argsort(stable=True)
    order = order[(i * n_atoms + j)[order].argsort(stable=True)]
    first, second = order[0::2], order[1::2]
    there = first[: len(second)]
    matched = (rows[there] == rows[second]).all(1) & ~flipped[there] & flipped[second]
    matched = torch.nn.functional.pad(matched, (0, len(first) - len(second)))
    bad = ~matched & (i[first] < n_atoms - GHOSTS)
    got = "another number of the one between atoms {} and {} with offset [{}, {}, {}]"
    text = message(
        "each edge once in both directions", got, "look at how the edges were made, or pass none"
    )
    found.note(bad, text, *edges[:, first], *offsets[first].T)
    number = torch.arange(len(order), device=order.device)
    return torch.zeros_like(order).index_copy(0, order, number // 2), first


def angles(
    centres: Int[torch.Tensor, " E"],
    short: Bool[torch.Tensor, " E"],
    n_atoms: int,
    per_atom: int,
    found: Status,
) -> Int[torch.Tensor, "2 angles"]:
    """Returns all pairs of two of the short edges that have one centre, each pair once.

    There are slots for `per_atom` angles of each atom, on average. Unused ones hold E, and edges of
    the ghosts form no angles. If there are more angles than slots, this is noted in `found`."""
    real = n_atoms - GHOSTS
    if not len(centres):
        return centres.new_zeros(2, 0)
    short = short & (centres < real)
    order = torch.where(short, centres, n_atoms).argsort(stable=True)
    count = padding.counted(centres, n_atoms, short)
    start = count.cumsum(0) - count  # of the short edges of each atom in `order`
    pairs = count * (count - 1) // 2
    ends = pairs.cumsum(0)
    total = ends[-1:]
    slots = per_atom * real
    expected = f"at most {slots} angles, angles_per_atom={per_atom} for each of {real} atoms"
    do = "pass angles_per_atom={} or more to the model, with some room to spare"
    text = message(expected, "{}", do)
    found.note(total > slots, text, total, -(-total // max(real, 1)))
    slot = torch.arange(slots, device=order.device)
    atom = torch.searchsorted(ends, slot, right=True).clamp(max=n_atoms - 1)
    within = slot - (ends - pairs)[atom]
    # pair number l (l - 1) / 2 + k is that of the edges k < l of an atom
    number = torch.arange(len(order), device=order.device)
    before = number * (number - 1) // 2
    second = torch.searchsorted(before, within, right=True) - 1
    both = torch.stack([within - before[second], second])
    # beyond the last pair there is no such edge
    both = (start[atom] + both).clamp(0, len(order) - 1)
    return torch.where(slot < total, order[both], len(order))
