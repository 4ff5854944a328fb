"""ANI models of torchani (Gao et al., J. Chem. Inf. Model. 60, 3408 (2020)) as structure models of
the contract."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import nn

from bridge.card import Card
from bridge.contract import ENERGY_AND_GRADIENTS
from bridge.errors import message, missing
from torch_side.calls import status
from torch_side.potentials import pairing, virials
from torch_side.potentials.geometry import edge_vectors
from torch_side.potentials.model import Model
from torch_side.potentials.neighbors import bonds


class Graph(NamedTuple):
    """What torchani's layers need to know of a graph apart from its geometry.

    elements   torchani's table of molecules and their atoms, with numbers of elements, -1 for none
    place      the place of each atom in that table (N,)
    pairs      the places of each pair of neighbours, each pair once (2,P)
    once       the directed edge of each pair (P,)
    angles     the two edges of each angle (2,A), as places in the flattened `pairs`, 2 P for none;
               None where torchani finds them

    Where virials of atoms are asked for, each edge is a pair, of an atom and a copy of the other
    one. The copies follow in `elements`, and their energies count nowhere: that of an atom depends
    on the edges that start there, and on no others."""

    elements: Int[torch.Tensor, "rows atoms"]
    place: Int[torch.Tensor, " N"]
    pairs: Int[torch.Tensor, "2 P"]
    once: Int[torch.Tensor, " P"]
    angles: Int[torch.Tensor, "2 A"] | None


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
    ensemble of M networks (not of an ANIq), node_virials (N,3,3) and the hessian. Forces are -g,
    and torch_side.potentials.strain makes the virial and the stress. Virials of atoms are exact in
    that an atom's energy depends on the edges that start there, and cost twice the networks.

    Self energies are part of the energy. For a few heavy atoms they are some 1e5 eV, of which
    float32 keeps seven digits, so take float64 for energy differences. Neighbours are found as for
    every model of the contract and not by torchani's own lists, so that small and triclinic cells,
    slabs and unequal systems are fine. The AEVs are those that torchani computes in Python, since
    its CUDA ones have no second derivatives.

    In a program that is compiled as a whole, there is room for `angles_per_atom` angles of each
    atom, on average: n (n - 1) / 2 of an atom with n neighbours within the angular cutoff (3.5
    Angstrom as a rule). More are an error that says how many there are.

    Raises: ValueError for inputs outside the contract as torch_side.potentials.graph.evaluate does,
    for an element that the model does not know, for a charge that is not zero (torchani has neutral
    systems only), for given edges that lack one direction, for a potential without a cutoff and for
    an unknown name; TypeError for a model of another kind; NotImplementedError, in a program that
    is compiled as a whole, for a potential or networks of your own; ImportError without torchani or
    vesin.

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
        angles_per_atom: int = 200,
    ) -> None:
        super().__init__()
        self.angles_per_atom = angles_per_atom
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
        outputs = {*ENERGY_AND_GRADIENTS, "node_energies", "node_virials", "hessian"}
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

    def prepare(self, inputs: dict[str, torch.Tensor]) -> Graph:
        """Returns what is whole numbers of inputs without padding: elements, pairs, angles.

        While a status is collected (see torch_side.calls.status), no value is read, and angles are
        found here, up to angles_per_atom. Otherwise torchani finds them.

        Raises: ValueError for a charge that is not zero."""
        _check_neutral(inputs.get("charge"))
        if collected := status.current():
            with torch.no_grad():
                return self._prepare(inputs, collected)
        batch = inputs["batch"].long()
        shape, place = self._rows(batch, len(inputs["cell"]))
        elements = inputs["pos"].new_full(shape, -1, dtype=torch.long)
        numbers = inputs["atomic_numbers"].long()
        elements.view(-1)[place] = self.network.species_converter(numbers[None])[0]
        edges = inputs["edge_index"]
        # refuses edges that lack one direction, whichever of them are taken
        _, once = bonds(edges, inputs["cell_offsets"].long())
        directed = virials.are_asked(inputs)
        if directed:
            once = torch.arange(edges.shape[1], device=edges.device)
        pairs = place[edges.long().index_select(1, once)]
        graph = Graph(elements, place, pairs, once, None)
        return _with_copies(graph, 0) if directed else graph

    def _prepare(self, inputs: dict[str, torch.Tensor], collected: status.Status) -> Graph:
        """The same of fixed sizes: all atoms are one molecule, whose last two are ghosts."""
        numbers = inputs["atomic_numbers"].long()
        elements = self.network.species_converter.conv_tensor[numbers][None]
        edges, offsets = inputs["edge_index"].long(), inputs["cell_offsets"]
        # notes edges that lack one direction, whichever of them are taken
        _, once = pairing.bonds(edges, offsets, len(numbers), collected)
        directed = virials.are_asked(inputs)
        if directed:
            once = torch.arange(edges.shape[1], device=edges.device)
        pairs = edges.index_select(1, once)
        lengths = torch.linalg.vector_norm(edge_vectors(inputs).index_select(0, once), dim=-1)
        short = lengths <= self.network.aev_computer.angular.cutoff
        # both directions, one after the other; a copy needs no angles
        centres, short = (pairs[0], short) if directed else (pairs.flatten(), short.repeat(2))
        angles = pairing.angles(centres, short, len(numbers), self.angles_per_atom, collected)
        place = torch.arange(len(numbers), device=numbers.device)
        if not directed:
            return Graph(elements, place, pairs, once, angles)
        angles = torch.where(angles < len(once), angles, 2 * len(once))
        return _with_copies(Graph(elements, place, pairs, once, angles), 1)

    def energies(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the energies (B,) and (N,), and charges and member energies where these are
        active, of inputs without padding.

        Raises: ValueError for a charge that is not zero; NotImplementedError, while a status is
        collected, for a part of the model that can't be evaluated without a look at values."""
        from torchani.neighbors import Neighbors
        from torchani.units import HARTREE_TO_EV

        graph = self.prepare(inputs)
        batch = inputs["batch"].long()
        n_systems = len(inputs["cell"])
        each = "member_energies" in self.card.active_outputs
        vectors = edge_vectors(inputs).index_select(0, graph.once)
        lengths = torch.linalg.vector_norm(vectors, dim=-1)
        neighbors = Neighbors(graph.pairs, lengths, -vectors)
        if graph.angles is not None:
            table, charges = _evaluated(self.network, graph, neighbors, batch, n_systems, each)
            table = table[..., : len(batch)]
            charges = None if charges is None else charges[: len(batch)]
        else:
            # The neighbours hold all of the geometry; zeros stand in for the positions.
            pos = vectors.new_zeros(*graph.elements.shape, 3)
            found = self.network.compute_from_neighbors(
                graph.elements, pos, neighbors, atomic=True, ensemble_values=each
            )
            table = found.energies.flatten(-2)[..., graph.place]
            charges = found.scalars.flatten()[graph.place] if self.has_charges else None
        nodes = HARTREE_TO_EV * table
        energy = nodes.new_zeros(*nodes.shape[:-1], n_systems).index_add(-1, batch, nodes)
        out = {} if charges is None else {"charges": charges}
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
        from torchani.potentials.core import BasePairPotential
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
    for potential in network.potentials.values():
        if isinstance(potential, BasePairPotential):
            potential.symm = _symmetric
    local = (NNPotential, PairPotential, RepulsionXTB)
    is_local = all(isinstance(p, local) for p in network.potentials.values())
    return network, isinstance(model, ANIq), is_local


def _with_copies(graph: Graph, axis: int) -> Graph:
    """The same with a copy of each atom, which is the second one of its pairs: further rows of
    `elements` (axis 0), since charges are normalised row by row, or a longer one (axis 1)."""
    elements, (first, second) = graph.elements, graph.pairs
    pairs = torch.stack([first, second + elements.numel()])
    return graph._replace(elements=torch.cat([elements, elements], axis), pairs=pairs)


def _symmetric(x: torch.Tensor) -> torch.Tensor:
    """What BasePairPotential.symm does, which also looks at the values of its parameters."""
    return x + x.triu(1).T


def _evaluated(
    network: Any,
    graph: Graph,
    neighbors: Any,
    batch: Int[torch.Tensor, " N"],
    n_systems: int,
    each: bool,
) -> tuple[Float[torch.Tensor, "*M N"], Float[torch.Tensor, " N"] | None]:
    """The energies of atoms, with `each` those of all members, and the charges (None if there are
    none): what network.compute_from_neighbors gives, from operations of fixed sizes.

    Where torchani takes a part of the pairs or atoms, the others become ghosts here."""
    from torchani.arch import ANIq
    from torchani.potentials.core import BasePairPotential

    elements = graph.elements
    zeros = neighbors.distances.new_zeros(elements.shape)
    energies, charges = zeros, zeros[0] if isinstance(network, ANIq) else None
    potential: Any
    for name, potential in network.potentials.items():
        if not potential._enabled:
            continue
        inner = neighbors
        if potential.cutoff < network.cutoff:
            inner = _within(neighbors, potential.cutoff, elements.shape[1])
        if _has_networks(potential):
            aevs = _aevs(potential.aev_computer, graph, inner)
            outputs = _of_networks(potential.neural_networks, elements, aevs)
            nodes = outputs[..., 0] if each else outputs[..., 0].mean(0)
            if name == "nnp" and charges is not None:
                if hasattr(potential, "charge_networks"):
                    outputs = _of_networks(potential.charge_networks, elements, aevs)
                raw = outputs[..., -1].mean(0)
                if copies := elements.shape[1] - len(batch):
                    batch = nn.functional.pad(batch, (0, copies), value=n_systems - 1)
                charges = _neutral(potential.charge_normalizer, elements, raw, batch, n_systems)
        elif isinstance(potential, BasePairPotential):
            nodes = potential.compute_from_neighbors(elements, zeros, inner, 0, True).energies
        else:
            raise _refused(f"a {type(potential).__name__}")
        energies = energies + nodes
    if network.energy_shifter._enabled:
        energies = energies + network.energy_shifter(elements, atomic=True)
    return energies.squeeze(-2), charges


def _has_networks(potential: Any) -> bool:
    """Whether a potential is one of torchani's own with AEVs and networks, and not a variant that
    computes something else."""
    from torchani.aev import AEVComputer
    from torchani.potentials import (
        MergedChargesNNPotential,
        NNPotential,
        SeparateChargesNNPotential,
    )

    own = (NNPotential, MergedChargesNNPotential, SeparateChargesNNPotential)
    if type(potential) not in own:
        return False
    computer = type(potential.aev_computer)
    name = "_pyaev_compute_from_neighbors"
    if getattr(computer, name) is not getattr(AEVComputer, name):
        raise _refused(f"a {computer.__name__}")
    return True


def _within(neighbors: Any, cutoff: float, n_atoms: int) -> Any:
    """Pairs not beyond a cutoff. The others lead from one ghost to the other instead."""
    from torchani.neighbors import Neighbors

    indices, distances, vectors = neighbors
    inside = distances <= cutoff
    ghosts = torch.arange(n_atoms - 2, n_atoms, device=indices.device)[:, None]
    aside = _aside(cutoff / 2, distances)[:1]
    return Neighbors(
        torch.where(inside, indices, ghosts),
        torch.where(inside, distances, cutoff / 2),
        torch.where(inside[:, None], vectors, aside),
    )


def _aside(length: float, like: torch.Tensor) -> Float[torch.Tensor, "2 3"]:
    """Two vectors at a right angle, which no function has a singularity at."""
    return length * torch.eye(3, dtype=like.dtype, device=like.device)[:2]


def _aevs(computer: Any, graph: Graph, neighbors: Any) -> Float[torch.Tensor, "1 N F"]:
    """The AEVs of all atoms: what computer.compute_from_neighbors gives.

    Unused angles are those of a ghost between two pairs of ghosts that are added."""
    elements, (indices, distances, vectors) = graph.elements, neighbors
    radial = computer._collect_radial(elements, indices, computer.radial(distances))
    n_pairs, ghost = len(distances), elements.shape[1] - 1
    length = computer.angular.cutoff / 2
    indices = nn.functional.pad(indices, (0, 2), value=ghost)
    distances = nn.functional.pad(distances, (0, 2), value=length)
    vectors = torch.cat([vectors, _aside(length, vectors)])
    angles: Any = graph.angles
    used = angles < 2 * n_pairs
    added = torch.arange(n_pairs, n_pairs + 2, device=used.device)[:, None]
    sides = torch.where(used, angles % max(n_pairs, 1), added)
    signs = torch.where(angles < n_pairs, 1, -1)
    centres = torch.where(signs[0] == 1, indices[0, sides[0]], indices[1, sides[0]])
    apart = distances.index_select(0, sides.flatten()).view(2, -1)
    along = vectors.index_select(0, sides.flatten()).view(2, -1, 3) * signs[..., None]
    terms = computer.angular(apart, along)
    angular = computer._collect_angular(elements, indices, centres, sides, signs, terms)
    return torch.cat([radial, angular], dim=-1)


def _of_networks(
    networks: Any, elements: Int[torch.Tensor, "1 N"], aevs: Float[torch.Tensor, "1 N F"]
) -> Float[torch.Tensor, "M 1 N outputs"]:
    """What each active member gives for each atom: the networks of all elements are evaluated at
    all atoms, and each atom takes its own.

    Raises: NotImplementedError for networks that torchani combines in another way."""
    from torchani.nn import ANINetworks, ANISharedNetworks, BmmEnsemble, Ensemble, SingleNN
    from torchani.nn._internal import _ANINetworksDiscardFirstScalar, _ZeroANINetworks

    forward = type(networks).forward
    if forward is Ensemble.forward:
        active = [m for j, m in enumerate(networks.members) if j in networks.active_members_idxs]
        return torch.cat([_of_networks(member, elements, aevs) for member in active])
    if forward is _ZeroANINetworks.forward:
        return networks(elements, aevs, atomic=True)[None, ..., None]
    if forward is SingleNN.forward:
        if networks.do_embedding:
            aevs = torch.cat([aevs, networks.embed(elements)], -1)
        return networks.network(aevs).gather(-1, elements[..., None])[None]
    if forward is ANISharedNetworks.forward:
        aevs = networks.shared.activation(networks.shared(aevs))
    elif forward not in (
        ANINetworks.forward,
        BmmEnsemble.forward,
        _ANINetworksDiscardFirstScalar.forward,
    ):
        raise _refused(f"a {type(networks).__name__}")
    found: Any = None
    for number, network in enumerate(networks.atomics.values()):
        own = network(aevs[0])
        found = own if found is None else torch.where(elements[0, :, None] == number, own, found)
    if forward is _ANINetworksDiscardFirstScalar.forward:
        found = found[:, 1:]
    return found[None, None]


def _neutral(
    normalizer: Any,
    elements: Int[torch.Tensor, "1 N"],
    raw: Float[torch.Tensor, "1 N"],
    batch: Int[torch.Tensor, " N"],
    n_systems: int,
) -> Float[torch.Tensor, " N"]:
    """Charges, normalised system by system: in a table with a row of N places for each system."""
    own = batch == torch.arange(n_systems, device=batch.device)[:, None]
    # sums over an empty row would be divided by: it has the last atom, a ghost
    own[:, -1] |= ~own.any(1)
    table = normalizer(torch.where(own, elements, -1), torch.where(own, raw, 0), 0)
    return table.gather(0, batch[None])[0]


def _refused(got: str) -> NotImplementedError:
    """The error for a part of a model that has to look at values."""
    expected = "a TorchANI model that reads no value, in a program that is compiled as a whole"
    return NotImplementedError(message(expected, got, 'take lane="ffi"'))


def _check_neutral(charge: torch.Tensor | None) -> None:
    """ValueError naming a system whose charge is not zero, or a note of it."""
    if charge is None:
        return
    expected = "neutral systems, which is all that torchani has"
    do = "pass none, or take another model"
    if collected := status.current():
        text = message(expected, "charge {} in system {}", do)
        systems = torch.arange(len(charge), device=charge.device)
        collected.note(charge != 0, text, charge, systems)
    elif charge.any():
        system = int(charge.nonzero()[0])
        got = f"charge {charge[system].item()} in system {system}"
        raise ValueError(message(expected, got, do))
