"""How XLA's partitioner shares out a call: each device gets its examples of a batch, and nothing is
gathered.

XLA knows nothing of what is inside a custom call, and would give the whole batch to each device. It
is told here along which axes a Function takes batches, and what runs on a device that has a part of
them: the same Function for fewer examples. Cotangents of what the examples share are summed up over
the devices.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bridge.errors import message
from bridge.failures import carried
from bridge.function import Function, Mapped
from jax_side.calls import compat

Call = Callable[..., Sequence[jax.Array]]
Axes = tuple[str, ...]  # of a mesh


def lower(ctx: Any, *args: Any, fn: Function, whole: Call, part: Callable[[Function], Call]) -> Any:
    """Lowers the call of a Function in a program for several devices.

    `whole` is the call as XLA would have it on one device. `part(f)` gives what calls a Function
    `f` on a device; f is `fn`, or `fn` for fewer examples."""

    def partition(mesh: Mesh, given: Any, found: Any) -> tuple:
        try:
            return _partition(fn, part, mesh, given, found)
        except Exception as e:
            told = carried(e)
        raise told

    def results(mesh: Mesh, given: Any, found: Any) -> tuple:
        shares = _shares(fn, mesh, given, ())
        return tuple(NamedSharding(mesh, spec) for spec in _specs(fn, shares)[1])

    call = compat.custom_partitioning(lambda *xs: tuple(whole(*xs)))
    rule = compat.sharding_rule(*_names(fn))
    call.def_partition(
        partition,
        infer_sharding_from_operands=results,
        sharding_rule=rule,
        decode_shardings=False,  # which fails where no names of axes say how an array lies
    )
    found = compat.lower_fun(call, multiple_results=True)(ctx, *args)
    return compat.laid_as_typed(ctx, compat.of_this_process(found))


def result_shardings(fn: Function, avals: Sequence[Any]) -> Sequence[Any]:
    """Returns how each result lies over the devices, where JAX has that in the types of the inputs
    (AxisType.Explicit); None where it has not."""
    there = next((a.sharding for a in avals if any(a.sharding.spec)), None)
    shares = [] if there is None else _shares(fn, there.mesh, avals, ())
    if there is None or not any(shares):
        return [None] * len(fn.outputs)
    specs = zip(_specs(fn, shares)[1], fn.outputs)
    return [there.update(spec=P(*spec, *[None] * (len(s.shape) - len(spec)))) for spec, s in specs]


def _carried(fn: Function) -> tuple[list[Mapped], list[Mapped]]:
    """For each input and for each output, which of the batches it carries, in order."""
    of_inputs = [tuple(b.inputs[i] for b in fn.batches) for i in range(len(fn.inputs))]
    of_outputs = [tuple(b.outputs[i] for b in fn.batches) for i in range(len(fn.outputs))]
    return of_inputs, of_outputs


def _names(fn: Function) -> tuple[list[Axes], list[Axes], list[str]]:
    """The names of the axes of inputs and of outputs, and those of axes that no device has a part
    of."""
    whole: list[str] = []

    def named(rank: int, carried: Mapped) -> tuple[str, ...]:
        batches = tuple(f"batch{k}" for k, c in enumerate(carried) if c)
        own = [f"whole{len(whole) + k}" for k in range(rank - len(batches))]
        whole.extend(own)
        return (*batches, *own)

    of_inputs, of_outputs = _carried(fn)
    inputs = [named(len(s.shape), c) for s, c in zip(fn.inputs, of_inputs)]
    outputs = [named(len(s.shape), c) for s, c in zip(fn.outputs, of_outputs)]
    return inputs, outputs, whole


def _shares(fn: Function, mesh: Any, given: Any, found: Any) -> list[Axes]:
    """For each batch, the axes of the mesh over which its examples are shared out: () where each
    device has to have all of them."""
    of_inputs, of_outputs = _carried(fn)
    shares: list[Axes] = []
    for k, batch in enumerate(fn.batches):
        lies = [*_lies(found, of_outputs, k, mesh), *_lies(given, of_inputs, k, mesh)]
        axes = next((axes for axes in lies if axes and not {*axes} & {*sum(shares, ())}), ())
        # rows that XLA adds to a part to make all parts equal are no examples
        shares.append(axes if batch.size % _devices(mesh, axes) == 0 else ())
    return shares


def _lies(arrays: Any, carried: list[Mapped], k: int, mesh: Any) -> Iterator[Axes]:
    """The axes of the mesh over which the axis of batch k lies, for each array that carries it."""
    for x, carries in zip(arrays, carried):
        spec = compat.spec_of(x.sharding, mesh) if carries[k] else ()
        place = sum(carries[:k])
        if carries[k] and place < len(spec) and spec[place] is not None:
            yield spec[place] if isinstance(spec[place], tuple) else (spec[place],)


def _devices(mesh: Any, axes: Axes) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def _specs(fn: Function, shares: list[Axes]) -> tuple[list[P], list[P]]:
    """How inputs and outputs lie over the mesh."""
    spec = lambda carried: P(*(axes or None for axes, c in zip(shares, carried) if c))
    of_inputs, of_outputs = _carried(fn)
    return [*map(spec, of_inputs)], [*map(spec, of_outputs)]


def _partition(fn: Function, part: Callable, mesh: Mesh, given: Any, found: Any) -> tuple:
    """What custom_partitioning asks for: the mesh, what runs on a device, and how results and
    operands lie."""
    shares = [()] * len(fn.batches) if mesh.empty else _shares(fn, mesh, given, found)
    if mesh.empty:
        mesh = Mesh(np.array(compat.devices_of(given[0].sharding)), ("devices",))
    if not any(shares) and not all(x.sharding.is_fully_replicated for x in given):
        warnings.warn(_gathered(fn), stacklevel=2)
    sizes = [b.size // _devices(mesh, axes) for b, axes in zip(fn.batches, shares)]
    call = _summing(part(fn.resized(sizes)), _carried(fn)[1], shares)
    lie = lambda specs: tuple(NamedSharding(mesh, spec) for spec in specs)
    inputs, outputs = _specs(fn, shares)
    return mesh, call, lie(outputs), lie(inputs)


def _summing(call: Call, carried: list[Mapped], shares: list[Axes]) -> Callable:
    """A call whose results that are sums over examples are summed up over devices."""
    over = [sum((axes for axes, c in zip(shares, one) if not c), ()) for one in carried]

    def summed(*xs: jax.Array) -> tuple:
        found = zip(call(*xs), over, strict=True)
        return tuple(compat.sum_over(y, axes) if axes else y for y, axes in found)

    return summed


def _gathered(fn: Function) -> str:
    """The text for arrays that are gathered, since nobody knows how to take a part of the call."""
    expected = f"a batch that devices can share out, in a call of {fn.base}"
    got = "arrays that lie over several devices in another way, so that each has them all and makes the whole call"
    do = "map it over examples by jax.vmap, as many as the devices divide, or call it in jax.shard_map"
    return message(expected, got, do)
