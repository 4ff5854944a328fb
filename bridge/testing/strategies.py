"""Hypothesis strategies that draw NumPy inputs of the potential contract: crystals, molecules,
batches, graphs; and arrays of every layout."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Bool, Float

from bridge.errors import message, missing

try:
    import hypothesis.strategies as st
except ImportError as error:
    raise missing("hypothesis", "bridge.testing") from error

if TYPE_CHECKING:
    from ase import Atoms

Structure = dict[str, np.ndarray]  # with the keys of bridge.contract
Structures = st.SearchStrategy[Structure]
Number = int | tuple[int, int]  # a number, or (least, most)
# Steps of the R3 sequence, whose points stay apart and have no symmetry.
SPREAD = np.array([0.8192, 0.671, 0.5497])
IMAGES = np.array(list(itertools.product((-2, -1, 0, 1, 2), repeat=3)))
Layout = Literal["C", "F", "strided", "reversed", "broadcast", "offset"]
LAYOUTS: tuple[Layout, ...] = ("C", "F", "strided", "reversed", "broadcast", "offset")
DTYPES = (
    "float32",
    "float64",
    "int32",
    "int64",
    "bool",
    "uint8",
    "float16",
    "complex64",
    "complex128",
)


def crystals(
    elements: Sequence[int] = (8, 14),
    n_atoms: Number = (1, 4),
    *,
    min_distance: float = 1.6,
    lengths: tuple[float, float] | None = None,
    pbc: Sequence[bool] | None = None,
    dtype: str = "float64",
) -> Structures:
    """Returns a strategy for one periodic structure: a dict of NumPy arrays with the keys of
    bridge.contract, for B = 1.

        pos (N,3), cell (1,3,3) by rows, pbc (1,3) bool, batch (N,) zeros, atomic_numbers (N,) int64

    Lengths are in Angstrom. `n_atoms` is a number or (least, most), and `elements` are atomic
    numbers. No two atoms, images included, are closer than `min_distance`. Cells are triclinic and
    of either handedness. Their lengths are within `lengths` (least, most). The default goes from
    just over min_distance to three times that, so that most cells are smaller than a model's
    cutoff. A cell grows if `n_atoms` do not fit. `pbc` says as three booleans which axes are
    periodic. None draws this; all three axes are periodic half of the time.

    A structure shrinks towards one atom of the first element, in a small orthogonal cell with all
    axes periodic. Coordinates have three decimals.

    Raises: ValueError for an empty choice (no elements, least > most, min_distance that is not
    positive).

    >>> from hypothesis import find
    >>> find(crystals((14,), min_distance=2.0), lambda s: len(s["pos"]) > 1)["atomic_numbers"].tolist()
    [14, 14]
    """
    least, most = _choice(elements, n_atoms, min_distance)
    low, high = lengths or (1.1 * min_distance, 3 * min_distance)
    if not min_distance <= low <= high:
        raise ValueError(
            message(
                f"lengths (least, most) from min_distance={min_distance} up",
                f"{low, high}",
                "give longer cells, or a smaller min_distance",
            )
        )
    mixed = [p for p in itertools.product((True, False), repeat=3) if 0 < sum(p) < 3]
    axes: st.SearchStrategy[tuple[bool, ...]]
    if pbc is None:
        axes = st.just((True,) * 3) | st.sampled_from(mixed)
    else:
        axes = st.just(tuple(map(bool, pbc)))
    three = st.integers(0, 21**3 - 1)
    settings = dict(least=least, min_distance=min_distance, low=low, high=high, dtype=dtype)
    return st.builds(
        lambda *drawn: _structure(*drawn, **settings),
        axes,
        three,
        three,
        st.integers(0, 2),
        st.booleans(),
        st.integers(0, 3),
        _atoms(elements, least, most),
    )


def molecules(
    elements: Sequence[int] = (8, 14),
    n_atoms: Number = (1, 4),
    *,
    min_distance: float = 1.6,
    dtype: str = "float64",
) -> Structures:
    """Returns a strategy for one structure without periodic axes.

    It is that of `crystals`, with a cell of zeros and pbc False.
    """
    inside = crystals(elements, n_atoms, min_distance=min_distance, pbc=(False,) * 3, dtype=dtype)
    return inside.map(lambda s: s | {"cell": np.zeros_like(s["cell"])})


def batches(
    structures: Structures | None = None, n_systems: Number = (1, 3), **options: Any
) -> Structures:
    """Returns a strategy for several structures in one dict, as the contract has them: batch is
    sorted, and the B systems have unequal sizes.

    `structures` is a strategy for one of them. The default is crystals and molecules, made with
    `options`.
    """
    if structures is None:
        structures = crystals(**options) | molecules(**options)
    least, most = _range(n_systems)
    return st.lists(structures, min_size=least, max_size=most).map(concatenate)


def graphs(
    structures: Structures | None = None,
    cutoff: float = 4.0,
    padding: Number = (0, 5),
    **options: Any,
) -> Structures:
    """Returns a strategy for structures with padding and with all edges shorter than `cutoff`, as
    edge_index (2,E) and cell_offsets (E,3).

    `structures` is a strategy of `crystals`, `molecules` or `batches` (the default, made with
    `options`). `padding` is a number or (least, most) of two things that are drawn independently:
    unused slots (index >= N) at any place among the edges, and atoms of number 0 at the end of the
    last system. This needs torch and vesin.
    """
    structures = batches(**options) if structures is None else structures
    count = st.integers(*_range(padding))
    return st.builds(
        lambda s, atoms, slots, seed: pad(with_edges(s, cutoff), atoms, slots, seed),
        structures,
        count,
        count,
        st.integers(0, 99),
    )


@st.composite
def arrays(
    draw: st.DrawFn,
    dtypes: Sequence[str] = DTYPES,
    shapes: st.SearchStrategy[Sequence[int]] | None = None,
    layouts: Sequence[Layout] = LAYOUTS,
) -> np.ndarray:
    """Returns a strategy for one NumPy array of any of the `dtypes`, in any of the `layouts`.

    It has 0 to 3 axes of sizes 0 to 4, unless `shapes` is a strategy for others. The layouts are
    "C" and "F" order, "strided" (every second element), "reversed" (negative strides), "broadcast"
    (stride 0, read-only) and "offset" (begins one element into its memory). Values are small, and
    exact in all dtypes. They shrink to zeros in C order.
    """
    sizes = st.lists(st.integers(0, 4), max_size=3) if shapes is None else shapes
    shape = tuple(draw(sizes))
    dtype = np.dtype(draw(st.sampled_from(list(dtypes))))
    layout = draw(st.sampled_from(list(layouts)))
    size = int(np.prod(shape))
    integers = st.integers(0 if dtype.kind in "ub" else -8, 8)
    numbers = np.array(draw(st.lists(integers, min_size=size, max_size=size)), float)
    factor = {"f": 0.25, "c": 0.25 + 0.5j}.get(dtype.kind, 1)
    return laid_out((numbers * factor).astype(dtype).reshape(shape), layout)


def laid_out(x: np.ndarray, layout: Layout) -> np.ndarray:
    """Returns x in that layout. "broadcast" repeats its first row."""
    if layout == "broadcast":
        return np.broadcast_to(x[:1], x.shape) if x.ndim and len(x) else x
    if layout == "reversed":
        every = (slice(None, None, -1),) * x.ndim
        return x[every].copy()[every]
    if layout == "strided":
        room = np.zeros([2 * n for n in x.shape], x.dtype)
        room[(slice(None, None, 2),) * x.ndim] = x
        return room[(slice(None, None, 2),) * x.ndim]
    if layout == "offset":
        return np.concatenate([np.zeros(1, x.dtype), x.ravel()])[1:].reshape(x.shape)
    return np.array(x, order=layout)


def concatenate(structures: Sequence[Structure]) -> Structure:
    """Returns several structures as one dict. batch is made anew, and edges are left out."""
    sizes = np.concatenate([np.bincount(s["batch"], minlength=len(s["cell"])) for s in structures])
    kept = [k for k in structures[0] if k not in ("batch", "edge_index", "cell_offsets")]
    joined = {k: np.concatenate([s[k] for s in structures]) for k in kept}
    return joined | {"batch": np.repeat(np.arange(len(sizes)), sizes)}


def systems_of(s: Structure) -> Iterator[Structure]:
    """Yields the systems of a dict, each a dict of its own."""
    for b in range(len(s["cell"])):
        own = s["batch"] == b
        atoms = {k: s[k][own] for k in ("pos", "atomic_numbers")}
        cells = {k: s[k][[b]] for k in ("cell", "pbc")}
        yield atoms | cells | {"batch": np.zeros(own.sum(), np.int64)}


def with_edges(structure: Structure, cutoff: float) -> Structure:
    """Returns the structure with its edges, from torch_side.potentials.neighbors."""
    import torch

    from torch_side.potentials.neighbors import neighbor_list

    pos, cell, pbc, batch = (
        torch.from_numpy(structure[k]) for k in ("pos", "cell", "pbc", "batch")
    )
    index, offsets = neighbor_list(pos, cell, pbc, cutoff, batch)
    return structure | {"edge_index": index.numpy(), "cell_offsets": offsets.numpy()}


def pad(structure: Structure, n_atoms: int, n_slots: int, seed: int = 0) -> Structure:
    """Returns the structure with `n_atoms` atoms of padding (number 0, last, in the last system)
    and `n_slots` unused slots (index N) among its edges."""
    s, more = dict(structure), {"pos": n_atoms, "atomic_numbers": n_atoms, "cell_offsets": n_slots}
    for k, n in more.items():
        s[k] = np.concatenate([s[k], np.zeros((n, *s[k].shape[1:]), s[k].dtype)])
    last = np.full(n_atoms, len(s["cell"]) - 1, s["batch"].dtype)
    s["batch"] = np.concatenate([s["batch"], last])
    slots = np.random.default_rng(seed).permutation(s["edge_index"].shape[1] + n_slots)
    unused = np.full((2, n_slots), len(s["pos"]), s["edge_index"].dtype)
    s["edge_index"] = np.concatenate([s["edge_index"], unused], 1)[:, slots]
    s["cell_offsets"] = s["cell_offsets"][slots]
    return s


def distances(
    pos: Float[np.ndarray, "N 3"], cell: Float[np.ndarray, "3 3"], pbc: Bool[np.ndarray, " 3"]
) -> Float[np.ndarray, "N N"]:
    """Returns the shortest distances between atoms, images included.

    The diagonal has the distances of atoms to their own images, inf if there are none.
    """
    images = IMAGES[~(IMAGES[:, ~pbc] != 0).any(1)]
    r = np.linalg.norm(pos[None, :, None] - pos[:, None, None] + images @ cell, axis=-1)
    r[np.arange(len(pos)), np.arange(len(pos)), (images == 0).all(1).argmax()] = np.inf
    return r.min(-1)


def of_ase(atoms: Atoms | dict[str, Any]) -> Structure:
    """Returns an ase.Atoms, or a dict of the contract, as a dict of NumPy arrays."""
    if isinstance(atoms, dict):
        s = {k: np.asarray(x) for k, x in atoms.items()}
        return s if "batch" in s else s | {"batch": np.zeros(len(s["pos"]), np.int64)}
    pos = np.array(atoms.positions, float)
    cell = np.where(np.any(atoms.pbc), np.array(atoms.cell.array, float), 0.0)[None]
    return {
        "pos": pos,
        "cell": cell,
        "pbc": np.array([atoms.pbc]),
        "batch": np.zeros(len(pos), np.int64),
        "atomic_numbers": np.array(atoms.numbers, np.int64),
    }


def _atoms(
    elements: Sequence[int], least: int, most: int
) -> st.SearchStrategy[list[tuple[int, int]]]:
    """A strategy for lists of atoms, each (element, its displacement in one number)."""
    atom = st.tuples(st.sampled_from(list(elements)), st.integers(0, 51**3 - 1))
    return st.integers(least, most).flatmap(lambda n: st.lists(atom, min_size=n, max_size=n))


def _structure(
    pbc: tuple[bool, ...],
    sizes: int,
    shears: int,
    turn: int,
    left: bool,
    narrow: int,
    atoms: list[tuple[int, int]],
    *,
    least: int,
    min_distance: float,
    low: float,
    high: float,
    dtype: str,
) -> Structure:
    """The dict of what was drawn. The cell grows until all atoms fit, or until the `least` number
    does where atoms that come too close are left out (`narrow` > 2)."""
    a, b, c = (low + (high - low) * k / 20 for k in _digits(sizes, 21))
    xy, xz, yz = (k / 20 for k in _signed(shears, 21))
    rows = [[a, 0, 0], [xy * a, b, 0], [xz * a, yz * b, -c if left else c]]
    cell = np.round(np.roll(rows, turn, axis=1), 2)
    sites = np.arange(len(atoms))[:, None] * SPREAD % 1
    moves = np.array([_signed(m, 51) for _, m in atoms]).reshape(-1, 3) / 100
    axes = np.array(pbc)
    wanted = least if narrow > 2 else len(atoms)
    kept = _fitting(cell, axes, sites + moves, min_distance)
    while len(kept) < wanted:
        cell, moves = np.round(1.2 * cell, 2), moves / 2
        kept = _fitting(cell, axes, sites + moves, min_distance)
    n = len(kept)
    return {
        "pos": np.round((sites + moves)[kept] @ cell, 3).astype(dtype),
        "cell": cell[None].astype(dtype),
        "pbc": axes[None],
        "batch": np.zeros(n, np.int64),
        "atomic_numbers": np.array([atoms[i][0] for i in kept], np.int64),
    }


def _digits(number: int, base: int) -> list[int]:
    """Three numbers from one, which hypothesis draws and shrinks faster than three."""
    return [number // base**k % base for k in range(3)]


def _signed(number: int, base: int) -> list[int]:
    """As _digits, from -base/2 to base/2."""
    return [d - base * (d > base // 2) for d in _digits(number, base)]


def _fitting(
    cell: np.ndarray, pbc: np.ndarray, sites: np.ndarray, min_distance: float
) -> list[int]:
    """Which sites keep a distance from all that are kept before them."""
    pos = np.round(sites @ cell, 3)
    far = distances(pos, cell, pbc) >= min_distance
    kept: list[int] = []
    for i in range(len(sites)):
        if far[i, [*kept, i]].all():
            kept.append(i)
    return kept


def _choice(elements: Sequence[int], n_atoms: Number, min_distance: float) -> tuple[int, int]:
    """(least, most) atoms. Raises ValueError for arguments from which nothing can be drawn."""
    if not len(elements) or not min_distance > 0:
        got = f"elements {tuple(elements)}, min_distance={min_distance}"
        raise ValueError(
            message(
                "at least one element and a positive min_distance",
                got,
                "pass atomic numbers and Angstrom",
            )
        )
    least, most = _range(n_atoms)
    if least < 1:
        raise ValueError(
            message("at least one atom", f"n_atoms={n_atoms}", "pass a number or (least, most)")
        )
    return least, most


def _range(number: Number) -> tuple[int, int]:
    """(least, most)."""
    least, most = (number, number) if isinstance(number, int) else number
    if not 0 <= least <= most:
        raise ValueError(
            message("a number, or (least, most)", f"{number}", "put the smaller one first")
        )
    return least, most
