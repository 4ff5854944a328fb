"""Arguments of the demos."""

from __future__ import annotations

import argparse
import math

import jax
import numpy as np


def at_least(kind, low, high=math.inf):
    """A converter for argparse: numbers of one kind between two bounds, the others refused in one
    clear line."""

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or math.isinf(value):
            bound = f"at least {low}" if math.isinf(high) else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(
                f"expected a number ({kind.__name__}) {bound}, got {text}; give such a number"
            )
        return value

    return convert


def refuse_unless(parser, chosen, rules):
    """The first of the `rules` (name of an option, whether it is fine, what was expected) that does
    not hold ends the program in one clear line."""
    for name, fine, expected in rules:
        if not fine:
            got = ", ".join(map(str, np.atleast_1d(getattr(chosen, name))))
            parser.error(f"argument --{name}: expected {expected}, got {got}; change it")


def add_device(parser):
    """Adds --device to the options."""
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: a GPU, where JAX and torch both see one"
    )


def device(parser, chosen):
    """The torch.device that the model goes to; JAX makes its arrays there, too, from now on. (On a
    GPU the demos have not been seen.)"""
    import torch  # not by the process of demos.export that does without

    gpus = _gpus()
    if chosen.device == "cuda" and not gpus:
        seen = f"{jax.default_backend()} in JAX and torch.cuda {torch.cuda.is_available()}"
        parser.error(
            f"argument --device: expected a GPU that JAX and torch both see, got {seen}; "
            "take --device cpu"
        )
    if not gpus:
        return torch.device("cpu")
    if chosen.device == "cpu":
        in_jax(jax.devices("cpu")[0])
        return torch.device("cpu")
    in_jax(gpus[0])
    return torch.device("cuda", gpus[0].local_hardware_id)


def in_jax(there):
    """JAX makes its arrays on this device of its own from now on."""
    jax.config.update("jax_default_device", there)


def _gpus() -> list:
    """JAX's GPUs, if torch sees any."""
    import torch

    try:
        return jax.devices("cuda") if torch.cuda.is_available() else []
    except RuntimeError:
        return []
