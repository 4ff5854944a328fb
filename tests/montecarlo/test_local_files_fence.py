"""Programs from elsewhere are read by another process first: it may end, hang or grow, and the file
is refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from bridge import archive
from bridge.native import folder
from jax_side.montecarlo import fence
from jax_side.montecarlo import files as local_files
from jax_side.montecarlo.local import LocalPotential
from tests.local_file_cases import entries, saved


@pytest.fixture
def nothing_known(tmp_path, monkeypatch):
    """As on a machine that has seen no file yet."""
    saved()
    monkeypatch.setenv("BRIDGE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def a_process(monkeypatch):
    """Takes the place of the process that reads."""

    def runs(code, seconds):
        monkeypatch.setattr(fence, "START", code)
        monkeypatch.setattr(fence, "SECONDS", seconds)
        monkeypatch.setattr(fence, "_readers", readers := [])
        return readers

    return runs


READ = "import os, sys, time; n = int.from_bytes(sys.stdin.buffer.read(8), 'big'); sys.stdin.buffer.read(n); "
ENDS = {
    "segfault": ("os.kill(os.getpid(), 11)", "ends the process which reads it (SIGSEGV)"),
    "abort": (
        "print('a check failed', file=sys.stderr, flush=True); os.abort()",
        "ends the process which reads it (SIGABRT: a check failed)",
    ),
    "exit": ("os._exit(3)", "ends the process which reads it (exit code 3)"),
    "hangs": ("time.sleep(100)", "takes more than 1 s to read"),
}


@pytest.mark.usefixtures("nothing_known")
@pytest.mark.parametrize("how", ENDS)
def test_a_program_that_ends_its_reader_is_refused(how, a_process):
    code, text = ENDS[how]
    readers = a_process(READ + code, seconds=1.0 if how == "hangs" else 60.0)
    with pytest.raises(ValueError) as e:
        local_files.load(path := saved())
    assert f"expected a local potential in {path}, got node_init.jax that {text}" in str(e.value)
    assert "or pass trust=True" in str(e.value)
    assert not readers[0].alive
    local_files.load(path, trust=True)


@pytest.mark.usefixtures("nothing_known")
def test_a_file_from_elsewhere_is_tried_once(tmp_path, monkeypatch):
    path = saved()
    assert not fence.known(entries(path)["edge.jax"])
    want = local_files.load(path, trust=True)
    assert not (tmp_path / "cache").exists()
    a = jnp.ones((3, 4))
    np.testing.assert_array_equal(
        local_files.load(path).edge(a, a, a[:, :3]), want.edge(a, a, a[:, :3])
    )
    assert (tmp_path / "cache" / fence.KNOWN).stat().st_mode & 0o777 == 0o600
    monkeypatch.setattr(fence, "tried", None)
    local_files.load(path)


def test_a_file_of_our_own_is_not_tried(tmp_path, monkeypatch):
    monkeypatch.setenv("BRIDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fence, "tried", None)
    local = LocalPotential(lambda Z: Z[:, None] * 1.5, lambda a, b, r: a, lambda a, s: s[:, 0], 3.0)
    local_files.save(tmp_path / "mine.zip", local, precision="64bit")
    local_files.load(tmp_path / "mine.zip")
    (tmp_path / "cache").chmod(0o777)  # what others can write to says nothing
    with pytest.raises(TypeError):
        local_files.load(tmp_path / "mine.zip")


def test_a_folder_that_can_not_be_written_costs_the_same_again(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("BRIDGE_CACHE", str(tmp_path / "file" / "cache"))
    for _ in range(2):
        local_files.load(saved())
        assert not fence.known(entries(saved())["edge.jax"])


def test_the_list_of_known_programs_is_begun_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("BRIDGE_CACHE", str(tmp_path))
    monkeypatch.setattr(fence, "MOST", 200)
    for k in range(5):
        fence.allow(b"%d" % k)
    assert fence.known(b"4") and not fence.known(b"0")
    assert len((tmp_path / fence.KNOWN).read_text().splitlines()) < 5


@pytest.mark.usefixtures("nothing_known")
def test_linear_algebra_needs_trust(tmp_path):
    """LAPACK is called with what the file says of its sizes, and writes beyond smaller arrays."""

    def readout(a, s):
        return jnp.linalg.eigvalsh(a[:, :, None] * a[:, None]).sum(-1) + s[:, 0]

    wide = lambda Z: jnp.stack([Z, Z], 1) * 1.5
    local = LocalPotential(wide, lambda a, b, r: a, readout, 3.0)
    local_files.save(path := tmp_path / "algebra.zip", local, precision="64bit")
    local_files.load(path)  # it was written here
    (folder.chosen() / fence.KNOWN).unlink()
    with pytest.raises(
        ValueError, match=r"readout.jax with lapack_\w+, machine code that believes"
    ):
        local_files.load(path)
    a = jnp.ones((3, 2))
    np.testing.assert_allclose(local_files.load(path, trust=True).readout(a, a), 3.0)


@pytest.mark.usefixtures("nothing_known")
def test_a_program_that_wants_all_memory_is_refused(tmp_path):
    def edge(a, b, r):
        huge = jnp.ones((a.shape[0], 2**16, 2**22)) * a[:, :1, None]
        return jnp.cumsum(huge, 1)[:, ::7].sum((1, 2))[:, None]

    local = LocalPotential(lambda Z: Z[:, None] * 1.5, edge, lambda a, s: s[:, 0], 3.0)
    local_files.save(path := tmp_path / "huge.zip", local, precision="64bit", order=0)
    (folder.chosen() / fence.KNOWN).unlink()
    with pytest.raises(
        ValueError, match=f"potential in {path}, got edge.jax that (can't run|ends)"
    ):
        local_files.load(path, order=0)


def test_a_process_that_was_idle_is_started_anew(monkeypatch):
    monkeypatch.setattr(fence, "_readers", [])
    monkeypatch.setattr(fence, "known", lambda blob: False)
    blob = archive.entries(saved().read_bytes())["node_init.jax"]
    assert fence.tried(blob) == ""
    first = fence._readers[0]
    first.process.stdin.close()  # as if its time were over
    assert first.process.wait(timeout=30) == 0
    assert fence.tried(blob) == "" and fence._readers[0] is not first
    monkeypatch.setattr(fence._readers[0], "parent", -1)
    assert not fence._readers[0].alive  # that of another process: this one is a fork of it


def test_what_harmed_its_process_does_not_harm_the_next(monkeypatch):
    """A process that another program has broken ends with a good one, which a new one reads."""
    monkeypatch.setattr(fence, "known", lambda blob: False)
    code = "import sys, time; sys.stdin.buffer.read(9); sys.exit(4)"
    with monkeypatch.context() as m:
        m.setattr(fence, "START", code)
        monkeypatch.setattr(fence, "_readers", readers := [fence.Reader()])
        assert readers[0].alive
    assert fence.tried(entries(saved())["node_init.jax"]) == ""
