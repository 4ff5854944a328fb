"""Start-up: whole processes, from their start to their end; imports alone, the first result, and the
second process, for which something was kept on the disk."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.harness import Case, late

IMPORTS = {
    "nothing": "",
    "jax": "import jax",
    "torch": "import torch",
    "jax, torch": "import jax, torch",
    "bridge alone": "import bridge",
    "bridge, jax, torch": "import jax, torch, bridge; bridge.to_jax, bridge.to_torch",
    "wrap-torch2jax": "import wrap_torch2jax",
    "torch_jax_interop": "import torch_jax_interop",
    "jax2torch": "import jax2torch",
}
CACHE = (
    'jax.config.update("jax_compilation_cache_dir", {folder!r});'
    'jax.config.update("jax_persistent_cache_min_compile_time_secs", 0);'
)
X = "x = jax.numpy.arange(64.0);"
SPRINGS = "f = lambda x: (x ** 2).sum();"
TO_JAX = "g = jax.jit(jax.grad(bridge.to_jax(f{options}))); g(x).block_until_ready()"
CALLED = (
    "both = lambda x: jax.pure_callback("
    "lambda x: 2 * torch.tensor(x.tolist()).numpy(), jax.ShapeDtypeStruct((64,), 'float32'), x);"
    "jax.jit(both)(x).block_until_ready()"
)
FIRST_IN_JAX = {
    "pure jax": f"import jax; {X} {SPRINGS} jax.jit(jax.grad(f))(x).block_until_ready()",
    "pure torch": "import torch; x = torch.arange(64.0).requires_grad_(); (x ** 2).sum().backward()",
    "pure_callback by hand": f"import jax, torch; {X} {CALLED}",
    "wrap-torch2jax": f"import jax, torch, wrap_torch2jax as w; {X} {SPRINGS} "
    "g = jax.jit(jax.grad(w.torch2jax(f, torch.ones(64)))); g(x).block_until_ready()",
    "bridge, ffi": f"import jax, torch, bridge; {X} {SPRINGS} {TO_JAX.format(options='')}",
    "bridge, host": f"import jax, torch, bridge; {X} {SPRINGS} "
    + TO_JAX.format(options=", lane='host'"),
}
SECOND = {
    "bridge, ffi, XLA's cache kept": f"import jax, torch, bridge; {CACHE} {X} {SPRINGS} "
    + TO_JAX.format(options=""),
    "pure jax, XLA's cache kept": f"import jax; {CACHE} {X} {SPRINGS} "
    "jax.jit(jax.grad(f))(x).block_until_ready()",
}
NATIVE = f"import jax, torch, bridge; {X} {SPRINGS} " + TO_JAX.format(options=", lane='native'")
SAVED = (
    f"import jax, torch, bridge; {X} {SPRINGS} "
    "g = jax.jit(jax.grad(bridge.to_jax(f, lane='native')));"
    "bridge.native.save(bridge.native.export(g, x), {folder!r})"
)
LOADED = (
    f"import jax, bridge; {X} g = bridge.native.load({{folder!r}}, trust=True); g(x).block_until_ready();"
    "import sys; assert 'torch' not in sys.modules"
)
Y = "x = torch.arange(64.0).requires_grad_();"
FIRST_IN_TORCH = {
    "pure torch": f"import torch; {Y} (x ** 2).sum().backward()",
    "torch_jax_interop": f"import jax, torch, torch_jax_interop as t; {Y} "
    "t.WrappedJaxFunction(jax.jit(lambda _, x: (x ** 2).sum()), ())(x).backward()",
    "jax2torch": f"import jax, torch, jax2torch as t; {Y} "
    "t.jax2torch(jax.jit(lambda x: (x ** 2).sum()))(x).backward()",
    "bridge": f"import jax, torch, bridge; {Y} "
    "bridge.to_torch(lambda x: (x ** 2).sum())(x).backward()",
}


def run_of(code: str):
    """n whole processes, one after another.

    Raises: RuntimeError with the last line that it wrote, for one that fails."""
    environment = os.environ | {"PYTHONPATH": str(Path.cwd()), "JAX_PLATFORMS": "cpu"}

    def run(n):
        for _ in range(n):
            ended = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, env=environment
            )
            if ended.returncode:
                raise RuntimeError((ended.stderr.strip() or "no text").splitlines()[-1])

    return run


def processes(codes: dict) -> dict:
    return {name: late(lambda code=code: run_of(code)) for name, code in codes.items()}


def first_in_jax() -> dict:
    """The first gradient; with a cache, that of the second process, since the first is not
    timed."""
    folder = Path(tempfile.mkdtemp(prefix="bench-start-"))
    kept = {
        name: code.format(folder=str(folder / str(k)))
        for k, (name, code) in enumerate(SECOND.items())
    }

    def loaded():
        program = str(folder / "program")
        run_of(SAVED.format(folder=program))(1)
        return run_of(LOADED.format(folder=program))

    return processes(FIRST_IN_JAX | kept) | {
        "bridge, native, package kept": late(lambda: run_of(NATIVE), True),
        "bridge, native, a saved program": late(loaded, True),
    }


def cases(quick: bool) -> dict[str, Case]:
    each = dict(unit="s", calls=1, rounds=5, longest=60.0)
    imports = {k: IMPORTS[k] for k in ("nothing", "bridge alone")} if quick else IMPORTS
    found = {
        "imports": Case(
            lambda: processes(imports), ("jax, torch",), ("nothing", "jax", "torch"), **each
        )
    }
    if quick:
        return found
    pure = ("pure jax", "pure torch", "pure jax, XLA's cache kept")
    return found | {
        "the first gradient in JAX": Case(first_in_jax, ("pure jax",), pure, **each),
        "the first gradient in torch": Case(
            lambda: processes(FIRST_IN_TORCH), ("pure torch",), pure, **each
        ),
    }
