"""Everything of JAX that is not public, in one place. Seen working in jax 0.10.2 and 0.12.0 (`make
test` and `make test-latest`); the same names stand in the sources of 0.11.2, which has not been
run."""

from __future__ import annotations

import jax
from jax._src import core
from jax._src.interpreters import ad, batching, mlir
from jaxlib import xla_client

Primitive = core.Primitive
Zero = ad.Zero
is_undefined_primal = ad.is_undefined_primal
lower_fun = mlir.lower_fun


def register(p: core.Primitive, *, impl, abstract_eval, jvp, transpose, batch, lower) -> None:
    """The rules of a primitive with several results; `lower` maps a platform (None: every other
    one) to its rule."""
    p.multiple_results = True
    p.def_impl(impl)
    p.def_abstract_eval(abstract_eval)
    ad.primitive_jvps[p] = jvp
    ad.primitive_transposes[p] = transpose
    batching.primitive_batchers[p] = batch
    for platform, rule in lower.items():
        mlir.register_lowering(p, rule, platform=platform)


def eager(args) -> bool:
    """True where nothing is being traced, and a call on these is its own result; `bind` finds that
    out in 7 us."""
    # A list is quicker than a generator here, and this is a hot path.
    return core.trace_state_clean() and not any([isinstance(a, core.Tracer) for a in args])  # noqa: C419


def align(args):
    """Inside shard_map all operands vary over the same manual axes; the transpose of this sums over
    them."""
    return core.auto_insert_reshard(*args)


def result_aval(shape, dtype, avals):
    """An output type that carries the manual axes of the inputs."""
    if not avals:
        return core.ShapedArray(shape, dtype)
    return core.ShapedArray(
        shape,
        dtype,
        sharding=core.get_cur_mesh_sharding(),
        manual_axis_type=avals[0].manual_axis_type,
    )


def for_export(ctx) -> bool:
    """True while jax.export lowers: its program outlives every Python object and can keep none
    alive."""
    return ctx.module_context.lowering_parameters.for_export


def keep_alive(ctx, owner) -> None:
    """`owner` lives as long as the executable that is being lowered."""
    ctx.module_context.add_keepalive(owner)


def no_tangent(x) -> Zero:
    """The tangent of an integer or bool value."""
    return Zero(core.typeof(x).to_tangent_aval())


def no_cotangent(shape, dtype) -> Zero:
    """The cotangent of an output that nobody asks about, for the function that jax.vjp returns: no
    0 * inf comes of it."""
    return Zero(core.ShapedArray(shape, dtype).to_ct_aval())


def float0(x) -> bool:
    return getattr(x, "dtype", None) == jax.dtypes.float0


def unmapped(dim) -> bool:
    """0.10 writes None for an input without a batch axis."""
    return dim is None


def asynchronous() -> bool:
    """The flag jax_cpu_enable_async_dispatch, which is no attribute of jax.config."""
    return jax.config._value_holders["jax_cpu_enable_async_dispatch"].value


def cpu_client():
    """A CPU client beside the one that JAX has; jit runs a program on the client whose arrays it is
    given."""
    return xla_client.make_cpu_client(asynchronous=False)
