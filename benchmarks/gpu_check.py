"""What only a machine with a CUDA GPU can tell: `python -m benchmarks.gpu_check`.

Each check (benchmarks/gpu_checks.py) runs in a process of its own, so that none, not even one that
kills its process, stops or spoils another. The results go to benchmarks/gpu/<date>.json. Exit code
0: all passed. 1: some failed. 3: no GPU, so nothing was checked and nothing is written.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent


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


def in_child(name: str, timeout: float = 600) -> dict:
    """The record that a fresh process prints last; a process that dies or hangs is a failed
    check."""
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--only", name]
    try:
        ended = subprocess.run(
            command, cwd=HERE.parent, capture_output=True, text=True, timeout=timeout
        )
        return json.loads(ended.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        error = f"no end after {timeout} s"
    except (IndexError, ValueError):
        error = f"the process ended with code {ended.returncode}: {ended.stderr[-2000:]}"
    return failed(error)


def failed(error: str) -> dict:
    return {"status": "failed", "error": error, "values": {}}


def report(machine: dict, names, start, folder: Path) -> bool:
    """Start every check, tell how it went, and write it all down; True if all passed."""
    results = {}
    for name in names:
        results[name] = start(name)
        print(f"{name:16}{results[name]['status']:8}{results[name]['error'] or ''}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{datetime.date.today()}.json"
    path.write_text(json.dumps({"machine": machine, "checks": results}, indent=1) + "\n")
    print(f"written to {path}")
    return all(r["status"] == "ok" for r in results.values())


def record(name: str) -> dict:
    if name == "machine":
        return machine()
    from benchmarks.gpu_checks import CHECKS

    gpus = cuda_devices()
    return attempt(CHECKS[name], gpus[0]) if gpus else failed("no CUDA GPU seen by jax")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument(
        "--only",
        metavar="NAME",
        help="run this check in this process and print its record; write nothing",
    )
    only = parser.parse_args(argv).only
    if only:
        print(json.dumps(record(only)))
        return 0
    here = in_child("machine")
    if "cuda" not in here:
        print(
            "JAX or torch can't be asked for a GPU, nothing was checked, nothing is written: "
            f"{here['error']}"
        )
        return 3
    if not here["cuda"]:
        seen = (
            f"jax (devices: {here['jax devices']}) and torch (cuda available: {here['torch.cuda']})"
        )
        print(f"no CUDA GPU seen by {seen}: nothing was checked, nothing is written")
        return 3
    from benchmarks.gpu_checks import CHECKS

    return 0 if report(here, CHECKS, in_child, HERE / "gpu") else 1


if __name__ == "__main__":
    sys.exit(main())
