"""Potentials across the border: potential, jax_potential, edges, torch_potential."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from bridge import contract
from bridge.call import one_of
from bridge.card import Card
from bridge.errors import message
from bridge.join.calls import as_buckets, module, to_jax, to_torch
from jax_side.potentials import potential as jax_side_potential
from jax_side.potentials.edges import Edges
from jax_side.potentials.outputs import Outputs
from torch_side.calls.adapted import Contracted
from torch_side.calls.buckets import Buckets
from torch_side.potentials.model import Model, Wrapped
from torch_side.potentials.neighbors import Padded as PaddedEdges
from torch_side.potentials.potential import JaxPotential

# The ladder of graph models: unused slots have an index that no system reaches.
EDGES = Buckets(
    {"edge_index": "2 E", "cell_offsets": "E 3"}, fill={"edge_index": 2**31 - 1}, growth=1.25
)


def potential(
    model,
    *,
    atomic_numbers,
    pbc=None,
    batch=None,
    n_systems=1,
    gradients="model",
    outputs=(),
    cutoff=None,
    card=None,
    batched="graph",
    lane="auto",
    **extras,
):
    """A torch potential as a differentiable JAX energy: `energy(positions, cell)`, in eV and
    Angstrom.

    `model` is a torch callable of the potential contract and what makes it a JAX model is said in
    `jax_potential`: gradients=, outputs=, cutoff=, card=, batched=, lane=. What the returned object
    can do, and its other arguments (the atoms, their boundaries, systems, and `extras` such as
    charge or edge_index): see jax_side.potentials.potential.potential.

    Value and gradient cost one call into torch: one forward, one backward. Higher orders go by
    double backward; Hessians record the forward once for all rows.

    Raises: as `jax_potential`, and as jax_side.potentials.potential.potential does.

    >>> import jax, torch, bridge
    >>> spring = lambda x: {"energy": (x["pos"] ** 2).sum()[None]}
    >>> energy = bridge.potential(spring, atomic_numbers=jax.numpy.array([1, 1]), gradients="autograd")
    >>> jax.jit(jax.grad(energy))(jax.numpy.ones((2, 3))).tolist()
    [[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]]
    """
    bridged = jax_potential(
        model,
        gradients=gradients,
        outputs=outputs,
        cutoff=cutoff,
        card=card,
        batched=batched,
        lane=lane,
    )
    return jax_side_potential.potential(
        bridged, atomic_numbers=atomic_numbers, pbc=pbc, batch=batch, n_systems=n_systems, **extras
    )


def jax_potential(
    model, *, gradients="model", outputs=(), cutoff=None, card=None, batched="graph", lane="auto"
):
    """A torch potential as a JAX model of the contract: a dict of arrays in, a dict of arrays out,
    for jax_side.potentials.direct and engines.

    `model` is a torch callable of the potential contract (bridge.contract): it takes one dict of
    tensors (pos (N,3), cell (B,3,3) by rows, pbc (B,3), batch (N,), atomic_numbers (N,) and what
    else the caller gives), and returns one. With `gradients="model"` that dict holds energy (B,),
    position_gradients g = dE/dr (N,3) and cell_gradients G = dE/dh at fixed Cartesian positions
    (B,3,3); with `gradients="autograd"` it holds energy alone, and torch.autograd makes g and G in
    the same pass.

    `outputs` names further outputs of bridge.contract.OUTPUTS that the result is to have
    (node_energies, charges, magmoms, dipole, embeddings, hessian, ...). A model that is given edges
    takes edge_index (2,E) and cell_offsets (E,3), with unused slots of index >= N (`bridge.edges`
    makes them); `cutoff` (Angstrom) makes them on the torch side instead, at each call, without
    padding or capacity. The model never sees padding: unused slots, atoms of number 0, systems
    without atoms; and edges beyond the cutoff are left out. `card` (bridge.Card) says what a model
    of your own has and needs; the models of this package carry theirs. `batched` is how vmap is
    served: "graph", all structures as the systems of one batched call (the model must keep systems
    apart); or "sequential", one call after another. `lane` is that of `to_jax`.

    The result has the model's `.card`, its active outputs among it, and is equal for equal
    arguments. Its energy differentiates by torch, not by the gradients beside it:
    jax_side.potentials.potential and jax_side.potentials.direct make energies that do.

    Raises: ValueError where card, or an output that is asked for, and model don't fit; as `to_jax`
    and torch_side.potentials.graph.evaluate.

    >>> import bridge, jax.numpy as jnp
    >>> model = bridge.jax_potential(lambda x: (x["pos"] ** 2).sum()[None], gradients="autograd")
    >>> inputs = {"pos": jnp.ones((2, 3)), "cell": jnp.zeros((1, 3, 3)), "pbc": jnp.zeros((1, 3), bool),
    ...           "batch": jnp.zeros(2, int), "atomic_numbers": jnp.ones(2, int)}
    >>> model(inputs)["position_gradients"][0].tolist()
    [2.0, 2.0, 2.0]
    """
    model = _model(
        model, one_of("gradients", gradients, ("model", "autograd")), tuple(outputs), cutoff, card
    )
    one_of("batched", batched, ("graph", "sequential"))
    bridged = to_jax(
        Contracted(model),
        outputs=_Declared(model.card),
        batched=batched,
        derivatives="autograd",
        lane=lane,
    )
    bridged.card = model.card
    return bridged


def edges(cutoff, capacity, *, ordered=False, lane="auto"):
    """Neighbour lists in a fixed number of slots, for graph models in JAX: `find(positions,
    cell=None, pbc=None, batch=None)`.

    `find` takes positions (N,3) in Angstrom and cell (3,3) by rows, or (B,3,3) with batch (N,) int,
    sorted; pbc as in `potential` (None: all axes if there is a cell). It returns {"edge_index":
    (2,capacity), "cell_offsets": (capacity,3)}, int32, of all directed edges shorter than `cutoff`
    (Angstrom), periodic images included, made by vesin; unused slots have the index N. jit, scan
    and vmap compose with it; derivatives are zero. With a cutoff longer than the model's (a skin)
    the list serves several steps: energy(positions, cell, **edges), for a potential's models leave
    out what is beyond their own cutoff.

    `ordered` sorts the edges by centre. Such a list takes up to twice as long to make; up to 10^5
    atoms a model gains nothing from it that was seen, at 10^6 it ran 1.1 to 1.35 times as fast,
    which pays where a list serves a few steps.

    Raises: ValueError for a capacity that is too small, saying how many slots are needed; as
    torch_side.potentials.neighbors.neighbor_list.

    >>> import bridge, jax.numpy as jnp
    >>> bridge.edges(1.5, 3)(jnp.array([[0.0, 0, 0], [1, 0, 0]]))["edge_index"].tolist()
    [[0, 1, 2], [1, 0, 2]]
    """
    slots = _Slots(
        one_of(
            "capacity",
            capacity,
            [capacity] if isinstance(capacity, int) and capacity > 0 else (),
            "a positive int",
        )
    )
    return Edges(
        to_jax(
            PaddedEdges(cutoff, capacity, ordered), outputs=slots, batched="sequential", lane=lane
        )
    )


def torch_potential(model, params=None, *, gradients="model", cutoff=None, buckets=None, card=None):
    """A JAX potential as an nn.Module of the potential contract: `module(inputs)` is a dict of
    tensors, by one JAX call.

    `model` is a JAX callable of one dict, or of (params, dict) with `params` given, whose arrays
    then are Parameters as in `module` and train on energies, forces and cell gradients. The dict
    has the keys of bridge.contract; N atoms, B systems:

        pos (N,3) float, cell (B,3,3) float by rows, pbc (B,3) bool, batch (N,) int sorted,
        atomic_numbers (N,) int

    and whatever else the caller passes (charge, spin, ...). Integers of the contract may be int64:
    JAX gets them as int32. With `gradients="model"` the model returns energy (B,),
    position_gradients g = dE/dr at fixed cell (N,3) and cell_gradients G = dE/dh at fixed Cartesian
    positions (B,3,3), in eV and Angstrom; with `gradients="autodiff"` it returns energy (B,), or a
    dict with it, and JAX makes g and G in the same program. Further outputs are passed on. Forces
    are -g.

    `cutoff` (Angstrom) is for graph models: edge_index (2,E) and cell_offsets (E,3) are then made
    by torch_side.potentials.neighbors.neighbor_list at each call, unless the caller passes
    edge_index (torch.compile and vmap over positions need that). As the number of edges changes
    from step to step, with a cutoff they are padded by unused slots (index >= N), up to a quarter
    more, in a few programs; `buckets=`, as in `to_torch`, takes another ladder, and False none.

    Energies differentiate in torch by the model's own gradients: torch.autograd.grad(energy.sum(),
    pos) is g, in cell it is G; all else, second derivatives included, differentiates the model.
    Without a graph (torch.no_grad, or neither inputs nor parameters that require grad) nothing is
    kept. Inputs are read where they lie, results are fresh memory; float dtypes are never cast.

    Raises, when it is called: ValueError for inputs or outputs outside of the contract (checked
    once for each set of shapes and dtypes, as JAX traces), and as neighbor_list does; otherwise as
    `to_torch`, with params as `module`. ValueError for buckets with a mask: it is the index that
    marks an unused slot; and for a cutoff that is not the card's.

    The module has a `card` (bridge.Card; by default: energy and gradients, this cutoff, and the
    model's word where it has an attribute `batches` that it keeps systems apart) and adds to other
    models: `a + b`.

    >>> import bridge, jax, torch
    >>> spring = lambda p, x: p["k"] * jax.ops.segment_sum((x["pos"] ** 2).sum(-1), x["batch"], num_segments=len(x["cell"]))
    >>> model = bridge.torch_potential(spring, {"k": jax.numpy.ones(())}, gradients="autodiff")
    >>> inputs = {"pos": torch.ones(2, 3), "cell": torch.zeros(1, 3, 3), "pbc": torch.zeros(1, 3, dtype=torch.bool),
    ...           "batch": torch.zeros(2, dtype=torch.int64), "atomic_numbers": torch.ones(2, dtype=torch.int64)}
    >>> out = model(inputs)
    >>> out["energy"].tolist(), out["position_gradients"][0].tolist()
    ([6.0], [2.0, 2.0, 2.0])
    >>> out["position_gradients"].square().sum().backward()
    >>> model.get_parameter("model.k").grad
    tensor(48.)
    """
    outputs = Outputs(
        model, one_of("gradients", gradients, ("model", "autodiff")), params is not None
    )
    buckets = EDGES if buckets is None and cutoff is not None else buckets and as_buckets(buckets)
    if buckets and buckets.mask:
        raise ValueError(
            message(
                "buckets without a mask",
                f"mask={buckets.mask}",
                "an index >= N marks an unused slot: fill edge_index with one",
            )
        )
    if None not in (card, cutoff) and card.cutoff not in (None, cutoff):
        got = f"{cutoff}, and {card.cutoff} on the card"
        raise ValueError(message("one cutoff", got, "pass the same with both"))
    if card is None:
        neighbors, vouched = None if cutoff is None else "own", getattr(model, "batches", False)
        card = Card(
            cutoff=cutoff, neighbor_list=neighbors, optional_inputs=contract.INFO, batches=vouched
        )
    return JaxPotential(
        to_torch(outputs, buckets=buckets)
        if params is None
        else module(outputs, params, buckets=buckets),
        cutoff,
        card,
    )


def _model(model, gradients, outputs, cutoff, card) -> Model:
    """The torch model with a card, its outputs active."""
    if isinstance(model, Model):
        if cutoff is not None or card is not None:
            raise ValueError(
                message(
                    f"no cutoff and no card for {type(model).__name__}",
                    "one of them",
                    "it carries its own card: model.card",
                )
            )
        return model.asking(*outputs) if set(outputs) - model.card.active_outputs else model
    neighbors = None if cutoff is None else "own"
    if card is None:
        asked = {*contract.ENERGY_AND_GRADIENTS, *outputs}
        card = Card(
            outputs=asked, cutoff=cutoff, neighbor_list=neighbors, optional_inputs=contract.INFO
        )
    elif cutoff not in (None, card.cutoff):
        raise ValueError(
            message(
                "one cutoff", f"{cutoff}, and {card.cutoff} on the card", "pass it with one of them"
            )
        )
    return Wrapped(model, card.asking(*outputs), gradients)


@dataclass(frozen=True)
class _Declared:
    """Types of a model's outputs."""

    card: Card

    def __call__(self, inputs):
        shapes = self.card.shapes(inputs["pos"].shape[0], inputs["cell"].shape[0])
        return {k: jax.ShapeDtypeStruct(shape, inputs["pos"].dtype) for k, shape in shapes.items()}


@dataclass(frozen=True)
class _Slots:
    """Types of a padded neighbour list."""

    capacity: int

    def __call__(self, inputs):
        shapes = {"edge_index": (2, self.capacity), "cell_offsets": (self.capacity, 3)}
        return {k: jax.ShapeDtypeStruct(shape, "int32") for k, shape in shapes.items()}
