"""Puts a mutated source in the place of one module, when Python imports it; nothing on the disk is
changed. With this folder on PYTHONPATH, processes that tests start see the mutant, too.

Standard library only, and nothing of this project: every such process imports it at its start.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any

MODULE, SOURCE = "MUTATION_MODULE", "MUTATION_SOURCE"  # of the environment: a name, a file


class Changed(MetaPathFinder):
    """Finds modules whose name `is_wanted`, with `code(text, path)` in the place of their code."""

    def __init__(
        self, is_wanted: Callable[[str], bool], code: Callable[[str, str], CodeType]
    ) -> None:
        self.is_wanted, self.code = is_wanted, code

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """Returns the module's spec with another loader, None for other modules."""
        spec = PathFinder.find_spec(name, path) if self.is_wanted(name) else None
        if spec is not None and spec.origin is not None:
            spec.loader = _Loader(name, spec.origin, self.code)
        return spec


class _Loader(SourceFileLoader):
    def __init__(self, name: str, path: str, code: Callable[[str, str], CodeType]) -> None:
        super().__init__(name, path)
        self._code = code

    def get_code(self, fullname: str) -> CodeType:
        return self._code(Path(self.path).read_text(), self.path)


def install() -> None:
    """Finds the mutant that the environment names from now on, if it names one."""
    if name := os.environ.get(MODULE):
        source = Path(os.environ[SOURCE])
        code = lambda _, path: compile(source.read_text(), path, "exec", dont_inherit=True)
        sys.meta_path.insert(0, Changed(name.__eq__, code))


install()
