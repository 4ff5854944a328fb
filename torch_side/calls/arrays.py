"""DLPack in and out of torch: which tensors can lend their memory, which must be copied, and why."""

from __future__ import annotations

import sys
from collections import deque
from functools import partial
from typing import Any

import torch

from bridge.errors import message, spec

_NAMES = """bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 bfloat16 float32 float64 complex64 complex128
float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu"""
DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name) for name in _NAMES.split() if hasattr(torch, name)
}
_KNOWN = {dtype: name for name, dtype in DTYPES.items()}
# The boundaries, in bytes, of the pickiest consumer that we know.
_CPU_ALIGN = 64  # as measured
_GPU_ALIGN = 16  # as its source has it
_OR_COPY = ", or copy=None to let it be copied"


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the neutral name, such as "float32", "bfloat16" or "float8_e4m3fn".

    It is the same in torch, NumPy and ml_dtypes."""
    return _KNOWN.get(dtype) or str(dtype).removeprefix("torch.")


def export(
    tensor: torch.Tensor, copy: bool | None = None, dst: str = "the consumer"
) -> torch.Tensor:
    """Returns a tensor whose `__dlpack__` can be consumed without a copy.

    That is `tensor` itself wherever possible. Shape, dtype, device and values are kept, and conj
    and neg bits are resolved. The result never requires grad. `dst` names the consumer in error
    texts.

    Memory can be lent if it is dense and starts on a 64-byte boundary (16 on a GPU). Dense means
    row-major, or a permutation of it: transposed, channels_last. The tensor must have neither
    requires_grad, since an optimizer would change it under the consumer, nor the conj or neg bit.
    Empty tensors can always be lent.

    copy=None   copies only what can't be lent
    copy=True   always gives fresh, row-major memory
    copy=False  never copies; it raises ValueError instead

    Who owns the memory: a lent tensor and the consumer's array share it, and either keeps it alive.
    WRITING TO THE TENSOR IN PLACE CHANGES THE ARRAY, which its framework believes constant. A copy
    belongs to the consumer alone. It is complete when this returns; on a GPU it is made in the
    order of the current stream. The whole of `copy` is done here. Where the consumer has a copy
    argument too, its copy=False is then a check that costs nothing, and its copy=True makes a
    second copy.

    Raises: ValueError if copy=False and a copy is needed; it names the reason ("requires_grad",
    "stride 0", "unaligned offset of 4 bytes") and the cure. TypeError for what has no dense memory
    (sparse, nested, quantized, meta and fake tensors, and those inside torch.func transforms), for
    a dtype that only torch knows, and for what is no tensor.

    >>> x = torch.arange(6.0).reshape(2, 3)
    >>> export(x.T).data_ptr() == x.data_ptr(), export(x[:, :2]).data_ptr() == x.data_ptr()
    (True, False)
    """
    address = _address(tensor)
    if copy:
        return _fresh(tensor)
    why = _obstacle(tensor, address)
    if why is None:
        return tensor
    if copy is None:
        return _fresh(tensor)
    reason, do = why
    got = f"{spec(tensor.shape, dtype_name(tensor.dtype))} with {reason} and copy=False"
    raise ValueError(message(f"a tensor whose memory {dst} can share", got, do + _OR_COPY))


def import_(obj: Any, copy: bool | None = None) -> torch.Tensor:
    """Returns a tensor over the memory of any object that has `__dlpack__`.

    Such an object is an array of NumPy, of CuPy or of the other bank. Shape, dtype, device and
    layout are the producer's, so that a transposed layout arrives as strides. The result doesn't
    require grad. Every dtype that DLPack carries and torch knows will do, and every shape, empty
    and 0-d ones included.

    copy=None, copy=False  share the memory (False also forbids the producer to copy)
    copy=True              always gives fresh memory

    Who owns the memory: it is the producer's, and the tensor keeps it alive, also after the
    producer's object was deleted. WRITING TO THE TENSOR IN PLACE CHANGES THE PRODUCER'S ARRAY,
    which its framework may believe constant: use copy=True for a tensor to be written to. On a GPU
    the protocol orders the two streams, without a host synchronisation. Memory that the tensor
    gives up goes back to the producer once torch's current stream has done the work that it had
    then.

    Raises: TypeError if `obj` has no `__dlpack__`. ValueError, with the producer's own text, if the
    producer can't lend its memory or torch can't take it: for a dtype that only the producer knows,
    or for copy=False where it must copy.

    >>> import numpy
    >>> a = numpy.zeros(3)
    >>> import_(a)[0] = 5.0
    >>> a[0] == 5.0
    np.True_
    """
    if not hasattr(obj, "__dlpack__"):
        raise TypeError(
            message("an object with __dlpack__", type(obj).__name__, "make an array of it first")
        )
    try:
        shared = partial(torch.from_dlpack, obj, copy=None if copy else copy)
        tensor = shared()
        if tensor.is_cuda:
            _outlive(tensor, owner=shared())
    except (BufferError, RuntimeError, ValueError, TypeError) as error:
        do = "make a dense copy in a dtype and on a device that torch knows first"
        raise ValueError(
            message("memory that torch can share", f"{type(obj).__name__}: {error}", do)
        ) from error
    return tensor.clone() if copy else tensor


# (an event of torch's stream, the owner of the memory that is read before that event)
_waiting: deque[tuple[torch.Event | torch.cuda.Event, Any]] = deque()


def _outlive(tensor: torch.Tensor, owner: Any) -> None:
    """Lets `owner` live as long as the memory of `tensor`, and until the GPU has read that memory
    for the last time.

    A producer takes memory back in the order of its own stream. Kernels that torch has still to run
    would read what the producer writes there next. On an H200, JAX's next arrays were seen in the
    results of torch."""
    while _waiting and _waiting[0][0].query():
        _waiting.popleft()
    _keep(tensor.untyped_storage(), _Owner(owner, tensor.device))


def _keep(storage: Any, owner: _Owner) -> None:
    """A storage of torch takes any attribute, though its type names none."""
    storage.owner = owner


class _Owner:
    """What a storage holds; it dies with the storage."""

    __slots__ = ("device", "owner")

    def __init__(self, owner: Any, device: torch.device) -> None:
        self.owner = owner
        self.device = device

    def __del__(self) -> None:
        if sys.is_finalizing():
            return
        done = _mark(self.device)
        if not done.query():
            _waiting.append((done, self.owner))


def _mark(device: torch.device) -> torch.Event | torch.cuda.Event:
    """An event that comes when torch's current stream on `device` has done all that it has been
    given so far."""
    return torch.cuda.current_stream(device).record_event()


def check_dense(t: torch.Tensor) -> None:
    """Raises TypeError, with the cure, for a tensor without a shape and dtype as others have them.

    Such tensors are nested, sparse or quantized."""
    if t.is_nested or t.layout is not torch.strided or t.is_quantized:
        raise _type_error(t)


def _address(t: torch.Tensor) -> int:
    """The address of the elements. Raises TypeError if there is none, or if the dtype is one that
    nobody else knows."""
    dense = (
        isinstance(t, torch.Tensor)
        and t.layout is torch.strided
        and not t.is_nested
        and not t.is_meta
    )
    if not dense or t.dtype not in _KNOWN:
        raise _type_error(t)
    try:
        address = t.data_ptr()
    except RuntimeError:  # inside torch.func
        address = 0
    if not address and t.numel() and not t._is_zerotensor():
        raise _type_error(t)
    return address


def _type_error(t: Any) -> TypeError:
    """An error that says what keeps `t` from having memory to lend."""
    if not isinstance(t, torch.Tensor):
        return TypeError(
            message("a torch.Tensor", type(t).__name__, "make one with torch.as_tensor")
        )
    for bad, kind, do in (
        (t.is_nested, "a nested tensor", "pass its parts, or a padded tensor"),
        (t.layout is not torch.strided, f"a tensor of layout {t.layout}", "pass tensor.to_dense()"),
        (
            t.is_quantized,
            f"a quantized tensor ({t.dtype})",
            "pass tensor.dequantize(), or tensor.int_repr()",
        ),
        (
            t.is_meta,
            "a meta tensor, which has no memory",
            "move the model or tensor to a real device",
        ),
        (
            t.dtype not in _KNOWN,
            f"{t.dtype}, which only torch knows",
            f"cast it to one of {', '.join(DTYPES)}",
        ),
    ):
        if bad:
            return TypeError(message("a dense tensor of a dtype that both sides know", kind, do))
    do = "inside torch.func, torch.compile and torch.export call a function made by bridge.to_torch instead"
    return TypeError(
        message(
            "a tensor with memory of its own", f"a traced or wrapped one ({type(t).__name__})", do
        )
    )


def _obstacle(t: torch.Tensor, address: int) -> tuple[str, str] | None:
    """(reason, cure) if the memory can't be lent as it is, else None."""
    if t.requires_grad:
        return "requires_grad", "pass tensor.detach() to share its memory without the graph"
    if t.is_conj():
        return "the conj bit", "pass tensor.resolve_conj()"
    if t.is_neg():
        return "the neg bit", "pass tensor.resolve_neg()"
    if t._is_zerotensor():  # as torch.func.jvp gives them
        return "zeros that torch keeps without memory", "pass tensor.clone()"
    if not t.is_contiguous() and not _permuted(t):
        zero = any(s == 0 and n > 1 for s, n in zip(t.stride(), t.shape))
        return (
            "stride 0" if zero else f"strides {t.stride()}, not dense",
            "pass tensor.contiguous()",
        )
    past = address % (_CPU_ALIGN if t.is_cpu else _GPU_ALIGN)
    if past:
        return f"unaligned offset of {past} bytes", "pass tensor.clone()"
    return None


def _permuted(t: torch.Tensor) -> bool:
    """True where the strides are those of a row-major array with its axes permuted, so that there
    are neither gaps nor overlap."""
    dense = 1
    for stride, size in sorted((s, n) for s, n in zip(t.stride(), t.shape) if n != 1):
        if stride != dense:
            return False
        dense *= size
    return True


def _fresh(t: torch.Tensor) -> torch.Tensor:
    """A row-major copy of the values alone, with conj and neg bits resolved.

    torch starts every allocation on a 64-byte boundary."""
    return t.detach().clone(memory_format=torch.contiguous_format)
