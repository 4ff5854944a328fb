"""One session: x64 on, two CPU devices for shard_map, hypothesis without a deadline (a first call
compiles), packages of the native lane kept in build/native."""

import gc
import logging
import os
from pathlib import Path

# Before anything reads it; processes that tests start have it too.
os.environ.setdefault("BRIDGE_CACHE", str(Path(__file__).resolve().parents[1] / "build/native"))

import hypothesis
import jax
import psutil
import pytest
import torch

from tests.matrices import left_out

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 2)
hypothesis.settings.register_profile(
    "bridge", deadline=None, max_examples=25, derandomize=True, print_blob=True
)
hypothesis.settings.load_profile("bridge")


memory = psutil.Process().memory_info
after_clearing = [memory().rss]


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_end_before_they_fill_the_memory():
    """Some thousand of them take gigabytes; to compile all anew for each file would take
    minutes."""
    yield
    if memory().rss > after_clearing[0] + 2e9:
        jax.clear_caches()
        after_clearing[0] = memory().rss


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="every cell of every matrix")
    parser.addoption(
        "--fuzz", nargs=2, type=int, metavar=("EXAMPLES", "SEED"), help="see tests/fuzz"
    )


def pytest_collection_modifyitems(config, items):
    """See tests/matrices.py."""
    if not config.getoption("--full"):
        out = set(left_out(items))
        config.hook.pytest_deselected(items=[item for item in items if item in out])
        items[:] = [item for item in items if item not in out]


@pytest.fixture(params=["ffi", "host"])
def lane(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["eager", "jit"])
def maybe_jit(request):
    return jax.jit if request.param else lambda f: f


def pytest_collection_finish():
    """Garbage is looked for among what tests make, and not among what was imported: a tenth of the
    time went there."""
    freeze()


def freeze():
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def frozen():
    """gc.collect() looks only at what a file makes, or it would take 0.2 s each time."""
    freeze()
    yield
    gc.unfreeze()
    freeze()


@pytest.fixture
def unlogged():
    """JAX logs each exception on the host lane, and pytest keeps what is logged: tracebacks with
    arrays."""
    logger = logging.getLogger("jax._src.callback")
    logger.disabled = True
    yield
    logger.disabled = False


@pytest.fixture
def fresh_dynamo():
    """torch.compile remembers nothing of other tests."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def refused_line(capsys, tmp_path, monkeypatch):
    """(options, args) -> the last line of what a demo's command line says of nonsense; `file` is a
    file in its folder."""
    monkeypatch.chdir(tmp_path)

    def last_line(options, args, file="a_file"):
        (tmp_path / file).touch()
        with pytest.raises(SystemExit) as stop:
            options(args.split())
        assert stop.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    return last_line
