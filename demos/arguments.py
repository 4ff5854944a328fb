"""Arguments of the demos."""

from __future__ import annotations

import argparse
import math

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
