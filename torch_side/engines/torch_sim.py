"""torch-sim (the package torch-sim-atomistic, github.com/TorchSim/torch-sim): a potential as its
ModelInterface."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import cache
from inspect import signature
from typing import Any, Literal, TypeVar, get_args

import torch
from jaxtyping import Bool, Float

from bridge.contract import GRADIENTS, INPUTS, OUTPUTS
from bridge.errors import message, missing
from torch_side.potentials import strain
from torch_side.potentials.model import Model

NAMES = {"node_energies": "energies"}  # outputs that have another name in torch-sim


def model(
    potential: Model,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    compute_stress: bool | None = None,
    compute_forces: bool | None = None,
    memory_scales_with: str | None = None,
    batched: Literal["graph", "sequential"] = "graph",
    charge: float | None = None,
    spin: float | None = None,
) -> Any:
    """Returns a potential of the contract as a torch_sim.models.interface.ModelInterface, for
    torch_sim.integrate, optimize, static and its integrators.

    `potential` is any torch_side.potentials.model.Model: SevenNet and the others of
    torch_side.models, a sum, a committee, one of your own (Wrapped), or a JAX potential
    (bridge.torch_potential(...) is a Model). It is held, not copied, as `.potential`.

    The result is called with a torch_sim SimState, or a dict of its fields (positions (N,3), cell
    (B,3,3) with lattice vectors as COLUMNS, pbc, atomic_numbers (N,), system_idx (N,)). It calls
    the potential once and gives, in eV and Angstrom, as torch-sim has it,

        energy (B,), forces (N,3) = -dE/dr, stress (B,3,3) = W/V, tension positive, and energies
        (N,), atom by atom, where the potential has node_energies; its other outputs (charges,
        magmoms, energy_std, ...) keep the contract's names

    All are detached, unless positions or cell require grad: then they can be differentiated as the
    potential's own. Nothing is padded, cast or moved. A JAX potential compiles for each new number
    of atoms or systems.

    dtype, device       those of the states that it takes. None means the potential's own, or
                        torch's default where the potential takes any (JAX potentials)
    compute_stress, compute_forces
                        whether these are given. None means: if the potential has them. Both can be
                        set later, as torch-sim's validator does. The stress of a system without
                        periodic boundaries is NaN; for molecules pass compute_stress=False
    memory_scales_with  the figure by which the autobatchers fill a batch, one of torch-sim's
                        (torch_sim.typing.MemoryScaling). None means "n_atoms_x_density" (which
                        counts neighbours) where the potential has a cutoff, and "n_atoms" where it
                        has none. When JAX runs out of memory, the error is torch's own, by which an
                        autobatcher finds the largest batch
    batched             "graph": one call with all systems. "sequential": one call for each system,
                        for potentials of one system (jax_side.engines.jax_md.model)
    charge, spin        a number for all systems, passed on as given. A field of that name in the
                        state takes precedence. A number that is not zero is an error where the
                        potential has no use for it

    Raises: TypeError if `potential` is not a Model; ValueError for other values of the arguments,
    and for a dtype or device that is not the potential's; NotImplementedError for forces or a
    stress that the potential does not have; ImportError without torch-sim. A call raises ValueError
    for a state of another dtype or device, and as the potential does.

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
    home = _home(potential, dtype, device)
    given = {"charge": charge, "spin": spin}
    numbers = {name: float(number) for name, number in given.items() if number is not None}
    for name in potential.card.unused(numbers):
        potential.card.check_unused(name, [numbers[name]], type(potential).__name__)
    return TorchSim(
        potential, home, compute_stress, compute_forces, memory_scales_with, batched, given
    )


def integrator(
    name: str, model: Any, **settings: Any
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Returns torch-sim's integrator as (init(state), step(state)).

    `name` is that of torch-sim ("nve"), `model` its ModelInterface. The functions are name_init and
    name_step of torch-sim 0.6, with those of the `settings` that they take, or what name(model,
    **settings) of torch-sim 0.3 makes.

    Raises: ValueError for an integrator that torch-sim does not have; TypeError for settings that
    neither function takes."""
    import torch_sim

    parts: dict[str, Any] = {
        end: getattr(torch_sim, name + end, None) for end in ("_init", "_step", "")
    }
    init, step, make = parts.values()
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
    of_step, of_init = signature(step).parameters, signature(init).parameters
    each = {key: value for key, value in settings.items() if key in of_step}
    if unknown := settings.keys() - each.keys() - of_init.keys():
        raise TypeError(
            message(
                f"settings of torch_sim.{name}_init and _step",
                ", ".join(sorted(unknown)),
                "leave them out",
            )
        )
    return (
        lambda state: init(state=state, model=model, **settings),
        lambda state: step(state=state, model=model, **each),
    )


@cache
def _interface() -> tuple[type, tuple[str, ...]]:
    """The class of `model`, made here because its base is torch-sim's, and the figures that
    torch-sim's autobatchers can count by."""
    try:
        from torch_sim.models.interface import ModelInterface
        from torch_sim.typing import MemoryScaling
    except ImportError as error:
        raise missing("torch-sim-atomistic", "simulations of batches with torch_sim") from error

    class TorchSim(ModelInterface):
        """What model() returns; its docstring is the documentation."""

        def __init__(
            self,
            potential: Model,
            home: tuple[torch.dtype, torch.device],
            stress: bool | None,
            forces: bool | None,
            memory: Any,
            batched: str,
            given: dict[str, float | None],
        ) -> None:
            super().__init__()
            self.potential = potential
            self._dtype, self._device = home
            self._memory_scales_with = memory
            self.batched = batched
            self.given = given
            has = potential.card.outputs
            self.compute_stress = "cell_gradients" in has if stress is None else stress
            self.compute_forces = "position_gradients" in has if forces is None else forces

        @property
        def compute_stress(self) -> bool:
            """Whether the stress is given."""
            return self._compute_stress

        @compute_stress.setter
        def compute_stress(self, on: bool) -> None:
            self._compute_stress = _asked(self.potential, "stress", "cell_gradients", on)

        @property
        def compute_forces(self) -> bool:
            """Whether forces are given."""
            return self._compute_forces

        @compute_forces.setter
        def compute_forces(self, on: bool) -> None:
            self._compute_forces = _asked(self.potential, "forces", "position_gradients", on)

        def forward(self, state: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
            """Returns the outputs of a SimState, or of a dict of its fields."""
            inputs = _inputs(state, self)
            live = torch.is_grad_enabled() and any(inputs[name].requires_grad for name in GRADIENTS)
            with torch.set_grad_enabled(live), _out_of_memory():
                if self.batched == "graph":
                    found = self.potential(inputs)
                else:
                    found = _one_by_one(self.potential, inputs)
                out = _outputs(dict(found), inputs, self)
            return out if live else {name: x.detach() for name, x in out.items()}

        def _apply(self, fn, recurse=True):
            """to(dtype), to(device): the states that are taken follow the weights."""
            super()._apply(fn, recurse)
            moved = fn(torch.empty(0, dtype=self._dtype, device=self._device))
            self._dtype, self._device = moved.dtype, moved.device
            return self

        def extra_repr(self) -> str:
            """Returns the settings, for repr."""
            return (
                f"dtype={self.dtype}, device={self.device}, "
                f"memory_scales_with={self.memory_scales_with!r}, batched={self.batched!r}"
            )

    return TorchSim, get_args(MemoryScaling)


def _inputs(state: Any, model: Any) -> dict[str, torch.Tensor]:
    """The dict of the contract for a SimState, or a dict of its fields; cells by rows."""

    def get(name: str) -> Any:
        return state.get(name) if isinstance(state, dict) else getattr(state, name, None)

    pos, cell = get("positions"), get("cell")
    _check_home(pos, cell, model)
    cell = (cell if cell.ndim == 3 else cell[None]).mT.contiguous()
    systems, device = len(cell), pos.device
    pbc = torch.as_tensor(get("pbc"), dtype=torch.bool, device=device)
    pbc = pbc.expand(systems, 3).contiguous()
    batch = get("system_idx")
    if batch is None:
        batch = torch.zeros(len(pos), dtype=torch.int64, device=device)
    inputs = {
        "pos": pos,
        "cell": cell,
        "pbc": pbc,
        "batch": batch,
        "atomic_numbers": get("atomic_numbers"),
    }
    for name, number in model.given.items():
        value = get(name)
        value = number if value is None else value
        if value is not None:
            each = torch.as_tensor(value, dtype=pos.dtype, device=device)
            inputs[name] = each.expand(systems).contiguous()
    return inputs


def _check_home(pos: torch.Tensor, cell: torch.Tensor, model: Any) -> None:
    """ValueError for a state of another dtype or device than the model's."""
    for name, x in (("positions", pos), ("cell", cell)):
        if (x.dtype, x.device) != (model.dtype, model.device):
            expected = f"{model.dtype} on {model.device}"
            got = f"{x.dtype} on {x.device}"
            do = "make the state by initialize_state(system, model.device, model.dtype), or the model with another dtype="
            raise ValueError(message(f"{name} as {expected}, where the model is", got, do))


def _outputs(
    out: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor], model: Any
) -> dict[str, torch.Tensor]:
    """The potential's outputs under the names and signs of torch-sim."""
    further = {name: x for name, x in out.items() if name not in GRADIENTS.values()}
    results = {NAMES.get(name, name): x for name, x in further.items()}
    if model.compute_forces:
        results["forces"] = -out["position_gradients"]
    if model.compute_stress:
        g, G = out["position_gradients"], out["cell_gradients"]
        W = strain.virial(g, G, inputs["pos"], inputs["batch"], inputs["cell"])
        results["stress"] = _stress(W, inputs["cell"], inputs["pbc"])
    return results


def _stress(
    W: Float[torch.Tensor, "B 3 3"],
    cell: Float[torch.Tensor, "B 3 3"],
    pbc: Bool[torch.Tensor, "B 3"],
) -> Float[torch.Tensor, "B 3 3"]:
    """W/V. For a system without a periodic axis it is NaN, which torch_sim.static uses for what is
    not computed."""
    none = ~pbc.any(-1)[:, None, None]
    cell = torch.where(none, torch.eye(3, dtype=cell.dtype, device=cell.device), cell)
    return strain.stress(W, cell, pbc | none[:, 0]).masked_fill(none, torch.nan)


def _one_by_one(potential: Model, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The potential's outputs by one call for each system."""
    n_systems = len(inputs["cell"])
    sizes = {
        "N": inputs["batch"].bincount(minlength=n_systems).tolist(),
        "B": [1] * n_systems,
    }
    parts = {name: x.split(sizes[INPUTS[name][0][0]]) for name, x in inputs.items()}
    systems = [dict(zip(parts, values)) for values in zip(*parts.values())]
    outs = [potential(system | {"batch": torch.zeros_like(system["batch"])}) for system in systems]
    return {name: torch.cat([out[name] for out in outs], _axis(name)) for name in outs[0]}


def _axis(name: str) -> int:
    """The axis along which an output of several systems is laid end to end."""
    sizes = OUTPUTS[name][0] if name in OUTPUTS else ()
    axes = [axis for axis, size in enumerate(sizes) if size in ("N", "B")]
    if len(axes) != 1:
        raise ValueError(
            message(
                'outputs with one axis of atoms or systems for batched="sequential"',
                name,
                'leave it out, or take batched="graph"',
            )
        )
    return axes[0]


def _asked(potential: Model, what: str, output: str, on: bool) -> bool:
    """`on` as a bool. NotImplementedError, by which torch-sim knows that a model can't do it, where
    `what` is asked for and the potential does not have the output."""
    if on and output not in potential.card.outputs:
        who = type(potential).__name__
        raise NotImplementedError(
            message(
                f"a potential with {output} for compute_{what}=True",
                f"{who}, which has none",
                "set it to False",
            )
        )
    return bool(on)


def _home(
    potential: Model, dtype: torch.dtype | None, device: torch.device | str | None
) -> tuple[torch.dtype, torch.device]:
    """Where states have to be, (dtype, device): the potential's, or what is asked for where it
    takes any. Where nobody says, it is the dtype or device of the potential's first weight."""
    tensors = (x for x in (*potential.parameters(), *potential.buffers()) if x.is_floating_point())
    probe, card = next(tensors, torch.empty(0)), potential.card
    own_dtype = getattr(torch, card.dtype) if card.dtype else None
    own_device = _device(card.device) if card.device else None
    asked_device = None if device is None else _device(device)
    return (
        _chosen("dtype", own_dtype, dtype, probe.dtype),
        _chosen("device", own_device, asked_device, probe.device),
    )


def _device(name: torch.device | str) -> torch.device:
    """The device as tensors name it: "cuda" is cuda:0."""
    return torch.empty(0, device=name).device


Choice = TypeVar("Choice")


def _chosen(name: str, own: Choice | None, wanted: Choice | None, default: Choice) -> Choice:
    """What is asked for, else the potential's own, else the default; ValueError where the first two
    differ."""
    if own is not None and wanted is not None and own != wanted:
        spelt = wanted if isinstance(wanted, torch.dtype) else repr(str(wanted))
        raise ValueError(
            message(
                f"{name}={own}, the potential's",
                str(wanted),
                f"convert the potential first: potential.to({spelt})",
            )
        )
    found = own if wanted is None else wanted
    return default if found is None else found


@contextmanager
def _out_of_memory() -> Iterator[None]:
    """Turns XLA's error into torch's, for which torch-sim's autobatchers look."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise torch.OutOfMemoryError(f"CUDA out of memory, found by XLA: {error}") from error


def _one_of(name: str, value: str, known: Collection[str]) -> None:
    """ValueError for a value that is not known."""
    if value not in known:
        raise ValueError(
            message(f"{name} as one of {', '.join(known)}", repr(value), "take one of these")
        )
