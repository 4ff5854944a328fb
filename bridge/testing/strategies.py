"""Hypothesis strategies that draw NumPy inputs of the potential contract: crystals, molecules,
batches, graphs; and arrays of every layout."""

from __future__ import annotations

import itertools
from functools import reduce

import numpy as np

from bridge.errors import message, missing

try:
    import hypothesis.strategies as st
except ImportError as error:
    raise missing("hypothesis", "bridge.testing") from error

# steps of the R3 sequence: points that stay apart and have no symmetry
SPREAD = np.array([0.8192, 0.671, 0.5497])
IMAGES = np.array(list(itertools.product((-2, -1, 0, 1, 2), repeat=3)))
LAYOUTS = ("C", "F", "strided", "reversed", "broadcast", "offset")
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
    elements=(8, 14), n_atoms=(1, 4), *, min_distance=1.6, lengths=None, pbc=None, dtype="float64"
):
    """A strategy for one periodic structure: a dict of NumPy arrays with the keys of
    bridge.contract, B = 1.

        pos (N,3), cell (1,3,3) by rows, pbc (1,3) bool, batch (N,) zeros, atomic_numbers (N,) int64

    Lengths are in Angstrom. `n_atoms` is a number or (least, most); `elements` are atomic numbers;
    no two atoms, images included, are closer than `min_distance`. Cells are triclinic, of either
    handedness, each length among `lengths`, (least, most), by default from just over min_distance
    to three times that: mostly smaller than a model's cutoff. A cell grows where `n_atoms` do not
    fit. `pbc` is the periodicity of all axes as three booleans; None draws it, all three axes half
    of the time.

    It shrinks towards one atom, the first element, and a small orthogonal cell with all axes
    periodic. Coordinates have three decimals.

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
    axes = (
        st.just((True,) * 3) | st.sampled_from(mixed)
        if pbc is None
        else st.just(tuple(map(bool, pbc)))
    )
    three = st.integers(0, 21**3 - 1)
    return st.builds(
        lambda *drawn: _structure(*drawn, least, min_distance, low, high, dtype),
        axes,
        three,
        three,
        st.integers(0, 2),
        st.booleans(),
        st.integers(0, 3),
        _atoms(elements, least, most),
    )


def molecules(elements=(8, 14), n_atoms=(1, 4), *, min_distance=1.6, dtype="float64"):
    """A strategy for one structure without periodic axes: as `crystals`, with a cell of zeros and
    pbc False."""
    inside = crystals(elements, n_atoms, min_distance=min_distance, pbc=(False,) * 3, dtype=dtype)
    return inside.map(lambda s: s | {"cell": np.zeros_like(s["cell"])})


def batches(structures=None, n_systems=(1, 3), **options):
    """A strategy for several structures in one dict, as the contract has them: batch sorted, B
    systems of unequal sizes.

    `structures` is a strategy for one of them; by default crystals and molecules, made with
    `options`."""
    if structures is None:
        structures = crystals(**options) | molecules(**options)
    least, most = _range(n_systems)
    return st.lists(structures, min_size=least, max_size=most).map(concatenate)


def graphs(structures=None, cutoff=4.0, padding=(0, 5), **options):
    """A strategy for structures with edge_index (2,E) and cell_offsets (E,3), all edges shorter
    than `cutoff`, and padding.

    `structures` is a strategy of `crystals`, `molecules` or `batches` (the default, made with
    `options`). `padding` is a number or (least, most): that many unused slots (index >= N), at any
    place among the edges, and as many atoms of number 0 at the end of the last system are drawn,
    each on its own. Needs torch and vesin."""
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
def arrays(draw, dtypes=DTYPES, shapes=None, layouts=LAYOUTS):
    """A strategy for one NumPy array: of any of the `dtypes`, of 0 to 3 axes (sizes 0 to 4;
    `shapes` is a strategy for others), in any layout.

    Layouts: "C" and "F" order, "strided" (every second element), "reversed" (negative strides),
    "broadcast" (stride 0, read-only), "offset" (begins one element into its memory). Values are
    small and exact in all dtypes; they shrink to zeros in C order."""
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3) if shapes is None else shapes))
    dtype, layout = (
        np.dtype(draw(st.sampled_from(list(dtypes)))),
        draw(st.sampled_from(list(layouts))),
    )
    size = int(np.prod(shape))
    numbers = np.array(
        draw(
            st.lists(st.integers(0 if dtype.kind in "ub" else -8, 8), min_size=size, max_size=size)
        ),
        float,
    )
    values = (
        (
            numbers / 4
            if dtype.kind == "f"
            else numbers * (0.25 + 0.5j)
            if dtype.kind == "c"
            else numbers
        )
        .astype(dtype)
        .reshape(shape)
    )
    return laid_out(values, layout)


def laid_out(x, layout):
    """x in that layout; "broadcast" repeats its first row."""
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


def concatenate(structures):
    """Several structures as one dict, batch made anew. Edges are not taken along."""
    sizes = np.concatenate([np.bincount(s["batch"], minlength=len(s["cell"])) for s in structures])
    kept = [k for k in structures[0] if k not in ("batch", "edge_index", "cell_offsets")]
    return {k: np.concatenate([s[k] for s in structures]) for k in kept} | {
        "batch": np.repeat(np.arange(len(sizes)), sizes)
    }


def systems_of(s):
    """The systems of a dict, each a dict of its own."""
    for b in range(len(s["cell"])):
        own = s["batch"] == b
        atoms, cells = (
            {k: s[k][own] for k in ("pos", "atomic_numbers")},
            {k: s[k][[b]] for k in ("cell", "pbc")},
        )
        yield atoms | cells | {"batch": np.zeros(own.sum(), np.int64)}


def with_edges(structure, cutoff):
    """The structure with its edges, from torch_side.potentials.neighbors."""
    import torch

    from torch_side.potentials.neighbors import neighbor_list

    edges = neighbor_list(
        *(torch.from_numpy(structure[k]) for k in ("pos", "cell", "pbc")),
        cutoff,
        torch.from_numpy(structure["batch"]),
    )
    return structure | dict(zip(("edge_index", "cell_offsets"), (x.numpy() for x in edges)))


def pad(structure, n_atoms, n_slots, seed=0):
    """The structure with padding atoms (number 0, last, in the last system) and unused slots (index
    N) among its edges."""
    s, zeros = dict(structure), lambda n, x: np.zeros((n, *x.shape[1:]), x.dtype)
    s["pos"], s["atomic_numbers"] = (
        np.concatenate([s[k], zeros(n_atoms, s[k])]) for k in ("pos", "atomic_numbers")
    )
    s["batch"] = np.concatenate(
        [s["batch"], np.full(n_atoms, len(s["cell"]) - 1, s["batch"].dtype)]
    )
    slots = np.random.default_rng(seed).permutation(s["edge_index"].shape[1] + n_slots)
    unused = np.full((2, n_slots), len(s["pos"]), s["edge_index"].dtype)
    s["edge_index"] = np.concatenate([s["edge_index"], unused], 1)[:, slots]
    s["cell_offsets"] = np.concatenate([s["cell_offsets"], zeros(n_slots, s["cell_offsets"])])[
        slots
    ]
    return s


def distances(pos, cell, pbc):
    """Shortest distances between atoms (N,N), images included; on the diagonal to an atom's own
    images (inf without any)."""
    images = IMAGES[~(IMAGES[:, ~pbc] != 0).any(1)]
    r = np.linalg.norm(pos[None, :, None] - pos[:, None, None] + images @ cell, axis=-1)
    r[np.arange(len(pos)), np.arange(len(pos)), (images == 0).all(1).argmax()] = np.inf
    return r.min(-1)


def of_ase(atoms):
    """An ase.Atoms, or a dict of the contract, as a dict of NumPy arrays."""
    if isinstance(atoms, dict):
        s = {k: np.asarray(x) for k, x in atoms.items()}
        return s if "batch" in s else s | {"batch": np.zeros(len(s["pos"]), np.int64)}
    pos = np.array(atoms.positions, float)
    cell = np.where(np.any(atoms.pbc), np.array(atoms.cell[:], float), 0.0)[None]
    return {
        "pos": pos,
        "cell": cell,
        "pbc": np.array([atoms.pbc]),
        "batch": np.zeros(len(pos), np.int64),
        "atomic_numbers": np.array(atoms.numbers, np.int64),
    }


def _atoms(elements, least, most):
    """Lists of (element, its displacement in one number)."""
    atom = st.tuples(st.sampled_from(list(elements)), st.integers(0, 51**3 - 1))
    return st.integers(least, most).flatmap(lambda n: st.lists(atom, min_size=n, max_size=n))


def _structure(
    pbc, sizes, shears, turn, left, narrow, atoms, least, min_distance, low, high, dtype
):
    """The dict of what was drawn: the cell grows until all fit, or atoms that come too close are
    left out."""
    a, b, c = (low + (high - low) * k / 20 for k in _digits(sizes, 21))
    xy, xz, yz = (k / 20 for k in _signed(shears, 21))
    cell = np.round(
        np.roll([[a, 0, 0], [xy * a, b, 0], [xz * a, yz * b, -c if left else c]], turn, axis=1), 2
    )
    sites, moves, pbc = (
        np.arange(len(atoms))[:, None] * SPREAD % 1,
        np.array([_signed(m, 51) for _, m in atoms]).reshape(-1, 3) / 100,
        np.array(pbc),
    )
    kept = _fitting(cell, pbc, sites + moves, min_distance)
    while len(kept) < (least if narrow > 2 else len(atoms)):
        cell, moves = np.round(1.2 * cell, 2), moves / 2
        kept = _fitting(cell, pbc, sites + moves, min_distance)
    n = len(kept)
    return {
        "pos": np.round((sites + moves)[kept] @ cell, 3).astype(dtype),
        "cell": cell[None].astype(dtype),
        "pbc": pbc[None],
        "batch": np.zeros(n, np.int64),
        "atomic_numbers": np.array([atoms[i][0] for i in kept], np.int64),
    }


def _digits(number, base):
    """Three numbers from one, which hypothesis draws and shrinks sooner than three."""
    return [number // base**k % base for k in range(3)]


def _signed(number, base):
    """As _digits, from -base/2 to base/2."""
    return [d - base * (d > base // 2) for d in _digits(number, base)]


def _fitting(cell, pbc, sites, min_distance):
    """Which sites stay at a distance from all before them."""
    pos = np.round(sites @ cell, 3)
    far = distances(pos, cell, pbc) >= min_distance
    return reduce(
        lambda kept, i: [*kept, i] if far[i, [*kept, i]].all() else kept, range(len(sites)), []
    )


def _choice(elements, n_atoms, min_distance):
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


def _range(number):
    least, most = (number, number) if isinstance(number, int) else number
    if not 0 <= least <= most:
        raise ValueError(
            message("a number, or (least, most)", f"{number}", "put the smaller one first")
        )
    return least, most
