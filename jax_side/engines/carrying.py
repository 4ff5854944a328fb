"""Integrators of jax-md that ask for an energy several times in a step, driven by one evaluation,
whose results the state carries."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bridge.errors import message


class Evaluation(NamedTuple):
    """E, g = dE/dR in real space, W = dE/dP of r -> P r, at positions R."""

    energy: Any
    gradient: Any
    virial: Any
    position: Any


@dataclasses.dataclass(frozen=True)
class Carrying:
    """A simulator of jax-md whose state carries its energy and virial: one evaluation of energy_fn
    in init, one in a step.

    `make(energy_fn)` gives jax-md's own (init, step). A step is traced twice. First with an energy
    of zero, to see where it takes positions and box, which do not depend on the forces there;
    energy_fn is evaluated there; then with a plane in place of the energy that has its value and
    slopes, which is all that the step asks for (XLA drops what is done twice). `at_start` says that
    it also asks where it starts: there the state knows the answer. The steps are jax-md's own
    arithmetic, and differentiate as its own do."""

    make: Callable
    energy_fn: Callable
    at_start: bool

    def init(self, *args, **kwargs):
        return self._run(0, None, False, *args, **kwargs)

    def step(self, state, **kwargs):
        start = Evaluation(state.energy, -state.force, state.virial, state.position)
        return self._run(1, start, self.at_start, _plain(state), **kwargs)

    def _run(self, which, start, at_start, *args, **kwargs):
        def run(end):
            calls = []
            fn = self.make(_plane(start, end, calls))[which]
            # inside a jit of jax-md's the planes would be of another trace
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


def observe(fn, seen):
    """fn with the energy that force_fn left while fn was traced; within one trace, so that no
    tracer gets out."""
    # inside jax-md's own jit the energy would be a tracer of another trace
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


def _plane(start, end, calls):
    """The tangent plane of the energy at the start of a step or at its end (None: zero), which
    notes how it is called."""

    def energy_fn(R, box=None, perturbation=None, **passed):
        at_start = start is not None and R is start.position
        calls.append((at_start, passed))
        plane = start if at_start else end
        if plane is None:
            return jnp.zeros((), R.dtype)
        one = jnp.eye(R.shape[-1], dtype=R.dtype)
        P = (
            one
            if perturbation is None
            else perturbation * one
            if jnp.ndim(perturbation) == 0
            else perturbation
        )
        return (
            plane.energy
            + (plane.gradient * (R - plane.position)).sum()
            + (plane.virial * (P - one)).sum()
        )

    return energy_fn


def _check(calls, at_start):
    """The order in which a step asks: where it starts, if it does, then where it ends."""
    if (
        calls[: int(at_start)] != [True] * at_start
        or True in calls[int(at_start) :]
        or len(calls) == at_start
    ):
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
    """The state with the energy and the virial."""
    return _kind(type(state))(*_values(state, type(state)), end.energy, end.virial)


def _plain(state):
    """The state as jax-md's own step has it."""
    return state.plain(*_values(state, state.plain))


def _values(state, kind):
    return [getattr(state, f.name) for f in dataclasses.fields(kind)]


@functools.cache
def _kind(plain):
    """jax-md's class of states with two more fields; a subclass, so that jax-md's functions take
    it."""
    fields, names = [("energy", Any), ("virial", Any)], {"plain": plain, "__reduce__": _reduce}
    return jax.tree_util.register_dataclass(
        dataclasses.make_dataclass(
            plain.__name__, fields, bases=(plain,), frozen=True, namespace=names
        )
    )


def _reduce(state):
    """For pickle, which does not find a class that was made here."""
    return _again, (state.plain, _values(state, type(state)))


def _again(plain, values):
    return _kind(plain)(*values)
