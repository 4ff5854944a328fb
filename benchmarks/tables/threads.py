"""One and two threads, with and without what the doctor advises. Each variant is a process that
waits for its turn: `python -m benchmarks.tables.threads MODEL CORES THREADS ADVICE`."""

from __future__ import annotations

import os
import subprocess
import sys

from benchmarks.harness import Case, late, said

MODELS = ("a torch model", "a JAX model")
# (title, cores, threads of torch, the doctor's option of XLA's)
TORCH = [
    ("ffi, one core, one thread", 1, 1, False),
    ("ffi, one core, two threads: against the advice", 1, 2, False),
    ("ffi, two cores, one thread", 2, 1, False),
    ("ffi, two cores, two threads", 2, 2, False),
    ("ffi, two cores, four threads: against the advice", 2, 4, False),
    ("bare torch, one core", 1, 1, False),
    ("bare torch, two cores, two threads", 2, 2, False),
]
JAX = [
    ("pure jax, one core", 1, 1, False),
    ("pure jax, one core, with the advice", 1, 1, True),
    ("pure jax, two cores", 2, 1, False),
    ("pure jax, two cores, with the advice", 2, 1, True),
    ("bridge.to_torch, one core", 1, 1, False),
    ("bridge.to_torch, one core, with the advice", 1, 1, True),
    ("bridge.to_torch, two cores", 2, 1, False),
    ("bridge.to_torch, two cores, with the advice", 2, 1, True),
]


class Worker:
    """A process that calls its variant n times for each number that it reads; stopped when this
    object is dropped."""

    def __init__(self, *arguments) -> None:
        command = [sys.executable, "-m", __name__, *map(str, arguments)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, n: int) -> None:
        print(n, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline().strip()
        if answer != "done":
            raise RuntimeError(answer or "its process ended")

    def __del__(self) -> None:
        self.process.kill()
        self.process.wait()


def torch_model(advice: bool, bare: bool):
    """A call of a small MACE on 216 atoms from JAX: energy and gradients."""
    import torch

    from benchmarks.engines import bare_model, salt
    from benchmarks.native import rattled
    from benchmarks.tables.models import in_jax
    from tests.model_cases import mace

    model, atoms = mace(torch.float32), rattled(salt(3))
    return bare_model(model, atoms, torch.float32) if bare else in_jax(model, atoms, "ffi")


def jax_model(advice: bool, bare: bool):
    """A call of a JAX NequIP on 64 atoms, by itself or from torch: energy and gradient."""
    import jax
    import jax.numpy as jnp
    import torch

    import bridge
    from benchmarks.engines import salt
    from benchmarks.harness import bare as repeated
    from benchmarks.harness import one_by_one
    from benchmarks.native import rattled, structure, with_edges
    from jax_side.doctor import XLAS_OWN
    from jax_side.models.nequip import NequIP

    apply, params = NequIP([11, 17], 4.0)
    exact, _ = with_edges(structure(rattled(salt(2))), 4.0)
    given = {k: jnp.asarray(x.int() if x.dtype == torch.int64 else x) for k, x in exact.items()}

    def energy(pos):
        return apply(params, given | {"pos": pos})["energy"].sum()

    options = {"compiler_options": XLAS_OWN} if advice else {}
    if bare:
        return one_by_one(jax.jit(jax.value_and_grad(energy), **options), given["pos"])
    pos = exact["pos"].requires_grad_()
    f = bridge.to_torch(jax.jit(energy, **options))
    return repeated(lambda: torch.autograd.grad(f(pos), pos))


def serve(answer, title: str, model: str, cores: str, threads: str, advice: str) -> None:
    """Reads numbers and makes so many calls, on some of the cores; `answer` says that it has."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(cores)])
    import torch

    torch.set_num_threads(int(threads))
    make = torch_model if model == MODELS[0] else jax_model
    run = make(advice == "True", title.startswith(("bare", "pure")))
    for line in sys.stdin:
        run(int(line))
        answer("done")


def workers(model: str, variants: list) -> dict:
    """Those that this machine has cores for."""
    found = {}
    for title, cores, threads, advice in variants:
        if cores <= len(os.sched_getaffinity(0)):
            found[title] = late(
                lambda t=title, c=cores, k=threads, a=advice: Worker(t, model, c, k, a)
            )
    return found


def cases(quick: bool) -> dict[str, Case]:
    each, first = dict(unit="ms", rounds=9), 2 if quick else None
    return {
        f"{MODELS[0]}: MACE of 216 atoms": Case(
            lambda: workers(MODELS[0], TORCH[:first]), ("bare torch, one core",), **each
        ),
        f"{MODELS[1]}: NequIP of 64 atoms": Case(
            lambda: workers(MODELS[1], JAX[:first]),
            ("pure jax, one core",),
            tuple(title for title, *_ in JAX if title.startswith("pure")),
            **each,
        ),
    }


if __name__ == "__main__":
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what packages print is no answer
    try:
        serve(lambda text: print(text, file=lines, flush=True), *sys.argv[1:])
    except Exception as error:
        print(said(error), file=lines, flush=True)
