"""The potential contract: keys, shapes, units, signs. Standard library only.

Lattice vectors are the rows of the cell h, so that a position is r = s h for fractional coordinates
s. Units are eV and Angstrom. There are N atoms, B systems and E edges. Nothing here imports a
framework: an array is anything with `.shape` and `.dtype`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

from bridge.errors import message, spec

# The shape, each size an int or the letter that stands for it; the kind of dtype; the meaning.
Row = tuple[tuple[Any, ...], str, str]


class Shaped(Protocol):
    """An array of any framework, as far as the contract looks at it."""

    @property
    def shape(self) -> Sequence[int]:
        """Sizes of its axes."""
        ...

    @property
    def dtype(self) -> Any:
        """A dtype whose text is its name, with or without the framework in front."""
        ...


INPUTS: dict[str, Row] = {
    "pos": (("N", 3), "float", "Cartesian positions in Angstrom, any periodic image"),
    "atomic_numbers": (("N",), "int", "0 marks a padding atom"),
    "cell": (
        ("B", 3, 3),
        "float",
        "lattice vectors as rows, Angstrom; zeros where nothing is periodic",
    ),
    "pbc": (("B", 3), "bool", "which axes are periodic"),
    "edge_index": (
        (2, "E"),
        "int",
        "[0] centre i, [1] neighbour j, both directions; >= N marks an unused slot",
    ),
    "cell_offsets": (("E", 3), "int", "r_ij = r_j - r_i + cell_offsets @ cell[batch[i]]"),
    "batch": (("N",), "int", "system of each atom, sorted"),
    "charge": (("B",), "float", "total charge in e, passed on as given"),
    "spin": (("B",), "float", "passed on as given"),
    "field": (
        ("B", 3),
        "float",
        "homogeneous electric field in V/Angstrom, passed on as given",
    ),
}
OUTPUTS: dict[str, Row] = {
    "energy": (("B",), "float", "eV, extensive"),
    "position_gradients": (
        ("N", 3),
        "float",
        "g = dE/dr at fixed cell, eV/Angstrom; forces are -g",
    ),
    "cell_gradients": (("B", 3, 3), "float", "G = dE/dh at fixed Cartesian positions, eV/Angstrom"),
    "node_energies": (("N",), "float", "eV, atom by atom"),
    "node_virials": (
        ("N", 3, 3),
        "float",
        "eV, what each atom adds to W = dE/de: w_j = sum of r_ij (dE/dr_ij)^T over the edges to j",
    ),
    "charges": (("N",), "float", "partial charges in e"),
    "magmoms": (("N",), "float", "magnetic moments in Bohr magnetons"),
    "dipole": (("B", 3), "float", "e Angstrom"),
    "embeddings": (("N", "F"), "float", "features of each atom"),
    "hessian": (
        ("N", 3, "N", 3),
        "float",
        "d2E/dr dr at fixed cell, eV/Angstrom^2; zero between systems",
    ),
    "energy_std": (("B",), "float", "eV, spread of a committee of M models (standard deviation)"),
    "position_gradients_std": (("N", 3), "float", "eV/Angstrom, spread of a committee"),
    "member_energies": (("M", "B"), "float", "eV, each of a committee"),
    "member_position_gradients": (("M", "N", 3), "float", "eV/Angstrom, each of a committee"),
}
INFO = ("charge", "spin")  # numbers of a system that a potential may have no use for
# inputs of a system that must be zero where a potential has no use for them
CONDITIONS = (*INFO, "field")
# Outputs of a sum of potentials that are the sums of their outputs.
ADDITIVE = (
    "energy",
    "position_gradients",
    "cell_gradients",
    "node_energies",
    "node_virials",
    "hessian",
    "dipole",
)
STRUCTURE = ("pos", "atomic_numbers", "cell", "pbc", "batch")  # what a structure model takes
GRAPH = (*STRUCTURE, "edge_index", "cell_offsets")  # what a graph model takes
GRADIENTS = {"pos": "position_gradients", "cell": "cell_gradients"}  # input: its gradient
ENERGY_AND_GRADIENTS = ("energy", *GRADIENTS.values())  # of a model that gives its own gradients
DTYPES = {
    "float": ("float16", "bfloat16", "float32", "float64"),
    "int": ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    "bool": ("bool", "bool_"),
}


def output_shapes(
    n_atoms: int,
    n_systems: int,
    names: Iterable[str] = (*ENERGY_AND_GRADIENTS, "node_energies"),
    **sizes: int,
) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the outputs `names`, for N atoms in B systems.

    `sizes` are the sizes of other axes: F features, M models of a committee.

    >>> output_shapes(5, 2)["cell_gradients"], output_shapes(5, 2, ["embeddings"], F=64)["embeddings"]
    ((2, 3, 3), (5, 64))
    """
    known: dict[Any, Any] = {**sizes, "N": n_atoms, "B": n_systems}
    return {name: tuple(known.get(d, d) for d in OUTPUTS[name][0]) for name in names}


def called(model: Callable[[Any], Any], inputs: Mapping[str, Any], who: str) -> Any:
    """Returns model(inputs).

    Raises: ValueError where the model, called `who`, reads an optional input of the contract that
    nobody gave (it says how it is given), and what the model raises."""
    try:
        return model(inputs)
    except KeyError as error:
        name = error.args[0] if error.args else None
        if name not in INPUTS or name in STRUCTURE or inputs.get(name) is not None:
            raise
        raise _unread(name, who) from error


def _unread(name: str, who: str) -> ValueError:
    """The error for an optional input that a model reads and nobody gave."""
    do = "pass it with the call"
    if name in GRAPH:
        do = "pass cutoff=..., in Angstrom, so that edges are found, or pass edges with the call"
    return ValueError(message(f"{name} among the inputs, which {who} reads", "none", do))


def check_inputs(
    inputs: Mapping[str, Shaped | None], required: Iterable[str] = STRUCTURE
) -> tuple[int, int]:
    """Checks the dict that a model is called with, by shapes and dtype names alone; returns (N, B).

    `inputs` holds arrays of any framework under the keys of `INPUTS`. Keys outside of the contract
    are passed over. N is taken from pos and B from cell. No value of an array is read, cast or
    moved, so that tracers are welcome.

    Raises: ValueError where a key of `required` is missing, where a shape or a kind of dtype is not
    the contract's, or where pos and cell differ in dtype.

    >>> from types import SimpleNamespace as A
    >>> check_inputs({"pos": A(shape=(2, 3), dtype="float32"), "cell": A(shape=(1, 3, 3), dtype="float32")}, ("pos",))
    (2, 1)
    """
    kinds = tuple(
        (name, tuple(x.shape), dtype_name(x))
        for name, x in inputs.items()
        if x is not None and name in INPUTS
    )
    return _check_inputs(kinds, tuple(required))


_Kinds = tuple[tuple[str, tuple[int, ...], str], ...]  # (name, shape, dtype) of several arrays


@lru_cache(maxsize=256)
def _check_inputs(arrays: _Kinds, required: tuple[str, ...]) -> tuple[int, int]:
    """Runs once for each set of shapes and dtypes."""
    inputs = {name: _Type(shape, dtype) for name, shape, dtype in arrays}
    absent = [name for name in required if name not in inputs]
    if absent:
        raise ValueError(
            message(
                f"the inputs {', '.join(required)}",
                f"no {', '.join(absent)}",
                "add what is missing",
            )
        )
    sizes = _check(inputs, INPUTS, {})
    same_dtype(inputs)
    return sizes.get("N", 0), sizes.get("B", 0)


class _Type(NamedTuple):
    shape: tuple[int, ...]
    dtype: str


def check_outputs(
    outputs: Mapping[str, Any],
    n_atoms: int,
    n_systems: int,
    required: Iterable[str] = ("energy",),
    dtype: str | None = None,
) -> None:
    """Checks what a model returned for N atoms in B systems, by shapes and dtype names alone.

    `required` are the outputs that must be there. `dtype` is the dtype that floats must have (that
    of pos); None allows any.

    Raises: ValueError as check_inputs does; TypeError where `outputs` is no dict, or holds
    something else than arrays under a name of the contract.
    """
    if not isinstance(outputs, dict):
        raise TypeError(
            message("a dict of outputs of the contract", type(outputs).__name__, _RETURN)
        )
    absent = [name for name in required if name not in outputs]
    if absent:
        got = f"only {', '.join(sorted(outputs)) or 'nothing'}"
        raise ValueError(
            message(f"the outputs {', '.join(required)}", got, missing(absent, outputs))
        )
    for name, x in outputs.items():
        if name in OUTPUTS and not (hasattr(x, "shape") and hasattr(x, "dtype")):
            raise TypeError(message(f"{name} as an array", type(x).__name__, _RETURN))
    types = tuple(
        (name, tuple(x.shape), dtype_name(x)) for name, x in outputs.items() if name in OUTPUTS
    )
    _check_outputs(types, n_atoms, n_systems, dtype)


def named(outputs: Any) -> dict[str, Any]:
    """Returns what a model of energies gave as a dict. The model gives the energy alone, or a dict
    that has it.

    Raises: TypeError for an energy that is no array; ValueError for a dict without energy.
    """
    found = dict(outputs) if isinstance(outputs, dict) else {"energy": outputs}
    if "energy" not in found:
        got = f"only {', '.join(sorted(found)) or 'nothing'}"
        raise ValueError(message("the outputs energy", got, missing(["energy"], found)))
    if not (hasattr(found["energy"], "shape") and hasattr(found["energy"], "dtype")):
        raise TypeError(
            message("the energy as an array (B,)", type(found["energy"]).__name__, _RETURN)
        )
    return found


def missing(absent: Collection[str], found: Collection[str]) -> str:
    """Returns the advice of an error text on the outputs `absent`, of a model that gave `found`."""
    do = f"let the model return {', '.join(absent)}"
    if set(absent) & set(GRADIENTS.values()):
        do = f'pass gradients="autograd" (of a JAX model "autodiff") for a model that gives its energy alone, or {do}'
    if "position_gradients" in absent and "forces" in found:
        do += " (dE/dr at fixed cell, that is minus the forces)"
    return do


@lru_cache(maxsize=256)
def _check_outputs(types: _Kinds, n_atoms: int, n_systems: int, dtype: str | None) -> None:
    """Runs once for each set of shapes and dtypes."""
    arrays = {name: _Type(shape, got) for name, shape, got in types}
    _check(arrays, OUTPUTS, {"N": n_atoms, "B": n_systems})
    for name, shape, got in types:
        if dtype is not None and got in DTYPES["float"] and got != dtype:
            do = "compute it in the dtype of pos, or cast what you return"
            raise ValueError(
                message(
                    f"{name} as {spec(shape, dtype)}, in the dtype of pos", spec(shape, got), do
                )
            )


def added(outputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the outputs of a sum of potentials, given the outputs of each.

    An output that adds is kept where all potentials have it. One that does not add is kept where a
    single potential has it.
    """
    names = dict.fromkeys(name for out in outputs for name in out)
    kept = [n for n in names if n not in ADDITIVE or all(n in out for out in outputs)]
    terms = {n: [out[n] for out in outputs if n in out] for n in kept}
    return {n: sum(xs[1:], xs[0]) for n, xs in terms.items() if n in ADDITIVE or len(xs) == 1}


def same_dtype(arrays: Mapping[str, Shaped | None], names: Iterable[str] = ("pos", "cell")) -> None:
    """Raises ValueError where the arrays `names` differ in dtype, for nothing is cast silently."""
    dtypes = {name: dtype_name(x) for name in names if (x := arrays.get(name)) is not None}
    if len(set(dtypes.values())) > 1:
        got = " and ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise ValueError(
            message(f"one dtype for {' and '.join(dtypes)}", got, "cast one of them yourself")
        )


def dtype_name(array: Shaped) -> str:
    """Returns the name of an array's dtype without its framework: float32, not torch.float32."""
    return str(array.dtype).removeprefix("torch.")


def _check(
    arrays: Mapping[str, _Type], table: Mapping[str, Row], sizes: MutableMapping[str, int]
) -> MutableMapping[str, int]:
    """Checks shapes and dtypes of the arrays that `table` knows. A letter takes the first size that
    it stands for."""
    for name, (shape, kind, _) in table.items():
        array = arrays.get(name)
        if array is None:
            continue
        if not _fits(tuple(array.shape), shape, sizes) or dtype_name(array) not in DTYPES[kind]:
            expected = spec([sizes.get(d, d) for d in shape], kind)
            raise ValueError(
                message(
                    f"{name} as {expected}",
                    spec(array.shape, dtype_name(array)),
                    _REMEDY.get(name, "reshape or cast it"),
                )
            )
    return sizes


def _fits(shape: tuple[int, ...], wanted: tuple[Any, ...], sizes: MutableMapping[str, int]) -> bool:
    """True where a shape matches the pattern. New letters take their sizes here."""
    if len(shape) != len(wanted):
        return False
    return all(
        n == (sizes.setdefault(d, n) if isinstance(d, str) else d) for n, d in zip(shape, wanted)
    )


# What to do where a virial has parts that no edge has.
PARTS_OF_VIRIAL = (
    "compute r_ij as r_j - r_i + cell_offsets @ cell, with cell_offsets cast to the dtype of cell, "
    "and all of the energy from these"
)
_RETURN = "return energies (B,) in eV, one for each system, or a dict with them as energy"
_REMEDY = {
    "energy": (
        "return one energy for each system, (B,): add up the energies of its atoms by batch "
        "(torch: "
        'x["pos"].new_zeros(len(x["cell"])).index_add(0, x["batch"], node_energies); JAX: jax.ops.segment_sum); '
        "a model of one system alone returns energy.reshape(1)"
    ),
    "position_gradients": "return dE/dr at fixed cell, a row for each atom; forces are minus that",
    "cell_gradients": "return dE/dh at fixed Cartesian positions, a 3 x 3 matrix for each system",
    "cell": "give one 3 x 3 cell of rows for each system (one system: cell[None])",
    "pbc": "give three booleans for each system (one system: pbc[None])",
    "batch": "give the index of its system for each atom, sorted",
    "atomic_numbers": "give one atomic number for each atom",
    "field": "give three components in V/Angstrom for each system (one system: field[None])",
}
