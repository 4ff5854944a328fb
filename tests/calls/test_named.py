"""Programs of the ffi lane in other processes: bridged functions found again by name and
fingerprint, under every transform; missing ones and other ones refused."""

import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import bridge
import bridge.native
from bridge import recipes
from jax_side.calls import named
from tests.cases import close
from torch_side.calls.fingerprints import fingerprint

MODEL = """
import json, sys, jax, jax.numpy as jnp, numpy as np, torch, bridge, bridge.native
jax.config.update("jax_enable_x64", True)
scale, power = {scale}, 3

def energy(x, w, kind="cubic", shift=None):
    # the structure of arguments travels with the program
    return scale * (w["k"] * x**power).sum(-1)

torch.manual_seed({seed})
net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double().eval()
x, w = jnp.linspace(0.1, 2, 12).reshape(4, 3), {{"k": jnp.array([1.0, 2.0, 3.0])}}
TRANSFORMS = {{
    "value": lambda f: lambda x, w: f(x[0], w, kind="cubic"),
    "gradients": lambda f: jax.vmap(jax.grad(lambda x, w: f(x, w).sum()), (0, None)),
    "hvp": lambda f: lambda x, w: jax.jvp(jax.grad(lambda x: jax.vmap(f, (0, None))(x, w).sum()), (x,), (x,))[1],
    "jvp": lambda f: lambda x, w: jax.jvp(lambda x: jax.vmap(f, (0, None))(x, w), (x,), (x,))[1],
    "hessians": lambda f: jax.vmap(jax.hessian(lambda x, w: f(x, w).sum()), (0, None)),
}}
"""
SAVE = (
    MODEL
    + """
f = bridge.to_jax(energy, name="energy", batched={batched!r})
for name, of in TRANSFORMS.items():
    bridge.native.save(bridge.native.export(jax.jit(of(f)), x, w), f"{{sys.argv[1]}}/{{name}}")
g = bridge.to_jax(net, name="net")
both = jax.jit(lambda x: jax.vmap(jax.grad(lambda x: g(x).sum()))(x))
bridge.native.save(bridge.native.export(both, x), sys.argv[1] + "/net")
"""
)
LOAD = (
    MODEL
    + """
{made}
found = {{}}
for name in [*TRANSFORMS, "net"]:
    try:
        y = bridge.native.load(f"{{sys.argv[1]}}/{{name}}", trust=True)(*((x,) if name == "net" else (x, w)))
        found[name] = [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(y)]
    except Exception as error:
        found[name] = f"{{type(error).__name__}}: {{error}}"
print(json.dumps(found))
"""
)
MADE = """
f = bridge.to_jax(energy, name="energy", batched={batched!r})
g = bridge.to_jax(net, name="net")
"""


def python(code, *args):
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        cwd=os.getcwd(),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def loaded(folder, made, scale=2.0, seed=0):
    return json.loads(python(LOAD.format(made=made, scale=scale, seed=seed), folder))


@pytest.fixture(scope="module", params=["vmap", "sequential", {"x": 0}], ids=str)
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("named")
    python(SAVE.format(scale=2.0, seed=0, batched=request.param), folder)
    return folder, request.param


def test_the_same_function_in_another_process(saved):
    folder, batched = saved
    found = loaded(folder, MADE.format(batched=batched))
    space = {}
    exec(MODEL.format(scale=2.0, seed=0), space)
    twin = lambda x, w, **_: 2.0 * (w["k"] * x**3).sum(-1)
    for name, of in space["TRANSFORMS"].items():
        want = jax.tree.leaves(jax.jit(of(twin))(space["x"], space["w"]))
        assert not isinstance(found[name], str), found[name]
        for ours, theirs in zip(found[name], want, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    x = torch.from_numpy(np.array(space["x"])).requires_grad_()
    (gradient,) = torch.autograd.grad(space["net"](x).sum(), x)
    np.testing.assert_allclose(found["net"][0], gradient, rtol=1e-12)


def test_what_is_missing_or_another_one_is_refused(saved):
    """By load, before anything runs."""
    folder, batched = saved
    if batched != "vmap":
        batched = "vmap"  # other options are another function
        found = loaded(folder, MADE.format(batched=batched))
        assert "other options" in found["value"] and isinstance(found["net"], list)
        return
    made = MADE.format(batched=batched)
    nobody = "ValueError: expected a bridged function with name='net', as the program was exported with, got 'energy' in this process; bridge.to_jax(model, name='net')"
    assert loaded(folder, made.replace('"net"', '"energy"'))["net"].startswith(nobody)
    other = "got one of other weights, other code or other options"
    weights, closure = loaded(folder, made, seed=1), loaded(folder, made, scale=3.0)
    assert other in weights["net"] and isinstance(weights["value"], list)
    code = loaded(
        folder, made.replace("energy, name", "lambda x, w, kind='': 1 + energy(x, w), name")
    )
    assert other in code["value"] and isinstance(code["net"], list)
    # what code calls by a global name is not looked into
    assert isinstance(closure["value"], list)


def test_without_a_name_it_is_refused():
    f = jax.jit(bridge.to_jax(lambda x: x.sum(), lane="ffi"))
    with pytest.raises(
        ValueError, match='on lane="native", or with a name, .* lane="ffi" and name='
    ):
        bridge.native.export(f, jnp.ones(3))


def test_arguments_that_json_cannot_hold():
    f = bridge.to_jax(lambda x, k: x.sum(), name="strange")
    with pytest.raises(
        NotImplementedError, match="arguments of 'strange' that are arrays, numbers"
    ):
        bridge.native.export(jax.jit(lambda x: f(x, frozenset({1}))), jnp.ones(3))


@pytest.mark.parametrize(
    "arguments", [0, None, (0, 1), [0, (1, None)], {"w": {"k": 0}, "x": [1]}, ((0,), {})]
)
def test_structures_of_arguments_in_json(arguments):
    written = json.dumps(named._encoded(arguments, "model"))
    assert named._decoded(json.loads(written)) == arguments


def test_a_symbol_of_examples(tmp_path):
    """Saved and loaded, for any number of them."""
    f = bridge.to_jax(lambda x: (x**3).sum(-1), name="cubes", batched=0)
    (b, _) = jax.export.symbolic_shape("b, 3")
    program = jax.jit(jax.vmap(jax.grad(f)))
    exported = bridge.native.export(program, jax.ShapeDtypeStruct((b, 3), jnp.float64))
    loop = bridge.native.load(bridge.native.save(exported, tmp_path / "cubes"), trust=True)
    for n in (1, 4):
        x = jnp.arange(3.0 * n).reshape(n, 3)
        close(loop(x), 3 * x**2)


@pytest.mark.parametrize(
    "recipe", [{"kind": "what", "of": None}, {"of": None}, {"kind": "jvp", "of": None}, 3]
)
def test_recipes_that_nobody_wrote(recipe):
    with pytest.raises(ValueError, match="expected the recipe of a bridged function"):
        recipes.read(recipe, bridge.function.Function())


def test_potentials_have_names(tmp_path):
    spring = lambda x: {"energy": (x["pos"] ** 2).sum()[None]}
    make = lambda: bridge.potential(
        spring, atomic_numbers=np.array([1, 1]), gradients="autograd", lane="ffi", name="spring"
    )
    r = jnp.arange(6.0).reshape(2, 3)
    folder = bridge.native.save(
        bridge.native.export(jax.jit(jax.grad(make())), r), tmp_path / "spring"
    )
    close(bridge.native.load(folder, trust=True)(r), 2 * r)
    assert "spring" in named.callables


class Holder:
    """An object whose attribute is a constant of the function."""

    def __init__(self, k):
        self.k = k

    def __call__(self, x):
        return self.k * x


class Layer(torch.nn.Module):
    def __init__(self, k):
        super().__init__()
        self.k, self.more = k, [torch.full((2,), float(k))]

    def forward(self, x):
        return self.k * x + self.more[0].sum()


def outer(k):
    inner = lambda x: k * x
    return lambda x: inner(x)


def later(k):
    """A closure that calls what is not made yet."""
    inner = lambda x: k * late(x)
    if k < 0:
        late = inner
    return inner


KINDS = {
    "closure over nothing yet": later,
    "partial": lambda k: functools.partial(torch.mul, other=k),
    "partial of a tensor": lambda k: functools.partial(torch.add, torch.full((3,), float(k))),
    "closure of a closure": outer,
    "object": Holder,
    "bound method": lambda k: Holder(k).__call__,
    "module": Layer,
    "modules": lambda k: torch.nn.Sequential(torch.nn.Tanh(), Layer(k)),
    "class": lambda k: type("Made", (Holder,), {"scale": k})(1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_fingerprints_tell_constants_apart(kind):
    make = KINDS[kind]
    assert fingerprint(make(2)) == fingerprint(make(2)) != fingerprint(make(3))


def test_an_altered_recipe(tmp_path):
    f = bridge.to_jax(lambda x: (x**3).sum(), name="altered")
    exported = bridge.native.export(jax.jit(jax.grad(f)), jnp.ones(3))
    folder = bridge.native.save(exported, tmp_path / "altered")
    manifest = json.loads((folder / "manifest.json").read_text())
    (recipe,) = manifest["functions"].values()
    recipe["transforms"] = None
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="recipes as they were saved, got altered ones"):
        bridge.native.load(folder, trust=True)
    del manifest["packages"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="a folder as bridge.native.save wrote it .* 'packages'"):
        bridge.native.load(folder, trust=True)


SIZE = [3]


def test_the_same_code_with_other_results(tmp_path):
    """What a global name stands for is in no fingerprint, but in the types of the results."""
    make = lambda: bridge.to_jax(lambda x: x[: SIZE[0]], name="cut")
    exported = bridge.native.export(jax.jit(make()), jnp.ones(3))
    folder = bridge.native.save(exported, tmp_path / "cut")
    SIZE[0] = 2
    again = make()
    try:
        with pytest.raises(ValueError, match=r"name='cut', .* got one with float64\[2\]; bridge"):
            bridge.native.load(folder, trust=True)
    finally:
        SIZE[0] = 3
    assert again.name == "cut"


@pytest.mark.parametrize("name", ["", 5])
def test_names_that_are_none(name):
    with pytest.raises(ValueError, match="name as one of a text that is not empty"):
        bridge.to_jax(torch.sin, name=name)
