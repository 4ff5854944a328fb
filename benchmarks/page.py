"""What `make bench-full` has found, to read: a table for the terminal, and docs/benchmarks.md with a
picture for each table."""

from __future__ import annotations

import fnmatch
import io
import re
from pathlib import Path

from benchmarks.tables import TABLES

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE, FIGURES = DOCS / "benchmarks.md", DOCS / "figures"
SIZED = re.compile(r"(.*?),? ?(\d[\d,]*) (atoms|systems)$")  # a case that is one size of several

HOST = "the host lane is `jax.pure_callback`, for devices without another: JAX copies what goes in and comes out"
TORCH_RUNS = "torch does the same work, and the way through XLA is added to it"
# Rows in which a peer or torch alone is ahead, by name or pattern; the first that fits is told.
REASONS = {
    "shapes/*/host*": "a program is traced and compiled for each shape; call without jit, or with `buckets=`",
    "startup/*": "both frameworks are imported, where the other needs one of them, or less of them",
    "*/host": HOST,
    "*/*, host": HOST,
    "calls/an empty call in a loop/ffi": "inputs are lent and checked and exceptions carried home, which nobody does by hand",
    "calls/sin of 64 numbers in a loop/native": "the compiled call is as short as torch's own, and the loop of XLA is added to it",
    "calls/sin of 64 numbers in a loop/ffi": TORCH_RUNS,
    "calls/sin of 64 numbers from Python/*": "an eager call goes through JAX's primitive and its rules, a jitted one through its dispatch, which alone takes more than torch's operation",
    "calls/energy*of 64 atoms/ffi*": TORCH_RUNS + "; by hand nothing is checked",
    "calls/a training step*": "the loss is in JAX and needs the outputs, so that the forward runs twice (docs/performance.md)",
    "in_torch/2 sin(x) of*": "a jit dispatch on memory that JAX has not made takes longer than torch's two operations; the rest is Python that looks",
    "in_torch/2 sin(x) under*": "torch fuses its own operations, and a program of XLA's stays a call",
    "in_torch/energy*": "two jit dispatches, each with memory lent and taken, beside operations as small",
    "in_torch/a training step*": "two jit dispatches, each with memory lent and taken, beside operations as small",
    "in_torch/64 numbers to torch/*": "a deleted array, several devices and x64 are looked for first",
    "models/CHGNet*/native": "each atom has 100 slots for angles, of which this crystal fills 15; `CHGNet(angles_per_atom=...)` sets them",
    "models/*/ffi": "torch runs the model eagerly, as it is, and the way through XLA is added; what is compiled is the native lane",
    "models/*/native": "both are Inductor's code; here a tenth of the slots of edges is unused, and neighbours are found anew",
    "engines/*/jax-md, ffi": TORCH_RUNS,
    "engines/*pair*/*": "the other's own Lennard-Jones is a cheaper function, on all pairs or on a list that it keeps; here neighbours are found in each step",
    "engines/*/*bridge's*": TORCH_RUNS,
    "engines/*/jax-md, native": "the neighbours are found anew in each step, in a call into torch",
    "batches/*/ffi, one by one": "a call for each system, where one graph holds them all",
    "batches/*/ffi": "the structures are made one graph, checked, at each call; by hand that was done before",
    "batches/*/native": "neighbours are found one system after another",
    "second/Hessian*": "rows come one after another, in memory that grows with N; torch batches them, in memory that grows with N^2",
    "second/H v*, second.hvp": "the forward is recorded in a call of its own kind, with all checks; by hand the list is given",
    "second/H v*": "jvp of a gradient takes two backward passes more than its pullback, which second.hvp takes",
    "million/torch in JAX, time/*": TORCH_RUNS,
    "million/torch in JAX, peak memory/*": "XLA holds its own inputs and outputs, and the values of edges are checked",
    "million/JAX in torch*": "the pair of programs for forward and backward keeps what the backward needs, where one program fuses both",
    "shapes/torch in JAX/bridge, eager": "the outputs' types are found with fake tensors for each new shape",
    "shapes/torch in JAX/bridge, jitted": "a program is traced and compiled for each shape; call without jit",
    "shapes/JAX in torch/bridge": "XLA compiles a program for each shape; `buckets=` avoids that",
    "shapes/JAX in torch/bridge, buckets=": "padding and cutting are operations of their own, and a jit dispatch takes longer than the sum",
    "threads/*/ffi*": TORCH_RUNS,
    "threads/*/bridge.to_torch*": "two jit dispatches, where one program gives value and gradient",
}  # fmt: skip


def reason(row: dict) -> str:
    """Why another is ahead in this row; "" where nobody has said so yet."""
    return next(
        (why for like, why in REASONS.items() if fnmatch.fnmatchcase(row["name"], like)), ""
    )


def unexplained(rows: list[dict]) -> list[dict]:
    return [r for r in rows if r.get("behind") and not reason(r)]


def report(rows: list[dict]) -> str:
    """The rows that are behind without a reason."""
    found = [f"  {r['name']}: {versus(r, r['behind'][0])}" for r in unexplained(rows)]
    return "\n".join(["behind, without a reason:", *found]) if found else ""


def versus(row: dict, other: str) -> str:
    """The ratio to another, with its quartiles."""
    low, middle, high = row["ratios"][other]
    return f"{middle:.3g} ({low:.3g} to {high:.3g}) of {other}"


def text_table(rows: list[dict]) -> str:
    """All rows, for the terminal."""
    width = max((len(r["name"]) for r in rows), default=0) + 1
    return "\n".join(f"{r['name']:{width}}{figures(r)}" for r in rows)


def figures(row: dict) -> str:
    if "median" not in row:
        return f"  {row['status']}: {row['error']}"
    told = "   ".join(versus(row, b) for b in row["baselines"])
    return f"{row['median']:11.4g} {row['unit']:3} {spread(row):24} {told}"


def spread(row: dict) -> str:
    return "{:.3g} to {:.3g}".format(*row["quartiles"])


def cell(text: str) -> str:
    """Text that a table of Markdown takes as it is."""
    return text.replace("|", "\\|").replace("_", "\\_").replace("*", "\\*")


def split(row: dict) -> tuple[str, str, str]:
    """(table, case, variant) of a row; a table that ended early has no more than its name."""
    return (*row["name"].split("/", 2), "", "")[:3]


def line(row: dict, first: bool) -> str:
    """A row of the page."""
    _, case, variant = split(row)
    head = f"| {cell(case) if first else ''} | {cell(variant)} |"
    if "median" not in row:
        return f"{head} | | {row['status']}: {cell(row['error'])} |"
    told = cell(versus(row, row["baselines"][0])) if row["baselines"] else ""
    behind = ", ".join(f"{row['ratios'][b][1]:.3g} of {b}" for b in row["behind"])
    why = f"{cell(behind)}: {reason(row) or 'without a reason yet'}" if behind else ""
    return f"{head} {row['median']:.4g} {row['unit']} ({spread(row)}) | {told} | {why} |"


def section(name: str, rows: list[dict]) -> str:
    title, text = TABLES[name]
    lines, last = [], None
    for row in rows:
        case = split(row)[1]
        lines.append(line(row, case != last))
        last = case
    head = "| | | median (quartiles) | ratio (quartiles) | who is ahead, and why |\n|---|---|---|---|---|"
    picture = f"![{title}](figures/bench-{name}.png)"
    return "\n".join([f"## {title}\n", text + "\n", picture + "\n", head, *lines])


HEAD = """# Benchmarks

`make bench-full` measures these tables, each in a process of its own, in which the variants of a
case take turns, and writes this page. A ratio is the median over rounds of this / that in the same
round: below 1, this one is ahead. Only ratios travel from one machine to another. A package that
fails is told with its error. `make bench-compare OLD=... NEW=...` compares two files of results.
"""


def text(rows: list[dict]) -> str:
    """The page, from the rows of a file of results; without rows it says that there are none."""
    if not rows:
        return HEAD + "\nNothing was measured yet.\n"
    where, tables = rows[0], {name: [] for name in TABLES}
    for row in rows[1:]:
        tables[split(row)[0]].append(row)
    versions = ", ".join(f"{package} {v}" for package, v in where["versions"].items())
    told = (
        f"\n{where['date']}, {where['cpu']}, {where['cores']} cores, {where['threads']} thread of "
        f"torch, load {where['load']:.2f} at the start, Python {where['python']}; {versions}.\n"
    )
    return "\n".join(
        [HEAD, told.lstrip(), *(section(k, found) + "\n" for k, found in tables.items() if found)]
    )


def write(rows: list[dict], page: Path = PAGE, figures: Path = FIGURES) -> None:
    """The page and its pictures."""
    page.write_text(text(rows))
    for name, (title, _) in TABLES.items():
        if found := [r for r in rows[1:] if split(r)[0] == name and "median" in r]:
            draw(title, found, figures / f"bench-{name}.png")


def draw(title: str, rows: list[dict], path: Path) -> None:
    """A panel for each case, with a mark for each variant; or for each family of cases that differ in size:
    a line for each variant."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    panels, sizes = {}, {}
    for case in dict.fromkeys(split(row)[1] for row in rows):
        if sized := SIZED.match(case):
            sizes.setdefault(sized[1] or sized[3], {})[case] = int(sized[2].replace(",", ""))
    families = {case: family for family, of in sizes.items() if len(of) > 1 for case in of}
    for row in rows:
        _, case, variant = split(row)
        family = families.get(case)
        x = sizes[family][case] if family else 0
        panels.setdefault(family or case, {}).setdefault(variant, []).append((x, row))
    columns = 2 if len(panels) > 1 else 1
    height = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        height, columns, figsize=(6 * columns, 2.9 * height), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (case, variants) in zip(axes.flat, panels.items()):
        (lines if case in families.values() else dots)(axis, variants)
        axis.set_title(case, fontsize=9)
        axis.tick_params(labelsize=7)
    figure.suptitle(title, fontsize=10)
    save(figure, path)
    plt.close(figure)


def lines(axis, variants: dict) -> None:
    for variant, points in variants.items():
        xs, rows = zip(*points)
        medians = [r["median"] for r in rows]
        off = [[abs(r["quartiles"][k] - r["median"]) for r in rows] for k in (0, 1)]
        style = "o-" if rows[0]["ours"] else "s--"
        axis.errorbar(xs, medians, off, fmt=style, ms=3, lw=1, label=variant)
    axis.set(xscale="log", yscale="log")
    axis.set_ylabel(rows[0]["unit"], fontsize=8)
    axis.legend(fontsize=6)


def dots(axis, variants: dict) -> None:
    for name, ((_, row),) in variants.items():
        off = [[abs(quartile - row["median"])] for quartile in row["quartiles"]]
        style = dict(fmt="o", ms=4, color="C0") if row["ours"] else dict(fmt="s", ms=4, color="0.5")
        axis.errorbar([row["median"]], [name], xerr=off, **style)
    axis.invert_yaxis()
    axis.grid(alpha=0.3)
    axis.set(xscale="log")
    axis.set_xlabel(row["unit"], fontsize=8)


def save(figure, path: Path) -> None:
    """As a small PNG of few colours."""
    from PIL import Image

    whole = io.BytesIO()
    figure.savefig(whole, dpi=80)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(whole).convert("RGB").quantize(32).save(path, optimize=True)
