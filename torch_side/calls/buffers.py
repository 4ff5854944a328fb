"""Foreign buffers as tensors during a call: no copies, no checks that the caller made already.

A buffer is a torch.Tensor (made by the ffi lane), a bare DLPack capsule, or anything with
`__dlpack__`. Dtypes that a lane can't carry travel in a carrier of the same bytes: complex as a
real array with a trailing 2, bfloat16 and float8 as unsigned integers.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from bridge.function import Spec
from torch_side.calls.arrays import DTYPES, dtype_name, export, import_


def spec_of(t: torch.Tensor) -> Spec:
    """Returns the shape and the dtype name of a tensor."""
    return Spec(tuple(t.shape), dtype_name(t.dtype))


def kinds(specs: Iterable[Spec]) -> tuple[tuple[torch.Size, torch.dtype], ...]:
    """Returns (shape, dtype) of each spec as a tensor has them, for checks that take no time."""
    return tuple((torch.Size(s.shape), DTYPES[s.dtype]) for s in specs)


def views(buffers: Iterable[Any], specs: Iterable[Spec]) -> list[torch.Tensor]:
    """Returns the buffers as tensors of the specs' dtypes, over the same memory."""
    return [view(b, DTYPES[s.dtype]) for b, s in zip(buffers, specs)]


def view(buffer: Any, dtype: torch.dtype) -> torch.Tensor:
    """Returns a buffer as a tensor of `dtype`, over the same memory.

    The buffer is of that dtype or of its carrier."""
    if type(buffer) is _Bare:
        buffer = _from_capsule(buffer)
    elif not isinstance(buffer, torch.Tensor):
        buffer = torch.from_dlpack(buffer)
    if buffer.dtype is dtype:
        return buffer
    other = torch.view_as_complex(buffer) if dtype.is_complex else buffer.view(dtype)
    return other.detach()  # which does not hold the buffer


def normal(buffers: Iterable[Any]) -> tuple:
    """Returns the buffers, with other tensors over the same memory for those of inference mode."""
    return tuple(
        torch.from_dlpack(b) if isinstance(b, torch.Tensor) and b.is_inference() else b
        for b in buffers
    )


_ALIGNED = 64  # bytes: the boundary of memory that JAX can share
# References to a tensor that its list alone holds, as `fresh` sees them.
_ALONE = [(lambda t: sys.getrefcount(t))(t) for t in [torch.empty(0)]][0]  # noqa: RUF015


def fresh(t: torch.Tensor) -> torch.Tensor:
    """Returns a result as a dense, aligned tensor that nobody else holds.

    That is the result itself if it is such a tensor and only its list refers to it, else a
    clone."""
    kept = sys.getrefcount(t) > _ALONE or owners(t) > 1 or holders(t.untyped_storage()._cdata) > 2
    borrowed = kept or t.requires_grad or t.is_conj() or t.is_neg() or t._is_zerotensor()
    if borrowed or not t.is_contiguous() or t.data_ptr() % _ALIGNED:
        return t.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return t


# What follows is private in torch 2.13, and saves microseconds. pyright does not find two of these
# names in torch's stubs.

# The number of C++ owners of a tensor.
owners: Callable[[torch.Tensor], int]
owners = torch.Tensor._use_count  # pyright: ignore[reportAttributeAccessIssue]
# The number of C++ owners of a storage, its Python wrapper included where one was made. It is asked
# by the `_cdata` of the storage, which `storage` finds without making that wrapper.
holders: Callable[[int], int] = torch._C._storage_Use_Count
storage: Callable[[torch.Tensor], int]
storage = torch._C._storage_address  # pyright: ignore[reportAttributeAccessIssue]
# What torch.no_grad() does, without the context manager.
set_grad_enabled: Callable[[bool], None] = torch._C._set_grad_enabled


@contextmanager
def on_stream(stream: int, tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Makes a foreign CUDA stream torch's current stream for the length of a `with`.

    The device is that of the tensors. XLA's streams are non-blocking, so that they are ordered
    here, on the device, with torch's own stream: weights that torch wrote before the call are
    there, and what torch writes after the call waits for its end. The host waits for nothing.
    Memory that torch takes in the call is of XLA's stream, and is used again in that order."""
    device = tensors[0].device.index if tensors else torch.cuda.current_device()
    foreign, own = external(stream, device), torch.cuda.current_stream(device)
    before, after = _events(stream, device)
    before.record(own)
    foreign.wait_event(before)
    with torch.cuda.stream(foreign):
        yield
    after.record(foreign)
    own.wait_event(after)


def runs_ahead(tensors: Sequence[torch.Tensor]) -> bool:
    """Returns True where the host runs ahead of the device of the tensors, a GPU, and a value that
    it reads holds it up."""
    return any(t.is_cuda for t in tensors)


@functools.lru_cache(maxsize=64)
def external(stream: int, device: int) -> torch.cuda.ExternalStream:
    """Returns a foreign CUDA stream as one of torch's."""
    return torch.cuda.ExternalStream(stream, device=device)


@functools.lru_cache(maxsize=64)
def _events(stream: int, device: int) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    """The events before and after calls on a foreign stream, recorded anew for each: to make one
    takes longer. A wait is for what was recorded last, which is later than what it needs at most."""
    return torch.cuda.Event(), torch.cuda.Event()


def finish(tensors: Sequence[torch.Tensor]) -> None:
    """Waits for torch's current stream, if the tensors are on a GPU.

    An eager call has to: JAX takes the memory of the inputs back in the order of another stream."""
    if any(t.is_cuda for t in tensors):
        torch.cuda.current_stream(tensors[0].device).synchronize()


# Tensors lent to the other bank for one call, and taken from it.


def lent(tensors: Iterable[torch.Tensor]) -> list:
    """Returns the values of tensors, to be read only, over the tensors' own memory.

    On the CPU these are NumPy arrays where NumPy knows the dtype, else DLPack capsules. On a GPU
    they are tensors. Only what the borrower could not read is copied: tensors with conj or neg
    bits, and in a capsule or on a GPU those that are not row-major.

    Raises: TypeError for a tensor without memory."""
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
    """What NumPy takes for a DLPack exporter.

    Tensor.numpy() would forbid the tensor to be resized, for ever."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **_: Any) -> Any:
        return _to_capsule(self.tensor)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0  # kDLCPU


def _lent(t: torch.Tensor) -> Any:
    """The same for one tensor that needs a look: it is empty, has conj or neg bits, is of another
    dtype or on another device, or has no memory (TypeError)."""
    t = export(t.detach(), None, "JAX")
    if not t.is_cpu:
        return t.contiguous()
    return _from_loan(_Loan(t)) if t.dtype in _NUMPY else _to_capsule(t.contiguous())


_from_loan: Callable[[_Loan], np.ndarray] = np.from_dlpack
_NUMPY = frozenset(
    dtype for name, dtype in DTYPES.items() if not name.startswith(("bfloat16", "float8"))
)


def given(results: Iterable[torch.Tensor]) -> list:
    """Returns results that nobody else holds, for the other bank to keep.

    On the CPU these are bare capsules, on a GPU the tensors."""
    return [_to_capsule(t) if t.is_cpu else t for t in results]


def taken(results: Sequence[Any]) -> list[torch.Tensor]:
    """Returns tensors over results that the other bank has let go.

    Nobody else reads or writes their memory."""
    take = _from_capsule if results and type(results[0]) is _Bare else import_
    return [*map(take, results)]


# Private in torch 2.13: Tensor.__dlpack__ and torch.from_dlpack without their checks. They take 0.1
# us instead of 1.6, and 0.4 us instead of 2.
_to_capsule = torch._C._to_dlpack
_from_capsule = torch._C._from_dlpack
_Bare = type(_to_capsule(torch.empty(0)))
