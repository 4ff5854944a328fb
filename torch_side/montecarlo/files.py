"""Local potentials of torch as files: a zip of three torch.export programs and metadata.json, the
twin of jax_side.montecarlo.files."""

from __future__ import annotations

import ast
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch.export import ExportedProgram

from bridge import archive
from bridge.archive import Kind, Odd
from bridge.errors import message, spec
from torch_side.calls.arrays import dtype_name
from torch_side.calls.inference import check_mode

ENTRIES = (*(f"{file}.pt2" for file, _, _ in archive.FUNCTIONS.values()), archive.METADATA)
SAMPLES = "data/sample_inputs/model.pt"  # a pickle, which nothing needs
# What a .pt2 may hold below its root folder: no compiled libraries, no pickled objects and no files
# of older formats.
PARTS = re.compile(
    r"data/(weights|constants)/(weight_\d+|tensor_\d+|model_(weights|constants)_config\.json)|models/model\.json|archive_format|archive_version"
    rf"|\.data/(version|serialization_id)|byteorder|{re.escape(SAMPLES)}"
)
# what a node of a graph may call beside the operations of aten: a program of sizes, and loops
TARGETS = re.compile(
    r"torch\.ops\.prims\.\w+\.\w+|torch\.sym_\w+|math\.(trunc|ceil|floor|sqrt)"
    r"|torch\.ops\.higher_order\.(cond|while_loop|scan|associative_scan|map(_impl)?|wrap_with_(set_grad_enabled|autocast))"
    r"|_operator\.(add|sub|mul|floordiv|truediv|mod|neg|pos|pow|and_|or_|not_|eq|ne|lt|le|gt|ge|getitem)"
)
ATEN = re.compile(r"torch\.ops\.aten\.(\w+)\.(\w+)")
# of aten, what reads files, and what believes memory to be as other packages have laid it out
FOREIGN = re.compile(
    r"from_file|set_?|(fbgemm|mkldnn|mkl|cudnn|miopen|quantized|hspmm|nested|to_mkldnn)_?\w*"
)
# names in expressions of sizes
WORDS = re.compile(
    r"L|args|kwargs|size|stride|math|int_oo|and_|or_|positive|integer|real|nonnegative|[suzf]\d+|[A-Z]\w*"
)
# syntax of expressions of sizes
PLAIN = (
    ast.Expression,
    ast.BinOp,
    ast.UnaryOp,
    ast.BoolOp,
    ast.Compare,
    ast.Call,
    ast.keyword,
    ast.Subscript,
    ast.Load,
    ast.Add,
    ast.Sub,
    ast.Mult,
    ast.Div,
    ast.FloorDiv,
    ast.Mod,
    ast.Pow,
    ast.unaryop,
    ast.Name,
    ast.Attribute,
    ast.Constant,
    ast.cmpop,
    ast.boolop,
)
HIGHEST = 8  # power in expressions of sizes: higher ones of higher ones would never end
TREES = {None, "builtins.tuple", "builtins.list", "builtins.dict"}  # containers of arguments


class Programs(NamedTuple):
    """The functions of a local potential, three torch modules, and its cutoff in Angstrom.

    init      atomic numbers Z (n,) -> node features (n,F)
    edge      nodes i and j (n,F), r_ij = r_j - r_i (n,3) -> messages (n,M)
    readout   node (n,F), sums of its messages (n,M) -> energies (n,) in eV"""

    init: Callable[..., torch.Tensor]
    edge: Callable[..., torch.Tensor]
    readout: Callable[..., torch.Tensor]
    cutoff: float


def save(
    path: str | os.PathLike[str],
    init: Callable[..., torch.Tensor],
    edge: Callable[..., torch.Tensor],
    readout: Callable[..., torch.Tensor],
    cutoff: float,
    *,
    precision: Literal["32bit", "64bit"],
) -> None:
    """Writes three torch callables (functions or nn.Modules in evaluation mode) to the zip `path`
    as torch.export programs.

    They are init(Z (n,)) -> (n,F), edge(node_i, node_j, r_ij = r_j - r_i (n,3)) -> (n,M) and
    readout(node (n,F), sums (n,M)) -> energies (n,), in eV and Angstrom, for any number of rows n
    from 0 on. `cutoff` is in Angstrom. The precision "32bit" exports them for int32 atomic numbers
    and float32 arrays, "64bit" for int64 and float64, and their weights must be of that dtype. Each
    is exported on the device of its parameters (a function on the CPU), with all weights that it
    holds or closes over. The file appears whole or not at all.

    Raises: TypeError for what is not callable; ValueError for another precision or cutoff and for a
    module in training mode; ValueError that names the function, where its result does not fit, and
    where torch.export can't write it for every n, as for a JAX function that came by
    bridge.to_torch (jax_side.montecarlo.files.save writes those).

    >>> import tempfile, torch
    >>> gauss = lambda a, b, r: a * b * torch.exp(-(r**2).sum(-1, keepdim=True))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder + "/gauss.zip", lambda Z: torch.ones_like(Z, dtype=torch.float32)[:, None], gauss, lambda a, s: s[:, 0], 3.0, precision="32bit")
    ...     local = load(folder + "/gauss.zip")
    >>> local.edge(torch.ones(2, 1), torch.ones(2, 1), torch.zeros(2, 3)).tolist(), local.cutoff
    ([[1.0], [1.0]], 3.0)
    """
    types = archive.types(precision)
    cutoff = archive.checked_cutoff(cutoff)
    entries: dict[str, bytes] = {}
    for (name, (file, takes, gives)), f in zip(archive.FUNCTIONS.items(), (init, edge, readout)):
        if not callable(f):
            raise TypeError(
                message(
                    f"a torch callable as {name}",
                    type(f).__name__,
                    "pass a function or an nn.Module",
                )
            )
        check_mode(f)
        inputs = [types[k] for k in takes]
        entries[f"{file}.pt2"], types[gives] = _exported(name, f, inputs, types[gives])
    archive.write(path, {**entries, archive.METADATA: archive.metadata_bytes(cutoff, precision)})


def load(path: str | os.PathLike[str], *, limit: int = archive.LIMIT) -> Programs:
    """Returns Programs(init, edge, readout, cutoff) of a zip that `save` wrote: torch modules for
    any number of rows.

    In torch they run as they are, on the device that they were saved on. Integers may have any
    dtype, and floats must have that of the file's precision, since they are never cast. torch.func
    and torch.autograd differentiate them to any order. For JAX, write
    LocalPotential(*(bridge.to_jax(f) for f in local[:3]), local.cutoff); the defaults of to_jax
    serve gradients, Hessians and vmap. `limit` is the largest size of all entries together, in
    bytes, and also that of the entries of each .pt2.

    torch's own loader trusts a file: it unpickles sample inputs with weights_only=True and, if that
    fails, with weights_only=False; it unpickles weights and objects; it evaluates expressions of
    sizes as Python (by sympy); and it loads compiled libraries. Therefore this function lets
    through only plain tensors, graphs of aten's public operators and of loops, and expressions of
    symbols and numbers. They are repacked, so that torch sees exactly what was checked, without the sample
    inputs. But a graph is still a program: load only files from sources whose programs you would
    run.

    Raises: ValueError that names the file and the reason, its __cause__ being what the reader said.
    Reasons are a zip that is broken or none; entries that are missing, unknown, twice there, too
    large, encrypted, links, or with names that leave the folder, in the zip and in each .pt2; a
    metadata.json without exactly cutoff (finite, > 0) and precision; and programs that can't be
    read, that have another number of arguments, other ranks, dtypes or widths, or one fixed number
    of rows. OSError where the file can't be opened.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as f:  # doctest: +NORMALIZE_WHITESPACE
    ...     try: load(f.name)
    ...     except ValueError as e: print(str(e).replace(f.name, "F"))
    expected a local potential in F, got what is no whole zip (BadZipFile: File is not a zip file);
    write or copy it anew
    """
    found = archive.read(path, ENTRIES, limit)
    cutoff, precision = archive.metadata(path, found[archive.METADATA])
    types = archive.types(precision)
    modules: dict[str, _Rows] = {}
    for name, (file, takes, gives) in archive.FUNCTIONS.items():
        try:
            program = _read(_repacked(found[f"{file}.pt2"], limit))
            inputs = [types[k] for k in takes]
            types[gives] = _check(program, inputs, types[gives])
            modules[name] = _Rows(name, program.module(), inputs)
        except Odd as odd:
            raise archive.refused(
                path, f"{file}.pt2 with {odd.args[0]}", odd.args[1]
            ) from odd.__cause__
        except Exception as e:
            got = f"{file}.pt2 that torch.export can't run ({archive.said(e)})"
            raise archive.refused(path, got, "export it anew") from e
    return Programs(**modules, cutoff=cutoff)


class _Taking(torch.nn.Module):
    """Any callable as a module of positional arguments."""

    def __init__(self, f: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.f = f
        self.training = False

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        """Returns f(*args)."""
        return self.f(*args)


class _Rows(torch.nn.Module):
    """A program of rows. Integers are cast to the dtype that it takes, and floats must have it."""

    def __init__(self, name: str, program: torch.nn.Module, inputs: Sequence[Kind]) -> None:
        super().__init__()
        self.name = name
        self.program = program
        self.inputs = inputs
        self.training = False

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        """Returns the program's result. Raises: ValueError for floats of another dtype."""
        pairs = enumerate(zip(args, self.inputs, strict=True))
        return self.program(*(self._cast(k, x, kind) for k, (x, kind) in pairs))

    def _cast(self, k: int, x: torch.Tensor, kind: Kind) -> torch.Tensor:
        """Argument k in the dtype that the program takes."""
        dtype = kind[1]
        if dtype.startswith("int") and not x.is_floating_point() and x.dtype != torch.bool:
            return x.to(getattr(torch, dtype))
        if dtype_name(x.dtype) != dtype:
            do = "cast positions, cell and all else to one dtype, or save the potential in the other precision"
            raise ValueError(
                message(
                    f"argument {k} of the loaded {self.name} as {archive.words(kind)}",
                    spec(x.shape, dtype_name(x.dtype)),
                    do,
                )
            )
        return x


def _exported(
    name: str, f: Callable[..., torch.Tensor], inputs: Sequence[Kind], wanted: Kind
) -> tuple[bytes, Kind]:
    """The .pt2 of f, and the kind of its result."""
    rows = torch.export.Dim("n", min=0)
    device = None
    if isinstance(f, torch.nn.Module):
        device = next((p.device for p in f.parameters()), None)
    takes = ", ".join(map(archive.words, inputs))
    # Each is a tensor of its own, so that torch.export does not take two arguments for one.
    examples = []
    for shape, dtype in inputs:
        sizes: tuple[Any, ...] = (5, *shape)  # the functions that came before have set the widths
        examples.append(torch.ones(sizes, dtype=getattr(torch, dtype), device=device))
    try:
        program = torch.export.export(
            _Taking(f), tuple(examples), dynamic_shapes=(tuple({0: rows} for _ in inputs),)
        )
        torch.export.save(program, out := io.BytesIO())
        blob = _repacked(out.getvalue())
        return blob, _check(_read(blob), inputs, wanted)
    except Odd as odd:
        expected = f"{name} as rows of {archive.words(wanted)} from {takes}"
        raise ValueError(message(expected, *odd.args)) from odd.__cause__
    except Exception as e:
        expected = (
            f"{name} as a function that torch.export can write for any number of rows n, of {takes}"
        )
        do = "see the cause; a JAX function is for jax_side.montecarlo.files.save"
        raise ValueError(message(expected, archive.said(e), do)) from e


def _repacked(blob: bytes, limit: int = archive.LIMIT) -> bytes:
    """A .pt2 of what was checked in `blob`, without sample inputs. Raises Odd."""
    found: dict[str, bytes] = {}
    for name, data in archive.entries(blob, limit).items():
        _, _, part = name.partition("/")
        if not PARTS.fullmatch(part):
            raise Odd(
                f"an entry {name!r:.60} that is no part of a plain program",
                "export it anew, by torch_side.montecarlo.files.save",
            )
        found[f"archive/{part}"] = b"" if part == SAMPLES else data
    for part in (
        "archive/models/model.json",
        "archive/data/weights/model_weights_config.json",
        "archive/data/constants/model_constants_config.json",
    ):
        try:
            for key, value in _items(json.loads(found[part])):
                _check_item(key, value)
        except Odd:
            raise
        except Exception as e:
            raise Odd(f"no readable {part} ({archive.said(e)})", "export it anew") from e
    return archive.zipped(found)


def _items(x: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of everything in x that is no container, at any depth. Items of a list have the
    list's key."""
    if isinstance(x, dict):
        for k, v in x.items():
            yield from _items(v, k)
    elif isinstance(x, list):
        for v in x:
            yield from _items(v, key)
    else:
        yield key, x


def _check_item(key: str, value: Any) -> None:
    """Raises Odd for what torch's loader would unpickle, or evaluate as more than an expression of
    sizes."""
    plain = True
    if key == "use_pickle":
        plain = value is False
    elif key == "path_name":
        plain = bool(re.fullmatch(r"(weight|tensor)_\d+", str(value)))
    if not plain:
        raise Odd(
            f"a pickled object ({key} {value!r:.60})", "keep nothing but tensors in the functions"
        )
    if key == "target" and not _may_be_called(str(value)):
        raise Odd(
            f"a call of {value!r:.80}, which another process may not have",
            "write it in torch's own operations",
        )
    if key in ("in_spec", "out_spec"):
        containers = {v for k, v in _items(json.loads(value)) if k == "type"}
        if not containers <= TREES:
            raise Odd(f"arguments {value!r:.80}", "export functions of plain tensors")
    if key in ("expr_str", "guards_code") and not _plain(value):
        raise Odd(f"{key} {value!r:.80}, which is no plain expression of sizes", "export it anew")


def _may_be_called(target: str) -> bool:
    """True for operations of tensors and sizes that check what they are given. Those whose name
    begins with an underscore do so where torch counts them among its core operations."""
    if not (found := ATEN.fullmatch(target)):
        return bool(TARGETS.fullmatch(target))
    name, overload = found.groups()
    full = f"aten::{name}" if overload == "default" else f"aten::{name}.{overload}"
    # others of this name are TorchScript's own: they write files and set the state of the process
    if FOREIGN.fullmatch(name) or not torch._C._dispatch_has_kernel(full):
        return False
    core = torch.Tag.core in getattr(getattr(torch.ops.aten, name), overload).tags
    return core or not name.startswith("_") or name.startswith(("_assert_", "_unsafe_view"))


def _plain(text: str) -> bool:
    """True for an expression of sizes that is made of arithmetic and known names alone."""
    for x in ast.walk(ast.parse(text, mode="eval")):
        if not isinstance(x, PLAIN):
            return False
        powers = []
        if isinstance(x, ast.BinOp) and isinstance(x.op, ast.Pow):
            powers = [x.right]
        elif (
            isinstance(x, ast.Call) and getattr(x.func, "id", getattr(x.func, "attr", "")) == "Pow"
        ):
            powers = x.args[1:]
        if not all(isinstance(p, ast.Constant) and p.value in range(HIGHEST) for p in powers):
            return False
        word = None
        if isinstance(x, ast.Name):
            word = x.id
        elif isinstance(x, ast.Attribute):
            word = x.attr
        elif isinstance(x, ast.Constant):
            word = x.value
        if isinstance(word, str) and ("__" in word or not WORDS.fullmatch(word)):
            return False
    return True


def _read(blob: bytes) -> ExportedProgram:
    """The program of a .pt2 that was repacked. Raises Odd."""
    try:
        return torch.export.load(io.BytesIO(blob))
    except Exception as e:
        raise Odd(f"what torch.export can't read ({archive.said(e)})", "export it anew") from e


def _check(program: ExportedProgram, inputs: Sequence[Kind], wanted: Kind) -> Kind:
    """The kind of the program's result. Raises Odd unless the program takes `inputs`, gives what is
    `wanted`, and does so for any number of rows."""
    made: dict[Any, Any] = {n.name: n.meta.get("val") for n in program.graph.nodes}
    signature = program.graph_signature
    ins = [made.get(x) for x in signature.user_inputs]
    outs = [made.get(x) for x in signature.user_outputs]
    tensors = [x for x in (*ins, *outs) if isinstance(x, torch.Tensor)]
    if len(ins) != len(inputs) or len(outs) != 1 or len(tensors) != len(ins) + 1:
        raise Odd(
            f"{len(ins)} arguments and {len(outs)} results",
            f"it must take {len(inputs)} tensors and give one tensor",
        )
    for x, kind in zip(tensors, (*inputs, wanted)):
        got = spec(x.shape, dtype_name(x.dtype))
        if not archive.fits(x.shape, dtype_name(x.dtype), kind):
            raise Odd(got, f"it must be {archive.words(kind)} there")
        if not all(isinstance(k, int) for k in x.shape[1:]):
            raise Odd(got, "only the number of rows may be open")
    rows = {str(x.shape[0]) for x in tensors}
    ranges = program.range_constraints.values()
    limited = any(r.lower > 2 or r.upper < 2**31 for r in ranges)
    if len(rows) != 1 or not isinstance(tensors[0].shape[0], torch.SymInt) or limited:
        raise Odd(
            f"{' and '.join(sorted(rows))} rows ({program.range_constraints})",
            "export it with one dynamic leading size n >= 0 of all tensors",
        )
    return tuple(tensors[-1].shape[1:]), wanted[1]
