"""A Function as one graph of ATen operations, its own backward inside: what a compiler can take."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bridge.errors import message
from bridge.failures import place
from bridge.function import Function, Spec
from torch_side.calls import buffers, inference, rewriting, running, status, transforms

OTHER_LANES = 'take lane="ffi" or "host", which run it as it is'


@dataclass(frozen=True, eq=False)
class Traced:
    """What `trace` returns.

    graph      a module of ATen operations, from the inputs of the Function to its outputs, and to
               the row of the status if there is one
    examples   tensors of the types of the inputs, without values
    texts      the texts of the codes of the status; none if nothing is checked
    constants  the tensors that the graph holds, weights for example, by their names in it"""

    graph: torch.fx.GraphModule
    examples: tuple[torch.Tensor, ...]
    texts: tuple[str, ...]
    constants: dict[str, torch.Tensor]

    @cached_property
    def digest(self) -> str:
        """A hash of all that decides what the program computes: graph, types, constants, texts."""
        types = [f"{t.dtype} {tuple(t.shape)} {t.device.type}" for t in self.examples]
        found = hashlib.sha256("\n".join([self.graph.code, *types, *self.texts]).encode())
        for name, x in self.constants.items():
            found.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
            dense = x.detach().cpu().resolve_conj().resolve_neg().contiguous()
            found.update(dense.reshape(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()


def trace(fn: Function, device: str) -> Traced:
    """Returns the graph of a Function for its input types, on "cpu" or "cuda".

    Nothing runs: fake tensors go through the user's code. Its weights, and all other tensors that
    it holds, become constants of the graph.

    Raises: NotImplementedError for code that can't be traced, naming the line (a value that is read
    on the host, shapes that depend on data, a Python operator of another library); and what the
    code itself raises."""
    inference.check_mode(fn.base.call.target)  # pyright: ignore[reportAttributeAccessIssue]
    engine: Any = fn.engine
    if isinstance(engine, transforms.Func):
        transforms.trust_in(fn.base)  # this runs the call, too, and not inside of a tracer
    examples = tuple(_example(s, device) for s in fn.inputs)
    checks = status.Status()

    def run(*tensors: torch.Tensor) -> list[torch.Tensor]:
        # A model may ask whether a tensor requires grad; these don't.
        grad_mode = torch.set_grad_enabled(engine.differentiates_inside)
        with status.collecting(checks), grad_mode, _Zeros():
            found = [y.detach() for y in fn(*tensors)]
            row = checks.row()
        dense = [y.resolve_conj().resolve_neg() for y in found]
        return dense if row is None else [*dense, row]

    with inference.uncompiled(), torch.inference_mode(False), _refusing(fn):
        graph = _graph(run, examples)
    inference.check_no_fake_kept(fn.base.call.target)  # pyright: ignore[reportAttributeAccessIssue]
    rewriting.unshare(graph)
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    _check_operators(graph, fn)
    _check_pure(graph, fn)
    held = {
        n.target: operator.attrgetter(n.target)(graph)
        for n in graph.graph.nodes
        if n.op == "get_attr"
    }
    constants = {name: x for name, x in held.items() if isinstance(x, torch.Tensor)}
    if device == "cpu":  # nobody has seen yet what is quicker on a GPU
        rewriting.write_out(graph)
    rewriting.sum_up(graph)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return Traced(graph, examples, tuple(checks.texts), constants)


class _Zeros(TorchDispatchMode):
    """Gives tangents of zero memory of their own. Sums of torch's kind without memory (2.13) with
    another tensor are on no device while they are traced."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.aten._efficientzerotensor.default:
            func = torch.ops.aten.zeros.default
        return func(*args, **(kwargs or {}))


def _graph(run: Any, examples: Sequence[torch.Tensor]) -> torch.fx.GraphModule:
    """What make_fx makes of it."""
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(run, tracing_mode="fake", _allow_non_fake_inputs=True)(*examples)


def _example(s: Spec, device: str) -> torch.Tensor:
    """A tensor of a type, without values."""
    return torch.empty(s.shape, dtype=buffers.DTYPES[s.dtype], device=device)


@contextmanager
def _refusing(fn: Function) -> Iterator[None]:
    """Turns what torch says of code that it can't trace into an error that names the line."""
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        UnsupportedOperatorException,
    )
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    refusals = (
        DataDependentOutputException,
        DynamicOutputShapeException,
        UnsupportedOperatorException,
        GuardOnDataDependentSymNode,
    )
    try:
        yield
    except refusals as error:
        raise _untraceable(fn, str(getattr(error, "func", error)), error) from error
    except RuntimeError as error:
        if type(error) is not RuntimeError or not any(w in str(error) for w in _WORDS):
            raise
        raise _untraceable(fn, str(error), error) from error


# What torch says where the value of a fake or traced tensor is asked for.
_WORDS = ("get value out of", "FakeTensor", ".numpy()", "fake tensor", "Cannot access data pointer")


def _untraceable(fn: Function, what: str, error: BaseException) -> NotImplementedError:
    """The error for a line that reads a value, or whose result has a shape that depends on data."""
    expected = f"{fn.base} to be made of operations whose shapes don't depend on values"
    return NotImplementedError(
        message(
            expected,
            f"{what.strip().splitlines()[0]} in {place(error)}",
            f"write that line with torch.where, index_add and the like, or {OTHER_LANES}",
        )
    )


def _check_operators(graph: torch.fx.GraphModule, fn: Function) -> None:
    """NotImplementedError for an operator that is not torch's own: only Python may know it; and for
    a float that is read on the host, which Inductor (torch 2.13) rounds to float32."""
    for node in graph.graph.nodes:
        target = node.target
        if isinstance(node.meta.get("val"), torch.SymFloat):
            expected = f"{fn.base} to be made of tensors, which is compiled without Python"
            do = f"keep the value a tensor, or {OTHER_LANES}"
            raise NotImplementedError(message(expected, "a float that is read by .item()", do))
        if node.op != "call_function" or getattr(target, "__module__", "") == "_operator":
            continue
        namespace = getattr(target, "namespace", None)
        if namespace not in ("aten", "prims"):
            raise NotImplementedError(
                message(
                    f"operators of torch itself in {fn.base}, which is compiled without Python",
                    f"{target}",
                    OTHER_LANES,
                )
            )


def _check_pure(graph: torch.fx.GraphModule, fn: Function) -> None:
    """ValueError for a callable that changes an input, or a tensor that it holds, in place."""
    for node in graph.graph.nodes:
        for changed in _written(node):
            root = changed
            while (base := _viewed(root)) is not None:
                root = base
            if root.op == "placeholder":
                number = [n for n in graph.graph.nodes if n.op == "placeholder"].index(root)
                raise inference.changed(fn.base, running.input_name(fn, number))
            if root.op == "get_attr":
                do = "use out-of-place operations, or clone it first"
                got = f"one of shape {tuple(root.meta['val'].shape)} changed in place by {node.target}"
                expected = f"{fn.base} to leave the tensors that it holds as they are"
                raise ValueError(message(expected, got, do))


def _written(node: torch.fx.Node) -> list[torch.fx.Node]:
    """The arguments that an operator changes in place."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    given = dict(zip((a.name for a in schema.arguments), node.args)) | node.kwargs
    named = {a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write}
    return [x for name, x in given.items() if name in named and isinstance(x, torch.fx.Node)]


def _viewed(node: torch.fx.Node) -> torch.fx.Node | None:
    """The argument whose memory the result of an operator has; None for new memory."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not any(r.alias_info for r in schema.returns):
        return None
    aliased = [x for a, x in zip(schema.arguments, node.args) if a.alias_info]
    return aliased[0] if aliased and isinstance(aliased[0], torch.fx.Node) else None
