"""Zip files of local potentials: written whole or not at all, read only where nothing about them is
odd. Standard library only."""

from __future__ import annotations

import io
import json
import math
import os
import secrets
import stat
import zipfile
from pathlib import Path

from bridge.errors import message, spec

METADATA = "metadata.json"
# name: its file, what it takes (Z atomic numbers, F node, M message or sum, r vector) and what it
# gives (E energy)
FUNCTIONS = {
    "init": ("node_init", "Z", "F"),
    "edge": ("edge", "FFr", "M"),
    "readout": ("readout", "FM", "E"),
}
# precision: of atomic numbers, of all else
DTYPES = {
    "32bit": ("int32", "float32"),
    "64bit": ("int64", "float64"),
}
LIMIT = 2**30  # bytes of all entries together


class Odd(Exception):
    """What is wrong with a zip: the words after "got" and "; "."""


def write(path, entries: dict) -> None:
    """`entries` {name: bytes} as the zip `path`, the same bytes for the same entries. The file
    appears when it is complete, or not at all."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(beside, "xb") as f:
            f.write(zipped(entries))
            f.flush()
            os.fsync(f.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def zipped(entries: dict) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        for name, data in entries.items():
            z.writestr(zipfile.ZipInfo(name), data)
    return out.getvalue()


def read(path, names, limit: int = LIMIT) -> dict:
    """{name: bytes} of the zip `path`, whose entries must be exactly `names`, `limit` bytes
    together at the most; CRCs hold.

    Raises: ValueError that names the file and the reason for anything else, the cause being what
    zipfile said; OSError where the file can't be read.
    """
    with open(path, "rb") as f:
        size = os.fstat(f.fileno()).st_size
        if size > 2 * limit:
            raise refused(path, f"{size} bytes", f"raise limit={limit} if you trust it")
        data = f.read()
    try:
        found = entries(data, limit)
        for missing in sorted(set(names) - set(found)):
            raise Odd(f"no entry {missing!r}", f"its entries must be {', '.join(names)}")
        for more in sorted(set(found) - set(names)):
            raise Odd(f"an entry {more!r}", f"its entries must be {', '.join(names)} and no others")
    except Odd as odd:
        raise refused(path, *odd.args) from odd.__cause__
    return found


def entries(data: bytes, limit: int = LIMIT) -> dict:
    """{name: bytes} of a zip in memory. Raises Odd."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as z:
            infos = z.infolist()
            _check(infos, limit)
            return {i.filename: z.read(i) for i in infos}
    except Odd:
        raise
    except Exception as e:  # zipfile has no one exception for what it can't read
        raise Odd(f"what is no whole zip ({said(e)})", "write or copy it anew") from e


def _check(infos, limit):
    seen, total = set(), 0
    for i in infos:
        what, total = f"an entry {i.orig_filename!r:.60}", total + i.file_size
        parts = i.orig_filename.replace("\\", "/").split("/")
        for odd, why in (
            (i.orig_filename in seen, " twice"),
            (
                ".." in parts or parts[0] == "" or ":" in parts[0] or "\0" in i.orig_filename,
                " whose name leaves the folder it is in",
            ),
            (
                i.is_dir() or stat.S_IFMT(i.external_attr >> 16) not in (0, stat.S_IFREG),
                " that is no plain file (a link, a folder)",
            ),
            (i.flag_bits & 0x1, " that is encrypted"),
            (
                i.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED),
                f" compressed by method {i.compress_type}",
            ),
        ):
            if odd:
                raise Odd(what + why, "don't use this file")
        if total > limit:
            raise Odd(f"entries of {total} bytes or more", f"raise limit={limit} if you trust it")
        seen.add(i.orig_filename)


def metadata_bytes(cutoff, precision) -> bytes:
    return json.dumps({"cutoff": cutoff, "precision": precision}).encode()


def metadata(path, data: bytes) -> tuple:
    """cutoff in Angstrom (float) and precision ("32bit" or "64bit") of metadata.json. Raises:
    ValueError naming the file and the reason."""
    try:
        meta = _parsed(data)
        checked_cutoff(meta["cutoff"])
        checked_precision(meta["precision"])
        return float(meta["cutoff"]), meta["precision"]
    except Odd as odd:
        raise refused(path, f"{odd.args[0]} in {METADATA}", odd.args[1]) from odd.__cause__
    except (TypeError, ValueError) as e:
        raise refused(path, f"bad {METADATA} ({e})", "mend it") from e


def _parsed(data):
    do = 'it must be {"cutoff": ..., "precision": ...}'
    try:
        meta = json.loads(data.decode(), object_pairs_hook=_unique)
    except Odd:
        raise
    except Exception as e:  # RecursionError and UnicodeDecodeError among them
        raise Odd(f"no JSON ({said(e)})", do) from e
    if not isinstance(meta, dict):
        raise Odd(f"a {type(meta).__name__}", do)
    if set(meta) != {"cutoff", "precision"}:
        raise Odd(f"keys {', '.join(sorted(meta)) or 'none'!s:.80}", do)
    return meta


def _unique(pairs):
    if len(dict(pairs)) != len(pairs):
        raise Odd("a key twice", 'it must be {"cutoff": ..., "precision": ...}')
    return dict(pairs)


def checked_cutoff(cutoff) -> float:
    """A positive finite number. Raises TypeError or ValueError."""
    if isinstance(cutoff, bool) or not isinstance(cutoff, (int, float)):
        raise TypeError(
            message(
                "a cutoff in Angstrom", f"{type(cutoff).__name__} {cutoff!r:.60}", "give a number"
            )
        )
    if not 0 < cutoff < 1e300 or not math.isfinite(cutoff):
        raise ValueError(message("a finite cutoff above 0 Angstrom", f"{cutoff!s:.60}", "give one"))
    return float(cutoff)


def checked_precision(precision) -> tuple:
    """Names of the dtypes of integers and floats. Raises ValueError."""
    if not isinstance(precision, str) or precision not in DTYPES:
        raise ValueError(
            message(
                f"precision {' or '.join(map(repr, DTYPES))}",
                f"{precision!r:.60}",
                "name one of them",
            )
        )
    return DTYPES[precision]


def types(precision) -> dict:
    """What the functions take and give: (shape without rows, dtype) by the letters of FUNCTIONS; a
    width that they choose is None."""
    integer, real = checked_precision(precision)
    return {
        "Z": ((), integer),
        "r": ((3,), real),
        "F": ((None,), real),
        "M": ((None,), real),
        "E": ((), real),
    }


def fits(shape, dtype: str, kind) -> bool:
    """Whether an array is rows of such a kind."""
    return (
        len(shape) == 1 + len(kind[0])
        and all(w in (None, k) for w, k in zip(kind[0], shape[1:]))
        and dtype == kind[1]
    )


def words(kind) -> str:
    shape, dtype = kind
    return spec(("n", *("width" if w is None else w for w in shape)), dtype)


def said(e) -> str:
    """An exception in a line."""
    return f"{type(e).__name__}: {next(iter(str(e).splitlines()), ''):.200}".rstrip(": ")


def refused(path, got: str, do: str) -> ValueError:
    return ValueError(message(f"a local potential in {os.fspath(path)}", got, do))
