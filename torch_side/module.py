"""A pytree of parameters and a function of it as an nn.Module."""

from __future__ import annotations

import torch

from torch_side import library


class JaxModule(torch.nn.Module):
    """What bridge.module returns; its docstring is the documentation.

    `call(params, *args, **kwargs)` is a TorchCallable. `skeleton` is the pytree with the position of each leaf in its place,
    `paths` the names on the way to each leaf, `leaves` tensors (floating ones become Parameters, others buffers) or Python
    values, which stay as they are."""

    def __init__(self, call, skeleton, paths, leaves):
        super().__init__()
        self._call, self._skeleton, self._paths = call, skeleton, paths
        self._values = {i: x for i, x in enumerate(leaves) if not isinstance(x, torch.Tensor)}
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
            return library.traced(self._token, ([tensors[name] for tensors, name in self._places], *args), kwargs)
        return self._call(self.pytree(), *args, **kwargs)

    def pytree(self):
        """The parameters as the pytree that they came as, the module's own tensors in it."""
        return self._tree([tensors[name] for tensors, name in self._places])

    def function(self, args, kwargs):
        """The Function and tensors of a call whose first argument is the list of the module's tensors (see library.traced)."""
        tensors, *args = args
        return self._call.function((self._tree(tensors), *args), kwargs)

    def _tree(self, tensors):
        tensors = iter(tensors)
        return self._structure.unflatten([self._values[i] if i in self._values else next(tensors) for i in range(len(self._paths))])

    @property
    def compilations(self) -> int:
        return self._call.compilations

    def extra_repr(self) -> str:
        return f"{self._call!r}, {len(self._places)} arrays"

    def _home(self, path: tuple[str, ...]):
        """(the submodule that holds a leaf, its name there), submodules made where there are none."""
        home = self
        for name in path[:-1]:
            home = home._modules.setdefault(name, torch.nn.Module())
        return home, path[-1]

    def _bind(self) -> None:
        """Where each tensor is found: in the dicts of the submodules, which .to(), load_state_dict and functional_call replace entries of."""
        self._structure = self._call.flatten(self._skeleton)[1]
        self._token = library.register(self)
        self._places = []
        for i, path in enumerate(self._paths):
            if i not in self._values:
                home, name = self._home(path)
                self._places.append((home._parameters if name in home._parameters else home._buffers, name))

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k not in ("_structure", "_places", "_token")}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._bind()
