"""Callables around a user's torch model, equal for the same model."""

from __future__ import annotations

import torch

from bridge.call import parameter_names
from bridge.contract import missing
from bridge.errors import message


class Adapted:
    """A callable around a model. `__self__` lets checks of the model see it."""

    def __init__(self, model):
        self.__self__ = model
        self.__name__ = self.__qualname__ = getattr(model, "__qualname__", type(model).__name__)

    def __eq__(self, other):
        return type(self) is type(other) and self.__self__ == other.__self__

    def __hash__(self):
        return hash(self.__self__)


class Applied(Adapted):
    """torch.func.functional_call of one module."""

    def __call__(self, params, *args, **kwargs):
        return torch.func.functional_call(self.__self__, params, args, kwargs)

    @property
    def parameters(self):
        return ["params", *parameter_names(self.__self__.forward)]


class Contracted(Adapted):
    """A torch_side.potentials.model.Model, its outputs reduced to those that its card has active;
    its parameters are constants."""

    def __call__(self, inputs):
        found, active = self.__self__(inputs, trained=False), self.__self__.card.active
        if absent := [k for k in active if k not in found]:
            expected = f"{', '.join(active)} from {self.__qualname__}"
            raise ValueError(message(expected, f"no {', '.join(absent)}", missing(absent, found)))
        return {k: found[k] for k in active}
