"""Local potentials as files: what is written comes back the same, in other processes, readers and
frameworks too."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import bridge
from jax_side.montecarlo import files as local_files
from jax_side.montecarlo.local import LocalPotential
from tests.local_file_cases import (
    CUTOFF,
    NUMBERS,
    PAIRS,
    POS,
    TABLE,
    Net,
    energy,
    entries,
    graph,
    potential,
    rng,
    saved,
    torch_saved,
    wanted,
)
from torch_side.montecarlo import files as torch_files


@functools.cache
def loaded(order):
    return local_files.load(saved(order=order), order)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_derivatives_x_orders(order):
    f, pos = energy(loaded(order)), jnp.asarray(POS)
    kind, transform = [
        ("energy", lambda f: f),
        ("gradient", jax.grad),
        ("hessian", lambda f: jax.jacrev(jax.jacrev(f))),
    ][order]
    np.testing.assert_allclose(jax.jit(transform(f))(pos), wanted(kind), rtol=1e-10, atol=1e-12)
    again = lambda f: lambda x: jax.grad(f)(x).sum()
    for _ in range(order + 1):
        f = again(f)
    with pytest.raises(
        ValueError,
        match=rf"expected at most {order} derivatives of the loaded \w+, got one more; load \(and save\) with order={order + 1}",
    ):
        jax.eval_shape(f, pos)


def test_energies_and_gradients_x_vmap_scan():
    # atomic numbers are the same backwards
    f, many = (
        energy(loaded(1)),
        jnp.stack([POS, POS[::-1]] * 2).reshape(2, 2, 5, 3),
    )

    def every(x):
        total = lambda x: jax.lax.scan(lambda c, p: (c + jax.vmap(f)(p).sum(), None), 0.0, x)[0]
        return *jax.vmap(jax.vmap(jax.value_and_grad(f)))(x), jax.grad(total)(x)

    e, g, of_sum = jax.jit(every)(many)
    both = np.stack([wanted("gradient"), wanted("gradient")[::-1]] * 2).reshape(many.shape)
    np.testing.assert_allclose(e, np.full((2, 2), wanted("energy")), rtol=1e-12)
    np.testing.assert_allclose(g, both, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(of_sum, both, rtol=1e-10, atol=1e-12)


def test_an_argument_that_all_examples_share_x_vmap():
    a, r = jnp.asarray(TABLE[:2]), jnp.asarray(rng.normal(size=(3, 2, 3)))
    over = jax.vmap(loaded(1).edge, (None, None, 0))(a, a, r)
    np.testing.assert_allclose(over, jnp.stack([potential().edge(a, a, x) for x in r]), rtol=1e-12)


@pytest.mark.parametrize("n", [0, 1])
def test_rows_none_and_one_x_vmap(n):
    a, r = jnp.ones((n, 4)), jnp.ones((n, 3))
    assert loaded(1).init(jnp.ones(n, int)).shape == (n, 4)
    assert loaded(1).edge(a, a, r).shape == (n, 5)
    assert jax.vmap(loaded(1).readout)(jnp.ones((2, n, 4)), jnp.ones((2, n, 5))).shape == (2, n)
    assert jax.grad(lambda r: loaded(1).edge(a, a, r).sum())(r).shape == (n, 3)


def test_a_loaded_potential_is_saved_again(tmp_path):
    local_files.save(tmp_path / "again.zip", loaded(1), precision="64bit")
    again = local_files.load(tmp_path / "again.zip")
    np.testing.assert_allclose(jax.jit(energy(again))(POS), wanted("energy"), rtol=1e-12)
    assert again.cutoff == CUTOFF


def test_the_way_kups_reads():
    """zipfile and jax.export alone: dtypes cast to the precision, `.call`, widths by eval_shape of
    one row."""
    found = entries(saved())
    meta = json.loads(found.pop("metadata.json").decode())
    assert meta == {"cutoff": CUTOFF, "precision": "64bit"}
    assert set(found) == {"node_init.jax", "edge.jax", "readout.jax"}
    init, edge, readout = (
        jax.export.deserialize(bytearray(found[n])).call
        for n in ("node_init.jax", "edge.jax", "readout.jax")
    )
    node = jax.eval_shape(init, jnp.zeros(1, jnp.int64))
    assert jax.eval_shape(edge, node, node, jnp.zeros((1, 3))).shape == (1, 5)

    def f(pos):
        r = pos[PAIRS[1]] - pos[PAIRS[0]]
        near = (r**2).sum(-1) < CUTOFF**2
        nodes = init(jnp.asarray(NUMBERS, jnp.int64))
        messages = jnp.where(near[:, None], edge(nodes[PAIRS[0]], nodes[PAIRS[1]], r), 0)
        return readout(nodes, jax.ops.segment_sum(messages, PAIRS[0], 5)).sum()

    e, g = jax.jit(jax.value_and_grad(f))(jnp.asarray(POS))
    np.testing.assert_allclose(e, wanted("energy"), rtol=1e-12)
    np.testing.assert_allclose(g, wanted("gradient"), rtol=1e-10, atol=1e-12)


OTHER = """
import json, sys, jax, numpy as np
jax.config.update("jax_enable_x64", True)
from jax_side.montecarlo import files as local_files
assert "torch" not in sys.modules
graph = {k: np.array(v) for k, v in json.load(sys.stdin).items()}
print(float(jax.jit(local_files.load(sys.argv[1]))(graph)["energy"][0]).hex())
"""


def test_energy_x_another_process():
    given = json.dumps({k: x.tolist() for k, x in graph(jnp.asarray(POS)).items()})
    args = [sys.executable, "-c", OTHER, str(saved())]
    done = subprocess.run(
        args,
        input=given,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(float.fromhex(done.stdout.strip()), wanted("energy"), rtol=1e-12)


def test_several_platforms_in_one_blob():
    path = saved("float32", 1, ("cpu", "cuda", "tpu"))
    for name, blob in entries(path).items():
        if name != "metadata.json":
            assert jax.export.deserialize(bytearray(blob)).platforms == ("cpu", "cuda", "tpu")
    np.testing.assert_allclose(
        jax.jit(energy(local_files.load(path)))(POS.astype("float32")),
        wanted("energy", "float32"),
        rtol=1e-5,
    )


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8"])
def test_atomic_numbers_of_any_integer_dtype(dtype):
    numbers = NUMBERS.astype(dtype)
    for local in (loaded(1), local_files.load(saved("float32", 1, ("cpu", "cuda", "tpu")))):
        np.testing.assert_allclose(local.init(jnp.asarray(numbers)), TABLE[NUMBERS], rtol=1e-6)
    np.testing.assert_allclose(
        torch_files.load(torch_saved()).init(torch.tensor(numbers)).detach(), TABLE[NUMBERS]
    )


def test_floats_of_another_dtype_are_never_cast():
    for local, one in (
        (loaded(1), jnp.ones((2, 3), "float32")),
        (torch_files.load(torch_saved()), torch.ones(2, 3)),
    ):
        nodes = local.init(
            jnp.ones(2, int)
            if one.__class__ is not torch.Tensor
            else torch.ones(2, dtype=torch.int64)
        )
        with pytest.raises(
            ValueError,
            match=r"argument 2 of the loaded edge as float64\[n,3\], got float32\[2,3\]; cast positions",
        ):
            local.edge(nodes, nodes, one)
    with pytest.raises(
        ValueError, match=r"argument 0 of the loaded init as int64\[n\], got float64\[2\]"
    ):
        loaded(1).init(jnp.ones(2))


def test_64bit_x_x64_off(tmp_path):
    path = saved()
    with jax.enable_x64(False):
        with pytest.raises(
            ValueError, match="got one of precision 64bit while x64 is off; run jax.config.update"
        ):
            local_files.load(path)
        with pytest.raises(ValueError, match="expected x64 on for precision='64bit', got x64 off"):
            local_files.save(tmp_path / "x.zip", potential(), precision="64bit")
        local_files.load(saved("float32", 1, ("cpu", "cuda", "tpu")))


# In torch


def net_energy(net, pos):
    r = pos[PAIRS[1]] - pos[PAIRS[0]]
    near = (r**2).sum(-1) < CUTOFF**2
    nodes = net.init(torch.tensor(NUMBERS))
    messages = net.edge(nodes[PAIRS[0]], nodes[PAIRS[1]], r) * near[:, None]
    return net.readout(
        nodes, torch.zeros(5, 5, dtype=pos.dtype).index_add(0, torch.tensor(PAIRS[0]), messages)
    ).sum()


def test_torch_energy_and_gradients_x_torch():
    local, pos = torch_files.load(torch_saved()), torch.tensor(POS)
    assert local.cutoff == CUTOFF
    np.testing.assert_allclose(net_energy(local, pos).detach(), wanted("energy"), rtol=1e-12)
    f = lambda p: net_energy(local, p)
    np.testing.assert_allclose(
        torch.func.grad(f)(pos).detach(), wanted("gradient"), rtol=1e-10, atol=1e-12
    )
    np.testing.assert_allclose(
        torch.func.hessian(f)(pos).detach(), wanted("hessian"), rtol=1e-10, atol=1e-12
    )


def test_torch_energy_and_gradients_x_jax():
    """With the defaults of to_jax."""
    local = torch_files.load(torch_saved())
    f = energy(LocalPotential(*map(bridge.to_jax, local[:3]), local.cutoff))
    e, g = jax.jit(jax.value_and_grad(f))(jnp.asarray(POS))
    np.testing.assert_allclose(e, wanted("energy"), rtol=1e-12)
    np.testing.assert_allclose(g, wanted("gradient"), rtol=1e-10, atol=1e-12)
    # atomic numbers are the same backwards
    many = jax.jit(jax.vmap(jax.grad(f)))(jnp.stack([POS, POS[::-1]]))
    np.testing.assert_allclose(many, [g, g[::-1]], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("n", [0, 1, 2, 7])
def test_torch_rows(n):
    local, net = torch_files.load(torch_saved("float32")), Net("float32")
    nodes, r = local.init(torch.arange(n)), torch.rand(n, 3)
    messages = local.edge(nodes, nodes.flip(0), r)
    assert torch.equal(messages, net.edge(net.init(torch.arange(n)), nodes.flip(0), r))
    assert torch.equal(local.readout(nodes, messages), net.readout(nodes, messages))


# What can't be written


def torch_product(a, b, r):
    return (a * b)[:, :1] * r[:, :1]


def _with_rule(f):
    f.defvjp(lambda *args: (f(*args), args), lambda args, ct: args)
    return f


BRIDGED = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "scan": lambda f: (
        lambda a, b, r: jax.lax.scan(lambda c, _: (c + f(a, b, r), None), f(a, b, r), length=2)[0]
    ),
    "cond": lambda f: (
        lambda a, b, r: jax.lax.cond(r.sum() > 0, f, lambda a, b, r: a[:, :1], a, b, r)
    ),
    "while": lambda f: (
        lambda a, b, r: jax.lax.fori_loop(
            0, a.sum().astype(int), lambda i, c: c + f(a, b, r), a[:, :1]
        )
    ),
    "gradient": lambda f: lambda a, b, r: jax.grad(lambda r: f(a, b, r).sum())(r),
    "vmap": lambda f: (
        lambda a, b, r: jax.vmap(lambda a, b, r: f(a[None], b[None], r[None])[0])(a, b, r)
    ),
    "custom": lambda f: _with_rule(jax.custom_vjp(f)),
    "checkpoint": jax.checkpoint,
}


@pytest.mark.parametrize("inside", BRIDGED)
def test_a_bridged_torch_callable_is_refused_by_name(inside, tmp_path):
    local = potential()
    edge = BRIDGED[inside](bridge.to_jax(torch_product))
    with pytest.raises(
        ValueError,
        match="expected edge in JAX alone, got a torch callable.* by torch_side.montecarlo.files.save",
    ):
        local_files.save(
            tmp_path / "x.zip",
            LocalPotential(local.init, edge, local.readout, CUTOFF),
            precision="64bit",
        )
    assert not os.listdir(tmp_path)


def printing(a, b, r):
    jax.debug.print("{}", r.sum())
    return a


UNWRITABLE = {
    "callback": (
        lambda a, b, r: a * jax.pure_callback(np.sin, jax.ShapeDtypeStruct((), a.dtype), a[0, 0]),
        "expected edge as a function .*callback",
    ),
    "effect": (
        printing,
        "expected edge as a program that another process can run, got one with effects|expected "
        "edge as a function",
    ),
    "rows": (
        lambda a, b, r: a if a.shape[0] > 3 else b,
        "expected edge as a function that jax.export can write for any number of rows "
        "n.*Inconclusive",
    ),
    "len": (
        lambda a, b, r: jnp.ones((len(a), 2)),
        r"got TypeError: .*write x.shape\[0\], not len\(x\)",
    ),
    "shape": (
        lambda a, b, r: a[:, 0],
        r"expected float64\[n,width\] from edge of float64\[n,4\], .*, got float64\[5\] for n=5; return one such array",
    ),
    "dtype": (
        lambda a, b, r: a.astype("float32"),
        r"expected float64\[n,width\] from edge .*, got float32\[5,4\] for n=5",
    ),
    "sum": (lambda a, b, r: a.sum(0)[None], r"from edge .*, got float64\[1,4\] for n=5"),
    "two": (lambda a, b, r: (a, b), r"from edge .*, got PyTreeDef\(\(\*, \*\)\) for n=5"),
}


@pytest.mark.parametrize("case", UNWRITABLE)
def test_a_function_that_can_not_be_written_is_named(case, tmp_path):
    edge, text = UNWRITABLE[case]
    (tmp_path / "x.zip").write_bytes(b"before")
    with pytest.raises(ValueError, match=text):
        local_files.save(
            tmp_path / "x.zip",
            LocalPotential(potential().init, edge, lambda a, s: s[:, 0], CUTOFF),
            precision="64bit",
        )
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"before"]


def test_weights_of_another_precision_are_refused(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"expected float32\[n,width\] from init of int32\[n\], got float64\[5,4\] for n=5; .* weights of another dtype",
    ):
        local_files.save(tmp_path / "x.zip", potential("float64"), precision="32bit")


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        local_files.save(tmp_path / "x.zip", potential(), precision="64bit")
    assert not os.listdir(tmp_path)


def test_the_same_functions_give_the_same_bytes(tmp_path):
    for name in "ab":
        local_files.save(tmp_path / name, potential(), precision="64bit")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


OPTIONS = [
    (dict(precision="16bit"), "expected precision '32bit' or '64bit', got '16bit'"),
    (
        dict(precision="64bit", order=-1),
        "expected order as a number of derivatives, 0 or more, got -1",
    ),
    (
        dict(precision="64bit", order=True),
        "expected order as a number of derivatives, 0 or more, got True",
    ),
    (
        dict(precision="64bit", platforms="cpu"),
        "expected platforms among .*, got 'cpu'; give a tuple",
    ),
    (
        dict(precision="64bit", platforms=("abacus",)),
        r"expected platforms among .*, got \('abacus',\); give a tuple",
    ),
]


@pytest.mark.parametrize("options, text", OPTIONS, ids=range(len(OPTIONS)))
def test_options_that_mean_nothing_are_refused(options, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        local_files.save(tmp_path / "x.zip", potential(), **options)


def test_what_is_no_local_potential_is_refused(tmp_path):
    with pytest.raises(
        TypeError,
        match="expected a LocalPotential, got Net; make one of init, edge, readout and cutoff",
    ):
        local_files.save(tmp_path / "x.zip", Net(), precision="64bit")
    with pytest.raises(ValueError, match="expected a finite cutoff above 0 Angstrom, got inf"):
        local_files.save(
            tmp_path / "x.zip", LocalPotential(len, len, len, float("inf")), precision="64bit"
        )
    with pytest.raises(ValueError, match="expected order as a number of derivatives"):
        local_files.load(saved(), order="1")


TORCH_UNWRITABLE = {
    "training": (
        torch.nn.Sequential(torch.nn.Dropout(0.5)),
        ValueError,
        "expected Sequential in evaluation mode, got layer 0",
    ),
    "object": (3, TypeError, "expected a torch callable as edge, got int"),
    "jax": (
        bridge.to_torch(lambda a, b, r: a * b),
        ValueError,
        "expected edge as .*a JAX function is for jax_side.montecarlo.files.save",
    ),
    "rows": (
        lambda a, b, r: a * b if len(a) > 3 else a,
        ValueError,
        "expected edge as a function that torch.export can write for any number of rows n",
    ),
    "fixed": (
        lambda a, b, r: a * torch.ones(5, 1, dtype=a.dtype),
        ValueError,
        "expected edge as a function that torch.export can write",
    ),
    "shape": (
        lambda a, b, r: a[:, 0],
        ValueError,
        r"expected edge as rows of float64\[n,width\] from .*, got float64\[s\d+\]; it must be float64\[n,width\]",
    ),
    "dtype": (
        lambda a, b, r: a.float(),
        ValueError,
        r"expected edge as rows of .*, got float32\[s\d+,4\]",
    ),
    "two": (
        lambda a, b, r: (a, b),
        ValueError,
        "expected edge as rows of .*, got 3 arguments and 2 results",
    ),
}


@pytest.mark.parametrize("case", TORCH_UNWRITABLE)
def test_a_torch_function_that_can_not_be_written_is_named(case, tmp_path):
    edge, kind, text = TORCH_UNWRITABLE[case]
    with pytest.raises(kind, match=text):
        torch_files.save(
            tmp_path / "x.zip", Net().init, edge, Net().readout, CUTOFF, precision="64bit"
        )
    assert not os.listdir(tmp_path)
