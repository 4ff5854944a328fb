"""Local potentials as files, in kUPS's format: a zip of three jax.export blobs and metadata.json (DESIGN section 6)."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np

from bridge import archive
from bridge.errors import message
from jax_side.local import LocalPotential
from jax_side.primitive import bridge_p

NAMES = {"init": "node_init.jax", "edge": "edge.jax", "readout": "readout.jax"}
ARGUMENTS = {"init": "(Z)", "edge": "(node_i, node_j, r_ij)", "readout": "(node, sum)"}
OWN_TARGETS = re.compile(  # custom calls that every jaxlib serves: shapes, shardings, linear algebra, random bits
    r"(lapack|cusolver|cublas|hipsolver|hipblas)_\w+|(cu|hip)_threefry2x32_ffi|Sharding|SPMD\w+|shape_assertion|stablehlo\.dynamic_\w+|mhlo\.\w+"
    r"|ApproxTopK|Eigh|Qr|ProductOfElementaryHouseholderReflectors|LuDecomposition|AllocateBuffer"
)


def save(path, local: LocalPotential, *, precision: str, order: int = 1, platforms=None) -> None:
    """Write `local` to the zip `path`, which `load`, and kUPS's LocalMLIAPData.from_zip_file, read in any other process.

    Each function becomes a jax.export blob for any number of rows; weights that it closes over (arrays of JAX or numpy) go in as
    constants. It must take any number of rows n while it is traced: no Python `if` on n.

    precision   "32bit": it is traced for int32 atomic numbers and float32 else; "64bit": int64 and float64 (needs x64)
    order       how often the loaded potential can be differentiated: energies only 0, forces 1, Hessians 2. Each order adds a
                program to each blob. 1 is the least that kUPS can run MD with
    platforms   those that the blobs run on, as jax.export names them, e.g. ("cpu", "cuda", "tpu"); None: this process's

    The file appears whole or not at all; cutoff in Angstrom. The same functions give the same bytes.

    Raises: TypeError for what is no LocalPotential; ValueError for another precision or order, for functions whose results don't fit
    the precision or one another, for a torch function that came by bridge.to_jax (torch_side.local_files.save writes those) and
    for what jax.export can't write, callbacks among them, naming the function.

    >>> import jax.numpy as jnp, tempfile
    >>> from jax_side.local import LocalPotential
    >>> local = LocalPotential(lambda Z: jnp.ones((len(Z), 1)), lambda a, b, r: a * b * jnp.exp(-(r**2).sum(-1, keepdims=True)), lambda a, s: s[:, 0], 3.0)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder + "/gauss.zip", local, precision="32bit")
    ...     again = load(folder + "/gauss.zip")
    >>> graph = {"pos": jnp.eye(3)[:2], "atomic_numbers": jnp.array([1, 1])}
    >>> float(again.full(graph).energy) == float(local.full(graph).energy), again.cutoff
    (True, 3.0)
    """
    if not isinstance(local, LocalPotential):
        raise TypeError(message("a LocalPotential", type(local).__name__, "make one of init, edge, readout and cutoff"))
    integer, real = _dtypes(precision)
    _check_order(order)
    cutoff, blobs = archive.checked_cutoff(float(local.cutoff)), {}
    widths = {"Z": ((), integer), "r": ((3,), real)}
    for name, result in (("init", "F"), ("edge", "M"), ("readout", None)):
        f, inputs = getattr(local, name), [widths[k] for k in {"init": "Z", "edge": "FFr", "readout": "FM"}[name]]
        tail = _traced(name, f, inputs, real, () if result is None else ("features",))
        widths[result] = (tail, real)
        exported, blobs[name] = _exported(name, f, inputs, order, platforms)
        if why := _foreign(exported):
            raise ValueError(message(f"{name} as a program that another process can run", why[0], "write it in JAX alone"))
    metadata = archive.metadata_bytes(cutoff, precision)
    archive.write(path, {**{NAMES[k]: v for k, v in blobs.items()}, archive.METADATA: metadata})


def load(path, order: int = 1, *, limit: int = archive.LIMIT) -> LocalPotential:
    """The LocalPotential of a zip that `save` wrote, or another program in the same format (exported for kUPS, say).

    It runs under jit, scan and vmap (a batch is one call of B n rows, so each function must treat its rows alike, as a
    LocalPotential's do) and differentiates up to `order` times by reverse mode (jax.grad, jax.vjp, jax.jacrev; a
    Hessian is jacrev of jacrev: jax.export writes no rule for forward mode). Any integer atomic numbers go in; positions must be
    float32 for a file of precision 32bit and float64 for 64bit: they are never cast. `limit`: bytes of all entries together.

    Everything that can be seen before a program runs is checked here: nothing is unpickled, nothing unpacked to disk. But the blobs
    are programs: read them from those whom you trust with your processor's time, as XLA's own reader is not made for enemies.

    Raises: ValueError that names the file and the reason, its __cause__ what the reader said: no zip or a broken one, entries missing,
    more, twice, too large, encrypted, links, with names that leave the folder; metadata.json without exactly cutoff
    (finite, > 0) and precision; blobs that can't be read, of other arity, ranks, dtypes or widths, for one number of rows only, with
    effects or foreign custom calls, for other platforms, or with fewer derivatives than `order`; 64bit while x64 is off.
    OSError where the file can't be opened.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as f:
    ...     try: load(f.name)
    ...     except ValueError as e: print(str(e).replace(f.name, "F"))
    expected a local potential in F, got what is no whole zip (BadZipFile: File is not a zip file); write or copy it anew
    """
    _check_order(order)
    found = archive.read(path, (*NAMES.values(), archive.METADATA), limit)
    cutoff, precision = archive.metadata(path, found[archive.METADATA])
    try:
        integer, real = _dtypes(precision)
        programs, widths = {}, {"Z": ((), integer), "r": ((3,), real)}
        for name, result in (("init", "F"), ("edge", "M"), ("readout", None)):
            inputs = [widths[k] for k in {"init": "Z", "edge": "FFr", "readout": "FM"}[name]]
            chain = _read(found[NAMES[name]], order if name != "init" else 0)  # integers have no derivative
            widths[result] = (_check_types(name, chain[0], inputs, real, () if result is None else ("features",)), real)
            programs[name] = _Rows(name, chain, inputs)
    except archive.Odd as odd:
        raise archive.refused(path, f"{NAMES[name]} {odd.args[0]}", odd.args[1]) from odd.__cause__
    except ValueError as e:
        raise archive.refused(path, f"one of precision {precision}: {e}", "see there") from e
    return LocalPotential(**programs, cutoff=cutoff)
