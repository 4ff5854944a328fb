"""SevenNet (Park et al., J. Chem. Theory Comput. 20, 4857 (2024)) as a structure model of the
contract."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int

from bridge.card import Card
from bridge.contract import ENERGY_AND_GRADIENTS
from bridge.errors import message, missing
from torch_side.potentials import checkpoints, padding
from torch_side.potentials.geometry import edge_vectors
from torch_side.potentials.model import Model


class SevenNet(Model):
    """A pretrained SevenNet, or one of your own: from positions and cells to the energy and its
    exact gradients.

    `model` is a name that the package sevenn knows ("7net-0", "7net-l3i5" and "7net-mf-0" lie in
    its wheel, and it downloads others) or the path of a checkpoint. Of a file, tensors and plain
    values are read; `trust=True` runs whatever else is pickled in it. `modal` names the fidelity of
    a multi-modal one. Weights are converted to `dtype` (float32 as trained, float64 for Hessians and
    finite differences) and frozen. `requires_grad_(True)` makes them trainable, and gradients then
    keep their graph. The model is in eval mode, on `device`. It takes a dict of tensors, with N
    atoms in B systems,

        pos (N,3) float, atomic_numbers (N,) int, cell (B,3,3) float by rows, pbc (B,3) bool, batch
        (N,) int sorted

    and optionally edge_index and cell_offsets; without these it finds the neighbours on the CPU. It
    returns, in eV and Angstrom, from one forward and one backward pass,

        energy (B,), position_gradients g = dE/dr at fixed cell (N,3), cell_gradients G = dE/dh at
        fixed Cartesian positions (B,3,3), node_energies (N,)

    and, after `asking("hessian")`, the Hessian. Forces are -g, and torch_side.potentials.strain
    makes the virial and the stress. If pos, cell or a parameter requires grad, all outputs can be
    differentiated again (Hessian by double backward); otherwise they are detached. Atoms without
    neighbours have the energy of an isolated atom, and their gradient is zero. Inputs are only
    read, and nothing is cast. The cutoff function of SevenNet-0 (XPLOR, from 4.5 to 5 Angstrom) has
    a jump in its second derivative at 4.5 Angstrom. With a shell of neighbours at that distance
    (silicon at a = 5.43) Hessians and finite differences of forces differ by half a per cent.

    Raises: ValueError for inputs outside the contract, for a float dtype or device other than the
    model's, for an element that the model does not know, for a position that is not finite (naming
    the atom), for a modal that is missing or unknown, for a model name unknown to sevenn, and for a
    checkpoint that can't be read or that holds more than plain values without trust=True;
    ImportError without sevenn or vesin.

    >>> model = SevenNet("7net-0")                                                          # doctest: +SKIP
    >>> model({"pos": torch.zeros(1, 3), "atomic_numbers": torch.tensor([18]), "cell": torch.zeros(1, 3, 3),
    ...        "pbc": torch.zeros(1, 3, dtype=torch.bool), "batch": torch.tensor([0])})     # doctest: +SKIP
    """

    network: Any  # sevenn's layers up to the atomic energies
    species: Int[torch.Tensor, " Z"]  # the model's own index of each atomic number, -1 if unknown

    def __init__(
        self,
        model: str | Path = "7net-0",
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        modal: str | None = None,
        trust: bool = False,
    ) -> None:
        super().__init__()
        network, elements, modals = _load(model, trust)
        self.network = network.to(device=device, dtype=dtype).requires_grad_(False).eval()
        species = torch.full((max(elements) + 1,), -1)
        species[list(elements)] = torch.tensor(list(elements.values()))
        self.register_buffer("species", species.to(device), persistent=False)
        self.n_species = len(elements)
        self.modal = _modal(modal, modals)
        self.n_modals = len(modals)
        cutoff = float(network.cutoff)
        n_convolutions = sum("convolution" in name for name, _ in network.named_children())
        self.card = Card(
            batches=True,
            outputs={*ENERGY_AND_GRADIENTS, "node_energies", "node_virials", "hessian"},
            cutoff=cutoff,
            neighbor_list="own",
            elements=elements,
            receptive_field=cutoff * n_convolutions,
            dtype=str(dtype).removeprefix("torch."),
            device=str(device),
        )
        self.eval()

    @property
    def cutoff(self) -> float | None:
        """The cutoff of its neighbour list in Angstrom."""
        return self.card.cutoff

    def energies(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns energy (B,) and node_energies (N,), of inputs without padding."""
        species = self.species[inputs["atomic_numbers"].long()]
        graph = self._graph(species, inputs["edge_index"], edge_vectors(inputs))
        nodes = self.network(graph)["atomic_energy"].squeeze(-1)
        energy = nodes.new_zeros(len(inputs["cell"])).index_add(0, inputs["batch"], nodes)
        return {"energy": energy, "node_energies": nodes}

    def _graph(
        self,
        species: Int[torch.Tensor, " N"],
        edges: Int[torch.Tensor, "2 E"],
        vectors: Float[torch.Tensor, "E 3"],
    ) -> dict[str, torch.Tensor]:
        """The dict that sevenn's layers pass on. The one-hot encodings are made here, since
        sevenn's are always float32."""
        one_hot = padding.one_hot(species, self.n_species, vectors.dtype)
        graph = {
            "x": one_hot,
            "node_attr": one_hot,
            "atom_type": species,
            "edge_index": edges.long(),
            "edge_vec": vectors,
        }
        if self.modal is not None:
            modal = torch.full((), self.modal, device=vectors.device)
            graph |= {
                "modal_type": modal,
                "modal_attr": padding.one_hot(modal, self.n_modals, vectors.dtype),
            }
        return graph


def _load(model: str | Path, trust: bool) -> tuple[Any, dict[int, int], dict[str, int]]:
    """The layers up to the atomic energies, {Z: index}, {modal: index}."""
    try:
        from sevenn.util import load_checkpoint
    except ImportError as error:
        raise missing("sevenn", "SevenNet models") from error
    if Path(model).is_file():  # as sevenn decides
        # sevenn would run what is pickled there, so it gets a file of our own
        found = checkpoints.read(model, trust)
        with checkpoints.of("sevenn", model), tempfile.TemporaryDirectory() as folder:
            torch.save(found, copy := Path(folder) / "checkpoint.pth")
            network: Any = load_checkpoint(copy).build_model()
    else:
        network = load_checkpoint(model).build_model()
    for layer in ("onehot_idx_to_onehot", "one_hot_modality", "reduce_total_enegy", "force_output"):
        network.delete_module_by_key(layer)
    network.eval_type_map = False
    network.eval_modal_map = False
    network.key_grad = None
    network.set_is_batch_data(False)  # one modal for all atoms; sums over systems are done here
    return network, dict(network.type_map), dict(network.modal_map or {})


def _modal(modal: str | None, known: Mapping[str, int]) -> int | None:
    """Index of the modal, None for a model without modals."""
    if modal not in (known or (None,)):
        expected = "no modal for a model without modals"
        if known:
            expected = f"modal to be one of {', '.join(known)}"
        raise ValueError(message(expected, repr(modal), "pass modal=... accordingly"))
    return None if modal is None else known.get(modal)
