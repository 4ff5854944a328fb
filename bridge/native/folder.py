"""Where compiled packages lie: a folder, in which each package has a folder of its own, named by a
hash of all that it was made of.

Standard library only. A package appears whole or not at all: it is written beside its place, and
moved there by one rename. What lies there is code that will run, so the folder must belong to this
user (or to root), and nobody else may write to it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from bridge import trust, writing
from bridge.errors import message
from bridge.function import Spec

RECORD, MODEL = "package.json", "model.pt2"
FORMAT = 1  # of the record


@dataclass(frozen=True)
class Record:
    """What is known of a package beside its code.

    key         its name: a hash of graph, weights, types, device, processor and versions
    name        what was compiled, for people
    inputs      the types of its arrays, outputs those of its results
    has_status  True where one more result says whether all was well
    device      "cpu" or "cuda"
    processor   what the code may use of the processor
    versions    of torch, and of the format
    seconds     how long it took to compile
    sha256      of the file with the code"""

    key: str
    name: str
    inputs: tuple[Spec, ...]
    outputs: tuple[Spec, ...]
    has_status: bool
    device: str
    processor: str
    versions: dict[str, str]
    seconds: float = 0.0
    sha256: str = ""

    def written(self) -> str:
        """Returns the record as JSON."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def read(cls, text: str) -> Record:
        """Returns the record of a JSON text.

        Raises: ValueError for a text that is no record."""
        try:
            found: dict[str, Any] = json.loads(text)
            for name in ("inputs", "outputs"):
                found[name] = tuple(Spec(tuple(shape), dtype) for shape, dtype in found[name])
            record = cls(**found)
            if strange := [name for name, kind in _KINDS if not isinstance(found[name], kind)]:
                raise TypeError(f"another kind of {', '.join(strange)}")
            sizes = [n for s in (*record.inputs, *record.outputs) for n in s.shape]
            dtypes = [s.dtype for s in (*record.inputs, *record.outputs)]
            if not {*map(type, sizes)} <= {int} or not {*map(type, dtypes)} <= {str}:
                raise TypeError("arrays of no plain types")
            return record
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            got = f"{type(error).__name__}: {error}"
            raise ValueError(message("the record of a package", got, "compile it again")) from error


# of the fields of a record that are no arrays
_KINDS: tuple[tuple[str, Any], ...] = (
    ("key", str),
    ("name", str),
    ("has_status", bool),
    ("device", str),
    ("processor", str),
    ("versions", dict),
    ("seconds", (int, float)),
    ("sha256", str),
)
_CHOSEN: ContextVar[Path | None] = ContextVar("folder", default=None)


@contextlib.contextmanager
def choosing(folder: str | os.PathLike[str] | None) -> Iterator[None]:
    """Within the `with`, packages lie in this folder. None leaves it as it is."""
    token = _CHOSEN.set(_CHOSEN.get() if folder is None else Path(folder))
    try:
        yield
    finally:
        _CHOSEN.reset(token)


def chosen() -> Path:
    """Returns the folder of packages: the one of `choosing`, or that of the environment variable
    BRIDGE_CACHE, or one among the user's caches."""
    folder: str | Path | None = _CHOSEN.get()
    if folder is None:
        folder = os.environ.get("BRIDGE_CACHE")
    if folder is None:
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(caches) / "jax-torch-bridge"
    return Path(folder)


def find(folder: Path, key: str) -> Record | None:
    """Returns the record of a package in the folder. None where there is none, or a damaged one,
    which is removed.

    Raises: ValueError where another user owns the folder, or can write to it."""
    place = folder / key
    if not place.exists():
        return None
    trust.check_own(folder)
    try:
        return check(place)
    except (OSError, ValueError):
        remove(folder, key)
        return None


def check(place: Path) -> Record:
    """Returns the record of the package that lies in the folder `place`.

    Raises: OSError where files are missing; ValueError where they are not those that were
    written."""
    record = Record.read((place / RECORD).read_text())
    found = sha256(place / MODEL)
    if found != record.sha256:
        raise ValueError(
            message(
                f"the file {MODEL} that was compiled in {place} (sha256 {record.sha256[:12]}...)",
                f"another one ({found[:12]}...)",
                "compile or save it again",
            )
        )
    return record


def remove(folder: Path, key: str) -> None:
    """Removes a package, if it is there: at once, so that nobody finds a part of it."""
    if (folder / key).exists():
        with contextlib.suppress(OSError), writing.folder(folder) as new:
            os.rename(folder / key, new / key)


@contextlib.contextmanager
def locked(folder: Path, key: str) -> Iterator[None]:
    """Lets one process at a time make the package `key`; the others wait. The lock goes with the
    process that has it, however it ends."""
    made(folder)
    with writing.named(folder), open(folder / f".{key}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def made(folder: Path) -> Path:
    """Returns the folder, which is made, for its owner alone, where it is missing: what lies in it
    is code that will run.

    Raises: ValueError where it can't be written to, or where another user can, or owns it."""
    do = "set BRIDGE_CACHE to a folder of yours, or pass folder=..."
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        got = f"{folder}: {error}"
        raise ValueError(message("a folder for packages that can be made", got, do)) from error
    trust.check_own(folder)
    if not os.access(folder, os.W_OK):
        raise ValueError(message("a folder for packages that can be written to", f"{folder}", do))
    return folder


def add(folder: Path, write: Callable[[Path], Record]) -> Record:
    """Makes a package, and returns its record: `write(path)` writes its code to `path`, and gives
    the record.

    Nothing is left behind where that fails or is interrupted.

    Raises: OSError that names the folder, where there is no room in it."""
    with writing.folder(made(folder)) as new:
        whole = new / "whole"
        whole.mkdir()
        record = write(whole / MODEL)
        (whole / RECORD).write_text(record.written())
        _moved(whole, folder / record.key)
    return record


def placed(folder: Path, name: str, write: Callable[[Path], None]) -> Path:
    """Returns the file `name` in the folder; where there is none, `write(path)` makes it, whole or
    not at all.

    Raises: ValueError where another user owns the folder, or can write to it; OSError that names
    the folder, where there is no room in it."""
    if not (folder / name).exists():
        with writing.folder(made(folder)) as new:
            write(new / name)
            writing.move(new / name, folder / name)
    trust.check_own(folder)
    return folder / name


def _moved(new: Path, place: Path) -> None:
    """Moves a folder to its place, unless another process has made the same one meanwhile."""
    try:
        writing.move(new, place)
    except OSError:
        if not place.exists():
            raise


def sha256(path: Path) -> str:
    """Returns the hash of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def processor() -> str:
    """Returns what code that was compiled here may use of the processor: its kind and features."""
    features: list[str] = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                features = sorted(value.split())
                break
    return " ".join([platform.system(), platform.machine(), *features])


def lacking(needed: str) -> list[str]:
    """Returns what a package needs of the processor and this one lacks."""
    return sorted(set(needed.split()) - set(processor().split()))
