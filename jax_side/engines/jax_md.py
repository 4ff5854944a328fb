"""jax-md (Schoenholz and Cubuk, NeurIPS 2020): a potential as an energy function, the reverse, and
energies seen on the way."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from bridge.contract import same_dtype
from bridge.errors import message, missing
from jax_side.engines.carrying import Carrying, observe
from jax_side.engines.fractional import fractions, real
from jax_side.engines.images import (
    Cell,
    Verdict,
    check_list,
    check_width,
    cutoff_of,
    known,
    or_nan,
    where_sound,
)

EnergyFn = Callable[..., jax.Array]  # of jax-md: energy_fn(R, **kwargs), a scalar in eV
InitAndStep = tuple[Callable[..., Any], Callable[..., Any]]  # of jax-md's simulators


def energy(
    potential: Callable[..., jax.Array],
    box: ArrayLike | None = None,
    fractional: bool = True,
    *,
    cutoff: float | None = None,
) -> EnergyFn:
    """Returns the potential in jax-md's idiom: `energy_fn(R, **kwargs)` for space.free or
    space.periodic_general.

    `potential` is called as potential(positions, cell) and returns eV, like
    jax_side.potentials.potential's for one system.

    Box and coordinates. box None is free space. Otherwise box is jax-md's: a number, a vector, or a
    matrix (upper triangular or not) whose COLUMNS are the lattice vectors in Angstrom, so that the
    cell of rows is box.T. With fractional=True, R (N,3) are fractional coordinates and r = box R.
    The gradient in R is nevertheless the real-space gradient dE/dr, as for every jax-md energy:
    this is what shift_fn of periodic_general expects. With fractional=False, R are real positions.
    R and box have one dtype.

    Keywords of `energy_fn`. Three are read, those that a bias in the potential takes
    (jax_side.potentials.bias: hills) are handed on, and the others that jax-md passes on (kT, t,
    ...) are ignored:

    - `neighbor` is a jax-md neighbour list of format Sparse, whose edges the potential is given
      (see below). Without it torch finds the neighbours.
    - `box` replaces the box given here (NPT).
    - `perturbation` P, a number or a matrix, maps r -> P r for atoms and cell alike. With P = I + e
      the virial W is dE/de at e = 0, whence quantity.stress = -W / V and quantity.pressure, for
      jax-md counts compression positive.

    Without `neighbor` no minimum image is taken. Which images count is then the potential's
    concern, and small boxes are fine.

    Neighbour lists. A jax-md list holds one image of each pair, and only the pairs that it has room
    for. With `neighbor` three conditions must therefore hold. Opposite faces of the box must be
    twice the cutoff apart (in a skewed box, twice the list's own cutoff, skin included). The list
    must reach as far as the cutoff. It must not have overflowed. The cutoff is that of
    potential.card, or `cutoff` in Angstrom, or the list's own. A condition that fails is an error
    at the call. Where values can't be seen (a box or a list that jit or vmap traces), the energy
    and all its derivatives are NaN, in that system alone. After a run in jit look at
    neighbor.did_buffer_overflow, as always in jax-md, allocate anew, and run again from before. The
    age of a list is the caller's concern: update it (with box=, if that changes) before atoms have
    moved by half of its skin.

    Cost. A step of NVE, NVT, Langevin or FIRE evaluates the potential once. A step of jax-md's own
    NPT and of its FIRE with a box evaluates it twice; `npt_nose_hoover` and `fire_descent_box` here
    need one evaluation. Under jax.vmap all replicas are one evaluation.

    Derivatives are exact to all orders (elasticity.athermal_moduli is right): each is what finite
    differences of the one before give, where a real displacement dr moves R by inv(box) dr. Mixed
    derivatives in R and box therefore come in two kinds: that of dE/dr in the box, and that of
    dE/dbox in r. (space.transform of jax-md gets the second kind wrong, and forward over forward.)

    Raises: ValueError for a cutoff that is not the card's; ImportError without jax-md. A call
    raises ValueError where R and box differ in dtype or box has another shape, and for a list that
    lacks edges; and NotImplementedError for `new_box`.

    >>> energy_fn = energy(lambda r, cell: (r ** 2).sum(), box=2.0)
    >>> R = jnp.full((1, 3), 0.5)
    >>> float(energy_fn(R)), jax.grad(energy_fn)(R).tolist()
    (3.0, [[2.0, 2.0, 2.0]])
    """
    space, home = _jax_md().space, box
    keywords = getattr(potential, "keywords", ())
    cutoff = cutoff_of(getattr(potential, "card", None), cutoff)

    def energy_fn(
        R: Float[jax.Array, "N 3"],
        box: ArrayLike | None = None,
        perturbation: ArrayLike | None = None,
        neighbor: Any = None,
        **kwargs: Any,
    ) -> jax.Array:
        if "new_box" in kwargs:
            raise NotImplementedError(
                message("box=... for a box that changes", "new_box", "pass it as box")
            )
        box = home if box is None else box
        matrix = None if box is None else _matrix(box, R)
        r = real(matrix, R) if fractional and matrix is not None else R
        cell = None if matrix is None else matrix.T
        if perturbation is not None:
            r = space.raw_transform(perturbation, r)
            cell = None if cell is None else space.raw_transform(perturbation, cell)
        passed = {name: x for name, x in kwargs.items() if name in keywords}
        if neighbor is None:
            return potential(r, cell, **passed)
        listed = passed | _minimum_images(neighbor, R, matrix, fractional)
        sound = check_list(neighbor, _seen(cell, box, perturbation), cutoff, fractional)
        if sound is True:
            return potential(r, cell, **listed)
        return _if_sound(sound, potential, r, cell, listed)

    return energy_fn


def edges(
    neighbor: Any,
    R: Float[jax.Array, "N 3"],
    box: ArrayLike | None = None,
    *,
    fractional: bool = True,
    cutoff: float | None = None,
) -> dict[str, jax.Array]:
    """Returns a jax-md neighbour list as the edges of the contract: {"edge_index": (2,capacity),
    "cell_offsets": (capacity,3)}, int32.

    `neighbor` is what jax-md's neighbor_fn.allocate or update gave, in the format Sparse with both
    directions. Its unused slots are unused slots of the contract too. R (N,3) and box are those of
    the moment, as in `energy`. Each edge is the minimum image, as jax-md's displacements are.
    Without a box all offsets are 0. Edges in the skin are included, and the potential's models
    leave them out. The energy functions of `energy` call this themselves, as `energy_fn(R,
    neighbor=neighbor)`, so that a step whose positions wrap has the right images.

    The list is checked as in `energy`, for a `cutoff` in Angstrom, by default the list's own, skin
    included. Where jit or vmap hides the values, a list that lacks edges has -1 for all of them.
    Models in torch refuse negative indices.

    Raises: ValueError for another format, and for a list that lacks edges.

    >>> from jax_md import partition, space
    >>> find = partition.neighbor_list(space.free()[0], jnp.array(10.0), 1.5, format=partition.Sparse)
    >>> R = jnp.array([[0.0, 0, 0], [1, 0, 0]])
    >>> sorted(edges(find.allocate(R), R)["edge_index"].T.tolist())[:2]
    [[0, 1], [1, 0]]
    """
    matrix = None if box is None else _matrix(box, R)
    found = _minimum_images(neighbor, R, matrix, fractional)
    cell = None if matrix is None else _seen(matrix.T, box)
    sound = check_list(neighbor, cell, cutoff_of(None, cutoff), fractional)
    if sound is True:
        return found
    return found | {"edge_index": jnp.where(sound, found["edge_index"], -1)}


def model(
    energy_fn: EnergyFn,
    cell: Literal["box", "perturbation"] | None = "box",
    *,
    cutoff: float | None = None,
) -> Callable[[dict[str, jax.Array]], dict[str, jax.Array]]:
    """Returns an energy function of jax-md as a model of the potential contract for one system: a
    dict in, {"energy": (1,)} out.

    The model takes pos (N,3) Cartesian, any image, and cell (1,3,3) by rows. It differentiates in
    both as the contract has it: g = dE/dr at fixed cell, G = dE/dh at fixed Cartesian positions.
    The species of the atoms are in energy_fn already (species=...). All other keys are ignored,
    also pbc: which axes are periodic is the displacement function's concern. Units are those of
    energy_fn, so make it with eV and Angstrom. `cell` says how energy_fn takes its box:

    "box"           It is called as energy_fn(fractional R, box=columns), made with
                    space.periodic_general(box, fractional_coordinates=True). Values, g, G and
                    second derivatives in positions are exact. Second derivatives that involve the
                    cell are not, because jax-md's space.transform gets these wrong.
    "perturbation"  It is called in the same way with perturbation=... as well, through which the
                    cell moves. Second derivatives that involve the cell are then exact too. A
                    dependence on the box by other ways than the displacement (an explicit volume)
                    is missed.
    None            Free space: it is called as energy_fn(positions), and G is zero.

    Exact means up to jax-md's own constants, some of which it rounds to float32. The gradient in a
    fractional R that jax-md defines is the real-space one. Positions are converted so that its rule
    comes out right. Models of equal energies are equal, for jit's caches.

    jax-md takes the minimum image of each pair, in all three directions. Except in free space, the
    energy's `cutoff` in Angstrom (its r_cutoff; for a sum the longest) must therefore be given, and
    opposite faces of the cell must be twice that apart. A narrower cell is an error. Where the cell
    can't be seen (inside jit and vmap, and in bridge.torch_potential), energy and derivatives are
    NaN instead.

    Raises: ValueError for another `cell`, and for a cell without a cutoff; ImportError without
    jax-md. A call raises ValueError for a cell that is too narrow, for more than one system, and
    for an energy that is not a scalar.

    >>> from jax_md import energy, space
    >>> displacement, _ = space.periodic_general(jnp.eye(3), fractional_coordinates=True)
    >>> lj = model(energy.lennard_jones_pair(displacement, sigma=2.0), cutoff=5.0)
    >>> lj({"pos": jnp.array([[0.0, 0, 0], [0, 0, 9]]), "cell": 11 * jnp.eye(3)[None]})["energy"].round(3).tolist()
    [0.0]
    """
    _jax_md()
    if cell not in ("box", "perturbation", None):
        raise ValueError(
            message('cell as one of "box", "perturbation", None', repr(cell), "choose one of these")
        )
    if cell is not None and cutoff is None:
        expected = "cutoff=... of a jax-md energy with a box, in Angstrom"
        raise ValueError(message(expected, "none", "pass its r_cutoff, or cell=None in free space"))
    return _Model(energy_fn, cell, cutoff_of(None, cutoff))


@dataclass(frozen=True)
class _Model:
    """What `model` returns; its docstring is the documentation."""

    energy_fn: EnergyFn
    cell: str | None
    cutoff: float | None

    def __call__(self, inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
        pos, cell = inputs["pos"], inputs["cell"]
        if cell.shape[0] != 1:
            raise ValueError(
                message(
                    "one system for a jax-md energy",
                    f"{cell.shape[0]} cells",
                    "call the model once for each system",
                )
            )
        wide = self._check(cell)
        energy = self._energy(pos, cell[0])
        if energy.shape:
            raise ValueError(
                message(
                    "a scalar from the jax-md energy",
                    str(energy.shape),
                    "make it without per_particle=True",
                )
            )
        energy = energy.astype(pos.dtype)
        return {"energy": (energy if wide is True else or_nan(wide, energy))[None]}

    def _check(self, cell: Float[jax.Array, "1 3 3"]) -> Verdict:
        """Whether the cell is wide enough for minimum images. Without a cell it always is."""
        if self.cell is None or self.cutoff is None:
            return True
        seen = known(cell)
        do = "repeat the structure, or take another potential"
        return check_width(cell[0] if seen is None else seen[0], self.cutoff, "jax-md", do)

    def _energy(self, pos: Float[jax.Array, "N 3"], cell: Float[jax.Array, "3 3"]) -> jax.Array:
        """The energy of jax-md."""
        if self.cell is None:
            return self.energy_fn(pos)
        home = jax.lax.stop_gradient(cell)
        R = fractions(pos, cell, home)
        if self.cell == "box":
            return self.energy_fn(R, box=cell.T)
        # The value is the unit matrix to the bit; the derivative is that of the strain.
        moved = jnp.eye(3, dtype=cell.dtype) + (jnp.linalg.inv(home) @ (cell - home)).T
        return self.energy_fn(R, box=home.T, perturbation=moved)


def observed(
    simulator: Callable[..., InitAndStep], energy_fn: EnergyFn, *args: Any, **kwargs: Any
) -> InitAndStep:
    """Returns `simulator(energy_fn, *args, **kwargs)` of jax_md.simulate, with the potential energy
    of each state for free.

    The result is a pair of jitted functions `init, step` that take what jax-md's own take and
    return (state, energy). The energy is energy_fn(state.position), taken from the evaluation that
    gave the forces, so that a step with logging costs one evaluation. (Calling energy_fn beside the
    step would evaluate again, unless XLA happens to merge the two calls.) This works for
    integrators that end where they evaluated their forces: nve, nvt_nose_hoover, nvt_langevin.

    Raises: NotImplementedError, when first called, for an integrator that moves on after its force
    evaluation (brownian), whose energies would be a step behind.

    >>> from jax_md import simulate, space
    >>> init, step = observed(simulate.nve, lambda R, **_: (R ** 2).sum(), space.free()[1], 1e-3)
    >>> state, energy = init(jax.random.key(0), jnp.ones((2, 3)), 0.0)
    >>> float(energy)
    6.0
    """
    seen = threading.local()

    def force_fn(R, **kwargs):
        seen.energy, gradient = jax.value_and_grad(energy_fn)(R, **kwargs)
        seen.position = R
        return -gradient

    init, step = simulator(force_fn, *args, **kwargs)
    return observe(init, seen), observe(step, seen)


def npt_nose_hoover(
    energy_fn: EnergyFn, shift_fn: Callable[..., jax.Array], *args: Any, **kwargs: Any
) -> InitAndStep:
    """Returns `init, step` of jax_md.simulate.npt_nose_hoover with one evaluation for a step.

    The method is that of Martyna, Klein, Tuckerman, J. Chem. Phys. 97, 2635 (1992). The arguments,
    the functions returned and the trajectory are those of jax-md's own. Its integrator asks for the
    energy's slope in the volume where a step starts and where it ends. The state here remembers
    what the step before found. `energy_fn(R, box=..., perturbation=..., **keywords of init or
    step)` comes from `energy` or is any jax-md energy. The step is jitted.

    The state is jax-md's (npt_box, npt_nose_hoover_invariant and state.set take it) with two more
    fields, both at state.position and state.box: `energy` in eV, and `virial` W = dE/de (3,3) in
    eV, so that the static stress in jax-md's sign is -W / V. Logging them costs nothing. Call init
    again after setting positions or box by hand.

    The conserved quantity costs nothing either: npt_nose_hoover_invariant(lambda R, **_:
    state.energy, state, pressure, kT). In jax-md 0.2.29 it drifts in fractional coordinates,
    whatever the energy, because the step stretches R with the box, which is right for real
    coordinates only. With energy(potential, fractional=False), shift_fn = space.free()[1] and real
    R it is conserved.

    Raises: NotImplementedError, when first called, if this version of jax-md asks for its energies
    in another order.

    >>> from jax_md import space
    >>> box = 4 * jnp.eye(3)
    >>> init, step = npt_nose_hoover(energy(lambda r, cell: (cell**2).sum(), box), space.periodic_general(box)[1], 1e-3, 0.0, 1.0)
    >>> state = init(jax.random.key(0), jnp.zeros((2, 3)), box)
    >>> float(state.energy), float(state.virial[0, 0]), float(step(state).energy) < 48
    (48.0, 32.0, True)
    """
    simulator = _jax_md().simulate.npt_nose_hoover
    return _carrying(
        lambda energy_fn: simulator(energy_fn, shift_fn, *args, **kwargs), energy_fn, at_start=True
    )


def fire_descent_box(
    energy_fn: EnergyFn, shift_fn: Callable[..., jax.Array], *args: Any, **kwargs: Any
) -> InitAndStep:
    """Returns `init, step` of jax_md.minimize.fire_descent_box with one evaluation for a step.

    It relaxes atoms and box by FIRE (Bitzek et al., Phys. Rev. Lett. 97, 170201 (2006)). The
    arguments, the functions returned and the path are those of jax-md's own, which asks for forces
    and virial one after the other at the same positions and box. The state has `energy` and
    `virial` as that of `npt_nose_hoover`, and energy_fn is as there.

    Raises: as `npt_nose_hoover`.

    >>> from jax_md import space
    >>> box = 4 * jnp.eye(3)
    >>> init, step = fire_descent_box(energy(lambda r, cell: ((cell - box) ** 2).sum(), box), space.periodic_general(box)[1])
    >>> float(init(jnp.zeros((2, 3)), 1.5 * box).energy)
    12.0
    """
    descent = _jax_md().minimize.fire_descent_box
    return _carrying(
        lambda energy_fn: descent(energy_fn, shift_fn, *args, **kwargs), energy_fn, at_start=False
    )


def _carrying(make: Callable[..., InitAndStep], energy_fn: EnergyFn, at_start: bool) -> InitAndStep:
    """init and step of Carrying, the latter jitted as jax-md jits its own."""
    simulator = Carrying(make, energy_fn, at_start)
    return simulator.init, jax.jit(simulator.step)


def _minimum_images(
    neighbor: Any,
    R: Float[jax.Array, "N 3"],
    matrix: Float[jax.Array, "3 3"] | None,
    fractional: bool,
) -> dict[str, jax.Array]:
    """The edges of a list as they are at R, in a box of columns or in free space (None)."""
    partition = _jax_md().partition
    listed = isinstance(neighbor, partition.NeighborList)
    if not listed or neighbor.format is not partition.Sparse:
        got = str(neighbor.format) if listed else f"a {type(neighbor).__name__}"
        do = "pass format=partition.Sparse to partition.neighbor_list"
        raise ValueError(message("a neighbour list of format partition.Sparse", got, do))
    index, s = neighbor.idx.astype(jnp.int32), jax.lax.stop_gradient(R)
    i, j = jnp.minimum(index, len(R) - 1)
    if matrix is None:
        s = jnp.zeros_like(s)
    elif not fractional:
        s = s @ jnp.linalg.inv(jax.lax.stop_gradient(matrix)).T
    return {"edge_index": index, "cell_offsets": -jnp.round(s[j] - s[i]).astype(jnp.int32)}


def _seen(
    cell: Float[jax.Array, "3 3"] | None,
    box: ArrayLike | None,
    perturbation: ArrayLike | None = None,
) -> Cell | None:
    """The cell by rows, in NumPy where `box` and `perturbation`, from which it is made, have known
    values, also inside jit; else the cell as it is given."""
    columns = known(box)
    moved = np.eye(3) if perturbation is None else known(perturbation)
    if columns is None or moved is None:
        return cell
    columns = columns if columns.size == 9 else columns.reshape(-1) * np.eye(3)
    return (moved * columns if moved.ndim == 0 else moved @ columns).T


def _if_sound(
    sound: Any,
    potential: Callable[..., jax.Array],
    r: Float[jax.Array, "N 3"],
    cell: Float[jax.Array, "3 3"] | None,
    listed: dict[str, Any],
) -> jax.Array:
    """The energy, NaN where the list is not sound.

    There the potential is given atoms far apart without edges, so that a run in jit goes on to the
    point where its result is looked at."""
    apart = jnp.arange(r.size, dtype=r.dtype).reshape(r.shape)
    if cell is not None:
        wide = max(r.size, 1) * jnp.eye(3, dtype=cell.dtype)
        cell = where_sound(sound, cell, wide)
    index = jnp.where(sound, listed["edge_index"], len(r))
    found = potential(where_sound(sound, r, apart), cell, **listed | {"edge_index": index})
    return or_nan(sound, found)


def _matrix(box: Any, R: Float[jax.Array, "N 3"]) -> Float[jax.Array, "3 3"]:
    """jax-md's box as a matrix of columns, in the dtype of R."""
    box = box if hasattr(box, "dtype") else jnp.asarray(box, R.dtype)
    same_dtype({"R": R, "box": box}, ("R", "box"))
    if box.size == 1:
        return jnp.eye(3, dtype=R.dtype) * box.reshape(())
    if box.shape not in ((3,), (3, 3)):
        raise ValueError(
            message(
                "box as a number, (3,) or (3,3)",
                str(box.shape),
                "pass the lattice vectors as columns",
            )
        )
    return jnp.diag(box) if box.ndim == 1 else jnp.asarray(box)


def _jax_md() -> Any:
    """The package jax_md."""
    try:
        import jax_md
    except ImportError as error:
        raise missing("jax-md", "molecular dynamics with jax_md") from error
    return jax_md
