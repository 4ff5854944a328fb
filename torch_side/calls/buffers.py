"""Foreign buffers as tensors during a call: no copies, no checks that the caller made already.

A buffer is a torch.Tensor (made by the ffi lane), a bare DLPack capsule, or anything with
`__dlpack__`. Dtypes that a lane can't carry travel in a carrier of the same bytes: complex as a
real array with a trailing 2, bfloat16 and float8 as unsigned integers.
"""

from __future__ import annotations

import functools
import sys
from contextlib import contextmanager

import numpy as np
import torch

from bridge.function import Spec
from torch_side.calls.arrays import DTYPES, dtype_name, export, import_


def spec_of(t: torch.Tensor) -> Spec:
    return Spec(tuple(t.shape), dtype_name(t.dtype))


def kinds(specs) -> tuple:
    """(shape, dtype) as tensors tell them, for checks that take no time."""
    return tuple((torch.Size(s.shape), DTYPES[s.dtype]) for s in specs)


def views(buffers, specs) -> list:
    """The buffers as tensors of the specs' dtypes, sharing their memory."""
    return [view(b, DTYPES[s.dtype]) for b, s in zip(buffers, specs)]


def view(buffer, dtype: torch.dtype) -> torch.Tensor:
    """A buffer as a tensor of a dtype that it may travel in another's place of."""
    if type(buffer) is _Bare:
        buffer = _from_capsule(buffer)
    elif not isinstance(buffer, torch.Tensor):
        buffer = torch.from_dlpack(buffer)
    if buffer.dtype is dtype:
        return buffer
    other = torch.view_as_complex(buffer) if dtype.is_complex else buffer.view(dtype)
    return other.detach()  # which does not hold the buffer


def normal(buffers) -> tuple:
    """The buffers, tensors that were made in inference mode as others over the same memory."""
    return tuple(
        torch.from_dlpack(b) if isinstance(b, torch.Tensor) and b.is_inference() else b
        for b in buffers
    )


_ALIGNED = 64  # bytes: the boundary of memory that JAX can share
# References to a tensor that its list alone holds, as `fresh` sees them.
_ALONE = [(lambda t: sys.getrefcount(t))(t) for t in [torch.empty(0)]][0]  # noqa: RUF015


def fresh(t: torch.Tensor) -> torch.Tensor:
    """A result that nobody else holds: itself if it is dense, on a boundary, and its list alone has
    it, else a clone."""
    kept = (
        sys.getrefcount(t) > _ALONE or t._use_count() > 1 or holders(t.untyped_storage()._cdata) > 2
    )
    borrowed = kept or t.requires_grad or t.is_conj() or t.is_neg() or t._is_zerotensor()
    if borrowed or not t.is_contiguous() or t.data_ptr() % _ALIGNED:
        return t.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return t


# Private in torch 2.13, for microseconds: the number of C++ owners of a storage (its Python wrapper
# included, where one was made), by its `_cdata`, which `storage` finds without making one; and what
# torch.no_grad() does, without the context manager.
holders = torch._C._storage_Use_Count
storage = torch._C._storage_address
set_grad_enabled = torch._C._set_grad_enabled


@contextmanager
def on_stream(stream: int, tensors):
    """torch's current stream := the foreign CUDA stream, for the length of a `with`; the tensors
    name the device.

    XLA's streams are non-blocking, so they are ordered here, on the device, with torch's own:
    weights that torch wrote before the call are there, and what it writes after the call waits. The
    host waits for nothing."""
    device = tensors[0].device.index if tensors else torch.cuda.current_device()
    foreign, own = external(stream, device), torch.cuda.current_stream(device)
    foreign.wait_stream(own)
    with torch.cuda.stream(foreign):
        yield
    own.wait_stream(foreign)


@functools.lru_cache(maxsize=64)
def external(stream: int, device: int):
    """A foreign CUDA stream as torch's."""
    return torch.cuda.ExternalStream(stream, device=device)


def finish(tensors) -> None:
    """An eager call on a GPU waits for torch, since JAX takes the inputs' memory back in the order
    of another stream."""
    if any(t.is_cuda for t in tensors):
        torch.cuda.current_stream(tensors[0].device).synchronize()


# Tensors lent to the other bank for one call, and taken from it.


def lent(tensors) -> list:
    """The values of tensors, to be read only, over their own memory: NumPy arrays where NumPy knows
    the dtype, DLPack capsules elsewhere on the CPU, tensors on a GPU. Only what the borrower could
    not read is copied: conj and neg bits, and in a capsule or on a GPU what is not row-major."""
    out = []
    for t in tensors:
        plain = (
            t.is_cpu
            and t.layout is torch.strided
            and t.dtype in _NUMPY
            and not t.is_conj()
            and not t.is_neg()
            and t.data_ptr()
        )
        out.append(_from_loan(_Loan(t)) if plain else _lent(t))
    return out


class _Loan:
    """What NumPy takes for a DLPack exporter; Tensor.numpy() would forbid the tensor to be resized,
    ever."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor

    def __dlpack__(self, **_):
        return _to_capsule(self.tensor)

    def __dlpack_device__(self):
        return 1, 0  # kDLCPU


def _lent(t: torch.Tensor):
    """The same for tensors that need a look: empty, with bits, of other dtypes, on other devices,
    or without memory (TypeError)."""
    t = export(t.detach(), None, "JAX")
    if not t.is_cpu:
        return t.contiguous()
    return _from_loan(_Loan(t)) if t.dtype in _NUMPY else _to_capsule(t.contiguous())


_from_loan = np.from_dlpack
_NUMPY = frozenset(
    dtype for name, dtype in DTYPES.items() if not name.startswith(("bfloat16", "float8"))
)


def given(results) -> list:
    """Results that nobody else holds, to the other bank for good: as bare capsules on the CPU."""
    return [_to_capsule(t) if t.is_cpu else t for t in results]


def taken(results) -> list:
    """Tensors over results that the other bank has let go: nobody else reads or writes this
    memory."""
    take = _from_capsule if results and type(results[0]) is _Bare else import_
    return [*map(take, results)]


# Private in torch 2.13: Tensor.__dlpack__ and torch.from_dlpack without their checks, 0.1 us
# instead of 1.6 and 0.4 instead of 2.
_to_capsule = torch._C._to_dlpack
_from_capsule = torch._C._from_dlpack
_Bare = type(_to_capsule(torch.empty(0)))
