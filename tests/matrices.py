"""Matrices of parameters: `make test` runs some of their cells, `make test-all` every one.

A test with the mark `matrix` runs in as few cells as have every value of every parameter; with
`matrix(2)`, in as few as have every pair of values. A test or a parameter with the mark `full` holds
in more places, or for longer, what others hold; `make test` leaves it out. What is left out is
deselected, not skipped.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import combinations

import pytest


def a_few(names, keep):
    """Parameters of a test, of which `make test` runs these few: `keep` is their number, evenly
    spread, or their names."""
    names = list(names)
    if isinstance(keep, int):
        keep = {names[i * len(names) // keep] for i in range(keep)}
    return [n if n in keep else pytest.param(n, marks=pytest.mark.full) for n in names]


def cover(cells, strength=1):
    """The places of the cells to run, chosen greedily: most that is new first, then what was used
    least, then the first in order. A cell is a dict {parameter: value}."""
    of_cell = [set(combinations(sorted(cell.items()), strength)) for cell in cells]
    left = set().union(*of_cell)
    used = Counter()
    chosen = []
    while left:
        worth = lambda i: (len(of_cell[i] & left), -sum(used[x] for x in cells[i].items()), -i)
        best = max(range(len(cells)), key=worth)
        chosen.append(best)
        left -= of_cell[best]
        used.update(cells[best].items())
    return sorted(chosen)


def left_out(items):
    """The items of a collection that a run of some cells leaves out."""
    out = [item for item in items if item.get_closest_marker("full")]
    matrices = defaultdict(list)
    for item in items:
        if item.get_closest_marker("matrix"):
            matrices[item.nodeid.split("[")[0]].append(item)
    for cells in matrices.values():
        strength = cells[0].get_closest_marker("matrix").args
        values = [{k: repr(v) for k, v in item.callspec.params.items()} for item in cells]
        chosen = cover(values, *strength)
        out += [item for i, item in enumerate(cells) if i not in chosen]
    return out
