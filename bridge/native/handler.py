"""The one library in C++: built once, found again, loaded without Python's torch.

Standard library only, but for `build`, which asks torch for its compiler flags.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge.errors import message, missing
from bridge.native import folder as folders

if TYPE_CHECKING:
    from bridge.function import Spec

SOURCE = Path(__file__).with_name("handler.cpp")
# the functions of handler.cpp that XLA calls, by platform
TARGETS = {"cpu": "bridge_native_cpu", "cuda": "bridge_native_gpu"}
# error of a call, as its text: key, what is wrong, inputs, text, room for it -> length of the text
Explain = ctypes.CFUNCTYPE(
    ctypes.c_int64,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_void_p,
    ctypes.c_int64,
)


def file_name() -> str:
    """Returns the name of the library for this source and these versions."""
    made_of = [SOURCE.read_text(), version("torch"), version("jaxlib"), sys.platform]
    return f"handler-{hashlib.sha256(' '.join(made_of).encode()).hexdigest()[:16]}.so"


def built() -> Path:
    """Returns the path of the library, which is built where it is missing (10 seconds, once).

    It lies in the folder of packages.

    Raises: RuntimeError without a C++ compiler, and what the compiler says."""
    return folders.placed(folders.chosen(), file_name(), _build)


def _build(path: Path) -> None:
    """Compiles the library by torch's own tools."""
    check_compiler()
    import jax.ffi
    from torch.utils import cpp_extension

    print("bridge: building the native handler (once, some 10 s)", file=sys.stderr, flush=True)
    build = path.parent / "build"
    build.mkdir()
    cpp_extension.load(
        "bridge_native",
        [str(SOURCE)],
        extra_cflags=["-O2"],
        extra_ldflags=["-Wl,--as-needed"],  # not libtorch_python
        extra_include_paths=[jax.ffi.include_dir()],
        build_directory=str(build),
        is_python_module=False,
    )
    shutil.move(build / "bridge_native.so", path)


def check_compiler() -> None:
    """Raises RuntimeError where there is no C++ compiler or no ninja, saying what to install."""
    compiler = os.environ.get("CXX", "g++")
    for tool, do in ((compiler, "apt install g++"), ("ninja", "pip install ninja")):
        beside = Path(sys.executable).with_name(tool)
        if shutil.which(tool) is None and not beside.exists():
            raise RuntimeError(
                message(
                    f'the program {tool} for lane="native"',
                    "no such program",
                    f'install it ({do}), or take lane="ffi", which compiles nothing',
                )
            )


_loaded: list[Library] = []  # one at most: XLA knows one function for each platform


def library(path: Path | None = None) -> Library:
    """Returns the library, loaded once. None stands for the one that `built` gives.

    Raises: ImportError without torch; OSError for a library that does not fit this torch;
    ValueError where this process has loaded another one."""
    if _loaded and path is not None and _loaded[0].path.name != path.name:
        do = "load it in a new process, or export it again here"
        raise ValueError(message(f"the library {_loaded[0].path.name}", path.name, do))
    if not _loaded:
        path = built() if path is None else path
        _load_torch()
        _loaded.append(Library(path))
    return _loaded[0]


class Library:
    """The functions of handler.cpp that Python calls."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.functions = ctypes.CDLL(str(path))
        text, number = ctypes.c_char_p, ctypes.c_int64
        for name, arguments in (
            ("load", [text, text, text, text, ctypes.c_int32, number]),
            ("watch", [text, ctypes.c_void_p]),
        ):
            function = getattr(self.functions, f"bridge_native_{name}")
            function.argtypes, function.restype = arguments, text
        self.functions.bridge_native_drop.argtypes = [text]
        self.functions.bridge_native_drop.restype = None
        self.functions.bridge_native_explain.argtypes = [Explain]
        self.functions.bridge_native_explain.restype = None
        self.functions.bridge_native_end.argtypes = []
        self.functions.bridge_native_end.restype = number

    def target(self, platform: str) -> Any:
        """Returns the function that XLA calls on a platform."""
        return getattr(self.functions, TARGETS[platform])

    def load(
        self,
        key: str,
        path: Path,
        inputs: tuple[Spec, ...],
        outputs: tuple[Spec, ...],
        has_status: bool,
    ) -> None:
        """Loads the package at `path`, which programs call by its key.

        Raises: RuntimeError with torch's own text."""
        at_once = max(os.cpu_count() or 1, 2)  # calls of one package, for several devices
        wrong: bytes | None = b""
        # a torch that takes no folder takes the file
        for place in dict.fromkeys((_unpacked(path), path)):
            texts = [s.encode() for s in (key, str(place), _types(inputs), _types(outputs))]
            wrong = self.functions.bridge_native_load(*texts, has_status, at_once)
            if not wrong:
                break
        if wrong:
            do = "compile it again, in this environment"
            raise RuntimeError(
                message(f"a package that torch can load in {path}", _text(wrong), do)
            )

    def watch(self, key: str, tensor: int) -> None:
        """Makes calls of a package fail once a tensor, given by its `_cdata`, has changed."""
        wrong = self.functions.bridge_native_watch(key.encode(), tensor)
        if wrong:
            raise RuntimeError(message("a package that is loaded", _text(wrong), "load it first"))

    def drop(self, key: str) -> None:
        """Forgets a package."""
        self.functions.bridge_native_drop(key.encode())

    def explain(self, ask: Any) -> None:
        """Sets what is asked for the text of an error."""
        self.functions.bridge_native_explain(ask)

    def end(self) -> int:
        """Makes calls fail from now on, without a word to Python: the process ends. Returns how many
        have failed so."""
        return self.functions.bridge_native_end()


# where packages lie unpacked, by path, size and time of the file, until the process ends
_folders: dict[tuple[str, int, int], tempfile.TemporaryDirectory] = {}


def _unpacked(path: Path) -> Path:
    """Returns a folder with what is in a package; the file itself where it can't be unpacked.

    Code that was loaded once stays mapped until the process ends. torch unpacks a file anew each
    time that it loads it, and so maps it anew; in one folder the same code is found again."""
    try:
        known = path.stat()
        key = str(path), known.st_size, known.st_mtime_ns
        if key not in _folders:
            made = tempfile.TemporaryDirectory(prefix="bridge-", ignore_cleanup_errors=True)
            with zipfile.ZipFile(path) as packed:
                packed.extractall(made.name)
            _folders.setdefault(key, made)
        return Path(_folders[key].name)
    except (OSError, zipfile.BadZipFile):
        return path


def _types(specs: tuple[Spec, ...]) -> str:
    """Types of arrays as handler.cpp reads them."""
    return ";".join(" ".join([s.dtype, *map(str, s.shape)]) for s in specs)


def _text(wrong: bytes) -> str:
    return wrong.decode(errors="replace").strip().splitlines()[0]


def _load_torch() -> None:
    """Loads torch's libraries as a C++ program would, unless Python's torch has done so."""
    if "torch" in sys.modules:
        return
    found = importlib.util.find_spec("torch")
    if found is None or not found.submodule_search_locations:
        raise missing("torch", "programs with compiled torch models in them")
    libraries = Path(found.submodule_search_locations[0]) / "lib"
    for name in ("c10", "torch_cpu", "c10_cuda", "torch_cuda", "torch"):
        path = libraries / f"lib{name}.so"
        if path.exists():
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
