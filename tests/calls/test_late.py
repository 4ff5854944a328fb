"""Errors that nobody waits for: of several calls the first that went wrong is told, once. On the
CPU, where the statuses have arrived when they are kept."""

import pytest
import torch

import bridge
from torch_side.calls import late
from torch_side.calls.status import Status


def status(*found):
    """A status with a check for each of these numbers, which says that it is wrong unless zero."""
    of = Status()
    for number in found:
        x = torch.tensor([0.0, number])
        of.note(x > 0, "expected no number, got {}", x)
    return of


@pytest.fixture(autouse=True)
def nothing_is_left():
    assert late.known(wait=True) is None
    yield
    late._on_its_way.clear()


def test_the_first_error_is_raised_once_and_names_the_call():
    late.keep(status(0, 0), "fine")
    late.keep(status(0, 2.0), "model")
    late.keep(status(3.0), "other")
    with pytest.raises(ValueError, match="expected no number, got 2") as caught:
        late.check()
    assert caught.value.__notes__ == [
        "bridge: an earlier call of model found this; a GPU is not waited for, so that a later call "
        "raises it"
    ]
    late.check()


@pytest.mark.parametrize("kept", [[], [()], [(0,), (0, 0)]])
def test_nothing_is_raised_where_all_is_well(kept):
    for found in kept:
        late.keep(status(*found), "fine")
    late.check()
    assert not late._on_its_way


@pytest.mark.parametrize("waits", [False, True])
def test_a_status_on_its_way_is_not_waited_for_unless_asked(waits):
    """An event that is over when it was waited for, as one of CUDA."""

    class Event:
        over = False

        def synchronize(self):
            self.over = True

        def query(self):
            return self.over

    late.keep(status(2.0), "model")
    late._on_its_way[0].there = Event()
    error = late.known(wait=waits)
    assert (error is not None) == waits and len(late._on_its_way) == (not waits)


def test_raising_tells_it():
    with pytest.raises(ValueError, match="got 2"), bridge.raising():
        late.keep(status(2.0), "model")
