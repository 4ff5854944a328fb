"""Exact strain algebra in torch: virial, stress, cell gradients, and gradients of an energy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int

from bridge.contract import named
from bridge.errors import message
from torch_side.calls import kernels, modes, status
from torch_side.potentials import virials


def virial(
    position_gradients: Float[torch.Tensor, "N 3"],
    cell_gradients: Float[torch.Tensor, "B 3 3"],
    positions: Float[torch.Tensor, "N 3"],
    batch: Int[torch.Tensor, " N"],
    cell: Float[torch.Tensor, "B 3 3"],
) -> Float[torch.Tensor, "B 3 3"]:
    """Returns W = dE/de of the strain r -> r(I+e), h -> h(I+e), for each system: W = R^T g + h^T G.

    Shapes: position_gradients g and positions (N,3), cell_gradients G and cell h (B,3,3), batch
    (N,) int; result (B,3,3). Units: eV/Angstrom and Angstrom in, eV out. Signs: g = dE/dr (forces
    are -g), G = dE/dh at fixed Cartesian positions; W is positive where the system wants to shrink.
    W is exact: for an energy that is invariant under rotation it comes out symmetric, although
    neither of its two terms is, and nothing is symmetrised here. For a cell of zeros W is R^T g.
    The tensors are only read, the result is a new one, and autograd can differentiate it.

    >>> one = torch.ones(1, 3, 3)
    >>> virial(torch.zeros(2, 3), one, torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), 2 * one)[0, 0]
    tensor([6., 6., 6.])
    """
    return _moments(positions, position_gradients, batch, cell) + cell.mT @ cell_gradients


def lattice_gradient_from_virial(
    forces: Float[torch.Tensor, "N 3"],
    positions: Float[torch.Tensor, "N 3"],
    batch: Int[torch.Tensor, " N"],
    cell: Float[torch.Tensor, "B 3 3"],
    virial: Float[torch.Tensor, "B 3 3"],
) -> Float[torch.Tensor, "B 3 3"]:
    """Returns G = dE/dh at fixed Cartesian positions, from forces and virial.

    G = h^-T (W - R^T g) with g = -forces and (R^T g)_ij = sum_b r_bi g_bj over the atoms b of each
    system. The signature is kUPS's, with virial = W (B,3,3) in eV. Shapes: forces and positions
    (N,3), batch (N,) int, cell h (B,3,3) by rows; result (B,3,3) in eV/Angstrom. The antisymmetric
    part is kept: symmetrising R^T g or h^T G, as some codes do, is wrong whenever sum r x g is not
    zero. A W that a model has symmetrised is the exact one if its energy is invariant under
    rotation.

    Raises: ValueError naming the system whose cell is singular, for which G does not follow from W.

    >>> eye = torch.eye(3)[None]
    >>> lattice_gradient_from_virial(torch.zeros(1, 3), torch.zeros(1, 3), torch.tensor([0]), 2 * eye, 6 * eye)[0, 0]
    tensor([3., 0., 0.])
    """
    _refuse(
        _singular(cell),
        "an invertible cell",
        "a singular cell",
        "without one dE/dh does not follow from the virial",
    )
    return torch.linalg.solve(cell.mT, virial + _moments(positions, forces, batch, cell))


def stress(
    virial: Float[torch.Tensor, "B 3 3"],
    cell: Float[torch.Tensor, "B 3 3"],
    pbc: Bool[torch.Tensor, "B 3"],
) -> Float[torch.Tensor, "B 3 3"]:
    """Returns the Cauchy stress W / V of each system, V = |det h|, with tension positive as in ASE.

    Shapes: virial W and cell h (B,3,3), pbc (B,3) bool; result (B,3,3) in eV/Angstrom^3. kUPS and
    jax-md use the opposite sign. ASE's Voigt order is xx, yy, zz, yz, xz, xy of this matrix.

    Raises: ValueError naming a system that has no stress, since no axis of it is periodic or its
    cell is singular.

    >>> stress(6 * torch.eye(3)[None], 2 * torch.eye(3)[None], torch.ones(1, 3, dtype=torch.bool))[0, 0]
    tensor([0.7500, 0.0000, 0.0000])
    """
    _refuse(
        ~pbc.any(-1), "a periodic system", "no periodic axis", "it has no stress; use the virial"
    )
    _refuse(
        _singular(cell), "an invertible cell", "a singular cell", "it has no stress; use the virial"
    )
    return virial / torch.linalg.det(cell).abs()[:, None, None]


def with_gradients(
    energy: Callable[[dict[str, torch.Tensor]], torch.Tensor | dict[str, torch.Tensor]],
    *,
    node_virials: bool = False,
) -> Callable[..., dict[str, torch.Tensor]]:
    """Turn `energy(inputs)` into a model of the contract, with g and G from one backward pass.

    `energy` takes the dict of the contract and returns (B,) in eV, or a dict with such an "energy"
    and other outputs, which are passed on. It must be differentiable in inputs["pos"] (N,3) and
    inputs["cell"] (B,3,3), and no system may see another. The result is a function
    `model(inputs, create_graph=None)`, which returns dict(energy (B,), position_gradients g = dE/dr
    at fixed cell (N,3), cell_gradients G = dE/dh at fixed Cartesian positions (B,3,3), ...). What
    the energy does not depend on has the gradient zero.

    `node_virials` adds node_virials (N,3,3) in eV from the same backward pass, unless `energy` gives
    its own: w_j = sum of r_ij (dE/dr_ij)^T over the edges i -> j, which add up to W. `energy` then
    takes all distances from edge_index and cell_offsets (`torch_side.potentials.geometry` does), and
    is given cell_offsets as floats that require grad, and unit vectors on open axes of singular
    cells. This is the convention of Fan et al., PRB 92, 094301 (2015), whose W_i is -w_i.

    `create_graph=None` keeps the graph only if grad mode is on and an input requires grad, that is
    if someone differentiates further (Hessians by double backward). True always keeps it, for
    training on forces. Without a graph all outputs are detached. pos and cell enter as fresh views,
    so that a pos computed from the cell (r = s h) still gives G at fixed positions. Inputs are
    never written to.

    The model raises ValueError where there is no energy, TypeError for an energy that is no tensor
    and NotImplementedError for an energy that changes with pos or cell and has no graph to them
    (which costs one more evaluation where there is no graph) and, with create_graph, for a custom
    autograd Function whose backward can't be differentiated again.

    >>> model = with_gradients(lambda x: x["pos"].square().sum()[None])
    >>> model({"pos": torch.ones(1, 3), "cell": torch.zeros(1, 3, 3)})["position_gradients"]
    tensor([[2., 2., 2.]])
    """

    def model(
        inputs: dict[str, torch.Tensor], create_graph: bool | None = None
    ) -> dict[str, torch.Tensor]:
        if torch.is_inference_mode_enabled():
            with modes.recording(inputs) as inputs:
                return model(inputs, create_graph)
        if create_graph is None:
            tensors = (x for x in inputs.values() if isinstance(x, torch.Tensor))
            create_graph = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        with torch.enable_grad():
            inputs = inputs | {name: _variable(inputs[name]) for name in ("pos", "cell")}
            variables = [inputs["pos"], inputs["cell"]]
            if node_virials:
                inputs = virials.by_edges(inputs)
            edges = [inputs["cell_offsets"]] if node_virials else []
            out = named(energy(inputs))
            if create_graph:
                _check_kernels(energy, inputs, out["energy"])
            found = _gradients(out["energy"], [*variables, *edges], create_graph)
            found, in_edges = found[:2], found[2:]
            _check_reached(energy, inputs, out["energy"], found)
            g, G = (
                torch.zeros_like(x) if dx is None else dx
                for x, dx in zip(variables, found, strict=True)
            )
            if edges and "node_virials" not in out:
                batch = inputs["batch"].long()
                out["node_virials"] = virials.node_virials(inputs, *in_edges)
                total = virial(g, G, variables[0], batch, variables[1])
                virials.check_sum(out["node_virials"], total, batch)
        out |= {"position_gradients": g, "cell_gradients": G}
        return out if create_graph else {name: x.detach() for name, x in out.items()}

    return model


def _variable(x: torch.Tensor) -> torch.Tensor:
    """A view to differentiate in: part of the graph of x where x requires grad, else a leaf."""
    return x.view_as(x) if x.requires_grad else x.detach().requires_grad_()


def _check_kernels(energy: Callable, inputs: dict[str, torch.Tensor], found: torch.Tensor) -> None:
    """NotImplementedError where a kernel inside of the energy would cut off the derivatives of its
    gradients."""

    def again() -> list[torch.Tensor]:
        pos, cell = kernels.moved([inputs["pos"], inputs["cell"]])
        moved = {"pos": pos.requires_grad_(), "cell": cell.requires_grad_()}
        return [named(energy(inputs | moved))["energy"]]

    private = [x for x in (inputs["pos"], inputs["cell"]) if x.is_leaf]
    kernels.check_twice([found], again, private)


def _gradients(
    energy: torch.Tensor, variables: Sequence[torch.Tensor], create_graph: bool
) -> Sequence[torch.Tensor | None]:
    """d sum(energy) / d variables by one backward pass, None for what its graph does not reach."""
    if not energy.requires_grad:
        return [None] * len(variables)
    return torch.autograd.grad(
        energy.sum(), variables, create_graph=create_graph, allow_unused=True
    )


def _check_reached(
    energy: Callable,
    inputs: dict[str, torch.Tensor],
    found: torch.Tensor,
    gradients: Sequence[torch.Tensor | None],
) -> None:
    """NotImplementedError where the energy changes with pos or cell and its graph does not reach
    them.

    The cell counts where edges lead into other cells: models that have no use for it are many.
    Nothing is checked where values can't be read: in a transform of torch.func, under torch.compile
    and for fake tensors. In a program that is compiled as a whole an energy that is computed from
    them counts as one that changes with them."""
    unreached = [name for name, g in zip(("pos", "cell"), gradients, strict=True) if g is None]
    tensors = [x for x in inputs.values() if isinstance(x, torch.Tensor)]
    if not unreached:
        return
    if kernels.have_values([found, *tensors]):
        offsets = inputs.get("cell_offsets")
        if "cell" in unreached and (offsets is None or not offsets.any()):
            unreached.remove("cell")
    elif status.current() is None or not kernels.traced():
        return
    for name in unreached:

        def again(name: str = name) -> torch.Tensor:
            (moved,) = kernels.moved([inputs[name]])
            return named(energy(inputs | {name: moved}))["energy"]

        kernels.check_unreached(found, inputs[name], again, name)


def _moments(
    positions: torch.Tensor, vectors: torch.Tensor, batch: torch.Tensor, cell: torch.Tensor
) -> torch.Tensor:
    """sum_b r_bi v_bj over the atoms b of each system: (B,3,3)."""
    outer = positions[:, :, None] * vectors[:, None, :]
    return torch.zeros_like(cell).index_add(0, batch, outer)


def _singular(cell: torch.Tensor) -> torch.Tensor:
    """True where |det h| is no more than rounding, or not a number: (B,)."""
    scale = torch.linalg.vector_norm(cell, dim=-1).prod(-1)
    return ~(torch.linalg.det(cell).abs() > 8 * torch.finfo(cell.dtype).eps * scale)


def _refuse(bad: torch.Tensor, expected: str, got: str, do: str) -> None:
    """ValueError naming the first system where bad (B,) is True."""
    if bad.any():
        raise ValueError(message(expected, f"{got} in system {int(bad.nonzero()[0])}", do))
