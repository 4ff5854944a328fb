"""A pytree of parameters and a function of it as an nn.Module."""

from __future__ import annotations

import copy
import itertools
from collections import Counter

import torch

from bridge.errors import message
from torch_side.calls import library, numbers


class JaxModule(torch.nn.Module):
    """What bridge.module returns; its docstring is the documentation.

    `call(params, *args, **kwargs)` is a TorchCallable. `skeleton` is the pytree with the position
    of each leaf in its place, `paths` the names on the way to each leaf, `leaves` tensors (floating
    ones become Parameters, others buffers) or Python values, which stay as they are."""

    def __init__(self, call, skeleton, paths, leaves):
        super().__init__()
        self._call, self._skeleton, self._paths = call, skeleton, (paths := _free(paths))
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

    def forward(self, *args, **kwargs):
        if torch.compiler.is_dynamo_compiling():
            return library.traced(self._token, (self._tensors(), *args), kwargs)
        return self._call(self.pytree(), *args, **kwargs)

    def pytree(self):
        """The parameters as the pytree that they came as, the module's own tensors in it."""
        return self._tree(self._tensors())

    def _tensors(self) -> list:
        """Looked up at each call: .to(), load_state_dict, functional_call, parametrisations and
        users replace tensors and submodules."""
        found = []
        for path, names in self._places:
            home = self
            for step in path:
                home = home._modules[step]
            parameters = home._parameters
            for name in names:
                found.append(parameters[name] if name in parameters else getattr(home, name))
        return found

    def function(self, args, kwargs):
        """The Function and tensors of a call whose first argument is the list of the module's
        tensors (see library.traced)."""
        tensors, *args = args
        return self._call.function((self._tree(tensors), *args), kwargs)

    def _tree(self, tensors):
        tensors = iter(tensors)
        return self._structure.unflatten(
            [
                self._values[i] if i in self._values else next(tensors)
                for i in range(len(self._paths))
            ]
        )

    @property
    def compilations(self) -> int:
        return self._call.compilations

    def extra_repr(self) -> str:
        return f"{self._call!r}, {len(self._paths) - len(self._values)} arrays"

    def _home(self, path: tuple[str, ...]):
        """(the submodule that holds a leaf, its name there), submodules made where there are
        none."""
        home = self
        for name in path[:-1]:
            home = home._modules.setdefault(name, torch.nn.Module())
        return home, path[-1]

    def _bind(self) -> None:
        """What can't be copied or pickled, and where the tensors are found: (names of submodules,
        names there), in their order."""
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

    def __deepcopy__(self, memo):
        """What is no tensor is shared: a copy of a jitted function would be another one, to be
        compiled anew."""
        memo.update({id(x): x for x in (self._skeleton, self._values)})
        memo[id(self)] = other = type(self).__new__(type(self))
        other.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return other

    def __getstate__(self):
        return {
            k: v for k, v in self.__dict__.items() if k not in ("_structure", "_places", "_token")
        }

    def __setstate__(self, state):
        super().__setstate__(state)
        self._bind()


def _free(paths) -> tuple:
    """`training` is an attribute of every module, written by train() and eval()."""
    return tuple(tuple("training_" if n == "training" else n for n in path) for path in paths)


def _check_distinct(paths) -> None:
    if twice := [".".join(p) for p, n in Counter(paths).items() if n > 1]:
        raise ValueError(
            message(
                "parameters whose names differ as text, with _ for dots",
                f"two that become {twice[0]!r}",
                "rename one of them",
            )
        )
