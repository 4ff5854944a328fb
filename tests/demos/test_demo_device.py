"""--device of the demos: a GPU where both frameworks see one. No GPU is needed here: a CPU device of
JAX stands for one."""

from types import SimpleNamespace

import jax
import pytest
import torch

from demos import arguments, export, fit, mc, md, npt, relax, torch_sim

DEMOS = [md, npt, relax, mc, fit, torch_sim, export]


@pytest.fixture
def default():
    before = jax.config.jax_default_device
    yield
    jax.config.update("jax_default_device", before)


@pytest.fixture
def gpus(monkeypatch, default):
    """What the demos see as JAX's GPUs."""
    found = []
    monkeypatch.setattr(arguments, "_gpus", lambda: found)
    return found


@pytest.mark.parametrize("demo", DEMOS)
def test_a_gpu_that_is_not_there_is_refused(demo, gpus, capsys):
    with pytest.raises(SystemExit):
        demo.options(["--device", "cuda"])
    text = "argument --device: expected a GPU that JAX and torch both see, got"
    assert text in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize("demo", DEMOS)
def test_without_a_gpu_it_is_the_cpu(demo, gpus, tmp_path):
    for given in ([], ["--device", "cpu"]):
        chosen = demo.options([*given, "--out", str(tmp_path)])
        assert chosen.device == torch.device("cpu") and jax.config.jax_default_device is None


def test_both_frameworks_take_the_same_device(gpus):
    gpus.append(jax.devices("cpu")[0])
    card = arguments.device(None, SimpleNamespace(device=None))
    assert card == torch.device("cuda", gpus[0].local_hardware_id)
    assert jax.config.jax_default_device is gpus[0]
    assert arguments.device(None, SimpleNamespace(device="cpu")) == torch.device("cpu")
    assert jax.config.jax_default_device == jax.devices("cpu")[0]
