"""ANI models of torchani (Gao et al., J. Chem. Inf. Model. 60, 3408 (2020)) as structure models of
the contract."""

from __future__ import annotations

import copy

import torch

from bridge.card import Card
from bridge.contract import ENERGY_AND_GRADIENTS
from bridge.errors import message, missing
from torch_side.potentials.geometry import edge_vectors
from torch_side.potentials.model import Model


class TorchANI(Model):
    """Any ANI model of torchani: positions and cells in; energy, its exact gradients and, from
    some, charges out.

    `model` is a torchani.arch.ANI or ANIq (which is copied) or the name of a model of
    torchani.models ("ANI2x", ...; torchani downloads its weights). They are converted to `dtype`
    and frozen; `requires_grad_(True)` makes them trainable, and gradients then keep their graph. It
    is in eval mode, on `device`. Called with the dict of the contract, with N atoms in B systems,

        pos (N,3) float, atomic_numbers (N,) int, cell (B,3,3) float by rows, pbc (B,3) bool, batch
        (N,) int sorted

    and optionally edge_index (2,E), cell_offsets (E,3) up to card.cutoff (both directions of each),
    it returns, in eV and Angstrom (Hartree by torchani's factor, which is ASE's), from one forward
    and one backward pass for all systems together,

        energy (B,), position_gradients g = dE/dr at fixed cell (N,3), cell_gradients G = dE/dh at
        fixed Cartesian positions (B,3,3), node_energies (N,)

    and, where `model.asking(...)` names them, charges (N,) of an ANIq, member_energies (M,B) of an
    ensemble of M networks (not of an ANIq), and the hessian. Forces are -g;
    torch_side.potentials.strain makes the virial and the stress. Self energies are part of energy:
    some 1e5 eV for a few heavy atoms, of which float32 keeps seven digits; float64 is for energy
    differences. Neighbours are those of the contract (torchani's own lists are not used), so that
    small and triclinic cells, slabs and unequal systems are fine. AEVs are torchani's Python ones,
    for its CUDA ones have no second derivatives.

    Raises: ValueError for inputs outside the contract as torch_side.potentials.graph.evaluate does,
    an element the model does not know, a system whose charge is given and not zero (torchani has
    neutral ones only), given edges that lack one direction, a potential without a cutoff, an
    unknown name; TypeError for a model of another kind; ImportError without torchani or vesin.

    >>> model = TorchANI("ANI2x").asking("hessian")                                         # doctest: +SKIP
    >>> model({"pos": torch.tensor([[0.0, 0, 0], [0, 0, 0.74]]), "atomic_numbers": torch.tensor([1, 1]), "batch": torch.tensor([0, 0]),
    ...        "cell": torch.zeros(1, 3, 3), "pbc": torch.zeros(1, 3, dtype=torch.bool)})   # doctest: +SKIP
    """

    def __init__(self, model="ANI2x", *, dtype=torch.float32, device="cpu"):
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
        members = (
            0
            if self.has_charges or not hasattr(network.neural_networks, "members")
            else len(network)
        )
        more = (["charges"] if self.has_charges else []) + (["member_energies"] if members else [])
        self.card = Card(
            batches=True,
            outputs={*ENERGY_AND_GRADIENTS, "node_energies", "hessian", *more},
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

    def energies(self, inputs):
        from torchani.neighbors import Neighbors
        from torchani.units import HARTREE_TO_EV

        _check_neutral(inputs.get("charge"))
        batch, n_systems, each = (
            inputs["batch"].long(),
            len(inputs["cell"]),
            "member_energies" in self.card.active_outputs,
        )
        shape, place = self._rows(batch, n_systems)
        elements, pos = (
            inputs["pos"].new_full(shape, -1, dtype=torch.long),
            inputs["pos"].new_zeros(*shape, 3),
        )
        elements.view(-1)[place] = self.network.species_converter(
            inputs["atomic_numbers"].long()[None]
        )[0]
        pairs, vectors = _pairs(inputs)
        neighbors = Neighbors(place[pairs], torch.linalg.vector_norm(vectors, dim=-1), -vectors)
        found = self.network.compute_from_neighbors(
            elements, pos, neighbors, atomic=True, ensemble_values=each
        )
        nodes = HARTREE_TO_EV * found.energies.flatten(-2)[..., place]
        energy = nodes.new_zeros(*nodes.shape[:-1], n_systems).index_add(-1, batch, nodes)
        out = {"charges": found.scalars.flatten()[place]} if self.has_charges else {}
        if each:
            out["member_energies"], energy, nodes = energy, energy.mean(0), nodes.mean(0)
        return {"energy": energy, "node_energies": nodes, **out}

    def _rows(self, batch, n_systems):
        """Shape of the table of molecules and atoms, and the place of each atom: one row for all,
        as no pair joins two systems.

        Charges are normalised row by row: with them each system has its own row."""
        if not self.has_charges:
            return (1, len(batch)), torch.arange(len(batch), device=batch.device)
        sizes = torch.bincount(batch, minlength=n_systems)
        longest, start = int(sizes.max()), sizes.cumsum(0) - sizes
        return (n_systems, longest), batch * longest + torch.arange(
            len(batch), device=batch.device
        ) - start[batch]


def _load(model):
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
    return (
        network,
        isinstance(model, ANIq),
        all(
            isinstance(p, (NNPotential, PairPotential, RepulsionXTB))
            for p in network.potentials.values()
        ),
    )


def _pairs(inputs):
    """Each pair of neighbours once: (2,P) indices and r_ij (P,3)."""
    edges, (a, b, c) = inputs["edge_index"], inputs["cell_offsets"].T
    ahead = (a > 0) | (a == 0) & ((b > 0) | (b == 0) & (c > 0))
    once = ((edges[0] < edges[1]) | (edges[0] == edges[1]) & ahead).nonzero()[:, 0]
    if 2 * len(once) != edges.shape[1]:
        got = f"{len(once)} of {edges.shape[1]} in one of them"
        raise ValueError(
            message(
                "each edge once in both directions",
                got,
                "look at how the edges were made, or pass none",
            )
        )
    return edges.long().index_select(1, once), edge_vectors(inputs).index_select(0, once)


def _check_neutral(charge):
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
