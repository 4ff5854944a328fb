"""Mutants that no test has to kill, and why."""

from __future__ import annotations

from typing import Any

# Functions that do nothing in `make test-all`: (file, function).
ELSEWHERE: dict[tuple[str, str], str] = {
    ("jax_side/calls/lanes.py", "_enter_gpu"): "runs on CUDA only: make gpu-check",
}

# (file, the first line that differs before, and after), as python -m tests.mutation prints them.
EXPLAINED: dict[tuple[str, str, str], str] = {}


def reason(line: dict[str, Any]) -> str | None:
    """Returns why the mutant of a result may survive, None if it may not."""
    place = (line["file"], line["inside"])
    return ELSEWHERE.get(place) or EXPLAINED.get((line["file"], line["before"], line["after"]))
