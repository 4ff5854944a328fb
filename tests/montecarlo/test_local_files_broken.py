"""Files of local potentials that are broken, hostile or of another kind: one ValueError that names
the file and the reason."""

import functools
import io
import json
import pickle
import stat
import zipfile
from pathlib import Path

import hypothesis.strategies as st
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given

from jax_side.montecarlo import files as local_files
from tests.local_file_cases import FOLDER, Net, entries, potential, saved, torch_saved
from torch_side.montecarlo import files as torch_files


def zipped(found, **special):
    """A zip of (name, bytes) pairs; special[name] changes a ZipInfo."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        for name, data in found.items() if isinstance(found, dict) else found:
            info = zipfile.ZipInfo(name)
            special.get(name.split(".")[0], lambda i: None)(info)
            z.writestr(info, data)
    return out.getvalue()


def refused(data, text, tmp_path, load=local_files.load, **options):
    path = tmp_path / "broken.zip"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"expected a local potential in {path}, got {text}") as e:
        load(path, **options)
    return e.value


def with_(name, data=b"x"):
    return lambda found: zipped({**found, name: data})


def set_(**values):
    return lambda info: [setattr(info, k, v) for k, v in values.items()]


def encrypted(found):
    data = bytearray(zipped(found))
    data[data.index(b"PK\x01\x02") + 8] |= 1  # flag of the first entry in the central directory
    return bytes(data)


def bomb(found):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
        for name, data in {**found, "edge.jax": bytes(2 * 10**7)}.items():
            z.writestr(name, data)
    return out.getvalue()


ZIPS = {
    "no zip": (lambda f: b"hello", "what is no whole zip .BadZipFile"),
    "empty": (lambda f: b"", "what is no whole zip"),
    "truncated": (lambda f: zipped(f)[:-400], "what is no whole zip"),
    "flipped": (
        lambda f: zipped(f).replace(f["edge.jax"][500:520], bytes(20)),
        "what is no whole zip .BadZipFile: Bad CRC-32 for file 'edge.jax'",
    ),
    "parent": (with_("../edge.jax"), "an entry '../edge.jax' whose name leaves the folder"),
    "deep": (with_("a/../../b"), "an entry 'a/../../b' whose name leaves the folder"),
    "absolute": (with_("/etc/passwd"), "an entry '/etc/passwd' whose name leaves the folder"),
    "backslash": (
        with_("..\\edge.jax"),
        r"an entry '\.\.\\\\edge.jax' whose name leaves the folder",
    ),
    "drive": (with_("C:/edge.jax"), "an entry 'C:/edge.jax' whose name leaves the folder"),
    "link": (
        lambda f: zipped(f, edge=set_(external_attr=(stat.S_IFLNK | 0o777) << 16)),
        "an entry 'edge.jax' that is no plain file",
    ),
    "folder": (with_("more/", b""), "an entry 'more/' that is no plain file"),
    "encrypted": (
        encrypted,
        "an entry 'edge.jax' that is encrypted|an entry 'node_init.jax' that is encrypted",
    ),
    "method": (
        lambda f: zipped(f, edge=set_(compress_type=zipfile.ZIP_LZMA)),
        "an entry 'edge.jax' compressed by method 14",
    ),
    "twice": (lambda f: zipped([*f.items(), ("edge.jax", b"")]), "an entry 'edge.jax' twice"),
    "more": (
        with_("evil.py"),
        "an entry 'evil.py'; its entries must be node_init.jax, edge.jax, readout.jax, "
        "metadata.json and no others",
    ),
    "missing": (
        lambda f: zipped({k: v for k, v in f.items() if k != "edge.jax"}),
        "no entry 'edge.jax'",
    ),
    "bomb": (bomb, "entries of 20.* bytes or more; raise limit=10000000 if"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("load", [local_files.load, torch_files.load], ids=["jax", "torch"])
@pytest.mark.parametrize("case", ZIPS)
def test_a_broken_zip_is_refused(case, load, tmp_path):
    (make, text), of_torch = ZIPS[case], load is torch_files.load
    if of_torch and case in ("more", "missing"):
        text = "no entry 'edge.pt2'"
    refused(make(entries(saved())), text, tmp_path, load, limit=10**7)


META = {
    "no json": (b"{", "no JSON .JSONDecodeError"),
    "binary": (b"\xff\xfe\x00", "no JSON .UnicodeDecodeError"),
    "deep": (b"[" * 100000, "no JSON .RecursionError"),
    "list": (b"[1, 2]", "a list in metadata.json; it must be"),
    "missing": (b'{"cutoff": 3.0}', "keys cutoff in metadata.json"),
    "more": (
        b'{"cutoff": 3.0, "precision": "64bit", "name": 1}',
        "keys cutoff, name, precision in metadata.json",
    ),
    "twice": (
        b'{"cutoff": 3.0, "cutoff": 4.0, "precision": "64bit"}',
        "a key twice in metadata.json",
    ),
    "bool": (
        b'{"cutoff": true, "precision": "64bit"}',
        "bad metadata.json .expected a cutoff in Angstrom, got bool True",
    ),
    "text": (
        b'{"cutoff": "3", "precision": "64bit"}',
        "bad metadata.json .expected a cutoff in Angstrom, got str '3'",
    ),
    "nan": (
        b'{"cutoff": NaN, "precision": "64bit"}',
        "bad metadata.json .expected a finite cutoff above 0 Angstrom, got nan",
    ),
    "infinite": (
        b'{"cutoff": Infinity, "precision": "64bit"}',
        "bad metadata.json .expected a finite cutoff",
    ),
    "huge": (
        b'{"cutoff": 1' + b"0" * 400 + b', "precision": "64bit"}',
        "bad metadata.json .expected a finite cutoff",
    ),
    "zero": (b'{"cutoff": 0, "precision": "64bit"}', "bad metadata.json .expected a finite cutoff"),
    "precision": (
        b'{"cutoff": 3.0, "precision": "16bit"}',
        "bad metadata.json .expected precision '32bit' or '64bit', got '16bit'",
    ),
    "no text": (
        b'{"cutoff": 3.0, "precision": ["64bit"]}',
        r"bad metadata.json .expected precision '32bit' or '64bit', got \['64bit'\]",
    ),
    "other": (
        b'{"cutoff": 3.0, "precision": "32bit"}',
        r"node_init.* int64\[.*\]; it must be int32\[n\] there",
    ),
}


@pytest.mark.parametrize("load", [local_files.load, torch_files.load], ids=["jax", "torch"])
@pytest.mark.parametrize("case", META)
def test_broken_metadata_are_refused(case, load, tmp_path):
    data, text = META[case]
    found = entries(saved() if load is local_files.load else torch_saved())
    refused(zipped({**found, "metadata.json": data}), text, tmp_path, load)


@functools.cache
def blob(f, *shapes, rows="n", order=1, platforms=None, dtypes=None, checks=()):
    sizes = jax.export.symbolic_shape(rows) if isinstance(rows, str) else (rows,)
    dtypes = dtypes or ["float64"] * len(shapes)
    structs = [
        jax.ShapeDtypeStruct((sizes[k % len(sizes)], *s), d)
        for k, (s, d) in enumerate(zip(shapes, dtypes))
    ]
    checks = [jax.export.DisabledSafetyCheck.custom_call(c) for c in checks]
    return bytes(
        jax.export.export(jax.jit(f), platforms=platforms, disabled_checks=checks)(
            *structs
        ).serialize(vjp_order=order)
    )


def product(a, b, r):
    return (a * b)[:, :1] * (r**2).sum(-1, keepdims=True)


def foreign(a, b, r):
    return jax.ffi.ffi_call("of_another_process", jax.ShapeDtypeStruct(r.shape, r.dtype))(r)


EDGE = ((4,), (4,), (3,))
BLOBS = {
    "no blob": ("edge", lambda: b"hello", "edge.jax that jax.export can't read"),
    "empty": ("edge", lambda: b"", "edge.jax that jax.export can't read"),
    "arity": (
        "edge",
        lambda: blob(lambda a, r: a[:, :1] * r[:, :1], (4,), (3,)),
        "edge.jax of 2 arguments and 1 results; it must take 3 arrays",
    ),
    "named": (
        "edge",
        lambda: blob(lambda a, b, r: {"m": product(a, b, r)}, *EDGE),
        "edge.jax of 3 arguments and 1 results; it must take 3 arrays",
    ),
    "results": (
        "edge",
        lambda: blob(lambda a, b, r: (a, r), *EDGE),
        "edge.jax of 3 arguments and 2 results",
    ),
    "rank": (
        "edge",
        lambda: blob(lambda a, b, r: product(a, b, r)[:, 0], *EDGE),
        r"edge.jax with float64\[n\]; it must be float64\[n,width\] there",
    ),
    "vector": (
        "edge",
        lambda: blob(product, (4,), (4,), (2,)),
        r"edge.jax with float64\[n,2\]; it must be float64\[n,3\] there",
    ),
    "dtype": (
        "edge",
        lambda: blob(product, *EDGE, dtypes=("float64", "float64", "float32")),
        r"edge.jax with float32\[n,3\]; it must be float64\[n,3\]",
    ),
    "node width": (
        "edge",
        lambda: blob(product, (6,), (6,), (3,)),
        r"edge.jax with float64\[n,6\]; it must be float64\[n,4\] there",
    ),
    "message width": (
        "edge",
        lambda: blob(product, *EDGE),
        r"readout.jax with float64\[n,5\]; it must be float64\[n,1\] there",
    ),
    "fixed": (
        "edge",
        lambda: blob(product, *EDGE, rows=7),
        "edge.jax for 7 rows; export it with one symbol",
    ),
    "two symbols": (
        "edge",
        lambda: blob(lambda a, b, r: a, *EDGE, rows="n, m"),
        "edge.jax for m and n rows; export it with one symbol",
    ),
    "even": (
        "edge",
        lambda: blob(product, *EDGE, rows="2*n"),
        r"edge.jax for 2\*n rows; export it with one symbol",
    ),
    "energies": (
        "readout",
        lambda: blob(lambda a, s: a, (4,), (5,)),
        r"readout.jax with float64\[n,4\]; it must be float64\[n\] there",
    ),
    "foreign": (
        "edge",
        lambda: blob(foreign, *EDGE, order=0, checks=("of_another_process",)),
        "edge.jax with a custom call of_another_process; it can't run",
    ),
    "platform": (
        "edge",
        lambda: blob(product, *EDGE, platforms=("cuda", "tpu")),
        r"edge.jax for cuda, tpu; export it with platforms=\('cpu', \.\.\.\)",
    ),
    "order": (
        "edge",
        lambda: blob(product, *EDGE, order=0),
        r"edge.jax that can be differentiated 0 times; export it with order=1 \(vjp_order\)",
    ),
    "elements": (
        "node_init",
        lambda: blob(lambda Z: Z[:, None], (), order=0),
        r"node_init.jax with float64\[n\]; it must be int64\[n\] there",
    ),
}


@pytest.mark.parametrize("case", BLOBS)
def test_a_blob_that_does_not_fit_is_refused(case, tmp_path):
    name, make, text = BLOBS[case]
    e = refused(zipped({**entries(saved()), f"{name}.jax": make()}), text, tmp_path)
    assert (e.__cause__ is not None) == (case in ("no blob", "empty"))


def test_a_derivative_of_another_function_is_refused(tmp_path, monkeypatch):
    other = jax.export.deserialize(
        bytearray(blob(lambda a, s: a[:, 0] + s[:, 0], (4,), (5,)))
    ).vjp()
    monkeypatch.setattr(jax.export.Exported, "vjp", lambda self: other)
    refused(zipped(entries(saved())), "edge.jax whose derivative is of another function", tmp_path)


def test_fewer_derivatives_than_asked_for_are_refused():
    with pytest.raises(
        ValueError,
        match=r"edge.jax that can be differentiated 1 times; export it with order=2 \(vjp_order\), or load with less",
    ):
        local_files.load(saved(), order=2)


def test_a_file_larger_than_the_limit_is_refused(tmp_path):
    refused(bytes(3000), "3000 bytes; raise limit=1000", tmp_path, limit=1000)
    with pytest.raises(FileNotFoundError):
        local_files.load(tmp_path / "none.zip")


def changed(data, cut, flips):
    data = bytearray(data[: int(cut * len(data))])
    for at, bit in flips:
        if data:
            data[int(at * (len(data) - 1))] ^= 1 << bit
    return bytes(data)


cuts = st.one_of(st.just(1.0), st.floats(0, 1))
flips = st.lists(
    st.tuples(st.one_of(st.floats(0, 1), st.floats(0.97, 1)), st.integers(0, 7)), max_size=3
)


def loaded_or_refused(files, whole, name, cut, flips):
    """What `files` loads of a changed file; None where it refuses it and names it."""
    path = Path(FOLDER.name) / name
    path.write_bytes(changed(whole.read_bytes(), cut, flips))
    try:
        return files.load(path)
    except ValueError as e:
        assert f"expected a local potential in {path}, got" in str(e)


@given(cuts, flips)
def test_a_file_cut_or_flipped_is_refused_or_the_same(cut, flips):
    local = loaded_or_refused(local_files, saved(), "fuzzed.zip", cut, flips)
    if local:
        np.testing.assert_allclose(
            local.readout(jnp.ones((2, 4)), jnp.ones((2, 5))),
            potential().readout(jnp.ones((2, 4)), jnp.ones((2, 5))),
        )


@given(cuts, flips)
def test_a_torch_file_cut_or_flipped_is_refused_or_the_same(cut, flips):
    local = loaded_or_refused(torch_files, torch_saved(), "fuzzed-torch.zip", cut, flips)
    if local:
        a, s = torch.ones(2, 4).double(), torch.ones(2, 5).double()
        assert torch.equal(local.readout(a, s), Net().readout(a, s))


# Programs of torch


def part(name, change):
    """The torch file with an entry of edge.pt2 changed (None: taken out)."""
    found = entries(torch_saved())
    inner = {n: d for n, d in entries(io.BytesIO(found["edge.pt2"])).items()}
    at = next((n for n in inner if n.endswith(name)), f"archive/{name}")
    inner[at] = change(inner.get(at))
    return zipped({**found, "edge.pt2": zipped({n: d for n, d in inner.items() if d is not None})})


def edited(change):
    def edit(data):
        change(model := json.loads(data))
        return json.dumps(model).encode()

    return edit


def node(model):
    return model["graph_module"]["graph"]["nodes"][0]


def sizes(model):
    return next(
        s
        for v in model["graph_module"]["graph"]["tensor_values"].values()
        for s in v["sizes"]
        if "as_expr" in s
    )["as_expr"]


class Evil:
    def __reduce__(self):
        return (Path(FOLDER.name, "unpickled").touch, ())


MODEL, CONSTANTS = "models/model.json", "model_constants_config.json"
EVIL = "__import__('os').system('true')"
PROGRAMS = {
    "library": (
        "data/aotinductor/model/a.so",
        lambda d: b"",
        "an entry 'archive/data/aotinductor/model/a.so' that is no part",
    ),
    "leaves": ("../a", lambda d: b"", "an entry 'archive/../a' whose name leaves the folder"),
    "older": (
        "data/weights/model.pt",
        lambda d: pickle.dumps(Evil()),
        "an entry 'archive/data/weights/model.pt' that is no part",
    ),
    "no json": (MODEL, lambda d: b"{", "no readable archive/models/model.json .JSONDecodeError"),
    "no model": (MODEL, lambda d: None, "no readable archive/models/model.json .KeyError"),
    "another": (MODEL, lambda d: b"{}", "what torch.export can't read"),
    "pickled": (
        CONSTANTS,
        edited(lambda m: next(iter(m["config"].values())).update(use_pickle=True)),
        "a pickled object .use_pickle True",
    ),
    "object": (
        CONSTANTS,
        edited(lambda m: next(iter(m["config"].values())).update(path_name="opaque_obj_0")),
        "a pickled object .path_name 'opaque_obj_0'",
    ),
    "target": (
        MODEL,
        edited(lambda m: node(m).update(target="torch.ops.mine.op")),
        "a call of 'torch.ops.mine.op', which another process may not",
    ),
    "from_file": (
        MODEL,
        edited(lambda m: node(m).update(target="torch.ops.aten.from_file.default")),
        "a call of 'torch.ops.aten.from_file",
    ),
    "size": (
        MODEL,
        edited(lambda m: sizes(m).update(expr_str=EVIL)),
        "expr_str .*, which is no plain expression",
    ),
    "attribute": (
        MODEL,
        edited(lambda m: sizes(m).update(expr_str="s10.__class__")),
        "expr_str 's10.__class__', which is no plain expression",
    ),
    "guard": (
        MODEL,
        edited(lambda m: m.update(guards_code=[EVIL])),
        "guards_code .*, which is no plain expression",
    ),
    "tree": (
        MODEL,
        lambda d: d.replace(b"builtins.tuple", b"collections.abc"),
        "arguments .*; export functions of plain tensors",
    ),
}


@pytest.mark.parametrize("case", PROGRAMS)
def test_a_program_that_torch_should_not_see_is_refused(case, tmp_path):
    name, change, text = PROGRAMS[case]
    refused(part(name, change), f"edge.pt2 with {text}", tmp_path, torch_files.load)


def test_sample_inputs_are_not_unpickled(tmp_path):
    path = tmp_path / "evil.zip"
    path.write_bytes(part("data/sample_inputs/model.pt", lambda d: pickle.dumps(Evil())))
    torch_files.load(path)
    assert not Path(FOLDER.name, "unpickled").exists()
    pickle.loads(pickle.dumps(Evil()))
    assert Path(FOLDER.name, "unpickled").exists()


SWAPPED = {
    "arity": (
        {"edge.pt2": "readout.pt2"},
        r"edge.pt2 with 2 arguments and 1 results; it must take 3 tensors",
    ),
    "dtype": ({"node_init.pt2": "readout.pt2"}, "node_init.pt2 with 2 arguments and 1 results"),
    "no program": ({"edge.pt2": "metadata.json"}, "edge.pt2 with what is no whole zip"),
}


@pytest.mark.parametrize("case", SWAPPED)
def test_programs_in_one_anothers_place_are_refused(case, tmp_path):
    swaps, text = SWAPPED[case]
    found = entries(torch_saved())
    refused(
        zipped({**found, **{k: found[v] for k, v in swaps.items()}}),
        text,
        tmp_path,
        torch_files.load,
    )


def test_programs_of_different_precision_are_refused(tmp_path):
    found = {
        **entries(torch_saved()),
        "readout.pt2": entries(torch_saved("float32"))["readout.pt2"],
    }
    refused(
        zipped(found),
        r"readout.pt2 with float32\[s\d+,4\]; it must be float64\[n,4\] there",
        tmp_path,
        torch_files.load,
    )


def test_a_fixed_number_of_rows_is_refused(tmp_path):
    class Edge(torch.nn.Module):
        def forward(self, a, b, r):
            return a * r[:, :1]

    ones = [torch.ones(5, k, dtype=torch.float64) for k in (4, 4, 3)]
    torch.export.save(torch.export.export(Edge(), tuple(ones)), out := io.BytesIO())
    refused(
        zipped({**entries(torch_saved()), "edge.pt2": out.getvalue()}),
        "edge.pt2 with 5 rows",
        tmp_path,
        torch_files.load,
    )
