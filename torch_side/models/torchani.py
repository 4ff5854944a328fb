"""ANI models of torchani (Gao et al., J. Chem. Inf. Model. 60, 3408 (2020)) as structure models of
the contract."""

from __future__ import annotations

import copy
from typing import Any

import torch
from jaxtyping import Float, Int

from bridge.card import Card
from bridge.contract import ENERGY_AND_GRADIENTS
from bridge.errors import message, missing
from torch_side.potentials.geometry import edge_vectors
from torch_side.potentials.model import Model
from torch_side.potentials.neighbors import bonds


class TorchANI(Model):
    """Any ANI model of torchani: from positions and cells to the energy, its exact gradients and,
    for some models, charges.

    `model` is a torchani.arch.ANI or ANIq, which is copied, or the name of a model of
    torchani.models ("ANI2x", ...), whose weights torchani downloads. Weights are converted to
    `dtype` and frozen. `requires_grad_(True)` makes them trainable, and gradients then keep their
    graph. The model is in eval mode, on `device`. It takes the dict of the contract, with N atoms
    in B systems,

        pos (N,3) float, atomic_numbers (N,) int, cell (B,3,3) float by rows, pbc (B,3) bool, batch
        (N,) int sorted

    and optionally edge_index (2,E) and cell_offsets (E,3), with both directions of each edge up to
    card.cutoff. It returns, in eV and Angstrom (Hartree are converted by torchani's factor, which
    is ASE's), from one forward and one backward pass for all systems together,

        energy (B,), position_gradients g = dE/dr at fixed cell (N,3), cell_gradients G = dE/dh at
        fixed Cartesian positions (B,3,3), node_energies (N,)

    and, where `model.asking(...)` names them, charges (N,) of an ANIq, member_energies (M,B) of an
    ensemble of M networks (not of an ANIq), and the hessian. Forces are -g, and
    torch_side.potentials.strain makes the virial and the stress. Self energies are part of the
    energy. For a few heavy atoms they are some 1e5 eV, of which float32 keeps seven digits, so take
    float64 for energy differences. Neighbours are found as for every model of the contract and not
    by torchani's own lists, so that small and triclinic cells, slabs and unequal systems are fine.
    The AEVs are those that torchani computes in Python, since its CUDA ones have no second
    derivatives.

    Raises: ValueError for inputs outside the contract as torch_side.potentials.graph.evaluate does,
    for an element that the model does not know, for a charge that is not zero (torchani has neutral
    systems only), for given edges that lack one direction, for a potential without a cutoff and for
    an unknown name; TypeError for a model of another kind; ImportError without torchani or vesin.

    >>> model = TorchANI("ANI2x").asking("hessian")                                         # doctest: +SKIP
    >>> model({"pos": torch.tensor([[0.0, 0, 0], [0, 0, 0.74]]), "atomic_numbers": torch.tensor([1, 1]), "batch": torch.tensor([0, 0]),
    ...        "cell": torch.zeros(1, 3, 3), "pbc": torch.zeros(1, 3, dtype=torch.bool)})   # doctest: +SKIP
    """

    network: Any  # a torchani.arch.ANI or ANIq

    def __init__(
        self,
        model: str | Any = "ANI2x",
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__()
        network, self.has_charges, local = _load(model)
        if network.cutoff == float("inf"):
            endless = [name for name, p in network.potentials.items() if p.cutoff == float("inf")]
            raise ValueError(
                message(
                    "potentials that all have a cutoff",
                    f"none for {', '.join(endless)}",
                    "build the model with one",
                )
            )
        network.set_strategy("pyaev")
        self.network = network.to(device=device, dtype=dtype).requires_grad_(False).eval()
        ensemble = not self.has_charges and hasattr(network.neural_networks, "members")
        members = len(network) if ensemble else 0
        outputs = {*ENERGY_AND_GRADIENTS, "node_energies", "hessian"}
        if self.has_charges:
            outputs.add("charges")
        if members:
            outputs.add("member_energies")
        self.card = Card(
            batches=True,
            outputs=outputs,
            optional_inputs={"charge"},
            cutoff=float(network.cutoff),
            neighbor_list="own",
            receptive_field=float(network.cutoff) if local else None,
            elements=network.atomic_numbers.tolist(),
            dtype=str(dtype).removeprefix("torch."),
            device=str(device),
            sizes=(("M", members),) if members else (),
        )
        self.eval()

    def energies(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the energies (B,) and (N,), and charges and member energies where these are
        active, of inputs without padding.

        Raises: ValueError for a charge that is not zero."""
        from torchani.neighbors import Neighbors
        from torchani.units import HARTREE_TO_EV

        _check_neutral(inputs.get("charge"))
        batch = inputs["batch"].long()
        n_systems = len(inputs["cell"])
        each = "member_energies" in self.card.active_outputs
        shape, place = self._rows(batch, n_systems)
        # The neighbours hold all of the geometry; zeros stand in for the positions.
        pos = inputs["pos"].new_zeros(*shape, 3)
        elements = inputs["pos"].new_full(shape, -1, dtype=torch.long)
        numbers = inputs["atomic_numbers"].long()
        elements.view(-1)[place] = self.network.species_converter(numbers[None])[0]
        pairs, vectors = _pairs(inputs)
        neighbors = Neighbors(place[pairs], torch.linalg.vector_norm(vectors, dim=-1), -vectors)
        found = self.network.compute_from_neighbors(
            elements, pos, neighbors, atomic=True, ensemble_values=each
        )
        nodes = HARTREE_TO_EV * found.energies.flatten(-2)[..., place]
        energy = nodes.new_zeros(*nodes.shape[:-1], n_systems).index_add(-1, batch, nodes)
        out = {"charges": found.scalars.flatten()[place]} if self.has_charges else {}
        if each:
            out["member_energies"] = energy
            energy, nodes = energy.mean(0), nodes.mean(0)
        return {"energy": energy, "node_energies": nodes, **out}

    def _rows(
        self, batch: Int[torch.Tensor, " N"], n_systems: int
    ) -> tuple[tuple[int, int], Int[torch.Tensor, " N"]]:
        """The shape of torchani's table of molecules and their atoms, and the place of each atom.

        All atoms lie in one row, since no pair joins two systems. But charges are normalised row by
        row, so that with charges each system has a row of its own."""
        number = torch.arange(len(batch), device=batch.device)
        if not self.has_charges:
            return (1, len(batch)), number
        sizes = torch.bincount(batch, minlength=n_systems)
        longest = int(sizes.max())
        start = sizes.cumsum(0) - sizes
        return (n_systems, longest), batch * longest + number - start[batch]


def _load(model: Any) -> tuple[Any, bool, bool]:
    """The network (a copy), whether it has charges, and whether an atom feels nothing beyond one
    cutoff."""
    try:
        from torchani import models
        from torchani.arch import ANI, ANIq
        from torchani.potentials import NNPotential, PairPotential, RepulsionXTB
    except ImportError as error:
        raise missing("torchani", "ANI models") from error
    if isinstance(model, str):
        if not model.startswith(("ANI", "Snn")) or not hasattr(models, model):
            raise ValueError(
                message(
                    "the name of a model of torchani.models, as ANI2x",
                    repr(model),
                    "pass one, or a torchani.arch.ANI",
                )
            )
        model = getattr(models, model)()
    if not isinstance(model, (ANI, ANIq)):
        raise TypeError(
            message(
                "a torchani.arch.ANI or ANIq, or a name",
                f"a {type(model).__name__}",
                "build one by torchani.arch or torchani.models",
            )
        )
    network = copy.deepcopy(model)
    local = (NNPotential, PairPotential, RepulsionXTB)
    is_local = all(isinstance(p, local) for p in network.potentials.values())
    return network, isinstance(model, ANIq), is_local


def _pairs(
    inputs: dict[str, torch.Tensor],
) -> tuple[Int[torch.Tensor, "2 P"], Float[torch.Tensor, "P 3"]]:
    """Each pair of neighbours once: (2,P) indices and r_ij (P,3)."""
    edges = inputs["edge_index"]
    _, once = bonds(edges, inputs["cell_offsets"])
    return edges.long().index_select(1, once), edge_vectors(inputs).index_select(0, once)


def _check_neutral(charge: torch.Tensor | None) -> None:
    """ValueError naming a system whose charge is not zero."""
    if charge is not None and charge.any():
        system = int(charge.nonzero()[0])
        got = f"charge {charge[system].item()} in system {system}"
        raise ValueError(
            message(
                "neutral systems, which is all that torchani has",
                got,
                "pass none, or take another model",
            )
        )
