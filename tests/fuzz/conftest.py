"""How far the state machines run: a few examples in `make test`, some more in `make test-all`, and in
`make fuzz` the share of each of all that are asked for, in parts that workers take."""

from typing import NamedTuple

import hypothesis
import jax
import pytest
from hypothesis.stateful import run_state_machine_as_test

hypothesis.settings.register_profile(
    "fuzz",
    hypothesis.settings.get_profile("bridge"),
    derandomize=False,
    suppress_health_check=list(hypothesis.HealthCheck),
    report_multiple_bugs=False,
)


class Share(NamedTuple):
    """Of 1,000 examples of `make fuzz`, and in one part of it; in `make test` and `make test-all`;
    and how many steps an example has at most."""

    of_1000: int
    part: int
    few: int
    more: int
    steps: int


# An array costs milliseconds, and what compiles costs tenths of a second.
SHARES = {
    "test_arrays": Share(910, part=5000, few=100, more=1000, steps=12),
    "test_potentials": Share(40, part=500, few=10, more=60, steps=8),
    "test_local_potentials": Share(10, part=500, few=5, more=30, steps=8),  # each of its three
    "test_functions_in_jax": Share(10, part=100, few=5, more=30, steps=3),
    "test_functions_in_torch": Share(5, part=50, few=4, more=20, steps=3),
    "test_functions_of_the_native_lane": Share(5, part=100, few=5, more=20, steps=3),
}


def pytest_generate_tests(metafunc):
    """Parts of the examples that this test has in `make fuzz`; else one."""
    if "part" in metafunc.fixturenames:
        asked, share = metafunc.config.getoption("--fuzz"), SHARES[metafunc.function.__name__]
        examples = asked[0] * share.of_1000 // 1000 if asked else 1
        metafunc.parametrize("part", range(-(-examples // share.part)))


@pytest.fixture
def fuzz(request, part):
    """fuzz(machine) runs it."""

    def run(machine):
        asked, share = request.config.getoption("--fuzz"), SHARES[request.function.__name__]
        if asked:
            examples, seed = asked
            left = examples * share.of_1000 // 1000 - part * share.part
            settings = hypothesis.settings(
                hypothesis.settings.get_profile("fuzz"), max_examples=min(left, share.part)
            )
            machine = hypothesis.seed(1000 * seed + part)(machine)
        else:
            full = request.config.getoption("--full")
            settings = hypothesis.settings(max_examples=share.more if full else share.few)
        settings = hypothesis.settings(settings, stateful_step_count=share.steps)
        run_state_machine_as_test(machine, settings=settings)

    yield run
    if request.config.getoption("--fuzz"):
        jax.clear_caches()
