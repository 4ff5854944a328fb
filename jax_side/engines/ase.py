"""ASE (Hjorth Larsen et al., J. Phys.: Condens. Matter 29, 273002 (2017)): a calculator over a JAX
potential, and any calculator in JAX."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import numpy as np

from bridge.atoms import INFO, PROPERTIES, calculators
from bridge.card import Card
from bridge.contract import ENERGY_AND_GRADIENTS, GRADIENTS, GRAPH, check_inputs, check_outputs
from bridge.errors import message
from jax_side.calls.nesting import cpu_device, here
from jax_side.potentials.calculated import Calculated
from jax_side.potentials.potential import Potential, array

GROWTH = 1.25  # of the ladder of numbers of edges


def calculator(model, *, outputs=(), cutoff=None, card=None, dtype=None):
    """A JAX potential as an ASE calculator: `atoms.calc = calculator(model)`, for optimisers,
    dynamics, phonons, databases.

    `model` is a JAX callable of the potential contract, from a dict to a dict with energy (B,),
    position_gradients and cell_gradients (jax_side.potentials.strain.with_gradients makes them),
    which then serves any atoms; or an energy that is bound to its atoms
    (jax_side.potentials.potential.potential, bridge.potential). It is jitted, and compiled once for
    each number of atoms. It gives, in eV, Angstrom and ASE's signs, as float64,

        energy, free_energy (the same), forces (N,3) = -g, stress (6,) = W / V in Voigt order xx,
        yy, zz, yz, xz, xy, tension positive, energies (N,), charges (N,), magmoms (N,), dipole (3,)
        as far as they are active

    from one evaluation; the results are kept until the atoms change, as ASE does it. `outputs`
    names the further outputs that model returns, by their names in the contract ("node_energies",
    ...); those active on its `card` (bridge.Card) come anyway. What ASE has no name for is in
    `results` (and implemented_properties) by the contract's, with its units and signs: energy_std
    (a float), position_gradients_std (N,3), member_energies (M,), member_position_gradients
    (M,N,3), hessian (N,3,N,3), embeddings (N,F). Files and databases leave these out. For a graph
    model, `cutoff` in Angstrom (or a card with neighbor_list="given") says that ASE's neighbour
    list makes edge_index and cell_offsets at each evaluation, with unused slots (index N) up to a
    quarter more, so that few programs serve every number of edges. pos and cell have the card's
    dtype, else float64 with x64 and float32 without; `dtype` says another. Where the card requires
    or uses charge and spin, or where there is no card, they are atoms.info["charge"] and
    atoms.info["spin"], and a change of these is seen. Else atoms.info is not looked at: what other
    codes and files have left there is no error.

    Raises: TypeError for what is no callable; ValueError for outputs that the card does not have, a
    cutoff beside another one, an energy of several systems; ImportError without ase. When used:
    ValueError for atoms that the card can't serve, or that are not those of a bound energy, and for
    outputs outside of the contract; ASE's PropertyNotImplementedError for what the model does not
    have, and for the stress of a system without a periodic axis or with a singular cell.

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
    bound = isinstance(model, Potential)
    card = _card(model.card if bound else card or getattr(model, "card", None), outputs, cutoff)
    if bound and not model.single:
        raise ValueError(
            message(
                "an energy of one system",
                f"{model.n_systems} systems",
                "bind one system, or pass its model",
            )
        )
    name = getattr(model.model if bound else model, "__name__", type(model).__name__)
    dtype = (
        str(np.dtype(dtype))
        if dtype
        else card.dtype or ("float64" if jax.config.jax_enable_x64 else "float32")
    )
    return kind((_OfEnergy if bound else _OfModel)(model, card, name), card, dtype, name)


def _card(card, outputs, cutoff):
    """The card, its outputs active."""
    if card is None:
        card = Card(outputs={*ENERGY_AND_GRADIENTS, *outputs}, optional_inputs=INFO)
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
    """A model of the contract from NumPy to NumPy."""

    model: Callable
    card: Card
    name: str

    def __call__(self, arrays):
        self.card.check_elements(arrays["atomic_numbers"].tolist(), arrays["batch"], self.name)
        self.card.check_pbc(arrays["pbc"].tolist(), self.name)
        if self.card.neighbor_list == "given":
            arrays = arrays | _edges(arrays, self.card.cutoff)
        with _beneath():
            inputs = {name: _array(name, x) for name, x in arrays.items()}
            self.card.check_bound(inputs, self.name)
            out = jax.jit(self.model)(inputs)  # its programs are jit's, found by the model
            check_outputs(out, *check_inputs(inputs), self.card.active)
            return {name: np.asarray(x) for name, x in out.items()}


@dataclass
class _OfEnergy:
    """A bound energy from NumPy to NumPy."""

    energy: Potential
    card: Card
    name: str

    def __call__(self, arrays):
        changing = {
            name: x for name, x in arrays.items() if name in INFO and name not in self.energy.fixed
        }
        self._check(arrays["atomic_numbers"], arrays["pbc"][0])
        if self.card.neighbor_list == "given" and "edge_index" not in self.energy.fixed:
            changing |= _edges(arrays, self.card.cutoff)
        cell = arrays["cell"][0] if arrays["pbc"].any() else None
        with _beneath():
            changing = {name: _array(name, x) for name, x in changing.items()}
            out = _outputs(
                self.energy,
                _array("pos", arrays["pos"]),
                None if cell is None else _array("cell", cell),
                changing,
            )
            return {name: np.asarray(x) for name, x in out.items()}

    def _check(self, numbers, pbc):
        bound, do = (
            np.asarray(self.energy.fixed["atomic_numbers"]),
            "bind another energy, or pass its model, which takes any atoms",
        )
        if not np.array_equal(bound, numbers):
            raise ValueError(
                message(
                    f"the atoms that the energy is bound to, {bound.tolist()}",
                    str(numbers.tolist()),
                    do,
                )
            )
        periodic = pbc.any() if self.energy.pbc is None else np.asarray(self.energy.pbc)
        if (pbc != periodic).any():
            expected = (
                "all or none" if self.energy.pbc is None else np.broadcast_to(periodic, 3).tolist()
            )
            raise ValueError(
                message(f"pbc {expected}, as the energy is bound", str(pbc.tolist()), do)
            )


@partial(jax.jit, static_argnums=0)
def _outputs(energy, pos, cell, changing):
    return energy.outputs(pos, cell, **changing)


def _array(name, x):
    """Integers as int32, whether x64 is on or off; a float that JAX would narrow is an error."""
    return array(name, x.astype("int32") if x.dtype.kind == "i" else x)


def _beneath():
    """Beneath a callback of another program, JAX runs on a client of its own."""
    return jax.default_device(cpu_device(here.depth)) if here.depth else contextlib.nullcontext()


def _edges(arrays, cutoff) -> dict:
    """The edges of the contract by ASE's neighbour list, with unused slots up to the next rung of a
    ladder."""
    from ase.neighborlist import primitive_neighbor_list

    pos, cell = arrays["pos"].astype("float64"), arrays["cell"][0].astype("float64")
    i, j, offsets = primitive_neighbor_list(
        "ijS", arrays["pbc"][0], cell, pos, cutoff, self_interaction=False
    )
    free = math.ceil(GROWTH ** math.ceil(math.log(max(len(i), 1), GROWTH))) - len(i)
    index = np.pad(np.stack([i, j]), ((0, 0), (0, free)), constant_values=len(pos))
    return {
        "edge_index": index.astype("int32"),
        "cell_offsets": np.pad(offsets, ((0, free), (0, 0))).astype("int32"),
    }


def model(calculator, *, outputs=()):
    """Any ASE calculator as a JAX model of the potential contract: classical, ab initio, or the own
    calculator of a network.

    The model takes the dict of the contract (pos (N,3), atomic_numbers (N,), cell (B,3,3) by rows,
    pbc (B,3), batch (N,); charge and spin go to atoms.info; atoms of number 0 are padding) and
    gives, in eV and Angstrom, as far as the calculator implements them,

        energy (B,), position_gradients g = -forces (N,3), cell_gradients G = h^-T (V stress - R^T
        g) (B,3,3)

    and those named in `outputs`: node_energies, charges, magmoms, dipole.
    jax_side.potentials.potential.potential(model(c), atomic_numbers=...) is the differentiable
    energy: its gradients are the calculator's. Each system is one calculation, on the host
    (jax.pure_callback), also under jit; none if the atoms are those of the last one. vmap runs one
    after another. One calculator is never run by two threads at once. A system without periodic
    axes has G = 0; a periodic one with a singular cell has no stress, and its G is NaN. Models of
    the same calculator are equal, for jit's caches.

    Raises: TypeError for what is no ASE calculator; ValueError for outputs that it does not
    implement; NotImplementedError for a derivative of its outputs (the energy of `potential` has
    first derivatives); ImportError without ase. What the calculator raises arrives in the error of
    JAX, and as it is `with bridge.raising():`.

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
    has = {"energy"}.union(
        *(
            needed
            for name, needed in PROPERTIES.items()
            if name in calculator.implemented_properties
        )
    )
    if "forces" not in calculator.implemented_properties:
        has -= set(GRADIENTS.values())
    card = Card(outputs=has, optional_inputs=INFO, derivative_order=1)
    return Calculated(calculator, card.asking(*outputs), Atoms)


def _of_ase():
    """The two classes of ase that a calculator is made of; ase is imported here."""
    from ase.calculators.calculator import Calculator, PropertyNotImplementedError

    return Calculator, PropertyNotImplementedError


_kind, __getattr__ = calculators(__name__, _of_ase)
