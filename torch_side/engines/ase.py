"""ASE: a torch potential as an ASE calculator.

ASE is described in Hjorth Larsen et al., J. Phys.: Condens. Matter 29, 273002 (2017).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bridge.atoms import BY_ATOMS, calculators
from bridge.contract import dtype_name
from bridge.errors import message
from torch_side.potentials.model import Model


def calculator(
    model: Model,
    *,
    outputs: Sequence[str] | None = None,
    dtype: torch.dtype | str | None = None,
) -> Any:
    """Returns a torch potential as an ASE calculator: `atoms.calc = calculator(model)`.

    The calculator serves ASE's optimisers, dynamics, phonons and databases. `model` is a
    torch_side.potentials.model.Model: one of torch_side/models, a sum of them, a user's own by
    torch_side.potentials.model.Wrapped, or a JAX potential by bridge.torch_potential. One call of
    the model, without an autograd graph, gives the following results as float64, in eV, Angstrom
    and ASE's signs, as far as the model's card has them:

        energy, free_energy (the same), forces (N,3) = -g, stress (6,) = W / V in Voigt order xx,
        yy, zz, yz, xz, xy, tension positive, energies (N,), charges (N,), magmoms (N,), dipole (3,)

    As always in ASE, results are kept until the atoms change.

    Further outputs. `outputs` names those that are wanted beside energy, forces and stress, by
    their names in the contract. None means "node_energies", "charges", "magmoms" and "dipole", as
    far as they are on the card. Outputs for which ASE has no name are in `results` (and in
    implemented_properties) under the contract's name, with its units and signs: energy_std (a
    float), position_gradients_std (N,3), member_energies (M,), member_position_gradients (M,N,3),
    hessian (N,3,N,3), embeddings (N,F). Files and databases leave these out, and
    SinglePointCalculator takes none of them.

    Dtype. Positions and cells are cast to the dtype of the card. Without one they get the dtype of
    the model's parameters, and float64 if it has none. `dtype` (torch.float32, "float32") overrides
    this.

    Charge, spin and field. Where the card requires or uses them, they are read from
    atoms.info["charge"], atoms.info["spin"] and atoms.info["field"] (three numbers in V/Angstrom),
    and a change of any triggers a new evaluation. Otherwise atoms.info is ignored, since other codes
    and files leave their own entries there; only a field that is not zero is refused. Initial
    charges and initial magnetic moments are always ignored. In databases the calculator has the
    name of the model's class.

    Raises: TypeError if `model` is not a Model; ValueError for outputs that the card does not have;
    ImportError without ase. An evaluation raises ValueError as torch_side.potentials.graph.evaluate
    does, where atoms.info lacks a required charge, spin or field, and for a field that the model
    has no use for. It raises ASE's PropertyNotImplementedError for properties that the model does
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
    kind = _kind()
    if outputs is None:
        outputs = [name for name in BY_ATOMS if name in model.card.outputs]
    if not set(outputs) <= set(model.card.active):
        model = model.asking(*outputs)
    return kind(
        _Evaluate(model),
        model.card,
        _dtype(model, dtype),
        getattr(model, "__qualname__", type(model).__name__),
    )


@dataclass
class _Evaluate:
    """Evaluates the model, from NumPy to NumPy."""

    model: Model

    def __call__(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        device = self.model.card.device or "cpu"
        tensors = {name: torch.from_numpy(x).to(device) for name, x in arrays.items()}
        with torch.no_grad():
            return {name: x.cpu().numpy() for name, x in self.model(tensors).items()}


def _dtype(model: Model, dtype: torch.dtype | str | None) -> str:
    """The name of the dtype: what is asked for, else the card's, else that of the parameters, else
    float64."""
    if dtype is not None:
        return str(dtype).removeprefix("torch.")
    weights = (p for p in model.parameters() if p.is_floating_point())
    return model.card.dtype or next(map(dtype_name, weights), "float64")


def _of_ase() -> tuple[type, type]:
    """The two classes of ase that a calculator is made of. ase is imported here."""
    from ase.calculators.calculator import Calculator, PropertyNotImplementedError

    return Calculator, PropertyNotImplementedError


_kind, __getattr__ = calculators(__name__, _of_ase)
