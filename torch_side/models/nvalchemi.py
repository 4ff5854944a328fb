"""nvalchemi-toolkit (NVIDIA): its models as potentials of the contract."""

from __future__ import annotations

import copy
from functools import partial
from importlib import metadata
from types import SimpleNamespace

import torch
from torch import nn

from bridge.card import Card
from bridge.contract import ENERGY_AND_GRADIENTS, OUTPUTS
from bridge.errors import message, missing
from torch_side.potentials import graph, strain
from torch_side.potentials.model import Model

# else the same
NAMES = {
    "energy": "energy",
    "position_gradients": "forces",
    "cell_gradients": "stress",
    "node_energies": "atomic_energies",
}
EXTRAS = ("charge", "spin")  # inputs of a system that both sides know
# before 0.1: supports_..., compute_...
OLD = {
    "energy": "energies",
    "forces": "forces",
    "stress": "stresses",
    "hessian": "hessians",
    "dipole": "dipoles",
}


class Nvalchemi(Model):
    """An nvalchemi model (BaseModelMixin, called the wrapper here) as a potential of the contract.

    Called with the dict of the contract, it runs the wrapper once and gives energy (B,),
    position_gradients g = dE/dr (N,3), cell_gradients G = dE/dh at fixed Cartesian positions
    (B,3,3), and what it is asked for of node_energies, charges and dipole, in eV and Angstrom. If
    forces are among the wrapper's autograd_outputs, its energy alone is asked for and
    torch.autograd makes g and G, higher derivatives included. Else, or if that energy turns out not
    to reach positions and cell, g and G come from its forces and its stress (W = V stress, G = h^-T
    (W - R^T g), zeros for open systems), detached: first derivatives only.

    Neighbours are found by torch_side.potentials.neighbors, or taken from edge_index and
    cell_offsets, and handed over in the format that the wrapper asks for (COO, MATRIX, half lists).
    Its own active_outputs are left alone. `card` is made from its ModelConfig (or, of models before
    nvalchemi-toolkit 0.1, from its model_card): without stress, a model of periodic systems has no
    cell_gradients.

    Raises: TypeError for something that is no nvalchemi model; ValueError for one without forces,
    or that needs inputs outside of the contract, and as torch_side.potentials.graph.evaluate does;
    ImportError without nvalchemi-toolkit.

    >>> Nvalchemi(LennardJonesModelWrapper(0.01, 3.4, 8.5)).card.cutoff     # doctest: +SKIP
    8.5
    """

    def __init__(self, wrapper):
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
        self.wrapper, self.declared = wrapper, _declared(wrapper)
        self.card, self._by_autograd = _card(wrapper, self.declared), {}
        self.__qualname__ = type(wrapper).__name__

    def forward(self, inputs, trained=None):
        return graph.evaluate(
            partial(self._evaluate, trained=trained), inputs, self.card, self.__qualname__, self
        )

    def energies(self, inputs):
        return self._call(inputs, set())

    def _evaluate(self, inputs, trained):
        if self.declared.by_autograd and self._reaches(inputs):
            out = self._with_gradients(inputs, trained)
            return (
                out
                if "cell_gradients" in self.card.outputs
                else {k: x for k, x in out.items() if k != "cell_gradients"}
            )
        return self._direct({k: x.detach() for k, x in inputs.items()})

    def _reaches(self, inputs):
        """Whether the energy can be differentiated in what the card has gradients for; tried once,
        and once where something is periodic."""
        periodic = bool(inputs["pbc"].any())
        if periodic not in self._by_autograd:
            leaves = {k: inputs[k].detach().requires_grad_() for k in ("pos", "cell")}
            with torch.enable_grad():
                energy = self.energies(inputs | leaves)["energy"]
                found = (
                    torch.autograd.grad(energy.sum(), list(leaves.values()), allow_unused=True)
                    if energy.requires_grad
                    else (None, None)
                )
            self._by_autograd[periodic] = found[0] is not None and (
                found[1] is not None or not (periodic and "cell_gradients" in self.card.outputs)
            )
        return self._by_autograd[periodic]

    def _direct(self, inputs):
        """Energy, g and G from what the wrapper gives."""
        periodic = inputs["pbc"].any(-1)[:, None, None]
        stressed = "stress" in self.declared.outputs and bool(periodic.any())
        with torch.enable_grad():  # its forces may be made by autograd
            out = self._call(inputs, {"forces", "stress"} if stressed else {"forces"})
        out = {k: x.detach() for k, x in out.items()}
        forces, cell = out.pop("forces"), _filled(inputs)
        out["position_gradients"] = -forces
        if stressed:
            W = sign() * torch.linalg.det(cell).abs()[:, None, None] * out.pop("stress")
            G = strain.lattice_gradient_from_virial(forces, inputs["pos"], inputs["batch"], cell, W)
            out["cell_gradients"] = torch.where(periodic, G, 0)
        elif "cell_gradients" in self.card.outputs:
            out["cell_gradients"] = torch.zeros_like(cell)
        return out

    def _call(self, inputs, names):
        """Outputs of one forward under names of the contract, forces and stress as they are."""
        further = self.card.active_outputs - {*ENERGY_AND_GRADIENTS, "hessian"}
        names = names | {"energy"} | {NAMES.get(k, k) for k in further}
        out = _asking(self.wrapper, names)(_batch(inputs, self.declared))
        out = {name: out.get(name, out.get(OLD.get(name))) for name in names}
        ours = {
            NAMES.get(k, k): k for k in OUTPUTS if k not in ("position_gradients", "cell_gradients")
        }
        shapes = self.card.shapes(len(inputs["pos"]), len(inputs["cell"]))
        return {
            k: x.reshape(shapes[k]) if k in shapes else x
            for k, x in ((ours.get(name, name), x) for name, x in out.items())
        }


def package():
    """nvalchemi's base of models, its AtomicData and its Batch."""
    try:
        from nvalchemi.data import AtomicData, Batch
        from nvalchemi.models import base
    except ImportError as error:
        raise missing("nvalchemi-toolkit", "nvalchemi models") from error
    return base, AtomicData, Batch


def sign():
    """Of stress in the installed version: the tension was negative before 0.2."""
    return (
        -1 if [int(n) for n in metadata.version("nvalchemi-toolkit").split(".")[:2]] < [0, 2] else 1
    )


def _declared(wrapper):
    """What an nvalchemi model says of itself, in one form."""
    config = wrapper.model_config
    if hasattr(config, "outputs"):
        new = SimpleNamespace(
            outputs=set(config.outputs),
            by_autograd="forces" in config.autograd_outputs,
            required=wrapper.input_data(),
        )
        return _with(new, config, config.optional_inputs)
    card = wrapper.model_card
    # whose convention was another
    outputs = {name for name, old in OLD.items() if getattr(card, f"supports_{old}", False)} - {
        "stress"
    }
    needs = {
        name
        for name, old in (("charge", "needs_system_charges"), ("charges", "needs_node_charges"))
        if getattr(card, old, False)
    }
    return _with(
        SimpleNamespace(outputs=outputs, by_autograd=card.forces_via_autograd, required=needs),
        card,
        (),
    )


def _with(declared, source, optional):
    declared.neighbors, declared.supports_pbc, declared.needs_pbc = (
        source.neighbor_config,
        source.supports_pbc,
        source.needs_pbc,
    )
    declared.optional = set(optional)
    return declared


def _card(wrapper, declared):
    """The card of an nvalchemi model."""
    name, known = type(wrapper).__name__, {"positions", "atomic_numbers", "cell", "pbc", *EXTRAS}
    known |= {
        "neighbor_list",
        "neighbor_list_shifts",
        "neighbor_matrix",
        "neighbor_matrix_shifts",
        "num_neighbors",
    }
    if "forces" not in declared.outputs:
        raise ValueError(
            message(
                "an nvalchemi model with forces",
                f"{name}, which has {', '.join(sorted(declared.outputs))}",
                "take another model",
            )
        )
    if strange := sorted(declared.required - known):
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
    outputs |= (
        {"cell_gradients"} if "stress" in declared.outputs or not declared.supports_pbc else set()
    )
    home = next((p for p in wrapper.parameters() if p.is_floating_point()), None)
    return Card(
        batches=True, outputs=outputs | ({"hessian"} if declared.by_autograd else set()), derivative_order=None if declared.by_autograd else 1,
        cutoff=declared.neighbors and declared.neighbors.cutoff, neighbor_list=declared.neighbors and "own",
        supports_pbc=declared.supports_pbc, needs_pbc=declared.needs_pbc,
        required_inputs=Card().required_inputs | (declared.required & set(EXTRAS)), optional_inputs=declared.optional & set(EXTRAS),
        dtype=home if home is None else str(home.dtype).removeprefix("torch."), device=home if home is None else str(home.device),
    )  # fmt: skip


def _asking(wrapper, names):
    """The same model with these outputs active; the one that was given keeps its own."""
    other, config = copy.copy(wrapper), wrapper.model_config
    new = (
        {"active_outputs": names}
        if hasattr(config, "active_outputs")
        else {f"compute_{old}": name in names for name, old in OLD.items()}
    )
    other.model_config = config.model_copy(update=new)
    return other


def _filled(inputs):
    """Cells, where nothing is periodic a unit cube."""
    cell = inputs["cell"]
    return torch.where(
        inputs["pbc"].any(-1)[:, None, None],
        cell,
        torch.eye(3, dtype=cell.dtype, device=cell.device),
    )


def _batch(inputs, declared):
    """nvalchemi's Batch of the dict of the contract, with the neighbours that the model asks
    for."""
    atoms = {"positions": inputs["pos"], "atomic_numbers": inputs["atomic_numbers"].long()}
    systems = {
        k: inputs[k][:, None]
        for k in EXTRAS
        if k in inputs and k in declared.optional | declared.required
    }
    systems |= {"cell": _filled(inputs), "pbc": inputs["pbc"]} if declared.supports_pbc else {}
    more, pairs = _neighbors(inputs, declared.neighbors) if declared.neighbors else ({}, {})
    rows = [{} for _ in inputs["cell"]]
    count = lambda index: torch.bincount(index, minlength=len(rows)).tolist()
    edges_of = count(inputs["batch"][pairs["neighbor_list"][:, 0].long()]) if pairs else []
    for table, sizes in ((atoms | more, count(inputs["batch"])), (systems, 1), (pairs, edges_of)):
        for name, x in table.items():
            for row, part in zip(rows, x.split(sizes)):
                row[name] = part
    first = 0
    for row in rows if pairs else ():  # the Batch counts atoms on from one system to the next
        row["neighbor_list"] = row["neighbor_list"] - first
        first += len(row["positions"])
    _, AtomicData, Batch = package()
    batch = (
        Batch.from_raw_dicts(rows)
        if hasattr(Batch, "from_raw_dicts")
        else Batch.from_data_list([AtomicData(**row) for row in rows])
    )
    if declared.neighbors:
        batch._neighbor_list_cutoff = declared.neighbors.cutoff  # where pipelines look
    return batch


def _neighbors(inputs, config):
    """The edges as what belongs to atoms (MATRIX) and what belongs to edges (COO)."""
    (i, j), offsets, n = (
        inputs["edge_index"].long(),
        inputs["cell_offsets"].long(),
        len(inputs["pos"]),
    )
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
    matrix, shifts = j.new_full((n, width), n), j.new_zeros(n, width, 3)
    matrix[i, place], shifts[i, place] = j, offsets
    return {
        "neighbor_matrix": matrix,
        "neighbor_matrix_shifts": shifts,
        "num_neighbors": counts.int(),
    }, {}
