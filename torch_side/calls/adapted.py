"""Callables around a user's torch model, equal for the same model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from bridge.call import parameter_names
from bridge.contract import missing
from bridge.errors import message


class Adapted:
    """A callable around a model, equal to another one of the same class around the same model.

    It holds the model as `__self__`, as a bound method does, so that checks of a callable see
    it."""

    __self__: Any  # the model

    def __init__(self, model: Any) -> None:
        self.__self__ = model
        self.__name__ = self.__qualname__ = getattr(model, "__qualname__", type(model).__name__)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Adapted) or type(self) is not type(other):
            return False
        return self.__self__ == other.__self__

    def __hash__(self) -> int:
        return hash(self.__self__)


class Applied(Adapted):
    """torch.func.functional_call of one module: its parameters become the first argument."""

    __self__: torch.nn.Module

    def __call__(self, params: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        """Returns what the module gives for `args` and `kwargs` with `params` as its parameters."""
        return torch.func.functional_call(self.__self__, params, args, kwargs)

    @property
    def parameters(self) -> list[str]:
        """The names of the parameters of a call: "params", then those of the module's forward."""
        return ["params", *parameter_names(self.__self__.forward)]


class Contracted(Adapted):
    """A torch_side.potentials.model.Model that gives only the outputs that its card has active.

    The model's parameters are constants: nobody differentiates in them."""

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the active outputs. Raises ValueError where the model does not give one of
        them."""
        found = self.__self__(inputs, trained=False)
        active = self.__self__.card.active
        if absent := [k for k in active if k not in found]:
            expected = f"{', '.join(active)} from {self.__qualname__}"
            raise ValueError(message(expected, f"no {', '.join(absent)}", missing(absent, found)))
        return {k: found[k] for k in active}
