"""The command line: `python -m bridge`.

doctor     says what this machine, these versions and these settings will do
check      checks whether a potential is right
compile    compiles a torch potential for the native lane ahead of time, and compares it
ipi        drives a running i-PI with a potential
--version  prints the version of this package
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import sys
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from bridge.card import symbol
from bridge.errors import message

if TYPE_CHECKING:
    from bridge.testing import Found

USAGE = """usage: python -m bridge doctor
       python -m bridge --version
       python -m bridge check module:factory [--kind torch|jax] [--gradients model|autograd] [--cutoff X] [--elements Si,O]
                              [--dtype float64|float32] [--examples N] [--native]
       python -m bridge compile module:factory structure [--cutoff X] [--capacity E] [--gradients model|autograd]
                              [--dtype float32|float64] [--hvp] [--folder F]
       python -m bridge ipi module:factory structure [--unix NAME | --host H --port P] [--wait S] [--no-virial]
                              [--kind torch|jax|ase] [--gradients model|autograd] [--cutoff X] [--dtype float32|float64]"""


def main(arguments: list[str]) -> int:
    """Runs the command in `arguments` and prints what it found.

    Returns the exit code: 0 if all is well, 1 if not, 2 for what is no command.
    """
    if arguments == ["--version"]:
        print(f"jax-torch-bridge {version('jax-torch-bridge')}")
        return 0
    if arguments == ["doctor"]:
        return doctor()
    name = arguments[0] if arguments else ""
    if name not in _COMMANDS:
        print(USAGE, file=sys.stderr)
        return 2
    parsed, run = _COMMANDS[name]
    try:
        options = parsed(arguments[1:])
    except SystemExit as end:  # of argparse, after its own message
        return int(end.code or 0)
    try:
        return run(options)
    except (
        ConnectionError,
        ImportError,
        NotImplementedError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        print(f"python -m bridge {name}: {error}", file=sys.stderr)
        return 2


def doctor() -> int:
    """Prints a line for each thing that was looked at; returns 0 if all are well, else 1."""
    from bridge.join.calls import diagnosis

    rows = diagnosis()
    width = max(len(what) for what, *_ in rows)
    for what, well, found in rows:
        print(f"{'ok' if well else '!!'}  {what:{width}}  {found}")
    return 0 if all(well for _, well, _ in rows) else 1


def check(options: argparse.Namespace) -> int:
    """Prints a line for each property as it is done, and the text of each failure.

    Returns 0 if all properties hold, else 1.
    """
    from bridge.testing import ALL, run_checks
    from bridge.testing.checks import PROPERTIES
    from bridge.testing.subject import kind_of

    given = {
        "kind": options.kind,
        "gradients": options.gradients,
        "cutoff": options.cutoff,
        "dtype": options.dtype,
        "elements": options.elements,
    }
    failed, model = 0, model_of(options.model)
    if options.kind is None and kind_of(model) is None:
        got = f"a {type(model).__name__}, which may be either"
        raise TypeError(
            message("--kind torch or --kind jax", got, "say which framework its arrays are of")
        )
    checks = tuple(PROPERTIES) if options.native else ALL
    for found in run_checks(model, checks=checks, max_examples=options.examples, **given):
        why = found.skipped or found.warning
        print(_state(found), found.name + (f" ({why})" if why else ""), flush=True)
        if found.failure:
            failed += 1
            lines = found.failure.splitlines()[1:]
            print("\n".join("       " + line for line in lines), flush=True)
    return 1 if failed else 0


def _state(found: Found) -> str:
    if found.failure:
        return "FAILED"
    if found.skipped:
        return "--    "
    return "warned" if found.warning else "ok    "


def model_of(spec: str) -> Any:
    """Returns the object that "module:name" names. A class or a function of no arguments is called.

    Raises: ValueError where there is no such object, or where a class wants arguments.
    """
    module, colon, name = spec.partition(":")
    if not (module and colon and name):
        raise ValueError(
            message(
                "module:factory",
                repr(spec),
                "write the module, a colon, and the name of the model in it",
            )
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(
                message(
                    f"{part!r} in {module}",
                    f"only {', '.join(n for n in dir(found) if not n.startswith('_'))}",
                    "name what is there",
                )
            )
        found = getattr(found, part)
    return found() if _without_arguments(found) else found


def _without_arguments(x: Any) -> bool:
    """True for a class or a function that is called with nothing."""
    if not (inspect.isclass(x) or inspect.isroutine(x)):
        return False
    try:
        inspect.signature(x).bind()
    except TypeError as error:
        if inspect.isclass(x):
            raise ValueError(
                message(
                    "a class of no arguments",
                    f"{x.__name__}: {error}",
                    "write a function that makes the model",
                )
            ) from error
        return False
    return True


def _parsed(arguments: list[str]) -> argparse.Namespace:
    """The options of check. Raises SystemExit for what it does not know."""
    parser = argparse.ArgumentParser(
        "python -m bridge check",
        description="Check a potential of the contract: bridge.testing.check_potential.",
    )
    parser.add_argument(
        "model", help="module:factory, where the module can be imported from here; or module:model"
    )
    parser.add_argument("--kind", choices=("torch", "jax"))
    parser.add_argument(
        "--gradients",
        choices=("model", "autograd", "autodiff"),
        help="autograd: the model returns its energy alone",
    )
    parser.add_argument("--cutoff", type=float, help="Angstrom, for a model that takes edges")
    parser.add_argument("--elements", type=_elements, help="symbols or atomic numbers, as Si,O")
    parser.add_argument("--dtype", choices=("float64", "float32"))
    parser.add_argument("--examples", type=int, default=20, help="structures for each property")
    parser.add_argument(
        "--native", action="store_true", help="check the native lane, too, which compiles the model"
    )
    return parser.parse_args(arguments)


def compile_ahead(options: argparse.Namespace) -> int:
    """Compiles a potential for a structure's sizes, and prints the packages and the errors.

    Returns 0 if the results are eager torch's; what is wrong is raised."""
    from bridge.join.ahead import compile_potential

    model = model_of(options.model)
    for report in compile_potential(
        model,
        options.structure,
        gradients=options.gradients,
        cutoff=options.cutoff,
        capacity=options.capacity,
        dtype=options.dtype,
        hvp=options.hvp,
        folder=options.folder,
    ):
        for record in report.records:
            print(f"{record.name}: {record.key}, compiled in {record.seconds:.0f} s")
        for result, error in report.errors.items():
            print(f"  {result}: at most {error:.2g} from eager torch", flush=True)
    return 0


def _parsed_for_compile(arguments: list[str]) -> argparse.Namespace:
    """The options of compile. Raises SystemExit for what it does not know."""
    parser = argparse.ArgumentParser(
        "python -m bridge compile",
        description="Compile a torch potential of the contract for the native lane, with its "
        "gradients, for the sizes of a structure; and compare it with eager torch there.",
    )
    parser.add_argument("model", help="module:factory, which gives the torch model")
    parser.add_argument("structure", help="a file that ase.io.read reads")
    parser.add_argument(
        "--cutoff", type=float, help="Angstrom, for a model of your own that takes edges"
    )
    parser.add_argument(
        "--capacity", type=int, help="slots of edges (by default a quarter more than there are)"
    )
    parser.add_argument("--gradients", choices=("model", "autograd"), default="model")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument(
        "--hvp", action="store_true", help="also products of the Hessian with a vector"
    )
    parser.add_argument(
        "--folder", help="of packages (by default BRIDGE_CACHE, or the user's cache)"
    )
    return parser.parse_args(arguments)


def ipi(options: argparse.Namespace) -> int:
    """Drives a running i-PI until that ends, and prints how many structures it asked for.

    Returns 0; what is wrong is raised."""
    from bridge.drivers.ipi import drive
    from bridge.join.calculators import calculator
    from jax_side.engines.ase import read

    model, atoms = model_of(options.model), read(options.structure)
    given = {name: getattr(options, name) for name in ("kind", "gradients", "cutoff", "dtype")}
    atoms.calc = calculator(model, **given)
    where = {name: getattr(options, name) for name in ("unix", "host", "port", "wait", "virial")}
    print(f"{drive(atoms, **where)} structures", flush=True)
    return 0


def _parsed_for_ipi(arguments: list[str]) -> argparse.Namespace:
    """The options of ipi. Raises SystemExit for what it does not know."""
    parser = argparse.ArgumentParser(
        "python -m bridge ipi",
        description="Serve energies, forces and virials of a potential to a running i-PI: "
        "bridge.drivers.ipi.drive.",
    )
    parser.add_argument("model", help="module:factory, which gives the model, or a calculator")
    parser.add_argument(
        "structure", help="a file that ase.io.read reads, with the atoms in i-PI's order"
    )
    parser.add_argument("--unix", help="name or path of a Unix socket: <address> with mode='unix'")
    parser.add_argument("--host", default="localhost")
    parser.add_argument("--port", type=int, default=31415)
    parser.add_argument("--wait", type=float, default=10.0, help="seconds until i-PI listens")
    parser.add_argument(
        "--no-virial", dest="virial", action="store_false", help="send zeros, at constant volume"
    )
    parser.add_argument("--kind", choices=("torch", "jax", "ase"))
    parser.add_argument("--gradients", choices=("model", "autograd"), default="model")
    parser.add_argument("--cutoff", type=float, help="Angstrom, for a model of your own with edges")
    parser.add_argument("--dtype", choices=("float32", "float64"))
    return parser.parse_args(arguments)


def _elements(text: str) -> tuple[int, ...]:
    """The atomic numbers of a text such as Si,O or 14,8."""
    known = {symbol(z).split()[0]: z for z in range(1, 119)}
    words = text.split(",")
    if strange := [w for w in words if w not in known and not w.isdigit()]:
        raise argparse.ArgumentTypeError(
            message("symbols of elements", ", ".join(strange), "write them as Si,O")
        )
    return tuple(known.get(w) or int(w) for w in words)


# name: (reads its options, runs it)
_COMMANDS = {
    "check": (_parsed, check),
    "compile": (_parsed_for_compile, compile_ahead),
    "ipi": (_parsed_for_ipi, ipi),
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
