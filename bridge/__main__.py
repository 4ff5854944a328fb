"""`python -m bridge doctor`: what this machine, these versions and these settings will do."""

from __future__ import annotations

import sys

USAGE = "usage: python -m bridge doctor"


def main(arguments: list[str]) -> int:
    """Print the diagnosis; 0 if all is well, 1 if not, 2 for what is no command."""
    if arguments != ["doctor"]:
        print(USAGE, file=sys.stderr)
        return 2
    from bridge.join import diagnosis

    rows = diagnosis()
    width = max(len(what) for what, *_ in rows)
    for what, well, found in rows:
        print(f"{'ok' if well else '!!'}  {what:{width}}  {found}")
    return 0 if all(well for _, well, _ in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
