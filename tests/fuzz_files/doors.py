"""The doors that promise to run nothing: a file as it should be, how it is changed, what loads it."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch

import bridge
from bridge import archive
from bridge.native import folder as folders
from demos import runs
from jax_side.calls.saved import MANIFEST
from jax_side.montecarlo import exported, fence
from jax_side.montecarlo import files as local_files
from jax_side.montecarlo.local import LocalPotential
from tests.fuzz_files import mutating
from torch_side.montecarlo import files as torch_files
from torch_side.potentials import checkpoints

LIMIT = 10**6  # bytes of a local potential here
STATE = {"R": jnp.zeros((4, 3)), "key": jnp.zeros(2, "uint32"), "n": jnp.zeros((), "int32")}


class Door(NamedTuple):
    """share   of all examples
    make    the file as it should be, in bytes
    change  (bytes, random, path of a canary) -> other bytes
    load    path -> whatever it loads, checked; it may raise a ValueError that names the path
    file    the name that the file must have, below the example's folder"""

    share: float
    make: Callable[[], bytes]
    change: Callable[..., bytes]
    load: Callable[[Path], Any]
    file: str = "file"


@functools.cache
def of_jax():
    """A local potential of JAX, small, with a derivative."""
    edge = lambda a, b, r: a * b * jnp.exp(-(r**2).sum(-1, keepdims=True))
    init = lambda Z: jnp.stack([Z, Z], 1).astype("float32")
    local = LocalPotential(init, edge, lambda a, s: a[:, 0] + s[:, 0], 3.0)
    with tempfile.TemporaryDirectory() as folder:
        local_files.save(path := Path(folder) / "local.zip", local, precision="32bit")
        return path.read_bytes()


@functools.cache
def of_torch():
    """The same in torch."""
    table = torch.nn.Parameter(torch.ones(9, 2))

    class Init(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = table

        def forward(self, Z):
            return self.table[Z]

    edge = lambda a, b, r: a * b * torch.exp(-(r**2).sum(-1, keepdim=True))
    readout = lambda a, s: a[:, 0] + s[:, 0]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "local.zip"
        torch_files.save(path, Init(), edge, readout, 3.0, precision="32bit")
        return path.read_bytes()


def load_jax(path):
    local = local_files.load(path, limit=LIMIT)
    assert isinstance(local.cutoff, float) and local.cutoff > 0
    a = local.init(jnp.ones(3, "int32"))
    energies = local.readout(a, local.edge(a, a, jnp.ones((3, 3), "float32")))
    assert energies.shape == (3,) and energies.dtype == "float32"


def load_torch(path):
    local = torch_files.load(path, limit=LIMIT)
    assert isinstance(local.cutoff, float) and local.cutoff > 0
    with contextlib.suppress(
        RuntimeError, IndexError
    ):  # weights of other values, a table too short
        a = local.init(torch.ones(3, dtype=torch.int32))
        energies = local.readout(a, local.edge(a, a, torch.ones(3, 3)))
        assert energies.shape == (3,) and energies.dtype == torch.float32


def load_blob(path):
    """A program of JAX, by the fence alone."""
    try:
        if not fence.tried(path.read_bytes()):
            exported.read(path.read_bytes())
    except archive.Odd as odd:
        raise ValueError(f"{path}: {odd}") from odd


@functools.cache
def run_files():
    """{suffix: bytes} of a run."""
    with tempfile.TemporaryDirectory() as folder:
        files = runs.Files(Path(folder) / "file", {"chunk": 2})
        files.begin([])
        files.append({"energy": np.arange(2.0), "R": np.zeros((2, 3))}, {})
        files.save(2, [np.asarray(x) for x in jax.tree.leaves(STATE)])
        return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def load_run(path):
    """A checkpoint or observables, beside the other files of the run."""
    for name, data in run_files().items():
        if not (place := path.with_name(name)).exists():
            place.write_bytes(data)
    template = [np.asarray(x) for x in jax.tree.leaves(STATE)]
    files = runs.Files(path.with_name("file"), {"chunk": 2})
    done, leaves = files.load(template, 4)
    assert type(done) is int and 0 <= done <= 4
    assert [(x.shape, x.dtype) for x in leaves] == [(x.shape, x.dtype) for x in template]
    assert all(isinstance(x, np.ndarray) for x in files.observables().values())


@functools.cache
def manifest():
    found = {"format": 1, "versions": {}, "processor": "", "packages": ["a" * 32]}
    found |= {"functions": {}, "handler": "handler-0.so", "sha256": {"program.bin": "0" * 64}}
    return json.dumps(found).encode()


def load_manifest(path):
    bridge.native.load(path.parent)


def record():
    return (
        folders.Record("a" * 32, "f", (), (), False, "cpu", "", {"torch": "0"}).written().encode()
    )


def load_record(path):
    """The record of a package; a damaged one is not found."""
    place = path.parent / ("a" * 32)
    place.mkdir(exist_ok=True)
    os.replace(path, place / folders.RECORD)
    (place / folders.MODEL).write_bytes(b"code")
    found = folders.find(path.parent, "a" * 32)
    assert found is None or isinstance(found, folders.Record)
    folders.remove(path.parent, "a" * 32)


@functools.cache
def checkpoint():
    """As sevenn and chgnet write them."""
    config = {"cutoff": 5.0, "type_map": {1: 0}, "shift": np.arange(3.0), "version": "0.13.0"}
    state = {"weight": torch.arange(6.0).reshape(2, 3), "ids": torch.arange(3)}
    torch.save({"model_state_dict": state, "config": config, "epoch": 3}, out := io.BytesIO())
    return out.getvalue()


def load_checkpoint(path):
    checkpoints.read(path, trust=False)


def zips(deep):
    """Changes of a zip; `deep` is the part of them that lies within an entry, checksums mended."""

    def change(data, random, canary):
        if random.random() < deep:
            return mutating.in_entry(data, random, canary)
        how = random.choice((mutating.in_zip, None))
        return how(data, random, canary) if how else mutating.changed(data, random)

    return change


def texts(data, random, canary):
    return random.choice((mutating.in_json, mutating.changed))(data, random)


def metadata(data, random, canary):
    return mutating.in_entry(data, random, canary, only=archive.METADATA)


def blob(data, random, canary):
    return mutating.changed(data, random)


def edge_blob():
    return archive.entries(of_jax())["edge.jax"]


DOORS = {
    "jax zip": Door(0.25, of_jax, zips(0.0), load_jax),
    "jax metadata": Door(0.06, of_jax, metadata, load_jax),
    "jax program": Door(0.02, edge_blob, blob, load_blob),
    "torch zip": Door(0.2, of_torch, zips(0.0), load_torch),
    "torch program": Door(0.02, of_torch, zips(1.0), load_torch),
    "checkpoint": Door(0.15, lambda: run_files()["file.ckpt.npz"], zips(0.5), load_run, "file.ckpt.npz"),
    "observables": Door(0.08, lambda: run_files()["file.jsonl"], blob, load_run, "file.jsonl"),
    "manifest": Door(0.06, manifest, texts, load_manifest, MANIFEST),
    "record": Door(0.06, record, texts, load_record, "record"),
    "weights": Door(0.1, checkpoint, zips(0.5), load_checkpoint, "file.pth"),
}  # fmt: skip
