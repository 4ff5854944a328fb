"""nvalchemi-toolkit (NVIDIA): its models as potentials of the contract."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any

import torch
from jaxtyping import Float
from torch import nn

from bridge.card import Card
from bridge.contract import ENERGY_AND_GRADIENTS, OUTPUTS
from bridge.errors import message, missing
from torch_side.potentials import graph, strain
from torch_side.potentials.model import Model

# the contract's name: nvalchemi's, where these differ
NAMES = {
    "energy": "energy",
    "position_gradients": "forces",
    "cell_gradients": "stress",
    "node_energies": "atomic_energies",
}
EXTRAS = ("charge", "spin")  # inputs of a system that both sides know
# nvalchemi's name: its name before 0.1, in supports_... and compute_...
OLD = {
    "energy": "energies",
    "forces": "forces",
    "stress": "stresses",
    "hessian": "hessians",
    "dipole": "dipoles",
}
# nvalchemi's name: the contract's, of all outputs but forces and stress
_OURS = {NAMES.get(k, k): k for k in OUTPUTS if k not in ("position_gradients", "cell_gradients")}
# nvalchemi's names of the inputs that the contract can give it
_KNOWN = {
    "positions",
    "atomic_numbers",
    "cell",
    "pbc",
    *EXTRAS,
    "neighbor_list",
    "neighbor_list_shifts",
    "neighbor_matrix",
    "neighbor_matrix_shifts",
    "num_neighbors",
}


class Nvalchemi(Model):
    """An nvalchemi model (BaseModelMixin, called the wrapper here) as a potential of the contract.

    Called with the dict of the contract, it runs the wrapper once and returns energy (B,),
    position_gradients g = dE/dr (N,3), cell_gradients G = dE/dh at fixed Cartesian positions
    (B,3,3), and what it is asked for of node_energies, charges and dipole, in eV and Angstrom. If
    forces are among the wrapper's autograd_outputs, the wrapper computes its energy alone, and
    torch.autograd makes g and G, which have derivatives of their own. Otherwise, or if that energy
    turns out not to depend on positions and cell as autograd sees it, g and G are made from the
    wrapper's forces and stress (W = V stress, G = h^-T (W - R^T g), zeros for open systems). These
    are detached, so that the model has first derivatives only.

    Neighbours are found by torch_side.potentials.neighbors, or taken from edge_index and
    cell_offsets, and handed over in the format that the wrapper asks for (COO, MATRIX, half lists).
    The wrapper is not copied, and its own active_outputs stay as they are. `card` is made from its
    ModelConfig, or from its model_card for models before nvalchemi-toolkit 0.1. A model of periodic
    systems that has no stress has no cell_gradients.

    Raises: TypeError for something that is no nvalchemi model; ValueError for a model without
    forces, for one that needs inputs outside of the contract, and as
    torch_side.potentials.graph.evaluate does; ImportError without nvalchemi-toolkit.

    >>> Nvalchemi(LennardJonesModelWrapper(0.01, 3.4, 8.5)).card.cutoff     # doctest: +SKIP
    8.5
    """

    wrapper: Any  # an nvalchemi model

    def __init__(self, wrapper: nn.Module) -> None:
        super().__init__()
        package()
        if not isinstance(wrapper, nn.Module) or not hasattr(wrapper, "model_config"):
            raise TypeError(
                message(
                    "an nvalchemi model (BaseModelMixin)",
                    f"a {type(wrapper).__name__}",
                    "pass a wrapped model",
                )
            )
        self.wrapper = wrapper
        self.declared = _declared(wrapper)
        self.card = _card(wrapper, self.declared)
        self._by_autograd: dict[bool, bool] = {}  # periodic: whether autograd makes the gradients
        self.__qualname__ = type(wrapper).__name__

    def forward(
        self, inputs: dict[str, torch.Tensor], trained: bool | None = None
    ) -> dict[str, torch.Tensor]:
        """Returns the active outputs; see Model.forward."""
        return graph.evaluate(
            partial(self._evaluate, trained=trained), inputs, self.card, self.__qualname__, self
        )

    def energies(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the energy (B,) and the active outputs that are no gradients, of inputs without
        padding."""
        return self._call(inputs, set())

    def _evaluate(
        self, inputs: dict[str, torch.Tensor], trained: bool | None
    ) -> dict[str, torch.Tensor]:
        """The active outputs of inputs without padding."""
        if self.declared.by_autograd and self._reaches(inputs):
            out = self._with_gradients(inputs, trained)
            if "cell_gradients" in self.card.outputs:
                return out
            return {k: x for k, x in out.items() if k != "cell_gradients"}
        return self._direct({k: x.detach() for k, x in inputs.items()})

    def _reaches(self, inputs: dict[str, torch.Tensor]) -> bool:
        """True if autograd can differentiate the energy in what the card has gradients for. This is
        tried twice: in the first call with a periodic system, and in the first without."""
        periodic = bool(inputs["pbc"].any())
        if periodic not in self._by_autograd:
            pos = inputs["pos"].detach().requires_grad_()
            cell = inputs["cell"].detach().requires_grad_()
            g = G = None
            with torch.enable_grad():
                energy = self.energies(inputs | {"pos": pos, "cell": cell})["energy"]
                if energy.requires_grad:
                    g, G = torch.autograd.grad(energy.sum(), [pos, cell], allow_unused=True)
            needs_cell = periodic and "cell_gradients" in self.card.outputs
            self._by_autograd[periodic] = g is not None and (G is not None or not needs_cell)
        return self._by_autograd[periodic]

    def _direct(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Energy, g and G from the wrapper's energy, forces and stress."""
        periodic = inputs["pbc"].any(-1)[:, None, None]
        stressed = "stress" in self.declared.outputs and bool(periodic.any())
        with torch.enable_grad():  # its forces may be made by autograd
            out = self._call(inputs, {"forces", "stress"} if stressed else {"forces"})
        out = {k: x.detach() for k, x in out.items()}
        forces = out.pop("forces")
        cell = _filled(inputs)
        out["position_gradients"] = -forces
        if stressed:
            W = sign() * torch.linalg.det(cell).abs()[:, None, None] * out.pop("stress")
            G = strain.lattice_gradient_from_virial(forces, inputs["pos"], inputs["batch"], cell, W)
            out["cell_gradients"] = torch.where(periodic, G, 0)
        elif "cell_gradients" in self.card.outputs:
            out["cell_gradients"] = torch.zeros_like(cell)
        return out

    def _call(self, inputs: dict[str, torch.Tensor], names: set[str]) -> dict[str, torch.Tensor]:
        """Outputs of one forward pass of the wrapper: the energy, what is active and what is named
        (forces, stress). These two keep their names and signs; the others have the contract's."""
        further = self.card.active_outputs - {*ENERGY_AND_GRADIENTS, "hessian"}
        names = names | {"energy"} | {NAMES.get(k, k) for k in further}
        out = _asking(self.wrapper, names)(_batch(inputs, self.declared))
        shapes = self.card.shapes(len(inputs["pos"]), len(inputs["cell"]))
        found = {}
        for name in names:
            x = out.get(name, out.get(OLD.get(name)))
            key = _OURS.get(name, name)
            found[key] = x.reshape(shapes[key]) if key in shapes else x
        return found


def package() -> tuple[Any, Any, Any]:
    """Returns nvalchemi's module `base` of models, its AtomicData and its Batch.

    Raises: ImportError without nvalchemi-toolkit."""
    try:
        from nvalchemi.data import AtomicData, Batch
        from nvalchemi.models import base
    except ImportError as error:
        raise missing("nvalchemi-toolkit", "nvalchemi models") from error
    return base, AtomicData, Batch


def sign() -> int:
    """Returns the sign of a tensile stress in the installed version: -1 before 0.2, 1 since
    then."""
    version = [int(n) for n in metadata.version("nvalchemi-toolkit").split(".")[:2]]
    return -1 if version < [0, 2] else 1


@dataclass(frozen=True, eq=False)
class _Declared:
    """What an nvalchemi model says of itself, in one form for all versions.

    outputs       names of nvalchemi that it can compute
    by_autograd   True if its forces are derivatives of its energy by autograd
    required      names of nvalchemi without which it can't be called
    optional      names of nvalchemi that it uses where they are given
    neighbors     nvalchemi's NeighborConfig, None without neighbours
    supports_pbc, needs_pbc   whether axes may be periodic, and whether some must be"""

    outputs: set[str]
    by_autograd: bool
    required: set[str]
    optional: set[str]
    neighbors: Any
    supports_pbc: bool
    needs_pbc: bool


def _declared(wrapper: Any) -> _Declared:
    """What an nvalchemi model says of itself."""
    config = wrapper.model_config
    if hasattr(config, "outputs"):
        return _Declared(
            outputs=set(config.outputs),
            by_autograd="forces" in config.autograd_outputs,
            required=wrapper.input_data(),
            optional=set(config.optional_inputs),
            neighbors=config.neighbor_config,
            supports_pbc=config.supports_pbc,
            needs_pbc=config.needs_pbc,
        )
    card = wrapper.model_card
    outputs = {name for name, old in OLD.items() if getattr(card, f"supports_{old}", False)}
    needs = (("charge", "needs_system_charges"), ("charges", "needs_node_charges"))
    return _Declared(
        outputs=outputs - {"stress"},  # which had another convention then
        by_autograd=card.forces_via_autograd,
        required={name for name, old in needs if getattr(card, old, False)},
        optional=set(),
        neighbors=card.neighbor_config,
        supports_pbc=card.supports_pbc,
        needs_pbc=card.needs_pbc,
    )


def _card(wrapper: nn.Module, declared: _Declared) -> Card:
    """The card of an nvalchemi model."""
    name = type(wrapper).__name__
    if "forces" not in declared.outputs:
        raise ValueError(
            message(
                "an nvalchemi model with forces",
                f"{name}, which has {', '.join(sorted(declared.outputs))}",
                "take another model",
            )
        )
    if strange := sorted(declared.required - _KNOWN):
        raise ValueError(
            message(
                "a model that needs inputs of the contract only",
                f"{name}, which needs {', '.join(strange)}",
                "take another model",
            )
        )
    outputs = {
        k
        for k in ("energy", "position_gradients", "node_energies", "charges", "dipole")
        if NAMES.get(k, k) in declared.outputs
    }
    if "stress" in declared.outputs or not declared.supports_pbc:
        outputs.add("cell_gradients")
    if declared.by_autograd:
        outputs.add("hessian")
    home = next((p for p in wrapper.parameters() if p.is_floating_point()), None)
    return Card(
        batches=True,
        outputs=outputs,
        derivative_order=None if declared.by_autograd else 1,
        cutoff=declared.neighbors and declared.neighbors.cutoff,
        neighbor_list=declared.neighbors and "own",
        supports_pbc=declared.supports_pbc,
        needs_pbc=declared.needs_pbc,
        required_inputs=Card().required_inputs | (declared.required & set(EXTRAS)),
        optional_inputs=declared.optional & set(EXTRAS),
        dtype=None if home is None else str(home.dtype).removeprefix("torch."),
        device=None if home is None else str(home.device),
    )


def _asking(wrapper: Any, names: set[str]) -> Any:
    """The same model with these outputs active. The one that was given keeps its own."""
    other, config = copy.copy(wrapper), wrapper.model_config
    if hasattr(config, "active_outputs"):
        new = {"active_outputs": names}
    else:
        new = {f"compute_{old}": name in names for name, old in OLD.items()}
    other.model_config = config.model_copy(update=new)
    return other


def _filled(inputs: dict[str, torch.Tensor]) -> Float[torch.Tensor, "B 3 3"]:
    """The cells, with a unit cube for systems without a periodic axis."""
    cell = inputs["cell"]
    cube = torch.eye(3, dtype=cell.dtype, device=cell.device)
    return torch.where(inputs["pbc"].any(-1)[:, None, None], cell, cube)


def _batch(inputs: dict[str, torch.Tensor], declared: _Declared) -> Any:
    """nvalchemi's Batch of the dict of the contract, with the neighbours that the model asks
    for."""
    used = declared.optional | declared.required
    atoms = {"positions": inputs["pos"], "atomic_numbers": inputs["atomic_numbers"].long()}
    systems = {k: inputs[k][:, None] for k in EXTRAS if k in inputs and k in used}
    if declared.supports_pbc:
        systems |= {"cell": _filled(inputs), "pbc": inputs["pbc"]}
    pairs: dict[str, torch.Tensor] = {}
    if declared.neighbors:
        of_atoms, pairs = _neighbors(inputs, declared.neighbors)
        atoms |= of_atoms
    rows: list[dict[str, torch.Tensor]] = [{} for _ in inputs["cell"]]
    count = lambda index: torch.bincount(index, minlength=len(rows)).tolist()
    _share_out(rows, atoms, count(inputs["batch"]))
    _share_out(rows, systems, 1)
    if pairs:
        centres = pairs["neighbor_list"][:, 0].long()
        _share_out(rows, pairs, count(inputs["batch"][centres]))
    first = 0
    for row in rows if pairs else ():  # the Batch counts atoms on from one system to the next
        row["neighbor_list"] = row["neighbor_list"] - first
        first += len(row["positions"])
    _, AtomicData, Batch = package()
    if hasattr(Batch, "from_raw_dicts"):
        batch = Batch.from_raw_dicts(rows)
    else:
        batch = Batch.from_data_list([AtomicData(**row) for row in rows])
    if declared.neighbors:
        batch._neighbor_list_cutoff = declared.neighbors.cutoff  # where pipelines look
    return batch


def _share_out(
    rows: Iterable[dict[str, torch.Tensor]],
    table: dict[str, torch.Tensor],
    sizes: int | list[int],
) -> None:
    """Writes into each system's row its part of the tensors, whose leading sizes are given."""
    for name, x in table.items():
        for row, part in zip(rows, x.split(sizes)):
            row[name] = part


def _neighbors(
    inputs: dict[str, torch.Tensor], config: Any
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The edges in nvalchemi's format: tensors of atoms (MATRIX), and tensors of edges (COO)."""
    i, j = inputs["edge_index"].long()
    offsets = inputs["cell_offsets"].long()
    n = len(inputs["pos"])
    if config.half_list:
        x, y, z = offsets.T
        ahead = (x > 0) | (x == 0) & ((y > 0) | (y == 0) & (z > 0))
        i, j, offsets = (a[(i < j) | (i == j) & ahead] for a in (i, j, offsets))
    order = torch.argsort(i, stable=True)
    i, j, offsets = i[order], j[order].int(), offsets[order].int()
    if config.format.value == "coo":
        return {}, {"neighbor_list": torch.stack([i.int(), j], 1), "neighbor_list_shifts": offsets}
    counts = torch.bincount(i, minlength=n)
    place = torch.arange(len(i), device=i.device) - (counts.cumsum(0) - counts)[i]
    width = int(counts.max()) + 1
    matrix = j.new_full((n, width), n)
    matrix[i, place] = j
    shifts = j.new_zeros(n, width, 3)
    shifts[i, place] = offsets
    of_atoms = {
        "neighbor_matrix": matrix,
        "neighbor_matrix_shifts": shifts,
        "num_neighbors": counts.int(),
    }
    return of_atoms, {}
