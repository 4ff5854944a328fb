"""Compiled models beneath the bridge, in a process of their own: a fault would end it. The whole
table is in tests/full."""

import pytest

from tests.compiled_cases import PROLOGUE, run
from tests.matrices import a_few

OTHERS = {
    "inductor": """
model = torch.compile(function)
assert abs(jax.jit(bridge.to_jax(model))(x) - float(function(sample))) < 1e-12
np.testing.assert_allclose(jax.jit(jax.grad(bridge.to_jax(model)))(x), jnp.sin(2 * x))
np.testing.assert_allclose(jax.hessian(bridge.to_jax(model))(x), jnp.diag(2 * jnp.cos(2 * x)), atol=1e-12)
""",
    "functional": """
apply, params = bridge.functional(torch.compile(net, backend="aot_eager"))
want, weights = bridge.functional(net)
double = jax.tree.map(lambda w: 2 * w, params)
assert sorted(params) == sorted(f"_orig_mod.{name}" for name in weights)
for p in (params, double, params):
    q = {name.removeprefix("_orig_mod."): w for name, w in p.items()}
    np.testing.assert_allclose(jax.jit(apply)(p, x), want(q, x), rtol=1e-10)
    got = jax.jit(jax.grad(lambda p: apply(p, x).sum()))(p)
    for name, g in jax.grad(lambda p: want(p, x).sum())(q).items():
        np.testing.assert_allclose(got["_orig_mod." + name], g, rtol=1e-10)
""",
    "potential": """
class Springs(torch.nn.Module):
    def forward(self, inputs):
        nodes = (inputs["pos"] ** 3).sum(-1)
        return nodes.new_zeros(len(inputs["cell"])).index_add(0, inputs["batch"], nodes)

energy = bridge.potential(torch.compile(Springs(), backend="aot_eager"), atomic_numbers=np.array([1, 1]), gradients="autograd")
r = jnp.arange(6.0).reshape(2, 3)
value, gradient = jax.jit(jax.value_and_grad(energy))(r)
np.testing.assert_allclose(gradient, 3 * r**2)
np.testing.assert_allclose(jax.vmap(energy)(jnp.stack([r, 2 * r])), [value, 8 * value])
try:
    jax.hessian(energy)(r)
except NotImplementedError as error:
    assert "expected a first backward of a model inside torch.compile, got a second one, or forward mode by torch.autograd; pass the model uncompiled" in str(error)
else:
    raise AssertionError("no error")
""",
    "still compiled": """
runs = []

def backend(module, inputs):
    return lambda *args: runs.append(1) or module(*args)

# a function of its own: torch compiles one at most eight times, and then runs it as it is
compiled = torch.compile(lambda x: (torch.sin(x) ** 2).sum() * 1.0, backend=backend)
bridged = jax.jit(bridge.to_jax(compiled))
for _ in range(3):
    jax.block_until_ready(bridged(x))
assert len(runs) == 3, runs
""",
}


@pytest.mark.parametrize(
    "names", a_few([("functional", "potential", "still compiled"), ("inductor",)], 1)
)
def test_compiled_x_others(names, tmp_path):
    """The last name that is printed is the one that failed."""
    parts = [f"print({name!r}, flush=True)\n{OTHERS[name]}" for name in names]
    done = run("\n".join([PROLOGUE, *parts]), tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
