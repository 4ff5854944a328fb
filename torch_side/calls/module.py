"""A pytree of parameters and a function of it as an nn.Module."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from bridge.errors import message
from torch_side.calls import library, numbers

if TYPE_CHECKING:
    from torch_side.calls.calling import TorchCallable
    from torch_side.calls.numbers import ForeignBase

Path = tuple[str, ...]  # names of submodules, then the name of a tensor in the last of them


class JaxModule(torch.nn.Module):
    """What bridge.module returns; its docstring is the documentation.

    call       a TorchCallable that is called with (params, *args, **kwargs)
    skeleton   the pytree of parameters, with the position of each leaf in its place
    paths      the names on the way to each leaf
    leaves     tensors or Python values. Floating and complex tensors become Parameters, other
               tensors buffers; Python values stay as they are

    Raises: ValueError for two leaves whose names are the same text."""

    _modules: dict[str, Any]  # none of these is None here, as torch's own annotation allows

    # What `_bind` makes, which can be neither copied nor pickled.
    _structure: Any  # of the pytree of parameters
    _token: str  # by which code under torch.compile finds this module
    _places: list[tuple[Path, list[str]]]  # where the tensors are found, in their order

    def __init__(
        self, call: TorchCallable, skeleton: Any, paths: Iterable[Path], leaves: Sequence[Any]
    ) -> None:
        super().__init__()
        paths = _free(paths)
        self._call = call
        self._skeleton = skeleton
        self._paths = paths
        self._values = {i: x for i, x in enumerate(leaves) if not isinstance(x, torch.Tensor)}
        _check_distinct([p for i, p in enumerate(paths) if i not in self._values])
        for path, x in zip(paths, leaves, strict=True):
            if isinstance(x, torch.Tensor):
                home, name = self._home(path)
                if x.is_floating_point() or x.is_complex():
                    home._parameters[name] = torch.nn.Parameter(x)
                else:
                    home._buffers[name] = x
        self._bind()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the JAX function gives for the module's parameters and these arguments."""
        if torch.compiler.is_dynamo_compiling():
            return library.traced(self._token, (self._tensors(), *args), kwargs)
        return self._call(self.pytree(), *args, **kwargs)

    def pytree(self) -> Any:
        """Returns the parameters as the pytree that they came as, with the module's own tensors."""
        return self._tree(self._tensors())

    def _tensors(self) -> list[torch.Tensor]:
        """The module's tensors, looked up at each call.

        .to(), load_state_dict, functional_call, parametrisations and users replace tensors and
        submodules."""
        found = []
        for path, names in self._places:
            home = self
            for step in path:
                home = home._modules[step]
            parameters = home._parameters
            for name in names:
                found.append(parameters[name] if name in parameters else getattr(home, name))
        return found

    def function(
        self, args: Sequence, kwargs: Mapping[str, Any]
    ) -> tuple[ForeignBase, list[torch.Tensor]]:
        """Returns the Function and the tensors of a call, for library.traced.

        The first argument of that call is the list of the module's tensors."""
        tensors, *others = args
        return self._call.function((self._tree(tensors), *others), kwargs)

    def _tree(self, tensors: Iterable[torch.Tensor]) -> Any:
        """The pytree of parameters, with these tensors in it."""
        rest, values = iter(tensors), self._values
        leaves = [values[i] if i in values else next(rest) for i in range(len(self._paths))]
        return self._structure.unflatten(leaves)

    @property
    def compilations(self) -> int:
        """How many programs were compiled for this module and its derivatives."""
        return self._call.compilations

    def extra_repr(self) -> str:
        """Returns what repr shows of this module beside its submodules."""
        return f"{self._call!r}, {len(self._paths) - len(self._values)} arrays"

    def _home(self, path: Path) -> tuple[torch.nn.Module, str]:
        """(the submodule that holds a leaf, the name of the leaf there). Submodules are made where
        there are none."""
        home = self
        for name in path[:-1]:
            home = home._modules.setdefault(name, torch.nn.Module())
        return home, path[-1]

    def _bind(self) -> None:
        """Makes what can't be copied or pickled, and finds the places of the tensors."""
        kept = [path for i, path in enumerate(self._paths) if i not in self._values]
        places = [
            (home, [path[-1] for path in group])
            for home, group in itertools.groupby(kept, key=lambda path: path[:-1])
        ]
        self.__dict__.update(
            _structure=self._call.flatten(self._skeleton)[1],
            _token=numbers.register(self),
            _places=places,
        )

    def __deepcopy__(self, memo: dict) -> JaxModule:
        """Copies the tensors and shares the rest: a copy of a jitted function would be another one,
        to be compiled anew."""
        memo.update({id(x): x for x in (self._skeleton, self._values)})
        memo[id(self)] = other = type(self).__new__(type(self))
        other.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return other

    def __getstate__(self) -> dict[str, Any]:
        return {
            k: v for k, v in self.__dict__.items() if k not in ("_structure", "_places", "_token")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._bind()


def _free(paths: Iterable[Path]) -> tuple[Path, ...]:
    """The paths with another name for `training`, an attribute of every module, which train() and
    eval() write."""
    return tuple(tuple("training_" if n == "training" else n for n in path) for path in paths)


def _check_distinct(paths: Iterable[Path]) -> None:
    """Raises ValueError for two paths that are the same."""
    if twice := [".".join(p) for p, n in Counter(paths).items() if n > 1]:
        raise ValueError(
            message(
                "parameters whose names differ as text, with _ for dots",
                f"two that become {twice[0]!r}",
                "rename one of them",
            )
        )
