"""The card of a potential: what it computes and what it needs, so that what is not there is refused
before anything runs.

Standard library only. The vocabulary is that of nvalchemi's ModelConfig, with the names of the
contract.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

from bridge.contract import (
    ADDITIVE,
    CONDITIONS,
    ENERGY_AND_GRADIENTS,
    INPUTS,
    OUTPUTS,
    STRUCTURE,
    Shaped,
    dtype_name,
    output_shapes,
)
from bridge.errors import message

UNITS = ("eV", "Angstrom")


@dataclass(frozen=True)
class Card:
    """What a potential of the contract computes and needs. Immutable, hashable, equal by value.

    outputs           names of bridge.contract.OUTPUTS that it can compute. Energy is one of them
    active_outputs    the outputs that it is asked for in each call. None stands for energy and its
                      gradients, as far as it has them
    required_inputs   keys of the contract without which it can't be called. Charge, spin and field
                      are never guessed
    optional_inputs   keys that it uses where they are given. A charge, spin or field that is in
                      neither set, and not zero, is an error. (MACE's total_spin is a multiplicity,
                      so its singlet, 1, is an error for models without spin.)
    supports_pbc, needs_pbc   whether axes may be periodic, and whether some must be
    cutoff            radius of its neighbour list in Angstrom, None if it has no list
    neighbor_list     "own": it finds its neighbours where no edges are given. "given": it can't do
                      without edge_index and cell_offsets. None: it uses no neighbours
    receptive_field   distance in Angstrom beyond which an atom is not felt (layers x cutoff), None
                      if that is unknown or unlimited
    messages          True if atoms feel one another by way of others though the receptive field is
                      no longer than the cutoff: in sums, where the cutoff is another term's
    elements          atomic numbers that it knows, None for all
    derivative_order  how often the energy can be differentiated: 0 not at all, 1 gradients only,
                      None without a limit
    dtype, device     what it takes and gives ("float32", "cpu"), None for any
    units             units of energy and length. The contract is in eV and Angstrom, and sums of
                      potentials refuse other units
    sizes             sizes of the other axes of its outputs: (("F", 128), ("M", 4))
    empty_systems     True if it wants to see systems without atoms. They are taken out before other
                      models are called
    batches           True vouches that the systems of one call don't see one another, and that each
                      energy is that of its own system. If nobody vouches, the first call with
                      several systems evaluates one of them alone as well, and an energy that
                      differs is an error. (Inputs outside of the contract can't be divided among
                      systems, so a call with such inputs is not checked.)

    Sets of names and of elements may be any iterables; they are kept as frozensets.

    Raises: ValueError for names outside of the contract and for settings that contradict one
    another.

    >>> card = Card(outputs={"energy", "position_gradients"})
    >>> card.check_outputs(("hessian",), "LJ")  # doctest: +NORMALIZE_WHITESPACE
    Traceback (most recent call last):
    ...
    ValueError: expected outputs that LJ has (energy, position_gradients), got hessian; ask for
    these, or take another model
    """

    outputs: frozenset[str] = frozenset(ENERGY_AND_GRADIENTS)
    active_outputs: frozenset[str] = cast("frozenset[str]", None)  # a set from __post_init__ on
    required_inputs: frozenset[str] = frozenset(STRUCTURE)
    optional_inputs: frozenset[str] = frozenset()
    supports_pbc: bool = True
    needs_pbc: bool = False
    cutoff: float | None = None
    neighbor_list: Literal["own", "given"] | None = None
    receptive_field: float | None = None
    elements: frozenset[int] | None = None
    derivative_order: int | None = None
    dtype: str | None = None
    device: str | None = None
    units: tuple[str, str] = UNITS
    sizes: tuple[tuple[str, int], ...] = ()
    empty_systems: bool = False
    batches: bool = False
    messages: bool = False

    if TYPE_CHECKING:  # the fields again, as wide as __post_init__ takes them

        def __init__(
            self,
            outputs: Iterable[str] = ...,
            active_outputs: Iterable[str] | None = None,
            required_inputs: Iterable[str] = ...,
            optional_inputs: Iterable[str] = (),
            supports_pbc: bool = True,
            needs_pbc: bool = False,
            cutoff: float | None = None,
            neighbor_list: Literal["own", "given"] | None = None,
            receptive_field: float | None = None,
            elements: Iterable[int] | None = None,
            derivative_order: int | None = None,
            dtype: str | None = None,
            device: str | None = None,
            units: tuple[str, str] = UNITS,
            sizes: tuple[tuple[str, int], ...] = (),
            empty_systems: bool = False,
            batches: bool = False,
            messages: bool = False,
        ) -> None: ...

    def __post_init__(self) -> None:
        """Makes frozensets of the sets, and refuses what contradicts itself."""
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
        both = (self.neighbor_list is None) == (self.cutoff is None)
        if self.neighbor_list not in ("own", "given", None) or not both:
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
        """Returns the same card with the outputs `names` active as well.

        Raises: ValueError for an output that the model does not have.
        """
        self.check_outputs(names, "this model")
        return replace(self, active_outputs=self.active_outputs | set(names))

    def check_outputs(self, names: Iterable[str], who: str) -> None:
        """Raises ValueError where an output is asked for that the model `who` does not have."""
        if absent := [n for n in names if n not in self.outputs]:
            have = ", ".join(sorted(self.outputs))
            raise ValueError(
                message(
                    f"outputs that {who} has ({have})",
                    ", ".join(absent),
                    "ask for these, or take another model",
                )
            )

    def check_bound(self, given: Iterable[str], who: str) -> None:
        """Raises ValueError where an input that the model `who` needs is missing.

        `given` are the names of the inputs that the caller passes.
        """
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

    def unused(self, given: Collection[str]) -> list[str]:
        """Returns which of charge, spin and field are among the names `given`, though the model has
        no use for them."""
        used = self.required_inputs | self.optional_inputs
        return [name for name in CONDITIONS if name in given and name not in used]

    def check_unused(self, name: str, values: Iterable[float | Sequence[float]], who: str) -> None:
        """Raises ValueError where the model `who` would pass over a charge, spin or field that is
        not zero.

        `name` is the input, and `values` has one number, or the components of one field, for each
        system. The error names the first system that is not zero.
        """
        for system, value in enumerate(values):
            parts = value if isinstance(value, Sequence) else (value,)
            if any(parts):
                shown = _plain([f"{x:g}" for x in parts] if parts is value else f"{value:g}")
                expected = f"no {name}, or zero, since {who} has no use for one"
                do = f"leave it out, take another model, or say that it is used: card=bridge.Card(optional_inputs={{{name!r}}})"
                raise ValueError(message(expected, f"{name} {shown} in system {system}", do))

    def check_home(self, pos: Shaped, device: str | None = None) -> None:
        """Raises ValueError where positions are not in the model's dtype or not on its device.

        `device` is the name of theirs, None if it is not known.
        """
        if self.dtype not in (None, dtype_name(pos)):
            do = f"cast pos and cell, or load the model with dtype={dtype_name(pos)}"
            raise ValueError(
                message(f"pos as {self.dtype}, the model's dtype", dtype_name(pos), do)
            )
        if device is None:
            return
        kind = device.partition(":")[0]  # "cuda" on a card is any of cuda:0, cuda:1
        if self.device not in (None, device, kind):
            do = f"move the model, .to({device!r}), or the inputs"
            raise ValueError(message(f"pos on {self.device}, the model's device", device, do))

    def check_pbc(self, periodic: Iterable[Sequence[bool]], who: str) -> None:
        """Raises ValueError where axes of a system are periodic and must not be, or the reverse.

        `periodic` has three booleans for each system.
        """
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

    def check_elements(self, numbers: Iterable[int], batch: Sequence[int], who: str) -> None:
        """Raises ValueError that names the first atom whose element the model does not know.

        `numbers` are the atomic numbers, where 0 marks a padding atom, and `batch` is the system of
        each atom.
        """
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
        """Returns the shapes of the active outputs, for N atoms in B systems."""
        return output_shapes(n_atoms, n_systems, self.active, **dict(self.sizes))

    def __add__(self, other: Card) -> Card:
        """Returns the card of a sum of two potentials.

        The sum has the outputs that add and that both have, the needs of both, and the longer
        cutoff. An output that does not add (charges, embeddings) is kept if only one of the two has
        it.

        Raises: ValueError for unlike units, dtypes or devices; where one needs what the other can't
        have; for an output that is active in both and does not add, since its sum has no meaning;
        and for an active output that adds and that one of them lacks. Gradients are excepted from
        the last rule: the sum has them if both potentials do.
        """
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
        lists = (self.neighbor_list, other.neighbor_list)
        cutoffs = [c.cutoff for c in (self, other) if c.cutoff is not None]
        fields = [c.receptive_field for c in (self, other) if c.receptive_field is not None]
        elements = [c.elements for c in (self, other) if c.elements is not None]
        orders = [c.derivative_order for c in (self, other) if c.derivative_order is not None]
        return Card(
            outputs=adds | own,
            active_outputs=(self.active_outputs | other.active_outputs) & (adds | own),
            required_inputs=self.required_inputs | other.required_inputs,
            optional_inputs=self.optional_inputs | other.optional_inputs,
            supports_pbc=self.supports_pbc and other.supports_pbc,
            needs_pbc=self.needs_pbc or other.needs_pbc,
            cutoff=max(cutoffs, default=None),
            neighbor_list="given" if "given" in lists else "own" if "own" in lists else None,
            receptive_field=max(fields) if len(fields) == 2 else None,
            elements=frozenset.intersection(*elements) if elements else None,
            derivative_order=min(orders, default=None),
            dtype=self.dtype or other.dtype,
            device=self.device or other.device,
            units=self.units,
            sizes=tuple(sorted({**dict(self.sizes), **dict(other.sizes)}.items())),
            empty_systems=self.empty_systems and other.empty_systems,
            messages=any(c.messages or c.receptive_field != c.cutoff for c in (self, other)),
            batches=self.batches and other.batches,
        )


def shared_out(inputs: Mapping[str, Any], cards: Iterable[Card]) -> list[dict[str, Any]]:
    """Returns the inputs of each term of a sum, given those of the sum.

    Charge, spin and field are left out for the terms that have no use for them, if another term has
    one.
    """
    kept = [set(card.unused(inputs)) for card in cards]
    nobody = set.intersection(*kept) if kept else set()
    return [
        {name: x for name, x in inputs.items() if name not in unused - nobody} for unused in kept
    ]


def symbol(number: int) -> str:
    """Returns an element as error texts name it: Pu (Z = 94)."""
    name = _SYMBOLS[number - 1] if 0 < number <= len(_SYMBOLS) else "no element"
    return f"{name} (Z = {number})"


def _known(what: str, names: Iterable[str], table: Iterable[str]) -> None:
    """Raises ValueError for names that the contract does not have."""
    if strange := sorted(set(names) - set(table)):
        raise ValueError(
            message(
                f"{what} of the contract ({', '.join(table)})",
                ", ".join(strange),
                "use these names",
            )
        )


def _plain(value: Any) -> str:
    """Several values in brackets, one as it is."""
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        return str(value)
    return "(" + ", ".join(map(str, value)) + ")"


_SYMBOLS = (
    "H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se "
    "Br Kr Rb Sr Y Zr Nb Mo Tc Ru Rh "
    "Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta W Re Os Ir "
    "Pt Au Hg Tl Pb Bi Po At Rn "
    "Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts Og"
).split()
