"""Direct potentials: models that return their own gradients, as kUPS has them; sums and scalings of
these."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any

import jax

from bridge.call import one_of
from bridge.card import Card, shared_out
from bridge.contract import INFO, check_inputs, check_outputs
from bridge.errors import message
from jax_side.potentials.cache import Cache, CachedPotential, cached, select_systems
from jax_side.potentials.derivatives import Call, outputs
from jax_side.potentials.outputs import check_unused, marked
from jax_side.potentials.potential import UNKNOWN
from jax_side.potentials.potential_out import (
    EMPTY,
    HESSIANS,
    KINDS,
    NAMES,
    EmptyType,
    Linear,
    Positions,
    PositionsAndCell,
    PotentialOut,
)

__all__ = [
    "EMPTY",
    "Cache",
    "CachedPotential",
    "DirectPotential",
    "EmptyType",
    "Positions",
    "PositionsAndCell",
    "Potential",
    "PotentialOut",
    "ScaledPotential",
    "SummedPotential",
    "cached",
    "direct",
    "select_systems",
    "sum_potentials",
]
tree = jax.tree_util


def direct(model, gradients="positions and cell", hessians=None, *, derivative_order=None):
    """A model that returns its own gradients as a potential: `potential(inputs)` is a PotentialOut,
    from one evaluation.

    `model` is a JAX callable (a torch model by bridge.to_jax included) of the dict of
    bridge.contract; it returns one with energy (B,) eV, position_gradients g = dE/dr at fixed cell
    (N,3), cell_gradients G = dE/dh at fixed Cartesian positions (B,3,3), hessian (N,3,N,3), as far
    as these are asked for; or a PotentialOut. (For an energy alone:
    direct(strain.with_gradients(energy)).)

    gradients         "positions and cell": out.gradients is PositionsAndCell(positions, cell).
                      "positions": Positions(positions). None: EMPTY, as for Monte Carlo
    hessians          "positions": out.hessians is Positions(hessian). None: EMPTY
    derivative_order  1: the model can't be differentiated, its gradients are all there is. None: as
                      often as one likes, or what the model's card says

    The cell gradient is the one that kUPS's direct potentials take of a torch model, at fixed
    Cartesian positions: the whole (3,3), where kUPS then keeps the parameters of its frame (the
    lower triangle). For G at fixed fractional coordinates, or from a virial, see
    jax_side.potentials.strain.

    total_energies differentiates by the gradients that the model returns, asked for or not: dE[b] =
    sum_{i in b} g_i . dr_i + <G_b, dh_b>, so that jax.grad costs the same one evaluation. All else
    (other inputs, gradients of gradients, a model that returns no gradients at all) is JAX's own
    derivative of the model; with derivative_order=1 a derivative of the energy in other inputs is
    refused, and derivatives of gradients are NaN. jit, grad, jvp, hessian, vmap and scan compose
    with it. Parameters to be differentiated go into the inputs, under a key of their own.

    `a + b` and `sum_potentials(a, b)` add, `2 * a` scales (also by traced weights: thermodynamic
    integration), `a.narrowed("positions")` gives less. Potentials are pytrees whose leaves are the
    weights, so that `jax.jit(lambda p, x: p(x))` compiles once for all weights, and jax.grad in a
    potential is that in its weights.

    Raises: ValueError where the model does not give what is asked for (here, if it has a card; else
    as it is traced), and for inputs and outputs outside of the contract; TypeError for a model that
    is not callable or returns something else; NotImplementedError for a derivative in pos or cell
    of which the model gives no gradient, naming it.

    >>> import jax.numpy as jnp
    >>> spring = direct(lambda x: {"energy": (x["pos"] ** 2).sum()[None], "position_gradients": 2 * x["pos"]}, "positions")
    >>> inputs = {"pos": jnp.ones((2, 3)), "cell": jnp.zeros((1, 3, 3)), "pbc": jnp.zeros((1, 3), bool),
    ...           "batch": jnp.zeros(2, int), "atomic_numbers": jnp.ones(2, int)}
    >>> out = (0.5 * spring + spring)(inputs)
    >>> out.total_energies.tolist(), out.gradients.positions[0].tolist()
    ([9.0], [3.0, 3.0, 3.0])
    """
    if not callable(model):
        raise TypeError(
            message("a callable model(inputs)", f"{model!r:.60}", "pass the model's function")
        )
    one_of("gradients", gradients, tuple(KINDS)), one_of("hessians", hessians, tuple(HESSIANS))
    card = _card(model)
    if card is not None:
        wanted = ("energy", *KINDS[gradients], *HESSIANS[hessians])
        card.check_outputs(wanted, _name(model))
        if idle := [n for n in wanted if n not in card.active_outputs]:
            do = f"pass model.asking({', '.join(map(repr, idle))})"
            raise ValueError(
                message(
                    f"{', '.join(idle)} among the active outputs of {_name(model)}",
                    "a card without",
                    do,
                )
            )
        derivative_order = card.derivative_order if derivative_order is None else derivative_order
    return DirectPotential(model, gradients, hessians, derivative_order)


class Potential(Linear):
    """What `direct` describes: sums, scalings and narrowings of potentials are potentials.

    `takes` holds those of charge and spin that it has a use for; a sum gives them to the terms that
    have one."""

    def __add__(self, other):
        return sum_potentials(self, other) if isinstance(other, Potential) else NotImplemented

    def scaled(self, scale):
        return ScaledPotential(self, scale)

    def narrowed(self, gradients, hessians=None):
        """The same with fewer gradients (and, unless asked for, no hessians). ValueError for more
        than there is."""
        one_of(
            "gradients",
            gradients,
            tuple(k for k, names in KINDS.items() if {*names} <= {*KINDS[self.gradients]}),
        )
        one_of("hessians", hessians, tuple(k for k in HESSIANS if k in (self.hessians, None)))
        return self._narrowed(gradients, hessians)


@partial(
    tree.register_dataclass,
    data_fields=(),
    meta_fields=("model", "gradients", "hessians", "derivative_order"),
)
@dataclass(frozen=True)
class DirectPotential(Potential):
    model: Callable
    gradients: str | None
    hessians: str | None
    derivative_order: int | None
    card = property(lambda self: _card(self.model) or UNKNOWN)
    takes = property(lambda self: frozenset(INFO) - set(self.card.unused(INFO)))

    def __call__(self, inputs) -> PotentialOut:
        check_inputs(inputs)
        check_unused(self.card, inputs, _name(self.model))
        return PotentialOut.of(_evaluate(self, inputs), self.gradients, self.hessians)

    def _narrowed(self, gradients, hessians):
        return replace(self, gradients=gradients, hessians=hessians)

    def outputs(self, inputs):
        """The model's own, by names of the contract, checked."""
        out, who = self.model(inputs), _name(self.model)
        if not isinstance(out, (dict, PotentialOut)):
            do = "wrap an energy alone by jax_side.potentials.strain.with_gradients"
            raise TypeError(
                message(
                    f"a dict of the contract or a PotentialOut from {who}",
                    f"a {type(out).__name__}",
                    do,
                )
            )
        out = {n: out[n] for n in NAMES if n in out} if isinstance(out, dict) else out.named()
        wanted = ("energy", *KINDS[self.gradients], *HESSIANS[self.hessians])
        if any(n not in out for n in wanted):
            asked = f"{', '.join(wanted)} from {who}, as gradients={self.gradients!r}, hessians={self.hessians!r} ask"
            do = "ask for what it gives, or make gradients of an energy by jax_side.potentials.strain.with_gradients"
            raise ValueError(message(asked, f"only {', '.join(out) or 'other outputs'}", do))
        check_outputs(out, inputs["pos"].shape[0], inputs["cell"].shape[0])
        return marked(out, inputs, self.card.unused(inputs))


@partial(tree.register_dataclass, data_fields=("potentials",), meta_fields=())
@dataclass(frozen=True)
class SummedPotential(Potential):
    potentials: tuple
    gradients = property(lambda self: self.potentials[0].gradients)
    hessians = property(lambda self: self.potentials[0].hessians)
    takes = property(lambda self: frozenset().union(*(p.takes for p in self.potentials)))

    def __call__(self, inputs) -> PotentialOut:
        each = shared_out(inputs, [Card(optional_inputs=p.takes) for p in self.potentials])
        return reduce(PotentialOut.__add__, [p(given) for p, given in zip(self.potentials, each)])

    def _narrowed(self, *kinds):
        return SummedPotential(tuple(p.narrowed(*kinds) for p in self.potentials))


@partial(tree.register_dataclass, data_fields=("potential", "scale"), meta_fields=())
@dataclass(frozen=True, eq=False)
class ScaledPotential(Potential):
    potential: Potential
    scale: Any
    gradients = property(lambda self: self.potential.gradients)
    hessians = property(lambda self: self.potential.hessians)
    takes = property(lambda self: self.potential.takes)

    def __call__(self, inputs) -> PotentialOut:
        return self.potential(inputs) * self.scale

    def _narrowed(self, *kinds):
        return replace(self, potential=self.potential.narrowed(*kinds))


def sum_potentials(*potentials) -> Potential:
    """The sum of potentials made by `direct`, each evaluated once: energies, gradients and hessians
    add.

    Weights are `w * potential`. Raises: ValueError for no potentials, or for unlike gradients or
    hessians (narrow one of them: `a.narrowed("positions")`; nothing is dropped silently); TypeError
    for what `direct` has not made.

    >>> sum_potentials()
    Traceback (most recent call last):
    ...
    ValueError: expected at least one potential, got none; pass those to add
    """
    if not potentials:
        raise ValueError(message("at least one potential", "none", "pass those to add"))
    if strange := [p for p in potentials if not isinstance(p, Potential)]:
        raise TypeError(
            message(
                "potentials to add",
                f"a {type(strange[0]).__name__}",
                "wrap it by jax_side.potentials.direct.direct",
            )
        )
    kinds = [f"gradients={p.gradients!r}, hessians={p.hessians!r}" for p in potentials]
    if unlike := [k for k in kinds if k != kinds[0]]:
        raise ValueError(
            message(
                f"the same gradients and hessians of all terms ({kinds[0]})",
                unlike[0],
                "narrow one: potential.narrowed(...)",
            )
        )
    return SummedPotential(potentials)


def _evaluate(potential, inputs):
    """The model's outputs; the energy among them differentiates by the gradients among them."""
    leaves, structure = tree.tree_flatten(inputs)

    def evaluate(arrays):
        return potential.outputs(structure.unflatten([arrays[i] for i in range(len(arrays))]))

    others = "unknown" if potential.derivative_order in (0, 1) else "JAX"
    places = structure.unflatten(range(len(leaves)))
    return outputs(Call(evaluate, places, others, _name(potential.model)), dict(enumerate(leaves)))


def _card(model):
    """The card of a model, or of the torch model that it is a bridge to."""
    while model is not None and not hasattr(model, "card"):
        model = getattr(model, "__wrapped__", None) or getattr(model, "__self__", None)
    return getattr(model, "card", None)


def _name(model):
    return getattr(model, "__name__", type(model).__name__)
