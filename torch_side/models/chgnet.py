"""CHGNet (Deng et al., Nat. Mach. Intell. 5, 1031 (2023)) as a structure model of the contract."""

from __future__ import annotations

import contextlib
import copy
import io
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import nn
from torch.overrides import TorchFunctionMode

from bridge.card import Card
from bridge.contract import ENERGY_AND_GRADIENTS
from bridge.errors import message, missing
from torch_side.calls import status
from torch_side.potentials import checkpoints, padding, pairing, virials
from torch_side.potentials.geometry import edge_vectors
from torch_side.potentials.model import Model
from torch_side.potentials.neighbors import bonds

VERSIONS = ("0.3.0", "r2scan", "0.2.0")  # their weights lie in the wheel of chgnet


class Graph(NamedTuple):
    """What chgnet's layers need to know of a graph apart from its geometry.

    edges          directed edges (2,E)
    bond_of_edge   the bond (undirected edge) of each directed edge (E,)
    edge_of_bond   one directed edge of each bond
    angles         centre and two bonds of each angle (A,3)
    sides          the two directed edges of each angle (2,A)"""

    edges: Int[torch.Tensor, "2 E"]
    bond_of_edge: Int[torch.Tensor, " E"]
    edge_of_bond: Int[torch.Tensor, " bonds"]
    angles: Int[torch.Tensor, "A 3"]
    sides: Int[torch.Tensor, "2 A"]


class CHGNet(Model):
    """A pretrained CHGNet, or one of your own: from positions and cells to the energy, its exact
    gradients and magnetic moments.

    `model` is a version whose weights lie in the wheel of chgnet ("0.3.0", "r2scan", "0.2.0"), the
    path of a checkpoint, or a chgnet.model.model.CHGNet, which is copied. Of a checkpoint, tensors
    and plain values are read; `trust=True` runs whatever else is pickled in it. Weights are
    converted to `dtype` (float32 as trained, float64 for Hessians and finite differences) and
    frozen. `requires_grad_(True)` makes them trainable, and gradients then keep their graph. The
    model is in eval mode, on `device`. It takes the dict of the contract, with N atoms in B systems,

        pos (N,3) float, atomic_numbers (N,) int, cell (B,3,3) float by rows, pbc (B,3) bool, batch
        (N,) int sorted

    and optionally edge_index (2,E) and cell_offsets (E,3), with both directions of each edge up to
    card.cutoff (6 Angstrom as trained). It returns, in eV, Angstrom and Bohr magnetons, from one
    forward and one backward pass for all systems together,

        energy (B,), extensive (chgnet's own is per atom); position_gradients g = dE/dr at fixed
        cell (N,3); cell_gradients G = dE/dh at fixed Cartesian positions (B,3,3); node_energies
        (N,), if the model is a sum over atoms, as trained

    and, where `model.asking(...)` names them, magmoms (N,) (absolute values), embeddings (N,F) (the
    features that magmoms are made from), node_virials (N,3,3) and the hessian. Forces are -g, and
    torch_side.potentials.strain makes the virial and the stress. In virials of atoms, each end of a
    bond gets half of the derivative in its length (with one layer alone, that of its own energy).
    The graph of bonds and angles is made from the edges and not by pymatgen, so open systems need
    no cell. An atom without neighbours has the energy that chgnet's calculator gives it, with
    chgnet's warning that this "will likely go wrong", and its gradient is zero.

    In a program that is compiled as a whole, there is room for `angles_per_atom` angles of each
    atom, on average: n (n - 1) / 2 of an atom with n neighbours below 3 Angstrom. More are an error
    that says how many there are. A smaller number makes the program faster.

    Raises: ValueError for inputs outside the contract as torch_side.potentials.graph.evaluate does,
    for an element beyond Pu, for given edges that lack one direction, for an unknown version, for a
    checkpoint that can't be read or that holds more than plain values without trust=True, and, with
    the weights of 0.2.0 only, for a system without angles (no atom with two bonds below 3 Angstrom)
    in one call with others, or in a program that is compiled as a whole; NotImplementedError in
    such a program for a readout by attention; ImportError without chgnet or vesin.

    >>> model = CHGNet("0.3.0").asking("magmoms")                                           # doctest: +SKIP
    >>> model({"pos": torch.zeros(1, 3), "atomic_numbers": torch.tensor([26]), "cell": 2.5 * torch.eye(3)[None],
    ...        "pbc": torch.ones(1, 3, dtype=torch.bool), "batch": torch.tensor([0])})      # doctest: +SKIP
    """

    network: Any  # a chgnet.model.model.CHGNet

    def __init__(
        self,
        model: str | os.PathLike[str] | Any = "0.3.0",
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        angles_per_atom: int = 100,
        trust: bool = False,
    ) -> None:
        super().__init__()
        self.angles_per_atom = angles_per_atom
        self.network = (
            _load(model, trust).to(device=device, dtype=dtype).requires_grad_(False).eval()
        )
        converter = self.network.graph_converter
        cutoff = float(converter.atom_graph_cutoff)
        self.bond_cutoff = float(converter.bond_graph_cutoff)
        outputs = {*ENERGY_AND_GRADIENTS, "magmoms", "embeddings", "node_virials", "hessian"}
        if self.network.mlp_first:
            outputs.add("node_energies")
        self.card = Card(
            batches=True,
            outputs=outputs,
            cutoff=cutoff,
            neighbor_list="own",
            receptive_field=cutoff * self.network.n_conv,
            elements=range(1, self.network.atom_embedding.embedding.num_embeddings + 1),
            dtype=str(dtype).removeprefix("torch."),
            device=str(device),
            sizes=(("F", self.network.atom_fea_dim),),
        )
        self.eval()

    def prepare(self, inputs: dict[str, torch.Tensor]) -> Graph:
        """Returns what is whole numbers of inputs without padding: bonds and angles.

        While a status is collected (see torch_side.calls.status), no value is read, and there are
        as many angles as angles_per_atom has room for.

        Raises: ValueError where weights like those of 0.2.0 get some systems without angles."""
        edges, offsets = inputs["edge_index"], inputs["cell_offsets"].long()
        with torch.no_grad():
            short = torch.linalg.vector_norm(edge_vectors(inputs), dim=-1) < self.bond_cutoff
        if collected := status.current():
            return self._prepare(inputs, short, collected)
        bond_of_edge, edge_of_bond = bonds(edges, offsets)
        first, second = _angles(edges[0], short)
        centres = edges[0][first]
        if self._feels_angles() and len(centres):
            self._check_angles(inputs["batch"], centres)
        angles = torch.stack([centres, bond_of_edge[first], bond_of_edge[second]], 1)
        return Graph(edges, bond_of_edge, edge_of_bond, angles, torch.stack([first, second]))

    def _prepare(
        self, inputs: dict[str, torch.Tensor], short: torch.Tensor, collected: status.Status
    ) -> Graph:
        """The same of fixed sizes, with one more bond and two more edges, those of unused angles,
        whose centre is a ghost."""
        edges, offsets = inputs["edge_index"].long(), inputs["cell_offsets"]
        n_atoms = len(inputs["atomic_numbers"])
        bond_of_edge, edge_of_bond = pairing.bonds(edges, offsets, n_atoms, collected)
        sides = pairing.angles(edges[0], short, n_atoms, self.angles_per_atom, collected)
        # each angle from both of its sides
        sides = torch.cat([sides, sides.flip(0)], 1)
        used = sides[0] < len(short)
        added = torch.arange(2, device=used.device)[:, None]
        sides = torch.where(used, sides, len(short) + added)
        centre = nn.functional.pad(edges[0], (0, 2), value=n_atoms - 1)[sides[0]]
        of_sides = nn.functional.pad(bond_of_edge, (0, 2), value=len(edge_of_bond))[sides]
        if self._feels_angles() and len(used):
            self._note_angles(inputs, centre, used, collected)
        angles = torch.stack([centre, *of_sides], 1)
        return Graph(edges, bond_of_edge, edge_of_bond, angles, sides)

    def energies(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the energy (B,) and the active outputs that are no gradients, of inputs without
        padding.

        Raises: ValueError where weights like those of 0.2.0 get some systems without angles;
        NotImplementedError for a readout by attention while a status is collected."""
        active = self.card.active_outputs
        fixed = status.current() is not None
        inputs = inputs | {"batch": inputs["batch"].long()}
        with self._counted(inputs) if fixed else contextlib.nullcontext():
            known = self.prepare(inputs)
            if self.network.n_conv == 1 and virials.are_asked(inputs):
                known = _directed(known)
            graph = self._graph(inputs, known, fixed)
            found = self.network._compute(
                graph,
                compute_magmom="magmoms" in active,
                return_site_energies="node_energies" in self.card.outputs,
                return_atom_feas="embeddings" in active,
            )
        out = {name: torch.cat(found[key]) for key, name in _NODES.items() if key in found}
        energy = found["e"]
        n_atoms = found["atoms_per_graph"]
        composition = self.network.composition_model
        if composition is not None:
            alone = composition.fc.weight[0][inputs["atomic_numbers"].long() - 1]
            together = torch.zeros_like(energy).index_add(0, inputs["batch"], alone)
            energy = energy + (together / n_atoms if composition.is_intensive else together)
            if "node_energies" in out:
                out["node_energies"] = out["node_energies"] + alone
        return {"energy": energy * n_atoms if self.network.is_intensive else energy, **out}

    def _graph(self, inputs: dict[str, torch.Tensor], graph: Graph, fixed: bool) -> Any:
        """Atoms, bonds (undirected edges) and angles (pairs of short edges at an atom), as chgnet's
        layers take them."""
        from chgnet.model.model import BatchedGraph

        network, vectors = self.network, edge_vectors(inputs)
        length = torch.linalg.vector_norm(vectors, dim=-1)
        length_of_bond, direction = length[graph.edge_of_bond], vectors / length[:, None]
        if virials.are_asked(inputs) and len(length_of_bond) < len(length):
            # the mean of both directions, equal to the bit: each edge gets half of the derivative
            both = torch.zeros_like(length_of_bond).index_add(0, graph.bond_of_edge, length)
            length_of_bond = both / 2
        if fixed:
            length_of_bond = nn.functional.pad(length_of_bond, (0, 1), value=self.bond_cutoff / 2)
            # at a right angle, where no function has a singularity
            across = torch.eye(3, dtype=vectors.dtype, device=vectors.device)[:2]
            direction = torch.cat([direction, across])
        first, second = graph.sides
        basis = network.bond_basis_expansion
        return BatchedGraph(
            atomic_numbers=inputs["atomic_numbers"].long(),
            atom_owners=inputs["batch"],
            bond_bases_ag=basis.rbf_expansion_ag(length_of_bond),
            bond_bases_bg=basis.rbf_expansion_bg(length_of_bond),
            angle_bases=network.angle_basis_expansion(direction[first], direction[second]),
            batched_atom_graph=graph.edges.T,
            directed2undirected=graph.bond_of_edge,
            batched_bond_graph=graph.angles,
            atom_positions=(),
            strains=(),
            volumes=(),
        )

    def _counted(self, inputs: dict[str, torch.Tensor]) -> Counted:
        """What keeps chgnet from counting on the host.

        Raises: NotImplementedError for a readout by attention, which takes one system after the
        other."""
        from chgnet.model.layers import GraphAttentionReadOut

        if isinstance(self.network.pooling, GraphAttentionReadOut):
            expected = "a CHGNet that adds up over atoms, in a program that is compiled as a whole"
            got = "a readout by attention"
            raise NotImplementedError(message(expected, got, 'take lane="ffi"'))
        sizes = padding.counted(inputs["batch"], len(inputs["cell"]))
        # no energy is divided by zero
        return Counted(inputs["batch"], sizes.clamp(min=1))

    def _feels_angles(self) -> bool:
        """Whether a bond without angles changes where others have some: by a bias or a norm."""
        layers = [layer for layer in self.network.bond_conv_layers if layer is not None]
        last = [layer.mlp_out.layers[-1] for layer in layers if layer.use_mlp_out]
        normed = any(layer.bond_norm is not None for layer in layers)
        return normed or any(layer.bias is not None for layer in last)

    def _check_angles(self, batch: torch.Tensor, centres: torch.Tensor) -> None:
        """ValueError where bonds without angles would get a bias that they don't have in a call of
        their own."""
        angles = torch.bincount(batch[centres], minlength=int(batch[-1]) + 1)
        if not angles.all():
            got = f"none in system {int((angles == 0).nonzero()[0])}"
            raise ValueError(
                message(
                    "angles in each system of one call of this CHGNet, which treats systems "
                    "without them differently",
                    got,
                    "pass it alone, or take another version",
                )
            )

    def _note_angles(
        self,
        inputs: dict[str, torch.Tensor],
        centres: torch.Tensor,
        used: torch.Tensor,
        collected: status.Status,
    ) -> None:
        """A note of a system that has no angles, for there are always some here."""
        batch, n_systems = inputs["batch"].long(), len(inputs["cell"])
        angles = padding.counted(batch[centres], n_systems, used)
        # the last system is that of the ghosts
        bad = ((angles == 0) & (padding.counted(batch, n_systems) > 0))[:-1]
        expected = (
            "angles in each system of this CHGNet, which treats systems without them differently, "
            "in a program that is compiled as a whole"
        )
        text = message(expected, "none in system {}", 'take lane="ffi", or another version')
        collected.note(bad, text, torch.arange(n_systems - 1, device=batch.device))


# chgnet's name: the contract's
_NODES = {"site_energies": "node_energies", "m": "magmoms", "atom_fea": "embeddings"}


def _load(model: Any, trust: bool) -> Any:
    """A CHGNet of our own."""
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
        if model in VERSIONS:
            return Network.load(model_name=model, use_device="cpu", verbose=False)
        found = checkpoints.read(model, trust)
        with checkpoints.of("chgnet", model):
            return Network.from_dict(found["model"])


class Counted(TorchFunctionMode):
    """Within this context, chgnet neither reads values nor copies any to a GPU.

    `owners` (N,) are the systems of the atoms, and `sizes` (B,) says how many atoms each has.
    chgnet's `aggregate` counts the owners of its rows too, but where it is told how many there are
    it has no use for the counts, and completes what it gets here, which is empty. Outputs of atoms
    are split by system nowhere, and stay as one. A constant that chgnet makes on the CPU at each
    call is made on the device."""

    def __init__(self, owners: Int[torch.Tensor, " N"], sizes: Int[torch.Tensor, " B"]) -> None:
        super().__init__()
        self.owners, self.sizes = owners, sizes
        sizes.tolist = lambda: [len(owners)]  # fake tensors have a method of their own

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Returns what func(*args, **kwargs) does, from `sizes` where func counts."""
        if func is torch.bincount:
            (owners,) = args
            return self.sizes if owners is self.owners else owners.new_zeros(0)
        if func is torch.tensor and args == ([2],):
            return torch.full((1,), 2, device=self.owners.device)
        return func(*args, **(kwargs or {}))


def _directed(graph: Graph) -> Graph:
    """The same where each directed edge is a bond of its own, for one layer, which doesn't look at
    angles: the energy of an atom then depends on the edges that start there."""
    number = torch.arange(graph.edges.shape[1], device=graph.edges.device)
    return graph._replace(bond_of_edge=number, edge_of_bond=number)


def _angles(
    centres: Int[torch.Tensor, " E"], short: Bool[torch.Tensor, " E"]
) -> tuple[Int[torch.Tensor, " A"], Int[torch.Tensor, " A"]]:
    """All ordered pairs of two of the short edges that have one centre."""
    order = short.nonzero()[:, 0]
    order = order[torch.argsort(centres[order], stable=True)]
    _, place, count = torch.unique_consecutive(
        centres[order], return_inverse=True, return_counts=True
    )
    start = count.cumsum(0) - count  # of the edges of each centre
    n = count[place]  # how many edges the centre of each edge has
    first = torch.repeat_interleave(torch.arange(len(order), device=order.device), n)
    pairs_before = torch.repeat_interleave(n.cumsum(0) - n, n)
    within = torch.arange(len(first), device=order.device) - pairs_before
    second = start[place][first] + within
    return order[first[first != second]], order[second[first != second]]
