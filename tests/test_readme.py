"""Examples of README, of the documentation and of docstrings run as shown; the files, links and
targets that they name are there."""

import contextlib
import doctest
import importlib
import io
import re
import subprocess
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {p.name: p.read_text() for p in sorted((ROOT / "docs").glob("*.md"))}
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.S)
BLOCKS = [
    pytest.param(block, id=f"{name}-{i}")
    for name, text in PAGES.items()
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", text, re.S))
]
MODULES = sorted(
    ".".join(p.relative_to(ROOT).with_suffix("").parts)
    for d in ("bridge", "jax_side", "torch_side")
    for p in (ROOT / d).rglob("*.py")
    if p.name != "__init__.py"
)


@pytest.fixture
def as_a_new_user():
    """x64 is off, and what an example does to it ends with its test."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", False)
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.mark.usefixtures("as_a_new_user")
def test_the_first_example_has_eight_lines_and_prints_what_it_says():
    lines = [line for line in EXAMPLES[0].splitlines() if line.strip()]
    assert len(lines) == 8
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(EXAMPLES[0], {})
    assert out.getvalue().strip() == lines[-1].split("# ")[1].strip()


@pytest.mark.usefixtures("as_a_new_user")
@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_of_the_documentation_runs(block):
    scope = {}
    exec(block, scope)
    if "init" in scope:
        state, e0 = scope["init"](
            jax.random.key(0),
            jax.numpy.asarray(scope["atoms"].get_scaled_positions(), "float32"),
            kT=0.02,
            mass=30.0,
        )
        _, e1 = scope["step"](state)
        assert float(e0) < -20 and abs(float(e1 - e0)) < 1


@pytest.mark.usefixtures("as_a_new_user")
@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_the_house_names_every_file():
    for name in MODULES:
        bank, *rooms, file = name.split(".")
        section = PAGES["house.md"].split(f"## {'/'.join([bank, *rooms])}/\n")[1].split("##")[0]
        assert f"`{file}.py`" in section, name


def test_the_readme_fits_on_two_screens():
    assert len(README) <= 9000


@pytest.mark.parametrize("page", ["../README.md", "../CONTRIBUTING.md", *PAGES])
def test_links_lead_to_files(page):
    path = ROOT / "docs" / page
    for link in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / link).exists(), link


def test_the_pages_are_on_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text()
    assert all(f": {name}\n" in menu for name in PAGES)


def test_files_that_contributors_are_told_of_are_there():
    named = re.findall(
        r"`((?:bridge|jax_side|torch_side|tests|docs|benchmarks)/[\w/]+\.\w+)`",
        (ROOT / "CONTRIBUTING.md").read_text(),
    )
    assert len(named) > 20 and all((ROOT / name).exists() for name in named)


def test_make_help_lists_every_target():
    listed = subprocess.run(
        ["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert targets and all(f"make {t} " in listed for t in targets)


def test_the_commands_of_the_readme_are_targets():
    assert set(re.findall(r"`?make ([a-z-]+)", "".join([README, *PAGES.values()]))) <= set(
        re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    )
