"""Packages of the native lane: found again, compiled anew, compared, made ahead; and packages that
somebody else has compiled."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import ase
import ase.io
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import bridge
from bridge.__main__ import main
from bridge.native import folder, handler
from torch_side.calls import compiling

ROOT = Path(__file__).resolve().parents[2]
# Every process compiles this one function.
PROGRAM = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background has it ignored
import jax, torch, bridge
print(float(jax.jit(bridge.to_jax(lambda x: (x**2).sum(), lane="native"))(jax.numpy.arange(3.0))))
"""


def start(cache, **environment):
    """A process that runs PROGRAM with packages in `cache`, and the handler that is built already."""
    cache.mkdir(exist_ok=True)
    built = cache / handler.file_name()
    if not built.exists():
        built.write_bytes(handler.built().read_bytes())
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "BRIDGE_CACHE": str(cache), **environment},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process):
    """(what it printed, what it said on stderr)"""
    out, err = process.communicate(timeout=200)
    return out.strip(), err


def packages(cache):
    return [p for p in cache.iterdir() if (p / folder.RECORD).exists()]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A folder with the one package, made by two processes at once."""
    place = tmp_path_factory.mktemp("packages") / "cache"
    both = [ended(p) for p in [start(place), start(place)]]
    assert [out for out, _ in both] == ["5.0", "5.0"], both
    assert sum("compiled <lambda>" in err for _, err in both) == 1
    assert len(packages(place)) == 1
    return place


def test_a_second_process_compiles_nothing(cache):
    out, err = ended(start(cache))
    assert out == "5.0" and "compil" not in err


def test_a_folder_that_cannot_be_made_is_refused(cache, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "BRIDGE_CACHE": str(file / "cache")},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert "expected a folder for packages that can be made" in process.stderr
    assert "set BRIDGE_CACHE to a folder of yours" in process.stderr


def test_without_a_compiler_the_error_says_what_to_install(tmp_path):
    _, err = ended(start(tmp_path / "cache", CXX="no-such-compiler"))
    assert "expected the program no-such-compiler for lane=" in err
    assert "apt install g++" in err and 'take lane="ffi"' in err


def damage_code(place):
    path = place / folder.MODEL
    path.write_bytes(path.read_bytes()[:1000])


def damage_record(place):
    (place / folder.RECORD).write_text("{}")


@pytest.mark.parametrize("damage", [damage_code, damage_record], ids=lambda f: f.__name__)
def test_a_damaged_package_is_not_found(damage, tmp_path):
    """So that it is compiled anew; the rest of it is removed."""

    record = folder.Record("a" * 32, "f", (), (), False, "cpu", "", {"torch": "0"})

    def write(path):
        path.write_bytes(b"code" * 1000)
        return replace(record, sha256=folder.sha256(path))

    folder.add(tmp_path, write)
    assert folder.find(tmp_path, record.key) is not None
    damage(tmp_path / record.key)
    assert folder.find(tmp_path, record.key) is None
    assert not (tmp_path / record.key).exists()


def test_an_interrupted_compilation_leaves_nothing(tmp_path):
    place = tmp_path / "cache"
    process = start(place)
    for line in process.stderr:
        if "compiling" in line:
            break
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0
    left = [p.name for p in place.iterdir()]
    assert all(n.endswith(".lock") or n == handler.file_name() for n in left), left


@pytest.fixture
def interruptible():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_that_python_loses_comes_again(interruptible):
    """Of a finalizer or a callback of the garbage collector, where Python prints and forgets it."""

    class Interrupted:
        def __del__(self):
            raise KeyboardInterrupt

    hook = sys.unraisablehook
    with pytest.raises(KeyboardInterrupt), compiling._interruptible():
        Interrupted()
        time.sleep(10)
    assert sys.unraisablehook is hook


# Ahead of time.

NATIVE = bridge.to_jax(lambda x: (x**2).sum(), lane="native")
X = jnp.arange(3.0)


def test_compile_reports_packages_and_errors():
    report = bridge.native.compile(jax.grad(NATIVE), X)
    (record,) = report.records
    assert "<lambda>" in record.name and record.inputs[0].shape == (3,)
    assert report.errors == {"the result": 0.0}


def test_what_disagrees_is_refused_and_removed(tmp_path):
    (record,) = bridge.native.compile(NATIVE, X).records
    shutil.copytree(folder.chosen() / record.key, tmp_path / record.key)
    bridge.native.compile(NATIVE, X, folder=tmp_path)
    assert [p.name for p in packages(tmp_path)] == [record.key]
    with pytest.raises(RuntimeError, match=r"equal to eager torch's, got an error of 0 in the res"):
        bridge.native.compile(NATIVE, X, tolerance=-1.0, folder=tmp_path)
    assert not packages(tmp_path) and folder.find(folder.chosen(), record.key)


def test_a_model_that_is_another_one_eagerly_is_refused(tmp_path):
    """Planted: it asks whether it is being traced."""

    def two_faced(x):
        tracing = isinstance(x, torch._subclasses.FakeTensor)
        return (x**2).sum() if tracing else (x**2).sum() + 1e-3

    f = bridge.to_jax(two_faced, lane="native", outputs=lambda x: jax.ShapeDtypeStruct((), x.dtype))
    (record,) = bridge.native.compile(NATIVE, X).records
    shutil.copytree(folder.chosen() / record.key, tmp_path / record.key)
    with pytest.raises(RuntimeError, match="got an error of 0.001 in the result"):
        bridge.native.compile(f, X, folder=tmp_path)
    assert not packages(tmp_path)
    bridge.native.compile(f, X, folder=folder.chosen(), tolerance=1e-2)


def test_compile_wants_the_native_lane():
    with pytest.raises(ValueError, match='calls on lane="native" in the function, got none'):
        bridge.native.compile(bridge.to_jax(torch.sin), X)


class Pairs(torch.nn.Module):
    """Soft spheres over the edges."""

    def forward(self, inputs):
        from torch_side.potentials.geometry import edge_vectors

        centre = inputs["batch"][inputs["edge_index"][0]]
        each = (1 - edge_vectors(inputs).square().sum(-1) / 9.0) ** 2
        return each.new_zeros(len(inputs["cell"])).index_add(0, centre, each)


@pytest.fixture
def x64_again():
    """The command sets it for its process."""
    yield
    jax.config.update("jax_enable_x64", True)


@pytest.mark.usefixtures("x64_again")
def test_the_command_compiles_for_a_structure(tmp_path, capsys):
    atoms = ase.Atoms("Ar3", positions=[[0, 0, 0], [1.1, 0, 0], [0, 1.3, 0]])
    ase.io.write(tmp_path / "three.extxyz", atoms)
    arguments = ["compile", f"{__name__}:Pairs", str(tmp_path / "three.extxyz")]
    options = ["--cutoff", "3", "--gradients", "autograd", "--dtype", "float64"]
    assert main([*arguments, *options]) == 0
    out = capsys.readouterr().out
    assert "compiled in" in out and "['position_gradients']: at most" in out
    assert main(["compile", f"{__name__}:Pairs", str(tmp_path / "none.xyz")]) == 2
    assert "expected a file with a structure, got" in capsys.readouterr().err


# Somebody else's.


class Theirs(torch.nn.Module):
    def forward(self, given, scale):
        return {"z": scale * given["x"] + given["y"].sum(), "b": given["x"][:1]}


@pytest.fixture(scope="module")
def theirs():
    """A package with a dict, whose keys are not in order, and an axis of any size."""
    path = folder.made(folder.chosen()) / f"theirs-{torch.__version__}.pt2"
    if not path.exists():
        given = {"y": torch.ones(2, dtype=torch.float64), "x": torch.ones(3)}
        n = torch.export.Dim("n", min=2, max=64)
        program = torch.export.export(
            Theirs(),
            (given, torch.tensor(2.0)),
            dynamic_shapes=({"y": {0: n}, "x": None}, None),
        )
        new = path.with_suffix(f".{os.getpid()}.pt2")
        torch._inductor.aoti_compile_and_package(program, package_path=str(new))
        os.replace(new, path)
    return bridge.native.Package(path, trust=True)


GIVEN = {"x": jnp.arange(3, dtype="float32"), "y": jnp.array([1.0, 5.0, 7.0])}
TWO = jnp.float32(2.0)


@pytest.mark.parametrize("lane", ["auto", "native", "ffi", "host"])
def test_a_package_x_lanes(theirs, lane):
    f = bridge.to_jax(theirs, lane=lane)
    for run in (f, jax.jit(f)):
        found = run(GIVEN, TWO)
        np.testing.assert_array_equal(found["z"], 2 * np.arange(3) + 13)
        np.testing.assert_array_equal(found["b"], [0.0])


def test_the_signature_of_a_package(theirs):
    kinds = [(dtype, [str(a) for a in axes]) for dtype, axes in theirs.signature]
    assert kinds == [("float64", ["2..64"]), ("float32", ["3"]), ("float32", [])]
    assert theirs.device == "cpu" and theirs == bridge.native.Package(theirs.path, trust=True)


WRONG = {
    "shape": ({**GIVEN, "x": jnp.zeros(4, "float32")}, ValueError, r"as float32\[3\], got float32\[4\]"),
    "dtype": ({**GIVEN, "x": jnp.zeros(3)}, ValueError, r"as float32\[3\], got float64\[3\]"),
    "size": ({**GIVEN, "y": jnp.zeros(65)}, ValueError, r"as float64\[2..64\], got float64\[65\]"),
    "keys": ({"x": GIVEN["x"]}, TypeError, "call it as it was exported"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_package_x_wrong_inputs(theirs, name):
    given, kind, text = WRONG[name]
    with pytest.raises(kind, match=text):
        jax.jit(bridge.to_jax(theirs)).lower(given, TWO)


def test_a_package_has_no_derivatives_and_no_vmap(theirs):
    f = bridge.to_jax(theirs)
    with pytest.raises(NotImplementedError, match="got derivatives"):
        jax.grad(lambda s: f(GIVEN, s)["z"].sum())(TWO)
    with pytest.raises(NotImplementedError, match="got vmap"):
        jax.vmap(f, (None, 0))(GIVEN, jnp.ones(2, "float32"))


def test_what_is_no_package_is_refused(tmp_path):
    file = tmp_path / "model.pt2"
    for make in (lambda: None, lambda: file.write_bytes(b"nonsense")):
        make()
        with pytest.raises(ValueError, match="expected a package of AOTInductor at"):
            bridge.native.Package(file, trust=True)
