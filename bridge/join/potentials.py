"""Potentials across the border: potential, jax_potential, edges, torch_potential."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import jax
import numpy as np
import torch
from jaxtyping import Int

from bridge import contract
from bridge.call import one_of
from bridge.card import Card
from bridge.errors import message
from bridge.join.calls import BucketsOrShapes, Lane, as_buckets, module, to_jax, to_torch
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


TorchModel = Callable[[dict[str, torch.Tensor]], Any]  # of the contract, or of the energy alone


class JaxModel(Protocol):
    """A JAX model of the contract, and its card."""

    card: Card

    def __call__(self, inputs: Mapping[str, Any], /) -> dict[str, jax.Array]:
        """Returns the active outputs of the card, for the inputs of the contract."""
        ...


def potential(
    model: TorchModel,
    *,
    atomic_numbers: Int[np.ndarray, " N"] | Int[jax.Array, " N"],
    pbc: jax_side_potential.Pbc | None = None,
    batch: Int[np.ndarray, " N"] | Int[jax.Array, " N"] | None = None,
    n_systems: int = 1,
    gradients: Literal["model", "autograd"] = "model",
    outputs: Iterable[str] = (),
    cutoff: float | None = None,
    card: Card | None = None,
    batched: Literal["graph", "sequential"] = "graph",
    lane: Lane = "auto",
    name: str | None = None,
    **extras: Any,
) -> jax_side_potential.Potential:
    """Returns a torch potential as a differentiable JAX energy: `energy(positions, cell)`, in eV
    and Angstrom.

    `model` is a torch callable of the potential contract. `jax_potential` says what makes it a JAX
    model: gradients=, outputs=, cutoff=, card=, batched=, lane=, name=.
    jax_side.potentials.potential.potential says what the returned object can do, and what its other
    arguments are: the atoms, their boundaries, systems, and `extras` such as charge or edge_index.

    Value and gradient together cost one call into torch, of one forward and one backward. Higher
    orders are by double backward. Hessians record the forward once for all rows.

    Raises: what `jax_potential` and jax_side.potentials.potential.potential raise.

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
        name=name,
    )
    return jax_side_potential.potential(
        bridged, atomic_numbers=atomic_numbers, pbc=pbc, batch=batch, n_systems=n_systems, **extras
    )


def jax_potential(
    model: TorchModel,
    *,
    gradients: Literal["model", "autograd"] = "model",
    outputs: Iterable[str] = (),
    cutoff: float | None = None,
    card: Card | None = None,
    batched: Literal["graph", "sequential"] = "graph",
    lane: Lane = "auto",
    name: str | None = None,
) -> JaxModel:
    """Returns a torch potential as a JAX model of the contract, for jax_side.potentials.direct and
    engines. It takes a dict of arrays and returns one.

    `model` is a torch callable of the potential contract (bridge.contract). It takes one dict of
    tensors: pos (N,3), cell (B,3,3) by rows, pbc (B,3), batch (N,), atomic_numbers (N,), and what
    else the caller gives. It returns another. With `gradients="model"` that holds energy (B,),
    position_gradients g = dE/dr (N,3) and cell_gradients G = dE/dh at fixed Cartesian positions
    (B,3,3). With `gradients="autograd"` it holds the energy alone, and torch.autograd makes g and G
    in the same pass.

    `outputs` names further outputs of bridge.contract.OUTPUTS that the result is to have
    (node_energies, charges, magmoms, dipole, embeddings, hessian, ...).

    A model that is given edges takes edge_index (2,E) and cell_offsets (E,3), with unused slots of
    index >= N; `bridge.edges` makes them. With `cutoff` (Angstrom) they are made on the torch side
    instead, at each call, without padding or capacity. The model never sees padding, that is unused
    slots, atoms of number 0 and systems without atoms. Edges beyond the cutoff are left out.

    `card` (bridge.Card) says what a model of your own has and needs; the models of this package
    carry theirs. `batched` is how vmap is served. "graph" makes all structures the systems of one
    batched call, so that the model must keep systems apart; "sequential" makes one call after
    another. `lane` and `name` are those of `to_jax`. On lane="native" a graph model is given its
    edges, and keeps systems apart, for unused slots of edges lie in a system of their own
    (torch_side.potentials.static).

    The result has the model's `.card`, which also tells the active outputs. It is equal for equal
    arguments. Its energy is differentiated by torch, without use of the gradients that the model
    returns. jax_side.potentials.potential and jax_side.potentials.direct make energies that use
    them.

    Raises: ValueError where the model does not fit the card, or an output that is asked for. A call
    raises what `to_jax` and torch_side.potentials.graph.evaluate raise.

    >>> import bridge, jax.numpy as jnp
    >>> model = bridge.jax_potential(lambda x: (x["pos"] ** 2).sum()[None], gradients="autograd")
    >>> inputs = {"pos": jnp.ones((2, 3)), "cell": jnp.zeros((1, 3, 3)), "pbc": jnp.zeros((1, 3), bool),
    ...           "batch": jnp.zeros(2, int), "atomic_numbers": jnp.ones(2, int)}
    >>> model(inputs)["position_gradients"][0].tolist()
    [2.0, 2.0, 2.0]
    """
    one_of("gradients", gradients, ("model", "autograd"))
    carded = _model(model, gradients, tuple(outputs), cutoff, card)
    one_of("batched", batched, ("graph", "sequential"))
    bridged: Any = to_jax(
        Contracted(carded),
        outputs=_Declared(carded.card),
        batched=batched,
        derivatives="autograd",
        lane=lane,
        name=name,
    )
    bridged.card = carded.card
    return bridged


def edges(
    cutoff: float,
    capacity: int,
    *,
    ordered: bool = False,
    lane: Literal["auto", "ffi", "host"] = "auto",
) -> Edges:
    """Returns a neighbour list for graph models in JAX, in a fixed number of slots: a function
    `find(positions, cell=None, pbc=None, batch=None)`.

    `find` takes positions (N,3) in Angstrom and cell (3,3) by rows, or cell (B,3,3) with batch (N,)
    int, sorted. pbc is that of `potential`; None means all axes if there is a cell. `find` returns
    {"edge_index": (2,capacity), "cell_offsets": (capacity,3)}, both int32: all directed edges
    shorter than `cutoff` (Angstrom), periodic images included, made by vesin. Unused slots have the
    index N. jit, scan and vmap compose with it, and derivatives are zero.

    With a cutoff longer than the model's (a skin) the list serves several steps:
    energy(positions, cell, **edges). The models of a potential leave out what is beyond their own
    cutoff.

    `ordered` sorts the edges by centre. Such a list takes up to twice as long to make. Up to 10^5
    atoms no gain for a model was seen. At 10^6 atoms a model ran 1.1 to 1.35 times as fast, which
    pays if a list serves a few steps.

    Raises: ValueError for a capacity that is no positive int. `find` raises ValueError if the
    capacity is too small, saying how many slots are needed, and what
    torch_side.potentials.neighbors.neighbor_list raises.

    >>> import bridge, jax.numpy as jnp
    >>> bridge.edges(1.5, 3)(jnp.array([[0.0, 0, 0], [1, 0, 0]]))["edge_index"].tolist()
    [[0, 1, 2], [1, 0, 2]]
    """
    given = [capacity] if isinstance(capacity, int) and capacity > 0 else []
    one_of("capacity", capacity, given, "a positive int")
    one_of("lane", lane, ("auto", "ffi", "host"))
    find = PaddedEdges(cutoff, capacity, ordered)
    return Edges(to_jax(find, outputs=_Slots(capacity), batched="sequential", lane=lane))


def torch_potential(
    model: Callable[..., Any],
    params: Any = None,
    *,
    gradients: Literal["model", "autodiff"] = "model",
    outputs: Iterable[str] = (),
    cutoff: float | None = None,
    buckets: BucketsOrShapes | Literal[False] | None = None,
    card: Card | None = None,
) -> JaxPotential:
    """Returns a JAX potential as an nn.Module of the potential contract: `module(inputs)` is a dict
    of tensors, made by one JAX call.

    `model` is a JAX callable of one dict. If `params` are given, it is a callable of (params,
    dict): their arrays are then Parameters as in `module`, and train on energies, forces and cell
    gradients. The dict has the keys of bridge.contract, for N atoms and B systems:

        pos (N,3) float, cell (B,3,3) float by rows, pbc (B,3) bool, batch (N,) int sorted,
        atomic_numbers (N,) int

    and whatever else the caller passes (charge, spin, ...). Integers of the contract may be int64;
    JAX gets them as int32. With `gradients="model"` the model returns energy (B,),
    position_gradients g = dE/dr at fixed cell (N,3) and cell_gradients G = dE/dh at fixed Cartesian
    positions (B,3,3), in eV and Angstrom. With `gradients="autodiff"` it returns energy (B,), or a
    dict that has it, and JAX makes g and G in the same program. Further outputs are passed on.
    Forces are -g. `outputs` names further outputs of bridge.contract.OUTPUTS that the model has, for
    the card; node_virials are made by JAX with gradients="autodiff".

    `cutoff` (Angstrom) is for graph models. edge_index (2,E) and cell_offsets (E,3) are then made
    by torch_side.potentials.neighbors.neighbor_list at each call, unless the caller passes
    edge_index (torch.compile and vmap over positions need that). As the number of edges changes
    from step to step, they are padded by unused slots (index >= N), at most by a quarter, so that a
    few programs serve all steps. `buckets=`, as in `to_torch`, sets another ladder, and False none.

    The first derivatives of an energy in torch are the model's own gradients:
    torch.autograd.grad(energy.sum(), pos) is g, and in cell it is G. All other derivatives, second
    ones included, differentiate the model. Without a graph (torch.no_grad, or neither inputs nor
    parameters that require grad) nothing is kept. Inputs are read where they lie, results are fresh
    memory, and float dtypes are never cast.

    The module has a `card` (bridge.Card). By default it says energy and gradients, this cutoff, and
    that systems are kept apart if the model has an attribute `batches` that is True. The module
    adds to other models: `a + b`.

    Raises: ValueError for buckets with a mask, since an index marks the unused slots, and for a
    cutoff that is not the card's. A call raises ValueError for inputs or outputs outside of the
    contract (checked once for each set of shapes and dtypes, as JAX traces), and what neighbor_list
    and `to_torch` raise, with params what `module` raises.

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
    one_of("gradients", gradients, ("model", "autodiff"))
    names = set(outputs)
    made = "node_virials" in names and gradients == "autodiff"
    whole = Outputs(model, gradients, params is not None, made)
    ladder = as_buckets(buckets) if buckets else None
    if buckets is None and cutoff is not None:
        ladder = EDGES
    if ladder and ladder.mask:
        do = "an index >= N marks an unused slot: fill edge_index with one"
        raise ValueError(message("buckets without a mask", f"mask={ladder.mask}", do))
    if card is not None and cutoff is not None and card.cutoff not in (None, cutoff):
        got = f"{cutoff}, and {card.cutoff} on the card"
        raise ValueError(message("one cutoff", got, "pass the same with both"))
    if card is None:
        card = Card(
            outputs={*contract.ENERGY_AND_GRADIENTS, *names},
            cutoff=cutoff,
            neighbor_list=None if cutoff is None else "own",
            optional_inputs=contract.CONDITIONS,
            batches=getattr(model, "batches", False),
        )
    card = card.asking(*names)
    if params is None:
        return JaxPotential(to_torch(whole, buckets=ladder), cutoff, card)
    return JaxPotential(module(whole, params, buckets=ladder), cutoff, card)


def _model(
    model: TorchModel,
    gradients: Literal["model", "autograd"],
    outputs: tuple[str, ...],
    cutoff: float | None,
    card: Card | None,
) -> Model:
    """The torch model with a card, on which its outputs are active."""
    if isinstance(model, Model):
        if cutoff is not None or card is not None:
            expected = f"no cutoff and no card for {type(model).__name__}"
            do = "it carries its own card: model.card"
            raise ValueError(message(expected, "one of them", do))
        return model.asking(*outputs) if set(outputs) - model.card.active_outputs else model
    if card is None:
        card = Card(
            outputs={*contract.ENERGY_AND_GRADIENTS, *outputs},
            cutoff=cutoff,
            neighbor_list=None if cutoff is None else "own",
            optional_inputs=contract.CONDITIONS,
        )
    elif cutoff not in (None, card.cutoff):
        got = f"{cutoff}, and {card.cutoff} on the card"
        raise ValueError(message("one cutoff", got, "pass it with one of them"))
    return Wrapped(model, card.asking(*outputs), gradients)


@dataclass(frozen=True)
class _Declared:
    """The types of a model's outputs, as its card has them."""

    card: Card

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
        shapes = self.card.shapes(inputs["pos"].shape[0], inputs["cell"].shape[0])
        return {k: jax.ShapeDtypeStruct(shape, inputs["pos"].dtype) for k, shape in shapes.items()}


@dataclass(frozen=True)
class _Slots:
    """The types of a padded neighbour list."""

    capacity: int

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
        shapes = {"edge_index": (2, self.capacity), "cell_offsets": (self.capacity, 3)}
        return {k: jax.ShapeDtypeStruct(shape, "int32") for k, shape in shapes.items()}
