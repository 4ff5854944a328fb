"""Zip files of local potentials: written whole or not at all, read only where nothing about them is
odd. Standard library only."""

from __future__ import annotations

import io
import json
import math
import os
import stat
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from bridge import writing
from bridge.errors import message, spec

StrPath = str | os.PathLike[str]
Kind = tuple[tuple[int | None, ...], str]  # shape of a row, where None is any width; and dtype
METADATA = "metadata.json"
# name: (its file, what it takes, what it gives), by letters. Z stands for atomic numbers, F for
# features of nodes, M for a message or a sum of messages, r for a vector, E for an energy.
FUNCTIONS = {
    "init": ("node_init", "Z", "F"),
    "edge": ("edge", "FFr", "M"),
    "readout": ("readout", "FM", "E"),
}
# precision: (dtype of atomic numbers, dtype of all else)
DTYPES = {"32bit": ("int32", "float32"), "64bit": ("int64", "float64")}
LIMIT = 2**30  # bytes of all entries together


class Odd(Exception):
    """What is wrong with a zip. Its arguments are the words of an error text after "got", and those
    after the semicolon."""

    def __str__(self) -> str:
        return str(self.args[0])


def write(path: StrPath, entries: Mapping[str, bytes]) -> None:
    """Writes `entries` {name: bytes} as the zip `path`.

    The same entries give the same bytes. The file appears when it is complete, or not at all.

    Raises: OSError that names the path, where it can't be written.
    """
    with writing.whole(Path(path)) as f:
        f.write(zipped(entries))


def zipped(entries: Mapping[str, bytes]) -> bytes:
    """Returns a zip of `entries` {name: bytes}, without times and without compression."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        for name, data in entries.items():
            z.writestr(zipfile.ZipInfo(name), data)
    return out.getvalue()


def read(path: StrPath, names: Collection[str], limit: int = LIMIT) -> dict[str, bytes]:
    """Returns {name: bytes} of the zip `path`.

    Its entries must be exactly `names`, must have `limit` bytes together at the most, and their
    CRCs must hold.

    Raises: ValueError that names the file and the reason for anything else, with what zipfile said
    as its cause; OSError where the file can't be read.
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


def entries(data: bytes, limit: int = LIMIT) -> dict[str, bytes]:
    """Returns {name: bytes} of a zip in memory.

    Raises: Odd for anything that is not a plain zip of at most `limit` bytes.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as z:
            infos = z.infolist()
            _check(infos, limit)
            return {i.filename: z.read(i) for i in infos}
    except Odd:
        raise
    except Exception as e:  # zipfile has no one exception for what it can't read
        raise Odd(f"what is no whole zip ({said(e)})", "write or copy it anew") from e


def _check(infos: Sequence[zipfile.ZipInfo], limit: int) -> None:
    """Raises Odd for entries that are odd, or too large together, before they are unpacked."""
    seen: set[str] = set()
    total = 0
    for i in infos:
        total += i.file_size
        why = " twice" if i.orig_filename in seen else _oddity(i)
        if why:
            raise Odd(f"an entry {i.orig_filename!r:.60}{why}", "don't use this file")
        if total > limit:
            raise Odd(f"entries of {total} bytes or more", f"raise limit={limit} if you trust it")
        seen.add(i.orig_filename)


def _oddity(i: zipfile.ZipInfo) -> str:
    """What is odd about an entry; "" if nothing is."""
    parts = i.orig_filename.replace("\\", "/").split("/")
    if ".." in parts or parts[0] == "" or ":" in parts[0] or "\0" in i.orig_filename:
        return " whose name leaves the folder it is in"
    if i.is_dir() or stat.S_IFMT(i.external_attr >> 16) not in (0, stat.S_IFREG):
        return " that is no plain file (a link, a folder)"
    if i.flag_bits & 0x1:
        return " that is encrypted"
    if i.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f" compressed by method {i.compress_type}"
    return ""


def metadata_bytes(cutoff: float, precision: str) -> bytes:
    """Returns metadata.json of a cutoff in Angstrom and a precision."""
    return json.dumps({"cutoff": cutoff, "precision": precision}).encode()


def metadata(path: StrPath, data: bytes) -> tuple[float, str]:
    """Returns the cutoff in Angstrom and the precision ("32bit" or "64bit") of metadata.json.

    Raises: ValueError that names the file `path` and the reason.
    """
    try:
        meta = _parsed(data)
        checked_cutoff(meta["cutoff"])
        checked_precision(meta["precision"])
        return float(meta["cutoff"]), meta["precision"]
    except Odd as odd:
        raise refused(path, f"{odd.args[0]} in {METADATA}", odd.args[1]) from odd.__cause__
    except (TypeError, ValueError) as e:
        raise refused(path, f"bad {METADATA} ({e})", "mend it") from e


def _parsed(data: bytes) -> dict[str, Any]:
    """The dict in metadata.json. Raises Odd for anything else."""
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


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dict of pairs from JSON. Raises Odd for a key that comes twice."""
    if len(dict(pairs)) != len(pairs):
        raise Odd("a key twice", 'it must be {"cutoff": ..., "precision": ...}')
    return dict(pairs)


def checked_cutoff(cutoff: Any) -> float:
    """Returns a cutoff in Angstrom as a float.

    Raises: TypeError for what is no number; ValueError for one that is not positive and finite.
    """
    if isinstance(cutoff, bool) or not isinstance(cutoff, (int, float)):
        got = f"{type(cutoff).__name__} {cutoff!r:.60}"
        raise TypeError(message("a cutoff in Angstrom", got, "give a number"))
    if not 0 < cutoff < 1e300 or not math.isfinite(cutoff):
        raise ValueError(message("a finite cutoff above 0 Angstrom", f"{cutoff!s:.60}", "give one"))
    return float(cutoff)


def checked_precision(precision: Any) -> tuple[str, str]:
    """Returns the names of the dtypes of integers and of floats.

    Raises: ValueError for a precision that there is not.
    """
    if not isinstance(precision, str) or precision not in DTYPES:
        expected = f"precision {' or '.join(map(repr, DTYPES))}"
        raise ValueError(message(expected, f"{precision!r:.60}", "name one of them"))
    return DTYPES[precision]


def types(precision: str) -> dict[str, Kind]:
    """Returns what the functions take and give, by the letters of FUNCTIONS.

    A kind is (shape without rows, dtype). A width that the functions choose is None.
    """
    integer, real = checked_precision(precision)
    return {
        "Z": ((), integer),
        "r": ((3,), real),
        "F": ((None,), real),
        "M": ((None,), real),
        "E": ((), real),
    }


def fits(shape: Sequence[Any], dtype: str, kind: Kind) -> bool:
    """True if an array of this shape and dtype is rows of such a kind."""
    row, its_dtype = kind
    return (
        len(shape) == 1 + len(row)
        and all(w in (None, k) for w, k in zip(row, shape[1:]))
        and dtype == its_dtype
    )


def words(kind: Kind) -> str:
    """Returns rows of such a kind as error texts write them: float32[n,3], float32[n,width]."""
    shape, dtype = kind
    return spec(("n", *("width" if w is None else w for w in shape)), dtype)


def said(e: BaseException) -> str:
    """Returns an exception in a line: its type and the first line of its text."""
    first = next(iter(str(e).splitlines()), "")
    return f"{type(e).__name__}: {first:.200}".rstrip(": ")


def refused(path: StrPath, got: str, do: str) -> ValueError:
    """Returns the error for the file `path`, in which `got` was found."""
    return ValueError(message(f"a local potential in {os.fspath(path)}", got, do))
