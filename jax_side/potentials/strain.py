"""Exact strain algebra in JAX: virial, stress, cell gradients, and gradients of an energy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from bridge.contract import check_outputs, named
from bridge.errors import message
from jax_side.potentials import virials
from jax_side.potentials.derivatives import Inputs, Model, Named

Vectors = Float[jax.Array, "N 3"]  # of each atom
Matrices = Float[jax.Array, "B 3 3"]  # of each system
Batch = Int[jax.Array, " N"]  # the system of each atom


def virial(
    position_gradients: Vectors,
    cell_gradients: Matrices,
    positions: Vectors,
    batch: Batch,
    cell: Matrices,
) -> Matrices:
    """Returns the virial W = dE/de of the strain r -> r(I+e), h -> h(I+e) for each system.

    It is W = R^T g + h^T G. Shapes: position_gradients g and positions (N,3), cell_gradients G and
    cell h (B,3,3), batch (N,) int; the result is (B,3,3). Units: eV/Angstrom and Angstrom in, eV
    out. Signs: g = dE/dr (forces are -g), G = dE/dh at fixed Cartesian positions, and W is positive
    where the system wants to shrink. W is exact: if rotation does not change the energy, W comes
    out symmetric, though neither of its terms is, and nothing is symmetrised here. A zero cell
    gives R^T g.

    >>> one = jnp.ones((1, 3, 3))
    >>> virial(jnp.zeros((2, 3)), one, jnp.zeros((2, 3)), jnp.zeros(2, int), 2 * one)[0, 0].tolist()
    [6.0, 6.0, 6.0]
    """
    return _moments(positions, position_gradients, batch, cell) + cell.mT @ cell_gradients


def lattice_gradient_from_virial(
    forces: Vectors, positions: Vectors, batch: Batch, cell: Matrices, virial: Matrices
) -> Matrices:
    """Returns G = dE/dh at fixed Cartesian positions, from forces and virial.

    It is G = h^-T (W - R^T g) with g = -forces, where (R^T g)_ij = sum_b r_bi g_bj over the atoms
    of each system. The signature is kUPS's, with virial = W (B,3,3) in eV. Shapes: forces and
    positions (N,3), batch (N,) int, cell h (B,3,3) by rows; the result is (B,3,3) in eV/Angstrom.
    The antisymmetric part is kept: symmetrising R^T g or h^T G, as some codes do, is wrong whenever
    sum r x g is not zero. A W that a model has symmetrised is the exact one if its energy is
    invariant under rotation.

    Raises: ValueError naming the system whose cell is singular, for which G does not follow from W.
    Under tracing, where values can't be seen, such a system gives NaN.

    >>> eye = jnp.eye(3)[None]
    >>> lattice_gradient_from_virial(jnp.zeros((1, 3)), jnp.zeros((1, 3)), jnp.array([0]), 2 * eye, 6 * eye)[0, 0].tolist()
    [3.0, 0.0, 0.0]
    """
    bad = virials.singular(cell)
    _refuse(
        bad,
        "an invertible cell",
        "a singular cell",
        "without one dE/dh does not follow from the virial",
    )
    safe = jnp.where(bad[:, None, None], jnp.eye(3, dtype=cell.dtype), cell)
    gradient = jnp.linalg.solve(safe.mT, virial + _moments(positions, forces, batch, cell))
    return jnp.where(bad[:, None, None], jnp.nan, gradient)


def stress(virial: Matrices, cell: Matrices, pbc: Bool[jax.Array, "B 3"]) -> Matrices:
    """Returns the Cauchy stress W / V of each system, with V = |det h| and tension positive as in
    ASE.

    Shapes: virial W and cell h (B,3,3), pbc (B,3) bool; the result is (B,3,3) in eV/Angstrom^3.
    kUPS and jax-md use the opposite sign. ASE's Voigt order is xx, yy, zz, yz, xz, xy of this
    matrix.

    Raises: ValueError naming the system that has no stress, because none of its axes is periodic or
    its cell is singular. Under tracing, where values can't be seen, such a system gives NaN, never
    a number.

    >>> stress(6 * jnp.eye(3)[None], 2 * jnp.eye(3)[None], jnp.ones((1, 3), bool))[0, 0].tolist()
    [0.75, 0.0, 0.0]
    """
    open_, singular = ~pbc.any(-1), virials.singular(cell)
    _refuse(open_, "a periodic system", "no periodic axis", "it has no stress; use the virial")
    _refuse(singular, "an invertible cell", "a singular cell", "it has no stress; use the virial")
    volume = jnp.where(open_ | singular, jnp.nan, abs(jnp.linalg.det(cell)))
    return virial / volume[:, None, None]


def with_gradients(
    energy: Callable[[Inputs], jax.Array | Named], *, node_virials: bool = False
) -> Model:
    """Turns `energy(inputs)` into a model of the contract, which gives the energy, g and G from one
    forward and one backward pass.

    `energy` takes the dict of the contract. It returns (B,) in eV, or a dict with such an "energy"
    and other outputs, which are passed on. It must be differentiable in inputs["pos"] (N,3) and
    inputs["cell"] (B,3,3), and no system may see another. The model returns a dict with energy
    (B,), position_gradients g = dE/dr at fixed cell (N,3), cell_gradients G = dE/dh at fixed
    Cartesian positions (B,3,3), and the other outputs. It is pure, and differentiable again. Models
    made from equal energies are equal and hash alike, so that jit caches hit.

    `node_virials` adds node_virials (N,3,3) in eV from the same backward pass, unless `energy`
    gives its own: w_j = sum of r_ij (dE/dr_ij)^T over the edges i -> j, which add up to W. `energy`
    then takes all distances from edge_index and cell_offsets, and is given cell_offsets as floats,
    and unit vectors on open axes of singular cells. This is the convention of Fan et al., PRB 92,
    094301 (2015), whose W_i is -w_i.

    Raises, when it is called: ValueError for an energy that is not (B,) or is missing, and, with
    node_virials, for inputs without edges and an energy with a virial that is not that of edges
    (under tracing, where values can't be seen, node_virials are NaN in such a system).

    >>> model = with_gradients(lambda x: (x["pos"] ** 2).sum()[None])
    >>> model({"pos": jnp.ones((1, 3)), "cell": jnp.zeros((1, 3, 3))})["position_gradients"].tolist()
    [[2.0, 2.0, 2.0]]
    """
    return _WithGradients(energy, node_virials)


@dataclass(frozen=True)
class _WithGradients:
    energy: Callable[[Inputs], jax.Array | Named]
    node_virials: bool

    def __call__(self, inputs: Inputs) -> Named:
        given = virials.by_edges(inputs) if self.node_virials else inputs
        names = ("pos", "cell", "cell_offsets") if self.node_virials else ("pos", "cell")

        def total(variables):
            changed = given | variables
            out = named(self.energy(changed))
            check_outputs(out, changed["pos"].shape[0], changed["cell"].shape[0])
            return out["energy"].sum(), out

        differentiate = jax.value_and_grad(total, has_aux=True)
        (_, out), found = differentiate({name: given[name] for name in names})
        g, G = found["pos"], found["cell"]
        out = out | {"position_gradients": g, "cell_gradients": G}
        if self.node_virials and "node_virials" not in out:
            each = virials.node_virials(given, found["cell_offsets"])
            W = virial(g, G, inputs["pos"], inputs["batch"], inputs["cell"])
            out["node_virials"] = virials.checked(each, W, inputs["batch"])
        return out


def _moments(positions: Vectors, vectors: Vectors, batch: Batch, cell: Matrices) -> Matrices:
    """sum_b r_bi v_bj over the atoms b of each system: (B,3,3)."""
    outer = positions[:, :, None] * vectors[:, None, :]
    return jax.ops.segment_sum(outer, batch, num_segments=cell.shape[0])


def _refuse(bad, expected, got, do):
    """ValueError naming the first system where bad (B,) is True, if values can be seen."""
    try:
        first = int(bad.argmax()) if bad.any() else None
    except jax.errors.ConcretizationTypeError:
        return
    if first is not None:
        raise ValueError(message(expected, f"{got} in system {first}", do))
