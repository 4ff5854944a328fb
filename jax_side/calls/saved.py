"""Exported programs, with the packages that they call, in a folder: for processes that never import
torch in Python."""

from __future__ import annotations

import json
import os
import shutil
import weakref
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import jax
import jax.export

from bridge import trust as trusting
from bridge import writing
from bridge.errors import message
from bridge.native import folder as folders
from bridge.native import handler
from jax_side.calls import named, native
from jax_side.calls.lanes import TARGET as PYTHON

PROGRAM, MANIFEST, PACKAGES = "program.bin", "manifest.json", "packages"
FORMAT = 1
CHECK = jax.export.DisabledSafetyCheck
# What must be the same where a program is loaded, by the names of distributions.
SAME = ("jaxlib", "torch")


def export(
    function: Callable[..., Any],
    *args: Any,
    platforms: tuple[str, ...] | None = None,
    **kwargs: Any,
) -> jax.export.Exported:
    """Returns a jitted function, with bridged models in it that are on lane="native" or have a
    name, as a program that other processes can run.

    `function` is what jax.jit returned, and `args` and `kwargs` are what it will be called with:
    arrays, or jax.ShapeDtypeStruct for their types. `platforms` is that of jax.export.export; None
    is this machine's. The weights are those of this moment. `save` writes the program.

    A model with a name (`to_jax(model, name="my-model")`, and so potentials) is called by Python on
    the ffi lane, and must be there under that name in the process that loads the program.

    Raises: ValueError where a bridged function has no name and is on another lane, which needs
    Python and this process; NotImplementedError for arguments of a named one that JSON can't hold;
    and what the lowering raises.

    >>> import bridge, jax, torch
    >>> energy = bridge.to_jax(lambda x: (x**2).sum(), lane="native")
    >>> exported = bridge.native.export(jax.jit(jax.grad(energy)), jax.numpy.ones(3))  # doctest: +SKIP
    """
    exporter = jax.export.export(
        cast("Any", function),
        platforms=platforms,
        disabled_checks=[CHECK.custom_call(native.TARGET), CHECK.custom_call(PYTHON)],
    )
    try:
        exported = exporter(*args, **kwargs)
    except NotImplementedError as error:
        if "callbacks" not in str(error):
            raise
        raise _calls_python() from error
    _functions(exported)
    return exported


def _functions(exported: jax.export.Exported) -> dict[str, named.Recipe]:
    """The recipes of what a program calls by Python. Raises ValueError for what has no name."""
    program = exported.mlir_module()
    if PYTHON not in program:
        return {}
    try:
        return named.recipes_in(program)
    except KeyError as error:
        raise _calls_python() from error


def _calls_python() -> ValueError:
    """The error for a program that needs this process."""
    expected = 'bridged functions on lane="native", or with a name, in a program that is exported'
    do = (
        'pass lane="native", or lane="ffi" and name=, to bridge.potential, to_jax and the others, '
        "and keep callbacks out"
    )
    return ValueError(message(expected, "a call into Python", do))


def save(exported: jax.export.Exported, folder: str | os.PathLike[str]) -> Path:
    """Writes what `export` returned, and the packages that it calls, into a new folder.

    The folder holds all that another process needs beside jaxlib and torch's libraries. It appears
    whole or not at all. Returns its path.

    Raises: ValueError where the folder exists, and for a program whose packages this process has
    not loaded; OSError that names the folder, where it can't be written."""
    place = Path(folder)
    if place.exists():
        do = "name a new folder, or remove this one"
        raise ValueError(message("a folder that does not exist yet", str(place), do))
    keys = native.keys_in(exported.mlir_module())
    if absent := [key for key in keys if key not in native.packages]:
        do = "save it in the process that exported it"
        raise ValueError(message("packages that this process has loaded", ", ".join(absent), do))
    with writing.named(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        _write(exported, place, keys)
    return place


def _write(exported: jax.export.Exported, place: Path, keys: list[str]) -> None:
    """The folder with the program and its packages."""
    with writing.folder(place.parent) as new:
        whole = new / "whole"
        (whole / PACKAGES).mkdir(parents=True)
        for key in keys:
            package = native.packages[key]
            (whole / PACKAGES / key).mkdir()
            shutil.copy(package.path, whole / PACKAGES / key / folders.MODEL)
            (whole / PACKAGES / key / folders.RECORD).write_text(package.record.written())
        files = [PROGRAM, handler.file_name()] if keys else [PROGRAM]
        if keys:
            shutil.copy(handler.built(), whole / handler.file_name())
        (whole / PROGRAM).write_bytes(exported.serialize())
        manifest = {
            "format": FORMAT,
            "versions": {name: version(name) for name in SAME},
            "processor": folders.processor(),
            "packages": keys,
            "functions": _functions(exported),
            "handler": handler.file_name(),
            "sha256": {n: folders.sha256(whole / n) for n in files},
        }
        (whole / MANIFEST).write_text(json.dumps(manifest, indent=1))
        writing.move(whole, place)


def load(folder: str | os.PathLike[str], *, trust: bool = False) -> Loaded:
    """Returns the program of a folder that `save` wrote, as a function of JAX arrays.

    The folder holds machine code, which runs with your rights: `trust=True` says that you would run
    a program from where it came from.

    It runs without Python's torch: only torch's libraries are loaded, unless it calls functions by
    their names. jit, scan and so on compose with the function; it has no derivatives, unless it was
    exported with its own.

    Raises: ValueError without trust=True; ValueError, naming what is wrong, where a file is missing
    or altered, for versions of jaxlib or torch other than those that it was written with, and for a
    processor that lacks something that the code may use; also where a bridged function that it
    calls by name is not there, or has other weights, other code or other options; ImportError
    without torch."""
    place = Path(folder)
    manifest = _manifest(place)
    trusting.ask(place, _runs(manifest), trust)
    _check_home(place, manifest)
    for name, expected in manifest["sha256"].items():
        _check_file(place / name, expected)
    records = {}
    for key in manifest["packages"]:
        try:
            records[key] = folders.check(place / PACKAGES / key)
        except OSError as error:
            raise _altered(place, f"none of {key}: {error}") from error
    for number, recipe in manifest["functions"].items():
        named.answer(number, recipe)
    library = None
    if records:
        library = native.register("cpu", place / manifest["handler"])
    if any(r.device == "cuda" for r in records.values()):
        native.register("cuda")
    for key, r in records.items():
        path = place / PACKAGES / key / folders.MODEL
        assert library is not None
        library.load(key, path, r.inputs, r.outputs, r.has_status)
    exported = jax.export.deserialize(bytearray((place / PROGRAM).read_bytes()))
    return Loaded(exported, library, tuple(records))


class Loaded:
    """What `load` returns: a function of JAX arrays. Its packages are let go with it.

    `exported` is the jax.export.Exported, which tells the types of inputs and outputs."""

    def __init__(
        self, exported: jax.export.Exported, library: handler.Library | None, keys: tuple[str, ...]
    ) -> None:
        self.exported = exported
        self._call = jax.jit(exported.call)
        self.__name__ = exported.fun_name
        for key in keys:
            if library is not None and key not in native.packages:
                weakref.finalize(self, library.drop, key).atexit = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the exported function returned for such arguments."""
        return self._call(*args, **kwargs)

    def __repr__(self) -> str:
        return f"bridge.native.load({self.__name__})"


def _runs(manifest: dict[str, Any]) -> str:
    """What runs when a folder is loaded, in words."""
    n = len(manifest["packages"])
    program = f"the compiled program {PROGRAM}"
    return f"{program} and the machine code of {n} packages" if n else program


def _manifest(place: Path) -> dict[str, Any]:
    """What `save` noted. Raises ValueError where that is missing or no longer readable."""
    try:
        found = json.loads((place / MANIFEST).read_text())
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']}")
        expected = {"versions": dict, "packages": list, "functions": dict, "sha256": dict}
        expected |= {"handler": str, "processor": object}
        if strange := [k for k, kind in expected.items() if not isinstance(found[k], kind)]:
            raise KeyError(*strange)
        files = [found["handler"], *found["packages"], *found["sha256"]]
        texts = [*files, *found["versions"], *found["versions"].values(), *found["sha256"].values()]
        if not {*map(type, texts)} <= {str} or any(Path(f).name != f or f == ".." for f in files):
            raise ValueError("names that are none of files in it")
        return found
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise _altered(place, f"{type(error).__name__}: {error}") from error


def _check_home(place: Path, manifest: dict[str, Any]) -> None:
    """Raises ValueError for other versions, and for a processor that lacks something."""
    for name, expected in manifest["versions"].items():
        found = version(name)
        if found != expected:
            do = f"install {name}=={expected}, or export it again here"
            raise ValueError(message(f"{name} {expected}, as {place} was written with", found, do))
    if lacking := folders.lacking(manifest["processor"]):
        do = "export it again on a machine of this kind"
        expected = f"a processor with all that the code in {place} may use"
        raise ValueError(message(expected, f"one without {', '.join(lacking[:8])}", do))


def _check_file(path: Path, expected: str) -> None:
    """Raises ValueError for a file that is missing or was altered."""
    try:
        found = folders.sha256(path)
    except OSError as error:
        raise _altered(path.parent, str(error)) from error
    if found != expected:
        raise _altered(path.parent, f"another {path.name}")


def _altered(place: Path, got: str) -> ValueError:
    """The error for a folder that is not what was written."""
    do = "copy the folder again as a whole, or export it again"
    return ValueError(message(f"a folder as bridge.native.save wrote it at {place}", got, do))
