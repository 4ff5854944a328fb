"""Programs in a folder: run by a process that never imports torch in Python, and refused where
something is not as it was."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import bridge
from bridge.native import folder
from jax_side.calls.saved import MANIFEST, PACKAGES, PROGRAM
from tests.potentials.test_native_potentials import INPUTS, NATIVE

ROOT = Path(__file__).resolve().parents[2]
RUN = """
import sys, json
import numpy as np
import jax
jax.config.update("jax_enable_x64", True)
import bridge.native
loop = bridge.native.load(sys.argv[1], trust=True)
given = dict(np.load(sys.argv[2]))
try:
    found = {name: np.asarray(x).tolist() for name, x in loop(given).items()}
except Exception as error:
    found = str(error)
loaded = sorted({m.split(".")[0] for m in sys.modules} & {"torch", "torch_side"})
print(json.dumps([found, loaded]))
"""


def steps(inputs):
    """Three steps downhill, and what the model says then."""

    def step(_, pos):
        return pos - 1e-3 * NATIVE(inputs | {"pos": pos})["position_gradients"]

    pos = jax.lax.fori_loop(0, 3, step, inputs["pos"])
    return NATIVE(inputs | {"pos": pos})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    place = tmp_path_factory.mktemp("saved") / "deep" / "program"
    exported = bridge.native.export(jax.jit(steps), INPUTS)
    assert bridge.native.save(exported, place) == place
    return place


def elsewhere(place, inputs, tmp_path):
    """(what another process found, which of torch's modules it had)"""
    np.savez(tmp_path / "inputs.npz", **{k: np.asarray(x) for k, x in inputs.items()})
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(place), str(tmp_path / "inputs.npz")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_another_process_finds_the_same_without_torch(saved, tmp_path):
    found, loaded = elsewhere(saved, INPUTS, tmp_path)
    want = jax.jit(steps)(INPUTS)
    assert loaded == [] and sorted(found) == sorted(want)
    for name, x in want.items():
        np.testing.assert_array_equal(np.array(found[name]), x)


def test_errors_there_name_system_and_atom(saved, tmp_path):
    wrong = INPUTS | {"pos": INPUTS["pos"].at[5, 1].set(jnp.nan)}
    found, _ = elsewhere(saved, wrong, tmp_path)
    assert "expected finite positions, got (" in found and "for atom 5 of system 2" in found


def test_the_same_process_loads_it_too(saved):
    loop = bridge.native.load(saved, trust=True)
    want = jax.jit(steps)(INPUTS)
    np.testing.assert_array_equal(loop(INPUTS)["energy"], want["energy"])
    assert repr(loop) == "bridge.native.load(steps)"


def edited(change):
    """Changes what `save` noted."""

    def edit(place):
        found = json.loads((place / MANIFEST).read_text())
        change(found)
        (place / MANIFEST).write_text(json.dumps(found))

    return edit


def appended(name):
    return lambda place: (place / name).write_bytes((place / name).read_bytes() + b"x")


def package(place):
    return next((place / PACKAGES).iterdir())


BROKEN = {
    "program altered": (appended(PROGRAM), "got another program.bin"),
    "program missing": (lambda p: (p / PROGRAM).unlink(), "as bridge.native.save wrote it at"),
    "package altered": (lambda p: appended(folder.MODEL)(package(p)), "got another one"),
    "package missing": (lambda p: shutil.rmtree(package(p)), "as bridge.native.save wrote it at"),
    "no manifest": (lambda p: (p / MANIFEST).unlink(), "got FileNotFoundError"),
    "another torch": (
        edited(lambda m: m["versions"].update(torch="1.0")),
        "expected torch 1.0, as .* was written with, got .*; install torch==1.0",
    ),
    "another jaxlib": (edited(lambda m: m["versions"].update(jaxlib="0.1")), "expected jaxlib 0.1"),
    "another processor": (
        edited(lambda m: m.update(processor=m["processor"] + " avx4096")),
        "got one without avx4096; export it again on a machine of this kind",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_that_is_not_as_it_was_is_refused(name, saved, tmp_path):
    place = tmp_path / "program"
    shutil.copytree(saved, place)
    harm, text = BROKEN[name]
    harm(place)
    with pytest.raises(ValueError, match=text):
        bridge.native.load(place, trust=True)


def test_an_existing_folder_is_not_written_over(tmp_path):
    exported = bridge.native.export(jax.jit(steps), INPUTS)
    with pytest.raises(ValueError, match="expected a folder that does not exist yet"):
        bridge.native.save(exported, tmp_path)
    assert list(tmp_path.iterdir()) == []


def with_ffi(x):
    return bridge.to_jax(torch.sin, lane="ffi")(x)


def with_host(x):
    return bridge.to_jax(torch.sin, lane="host")(x)


@pytest.mark.parametrize("function", [with_ffi, with_host], ids=lambda f: f.__name__)
def test_a_call_into_python_is_not_exported(function):
    with pytest.raises(ValueError, match=r"got a call into Python; pass lane=.native."):
        bridge.native.export(jax.jit(function), jnp.ones(3))
