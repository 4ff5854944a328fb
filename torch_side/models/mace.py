"""MACE (Batatia et al., NeurIPS 35, 11423 (2022)) as a structure model of the contract."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import nn

from bridge import trust as trusting
from bridge.card import Card
from bridge.contract import ENERGY_AND_GRADIENTS
from bridge.errors import message, missing
from torch_side.potentials import padding
from torch_side.potentials.checkpoints import PICKLE
from torch_side.potentials.geometry import edge_shifts
from torch_side.potentials.model import Model

DEBYE = 1e-11 / 299792458 / 1.602176634e-19  # in e Angstrom
GIVEN = {"total_charge": "charge", "total_spin": "spin"}  # MACE's name: the contract's


class MACE(Model):
    """A MACE model, trained or not: from positions and cells to the energy and its exact gradients.

    `model` is a module of mace-torch (MACE, ScaleShiftMACE or EnergyDipolesMACE), which is copied,
    or the path of a file in which one was saved: torch.save of the whole module, as MACE's training
    writes it. Such a file runs the Python code that is pickled in it: `trust=True` says that you
    would run a program from where it came from. `head` names the head of a model with several.
    Weights are frozen, and converted to `dtype`: None keeps them as they are, and float64 is for
    Hessians and finite differences. `requires_grad_(True)` makes them trainable.
    The model is in eval mode, on `device`.

    Called with the dict of the contract, with N atoms in B systems, it makes edges where none are
    given, and returns, in eV and Angstrom, from one forward and one backward pass,

        energy (B,), position_gradients g = dE/dr at fixed cell (N,3), cell_gradients G = dE/dh at
        fixed Cartesian positions (B,3,3), node_energies (N,)

    and, where `asking` names them, the hessian, embeddings (N,F) (MACE's "node_feats": the features
    of all layers side by side, invariant and equivariant) and, from EnergyDipolesMACE in place of
    embeddings, dipole (B,3) in e Angstrom (MACE itself has it in Debye). A dipole is computed with
    the fixed charges of the atoms that the caller passes as `charges` (N,) in e among the inputs;
    without them they are zero, as in MACE's calculator. Models that were trained with a total
    charge or spin need charge (B,) or spin (B,). Forces are -g, MACE's `virials` are -W of
    torch_side.potentials.strain.virial, and its `stress` is torch_side.potentials.strain.stress.
    MACE's forward sets requires_grad, which torch.func refuses. So second derivatives are made by
    double backward, and bridge.to_jax needs derivatives="autograd". `import mace` sets
    TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD in the environment.

    Raises: what every Model raises; ValueError for a path without trust=True, for a head that is
    missing or unknown, and for a model that needs inputs that the contract does not have; TypeError
    for what is no MACE model with an energy; ImportError for a path without mace-torch.

    >>> model = MACE("MACE_model_swa.model", dtype=torch.float64, trust=True)               # doctest: +SKIP
    >>> model({"pos": torch.zeros(1, 3), "atomic_numbers": torch.tensor([8]), "cell": torch.zeros(1, 3, 3),
    ...        "pbc": torch.zeros(1, 3, dtype=torch.bool), "batch": torch.tensor([0])})     # doctest: +SKIP
    """

    network: Any  # a module of mace-torch
    species: Int[torch.Tensor, " Z"]  # the model's own index of each atomic number, -1 if unknown

    def __init__(
        self,
        model: nn.Module | str | os.PathLike[str],
        *,
        head: str | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        trust: bool = False,
    ) -> None:
        super().__init__()
        network = _load(model, device, trust)
        cutoff = float(network.r_max)
        elements = network.atomic_numbers.tolist()
        self.needs = _needs(network)
        self.head = _head(head, getattr(network, "heads", ["Default"]))
        self.network = network.to(device=device, dtype=dtype).requires_grad_(False).eval()
        species = torch.full((max(elements) + 1,), -1)
        species[elements] = torch.arange(len(elements))
        self.register_buffer("species", species.to(device), persistent=False)
        self.n_species = len(elements)
        if "EnergyDipolesMACE" in _classes(network):
            more, sizes = "dipole", ()
        else:
            n_features = sum(p.linear.irreps_out.dim for p in network.products)
            more, sizes = "embeddings", (("F", n_features),)
        self.card = Card(
            batches=True,
            outputs={*ENERGY_AND_GRADIENTS, "node_energies", "node_virials", "hessian", more},
            required_inputs=Card().required_inputs | set(self.needs.values()),
            cutoff=cutoff,
            neighbor_list="own",
            receptive_field=cutoff * len(network.interactions),
            elements=elements,
            dtype=str(next(self.network.parameters()).dtype).removeprefix("torch."),
            device=str(device),
            sizes=sizes,
        )
        self.eval()

    @property
    def cutoff(self) -> float | None:
        """The cutoff of its neighbour list in Angstrom."""
        return self.card.cutoff

    def energies(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the energies (B,) and (N,), and embeddings or dipole where these are active, of
        inputs without padding."""
        out = self.network(self._graph(inputs), compute_force=False)
        # ScaleShiftMACE's node energies are always float64
        nodes = out["node_energy"].to(inputs["pos"].dtype)
        found = {"energy": out["energy"], "node_energies": nodes}
        if "embeddings" in self.card.active_outputs:
            found["embeddings"] = out["node_feats"]
        if "dipole" in self.card.active_outputs:
            found["dipole"] = out["dipole"] * DEBYE
        return found

    def _graph(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """MACE's own dict. Positions that do not require grad are detached, since MACE would set
        requires_grad on the caller's tensor."""
        pos, cell = inputs["pos"], inputs["cell"]
        batch = inputs["batch"].long()
        sizes = padding.counted(batch, len(cell))
        species = self.species[inputs["atomic_numbers"].long()]
        graph = {
            "positions": pos if pos.requires_grad else pos.detach(),
            "node_attrs": padding.one_hot(species, self.n_species, pos.dtype),
            "edge_index": inputs["edge_index"].long(),
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


def _load(
    model: nn.Module | str | os.PathLike[str], device: str | torch.device, trust: bool
) -> Any:
    """A MACE module of our own."""
    if isinstance(model, nn.Module):
        network = copy.deepcopy(model)
    else:
        try:
            import mace.modules  # noqa: F401
        except ImportError as error:
            raise missing("mace-torch", "MACE models") from error
        trusting.ask(model, PICKLE, trust)
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


def _classes(network: Any) -> list[str]:
    """The names of its class and of those that it inherits from."""
    return [c.__name__ for c in type(network).__mro__]


def _head(head: str | None, known: Sequence[str]) -> int:
    """Index of the head. If none is named, the model's only head is meant."""
    if head is None and len(known) == 1:
        return 0
    if head is None or head not in known:
        raise ValueError(
            message(
                f"head to be one of {', '.join(known)}", repr(head), "pass head=... accordingly"
            )
        )
    return list(known).index(head)


def _needs(network: Any) -> dict[str, str]:
    """{MACE's name: the contract's} of the inputs of a system that it was trained with."""
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
