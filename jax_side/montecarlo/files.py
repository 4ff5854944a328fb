"""Local potentials as files, in kUPS's format: a zip of three jax.export blobs and metadata.json
(DESIGN section 6)."""

from __future__ import annotations

import jax
import jax.export

from bridge import archive
from bridge.errors import message, spec
from jax_side.calls.primitive import bridge_p
from jax_side.montecarlo import exported
from jax_side.montecarlo.local import LocalPotential

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
ENTRIES = (*(f"{file}.jax" for file, _, _ in archive.FUNCTIONS.values()), archive.METADATA)
X64 = 'run jax.config.update("jax_enable_x64", True) first'


def save(path, local: LocalPotential, *, precision: str, order: int = 1, platforms=None) -> None:
    """Write `local` to the zip `path`, which `load`, and kUPS's LocalMLIAPData.from_zip_file, read
    in any other process.

    Each function becomes a jax.export blob for any number of rows; weights that it closes over
    (arrays of JAX or numpy) go in as constants. It must take any number of rows n while it is
    traced: no Python `if` on n, and x.shape[0] in place of len(x).

    precision   "32bit": it is traced for int32 atomic numbers and float32 else; "64bit": int64 and
                float64 (needs x64)
    order       how often the loaded potential can be differentiated: energies only 0, forces 1,
                Hessians 2. Each order adds a program to each blob. 1 is the least that kUPS can run
                MD with
    platforms   those that the blobs run on, as jax.export names them, e.g. ("cpu", "cuda", "tpu");
                None: this process's

    The file appears whole or not at all; cutoff in Angstrom. The same functions give the same
    bytes.

    Raises: TypeError for what is no LocalPotential; ValueError for another precision or order, for
    functions whose results don't fit the precision or one another, for a torch function that came
    by bridge.to_jax (torch_side.montecarlo.files.save writes those) and for what jax.export can't
    write, callbacks among them, naming the function.

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


def load(path, order: int = 1, *, limit: int = archive.LIMIT) -> LocalPotential:
    """The LocalPotential of a zip that `save` wrote, or another program in the same format
    (exported for kUPS, say).

    It runs under jit, scan and vmap (a batch is one call of B n rows, so each function must treat
    its rows alike, as a LocalPotential's do) and differentiates up to `order` times by reverse mode
    (jax.grad, jax.vjp, jax.jacrev; a Hessian is jacrev of jacrev: jax.export writes no rule for
    forward mode). Any integer atomic numbers go in; positions must be float32 for a file of
    precision 32bit and float64 for 64bit: they are never cast. `limit`: bytes of all entries
    together.

    Everything that can be seen before a program runs is checked here: nothing is unpickled, nothing
    unpacked to disk. But the blobs are programs: read them from those whom you trust with your
    processor's time, as XLA's own reader is not made for enemies: a blob forged with care can end
    the process.

    Raises: ValueError that names the file and the reason, its __cause__ what the reader said: no
    zip or a broken one, entries missing, more, twice, too large, encrypted, links, with names that
    leave the folder; metadata.json without exactly cutoff (finite, > 0) and precision; blobs that
    can't be read, of other arity, ranks, dtypes or widths, for one number of rows only, with
    effects or foreign custom calls, for other platforms, or with fewer derivatives than `order`;
    64bit while x64 is off. OSError where the file can't be opened.

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
    if precision == "64bit" and not jax.config.jax_enable_x64:
        raise archive.refused(path, "one of precision 64bit while x64 is off", X64)
    types, functions = archive.types(precision), {}
    for name, (file, takes, gives) in archive.FUNCTIONS.items():
        inputs = [types[k] for k in takes]
        try:
            # integers have no derivatives
            programs = exported.read(found[f"{file}.jax"], 0 if takes == "Z" else order)
            types[gives] = exported.check(programs, inputs, types[gives])
        except archive.Odd as odd:
            raise archive.refused(path, f"{file}.jax {odd.args[0]}", odd.args[1]) from odd.__cause__
        functions[name] = exported.Rows(name, programs, inputs)
    return LocalPotential(**functions, cutoff=cutoff)


def _types(precision):
    types = archive.types(precision)
    if precision == "64bit" and not jax.config.jax_enable_x64:
        raise ValueError(message("x64 on for precision='64bit'", "x64 off", X64))
    return types


def _check_order(order):
    if isinstance(order, bool) or not isinstance(order, int) or order < 0:
        raise ValueError(
            message("order as a number of derivatives, 0 or more", repr(order), "give an int")
        )


def _structs(rows, inputs):
    return [jax.ShapeDtypeStruct((rows, *shape), dtype) for shape, dtype in inputs]


def _traced(name, f, inputs, wanted):
    """(shape without rows, dtype) of the result of f, which must be one array as wanted; and no
    torch inside."""
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
    if (
        not hasattr(out, "shape")
        or out.shape[:1] != (rows,)
        or not archive.fits(out.shape, str(out.dtype), wanted)
    ):
        got = spec(out.shape, out.dtype) if hasattr(out, "shape") else f"{jax.tree.structure(out)}"
        do = "return one such array; weights of another dtype make results of another"
        raise ValueError(
            message(
                f"{archive.words(wanted)} from {name} of {', '.join(map(archive.words, inputs))}",
                f"{got} for n={rows}",
                do,
            )
        )
    return out.shape[1:], wanted[1]


def _bridged(jaxpr) -> bool:
    """Whether the bridge's primitive is anywhere inside."""
    inner = lambda x: getattr(x, "jaxpr", x)
    inside = [
        inner(x)
        for e in jaxpr.eqns
        for x in jax.tree.leaves(
            list(e.params.values()), is_leaf=lambda x: hasattr(inner(x), "eqns")
        )
    ]
    return any(e.primitive is bridge_p for e in jaxpr.eqns) or any(
        hasattr(x, "eqns") and _bridged(x) for x in inside
    )


def _exported(name, f, inputs, order, platforms) -> bytes:
    (rows,) = jax.export.symbolic_shape("n")
    try:
        program = jax.export.export(jax.jit(lambda *xs: f(*xs)), platforms=platforms)(
            *_structs(rows, inputs)
        )
        why, blob = exported.foreign(program), bytes(program.serialize(vjp_order=order))
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
