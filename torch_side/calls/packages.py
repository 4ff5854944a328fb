"""Packages of AOTInductor that somebody else has compiled, as callables of this bank."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree  # what aoti_load_package keeps its types in

from bridge import trust as trusting
from bridge.contract import dtype_name
from bridge.errors import message
from bridge.function import Function, Spec
from bridge.native import folder as folders
from torch_side.calls.arrays import DTYPES
from torch_side.calls.compiling import Compiled
from torch_side.calls.export import TorchFunction

NO_DERIVATIVES = (
    "let the package return its gradients (of a potential: energy, position_gradients and "
    'cell_gradients, and gradients="model"), or bridge the model that it was made of'
)


@dataclass(frozen=True)
class Axis:
    """The sizes that one axis of an input may have: least to most, None without an end."""

    least: int
    most: int | None

    def __str__(self) -> str:
        if self.least == self.most:
            return str(self.least)
        return f"{self.least}.." if self.most is None else f"{self.least}..{self.most}"


class Package:
    """A package of AOTInductor (model.pt2, of torch._inductor.aoti_compile_and_package) as a torch
    callable of the signature that it was exported with.

    bridge.to_jax makes a JAX function of it. On lane="native", which is what lane="auto" stands for
    here, XLA calls it without Python. It is not compiled for anything else: it has no derivatives
    and no vmap, unless it returns gradients of its own. It runs on the device that it was compiled
    for. The types of its results are found by one call on zeros, unless to_jax is given outputs=.
    `path` is the file, which is loaded here and must not change while it is used. A package is
    machine code, which runs with your rights: `trust=True` says that you would run a program from
    where it came from. Packages of the same file are equal.

    Raises: ValueError without trust=True, for a file that is missing or is no package, and for one
    for another machine.

    >>> energy = bridge.to_jax(bridge.native.Package("model.pt2", trust=True))              # doctest: +SKIP
    """

    function_type: type[TorchFunction]  # PackageFunction, which is defined below

    def __init__(self, path: str | os.PathLike[str], *, trust: bool = False) -> None:
        self.path = Path(path).resolve()
        trusting.ask(self.path, "the machine code in it", trust)
        try:
            self.sha256 = folders.sha256(self.path)
            self._loaded = torch._inductor.aoti_load_package(str(self.path))
            specs = self._loaded.loader.get_call_spec()
            self.in_spec, self.out_spec = map(pytree.treespec_loads, specs)
        except Exception as error:
            got = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            do = "compile it by torch._inductor.aoti_compile_and_package on a machine of this kind"
            expected = f"a package of AOTInductor at {self.path}"
            raise ValueError(message(expected, got, do)) from error
        self.__name__ = self.__qualname__ = self.path.name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Package) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the package on tensors, and returns tensors in its own pytree."""
        found = self._loaded.loader.run(self.ordered(args, kwargs))
        return pytree.tree_unflatten(found, self.out_spec)

    @property
    def device(self) -> str:
        """ "cpu" or "cuda": what it was compiled for."""
        return self._loaded.loader.get_metadata().get("AOTI_DEVICE_KEY", "cpu")

    @cached_property
    def signature(self) -> tuple[tuple[str, tuple[Axis, ...]], ...] | None:
        """The dtype and the axes of each input, in the order of the package. None if the package
        does not say."""
        with zipfile.ZipFile(self.path) as archive:
            names = [n for n in archive.namelist() if n.endswith(".wrapper.cpp")]
            source = archive.read(names[0]).decode() if len(names) == 1 else ""
        return _signature(source)

    def ordered(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Returns the arrays of a call in the order of the package.

        Raises: TypeError for a call of another form than the package was exported with."""
        from torch.fx._pytree import tree_flatten_spec

        if _unlike((args, kwargs), self.in_spec):
            got = f"{pytree.tree_structure((args, kwargs))}"
            expected = f"a call of {self.__name__} as {self.in_spec}"
            raise TypeError(message(expected, got, "call it as it was exported"))
        return list(tree_flatten_spec((args, kwargs), self.in_spec))

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raises ValueError, naming the input, for types that the package was not compiled for.

        `args` and `kwargs` hold anything with shape and dtype; TypeError as `ordered`."""
        given = self.ordered(args, kwargs)
        for i, (x, known) in enumerate(zip(given, self.signature or ())):
            dtype, axes = known
            sizes = tuple(x.shape)
            fits = len(sizes) == len(axes) and all(
                a.least <= n and (a.most is None or n <= a.most) for n, a in zip(sizes, axes)
            )
            if dtype_name(x) != dtype or not fits:
                expected = f"{dtype}[{','.join(map(str, axes))}]"
                got = f"{dtype_name(x)}[{','.join(map(str, sizes))}]"
                do = "pass what it was compiled for, or compile it for these types"
                raise ValueError(message(f"input {i} of {self.__name__} as {expected}", got, do))

    def zeros(self, specs: Sequence[Spec]) -> list[torch.Tensor]:
        """Returns inputs of these types, on the device of the package."""
        return [torch.zeros(s.shape, dtype=DTYPES[s.dtype], device=self.device) for s in specs]


def _unlike(call: Any, spec: Any) -> bool:
    """True for a call of another form: other numbers of arguments, other keys."""
    if spec.is_leaf():
        return isinstance(call, (tuple, list, dict))
    parts = spec.children()
    if isinstance(call, dict):
        keys = spec.context
        return set(call) != set(keys) or any(map(_unlike, map(call.get, keys), parts))
    if not isinstance(call, (tuple, list)) or len(call) != len(parts):
        return True
    return any(map(_unlike, call, parts))


# What the C++ of a package says of its inputs, in the checks that torch writes into it.
_INPUT = re.compile(r"static void check_input_(\d+)\((.*?)\n}", re.DOTALL)
_DTYPE = re.compile(r"_expected_dtype = aoti_torch_dtype_(\w+)\(\)")
_EXACT = re.compile(r"if \((\d+) != \w+_size\[(\d+)\]\)")
_LEAST = re.compile(r"_size\[(\d+)\] < (\d+)\)")
_MOST = re.compile(r"_size\[(\d+)\] > (\d+)\)")


def _signature(source: str) -> tuple[tuple[str, tuple[Axis, ...]], ...] | None:
    """Types of the inputs, as far as the C++ of a package checks them."""
    found = []
    for _, body in sorted(_INPUT.findall(source), key=lambda m: int(m[0])):
        dtype = _DTYPE.search(body)
        if dtype is None:
            return None
        axes = {int(axis): Axis(int(n), int(n)) for n, axis in _EXACT.findall(body)}
        least = {int(axis): int(n) for axis, n in _LEAST.findall(body)}
        most = {int(axis): int(n) for axis, n in _MOST.findall(body)}
        for axis in {*least, *most} - {*axes}:
            axes[axis] = Axis(least.get(axis, 0), most.get(axis))
        if sorted(axes) != list(range(len(axes))):
            return None
        found.append((dtype[1], tuple(axes[k] for k in sorted(axes))))
    return tuple(found) or None


@dataclass(frozen=True)
class PackageFunction(TorchFunction):
    """A package for one set of argument types. It has no transforms."""

    def jvp(self, wrt: tuple[int, ...]) -> Function:
        """Raises NotImplementedError."""
        raise self._refused("derivatives", NO_DERIVATIVES)

    def gradient(self, wrt: tuple[int, ...]) -> Function | None:
        """Raises NotImplementedError."""
        raise self._refused("derivatives", NO_DERIVATIVES)

    def must_map(self, mapped: tuple[bool, ...]) -> tuple[bool, ...]:
        """Raises NotImplementedError."""
        raise self._refused("vmap", "use jax.lax.map, which calls it once for each example")

    def _refused(self, what: str, do: str) -> NotImplementedError:
        expected = f"calls of {self}, a package that is compiled for nothing else"
        return NotImplementedError(message(expected, what, do))

    @staticmethod
    def compiled(fn: Function, device: str) -> Compiled:
        """Returns the package itself, with the order in which it takes and gives arrays.

        Raises: ValueError for a program on another device."""
        base: Any = fn.base
        package: Package = base.call.target
        if package.device != device:
            do = f"run the program on {package.device}, or compile the package for {device}"
            expected = f"a program on {package.device}, which {package.__name__} was compiled for"
            raise ValueError(message(expected, device, do))
        places = range(len(fn.inputs))
        args, kwargs = base.call.tree.unflatten(places)
        given = tuple(package.ordered(args, kwargs))
        n = len(fn.outputs)
        result = pytree.tree_unflatten(list(range(n)), package.out_spec)
        found = tuple(base.call.flatten(result)[0])
        of_package = sorted(range(n), key=found.__getitem__)
        record = folders.Record(
            key=package.sha256[:32],
            name=package.__name__,
            inputs=tuple(fn.inputs[i] for i in given),
            outputs=tuple(fn.outputs[i] for i in of_package),
            has_status=False,
            device=device,
            processor=folders.processor(),
            versions={"torch": torch.__version__},
            sha256=package.sha256,
        )
        return Compiled(record, package.path, given=given, found=found)


Package.function_type = PackageFunction
