"""SevenNet (Park et al., J. Chem. Theory Comput. 20, 4857 (2024)) as a structure model of the contract."""

from __future__ import annotations

import torch
from torch import nn

from bridge.contract import check_inputs, dtype_name
from bridge.errors import message, missing
from torch_side.neighbors import neighbor_list
from torch_side.strain import with_gradients


class SevenNet(nn.Module):
    """A pretrained or own SevenNet: positions and cells in, energy and its exact gradients out.

    `model` is a name that the package sevenn knows ("7net-0", "7net-l3i5" and "7net-mf-0" lie in its wheel, others it
    downloads) or the path of a checkpoint; `modal` names the fidelity of a multi-modal one. Weights are converted to
    `dtype` (float32 as trained, float64 for Hessians and finite differences) and frozen; `requires_grad_(True)` makes
    them trainable, and gradients then keep their graph. It is in eval mode, on `device`; `.cutoff` is in Angstrom.

    Calling it with a dict of tensors, with N atoms in B systems,

        pos (N,3) float, atomic_numbers (N,) int, cell (B,3,3) float by rows, pbc (B,3) bool, batch (N,) int sorted

    (other keys are not looked at) finds the neighbours on the CPU and returns, in eV and Angstrom,

        energy (B,), position_gradients g = dE/dr at fixed cell (N,3), cell_gradients G = dE/dh at fixed Cartesian
        positions (B,3,3), node_energies (N,)

    from one forward and one backward pass. Forces are -g; torch_side.strain makes the virial and the stress. If pos or
    cell requires grad, all outputs can be differentiated again (Hessian by double backward); else they are detached.
    Atoms without neighbours have their isolated-atom energy and no gradient. Inputs are only read, nothing is cast.

    Raises: ValueError for inputs outside the contract, a float dtype or device other than the model's, an element the
    model does not know, a position that is not finite (naming the atom), a modal that is missing or unknown, or a model
    name unknown to sevenn; ImportError without sevenn or vesin.

    >>> model = SevenNet("7net-0")                                                          # doctest: +SKIP
    >>> model({"pos": torch.zeros(1, 3), "atomic_numbers": torch.tensor([18]), "cell": torch.zeros(1, 3, 3),
    ...        "pbc": torch.zeros(1, 3, dtype=torch.bool), "batch": torch.tensor([0])})     # doctest: +SKIP
    """

    def __init__(self, model="7net-0", *, dtype=torch.float32, device="cpu", modal=None):
        super().__init__()
        network, elements, modals = _load(model)
        self.cutoff = float(network.cutoff)
        self.network = network.to(device=device, dtype=dtype).requires_grad_(False).eval()
        species = torch.full((max(elements) + 2,), -1)  # the last one stands for all heavier elements
        species[list(elements)] = torch.tensor(list(elements.values()))
        self.register_buffer("species", species.to(device), persistent=False)
        self.n_species, self.modal, self.n_modals = len(elements), _modal(modal, modals), len(modals)
        self.eval()

    def forward(self, inputs: dict) -> dict:
        check_inputs(inputs)
        self._check_home(inputs["pos"])
        species = self._species(inputs["atomic_numbers"])
        edges, offsets = neighbor_list(*(inputs[k] for k in ("pos", "cell", "pbc")), self.cutoff, inputs["batch"])
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        evaluate = with_gradients(lambda x: self._energies(x, species, edges, offsets))
        return evaluate(inputs, create_graph=trained or None)

    def _energies(self, inputs, species, edges, offsets):
        """energy (B,) and node_energies (N,), differentiable in pos and cell through the edge vectors."""
        pos, cell, batch = inputs["pos"], inputs["cell"], inputs["batch"]
        i, j = edges
        shift = torch.einsum("ea,eab->eb", offsets.to(cell.dtype), cell[batch[i]])
        nodes = self.network(self._graph(species, edges, pos[j] - pos[i] + shift))["atomic_energy"].squeeze(-1)
        return {"energy": cell.new_zeros(len(cell)).index_add(0, batch, nodes), "node_energies": nodes}

    def _graph(self, species, edges, vectors):
        """The dict that sevenn's layers pass on; one-hot encodings are ours, for sevenn's are always float32."""
        one_hot = nn.functional.one_hot(species, self.n_species).to(vectors.dtype)
        graph = {"x": one_hot, "node_attr": one_hot, "atom_type": species, "edge_index": edges, "edge_vec": vectors}
        if self.modal is not None:
            modal = torch.tensor(self.modal, device=vectors.device)
            graph |= {"modal_type": modal, "modal_attr": nn.functional.one_hot(modal, self.n_modals).to(vectors.dtype)}
        return graph

    def _check_home(self, pos):
        """ValueError where the dtype or the device is not the model's."""
        home = next(self.network.parameters())
        if pos.dtype != home.dtype:
            do = f"cast pos and cell, or load SevenNet(dtype=torch.{dtype_name(pos)})"
            raise ValueError(message(f"pos as {dtype_name(home)}, the model's dtype", dtype_name(pos), do))
        if pos.device != home.device:
            do = f"move the inputs, or load SevenNet(device={str(pos.device)!r})"
            raise ValueError(message(f"pos on {home.device}, the model's device", str(pos.device), do))

    def _species(self, numbers):
        """Index of each atom's element among those that the model knows."""
        species = self.species[numbers.long().clamp(0, len(self.species) - 1)]
        if (species < 0).any():
            atom = int((species < 0).nonzero()[0])
            known = f"one of the {self.n_species} elements of this model"
            raise ValueError(message(known, f"{_symbol(int(numbers[atom]))} for atom {atom}", "take another model"))
        return species


def _symbol(number):
    """Pu (Z = 94); ase is there, since sevenn needs it."""
    from ase.data import chemical_symbols

    name = chemical_symbols[number] if 0 < number < len(chemical_symbols) else "no element"
    return f"{name} (Z = {number})"


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
        expected = f"modal to be one of {', '.join(known)}" if known else "no modal for a model without modals"
        raise ValueError(message(expected, repr(modal), "pass modal=... accordingly"))
    return known.get(modal)
