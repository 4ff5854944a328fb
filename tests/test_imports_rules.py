"""The import rules (docs/house.md): each is a function of a directory, true of this tree and
false of a planted one."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import bridge

ROOT = Path(__file__).resolve().parents[1]
BANKS = ("bridge", "jax_side", "torch_side")
FLOOR = {
    "bridge.errors",
    "bridge.function",
    "bridge.recipes",
    "bridge.trust",
    "bridge.writing",
    "bridge.failures",
    "bridge.contract",
    "bridge.call",
    "bridge.card",
    "bridge.conventions",
    "bridge.atoms",
    "bridge.archive",
    "bridge.native.folder",
    "bridge.native.handler",
}
JAX = {"jax", "jaxlib", "jax_side"}
TORCH = {"torch", "torch_side"}
STOREYS = {"calls": 0, "potentials": 1, "montecarlo": 2, "properties": 2, "engines": 3, "models": 3}
ATTIC = 4  # testing.py and doctor.py of a bank see all of it
PACKAGES = {
    *BANKS,
    "bridge.drivers",
    "bridge.join",
    "bridge.native",
    "bridge.testing",
    *(f"{b}.{room}" for b in BANKS[1:] for room in STOREYS),
}
SCIENCE = {"numpy", "ml_dtypes"}
SHAPES = {"jaxtyping"}  # in annotations; it loads numpy and no framework
# what a file may import beyond its bank; an adapter of an engine or a model: the package of its own
# name
OWN = {
    "bridge/drivers/ipi.py": {"ase"},
    "jax_side/calls/lanes.py": {"jax_tvm_ffi", "tvm_ffi"},
    "jax_side/models/nequip.py": {"jax_md", "jraph"},  # jax-md depends on jraph
    "torch_side/potentials/neighbors.py": {"vesin"},
    "torch_side/models/d3.py": {"torch_dftd"},
    "torch_side/models/sevennet.py": {"sevenn"},
}
# It builds the library in C++, with torch's tools and JAX's headers: it may ask both, in a function.
BUILDER = "bridge/native/handler.py"
# What a file may import at module level.
AT_TOP = {f"bridge/testing/{name}.py": {"hypothesis"} for name in ("__init__", "strategies")}
ADAPTED = set().union(
    *OWN.values(),
    "jax_md chgnet torchani mace franken ase torch_sim nvalchemi kups phonopy".split(),
)
DYNAMIC = ("import_module", "__import__", "find_spec", "LazyLoader")


def files(root):
    return {
        p.relative_to(root).as_posix(): p for d in BANKS for p in sorted((root / d).rglob("*.py"))
    }


def imports(path, name):
    """(module, True where only a call of a function imports it) for every import of a file, dynamic
    ones included. Types of bridge/ may name whatever they like, for nothing of it is loaded."""
    found = []

    def visit(node, inside):
        if name.startswith("bridge/") and is_for_types(node):
            return
        if isinstance(node, ast.Import):
            found.extend((a.name, inside) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join([*name.split("/")[: -node.level], *filter(None, [node.module])])
                if node.level
                else node.module
            )
            deeper = base in PACKAGES  # there a name is a module of its own
            found.extend((f"{base}.{a.name}" if deeper else base, inside) for a in node.names)
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "attr", getattr(node.func, "id", "")) in DYNAMIC
        ):
            found.extend(
                (n.value, inside)
                for n in ast.walk(node)
                if isinstance(n, ast.Constant) and isinstance(n.value, str)
            )
        for child in ast.iter_child_nodes(node):
            visit(
                child,
                inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)),
            )

    visit(ast.parse(path.read_text()), False)
    return found


def is_for_types(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def dotted(file):
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def top(module):
    return module.split(".")[0]


# The rules: a directory -> the files that break them.


def jax_side_imports_torch(root):
    return [
        f
        for f, p in files(root).items()
        if f.startswith("jax_side/") and TORCH & {top(m) for m, _ in imports(p, f)}
    ]


def torch_side_imports_jax(root):
    return [
        f
        for f, p in files(root).items()
        if f.startswith("torch_side/") and JAX & {top(m) for m, _ in imports(p, f)}
    ]


def bank_imports_beyond_the_floor(root):
    banks = [(f, p) for f, p in files(root).items() if not f.startswith("bridge/")]
    return [
        f for f, p in banks if any(top(m) == "bridge" and m not in FLOOR for m, _ in imports(p, f))
    ]


def joins_outside_of_join(root):
    found = [
        f
        for f, p in files(root).items()
        if (tops := {top(m) for m, _ in imports(p, f)}) & JAX and tops & TORCH
    ]
    return [f for f in found if not f.startswith("bridge/join/") and f != BUILDER]


def floor_imports_third_parties(root):
    floor = [(f, p) for f, p in files(root).items() if dotted(f) in FLOOR]
    return [
        f
        for f, p in floor
        if any(
            m not in FLOOR and top(m) not in sys.stdlib_module_names
            for m, inside in imports(p, f)
            if not (f == BUILDER and inside)
        )
    ]


def third_parties_outside_their_adapter(root):
    base = JAX | TORCH | SCIENCE | SHAPES | {"bridge"} | set(sys.stdlib_module_names)
    own = {
        f: OWN.get(f, {p.stem} if p.parent.name in ("engines", "models") else set())
        for f, p in files(root).items()
    }
    allowed = lambda f, m, inside: (
        top(m) in base | AT_TOP.get(f, set()) or (inside and top(m) in own[f])
    )
    return [
        f
        for f, p in files(root).items()
        if not all(allowed(f, m, inside) for m, inside in imports(p, f))
    ]


def storey(module):
    """Of a file or module of a bank; None for what is in none."""
    bank, *rooms = module.split(".")
    if bank not in BANKS[1:] or not rooms:
        return None
    return STOREYS.get(rooms[0], ATTIC)


def imports_from_a_higher_storey(root):
    def climbs(file, module):
        above, here = storey(module), storey(dotted(file))
        return above is not None and top(module) == top(file.replace("/", ".")) and above > here

    banks = {f: p for f, p in files(root).items() if not f.startswith("bridge/")}
    return [f for f, p in banks.items() if any(climbs(f, m) for m, _ in imports(p, f))]


def circles(root):
    """Files that import one another, directly or by others, when they are loaded or later."""
    found = files(root)
    modules = {dotted(f): f for f in found}
    arrows = {
        modules[name]: {modules[m] for m, _ in imports(found[f], f) if m in modules}
        for name, f in modules.items()
    }

    def reached(file):
        seen, todo = set(), [file]
        while todo:
            for nearer in arrows[todo.pop()] - seen:
                seen.add(nearer)
                todo.append(nearer)
        return seen

    ordered = [f for f in arrows if storey(dotted(f)) is not None or f.startswith("bridge/join/")]
    return [f for f in ordered if f in reached(f)]


RULES = {  # rule: (file, source) pairs, each of which breaks it
    jax_side_imports_torch: [
        ("jax_side/a.py", "import torch.nn as nn"),
        ("jax_side/b.py", "def f():\n    from torch_side.calls.export import run"),
        ("jax_side/c.py", "import importlib\nm = importlib.import_module('torch')"),
        ("jax_side/d.py", "if TYPE_CHECKING:\n    import torch"),
    ],
    torch_side_imports_jax: [
        ("torch_side/a.py", "from jax import numpy"),
        (
            "torch_side/models/b.py",
            "class A:\n    def f(self):\n        import jax_side.calls.lanes",
        ),
        ("torch_side/c.py", "if True:\n    from ..jax_side import lanes"),
    ],
    imports_from_a_higher_storey: [
        ("jax_side/calls/a.py", "from jax_side.potentials import strain"),
        ("torch_side/potentials/b.py", "def f():\n    import torch_side.models.mace"),
        ("torch_side/montecarlo/c.py", "from torch_side.testing import run"),
    ],
    circles: [
        ("jax_side/calls/a.py", "def f():\n    from jax_side.calls import a"),
        ("bridge/join/calls.py", "from . import calls"),
    ],
    bank_imports_beyond_the_floor: [
        ("jax_side/a.py", "from bridge import to_jax"),
        ("torch_side/b.py", "import bridge.join.calls"),
    ],
    joins_outside_of_join: [
        ("bridge/testing/__init__.py", "import jax\ndef f():\n    import torch"),
        ("bridge/__init__.py", "import jax_side, torch_side"),
        ("bridge/atoms.py", "if True:\n    import jax_side, torch_side"),
    ],
    floor_imports_third_parties: [
        ("bridge/errors.py", "import numpy"),
        ("bridge/function.py", "from bridge.join.calls import to_jax"),
        ("bridge/failures.py", "from . import join"),
    ],
    third_parties_outside_their_adapter: [
        ("torch_side/models/mace.py", "import mace"),
        (
            "torch_side/models/mace.py",
            "try:\n    from mace.tools import x\nexcept ImportError: pass",
        ),
        ("torch_side/models/chgnet.py", "def f():\n    import mace"),
        ("jax_side/potentials/potential.py", "def f():\n    import jax_md"),
        ("bridge/join/calls.py", "class A:\n    import tvm_ffi"),
        ("bridge/testing/checks.py", "import hypothesis"),
        ("torch_side/testing.py", "def f():\n    from hypothesis import given"),
    ],
}
PLANTED = [
    pytest.param(rule, f, s, id=f"{rule.__name__}-{i}")
    for rule, twins in RULES.items()
    for i, (f, s) in enumerate(twins)
]


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.__name__)
def test_rule_x_this_tree(rule):
    assert len(files(ROOT)) > 10
    assert rule(ROOT) == []


@pytest.mark.parametrize("rule, file, source", PLANTED)
def test_rule_x_planted_tree(rule, file, source, tmp_path):
    good = {
        "bridge/join/potentials.py": "import jax, torch",
        "jax_side/engines/jax_md.py": "import jax\ndef f(): import jax_md",
    }
    for name, text in {**good, file: source}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert rule(tmp_path) == [file]
    (tmp_path / file).write_text("from bridge.errors import message")
    assert rule(tmp_path) == []


def test_a_circle_of_two_files_is_seen(tmp_path):
    for name, other in ("a", "b"), ("b", "a"):
        path = tmp_path / f"torch_side/calls/{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"def f():\n    from torch_side.calls import {other}")
    assert circles(tmp_path) == ["torch_side/calls/a.py", "torch_side/calls/b.py"]


def test_types_of_bridge_may_name_both_banks(tmp_path):
    (tmp_path / "bridge").mkdir()
    (tmp_path / "bridge/contract.py").write_text("if TYPE_CHECKING:\n    import jax, torch, ase")
    assert not any(rule(tmp_path) for rule in RULES)


def test_names_of_bridge_x_homes_and_types():
    source = ast.parse((ROOT / "bridge/__init__.py").read_text())
    typed = next(filter(is_for_types, source.body)).body
    home = lambda node, a: f"bridge.{a.name}" if node.module == "bridge" else node.module
    assert {a.name: home(node, a) for node in typed for a in node.names} == bridge._HOMES
    assert sorted(bridge.__all__) == sorted(bridge._HOMES)


def python(code):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def modules(*banks):
    """Dotted names of everything in the banks, but __main__."""
    return [n for n in map(dotted, files(ROOT)) if top(n) in banks and not n.endswith("__main__")]


LOADED = "import sys, json, importlib\nfor m in {}: importlib.import_module(m)\nprint(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"


@pytest.mark.parametrize(
    "names, forbidden",
    [
        (["bridge", *sorted(FLOOR)], JAX | TORCH | SCIENCE | {"hypothesis"}),
        (modules("jax_side"), TORCH | ADAPTED),
        (modules("torch_side"), JAX | ADAPTED),
        (modules(*BANKS), ADAPTED),
    ],
    ids=["bridge", "jax_side", "torch_side", "all"],
)
def test_loaded_modules_x_import(names, forbidden):
    loaded = set(python(LOADED.format(names)))
    assert {top(n) for n in names} <= loaded
    assert not loaded & forbidden


def test_backends_x_import():
    """JAX is not started by an import: the number of CPU devices can be chosen after it."""
    after = "import jax; jax.config.update('jax_num_cpu_devices', 3); print(len(jax.devices()))"
    assert python(LOADED.format(modules(*BANKS)) + "\n" + after) == 3


STATE = """
import importlib, json, os, sys, numpy, jax, torch
def state():
    of_torch = [getattr(torch, "get_" + k)() for k in ("default_dtype", "num_threads", "num_interop_threads", "float32_matmul_precision")]
    of_torch += [torch.is_grad_enabled(), torch.get_default_device(), torch.are_deterministic_algorithms_enabled()]
    return dict(env=dict(os.environ), jax=repr(sorted(jax.config.values.items())), torch=repr(of_torch), numpy=repr(numpy.geterr()))
before = state()
{change}
for m in {names}: importlib.import_module(m)
print(json.dumps([k for k, v in state().items() if v != before[k]]))
"""


@pytest.mark.parametrize(
    "change, seen",
    [
        ("", []),
        (
            "os.environ['OMP_NUM_THREADS'] = '7'; jax.config.update('jax_enable_x64', True); "
            "torch.set_num_threads(3)",
            ["env", "jax", "torch"],
        ),
    ],
    ids=["nothing", "planted"],
)
def test_global_state_x_import(change, seen):
    assert python(STATE.format(change=change, names=["bridge", *modules(*BANKS)])) == seen
