"""CHGNet (Deng et al., Nat. Mach. Intell. 5, 1031 (2023)) as a structure model of the contract."""

from __future__ import annotations

import contextlib
import copy
import io
import os

import torch

from bridge.card import Card
from bridge.contract import ENERGY_AND_GRADIENTS
from bridge.errors import message, missing
from torch_side.potentials.geometry import edge_vectors
from torch_side.potentials.model import Model

VERSIONS = ("0.3.0", "r2scan", "0.2.0")  # in the wheel of chgnet


class CHGNet(Model):
    """A pretrained or own CHGNet: positions and cells in; energy, its exact gradients and magnetic
    moments out.

    `model` is a version whose weights lie in the wheel of chgnet ("0.3.0", "r2scan", "0.2.0"), the
    path of a checkpoint, or a chgnet.model.model.CHGNet (which is copied). Weights are converted to
    `dtype` (float32 as trained, float64 for Hessians and finite differences) and frozen;
    `requires_grad_(True)` makes them trainable, and gradients then keep their graph. It is in eval
    mode, on `device`. Called with the dict of the contract, with N atoms in B systems,

        pos (N,3) float, atomic_numbers (N,) int, cell (B,3,3) float by rows, pbc (B,3) bool, batch
        (N,) int sorted

    and optionally edge_index (2,E), cell_offsets (E,3) up to card.cutoff (6 Angstrom as trained;
    both directions of each), it returns, in eV, Angstrom and Bohr magnetons, from one forward and
    one backward pass for all systems together,

        energy (B,), extensive (chgnet's own is per atom); position_gradients g = dE/dr at fixed
        cell (N,3); cell_gradients G = dE/dh at fixed Cartesian positions (B,3,3); node_energies
        (N,), if the model is a sum over atoms, as trained

    and, where `model.asking(...)` names them, magmoms (N,) (absolute values), embeddings (N,F) (the
    features that magmoms are made from) and the hessian. Forces are -g;
    torch_side.potentials.strain makes the virial and the stress. The graph of bonds and angles is
    made from the edges, not by pymatgen: open systems need no cell. An atom without neighbours has
    the energy that chgnet's calculator gives it, with its warning that this "will likely go wrong",
    and no gradient.

    Raises: ValueError for inputs outside the contract as torch_side.potentials.graph.evaluate does,
    an element beyond Pu, given edges that lack one direction, an unknown version, and, with the
    weights of 0.2.0 only, for a system without angles (no atom with two bonds below 3 Angstrom) in
    one call with others; ImportError without chgnet or vesin.

    >>> model = CHGNet("0.3.0").asking("magmoms")                                           # doctest: +SKIP
    >>> model({"pos": torch.zeros(1, 3), "atomic_numbers": torch.tensor([26]), "cell": 2.5 * torch.eye(3)[None],
    ...        "pbc": torch.ones(1, 3, dtype=torch.bool), "batch": torch.tensor([0])})      # doctest: +SKIP
    """

    def __init__(self, model="0.3.0", *, dtype=torch.float32, device="cpu"):
        super().__init__()
        self.network = _load(model).to(device=device, dtype=dtype).requires_grad_(False).eval()
        converter = self.network.graph_converter
        cutoff, self.bond_cutoff = (
            float(converter.atom_graph_cutoff),
            float(converter.bond_graph_cutoff),
        )
        outputs = {*ENERGY_AND_GRADIENTS, *(["node_energies"] if self.network.mlp_first else [])}
        self.card = Card(
            batches=True,
            outputs=outputs | {"magmoms", "embeddings", "hessian"},
            cutoff=cutoff,
            neighbor_list="own",
            receptive_field=cutoff * self.network.n_conv,
            elements=range(1, self.network.atom_embedding.embedding.num_embeddings + 1),
            dtype=str(dtype).removeprefix("torch."),
            device=str(device),
            sizes=(("F", self.network.atom_fea_dim),),
        )
        self.eval()

    def energies(self, inputs):
        active, batch = self.card.active_outputs, inputs["batch"]
        graph = self._graph(inputs)
        found = self.network._compute(
            graph,
            compute_magmom="magmoms" in active,
            return_site_energies="node_energies" in self.card.outputs,
            return_atom_feas="embeddings" in active,
        )
        out = {name: torch.cat(found[key]) for key, name in _NODES.items() if key in found}
        energy, n_atoms, composition = (
            found["e"],
            found["atoms_per_graph"],
            self.network.composition_model,
        )
        if composition is not None:
            alone = composition.fc.weight[0][inputs["atomic_numbers"].long() - 1]
            together = torch.zeros_like(energy).index_add(0, batch, alone)
            energy = energy + (together / n_atoms if composition.is_intensive else together)
            out |= {"node_energies": out["node_energies"] + alone} if "node_energies" in out else {}
        return {"energy": energy * n_atoms if self.network.is_intensive else energy, **out}

    def _graph(self, inputs):
        """Atoms, bonds (undirected edges) and angles (pairs of short edges at an atom), as chgnet's
        layers take them."""
        from chgnet.model.model import BatchedGraph

        edges, vectors, network = inputs["edge_index"], edge_vectors(inputs), self.network
        length = torch.linalg.vector_norm(vectors, dim=-1)
        bond_of_edge, edge_of_bond = _bonds(edges, inputs["cell_offsets"])
        first, second = _angles(edges[0], length.detach() < self.bond_cutoff)
        self._check_angles(inputs["batch"], edges[0][first])
        direction, basis = vectors / length[:, None], network.bond_basis_expansion
        return BatchedGraph(
            atomic_numbers=inputs["atomic_numbers"].long(), atom_owners=inputs["batch"].long(),
            bond_bases_ag=basis.rbf_expansion_ag(length[edge_of_bond]), bond_bases_bg=basis.rbf_expansion_bg(length[edge_of_bond]),
            angle_bases=network.angle_basis_expansion(direction[first], direction[second]),
            batched_atom_graph=edges.T, directed2undirected=bond_of_edge,
            batched_bond_graph=torch.stack([edges[0][first], bond_of_edge[first], bond_of_edge[second]], 1),
            atom_positions=(), strains=(), volumes=(),
        )  # fmt: skip

    def _check_angles(self, batch, centres):
        """ValueError where bonds without angles would be given a bias that they don't have in a
        call of their own."""
        layers = [
            layer
            for layer in self.network.bond_conv_layers
            if layer is not None and layer.use_mlp_out
        ]
        if not len(centres) or all(layer.mlp_out.layers[-1].bias is None for layer in layers):
            return
        angles = torch.bincount(batch[centres], minlength=int(batch[-1]) + 1)
        if not angles.all():
            got, do = (
                f"none in system {int((angles == 0).nonzero()[0])}",
                "pass it alone, or take another version",
            )
            raise ValueError(
                message(
                    "angles in each system of one call of this CHGNet, which treats systems "
                    "without them differently",
                    got,
                    do,
                )
            )


_NODES = {"site_energies": "node_energies", "m": "magmoms", "atom_fea": "embeddings"}


def _load(model):
    try:
        from chgnet.model.model import CHGNet as Network
    except ImportError as error:
        raise missing("chgnet", "CHGNet models") from error
    if isinstance(model, Network):
        return copy.deepcopy(model)
    if model not in VERSIONS and not os.path.exists(model):
        raise ValueError(
            message(
                f"one of the versions {', '.join(VERSIONS)} or the path of a checkpoint",
                repr(model),
                "pass one of them",
            )
        )
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its number of parameters
        return (
            Network.load(model_name=model, use_device="cpu", verbose=False)
            if model in VERSIONS
            else Network.from_file(model)
        )


def _bonds(edges, offsets):
    """The bond (undirected edge) of each directed edge, and one directed edge of each bond."""
    (i, j), (a, b, c) = edges, offsets.T
    backward = (a < 0) | (a == 0) & ((b < 0) | (b == 0) & (c < 0))
    flipped = (i > j) | (i == j) & backward
    ends = torch.where(flipped, edges.flip(0), edges)
    keys = torch.cat([ends.T, torch.where(flipped[:, None], -offsets, offsets)], 1)
    _, bond, count = torch.unique(keys, dim=0, return_inverse=True, return_counts=True)
    once = torch.bincount(bond[~flipped], minlength=len(count))
    if (bad := (once != 1) | (count != 2)).any():
        edge = int(bad[bond].nonzero()[0])
        ways = sorted([int(once[bond[edge]]), int((count - once)[bond[edge]])])
        got = f"{ways[0]} and {ways[1]} of the one between atoms {edges[0, edge]} and {edges[1, edge]} with offset {offsets[edge].tolist()}"
        raise ValueError(
            message(
                "each edge once in both directions",
                got,
                "look at how the edges were made, or pass none",
            )
        )
    edge_of_bond = bond.new_empty(len(count))
    edge_of_bond[bond[~flipped]] = (~flipped).nonzero()[:, 0]
    return bond, edge_of_bond


def _angles(centres, short):
    """All ordered pairs of two of the short edges that have one centre."""
    order = short.nonzero()[:, 0]
    order = order[torch.argsort(centres[order], stable=True)]
    _, place, count = torch.unique_consecutive(
        centres[order], return_inverse=True, return_counts=True
    )
    start, n = count.cumsum(0) - count, count[place]
    first = torch.repeat_interleave(torch.arange(len(order), device=order.device), n)
    within = torch.arange(len(first), device=order.device) - torch.repeat_interleave(
        n.cumsum(0) - n, n
    )
    second = start[place][first] + within
    return order[first[first != second]], order[second[first != second]]
