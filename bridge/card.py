"""The card of a potential: what it computes and what it needs, so that what is not there is refused
before anything runs.

Standard library only. The vocabulary is nvalchemi's ModelConfig, with the names of the contract.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from bridge.contract import (
    ADDITIVE,
    ENERGY_AND_GRADIENTS,
    INFO,
    INPUTS,
    OUTPUTS,
    STRUCTURE,
    dtype_name,
    output_shapes,
)
from bridge.errors import message

UNITS = ("eV", "Angstrom")


@dataclass(frozen=True)
class Card:
    """What a potential of the contract computes and needs. Immutable, hashable, equal by value.

    outputs           names of bridge.contract.OUTPUTS that it can compute; energy is one of them
    active_outputs    those that it is asked for in each call; None: energy and its gradients, as
                      far as it has them
    required_inputs   keys of the contract without which it can't be called (charge and spin are
                      never guessed)
    optional_inputs   keys that it uses where they are given. A charge or spin that is in neither,
                      and not zero, is an error (MACE's total_spin is a multiplicity, so that its
                      singlet, 1, is an error for models without spin)
    supports_pbc, needs_pbc   whether axes may be periodic, whether some must be
    cutoff            radius of its neighbour list in Angstrom, None without one
    neighbor_list     "own": it finds its neighbours where no edges are given. "given": it can't do
                      without edge_index and cell_offsets. None: it has no use for any
    receptive_field   distance in Angstrom beyond which an atom is not felt (layers x cutoff), None
                      if unknown or unlimited
    elements          atomic numbers that it knows, None for all
    derivative_order  how often the energy can be differentiated: 0 not at all, 1 gradients only,
                      None as often as one likes
    dtype, device     what it takes and gives ("float32", "cpu"), None for any
    units             of energy and length. The contract is in eV and Angstrom; another unit is
                      refused in sums
    sizes             sizes of the other axes of its outputs: (("F", 128), ("M", 4))
    empty_systems     True to be shown systems without atoms; else they are taken out before it is
                      called
    batches           True vouches that systems of one call don't see one another, and that each
                      energy is that of its own system. Where nobody vouches, the first call with
                      several systems also evaluates one of them alone, and an energy that differs
                      is an error (inputs outside of the contract can't be shared out: with such
                      there is no check)

    Raises: ValueError for names outside of the contract and settings that contradict one another.

    >>> card = Card(outputs={"energy", "position_gradients"})
    >>> card.check_outputs(("hessian",), "LJ")  # doctest: +NORMALIZE_WHITESPACE
    Traceback (most recent call last):
    ...
    ValueError: expected outputs that LJ has (energy, position_gradients), got hessian; ask for
    these, or take another model
    """

    outputs: frozenset[str] = frozenset(ENERGY_AND_GRADIENTS)
    active_outputs: frozenset[str] | None = None
    required_inputs: frozenset[str] = frozenset(STRUCTURE)
    optional_inputs: frozenset[str] = frozenset()
    supports_pbc: bool = True
    needs_pbc: bool = False
    cutoff: float | None = None
    neighbor_list: str | None = None
    receptive_field: float | None = None
    elements: frozenset[int] | None = None
    derivative_order: int | None = None
    dtype: str | None = None
    device: str | None = None
    units: tuple[str, str] = UNITS
    sizes: tuple[tuple[str, int], ...] = ()
    empty_systems: bool = False
    batches: bool = False

    def __post_init__(self):
        for name in ("outputs", "active_outputs", "required_inputs", "optional_inputs", "elements"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else frozenset(value))
        _known("outputs", self.outputs, OUTPUTS)
        for name in ("required_inputs", "optional_inputs"):
            _known(name, getattr(self, name), INPUTS)
        if "energy" not in self.outputs:
            raise ValueError(
                message(
                    "energy among the outputs",
                    ", ".join(sorted(self.outputs)) or "none",
                    "add it: a potential has an energy",
                )
            )
        if self.neighbor_list not in ("own", "given", None) or (self.neighbor_list is None) != (
            self.cutoff is None
        ):
            got = f"neighbor_list={self.neighbor_list!r} and cutoff={self.cutoff!r}"
            raise ValueError(
                message(
                    'neighbor_list "own" or "given" with a cutoff, or None for both',
                    got,
                    "give both or neither",
                )
            )
        if self.cutoff is not None and not 0 < self.cutoff < float("inf"):
            raise ValueError(
                message(
                    "a positive cutoff in Angstrom", repr(self.cutoff), "pass the model's cutoff"
                )
            )
        if self.active_outputs is None:
            object.__setattr__(self, "active_outputs", self.outputs & set(ENERGY_AND_GRADIENTS))
        self.check_outputs(self.active_outputs, "this card")

    def asking(self, *names: str) -> Card:
        """The same with these outputs active as well."""
        self.check_outputs(names, "this model")
        return replace(self, active_outputs=self.active_outputs | set(names))

    def check_outputs(self, names, who: str) -> None:
        """ValueError where an output is asked for that the model does not have."""
        if absent := [n for n in names if n not in self.outputs]:
            have = ", ".join(sorted(self.outputs))
            raise ValueError(
                message(
                    f"outputs that {who} has ({have})",
                    ", ".join(absent),
                    "ask for these, or take another model",
                )
            )

    def check_bound(self, given, who: str) -> None:
        """ValueError where an input is missing; `given` are the names of what the caller passes."""
        edges = {"edge_index", "cell_offsets"} if self.neighbor_list == "given" else set()
        if absent := sorted((self.required_inputs | edges) - set(given)):
            do = " and ".join(f"pass {name}=... ({INPUTS[name][2]})" for name in absent)
            raise ValueError(
                message(
                    f"the inputs that {who} needs "
                    f"({', '.join(sorted(self.required_inputs | edges))})",
                    f"no {', '.join(absent)}",
                    do,
                )
            )

    def unused(self, given) -> list[str]:
        """Which of charge and spin are among the names `given`, though the model has no use for
        them."""
        return [
            name
            for name in INFO
            if name in given and name not in self.required_inputs | self.optional_inputs
        ]

    def check_unused(self, name: str, values, who: str) -> None:
        """ValueError naming the first system whose charge or spin is not zero, where the model
        would pass over it."""
        for system, value in enumerate(values):
            if value:
                expected = f"no {name}, or zero, since {who} has no use for one"
                do = f"leave it out, take another model, or say that it is used: card=bridge.Card(optional_inputs={{{name!r}}})"
                raise ValueError(message(expected, f"{name} {value:g} in system {system}", do))

    def check_home(self, pos, device=None) -> None:
        """ValueError where positions are not in the model's dtype or on its device (a name, None if
        it is not known)."""
        if self.dtype not in (None, dtype_name(pos)):
            do = f"cast pos and cell, or load the model with dtype={dtype_name(pos)}"
            raise ValueError(
                message(f"pos as {self.dtype}, the model's dtype", dtype_name(pos), do)
            )
        if device is not None and self.device not in (
            None,
            device,
            device.partition(":")[0],
        ):  # cuda is any of cuda:0, cuda:1
            do = f"move the inputs, or load the model with device={device!r}"
            raise ValueError(message(f"pos on {self.device}, the model's device", device, do))

    def check_pbc(self, periodic, who: str) -> None:
        """ValueError where an axis of a system (rows of three booleans) must or must not be
        periodic."""
        for s, axes in enumerate(periodic):
            if any(axes) and not self.supports_pbc:
                raise ValueError(
                    message(
                        f"open boundaries, which is all that {who} has",
                        f"pbc {_plain(axes)} in system {s}",
                        "set pbc False, or take another model",
                    )
                )
            if not any(axes) and self.needs_pbc:
                raise ValueError(
                    message(
                        f"a periodic system for {who}",
                        f"no periodic axis in system {s}",
                        "set pbc and a cell with vacuum around",
                    )
                )

    def check_elements(self, numbers, batch, who: str) -> None:
        """ValueError naming the first atom whose element the model does not know; 0 is a padding
        atom."""
        if self.elements is None:
            return
        for atom, number in enumerate(numbers):
            if int(number) not in self.elements and int(number):
                where = f"for atom {atom} of system {int(batch[atom])}"
                known = f"one of the {len(self.elements)} elements of {who}"
                raise ValueError(
                    message(known, f"{symbol(int(number))} {where}", "take another model")
                )

    @property
    def active(self) -> tuple[str, ...]:
        """The active outputs in the order of the contract."""
        return tuple(name for name in OUTPUTS if name in self.active_outputs)

    def shapes(self, n_atoms: int, n_systems: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the active outputs."""
        return output_shapes(n_atoms, n_systems, self.active, **dict(self.sizes))

    def __add__(self, other: Card) -> Card:
        """The card of a sum: what both have and what adds, the needs of both, the longer cutoff.

        What only one of them has is kept if it does not add (charges, embeddings). What is active
        in both and does not add is an error, for the sum of it means nothing; so is an active
        output that adds and that one of them does not have (but for gradients: these the sum has if
        both do). Raises ValueError for unlike units, dtypes or devices, and where one needs what
        the other can't have."""
        for name in ("units", "dtype", "device"):
            mine, yours = getattr(self, name), getattr(other, name)
            if mine != yours and None not in (mine, yours):
                raise ValueError(
                    message(
                        f"one {name} for all terms of a sum",
                        f"{_plain(mine)} and {_plain(yours)}",
                        f"convert one of the models to the other's {name}",
                    )
                )
        adds = self.outputs & other.outputs & set(ADDITIVE)
        own = (self.outputs ^ other.outputs) - set(ADDITIVE)
        if both := sorted(self.active_outputs & other.active_outputs - set(ADDITIVE)):
            raise ValueError(
                message(
                    "outputs that add, where both terms of a sum give them",
                    ", ".join(both),
                    "ask one term for it, not both",
                )
            )
        if alone := sorted(
            (self.active_outputs ^ other.active_outputs)
            & set(ADDITIVE) - adds - set(ENERGY_AND_GRADIENTS)
        ):
            raise ValueError(
                message(
                    "outputs that all terms of a sum have, since they add",
                    f"{', '.join(alone)} active in one that the other lacks",
                    "don't ask for it",
                )
            )
        if (self.needs_pbc and not other.supports_pbc) or (
            other.needs_pbc and not self.supports_pbc
        ):
            raise ValueError(
                message(
                    "terms of a sum that can have the same boundaries",
                    "one that needs pbc and one that has none",
                    "take another model",
                )
            )
        lists = {self.neighbor_list, other.neighbor_list} - {None}
        longest = lambda name: max(
            (x for c in (self, other) if (x := getattr(c, name)) is not None), default=None
        )
        both_fields = None not in (self.receptive_field, other.receptive_field)
        elements = [c.elements for c in (self, other) if c.elements is not None]
        orders = [c.derivative_order for c in (self, other) if c.derivative_order is not None]
        return Card(
            outputs=adds | own,
            active_outputs=(self.active_outputs | other.active_outputs) & (adds | own),
            required_inputs=self.required_inputs | other.required_inputs,
            optional_inputs=self.optional_inputs | other.optional_inputs,
            supports_pbc=self.supports_pbc and other.supports_pbc,
            needs_pbc=self.needs_pbc or other.needs_pbc,
            cutoff=longest("cutoff"),
            neighbor_list="given" if "given" in lists else "own" if lists else None,
            receptive_field=longest("receptive_field") if both_fields else None,
            elements=frozenset.intersection(*elements) if elements else None,
            derivative_order=min(orders, default=None),
            dtype=self.dtype or other.dtype,
            device=self.device or other.device,
            units=self.units,
            sizes=tuple(sorted({**dict(self.sizes), **dict(other.sizes)}.items())),
            empty_systems=self.empty_systems and other.empty_systems,
            batches=self.batches and other.batches,
        )


def shared_out(inputs: dict, cards) -> list[dict]:
    """The inputs of each term of a sum: charge and spin are left out for those that have no use for
    them, where another has."""
    kept = [set(card.unused(inputs)) for card in cards]
    nobody = set.intersection(*kept) if kept else set()
    return [
        {name: x for name, x in inputs.items() if name not in unused - nobody} for unused in kept
    ]


def symbol(number: int) -> str:
    """Pu (Z = 94)."""
    return f"{_SYMBOLS[number - 1] if 0 < number <= len(_SYMBOLS) else 'no element'} (Z = {number})"


def _known(what, names, table):
    if strange := sorted(set(names) - set(table)):
        raise ValueError(
            message(
                f"{what} of the contract ({', '.join(table)})",
                ", ".join(strange),
                "use these names",
            )
        )


def _plain(value) -> str:
    return (
        "(" + ", ".join(map(str, value)) + ")"
        if hasattr(value, "__iter__") and not isinstance(value, str)
        else str(value)
    )


_SYMBOLS = (
    "H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se "
    "Br Kr Rb Sr Y Zr Nb Mo Tc Ru Rh "
    "Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta W Re Os Ir "
    "Pt Au Hg Tl Pb Bi Po At Rn "
    "Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts Og"
).split()
