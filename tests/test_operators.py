"""First and second derivatives of the operators that potentials are made of, each by every way; the others in tests/full."""

import jax
import jax.numpy as jnp
import pytest
import torch

import bridge
from jax_side import second
from tests.operator_cases import POTENTIALS
from tests.operator_checks import check

SUSPECTED = ["det", "slogdet", "solve a matrix", "scatter prod"]  # a few more ways for these


@pytest.mark.parametrize("name", POTENTIALS)
def test_derivatives_x_operators(name):
    check(name, "func")


@pytest.mark.parametrize("name", [*SUSPECTED, "silu", "norm", "index_add", "softmax"])
def test_derivatives_by_autograd_x_operators(name):
    check(name, "autograd")
