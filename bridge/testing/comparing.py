"""check_function: a callable through the bridge beside itself, under every transform."""

from __future__ import annotations

import contextlib
import importlib

import numpy as np

from bridge.call import one_of
from bridge.errors import message

TRANSFORMS = ("value", "vjp", "jvp", "vmap", "hessian")
_SIDES = {"torch": "torch_side.testing", "jax": "jax_side.testing"}
# of to_jax, of to_torch
_OPTIONS = {
    "torch": ("outputs", "batched", "derivatives"),
    "jax": ("buckets",),
}
EPS = {"float64": 2.3e-16, "float32": 1.2e-7, "float16": 1e-3, "bfloat16": 8e-3}


def check_function(
    fn,
    *args,
    reference=None,
    kind=None,
    lanes=("ffi", "host"),
    transforms=TRANSFORMS,
    tolerance=1.0,
    **options,
):
    """Check that `fn` through the bridge is `fn`, under every transform: AssertionError naming the
    transform, the lane and both numbers.

    `fn` is a torch callable (or nn.Module) or a JAX one; `args` are those of one call: tensors,
    jax.Arrays or NumPy arrays, in dicts, lists and tuples, and static Python values. `kind`
    ("torch" or "jax") is found by their type and needs to be said for NumPy arrays alone.

    A torch callable is compared with bridge.to_jax(fn), on each of the `lanes`: its value; with
    random tangents and cotangents its vjp and jvp in all floating and complex inputs; vmap over two
    rows; and for one real number the Hessian in the first of these inputs; each as it is and under
    jax.jit. Torch's own answers are by torch.autograd, row by row for vmap. A JAX callable is
    compared with bridge.to_torch(fn): backward, double backward, torch.func.vjp, jvp, vmap and
    hessian against those of JAX. `transforms` names some of ("value", "vjp", "jvp", "vmap",
    "hessian"). Results have the same shapes; 64-bit dtypes are kept, whatever jax_enable_x64 is
    (for a torch callable).

    reference   the same function in the other framework: compared with `fn` as well
    tolerance   factor on what is allowed: 2000 times the rounding of the least precise float that
                comes in, relative to the largest entry
    options     those of bridge.to_jax (outputs, batched, derivatives) or bridge.to_torch (buckets)

    Raises: AssertionError where something differs; TypeError for a callable of unknown kind;
    ValueError for arguments that make no sense. What `fn` or a transform raises arrives as it is.

    >>> import torch
    >>> from bridge.testing import check_function
    >>> check_function(lambda x: torch.sin(x).sum(), torch.arange(3.0), lanes=["host"])
    """
    for name in transforms:
        one_of("transforms", name, TRANSFORMS)
    kind = one_of("kind", kind or _kind(fn, args), tuple(_SIDES))
    for name in options:
        one_of("options", name, _OPTIONS[kind])
    given, rebuild = _split(args)
    if not given:
        raise ValueError(
            message(
                "at least one array among the arguments", "none", "pass the arguments of one call"
            )
        )
    widened = (
        importlib.import_module(_SIDES["jax"]).wide(True)
        if kind == "torch" and _wide(given)
        else contextlib.nullcontext()
    )
    with widened:
        there, here = (_arrays(given, k) for k in (_other(kind), kind))
        allowed = (
            2000
            * tolerance
            * max(EPS.get(_name(x), 1.2e-7 if _name(x) == "complex64" else 2.3e-16) for x in given)
        )
        find = lambda side, f, xs, native: _side(side).transforms(
            _flat(f, rebuild), xs, _draw, transforms, native
        )
        want = {}
        for label, what, found in find(kind, fn, here, True):
            want.setdefault(what, (label, found))
        for lane, bridged in _bridged(fn, kind, lanes, options):
            _compare(
                find(_other(kind), bridged, there, False),
                want,
                allowed,
                f"through the bridge{lane}",
            )
        if reference is not None:
            _compare(
                find(_other(kind), reference, there, True), want, allowed, "from the reference"
            )


def _bridged(fn, kind, lanes, options):
    """(where, fn in the other framework)"""
    from bridge.join.calls import to_jax, to_torch

    if kind == "jax":
        return [("", to_torch(fn, **options))]
    return [(f" on the {lane} lane", to_jax(fn, lane=lane, **options)) for lane in lanes]


def _compare(found, want, allowed, where):
    """AssertionError for the first array that is not what was wanted."""
    for label, what, got in found:
        own, expected = want[what]
        if len(got) != len(expected):
            raise AssertionError(
                f"{what}: expected {len(expected)} arrays (the callable's own, by {own}), got "
                f"{len(got)} {where} by {label}"
            )
        for k, (a, b) in enumerate(zip(got, expected)):
            name = f"{what}, array {k}" if len(got) > 1 else what
            if a.shape != b.shape:
                raise AssertionError(
                    f"{name}: expected shape {b.shape} (the callable's own, by {own}), got shape "
                    f"{a.shape} {where} by {label}"
                )
            room = allowed * max(abs(b).max(initial=0), 1e-3)
            off = np.where((a == b) | np.isnan(a) & np.isnan(b), 0, abs(a.astype(complex) - b))
            if a.size and not off.max() <= room:
                at = np.unravel_index(np.argmax(np.where(np.isnan(off), np.inf, off)), off.shape)
                entry = name + (f" at [{', '.join(map(str, at))}]" if at else "")
                numbers = f"expected {b[at]:.10g} (the callable's own, by {own}), got {a[at]:.10g} {where} by {label}"
                raise AssertionError(
                    f"{entry}: {numbers}; off by {off[at]:.3g}, allowed {room:.3g}"
                )


def _kind(fn, args):
    """The framework of the arguments, or of the module."""
    tops = {type(x).__module__.split(".")[0] for x in _split(args)[0]} & {"torch", "jax", "jaxlib"}
    if tops == {"torch"} or (
        not tops and any(c.__module__.startswith("torch.nn.") for c in type(fn).__mro__)
    ):
        return "torch"
    if tops and "torch" not in tops:
        return "jax"
    raise TypeError(
        message(
            "tensors or jax.Arrays among the arguments",
            "both" if tops else "neither",
            'say kind="torch" or kind="jax"',
        )
    )


def _side(kind):
    return importlib.import_module(_SIDES[kind])


def _other(kind):
    return "jax" if kind == "torch" else "torch"


def _arrays(given, kind):
    """The arguments in a framework: copies, where they are not of it."""
    from bridge.join.calls import to_jax, to_torch

    own, across = {"torch": ("torch", to_torch), "jax": ("jax", to_jax)}[kind]
    of = lambda x: type(x).__module__.split(".")[0]
    bring = lambda x: (
        _side(kind).tensor(x)
        if isinstance(x, np.ndarray)
        else x
        if of(x).startswith(own)
        else across(_detached(x), copy=True)
    )
    return [_detached(bring(x)) for x in given]


def _detached(x):
    return x.detach() if hasattr(x, "detach") else x


def _name(x):
    return str(x.dtype).removeprefix("torch.")


def _wide(given):
    return any(
        (_name(x).endswith("64") and _name(x) != "complex64") or _name(x) == "complex128"
        for x in given
    )


def _draw(name, shapes):
    """Random arrays, the same for the same name and shapes."""
    rng = np.random.default_rng(len(name))
    return [rng.uniform(-1, 1, shape) for shape in shapes]


def _split(tree):
    """(arrays, a function that puts others in their places)"""
    found = []

    def visit(x, put):
        if isinstance(x, dict):
            return {k: visit(v, put) for k, v in x.items()}
        if isinstance(x, (list, tuple)):
            inner = [visit(v, put) for v in x]
            return type(x)(*inner) if hasattr(x, "_fields") else type(x)(inner)
        return put(x) if hasattr(x, "dtype") and hasattr(x, "shape") else x

    visit(tree, found.append)
    return found, lambda arrays: visit(tree, lambda _, it=iter(arrays): next(it))  # noqa: B008


def _flat(f, rebuild):
    """`f` as a function of arrays that gives a tuple of arrays: those of dicts sorted by key."""

    def leaves(y):
        if isinstance(y, dict):
            return [x for k in sorted(y) for x in leaves(y[k])]
        if isinstance(y, (list, tuple)):
            return [x for v in y for x in leaves(v)]
        return [] if y is None else [y]

    return lambda *xs: tuple(leaves(f(*rebuild(xs))))
