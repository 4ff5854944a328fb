"""nvalchemi-toolkit (NVIDIA): a potential of the contract as an nvalchemi model, and an nvalchemi
model as a potential."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from os import PathLike
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float
from torch import nn

from bridge.card import Card
from bridge.errors import message
from torch_side.models.nvalchemi import EXTRAS, NAMES, OLD, Nvalchemi, package, sign
from torch_side.potentials import geometry, strain
from torch_side.potentials.model import Model


def model(potential: Model) -> Any:
    """Returns a potential as an nvalchemi model, for its dynamics, optimizers and pipelines: an
    nn.Module and BaseModelMixin.

    `potential` is a torch_side.potentials.model.Model: an adapter of this package, or
    bridge.torch_potential(...) of a JAX potential. The result is called with a Batch (or
    AtomicData) of N atoms in B systems. It reads positions (N,3), atomic_numbers (N,), cell (B,3,3)
    by rows and pbc (B,3) (both absent: open boundaries), and charge and spin (B,1) where the card
    knows them. One call of the potential gives an OrderedDict of what `model_config.active_outputs`
    holds, in eV and Angstrom:

        energy (B,1)
        forces -g (N,3)
        stress W / V, tension positive, (B,3,3); -W / V where nvalchemi-toolkit < 0.2 is installed
        atomic_energies (N,), and the card's other outputs under their own names

    Stress is not active at first, as in nvalchemi's own models, for an open system has none. Ask
    for it by `set_config("active_outputs", {"energy", "forces", "stress"})`. A COO neighbour list
    in the Batch is used: neighbor_list (E,2) and neighbor_list_shifts (E,3), which dynamics makes
    with the hooks of `make_neighbor_hooks()`. Without one the potential finds its neighbours.

    `model_config` is made from the potential's card. `model_card` has the same under the names of
    nvalchemi's first guide (forces_via_autograd, supports_energies, ...). `adapt_input` gives the
    dict of the contract, and `adapt_output` takes the contract's outputs. `compute_embeddings`
    writes node_embeddings (N,F) and their sums graph_embeddings (B,F). `export_model` saves the
    potential or its state_dict. Outputs can be differentiated where positions or the potential's
    parameters require grad, else they are detached.

    Raises: TypeError for another kind of potential; ImportError without nvalchemi-toolkit. When it
    is called or configured: ValueError for an active output that the card does not have, for a cell
    without pbc, for a neighbour list that is too short or has no shifts, and as the potential does;
    KeyError for a required input that is absent; NotImplementedError for embeddings that the card
    does not have.

    >>> dynamics = NVE(model(bridge.torch_potential(lj, gradients="autodiff")), dt=1.0)     # doctest: +SKIP
    >>> dynamics.run(batch, n_steps=100)                                                     # doctest: +SKIP
    """
    if not isinstance(potential, Model):
        do = "wrap it by torch_side.potentials.model.Wrapped, or by bridge.torch_potential if it is a JAX model"
        raise TypeError(
            message("a torch_side.potentials.model.Model", f"a {type(potential).__name__}", do)
        )
    return _wrapper()(potential, _config(potential.card))


def potential(wrapper: nn.Module) -> Model:
    """Returns an nvalchemi model as a torch_side.potentials.model.Model of the contract, for
    bridge.potential: see torch_side.models.nvalchemi.Nvalchemi.

    `potential(model(p))` is p itself.

    Raises: as Nvalchemi.

    >>> lj = potential(LennardJonesModelWrapper(0.01, 3.4, 8.5))     # doctest: +SKIP
    >>> energy = bridge.potential(lj, atomic_numbers=numbers)         # doctest: +SKIP
    """
    return wrapper.model if isinstance(wrapper, _Wrapping) else Nvalchemi(wrapper)


class _Wrapping(nn.Module):
    """The methods of Wrapper, the class of `model`, which is a BaseModelMixin besides."""

    def __init__(self, model: Model, config: Any) -> None:
        super().__init__()
        self.model = model
        self.model_config = config

    @property
    def model_card(self) -> Any:
        """The ModelCard of nvalchemi's first guide."""
        return _old_card(self.model_config, bool(self.embedding_shapes))

    @property
    def embedding_shapes(self) -> dict[str, tuple[int | None, ...]]:
        """Shapes of the embeddings of an atom and of a system; empty without embeddings."""
        if "embeddings" not in self.model.card.outputs:
            return {}
        size = dict(self.model.card.sizes).get("F")
        return {"node_embeddings": (size,), "graph_embeddings": (size,)}

    def set_config(self, key: str, value: Any) -> None:
        """Sets a field of model_config. None for active_outputs means all outputs.

        Raises: ValueError for active outputs that this model does not have."""
        if key == "active_outputs":
            if value is None:
                value = set(self.model_config.outputs)
            else:
                self._check(value)
        _mixin(self).set_config(key, value)

    def input_data(self) -> set[str]:
        """Returns the names of what is read from a Batch."""
        found_here = {"neighbor_list"} if self.model.card.neighbor_list == "own" else set()
        return _mixin(self).input_data() - found_here

    def adapt_input(self, data: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Returns the dict of the contract for a Batch or AtomicData.

        Raises: ValueError for a cell without pbc, and for a neighbour list that is too short or
        has no shifts; KeyError for a required input that is absent."""
        self._check(self.model_config.active_outputs)
        found = _mixin(self).adapt_input(data, **kwargs)
        inputs = _geometry(data)
        inputs["atomic_numbers"] = found["atomic_numbers"]
        inputs |= {k: found[k].reshape(-1) for k in EXTRAS if k in found}
        return inputs | _edges(data, inputs, self.model.card.cutoff)

    def adapt_output(self, model_output: dict[str, torch.Tensor], data: Any) -> Any:
        """Returns nvalchemi's OrderedDict of the active outputs, from outputs of the contract."""
        active = self.model_config.active_outputs
        out = {NAMES.get(k, k): x for k, x in model_output.items() if NAMES.get(k, k) in active}
        if "forces" in active:
            out["forces"] = -out["forces"]
        if "stress" in active:
            out["stress"] = _stress(model_output, _geometry(data))
        return _mixin(self).adapt_output(out, data)

    def forward(self, data: Any, **kwargs: Any) -> Any:
        """Returns the active outputs for a Batch or AtomicData, from one call of the potential."""
        inputs = self.adapt_input(data, **kwargs)
        active, card = self.model_config.active_outputs, self.model.card
        names = {k for k in card.outputs if NAMES.get(k, k) in active}
        further = names - set(card.active)
        model = self.model.asking(*further) if further else self.model
        return self.adapt_output(model(inputs), data)

    def compute_embeddings(self, data: Any, **kwargs: Any) -> Any:
        """Writes node_embeddings (N,F) and their sums graph_embeddings (B,F) into the data, and
        returns it.

        Raises: NotImplementedError where the card has no embeddings."""
        if not self.embedding_shapes:
            got = f"one that has {', '.join(sorted(self.model.card.outputs))}"
            raise NotImplementedError(
                message("a potential with embeddings on its card", got, "take another model")
            )
        inputs = self.adapt_input(data, **kwargs)
        nodes = self.model.asking("embeddings")(inputs)["embeddings"]
        # An attribute that is set on a Batch would be one of its systems, not of its atoms.
        atoms = getattr(data, "_atoms_group", None)
        if atoms is None:
            data.node_embeddings = nodes
        else:
            atoms["node_embeddings"] = nodes
        sums = nodes.new_zeros(len(inputs["cell"]), nodes.shape[1])
        data.graph_embeddings = sums.index_add(0, inputs["batch"], nodes)
        return data

    def export_model(self, path: str | PathLike[str], as_state_dict: bool = False) -> None:
        """Saves the potential, or its state_dict, by torch.save."""
        torch.save(self.model.state_dict() if as_state_dict else self.model, path)

    def _check(self, names: Iterable[str]) -> None:
        """ValueError for outputs that are not there."""
        if absent := sorted(set(names) - self.model_config.outputs):
            have = ", ".join(sorted(self.model_config.outputs))
            raise ValueError(
                message(
                    f"active_outputs that this model has ({have})",
                    ", ".join(absent),
                    "ask for these, or take another model",
                )
            )


def _mixin(wrapper: _Wrapping) -> Any:
    """BaseModelMixin's methods of a Wrapper, as super() gives them: that class follows _Wrapping
    among its bases."""
    return super(_Wrapping, wrapper)


@cache
def _wrapper() -> type[_Wrapping]:
    """The class Wrapper, made here because a base of it is nvalchemi's."""
    return type(
        "Wrapper",
        (_Wrapping, package()[0].BaseModelMixin),
        {"__module__": __name__, "__doc__": model.__doc__},
    )


def __getattr__(name: str) -> type[_Wrapping]:
    """Returns the class Wrapper, once it is asked for: pickle looks here."""
    if name == "Wrapper":
        return _wrapper()
    raise AttributeError(name)


def _config(card: Card) -> Any:
    """nvalchemi's ModelConfig of a card. The outputs come with their gradients, so that nvalchemi
    itself has nothing to differentiate."""
    base = package()[0]
    outputs = {NAMES.get(k, k) for k in card.outputs}
    if not card.supports_pbc or "position_gradients" not in card.outputs:
        outputs -= {"stress"}
    active = {NAMES.get(k, k) for k in card.active} & outputs
    cutoff = card.cutoff
    return base.ModelConfig(
        outputs=outputs,
        active_outputs=active - {"stress"},
        supports_pbc=card.supports_pbc,
        needs_pbc=card.needs_pbc,
        required_inputs=card.required_inputs & set(EXTRAS),
        optional_inputs={"cell", "pbc", *(card.optional_inputs & set(EXTRAS))},
        neighbor_config=None if cutoff is None else base.NeighborConfig(cutoff=cutoff),
    )


def _old_card(config: Any, embeddings: bool) -> Any:
    """The ModelCard of nvalchemi's first guide; a plain namespace where there is no such class any
    more."""
    fields = {f"supports_{old}": name in config.outputs for name, old in OLD.items()}
    fields |= {f"supports_{k}_embeddings": embeddings for k in ("node", "graph")}
    never = (
        "forces_via_autograd",
        "supports_edge_embeddings",
        "needs_node_charges",
        "includes_dispersion",
        "includes_long_range_electrostatics",
    )
    fields |= dict.fromkeys(never, False)
    same = ("supports_pbc", "needs_pbc", "neighbor_config")
    fields |= {name: getattr(config, name) for name in same}
    fields["supports_non_batch"] = True
    fields["needs_system_charges"] = "charge" in config.required_inputs
    return getattr(package()[0], "ModelCard", SimpleNamespace)(**fields)


def _geometry(data: Any) -> dict[str, torch.Tensor]:
    """Positions, cells, boundaries and systems of a Batch or AtomicData; ValueError for a cell
    without pbc."""
    fields: list[Any] = [
        getattr(data, name, None) for name in ("positions", "cell", "pbc", "batch_idx")
    ]
    pos, cell, pbc, batch = fields
    systems = 1 if batch is None else data.num_graphs
    if cell is not None and pbc is None:
        raise ValueError(
            message("pbc with a cell", "a cell alone", "say which axes are periodic: pbc (B,3)")
        )
    if cell is None:
        cell = pos.new_zeros(systems, 3, 3)
    if pbc is None:
        pbc = pos.new_zeros(systems, 3, dtype=torch.bool)
    if batch is None:
        batch = pos.new_zeros(len(pos), dtype=torch.int64)
    return {"pos": pos, "cell": cell, "pbc": pbc, "batch": batch.long()}


def _edges(
    data: Any, inputs: dict[str, torch.Tensor], cutoff: float | None
) -> dict[str, torch.Tensor]:
    """The neighbour list in the data, without unused slots and without edges beyond the cutoff;
    nothing if there is none. ValueError for a list that is too short or has no shifts."""
    pairs = getattr(data, "neighbor_list", None)
    shifts = getattr(data, "neighbor_list_shifts", None)
    if cutoff is None or pairs is None:
        return {}
    if getattr(data, "_neighbor_list_cutoff", cutoff) < cutoff:
        got = f"one up to {data._neighbor_list_cutoff}"
        raise ValueError(
            message(
                f"a neighbour list up to {cutoff} Angstrom",
                got,
                "build it with this model's neighbor_config",
            )
        )
    if shifts is None and inputs["pbc"].any():
        raise ValueError(
            message(
                "neighbor_list_shifts with the neighbor_list of periodic systems",
                "none",
                "pass them, or no list",
            )
        )
    pairs = pairs.long()
    if shifts is None:
        shifts = torch.zeros_like(pairs[:, :1]).expand(-1, 3)
    used = (pairs < len(inputs["pos"])).all(1)
    edges = {"edge_index": pairs[used].T, "cell_offsets": shifts[used].long()}
    near = geometry.edge_vectors(inputs | edges).detach().norm(dim=-1) < cutoff
    return {"edge_index": edges["edge_index"][:, near], "cell_offsets": edges["cell_offsets"][near]}


def _stress(
    out: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor]
) -> Float[torch.Tensor, "B 3 3"]:
    """The stress in the sign of the installed nvalchemi."""
    W = strain.virial(
        out["position_gradients"],
        out["cell_gradients"],
        inputs["pos"],
        inputs["batch"],
        inputs["cell"],
    )
    return sign() * strain.stress(W, inputs["cell"], inputs["pbc"])
