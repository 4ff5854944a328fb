"""torch-sim (the package torch-sim-atomistic, github.com/TorchSim/torch-sim): a potential as its
ModelInterface."""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache
from inspect import signature
from typing import get_args

import torch

from bridge.contract import GRADIENTS, INPUTS, OUTPUTS
from bridge.errors import message, missing
from torch_side.potentials import strain
from torch_side.potentials.model import Model

NAMES = {"node_energies": "energies"}  # outputs that have another name in torch-sim


def model(
    potential,
    *,
    dtype=None,
    device=None,
    compute_stress=None,
    compute_forces=None,
    memory_scales_with=None,
    batched="graph",
    charge=None,
    spin=None,
):
    """A potential of the contract as a torch_sim.models.interface.ModelInterface, for
    torch_sim.integrate, optimize, static and its integrators.

    `potential` is any torch_side.potentials.model.Model: SevenNet and the others of
    torch_side.models, a sum, a committee, one of your own (Wrapped), or a JAX potential
    (bridge.torch_potential(...) is a Model). It is held, not copied, as `.potential`.

    Called with a torch_sim SimState, or a dict of its fields (positions (N,3), cell (B,3,3) with
    lattice vectors as COLUMNS, pbc, atomic_numbers (N,), system_idx (N,)), it calls the potential
    once and gives, in eV and Angstrom, as torch-sim has it,

        energy (B,), forces (N,3) = -dE/dr, stress (B,3,3) = W/V, tension positive, and energies
        (N,), atom by atom, where the potential has node_energies; its other outputs (charges,
        magmoms, energy_std, ...) keep the contract's names

    all detached, unless positions or cell require grad: then they can be differentiated as the
    potential's own. Nothing is padded, cast or moved; a JAX potential compiles for each new number
    of atoms or systems.

    dtype, device   of the states that it takes: None for the potential's own, or torch's default
                    where it takes any (JAX potentials)
    compute_stress, compute_forces   None for what the potential has; both can be set later, as
                                     torch-sim's validator does. A
                    system without periodic boundaries has no stress, it is NaN: for molecules say
                    compute_stress=False
    memory_scales_with   the figure by which the autobatchers fill a batch, one of torch-sim's
                         (torch_sim.typing.MemoryScaling):
                    None for "n_atoms_x_density" (which counts neighbours) where the potential has a
                    cutoff, "n_atoms" where it has none. Memory that JAX runs out of is reported as
                    torch reports its own, by which an autobatcher finds the largest batch
    batched         "graph": one call with all systems. "sequential": one call for each system, for
                    potentials of one system (jax_side.engines.jax_md.model)
    charge, spin    a number for all systems, passed on as given; a state that has such a field goes
                    before. One that is not zero is an error where the potential has no use for it

    Raises: TypeError for a potential that is no Model; ValueError for other values of the
    arguments, a dtype or device that is not the potential's, and, when called, for a state of
    another dtype or device, and as the potential does; NotImplementedError for forces or a stress
    that the potential does not have; ImportError without torch-sim.

    >>> from bridge.card import Card
    >>> from torch_side.potentials.model import Wrapped
    >>> spring = Wrapped(lambda x: {"energy": x["pos"].square().sum().reshape(1)}, Card(), "autograd")
    >>> state = {"positions": torch.ones(1, 3), "cell": 2 * torch.eye(3)[None], "pbc": True, "atomic_numbers": torch.tensor([1])}
    >>> out = model(spring, compute_stress=False)(state)
    >>> out["energy"], out["forces"]
    (tensor([3.]), tensor([[-2., -2., -2.]]))
    """
    if not isinstance(potential, Model):
        raise TypeError(
            message(
                "a Model of the contract",
                f"a {type(potential).__name__}",
                "wrap it by torch_side.potentials.model.Wrapped, or bridge.torch_potential",
            )
        )
    TorchSim, figures = _interface()
    if memory_scales_with is None:
        memory_scales_with = "n_atoms" if potential.card.cutoff is None else "n_atoms_x_density"
    _one_of("memory_scales_with", memory_scales_with, figures)
    _one_of("batched", batched, ("graph", "sequential"))
    home, given = _home(potential, dtype, device), {"charge": charge, "spin": spin}
    for name in potential.card.unused(
        [name for name, number in given.items() if number is not None]
    ):
        potential.card.check_unused(name, [float(given[name])], type(potential).__name__)
    return TorchSim(
        potential, home, compute_stress, compute_forces, memory_scales_with, batched, given
    )


def integrator(name, model, **settings):
    """torch-sim's integrator as (init(state), step(state)): of its 0.6 name_init and name_step, of
    its 0.3 what name(model, ...) makes."""
    import torch_sim

    init, step, make = (getattr(torch_sim, name + end, None) for end in ("_init", "_step", ""))
    if step is None and make is None:
        raise ValueError(
            message(
                "an integrator of torch-sim, such as nve",
                repr(name),
                "see what torch_sim.integrators of this version has",
            )
        )
    if step is None:
        return make(model, **settings)
    each = {key: value for key, value in settings.items() if key in signature(step).parameters}
    if unknown := settings.keys() - each.keys() - signature(init).parameters.keys():
        raise TypeError(
            message(
                f"settings of torch_sim.{name}_init and _step",
                ", ".join(sorted(unknown)),
                "leave them out",
            )
        )
    return lambda state: init(state=state, model=model, **settings), lambda state: step(
        state=state, model=model, **each
    )


@cache
def _interface():
    """The class, made here, for its base is torch-sim's; and the figures that torch-sim's
    autobatchers can count by."""
    try:
        from torch_sim.models.interface import ModelInterface
        from torch_sim.typing import MemoryScaling
    except ImportError as error:
        raise missing("torch-sim-atomistic", "simulations of batches with torch_sim") from error

    class TorchSim(ModelInterface):
        """What model() returns; its docstring is the documentation."""

        def __init__(self, potential, home, stress, forces, memory, batched, given):
            super().__init__()
            self.potential, (self._dtype, self._device) = potential, home
            self._memory_scales_with, self.batched, self.given = memory, batched, given
            has = potential.card.outputs
            self.compute_stress = "cell_gradients" in has if stress is None else stress
            self.compute_forces = "position_gradients" in has if forces is None else forces

        compute_stress = property(
            lambda self: self._compute_stress,
            lambda self, on: _ask(self, "stress", "cell_gradients", on),
        )
        compute_forces = property(
            lambda self: self._compute_forces,
            lambda self, on: _ask(self, "forces", "position_gradients", on),
        )

        def forward(self, state, **kwargs):
            inputs = _inputs(state, self)
            live = torch.is_grad_enabled() and any(inputs[name].requires_grad for name in GRADIENTS)
            with torch.set_grad_enabled(live), _out_of_memory():
                evaluate = (
                    self.potential
                    if self.batched == "graph"
                    else lambda x: _one_by_one(self.potential, x)
                )
                out = _outputs(dict(evaluate(inputs)), inputs, self)
            return out if live else {name: x.detach() for name, x in out.items()}

        def _apply(self, fn, recurse=True):
            """to(dtype), to(device): the home follows the weights."""
            super()._apply(fn, recurse)
            moved = fn(torch.empty(0, dtype=self._dtype, device=self._device))
            self._dtype, self._device = moved.dtype, moved.device
            return self

        def extra_repr(self):
            return f"dtype={self.dtype}, device={self.device}, memory_scales_with={self.memory_scales_with!r}, batched={self.batched!r}"

    return TorchSim, get_args(MemoryScaling)


def _inputs(state, model) -> dict:
    """The dict of the contract for a SimState, or a dict of its fields; cells as rows."""
    get = state.get if isinstance(state, dict) else lambda name: getattr(state, name, None)
    pos, cell = get("positions"), get("cell")
    _check_home(pos, cell, model)
    cell = (cell if cell.ndim == 3 else cell[None]).mT.contiguous()
    pbc = (
        torch.as_tensor(get("pbc"), dtype=torch.bool, device=pos.device)
        .expand(len(cell), 3)
        .contiguous()
    )
    batch = get("system_idx")
    batch = torch.zeros(len(pos), dtype=torch.int64, device=pos.device) if batch is None else batch
    inputs = {
        "pos": pos,
        "cell": cell,
        "pbc": pbc,
        "batch": batch,
        "atomic_numbers": get("atomic_numbers"),
    }
    for name, number in model.given.items():
        if (value := number if get(name) is None else get(name)) is not None:
            inputs[name] = (
                torch.as_tensor(value, dtype=pos.dtype, device=pos.device)
                .expand(len(cell))
                .contiguous()
            )
    return inputs


def _check_home(pos, cell, model):
    """ValueError for a state of another dtype or device."""
    for name, x in (("positions", pos), ("cell", cell)):
        if (x.dtype, x.device) != (model.dtype, model.device):
            expected, got = (
                f"{dtype} on {device}"
                for dtype, device in ((model.dtype, model.device), (x.dtype, x.device))
            )
            do = "make the state by initialize_state(system, model.device, model.dtype), or the model with another dtype="
            raise ValueError(message(f"{name} as {expected}, where the model is", got, do))


def _outputs(out, inputs, model) -> dict:
    """What torch-sim calls the potential's outputs."""
    gradients = {name: out.pop(name, None) for name in GRADIENTS.values()}
    results = {NAMES.get(name, name): x for name, x in out.items()}
    g, G = gradients.values()
    if model.compute_forces:
        results["forces"] = -g
    if model.compute_stress:
        W = strain.virial(g, G, inputs["pos"], inputs["batch"], inputs["cell"])
        results["stress"] = _stress(W, inputs["cell"], inputs["pbc"])
    return results


def _stress(W, cell, pbc):
    """W/V; NaN for a system without a periodic axis, as torch_sim.static has it for what is not
    computed."""
    none = ~pbc.any(-1)[:, None, None]
    cell = torch.where(none, torch.eye(3, dtype=cell.dtype, device=cell.device), cell)
    return strain.stress(W, cell, pbc | none[:, 0]).masked_fill(none, torch.nan)


def _one_by_one(potential, inputs) -> dict:
    """One call for each system."""
    sizes = {
        "N": inputs["batch"].bincount(minlength=len(inputs["cell"])).tolist(),
        "B": [1] * len(inputs["cell"]),
    }
    parts = {name: x.split(sizes[INPUTS[name][0][0]]) for name, x in inputs.items()}
    systems = [dict(zip(parts, values)) for values in zip(*parts.values())]
    outs = [potential(system | {"batch": torch.zeros_like(system["batch"])}) for system in systems]
    return {name: torch.cat([out[name] for out in outs], _axis(name)) for name in outs[0]}


def _axis(name) -> int:
    """The axis along which an output of several systems is laid end to end."""
    axes = [
        axis
        for axis, size in enumerate(OUTPUTS[name][0] if name in OUTPUTS else ())
        if size in ("N", "B")
    ]
    if len(axes) != 1:
        raise ValueError(
            message(
                'outputs with one axis of atoms or systems for batched="sequential"',
                name,
                'leave it out, or take batched="graph"',
            )
        )
    return axes[0]


def _ask(model, what, output, on):
    """The setters of compute_stress and compute_forces; torch-sim takes NotImplementedError for a
    no."""
    if on and output not in model.potential.card.outputs:
        who = type(model.potential).__name__
        raise NotImplementedError(
            message(
                f"a potential with {output} for compute_{what}=True",
                f"{who}, which has none",
                "set it to False",
            )
        )
    setattr(model, f"_compute_{what}", bool(on))


def _home(potential, dtype, device):
    """Where states have to be, (dtype, device): the potential's, or what is asked for where it
    takes any."""
    tensors = (x for x in (*potential.parameters(), *potential.buffers()) if x.is_floating_point())
    probe, card = next(tensors, torch.empty(0)), potential.card
    own = (
        getattr(torch, card.dtype) if card.dtype else None,
        torch.empty(0, device=card.device).device if card.device else None,
    )
    asked = dtype, None if device is None else torch.empty(0, device=device).device
    for name, mine, wanted in zip(("dtype", "device"), own, asked):
        if None not in (mine, wanted) and mine != wanted:
            raise ValueError(
                message(
                    f"{name}={mine}, the potential's",
                    str(wanted),
                    f"convert the potential first: potential.to({wanted})",
                )
            )
    return tuple(
        next(x for x in (wanted, mine, default) if x is not None)
        for wanted, mine, default in zip(asked, own, (probe.dtype, probe.device))
    )


@contextmanager
def _out_of_memory():
    """XLA's error as torch's, for which torch-sim's autobatchers look."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise torch.OutOfMemoryError(f"CUDA out of memory, found by XLA: {error}") from error


def _one_of(name, value, known):
    if value not in known:
        raise ValueError(
            message(f"{name} as one of {', '.join(known)}", repr(value), "take one of these")
        )
