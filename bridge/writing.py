"""Files and folders that appear whole or not at all, whatever ends the process that writes them.
Standard library only."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from bridge.errors import message

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_LEAVE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)
LOCK = "lock"  # in a folder that is being made; its maker holds it
ABANDONED = 3600.0  # seconds after which a folder without a lock is nobody's
UNWRITTEN = "room and leave to write"  # begins the errors of this file


@contextlib.contextmanager
def whole(path: Path) -> Iterator[IO[bytes]]:
    """Gives a file to write to, which becomes `path` at the end of the `with`: in one step, and on
    the disk. An error leaves what was there before.

    What killed processes have left beside it is removed.

    Raises: OSError that names the path and says what to do, where it can't be written."""
    with named(path):
        for old in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
            _remove_file(old)
        beside, file = _begun(path)
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(beside, path)
            sync(path.parent)
        finally:
            beside.unlink(missing_ok=True)


@contextlib.contextmanager
def folder(parent: Path) -> Iterator[Path]:
    """Gives a folder inside of `parent` for what is being made; it is gone afterwards.

    Those that killed processes have left there are removed.

    Raises: OSError that names what can't be written, and says what to do."""
    for old in parent.glob(".new-*"):
        _remove_folder(old)
    with named(parent):
        new, lock = _begun_folder(parent)
        try:
            with lock:
                yield new
        finally:
            with contextlib.suppress(OSError):
                _clear(new)


def move(new: Path, place: Path) -> None:
    """Moves a file, or a folder with all that is in it, to its place, where it stays if the machine
    fails.

    Raises: OSError, as where a folder is there already."""
    for path in (*new.rglob("*"), new):
        sync(path)
    os.rename(new, place)
    sync(place.parent)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno != errno.EINVAL:  # of file systems that sync no folders
            raise
    finally:
        os.close(opened)


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Within the `with`, an OSError for want of room or leave names `path` and says what to do. Its
    class and number stay."""
    try:
        yield
    except OSError as error:
        number = error.errno
        if number not in NO_ROOM + NO_LEAVE or UNWRITTEN in str(error):
            raise
        full = unwritten(path, number)
        raise full from error


def unwritten(path: Path | str, number: int) -> OSError:
    """Returns the error for a `path` that can't be written, from the number that the system gave."""
    do = "write somewhere else, or change its permissions"
    if number in NO_ROOM:
        do = "make room (disk, quota, limits of file sizes) and write it again; what was there before is whole"
    return OSError(number, message(f"{UNWRITTEN} {path}", os.strerror(number), do))


def no_room(error: BaseException | None) -> int | None:
    """Returns the system's number, if an error comes from a disk that is full; by its causes and by
    its text, as other programs write it."""
    while error is not None:
        for number in NO_ROOM:
            if getattr(error, "errno", None) == number or os.strerror(number) in str(error):
                return number
        error = error.__cause__ or error.__context__
    return None


def _begun(path: Path) -> tuple[Path, IO[bytes]]:
    """A new file beside `path`, locked for as long as it is open."""
    while True:
        beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        file = open(beside, "xb")  # noqa: SIM115
        if _locked(file):
            return beside, file


def _begun_folder(parent: Path) -> tuple[Path, IO[bytes]]:
    """A new folder inside of `parent`, and its lock, which holds for as long as it is open."""
    while True:
        new = Path(tempfile.mkdtemp(prefix=".new-", dir=parent))
        with contextlib.suppress(FileNotFoundError):  # it was empty, and swept
            lock = open(new / LOCK, "wb")  # noqa: SIM115
            if _locked(lock):
                return new, lock


def _locked(file: IO[bytes]) -> bool:
    """Locks a file that this process has just made. False where another one took it for abandoned
    meanwhile, and removed it."""
    fcntl.flock(file, fcntl.LOCK_EX)
    if os.fstat(file.fileno()).st_nlink:
        return True
    file.close()
    return False


def _remove_file(old: Path) -> None:
    """Removes a file that nobody holds any more."""
    with contextlib.suppress(OSError), open(old, "r+b") as file:  # BlockingIOError: it is held
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        old.unlink()


def _remove_folder(old: Path) -> None:
    """Removes a folder that nobody holds any more."""
    with contextlib.suppress(OSError):
        old.rmdir()  # it is empty where its maker was killed before the lock, or after it
        return
    with contextlib.suppress(OSError):
        if (old / LOCK).exists():
            with open(old / LOCK, "r+b") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _clear(old)
        elif time.time() - old.stat().st_mtime > ABANDONED:
            _clear(old)


def _clear(folder: Path) -> None:
    """Removes a folder, its lock last: what is left where that is interrupted can be swept."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != LOCK:
            path.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
