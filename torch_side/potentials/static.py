"""Graphs of fixed sizes: a model of the contract evaluated without a look at any value, so that
what runs can be compiled.

`graph` takes out what is padding, which needs values on the host. Here all sizes stay as they are.
One system is added, of two ghost atoms half a cutoff apart. Whatever is no edge of the model (an
unused slot, an edge that is not shorter than the cutoff, an edge of a padding atom) becomes an edge
from one ghost to the other, and padding atoms become lone atoms of that system. Messages run along
edges only, so no real atom can notice, whatever the model's cutoff function is. The results are cut
back. What `graph` checks is checked here too, into the `status` of the evaluation; where something
is wrong, all results are NaN.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import nn

from bridge.card import Card
from bridge.contract import INPUTS, OUTPUTS, called, check_inputs, check_outputs, dtype_name
from bridge.errors import message
from torch_side.calls import kernels
from torch_side.calls.status import Status
from torch_side.potentials import batches, padding

TOUCHING = 1e-4  # Angstrom: atoms closer than this are one on top of the other
GHOSTS = 2  # atoms of the system that is added
Model = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


class Real(NamedTuple):
    """What is real, and where the model sees it.

    atoms     which atoms are no padding (N,)
    systems   which systems have atoms (B,)
    place     the place of each atom among those that the model sees (N,): real ones first
    ghosts    how many atoms were added; with any of them, one system was added, too"""

    atoms: Bool[torch.Tensor, " N"]
    systems: Bool[torch.Tensor, " B"]
    place: Int[torch.Tensor, " N"]
    ghosts: int


def evaluate(
    model: Model,
    inputs: dict[str, torch.Tensor],
    card: Card,
    name: str,
    owner: nn.Module | None,
    status: Status,
) -> dict[str, torch.Tensor]:
    """Returns what graph.evaluate does, from operations of fixed shapes alone.

    The arguments are those of graph.evaluate; `inputs` holds no None. What can be known from
    shapes is raised at once, and what only values tell goes into `status`.

    Raises: ValueError for shapes and dtypes outside of the contract, for a model with a cutoff that
    is given no edges, and for one that does not keep systems apart."""
    n_atoms, n_systems = check_inputs(inputs)
    card.check_bound(inputs, name)
    card.check_home(inputs["pos"], str(inputs["pos"].device))
    if card.cutoff is not None and "edge_index" not in inputs:
        raise ValueError(_no_edges(name, card.cutoff))
    if card.cutoff is not None and "cell_offsets" not in inputs:
        raise ValueError(padding.NO_OFFSETS)
    first_check = len(status.rows)
    with torch.no_grad():
        _check_info(inputs, card, name, status)
        _check_axes(inputs, card, name, status)
        inputs, real = _atoms(inputs, card, name, status)
        _check_geometry(inputs, status)
        edges = _edges(inputs, real, card.cutoff, status) if "edge_index" in inputs else {}
    if real.ghosts and not card.batches:
        batches.check_ahead(owner, model, card, inputs, name)
    inner = _with_ghosts(inputs, real, edges, card)
    found = called(model, inner, name)
    extra = 1 if real.ghosts else 0
    check_own_gradients(model, inner, found, card, name)
    active = {key: found[key] for key in card.active_outputs if key in found}
    check_outputs(active, n_atoms + real.ghosts, n_systems + extra, (), dtype_name(inputs["pos"]))
    found = {key: _cut(key, x, real, n_systems) for key, x in found.items()}
    with torch.no_grad():
        _check_finite(found, inputs["batch"], name, status)
        row = status.row(first_check)
    if row is None:
        return found
    return {key: _or_nan(x, row[0] == 0) for key, x in found.items()}


def check_own_gradients(
    model: Model,
    inputs: dict[str, torch.Tensor],
    found: dict[str, torch.Tensor],
    card: Card,
    name: str,
) -> None:
    """Raises where someone differentiates gradients that are cut off from the positions.

    `found` is `model(inputs)`, and `name` that of the model in the error text.

    Raises: NotImplementedError."""
    pos, gradients = inputs["pos"], found.get("position_gradients")
    differentiated = pos.requires_grad and torch.is_grad_enabled()
    if gradients is None or not differentiated or card.derivative_order is not None:
        return

    def again() -> torch.Tensor:
        (moved,) = kernels.moved([pos])
        return model(inputs | {"pos": moved.requires_grad_()})["position_gradients"]

    kernels.check_given(gradients, pos, again, name)


def _no_edges(name: str, cutoff: float) -> str:
    """The text for a graph model without edges: nothing can look for neighbours here."""
    do = (
        f"make them with bridge.edges({cutoff:g}, capacity) and pass them with the call, or take "
        'lane="ffi", on which they are found at each call'
    )
    return message(f"edges for {name}, in a program that is compiled as a whole", "none", do)


def _check_info(inputs: dict[str, torch.Tensor], card: Card, name: str, status: Status) -> None:
    """Charges, spins and fields that are not zero and that the model has no use for."""
    for key in card.unused(inputs):
        values = inputs[key]
        do = f"leave it out, take another model, or say that it is used: card=bridge.Card(optional_inputs={{{key!r}}})"
        text = message(
            f"no {key}, or zero, since {name} has no use for one", f"{key} {{}} in system {{}}", do
        )
        # of the components of a field the largest
        parts = values[:, None].flatten(1)
        shown = parts.gather(1, parts.abs().argmax(1, keepdim=True))[:, 0]
        status.note(shown != 0, text, shown, _numbers(shown))


def _check_axes(inputs: dict[str, torch.Tensor], card: Card, name: str, status: Status) -> None:
    """Periodic axes that the model can't have, or open ones where it needs periodic ones."""
    periodic = inputs["pbc"].any(-1)
    if not card.supports_pbc:
        expected = f"open boundaries, which is all that {name} has"
        do = "set pbc False, or take another model"
        text = message(expected, "a periodic axis in system {}", do)
        status.note(periodic, text, _numbers(periodic))
    if card.needs_pbc:
        do = "set pbc and a cell with vacuum around"
        text = message(f"a periodic system for {name}", "no periodic axis in system {}", do)
        status.note(~periodic, text, _numbers(periodic))


def _atoms(
    inputs: dict[str, torch.Tensor], card: Card, name: str, status: Status
) -> tuple[dict[str, torch.Tensor], Real]:
    """The inputs with sound atomic numbers and batch, in which a padding atom has an element that
    the model knows and lies in the system that is added; and what is real."""
    numbers, batch = inputs["atomic_numbers"].long(), inputs["batch"].long()
    n_systems = len(inputs["cell"])
    descends = nn.functional.pad(batch.diff(), (1, 0)) < 0
    text = message(
        f"batch sorted, within 0..{n_systems - 1}",
        "system {} for atom {}",
        "sort the atoms by system",
    )
    strange = descends | (batch < 0) | (batch >= n_systems)
    status.note(strange, text, batch, _numbers(batch))
    batch = batch.clamp(0, n_systems - 1)
    known = numbers >= 0
    if card.elements is not None:
        known = _among(numbers, {0, *card.elements})
    expected, do = "atomic numbers of at least 0", "0 marks a padding atom"
    if card.elements:
        expected, do = f"one of the {len(card.elements)} elements of {name}", "take another model"
    text = message(expected, "Z = {} for atom {} of system {}", do)
    status.note(~known, text, numbers, _numbers(numbers), batch)
    atoms = known & (numbers != 0)
    # the least that the model knows, or any that is there
    element = min(card.elements) if card.elements else numbers.amax().clamp(min=1)
    numbers = torch.where(atoms, numbers, element)
    systems = padding.counted(batch, n_systems, atoms) > 0
    # a model of one structure without edges need not know what a system is
    ghosts = GHOSTS if "edge_index" in inputs or card.batches or n_systems > 1 else 0
    if not ghosts:
        do = 'take lane="ffi", which takes them out'
        text = message(f"no padding atoms for {name}, which has no edges", "atom {}", do)
        status.note(~atoms, text, _numbers(numbers))
    # real atoms count up from 0, and padding from the number of real ones
    before = atoms.int().cumsum(0)
    place = torch.where(atoms, before - 1, before[-1:] + _numbers(atoms) - before)
    sound = inputs | {"atomic_numbers": numbers, "batch": batch}
    return sound, Real(atoms, systems, place, ghosts)


def _among(x: Int[torch.Tensor, " K"], allowed: Iterable[int]) -> Bool[torch.Tensor, " K"]:
    """Which entries are among the numbers that are allowed. Runs of these are compared, since a
    table would be copied to a GPU at each call."""
    found = torch.zeros_like(x, dtype=torch.bool)
    for _, pairs in itertools.groupby(enumerate(sorted(allowed)), lambda pair: pair[1] - pair[0]):
        run = [number for _, number in pairs]
        found = found | (x >= run[0]) & (x <= run[-1])
    return found


def _check_geometry(inputs: dict[str, torch.Tensor], status: Status) -> None:
    """Positions that are not finite, and cells without a vector for each periodic axis."""
    pos, cell, pbc = inputs["pos"], inputs["cell"], inputs["pbc"]
    text = message(
        "finite positions", "({}, {}, {}) for atom {} of system {}", "look at the step before"
    )
    status.note(~pos.isfinite().all(-1), text, *pos.unbind(1), _numbers(pos), inputs["batch"])
    # Gram's determinant is the squared volume. An open axis counts as a unit vector across the
    # periodic ones.
    a, b, c = cell.double().unbind(1)
    p, q, r = pbc.unbind(1)
    length2 = lambda periodic, u: torch.where(periodic, (u * u).sum(-1), 1.0)
    dot = lambda both, u, v: torch.where(both, (u * v).sum(-1), 0.0)
    aa, bb, cc = length2(p, a), length2(q, b), length2(r, c)
    ab, bc, ca = dot(p & q, a, b), dot(q & r, b, c), dot(r & p, c, a)
    scale2 = aa * bb * cc
    volume2 = scale2 + 2 * ab * bc * ca - aa * bc * bc - bb * ca * ca - cc * ab * ab
    sound = (volume2 > 1e-12 * scale2) & volume2.isfinite()
    do = "give the cell, or set pbc False on that axis"
    text = message("independent cell vectors on periodic axes", "other ones in system {}", do)
    status.note(~sound, text, _numbers(sound))


def _edges(
    inputs: dict[str, torch.Tensor], real: Real, cutoff: float | None, status: Status
) -> dict[str, torch.Tensor]:
    """edge_index and cell_offsets as the model sees them, with ghost edges in all other slots."""
    pos, cell, batch = inputs["pos"], inputs["cell"], inputs["batch"]
    n_atoms = len(pos)
    if len(cell) == 1:
        batch = torch.zeros_like(batch)  # as it is, too; a compiler need not look at this one
    edges = inputs["edge_index"].long()
    slot = _numbers(edges[0])
    negative = (edges < 0).any(0)
    inside = ~negative & (edges < n_atoms).all(0)
    edges = torch.where(inside, edges, 0)
    i, j = edges
    apart = inside & (batch[i] != batch[j])
    text = message(
        "edges within one system, or slots marked unused by an index >= N",
        "atoms {} of system {} and {} of system {}, or a negative index, in slot {}",
        "look at how the edges were made",
    )
    status.note(negative | apart, text, i, batch[i], j, batch[j], slot)
    kept = inside & ~apart & real.atoms[i] & real.atoms[j]
    # both directions, as the contract has it
    ghost = n_atoms + (slot + torch.arange(2, device=slot.device)[:, None]) % 2
    places = real.place[edges]
    offsets = inputs.get("cell_offsets")
    if cutoff is None or offsets is None or not len(slot):
        found = {"edge_index": torch.where(kept, places, ghost)}
        return found if offsets is None else found | {"cell_offsets": offsets}
    shifts = (offsets.to(cell.dtype)[:, :, None] * cell[batch[i]]).sum(1)
    length = torch.linalg.vector_norm(pos[j] - pos[i] + shifts, dim=-1)
    distance = torch.where(kept, length, cutoff)
    text = message(
        "atoms apart from one another",
        "atoms {} and {} of system {} {} Angstrom apart",
        "take one of them out, or look at the step before",
    )
    status.note(distance < TOUCHING, text, i, j, batch[i], distance, first=distance.argmin())
    kept = kept & (length < cutoff)
    return {
        "edge_index": torch.where(kept, places, ghost),
        "cell_offsets": torch.where(kept[:, None], offsets, 0),
    }


def _with_ghosts(
    inputs: dict[str, torch.Tensor], real: Real, edges: dict[str, torch.Tensor], card: Card
) -> dict[str, torch.Tensor]:
    """The inputs as the model sees them: real atoms first, then padding, then ghosts."""
    if not real.ghosts:
        return inputs | edges
    pos, cell, pbc = inputs["pos"], inputs["cell"], inputs["pbc"]
    numbers, batch = inputs["atomic_numbers"], inputs["batch"]
    n_atoms, n_systems = len(pos), len(cell)
    length = card.cutoff or 1.0
    # padding atoms lie far from the ghosts and from one another
    far = _along_x(4 * length * (2 + _numbers(pos)), pos)
    everyone = torch.arange(n_atoms + real.ghosts, device=pos.device)
    ghosts = _along_x(length / 2 * (everyone - n_atoms), pos)
    box = 2 * length * torch.eye(3, dtype=cell.dtype, device=cell.device)
    last = torch.arange(n_systems + 1, device=cell.device) == n_systems
    element, system = numbers.amin(), torch.full_like(everyone, n_systems)
    seen = {
        "pos": _placed(ghosts, torch.where(real.atoms[:, None], pos, far), real),
        "atomic_numbers": _placed(element.expand(len(everyone)).clone(), numbers, real),
        "batch": _placed(system, torch.where(real.atoms, batch, n_systems), real),
        # unlike _longer, which compilers would evaluate again for each edge, this has a place
        "cell": torch.cat([cell, box[None]]),
        "pbc": torch.where(last[:, None], card.needs_pbc, _longer(pbc)),
    }
    seen |= edges
    return {key: seen[key] if key in seen else _extended(key, x, real) for key, x in inputs.items()}


def _along_x(x: torch.Tensor, like: torch.Tensor) -> Float[torch.Tensor, "K 3"]:
    """Points on the first axis."""
    return nn.functional.pad(x.to(like.dtype)[:, None], (0, 2))


def _placed(ghosts: torch.Tensor, x: torch.Tensor, real: Real) -> torch.Tensor:
    """Rows of atoms where the model sees them, before the last rows of `ghosts`."""
    return ghosts.to(x.dtype).index_copy(0, real.place, x)


def _longer(x: torch.Tensor) -> torch.Tensor:
    """x with one more row, of zeros. Compilers give torch.cat of the same a place in memory for
    each part."""
    return nn.functional.pad(x, (0, 0) * (x.ndim - 1) + (0, 1))


def _extended(key: str, x: torch.Tensor, real: Real) -> torch.Tensor:
    """Another input of the contract, with zeros for what was added.

    Raises: ValueError for a tensor outside of the contract, whose axes nobody knows."""
    if key not in INPUTS:
        if isinstance(x, torch.Tensor):
            do = f'pass one of {", ".join(INPUTS)}, or take lane="ffi"'
            raise ValueError(message("inputs of the contract for a compiled graph", key, do))
        return x
    axis = INPUTS[key][0][0]
    if axis == "N":
        return _placed(x.new_zeros(len(x) + real.ghosts, *x.shape[1:]), x, real)
    if axis == "B":
        return _longer(x)
    return x


def _cut(key: str, x: torch.Tensor, real: Real, n_systems: int) -> torch.Tensor:
    """An output as the caller sees it: N atoms, B systems, zeros where nothing is real.

    Raises: ValueError for an output outside of the contract."""
    if key not in OUTPUTS:
        do = f"return {', '.join(OUTPUTS)}"
        raise ValueError(message("outputs of the contract from a compiled graph", key, do))
    for axis, size in enumerate(OUTPUTS[key][0]):
        if size == "N":
            kept = real.atoms
            x = x.index_select(axis, real.place)
        elif size == "B":
            kept = real.systems
            x = x.narrow(axis, 0, n_systems)
        else:
            continue
        x = torch.where(kept.reshape(-1, *[1] * (x.ndim - axis - 1)), x, 0)
    return x


# outputs that must be finite, and what a row of each is
FINITE = {"energy": "system", "position_gradients": "atom", "cell_gradients": "system"}


def _check_finite(
    found: dict[str, torch.Tensor], batch: torch.Tensor, name: str, status: Status
) -> None:
    """Energies and gradients that are not finite."""
    do = "look at its structure: atoms may be too close"
    for key, what in FINITE.items():
        if key not in found:
            continue
        wrong = ~found[key].detach().isfinite()
        wrong = wrong.flatten(1).any(1) if wrong.ndim > 1 else wrong
        where = "atom {} of system {}" if what == "atom" else "system {}"
        text = message(f"a finite {key} from {name}", f"another one for {where}", do)
        places = [_numbers(wrong)] + ([batch] if what == "atom" else [])
        status.note(wrong, text, *places)


def _or_nan(x: torch.Tensor, fine: torch.Tensor) -> torch.Tensor:
    """An output, NaN where something is wrong."""
    return torch.where(fine, x, torch.nan) if x.is_floating_point() else x


def _numbers(x: torch.Tensor) -> Int[torch.Tensor, " K"]:
    """0, 1, 2, ... for the rows of x."""
    return torch.arange(len(x), device=x.device)
