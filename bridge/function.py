"""The neutral contract: a Function knows its shapes, runs, and gives its jvp, vjp and vmap, each a
Function again.

Standard library only. A bank implements `Base` (what is called) and an `Engine` (how its framework
differentiates and batches a call); everything else here is bookkeeping of shapes, shared by both
banks.

Conventions
- All inputs and outputs are flat tuples of arrays; `inputs` and `outputs` are their `Spec`s.
- A *linear* Function is linear in its last `linear` inputs; `along` keeps some of these (the others
  being zero) and `transpose` exchanges them with its outputs. jvp and vjp are each other's
  transpose, WITHOUT conjugation, as in JAX.
- `wrt` and `outs` are tuples of positions in the inputs and outputs of the function that is
  differentiated.
- Equality and hash are by value: two Functions that wrap the same things are the same Function.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

from bridge.errors import message, spec

WIDE = ("float64", "int64", "uint64", "complex128")  # dtypes of 64-bit parts


class Spec(NamedTuple):
    """Shape and dtype name of one array."""

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return spec(self.shape, self.dtype)

    @property
    def inexact(self) -> bool:
        """True where a derivative exists: floating and complex dtypes."""
        return self.dtype.startswith(("float", "bfloat", "complex"))

    @property
    def real(self) -> bool:
        return self.inexact and not self.dtype.startswith("complex")

    def stacked(self, size: int, axis: int = 0) -> Spec:
        return Spec((*self.shape[:axis], size, *self.shape[axis:]), self.dtype)


class Engine(Protocol):
    """How one framework serves the transforms of a call `f(*arrays) -> tuple of arrays`."""

    def jvp(self, f, primals, wrt, tangents, outs) -> tuple: ...

    def vjp(self, f, primals, wrt, cotangents, outs) -> tuple: ...

    def gradient(self, f, primals, wrt, out) -> tuple: ...

    def vmap(self, f, mapped, size, arrays) -> tuple: ...

    def check_vmap(self, f, mapped) -> None:
        """Raises NotImplementedError, naming the alternative, where `vmap` can't serve f."""

    # True where vmap over tangents or cotangents alone evaluates the function once for all of them
    shares: bool


class Function:
    """A call with known shapes. Subclasses set `inputs`, `outputs`, `engine` and define `__call__`.

    A base also tells lanes how to run any Function built on it: `run(fn, buffers, into=None)` on
    foreign memory, `tensor_type`, the class that buffers should arrive as, and `on_stream(stream,
    buffers)`, a context for a GPU call. `runner(fn, ready)` is `run` for many calls into buffers
    (`ready` says that they are of tensor_type and of their dtypes), and `give(results)` hands fresh
    results to the other bank.
    """

    inputs: tuple[Spec, ...]
    outputs: tuple[Spec, ...]
    engine: Engine
    linear: int = 0
    native: bool = False  # True where the base itself takes batches

    @cached_property
    def plain(self) -> bool:
        """True where every dtype travels as itself (see the carriers of a lane)."""
        return not any(
            s.dtype.startswith(("complex", "float8")) for s in (*self.inputs, *self.outputs)
        )

    @cached_property
    def memo(self) -> dict:
        """What a bank keeps with this Function: its program, its derivatives. Not part of its
        value."""
        return {}

    @cached_property
    def program(self):
        """What runs this Function on memory that the other bank lends, made once (a base that has
        `program_of`)."""
        return self.base.program_of(self)

    @cached_property
    def differentiable(self) -> bool:
        """True where some output has a derivative."""
        return any(s.inexact for s in self.outputs)

    def input_name(self, i: int) -> str:
        return f"[{i}]"

    def __call__(self, *arrays: Any) -> tuple:
        raise NotImplementedError

    @property
    def evaluator(self):
        """What serves many calls: `__call__`."""
        return self.__call__

    @property
    def base(self) -> Function:
        """The user's own call, beneath all transforms."""
        return self

    def jvp(self, wrt: tuple[int, ...]) -> Function:
        """(inputs, tangents of wrt) -> tangents of the inexact outputs."""
        return Jvp(self, wrt, _inexact(self.outputs))

    def gradient(self, wrt: tuple[int, ...]) -> Function | None:
        """inputs -> (outputs, gradients), in one forward and one backward; None unless the one real
        output is a scalar."""
        outs = _inexact(self.outputs)
        scalar = len(outs) == 1 and self.outputs[outs[0]].shape == () and self.outputs[outs[0]].real
        return (
            Gradient(self, wrt, outs[0])
            if scalar and all(self.inputs[i].real for i in wrt)
            else None
        )

    def must_map(self, mapped: tuple[bool, ...]) -> tuple[bool, ...]:
        """Which inputs have to carry the batch axis, given which do: linear ones always, so that
        transpose is exact."""
        fixed = len(mapped) - self.linear
        return tuple(m or i >= fixed for i, m in enumerate(mapped))

    def vmap(self, mapped: tuple[bool, ...], size: int) -> Function:
        """The call over a leading axis of the mapped inputs and of every output."""
        return Vmap(self, mapped, size)

    def along(self, keep: tuple[int, ...]) -> Function:
        raise TypeError(f"{self} is not linear")

    def transpose(self, keep: tuple[int, ...], outs: tuple[int, ...]) -> Function:
        raise TypeError(f"{self} is not linear")


def _inexact(specs) -> tuple[int, ...]:
    return tuple(i for i, s in enumerate(specs) if s.inexact)


def _pick(items, positions) -> tuple:
    return tuple(items[i] for i in positions)


@dataclass(frozen=True)
class Derived(Function):
    """A transform of another Function; shares its engine and its base."""

    of: Function

    @property
    def engine(self) -> Engine:
        return self.of.engine

    @property
    def base(self) -> Function:
        return self.of.base


@dataclass(frozen=True)
class Linearised(Derived):
    """What Jvp and Vjp share: `of` around its inputs, linear in what follows them."""

    wrt: tuple[int, ...]
    outs: tuple[int, ...]

    def _split(self, arrays):
        n = len(self.of.inputs)
        return arrays[:n], arrays[n:]

    def must_map(self, mapped):
        inputs, linear = self._split(mapped)
        return (inputs if self._shared(inputs) else self.of.must_map(inputs)) + (True,) * len(
            linear
        )

    def _shared(self, inputs) -> bool:
        """Many tangents or cotangents at one point, which the engine serves by one evaluation."""
        return self.engine.shares and not any(inputs)

    def vmap(self, mapped, size):
        inputs = self._split(mapped)[0]
        batched = None if self._shared(inputs) else _natively(self.of, inputs, size, self.wrt)
        return type(self)(batched, self.wrt, self.outs) if batched else Vmap(self, mapped, size)


@dataclass(frozen=True)
class Jvp(Linearised):
    """(x, tangents of x[wrt]) -> tangents of outputs[outs]; linear in the tangents."""

    inputs = cached_property(lambda self: self.of.inputs + _pick(self.of.inputs, self.wrt))
    outputs = cached_property(lambda self: _pick(self.of.outputs, self.outs))
    linear = cached_property(lambda self: len(self.wrt))

    def __call__(self, *arrays):
        primals, tangents = self._split(arrays)
        return self.engine.jvp(self.of, primals, self.wrt, tangents, self.outs)

    def along(self, keep):
        return Jvp(self.of, _pick(self.wrt, keep), self.outs)

    def transpose(self, keep, outs):
        return Vjp(self.of, _pick(self.wrt, keep), _pick(self.outs, outs))


@dataclass(frozen=True)
class Vjp(Linearised):
    """(x, cotangents of outputs[outs]) -> cotangents of x[wrt]; linear in the cotangents."""

    inputs = cached_property(lambda self: self.of.inputs + _pick(self.of.outputs, self.outs))
    outputs = cached_property(lambda self: _pick(self.of.inputs, self.wrt))
    linear = cached_property(lambda self: len(self.outs))

    def __call__(self, *arrays):
        primals, cotangents = self._split(arrays)
        return self.engine.vjp(self.of, primals, self.wrt, cotangents, self.outs)

    def along(self, keep):
        return Vjp(self.of, self.wrt, _pick(self.outs, keep))

    def transpose(self, keep, outs):
        return Jvp(self.of, _pick(self.wrt, outs), _pick(self.outs, keep))


@dataclass(frozen=True)
class Gradient(Derived):
    """x -> (outputs, d outputs[out] / d x[wrt]); outputs[out] is a real scalar for each example."""

    wrt: tuple[int, ...]
    out: int

    inputs = cached_property(lambda self: self.of.inputs)
    outputs = cached_property(lambda self: self.of.outputs + _pick(self.of.inputs, self.wrt))

    def __call__(self, *arrays):
        return self.engine.gradient(self.of, arrays, self.wrt, self.out)

    def must_map(self, mapped):
        return self.of.must_map(mapped)

    def vmap(self, mapped, size):
        batched = _natively(self.of, mapped, size, self.wrt)
        return Gradient(batched, self.wrt, self.out) if batched else Vmap(self, mapped, size)


@dataclass(frozen=True)
class Vmap(Derived):
    """The call over a leading axis, served by the engine; the axis lies behind others where these
    are batched natively."""

    mapped: tuple[bool, ...]
    size: int
    axis: int = 0

    def __post_init__(self):
        self.engine.check_vmap(self.of, self.mapped)

    inputs = cached_property(
        lambda self: tuple(
            s.stacked(self.size, self.axis) if m else s
            for s, m in zip(self.of.inputs, self.mapped, strict=True)
        )
    )
    outputs = cached_property(
        lambda self: tuple(s.stacked(self.size, self.axis) for s in self.of.outputs)
    )
    linear = cached_property(lambda self: self.of.linear)

    def __call__(self, *arrays):
        there = range(self.axis, 0, -1)
        arrays = tuple(
            _moved(a, there) if m else a for a, m in zip(arrays, self.mapped, strict=True)
        )
        return tuple(
            _moved(y, reversed(there))
            for y in self.engine.vmap(self.of, self.mapped, self.size, arrays)
        )

    def _around_native(self, mapped) -> bool:
        """Many tangents at one point of a model that batches natively, of which there now are
        several."""
        points = len(self.of.of.inputs) if isinstance(self.of, Linearised) else 0
        return self.base.native and any(mapped[:points]) and not any(self.mapped[:points])

    def must_map(self, mapped):
        return self.of.must_map(mapped) if self._around_native(mapped) else super().must_map(mapped)

    def vmap(self, mapped, size):
        if self._around_native(mapped):
            return Vmap(self.of.vmap(mapped, size), self.mapped, self.size, self.axis + 1)
        return Vmap(self, mapped, size)

    def gradient(self, wrt):
        """Per-example gradients, where each example has its own input; a shared input is served by
        vjp, which sums."""
        inner = (
            self.of.gradient(wrt) if not self.axis and all(self.mapped[i] for i in wrt) else None
        )
        return Vmap(inner, self.mapped, self.size) if inner else None

    def along(self, keep):
        return self._linear(self.of.along(keep), len(keep))

    def transpose(self, keep, outs):
        return self._linear(self.of.transpose(keep, outs), len(outs))

    def _linear(self, inner: Function, linear: int) -> Function:
        """Linear inputs always carry the batch axis (must_map), so the transpose needs no sum over
        it."""
        return Vmap(
            inner,
            self.mapped[: len(self.mapped) - self.linear] + (True,) * linear,
            self.size,
            self.axis,
        )


def _moved(array, steps):
    """One axis moved by swaps with its neighbours."""
    for k in steps:
        array = array.swapaxes(k, k - 1)
    return array


def _natively(of, mapped, size, wrt) -> Function | None:
    """`of` over a batch, where its base takes batches itself: then jvp and vjp go over that, not
    beneath a vmap."""
    if not of.base.native:
        return None
    if shared := [i for i in wrt if not mapped[i]]:
        raise NotImplementedError(
            message(
                "one value for each example of every input that is differentiated under vmap, "
                "where a model batches natively",
                f"input {of.base.input_name(shared[0])} without a batch axis",
                'name it in batched={...}, or use batched="vmap" or "sequential"',
            )
        )
    return of.vmap(mapped, size)
