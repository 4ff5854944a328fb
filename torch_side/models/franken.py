"""Franken (Novelli et al., npj Comput. Mater. 11, 293 (2025)): random features of a GNN's
descriptors, many weight vectors at once."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from bridge.card import Card
from bridge.contract import ENERGY_AND_GRADIENTS, dtype_name
from bridge.errors import message, missing, spec
from torch_side.potentials import geometry, graph
from torch_side.potentials.hessian import hessian
from torch_side.potentials.model import Model

SPREAD = ("energy_std", "position_gradients_std")
# need a gradient for each weight vector
MEMBERS = (
    "member_position_gradients",
    "position_gradients_std",
)
FAMILIES = ("mace", "sevenn")
ONE_HOT = "onehot_idx_to_onehot"  # sevenn's layer


class Franken(Model):
    """A FrankenPotential as a model of the contract: one descriptor and feature pass for M weight
    vectors, and the stress.

    With the feature map phi (B,F), the mean over the atoms of random features of the descriptors of
    a GNN, model m has the energy

        E_m[b] = n_atoms[b] * phi[b] . weights[m] + sum of the reference energies of the atoms,

    and `energy` (B,) is the mean of the M. `potential` is a franken.rf.model.FrankenPotential with
    a MACE or a SevenNet backbone (it is copied), or the path of one saved by it. `weights` (M,F) or
    (F,) are by default those of the potential, or all those saved with it; they are the Parameter
    `weights`. All is converted to `dtype`, frozen (`requires_grad_(True)` trains it) and in eval
    mode, on `device`.

    It takes the dict of the contract (see torch_side.potentials.model.Model), many systems in one
    pass, and returns energy, g and G in eV and Angstrom; `model.asking(...)` adds

        member_energies (M,B)              member_position_gradients (M,N,3), dE_m/dr: forces are
                                           minus that
        energy_std (B,)                    spread of the committee, if M > 1: square root of the
                                           mean square deviation
        position_gradients_std (N,3)       from the mean (ddof 0), component by component
        embeddings (N,D)                   the descriptors        hessian, of the mean energy
        node_energies (N,)                 mean over the models; only for heads that average over
                                           all atoms (franken's own configurations do)

    `derivatives="autograd"`: one backward, or M over one graph if gradients of the members are
    asked for. `"func"`: torch.func.vjp, and its vmap over the M. (Franken's own "torch.func" is
    forward mode: one tangent for each coordinate.) Both can be differentiated again.

    `features(inputs)` (B,F) and `descriptors(inputs)` (N,D) are differentiable torch functions of
    the same dict, which bridge.to_jax takes. `n_features` is F, `n_descriptors` D. Known elements
    are those of the backbone that the potential was fitted to (by its scaler and its reference
    energies): Franken itself computes something for others. Franken 0.7.0 hands Z to SevenNet where
    that expects its own index of the element; it is so here too, for the weights were fitted so,
    and elements with Z of 89 and more are not known.

    Raises: TypeError for what is no FrankenPotential; ValueError for another backbone, weights of
    another shape, unknown `derivatives`, and as every Model; NotImplementedError for a backbone
    that torch.func refuses, with the cause; ImportError without franken.

    >>> model = Franken("franken.pt", derivatives="func").asking("member_energies", "position_gradients_std")   # doctest: +SKIP
    >>> phi = bridge.to_jax(model.features)                                                                      # doctest: +SKIP
    """

    def __init__(
        self, potential, weights=None, *, derivatives="autograd", dtype=torch.float32, device="cpu"
    ):
        super().__init__()
        if derivatives not in ("autograd", "func"):
            raise ValueError(
                message('derivatives "autograd" or "func"', repr(derivatives), "pass one of these")
            )
        potential, self.configuration, saved = _load(potential)
        self.derivatives, head, gnn = derivatives, potential.rf, potential.gnn
        self.n_features, self.n_descriptors = head.total_random_features, gnn.feature_dim()
        weights = _weights(
            next(w for w in (weights, saved, head.weights) if w is not None), self.n_features
        )
        self.potential = _copied(potential).to(device=device, dtype=dtype).requires_grad_(False)
        self.weights = nn.Parameter(
            weights.to(device=device, dtype=dtype, copy=True), requires_grad=False
        )
        per_atom, M = head.num_species is None, len(self.weights)
        sometimes = [*(SPREAD if M > 1 else ()), *(["node_energies"] if per_atom else ())]
        self.card = Card(
            batches=True,
            outputs={
                *ENERGY_AND_GRADIENTS,
                "hessian",
                "embeddings",
                "member_energies",
                MEMBERS[0],
                *sometimes,
            },
            cutoff=float(gnn.cutoff_radius()),
            neighbor_list="own",
            elements=_elements(potential),
            receptive_field=gnn.cutoff_radius() * gnn.num_interaction_layers()
            if per_atom
            else None,
            dtype=str(dtype).removeprefix("torch."),
            device=str(device),
            sizes=(("F", self.n_descriptors), ("M", M)),
        )
        self.eval()

    def features(self, inputs: dict) -> torch.Tensor:
        """Franken's feature map phi (B,F) of each system, differentiable in pos and cell: energies
        are n_atoms * phi @ weights.T.

        It takes the dict of the contract, padding included (rows of zeros). In JAX,
        bridge.to_jax(model.features) finds its shape by itself; a Jacobian of it is cheapest with
        derivatives="autograd", batched="sequential" there. Raises ValueError as calling the model
        does."""
        shape = (self.n_features, len(inputs["cell"]))
        return self._part(
            "member_energies", shape, inputs, lambda x: self._features(x, self._descriptors(x)).mT
        ).mT

    def descriptors(self, inputs: dict) -> torch.Tensor:
        """The backbone's descriptors (N,D) of each atom, as it gives them (not scaled); otherwise
        as `features`."""
        return self._part(
            "embeddings", (len(inputs["pos"]), self.n_descriptors), inputs, self._descriptors
        )

    def energies(self, inputs):
        h, (batch, numbers) = self._descriptors(inputs), (inputs["batch"], inputs["atomic_numbers"])
        count = torch.bincount(batch, minlength=len(inputs["cell"])).to(h.dtype)
        reference = self.potential.energy_shift(numbers, batch_ids=batch, num_systems=len(count))
        members = count * (self._features(inputs, h) @ self.weights.mT).mT + reference
        out = {"energy": members.mean(0), "member_energies": members, "embeddings": h}
        if "energy_std" in self.card.active_outputs:
            out["energy_std"] = members.std(0, correction=0)
        if "node_energies" in self.card.active_outputs:
            each = torch.arange(len(h), device=h.device)
            reference = self.potential.energy_shift(numbers, batch_ids=each, num_systems=len(h))
            out["node_energies"] = (
                self._features(inputs | {"batch": each}, h) @ self.weights.mean(0) + reference
            )
        return out

    def _descriptors(self, inputs):
        """All systems as one graph: the edges are r_ij, with all atoms at the origin and the unit
        matrix as cell."""
        r = geometry.edge_vectors(inputs)
        numbers = inputs["atomic_numbers"].long()
        return self.potential.gnn.descriptors(
            self.configuration(
                atom_pos=r.new_zeros(len(numbers), 3),
                atomic_numbers=numbers,
                natoms=torch.tensor([len(numbers)], device=r.device),
                edge_index=inputs["edge_index"].long().mT,
                shifts=r,
                cell=torch.eye(3, dtype=r.dtype, device=r.device),
            )
        )

    def _features(self, inputs, descriptors):
        numbers = inputs["atomic_numbers"].long()
        # Franken scales in place
        scaled = self.potential.input_scaler(descriptors.clone(), atomic_numbers=numbers)
        head = copy.copy(self.potential.rf)
        # there Franken puts what it makes of them inside torch.func
        head._buffers = {**head._buffers}
        return head.feature_map(scaled, atomic_numbers=numbers, batch_ids=inputs["batch"].long())

    def _part(self, name, shape, inputs, compute):
        """What compute gives, put back into its full shape as an output `name` of the contract
        is."""
        if isinstance(inputs["pos"], torch._subclasses.FakeTensor):
            return inputs["pos"].new_empty(shape)  # all that is asked for is the shape
        sizes = (("F", self.n_descriptors), ("M", self.n_features))
        card = replace(self.card, active_outputs={"energy", name}, sizes=sizes)
        return graph.evaluate(lambda x: {name: compute(x)}, inputs, card, "Franken")[name]

    def _with_gradients(self, inputs, trained=None):
        tensors = (*(self.parameters() if trained is None else ()), *inputs.values())
        keep = bool(trained) or (
            torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in tensors)
        )
        wanted = {*ENERGY_AND_GRADIENTS, *self.card.active_outputs}
        if "hessian" in wanted:
            out = hessian(lambda x: self._evaluate(x, True), inputs, keep)
        else:
            out = self._evaluate(inputs, keep)
        return {name: x for name, x in out.items() if name in wanted}

    def _evaluate(self, inputs, keep):
        """The energies and, by cotangents (K,M) of theirs, g and G: one for each member if asked
        for, or one for their mean."""
        M, each = len(self.weights), any(name in self.card.active_outputs for name in MEMBERS)
        cotangents = torch.eye(M) if each else torch.full((1, M), 1 / M)
        pull = _by_func if self.derivatives == "func" else _by_autograd
        with torch.enable_grad():
            out, g, G = pull(self.energies, inputs, cotangents.to(self.weights), keep)
            out |= {"position_gradients": g.mean(0), "cell_gradients": G.mean(0)}
            if each:
                out |= {
                    "member_position_gradients": g,
                    "position_gradients_std": g.std(0, correction=0),
                }
        return out if keep else {name: x.detach() for name, x in out.items()}


def _by_autograd(energies, inputs, cotangents, keep):
    """Outputs, g (K,N,3) and G (K,B,3,3) by K backward passes over one graph."""
    variables = [
        x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        for x in (inputs["pos"], inputs["cell"])
    ]
    out = energies(inputs | dict(zip(("pos", "cell"), variables)))
    sums, last = cotangents @ out["member_energies"].sum(1), len(cotangents) - 1
    rows = [
        torch.autograd.grad(
            e, variables, retain_graph=keep or k < last, create_graph=keep, materialize_grads=True
        )
        for k, e in enumerate(sums)
    ]
    return out, *map(torch.stack, zip(*rows))


def _by_func(energies, inputs, cotangents, keep):
    """The same by torch.func: vjp, and vmap over more than one cotangent."""

    def members(pos, cell):
        out = energies(inputs | {"pos": pos, "cell": cell})
        return out["member_energies"], out

    try:
        values, pull, out = torch.func.vjp(members, inputs["pos"], inputs["cell"], has_aux=True)
        rows = cotangents[:, :, None].expand(*cotangents.shape, values.shape[1])
        g, G = torch.func.vmap(pull)(rows) if len(rows) > 1 else [x[None] for x in pull(rows[0])]
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        got = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        raise NotImplementedError(
            message(
                "a backbone that torch.func can differentiate",
                got,
                'pass derivatives="autograd" to Franken',
            )
        ) from error
    return out, g, G


def _load(potential):
    """The potential, franken's class of structures, and the weights saved beside it, if any."""
    try:
        from franken.data.base import Configuration
        from franken.rf.model import FrankenPotential
    except ImportError as error:
        raise missing("franken", "Franken potentials") from error
    saved = None
    if isinstance(potential, (str, Path)):
        saved = torch.load(potential, map_location="cpu", weights_only=False)["multi_weights"]
        potential = FrankenPotential.load(potential, map_location="cpu", rf_weight_id=0)
    elif not isinstance(potential, FrankenPotential):
        raise TypeError(
            message(
                "a FrankenPotential, or the path of one",
                f"a {type(potential).__name__}",
                "pass franken.rf.model.FrankenPotential",
            )
        )
    if (family := potential.gnn_config.family) not in FAMILIES:
        raise ValueError(
            message(
                f"a backbone of {' or '.join(FAMILIES)}",
                family,
                "take another backbone, or Franken's own calculators",
            )
        )
    return potential, Configuration, saved


def _copied(potential):
    """A copy, for any dtype. Franken's own torch.func mode leaves wrapped buffers, which can't be
    copied but cloned."""
    potential = copy.deepcopy(potential, {id(x): x.detach().clone() for x in potential.buffers()})
    if ONE_HOT in (layers := _layers(potential)):
        layers[ONE_HOT] = _OneHot(layers[ONE_HOT])
    return potential


def _layers(potential) -> dict:
    """Those of a SevenNet by name."""
    return getattr(getattr(potential.gnn, "base_model", None), "_modules", {})


def _weights(weights, n_features):
    """As (M,F)."""
    weights = torch.atleast_2d(torch.as_tensor(weights).detach())
    if weights.ndim != 2 or not len(weights) or weights.shape[1] != n_features:
        expected = spec(["M", n_features], "float")
        raise ValueError(
            message(
                f"weights as {expected}",
                spec(weights.shape, dtype_name(weights)),
                "pass weights=..., a row for each model",
            )
        )
    return weights


def _elements(potential) -> set[int]:
    """Those of the backbone that the scaler and the reference energies know, if they were set
    (zeros stand where they were not)."""
    elements = {int(z) for z in potential.gnn.supported_atomic_types()}
    if ONE_HOT in (layers := _layers(potential)):
        elements = {z for z in elements if z < layers[ONE_HOT].num_classes}
    for fitted in (potential.input_scaler.z_keys, potential.energy_shift.z_keys):
        known = {int(z) for z in fitted} - {0}
        elements = elements & known if known else elements
    return elements


class _OneHot(nn.Module):
    """sevenn's layer of this name, whose encodings are always float32, in the dtype of the
    edges."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, data):
        data = self.layer(data)
        return data | {
            key: data[key].to(data["edge_vec"].dtype)
            for key in (self.layer.key_output, self.layer.key_additional_output)
        }
