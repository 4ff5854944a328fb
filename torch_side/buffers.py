"""Foreign buffers as tensors during a call: no copies, no checks that the caller made already.

A buffer is a torch.Tensor (made by the ffi lane), or anything with `__dlpack__`. Dtypes that a lane can't carry travel
in a carrier of the same bytes: complex as a real array with a trailing 2, bfloat16 and float8 as unsigned integers.
"""

from __future__ import annotations

import torch

from bridge.function import Spec


def dtype(name: str) -> torch.dtype:
    return getattr(torch, name)


def dtype_name(t: torch.Tensor) -> str:
    return str(t.dtype)[6:]


def spec_of(t: torch.Tensor) -> Spec:
    return Spec(tuple(t.shape), dtype_name(t))


def view(buffer, spec: Spec) -> torch.Tensor:
    """The buffer as a tensor of the spec's dtype, sharing its memory."""
    t = buffer if isinstance(buffer, torch.Tensor) else torch.from_dlpack(buffer)
    want = dtype(spec.dtype)
    if t.dtype == want:
        return t
    return torch.view_as_complex(t) if want.is_complex else t.view(want)


def fresh(t: torch.Tensor) -> torch.Tensor:
    """A result that nobody else holds: itself if it is dense and alone on its storage, else a clone."""
    alone = holders(t.untyped_storage()) == 2 and t.is_contiguous() and not (t.is_conj() or t.is_neg() or t.requires_grad)
    return t if alone else t.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)


def holders(storage: torch.UntypedStorage) -> int:
    """How many C++ owners a storage has, its Python wrapper included (private in torch 2.13: torch._C._storage_Use_Count)."""
    return torch._C._storage_Use_Count(storage._cdata)


def on_stream(stream: int, tensors):
    """torch's current stream := the foreign CUDA stream, for the length of a `with`; the tensors name the device."""
    device = tensors[0].device if tensors else torch.cuda.current_device()
    return torch.cuda.stream(torch.cuda.ExternalStream(stream, device=device))
