"""Checks of benchmarks.gpu_check on what goes wrong: errors, memory, threads, libraries."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch

import bridge
from benchmarks import gpu_checks
from benchmarks.gpu_checks import CHECKS, check, energy, expect, place, same
from benchmarks.harness import one_by_one
from torch_side.calls import buffers, export

ROOT = Path(__file__).resolve().parents[1]


@check()
def python_errors(gpu, values):
    """An exception in a call ends the program with its text, bridge.raising gives it back with its
    type, and the next call works."""
    x = jax.device_put(jnp.ones(8, "float32"), gpu)

    def picky(x):
        if float(x[0]) > 1:
            raise ValueError("too large for this model")
        return 2 * x

    for lane in ("ffi", "host"):
        f = jax.jit(bridge.to_jax(picky, lane=lane, outputs=lambda x: x))
        try:
            jax.block_until_ready(f(3 * x))
        except Exception as error:
            values[lane] = next((t for t in str(error).splitlines() if "too large" in t), "")[:200]
        expect(values.get(lane), f"no error with its text on the {lane} lane")
        try:
            with bridge.raising():
                jax.block_until_ready(f(3 * x))
        except ValueError as error:
            values[f"{lane}, raising"] = str(error)[:100]
        expect(f"{lane}, raising" in values, "bridge.raising gave no ValueError")
        same(f(x), 2 * np.ones(8), f"the call after an error on the {lane} lane")


def elsewhere(code: str, timeout: float = 60) -> tuple[int, str]:
    """(exit code, what was printed) of a process that runs this code."""
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )
    return ended.returncode, ended.stdout + ended.stderr[-1500:]


@check(limit=90, card=True)
def kernel_errors(gpu, values):
    """An index out of bounds in a kernel of torch ends its process with an error, and does not
    hang."""
    code = """
import jax, jax.numpy as jnp, torch, bridge
f = jax.jit(bridge.to_jax(lambda x: x[(x * 0 + 100).long()], lane="ffi", outputs=lambda x: x))
print(f(jnp.ones(8)).sum())
"""
    ended, said = elsewhere(code)
    values |= {"exit code": ended, "said": said[-300:]}
    expect(ended != 0 and "assert" in said, "no error of a kernel was told")


@check(limit=120)
def imports(gpu, values):
    """Both orders of importing the two frameworks work, with a call each way."""
    for first, second in (("jax", "torch"), ("torch", "jax")):
        code = f"""
import {first}, {second}, bridge, jax.numpy as jnp
d = jax.devices("{gpu.platform if gpu.platform == "cpu" else "cuda"}")[0]
x = jax.device_put(jnp.ones(8), d)
print(jax.jit(bridge.to_jax(torch.sin, lane="ffi"))(x).shape, bridge.to_torch(jnp.sin)(bridge.to_torch(x)).shape)
"""
        ended, said = elsewhere(code)
        values[f"{first} first"] = said.strip().splitlines()[-1][:200] if said.strip() else ""
        expect(ended == 0, f"{first} before {second}: {said[-500:]}")


@check()
def threads(gpu, values):
    """Two host threads run programs with bridged calls at once, and get their own numbers."""
    f = jax.jit(jax.value_and_grad(bridge.to_jax(energy, lane="ffi")))
    rng = np.random.default_rng(0)
    inputs = [
        jax.device_put(jnp.asarray(rng.uniform(0, 6, (16, 3)), "float32"), gpu) for _ in range(2)
    ]
    want = [jax.tree.map(np.asarray, f(x)) for x in inputs]
    rounds = 20

    def many(k):
        return [jax.tree.map(np.asarray, f(inputs[k])) for _ in range(rounds)]

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(many, range(2)))
    apart = [
        float(np.abs(a - b).max())
        for k in range(2)
        for one in found[k]
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(want[k]), strict=True)
    ]
    values |= {"calls": 2 * rounds, "apart": max(apart)}
    expect(max(apart) < 1e-4, "a thread got another number")


@check(limit=90)
def torch_compile(gpu, values):
    """A JAX function within torch.compile, forward and backward, equals itself without."""
    there = bridge.to_torch(lambda x: (jnp.sin(x) ** 2).sum())
    found = {}
    for name, run in (("eager", lambda f: f), ("compiled", torch.compile)):
        x = torch.linspace(0, 1, 64, device=place(gpu), requires_grad=True)
        y = run(lambda x: 2 * there(x * x))(x)
        y.backward()
        found[name] = y.detach().cpu(), x.grad.cpu()
    apart = [float((a - b).abs().max()) for a, b in zip(found["eager"], found["compiled"])]
    values |= dict(zip(("value", "gradient"), apart))
    expect(max(apart) < 1e-5, "another number when compiled")


@check(card=True)
def missing_event(gpu, values):
    """Without the events that order XLA's stream and torch's own, order_weights fails: a wrong
    order would be seen."""

    @contextlib.contextmanager
    def unordered(stream, tensors):
        with torch.cuda.stream(buffers.external(stream, tensors[0].device.index)):
            yield

    kept, export.TorchFunction.on_stream = export.TorchFunction.on_stream, staticmethod(unordered)
    try:
        CHECKS["order_weights"].run(gpu, values)
    except AssertionError as error:
        values["seen"] = str(error)
    finally:
        export.TorchFunction.on_stream = staticmethod(kept)
    expect("seen" in values, "wrong numbers were expected, and none came")


@check(card=True)
def leak(gpu, values):
    """A planted leak of each framework's memory is seen by what the check `memory` reads."""
    kept = []
    ours = lambda: gpu.memory_stats()["bytes_in_use"]
    theirs = lambda: torch.cuda.memory_stats(place(gpu))["allocated_bytes.all.current"]
    before = ours(), theirs()
    f = bridge.to_jax(lambda x: (kept.append(x.clone()), x * 2)[1], lane="ffi", outputs=lambda x: x)
    x = jax.device_put(jnp.ones(1024, "float32"), gpu)
    keep = jax.jit(f)
    one_by_one(lambda x: kept.append(keep(x)), x)(max(10, gpu_checks.CALLS // 100))
    values |= {"jax grew": ours() - before[0], "torch grew": theirs() - before[1]}
    expect(min(values["jax grew"], values["torch grew"]) > 4096 * 10, "a leak was not seen")


@check(limit=90, card=True)
def out_of_memory(gpu, values):
    """More memory than the card has, asked for by torch in a call and by XLA, is an error that says
    so, and the process lives on; the doctor says what XLA takes beforehand."""
    x = jax.device_put(jnp.ones(8, "float32"), gpu)
    much = 2**40
    asking = {
        "torch": bridge.to_jax(
            lambda x: x + torch.empty(much, device=x.device)[0], outputs=lambda x: x
        ),
        "XLA": lambda x: jnp.ones((much // 4,), "float32").at[0].set(x[0]),
    }
    for name, f in asking.items():
        try:
            jax.block_until_ready(jax.jit(f)(x))
        except Exception as error:
            values[name] = str(error).strip().splitlines()[0][:200]
        told = values.get(name, "").lower()
        expect("memory" in told or "exhausted" in told, f"{name} did not say that it was out of it")
    same(jax.jit(bridge.to_jax(lambda x: 2 * x))(x), 2 * np.ones(8), "a call after that")
    from bridge.join.calls import diagnosis

    rows = [found for what, _, found in diagnosis() if "memory" in (what + found).lower()]
    values["doctor"] = rows
    expect(rows, "the doctor says nothing of XLA's share of the memory")
