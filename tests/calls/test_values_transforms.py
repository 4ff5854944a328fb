"""Values of every transform equal pure JAX, on every lane, eager and jitted."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import bridge
from tests.cases import ENERGIES, TWINS, VECTORS, close, draw, sizes
from tests.matrices import a_few

ALL = lambda f, xs: tuple(range(len(xs)))
CT = lambda y: jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)


def scan3(f):
    """Three steps of x <- x + 0.1 sum(f(x)); differentiable through all of them."""
    return lambda *xs: jax.lax.scan(
        lambda c, _: (c + 0.1 * jnp.sum(f(c, *xs[1:])), jnp.sum(f(c, *xs[1:]))),
        xs[0],
        None,
        length=3,
    )[1].sum()


TOTAL = lambda f: lambda *xs: (lambda y: (CT(y) * y).sum())(f(*xs))


TRANSFORMS = {
    "call": lambda f: f,
    "grad": lambda f: lambda *xs: jax.grad(TOTAL(f), ALL(f, xs))(*xs),
    "value_and_grad": lambda f: (
        lambda *xs: jax.value_and_grad(lambda *xs: (f(*xs) ** 2).sum(), ALL(f, xs))(*xs)
    ),
    "jvp": lambda f: lambda *xs: jax.jvp(f, xs, tuple(map(jnp.cos, xs))),
    "vjp": lambda f: lambda *xs: (lambda y, pull: pull(CT(y)))(*jax.vjp(f, *xs)),
    "linearize": lambda f: lambda *xs: jax.linearize(f, *xs)[1](*map(jnp.sin, xs)),
    "jvp_of_tangents": lambda f: (
        lambda *xs: jax.jvp(lambda *ts: jax.jvp(f, xs, ts)[1], xs, tuple(map(jnp.cos, xs)))
    ),
    "jvp_of_cotangents": lambda f: (
        lambda *xs: (lambda y, pull: jax.jvp(pull, (CT(y),), (jnp.sin(CT(y)),)))(*jax.vjp(f, *xs))
    ),
    "jacfwd": lambda f: lambda *xs: jax.jacfwd(f, ALL(f, xs))(*xs),
    "jacrev": lambda f: lambda *xs: jax.jacrev(f, ALL(f, xs))(*xs),
    "hessian": lambda f: lambda *xs: jax.hessian(f, ALL(f, xs))(*xs),
    "jacrev_jacrev": lambda f: lambda *xs: jax.jacrev(jax.jacrev(f))(*xs),
    "jacfwd_jacfwd": lambda f: lambda *xs: jax.jacfwd(jax.jacfwd(f))(*xs),
    "hvp": lambda f: lambda *xs: jax.jvp(jax.grad(TOTAL(f)), xs, tuple(map(jnp.cos, xs)))[1],
    "third_order": lambda f: lambda *xs: jax.jacfwd(jax.jacrev(jax.jacrev(TOTAL(f))))(*xs),
    "vmap": lambda f: lambda *xs: jax.vmap(f)(*[jnp.stack([x, 2 * x]) for x in xs]),
    "vmap_shared": lambda f: (
        lambda *xs: jax.vmap(f, (0,) + (None,) * (len(xs) - 1))(jnp.stack([xs[0], -xs[0]]), *xs[1:])
    ),
    "vmap_last_axis": lambda f: (
        lambda *xs: jax.vmap(f, -1, -1 if f(*xs).ndim else 0)(
            *[jnp.stack([x, 2 * x], -1) for x in xs]
        )
    ),
    "vmap_vmap": lambda f: (
        lambda *xs: jax.vmap(jax.vmap(f))(*[jnp.stack([jnp.stack([x, 2 * x])] * 2) for x in xs])
    ),
    "vmap_grad": lambda f: (
        lambda *xs: jax.vmap(jax.grad(TOTAL(f), ALL(f, xs)))(*[jnp.stack([x, 2 * x]) for x in xs])
    ),
    "grad_vmap": lambda f: (
        lambda *xs: jax.grad(
            lambda *ys: (jax.vmap(f, (0,) + (None,) * (len(xs) - 1))(*ys) ** 2).sum(), ALL(f, xs)
        )(jnp.stack([xs[0], -xs[0]]), *xs[1:])
    ),
    "vmap_hessian": lambda f: (
        lambda *xs: jax.vmap(jax.hessian(TOTAL(f)))(*[jnp.stack([x, 2 * x]) for x in xs])
    ),
    "checkpoint": lambda f: (
        lambda *xs: jax.grad(lambda *xs: (jax.checkpoint(f)(*xs) ** 2).sum())(*xs)
    ),
    "scan": scan3,
    "grad_scan": lambda f: jax.grad(scan3(f)),
    "grad_scan_checkpoint": lambda f: jax.grad(scan3(jax.checkpoint(f))),
    "fori_loop": lambda f: (
        lambda *xs: jax.lax.fori_loop(0, 3, lambda i, c: c + 0.1 * f(c, *xs[1:]).sum(), xs[0])
    ),
    "while_loop": lambda f: (
        lambda *xs: jax.lax.while_loop(
            lambda s: s[0] < 3,
            lambda s: (s[0] + 1, s[1] + 0.1 * f(s[1], *xs[1:]).sum()),
            (0, xs[0]),
        )
    ),
    "jvp_while_loop": lambda f: (
        lambda *xs: jax.jvp(
            lambda x: jax.lax.while_loop(
                lambda s: s[0] < 3,
                lambda s: (s[0] + 1, s[1] + 0.1 * f(s[1], *xs[1:]).sum()),
                (0, x),
            )[1],
            xs[:1],
            xs[:1],
        )
    ),
    "cond": lambda f: lambda *xs: jax.lax.cond(xs[0].sum() > 0, lambda: f(*xs), lambda: 2 * f(*xs)),
    "grad_cond": lambda f: jax.grad(
        lambda *xs: jax.lax.cond(xs[0].sum() > 0, lambda: f(*xs).sum(), lambda: 2 * f(*xs).sum())
    ),
    "vmap_cond": lambda f: (
        lambda *xs: jax.vmap(
            lambda x: jax.lax.cond(x.sum() > 0, lambda: f(x, *xs[1:]), lambda: 2 * f(x, *xs[1:]))
        )(jnp.stack([xs[0], -xs[0]]))
    ),
    "lax_map": lambda f: (
        lambda *xs: jax.lax.map(lambda x: f(x, *xs[1:]), jnp.stack([xs[0], -xs[0]]))
    ),
    "custom_vjp_inside": lambda f: jax.grad(
        lambda *xs: jnp.sin(f(*xs)).sum() * jnp.cos(f(*xs)).sum()
    ),
}


def assert_equals_pure_jax(name, transform, way):
    twin = TWINS[name]
    bridged = bridge.to_jax(twin.torch, lane="auto" if way == "eager" else way)
    xs = draw(twin)
    of = TRANSFORMS[transform]
    run = of(bridged) if way == "eager" else jax.jit(of(bridged))
    close(run(*xs), jax.jit(of(twin.jax))(*xs), rtol=1e-11)


@pytest.mark.matrix
@pytest.mark.parametrize("way", ["eager", "ffi", "host"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", TWINS)
def test_transform_equals_pure_jax(name, transform, way):
    assert_equals_pure_jax(name, transform, way)


# What the native lane compiles takes 10 s, so that it has few cells of this table: every transform
# of one energy, those of a vector that are others, and a few of the other twins. Most of the cells
# of `make test` call packages that another one has compiled.
OF_VECTORS = ["jvp", "vjp", "jacrev", "vmap_last_axis", "grad_vmap", "jvp_while_loop"]
OTHERS = ["grad", "hessian", "vmap_grad", "vmap_hessian"]
NATIVE = [
    *(f"cubic {transform}" for transform in TRANSFORMS),
    *(f"elementwise {transform}" for transform in OF_VECTORS),
    *(f"{name} {t}" for name in TWINS if name not in ("cubic", "elementwise") for t in OTHERS),
]
RUN = """call grad value_and_grad jvp checkpoint scan grad_scan while_loop fori_loop cond grad_cond lax_map
    custom_vjp_inside vmap vmap_grad hvp hessian vmap_hessian third_order""".split()
# and the derivative of a gather, of which Inductor makes wrong numbers unless it is traced with care
A_FEW_NATIVE = {*(f"cubic {t}" for t in RUN), "elementwise jvp", "elementwise vjp", "pair hessian"}


@pytest.mark.parametrize("cell", a_few(NATIVE, A_FEW_NATIVE))
def test_transform_equals_pure_jax_on_the_native_lane(cell):
    assert_equals_pure_jax(*cell.split(), "native")


@settings(max_examples=3)
@given(
    size=sizes, lane=st.sampled_from(["ffi", "host"]), dtype=st.sampled_from(["float64", "float32"])
)
@pytest.mark.parametrize("transform", ["jvp", "hessian", "vmap_grad"])
@pytest.mark.parametrize("name", ["bilinear", "softmax"])
def test_transform_equals_pure_jax_for_any_shape_and_dtype(name, transform, size, lane, dtype):
    twin, (n, m, seed) = TWINS[name], size
    xs = draw(twin, n, m, seed, dtype)
    of = TRANSFORMS[transform]
    close(
        jax.jit(of(bridge.to_jax(twin.torch, lane=lane)))(*xs),
        jax.jit(of(twin.jax))(*xs),
        rtol=1e-11 if dtype == "float64" else 1e-4,
    )


DIFFERENTIATED = ["grad", "hessian", "vmap_hessian", "jvp", "grad_scan", "third_order"]


@pytest.mark.matrix
@pytest.mark.parametrize("transform", DIFFERENTIATED)
@pytest.mark.parametrize("name", ["pair", "bilinear", "elementwise", "matmul"])
def test_autograd_derivatives_equal_pure_jax(name, transform, lane):
    """derivatives="autograd" with vmap served one after another."""
    twin = TWINS[name]
    xs = draw(twin)
    of = TRANSFORMS[transform]
    bridged = bridge.to_jax(twin.torch, lane=lane, derivatives="autograd", batched="sequential")
    close(jax.jit(of(bridged))(*xs), jax.jit(of(twin.jax))(*xs), rtol=1e-11)


@pytest.mark.matrix
@pytest.mark.parametrize("transform", ["call", "grad", "hessian", "vmap_grad", "grad_scan"])
@pytest.mark.parametrize("name", TWINS)
def test_both_lanes_agree_to_the_bit(name, transform):
    twin = TWINS[name]
    xs = draw(twin, 3, 2)
    of = TRANSFORMS[transform]
    a = jax.jit(of(bridge.to_jax(twin.torch, lane="ffi")))(*xs)
    b = jax.jit(of(bridge.to_jax(twin.torch, lane="host")))(*xs)
    for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert p.tobytes() == q.tobytes()


# shard_map: each device calls torch with its own part.

SHARDED = {
    "elementwise": (lambda f: lambda x, w: f(x), VECTORS["elementwise"], (4,), ()),
    "energy": (lambda f: lambda x, w: f(x), ENERGIES["cubic"], (4, 3), ()),
    "replicated": (lambda f: f, VECTORS["matmul"], (4, 2), (2, 3)),
}


@pytest.mark.matrix
@pytest.mark.parametrize("transform", ["call", "grad", "hessian", "jvp"])
@pytest.mark.parametrize("name", SHARDED)
def test_shard_map_equals_pure_jax(name, transform, lane):
    adapt, twin, shape, shape_w = SHARDED[name]
    mesh = jax.make_mesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jnp.cos(jnp.arange(float(jnp.prod(jnp.array(shape))))).reshape(shape)
    w = jnp.sin(jnp.ones(shape_w))

    def over_devices(f):
        local = lambda x, w: jax.lax.psum(jnp.sum(adapt(f)(x, w) ** 2), "i")
        return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P("i"), P()), out_specs=P()))

    of = TRANSFORMS[transform]
    close(
        of(over_devices(bridge.to_jax(twin.torch, lane=lane)))(x, w),
        of(over_devices(twin.jax))(x, w),
        rtol=1e-11,
    )


def test_jit_of_sharded_arrays_gives_the_right_values(maybe_jit):
    """Without shard_map XLA runs the whole call on every device: slower, never wrong."""
    mesh = jax.make_mesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.device_put(jnp.arange(8.0), NamedSharding(mesh, P("i")))
    twin = VECTORS["elementwise"]
    close(maybe_jit(bridge.to_jax(twin.torch))(x), twin.jax(x))
