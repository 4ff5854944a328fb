"""One primitive, all transforms: it binds a Function, and each rule binds another Function that the
first one gives."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from bridge.errors import message
from bridge.function import Function
from jax_side.calls import compat, lanes, named, native, partitioning, processes, registry
from jax_side.calls.compat import Zero
from jax_side.calls.nesting import here

bridge_p = compat.Primitive("bridge")


def call(fn: Function, *args: Any, lane: str = "auto") -> list[jax.Array]:
    """Applies a Function to JAX arrays or tracers of exactly its input types, and returns its
    outputs."""
    if compat.eager(args):
        return _impl(*args, fn=fn, lane=lane)
    return bridge_p.bind(*compat.align(args), fn=fn, lane=lane)


def _impl(*args, fn, lane):
    """An eager call, which no lane serves: an exception arrives as it is, since there is no runtime
    in between. Arrays that lie on several devices need XLA."""
    processes.check_own()
    # Constants of a jaxpr that is run eagerly need not be JAX arrays.
    args = [a if isinstance(a, jax.Array) else jnp.asarray(a) for a in args]
    if any(a.sharding.num_devices > 1 for a in args):
        with jax.disable_jit(False):
            return jax.jit(functools.partial(call, fn, lane=lane))(*args)
    return lanes.eager(fn, args)


def _abstract_eval(*avals, fn, lane):
    lies = partitioning.result_shardings(fn, avals)
    return [
        compat.result_aval(s.shape, jnp.dtype(s.dtype), avals, sharding)
        for s, sharding in zip(fn.outputs, lies, strict=True)
    ]


def _zero(t) -> bool:
    return type(t) is Zero or compat.float0(t)


def _jvp(primals, tangents, *, fn, lane):
    wrt = tuple(i for i, t in enumerate(tangents) if not _zero(t))
    dx = [tangents[i] for i in wrt]
    fixed = len(primals) - fn.linear
    if fn.linear and all(i >= fixed for i in wrt):
        outs = call(fn, *primals, lane=lane)
        dots = call(fn.along(tuple(i - fixed for i in wrt)), *primals[:fixed], *dx, lane=lane)
    elif gradient := fn.gradient(wrt):
        outs, dots = _jvp_of_energy(gradient, fn, primals, dx, lane)
    else:
        outs = call(fn, *primals, lane=lane)
        dots = call(fn.jvp(wrt), *primals, *dx, lane=lane)
    dots = iter(dots)
    return outs, [
        next(dots) if s.inexact else compat.no_tangent(o)
        for o, s in zip(outs, fn.outputs, strict=True)
    ]


def _jvp_of_energy(gradient: Function, fn: Function, primals, dx, lane):
    """The rule for a real scalar output for each example. Value and gradient come from one call,
    and the tangent is the inner product of gradient and dx."""
    results = call(gradient, *primals, lane=lane)
    outs, grads = results[: len(fn.outputs)], results[len(fn.outputs) :]
    lead = max(o.ndim for o, s in zip(outs, fn.outputs) if s.inexact)
    dots = [jnp.sum(g * t, axis=tuple(range(lead, g.ndim))) for g, t in zip(grads, dx, strict=True)]
    return outs, [sum(dots[1:], dots[0])]


def _transpose(cts, *args, fn, lane):
    fixed = len(args) - fn.linear
    unknown = tuple(k for k in range(fn.linear) if compat.is_undefined_primal(args[fixed + k]))
    live = tuple(o for o, c in enumerate(cts) if type(c) is not Zero)
    result = [None] * len(args)
    if live:
        values = call(
            fn.transpose(unknown, live), *args[:fixed], *(cts[o] for o in live), lane=lane
        )
        for k, v in zip(unknown, values, strict=True):
            result[fixed + k] = compat.laid_like(v, args[fixed + k].aval)
    return result


def _batch(args, dims, *, fn, lane):
    mapped = tuple(not compat.unmapped(d) for d in dims)
    size = next(a.shape[d] for a, d, m in zip(args, dims, mapped) if m)
    needed = fn.must_map(mapped)
    args = [_lead(a, d, m, n, size) for a, d, m, n in zip(args, dims, mapped, needed, strict=True)]
    outs = call(fn.vmap(needed, size), *args, lane=lane)
    return outs, (0,) * len(outs)


def _lead(x, dim, mapped, needed, size):
    """The input with its batch axis first. One that must have a batch axis and has none is
    broadcast."""
    if mapped:
        return jnp.moveaxis(x, dim, 0)
    return jnp.broadcast_to(x, (size, *x.shape)) if needed else x


def _check_sizes(fn, lane):
    """NotImplementedError where a batch has a symbol for its size, which only the ffi lane
    serves."""
    if fn.symbolic:
        do = 'take lane="ffi", or export it for each size'
        expected = f"a number of examples in a call of {fn.base} on lane={lane!r}"
        sizes = ", ".join(str(b.size) for b in fn.batches)
        raise NotImplementedError(message(expected, f"the symbol {sizes}", do))


def _lower_host(ctx, *args, fn, lane):
    _check_sizes(fn, "host")
    if lane in ("ffi", "native"):
        platform = ctx.module_context.platforms
        raise NotImplementedError(
            message(
                f"one of the platforms {lanes.FFI_PLATFORMS} for lane={lane!r}",
                str(platform),
                'use lane="auto" or "host"',
            )
        )
    platform = ctx.module_context.platforms[0]
    f = functools.partial(lanes.host, fn)
    if (
        platform in lanes.FFI_PLATFORMS
        and lanes.is_wide(*fn.inputs, *fn.outputs)
        and not compat.for_export(ctx)
        and not compat.x64_in_all_threads()
    ):
        # JAX would narrow the inputs, in a thread of XLA's where x64 is off
        index = compat.add_host_callback(ctx, lanes.HostPart(fn))
        f = functools.partial(lanes.host_part, fn, index, platform)
    return compat.lower_fun(f, multiple_results=True)(ctx, *args)


def _lower_native(ctx, *args, fn, platform):
    _check_sizes(fn, "native")
    forever = compat.for_export(ctx)
    owner = native.own(fn, platform, forever, compat.over_processes(ctx))
    if not forever:
        # the user's module too: a weight that it lets go has been replaced
        compat.keep_alive(ctx, (owner, fn))
    return compat.lower_fun(lambda *xs: native.call(fn, owner.number, *xs), multiple_results=True)(
        ctx, *args
    )


def _lower_ffi(ctx, *args, fn, lane, platform):
    if compat.over_devices(ctx) and not compat.for_export(ctx):
        return _lower_partitioned(ctx, *args, fn=fn, lane=lane, platform=platform)
    if lane == "native":
        return _lower_native(ctx, *args, fn=fn, platform=platform)
    if _by_host(lane):
        return _lower_host(ctx, *args, fn=fn, lane=lane)
    lanes.register_ffi(fn.base.tensor_type)
    if compat.for_export(ctx):
        owner = named.own(fn) if "named" in fn.base.memo else registry.own_forever(fn)
    else:
        owner = registry.own(fn, telling=compat.over_processes(ctx))
        compat.keep_alive(ctx, owner)
    return compat.lower_fun(lambda *xs: lanes.ffi(fn, owner.number, *xs), multiple_results=True)(
        ctx, *args
    )


def _lower_partitioned(ctx, *args, fn, lane, platform):
    """In a program for several devices."""
    depth, owners = here.depth, []

    def owned(fn):
        outside, here.depth = here.depth, depth
        try:
            if lane == "native":
                owner, f = native.own(fn, platform, False, True), native.call
            else:
                lanes.register_ffi(fn.base.tensor_type)
                owner, f = registry.own(fn, telling=True), lanes.ffi
        finally:
            here.depth = outside
        owners.append((owner, fn))  # which the program keeps, with this function
        return functools.partial(f, fn, owner.number)

    part = owned
    if _by_host(lane):
        index = compat.add_host_callback(ctx, processes.telling(lanes.HostPart(fn)))
        part = lambda fn: functools.partial(lanes.host_part, fn, index, platform)
    whole = functools.partial(call, fn, lane=lane)
    return partitioning.lower(ctx, *args, fn=fn, whole=whole, part=part)


def _by_host(lane) -> bool:
    return lane == "host" or (lane == "auto" and not lanes.has_ffi())


compat.register(
    bridge_p,
    impl=_impl,
    abstract_eval=_abstract_eval,
    jvp=_jvp,
    transpose=_transpose,
    batch=_batch,
    lower={
        None: _lower_host,
        **{p: functools.partial(_lower_ffi, platform=p) for p in lanes.FFI_PLATFORMS},
    },
)
