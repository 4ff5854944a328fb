"""Processes that are killed as they write, and disks that are full: what was there before is whole, or
what is new is; nothing piles up; the error names the path."""

import contextlib
import errno
import os
import random
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import bridge
from bridge import archive, writing
from bridge.native import folder
from torch_side.calls import compiling

ROOT = Path(__file__).resolve().parents[2]
# Writes one archive again and again, and one package after another, slowly enough to be met at it.
WRITES = """
import sys, time
from dataclasses import replace
from pathlib import Path
from bridge import archive
from bridge.native import folder
place = Path(sys.argv[1])

def code(path):
    with open(path, "wb") as file:
        for _ in range(20):
            file.write(bytes(50_000))
            time.sleep(0.001)
    return replace(record, sha256=folder.sha256(path))

for k in range(10**6):
    archive.write(place / "local.zip", {name: bytes([k % 256]) * 10**6 for name in ("a", "b")})
    record = folder.Record(f"{k % 3:032}", "f", (), (), False, "cpu", "", {"torch": "0"})
    with folder.locked(place / "cache", record.key):
        if k % 2:
            folder.remove(place / "cache", record.key)
        if folder.find(place / "cache", record.key) is None:
            folder.add(place / "cache", code)
    print(k, flush=True)
"""


def left_over(place):
    """What is being written, or was when a process ended."""
    return [p.name for p in place.rglob(".*") if p.suffix != ".lock"]


def test_kill_9_leaves_whole_files_and_no_heap(tmp_path):
    chance = random.Random(0)
    met = 0
    for _ in range(8):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITES, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE
        )
        process.stdout.readline()
        time.sleep(0.2 * chance.random())
        process.send_signal(signal.SIGKILL)
        process.communicate()
        met += bool(left_over(tmp_path))
        found = archive.read(tmp_path / "local.zip", ("a", "b"))
        assert found["a"] == found["b"] and len({*found["a"]}) == 1 and len(found["a"]) == 10**6
        whole = [p for p in (tmp_path / "cache").iterdir() if p.name[0] != "."]
        assert whole and all(folder.check(p).key == p.name for p in whole)
        assert len(left_over(tmp_path)) <= 2  # of this process alone
    assert met
    archive.write(tmp_path / "local.zip", {"a": b""})
    with writing.folder(tmp_path / "cache"):
        assert len(left_over(tmp_path)) == 1
    assert left_over(tmp_path) == []


def test_what_another_process_is_making_stays(tmp_path):
    with writing.folder(tmp_path) as mine, writing.whole(tmp_path / "file") as half:
        half.write(b"mine")
        with writing.folder(tmp_path), writing.whole(tmp_path / "file") as other:
            other.write(b"other")
        assert mine.exists() and (tmp_path / "file").read_bytes() == b"other"
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_a_folder_of_older_versions_goes_after_an_hour(tmp_path):
    for name, age in ((".new-young", 0), (".new-old", 2 * writing.ABANDONED)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").touch()
        os.utime(tmp_path / name, times=(time.time() - age,) * 2)
    with writing.folder(tmp_path):
        assert (tmp_path / ".new-young").exists() and not (tmp_path / ".new-old").exists()


@contextlib.contextmanager
def files_of_at_most(n_bytes):
    """As a full disk: a file takes that many bytes, and no more (EFBIG)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def package(place):
    def write(path):
        path.write_bytes(bytes(10_000))
        return replace(record, sha256=folder.sha256(path))

    record = folder.Record("a" * 32, "f", (), (), False, "cpu", "", {"torch": "0"})
    folder.add(place, write)
    assert folder.check(place / record.key)


def program(place):
    """A program of JAX alone."""
    weights = jnp.arange(2000.0)
    exported = bridge.native.export(jax.jit(lambda x: weights * x), jnp.ones(()))
    bridge.native.save(exported, place / "program")
    assert bridge.native.load(place / "program", trust=True)(2.0)[1] == 2.0


def local(place):
    archive.write(place / "local.zip", {"new": bytes(10_000)})
    assert archive.read(place / "local.zip", ["new"])


WRITERS = {f.__name__: f for f in (package, program, local)}


@pytest.mark.parametrize("size", [0, 100, 5000])
@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_x_writer(name, size, tmp_path):
    archive.write(tmp_path / "local.zip", {"old": b"old"})
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with files_of_at_most(size), pytest.raises(OSError) as e:
        WRITERS[name](tmp_path)
    assert e.value.errno == errno.EFBIG
    assert f"expected room and leave to write {tmp_path}" in str(e.value)
    assert "make room" in str(e.value)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before
    assert archive.read(tmp_path / "local.zip", ["old"]) == {"old": b"old"}
    WRITERS[name](tmp_path)


@pytest.mark.parametrize("call", ["fsync", "replace", "rename", "open"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_x_call(name, call, tmp_path, monkeypatch):
    """The error of any call of the system, the first or a later one."""
    real, n = getattr(os, call), 0
    for fails in (1, 2, 3):
        place = tmp_path / str(fails)
        place.mkdir()
        n = 0

        def once(*args, fails=fails, **kwargs):
            nonlocal n
            if str(tmp_path) in str(args[0]) or isinstance(args[0], int):
                n += 1
                if n == fails:
                    raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **kwargs)

        monkeypatch.setattr(os, call, once)
        with contextlib.suppress(OSError):
            WRITERS[name](place)
        monkeypatch.setattr(os, call, real)
        assert left_over(place) == []
        whole = [p for p in place.iterdir() if not p.name.startswith(".")]
        for path in whole:
            if path.name == "program":
                bridge.native.load(path, trust=True)
            elif path.is_dir():
                folder.check(path)
            else:
                archive.read(path, ["new"])


def test_a_folder_without_leave_names_the_path(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError, match="expected room and leave to write .*local.zip"):
        archive.write(tmp_path / "local.zip", {"a": b""})


def test_a_compiler_without_room_says_so(tmp_path, monkeypatch):
    """Whatever torch makes of a full disk."""

    def full(*args, **kwargs):
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise RuntimeError("the backend failed") from error

    monkeypatch.setenv("BRIDGE_CACHE", str(tmp_path))
    monkeypatch.setattr(compiling.torch._inductor, "aoti_compile_and_package", full)
    energy = bridge.to_jax(lambda x: (x**3).sum(), lane="native")
    with pytest.raises(OSError, match=f"room and leave to write {tmp_path} .*No space left") as e:
        jax.jit(energy).lower(jnp.ones(3))
    assert e.value.errno == errno.ENOSPC
    assert left_over(tmp_path) == []


def test_no_room_is_found_in_what_other_programs_say():
    said = RuntimeError("g++: error writing to /tmp/x.s: No space left on device")
    assert writing.no_room(said) == errno.ENOSPC
    assert writing.no_room(RuntimeError("another")) is None and writing.no_room(None) is None
