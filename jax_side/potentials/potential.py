"""A model of the potential contract -> a differentiable energy function."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from bridge.card import Card, shared_out
from bridge.contract import CONDITIONS, added, called, check_inputs, check_outputs
from bridge.errors import message, spec
from jax_side.potentials import strain
from jax_side.potentials.derivatives import Call, Inputs, Model, Named, gradient_of, outputs
from jax_side.potentials.outputs import Marking, check_unused

Pbc = bool | Bool[np.ndarray, "*B 3"] | Bool[jax.Array, "*B 3"]
Positions = Float[ArrayLike, "N 3"]  # in Angstrom
Cell = Float[ArrayLike, "*B 3 3"]  # lattice vectors as rows, in Angstrom
Energy = Float[jax.Array, "*B"]  # in eV; a scalar for one system


def potential(
    model: Model,
    *,
    atomic_numbers: Int[np.ndarray, " N"] | Int[jax.Array, " N"],
    pbc: Pbc | None = None,
    batch: Int[np.ndarray, " N"] | Int[jax.Array, " N"] | None = None,
    n_systems: int = 1,
    card: Card | None = None,
    **extras: Any,
) -> Potential:
    """Returns a model bound to its atoms, as a function `energy(positions, cell=None)` in eV that
    differentiates as JAX does.

    `model` is a JAX callable (a bridged torch model, or pure JAX) from the dict of the contract to
    a dict with

        energy (B,) eV,
        position_gradients g = dE/dr at fixed cell (N,3) eV/Angstrom,
        cell_gradients G = dE/dh at fixed Cartesian positions (B,3,3) eV/Angstrom,
        and any other outputs.

    jax_side.potentials.strain.with_gradients makes such a model of one that returns an energy
    alone. The model is called with pos, cell, pbc, batch and atomic_numbers (N,), and with the
    `extras` (charge, spin, edge_index, ...) as they are given here. Inputs that change from step to
    step are given in the call: energy(positions, cell, edge_index=..., cell_offsets=...).

    Without `batch` there is one system. Then positions are (N,3), cell is (3,3) by rows or None for
    open boundaries, pbc is (3,), and the energy is a scalar. With `batch` (N,) int, sorted, there
    are n_systems. Then cell is (B,3,3) or None, pbc is (B,3), and the energy is (B,). pbc may be
    one bool for all axes. If it is None, all axes are periodic if a cell is given, and none
    otherwise. Without a cell the model gets zeros.

    Derivatives come from the model's own gradients, dE[b] = sum_{i in b} g_i . dr_i + <G_b, dh_b>,
    so that value and gradient cost one evaluation. Higher orders differentiate the model. jit,
    grad, value_and_grad, jvp, hessian, vmap, scan and remat compose with it. Energies bound to
    equal things are equal and hash alike, so that they share a trace as static arguments of jit.
    NumPy arrays that are given here are copied.

    `energy.outputs(positions, cell)` is the model's whole dict, `energy.forces(positions, cell)` is
    -g, and `energy.stress(positions, cell)` is W / V, tension positive, (3,3) or (B,3,3). Each costs
    one evaluation. `a + b` is the sum of two energies of the same atoms. Outputs that are additive
    are added, and those that only one of the two gives are kept.

    `card` (bridge.Card) says what the model has and needs; None stands for the model's own card, if
    it has one. Elements, boundaries, inputs, the dtype and the order of derivatives are checked
    against it before anything runs. A charge, spin or field for which the card has no use must be
    zero. Where it is traced, so that nobody can see its value, energy and gradients are NaN in
    systems where it is not zero. A model without a card is called with whatever is given here.

    Raises: ValueError for anything that the card does not have, for shapes, dtypes or outputs
    outside the contract, for positions and cell of unlike dtype, for floats that JAX would narrow
    (float64 without x64) and for pbc without a cell; NotImplementedError for a derivative in an
    input for which the model gives no gradient, naming it.

    >>> spring = strain.with_gradients(lambda x: (x["pos"] ** 2).sum()[None])
    >>> energy = potential(spring, atomic_numbers=np.array([1, 1]))
    >>> jax.grad(energy)(jnp.ones((2, 3))).tolist()
    [[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]]
    """
    return Potential(
        model,
        atomic_numbers,
        pbc,
        batch,
        n_systems,
        extras,
        card or getattr(model, "card", None) or UNKNOWN,
    )


# The card of a model that nobody has described: it may use charge, spin and field.
UNKNOWN = Card(optional_inputs=CONDITIONS)


class Potential:
    """What `potential` returns; its docstring is the documentation."""

    def __init__(
        self,
        model: Model,
        atomic_numbers: Int[np.ndarray, " N"] | Int[jax.Array, " N"],
        pbc: Pbc | None,
        batch: Int[np.ndarray, " N"] | Int[jax.Array, " N"] | None,
        n_systems: int,
        extras: dict[str, Any],
        card: Card,
    ) -> None:
        self.model = model
        self.pbc = _frozen(pbc)
        self.n_systems = n_systems
        self.single = batch is None
        self.card = card
        _check_call(extras, batch, n_systems)
        _check_numbers(atomic_numbers)
        batch = np.zeros(len(atomic_numbers), np.int32) if batch is None else batch
        fixed = {"atomic_numbers": atomic_numbers, "batch": batch, **extras}
        self.fixed = {name: _frozen(x) for name, x in fixed.items() if x is not None}
        self._check_card()
        bound = sorted({"pbc": pbc, **self.fixed}.items())
        content = [(name, _content(x)) for name, x in bound]
        self._key = (model, card, self.single, n_systems, *content)
        self._hash = hash(self._key)

    def __call__(self, positions: Positions, cell: Cell | None = None, **changing: Any) -> Energy:
        energy = _energy(*self._bind(positions, cell, changing))
        return energy[0] if self.single else energy

    def outputs(self, positions: Positions, cell: Cell | None = None, **changing: Any) -> Named:
        """Returns the model's whole dict, checked, with an axis of systems also where there is one.

        Its derivatives are JAX's own derivatives of the model.
        """
        return _outputs(*self._bind(positions, cell, changing))

    def forces(
        self, positions: Positions, cell: Cell | None = None, **changing: Any
    ) -> Float[jax.Array, "N 3"]:
        """Returns the forces -g (N,3) in eV/Angstrom.

        Raises: NotImplementedError for a model that does not return g.
        """
        return -gradient_of(self.outputs(positions, cell, **changing), "pos")

    def stress(
        self, positions: Positions, cell: Cell | None = None, **changing: Any
    ) -> Float[jax.Array, "*B 3 3"]:
        """Returns the stress W / V in eV/Angstrom^3, tension positive, (3,3) for one system and
        (B,3,3) for several.

        Raises: NotImplementedError for a model that does not return g and G; ValueError for a
        system without a periodic axis or with a singular cell.
        """
        model, inputs = self._bind(positions, cell, changing)
        out = _outputs(model, inputs)
        g, G = gradient_of(out, "pos"), gradient_of(out, "cell")
        virial = strain.virial(g, G, inputs["pos"], inputs["batch"], inputs["cell"])
        result = strain.stress(virial, inputs["cell"], inputs["pbc"])
        return result[0] if self.single else result

    def check(self, positions: Positions, cell: Cell | None = None, **changing: Any) -> None:
        """Evaluates the model once, outside of every compiled program, with all that it checks.

        On a GPU a program does not wait for the host to look at what is wrong: its results are NaN
        then (lane="ffi" raises the error with one of the next calls). Call this with the same
        arguments, and the error that names system and atom is raised. All is well where nothing is
        raised.

        Raises: TypeError inside of jit, where there are no values; and what the model raises.
        """
        if any(isinstance(x, jax.core.Tracer) for x in (positions, cell, *changing.values())):
            do = "call it after the program has run, on the arrays that it was given"
            raise TypeError(message("arrays with values for a check", "ones that jit traces", do))
        jax.block_until_ready(self.outputs(positions, cell, **changing))

    def __add__(self, other: Potential) -> Potential:
        if not isinstance(other, Potential):
            return NotImplemented
        if self._key[2:] != other._key[2:]:
            differ = [
                name
                for name in {*self.fixed, *other.fixed, "pbc"}
                if _content(self._bound(name)) != _content(other._bound(name))
            ]
            expected = "energies of the same atoms as terms of a sum"
            raise ValueError(
                message(
                    expected,
                    f"two that differ in {', '.join(sorted(differ)) or 'their systems'}",
                    "bind both to the same",
                )
            )
        extras = dict(self.fixed)
        atomic_numbers, batch = extras.pop("atomic_numbers"), extras.pop("batch")
        return Potential(
            _Sum((self.model, other.model)),
            atomic_numbers,
            self.pbc,
            None if self.single else batch,
            self.n_systems,
            extras,
            self.card + other.card,
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Potential) and self._key == other._key

    def __hash__(self) -> int:
        return self._hash

    @property
    def _model(self) -> Model:
        return _once(self.model) if self.card.derivative_order == 1 else self.model

    def _bound(self, name: str) -> Any:
        return self.pbc if name == "pbc" else self.fixed.get(name)

    def _check_card(self) -> None:
        """Checks what is known of the atoms before there are positions. Traced values are left to
        the model."""
        who = _name(self.model)
        known = {
            name: np.asarray(x)
            for name in ("atomic_numbers", "batch", "pbc")
            if (x := self._bound(name)) is not None and not isinstance(x, jax.core.Tracer)
        }
        if "atomic_numbers" in known and "batch" in known:
            numbers, batch = known["atomic_numbers"], known["batch"]
            if len(numbers) == len(batch):
                self.card.check_elements(numbers.tolist(), batch.tolist(), who)
        check_unused(self.card, self.fixed, who)
        if "pbc" in known:
            pbc = np.broadcast_to(known["pbc"], (self.n_systems, 3))
            self.card.check_pbc(pbc.tolist(), who)

    def _bind(
        self, positions: Positions, cell: Cell | None, changing: dict[str, Any]
    ) -> tuple[Model, Named]:
        """The model, and the dict of the contract that it is called with."""
        traced = check_unused(self.card, self.fixed | changing, _name(self.model))
        inputs = self._inputs(positions, cell, changing)
        return Marking(self._model, traced) if traced else self._model, inputs

    def _inputs(self, positions: Positions, cell: Cell | None, changing: dict[str, Any]) -> Named:
        """The dict of the contract."""
        pos = array("positions", positions)
        systems = () if self.single else (self.n_systems,)
        if cell is None and self.pbc is not None and np.any(self.pbc):
            raise ValueError(message("a cell, since pbc is set", "None", "pass cell, or pbc=None"))
        if twice := sorted(set(changing) & set(self.fixed)):
            raise ValueError(
                message(
                    "inputs either bound or given in the call",
                    f"{', '.join(twice)} in both",
                    "leave it out of one of them",
                )
            )
        periodic = cell is not None if self.pbc is None else self.pbc
        given = {
            "cell": jnp.zeros((*systems, 3, 3), pos.dtype) if cell is None else cell,
            "pbc": np.full((*systems, 3), periodic) if isinstance(periodic, bool) else periodic,
            **self.fixed,
            **{name: x for name, x in changing.items() if x is not None},
        }
        inputs = {name: array(name, x) for name, x in given.items()} | {"pos": pos}
        for name, inner in {"cell": (3, 3), "pbc": (3,)}.items():
            inputs[name] = self._by_system(name, inputs[name], (*systems, *inner))
        check_inputs(inputs)
        self.card.check_bound(inputs, _name(self.model))
        self.card.check_home(pos)
        if self.pbc is None:
            self.card.check_pbc([[cell is not None] * 3], _name(self.model))
        return inputs

    def _by_system(self, name: str, array: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The array with an axis of systems in front."""
        if array.shape != shape:
            got = spec(array.shape, array.dtype)
            do = "for several systems pass batch=..., n_systems=... and one each"
            raise ValueError(message(f"{name} as {spec(shape, array.dtype)}", got, do))
        return array[None] if self.single else array


def _check_call(extras: Collection[str], batch: Any, n_systems: int) -> None:
    """Raises ValueError for arguments that contradict one another."""
    for name in {"pos", "cell"} & set(extras):
        raise ValueError(
            message(
                f"no {name} among the extras",
                name,
                "pass it to the energy: energy(positions, cell)",
            )
        )
    for name in {"outputs", "gradients", "lane"} & set(extras):
        raise ValueError(
            message(
                f"no {name} among the extras",
                name,
                "leave it out, it is one of bridge.potential: a JAX model gives all its outputs, and "
                "strain.with_gradients its gradients",
            )
        )
    if batch is None and n_systems != 1:
        raise ValueError(message(f"batch for n_systems={n_systems}", "None", "pass batch (N,)"))


def _check_numbers(atomic_numbers: Any) -> None:
    """Raises TypeError for symbols and for ASE's Atoms."""
    if (
        isinstance(atomic_numbers, jax.Array | np.ndarray)
        and atomic_numbers.dtype.kind not in "USO"
    ):
        return
    if (dtype := np.asarray(atomic_numbers).dtype).kind in "USO":
        do = "pass atoms.numbers, or ase.symbols.symbols2numbers of symbols"
        what = type(atomic_numbers).__name__
        raise TypeError(message("atomic numbers, integers", f"{what} of {dtype}", do))


def _energy(model: Model, inputs: Named) -> Float[jax.Array, " B"]:
    """The energies, which differentiate by the model's gradients and by nothing else."""
    places = {name: name for name in inputs}
    return outputs(Call(partial(_outputs, model), places, "refused"), inputs)["energy"]


def _outputs(model: Model, inputs: Inputs) -> Named:
    """The model's dict, checked."""
    out = called(model, inputs, _name(model))
    check_outputs(out, inputs["pos"].shape[0], inputs["cell"].shape[0])
    return out


def _name(model: Any) -> str:
    return getattr(model, "__name__", type(model).__name__)


@dataclass(frozen=True)
class _Sum:
    """Models of the contract, added."""

    models: tuple[Model, ...]

    @property
    def __name__(self) -> str:
        return " + ".join(map(_name, self.models))

    def __call__(self, inputs: Inputs) -> Named:
        cards = [getattr(model, "card", None) or UNKNOWN for model in self.models]
        return added([model(given) for model, given in zip(self.models, shared_out(inputs, cards))])


@lru_cache
def _once(model: Model) -> Model:
    """The model, with an error for whoever differentiates its outputs again."""

    @jax.custom_jvp
    def outputs(inputs):
        return model(inputs)

    @outputs.defjvp
    def _(primals, tangents):
        raise NotImplementedError(
            message(
                f"first derivatives of {_name(model)}, whose card has derivative_order=1",
                "a second derivative",
                "take finite differences of its forces, or another model",
            )
        )

    return outputs


def array(name: str, x: Any) -> jax.Array:
    """Returns x as a JAX array of its own precision. Integers are int32 without x64, as everywhere
    in JAX.

    Raises: ValueError for floats that JAX would narrow; TypeError for what is no array, as ASE's
    Atoms and Cell; `name` says in its text what x is.
    """
    if type(x).__module__.partition(".")[0] == "ase":
        do = "pass NumPy's: atoms.positions, atoms.cell.array"
        raise TypeError(message(f"{name} as an array", f"ASE's {type(x).__name__}", do))
    result = jnp.asarray(x)
    dtype = getattr(x, "dtype", result.dtype)
    if result.dtype != dtype and jnp.issubdtype(result.dtype, jnp.inexact):
        do = "enable x64 (jax.config.update('jax_enable_x64', True)), or cast it yourself"
        got = f"{dtype}, narrowed to {result.dtype}"
        raise ValueError(message(f"{name} in a dtype that JAX keeps", got, do))
    return result


def _frozen(x: Any) -> Any:
    """A copy of what could be written to later, since the hash must stay true."""
    return x.copy() if isinstance(x, np.ndarray) else x


def _content(x: Any) -> Any:
    """Something that is equal for equal arrays; for what has no value yet, the object itself."""
    if x is None or isinstance(x, jax.core.Tracer):
        return _Same(x)
    array = np.asarray(x)
    return array.dtype.str, array.shape, array.tobytes()


class _Same:
    """Equality by identity, for tracers, whose own == is an array."""

    def __init__(self, x: Any) -> None:
        self.x = x

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.x is other.x

    def __hash__(self) -> int:
        return id(self.x)
