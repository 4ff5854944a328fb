"""Error texts: what was expected, what came, what to do. Standard library only, so that both banks
may use it."""

from __future__ import annotations


def message(expected: str, got: str, do: str) -> str:
    """The one form of every error of this package: "expected ..., got ...; ..."."""
    return f"expected {expected}, got {got}; {do}"


def missing(package: str, what: str) -> ImportError:
    """The error for a third-party package that an adapter needs and does not find."""
    return ImportError(
        message(
            f"the package {package!r} for {what}", "no such package", f"run: pip install {package}"
        )
    )


def spec(shape, dtype) -> str:
    """How arrays are written in every text: float32[8,3]."""
    return f"{dtype}[{','.join(str(n) for n in shape)}]"
