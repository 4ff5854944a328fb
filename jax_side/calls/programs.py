"""XLA programs of a Function: one for a call, and where a backward will follow, a pair that shares
what it keeps.

A pair is `jax.vjp` cut in two. The forward program gives the outputs and the residuals of the vjp,
and the backward program takes these. A residual that is an input or an output isn't given a second
time, since the caller keeps that array himself. A program is compiled once for the types of its
Function. Memory that it allocates belongs to the arrays it returns.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from bridge.function import Function
from jax_side.calls import compat, ending, processes
from jax_side.calls.arrays import KNOWN, borrow, lend

tree = jax.tree_util


class Program:
    """A jitted function on foreign memory, which it reads where it lies. Nobody else holds what it
    returns.

    It takes lent memory (see arrays.borrow) in one list, or in several. The first call is made by
    one thread alone. Each trace is counted with the base.
    """

    def __init__(self, traced: Callable[..., Any], fn: Function) -> None:
        ending.expect()
        base: Any = fn.base  # a JaxFunction
        self._first = threading.RLock()
        self._ready = False
        self._x64 = base.x64
        counted = fn.base.memo.setdefault("traces", [])

        def count(*groups):
            counted.append(None)
            return traced(*groups)

        self._jitted = jax.jit(count, compiler_options=dict(base.options) or None)

    def __call__(self, *groups: Any) -> list[Any]:
        return lend(self.arrays(*groups))

    @ending.call
    def arrays(self, *groups: Any) -> Any:
        """Returns the results as the traced function gives them.

        It runs under the x64 setting under which its types were found: a backward may come after
        the `with` block of its forward, and a callback in another thread.
        """
        if processes.forked:
            processes.check_own()
        if ending.begun:
            ending.refuse_threads()
        if compat.config.jax_enable_x64 is not self._x64:
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
    """Returns how many programs were compiled for a base and its derivatives."""
    return len(base.memo.get("traces", ()))


def program(fn: Function) -> Program:
    """Returns the program of a call."""
    return Program(lambda xs: fn(*xs), fn)


def record(fn: Function, wrt: tuple[int, ...]) -> Recorder:
    """Returns the pair of programs of `fn`, which is differentiable in its inputs `wrt`."""
    key = "pair", wrt
    return fn.memo.get(key) or fn.memo.setdefault(key, Recorder(fn, wrt))


@tree.register_pytree_node_class
@dataclass(frozen=True)
class Residuals:
    """What the forward program keeps for the backward one."""

    kept: list[Any]  # arrays that can be lent
    own: list[Any]  # arrays of dtypes that JAX alone has (PRNG keys, int4)
    plan: Plan  # where each of them goes

    def tree_flatten(self) -> tuple[tuple[list[Any], list[Any]], Plan]:
        """Returns the arrays and the plan, as JAX asks of a pytree."""
        return (self.kept, self.own), self.plan

    @classmethod
    def tree_unflatten(cls, plan: Plan, groups: tuple[list[Any], list[Any]]) -> Residuals:
        """Returns the Residuals again, as JAX asks of a pytree."""
        kept, own = groups
        return cls(kept, own, plan)


@dataclass(frozen=True, eq=False)
class Plan:
    """How the pullback of a vjp is put together again from what the two programs share."""

    structure: Any  # the pullback's own pytree
    # for each leaf (place, index): "input", "output", "kept" or "own"; or ("constant", value)
    leaves: tuple[tuple[str, Any], ...]
    outputs: tuple[int, ...]  # those that the backward program wants back


class Recorder:
    """The pair of programs. `forward` and `backward` take and give lent memory, as a Program
    does."""

    def __init__(self, fn: Function, wrt: tuple[int, ...]) -> None:
        self.fn = fn
        self.wrt = wrt
        self.inexact = tuple(i for i, s in enumerate(fn.outputs) if s.inexact)
        self._forward = Program(self._outputs_and_residuals, fn)
        self._backward: dict[tuple[Any, ...], Program] = {}

    def forward(self, lent: Any) -> tuple[list[Any], list[Any], tuple[list[Any], Plan]]:
        """Returns (outputs, residuals that are lent, the other residuals with their plan)."""
        outs, residuals = self._forward.arrays(lent)
        return lend(outs), lend(residuals.kept), (residuals.own, residuals.plan)

    def backward(
        self,
        own_and_plan: tuple[list[Any], Plan],
        needed: tuple[int, ...],
        inputs: Any,
        outputs: Any,
        kept: Any,
        cotangents: Mapping[int, Any],
    ) -> list[Any]:
        """Returns the gradients of the inputs `needed`, by the convention of torch: they are the
        conjugate of the contract's.

        `outputs` are those that the plan names. `cotangents` maps an output to its cotangent.
        """
        own, plan = own_and_plan
        live = tuple(o for o in self.inexact if o in cotangents)
        key = plan, needed, live
        program = self._backward.get(key)
        if program is None:
            # Each retrace (jax.clear_caches, another matmul precision) has a plan of its own.
            if len(self._backward) >= 64:
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

        primals, pull, ys = compat.vjp_with_aux(inexact_first, *moved)
        for i, y in zip(self.inexact, primals, strict=True):
            ys = (*ys[:i], y, *ys[i + 1 :])
        return ys, _residuals(pull, xs, ys)


def _residuals(pull: Any, xs: Sequence[Any], ys: Sequence[Any]) -> Residuals:
    """The leaves of a pullback, each array once."""
    leaves, structure = tree.tree_flatten(pull)
    places = {id(x): ("input", i) for i, x in enumerate(xs)}
    places |= {id(y): ("output", i) for i, y in enumerate(ys)}
    groups: dict[str, list[Any]] = {"kept": [], "own": []}
    where: list[tuple[str, Any]] = []
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
    return Residuals(**groups, plan=Plan(structure, tuple(where), outputs))


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
        cts = [self._cotangent(o, given) for o in self.recorder.inexact]
        gradients = dict(zip(self.recorder.wrt, self.plan.structure.unflatten(leaves)(cts)))
        return [gradients[i].conj() for i in self.needed]

    def _cotangent(self, output: int, given: Mapping[int, Any]) -> Any:
        if output in given:
            return given[output].conj()
        s = self.recorder.fn.outputs[output]
        return compat.no_cotangent(s.shape, jnp.dtype(s.dtype))


def restrict(
    f: Callable[..., Any],
    primals: Sequence[Any],
    wrt: Sequence[int],
    outs: Sequence[int] | None = None,
) -> tuple[Callable[..., tuple[Any, ...]], tuple[Any, ...]]:
    """Returns f as a function of the inputs `wrt` alone, and these inputs.

    The function gives the outputs `outs`, or all of them if that is None.
    """

    def g(*xs):
        full = list(primals)
        for i, x in zip(wrt, xs, strict=True):
            full[i] = x
        ys = f(*full)
        return tuple(ys) if outs is None else tuple(ys[o] for o in outs)

    return g, tuple(primals[i] for i in wrt)
