"""What the soak judges by (tests/soak): a slow leak is seen, noise is not, and an error that does
not come is an error."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import bridge
from jax_side.calls import registry
from tests.soak import faults, into_jax, into_torch, values
from tests.soak.crossing import LAYOUTS, bits
from tests.soak.watch import growths, kept

NOISE = np.random.default_rng(0)


@pytest.mark.parametrize("name, step", [("MB", 10.0), ("arrays", 1.0), ("threads", 1.0)])
def test_a_slow_leak_is_seen_and_noise_is_not(name, step):
    noise = list(NOISE.uniform(0, 3, 16))
    leaking = [x + step * k for k, x in enumerate(noise)]
    warm = [100 * max(0, 4 - k) + x for k, x in enumerate(noise)]
    assert growths({name: leaking}).keys() == {name}
    assert growths({name: noise}) == growths({name: noise[::-1]}) == growths({name: warm}) == {}


def test_what_the_packages_keep_is_found_by_itself():
    bridge.to_torch(jnp.sin)
    before = kept()
    caches = {"torch_side.calls.numbers._bases", "jax_side.calls.nesting.cpu_device"}
    assert caches <= before.keys()
    registry.functions["planted"] = registry.Called(None, 0, 0, None, None)
    try:
        now = kept()
    finally:
        del registry.functions["planted"]
    assert (
        now["jax_side.calls.registry.functions"] == 1 + before["jax_side.calls.registry.functions"]
    )


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "complex128"])
def test_a_wrong_number_is_seen(dtype):
    want = values.draw(np.random.default_rng(0), dtype, (5, 3)).astype(
        np.complex128 if dtype == "complex128" else np.float64
    )
    values.compare(jnp.asarray(want, dtype), want, dtype)
    wrong = want.copy()
    wrong[3, 1] += 0.3 if dtype == "bfloat16" else 0.1 if dtype == "float16" else 1e-5
    with pytest.raises(AssertionError, match="off by"):
        values.compare(jnp.asarray(wrong, dtype), want, dtype)


@pytest.mark.parametrize("dtype", ["int8", "bool", "float8_e4m3fn", "uint64"])
def test_a_wrong_bit_is_seen(dtype):
    want = values.draw(np.random.default_rng(0), dtype, (50, 3))
    values.compare(jnp.asarray(want), want, dtype)
    with pytest.raises(AssertionError, match="not equal"):
        values.compare(jnp.asarray(want[::-1]), want, dtype)


def test_an_error_that_does_not_come_is_told():
    with pytest.raises(AssertionError, match="got no error"), faults.expect(ValueError):
        pass
    with pytest.raises(AssertionError, match="expected 'this'"), faults.expect(ValueError, "this"):
        raise ValueError("that")
    with pytest.raises(AssertionError, match="expected KeyboardInterrupt"):
        faults.interrupted(lambda: None, patience=0.1)


@pytest.mark.parametrize("side", [into_jax, into_torch])
def test_each_lane_has_cases_and_faults(side):
    for lane in side.LANES:
        assert side.cases(lane)
        assert lane == "control" or any(lane in lanes for _, lanes in side.FAULTS.values())
    assert not set(side.CASES) & set(side.FAULTS)  # one table counts both


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_are_those_of_the_values(layout):
    x = torch.arange(12.0).view(4, 3)
    t = LAYOUTS[layout](x)
    assert bits(t.contiguous()) == t.numpy().tobytes() and bits(t.contiguous() + 1) != bits(t)
