"""Which tests are run for a mutant."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable
from itertools import accumulate

from tests.mutation.covering import covered
from tests.mutation.mutants import Mutant
from tests.mutation.rooms import ROOT

# What is recorded: folders and files whose tests reach the core in the process of the test.
REACHING = """tests/calls tests/potentials tests/models/test_static_models.py
    tests/models/test_models_vmap.py""".split()
# Tests that reach a file in processes that they start: of lines that no test reaches in its own.
STARTING = {"jax_side/calls/processes.py": "tests/calls/test_processes.py"}
Timed = tuple[float, str]  # seconds, name of a test
COLLECTING = 0.5  # seconds that the tests of one more file take to be found


class Selection:
    """The tests that reach a mutant's statement, quickest first, by what was recorded.

    A statement of a module or of a class, which runs once, is reached by the tests of the functions that
    name what it defines; the head of a function by those of its body; and where that gives none, a
    statement by all tests of its file (or by those of STARTING). `seconds` are allowed for the first wave, which has one variant of
    each test function, and again for the second, which has others."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._all: set[Timed] = set()
        self._of_line: dict[tuple[str, int], set[Timed]] = defaultdict(set)
        for line in covered().values():
            if line["passed"]:
                self._all.add((line["seconds"], line["test"]))
                for file, lines in line["lines"].items():
                    for n in lines:
                        self._of_line[file, n].add((line["seconds"], line["test"]))
        if not self._of_line:
            raise SystemExit("no test is recorded yet: make mutate ARGS=--record")
        self._trees: dict[str, ast.Module] = {}

    def waves(self, mutant: Mutant) -> tuple[list[Timed], list[Timed]]:
        """Returns the tests of both waves."""
        first, rest = [], []
        functions = set()
        for timed in sorted(self._reaching(mutant)):
            function = timed[1].split("[")[0]
            (rest if function in functions else first).append(timed)
            functions.add(function)
        return self._within(first), self._within(rest)

    def _within(self, tests: list[Timed]) -> list[Timed]:
        """As many as there is time for, of which each file gets the same share."""
        of_file: dict[str, float] = defaultdict(float)  # the time that its tests have taken
        due = []
        for seconds, test in tests:
            file = test.split("::")[0]
            of_file[file] += seconds
            due.append((of_file[file], seconds, test))
        in_turn = [(seconds, test) for _, seconds, test in sorted(due)]
        spent = accumulate(seconds for seconds, _ in in_turn)
        left = max(self.seconds - COLLECTING * len(of_file), 0.5 * self.seconds)
        return [timed for at, timed in zip(spent, in_turn) if at < left] or tests[:1]

    def _reaching(self, mutant: Mutant) -> set[Timed]:
        tree = self._trees.get(mutant.file) or ast.parse((ROOT / mutant.file).read_text())
        self._trees[mutant.file] = tree
        around = [n for n in ast.walk(tree) if isinstance(n, ast.stmt) and _holds(n, mutant)]
        found = self._of(mutant.file, _statements(around, tree))
        if found or mutant.file not in STARTING:
            whole = set().union(*(_lines(f.body) for f in _functions(tree)))
            return found or self._of(mutant.file, whole)
        return {timed for timed in self._all if timed[1].startswith(STARTING[mutant.file])}

    def _of(self, file: str, lines: Iterable[int]) -> set[Timed]:
        return set().union(*(self._of_line.get((file, n), set()) for n in lines))


def _holds(statement: ast.stmt, mutant: Mutant) -> bool:
    """True for the statements that a mutant lies in; decorators belong to what they decorate."""
    start = min(
        (d.lineno for d in getattr(statement, "decorator_list", [])), default=statement.lineno
    )
    end = statement.end_lineno or statement.lineno
    return start <= mutant.line <= end


def _statements(around: list[ast.stmt], tree: ast.Module) -> set[int]:
    """The first lines of the statements that reach a mutant, of the statements that it lies in."""
    inner = max(around, key=lambda s: s.lineno)
    functions = [s for s in around if isinstance(s, ast.FunctionDef)]
    if isinstance(inner, ast.FunctionDef):
        return _lines(inner.body)
    if functions:
        return {inner.lineno}
    if isinstance(inner, ast.ClassDef):
        return set().union(*(_lines(f.body) for f in _functions(inner)))
    targets = getattr(inner, "targets", [getattr(inner, "target", None)])
    names = {n.id for t in targets if t for n in ast.walk(t) if isinstance(n, ast.Name)}
    return set().union(
        *(
            {s.lineno}
            for f in _functions(tree)
            for s in ast.walk(f)
            if isinstance(s, ast.stmt) and s is not f and names & set(_named(s))
        )
    )


def _functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]


def _lines(body: list[ast.stmt]) -> set[int]:
    return {s.lineno for s in body}


def _named(statement: ast.stmt) -> list[str]:
    """Names and attributes in a statement."""
    nodes = list(ast.walk(statement))
    return [n.id for n in nodes if isinstance(n, ast.Name)] + [
        n.attr for n in nodes if isinstance(n, ast.Attribute)
    ]
