"""Exported programs from elsewhere, read by another process first: XLA's readers can end the process
that gives them a forged one."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp

from bridge import trust
from bridge.archive import Odd, said
from bridge.errors import message
from bridge.native import folder as folders
from jax_side.montecarlo import exported

KNOWN = "programs.txt"  # in the folder of packages: hashes of programs that need no fence
MOST = 2**20  # bytes of that file, which is begun anew then
MEMORY = 2**34  # bytes of address space of the other process
SECONDS = 300.0  # that it may take for one program
IDLE = 60.0  # seconds without a program after which it ends
ROWS = 5  # with which a program is tried
ROOT = Path(__file__).resolve().parents[2]
START = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from jax_side.montecarlo import fence; fence.serve()"
ANEW = f"export it anew, or {trust.TRUST}"


def known(blob: bytes) -> bool:
    """Returns True for a program that `allow` was called with, by this user, with this jaxlib."""
    with contextlib.suppress(OSError, ValueError):
        folder = folders.chosen()
        trust.check_own(folder)
        return _digest(blob) in (folder / KNOWN).read_text().splitlines()
    return False


def allow(blob: bytes) -> None:
    """Notes that a program is harmless to read, since it was made or tried here.

    Where the folder of packages can't be written to, it is not noted."""
    if known(blob):
        return
    with contextlib.suppress(OSError, ValueError):
        file = folders.made(folders.chosen()) / KNOWN
        grown = file.exists() and file.stat().st_size > MOST
        # lines are short, so that each is written as a whole
        with open(file, "w" if grown else "a", opener=_private) as opened:
            opened.write(f"{_digest(blob)}\n")


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _digest(blob: bytes) -> str:
    return hashlib.sha256(version("jaxlib").encode() + b"\0" + blob).hexdigest()


def tried(blob: bytes) -> str:
    """Reads, compiles and runs a program in another process.

    Returns "" where all is well, or else the error of running it; that is for whoever knows what
    the program should be.

    Raises: Odd for a program that can't be read, that has custom calls, or that takes too long or
    too much memory, or ends the process."""
    if known(blob):
        return ""
    with _lock:
        failed = _read(blob)
    if not failed:
        allow(blob)
    return failed


def _read(blob: bytes) -> str:
    """What a process says that waits, or a new one. One that other programs went through before may
    have been harmed by them, so what ends it is read again by a new one."""
    if _readers and _readers[-1].alive:
        try:
            return _readers[-1].read(blob)
        except Odd:
            if _readers[-1].alive:
                raise
    _readers[:] = [Reader()]
    return _readers[-1].read(blob)


_lock = threading.Lock()


class Reader:
    """The other process."""

    def __init__(self, seconds: float | None = None) -> None:
        self.seconds = SECONDS if seconds is None else seconds
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        self.parent = os.getpid()
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", START],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
                env={**os.environ, "JAX_PLATFORMS": "cpu"},
            )
        except OSError as error:
            expected = "a process that reads programs from elsewhere"
            do = "start this one by python, or pass trust=True"
            raise ValueError(message(expected, said(error), do)) from error

    @property
    def alive(self) -> bool:
        """True while it waits for programs of this process."""
        return self.parent == os.getpid() and self.process.poll() is None

    def read(self, blob: bytes) -> str:
        """Returns the error of running a program, "" for none. Raises: Odd."""
        late = threading.Timer(self.seconds, self.process.kill)
        late.start()
        try:
            line = self._asked(blob)
        finally:
            on_time = late.is_alive()
            late.cancel()
        if not line:
            self.end()
            raise Odd(_ended(self, on_time), ANEW)
        answer = json.loads(line)
        if "got" in answer:
            cause = RuntimeError(answer["cause"]) if answer["cause"] else None
            raise Odd(answer["got"], answer["do"]) from cause
        return answer["failed"]

    def _asked(self, blob: bytes) -> bytes:
        """A line of JSON; nothing where the process has ended."""
        given, taken = self.process.stdin, self.process.stdout
        assert given is not None and taken is not None
        with contextlib.suppress(BrokenPipeError):
            given.write(len(blob).to_bytes(8, "big") + blob)
            given.flush()
        return taken.readline()

    def end(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.communicate()


def _ended(reader: Reader, on_time: bool) -> str:
    """How a program ended the process, in words."""
    if not on_time:
        return f"that takes more than {reader.seconds:.0f} s to read"
    code = reader.process.returncode
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    reader.errors.seek(0)
    last = reader.errors.read().decode(errors="replace").strip().splitlines()[-1:]
    return f"that ends the process which reads it ({how}{': ' if last else ''}{''.join(last):.200})"


_readers: list[Reader] = []  # one at most


def serve() -> None:
    """Reads programs from stdin, each behind its length, and writes a line of JSON for each."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    jax.config.update("jax_enable_x64", True)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    given = io.FileIO(0)
    while select.select([given], [], [], IDLE)[0]:
        size = _exactly(given, 8)
        if not size:
            return
        answer = _answer(_exactly(given, int.from_bytes(size, "big")))
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def _exactly(given: io.FileIO, n: int) -> bytes:
    """n bytes, or fewer at the end."""
    found = bytearray()
    while len(found) < n and (more := given.read(n - len(found))):
        found += more
    return bytes(found)


def _answer(blob: bytes) -> dict[str, str]:
    """What the process says of a program."""
    try:
        programs = exported.read(blob)
    except Odd as odd:
        got, do = odd.args
        return {"got": got, "do": do, "cause": str(odd.__cause__ or "")}
    failed = ""
    for program in programs if "cpu" in programs[0].platforms else ():
        try:
            _run(program)
        except Exception as error:
            failed = failed or said(error)
    jax.clear_caches()
    return {"failed": failed}


def _run(program: jax.export.Exported) -> None:
    """Compiles and runs a program on ones, with some rows."""
    sizes = [[n if isinstance(n, int) else ROWS for n in x.shape] for x in program.in_avals]
    given = [jnp.ones(shape, x.dtype) for shape, x in zip(sizes, program.in_avals)]
    args, kwargs = jax.tree.unflatten(program.in_tree, given)
    jax.block_until_ready(jax.jit(program.call)(*args, **kwargs))
