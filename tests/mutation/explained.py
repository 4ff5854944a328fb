"""Mutants that no test has to kill, and why."""

from __future__ import annotations

from typing import Any

GPU = "runs on CUDA only: make gpu-check"
# Functions that do nothing on a CPU: (file, function).
ELSEWHERE: dict[tuple[str, str], str] = {
    ("jax_side/calls/lanes.py", "_enter_gpu"): GPU,
    ("torch_side/calls/buffers.py", "on_stream"): GPU,
    ("torch_side/calls/buffers.py", "external"): GPU,
    ("torch_side/calls/buffers.py", "_events"): GPU,
    ("torch_side/calls/buffers.py", "finish"): GPU,
    ("torch_side/calls/arrays.py", "_outlive"): GPU,
    ("torch_side/calls/arrays.py", "_mark"): GPU,
}

COST = "the same numbers at another cost"
BOTH = "both lists were made of the same one: strict= guards against errors of our own"
# (file, the first line that differs before, and after), as python -m tests.mutation prints them.
EXPLAINED: dict[tuple[str, str, str], str] = {
    (
        "jax_side/calls/arrays.py",
        "return jax.device_put(dense, cpu_device(here.depth), may_alias=True)",
        "return jax.device_put(dense, cpu_device(here.depth), may_alias=False)",
    ): COST + ": a copy",
    (
        "jax_side/calls/arrays.py",
        "readable = lent.flags.c_contiguous and not lent.ctypes.data % _CPU_ALIGN",
        "readable = lent.flags.c_contiguous and not lent.ctypes.data // _CPU_ALIGN",
    ): COST + ": a copy, on the CPU client of a call within a call",
    (
        "jax_side/calls/ending.py",
        "stuck = _last and not running and now - _last > QUIET",
        "stuck = _last and not running and now - _last >= QUIET",
    ): "no clock shows the limit itself",
    (
        "jax_side/calls/saved.py",
        'if any(r.device == "cuda" for r in records.values()):',
        'if not any(r.device == "cuda" for r in records.values()):',
    ): GPU + ", and a target of CUDA that nobody calls changes nothing",
    (
        "jax_side/calls/export.py",
        "for x, name in zip(leaves, output_names(out_tree), strict=True):",
        "for x, name in zip(leaves, output_names(out_tree), strict=False):",
    ): BOTH,
    (
        "jax_side/calls/compat.py",
        "return tuple(parse_flatten_op_sharding(sharding._to_xla_hlo_sharding(0), mesh)[0])",
        "return tuple(parse_flatten_op_sharding(sharding._to_xla_hlo_sharding(0), mesh)[ -1])",
    ): "of one array there is one",
    (
        "jax_side/calls/lanes.py",
        "_QUICK = 1e-3  # seconds: copies of the inputs of a usual call arrive earlier",
        "_QUICK = -0.999  # seconds: copies of the inputs of a usual call arrive earlier",
    ): COST,
    (
        "jax_side/calls/primitive.py",
        "platform = ctx.module_context.platforms[0]",
        "platform = ctx.module_context.platforms[ -1]",
    ): "there are several in an export alone, to which the platform is the same",
    (
        "jax_side/calls/lanes.py",
        "if waited > limit:",
        "if waited >= limit:",
    ): "no clock shows the limit itself",
    (
        "jax_side/calls/lanes.py",
        "time.sleep(0 if waited < _QUICK else 1e-5)  # the shortest real sleep takes 60 us",
        "time.sleep(0 if waited > _QUICK else 1e-5)  # the shortest real sleep takes 60 us",
    ): COST,
    (
        "jax_side/calls/lanes.py",
        "self._sized = functools.lru_cache(maxsize=64)(self._sized)",
        "self._sized = functools.lru_cache(maxsize= 65)(self._sized)",
    ): COST,
    (
        "jax_side/calls/primitive.py",
        "if fn.linear and all(i >= fixed for i in wrt):",
        "if not fn.linear and all(i >= fixed for i in wrt):",
    ): COST + ": the rule below gives the same, and differentiates where that is not needed",
    (
        "jax_side/calls/signature.py",
        "for s, name in zip(inputs, names, strict=True):",
        "for s, name in zip(inputs, names, strict=False):",
    ): BOTH,
    (
        "torch_side/calls/arrays.py",
        "_outlive(tensor, owner=shared())",
        "pass",
    ): GPU,
    (
        "torch_side/calls/batching.py",
        "for s, m in zip(self.of.inputs, self.mapped, strict=True)",
        "for s, m in zip(self.of.inputs, self.mapped, strict=False)",
    ): BOTH,
    (
        "torch_side/calls/batching.py",
        "given = dict(zip(self.inputs, tensors, strict=True))",
        "given = dict(zip(self.inputs, tensors, strict=False))",
    ): BOTH,
    (
        "torch_side/calls/compiling.py",
        'key=hashlib.sha256("\\n".join(made_of).encode()).hexdigest()[:32],',
        'key=hashlib.sha256("\\n".join(made_of).encode()).hexdigest()[: 33],',
    ): "a name of any length will do",
    (
        "torch_side/calls/running.py",
        "found = status.Status(may_read=True) if buffers.runs_ahead(tensors) else None",
        "found = status.Status(may_read=False) if buffers.runs_ahead(tensors) else None",
    ): GPU,
    (
        "jax_side/calls/registry.py",
        "release_retired(thorough=True)",
        "pass",
    ): COST + ": they are released when the next function is bridged",
    (
        "torch_side/calls/batching.py",
        "x = x.clamp(0, n_systems - 1)",
        "x = x.clamp(0, n_systems + 1)",
    ): "the results of this call are not given: the status has the error",
    (
        "torch_side/calls/calling.py",
        "if not isinstance(other, TorchCallable) or type(other) is not type(self):",
        "if not isinstance(other, TorchCallable) and type(other) is not type(self):",
    ): "Python asks the subclass, Padded, first",
    (
        "torch_side/calls/kernels.py",
        "return t.detach() + _MOVE * (1 + t.detach().abs()) * direction.to(t.dtype)",
        "return t.detach() + _MOVE / (1 + t.detach().abs()) * direction.to(t.dtype)",
    ): "any small move will do",
    (
        "torch_side/calls/kernels.py",
        "return any(_differ(a, b) for a, b in zip(found, gradients, strict=True) if b.numel())",
        "return any(_differ(a, b) for a, b in zip(found, gradients, strict=False) if b.numel())",
    ): BOTH,
    (
        "torch_side/calls/rewriting.py",
        "if schema is None or schema.is_mutable or not isinstance(known, torch.Tensor):",
        "if schema is None or schema.is_mutable and not isinstance(known, torch.Tensor):",
    ): "a graph that changes something in place is refused before it comes here",
    (
        "jax_side/calls/processes.py",
        "PERIOD = 0.5  # seconds between two looks at what other processes tell",
        "PERIOD = 1.5  # seconds between two looks at what other processes tell",
    ): COST + ": an error is told a second later",
    (
        "torch_side/calls/running.py",
        "b.copy_(r.detach() if inside and r.requires_grad else r)",
        "b.copy_(r.detach() if inside or r.requires_grad else r)",
    ): COST,
    (
        "torch_side/calls/running.py",
        "if found and into is None:",
        "if not found and into is None:",
    ): GPU,
    (
        "torch_side/potentials/strain.py",
        "scale = torch.linalg.vector_norm(cell, dim=-1).prod(-1)",
        "scale = torch.linalg.vector_norm(cell, dim=-1).prod(1)",
    ): "the last of two axes is axis 1",
    (
        "torch_side/calls/transforms.py",
        "row = lambda i: [a[i] if m else a for a, m in zip(arrays, mapped, strict=True)]",
        "row = lambda i: [a[i] if m else a for a, m in zip(arrays, mapped, strict=False)]",
    ): BOTH,
    (
        "jax_side/calls/arrays.py",
        "dense = lent if readable else lent.copy()",
        "dense = lent if not readable else lent.copy()",
    ): COST + ": JAX copies what it can't read",
    (
        "jax_side/calls/ending.py",
        "if len(devices) > 1:",
        "if len(devices) >= 1:",
    ): COST + ": one more array",
    (
        "jax_side/calls/processes.py",
        "GRACE = 10.0  # seconds in which a process may end by itself",
        "GRACE = 11.0  # seconds in which a process may end by itself",
    ): "a process ends a second later",
    (
        "jax_side/calls/registry.py",
        '_next = map("{:x}".format, itertools.count(1))',
        '_next = map("{:x}".format, itertools.count( 2))',
    ): "any numbers will do",
    (
        "torch_side/calls/kernels.py",
        "hook.remove()",
        "pass",
    ): COST + ": nobody reads what the hook notes any more",
    (
        "torch_side/calls/packages.py",
        'source = archive.read(names[0]).decode() if len(names) == 1 else ""',
        'source = archive.read(names[ -1]).decode() if len(names) == 1 else ""',
    ): "there is one",
    (
        "torch_side/calls/running.py",
        "or owners(t) > 1",
        "or owners(t) >= 1",
    ): COST + ": a second look finds nothing",
    (
        "torch_side/calls/status.py",
        "if axis >= 0:",
        "if axis >= 1:",
    ): "the first axis is where it belongs",
    (
        "torch_side/calls/status.py",
        "column = torch.arange(WIDTH, device=entries[0].device)",
        "column = torch.arange(WIDTH, device=entries[ 1].device)",
    ): "there are several, on one device",
    (
        "torch_side/calls/tracing.py",
        "return aliased[0] if aliased and isinstance(aliased[0], torch.fx.Node) else None",
        "return aliased[0] if aliased and isinstance(aliased[ -1], torch.fx.Node) else None",
    ): "a view is of one tensor",
    (
        "torch_side/potentials/static.py",
        "slot = _numbers(edges[0])",
        "slot = _numbers(edges[ 1])",
    ): "both rows are as long",
    (
        "torch_side/calls/wrap.py",
        "outs = over_rows(_batched(fn, mapped, size), tensors, level - 1)",
        "outs = over_rows(_batched(fn, mapped, size), tensors, level - 0)",
    ): COST + ": a level without a batch is passed over",
}


def reason(line: dict[str, Any]) -> str | None:
    """Returns why the mutant of a result may survive, None if it may not."""
    place = (line["file"], line["inside"])
    return ELSEWHERE.get(place) or EXPLAINED.get((line["file"], line["before"], line["after"]))
