"""Everything of JAX that is not public, in one place.

It works in jax 0.10.2 and 0.12.0 (`make test` and `make test-latest`), and in 0.11.2 as far as
docs/gpu.md says.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import logging
import secrets
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax._src import core, dispatch, distributed, xla_bridge
from jax._src import mesh as mesh_lib
from jax._src.ad_util import Zero as Zero
from jax._src.custom_partitioning_sharding_rule import ArrayMapping, SdyShardingRule
from jax._src.interpreters import ad, batching, mlir
from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]
from jax._src.sharding_impls import ShardingContext, parse_flatten_op_sharding
from jax.experimental.custom_partitioning import custom_partitioning as custom_partitioning
from jaxlib import xla_client

Primitive = core.Primitive
is_undefined_primal = ad.is_undefined_primal
lower_fun = mlir.lower_fun
config: Any = jax.config  # its options are attributes that no type checker knows


def register(
    p: core.Primitive,
    *,
    impl: Callable[..., Any],
    abstract_eval: Callable[..., Any],
    jvp: Callable[..., Any],
    transpose: Callable[..., Any],
    batch: Callable[..., Any],
    lower: Mapping[str | None, Callable[..., Any]],
) -> None:
    """Sets the rules of a primitive with several results.

    `lower` maps a platform to its lowering rule; the rule of None is for all other platforms.
    """
    p.multiple_results = True
    dispatch.prim_requires_devices_during_lowering.add(p)
    p.def_impl(impl)
    p.def_abstract_eval(abstract_eval)
    ad.primitive_jvps[p] = jvp
    ad.primitive_transposes[p] = transpose
    batching.primitive_batchers[p] = batch
    for platform, rule in lower.items():
        mlir.register_lowering(p, rule, platform=platform)


def eager(args: Sequence[Any]) -> bool:
    """True where nothing is being traced, so that a call on these arguments can run at once.

    `Primitive.bind` would find the same out in 7 us.
    """
    # A list is quicker than a generator here, and this is a hot path.
    return core.trace_state_clean() and not any([isinstance(a, core.Tracer) for a in args])  # noqa: C419


def align(args: Sequence[Any]) -> Sequence[Any]:
    """Returns operands that vary over the same manual axes, as shard_map wants it. The transpose
    of this sums over these axes."""
    return core.auto_insert_reshard(*args)


def result_aval(
    shape: tuple[int, ...], dtype: Any, avals: Sequence[Any], sharding: Any = None
) -> core.ShapedArray:
    """Returns an output type that carries the manual axes of the inputs, and lies over the devices
    as `sharding` says (None: each has all of it)."""
    if not avals:
        return core.ShapedArray(shape, dtype)
    sharding = core.get_cur_mesh_sharding() if sharding is None else sharding
    return core.ShapedArray(
        shape,
        dtype,
        sharding=sharding,
        manual_axis_type=avals[0].manual_axis_type,
    )


def laid_like(x: jax.Array, aval: Any) -> jax.Array:
    """Returns x, laid over the devices as the type says."""
    there = core.typeof(x).sharding
    return x if there == aval.sharding else jax.sharding.reshard(x, aval.sharding)


# A sum over axes of a mesh, in what custom_partitioning runs on a device. jax 0.11 puts the mesh of
# jax.set_mesh into the sum that it lowers there, which XLA refuses; here it knows of none.
_sum_p = Primitive("bridge_sum")
_sum_p.def_abstract_eval(lambda x, axes: x)


def _lower_sum(ctx: Any, x: Any, *, axes: tuple[str, ...]) -> Any:
    (aval,) = ctx.avals_in
    plain = core.ShapedArray(aval.shape, aval.dtype)
    here = ctx.replace(avals_in=[plain], avals_out=[plain])
    with mesh_lib.use_abstract_mesh(mesh_lib.empty_abstract_mesh):
        return lower_fun(lambda x: jax.lax.psum(x, axes), multiple_results=False)(here, x)


mlir.register_lowering(_sum_p, _lower_sum)


def sum_over(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Returns the sum of what the devices along axes of a mesh have."""
    return _sum_p.bind(x, axes=axes)


def of_this_process(results: Sequence[Any]) -> Sequence[Any]:
    """Returns lowered results of a call that means nothing in another process: no compilation
    cache finds its program again."""
    mark = ir.DictAttr.get({"bridge_process": ir.StringAttr.get(_PROCESS)})
    for y in results:
        y.owner.attributes["mhlo.frontend_attributes"] = mark
    return results


_PROCESS = secrets.token_hex(8)


def laid_as_typed(ctx: Any, results: Sequence[Any]) -> list[Any]:
    """Returns lowered results, which XLA lays over the devices as their types say."""
    return [
        mlir.lower_with_sharding_in_types(ctx, y, aval)
        for y, aval in zip(results, ctx.avals_out, strict=True)
    ]


def for_export(ctx: Any) -> bool:
    """True while jax.export lowers. Its program outlives every Python object and can keep none
    alive."""
    return ctx.module_context.lowering_parameters.for_export


def add_host_callback(ctx: Any, callback: Callable[..., Any]) -> int:
    """Gives the program that is being lowered one more callback; returns its number."""
    ctx.module_context.add_host_callback(callback)
    return len(ctx.module_context.host_callbacks) - 1


def keep_alive(ctx: Any, owner: object) -> None:
    """Keeps `owner` alive as long as the executable that is being lowered."""
    ctx.module_context.add_keepalive(owner)


def over_devices(ctx: Any) -> bool:
    """True in a program for several devices that XLA partitions: in shard_map JAX has done so."""
    context = ctx.module_context.axis_context
    return isinstance(context, ShardingContext) and context.num_devices > 1


def over_processes(ctx: Any) -> bool:
    """True in a program that several processes run."""
    context = ctx.module_context.axis_context
    mesh = getattr(context, "mesh", None)
    devices = mesh.devices.flat if mesh is not None else getattr(context, "device_assignment", None)
    return any(d.process_index != jax.process_index() for d in devices or ())


def job() -> tuple[int, Any]:
    """Returns the number of this process, and the client of jax.distributed (None without it)."""
    return jax.process_index(), distributed.global_state.client


def has_started() -> bool:
    """True where JAX has made a client, which has threads."""
    return xla_bridge.backends_are_initialized()


def sharding_rule(
    operands: Sequence[tuple[str, ...]], results: Sequence[tuple[str, ...]], whole: Sequence[str]
) -> SdyShardingRule:
    """Returns what Shardy is told of a call, from the names of the axes of its operands and
    results. Axes of one name are divided alike, and those of `whole` not at all."""
    mapped = lambda arrays: tuple(ArrayMapping(*names) for names in arrays)
    return SdyShardingRule(mapped(operands), mapped(results), need_replication_factors=tuple(whole))


def spec_of(sharding: Any, mesh: Any) -> tuple[Any, ...]:
    """Returns the axes of the mesh over which each axis of an array lies; () where no names of axes
    say how it lies."""
    if isinstance(sharding, jax.sharding.NamedSharding):
        return tuple(sharding.spec)
    try:
        return tuple(parse_flatten_op_sharding(sharding._to_xla_hlo_sharding(0), mesh)[0])
    except Exception:  # a part of an axis, or one that does not divide
        return ()


def devices_of(sharding: Any) -> Sequence[Any]:
    """Returns the devices of a sharding, in its order."""
    return sharding._device_assignment


def vjp_with_aux(
    f: Callable[..., tuple[Any, Any]], *primals: Any
) -> tuple[Any, Callable[[Any], tuple[Any, ...]], Any]:
    """Returns (y, its pullback, aux) for f, which returns (y, aux): jax.vjp with has_aux=True,
    whose type says otherwise."""
    # jax.vjp is declared to return a pair, with has_aux=True as well.
    return jax.vjp(f, *primals, has_aux=True)  # pyright: ignore[reportReturnType]


# jitted functions with compiler options: the same without
_without_options: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def compiler_options(f: Callable[..., Any]) -> dict[str, Any]:
    """Returns the compiler options that a jitted function was given, {} for any other callable."""
    return dict(getattr(getattr(f, "_jit_info", None), "compiler_options_kvs", ()))


def without_options(f: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that may be called within another jitted one, as those with compiler
    options may not: the same one each time."""
    if not compiler_options(f):
        return f
    if f not in _without_options:
        static = {
            name: getattr(f._jit_info, name) for name in ("static_argnums", "static_argnames")
        }
        _without_options[f] = jax.jit(f.__wrapped__, **static)
    return _without_options[f]


def no_tangent(x: Any) -> Zero:
    """Returns the tangent of an integer or bool value."""
    return Zero(core.typeof(x).to_tangent_aval())


def no_cotangent(shape: tuple[int, ...], dtype: Any) -> Zero:
    """Returns the cotangent of an output that nobody asks about, for the function that jax.vjp
    gives. Unlike an array of zeros it can't become 0 * inf."""
    return Zero(core.ShapedArray(shape, dtype).to_ct_aval())


def float0(x: Any) -> bool:
    """True for a tangent of float0, the dtype of tangents of integers."""
    return getattr(x, "dtype", None) == jax.dtypes.float0


def unmapped(dim: Any) -> bool:
    """True for an input without a batch axis, for which jax 0.10 writes None."""
    return dim is None


def live_programs() -> Iterator[tuple[bytes | None, Callable[[], str]]]:
    """Yields (fingerprint, what gives the text) of each compiled program that XLA holds."""
    for client in (*xla_bridge.backends().values(), *_cpu_clients):
        for program in client.live_executables():
            text = lambda program=program: "".join(m.to_string() for m in program.hlo_modules())
            yield program.fingerprint, text


_cpu_clients: list[Any] = []


def wait_for_ordered_effects() -> None:
    """Waits for the programs of this thread that have effects in order (jax.experimental.io_callback
    with ordered=True): JAX promises that a process does not end before them."""
    for token in dispatch.runtime_tokens.current_tokens.values():
        with contextlib.suppress(Exception):  # JAX raises it itself at exit
            token.block_until_ready()


def log_no_failed_callbacks() -> None:
    """Keeps JAX from logging each exception of a callback of the host lane."""
    logging.getLogger("jax._src.callback").disabled = True


def forget_errors(tag: str) -> None:
    """Forgets the errors with `tag` in their text that JAX keeps in order to print them at exit, where
    nobody can do anything about them."""
    tokens = dispatch.runtime_tokens
    for kept in (tokens.current_tokens, tokens.output_runtime_tokens):
        for key, token in [*kept.items()]:
            try:
                token.block_until_ready()
            except Exception as error:
                if tag in str(error):
                    del kept[key]


def leave_programs() -> None:
    """Lets the process end while programs run: neither JAX's own handlers at exit nor the end of its
    clients waits for them."""
    dispatch.runtime_tokens.clear()
    for client in {id(d.client): d.client for d in jax.local_devices()}.values():
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(client))


def asynchronous() -> bool:
    """Returns the flag jax_cpu_enable_async_dispatch, which is no attribute of jax.config."""
    return jax.config._value_holders["jax_cpu_enable_async_dispatch"].value


def x64_in_all_threads() -> bool:
    """Returns whether x64 is on for threads that never asked for it, such as XLA's: a
    `with jax.enable_x64(True)` holds for its own thread alone."""
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(config.jax_enable_x64))
    thread.start()
    thread.join()
    return found[0]


def cpu_client() -> Any:
    """Returns a CPU client beside the one that JAX has. jit runs a program on the client whose
    arrays it is given."""
    _cpu_clients.append(xla_client.make_cpu_client(asynchronous=False))
    return _cpu_clients[-1]


def jaxlib_private() -> Any:
    """Returns the module of jaxlib's own functions on buffers, whose names may go.

    Raises: ImportError where it has gone itself.
    """
    return importlib.import_module("jaxlib._jax")
