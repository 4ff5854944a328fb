"""Local potentials as files, in kUPS's format: a zip of three jax.export blobs and metadata.json."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.export

from bridge import archive
from bridge.errors import message, spec
from jax_side.calls import compat
from jax_side.calls.primitive import bridge_p
from jax_side.montecarlo import exported, fence
from jax_side.montecarlo.exported import Kind
from jax_side.montecarlo.local import LocalPotential

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
ENTRIES = (*(f"{file}.jax" for file, _, _ in archive.FUNCTIONS.values()), archive.METADATA)
X64 = 'run jax.config.update("jax_enable_x64", True) first'


def save(
    path: str | os.PathLike[str],
    local: LocalPotential,
    *,
    precision: Literal["32bit", "64bit"],
    order: int = 1,
    platforms: Sequence[str] | None = None,
) -> None:
    """Writes `local` to the zip `path`, which `load`, and kUPS's LocalMLIAPData.from_zip_file, can
    read in any other process.

    Each function becomes a jax.export blob for any number of rows. Weights that it closes over
    (arrays of JAX or NumPy) are written as constants. It must take any number of rows n while it is
    traced: no Python `if` on n, and x.shape[0] in place of len(x).

    precision   "32bit": functions are traced for int32 atomic numbers and float32 arrays. "64bit":
                for int64 and float64, which needs x64
    order       how often the loaded potential can be differentiated: 0 gives energies only, 1
                forces, 2 Hessians. Each order adds a program to each blob. kUPS needs at least 1
                for MD
    platforms   the platforms that the blobs run on, as jax.export names them, e.g. ("cpu", "cuda",
                "tpu"). None means this process's

    The file appears whole or not at all. Its cutoff is in Angstrom. The same functions give the
    same bytes.

    Raises: TypeError if `local` is not a LocalPotential; ValueError for another precision, order or
    platform; ValueError that names the function, where its result does not fit the precision or the
    other functions, where it is a torch function that came by bridge.to_jax (use
    torch_side.montecarlo.files.save for those), and where jax.export can't write it, as for one
    with callbacks.

    >>> import jax.numpy as jnp, tempfile
    >>> from jax_side.montecarlo.local import LocalPotential
    >>> local = LocalPotential(lambda Z: jnp.ones((Z.shape[0], 1)), lambda a, b, r: a * b * jnp.exp(-(r**2).sum(-1, keepdims=True)), lambda a, s: s[:, 0], 3.0)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder + "/gauss.zip", local, precision="32bit")
    ...     again = load(folder + "/gauss.zip")
    >>> graph = {"pos": jnp.eye(3)[:2], "atomic_numbers": jnp.array([1, 1])}
    >>> float(again.full(graph).energy) == float(local.full(graph).energy), again.cutoff
    (True, 3.0)
    """
    if not isinstance(local, LocalPotential):
        raise TypeError(
            message(
                "a LocalPotential",
                type(local).__name__,
                "make one of init, edge, readout and cutoff",
            )
        )
    types, cutoff = _types(precision), archive.checked_cutoff(float(local.cutoff))
    _check_order(order)
    if platforms is not None and (
        isinstance(platforms, str) or not platforms or not set(platforms) <= set(PLATFORMS)
    ):
        raise ValueError(
            message(
                f"platforms among {PLATFORMS}",
                repr(platforms),
                'give a tuple such as ("cpu", "cuda")',
            )
        )
    entries = {}
    for name, (file, takes, gives) in archive.FUNCTIONS.items():
        f, inputs = getattr(local, name), [types[k] for k in takes]
        types[gives] = _traced(name, f, inputs, types[gives])
        entries[f"{file}.jax"] = _exported(name, f, inputs, order, platforms)
    archive.write(path, {**entries, archive.METADATA: archive.metadata_bytes(cutoff, precision)})
    for blob in entries.values():
        fence.allow(blob)


def load(
    path: str | os.PathLike[str],
    order: int = 1,
    *,
    limit: int = archive.LIMIT,
    trust: bool = False,
) -> LocalPotential:
    """Returns the LocalPotential of a zip that `save` wrote, or another program in the same format
    (exported for kUPS, say).

    It runs under jit, scan and vmap. A batch is one call of B n rows, so each function must treat
    its rows alike, as a LocalPotential's do. It differentiates up to `order` times by reverse mode
    (jax.grad, jax.vjp, jax.jacrev). A Hessian is jacrev of jacrev, because jax.export writes no
    rule for forward mode. Atomic numbers may have any integer dtype. Positions are never cast: they
    must be float32 for a file of precision 32bit and float64 for 64bit. `limit` is the largest size
    of all entries together, in bytes.

    All that can be known before a program runs is checked here. Nothing is unpickled, and nothing
    is unpacked to disk. XLA's readers are not made for hostile input, and a forged blob can end the
    process that reads it. So a file that `save` did not write here is read, compiled and run first
    by another process, which takes some 3 s once for each file. Calls of machine code, as for
    linear algebra, are refused. `trust=True` says that you would run a program from where the file
    came from; then both is left out.

    Raises: ValueError that names the file and the reason, its __cause__ being what the reader said.
    Reasons are a zip that is broken or none; entries that are missing, unknown, twice there, too
    large, encrypted, links, or with names that leave the folder; a metadata.json without exactly
    cutoff (finite, > 0) and precision; blobs that can't be read, that have another number of
    arguments, other ranks, dtypes or widths, one fixed number of rows, effects or foreign custom
    calls, that are for other platforms, that have fewer derivatives than `order`, or that end the
    process which tries them; and 64bit while x64 is off. OSError where the file can't be opened.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as f:  # doctest: +NORMALIZE_WHITESPACE
    ...     try: load(f.name)
    ...     except ValueError as e: print(str(e).replace(f.name, "F"))
    expected a local potential in F, got what is no whole zip (BadZipFile: File is not a zip file);
    write or copy it anew
    """
    _check_order(order)
    found = archive.read(path, ENTRIES, limit)
    cutoff, precision = archive.metadata(path, found[archive.METADATA])
    if precision == "64bit" and not compat.config.jax_enable_x64:
        raise archive.refused(path, "one of precision 64bit while x64 is off", X64)
    types, functions = archive.types(precision), {}
    for name, (file, takes, gives) in archive.FUNCTIONS.items():
        inputs, blob = [types[k] for k in takes], found[f"{file}.jax"]
        try:
            mine = trust or fence.known(blob)
            failed = "" if mine else fence.tried(blob)
            # integers have no derivatives
            programs = exported.read(blob, 0 if takes == "Z" else order, trust=mine)
            types[gives] = exported.check(programs, inputs, types[gives])
            if failed:
                raise archive.Odd(f"that can't run ({failed})", fence.ANEW)
        except archive.Odd as odd:
            raise archive.refused(path, f"{file}.jax {odd.args[0]}", odd.args[1]) from odd.__cause__
        functions[name] = exported.Rows(name, programs, inputs)
    return LocalPotential(**functions, cutoff=cutoff)


def _types(precision: str) -> dict[str, Kind]:
    """The kinds of all arrays by the letters of archive.FUNCTIONS; ValueError for 64bit without
    x64."""
    types = archive.types(precision)
    if precision == "64bit" and not compat.config.jax_enable_x64:
        raise ValueError(message("x64 on for precision='64bit'", "x64 off", X64))
    return types


def _check_order(order: int) -> None:
    """ValueError for what is not a number of derivatives."""
    if isinstance(order, bool) or not isinstance(order, int) or order < 0:
        raise ValueError(
            message("order as a number of derivatives, 0 or more", repr(order), "give an int")
        )


def _structs(rows: Any, inputs: Sequence[Kind]) -> list[jax.ShapeDtypeStruct]:
    """Arguments of these kinds with `rows` rows, an int or a symbolic size."""
    return [jax.ShapeDtypeStruct((rows, *shape), dtype) for shape, dtype in inputs]


def _traced(name: str, f: Callable[..., Any], inputs: Sequence[Kind], wanted: Kind) -> Kind:
    """The kind of f's result. ValueError unless it is one array as `wanted`, and where f contains a
    torch function."""
    rows = 5
    jaxpr, out = jax.make_jaxpr(lambda *xs: f(*xs), return_shape=True)(*_structs(rows, inputs))
    if _bridged(jaxpr.jaxpr):
        do = "write the three torch callables by torch_side.montecarlo.files.save"
        raise ValueError(
            message(
                f"{name} in JAX alone",
                "a torch callable that came by bridge.to_jax, which no other process can run",
                do,
            )
        )
    is_array = hasattr(out, "shape")
    if (
        not is_array
        or out.shape[:1] != (rows,)
        or not archive.fits(out.shape, str(out.dtype), wanted)
    ):
        takes = ", ".join(map(archive.words, inputs))
        got = spec(out.shape, out.dtype) if is_array else f"{jax.tree.structure(out)}"
        do = "return one such array; weights of another dtype make results of another"
        raise ValueError(
            message(
                f"{archive.words(wanted)} from {name} of {takes}",
                f"{got} for n={rows}",
                do,
            )
        )
    return out.shape[1:], wanted[1]


def _bridged(jaxpr: Any) -> bool:
    """Whether the bridge's primitive is anywhere inside."""
    inner = lambda x: getattr(x, "jaxpr", x)
    has_equations = lambda x: hasattr(inner(x), "eqns")
    for equation in jaxpr.eqns:
        if equation.primitive is bridge_p:
            return True
        parameters = jax.tree.leaves(list(equation.params.values()), is_leaf=has_equations)
        if any(has_equations(x) and _bridged(inner(x)) for x in parameters):
            return True
    return False


def _exported(
    name: str,
    f: Callable[..., Any],
    inputs: Sequence[Kind],
    order: int,
    platforms: Sequence[str] | None,
) -> bytes:
    """f as a blob of jax.export with `order` derivatives; ValueError where it can't be written."""
    (rows,) = jax.export.symbolic_shape("n")
    try:
        export = jax.export.export(jax.jit(lambda *xs: f(*xs)), platforms=platforms)
        program = export(*_structs(rows, inputs))
        why = exported.foreign(program, program.mlir_module())
        blob = bytes(program.serialize(vjp_order=order))
    except Exception as e:
        expected = f"{name} as a function that jax.export can write for any number of rows n, {order} derivatives of it and platforms={platforms}"
        raise ValueError(
            message(
                expected,
                archive.said(e),
                "see the cause; where it is a size: write x.shape[0], not len(x), and no Python "
                "`if` on it",
            )
        ) from e
    if why:
        raise ValueError(
            message(
                f"{name} as a program that another process can run",
                f"one {why}",
                "write it in JAX alone, without callbacks",
            )
        )
    return blob
