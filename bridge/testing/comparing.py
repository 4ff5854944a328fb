"""check_function: a callable through the bridge beside itself, under every transform."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from bridge.call import one_of
from bridge.errors import message
from bridge.function import WIDE
from bridge.testing.subject import SIDES, Found, Kind, side

TRANSFORMS = ("value", "vjp", "jvp", "vmap", "hessian")
_OPTIONS = {"torch": ("outputs", "batched", "derivatives"), "jax": ("buckets",)}
# The rounding of floats, where it is not that of float64.
EPS = {"float32": 1.2e-7, "complex64": 1.2e-7, "float16": 1e-3, "bfloat16": 8e-3}


def check_function(
    fn: Callable[..., Any],
    *args: Any,
    reference: Callable[..., Any] | None = None,
    kind: Kind | None = None,
    lanes: Sequence[str] = ("ffi", "host"),
    transforms: Sequence[str] = TRANSFORMS,
    tolerance: float = 1.0,
    **options: Any,
) -> None:
    """Checks that `fn` through the bridge is `fn`, under every transform.

    `fn` is a torch callable (or nn.Module) or a JAX one. `args` are those of one call: tensors,
    jax.Arrays or NumPy arrays, in dicts, lists and tuples, and static Python values. `kind`
    ("torch" or "jax") is found by their types. It has to be said where all are NumPy arrays.

    A torch callable is compared with bridge.to_jax(fn), on each of the `lanes`, as it is and under
    jax.jit. Compared are its value, its vjp and jvp in all floating and complex inputs with random
    cotangents and tangents, vmap over two rows, and for one real number the Hessian in the first of
    these inputs. Torch's own answers are by torch.autograd, row by row for vmap. 64-bit dtypes are
    kept, whatever jax_enable_x64 is. A JAX callable is compared with bridge.to_torch(fn): backward,
    double backward, torch.func.vjp, jvp, vmap and hessian must give what JAX gives. Results must
    have the same shapes.

    lanes       those of bridge.to_jax that a torch callable goes by
    transforms  some of ("value", "vjp", "jvp", "vmap", "hessian")
    reference   the same function in the other framework, which is compared with `fn` as well
    tolerance   factor on what is allowed, which is 2000 times the rounding of the least precise
                float that comes in, relative to the largest entry
    options     those of bridge.to_jax (outputs, batched, derivatives) or bridge.to_torch (buckets)

    Raises: AssertionError where something differs, naming the transform, the lane and both numbers;
    TypeError for a callable of unknown kind; ValueError for arguments that make no sense. What `fn`
    or a transform raises arrives as it is.

    >>> import torch
    >>> from bridge.testing import check_function
    >>> check_function(lambda x: torch.sin(x).sum(), torch.arange(3.0), lanes=["host"])
    """
    for name in transforms:
        one_of("transforms", name, TRANSFORMS)
    kind = one_of("kind", kind or _kind(fn, args), tuple(SIDES))
    for name in options:
        one_of("options", name, _OPTIONS[kind])
    given, rebuild = _split(args)
    if not given:
        do = "pass the arguments of one call"
        raise ValueError(message("at least one array among the arguments", "none", do))

    def find(where: Kind, f: Callable[..., Any], xs: list[Any], native: bool) -> list[Found]:
        return side(where).transforms(_flat(f, rebuild), xs, _draw, transforms, native)

    wide = kind == "torch" and any(_name(x) in WIDE for x in given)
    with side("jax").wide(True) if wide else contextlib.nullcontext():
        other = _other(kind)
        there, here = _arrays(given, other), _arrays(given, kind)
        allowed = 2000 * tolerance * max(EPS.get(_name(x), 2.3e-16) for x in given)
        want: dict[str, tuple[str, list[np.ndarray]]] = {}
        for label, what, found in find(kind, fn, here, True):
            want.setdefault(what, (label, found))
        for lane, bridged in _bridged(fn, kind, lanes, options):
            _compare(find(other, bridged, there, False), want, allowed, f"through the bridge{lane}")
        if reference is not None:
            _compare(find(other, reference, there, True), want, allowed, "from the reference")


def _bridged(
    fn: Callable[..., Any], kind: Kind, lanes: Iterable[str], options: dict[str, Any]
) -> list[tuple[str, Callable[..., Any]]]:
    """Pairs (where, fn in the other framework)."""
    from bridge.join.calls import to_jax, to_torch

    if kind == "jax":
        return [("", to_torch(fn, **options))]
    return [(f" on the {lane} lane", to_jax(fn, **{"lane": lane, **options})) for lane in lanes]


def _compare(
    found: Iterable[Found],
    want: dict[str, tuple[str, list[np.ndarray]]],
    allowed: float,
    where: str,
) -> None:
    """Raises AssertionError for the first array that is not what was wanted."""
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
                numbers = (
                    f"expected {b[at]:.10g} (the callable's own, by {own}), got {a[at]:.10g} "
                    f"{where} by {label}"
                )
                raise AssertionError(
                    f"{entry}: {numbers}; off by {off[at]:.3g}, allowed {room:.3g}"
                )


def _kind(fn: Callable[..., Any], args: Sequence[Any]) -> Kind:
    """The framework of the arguments, or of the module. Raises TypeError where that is unclear."""
    tops = {type(x).__module__.split(".")[0] for x in _split(args)[0]} & {"torch", "jax", "jaxlib"}
    is_module = any(c.__module__.startswith("torch.nn.") for c in type(fn).__mro__)
    if tops == {"torch"} or (is_module and not tops):
        return "torch"
    if tops and "torch" not in tops:
        return "jax"
    got = "both" if tops else "neither"
    do = 'say kind="torch" or kind="jax"'
    raise TypeError(message("tensors or jax.Arrays among the arguments", got, do))


def _other(kind: Kind) -> Kind:
    return "jax" if kind == "torch" else "torch"


def _arrays(given: Iterable[Any], kind: Kind) -> list[Any]:
    """The arguments in a framework. They are copies if they are not of it."""
    from bridge.join.calls import to_jax, to_torch

    across = to_torch if kind == "torch" else to_jax

    def bring(x: Any) -> Any:
        if isinstance(x, np.ndarray):
            return side(kind).tensor(x)
        is_own = type(x).__module__.split(".")[0].startswith(kind)  # jaxlib is JAX's as well
        return x if is_own else across(_detached(x), copy=True)

    return [_detached(bring(x)) for x in given]


def _detached(x: Any) -> Any:
    return x.detach() if hasattr(x, "detach") else x


def _name(x: Any) -> str:
    return str(x.dtype).removeprefix("torch.")


def _draw(name: str, shapes: Iterable[tuple[int, ...]]) -> list[np.ndarray]:
    """Random arrays, the same for the same name and shapes."""
    rng = np.random.default_rng(len(name))
    return [rng.uniform(-1, 1, shape) for shape in shapes]


def _split(tree: Any) -> tuple[list[Any], Callable[[Iterable[Any]], Any]]:
    """(the arrays of a pytree, a function that puts others in their places)."""
    found = []

    def visit(x: Any, put: Callable[[Any], Any]) -> Any:
        if isinstance(x, dict):
            return {k: visit(v, put) for k, v in x.items()}
        if isinstance(x, (list, tuple)):
            inner = [visit(v, put) for v in x]
            return type(x)(*inner) if hasattr(x, "_fields") else type(x)(inner)
        return put(x) if hasattr(x, "dtype") and hasattr(x, "shape") else x

    def rebuild(arrays: Iterable[Any]) -> Any:
        left: Iterator[Any] = iter(arrays)
        return visit(tree, lambda _: next(left))

    visit(tree, found.append)
    return found, rebuild


def _flat(f: Callable[..., Any], rebuild: Callable[[Iterable[Any]], Any]) -> Callable[..., Any]:
    """`f` as a function of arrays that gives a tuple of arrays. Dicts are sorted by key."""

    def leaves(y: Any) -> list[Any]:
        if isinstance(y, dict):
            return [x for k in sorted(y) for x in leaves(y[k])]
        if isinstance(y, (list, tuple)):
            return [x for v in y for x in leaves(v)]
        return [] if y is None else [y]

    return lambda *xs: tuple(leaves(f(*rebuild(xs))))
