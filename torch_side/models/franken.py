"""Franken (Novelli et al., npj Comput. Mater. 11, 293 (2025)): random features of a GNN's
descriptors, many weight vectors at once."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import nn
from torch._subclasses import FakeTensor

from bridge import trust as trusting
from bridge.card import Card
from bridge.contract import ENERGY_AND_GRADIENTS, dtype_name
from bridge.errors import message, missing, spec
from torch_side.calls import status
from torch_side.potentials import geometry, graph, padding
from torch_side.potentials.checkpoints import PICKLE
from torch_side.potentials.hessian import hessian
from torch_side.potentials.model import Model

SPREAD = ("energy_std", "position_gradients_std")  # if there are several weight vectors
MEMBERS = ("member_position_gradients", "position_gradients_std")  # need a gradient for each
FAMILIES = ("mace", "sevenn")  # of backbones, by franken's names
ONE_HOT = "onehot_idx_to_onehot"  # sevenn's layer


class Franken(Model):
    """A FrankenPotential as a model of the contract: one descriptor and feature pass for M weight
    vectors, and the stress.

    The feature map phi (B,F) is the mean over the atoms of random features of the descriptors of a
    GNN. With it, model m has the energy

        E_m[b] = n_atoms[b] * phi[b] . weights[m] + sum of the reference energies of the atoms,

    and `energy` (B,) is the mean over the M models. `potential` is a
    franken.rf.model.FrankenPotential with a MACE or a SevenNet backbone, which is copied, or the
    path of one that was saved by it. Franken unpickles such a file, and the backbone that it names,
    so `trust=True` says that you would run a program from where it came from. `weights` (M,F) or
    (F,) are by default those of the potential, or all that were saved with it. They become the
    Parameter `weights` (M,F). All is converted to `dtype`, frozen and in eval mode, on `device`;
    `requires_grad_(True)` makes it trainable.

    It takes the dict of the contract (see torch_side.potentials.model.Model), with many systems in
    one pass, and returns energy, g and G in eV and Angstrom. `model.asking(...)` adds

        member_energies (M,B)              energy of each model
        member_position_gradients (M,N,3)  dE_m/dr of each model; forces are minus that
        energy_std (B,)                    if M > 1: standard deviation over the models, with M in
                                           the denominator (ddof 0)
        position_gradients_std (N,3)       if M > 1: the same, component by component
        embeddings (N,D)                   the descriptors
        hessian (N,3,N,3)                  of the mean energy
        node_energies (N,)                 mean over the models; only for heads that average over
                                           all atoms, as franken's own configurations do

    With `derivatives="autograd"` there is one backward pass, or M passes over one graph if
    gradients of the members are asked for. With `"func"` torch.func.vjp makes the gradients, and
    torch.func.vmap runs it over the M models. (Franken's own "torch.func" is forward mode, with one
    tangent for each coordinate.) Both results can be differentiated again.

    `features(inputs)` (B,F) and `descriptors(inputs)` (N,D) are differentiable torch functions of
    the same dict, which bridge.to_jax takes. `n_features` is F, and `n_descriptors` is D. The
    elements that it knows are those of the backbone that the potential was fitted to, according to
    its scaler and its reference energies. Franken itself computes something for other elements too.
    Franken 0.7.0 hands Z to SevenNet where SevenNet expects its own index of the element. Here it
    is the same, because the weights were fitted so, and elements with Z of 89 and more are not
    known.

    Raises: TypeError for what is no FrankenPotential; ValueError for another backbone, for weights
    of another shape, for unknown `derivatives`, for a path without trust=True, and as every Model;
    NotImplementedError for a backbone that torch.func refuses, with the cause; ImportError without
    franken.

    >>> model = Franken("franken.pt", derivatives="func").asking("member_energies", "position_gradients_std")   # doctest: +SKIP
    >>> phi = bridge.to_jax(model.features)                                                                      # doctest: +SKIP
    """

    potential: Any  # a franken.rf.model.FrankenPotential
    weights: nn.Parameter

    def __init__(
        self,
        potential: str | Path | Any,
        weights: Any = None,
        *,
        derivatives: Literal["autograd", "func"] = "autograd",
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        trust: bool = False,
    ) -> None:
        super().__init__()
        if derivatives not in ("autograd", "func"):
            raise ValueError(
                message('derivatives "autograd" or "func"', repr(derivatives), "pass one of these")
            )
        original, self.configuration, saved = _load(potential, trust)
        self.derivatives = derivatives
        head, gnn = original.rf, original.gnn
        self.n_features: int = head.total_random_features
        self.n_descriptors: int = gnn.feature_dim()
        given = next(w for w in (weights, saved, head.weights) if w is not None)
        rows = _weights(given, self.n_features)
        self.potential = _copied(original).to(device=device, dtype=dtype).requires_grad_(False)
        self.weights = nn.Parameter(
            rows.to(device=device, dtype=dtype, copy=True), requires_grad=False
        )
        M = len(self.weights)
        outputs = {*ENERGY_AND_GRADIENTS, "hessian", "embeddings", "member_energies", MEMBERS[0]}
        if M > 1:
            outputs.update(SPREAD)
        reach = None
        if head.num_species is None:  # it averages over all atoms
            outputs.add("node_energies")
            reach = gnn.cutoff_radius() * gnn.num_interaction_layers()
        self.card = Card(
            batches=True,
            outputs=outputs,
            cutoff=float(gnn.cutoff_radius()),
            neighbor_list="own",
            elements=_elements(original),
            receptive_field=reach,
            dtype=str(dtype).removeprefix("torch."),
            device=str(device),
            sizes=(("F", self.n_descriptors), ("M", M)),
        )
        self.eval()

    def features(self, inputs: dict[str, torch.Tensor]) -> Float[torch.Tensor, "B F"]:
        """Returns Franken's feature map phi (B,F) of each system, differentiable in pos and cell.

        Energies are n_atoms * phi @ weights.T, without the reference energies. It takes the dict of
        the contract; padding is allowed, and has rows of zeros. In JAX,
        bridge.to_jax(model.features) finds its shape by itself, and a Jacobian of it is cheapest
        with derivatives="autograd", batched="sequential" there. Raises ValueError as calling the
        model does."""

        def compute(x: dict[str, torch.Tensor]) -> torch.Tensor:
            return self._features(x, self._descriptors(x), len(x["cell"])).mT

        shape = (self.n_features, len(inputs["cell"]))
        return self._part("member_energies", shape, inputs, compute).mT

    def descriptors(self, inputs: dict[str, torch.Tensor]) -> Float[torch.Tensor, "N D"]:
        """Returns the backbone's descriptors (N,D) of each atom, not scaled.

        They are differentiable in pos and cell. Inputs, padding and errors are as for
        `features`."""
        shape = (len(inputs["pos"]), self.n_descriptors)
        return self._part("embeddings", shape, inputs, self._descriptors)

    def energies(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns energy (B,), member_energies (M,B) and embeddings (N,D), and energy_std and
        node_energies where these are active, of inputs without padding."""
        h = self._descriptors(inputs)
        batch, numbers = inputs["batch"], inputs["atomic_numbers"]
        count = padding.counted(batch, len(inputs["cell"])).to(h.dtype)
        reference = self.potential.energy_shift(numbers, batch_ids=batch, num_systems=len(count))
        members = count * (self._features(inputs, h, len(count)) @ self.weights.mT).mT + reference
        out = {"energy": members.mean(0), "member_energies": members, "embeddings": h}
        if "energy_std" in self.card.active_outputs:
            out["energy_std"] = members.std(0, correction=0)
        if "node_energies" in self.card.active_outputs:
            each = torch.arange(len(h), device=h.device)
            reference = self.potential.energy_shift(numbers, batch_ids=each, num_systems=len(h))
            # each atom as a system
            features = self._features(inputs | {"batch": each}, h, len(h))
            out["node_energies"] = features @ self.weights.mean(0) + reference
        return out

    def _descriptors(self, inputs: dict[str, torch.Tensor]) -> Float[torch.Tensor, "N D"]:
        """The descriptors of all systems, as one graph. All atoms lie at the origin of a unit cell,
        and the shift of each edge is its r_ij."""
        r = geometry.edge_vectors(inputs)
        numbers = inputs["atomic_numbers"].long()
        structure = self.configuration(
            atom_pos=r.new_zeros(len(numbers), 3),
            atomic_numbers=numbers,
            natoms=torch.full((1,), len(numbers), device=r.device),
            edge_index=inputs["edge_index"].long().mT,
            shifts=r,
            cell=torch.eye(3, dtype=r.dtype, device=r.device),
        )
        return self.potential.gnn.descriptors(structure)

    def _features(
        self,
        inputs: dict[str, torch.Tensor],
        descriptors: Float[torch.Tensor, "N D"],
        n_systems: int,
    ) -> Float[torch.Tensor, "B F"]:
        """phi of each of the systems that inputs["batch"] numbers."""
        numbers = inputs["atomic_numbers"].long()
        scaler = self.potential.input_scaler
        if status.current() is not None and scaler.scale_by_Z:
            scaled = _scaled(scaler, descriptors, numbers)
        else:
            # Franken scales in place
            scaled = scaler(descriptors.clone(), atomic_numbers=numbers)
        # inside torch.func it replaces buffers of its head
        head = copy.copy(self.potential.rf)
        head._buffers = {**head._buffers}
        if status.current() is not None:
            self._check_static()
            # its own looks up the number of systems in the values
            head.species_scatter_sum = partial(_mean, n_systems=n_systems)
        return head.feature_map(scaled, atomic_numbers=numbers, batch_ids=inputs["batch"].long())

    def _check_static(self) -> None:
        """NotImplementedError for a head whose result depends on which elements are there."""
        if self.potential.rf.num_species is not None:
            expected = "a head that averages over all atoms, in a program that is compiled"
            got = "one that looks up which elements are there (num_species)"
            raise NotImplementedError(message(expected, got, 'take lane="ffi"'))

    def _part(
        self,
        name: str,
        shape: tuple[int, ...],
        inputs: dict[str, torch.Tensor],
        compute: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    ) -> torch.Tensor:
        """What compute(inputs without padding) returns, put back to `shape` as the output `name` of
        the contract is."""
        if isinstance(inputs["pos"], FakeTensor):
            return inputs["pos"].new_empty(shape)  # somebody asks for the shape alone
        sizes = (("F", self.n_descriptors), ("M", self.n_features))
        card = replace(self.card, active_outputs={"energy", name}, sizes=sizes)
        return graph.evaluate(lambda x: {name: compute(x)}, inputs, card, "Franken")[name]

    def _with_gradients(
        self, inputs: dict[str, torch.Tensor], trained: bool | None = None
    ) -> dict[str, torch.Tensor]:
        """The active outputs of inputs without padding."""
        keep = bool(trained)
        if not keep and torch.is_grad_enabled():
            tensors = (*(self.parameters() if trained is None else ()), *inputs.values())
            keep = any(getattr(x, "requires_grad", False) for x in tensors)
        wanted = {*ENERGY_AND_GRADIENTS, *self.card.active_outputs}
        if "hessian" in wanted:
            out = hessian(lambda x: self._evaluate(x, True), inputs, keep)
        else:
            out = self._evaluate(inputs, keep)
        return {name: x for name, x in out.items() if name in wanted}

    def _evaluate(self, inputs: dict[str, torch.Tensor], keep: bool) -> dict[str, torch.Tensor]:
        """The energies, g and G. The gradients are made by K cotangents (K,M) of the members'
        energies: one for each member if these are asked for, otherwise one for the mean."""
        M = len(self.weights)
        each = any(name in self.card.active_outputs for name in MEMBERS)
        like = {"dtype": self.weights.dtype, "device": self.weights.device}
        cotangents = torch.eye(M, **like) if each else torch.full((1, M), 1 / M, **like)
        pull = _by_func if self.derivatives == "func" else _by_autograd
        with torch.enable_grad():
            out, g, G = pull(self.energies, inputs, cotangents, keep)
            out |= {"position_gradients": g.mean(0), "cell_gradients": G.mean(0)}
            if each:
                out["member_position_gradients"] = g
                out["position_gradients_std"] = g.std(0, correction=0)
        return out if keep else {name: x.detach() for name, x in out.items()}


def _scaled(
    scaler: Any, descriptors: Float[torch.Tensor, "N D"], numbers: Int[torch.Tensor, " N"]
) -> Float[torch.Tensor, "N D"]:
    """What franken's scaler gives for descriptors that it scales element by element.

    Its own takes the rows of each element out by a mask, whose values the host reads."""
    found = descriptors
    for number, mean, std in zip(scaler.z_keys, scaler.mean, scaler.std, strict=True):
        scaled = (descriptors - mean) / (std * math.sqrt(scaler.input_dim))
        found = torch.where((numbers == number)[:, None], scaled, found)
    return found


def _mean(
    Z: torch.Tensor,
    atomic_numbers: torch.Tensor | None = None,
    batch_ids: torch.Tensor | None = None,
    *,
    n_systems: int,
) -> torch.Tensor:
    """The means over the atoms of each system (B,F), as franken's species_scatter_sum."""
    owner = Z.new_zeros(len(Z), dtype=torch.long) if batch_ids is None else batch_ids
    total = Z.new_zeros(n_systems, Z.shape[1]).index_add(0, owner, Z)
    return total / padding.counted(owner, n_systems).clamp(min=1).to(Z.dtype)[:, None]


Energies = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
Gradients = tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]


def _by_autograd(
    energies: Energies, inputs: dict[str, torch.Tensor], cotangents: torch.Tensor, keep: bool
) -> Gradients:
    """Outputs, g (K,N,3) and G (K,B,3,3) by K backward passes over one graph."""
    pos, cell = (
        x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        for x in (inputs["pos"], inputs["cell"])
    )
    out = energies(inputs | {"pos": pos, "cell": cell})
    sums = cotangents @ out["member_energies"].sum(1)
    last = len(cotangents) - 1
    g, G = [], []
    for k, energy in enumerate(sums):
        of_pos, of_cell = torch.autograd.grad(
            energy,
            (pos, cell),
            retain_graph=keep or k < last,
            create_graph=keep,
            materialize_grads=True,
        )
        g.append(of_pos)
        G.append(of_cell)
    return out, torch.stack(g), torch.stack(G)


def _by_func(
    energies: Energies, inputs: dict[str, torch.Tensor], cotangents: torch.Tensor, keep: bool
) -> Gradients:
    """The same by torch.func: vjp, and vmap over more than one cotangent."""

    def members(
        pos: torch.Tensor, cell: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        out = energies(inputs | {"pos": pos, "cell": cell})
        return out["member_energies"], out

    try:
        pos, cell = inputs["pos"], inputs["cell"]
        with_aux: Any = torch.func.vjp(members, pos, cell, has_aux=True)
        values, pull, out = with_aux
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


def _load(potential: Any, trust: bool) -> tuple[Any, Any, Any]:
    """The potential, franken's class of structures, and the weights saved beside it, if any."""
    try:
        from franken.data.base import Configuration
        from franken.rf.model import FrankenPotential
    except ImportError as error:
        raise missing("franken", "Franken potentials") from error
    saved = None
    if isinstance(potential, (str, Path)):
        trusting.ask(potential, f"{PICKLE}, and in the backbone that it names", trust)
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


def _copied(potential: Any) -> Any:
    """A copy that any dtype will do for. Franken's own torch.func mode leaves wrapped buffers
    behind, which can be cloned but not copied."""
    potential = copy.deepcopy(potential, {id(x): x.detach().clone() for x in potential.buffers()})
    if ONE_HOT in (layers := _layers(potential)):
        layers[ONE_HOT] = _OneHot(layers[ONE_HOT])
    return potential


def _layers(potential: Any) -> dict[str, Any]:
    """The layers of a SevenNet by name; none of another backbone."""
    return getattr(getattr(potential.gnn, "base_model", None), "_modules", {})


def _weights(weights: Any, n_features: int) -> Float[torch.Tensor, "M F"]:
    """The weights as (M,F), checked."""
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


def _elements(potential: Any) -> set[int]:
    """The elements of the backbone that the scaler and the reference energies know as well. Where
    one of these was not set, it holds zeros and excludes nothing."""
    elements = {int(z) for z in potential.gnn.supported_atomic_types()}
    if ONE_HOT in (layers := _layers(potential)):
        elements = {z for z in elements if z < layers[ONE_HOT].num_classes}
    for fitted in (potential.input_scaler.z_keys, potential.energy_shift.z_keys):
        known = {int(z) for z in fitted} - {0}
        elements = elements & known if known else elements
    return elements


class _OneHot(nn.Module):
    """sevenn's layer of this name, with its encodings in the dtype of the edges; its own are always
    float32."""

    layer: Any

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, data: Any) -> Any:
        """Returns sevenn's dict, encodings included."""
        data = self.layer(data)
        dtype = data["edge_vec"].dtype
        keys = (self.layer.key_output, self.layer.key_additional_output)
        return data | {key: data[key].to(dtype) for key in keys}
