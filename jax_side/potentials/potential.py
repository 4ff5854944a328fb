"""A model of the potential contract -> a differentiable energy function."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from bridge.card import Card, shared_out
from bridge.contract import INFO, added, check_inputs, check_outputs
from bridge.errors import message, spec
from jax_side.potentials import strain
from jax_side.potentials.derivatives import Call, gradient_of, outputs
from jax_side.potentials.outputs import Marking, check_unused


def potential(model, *, atomic_numbers, pbc=None, batch=None, n_systems=1, card=None, **extras):
    """Bind a model to its atoms: the result is called as `energy(positions, cell=None)` and
    differentiates as JAX does.

    `model` is a JAX callable (a bridged torch model, or pure JAX) from the dict of the contract to
    a dict with

        energy (B,) eV,  position_gradients g = dE/dr at fixed cell (N,3),
        cell_gradients G = dE/dh at fixed Cartesian positions (B,3,3) eV/Angstrom, and what else it
        likes;

    for one that returns an energy alone see jax_side.potentials.strain.with_gradients. It is called
    with pos, cell, pbc, batch and atomic_numbers (N,), and with the `extras` (charge, spin,
    edge_index, ...) as they are given here. What changes from step to step is given in the call:
    energy(positions, cell, edge_index=..., cell_offsets=...).

    Without `batch` there is one system: positions (N,3), cell (3,3) by rows or None for open
    boundaries, pbc (3,), and the energy is a scalar. With `batch` (N,) int, sorted, there are
    n_systems: cell (B,3,3) or None, pbc (B,3), and the energy is (B,). pbc may be one bool for all
    axes; None means all if a cell is given, none otherwise. Without a cell the model gets zeros.

    Derivatives come from the model's own gradients, dE[b] = sum_{i in b} g_i . dr_i + <G_b, dh_b>,
    so that value and gradient cost one evaluation; higher orders differentiate the model. jit,
    grad, value_and_grad, jvp, hessian, vmap, scan and remat compose with it. Energies bound to
    equal things are equal and hash alike: as static arguments of jit they share a trace. numpy
    arrays given here are copied.

    `energy.outputs(positions, cell)` is the model's whole dict, `energy.forces(positions, cell)` is
    -g and `energy.stress(positions, cell)` is W / V, tension positive, (3,3) or (B,3,3): one
    evaluation each. `a + b` is the sum of two energies of the same atoms: what adds is added, what
    only one gives is kept.

    `card` (bridge.Card; None: the model's own, if it has one) says what the model has and needs;
    elements, boundaries, inputs, the dtype and the order of derivatives are checked against it
    before anything runs. A charge or spin without use on it must be zero; where it is traced, so
    that nobody sees it, energy and gradients are NaN in systems where it is not. Without a card the
    model is given what is given here.

    Raises: ValueError for what the card does not have, for shapes, dtypes or outputs outside the
    contract, for positions and cell of unlike dtype, for floats that JAX would narrow (float64
    without x64) and for pbc without a cell; NotImplementedError for a derivative in anything that
    the model gives no gradient of, naming it.

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


# of a model that nobody has described: it may use charge and spin
UNKNOWN = Card(optional_inputs=INFO)


class Potential:
    """What `potential` returns; its docstring is the documentation."""

    def __init__(self, model, atomic_numbers, pbc, batch, n_systems, extras, card):
        self.model, self.pbc, self.n_systems, self.single, self.card = (
            model,
            _frozen(pbc),
            n_systems,
            batch is None,
            card,
        )
        _check_call(extras, batch, n_systems)
        batch = np.zeros(len(atomic_numbers), np.int32) if batch is None else batch
        fixed = {"atomic_numbers": atomic_numbers, "batch": batch, **extras}
        self.fixed = {name: _frozen(x) for name, x in fixed.items() if x is not None}
        self._check_card()
        content = sorted({"pbc": pbc, **self.fixed}.items())
        self._key = (
            model,
            card,
            self.single,
            n_systems,
            *((name, _content(x)) for name, x in content),
        )
        self._hash = hash(self._key)

    def __call__(self, positions, cell=None, **changing):
        energy = _energy(*self._bind(positions, cell, changing))
        return energy[0] if self.single else energy

    def outputs(self, positions, cell=None, **changing):
        return _outputs(*self._bind(positions, cell, changing))

    def forces(self, positions, cell=None, **changing):
        return -gradient_of(self.outputs(positions, cell, **changing), "pos")

    def stress(self, positions, cell=None, **changing):
        model, inputs = self._bind(positions, cell, changing)
        out = _outputs(model, inputs)
        g, G = gradient_of(out, "pos"), gradient_of(out, "cell")
        virial = strain.virial(g, G, inputs["pos"], inputs["batch"], inputs["cell"])
        result = strain.stress(virial, inputs["cell"], inputs["pbc"])
        return result[0] if self.single else result

    def __add__(self, other):
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
        extras = {
            name: x for name, x in self.fixed.items() if name not in ("atomic_numbers", "batch")
        }
        batch = None if self.single else self.fixed["batch"]
        total = _Sum((self.model, other.model))
        return Potential(
            total,
            self.fixed["atomic_numbers"],
            self.pbc,
            batch,
            self.n_systems,
            extras,
            self.card + other.card,
        )

    def __eq__(self, other):
        return isinstance(other, Potential) and self._key == other._key

    def __hash__(self):
        return self._hash

    @property
    def _model(self):
        return _once(self.model) if self.card.derivative_order == 1 else self.model

    def _bound(self, name):
        return self.pbc if name == "pbc" else self.fixed.get(name)

    def _check_card(self):
        """What can be known of the atoms before there are positions; traced values are left to the
        model."""
        known = {
            name: np.asarray(x)
            for name in ("atomic_numbers", "batch", "pbc")
            if (x := self._bound(name)) is not None and not isinstance(x, jax.core.Tracer)
        }
        if {"atomic_numbers", "batch"} <= set(known) and len(known["batch"]) == len(
            known["atomic_numbers"]
        ):
            self.card.check_elements(
                known["atomic_numbers"].tolist(), known["batch"].tolist(), _name(self.model)
            )
        check_unused(self.card, self.fixed, _name(self.model))
        if "pbc" in known:
            self.card.check_pbc(
                np.broadcast_to(known["pbc"], (self.n_systems, 3)).tolist(), _name(self.model)
            )

    def _bind(self, positions, cell, changing):
        """The model, and the dict of the contract that it is called with."""
        traced = check_unused(self.card, self.fixed | changing, _name(self.model))
        inputs = self._inputs(positions, cell, changing)
        return Marking(self._model, traced) if traced else self._model, inputs

    def _inputs(self, positions, cell, changing):
        """The dict of the contract."""
        pos, systems = array("positions", positions), () if self.single else (self.n_systems,)
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
        pbc = np.full((*systems, 3), periodic) if isinstance(periodic, bool) else periodic
        cell = jnp.zeros((*systems, 3, 3), pos.dtype) if cell is None else cell
        given = {
            "cell": cell,
            "pbc": pbc,
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
            self.card.check_pbc([[periodic] * 3], _name(self.model))
        return inputs

    def _by_system(self, name, array, shape):
        """The array with an axis of systems in front."""
        if array.shape != shape:
            got, do = (
                spec(array.shape, array.dtype),
                "for several systems pass batch=..., n_systems=... and one each",
            )
            raise ValueError(message(f"{name} as {spec(shape, array.dtype)}", got, do))
        return array[None] if self.single else array


def _check_call(extras, batch, n_systems):
    """ValueError for what `potential` can't be called with."""
    for name in {"pos", "cell"} & set(extras):
        raise ValueError(
            message(
                f"no {name} among the extras",
                name,
                "pass it to the energy: energy(positions, cell)",
            )
        )
    if batch is None and n_systems != 1:
        raise ValueError(message(f"batch for n_systems={n_systems}", "None", "pass batch (N,)"))


def _energy(model, inputs):
    """Energies (B,), with the derivative that the model gives."""
    places = {name: name for name in inputs}
    return outputs(Call(partial(_outputs, model), places, "refused"), inputs)["energy"]


def _outputs(model, inputs):
    """The model's dict, checked."""
    out = model(inputs)
    check_outputs(out, inputs["pos"].shape[0], inputs["cell"].shape[0])
    return out


def _name(model):
    return getattr(model, "__name__", type(model).__name__)


@dataclass(frozen=True)
class _Sum:
    """Models of the contract, added."""

    models: tuple

    @property
    def __name__(self):
        return " + ".join(map(_name, self.models))

    def __call__(self, inputs):
        cards = [getattr(model, "card", None) or UNKNOWN for model in self.models]
        return added([model(given) for model, given in zip(self.models, shared_out(inputs, cards))])


@lru_cache
def _once(model):
    """The model, with an error for whoever differentiates its outputs again."""

    @jax.custom_jvp
    def outputs(inputs):
        return model(inputs)

    @outputs.defjvp
    def _(primals, tangents):
        expected, got = (
            f"first derivatives of {_name(model)}, whose card has derivative_order=1",
            "a second derivative",
        )
        raise NotImplementedError(
            message(expected, got, "take finite differences of its forces, or another model")
        )

    return outputs


def array(name, x):
    """x as a JAX array of its own precision; without x64 integers are int32, as everywhere in
    JAX."""
    array = jnp.asarray(x)
    if hasattr(x, "dtype") and array.dtype != x.dtype and jnp.issubdtype(array.dtype, jnp.inexact):
        do = "enable x64 (jax.config.update('jax_enable_x64', True)), or cast it yourself"
        raise ValueError(
            message(
                f"{name} in a dtype that JAX keeps", f"{x.dtype}, narrowed to {array.dtype}", do
            )
        )
    return array


def _frozen(x):
    """A copy of what could be written to later: the hash must stay true."""
    return x.copy() if isinstance(x, np.ndarray) else x


def _content(x):
    """Something that is equal for equal arrays; for what has no value yet, the object itself."""
    if x is None or isinstance(x, jax.core.Tracer):
        return _Same(x)
    array = np.asarray(x)
    return array.dtype.str, array.shape, array.tobytes()


class _Same:
    """Equality by identity for tracers, whose own == is an array."""

    def __init__(self, x):
        self.x = x

    def __eq__(self, other):
        return isinstance(other, _Same) and self.x is other.x

    def __hash__(self):
        return id(self.x)
