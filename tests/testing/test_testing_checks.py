"""bridge.testing: what its verbs take, refuse and say; check_function in both directions."""

import re

import ase
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from ase.build import bulk

from bridge import testing
from bridge.card import Card
from bridge.testing import check_function, check_potential, checks, crystals, run_checks
from tests.matrices import a_few
from tests.planted import CUTOFF, GALLERY, StaleCache, right, structure
from torch_side.potentials.model import Wrapped

FIELD = GALLERY["a field"].make()
TRANSLATION = {"checks": ["translation"], "kind": "torch"}


def failure(model, structures=None, **options):
    with pytest.raises(AssertionError) as caught:
        check_potential(model, structures, **options)
    return str(caught.value)


def test_a_failure_x_what_it_says():
    text = failure(FIELD, gradients="autograd", **TRANSLATION)
    found = re.search(
        r"energy\[0\]: expected (\S+) \(.*\), got (\S+) eV; off by (\S+), allowed (\S+)\n", text
    )
    expected, got, off, allowed = (float(x) for x in found.groups())
    assert abs(abs(expected - got) - off) < 1e-2 * off and off > allowed
    assert (
        "smallest structure found:\n    ase.Atoms(numbers=[8], positions=[[0.0, 0.0, 0.0]], "
        "cell=[[1.76," in text
    )


def test_the_numbers_in_a_failure_x_the_model():
    """Expected is the model's energy before the translation: that of the structure in the text."""
    text = failure(FIELD, gradients="autograd", **TRANSLATION)
    atoms = eval(re.search(r"ase\.Atoms\(.*\)", text).group(), {"ase": ase})
    inputs = {
        "pos": torch.tensor(atoms.positions),
        "cell": torch.tensor(atoms.cell[:])[None],
        "pbc": torch.tensor(atoms.pbc)[None],
    }
    energy = FIELD(
        inputs
        | {
            "batch": torch.zeros(1, dtype=torch.int64),
            "atomic_numbers": torch.tensor(atoms.numbers),
        }
    )["energy"]
    assert f"expected {float(energy):.10g} " in text


def test_several_failures_x_one_text():
    text = failure(
        GALLERY["mean over atoms"].make(),
        kind="torch",
        gradients="autograd",
        checks=["extensive", "rotation", "batched equals single"],
    )
    assert text.startswith("1 of 3 properties failed: extensive\n")
    text = failure(
        GALLERY["twice the cell gradient"].make(),
        kind="torch",
        checks=["virial is that of strain", GALLERY["twice the cell gradient"].caught],
    )
    assert (
        text.startswith("2 of 2 properties failed: virial is that of strain, cell gradients are")
        and text.count("ase.Atoms(") == 2
    )


def test_an_exception_of_the_model_x_cause():
    def refuses(x):
        if len(x["pos"]) > 1:
            raise ArithmeticError("two is a crowd")
        return structure(x)

    with pytest.raises(
        AssertionError, match="the check raised ArithmeticError: two is a crowd"
    ) as caught:
        check_potential(refuses, kind="torch", checks=["translation"])
    assert isinstance(caught.value.__cause__, ArithmeticError) and "numbers=[8, 8]" in str(
        caught.value
    )


def test_a_model_of_moods_x_note():
    class Moody:
        calls = 0

        def __call__(self, x):
            self.calls += 1
            return {"energy": right(x)["energy"] + (self.calls == 3)}

    text = failure(Moody(), gradients="autograd", cutoff=CUTOFF, **TRANSLATION)
    assert "the model is not deterministic" in text and "translation" in text


def test_structures_x_given():
    atoms = bulk("NaCl", "rocksalt", 5.0)
    seen = []
    model = lambda x: seen.append(x["atomic_numbers"].tolist()) or structure(x)
    check_potential(
        model, [atoms], kind="torch", checks=["rotation", "periodic wrap"], max_examples=3
    )
    assert seen and all(z == [11, 17] for z in seen)
    as_dict = {
        "pos": atoms.positions,
        "cell": atoms.cell[:][None],
        "pbc": atoms.pbc[None],
        "atomic_numbers": atoms.numbers,
    }
    check_potential(
        structure,
        [as_dict],
        kind="torch",
        checks=["rotation", "batched equals single"],
        max_examples=3,
    )
    check_potential(
        model, crystals((3,), n_atoms=2), kind="torch", checks=["extensive"], max_examples=3
    )
    assert seen[-1] == [3, 3, 3, 3]


def test_elements_and_boundaries_x_card():
    seen = []

    def model(x):
        seen.append((set(x["atomic_numbers"].tolist()), bool(x["pbc"].any())))
        return right(x)

    card = Card(cutoff=CUTOFF, neighbor_list="own", elements={22, 79}, supports_pbc=False)
    found = list(
        run_checks(
            Wrapped(model, card, "autograd"),
            checks=["rotation", "extensive", "periodic wrap"],
            max_examples=6,
        )
    )
    assert [f.skipped for f in found] == ["", "", "no structure is periodic"] and not any(
        f.failure for f in found
    )
    assert set().union(*(z for z, _ in seen)) == {22, 79} and not any(p for _, p in seen)


def test_extras_x_charge():
    card = Card(required_inputs={*Card().required_inputs, "charge"})
    charged = Wrapped(
        lambda x: {"energy": structure(x)["energy"] * (1 + x["charge"])}, card, "model"
    )
    with pytest.raises(
        ValueError,
        match=r"expected the inputs charge, got none; pass extras=\{'charge': 0.0, ...\}",
    ):
        check_potential(charged)
    seen = []
    watched = Wrapped(lambda x: seen.append(x["charge"].tolist()) or structure(x), card, "model")
    check_potential(
        watched, checks=["batched equals single"], extras={"charge": 2.0}, max_examples=2
    )
    assert [2.0, 2.0] in seen and {c for x in seen for c in x} == {2.0}


def test_tolerance_x_factor():
    off = lambda x: (
        structure(x) | {"position_gradients": structure(x)["position_gradients"] * (1 + 1e-4)}
    )
    finite = "position gradients are those of finite differences"
    assert finite in failure(off, kind="torch", checks=[finite])
    check_potential(off, kind="torch", checks=[finite], tolerance=100.0)


def test_time_for_a_smaller_structure_x_seconds(monkeypatch):
    """With no time, the first structure found is the one that is told."""
    calls = []
    wrong = GALLERY["forces as gradients"]
    model = lambda x: calls.append(1) or wrong.make()(x)
    assert "ase.Atoms(" in failure(model, checks=[wrong.caught], kind="torch")
    patient = len(calls)
    monkeypatch.setattr(testing, "SECONDS", 0.0)
    assert "ase.Atoms(" in failure(model, checks=[wrong.caught], kind="torch")
    assert len(calls) - patient < patient / 2


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({}, TypeError, 'expected kind="torch" or kind="jax", got a function, which may be either'),
        ({"kind": "tf"}, ValueError, "expected kind as one of 'torch', 'jax', got 'tf'"),
        (
            {"kind": "torch", "checks": ["rotations"]},
            ValueError,
            "expected checks as one of 'shapes of the contract', ",
        ),
        (
            {"kind": "torch", "gradients": "numeric"},
            ValueError,
            "expected gradients as one of 'model', 'autograd'",
        ),
        (
            {"kind": "torch", "dtype": "float16"},
            ValueError,
            "expected dtype as one of 'float64', 'float32', got 'float16'",
        ),
        (
            {"kind": "torch", "checks": ["padding changes nothing"]},
            ValueError,
            "got padding changes nothing, but the model takes no edges; leave it out",
        ),
        (
            {"kind": "torch", "pbc": False, "checks": ["periodic wrap"]},
            ValueError,
            "got periodic wrap, but no structure is periodic",
        ),
    ],
)
def test_arguments_x_errors(options, error, text):
    with pytest.raises(error) as caught:
        check_potential(structure, **options)
    assert text in str(caught.value)


def test_every_property_x_a_name():
    assert (
        len(testing.ALL) == 16
        and set(checks.PROPERTIES) == {*testing.ALL, "native lane agrees"}
        and set(testing.__all__) <= set(dir(testing))
    )


def test_a_stale_cache_x_each_call_anew():
    text = failure(
        StaleCache(), kind="torch", checks=["position gradients are those of finite differences"]
    )
    assert "got " in text


# check_function

x3 = torch.linspace(0.2, 0.9, 3)
RIGHT = {
    "scalar": (lambda x: torch.sin(x).prod(), [x3], {"reference": lambda x: jnp.sin(x).prod()}),
    "float64": (lambda x: torch.sin(x).sum(), [x3.double()], {}),
    "pytree": (
        lambda x, d, n: {
            "b": d["w"].sum() + x.sum(),
            "a": torch.tanh(n * x @ d["w"]),
            "i": d["k"] + 1,
        },
        [torch.ones(2, 3), {"w": torch.ones(3, 2), "k": torch.arange(3)}, 2],
        {},
    ),
    "complex": (lambda z: z * z.conj() + z**2, [torch.tensor([1 + 2j, 0.5 - 1j])], {}),
    "module": (torch.nn.Linear(3, 2), [torch.ones(4, 3)], {}),
    "integers": (lambda k: k.cumsum(0), [torch.arange(4)], {}),
    "bfloat16": (torch.tanh, [x3.bfloat16()], {}),
    "options": (
        lambda x: x.sin().sum(),
        [x3],
        {"derivatives": "autograd", "batched": "sequential"},
    ),
}
RIGHT_JAX = {
    "scalar": (
        lambda x: jnp.sin(x).prod(),
        [jnp.array([0.2, 0.5])],
        {"reference": lambda x: torch.sin(x).prod()},
    ),
    "pytree": (
        lambda x, d, n: {"b": d["w"].sum(), "a": jnp.tanh(n * x @ d["w"])},
        [jnp.ones((2, 3)), {"w": jnp.ones((3, 2))}, 2],
        {},
    ),
    "numpy": (lambda x: jnp.cumsum(x**2), [np.arange(3.0)], {"kind": "jax"}),
    "complex": (lambda z: z * z.conj() + z**2, [jnp.array([1 + 2j])], {}),
}


@pytest.mark.parametrize("name", a_few(RIGHT, 4))
def test_a_torch_function_x_itself(name):
    fn, args, options = RIGHT[name]
    check_function(fn, *args, **options)


@pytest.mark.parametrize("name", a_few(RIGHT_JAX, 2))
def test_a_jax_function_x_itself(name):
    fn, args, options = RIGHT_JAX[name]
    check_function(fn, *args, **options)


def _wrong_hessian():
    """A reference of the same value and gradient, whose Hessian is none."""

    @jax.custom_jvp
    def f(x):
        return (x**3).sum()

    f.defjvp(lambda p, t: (f(*p), (3 * jax.lax.stop_gradient(p[0]) ** 2 * t[0]).sum()))
    return f


@pytest.mark.parametrize(
    "fn, options, text",
    [
        (
            torch.sin,
            {"reference": jnp.cos},
            r"^value at \[\d\]: expected 0\.\d+ \(the callable's own, by call\), got 0\.\d+ from the reference by call; off by",
        ),
        (
            lambda x: x.cumsum(0),
            {"batched": 0},
            r"^vmap at \[[01], \d\]: expected .* by rows in a loop\), got .* through the bridge on the ffi lane by jax.vmap",
        ),
        (lambda x: x.cumsum(0), {"batched": 0, "lanes": ["host"]}, "on the host lane"),
        (
            lambda x: (x**3).sum(),
            {"reference": _wrong_hessian()},
            r"^hessian at \[\d, \d\]: expected .*, got 0 from the reference by jax.hessian",
        ),
        (lambda x: x**2, {"reference": lambda x: jax.lax.stop_gradient(x) * x}, "^vjp at"),
        (
            lambda x: x.sum(),
            {"reference": lambda x: x.sum()[None]},
            r"^value: expected shape \(\) .* got shape \(1,\)",
        ),
        (lambda x: (x, x), {"reference": lambda x: x}, "^value: expected 2 arrays .* got 1"),
    ],
)
def test_a_wrong_function_x_what_is_said(fn, options, text):
    with pytest.raises(AssertionError, match=text):
        check_function(fn, x3, **options)


def test_transforms_x_chosen():
    """A function that has no derivatives passes where none are asked for."""

    class Once(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x**2

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, g):
            raise ArithmeticError("no backward")

    check_function(Once.apply, x3, transforms=["value", "vmap"])
    with pytest.raises(ArithmeticError, match="no backward"):
        check_function(Once.apply, x3)


@pytest.mark.parametrize(
    "call, error, text",
    [
        (
            lambda: check_function(np.sin, np.ones(2)),
            TypeError,
            "expected tensors or jax.Arrays among the arguments, got neither",
        ),
        (lambda: check_function(torch.sin, x3, jnp.ones(2)), TypeError, "got both"),
        (
            lambda: check_function(lambda n: n, 3, kind="torch"),
            ValueError,
            "expected at least one array among the arguments, got none",
        ),
        (
            lambda: check_function(torch.sin, x3, transforms=["grad"]),
            ValueError,
            "expected transforms as one of 'value', 'vjp'",
        ),
        (
            lambda: check_function(torch.sin, x3, buckets={}),
            ValueError,
            "expected options as one of 'outputs', 'batched', 'derivatives', got 'buckets'",
        ),
    ],
)
def test_arguments_of_check_function_x_errors(call, error, text):
    with pytest.raises(error) as caught:
        call()
    assert text in str(caught.value)
