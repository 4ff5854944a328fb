"""NequIP as jax-md has it, as a graph model of the contract.

NequIP is described in Batzner et al., Nat. Commun. 13, 2453 (2022).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from bridge.contract import GRAPH, check_inputs
from bridge.errors import message, missing


def NequIP(
    elements: Iterable[int],
    cutoff: float,
    *,
    layers: int = 2,
    hidden: str = "16x0e + 8x1o",
    harmonics: str = "1x0e + 1x1o",
    radial: int = 16,
    neighbors: float = 12.0,
    scale: float = 1.0,
    shift: float = 0.0,
    seed: int = 0,
    dtype: str = "float32",
) -> tuple[Callable[[Any, dict[str, jax.Array]], dict[str, jax.Array]], Any]:
    """Returns a NequIP with random weights: `(apply, params)`, where apply(params, inputs) is
    {"energy": (B,), "node_energies": (N,)}, in eV.

    Settings. `elements` are the atomic numbers that the network tells apart, and `cutoff` is in
    Angstrom. There are `layers` interaction layers with features `hidden` and spherical harmonics
    `harmonics` (irreps of e3nn; vectors are 1o), and radial networks of two layers of `radial`
    neurons. Sums over neighbours are divided by `neighbors`, their usual number. An atom's energy
    is scale * network + shift, in eV. Weights are drawn from `seed`, as `dtype`. params is flax's
    pytree, owned by the caller.

    Inputs are the dict of the contract with edges: pos (N,3), cell (B,3,3) by rows, pbc (B,3),
    batch (N,) sorted, atomic_numbers (N,), edge_index (2,E), cell_offsets (E,3), with r_ij = r_j -
    r_i + cell_offsets @ cell[batch[i]] and both directions listed. Edges with an index >= N, edges
    longer than the cutoff and atoms of number 0 contribute nothing.

    Wrong values can't be refused while JAX traces, so they become NaN. An atom of another element
    has energy and gradients NaN. A negative index means that edges are missing (see
    jax_side.engines.jax_md.edges), and all energies and gradients are NaN.

    The energy is invariant under rotation, reflection, translation and permutation. It can be
    differentiated in pos, cell and params to any order. For g and G see
    jax_side.potentials.strain.with_gradients, or bridge.torch_potential(apply, params,
    gradients="autodiff"). apply is hashable, equal for equal settings, and can be pickled.

    Raises: ValueError where no element is given or one is given twice, and for a cutoff that is not
    above 0.5; ImportError without jax-md (which brings flax and e3nn_jax). apply raises ValueError
    for inputs outside of the contract or without edges.

    >>> apply, params = NequIP([29], 4.0, layers=1, hidden="4x0e", harmonics="1x0e", radial=4)
    >>> inputs = dict(pos=jnp.zeros((2, 3)).at[1, 0].set(2.5), cell=jnp.zeros((1, 3, 3)), pbc=jnp.zeros((1, 3), bool),
    ...     batch=jnp.zeros(2, int), atomic_numbers=jnp.array([29, 29]), cell_offsets=jnp.zeros((2, 3), int))
    >>> out = apply(params, inputs | {"edge_index": jnp.array([[0, 1], [1, 0]])})
    >>> out["energy"].shape, out["node_energies"].shape
    ((1,), (2,))
    """
    elements, cutoff = tuple(map(int, elements)), float(cutoff)
    if not elements or len(set(elements)) < len(elements) or min(elements) < 1:
        raise ValueError(
            message("atomic numbers, each once", str(elements), "pass elements=[29] for copper")
        )
    if not cutoff > 0.5:  # jax-md's envelope takes the last half Angstrom
        raise ValueError(message("a cutoff above 0.5 Angstrom", str(cutoff), "pass a longer one"))
    settings = dict(
        graph_net_steps=layers,
        radial_net_n_hidden=radial,
        n_neighbors=float(neighbors),
        scale=scale,
        shift=shift,
        hidden_irreps=hidden,
        sh_irreps=harmonics,
    )
    apply = _NequIP(elements, cutoff, tuple(settings.items()))
    return apply, apply.init(seed, dtype)


@dataclass(frozen=True)
class _NequIP:
    """jax-md's network of one graph, which is given each atom as a graph of its own, so that it
    returns the energy of each atom."""

    elements: tuple[int, ...]
    cutoff: float
    settings: tuple[tuple[str, Any], ...]
    batches: ClassVar[bool] = True  # it keeps the systems of one call apart, as bridge.Card has it

    def __call__(self, params: Any, inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
        _, n_systems = check_inputs(inputs, GRAPH)
        dtype, numbers = inputs["pos"].dtype, inputs["atomic_numbers"]
        # Where edges are missing, NaN in the positions makes all forces NaN.
        whole = jnp.where((inputs["edge_index"] < 0).any(), jnp.nan, 1).astype(dtype)
        inputs = inputs | {"pos": whole * inputs["pos"]}
        one_hot = numbers[:, None] == jnp.asarray(self.elements)
        vectors, edges = self._edges(inputs)
        nodes = _call(self._network().apply, params, one_hot, vectors, edges).astype(dtype)
        nodes *= whole
        # A factor, so that for unknown elements forces are NaN, too.
        unknown = jnp.where(numbers == 0, 0, jnp.nan)
        nodes *= jnp.where(one_hot.any(-1), 1, unknown).astype(dtype)
        return {
            "energy": jax.ops.segment_sum(nodes, inputs["batch"], num_segments=n_systems),
            "node_energies": nodes,
        }

    def init(self, seed: int, dtype: str) -> Any:
        """Returns random parameters, a pytree of flax with leaves of `dtype`."""
        vectors, edges = jnp.ones((1, 3), jnp.float32), jnp.zeros((2, 1), int)
        graph = lambda: _graph(jnp.zeros((1, len(self.elements)), bool), vectors, edges)
        draw = jax.jit(lambda key: self._network().init(key, graph()))
        return jax.tree.map(lambda x: x.astype(dtype), draw(jax.random.key(seed)))

    def _network(self) -> Any:
        """jax-md's network with these settings."""
        nequip = _nequip()
        config = nequip.default_config()
        config.update(dict(self.settings), n_elements=len(self.elements), r_max=self.cutoff)
        return nequip.model_from_config(config)

    def _edges(
        self, inputs: dict[str, jax.Array]
    ) -> tuple[Float[jax.Array, "E 3"], Int[jax.Array, "2 E"]]:
        """(vectors (E,3), edge_index (2,E)). Unused slots become edges beyond the cutoff, between
        atoms that exist."""
        pos, cell, (i, j) = inputs["pos"], inputs["cell"], inputs["edge_index"]
        used = (i < len(pos)) & (j < len(pos))
        i, j = jnp.where(used, i, 0), jnp.where(used, j, 0)
        shift = jnp.einsum(
            "ea,eab->eb", inputs["cell_offsets"].astype(cell.dtype), cell[inputs["batch"][i]]
        )
        away = jnp.array([2 * self.cutoff, 0, 0], pos.dtype)
        return jnp.where(used[:, None], pos[j] - pos[i] + shift, away), jnp.stack([i, j])


def _call(
    apply: Callable[..., jax.Array],
    params: Any,
    one_hot: Bool[jax.Array, "N elements"],
    vectors: Float[jax.Array, "E 3"],
    edges: Int[jax.Array, "2 E"],
) -> Float[jax.Array, " N"]:
    """The network's energy of each atom."""
    return apply(params, _graph(one_hot, vectors, edges))[:, 0]


def _graph(
    one_hot: Bool[jax.Array, "N elements"],
    vectors: Float[jax.Array, "E 3"],
    edges: Int[jax.Array, "2 E"],
) -> Any:
    """The graph of jraph. In jax-md an edge vector points from the sender, the neighbour, to the
    receiver, the centre."""
    import jraph

    one = jnp.ones(len(one_hot), int)
    return jraph.GraphsTuple(
        one_hot.astype(vectors.dtype),
        -vectors,
        senders=edges[1],
        receivers=edges[0],
        globals=None,
        n_node=one,
        n_edge=None,  # pyright: ignore[reportArgumentType] # jax-md does not read it
    )


def _nequip() -> Any:
    """jax-md's module of NequIP."""
    try:
        from jax_md._nn import nequip
    except ImportError as error:
        raise missing("jax-md", "NequIP") from error
    return nequip
