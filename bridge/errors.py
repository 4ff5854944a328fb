"""Error texts: what was expected, what came, what to do. Standard library only, so that both banks
may use it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def message(expected: str, got: str, do: str) -> str:
    """Returns the text of an error in the one form that this package has: "expected ..., got ...;
    ..."."""
    return f"expected {expected}, got {got}; {do}"


def missing(package: str, what: str) -> ImportError:
    """Returns the error for a third-party package that an adapter needs and does not find."""
    return ImportError(
        message(
            f"the package {package!r} for {what}", "no such package", f"run: pip install {package}"
        )
    )


def spec(shape: Iterable[Any], dtype: Any) -> str:
    """Returns an array as every text of this package writes it: float32[8,3]."""
    return f"{dtype}[{','.join(str(n) for n in shape)}]"
