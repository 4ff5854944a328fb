"""Which tests run which statements of the core rooms: `python -m tests.mutation.covering TESTS`.

A trace function, as that of coverage.py, isn't called on the threads of XLA, on which half of the
core runs. So each statement of the core notes itself in a set, which is emptied before each test.
For each test one JSON line is added to build/mutation/covered.jsonl: its name, its seconds, whether
it passed, and the first lines of the statements that ran, its fixtures' among them, by file. Tests
that are there already are left out. What ran in processes that a test started is not known.
"""

from __future__ import annotations

import ast
import builtins
import json
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from tests.mutation.rooms import COVERED, FILES, OUT, ROOT, module_of
from tests.mutation.site.sitecustomize import Changed

HITS = "_mutation_hits"  # the name of the set, among the builtins
NAMES = list(FILES)  # a statement is a number: 10,000 times the place of its file, and its line


class Noting(ast.NodeTransformer):
    """Writes before each statement that it was reached."""

    def __init__(self, file: str) -> None:
        self.first = 10_000 * NAMES.index(file)

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        for name in ("body", "orelse", "finalbody"):
            body = getattr(node, name, None)
            if isinstance(body, list):
                setattr(node, name, [new for old in body for new in self._noted(old)])
        return node

    def _noted(self, statement: ast.stmt) -> list[ast.stmt]:
        if _is_fixed(statement):
            return [statement]
        note = ast.parse(f"{HITS}.add({self.first + statement.lineno})").body[0]
        for node in ast.walk(note):
            ast.copy_location(node, statement)
        return [note, statement]


def _is_fixed(statement: ast.stmt) -> bool:
    """True for what has to stay first: docstrings, and imports from __future__."""
    if isinstance(statement, ast.ImportFrom):
        return statement.module == "__future__"
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def noting(text: str, path: str) -> Any:
    """Returns the code of a file of the core, whose statements note that they were reached."""
    tree = Noting(Path(path).relative_to(ROOT).as_posix()).visit(ast.parse(text))
    return compile(tree, path, "exec", dont_inherit=True)


class Recorder:
    """The plugin of pytest that writes what each test has run."""

    def __init__(self) -> None:
        self.hits: set[int] = set()
        setattr(builtins, HITS, self.hits)
        self.known = {test for test, line in covered().items() if line["passed"]}
        self.failed: set[str] = set()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.nodeid not in self.known]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.passed:
            self.failed.add(report.nodeid)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        self.hits.clear()
        start = time.perf_counter()
        yield
        lines = defaultdict(list)
        for hit in sorted(self.hits):
            lines[NAMES[hit // 10_000]].append(hit % 10_000)
        found = dict(
            test=item.nodeid,
            seconds=round(time.perf_counter() - start, 3),
            passed=item.nodeid not in self.failed,
            lines=lines,
        )
        with open(COVERED, "a") as file:
            file.write(json.dumps(found) + "\n")
        return True


def covered() -> dict[str, dict[str, Any]]:
    """Returns what was recorded until now, by the names of the tests."""
    found: dict[str, dict[str, Any]] = {}
    if COVERED.exists():
        for text in COVERED.read_text().splitlines():
            line = json.loads(text)
            old = found.setdefault(line["test"], line)
            old["passed"] |= line["passed"]
    return found


def main(arguments: list[str]) -> int:
    """Runs pytest with these arguments. What fails, since torch.compile doesn't take the notes, is run
    once more without them."""
    OUT.mkdir(parents=True, exist_ok=True)
    plain = arguments[:1] == ["--plain"]
    if not plain:
        core = {module_of(file) for file in FILES}
        sys.meta_path.insert(0, Changed(core.__contains__, noting))
    recorder = Recorder()
    options = ["-q", "-p", "no:cacheprovider", *arguments[plain:]]
    code = pytest.main(options, plugins=[recorder])
    if recorder.failed and not plain:
        again = [sys.executable, "-m", "tests.mutation.covering", "--plain", "--full"]
        code = subprocess.run([*again, *recorder.failed], cwd=ROOT).returncode
    return code


if __name__ == "__main__":
    # Under its own name, so that pytest's plugins and this program share one module.
    from tests.mutation.covering import main as run

    sys.exit(run(sys.argv[1:]))
