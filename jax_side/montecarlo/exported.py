"""Exported programs of rows, read with every check there is, as functions that jit, vmap and
reverse mode take."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Sequence

import jax
import jax.export
import jax.numpy as jnp

from bridge.archive import Kind, Odd, fits, said, words
from bridge.errors import message, spec
from bridge.trust import TRUST

# custom calls that every jaxlib serves: what XLA itself makes of shapes, shardings and so on
OWN_TARGETS = re.compile(
    r"Sharding|SPMD\w+|shape_assertion|stablehlo\.dynamic_\w+|mhlo\.\w+"
    r"|ApproxTopK|Eigh|Qr|ProductOfElementaryHouseholderReflectors|LuDecomposition|AllocateBuffer"
)
# and its machine code, for linear algebra and random bits, which writes beyond an array of another
# size than it expects
KERNELS = re.compile(r"(lapack|cusolver|cublas|hipsolver|hipblas)_\w+|(cu|hip)_threefry2x32_ffi")


def foreign(program: jax.export.Exported, text: str) -> str:
    """Returns what ties an exported program to the process that made it, in words; "" if nothing
    does. `text` is its MLIR module."""
    if program.ordered_effects or program.unordered_effects:
        return "with effects"
    if program.nr_devices != 1:
        return f"for {program.nr_devices} devices"
    if found := re.search(r"stablehlo\.(infeed|outfeed|send|recv)\b", text):
        return f"with {found[0]}"
    foreign = [t for t in _targets(text) if not (OWN_TARGETS.fullmatch(t) or KERNELS.fullmatch(t))]
    return f"with a custom call {', '.join(foreign)}" if foreign else ""


def _targets(text: str) -> list[str]:
    """The names of custom calls in a module."""
    found = re.findall(r"stablehlo\.custom_call(?: @([\w.$-]+)\()?", text)
    return sorted({t or "of no plain name" for t in found})


def read(
    blob: bytes, order: int | None = None, *, trust: bool = False
) -> list[jax.export.Exported]:
    """Returns the exported function and its first `order` derivatives; None stands for all.

    Raises: Odd for a blob that can't be read, that no other process can run, that calls machine
    code while `trust` is False, or that has fewer derivatives."""
    try:
        programs = [jax.export.deserialize(bytearray(blob))]
        while (order is None or len(programs) <= order) and programs[-1].has_vjp():
            programs.append(programs[-1].vjp())
        texts = [p.mlir_module() for p in programs]
        whys = [foreign(p, text) for p, text in zip(programs, texts)]
    except Exception as e:  # flatbuffers and MLIR have no one exception for what they can't read
        raise Odd(f"that jax.export can't read ({said(e)})", "export it anew") from e
    if why := next(filter(None, whys), ""):
        raise Odd(
            why,
            "it can't run in another process than its author's: write it in JAX alone",
        )
    kernels = [t for text in texts for t in _targets(text) if KERNELS.fullmatch(t)]
    if kernels and not trust:
        raise Odd(
            f"with {kernels[0]}, machine code that believes what the file says of its sizes",
            TRUST,
        )
    if order is not None and len(programs) <= order:
        raise Odd(
            f"that can be differentiated {len(programs) - 1} times",
            f"export it with order={order} (vjp_order), or load with less",
        )
    return programs


def check(programs: Sequence[jax.export.Exported], inputs: Sequence[Kind], wanted: Kind) -> Kind:
    """Returns the kind of the result: its shape without rows and its dtype.

    `programs` are what `read` gave, `inputs` the kinds of the arguments, `wanted` that of the
    result, where a width None may be any.

    Raises: Odd for a program of other types, of a fixed number of rows, or for other platforms, and
    for a derivative that does not belong to the program before it."""
    program, here = programs[0], jax.export.default_export_platform()
    ins, outs = program.in_avals, program.out_avals
    takes = jax.tree.structure((tuple(0 for _ in inputs), {}))
    if program.in_tree != takes or program.out_tree != jax.tree.structure(0):
        raise Odd(
            f"of {len(ins)} arguments and {len(outs)} results",
            f"it must take {len(inputs)} arrays and give one array",
        )
    for x, kind in (*zip(ins, inputs), (outs[0], wanted)):
        if not fits(x.shape, str(x.dtype), kind):
            raise Odd(f"with {spec(x.shape, x.dtype)}", f"it must be {words(kind)} there")
    if not all(isinstance(w, int) for w in outs[0].shape[1:]):
        raise Odd(
            f"with a result {spec(outs[0].shape, outs[0].dtype)}",
            "only the number of rows may be open",
        )
    rows = {str(x.shape[0]) for x in (*ins, *outs)}
    if len(rows) != 1 or not rows.copy().pop().isidentifier():
        raise Odd(
            f"for {' and '.join(sorted(rows))} rows",
            "export it with one symbol as the leading size of all arrays",
        )
    if here not in program.platforms:
        raise Odd(
            f"for {', '.join(program.platforms)}", f"export it with platforms=({here!r}, ...)"
        )
    types = lambda avals: [(str(x.shape), x.dtype) for x in avals]
    for p, d in itertools.pairwise(programs):
        takes_same = types(d.in_avals) == types((*p.in_avals, *p.out_avals))
        gives_same = types(d.out_avals) == types(p.in_avals)
        if not (takes_same and gives_same):
            raise Odd("whose derivative is of another function", "export it anew")
    return outs[0].shape[1:], wanted[1]


class Rows:
    """A function of arrays of rows, served by an exported program and its derivatives.

    It may be called under jit, vmap and reverse mode. `name` is for error texts, `programs` are
    what `read` gave, and `inputs` are the kinds of the arguments.

    Raises: a call raises ValueError for arguments of other kinds, and where more derivatives are
    asked for than there are programs."""

    def __init__(
        self, name: str, programs: Sequence[jax.export.Exported], inputs: Sequence[Kind]
    ) -> None:
        self.name = name
        self.inputs = inputs
        self.call = _differentiable(name, programs)

    def __call__(self, *args: jax.Array) -> jax.Array:
        pairs = zip(args, self.inputs, strict=True)
        cast = [_cast(self.name, k, x, *kind) for k, (x, kind) in enumerate(pairs)]
        return self.call(*cast)[0]


def _cast(name: str, k: int, x: jax.Array, shape: tuple[int | None, ...], dtype: str) -> jax.Array:
    """Argument `k` with integers cast to the program's dtype; ValueError for a float of another
    dtype or width than the program takes."""
    if dtype.startswith("int") and jnp.issubdtype(x.dtype, jnp.integer):
        x = x.astype(dtype)
    if not fits(x.shape, str(x.dtype), (shape, dtype)):
        do = "cast positions, cell and all else to one dtype, or save the potential in the other precision"
        raise ValueError(
            message(
                f"argument {k} of the loaded {name} as {words((shape, dtype))}",
                spec(x.shape, x.dtype),
                do,
            )
        )
    return x


def _differentiable(
    name: str, programs: Sequence[jax.export.Exported], done: int = 0
) -> Callable[..., list[jax.Array]]:
    """The first program as a function of arrays -> list of arrays; the others are its
    derivatives."""
    if not programs:
        return functools.partial(_no_more, name, done - 1)
    flat = _batched(programs[0])
    back = _differentiable(name, programs[1:], done + 1)

    @jax.custom_vjp
    def f(*args):
        return flat(*args)

    def forward(*args):
        return f(*args), args

    def backward(args, cotangents):
        return tuple(back(*args, *cotangents))

    f.defvjp(forward, backward)
    return f


def _no_more(name, order, *_):
    """The derivative that is not in the file: a ValueError."""
    raise ValueError(
        message(
            f"at most {order} derivatives of the loaded {name}",
            "one more",
            f"load (and save) with order={order + 1}",
        )
    )


def _batched(program: jax.export.Exported) -> Callable[..., list[jax.Array]]:
    """The program as a function of arrays of rows. Under vmap it is one call with the rows of all
    examples."""

    @jax.custom_batching.custom_vmap
    def flat(*args):
        if args[0].shape[0] == 0:  # the program's symbolic number of rows is 1 or more
            return [jnp.zeros((0, *x.shape[1:]), x.dtype) for x in program.out_avals]
        return jax.tree.leaves(program.call(*args))

    @flat.def_vmap
    def over_examples(size, mapped, *args):
        args = [x if m else jnp.broadcast_to(x, (size, *x.shape)) for x, m in zip(args, mapped)]
        rows = args[0].shape[1]
        outs = flat(*(x.reshape(size * rows, *x.shape[2:]) for x in args))
        return [y.reshape(size, rows, *y.shape[1:]) for y in outs], [True] * len(outs)

    return flat
