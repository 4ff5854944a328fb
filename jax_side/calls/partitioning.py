"""How XLA's partitioner shares out a call: each device gets its examples of a batch, and nothing is
gathered.

XLA knows nothing of what is inside a custom call, and would give the whole batch to each device. It
is told here along which axis a Function takes a batch, and what runs on a device that has a part of
it: the same Function for fewer examples. Cotangents of what the examples share are summed up over
the devices.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bridge.errors import message
from bridge.function import Batch, Function, Mapped
from jax_side.calls import compat

Call = Callable[..., Sequence[jax.Array]]


def lower(ctx: Any, *args: Any, fn: Function, whole: Call, part: Callable[[Function], Call]) -> Any:
    """Lowers the call of a Function in a program for several devices.

    `whole` is the call as XLA would have it on one device. `part(f)` gives what calls a Function
    `f` on a device; f is `fn`, or `fn` for fewer examples."""

    def partition(mesh: Mesh, given: Any, found: Any) -> tuple:
        return _partition(fn, part, mesh, given, found)

    call = compat.custom_partitioning(lambda *xs: tuple(whole(*xs)))
    call.def_partition(
        partition,
        infer_sharding_from_operands=lambda mesh, given, found: _results(fn, mesh, given, found),
        sharding_rule=compat.sharding_rule(*_factors(fn)),
    )
    results = compat.lower_fun(call, multiple_results=True)(ctx, *args)
    return compat.laid_as_typed(ctx, results)


def example(fn: Function, avals: Sequence[Any]) -> Any:
    """Returns the type of an input whose examples lie over several devices, where JAX has that in
    its types; else None."""
    carried = fn.batch.inputs if fn.batch else ()
    return next((a for a, c in zip(avals, carried) if c and compat.lies_over_devices(a)), None)


def _factors(fn: Function) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]], list[str]]:
    """The names of the axes of inputs and of outputs, and those of axes that no device has a part
    of."""
    whole: list[str] = []

    def named(rank: int, carries: bool) -> tuple[str, ...]:
        own = [f"whole{len(whole) + k}" for k in range(rank - carries)]
        whole.extend(own)
        return ("batch",) * carries + tuple(own)

    batch = fn.batch or Batch(1, (False,) * len(fn.inputs), (False,) * len(fn.outputs))
    named_all = lambda specs, carried: [
        named(len(s.shape), c) for s, c in zip(specs, carried, strict=True)
    ]
    return named_all(fn.inputs, batch.inputs), named_all(fn.outputs, batch.outputs), whole


def _axes_of(sharding: Any) -> tuple[str, ...]:
    """The axes of the mesh over which the first axis of an array lies."""
    if not isinstance(sharding, NamedSharding) or not len(sharding.spec):
        return ()
    first = sharding.spec[0]
    return () if first is None else first if isinstance(first, tuple) else (first,)


def _shared_out(fn: Function, mesh: Mesh, given: Any, found: Any) -> tuple[str, ...]:
    """The axes of the mesh over which the examples are shared out: () where all devices have to
    have all of them."""
    if fn.batch is None or mesh.empty:
        return ()
    carrying = [x for x, c in zip((*found, *given), fn.batch.outputs + fn.batch.inputs) if c]
    axes = next(filter(None, (_axes_of(getattr(x, "sharding", None)) for x in carrying)), ())
    devices = math.prod(mesh.shape[axis] for axis in axes)
    # rows that XLA adds to a part to make all parts equal are no examples
    return axes if fn.batch.size % devices == 0 else ()


def _partition(fn: Function, part: Callable, mesh: Mesh, given: Any, found: Any) -> tuple:
    """What custom_partitioning asks for: the mesh, what runs on a device, and how results and
    operands lie."""
    axes = _shared_out(fn, mesh, given, found)
    if mesh.empty:
        mesh = Mesh(np.array(compat.devices_of(given[0].sharding)), ("devices",))
    if not axes and not all(x.sharding.is_fully_replicated for x in given):
        warnings.warn(_gathered(fn), stacklevel=2)
    lie = lambda carried: tuple(NamedSharding(mesh, P(axes) if axes and c else P()) for c in carried)
    if not axes:
        nothing = lambda arrays: (False,) * len(arrays)
        return mesh, _tuple(part(fn)), lie(nothing(fn.outputs)), lie(nothing(fn.inputs))
    batch: Any = fn.batch
    size = batch.size // math.prod(mesh.shape[axis] for axis in axes)
    call = _summing(part(fn.resized(size)), batch.outputs, axes)
    return mesh, call, lie(batch.outputs), lie(batch.inputs)


def _tuple(call: Call) -> Callable:
    return lambda *xs: tuple(call(*xs))


def _summing(call: Call, carried: Mapped, axes: tuple[str, ...]) -> Callable:
    """A call whose results that are sums over examples are summed up over devices."""

    def summed(*xs: jax.Array) -> tuple:
        return tuple(y if c else jax.lax.psum(y, axes) for y, c in zip(call(*xs), carried))

    return summed


def _results(fn: Function, mesh: Mesh, given: Any, found: Any) -> tuple:
    """How results lie where operands lie as they do."""
    axes = _shared_out(fn, mesh, given, found)
    carried = fn.batch.outputs if fn.batch else (False,) * len(fn.outputs)
    return tuple(NamedSharding(mesh, P(axes) if axes and c else P()) for c in carried)


def _gathered(fn: Function) -> str:
    """The text for arrays that are gathered, since nobody knows how to take a part of the call."""
    expected = f"a batch along the first axis that devices can share out, in a call of {fn.base}"
    got = "arrays that lie on several devices in another way: each device has them all, and makes the whole call"
    do = "call it inside of jax.shard_map, or map it over examples by jax.vmap, as many as the devices divide"
    return message(expected, got, do)
