"""What only a machine with a CUDA GPU can tell: `python -m benchmarks.gpu_check`.

Each check (benchmarks/gpu_checks.py, gpu_steps.py, gpu_faults.py) has a process and a time limit of
its own, so that none, not even one that hangs or kills its process, stops or spoils another. The
most important come first. Results go to benchmarks/gpu/<date>-<card>.json as they come; a second run on
the same day and card adds to that file. Nothing is installed: it runs from a checkout by
PYTHONPATH. `--rehearse` runs the same code on a CPU, at small sizes, and writes nothing.

Exit code 0: all passed. 1: some failed, or had no time left. 3: no GPU, so nothing was checked and
nothing is written.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
# by worth: wrong numbers first, then what makes a process die, then how fast it is
ORDER = """pointers stream order_jit order_eager order_arrays order_weights missing_event no_wait potential_no_wait
    numbers jax_potential jax_in_torch side_stream python_errors threads native memory leak out_of_memory kernel_errors imports torch_compile graph
    monte_carlo timing speed sevennet sevennet_native""".split()
LEAST = 10  # seconds that must be left for a check to start


def machine() -> dict:
    """What is here; `cuda` is False unless JAX and torch both see a CUDA GPU."""
    import jax
    import torch

    found = {
        "jax devices": ", ".join(map(str, jax.devices())),
        "torch.cuda": torch.cuda.is_available(),
    }
    if not torch.cuda.is_available() or not (gpus := cuda_devices()):
        return {"cuda": False, **found}
    packages = {p: version(p) for p in ("jax", "jaxlib", "torch", "jax-tvm-ffi", "apache-tvm-ffi")}
    smi = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
    )
    names = {
        "device": gpus[0].device_kind,
        "device in torch": torch.cuda.get_device_name(),
        "nvidia-smi": smi.stdout.strip(),
    }
    return {"cuda": True, **found, **names, "platform": gpus[0].client.platform_version, **packages}


def cuda_devices() -> list:
    import jax

    try:
        return jax.devices("cuda")
    except RuntimeError:
        return []


def attempt(check, gpu) -> dict:
    """The record of one check; one that raises has failed, and keeps the values that it found
    before."""
    start, values, error = time.perf_counter(), {}, None
    try:
        check(gpu, values)
    except Exception as e:
        error = f"{type(e).__name__}: {e}"
    return {
        "status": "failed" if error else "ok",
        "error": error,
        "seconds": round(time.perf_counter() - start, 2),
        "values": values,
    }


def in_child(name: str, timeout: float = 120, rehearse: bool = False) -> dict:
    """The record that a fresh process prints last; a process that dies or hangs is a failed
    check."""
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--child", name]
    try:
        ended = subprocess.run(
            command + ["--rehearse"] * rehearse,
            cwd=HERE.parent,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        return json.loads(ended.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        error = f"no end after {timeout:.0f} s"
    except (IndexError, ValueError):
        error = f"the process ended with code {ended.returncode}: {ended.stderr[-2000:]}"
    return failed(error)


def failed(error: str, status: str = "failed") -> dict:
    return {"status": status, "error": error, "values": {}}


def checks() -> dict:
    """All checks, in the order of ORDER."""
    from benchmarks import gpu_checks, gpu_faults, gpu_steps  # noqa: F401, they list their own

    return {name: gpu_checks.CHECKS[name] for name in ORDER}


def record(name: str, rehearse: bool) -> dict:
    """What a child finds."""
    if name == "machine":
        return machine()
    from benchmarks import gpu_checks

    check = checks()[name]
    if rehearse:
        import jax

        gpu_checks.SIDE, gpu_checks.STEPS, gpu_checks.CALLS = gpu_checks.SMALL
        if check.card:
            return failed("needs a card", "skipped")
        return attempt(check.run, jax.devices("cpu")[0])
    gpus = cuda_devices()
    return attempt(check.run, gpus[0]) if gpus else failed("no CUDA GPU seen by jax")


def report(names, limits, start, minutes: float, keep) -> bool:
    """Starts every check while time is left, says how it went, and hands the results on to `keep`
    each time; True if all passed."""
    results, end = {}, time.monotonic() + 60 * minutes
    for name in names:
        left = end - time.monotonic()
        if left < LEAST:
            results[name] = failed(f"no time left of {minutes:g} minutes", "not run")
        else:
            results[name] = start(name, min(left, limits[name]))
        found = results[name]
        print(f"{name:18}{found['status']:8} {found['error'] or ''}".rstrip(), flush=True)
        keep(results)
    return all(r["status"] in ("ok", "skipped") for r in results.values())


def keeper(machine: dict, folder: Path):
    """What writes results into the file of this day and card, beside those that it has."""
    card = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    path = folder / f"{datetime.date.today()}-{card}.json"
    folder.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text())["checks"] if path.exists() else {}

    def keep(results: dict) -> None:
        whole = {"machine": machine, "checks": before | results}
        new = path.with_suffix(".new")
        new.write_text(json.dumps(whole, indent=1) + "\n")
        os.replace(new, path)

    print(f"writing to {path}", flush=True)
    return keep


def listing(checks: dict) -> str:
    """A line for each check: its limit, whether a CPU can run it, what must hold."""
    lines = []
    for name, check in checks.items():
        what = " ".join(check.run.__doc__.split()).split(". ")[0].rstrip(".")
        lines.append(f"{name:18}{check.limit:4} s  {'card' if check.card else '':6}{what}")
    return "\n".join(lines)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--only", metavar="NAME", nargs="+", help="these checks alone")
    parser.add_argument("--minutes", type=float, default=8, help="no check runs longer than these")
    parser.add_argument("--list", action="store_true", help="print the checks, and run none")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU; nothing is written")
    parser.add_argument("--child", metavar="NAME", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        print(json.dumps(record(options.child, options.rehearse)))
        return 0
    known = checks()
    names = options.only or ORDER
    if unknown := sorted({*names} - {*ORDER}):
        parser.error(f"expected checks of --list, got {', '.join(unknown)}")
    if options.list:
        print(listing(known))
        return 0
    keep = lambda results: None
    if not options.rehearse:
        here = in_child("machine")
        if not here.get("cuda"):
            print(_nothing(here))
            return 3
        keep = keeper(here, HERE / "gpu")
    start = lambda name, limit: in_child(name, limit, options.rehearse)
    limits = {name: check.limit for name, check in known.items()}
    return 0 if report(names, limits, start, options.minutes, keep) else 1


def _nothing(here: dict) -> str:
    """Why nothing can be checked."""
    if "cuda" not in here:
        return (
            "JAX or torch can't be asked for a GPU, nothing was checked, nothing is written: "
            f"{here['error']}"
        )
    seen = f"jax (devices: {here['jax devices']}) and torch (cuda available: {here['torch.cuda']})"
    return f"no CUDA GPU seen by {seen}: nothing was checked, nothing is written"


if __name__ == "__main__":
    sys.exit(main())
