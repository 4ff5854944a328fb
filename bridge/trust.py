"""Files that hold code: whoever loads one is told what would run, and asked. Standard library only."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

from bridge.errors import message

StrPath = str | os.PathLike[str]
# what to do, in the errors of all doors
TRUST = "pass trust=True if you would run a program from where this file came from"


def ask(path: StrPath, runs: str, trust: bool) -> None:
    """Returns if `trust` is True, and raises otherwise.

    `path` is the file (or folder) that would be loaded, `runs` says what would run then.

    Raises: ValueError that says what would run, whose file it is and how to trust it; TypeError for
    a `trust` that is neither True nor False.

    >>> ask("model.pt", "the pickled code in it", trust=True)
    >>> ask("/none.pt", "the pickled code in it", trust=False)
    Traceback (most recent call last):
    ValueError: expected trust=True for /none.pt, got trust=False, while loading it runs the pickled code in it, with all your rights; pass trust=True if you would run a program from where this file came from (it does not exist)
    """
    if not isinstance(trust, bool):
        raise TypeError(message("trust as True or False", repr(trust), "pass one of them"))
    if not trust:
        got = f"trust=False, while loading it runs {runs}, with all your rights"
        do = f"{TRUST} ({_whose(path)})"
        raise ValueError(message(f"trust=True for {os.fspath(path)}", got, do))


def check_own(folder: Path) -> None:
    """Raises ValueError unless a folder that holds code belongs to this process's user (or root),
    and nobody else can write to it: what others put there would run."""
    found = folder.stat()
    if found.st_uid not in (os.geteuid(), 0):
        got = f"{folder}, which belongs to {_name(found.st_uid)}"
        do = "set BRIDGE_CACHE to a folder of yours, or pass folder=..."
        raise ValueError(message("a folder of this user's for code that will run", got, do))
    if found.st_mode & 0o022:
        got = f"{folder} with mode {found.st_mode & 0o7777:o}"
        do = f"look into it, then run: chmod go-w {folder}"
        raise ValueError(message("a folder that nobody else can write to", got, do))


def _whose(path: StrPath) -> str:
    """Who owns a file, in words."""
    try:
        return f"its owner is {_name(os.stat(path).st_uid)}"
    except OSError:
        return "it does not exist"


def _name(user: int) -> str:
    """The name of a user of this machine, or the number of one without a name."""
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return f"user {user}"
