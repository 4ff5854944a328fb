"""MACE (Batatia et al., NeurIPS 35, 11423 (2022)) as a structure model of the contract."""

from __future__ import annotations

import copy

import torch
from torch import nn

from bridge.card import Card
from bridge.contract import ENERGY_AND_GRADIENTS
from bridge.errors import message, missing
from torch_side.potentials.geometry import edge_shifts
from torch_side.potentials.model import Model

DEBYE = 1e-11 / 299792458 / 1.602176634e-19  # e Angstrom
GIVEN = {"total_charge": "charge", "total_spin": "spin"}  # MACE's name: the contract's


class MACE(Model):
    """A MACE model, trained or not: positions and cells in, energy and its exact gradients out.

    `model` is a module of mace-torch (MACE, ScaleShiftMACE, EnergyDipolesMACE; it is copied) or the
    path of a file in which one was saved (torch.save of the whole module, as MACE's training writes
    it; a pickle, so load only files you trust). `head` names the head of a model with several.
    Weights are frozen, and converted to `dtype` (None: as they are; float64 for Hessians and finite
    differences); `requires_grad_(True)` makes them trainable. It is in eval mode, on `device`.

    Called with the dict of the contract (N atoms in B systems; edges are made where none are given)
    it returns, in eV and Angstrom, from one forward and one backward pass,

        energy (B,), position_gradients g = dE/dr at fixed cell (N,3), cell_gradients G = dE/dh at
        fixed Cartesian positions (B,3,3), node_energies (N,)

    and, as `asking` says, hessian, embeddings (N,F) (MACE's "node_feats": features of all layers
    side by side, invariant and equivariant) and, from EnergyDipolesMACE, dipole (B,3) in e Angstrom
    (MACE itself: Debye), with charges that the caller fixes as `charges` (N,) in e among the
    inputs, else zero, as in MACE's calculator. Models that were trained with a total charge or spin
    need charge (B,) or spin (B,). Forces are -g; MACE's `virials` are -W of
    torch_side.potentials.strain.virial, its `stress` is torch_side.potentials.strain.stress. MACE's
    forward sets requires_grad, so that torch.func refuses it: second derivatives go by double
    backward, and bridge.to_jax wants derivatives="autograd". `import mace` sets
    TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD in the environment.

    Raises: as every Model; TypeError for what is no MACE model with an energy; ValueError for a
    head that is missing or unknown and for a model that needs inputs that the contract does not
    have; ImportError without mace-torch, for a path.

    >>> model = MACE("MACE_model_swa.model", dtype=torch.float64)                           # doctest: +SKIP
    >>> model({"pos": torch.zeros(1, 3), "atomic_numbers": torch.tensor([8]), "cell": torch.zeros(1, 3, 3),
    ...        "pbc": torch.zeros(1, 3, dtype=torch.bool), "batch": torch.tensor([0])})     # doctest: +SKIP
    """

    def __init__(self, model, *, head=None, dtype=None, device="cpu"):
        super().__init__()
        network = _load(model, device)
        cutoff, elements = float(network.r_max), network.atomic_numbers.tolist()
        self.needs, self.head = _needs(network), _head(head, getattr(network, "heads", ["Default"]))
        self.network = network.to(device=device, dtype=dtype).requires_grad_(False).eval()
        species = torch.full((max(elements) + 1,), -1)
        species[elements] = torch.arange(len(elements))
        self.register_buffer("species", species.to(device), persistent=False)
        self.n_species, dipoles = len(elements), "EnergyDipolesMACE" in _classes(network)
        self.card = Card(
            batches=True,
            outputs={
                *ENERGY_AND_GRADIENTS,
                "node_energies",
                "hessian",
                "dipole" if dipoles else "embeddings",
            },
            required_inputs=Card().required_inputs | set(self.needs.values()),
            cutoff=cutoff,
            neighbor_list="own",
            receptive_field=cutoff * len(network.interactions),
            elements=elements,
            dtype=str(next(self.network.parameters()).dtype).removeprefix("torch."),
            device=str(device),
            sizes=()
            if dipoles
            else (("F", sum(p.linear.irreps_out.dim for p in network.products)),),
        )
        self.eval()

    @property
    def cutoff(self) -> float:
        return self.card.cutoff

    def energies(self, inputs):
        out = self.network(self._graph(inputs), compute_force=False)
        found = {"energy": out["energy"], "node_energies": out["node_energy"]}
        if "embeddings" in self.card.active_outputs:
            found["embeddings"] = out["node_feats"]
        if "dipole" in self.card.active_outputs:
            found["dipole"] = out["dipole"] * DEBYE
        return found

    def _graph(self, inputs):
        """MACE's own dict. Positions that do not require grad are detached, for MACE would change
        that on the caller's tensor."""
        pos, cell, batch, edges = (
            inputs["pos"],
            inputs["cell"],
            inputs["batch"].long(),
            inputs["edge_index"].long(),
        )
        sizes = torch.bincount(batch, minlength=len(cell))
        graph = {
            "positions": pos if pos.requires_grad else pos.detach(),
            "node_attrs": nn.functional.one_hot(
                self.species[inputs["atomic_numbers"].long()], self.n_species
            ).to(pos.dtype),
            "edge_index": edges,
            "unit_shifts": inputs["cell_offsets"].to(cell.dtype),
            "shifts": edge_shifts(inputs),
            "cell": cell.reshape(-1, 3),
            "pbc": inputs["pbc"],
            "batch": batch,
            "ptr": nn.functional.pad(sizes.cumsum(0), (1, 0)),
            "head": torch.full_like(sizes, self.head),
            "charges": inputs.get("charges", torch.zeros_like(pos[:, 0])),
        }
        return graph | {name: inputs[key].to(pos.dtype) for name, key in self.needs.items()}


def _load(model, device):
    """A MACE module of our own."""
    if isinstance(model, nn.Module):
        network = copy.deepcopy(model)
    else:
        try:
            import mace.modules  # noqa: F401
        except ImportError as error:
            raise missing("mace-torch", "MACE models") from error
        network = torch.load(model, map_location=device, weights_only=False)
    classes = _classes(network)
    if not {"MACE", "EnergyDipolesMACE"} & set(classes) or {"MACELES", "PolarMACE"} & set(classes):
        expected = "MACE, ScaleShiftMACE or EnergyDipolesMACE, or the path of one saved whole"
        raise TypeError(
            message(
                expected,
                f"a {type(network).__name__}",
                "pass a module of mace-torch that has an energy and no long-range part",
            )
        )
    return network


def _classes(network):
    return [c.__name__ for c in type(network).__mro__]


def _head(head, known) -> int:
    """Index of the head; the only one is meant where none is named."""
    if head is None and len(known) == 1:
        return 0
    if head not in known:
        raise ValueError(
            message(
                f"head to be one of {', '.join(known)}", repr(head), "pass head=... accordingly"
            )
        )
    return list(known).index(head)


def _needs(network) -> dict:
    """{MACE's name: the contract's} of what it was trained with."""
    names = list(getattr(network, "embedding_specs", ()))
    if strange := [n for n in names if n not in GIVEN]:
        raise ValueError(
            message(
                f"a model that needs no more than {', '.join(GIVEN)}",
                f"one that needs {', '.join(strange)}",
                "take another model",
            )
        )
    return {n: GIVEN[n] for n in names}
