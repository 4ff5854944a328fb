"""Compiled models, and scripts that run them in a process of their own: a fault would end it."""

import os
import subprocess
import sys

PROLOGUE = """
import jax, jax.numpy as jnp, numpy as np, torch, bridge
jax.config.update("jax_enable_x64", True)
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).eval().double()
sample = torch.linspace(0.3, 2.3, 3, dtype=torch.float64)
x = jnp.asarray(sample.numpy())

def function(x):
    return (torch.sin(x) ** 2).sum() * 1.0

def itself():
    module = torch.nn.Sequential(net)
    module.compile()
    return module

def inside():
    compiled = torch.compile(net)
    return lambda x: compiled(x).sum() * 1.0
"""
KINDS = {  # how it is made, and what it is without a compiler
    "a function": ("torch.compile(function)", "function"),
    "a module": ("torch.compile(net)", "net"),
    "module.compile()": ("itself()", "net"),
    "inside of a lambda": ("inside()", "lambda x: net(x).sum()"),
    "a GraphModule": ("torch.fx.symbolic_trace(net)", "net"),
    "an exported program": ("torch.export.export(net, (sample,)).module()", "net"),
    "a compiled exported program": (
        "torch.compile(torch.export.export(net, (sample,)).module())",
        "net",
    ),
    "TorchScript": ("torch.jit.script(net)", "net"),
}
BODY = """
def total(f):
    return lambda x: f(x).sum()

WAYS = {{
    "jit": lambda f: jax.jit(total(f)),
    "grad": lambda f: jax.jit(jax.grad(total(f))),
    "vmap": lambda f: lambda x: jax.vmap(total(f))(jnp.stack([x, 2 * x])),
    "vmap of grad": lambda f: lambda x: jax.vmap(jax.grad(total(f)))(jnp.stack([x, 2 * x])),
    "hessian": lambda f: jax.hessian(total(f)),
}}
plain = bridge.to_jax({plain})
for derivatives in ("func", "autograd"):
    for warm in (False, True):
        model = {made}
        if warm:
            model(sample)
        options = dict(derivatives=derivatives, batched="vmap" if derivatives == "func" and "Script" not in {kind!r} else "sequential")
        for way, transform in WAYS.items():
            try:
                got = jax.block_until_ready(transform(bridge.to_jax(model, **options))(x))
            except NotImplementedError as error:
                assert way == "hessian" and "expected a first backward of a model inside torch.compile" in str(error), error
                continue
            except RuntimeError as error:
                note = 'pass derivatives="autograd"'
                assert derivatives == "func" and "Script" in {kind!r} and any(note in n for n in error.__notes__), (way, error)
                continue
            np.testing.assert_allclose(got, transform(plain)(x), rtol=1e-8, err_msg=str((derivatives, warm, way)))
print("passed")
"""


def run(source, tmp_path):
    script = tmp_path / "compiled.py"
    script.write_text(source)
    settings = {
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
        "PYTHONPATH": os.getcwd(),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | settings,
    )
