"""A short form of `make fuzz-files`, and what it must notice."""

import random
import time

import pytest

from tests.fuzz_files import __main__ as fuzz
from tests.fuzz_files import doors

SHORT = {"jax program": 4, "torch program": 8}  # the others: 60


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", doors.DOORS)
def test_changed_files_x_door(name, tmp_path):
    for number in range(SHORT.get(name, 60)):
        _, chance = fuzz.example("short", number, {name: 1.0})
        outcome = fuzz.tried(name, chance, tmp_path)
        assert outcome in ("loaded", "refused"), (name, number, outcome)


@pytest.mark.parametrize("name", [n for n in doors.DOORS if n not in ("manifest", "record")])
def test_the_file_as_it_should_be_loads(name, tmp_path):
    """So that what refuses the others is what was changed."""
    door = doors.DOORS[name]
    (tmp_path / door.file).write_bytes(door.make())
    door.load(tmp_path / door.file)


def unpickled(path):
    doors.torch.load(path, weights_only=False)


def nameless(path):
    raise ValueError("something is wrong")


def other(path):
    raise KeyError(str(path))


def plant(name, load, monkeypatch):
    door = doors.DOORS["weights"]._replace(load=load, change=doors.zips(1.0))
    monkeypatch.setitem(doors.DOORS, name, door)


@pytest.mark.parametrize(
    ("load", "said"),
    [
        (nameless, "an error without the name of the file"),
        (other, "another error: KeyError"),
        (unpickled, "a pickle was run"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_door_that_breaks_its_promise_is_seen(load, said, monkeypatch, tmp_path):
    plant("planted", load, monkeypatch)
    found = {fuzz.tried("planted", random.Random(k), tmp_path) for k in range(60)}
    assert any(outcome.startswith(said) for outcome in found), found


class Fake(fuzz.Worker):
    """A worker whose process is this code."""

    code = ""

    def command(self):
        return ["/bin/sh", "-c", self.code.format(report=self.report, first=self.next)]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("printf '{first} a door\\t' >> {report}; kill -9 $$", "the process ended (-9)"),
        ("printf '{first} a door\\t' >> {report}; sleep 60", "more than 0 s"),
    ],
)
def test_a_process_that_ends_or_hangs_is_counted(code, said, monkeypatch, tmp_path):
    monkeypatch.setattr(fuzz, "SECONDS", 0.3)
    monkeypatch.setattr(Fake, "code", code)
    args = fuzz.parsed(["--examples", "3", "--workers", "2"])
    worker = Fake(args, 0, tmp_path)
    end = time.monotonic() + 30
    while worker.look() and time.monotonic() < end:
        time.sleep(0.05)
    assert worker.failures == [f"{n} (a door): {said}" for n in (0, 2)]
    assert worker.process.poll() is not None
