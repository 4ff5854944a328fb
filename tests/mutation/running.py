"""Runs tests on a mutant: in a child of a process that has imported all that is slow to import, but
nothing of this project, and in which neither XLA nor OpenMP has started a thread."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.mutation.rooms import OUT, ROOT, module_of
from tests.mutation.site import sitecustomize

SLOW = """numpy scipy jax jax.numpy jax.export jax_tvm_ffi torch torch._dynamo torch.export torch.testing
    torch._inductor.compile_fx hypothesis pytest ase ase.build ase.calculators.calculator vesin flax optax
    equinox e3nn"""  # not jax_md, which runs a program of XLA when it is imported
NATIVE = ROOT / "build/native"  # packages that are compiled already
MEMORY = 8e9  # bytes that a mutant may take


@dataclass(frozen=True)
class Outcome:
    """What tests made of a mutant.

    how      "passed"; "failed" where a test did, "import" where a test's file could not be imported,
             "time" or "memory" where the tests were ended, "crash" where the process died
    test     the test that failed, or that ran when it ended
    why      the first line of its error, the last one of an import's
    seconds  how long all took"""

    how: str
    test: str
    why: str
    seconds: float


class _Noting:
    """The plugin of pytest that keeps, in a file, which test runs and which has failed."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._note("runs", nodeid, "")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            why = crash.message if crash else str(report.longrepr)
            self._note("failed", report.nodeid, why.splitlines()[0] if why else "")

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._note("import", report.nodeid, str(report.longrepr).splitlines()[-1])

    def _note(self, how: str, test: str, why: str) -> None:
        self.place.write_text(json.dumps([how, test, why[:200]]))


def preload() -> None:
    """Imports what is slow to import."""
    for name in SLOW.split():
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    ours = ("bridge", "jax_side", "torch_side")
    assert not [m for m in sys.modules if m.split(".")[0] in ours]
    assert len(os.listdir("/proc/self/task")) == 1, (
        "a thread was started, which no child would have"
    )


def run(file: str, source: str, tests: list[str], limit: float, arguments: str = "-x") -> Outcome:
    """Runs tests, each by its name, with `source` in the place of a file, for `limit` seconds at
    most."""
    start = time.monotonic()
    place = Path(tempfile.mkdtemp(prefix="mutant-", dir=OUT))
    try:
        (place / "source.py").write_text(source)
        child = os.fork()
        if child == 0:
            _be_child(place, file, tests, arguments)
        how = _wait(child, start + limit)
        noted = place / "noted"
        known, test, why = json.loads(noted.read_text()) if noted.exists() else ("runs", "", "")
        if how is None:
            how = known if known != "runs" else _ended(place)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return Outcome(how, "" if how == "passed" else test, why, round(time.monotonic() - start, 1))


def _ended(place: Path) -> str:
    """What became of tests of which none has failed.

    Raises: RuntimeError where pytest has found no test: a name that is none, and no mutant's fault."""
    done = place / "code"
    code = int(done.read_text()) if done.exists() else None
    if code in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise RuntimeError((place / "log").read_text()[-3000:])
    return "passed" if code == 0 else "crash"


def _be_child(place: Path, file: str, tests: list[str], arguments: str) -> None:
    """Runs pytest, and ends the process without what a forked interpreter might wait for."""
    try:
        os.setsid()
        log = os.open(place / "log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        packages = place / "native"
        if NATIVE.exists():
            shutil.copytree(NATIVE, packages, symlinks=True)
        os.environ.update(
            {
                sitecustomize.MODULE: module_of(file),
                sitecustomize.SOURCE: str(place / "source.py"),
                "PYTHONPATH": f"{Path(sitecustomize.__file__).parent}:{ROOT}",
                "BRIDGE_CACHE": str(packages),
                "TMPDIR": str(place),
                "TORCHINDUCTOR_CACHE_DIR": str(OUT / "inductor"),
            }
        )
        tempfile.tempdir = None
        sitecustomize.install()
        options = ["-q", "--full", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
        plugins = [_Noting(place / "noted")]
        code = pytest.main([*options, *arguments.split(), *tests], plugins=plugins)
        (place / "code").write_text(str(int(code)))
    finally:
        sys.stdout.flush()
        os._exit(0)


def _wait(child: int, until: float) -> str | None:
    """Waits for a child, and ends it where it takes too long or too much memory: then it says which.
    What the child has started and left behind is ended in any case."""
    how = None
    try:
        while how is None and os.waitpid(child, os.WNOHANG) == (0, 0):
            with contextlib.suppress(psutil.Error):
                how = "memory" if psutil.Process(child).memory_info().rss > MEMORY else None
            if time.monotonic() > until:
                how = "time"
            time.sleep(0.05)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)
    return how
