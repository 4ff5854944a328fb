"""A process in which torch has a device of its own, which holds no values: what runs there would
run on a GPU without a tensor in the wrong place and without a step that the host waits for.

`python -m tests.models.elsewhere` prints a line "NAME: ok" for each model of
tests.models.test_static_models, or "NAME: what went wrong".
"""

import contextlib
import copy
import io

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from benchmarks.gpu_steps import Refusing
from tests.models.test_static_models import BUILD, F64, built, inputs, padded, with_edges
from torch_side.calls import inference, status

DEVICE = "elsewhere"


def moved(x, mode):
    return mode.from_tensor(x.detach()).to(f"{DEVICE}:0")


def step(name):
    """One evaluation with gradients, and a Hessian-vector product."""
    model, systems = built(name)
    x = with_edges(padded(inputs(*systems, dtype=F64)), model, 7)
    with status.collecting():
        model(x)  # what is looked up once
    there = copy.deepcopy(model)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with inference.uncompiled(), mode:
        there._apply(lambda t: moved(t, mode))
        y = {key: moved(value, mode) for key, value in x.items()}
    with inference.uncompiled(), mode, status.collecting(), Refusing():
        found = there(y)
        pos = y["pos"].clone().requires_grad_()
        (hvp,) = torch.autograd.grad(there(y | {"pos": pos})["position_gradients"].sum(), pos)
    for key, value in (found | {"hvp": hvp}).items():
        assert value.device.type == DEVICE, f"{key} on {value.device}"
        assert key == "hvp" or value.shape == model(x)[key].shape, f"{key} {tuple(value.shape)}"
    assert there.card.device == f"{DEVICE}:0", there.card.device


def main():
    _setup_privateuseone_for_python_backend(DEVICE)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    for name in BUILD:
        said = "ok"
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                step(name)
            except Exception as error:
                said = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        print(f"{name}: {said}", flush=True)


if __name__ == "__main__":
    main()
