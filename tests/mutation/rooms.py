"""The core rooms, whose mutants are made, and where results lie."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "build/mutation"
COVERED = OUT / "covered.jsonl"  # which tests run which lines: tests.mutation.covering
ROOMS = {
    "jax calls": sorted((ROOT / "jax_side/calls").glob("[!_]*.py")),
    "torch calls": sorted((ROOT / "torch_side/calls").glob("[!_]*.py")),
    "strain": [ROOT / f"{bank}_side/potentials/strain.py" for bank in ("jax", "torch")],
    "static graphs": [ROOT / "torch_side/potentials/static.py"],
    "cache": [ROOT / "jax_side/potentials/cache.py"],
}
FILES = {path.relative_to(ROOT).as_posix(): room for room in ROOMS for path in ROOMS[room]}


def module_of(file: str) -> str:
    """Returns the dotted name of a file of the repository."""
    return file.removesuffix(".py").replace("/", ".")
