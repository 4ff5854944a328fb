"""ASE (Hjorth Larsen et al., J. Phys.: Condens. Matter 29, 273002 (2017)): a calculator over a
torch potential."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bridge.atoms import BY_ATOMS, calculators
from bridge.contract import dtype_name
from bridge.errors import message
from torch_side.potentials.model import Model


def calculator(model, *, outputs=None, dtype=None):
    """A torch potential as an ASE calculator: `atoms.calc = calculator(model)`, for optimisers,
    dynamics, phonons, databases.

    `model` is a torch_side.potentials.model.Model: one of torch_side/models, a sum of them, a
    user's own by torch_side.potentials.model.Wrapped, or a JAX potential by bridge.torch_potential.
    It gives, in eV, Angstrom and ASE's signs, as float64,

        energy, free_energy (the same), forces (N,3) = -g, stress (6,) = W / V in Voigt order xx,
        yy, zz, yz, xz, xy, tension positive, energies (N,), charges (N,), magmoms (N,), dipole (3,)
        as far as the model's card has them

    from one call of the model, without a graph; the results are kept until the atoms change, as ASE
    does it. `outputs` names the further outputs that are wanted, by their names in the contract;
    None means those of the second line ("node_energies", "charges", "magmoms", "dipole") that are
    on the card. What ASE has no name for is in `results` (and implemented_properties) by the
    contract's, with its units and signs: energy_std (a float), position_gradients_std (N,3),
    member_energies (M,), member_position_gradients (M,N,3), hessian (N,3,N,3), embeddings (N,F).
    Files and databases leave these out, and SinglePointCalculator takes none of them.

    Positions and cells are cast to the dtype of the card, for a model without one to that of its
    parameters, else float64; `dtype` (torch.float32, "float32") says another. Where the card
    requires or uses charge and spin, they are atoms.info["charge"] and atoms.info["spin"], and a
    change of these is seen; else atoms.info is not looked at: what other codes and files have left
    there is no error. Initial charges and magnetic moments are not looked at. The calculator's
    name, in databases, is that of the model's class.

    Raises: TypeError for what is no Model; ValueError for outputs that the card does not have;
    ImportError without ase. When used: ValueError as torch_side.potentials.graph.evaluate and where
    atoms.info lacks a required charge; ASE's PropertyNotImplementedError for what the model does
    not have, and for the stress of a system without a periodic axis or with a singular cell.

    >>> import ase.build                                                                     # doctest: +SKIP
    >>> atoms = ase.build.bulk("Si")                                                         # doctest: +SKIP
    >>> atoms.calc = calculator(SevenNet("7net-0"))                                          # doctest: +SKIP
    >>> atoms.get_potential_energy(), atoms.get_stress()                                     # doctest: +SKIP
    """
    if not isinstance(model, Model):
        raise TypeError(
            message(
                "a torch_side.potentials.model.Model",
                f"a {type(model).__name__}",
                "wrap it: torch_side.potentials.model.Wrapped(model, card, gradients)",
            )
        )
    kind, has = _kind(), model.card.outputs
    wanted = [name for name in BY_ATOMS if name in has] if outputs is None else outputs
    model = model.asking(*wanted) if set(wanted) - model.card.active_outputs else model
    return kind(
        _Evaluate(model),
        model.card,
        _dtype(model, dtype),
        getattr(model, "__qualname__", type(model).__name__),
    )


@dataclass
class _Evaluate:
    """The model from NumPy to NumPy."""

    model: Model

    def __call__(self, arrays):
        tensors = {
            name: torch.from_numpy(x).to(self.model.card.device or "cpu")
            for name, x in arrays.items()
        }
        with torch.no_grad():
            return {name: x.cpu().numpy() for name, x in self.model(tensors).items()}


def _dtype(model, dtype) -> str:
    """Said, or the card's, or that of the parameters, or float64."""
    if dtype is not None:
        return str(dtype).removeprefix("torch.")
    weights = (p for p in model.parameters() if p.is_floating_point())
    return model.card.dtype or next(map(dtype_name, weights), "float64")


def _of_ase():
    """The two classes of ase that a calculator is made of; ase is imported here."""
    from ase.calculators.calculator import Calculator, PropertyNotImplementedError

    return Calculator, PropertyNotImplementedError


_kind, __getattr__ = calculators(__name__, _of_ase)
