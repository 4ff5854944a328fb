"""The whole table of operators: every way, torch.func and torch.autograd (`make test-all`)."""

import pytest

from tests.operator_cases import OTHERS, POTENTIALS
from tests.operator_checks import ENGINES, check


@pytest.mark.parametrize("derivatives", ENGINES)
@pytest.mark.parametrize("name", [*POTENTIALS, *OTHERS])
def test_derivatives_x_all_operators(name, derivatives):
    check(name, derivatives)
