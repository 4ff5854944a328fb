"""ASE's Atoms and a potential of the contract: what a calculator does, whichever bank the potential
is of. Standard library only.

ase itself is for the engines of the banks to import: they hand its classes in, and a function from
NumPy arrays to NumPy arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from bridge.contract import INFO, INPUTS, OUTPUTS
from bridge.conventions import to
from bridge.errors import message, missing

PROPERTIES = {  # ASE's name: the outputs of the contract that it is made of
    "energy": ("energy",),
    "free_energy": ("energy",),
    "forces": ("position_gradients",),
    "stress": ("position_gradients", "cell_gradients"),
    "energies": ("node_energies",),
    "charges": ("charges",),
    "magmoms": ("magmoms",),
    "dipole": ("dipole",),
}
# outputs beside energy and gradients that ASE has a name for
BY_ATOMS = (
    "node_energies",
    "charges",
    "magmoms",
    "dipole",
)


def properties(outputs) -> list[str]:
    """ASE's names of what these outputs give, and the contract's of those that ASE has no name
    for."""
    named = [name for name, needed in PROPERTIES.items() if set(needed) <= set(outputs)]
    return named + [name for name in OUTPUTS if name in outputs and name not in _NAMED]


_NAMED = {output for needed in PROPERTIES.values() for output in needed}


def has_stress(atoms) -> bool:
    """A stress wants a periodic axis and three independent cell vectors."""
    return bool(atoms.pbc.any()) and atoms.cell.rank == 3


def inputs_of(atoms, card, dtype: str, who: str) -> dict:
    """The dict of the contract for one ase.Atoms, as fresh NumPy arrays: pos and cell in `dtype`,
    integers int64.

    charge and spin are atoms.info["charge"] and atoms.info["spin"], where the card requires or uses
    them. Elsewhere atoms.info is not looked at, for files and other codes leave their own notes
    there: such a charge is not an explicit one.

    Raises: ValueError where the card requires one that atoms.info lacks, or what is there is not a
    number."""
    numbers, cell = atoms.numbers.astype("int64"), atoms.cell.array.astype(dtype)[None]
    found = {
        "pos": atoms.positions.astype(dtype),
        "atomic_numbers": numbers,
        "cell": cell,
        "pbc": atoms.pbc.copy()[None],
        "batch": 0 * numbers,
    }
    for name in (n for n in INFO if n in card.required_inputs and n not in atoms.info):
        raise ValueError(
            message(
                f"atoms.info[{name!r}], which {who} needs",
                "none",
                f"set it ({INPUTS[name][2]}); it is never guessed",
            )
        )
    return found | {name: 0 * cell[:, 0, 0] + value for name, value in _info(atoms, card).items()}


def _info(atoms, card) -> dict:
    """Charge and spin as far as the card has a use for them."""
    return {
        n: _number(n, atoms.info[n])
        for n in INFO
        if n in card.required_inputs | card.optional_inputs and n in atoms.info
    }


def _number(name, value) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            message(f"a number as atoms.info[{name!r}]", repr(value), "set one, or take it out")
        ) from error


def results(out: dict, atoms, asked=()) -> dict:
    """ASE's results from outputs of one system, NumPy arrays: energies in eV, forces -g, stress W/V
    (Voigt), all float64.

    Outputs that ASE has no name for (energy_std, hessian, ...) have the contract's, units and signs
    included, in the shapes of the contract without the axis of systems.

    Raises: ValueError for an asymmetric virial where the stress is `asked` for; else there is none
    among the results."""
    out = {name: x.astype("float64") for name, x in out.items()}
    found = {"energy": float(out["energy"][0]), "free_energy": float(out["energy"][0])}
    found |= {
        name: out[key]
        for name, key in (
            ("energies", "node_energies"),
            ("charges", "charges"),
            ("magmoms", "magmoms"),
        )
        if key in out
    }
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
            try:
                found["stress"] = to(
                    "ase", atoms.positions.T @ g + cell.T @ out["cell_gradients"][0], cell
                )
            except ValueError:
                if "stress" in asked:
                    raise
    return found


def _of_one_system(name, x):
    """An output without its axis of systems; a number where nothing else is left."""
    x = x[tuple(0 if size == "B" else slice(None) for size in OUTPUTS[name][0])]
    return float(x) if x.ndim == 0 else x


def calculator_class(base, refusal, module: str):
    """The class of calculators of one bank: `kind(evaluate, card, dtype, name)`.

    `base` is ase's Calculator, `refusal` its PropertyNotImplementedError; `module` is where pickle
    finds the class as Calculator. `evaluate` takes the dict of `inputs_of` and gives the model's
    outputs as NumPy arrays; each calculation is one call."""

    class Calculator(base):
        """A potential of the contract under ASE; see `calculator`."""

        ignored_changes = {"initial_charges", "initial_magmoms"}  # potentials don't look at these

        def __init__(self, evaluate, card, dtype, name):
            super().__init__()
            self.evaluate, self.card, self.dtype, self.model_name = evaluate, card, dtype, name
            self.implemented_properties = properties(card.active_outputs)

        def check_state(self, atoms, tol=1e-15):
            changes = super().check_state(atoms, tol)
            return changes or (
                ["info"] if _info(self.atoms, self.card) != _info(atoms, self.card) else []
            )

        def calculate(self, atoms=None, properties=("energy",), system_changes=()):
            super().calculate(atoms, properties, system_changes)
            if "stress" in properties and not has_stress(self.atoms):
                got = "no periodic axis" if not self.atoms.pbc.any() else "a singular cell"
                raise refusal(
                    message(
                        "a periodic system with three cell vectors for a stress",
                        got,
                        "such a system has none",
                    )
                )
            out = self.evaluate(inputs_of(self.atoms, self.card, self.dtype, self.model_name))
            unasked = set(out) - _NAMED - self.card.active_outputs
            self.results = results(
                {name: x for name, x in out.items() if name not in unasked}, self.atoms, properties
            )

        def export_properties(self):
            """Those of the results that ASE has a name for: it refuses others."""
            found = self.results
            self.results = {name: x for name, x in found.items() if name in PROPERTIES}
            try:
                return super().export_properties()
            finally:
                self.results = found

        def _get_name(self):
            return self.model_name.lower()

    Calculator.__module__, Calculator.__qualname__ = module, "Calculator"
    return Calculator


def calculators(
    module: str, of_ase: Callable[[], tuple[type, type]]
) -> tuple[Callable[[], type], Callable[[str], type]]:
    """`kind()`, the class of calculators of the engine `module`, and the engine's `__getattr__`.

    `of_ase` imports ase and returns its Calculator and PropertyNotImplementedError. It runs when
    the class is first wanted, so that importing the engine does not import ase. `__getattr__`
    gives the class under the name `Calculator`, for isinstance and pickle.

    Raises: both functions raise ImportError without ase; `__getattr__` raises AttributeError for
    any other name."""

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
