"""nvalchemi-toolkit (NVIDIA): a potential of the contract as an nvalchemi model, and an nvalchemi
model as a potential."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import torch
from torch import nn

from bridge.errors import message
from torch_side.models.nvalchemi import EXTRAS, NAMES, OLD, Nvalchemi, package, sign
from torch_side.potentials import geometry, strain
from torch_side.potentials.model import Model


def model(potential):
    """A potential as an nvalchemi model, for its dynamics, optimizers and pipelines: an nn.Module
    and BaseModelMixin.

    `potential` is a torch_side.potentials.model.Model: an adapter of this package, or
    bridge.torch_potential(...) of a JAX potential. The result is called with a Batch (or
    AtomicData) of N atoms in B systems; it reads positions (N,3), atomic_numbers (N,), cell (B,3,3)
    by rows and pbc (B,3) (both absent: open boundaries), charge and spin (B,1) where the card knows
    them, and gives an OrderedDict of what `model_config.active_outputs` holds, in eV and Angstrom:

        energy (B,1),  forces -g (N,3),  stress W / V, tension positive, (B,3,3) (-W / V where
                       nvalchemi-toolkit < 0.2 is
        installed),  atomic_energies (N,), and the card's other outputs under their own names

    from one call of the potential. As in nvalchemi's own models stress is not active at first, for
    an open system has none: `set_config("active_outputs", {"energy", "forces", "stress"})`. A COO
    neighbour list in the Batch (neighbor_list (E,2), neighbor_list_shifts (E,3);
    `make_neighbor_hooks()` has dynamics make it) is used; without one the potential finds its
    neighbours.

    `model_config` is made from the potential's card; `model_card` has the same under the names of
    nvalchemi's first guide (forces_via_autograd, supports_energies, ...). `adapt_input` gives the
    dict of the contract, `adapt_output` takes the contract's outputs, `compute_embeddings` writes
    node_embeddings (N,F) and their sums graph_embeddings (B,F), `export_model` saves the potential
    or its state_dict. Outputs can be differentiated where positions or the potential's parameters
    require grad, else they are detached.

    Raises: TypeError for another kind of potential; ImportError without nvalchemi-toolkit; when it
    is called or configured, ValueError for an active output that the card does not have, a cell
    without pbc, a neighbour list that is too short or has no shifts, and as the potential does;
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


def potential(wrapper):
    """An nvalchemi model as a torch_side.potentials.model.Model of the contract, for
    bridge.potential: see torch_side.models.nvalchemi.Nvalchemi.

    `potential(model(p))` is p itself. Raises: as Nvalchemi.

    >>> lj = potential(LennardJonesModelWrapper(0.01, 3.4, 8.5))     # doctest: +SKIP
    >>> energy = bridge.potential(lj, atomic_numbers=numbers)         # doctest: +SKIP
    """
    return wrapper.model if isinstance(wrapper, _Wrapping) else Nvalchemi(wrapper)


class _Wrapping(nn.Module):
    """The methods of Wrapper, which is a BaseModelMixin besides."""

    def __init__(self, model, config):
        super().__init__()
        self.model, self.model_config = model, config

    @property
    def model_card(self):
        return _old_card(self.model_config, bool(self.embedding_shapes))

    @property
    def embedding_shapes(self):
        size = dict(self.model.card.sizes).get("F")
        return (
            {"node_embeddings": (size,), "graph_embeddings": (size,)}
            if "embeddings" in self.model.card.outputs
            else {}
        )

    def set_config(self, key, value):
        if key == "active_outputs" and value is not None:
            self._check(value)
        super().set_config(
            key,
            set(self.model_config.outputs) if key == "active_outputs" and value is None else value,
        )

    def input_data(self):
        return super().input_data() - (
            {"neighbor_list"} if self.model.card.neighbor_list == "own" else set()
        )

    def adapt_input(self, data, **kwargs):
        self._check(self.model_config.active_outputs)
        found = super().adapt_input(data, **kwargs)
        inputs = (
            _geometry(data)
            | {"atomic_numbers": found["atomic_numbers"]}
            | {k: found[k].reshape(-1) for k in EXTRAS if k in found}
        )
        return inputs | _edges(data, inputs, self.model.card.cutoff)

    def adapt_output(self, model_output, data):
        active = self.model_config.active_outputs
        out = {NAMES.get(k, k): x for k, x in model_output.items() if NAMES.get(k, k) in active}
        if "forces" in active:
            out["forces"] = -out["forces"]
        if "stress" in active:
            out["stress"] = _stress(model_output, _geometry(data))
        return super().adapt_output(out, data)

    def forward(self, data, **kwargs):
        inputs = self.adapt_input(data, **kwargs)
        names = {
            k
            for k in self.model.card.outputs
            if NAMES.get(k, k) in self.model_config.active_outputs
        }
        further = names - self.model.card.active_outputs
        return self.adapt_output(
            (self.model.asking(*further) if further else self.model)(inputs), data
        )

    def compute_embeddings(self, data, **kwargs):
        if not self.embedding_shapes:
            got = f"one that has {', '.join(sorted(self.model.card.outputs))}"
            raise NotImplementedError(
                message("a potential with embeddings on its card", got, "take another model")
            )
        inputs = self.adapt_input(data, **kwargs)
        nodes = self.model.asking("embeddings")(inputs)["embeddings"]
        # of a Batch, whose attributes would be a system's
        home = getattr(data, "_atoms_group", None)
        data.__setattr__("node_embeddings", nodes) if home is None else home.__setitem__(
            "node_embeddings", nodes
        )
        data.graph_embeddings = nodes.new_zeros(len(inputs["cell"]), nodes.shape[1]).index_add(
            0, inputs["batch"], nodes
        )
        return data

    def export_model(self, path, as_state_dict=False):
        torch.save(self.model.state_dict() if as_state_dict else self.model, path)

    def _check(self, names):
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


@cache
def _wrapper():
    return type(
        "Wrapper",
        (_Wrapping, package()[0].BaseModelMixin),
        {"__module__": __name__, "__doc__": model.__doc__},
    )


def __getattr__(name):
    """The class Wrapper, once it is asked for: pickle looks here."""
    if name == "Wrapper":
        return _wrapper()
    raise AttributeError(name)


def _config(card):
    """nvalchemi's ModelConfig of a card; nvalchemi itself needs to differentiate nothing."""
    base = package()[0]
    outputs = {NAMES.get(k, k) for k in card.outputs}
    if not card.supports_pbc or "position_gradients" not in card.outputs:
        outputs -= {"stress"}
    return base.ModelConfig(
        outputs=outputs, active_outputs={NAMES.get(k, k) for k in card.active_outputs} & outputs - {"stress"},
        supports_pbc=card.supports_pbc, needs_pbc=card.needs_pbc,
        required_inputs=card.required_inputs & set(EXTRAS), optional_inputs={"cell", "pbc", *(card.optional_inputs & set(EXTRAS))},
        neighbor_config=None if card.cutoff is None else base.NeighborConfig(cutoff=card.cutoff),
    )  # fmt: skip


def _old_card(config, embeddings):
    """The ModelCard of nvalchemi's first guide; a plain namespace where there is no such class any
    more."""
    fields = {f"supports_{old}": name in config.outputs for name, old in OLD.items()} | {
        f"supports_{k}_embeddings": embeddings for k in ("node", "graph")
    }
    never = (
        "forces_via_autograd",
        "supports_edge_embeddings",
        "needs_node_charges",
        "includes_dispersion",
        "includes_long_range_electrostatics",
    )
    fields |= {
        name: getattr(config, name) for name in ("supports_pbc", "needs_pbc", "neighbor_config")
    } | dict.fromkeys(never, False)
    fields |= {
        "supports_non_batch": True,
        "needs_system_charges": "charge" in config.required_inputs,
    }
    return getattr(package()[0], "ModelCard", SimpleNamespace)(**fields)


def _geometry(data):
    """Positions, cells, boundaries and systems of a Batch or AtomicData."""
    pos, cell, pbc, batch = (
        getattr(data, name, None) for name in ("positions", "cell", "pbc", "batch_idx")
    )
    systems = 1 if batch is None else data.num_graphs
    if cell is not None and pbc is None:
        raise ValueError(
            message("pbc with a cell", "a cell alone", "say which axes are periodic: pbc (B,3)")
        )
    return {
        "pos": pos, "cell": pos.new_zeros(systems, 3, 3) if cell is None else cell, "pbc": pos.new_zeros(systems, 3, dtype=torch.bool) if pbc is None else pbc,
        "batch": pos.new_zeros(len(pos), dtype=torch.int64) if batch is None else batch.long(),
    }  # fmt: skip


def _edges(data, inputs, cutoff):
    """The neighbour list in the data, without unused slots and what is beyond the cutoff; nothing
    if there is none."""
    pairs, shifts = (
        getattr(data, name, None) for name in ("neighbor_list", "neighbor_list_shifts")
    )
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
    pairs, shifts = (
        pairs.long(),
        torch.zeros_like(pairs[:, :1]).expand(-1, 3) if shifts is None else shifts,
    )
    used = (pairs < len(inputs["pos"])).all(1)
    edges = {"edge_index": pairs[used].T, "cell_offsets": shifts[used].long()}
    near = geometry.edge_vectors(inputs | edges).detach().norm(dim=-1) < cutoff
    return {"edge_index": edges["edge_index"][:, near], "cell_offsets": edges["cell_offsets"][near]}


def _stress(out, inputs):
    W = strain.virial(
        out["position_gradients"],
        out["cell_gradients"],
        *(inputs[k] for k in ("pos", "batch", "cell")),
    )
    return sign() * strain.stress(W, inputs["cell"], inputs["pbc"])
