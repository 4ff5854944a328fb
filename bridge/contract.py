"""The potential contract: keys, shapes, units, signs (DESIGN section 5). Standard library only.

Row convention: lattice vectors are the rows of the cell h; r = s h. Units eV and Angstrom. N atoms,
B systems, E edges. Nothing here imports a framework: an array is anything with `.shape` and
`.dtype`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from bridge.errors import message, spec

# name: (shape, kind of dtype, meaning)
INPUTS = {
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
}
OUTPUTS = {
    "energy": (("B",), "float", "eV, extensive"),
    "position_gradients": (
        ("N", 3),
        "float",
        "g = dE/dr at fixed cell, eV/Angstrom; forces are -g",
    ),
    "cell_gradients": (("B", 3, 3), "float", "G = dE/dh at fixed Cartesian positions, eV/Angstrom"),
    "node_energies": (("N",), "float", "eV, atom by atom"),
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
INFO = ("charge", "spin")  # inputs of a system that a potential may have no use for
# outputs that add where potentials do
ADDITIVE = (
    "energy",
    "position_gradients",
    "cell_gradients",
    "node_energies",
    "hessian",
    "dipole",
)
STRUCTURE = ("pos", "atomic_numbers", "cell", "pbc", "batch")  # what a structure model takes
GRAPH = (*STRUCTURE, "edge_index", "cell_offsets")  # what a graph model takes
# input -> the output that is its gradient
GRADIENTS = {
    "pos": "position_gradients",
    "cell": "cell_gradients",
}
# what a model that gives its own gradients returns at least
ENERGY_AND_GRADIENTS = (
    "energy",
    *GRADIENTS.values(),
)
DTYPES = {
    "float": ("float16", "bfloat16", "float32", "float64"),
    "int": ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    "bool": ("bool", "bool_"),
}


def output_shapes(
    n_atoms: int, n_systems: int, names=(*ENERGY_AND_GRADIENTS, "node_energies"), **sizes
) -> dict[str, tuple[int, ...]]:
    """Shape of the outputs named, for N atoms in B systems; `sizes` are those of other symbols (F
    features, M models).

    >>> output_shapes(5, 2)["cell_gradients"], output_shapes(5, 2, ["embeddings"], F=64)["embeddings"]
    ((2, 3, 3), (5, 64))
    """
    sizes |= {"N": n_atoms, "B": n_systems}
    return {name: tuple(sizes.get(d, d) for d in OUTPUTS[name][0]) for name in names}


def check_inputs(inputs: dict, required=STRUCTURE) -> tuple[int, int]:
    """Check the dict that a model is called with, by shapes and dtype names alone, and return (N,
    B).

    `inputs` holds arrays of any framework under the keys of `INPUTS`; keys outside of the contract
    are passed over. N is taken from pos and B from cell. Nothing is read from the arrays, cast or
    moved, so that tracers are welcome.

    Raises: ValueError where a key of `required` is missing, a shape or a kind of dtype is not the
    contract's, or pos and cell differ in dtype.

    >>> from types import SimpleNamespace as A
    >>> check_inputs({"pos": A(shape=(2, 3), dtype="float32"), "cell": A(shape=(1, 3, 3), dtype="float32")}, ("pos",))
    (2, 1)
    """
    return _check_inputs(
        tuple(
            (name, tuple(x.shape), dtype_name(x))
            for name, x in inputs.items()
            if x is not None and name in INPUTS
        ),
        tuple(required),
    )


@lru_cache(maxsize=256)
def _check_inputs(arrays, required):
    """Once for each set of shapes and dtypes."""
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
    shape: tuple
    dtype: str


def check_outputs(
    outputs: dict, n_atoms: int, n_systems: int, required=("energy",), dtype: str | None = None
) -> None:
    """Check what a model returned for N atoms in B systems, by shapes and dtype names alone.

    `required` are the outputs that must be there; `dtype` is what floats must have (that of pos),
    None for any. Raises: ValueError as in check_inputs; TypeError for what is neither a dict nor
    holds arrays."""
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


def named(outputs) -> dict:
    """What a model of energies returned, as a dict: the energy alone, or a dict with it.

    Raises: TypeError for an energy that is no array; ValueError where there is none."""
    found = dict(outputs) if isinstance(outputs, dict) else {"energy": outputs}
    if "energy" not in found:
        got = f"only {', '.join(sorted(found)) or 'nothing'}"
        raise ValueError(message("the outputs energy", got, missing(["energy"], found)))
    if not (hasattr(found["energy"], "shape") and hasattr(found["energy"], "dtype")):
        raise TypeError(
            message("the energy as an array (B,)", type(found["energy"]).__name__, _RETURN)
        )
    return found


def missing(absent, found) -> str:
    """What to do about outputs that are not there, where a model returned what is in `found`."""
    do = f"let the model return {', '.join(absent)}"
    if set(absent) & set(GRADIENTS.values()):
        do = f'pass gradients="autograd" (of a JAX model "autodiff") for a model that gives its energy alone, or {do}'
    if "position_gradients" in absent and "forces" in found:
        do += " (dE/dr at fixed cell, that is minus the forces)"
    return do


@lru_cache(maxsize=256)
def _check_outputs(types, n_atoms, n_systems, dtype):
    """Once for each set of shapes and dtypes."""
    _check({name: _Type(*kind) for name, *kind in types}, OUTPUTS, {"N": n_atoms, "B": n_systems})
    for name, shape, got in types:
        if dtype is not None and got in DTYPES["float"] and got != dtype:
            do = "compute it in the dtype of pos, or cast what you return"
            raise ValueError(
                message(
                    f"{name} as {spec(shape, dtype)}, in the dtype of pos", spec(shape, got), do
                )
            )


def added(outputs: list[dict]) -> dict:
    """The outputs of a sum of potentials: what adds, where all have it; of what does not add, the
    one that there is."""
    names = dict.fromkeys(name for out in outputs for name in out)
    kept = [n for n in names if n not in ADDITIVE or all(n in out for out in outputs)]
    terms = {n: [out[n] for out in outputs if n in out] for n in kept}
    return {n: sum(xs[1:], xs[0]) for n, xs in terms.items() if n in ADDITIVE or len(xs) == 1}


def same_dtype(arrays: dict, names=("pos", "cell")) -> None:
    """ValueError where the arrays named differ in dtype: nothing is cast silently."""
    dtypes = {name: dtype_name(arrays[name]) for name in names if arrays.get(name) is not None}
    if len(set(dtypes.values())) > 1:
        got = " and ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise ValueError(
            message(f"one dtype for {' and '.join(dtypes)}", got, "cast one of them yourself")
        )


def dtype_name(array) -> str:
    """float32, whatever the framework calls it."""
    return str(array.dtype).removeprefix("torch.")


def _check(arrays, table, sizes):
    """Shapes and dtypes of the arrays that `table` knows; binds the symbols of `sizes` on first
    sight."""
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


def _fits(shape, wanted, sizes):
    """True where a shape matches the pattern; new symbols take their size here."""
    if len(shape) != len(wanted):
        return False
    return all(
        n == (sizes.setdefault(d, n) if isinstance(d, str) else d) for n, d in zip(shape, wanted)
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
}
