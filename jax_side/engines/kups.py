"""kUPS (CuspAI, PyPI `kups`, Python >= 3.12): a potential as the model of its direct potentials,
for its MD and relaxation."""

# kUPS needs a newer Python than the one that this package is developed with.
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from bridge.call import one_of
from bridge.card import Card
from bridge.contract import ENERGY_AND_GRADIENTS, check_inputs, check_outputs
from bridge.errors import message, missing
from jax_side.potentials.outputs import check_unused, marked
from jax_side.potentials.potential import UNKNOWN, Potential

# asked for -> outputs of the contract
KINDS = {
    "positions and cell": ENERGY_AND_GRADIENTS,
    "positions": ENERGY_AND_GRADIENTS[:2],
}

Model = Callable[
    [dict[str, jax.Array]], dict[str, jax.Array]
]  # from the contract's dict to its own
Kind = Literal["positions and cell", "positions"]  # the keys of KINDS


def model(
    potential: Model | Potential,
    *,
    gradients: Kind = "positions and cell",
    filter: Any = None,
    extras: Callable[[Any], dict[str, jax.Array]] | None = None,
) -> Callable[[Any], Any]:
    """Returns the potential as a model function, the first argument of
    kups.potential.mliap.direct.make_direct_mliap_potential.

    `potential` is one of two things:

    - a JAX model of the contract, from a dict of arrays to one with energy (B,) eV,
      position_gradients g = dE/dr at fixed cell (N,3) and cell_gradients G = dE/dh at fixed
      Cartesian positions (B,3,3), eV/Angstrom. A torch model becomes one by bridge.jax_potential, a
      JAX model of an energy alone by jax_side.potentials.strain.with_gradients.
    - an energy of bridge.potential. Its model and its extras are used; the atoms are those of
      kUPS's state.

    The result runs wherever the bridge does, on the CPU too. kUPS calls it with its graph (see
    `inputs`) and gets a kUPS WithPatch of a kUPS PotentialOut:

        total_energies   a Table of the systems, eV
        gradients        "positions and cell": kUPS's PositionsAndCell, Tables of g and of the cell,
                         whose frame holds dE/d(its parameters), as kUPS's MD wants it. "positions":
                         g alone, an Array (N,3)
        hessians         EMPTY

    Atoms that kUPS marks as padding have zero gradients. With `filter`, a relaxation filter of
    kups.application.potential.filter (POSITIONS_ONLY, FRECHET_FILTER ...), the gradients are pulled
    back to its degrees of freedom, as kUPS's relaxation wants them.

    `extras` is a function of kUPS's input (its fields: parameters, what model_view gives, and
    graph) that returns further inputs of the contract, e.g. `lambda inp: {"charge":
    inp.parameters}`. Charge and spin are never guessed. No dtype is cast: kUPS's own programs
    enable x64, so load the model in float64 for these.

    Models of equal arguments are equal, so that kUPS compiles once. One evaluation serves energy
    and gradients. If kUPS differentiates the result again (a hessian lens), the derivative is that
    of the model.

    Raises: TypeError if `potential` can't be called; ValueError for another `gradients`, and for a
    filter without cell gradients; ImportError without kUPS. When kUPS traces the result, ValueError
    for inputs that the card (if there is one) does not have, and for outputs outside the contract.

    >>> import bridge, torch_side.models.sevennet as sevennet                                       # doctest: +SKIP
    >>> fn = model(bridge.jax_potential(sevennet.SevenNet("7net-0", dtype=torch.float64)))           # doctest: +SKIP
    >>> potential = make_direct_mliap_potential(fn, particles, systems, neighborlist, lambda s: None)  # doctest: +SKIP
    """
    _kups()
    one_of("gradients", gradients, KINDS)
    if filter is not None and gradients != "positions and cell":
        raise ValueError(
            message(
                'gradients="positions and cell" with a filter',
                repr(gradients),
                "a filter takes both: kUPS drops what it does not move",
            )
        )
    return _Model(_callable(potential), gradients, filter, extras)


def build(
    potential: Model | Potential,
    state: Any,
    filter: Any = None,
    *,
    cutoff: float | None = None,
    extras: Callable[[Any], dict[str, jax.Array]] | None = None,
    neighbors: Callable[..., Any] | None = None,
) -> tuple[Any, Any]:
    """Returns `(kUPS potential, cutoff)` for a kUPS state, as `config.potential.build(state,
    filter)` of kUPS's own programs does.

    `potential`, `filter` and `extras` are as in `model`. `state` is a kUPS Lens into a state with
    particles (that have atomic_numbers), systems and neighborlist_params, such as
    identity_lens(MdState) or identity_lens(RelaxState). `cutoff` is in Angstrom, by default that of
    the potential's card. It is returned as a Table of kUPS, for
    UniversalNeighborlistParameters.estimate. `neighbors` is kUPS's neighborlist_factory (default
    AdaptiveNeighborList.from_state).

    Raises: as `model`; ValueError for a cutoff that is shorter than the card's, and where neither
    card nor caller gives one, since kUPS makes a neighbour list in any case.

    >>> potential, cutoff = build(model, identity_lens(MdState))                     # doctest: +SKIP
    >>> propagator = make_md_propagator(identity_lens(MdState), "verlet", potential)  # doctest: +SKIP
    """
    fn = model(potential, filter=filter, extras=extras)
    core, parts = _kups()
    own = _card(potential).cutoff
    if own is not None and cutoff is not None and cutoff < own:
        expected = f"a cutoff of at least {own:.7g} Angstrom, the potential's"
        do = "leave cutoff out: edges would be missing"
        raise ValueError(message(expected, f"{cutoff:.7g}", do))
    cutoff = own if cutoff is None else cutoff
    if cutoff is None:
        raise ValueError(
            message(
                "a cutoff in Angstrom, by the card or by cutoff=",
                "none",
                "pass the reach of the neighbour list that kUPS makes",
            )
        )
    table = core.data.Table((core.typing.SystemId(0),), jnp.array([cutoff], float))
    factory = neighbors or core.neighborlist.AdaptiveNeighborList.from_state
    views = (
        state.focus(lambda s: s.particles),
        state.focus(lambda s: s.systems),
        lambda s: factory(state(s), table),
    )
    return parts.mliap.direct.make_direct_mliap_potential(fn, *views, lambda s: None), table


def inputs(graph: Any) -> tuple[dict[str, jax.Array], Int[jax.Array, " N"]]:
    """Returns a kUPS graph as the contract has it: `(inputs, place)`, where inputs is a dict of
    pos, atomic_numbers, cell, pbc, batch, edge_index and cell_offsets.

    `graph` is a kUPS HyperGraph of N particles, B systems and E edge slots. Shapes are as in
    bridge.contract. Atoms are sorted by system: place (N,) int says where each of kUPS's particles
    went, so that out["position_gradients"][place] is in kUPS's order. Slots that kUPS does not use
    have an index >= N. Particles that it does not use (those of a system beyond the last) have
    atomic number 0, and come last. pbc is what the cell says, the same for all systems. The cell of
    an open system is kUPS's bounding box.
    """
    atoms, cell = graph.particles.data, graph.systems.data.cell
    n_atoms, n_systems = atoms.positions.shape[0], cell.vectors.shape[0]
    real = atoms.system.valid_mask
    batch = jnp.where(real, atoms.system.indices_in(graph.systems.keys), n_systems)
    order = jnp.argsort(batch, stable=True)
    place = jnp.zeros(n_atoms, jnp.int32).at[order].set(jnp.arange(n_atoms, dtype=jnp.int32))
    slots = jnp.append(jnp.where(real, place, n_atoms), n_atoms)  # no edge to padding
    index = jnp.minimum(graph.edges.indices.indices_in(graph.particles.keys), n_atoms).T
    return {
        "pos": jnp.where(real[:, None], atoms.positions, 0)[order],
        "atomic_numbers": jnp.where(real, atoms.atomic_numbers, 0)[order],
        "cell": cell.vectors,
        "pbc": jnp.broadcast_to(jnp.asarray(cell.periodic, bool), (n_systems, 3)),
        "batch": jnp.minimum(batch[order], n_systems - 1).astype(jnp.int32),
        "edge_index": slots[index].astype(jnp.int32),
        "cell_offsets": graph.edges.shifts[:, 0].astype(jnp.int32),
    }, place


@dataclass(frozen=True)
class _Model:
    """What `model` returns; its docstring is the documentation."""

    potential: Model | Potential
    gradients: Kind
    filter: Any
    extras: Callable[[Any], dict[str, jax.Array]] | None

    def __call__(self, inp: Any) -> Any:
        core, parts = _kups()
        energy, g, G = evaluate(self.potential, inp, self.gradients, self.extras)
        systems, particles = inp.graph.systems, inp.graph.particles
        gradients = g
        if self.gradients == "positions and cell":
            frames = systems.set_data(_on_frame(core, systems.data.cell, G))
            gradients = parts.common.geometry.PositionsAndCell(particles.set_data(g), frames)
        if self.filter is not None:
            geometry = parts.common.graph.GRAPH_GEOMETRY.get(inp)
            gradients = parts.mliap.direct.filter_pullback(geometry, gradients, self.filter)
        out = core.potential.PotentialOut(systems.set_data(energy), gradients, core.potential.EMPTY)
        return core.patch.WithPatch(out, core.patch.IdPatch())


def evaluate(
    potential: Model | Potential,
    inp: Any,
    gradients: Kind = "positions and cell",
    extras: Callable[[Any], dict[str, jax.Array]] | None = None,
) -> tuple[Float[jax.Array, " B"], Float[jax.Array, "N 3"], Float[jax.Array, "B 3 3"] | None]:
    """Returns energy (B,) eV, g (N,3) in kUPS's order and G (B,3,3), eV/Angstrom, of a kUPS input.

    G is None where the model does not give it, which is allowed if `gradients` is "positions".

    Raises: ValueError as the result of `model` does."""
    given, place = inputs(inp.graph)
    if isinstance(potential, Potential):
        run = potential.model
        given |= _bound(potential)
    else:
        run = potential
    if extras is not None:
        given |= extras(inp)
    sizes = check_inputs(given)
    card, name = _card(potential), getattr(run, "__name__", type(run).__name__)
    card.check_bound(given, name)
    card.check_home(given["pos"])
    card.check_pbc([inp.graph.systems.data.cell.periodic] * sizes[1], name)
    out = marked(run(given), given, check_unused(card, given, name))
    check_outputs(out, *sizes, KINDS[gradients])
    real = inp.graph.particles.data.system.valid_mask
    g = jnp.where(real[:, None], out["position_gradients"][place], 0)
    return out["energy"], g, out.get("cell_gradients")


def _bound(potential: Potential) -> dict[str, jax.Array]:
    """What an energy of bridge.potential was given beside its atoms."""
    return {
        name: jnp.asarray(x)
        for name, x in potential.fixed.items()
        if name not in ("atomic_numbers", "batch")
    }


def _on_frame(core: Any, cell: Any, G: Any) -> Any:
    """kUPS's cell, with dE/d(parameters of its frame) in the place of these parameters."""
    return core.lens.bind(cell, lambda c: c.frame).set(cell.frame.parameter_gradient(G))


def _card(potential: Model | Potential) -> Card:
    """The potential's card, or that of a model which nobody has described."""
    return getattr(potential, "card", None) or UNKNOWN


def _callable(potential: Model | Potential) -> Model | Potential:
    """The potential; TypeError if it can't be called."""
    if not callable(potential):
        expected = "a JAX model of the contract, or an energy of bridge.potential"
        raise TypeError(
            message(expected, type(potential).__name__, "pass bridge.jax_potential(torch_model)")
        )
    return potential


def _kups() -> tuple[Any, Any]:
    """kups.core and kups.potential, with the modules of them that are used here."""
    try:
        import kups.core.data
        import kups.core.lens
        import kups.core.neighborlist
        import kups.core.patch
        import kups.core.potential
        import kups.core.typing
        import kups.potential.common.geometry
        import kups.potential.common.graph
        import kups.potential.mliap.direct
    except ImportError as error:
        raise missing("kups", "potentials in kUPS, on Python 3.12 or later") from error
    return kups.core, kups.potential
