"""ASE: a JAX potential as an ASE calculator, and any ASE calculator as a JAX potential.

ASE is described in Hjorth Larsen et al., J. Phys.: Condens. Matter 29, 273002 (2017).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from bridge.atoms import PROPERTIES, calculators
from bridge.card import Card
from bridge.contract import (
    CONDITIONS,
    ENERGY_AND_GRADIENTS,
    GRADIENTS,
    GRAPH,
    INFO,
    called,
    check_inputs,
    check_outputs,
)
from bridge.errors import message, missing
from jax_side.calls import compat
from jax_side.calls.nesting import cpu_device, here
from jax_side.potentials.calculated import Calculated
from jax_side.potentials.potential import Potential, array

GROWTH = 1.25  # ratio of one allowed number of edge slots to the next smaller one

Model = Callable[
    [dict[str, jax.Array]], dict[str, jax.Array]
]  # from the contract's dict to its own
Arrays = dict[str, np.ndarray]  # the same dict in NumPy


def calculator(
    model: Model | Potential,
    *,
    outputs: Sequence[str] = (),
    cutoff: float | None = None,
    card: Card | None = None,
    dtype: DTypeLike | None = None,
) -> Any:
    """Returns a JAX potential as an ASE calculator: `atoms.calc = calculator(model)`.

    The calculator serves ASE's optimisers, dynamics, phonons and databases. `model` is one of two
    things:

    - a JAX callable of the potential contract, from a dict to a dict with energy (B,),
      position_gradients and cell_gradients (jax_side.potentials.strain.with_gradients makes them).
      It serves any atoms.
    - an energy that is bound to its atoms (jax_side.potentials.potential.potential,
      bridge.potential). It serves these atoms alone.

    The model is jitted, and compiled once for each number of atoms. One evaluation gives the
    following results as float64, in eV, Angstrom and ASE's signs, as far as they are active:

        energy, free_energy (the same), forces (N,3) = -g, stress (6,) = W / V in Voigt order xx,
        yy, zz, yz, xz, xy, tension positive, energies (N,), charges (N,), magmoms (N,), dipole (3,)

    As always in ASE, results are kept until the atoms change.

    Further outputs. The outputs that are active on the model's `card` (bridge.Card) are computed
    anyway. `outputs` names others that the model returns, by their names in the contract
    ("node_energies", ...). Outputs for which ASE has no name are in `results` (and in
    implemented_properties) under the contract's name, with its units and signs: energy_std (a
    float), position_gradients_std (N,3), member_energies (M,), member_position_gradients (M,N,3),
    hessian (N,3,N,3), embeddings (N,F). Files and databases leave these out.

    Neighbours. For a graph model pass `cutoff` in Angstrom, or a card with neighbor_list="given".
    ASE's neighbour list then makes edge_index and cell_offsets at each evaluation. Up to a quarter
    more slots than edges are allocated, and unused ones have index N, so that few compiled programs
    serve every number of edges.

    Dtype. pos and cell have the dtype of the card. Without one they are float64 if x64 is enabled
    and float32 otherwise. `dtype` overrides this.

    Charge, spin and field. Where the card requires or uses them, or where there is no card, they
    are read from atoms.info["charge"], atoms.info["spin"] and atoms.info["field"] (three numbers in
    V/Angstrom), and a change of any triggers a new evaluation. Otherwise atoms.info is ignored,
    since other codes and files leave their own entries there; only a field that is not zero is
    refused.

    Raises: TypeError if `model` is not callable; ValueError for outputs that the card does not
    have, for a cutoff that differs from the card's, and for an energy of several systems;
    ImportError without ase. An evaluation raises ValueError for atoms that the card can't serve or
    that are not those of a bound energy, and for outputs outside of the contract. It raises ASE's
    PropertyNotImplementedError for properties that the model does not have, and for the stress of a
    system without a periodic axis or with a singular cell.

    >>> from ase import Atoms
    >>> from jax_side.potentials.strain import with_gradients
    >>> water = Atoms("OH2", positions=[[0, 0, 0], [0, 0, 1], [0, 1, 0]])
    >>> water.calc = calculator(with_gradients(lambda x: (x["pos"] ** 2).sum()[None]))
    >>> float(water.get_potential_energy()), water.get_forces()[1].tolist()
    (2.0, [-0.0, -0.0, -2.0])
    """
    if not callable(model):
        raise TypeError(
            message(
                "a JAX potential: a callable from dict to dict, or an energy bound to its atoms",
                f"a {type(model).__name__}",
                "pass one",
            )
        )
    kind = _kind()
    own = model.card if isinstance(model, Potential) else card or getattr(model, "card", None)
    card = _card(own, outputs, cutoff)
    evaluate = _evaluator(model, card)
    if dtype:
        dtype_name = str(np.dtype(dtype))
    else:
        dtype_name = card.dtype or ("float64" if compat.config.jax_enable_x64 else "float32")
    return kind(evaluate, card, dtype_name, evaluate.name)


def _evaluator(model: Model | Potential, card: Card) -> _OfModel | _OfEnergy:
    """The potential as a function from NumPy to NumPy."""
    if not isinstance(model, Potential):
        return _OfModel(model, card, getattr(model, "__name__", type(model).__name__))
    if not model.single:
        raise ValueError(
            message(
                "an energy of one system",
                f"{model.n_systems} systems",
                "bind one system, or pass its model",
            )
        )
    # without a name of its own, an energy is called by its own type
    return _OfEnergy(model, card, getattr(model.model, "__name__", type(model).__name__))


def _card(card: Card | None, outputs: Iterable[str], cutoff: float | None) -> Card:
    """The card with `outputs` active, and with edges required where a cutoff is given."""
    if card is None:
        card = Card(
            outputs=frozenset({*ENERGY_AND_GRADIENTS, *outputs}),
            optional_inputs=frozenset(CONDITIONS),
        )
    if cutoff is not None:
        if card.cutoff not in (None, cutoff):
            raise ValueError(
                message(
                    "one cutoff", f"{cutoff}, and {card.cutoff} on the card", "leave it out here"
                )
            )
        card = replace(
            card,
            cutoff=cutoff,
            neighbor_list="given",
            required_inputs=card.required_inputs | set(GRAPH),
        )
    return card.asking(*outputs)


@dataclass
class _OfModel:
    """Evaluates a model of the contract, from NumPy to NumPy."""

    model: Model
    card: Card
    name: str

    def __call__(self, arrays: Arrays) -> Arrays:
        numbers = arrays["atomic_numbers"].tolist()
        self.card.check_elements(numbers, arrays["batch"].tolist(), self.name)
        self.card.check_pbc(arrays["pbc"].tolist(), self.name)
        if self.card.neighbor_list == "given":
            arrays = arrays | _edges(arrays, self.card.cutoff)
        with _beneath():
            inputs = {name: _array(name, x) for name, x in arrays.items()}
            self.card.check_bound(inputs, self.name)
            # its programs are jit's, found by the model
            out = called(jax.jit(self.model), inputs, self.name)
            check_outputs(out, *check_inputs(inputs), self.card.active)
            return {name: np.asarray(x) for name, x in out.items()}


@dataclass
class _OfEnergy:
    """Evaluates a bound energy, from NumPy to NumPy."""

    energy: Potential
    card: Card
    name: str

    def __call__(self, arrays: Arrays) -> Arrays:
        changing = {
            name: x
            for name, x in arrays.items()
            if name in CONDITIONS and name not in self.energy.fixed
        }
        self._check(arrays["atomic_numbers"], arrays["pbc"][0])
        if self.card.neighbor_list == "given" and "edge_index" not in self.energy.fixed:
            changing |= _edges(arrays, self.card.cutoff)
        with _beneath():
            given = {name: _array(name, x) for name, x in changing.items()}
            pos = _array("pos", arrays["pos"])
            cell = _array("cell", arrays["cell"][0]) if arrays["pbc"].any() else None
            out = _outputs(self.energy, pos, cell, given)
            return {name: np.asarray(x) for name, x in out.items()}

    def _check(self, numbers: np.ndarray, pbc: np.ndarray) -> None:
        """ValueError for atoms or boundaries other than those the energy is bound to."""
        bound = np.asarray(self.energy.fixed["atomic_numbers"])
        do = "bind another energy, or pass its model, which takes any atoms"
        if not np.array_equal(bound, numbers):
            raise ValueError(
                message(
                    f"the atoms that the energy is bound to, {bound.tolist()}",
                    str(numbers.tolist()),
                    do,
                )
            )
        if self.energy.pbc is None:
            periodic, expected = pbc.any(), "all or none"
        else:
            periodic = np.asarray(self.energy.pbc)
            expected = np.broadcast_to(periodic, 3).tolist()
        if (pbc != periodic).any():
            raise ValueError(
                message(f"pbc {expected}, as the energy is bound", str(pbc.tolist()), do)
            )


@partial(jax.jit, static_argnums=0)
def _outputs(energy, pos, cell, changing):
    return energy.outputs(pos, cell, **changing)


def _array(name: str, x: np.ndarray) -> jax.Array:
    """x in JAX. Integers become int32 with or without x64; a float that JAX would narrow is an
    error."""
    return array(name, x.astype("int32") if x.dtype.kind == "i" else x)


def _beneath() -> contextlib.AbstractContextManager:
    """A context for JAX calls that may run inside a callback of another program.

    There JAX must use a client of its own (see jax_side.calls.nesting)."""
    return jax.default_device(cpu_device(here.depth)) if here.depth else contextlib.nullcontext()


def _edges(arrays: Arrays, cutoff: float | None) -> Arrays:
    """The edges of the contract by ASE's neighbour list. The number of slots is rounded up to a
    power of GROWTH."""
    from ase.neighborlist import primitive_neighbor_list

    pos, cell = arrays["pos"].astype("float64"), arrays["cell"][0].astype("float64")
    i, j, offsets = primitive_neighbor_list(
        "ijS", arrays["pbc"][0], cell, pos, cutoff, self_interaction=False
    )
    rung = math.ceil(math.log(max(len(i), 1), GROWTH))
    slots = math.ceil(GROWTH**rung)
    edge_index = np.full((2, slots), len(pos), "int32")
    edge_index[:, : len(i)] = i, j
    cell_offsets = np.zeros((slots, 3), "int32")
    cell_offsets[: len(i)] = offsets
    return {"edge_index": edge_index, "cell_offsets": cell_offsets}


def model(calculator: Any, *, outputs: Sequence[str] = ()) -> Calculated:
    """Returns any ASE calculator as a JAX model of the potential contract.

    `calculator` is an ase.calculators.calculator.BaseCalculator: classical, ab initio, or the
    calculator that comes with a network. The model takes the dict of the contract: pos (N,3),
    atomic_numbers (N,), cell (B,3,3) by rows, pbc (B,3), batch (N,). charge and spin are put into
    atoms.info, and atoms of number 0 are padding. It returns, in eV and Angstrom, as far as the
    calculator implements them,

        energy (B,), position_gradients g = -forces (N,3), cell_gradients G = h^-T (V stress - R^T
        g) (B,3,3)

    and those named in `outputs`: node_energies, charges, magmoms, dipole. For a differentiable
    energy use jax_side.potentials.potential.potential(model(c), atomic_numbers=...), whose
    gradients are the calculator's.

    Each system is one calculation, on the host (jax.pure_callback), also under jit. No calculation
    is run if the atoms are those of the last one. vmap runs one calculation after another, and two
    threads never run the same calculator at once. A system without periodic axes has G = 0. A
    periodic system with a singular cell has no stress, and its G is NaN. Models of the same
    calculator are equal, for jit's caches.

    Raises: TypeError if it is not an ASE calculator; ValueError for outputs that it does not
    implement; NotImplementedError for a derivative of its outputs (the energy of `potential` has
    first derivatives); ImportError without ase. An exception of the calculator is quoted in JAX's
    own error, and is raised unchanged `with bridge.raising():`.

    >>> from ase.calculators.lj import LennardJones
    >>> from jax_side.potentials.potential import potential
    >>> energy = potential(model(LennardJones(rc=9.0, smooth=True)), atomic_numbers=np.array([18, 18]))
    >>> r = jax.numpy.array([[0.0, 0, 0], [0, 0, 2 ** (1 / 6)]])
    >>> jax.jit(energy)(r).round(2).tolist(), abs(jax.grad(energy)(r)).max().round(3).tolist()
    (-1.0, 0.0)
    """
    _kind()
    from ase import Atoms
    from ase.calculators.calculator import BaseCalculator

    if not isinstance(calculator, BaseCalculator):
        got = (
            f"the class {calculator.__name__}"
            if isinstance(calculator, type)
            else f"a {type(calculator).__name__}"
        )
        raise TypeError(
            message("an ASE calculator", got, "pass an object of one of ase.calculators")
        )
    implemented = calculator.implemented_properties
    has = {"energy"}
    for name, needed in PROPERTIES.items():
        if name in implemented:
            has.update(needed)
    if "forces" not in implemented:
        has -= set(GRADIENTS.values())
    card = Card(outputs=frozenset(has), optional_inputs=frozenset(INFO), derivative_order=1)
    return Calculated(calculator, card.asking(*outputs), Atoms)


def _of_ase() -> tuple[type, type]:
    """The two classes of ase that a calculator is made of. ase is imported here."""
    from ase.calculators.calculator import Calculator, PropertyNotImplementedError

    return Calculator, PropertyNotImplementedError


_kind, __getattr__ = calculators(__name__, _of_ase)


def read(path: str) -> Any:
    """Returns the ase.Atoms of a file that ase.io.read reads, the last ones of several.

    Raises: ValueError for a file that ASE can't read; ImportError without ase."""
    try:
        import ase.io
    except ImportError as error:
        raise missing("ase", "structures") from error
    try:
        return ase.io.read(path)
    except Exception as error:
        do = "pass a file that ase.io.read reads (extxyz, cif, POSCAR, ...)"
        got = f"{path}: {type(error).__name__}: {error}"
        raise ValueError(message("a file with a structure", got, do)) from error


def structure(path: str, dtype: str = "float32") -> Arrays:
    """Returns a structure as the contract's dict for one system, in NumPy, from a file that
    ase.io.read reads (extxyz, cif, POSCAR, ...), the last one of several.

    pos (N,3) and cell (1,3,3) in Angstrom have the dtype `dtype`; pbc (1,3) bool; batch and
    atomic_numbers (N,) int32.

    Raises: ValueError for a file that ASE can't read; ImportError without ase."""
    atoms = read(path)
    return {
        "pos": np.asarray(atoms.positions, dtype),
        "cell": np.asarray(atoms.cell.array, dtype)[None],
        "pbc": np.asarray(atoms.pbc)[None],
        "batch": np.zeros(len(atoms), np.int32),
        "atomic_numbers": np.asarray(atoms.numbers, np.int32),
    }
