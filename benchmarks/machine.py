"""Where figures come from: the machine, its processor, the versions of packages."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def machine() -> str:
    return f"{platform.system()}-{platform.machine()}-{os.cpu_count()}cores".lower()


def cpu() -> str:
    """The processor's name, and the widest vectors that it has."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    found = dict(line.split("\t: ", 1) for line in lines if "\t: " in line)
    flags = found.get("flags", "").split()
    widest = next((flag for flag in ("avx512f", "avx2", "avx") if flag in flags), "")
    return f"{found.get('model name', platform.machine())} {widest}".strip()


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
