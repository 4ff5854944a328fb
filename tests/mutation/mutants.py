"""The mutants of a file: cosmic-ray's operators, and one that removes a statement.

Of cosmic-ray's 132 replacements of a binary operator and 56 of a comparison those in KEPT are made:
one or two for each operator, so that a `+` doesn't weigh eleven times as much as an `if`. Its
operators for variables are left out, as their mutants are random. What can't be told from the
original is left out, too: annotations, blocks of TYPE_CHECKING, `__all__`, what is inside the
f-strings of an error text (`message(...)`), what is no Python, and what is the same Python as the
original.
"""

from __future__ import annotations

import ast
import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Example, Operator
from cosmic_ray.operators.provider import OperatorProvider
from parso.python.tree import Keyword

from tests.mutation.rooms import ROOT

PAIRS = """Add_Sub Sub_Add Mul_Div Div_Mul FloorDiv_Mul Mod_FloorDiv Pow_Mul BitOr_BitAnd BitAnd_BitOr
    BitXor_BitOr LShift_RShift RShift_LShift"""
COMPARISONS = """Eq_NotEq NotEq_Eq Lt_LtE Lt_Gt LtE_Lt LtE_Gt Gt_GtE Gt_Lt GtE_Gt GtE_Lt Is_IsNot
    IsNot_Is"""
KEPT = {
    *(f"ReplaceBinaryOperator_{pair}" for pair in PAIRS.split()),
    *(f"ReplaceComparisonOperator_{pair}" for pair in COMPARISONS.split()),
    *(f"ReplaceUnaryOperator_Delete_{name}" for name in ("USub", "Invert", "Not")),
    *"AddNot ReplaceTrueWithFalse ReplaceFalseWithTrue ReplaceAndWithOr ReplaceOrWithAnd".split(),
    *"ReplaceBreakWithContinue ReplaceContinueWithBreak ExceptionReplacer NumberReplacer".split(),
    *"RemoveDecorator ZeroIterationForLoop".split(),
}
Place = tuple[tuple[int, int], tuple[int, int]]  # (line, column) of the start, and of the end


class RemoveStatement(Operator):
    """Removes a call whose result nobody takes, and an assignment to an attribute or to an item."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
        """Where the statement lies, if it is one."""
        if node.type == "simple_stmt":
            target, ends = node.children[0], ("(",)
            if target.type == "expr_stmt":
                target, ends = target.children[0], (".", "[")
            last = target.children[-1] if target.type in ("atom_expr", "power") else target
            if last.type == "trailer" and last.children[0].value in ends:
                yield node.start_pos, node.children[0].end_pos

    def mutate(self, node: Any, index: int) -> Any:
        """Returns the statement `pass`."""
        first = node.get_first_leaf()
        node.children[0] = Keyword("pass", node.start_pos, first.prefix)
        return node

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        """As cosmic-ray's own operators give them."""
        return Example("f(x)\ny = g(x)", "pass\ny = g(x)"), Example("a.b = c", "pass")


_CORE = OperatorProvider()
OPERATORS = {**{name: _CORE[name]() for name in sorted(KEPT)}, "RemoveStatement": RemoveStatement()}


@dataclass(frozen=True)
class Mutant:
    """One change of one file: by which operator, its how manieth place in the file, in which line, inside
    of which function ("" for none), and the first line that differs, before and after."""

    file: str
    operator: str
    occurrence: int
    line: int
    inside: str
    before: str
    after: str
    source: str

    @property
    def key(self) -> str:
        """A name that another text of the file would not have."""
        return hashlib.sha256(f"{self.file} {self.source}".encode()).hexdigest()[:16]


class File:
    """A file, and the places in it that a mutant can differ in: (line, operator, its how manieth)."""

    def __init__(self, name: str, text: str) -> None:
        self.name, self.text = name, text
        self.tree = ast.parse(text)
        self.places = sorted(self._places())

    def _places(self) -> Iterator[tuple[int, str, int]]:
        out = list(_left_out(self.tree))
        sums = [_ends(n) for n in ast.walk(self.tree) if isinstance(n, ast.BinOp | ast.AugAssign)]
        within = lambda place, ranges: any(first <= place < last for first, last in ranges)
        nodes = list(ast_nodes(get_ast(self.text)))
        for name, operator in OPERATORS.items():
            found = [p for node in nodes for p in operator.mutation_positions(node)]
            for i, (start, _) in enumerate(found):
                is_mark = "BinaryOperator" in name and not within(start, sums)  # f(x, *, y)
                if not is_mark and not within(start, out):
                    yield start[0], name, i

    def mutant(self, place: tuple[int, str, int]) -> Mutant | None:
        """Returns the mutant of a place, None where it is no Python or the same as the original."""
        line, name, i = place
        source = mutate_code(self.text, OPERATORS[name], i)
        try:
            tree = ast.parse(source)
            compile(source, self.name, "exec", dont_inherit=True)
        except SyntaxError:
            return None
        if ast.dump(tree) == ast.dump(self.tree):
            return None
        inside = _function(self.tree, line)
        return Mutant(self.name, name, i, line, inside, *_change(self.text, source), source)


def _function(tree: ast.Module, line: int) -> str:
    """The name of the outermost function that a line lies in."""
    functions = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef))  # outer ones first
    return next((f.name for f in functions if f.lineno <= line <= (f.end_lineno or 0)), "")


def _change(text: str, source: str) -> tuple[str, str]:
    """The first line that differs, before and after."""
    pairs = zip(text.splitlines(), source.splitlines())
    return next((a.strip(), b.strip()) for a, b in pairs if a != b)


def _left_out(tree: ast.Module) -> Iterator[Place]:
    """Where mutants would change nothing, or only words of an error text: (start, end)."""
    for node in ast.walk(tree):
        parts: list[Any] = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            parts += [node.test, *node.body]
        if isinstance(node, ast.Assign) and "id='__all__'" in ast.dump(node.targets[0]):
            parts.append(node)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "message":
            parts += [n for n in ast.walk(node) if isinstance(n, ast.JoinedStr)]
        for part in filter(None, parts):
            yield _ends(part)


def _ends(node: Any) -> Place:
    return (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)


def sample(files: list[str], size: int, seed: int) -> list[Mutant]:
    """Returns `size` mutants of these files, of each file in proportion to how many places it has; all
    of them for 0. A larger sample of the same seed begins with the smaller one."""
    placed = []
    for name in files:
        draw = random.Random(f"{seed} {name}")
        file = File(name, (ROOT / name).read_text())
        places = draw.sample(file.places, len(file.places))
        placed += [((i + draw.random()) / len(places), file, p) for i, p in enumerate(places)]
    placed.sort(key=lambda one: one[0])
    made = (file.mutant(place) for _, file, place in placed)
    return list(islice(filter(None, made), size or None))
