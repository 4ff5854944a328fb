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
from bridge.contract import CONDITIONS, called, check_inputs, check_outputs
from bridge.errors import message
from jax_side.potentials.cache import Cache, CachedPotential, cached, select_systems
from jax_side.potentials.derivatives import Call, Inputs, Named, outputs
from jax_side.potentials.outputs import check_unused, marked
from jax_side.potentials.potential import UNKNOWN
from jax_side.potentials.potential_out import (
    EMPTY,
    HESSIANS,
    KINDS,
    NAMES,
    EmptyType,
    HessianKind,
    Kind,
    Linear,
    Positions,
    PositionsAndCell,
    PotentialOut,
    Scalar,
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


def direct(
    model: Callable[[Inputs], Named | PotentialOut],
    gradients: Kind = "positions and cell",
    hessians: HessianKind = None,
    *,
    derivative_order: int | None = None,
) -> DirectPotential:
    """Returns a model that gives its own gradients as a potential: `potential(inputs)` is a
    PotentialOut, from one evaluation.

    `model` is a JAX callable (a torch model by bridge.to_jax included) that takes the dict of
    bridge.contract. It returns a PotentialOut, or a dict with energy (B,) eV, position_gradients g
    = dE/dr at fixed cell (N,3), cell_gradients G = dE/dh at fixed Cartesian positions (B,3,3) and
    hessian (N,3,N,3), as far as these are asked for. For an energy alone, use
    direct(strain.with_gradients(energy)).

    gradients         "positions and cell": out.gradients is PositionsAndCell(positions, cell).
                      "positions": it is Positions(positions). None: it is EMPTY, as for Monte Carlo
    hessians          "positions": out.hessians is Positions(hessian). None: it is EMPTY
    derivative_order  1: the model can't be differentiated, its gradients are all there is. None:
                      it can be as often as one likes, or as often as its card says

    The cell gradient is the one that kUPS's direct potentials take of a torch model, at fixed
    Cartesian positions. It is the whole (3,3), of which kUPS then keeps the parameters of its frame
    (the lower triangle). For G at fixed fractional coordinates, or from a virial, see
    jax_side.potentials.strain.

    total_energies differentiates by the gradients that the model returns, whether they are asked
    for or not: dE[b] = sum_{i in b} g_i . dr_i + <G_b, dh_b>. So jax.grad costs the same one
    evaluation. All else (other inputs, gradients of gradients, a model that returns no gradients at
    all) is JAX's own derivative of the model. With derivative_order=1 a derivative of the energy in
    other inputs is refused, and derivatives of gradients are NaN. jit, grad, jvp, hessian, vmap and
    scan compose with it. Parameters to be differentiated go into the inputs, under a key of their
    own.

    `a + b` and `sum_potentials(a, b)` add potentials. `2 * a` scales one, also by a traced weight,
    as in thermodynamic integration. `a.narrowed("positions")` gives less. Potentials are pytrees
    whose leaves are the weights, so that `jax.jit(lambda p, x: p(x))` compiles once for all
    weights, and jax.grad in a potential is that in its weights.

    Raises: ValueError where the model does not give what is asked for (at once if it has a card,
    else as it is traced), and for inputs and outputs outside of the contract; TypeError for a model
    that is not callable or returns something else; NotImplementedError for a derivative in pos or
    cell of which the model gives no gradient, naming it.

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
    one_of("gradients", gradients, tuple(KINDS))
    one_of("hessians", hessians, tuple(HESSIANS))
    card = _card(model)
    if card is not None:
        wanted = ("energy", *KINDS[gradients], *HESSIANS[hessians])
        card.check_outputs(wanted, _name(model))
        if idle := [n for n in wanted if n not in card.active]:
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
    """What `direct` describes. Sums, scalings and narrowings of potentials are potentials too."""

    # Subclasses have these as fields or as properties.
    gradients: Any  # one of KINDS
    hessians: Any  # one of HESSIANS
    # those of charge, spin and field that it has a use for; a sum gives them to terms that have one
    takes: Any

    def __call__(self, inputs: Inputs) -> PotentialOut:
        """Returns the outputs for the dict of the contract."""
        raise NotImplementedError

    def __add__(self, other: Potential) -> Potential:
        return sum_potentials(self, other) if isinstance(other, Potential) else NotImplemented

    def scaled(self, scale: Scalar) -> ScaledPotential:
        """Returns the potential times a weight."""
        return ScaledPotential(self, scale)

    def narrowed(self, gradients: Kind, hessians: HessianKind = None) -> Potential:
        """Returns the potential with fewer gradients, and without hessians unless they are asked
        for.

        Raises: ValueError for more than there is.
        """
        own = {*KINDS[self.gradients]}
        fewer = tuple(kind for kind, names in KINDS.items() if {*names} <= own)
        one_of("gradients", gradients, fewer)
        one_of("hessians", hessians, tuple(k for k in HESSIANS if k in (self.hessians, None)))
        return self._narrowed(gradients, hessians)

    def _narrowed(self, gradients: Kind, hessians: HessianKind) -> Potential:
        raise NotImplementedError


@partial(
    tree.register_dataclass,
    data_fields=(),
    meta_fields=("model", "gradients", "hessians", "derivative_order"),
)
@dataclass(frozen=True)
class DirectPotential(Potential):
    """What `direct` returns."""

    model: Callable[[Inputs], Named | PotentialOut]
    gradients: Kind
    hessians: HessianKind
    derivative_order: int | None

    @property
    def card(self) -> Card:
        """The model's card."""
        return _card(self.model) or UNKNOWN

    @property
    def takes(self) -> frozenset[str]:
        """Those of charge, spin and field that the model has a use for."""
        return frozenset(CONDITIONS) - set(self.card.unused(CONDITIONS))

    def __call__(self, inputs: Inputs) -> PotentialOut:
        check_inputs(inputs)
        check_unused(self.card, inputs, _name(self.model))
        return PotentialOut.of(_evaluate(self, inputs), self.gradients, self.hessians)

    def _narrowed(self, gradients: Kind, hessians: HessianKind) -> DirectPotential:
        return replace(self, gradients=gradients, hessians=hessians)

    def outputs(self, inputs: Inputs) -> Named:
        """Returns the model's outputs by the names of the contract, checked, without a rule for
        their derivatives."""
        who = _name(self.model)
        out = called(self.model, inputs, who)
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
    """What `sum_potentials` returns."""

    potentials: tuple[Potential, ...]

    @property
    def gradients(self) -> Kind:
        """Those of each term."""
        return self.potentials[0].gradients

    @property
    def hessians(self) -> HessianKind:
        """Those of each term."""
        return self.potentials[0].hessians

    @property
    def takes(self) -> frozenset[str]:
        """Those of charge, spin and field that some term has a use for."""
        return frozenset().union(*(p.takes for p in self.potentials))

    def __call__(self, inputs: Inputs) -> PotentialOut:
        each = shared_out(inputs, [Card(optional_inputs=p.takes) for p in self.potentials])
        return reduce(PotentialOut.__add__, [p(given) for p, given in zip(self.potentials, each)])

    def _narrowed(self, gradients: Kind, hessians: HessianKind) -> SummedPotential:
        return SummedPotential(tuple(p.narrowed(gradients, hessians) for p in self.potentials))


@partial(tree.register_dataclass, data_fields=("potential", "scale"), meta_fields=())
@dataclass(frozen=True, eq=False)
class ScaledPotential(Potential):
    """A potential times a weight."""

    potential: Potential
    scale: Scalar

    @property
    def gradients(self) -> Kind:
        """Those of the potential."""
        return self.potential.gradients

    @property
    def hessians(self) -> HessianKind:
        """Those of the potential."""
        return self.potential.hessians

    @property
    def takes(self) -> frozenset[str]:
        """Those of charge, spin and field that the potential has a use for."""
        return self.potential.takes

    def __call__(self, inputs: Inputs) -> PotentialOut:
        return self.potential(inputs) * self.scale

    def _narrowed(self, gradients: Kind, hessians: HessianKind) -> ScaledPotential:
        return replace(self, potential=self.potential.narrowed(gradients, hessians))


def sum_potentials(*potentials: Potential) -> SummedPotential:
    """Returns the sum of potentials made by `direct`, each of which is evaluated once. Energies,
    gradients and hessians add.

    Weights are `w * potential`. Gradients and hessians of all terms must be alike, since nothing is
    dropped silently: narrow a term that has more, by `a.narrowed("positions")`.

    Raises: ValueError for no potentials, or for unlike gradients or hessians; TypeError for what
    `direct` has not made.

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


def _evaluate(potential: DirectPotential, inputs: Inputs) -> Named:
    """The model's outputs. The energy among them differentiates by the gradients among them."""
    leaves, structure = tree.tree_flatten(inputs)

    def evaluate(arrays):
        return potential.outputs(structure.unflatten([arrays[i] for i in range(len(arrays))]))

    others = "unknown" if potential.derivative_order in (0, 1) else "JAX"
    places = structure.unflatten(range(len(leaves)))
    call = Call(evaluate, places, others, _name(potential.model))
    return outputs(call, dict(enumerate(leaves)))


def _card(model: Any) -> Card | None:
    """The card of a model, or of the torch model that it is a bridge to."""
    while model is not None and not hasattr(model, "card"):
        model = getattr(model, "__wrapped__", None) or getattr(model, "__self__", None)
    return getattr(model, "card", None)


def _name(model: Any) -> str:
    return getattr(model, "__name__", type(model).__name__)
