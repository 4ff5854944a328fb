"""XLA programs of a Function: one for a call, and where a backward will follow, a pair that shares
what it keeps.

A pair is `jax.vjp` cut in two: the forward program gives the outputs and the residuals of the vjp,
the backward program takes these. A residual that is an input or an output isn't given a second
time: the caller keeps that array himself. A program is compiled once for the types of its Function;
memory that it allocates belongs to the arrays it returns.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from bridge.function import Function
from jax_side.calls import compat
from jax_side.calls.arrays import KNOWN, borrow, lend

tree = jax.tree_util


class Program:
    """A jitted function on foreign memory, read where it lies; gives what nobody else holds.

    It takes lent memory (see borrow) in one list, or in several. The first call is made by one
    thread alone; each trace is counted with the base."""

    def __init__(self, traced, fn: Function):
        self._first, self._ready, self._x64 = threading.RLock(), False, fn.base.x64
        counted = fn.base.memo.setdefault("traces", [])

        def count(*groups):
            counted.append(None)
            return traced(*groups)

        self._jitted = jax.jit(count)

    def __call__(self, *groups) -> list:
        return lend(self.arrays(*groups))

    def arrays(self, *groups):
        """The same, with results as the traced function gives them. It runs under the x64 setting
        that its types were found under: a backward may come after the `with` block of its forward,
        and a callback in another thread."""
        if jax.config.jax_enable_x64 is not self._x64:
            with jax.enable_x64(self._x64):
                return self._run(groups)
        return self._jitted(*map(borrow, groups)) if self._ready else self._run(groups)

    def _run(self, groups):
        if self._ready:
            return self._jitted(*map(borrow, groups))
        with self._first:
            result = self._jitted(*map(borrow, groups))
            self._ready = True
            return result


def compilations(base: Function) -> int:
    """How many programs were compiled for a base and its derivatives."""
    return len(base.memo.get("traces", ()))


def program(fn: Function) -> Program:
    """The program of a call."""
    return Program(lambda xs: fn(*xs), fn)


def record(fn: Function, wrt: tuple[int, ...]) -> Recorder:
    """The pair of programs of `fn`, differentiable in its inputs `wrt`."""
    key = "pair", wrt
    return fn.memo.get(key) or fn.memo.setdefault(key, Recorder(fn, wrt))


@tree.register_pytree_node_class
@dataclass(frozen=True)
class Residuals:
    """What the forward program keeps for the backward one: arrays that can be lent, arrays of
    dtypes that JAX alone has (PRNG keys, int4), and the plan that says where each goes."""

    kept: list
    own: list
    plan: Plan

    def tree_flatten(self):
        return (self.kept, self.own), self.plan

    @classmethod
    def tree_unflatten(cls, plan, groups):
        return cls(*groups, plan)


@dataclass(frozen=True, eq=False)
class Plan:
    """The vjp's own pytree; for each leaf (place, index or value): an input, an output, a residual,
    a constant.

    `outputs` are those that the backward program wants back."""

    structure: Any
    leaves: tuple
    outputs: tuple[int, ...]


class Recorder:
    """The pair. `forward` and `backward` take and give lent memory, as a Program does."""

    def __init__(self, fn: Function, wrt: tuple[int, ...]):
        self.fn, self.wrt = fn, wrt
        self.inexact = tuple(i for i, s in enumerate(fn.outputs) if s.inexact)
        self._forward = Program(self._outputs_and_residuals, fn)
        self._backward: dict[tuple, Program] = {}

    def forward(self, lent):
        """-> (outputs, residuals that are lent, the others with their plan)."""
        outs, residuals = self._forward.arrays(lent)
        return lend(outs), lend(residuals.kept), (residuals.own, residuals.plan)

    def backward(
        self, own_and_plan, needed: tuple[int, ...], inputs, outputs, kept, cotangents
    ) -> list:
        """Gradients of the inputs `needed`, by the convention of torch: the conjugate of the
        contract's.

        `outputs` are those that the plan names; `cotangents` maps an output to its cotangent."""
        own, plan = own_and_plan
        live = tuple(o for o in self.inexact if o in cotangents)
        key = plan, needed, live
        program = self._backward.get(key)
        if program is None:
            if (
                len(self._backward) >= 64
            ):  # each retrace (jax.clear_caches, another matmul precision) has a plan of its own
                self._backward.clear()
            program = self._backward.setdefault(
                key, Program(_Pull(self, plan, needed, live), self.fn)
            )
        return program(inputs, outputs, kept, own, [cotangents[o] for o in live])

    def _outputs_and_residuals(self, xs):
        g, moved = restrict(self.fn, xs, self.wrt)

        def inexact_first(*moved):
            ys = g(*moved)
            return [ys[i] for i in self.inexact], ys

        primals, pull, ys = jax.vjp(inexact_first, *moved, has_aux=True)
        for i, y in zip(self.inexact, primals, strict=True):
            ys = (*ys[:i], y, *ys[i + 1 :])
        return ys, _residuals(pull, xs, ys)


def _residuals(pull, xs, ys) -> Residuals:
    """The leaves of a vjp, each array once."""
    leaves, structure = tree.tree_flatten(pull)
    places = {id(x): ("input", i) for i, x in enumerate(xs)} | {
        id(y): ("output", i) for i, y in enumerate(ys)
    }
    groups, where = {"kept": [], "own": []}, []
    for leaf in leaves:
        if not isinstance(leaf, jax.core.Tracer):
            where.append(("constant", leaf))
            continue
        if id(leaf) not in places:
            name = "kept" if leaf.dtype in KNOWN else "own"
            places[id(leaf)] = name, len(groups[name])
            groups[name].append(leaf)
        where.append(places[id(leaf)])
    outputs = tuple(sorted({i for place, i in where if place == "output"}))
    return Residuals(*groups.values(), Plan(structure, tuple(where), outputs))


@dataclass(frozen=True)
class _Pull:
    """The backward program."""

    recorder: Recorder
    plan: Plan
    needed: tuple[int, ...]
    live: tuple[int, ...]

    def __call__(self, inputs, outputs, kept, own, cotangents):
        values = {
            "input": inputs,
            "output": dict(zip(self.plan.outputs, outputs)),
            "kept": kept,
            "own": own,
        }
        leaves = [i if place == "constant" else values[place][i] for place, i in self.plan.leaves]
        given = dict(zip(self.live, cotangents))
        specs = self.recorder.fn.outputs
        cts = [
            given[o].conj()
            if o in given
            else compat.no_cotangent(specs[o].shape, jnp.dtype(specs[o].dtype))
            for o in self.recorder.inexact
        ]
        gradients = dict(zip(self.recorder.wrt, self.plan.structure.unflatten(leaves)(cts)))
        return [gradients[i].conj() for i in self.needed]


def restrict(f, primals, wrt, outs=None):
    """f as a function of the inputs `wrt` alone, giving the outputs `outs` (all of them if
    None)."""

    def g(*xs):
        full = list(primals)
        for i, x in zip(wrt, xs, strict=True):
            full[i] = x
        ys = f(*full)
        return tuple(ys) if outs is None else tuple(ys[o] for o in outs)

    return g, tuple(primals[i] for i in wrt)
