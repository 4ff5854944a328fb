"""Memory between JAX and torch: any layout and dtype goes in, results are fresh and nobody
else's."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import bridge
from tests.torch_cases import close
from torch_side.calls.arrays import DTYPES

CONSTANT, NUMPY = jnp.arange(4.0), np.arange(4.0)
FRESH = {
    "input": lambda x: x,
    "input_twice": lambda x: (x, x),
    "view": lambda x: x.reshape(2, -1),
    "same_twice": lambda x: (jnp.sin(x),) * 2,
    "equal_twice": lambda x: (jnp.sin(x), jnp.sin(x)),
    "closure": lambda x: (x, CONSTANT),
    "numpy_closure": lambda x: (x, NUMPY, NUMPY),
    "constants": lambda x: (jnp.zeros(4), jnp.zeros(4)),
    "residual": jnp.exp,
    "scalar": lambda x: (x.sum(), x),
}


@pytest.mark.matrix
@pytest.mark.parametrize("size", [4, 2**18])
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", FRESH)
def test_memory_x_fresh(name, requires_grad, size):
    """Writing to a result changes no input, no other result, no constant and no later call."""
    f, x = (
        bridge.to_torch(FRESH[name]),
        torch.ones(size, dtype=torch.float64, requires_grad=requires_grad),
    )
    first, second = ([*y] if isinstance(y, tuple) else [y] for y in (f(x), f(x)))
    assert len({t.data_ptr() for t in (x, *first, *second)}) == 1 + len(first) + len(second)
    want = [y.detach().clone() for y in second]
    for y in first:
        y.detach().fill_(7)
    third = f(x)
    close([y.detach() for y in (third if isinstance(third, tuple) else (third,))], want)
    close([y.detach() for y in second], want)
    assert (
        (x == 1).all() and (jnp.arange(4.0) == CONSTANT).all() and (np.arange(4.0) == NUMPY).all()
    )


def frozen(x):
    a = x.numpy().copy()
    a.flags.writeable = False
    return torch.from_numpy(a)


LAYOUTS = {  # of a (4, 6) float64 or complex128 tensor
    "transposed": lambda x: x.T.contiguous().T,
    "stride_0": lambda x: x[:1].expand(4, 6),
    "all_stride_0": lambda x: x[0, 0].expand(4, 6),
    "every_second": lambda x: torch.stack([x, x], -1).flatten(1)[:, ::2],
    "unaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(4, 6),
    "unaligned_transposed": lambda x: torch.cat([x.new_zeros(1), x.T.flatten()])[1:].view(6, 4).T,
    "byte_offset": lambda x: (
        torch.cat([torch.zeros(8, dtype=torch.uint8), x.view(torch.uint8).flatten()])[8:]
        .view(x.dtype)
        .view(4, 6)
    ),
    "conj": lambda x: torch.complex(x, -2 * x).conj(),
    "neg": lambda x: torch.complex(x, 2 * x).conj().imag,
    "zeros": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    "real_part": lambda x: torch.complex(x, 2 * x).real,
    "read_only": frozen,
    "numpy": lambda x: torch.from_numpy(x.numpy().copy()[::-1].copy()),
    "parameter": lambda x: torch.nn.Parameter(x.clone()),
    "one_column": lambda x: x[:, 2:3],
    "empty": lambda x: x[:, 6:],
    "no_rows": lambda x: x[4:].T,
    "zero_d": lambda x: x[2, 3],
}


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_x_input_and_cotangent(name):
    x = LAYOUTS[name](torch.sin(torch.arange(24.0, dtype=torch.float64)).view(4, 6))
    f, g = bridge.to_torch(lambda x: x * x + 1), lambda x: x * x + 1
    before = x.detach().clone()
    close(f(x), g(before), check_stride=False)
    plain, moved = before.clone().requires_grad_(), x.detach().requires_grad_()
    (want,) = torch.autograd.grad(g(plain), plain, before)
    for y, cotangent in ((plain, x.detach()), (moved, before), (moved, x.detach())):
        close(torch.autograd.grad(f(y), y, cotangent), (want,), check_stride=False)
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", DTYPES)
def test_value_and_gradient_x_dtype(name):
    """To the bit; a float8 has no arithmetic in torch to compare gradients with."""
    x = torch.tensor([1, 0, 2, 1]).to(torch.float32).to(DTYPES[name])
    got, wide = bridge.to_torch(lambda x, i: (x[i], x.astype("complex128")))(
        x, torch.tensor([3, 2, 0])
    )
    assert got.dtype == x.dtype and got.view(torch.uint8).equal(
        torch.stack([x[3], x[2], x[0]]).view(torch.uint8)
    )
    close(wide, x.to(torch.float32 if x.dtype.itemsize == 1 else x.dtype).to(torch.complex128))
    if (x.dtype.is_floating_point and x.dtype.itemsize > 1) or x.dtype.is_complex:
        y = x.clone().requires_grad_()
        close(torch.autograd.grad(bridge.to_torch(lambda x: x * 3)(y), y, x), (x * 3,))
