"""Every adapter passes bridge.testing's properties, in float64, on structures that hypothesis draws
from elements that it knows."""

import pytest
import torch

from bridge.testing import ALL, check_potential
from tests.adapters import MODELS
from tests.matrices import a_few

ELEMENTS = {"franken": (29, 79), "torchani": (1, 8), "mace": (11, 14)}
# its acos((1 - 1e-6) cos) bends within 1e-3 rad of straight angles: finite differences of gradients
# see it
KINKS = {"chgnet": 10.0}


@pytest.mark.parametrize("name", a_few(MODELS, {*MODELS} - {"sevennet"}))
def test_check_potential_passes(name):
    model = MODELS[name].build(torch.float64)
    check_potential(
        model,
        elements=ELEMENTS.get(name, (8, 14)),
        max_examples=2,
        n_atoms=(2, 3),
        tolerance=KINKS.get(name, 1.0),
    )
    assert len(ALL) >= 12
