"""Local potentials of torch as files: a zip of three torch.export programs and metadata.json, the
twin of jax_side.montecarlo.files."""

from __future__ import annotations

import ast
import io
import json
import re
from collections.abc import Callable
from typing import NamedTuple

import torch

from bridge import archive
from bridge.archive import Odd
from bridge.errors import message, spec
from torch_side.calls.arrays import dtype_name
from torch_side.calls.inference import check_mode

ENTRIES = (*(f"{file}.pt2" for file, _, _ in archive.FUNCTIONS.values()), archive.METADATA)
SAMPLES = "data/sample_inputs/model.pt"  # a pickle; nothing needs it
# of a .pt2, below its root folder: no compiled libraries, no pickled objects, no files of older
# formats
PARTS = re.compile(
    r"data/(weights|constants)/(weight_\d+|tensor_\d+|model_(weights|constants)_config\.json)|models/model\.json|archive_format|archive_version"
    rf"|\.data/(version|serialization_id)|byteorder|{re.escape(SAMPLES)}"
)
TARGETS = re.compile(  # what a node may call
    r"torch\.ops\.(aten\.(?!from_file)|prims\.|higher_order\.)\w+(\.\w+)?|torch\.sym_\w+|math\.\w+"
    r"|_operator\.(add|sub|mul|floordiv|truediv|mod|neg|pos|pow|and_|or_|not_|eq|ne|lt|le|gt|ge|getitem)"
)
WORDS = re.compile(
    r"L|args|kwargs|size|stride|math|int_oo|and_|or_|positive|integer|real|nonnegative|[suzf]\d+|[A-Z]\w*"
)
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
    ast.operator,
    ast.unaryop,
)
PLAIN += (ast.Name, ast.Attribute, ast.Constant, ast.cmpop, ast.boolop)
TREES = {None, "builtins.tuple", "builtins.list", "builtins.dict"}  # of arguments


class Programs(NamedTuple):
    """The functions of a local potential, three torch modules, and its cutoff in Angstrom."""

    init: Callable
    edge: Callable
    readout: Callable
    cutoff: float


def save(path, init, edge, readout, cutoff, *, precision: str) -> None:
    """Write three torch callables (functions or nn.Modules in evaluation mode) to the zip `path` as
    torch.export programs.

    init(Z (n,)) -> (n,F); edge(node_i, node_j, r_ij = r_j - r_i (n,3)) -> (n,M); readout(node
    (n,F), sums (n,M)) -> energies (n,), eV and Angstrom, for any n from 0 on; `cutoff` in Angstrom.
    precision "32bit" exports for int32 atomic numbers and float32 else, "64bit" for int64 and
    float64; the weights must be of that dtype. They are exported on the device of their parameters
    (functions: the CPU), with all weights that they hold or close over. The file appears whole or
    not at all.

    Raises: TypeError for what is not callable; ValueError for another precision or cutoff, a module
    in training mode, results that do not fit, and what torch.export can't write for every n, a JAX
    function that came by bridge.to_torch among them (jax_side.montecarlo.files.save writes those),
    naming the function.

    >>> import tempfile, torch
    >>> gauss = lambda a, b, r: a * b * torch.exp(-(r**2).sum(-1, keepdim=True))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder + "/gauss.zip", lambda Z: torch.ones_like(Z, dtype=torch.float32)[:, None], gauss, lambda a, s: s[:, 0], 3.0, precision="32bit")
    ...     local = load(folder + "/gauss.zip")
    >>> local.edge(torch.ones(2, 1), torch.ones(2, 1), torch.zeros(2, 3)).tolist(), local.cutoff
    ([[1.0], [1.0]], 3.0)
    """
    types, cutoff = archive.types(precision), archive.checked_cutoff(cutoff)
    entries = {}
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
        entries[f"{file}.pt2"], types[gives] = _exported(
            name, f, [types[k] for k in takes], types[gives]
        )
    archive.write(path, {**entries, archive.METADATA: archive.metadata_bytes(cutoff, precision)})


def load(path, *, limit: int = archive.LIMIT) -> Programs:
    """Programs(init, edge, readout, cutoff) of a zip that `save` wrote: torch modules for any
    number of rows.

    In torch they run as they are, on the device they were saved on; integers may be of any dtype,
    floats of the file's precision alone (they are never cast). torch.func and torch.autograd
    differentiate them as often as one likes. In JAX: LocalPotential(*(bridge.to_jax(f) for f in
    local[:3]), local.cutoff); the defaults of to_jax serve gradients, Hessians and vmap. `limit`:
    bytes of all entries together, also within a .pt2.

    What torch's own loader trusts: it unpickles sample inputs with weights_only=True, and if that
    fails with weights_only=False; pickled weights and objects; it evaluates expressions of sizes as
    Python (by sympy), and loads compiled libraries. So here only plain tensors, a graph of aten and
    the like and expressions of symbols and numbers come through, repacked so that torch sees what
    was checked, and the sample inputs are taken out. Still a graph is a program: read those of
    people whom you trust.

    Raises: ValueError that names the file and the reason, its __cause__ what the reader said: no
    zip or a broken one, entries missing, more, twice, too large, encrypted, links, with names that
    leave the folder (in the zip and in each .pt2); metadata.json without exactly cutoff (finite, >
    0) and precision; programs that can't be read, of other arity, ranks, dtypes or widths, or for a
    fixed number of rows. OSError where the file can't be opened.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as f:  # doctest: +NORMALIZE_WHITESPACE
    ...     try: load(f.name)
    ...     except ValueError as e: print(str(e).replace(f.name, "F"))
    expected a local potential in F, got what is no whole zip (BadZipFile: File is not a zip file);
    write or copy it anew
    """
    found = archive.read(path, ENTRIES, limit)
    cutoff, precision = archive.metadata(path, found[archive.METADATA])
    types, modules = archive.types(precision), []
    for name, (file, takes, gives) in archive.FUNCTIONS.items():
        try:
            program, inputs = (
                _read(_repacked(found[f"{file}.pt2"], limit)),
                [types[k] for k in takes],
            )
            types[gives] = _check(program, inputs, types[gives])
            modules.append(_Rows(name, program.module(), inputs))
        except Odd as odd:
            raise archive.refused(
                path, f"{file}.pt2 with {odd.args[0]}", odd.args[1]
            ) from odd.__cause__
        except Exception as e:
            raise archive.refused(
                path,
                f"{file}.pt2 that torch.export can't run ({archive.said(e)})",
                "export it anew",
            ) from e
    return Programs(*modules, cutoff)


class _Taking(torch.nn.Module):
    """Any callable as a module of positional arguments."""

    def __init__(self, f):
        super().__init__()
        self.f, self.training = f, False

    def forward(self, *args):
        return self.f(*args)


class _Rows(torch.nn.Module):
    """A program of rows; integers come to the dtype that it wants, floats must have it."""

    def __init__(self, name, program, inputs):
        super().__init__()
        self.name, self.program, self.inputs, self.training = name, program, inputs, False

    def forward(self, *args):
        return self.program(
            *(
                self._cast(k, x, kind)
                for k, (x, kind) in enumerate(zip(args, self.inputs, strict=True))
            )
        )

    def _cast(self, k, x, kind):
        if kind[1].startswith("int") and not x.is_floating_point() and x.dtype != torch.bool:
            return x.to(getattr(torch, kind[1]))
        if dtype_name(x.dtype) != kind[1]:
            do = "cast positions, cell and all else to one dtype, or save the potential in the other precision"
            raise ValueError(
                message(
                    f"argument {k} of the loaded {self.name} as {archive.words(kind)}",
                    spec(x.shape, dtype_name(x.dtype)),
                    do,
                )
            )
        return x


def _exported(name, f, inputs, wanted):
    """The .pt2 of f, and (shape without rows, dtype) of its result."""
    rows = torch.export.Dim("n", min=0)
    device = (
        next((p.device for p in f.parameters()), None) if isinstance(f, torch.nn.Module) else None
    )
    # no two the same tensor
    examples = tuple(
        torch.ones((5, *shape), dtype=getattr(torch, dtype), device=device)
        for shape, dtype in inputs
    )
    try:
        program = torch.export.export(
            _Taking(f), examples, dynamic_shapes=(tuple({0: rows} for _ in inputs),)
        )
        torch.export.save(program, out := io.BytesIO())
        blob = _repacked(out.getvalue())
        return blob, _check(_read(blob), inputs, wanted)
    except Odd as odd:
        raise ValueError(
            message(
                f"{name} as rows of {archive.words(wanted)} from "
                f"{', '.join(map(archive.words, inputs))}",
                *odd.args,
            )
        ) from odd.__cause__
    except Exception as e:
        expected = f"{name} as a function that torch.export can write for any number of rows n, of {', '.join(map(archive.words, inputs))}"
        do = "see the cause; a JAX function is for jax_side.montecarlo.files.save"
        raise ValueError(message(expected, archive.said(e), do)) from e


def _repacked(blob, limit=archive.LIMIT) -> bytes:
    """A .pt2 of what was looked at in `blob`, without sample inputs. Raises Odd."""
    found = {}
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


def _items(x, key=""):
    """(key, value) of all that is no container, wherever it is; items of a list have the list's
    key."""
    if isinstance(x, dict | list):
        for k, v in x.items() if isinstance(x, dict) else ((key, v) for v in x):
            yield from _items(v, k)
    else:
        yield key, x


def _check_item(key, value):
    """Nothing that torch's loader would unpickle, or evaluate as more than an expression of sizes.
    Raises Odd."""
    if (key == "use_pickle" and value is not False) or (
        key == "path_name" and not re.fullmatch(r"(weight|tensor)_\d+", str(value))
    ):
        raise Odd(
            f"a pickled object ({key} {value!r:.60})", "keep nothing but tensors in the functions"
        )
    if key == "target" and not TARGETS.fullmatch(str(value)):
        raise Odd(
            f"a call of {value!r:.80}, which another process may not have",
            "write it in torch's own operations",
        )
    if (
        key in ("in_spec", "out_spec")
        and not {v for k, v in _items(json.loads(value)) if k == "type"} <= TREES
    ):
        raise Odd(f"arguments {value!r:.80}", "export functions of plain tensors")
    if key in ("expr_str", "guards_code") and not _plain(value):
        raise Odd(f"{key} {value!r:.80}, which is no plain expression of sizes", "export it anew")


def _plain(text) -> bool:
    for x in ast.walk(ast.parse(text, mode="eval")):
        word = (
            x.id
            if isinstance(x, ast.Name)
            else x.attr
            if isinstance(x, ast.Attribute)
            else x.value
            if isinstance(x, ast.Constant)
            else 0
        )
        if (
            isinstance(word, str) and not (WORDS.fullmatch(word) and "__" not in word)
        ) or not isinstance(x, PLAIN):
            return False
    return True


def _read(blob):
    """Raises Odd."""
    try:
        return torch.export.load(io.BytesIO(blob))
    except Exception as e:
        raise Odd(f"what torch.export can't read ({archive.said(e)})", "export it anew") from e


def _check(program, inputs, wanted):
    """(shape without rows, dtype) of the result, all types being as wanted. Raises Odd."""
    made = {n.name: n.meta.get("val") for n in program.graph.nodes}
    ins, outs = (
        [made.get(x) for x in xs]
        for xs in (program.graph_signature.user_inputs, program.graph_signature.user_outputs)
    )
    if (
        len(ins) != len(inputs)
        or len(outs) != 1
        or not all(isinstance(x, torch.Tensor) for x in (*ins, *outs))
    ):
        raise Odd(
            f"{len(ins)} arguments and {len(outs)} results",
            f"it must take {len(inputs)} tensors and give one tensor",
        )
    for x, kind in (*zip(ins, inputs), (outs[0], wanted)):
        got = spec(x.shape, dtype_name(x.dtype))
        if not archive.fits(x.shape, dtype_name(x.dtype), kind):
            raise Odd(got, f"it must be {archive.words(kind)} there")
        if not all(isinstance(k, int) for k in x.shape[1:]):
            raise Odd(got, "only the number of rows may be open")
    rows = {str(x.shape[0]) for x in (*ins, *outs)}
    if (
        len(rows) != 1
        or not isinstance(ins[0].shape[0], torch.SymInt)
        or any(r.lower > 2 or r.upper < 2**31 for r in program.range_constraints.values())
    ):
        raise Odd(
            f"{' and '.join(sorted(rows))} rows ({program.range_constraints})",
            "export it with one dynamic leading size n >= 0 of all tensors",
        )
    return tuple(outs[0].shape[1:]), wanted[1]
