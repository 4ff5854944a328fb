"""Everything of JAX that is not public, in one place, with the version in which it was seen (jax 0.10.2)."""

from __future__ import annotations

import jax
from jax._src import core
from jax._src.interpreters import ad, batching, mlir

Primitive = core.Primitive
Zero = ad.Zero
is_undefined_primal = ad.is_undefined_primal
lower_fun = mlir.lower_fun


def register(p: core.Primitive, *, impl, abstract_eval, jvp, transpose, batch, lower) -> None:
    """The rules of a primitive with several results; `lower` maps a platform (None: every other one) to its rule."""
    p.multiple_results = True
    p.def_impl(impl)
    p.def_abstract_eval(abstract_eval)
    ad.primitive_jvps[p] = jvp
    ad.primitive_transposes[p] = transpose
    batching.primitive_batchers[p] = batch
    for platform, rule in lower.items():
        mlir.register_lowering(p, rule, platform=platform)


def align(args):
    """Inside shard_map all operands vary over the same manual axes; the transpose of this sums over them."""
    return _insert_pvary(*args)


_NAMES = ("auto_insert_reshard", "standard_insert_pvary", "standard_insert_pbroadcast")  # jax 0.10, 0.8 to 0.9, 0.7
_insert_pvary = next(getattr(core, n) for n in _NAMES if hasattr(core, n))


def result_aval(shape, dtype, avals):
    """An output type that carries the manual axes of the inputs (`manual_axis_type` in 0.10, `vma` before)."""
    if not avals:
        return core.ShapedArray(shape, dtype)
    mesh = core.get_cur_mesh_sharding()
    mine = {k: getattr(avals[0], k) for k in ("manual_axis_type", "vma") if hasattr(avals[0], k)}
    key = next(iter(mine))
    return core.ShapedArray(shape, dtype, sharding=mesh, **{key: mine[key]})


def for_export(ctx) -> bool:
    """True while jax.export lowers: its program outlives every Python object and can keep none alive."""
    return ctx.module_context.lowering_parameters.for_export


def keep_alive(ctx, owner) -> None:
    """`owner` lives as long as the executable that is being lowered."""
    ctx.module_context.add_keepalive(owner)


def no_tangent(x) -> Zero:
    """The tangent of an integer or bool value."""
    return Zero(core.typeof(x).to_tangent_aval())


def float0(x) -> bool:
    return getattr(x, "dtype", None) == jax.dtypes.float0


def unmapped(dim) -> bool:
    """0.10 writes None for an input without a batch axis, as did `not_mapped` before."""
    return dim is None or dim is getattr(batching, "not_mapped", None)
