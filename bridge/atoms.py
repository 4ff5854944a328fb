"""ASE's Atoms and a potential of the contract: what a calculator does, whichever bank the potential
is of. Standard library only.

The engines of the banks import ase. They hand its classes in, and a function from NumPy arrays to
NumPy arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from bridge.contract import CONDITIONS, INPUTS, OUTPUTS
from bridge.conventions import VOIGT, to
from bridge.errors import message, missing

if TYPE_CHECKING:
    import numpy as np
    from ase import Atoms

    from bridge.card import Card

    Inputs = dict[str, np.ndarray]  # of the contract, for one system
    Evaluate = Callable[[Inputs], dict[str, np.ndarray]]  # from inputs to outputs

PROPERTIES = {  # ASE's name: the outputs of the contract that it is made of
    "energy": ("energy",),
    "free_energy": ("energy",),
    "forces": ("position_gradients",),
    "stress": ("position_gradients", "cell_gradients"),
    "energies": ("node_energies",),
    "stresses": ("node_virials",),
    "charges": ("charges",),
    "magmoms": ("magmoms",),
    "dipole": ("dipole",),
}
# outputs beside energy and gradients that ASE has a name for
BY_ATOMS = ("node_energies", "charges", "magmoms", "dipole")


def properties(outputs: Collection[str]) -> list[str]:
    """Returns the names of the results that `outputs` give: ASE's, and the contract's where ASE has
    none."""
    named = [name for name, needed in PROPERTIES.items() if set(needed) <= set(outputs)]
    return named + [name for name in OUTPUTS if name in outputs and name not in _NAMED]


_NAMED = {output for needed in PROPERTIES.values() for output in needed}


def has_stress(atoms: Atoms) -> bool:
    """True for a periodic axis and three independent cell vectors, without which there is no
    stress."""
    return bool(atoms.pbc.any()) and atoms.cell.rank == 3


def inputs_of(atoms: Atoms, card: Card, dtype: str, who: str) -> Inputs:
    """Returns the inputs of the contract for one ase.Atoms, as fresh NumPy arrays.

    pos and cell are in `dtype`, integers are int64. charge, spin and field are those of atoms.info
    where the card requires or uses them. Otherwise atoms.info is not looked at: files and other
    codes leave their own notes there, and such a charge is not an explicit one. But three numbers
    that are a field act on forces, and are never passed over.

    Raises: ValueError where the card requires a charge, spin or field that atoms.info lacks, where
    what is there is not a number, or not three finite ones, and for a field that is not zero where
    the card has no use for one; `who` is the model that the error names.
    """
    numbers, cell = atoms.numbers.astype("int64"), atoms.cell.array.astype(dtype)[None]
    found = {
        "pos": atoms.positions.astype(dtype),
        "atomic_numbers": numbers,
        "cell": cell,
        "pbc": atoms.pbc.copy()[None],
        "batch": 0 * numbers,
    }
    for name in CONDITIONS:
        if name in card.required_inputs and name not in atoms.info:
            expected = f"atoms.info[{name!r}], which {who} needs"
            do = f"set it ({INPUTS[name][2]}); it is never guessed"
            raise ValueError(message(expected, "none", do))
    for name, value in _info(atoms, card, who).items():
        zeros = 0 * (cell[:, 0] if name == "field" else cell[:, 0, 0])
        found[name] = (zeros + value).astype(dtype)
    return found


def _info(atoms: Atoms, card: Card, who: str) -> dict[str, float | tuple[float, ...]]:
    """Charge, spin and field, as far as atoms.info has them and the card has a use for them.

    Raises: ValueError as `inputs_of`, but for those that are missing."""
    given, unused = [name for name in CONDITIONS if name in atoms.info], card.unused(atoms.info)
    if "field" in unused and (field := _three(atoms.info["field"])):
        card.check_unused("field", [field], who)
    return {
        n: _field(atoms.info[n]) if n == "field" else _number(n, atoms.info[n])
        for n in given
        if n not in unused
    }


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            message(f"a number as atoms.info[{name!r}]", repr(value), "set one, or take it out")
        ) from error


def _field(value: Any) -> tuple[float, ...]:
    """Raises: ValueError for anything but three finite numbers."""
    found = _three(value)
    if not found or not all(map(math.isfinite, found)):
        expected, do = "three finite numbers as atoms.info['field']", "set V/Angstrom along x, y, z"
        raise ValueError(message(expected, repr(value), f"{do}, or take it out"))
    return found


def _three(value: Any) -> tuple[float, ...]:
    """A row of three numbers as floats, and () for all else."""
    if isinstance(value, str | bytes) or getattr(value, "shape", (3,)) != (3,):
        return ()
    try:
        found = tuple(map(float, value))
    except (TypeError, ValueError):
        return ()
    return found if len(found) == 3 else ()


def results(
    out: Mapping[str, np.ndarray], atoms: Atoms, asked: Collection[str] = ()
) -> dict[str, Any]:
    """Returns ASE's results from outputs of one system, all of them float64.

    Energies are in eV, forces are -g, and the stress is W/V in Voigt order. The stresses of atoms are
    the symmetric parts of their virials w_i / V, which add up to the stress. Outputs that ASE has no
    name for (energy_std, hessian, ...) have the contract's name, unit and sign, and its shape
    without the axis of systems.

    Raises: ValueError for an asymmetric virial if the stress is `asked` for. Otherwise the results
    then have no stress.
    """
    out = {name: x.astype("float64") for name, x in out.items()}
    energy = float(out["energy"][0])
    found: dict[str, Any] = {"energy": energy, "free_energy": energy}
    by_atoms = {"energies": "node_energies", "charges": "charges", "magmoms": "magmoms"}
    found |= {name: out[key] for name, key in by_atoms.items() if key in out}
    if "dipole" in out:
        found["dipole"] = out["dipole"][0]
    found |= {
        name: _of_one_system(name, x)
        for name, x in out.items()
        if name in OUTPUTS and name not in _NAMED
    }
    if (g := out.get("position_gradients")) is not None:
        found["forces"] = -g
        if "cell_gradients" in out and has_stress(atoms):
            cell = atoms.cell.array
            virial = atoms.positions.T @ g + cell.T @ out["cell_gradients"][0]
            try:
                found["stress"] = to("ase", virial, cell)
            except ValueError:
                if "stress" in asked:
                    raise
    if "node_virials" in out and has_stress(atoms):
        each = out["node_virials"]
        twice = (each + each.swapaxes(1, 2)).reshape(-1, 9)[:, VOIGT]
        found["stresses"] = twice / (2 * atoms.cell.volume)
    return found


def _of_one_system(name: str, x: np.ndarray) -> np.ndarray | float:
    """An output without its axis of systems; a number if no other axis is left."""
    x = x[tuple(0 if size == "B" else slice(None) for size in OUTPUTS[name][0])]
    return float(x) if x.ndim == 0 else x


def calculator_class(base: type[Any], refusal: type[Exception], module: str) -> type[Any]:
    """Returns the class of calculators of one bank: `kind(evaluate, card, dtype, name)`.

    `base` is ase's Calculator, and `refusal` its PropertyNotImplementedError. Pickle finds the
    class in `module`, under the name Calculator. `evaluate` takes the dict of `inputs_of` and gives
    the model's outputs as NumPy arrays. Each calculation calls it once.
    """

    class Calculator(base):
        """A potential of the contract under ASE; see `calculator`."""

        ignored_changes = {"initial_charges", "initial_magmoms"}  # potentials don't look at these

        def __init__(self, evaluate: Evaluate, card: Card, dtype: str, name: str) -> None:
            super().__init__()
            self.evaluate = evaluate
            self.card = card
            self.dtype = dtype
            self.model_name = name
            self.implemented_properties = properties(card.active_outputs)

        def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
            """Returns what has changed since the last calculation; "info" for charge, spin or
            field."""
            if changes := super().check_state(atoms, tol):
                return changes
            was, now = (_info(a, self.card, self.model_name) for a in (self.atoms, atoms))
            return ["info"] if was != now else []

        def calculate(
            self,
            atoms: Atoms | None = None,
            properties: Sequence[str] = ("energy",),
            system_changes: Sequence[str] = (),
        ) -> None:
            """Fills `results` from one evaluation.

            Raises: PropertyNotImplementedError for the stress of a system that has none.
            """
            super().calculate(atoms, properties, system_changes)
            if "stress" in properties and not has_stress(self.atoms):
                expected = "a periodic system with three cell vectors for a stress"
                got = "no periodic axis" if not self.atoms.pbc.any() else "a singular cell"
                raise refusal(message(expected, got, "such a system has none"))
            out = self.evaluate(inputs_of(self.atoms, self.card, self.dtype, self.model_name))
            unasked = set(out) - _NAMED - self.card.active_outputs
            wanted = {name: x for name, x in out.items() if name not in unasked}
            self.results = results(wanted, self.atoms, properties)

        def export_properties(self) -> dict[str, Any]:
            """Returns the results that ASE has a name for, since ASE refuses others."""
            found = self.results
            self.results = {name: x for name, x in found.items() if name in PROPERTIES}
            try:
                return super().export_properties()
            finally:
                self.results = found

        def _get_name(self) -> str:
            return self.model_name.lower()

    Calculator.__module__, Calculator.__qualname__ = module, "Calculator"
    return Calculator


def calculators(
    module: str, of_ase: Callable[[], tuple[type, type]]
) -> tuple[Callable[[], type], Callable[[str], type]]:
    """Returns `kind()`, the class of calculators of the engine `module`, and the engine's
    `__getattr__`.

    `of_ase` imports ase and returns its Calculator and PropertyNotImplementedError. It runs when
    the class is first wanted, so that importing the engine does not import ase. `__getattr__`
    gives the class under the name `Calculator`, for isinstance and pickle.

    Raises: both functions raise ImportError without ase; `__getattr__` raises AttributeError for
    any other name.
    """

    @cache
    def kind() -> type:
        try:
            base, refusal = of_ase()
        except ImportError as error:
            raise missing("ase", "calculators of ASE") from error
        return calculator_class(base, refusal, module)

    def attribute(name: str) -> type:
        if name != "Calculator":
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return kind()

    return kind, attribute
