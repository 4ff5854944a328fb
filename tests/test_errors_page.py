"""docs/errors.md has a row for every error that the package raises, and no row for one that it does
not: texts are read from the sources, by AST, and compared with the code spans of the page."""

from __future__ import annotations

import ast
import functools
import itertools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "errors.md").read_text()
SOURCES = tuple(
    (str(p.relative_to(ROOT)), p.read_text())
    for d in ("bridge", "jax_side", "torch_side")
    for p in sorted((ROOT / d).rglob("*.py"))
)
HOLE = "..."
# calls that make an error: the place of the words that a user reads, and what stands before them
MAKERS = {
    "message": (0, ""),
    "missing": (1, "the package ... for "),  # bridge.errors.missing(package, what)
    "Odd": (0, "got "),  # of files: the words after "got"
    "refused": (1, "got "),
}
# Texts that another function returns: by the function they are in and a pattern of the expression.
RETURNED = (
    ("read", r"\bwhys?\b", "foreign"),  # jax_side/montecarlo/exported.py
    ("_check", r"^got$", "spec"),  # bridge/errors.py: a type, in torch_side/montecarlo/files.py
)
# Calls that pass a text on, which is looked at where it is made: function, maker, words in it.
PASSED_ON = (
    ("missing", "message", ""),
    ("refused", "message", ""),
    ("read", "refused", "odd.args"),
    ("load", "refused", "odd.args"),
    ("metadata", "refused", ""),
    ("read", "Odd", "answer['got']"),  # of another process
)


class Module:
    """One source, with what its resolution needs."""

    def __init__(self, path, text):
        self.path, self.tree = path, ast.parse(text)
        self.parents = {
            child: node for node in ast.walk(self.tree) for child in ast.iter_child_nodes(node)
        }

    def above(self, node):
        while node := self.parents.get(node):
            yield node

    def function(self, node):
        """The function that a node is in; the module for what is in none."""
        found = (a for a in self.above(node) if isinstance(a, ast.FunctionDef))
        return next(found, self.tree)

    def bound(self, name, at):
        """What a name may stand for at a node: by the loop around it, else by assignments of its
        function, else by those of the module."""
        for loop in (a for a in self.above(at) if isinstance(a, ast.For)):
            if found := looped(name, loop):
                return found
        function = self.function(at)
        for nodes in (
            list(ast.walk(function)) if function is not self.tree else (),
            self.tree.body,
        ):
            found = []
            for node in nodes:
                if isinstance(node, ast.Assign):
                    for target in node.targets:
                        found += part(name, target, node.value)
                elif isinstance(node, ast.comprehension):
                    found += looped(name, node)
            if found:
                return found
        return []

    def returned(self, name):
        """What the functions of a name return, but for empty texts."""
        return [
            node.value
            for f in ast.walk(self.tree)
            if isinstance(f, ast.FunctionDef) and f.name == name
            for node in ast.walk(f)
            if isinstance(node, ast.Return)
            and node.value is not None
            and getattr(node.value, "value", None) != ""
        ]


def looped(name, loop):
    return [
        found
        for value in getattr(loop.iter, "elts", [loop.iter])
        for found in part(name, loop.target, value)
    ]


def part(name, target, value):
    """What a name gets of a value that is assigned to a target: [] or one."""
    if isinstance(target, ast.Name):
        return [value] if target.id == name else []
    places = [i for i, t in enumerate(getattr(target, "elts", ())) if getattr(t, "id", "") == name]
    values = getattr(value, "elts", None)
    return [values[i] if values else value for i in places]


def called(node):
    if not isinstance(node, ast.Call):
        return ""
    return getattr(node.func, "id", getattr(node.func, "attr", ""))


class Reader:
    """The texts of all errors of some sources."""

    def __init__(self, sources):
        self.modules = [Module(p, text) for p, text in sources.items()]
        self.calls = {}  # by the name of what is called: (call, module)
        for module in self.modules:
            for node in ast.walk(module.tree):
                self.calls.setdefault(called(node), []).append((node, module))

    def errors(self):
        """(where, groups) of each error; a group is a text with HOLE for what varies, and the same
        text with what can be filled in there, in all ways."""
        for module in self.modules:
            for node in ast.walk(module.tree):
                if called(node) in MAKERS:
                    groups = self._made(node, module)
                elif isinstance(node, ast.Raise) and called(node.exc) not in ("", *MAKERS):
                    groups = self._raised(node.exc, module)
                else:
                    continue
                if groups:
                    yield f"{module.path}:{node.lineno}", groups

    def _made(self, node, module):
        """Groups of a call of message and its kin; none where a text is passed on."""
        maker, function = called(node), getattr(module.function(node), "name", "")
        if any((f, m) == (function, maker) and w in ast.unparse(node) for f, m, w in PASSED_ON):
            return []
        if maker == "missing" and not isinstance(node.args[0], ast.Constant):
            return []  # the other function of this name, in bridge/contract.py
        place, before = MAKERS[maker]
        if isinstance(node.args[0], ast.Starred):
            return self._table(node, module)
        argument = node.args[place]
        text = ast.unparse(argument)
        others = [o for f, words, o in RETURNED if f == function and re.search(words, text)]
        groups = self._of(others[0]) if others else self._groups(argument, module)
        return [(before + plain, [before + t for t in full]) for plain, full in groups if plain]

    def _raised(self, error, module):
        """Groups of an exception that is raised with a text of its own, if it has one."""
        groups = self._groups(error.args[0], module) if error.args else []
        return [g for g in groups if g[0] != HOLE]

    def _table(self, node, module):
        """message(*...) of a row of a constant of its module: the first words of each row."""
        names = {n.id for n in ast.walk(module.function(node)) if isinstance(n, ast.Name)}
        tables = [v for n in sorted(names) for v in module.bound(n, module.tree)]
        rows = [r for t in tables if isinstance(t, ast.Tuple) for r in t.elts]
        texts = [r.elts[0].value for r in rows if isinstance(r, ast.Tuple)] or [HOLE]
        return [(t, [t]) for t in (re.sub(r"\{\w+\}", HOLE, t) for t in texts)]

    def _of(self, name):
        """Groups of what the functions of a name return."""
        return [
            group
            for home in self.modules
            for value in home.returned(name)
            for group in self._groups(value, home)
        ]

    def _groups(self, node, module, depth=6):
        """The alternatives of an expression."""
        match node:
            case ast.IfExp():
                nodes = [node.body, node.orelse]
            case ast.Call(func=ast.Attribute(attr="replace", value=text)):
                nodes = [text]
            case ast.Call(func=ast.Name(id=name)) if depth:
                nodes, depth = module.returned(name), depth - 1
            case ast.Name(id=name) if depth:
                nodes = module.bound(name, node)
                passed = [] if nodes else self._passed(name, module.function(node), module)
                if passed:
                    return [g for n, home in passed for g in self._groups(n, home, depth - 1)]
                depth -= 1
            case _:
                nodes = []
        if nodes:
            return [g for n in nodes for g in self._groups(n, module, depth)]
        return [(holes(self._plain(node)), [holes(t) for t in self._full(node, module, depth)])]

    def _plain(self, node):
        """An expression with HOLE for all that is not written out."""
        match node:
            case ast.Constant(value=str(text)):
                return text
            case ast.JoinedStr():
                return "".join(map(self._plain, node.values))
            case ast.BinOp(op=ast.Add()):
                return self._plain(node.left) + self._plain(node.right)
            case _:
                return HOLE

    def _full(self, node, module, depth):
        """The same with names and choices filled in, as far as these are known."""
        match node:
            case ast.JoinedStr():
                return joined(self._full(v, module, depth) for v in node.values)
            case ast.BinOp(op=ast.Add()):
                return joined(self._full(n, module, depth) for n in (node.left, node.right))
            case ast.FormattedValue(value=ast.Name() | ast.IfExp() | ast.Call() as inner) if depth:
                return self._full(inner, module, depth)
            case ast.Name() | ast.IfExp() | ast.Call() if depth:
                found = [t for _, full in self._groups(node, module, depth - 1) for t in full]
                return [HOLE] if HOLE in found else sorted(set(found))
            case _:
                return [self._plain(node)]

    def _passed(self, name, function, module):
        """(node, module) of what callers of a function give as its parameter."""
        names = [a.arg for a in function.args.args] if function is not module.tree else []
        if name not in names:
            return []
        place, private = names.index(name), function.name.startswith("_")
        return [
            (value, home)
            for call, home in self.calls.get(function.name, ())
            if home is module or not private
            for value in [
                *call.args[place : place + 1],
                *(k.value for k in call.keywords if k.arg == name),
            ]
        ]


@functools.cache
def errors(sources):
    """(where, text with HOLE for what varies, text with what is known of that filled in) of all
    errors of ((path, source), ...), without whitespace and backticks."""
    return [
        (where, bare(plain), bare(text))
        for where, groups in Reader(dict(sources)).errors()
        for plain, full in groups
        for text in full
    ]


def joined(parts):
    """All ways to put one text of each part behind another."""
    return ["".join(p) for p in itertools.product(*parts)]


def holes(text):
    """One hole where several meet."""
    return re.sub(r"\.{4,}", HOLE, text)


def bare(text):
    """Without whitespace and backticks."""
    return holes(re.sub(r"[\s`]", "", text))


def rows(page):
    """(line, texts) of each row of a table of the page: the code spans of its first cell."""
    for number, line in enumerate(page.splitlines(), 1):
        if line.startswith("| `"):
            yield number, [bare(t) for t in re.findall(r"`([^`]+)`", line.split(" | ")[0])]


def fits(general, text):
    """True where a text is another one with some of its holes filled."""
    return pattern(general).fullmatch(text) is not None


@functools.cache
def pattern(general):
    return re.compile(".*".join(map(re.escape, general.split(HOLE))))


def says(row, plain, text):
    """True where a row of the page is of a text: the same, or with more holes, but for those words
    that every error of its kind has."""
    return row == text or (fits(plain, row) and fits(row, text))


def without_row(sources, page):
    """Texts that no row of the page says."""
    known = {t for _, texts in rows(page) for t in texts}
    return [
        f"{where}: {text}"
        for where, plain, text in errors(sources)
        if text not in known and not any(says(row, plain, text) for row in known)
    ]


def without_error(sources, page):
    """Texts of rows that no error has."""
    found = errors(sources)
    said = {text for _, _, text in found}
    return [
        f"docs/errors.md:{line}: {row}"
        for line, texts in rows(page)
        for row in texts
        if row not in said and not any(says(row, plain, text) for _, plain, text in found)
    ]


def test_every_error_has_a_row():
    assert not without_row(SOURCES, PAGE)


def test_every_row_is_of_an_error():
    assert not without_error(SOURCES, PAGE)


def test_every_error_has_words():
    types = bare("got ...[...]")  # as bridge.errors.spec writes them
    empty = [
        where
        for where, _, text in errors(SOURCES)
        if text != types and not re.search(r"\w", text.removeprefix("got"))
    ]
    assert not empty


def test_most_of_the_package_was_read():
    assert len(errors(SOURCES)) > 300 and len(list(rows(PAGE))) > 200


PLANTED = (
    (
        "planted.py",
        """
def check(x, what):
    if x.off:
        raise ValueError(message(f"a planted {what} of {x.size}", "none", "take it out"))
    expected, do = "an octarine atom", "look again"
    if x.seen:
        expected, do = f"{'two' if x.many else 'three'} octarine atoms", "look again"
    for name in ("pos", "cell"):
        raise ValueError(message(f"{name} in octarine", "none", do))
    raise ValueError(message(expected, "none", do))

check(1, "potential"), check(2, what="charge")
""",
    ),
)


@pytest.mark.parametrize(
    ("page", "lacking"),
    [
        ("", 7),
        ("| `a planted ... of ...` | why | do |", 5),
        ("| `a planted potential of ...`<br>`pos in octarine` | why | do |", 5),
        ("| `... in octarine` | why | do |\n| `an octarine atom` | why | do |", 4),
        ("| `two octarine atoms` | why | do |\n| `... octarine atoms` | why | do |", 5),
    ],
)
def test_a_planted_error_without_a_row_is_found(page, lacking):
    found = without_row(PLANTED, page)
    assert len(found) == lacking and all(x.startswith("planted.py:") for x in found)
    assert not without_error(PLANTED, page)


@pytest.mark.parametrize("row", ["finite", "... positions", "a finite positions", "finite ..."])
def test_a_stale_row_is_found(row):
    assert len(without_error(SOURCES, PAGE + f"| `{row}` | why | do |\n")) == 1
    lost = without_row(SOURCES, PAGE.replace("`finite positions`", f"`{row}`"))
    assert {x.partition(": ")[2] for x in lost} == {"finitepositions"}


def test_every_row_has_a_reason_and_a_cure():
    for line in PAGE.splitlines():
        if line.startswith("|"):
            cells = [c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]]
            assert len(cells) == 3 and all(cells), line
