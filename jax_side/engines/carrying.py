"""Integrators of jax-md that ask for an energy several times in a step, driven by one evaluation,
whose results the state carries.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from bridge.errors import message


class Evaluation(NamedTuple):
    """One evaluation of an energy: E, its gradient g = dE/dR in real space, the virial W = dE/dP of
    r -> P r, and the positions R where all this holds. eV and Angstrom."""

    energy: Float[jax.Array, ""]
    gradient: Float[jax.Array, "N 3"]
    virial: Float[jax.Array, "3 3"]
    position: Float[jax.Array, "N 3"]


@dataclasses.dataclass(frozen=True)
class Carrying:
    """A simulator of jax-md whose state carries its energy and virial, so that init and each step
    evaluate energy_fn once.

    `make(energy_fn)` gives jax-md's own (init, step). Each call traces jax-md's function twice. The
    first time its energy is zero, which shows the positions and the box where the step ends, for
    these do not depend on the forces there. There energy_fn is evaluated. The second time the
    energy is the tangent plane with the value and slopes found, which is all that the step asks
    for. XLA drops what is computed twice.

    `at_start` says that a step also asks for the energy where it starts. The state that it starts
    from knows the answer. Steps are jax-md's own arithmetic, and differentiate as its own do."""

    make: Callable[..., tuple[Callable[..., Any], Callable[..., Any]]]
    energy_fn: Callable[..., Any]
    at_start: bool

    def init(self, *args: Any, **kwargs: Any) -> Any:
        """Returns jax-md's initial state, from the arguments of its own init, with energy (eV) and
        virial (3,3) as two more fields."""
        return self._run(0, None, False, *args, **kwargs)

    def step(self, state: Any, **kwargs: Any) -> Any:
        """Returns the state after one step, from a state that `init` or `step` gave and the
        keywords of jax-md's own step."""
        start = Evaluation(state.energy, -state.force, state.virial, state.position)
        return self._run(1, start, self.at_start, _plain(state), **kwargs)

    def _run(
        self, which: int, start: Evaluation | None, at_start: bool, *args: Any, **kwargs: Any
    ) -> Any:
        """Runs jax-md's init (`which` = 0) or step (1), traced twice as said above."""

        def run(end):
            calls = []
            fn = self.make(_plane(start, end, calls))[which]
            # Inside jax-md's own jit the arrays of the planes would belong to another trace.
            state = getattr(fn, "__wrapped__", fn)(*args, **kwargs)
            _check([at for at, _ in calls], at_start)
            return state, calls[-1][1]

        state, passed = run(None)
        end = self._evaluate(state.position, state.box, passed)
        return _carrying(run(end)[0], end)

    def _evaluate(self, R, box, passed):
        def energy(R, P):
            return self.energy_fn(R, box=box, perturbation=P, **passed)

        E, (g, W) = jax.value_and_grad(energy, (0, 1))(R, jnp.eye(R.shape[-1], dtype=R.dtype))
        return Evaluation(E, g, W, R)


def observe(fn: Callable[..., Any], seen: Any) -> Callable[..., tuple[Any, jax.Array]]:
    """Returns `fn`, an init or step of jax-md, jitted and with the energy (eV) as a second result.

    `seen` is the threading.local where force_fn leaves `energy` and `position` while `fn` is
    traced. It is emptied within the same trace, so that no tracer gets out of it.

    Raises: NotImplementedError where the state's positions are not those of the last energy."""
    # Inside jax-md's own jit the energy would be a tracer of another trace.
    fn = getattr(fn, "__wrapped__", fn)

    @jax.jit
    def run(*args, **kwargs):
        seen.__dict__.clear()
        state = fn(*args, **kwargs)
        found = dict(seen.__dict__)
        seen.__dict__.clear()
        if not found or found["position"] is not getattr(state, "position", None):
            expected, got = (
                "a step that ends where its forces were evaluated",
                "positions that moved on",
            )
            raise NotImplementedError(
                message(expected, got, "call energy_fn beside jax-md's own step")
            )
        return state, found["energy"]

    return run


def _plane(
    start: Evaluation | None, end: Evaluation | None, calls: list
) -> Callable[..., jax.Array]:
    """The tangent plane of the energy where a step starts or where it ends, as an energy function.

    An evaluation that is None gives zero. Each call is noted in `calls`, as (whether it is at the
    start, the keywords it passes on)."""

    def energy_fn(R, box=None, perturbation=None, **passed):
        at_start = start is not None and R is start.position
        calls.append((at_start, passed))
        plane = start if at_start else end
        if plane is None:
            return jnp.zeros((), R.dtype)
        one = jnp.eye(R.shape[-1], dtype=R.dtype)
        P = one if perturbation is None else perturbation
        if jnp.ndim(P) == 0:
            P = P * one
        return (
            plane.energy
            + (plane.gradient * (R - plane.position)).sum()
            + (plane.virial * (P - one)).sum()
        )

    return energy_fn


def _check(calls: list[bool], at_start: bool) -> None:
    """NotImplementedError unless a step asked for its energy where it starts, if it does that at
    all, and then only where it ends."""
    first = int(at_start)
    if calls[:first] != [True] * first or True in calls[first:] or len(calls) == first:
        places = ", ".join("start" if at else "end" for at in calls) or "nowhere"
        expected = f"a step that asks for its energy {'once where it starts, then ' if at_start else ''}where it ends"
        raise NotImplementedError(
            message(
                expected,
                places,
                "call jax-md's own integrator, or take the version of jax-md that is pinned",
            )
        )


def _carrying(state, end):
    """The state of jax-md with the energy and the virial as two more fields."""
    return _kind(type(state))(*_values(state, type(state)), end.energy, end.virial)


def _plain(state):
    """The state without these two, as jax-md's own step takes it."""
    return state.plain(*_values(state, state.plain))


def _values(state, kind):
    """The state's values of the fields of the class `kind`."""
    return [getattr(state, f.name) for f in dataclasses.fields(kind)]


@functools.cache
def _kind(plain):
    """jax-md's class of states with energy and virial as two more fields.

    It is a subclass, so that jax-md's functions take it."""
    fields = [("energy", Any), ("virial", Any)]
    names = {"plain": plain, "__reduce__": _reduce}
    made = dataclasses.make_dataclass(
        plain.__name__, fields, bases=(plain,), frozen=True, namespace=names
    )
    return jax.tree_util.register_dataclass(made)


def _reduce(state):
    """How pickle writes a state: it would not find a class that was made here."""
    return _again, (state.plain, _values(state, type(state)))


def _again(plain, values):
    """The state that pickle reads."""
    return _kind(plain)(*values)
