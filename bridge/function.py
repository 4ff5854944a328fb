"""The neutral contract: a Function knows its shapes, runs, and gives its jvp, vjp and vmap, each a
Function again.

Standard library only. A bank implements a base (a Function that runs the user's own call) and an
`Engine` (how its framework differentiates and batches a call). Everything else here is bookkeeping
of shapes, which both banks share.

Conventions
- All inputs and outputs are flat tuples of arrays. `inputs` and `outputs` are their `Spec`s.
- A *linear* Function is linear in its last `linear` inputs. `along` keeps some of these inputs and
  takes the others as zero. `transpose` exchanges them with its outputs. jvp and vjp are each
  other's transpose, WITHOUT conjugation, as in JAX.
- `wrt` and `outs` are tuples of positions in the inputs and outputs of the function that is
  differentiated.
- Equality and hash are by value: two Functions that wrap the same things are the same Function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol

from bridge.errors import message, spec

Arrays = tuple[Any, ...]  # of whichever framework runs the call
Positions = tuple[int, ...]  # which of the inputs, or of the outputs
Mapped = tuple[bool, ...]  # for each input, whether it carries the batch axis
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
        """True for floating dtypes that are not complex."""
        return self.inexact and not self.dtype.startswith("complex")

    def stacked(self, size: int, axis: int = 0) -> Spec:
        """Returns the Spec of `size` such arrays, stacked along a new axis."""
        return Spec((*self.shape[:axis], size, *self.shape[axis:]), self.dtype)


class Batch(NamedTuple):
    """How a Function takes a batch of examples, none of which depends on another: along an axis of
    some inputs and outputs, which comes before all that are no such axis.

    size     the number of examples
    inputs   for each input, whether it carries the axis; all examples share the others
    outputs  for each output, whether it carries the axis; the others are sums over the examples"""

    size: int
    inputs: Mapped
    outputs: Mapped


class Engine(Protocol):
    """How one framework serves the transforms of a call `f(*arrays) -> tuple of arrays`.

    `shares` is True where vmap over tangents or cotangents alone evaluates the function once for
    all of them.
    """

    shares: bool

    def jvp(
        self, f: Function, primals: Arrays, wrt: Positions, tangents: Arrays, outs: Positions
    ) -> Sequence[Any]:
        """Returns the tangents of the outputs `outs`, given those of the inputs `wrt`."""
        ...

    def vjp(
        self, f: Function, primals: Arrays, wrt: Positions, cotangents: Arrays, outs: Positions
    ) -> Sequence[Any]:
        """Returns the cotangents of the inputs `wrt`, given those of the outputs `outs`."""
        ...

    def gradient(self, f: Function, primals: Arrays, wrt: Positions, out: int) -> Sequence[Any]:
        """Returns all outputs, and then the gradients of the scalar output `out` in `wrt`."""
        ...

    def vmap(self, f: Function, mapped: Mapped, size: int, arrays: Arrays) -> Sequence[Any]:
        """Returns the outputs over `size` examples, which lie along the first axis."""
        ...

    def check_vmap(self, f: Function, mapped: Mapped) -> None:
        """Raises NotImplementedError, which names the alternative, where `vmap` can't serve f."""


class Function:
    """A call with known shapes. Subclasses set `inputs`, `outputs`, `engine` and define `__call__`.

    A base also says how any Function that is built on it runs for the other bank. A base of torch
    has these for the lanes of JAX:

        run(fn, buffers, into=None)   runs fn on foreign memory
        runner(fn, ready)             the same for many calls into buffers. `ready` says that they
                                      are of tensor_type and of their dtypes already
        give(results)                 hands fresh results to the other bank
        tensor_type                   the class that buffers should arrive as
        on_stream(stream, buffers)    a context for a call on a GPU
        compiled(fn, platform)        fn as a package that C++ can call, for the native lane

    A base of JAX has `program_of(fn)`, the program of fn for memory that torch lends.
    """

    inputs: tuple[Spec, ...]
    outputs: tuple[Spec, ...]
    engine: Engine
    linear: int = 0
    native: bool = False  # True where the base itself takes batches

    run: Callable[..., Any]
    runner: Callable[..., Callable[..., Any]]
    give: Callable[..., Any]
    tensor_type: type
    on_stream: Callable[..., AbstractContextManager[Any]]
    compiled: Callable[[Function, str], Any]
    program_of: Callable[[Function], Any]

    @property
    def batches(self) -> tuple[Batch, ...]:
        """How this Function takes batches, so that devices can share them out; the outermost first,
        whose axis is the first of the inputs and outputs that carry it."""
        return ()

    def resized(self, sizes: Sequence[int]) -> Function:
        """Returns the same call for batches of other sizes, one for each of `batches`."""
        return self

    @cached_property
    def symbolic(self) -> bool:
        """True where the size of a batch is a symbol (jax.export), not a number."""
        return not all(isinstance(b.size, int) for b in self.batches)

    def of_shapes(self, shapes: Sequence[Sequence[int]]) -> Function:
        """Returns the same call for batches as large as in inputs of these shapes."""
        sizes = []
        for k, batch in enumerate(self.batches):
            carrying = batch.inputs.index(True)
            place = sum(outer.inputs[carrying] for outer in self.batches[:k])
            sizes.append(shapes[carrying][place])
        return self.resized(sizes)

    @cached_property
    def plain(self) -> bool:
        """True where every dtype travels as itself, without the carriers of a lane."""
        specs = (*self.inputs, *self.outputs)
        return not any(s.dtype.startswith(("complex", "float8")) for s in specs)

    @cached_property
    def memo(self) -> dict[Any, Any]:
        """What a bank keeps with this Function: its program, its derivatives. It is not part of the
        Function's value."""
        return {}

    @cached_property
    def program(self) -> Any:
        """What runs this Function on memory that the other bank lends, made once. The base must
        have `program_of`."""
        return self.base.program_of(self)

    @cached_property
    def differentiable(self) -> bool:
        """True where some output has a derivative."""
        return any(s.inexact for s in self.outputs)

    def input_name(self, i: int) -> str:
        """Returns how error texts call input i."""
        return f"[{i}]"

    def __call__(self, *arrays: Any) -> Sequence[Any]:
        """Runs the call and returns its outputs."""
        raise NotImplementedError

    @property
    def evaluator(self) -> Callable[..., Sequence[Any]]:
        """What serves many calls. It is `__call__`, unless a base has something faster."""
        return self.__call__

    @property
    def base(self) -> Function:
        """The user's own call, beneath all transforms."""
        return self

    def jvp(self, wrt: Positions) -> Function:
        """Returns the Function (inputs, tangents of wrt) -> tangents of the inexact outputs."""
        return Jvp(self, wrt, _inexact(self.outputs))

    def gradient(self, wrt: Positions) -> Function | None:
        """Returns the Function inputs -> (outputs, gradients), which runs one forward and one
        backward.

        None unless the one inexact output is a real scalar, and the inputs `wrt` are real.
        """
        outs = _inexact(self.outputs)
        if len(outs) != 1 or not all(self.inputs[i].real for i in wrt):
            return None
        output = self.outputs[outs[0]]
        scalar = output.shape == () and output.real
        return Gradient(self, wrt, outs[0]) if scalar else None

    def must_map(self, mapped: Mapped) -> Mapped:
        """Returns which inputs have to carry the batch axis, given which do.

        Linear inputs always have to, so that transpose is exact.
        """
        fixed = len(mapped) - self.linear
        return tuple(m or i >= fixed for i, m in enumerate(mapped))

    def vmap(self, mapped: Mapped, size: int) -> Function:
        """Returns the call over a leading axis of the mapped inputs and of every output."""
        return Vmap(self, mapped, size)

    def along(self, keep: Positions) -> Function:
        """Returns the Function of the linear inputs `keep`, with the others zero.

        Raises: TypeError for a Function that is not linear.
        """
        raise TypeError(f"{self} is not linear")

    def transpose(self, keep: Positions, outs: Positions) -> Function:
        """Returns the transpose, from cotangents of the outputs `outs` to those of the linear
        inputs `keep`.

        Raises: TypeError for a Function that is not linear.
        """
        raise TypeError(f"{self} is not linear")


def _inexact(specs: Iterable[Spec]) -> Positions:
    """Where a derivative exists."""
    return tuple(i for i, s in enumerate(specs) if s.inexact)


def _pick(items: Sequence[Any], positions: Iterable[int]) -> tuple[Any, ...]:
    return tuple(items[i] for i in positions)


@dataclass(frozen=True)
class Derived(Function):
    """A transform of another Function, whose engine and base it shares."""

    of: Function

    @property
    def engine(self) -> Engine:
        """The engine of the other Function."""
        return self.of.engine

    @property
    def base(self) -> Function:
        """The user's own call, beneath all transforms."""
        return self.of.base


@dataclass(frozen=True)
class Linearised(Derived):
    """What Jvp and Vjp share: `of` around its inputs, linear in the inputs that follow these."""

    wrt: Positions
    outs: Positions

    def resized(self, sizes: Sequence[int]) -> Function:
        """As Function.resized."""
        return type(self)(self.of.resized(sizes), self.wrt, self.outs)

    def _split(self, arrays: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """(what belongs to the inputs of `of`, what belongs to the linear inputs)."""
        n = len(self.of.inputs)
        return arrays[:n], arrays[n:]

    def must_map(self, mapped: Mapped) -> Mapped:
        """As Function.must_map. The point may stay without the batch axis where the engine shares
        its evaluation."""
        inputs, linear = self._split(mapped)
        point = inputs if self._shared(inputs) else self.of.must_map(inputs)
        return point + (True,) * len(linear)

    def _shared(self, inputs: Mapped) -> bool:
        """True for many tangents or cotangents at one point, if the engine serves them by one
        evaluation."""
        return self.engine.shares and not any(inputs)

    def vmap(self, mapped: Mapped, size: int) -> Function:
        """As Function.vmap. A model that batches natively is batched first and differentiated
        then."""
        inputs = self._split(mapped)[0]
        batched = None if self._shared(inputs) else _natively(self.of, inputs, size, self.wrt)
        return type(self)(batched, self.wrt, self.outs) if batched else Vmap(self, mapped, size)


@dataclass(frozen=True)
class Jvp(Linearised):
    """(x, tangents of x[wrt]) -> tangents of outputs[outs], linear in the tangents."""

    @cached_property
    def inputs(self) -> tuple[Spec, ...]:
        """The inputs of the other Function, and the tangents of some of them."""
        return self.of.inputs + _pick(self.of.inputs, self.wrt)

    @cached_property
    def outputs(self) -> tuple[Spec, ...]:
        """The tangents of outputs."""
        return _pick(self.of.outputs, self.outs)

    @property
    def batches(self) -> tuple[Batch, ...]:
        """As the other Function has them."""
        inputs = lambda of: of.inputs + _pick(of.inputs, self.wrt)
        outputs = lambda of: _pick(of.outputs, self.outs)
        return tuple(Batch(of.size, inputs(of), outputs(of)) for of in self.of.batches)

    @cached_property
    def linear(self) -> int:
        """How many tangents go in."""
        return len(self.wrt)

    def __call__(self, *arrays: Any) -> Sequence[Any]:
        primals, tangents = self._split(arrays)
        return self.engine.jvp(self.of, primals, self.wrt, tangents, self.outs)

    def along(self, keep: Positions) -> Jvp:
        """Returns the jvp in some of its tangents."""
        return Jvp(self.of, _pick(self.wrt, keep), self.outs)

    def transpose(self, keep: Positions, outs: Positions) -> Vjp:
        """Returns the vjp in the other direction."""
        return Vjp(self.of, _pick(self.wrt, keep), _pick(self.outs, outs))


@dataclass(frozen=True)
class Vjp(Linearised):
    """(x, cotangents of outputs[outs]) -> cotangents of x[wrt], linear in the cotangents."""

    @cached_property
    def inputs(self) -> tuple[Spec, ...]:
        """The inputs of the other Function, and the cotangents of some of its outputs."""
        return self.of.inputs + _pick(self.of.outputs, self.outs)

    @cached_property
    def outputs(self) -> tuple[Spec, ...]:
        """The cotangents of inputs."""
        return _pick(self.of.inputs, self.wrt)

    @property
    def batches(self) -> tuple[Batch, ...]:
        """As the other Function has them. Cotangents of what examples share are sums over them."""
        inputs = lambda of: of.inputs + _pick(of.outputs, self.outs)
        outputs = lambda of: _pick(of.inputs, self.wrt)
        return tuple(Batch(of.size, inputs(of), outputs(of)) for of in self.of.batches)

    @cached_property
    def linear(self) -> int:
        """How many cotangents go in."""
        return len(self.outs)

    def __call__(self, *arrays: Any) -> Sequence[Any]:
        primals, cotangents = self._split(arrays)
        return self.engine.vjp(self.of, primals, self.wrt, cotangents, self.outs)

    def along(self, keep: Positions) -> Vjp:
        """Returns the vjp in some of its cotangents."""
        return Vjp(self.of, self.wrt, _pick(self.outs, keep))

    def transpose(self, keep: Positions, outs: Positions) -> Jvp:
        """Returns the jvp in the other direction."""
        return Jvp(self.of, _pick(self.wrt, outs), _pick(self.outs, keep))


@dataclass(frozen=True)
class Gradient(Derived):
    """x -> (outputs, d outputs[out] / d x[wrt]). outputs[out] is a real scalar for each example."""

    wrt: Positions
    out: int

    @cached_property
    def inputs(self) -> tuple[Spec, ...]:
        """The inputs of the other Function."""
        return self.of.inputs

    @cached_property
    def outputs(self) -> tuple[Spec, ...]:
        """The outputs of the other Function, and the gradients."""
        return self.of.outputs + _pick(self.of.inputs, self.wrt)

    @property
    def batches(self) -> tuple[Batch, ...]:
        """As the other Function has them. Gradients in what examples share are sums over them."""
        outputs = lambda of: of.outputs + _pick(of.inputs, self.wrt)
        return tuple(Batch(of.size, of.inputs, outputs(of)) for of in self.of.batches)

    def resized(self, sizes: Sequence[int]) -> Function:
        """As Function.resized."""
        return Gradient(self.of.resized(sizes), self.wrt, self.out)

    def __call__(self, *arrays: Any) -> Sequence[Any]:
        return self.engine.gradient(self.of, arrays, self.wrt, self.out)

    def must_map(self, mapped: Mapped) -> Mapped:
        """As the other Function has it."""
        return self.of.must_map(mapped)

    def vmap(self, mapped: Mapped, size: int) -> Function:
        """As Function.vmap. A model that batches natively is batched first and differentiated
        then."""
        batched = _natively(self.of, mapped, size, self.wrt)
        return Gradient(batched, self.wrt, self.out) if batched else Vmap(self, mapped, size)


@dataclass(frozen=True)
class Vmap(Derived):
    """The call over one more axis of `size` examples, served by the engine.

    It is the leading axis, but for Functions that batch natively over axes before it: then `axis`
    is its place.
    """

    mapped: Mapped
    size: int
    axis: int = 0

    def __post_init__(self) -> None:
        """Raises NotImplementedError where the engine can't serve it."""
        self.engine.check_vmap(self.of, self.mapped)

    @cached_property
    def inputs(self) -> tuple[Spec, ...]:
        """The inputs of the other Function, the mapped ones with the axis."""
        return tuple(
            s.stacked(self.size, self.axis) if m else s
            for s, m in zip(self.of.inputs, self.mapped, strict=True)
        )

    @cached_property
    def outputs(self) -> tuple[Spec, ...]:
        """The outputs of the other Function, with the axis."""
        return tuple(s.stacked(self.size, self.axis) for s in self.of.outputs)

    @property
    def batches(self) -> tuple[Batch, ...]:
        """The examples, among the batches of the other Function at the place of the axis."""
        own = Batch(self.size, self.mapped, (True,) * len(self.of.outputs))
        of = self.of.batches
        return (*of[: self.axis], own, *of[self.axis :])

    def resized(self, sizes: Sequence[int]) -> Function:
        """As Function.resized."""
        inner = (*sizes[: self.axis], *sizes[self.axis + 1 :])
        return replace(self, of=self.of.resized(inner), size=sizes[self.axis])

    @cached_property
    def linear(self) -> int:
        """As many as the other Function has."""
        return self.of.linear

    def __call__(self, *arrays: Any) -> Sequence[Any]:
        there = range(self.axis, 0, -1)
        in_front = tuple(
            _moved(a, there) if m else a for a, m in zip(arrays, self.mapped, strict=True)
        )
        results = self.engine.vmap(self.of, self.mapped, self.size, in_front)
        return tuple(_moved(y, reversed(there)) for y in results)

    def _around_native(self, mapped: Mapped) -> bool:
        """True for many tangents at one point of a model that batches natively, if there now are
        several points."""
        points = len(self.of.of.inputs) if isinstance(self.of, Linearised) else 0
        return self.base.native and any(mapped[:points]) and not any(self.mapped[:points])

    def must_map(self, mapped: Mapped) -> Mapped:
        """As Function.must_map, or as the other Function has it if that is batched first."""
        return self.of.must_map(mapped) if self._around_native(mapped) else super().must_map(mapped)

    def vmap(self, mapped: Mapped, size: int) -> Vmap:
        """As Function.vmap. Several points of a model that batches natively are batched beneath
        this axis."""
        if self._around_native(mapped):
            return Vmap(self.of.vmap(mapped, size), self.mapped, self.size, self.axis + 1)
        return Vmap(self, mapped, size)

    def gradient(self, wrt: Positions) -> Vmap | None:
        """Returns the gradients of each example, if each has inputs `wrt` of its own.

        None for an input that examples share: its gradient is a sum over them, which vjp gives.
        """
        if self.axis or not all(self.mapped[i] for i in wrt):
            return None
        inner = self.of.gradient(wrt)
        return Vmap(inner, self.mapped, self.size) if inner else None

    def along(self, keep: Positions) -> Vmap:
        """As Function.along, for each example."""
        return self._linear(self.of.along(keep), len(keep))

    def transpose(self, keep: Positions, outs: Positions) -> Vmap:
        """As Function.transpose, for each example."""
        return self._linear(self.of.transpose(keep, outs), len(outs))

    def _linear(self, inner: Function, linear: int) -> Vmap:
        """Linear inputs always carry the batch axis (must_map), so the transpose needs no sum over
        it."""
        nonlinear = self.mapped[: len(self.mapped) - self.linear]
        return Vmap(inner, nonlinear + (True,) * linear, self.size, self.axis)


def _moved(array: Any, steps: Iterable[int]) -> Any:
    """The array with one axis moved, by swaps with its neighbours."""
    for k in steps:
        array = array.swapaxes(k, k - 1)
    return array


def _natively(of: Function, mapped: Mapped, size: int, wrt: Positions) -> Function | None:
    """`of` over a batch, if its base takes batches itself; else None.

    jvp and vjp then differentiate the batched Function, and need no vmap around them.
    """
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
