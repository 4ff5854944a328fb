"""SevenNet (Park et al., J. Chem. Theory Comput. 20, 4857 (2024)) as a structure model of the
contract."""

from __future__ import annotations

import torch
from torch import nn

from bridge.card import Card
from bridge.contract import ENERGY_AND_GRADIENTS
from bridge.errors import message, missing
from torch_side.potentials.geometry import edge_vectors
from torch_side.potentials.model import Model


class SevenNet(Model):
    """A pretrained or own SevenNet: positions and cells in, energy and its exact gradients out.

    `model` is a name that the package sevenn knows ("7net-0", "7net-l3i5" and "7net-mf-0" lie in
    its wheel, others it downloads) or the path of a checkpoint; `modal` names the fidelity of a
    multi-modal one. Weights are converted to `dtype` (float32 as trained, float64 for Hessians and
    finite differences) and frozen; `requires_grad_(True)` makes them trainable, and gradients then
    keep their graph. It is in eval mode, on `device`; `.cutoff` is in Angstrom.

    Calling it with a dict of tensors, with N atoms in B systems,

        pos (N,3) float, atomic_numbers (N,) int, cell (B,3,3) float by rows, pbc (B,3) bool, batch
        (N,) int sorted

    finds the neighbours on the CPU, unless edge_index and cell_offsets are among them, and returns,
    in eV and Angstrom,

        energy (B,), position_gradients g = dE/dr at fixed cell (N,3), cell_gradients G = dE/dh at
        fixed Cartesian positions (B,3,3), node_energies (N,)

    from one forward and one backward pass; `asking("hessian")` gives that as well. Forces are -g;
    torch_side.potentials.strain makes the virial and the stress. If pos or cell requires grad, all
    outputs can be differentiated again (Hessian by double backward); else they are detached. Atoms
    without neighbours have their isolated-atom energy and no gradient. Inputs are only read,
    nothing is cast. The cutoff function of SevenNet-0 (XPLOR, from 4.5 to 5 Angstrom) has a jump in
    its second derivative at 4.5 Angstrom: with a shell of neighbours there (silicon at a = 5.43)
    Hessians and finite differences of forces differ by half a per cent.

    Raises: ValueError for inputs outside the contract, a float dtype or device other than the
    model's, an element the model does not know, a position that is not finite (naming the atom), a
    modal that is missing or unknown, or a model name unknown to sevenn; ImportError without sevenn
    or vesin.

    >>> model = SevenNet("7net-0")                                                          # doctest: +SKIP
    >>> model({"pos": torch.zeros(1, 3), "atomic_numbers": torch.tensor([18]), "cell": torch.zeros(1, 3, 3),
    ...        "pbc": torch.zeros(1, 3, dtype=torch.bool), "batch": torch.tensor([0])})     # doctest: +SKIP
    """

    def __init__(self, model="7net-0", *, dtype=torch.float32, device="cpu", modal=None):
        super().__init__()
        network, elements, modals = _load(model)
        self.network = network.to(device=device, dtype=dtype).requires_grad_(False).eval()
        species = torch.full((max(elements) + 1,), -1)
        species[list(elements)] = torch.tensor(list(elements.values()))
        self.register_buffer("species", species.to(device), persistent=False)
        self.n_species, self.modal, self.n_modals = (
            len(elements),
            _modal(modal, modals),
            len(modals),
        )
        self.card = Card(
            batches=True,
            outputs={*ENERGY_AND_GRADIENTS, "node_energies", "hessian"},
            cutoff=float(network.cutoff),
            neighbor_list="own",
            elements=elements,
            receptive_field=float(network.cutoff)
            * sum("convolution" in name for name, _ in network.named_children()),
            dtype=str(dtype).removeprefix("torch."),
            device=str(device),
        )
        self.eval()

    @property
    def cutoff(self) -> float:
        return self.card.cutoff

    def energies(self, inputs):
        species, batch = self.species[inputs["atomic_numbers"].long()], inputs["batch"]
        nodes = self.network(self._graph(species, inputs["edge_index"], edge_vectors(inputs)))[
            "atomic_energy"
        ].squeeze(-1)
        return {
            "energy": nodes.new_zeros(len(inputs["cell"])).index_add(0, batch, nodes),
            "node_energies": nodes,
        }

    def _graph(self, species, edges, vectors):
        """The dict that sevenn's layers pass on; one-hot encodings are ours, for sevenn's are
        always float32."""
        one_hot = nn.functional.one_hot(species, self.n_species).to(vectors.dtype)
        graph = {
            "x": one_hot,
            "node_attr": one_hot,
            "atom_type": species,
            "edge_index": edges.long(),
            "edge_vec": vectors,
        }
        if self.modal is not None:
            modal = torch.tensor(self.modal, device=vectors.device)
            graph |= {
                "modal_type": modal,
                "modal_attr": nn.functional.one_hot(modal, self.n_modals).to(vectors.dtype),
            }
        return graph


def _load(model):
    """The layers up to the atomic energies, {Z: index}, {modal: index}."""
    try:
        from sevenn.util import load_checkpoint
    except ImportError as error:
        raise missing("sevenn", "SevenNet models") from error
    network = load_checkpoint(model).build_model()
    for layer in ("onehot_idx_to_onehot", "one_hot_modality", "reduce_total_enegy", "force_output"):
        network.delete_module_by_key(layer)
    network.eval_type_map, network.eval_modal_map, network.key_grad = False, False, None
    network.set_is_batch_data(False)  # one modal for all atoms; sums over systems are ours
    return network, dict(network.type_map), dict(network.modal_map or {})


def _modal(modal, known):
    """Index of the modal, None for a model without modals."""
    if modal not in (known or (None,)):
        expected = (
            f"modal to be one of {', '.join(known)}"
            if known
            else "no modal for a model without modals"
        )
        raise ValueError(message(expected, repr(modal), "pass modal=... accordingly"))
    return known.get(modal)
