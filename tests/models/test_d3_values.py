"""D3 against torch-dftd's own calculator and numbers in the literature's units: functionals,
dampings, cutoffs; sums in both banks, lanes; what it refuses."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.calculators.mixing import SumCalculator

import bridge
from jax_side.potentials import direct, potential
from jax_side.potentials.strain import with_gradients
from tests.model_cases import CRYSTALS, D3_PARAMETERS, MODELS, MOLECULES, inputs
from torch_side.calls import status
from torch_side.engines.ase import calculator as of_torch
from torch_side.models.d3 import D3, DAMPINGS, REACH
from torch_side.potentials import strain
from torch_side.potentials.model import Wrapped
from torch_side.potentials.neighbors import Padded

F64 = torch.float64
SYSTEMS = CRYSTALS | MOLECULES
KINDS = {  # what the adapter and the calculator are told
    "as it is": ({}, {}),
    "r2scan": ({"xc": "r2scan"}, {"xc": "r2scan"}),
    "shorter": ({"cutoff": 11.5}, {"cutoff": 11.5, "cnthr": 11.5}),
    "Grimme's": (
        {"cutoff": 95 * units.Bohr, "coordination_cutoff": 40 * units.Bohr},
        {"cutoff": 95 * units.Bohr, "cnthr": 40 * units.Bohr},
    ),
    "two cutoffs": (
        {"cutoff": 10.0, "coordination_cutoff": 6.0},
        {"cutoff": 10.0, "cnthr": 6.0},
    ),
    "smooth": (
        {"cutoff": 9.0, "smooth": True},
        {"cutoff": 9.0, "cnthr": 9.0, "cutoff_smoothing": "poly"},
    ),
}
KINDS |= {damping: ({"damping": damping}, {"damping": damping}) for damping in DAMPINGS[1:]}


@functools.cache
def model(**options):
    return D3(dtype=F64, **options)


def reference(options):
    from torch_dftd.torch_dftd3_calculator import TorchDFTD3Calculator

    told = dict(xc="pbe", damping="bj", cutoff=REACH, cnthr=REACH) | options
    return TorchDFTD3Calculator(dtype=F64, **told)


@pytest.mark.parametrize("kind", KINDS)
def test_own_calculator_x_kinds(kind):
    """In float64, on crystals and molecules; the package converts smooth cutoffs by another
    Bohr."""
    told, calculator = KINDS[kind]
    near = 3e-8 if kind == "smooth" else 1e-12
    for name in ("skewed", "ethanol") if kind == "Grimme's" else SYSTEMS:
        atoms = SYSTEMS[name].copy()
        atoms.calc = reference(calculator)
        x = inputs(atoms, dtype=F64)
        out = model(**told)(x)
        assert abs(float(out["energy"]) - atoms.get_potential_energy()) < near
        assert abs(-out["position_gradients"].numpy() - atoms.get_forces()).max() < near
        assert float(out["energy"]) < -1e-4
        if atoms.pbc.any():
            g, G = out["position_gradients"], out["cell_gradients"]
            virial = strain.virial(g, G, x["pos"], x["batch"], x["cell"])
            stress = strain.stress(virial, x["cell"], x["pbc"])[0].numpy()
            assert abs(stress - atoms.get_stress(voigt=False)).max() < near


def test_argon_x_a_table():
    """C6 of Ar2 is 64.65 Hartree Bohr^6 in Grimme's table: with zero damping that is all there is
    far apart, and C8 = 3 C6 r2r4^2."""
    far = 30.0
    pair = inputs(Atoms("Ar2", positions=[[0, 0, 0], [far, 0, 0]]), dtype=F64)
    told = dict(cutoff=40.0, damping="zero")
    only = D3(D3_PARAMETERS | {"s6": 1.0, "s18": 0.0}, dtype=F64, **told)
    c6 = -float(only(pair)["energy"]) / units.Ha * (far / units.Bohr) ** 6
    assert abs(c6 - 64.6462) < 0.001


def test_node_energies_x_halves_of_pairs():
    x = inputs(*SYSTEMS.values(), dtype=F64)
    out = model().asking("node_energies")(x)
    sums = torch.zeros(len(x["cell"]), dtype=F64).index_add(0, x["batch"], out["node_energies"])
    torch.testing.assert_close(sums, out["energy"], rtol=1e-12, atol=1e-12)
    pair = model().asking("node_energies")(
        inputs(Atoms("CO", positions=[[0, 0, 0], [0, 0, 2]]), dtype=F64)
    )
    one, other = pair["node_energies"].tolist()
    assert abs(one - other) < 1e-15 and one < -1e-3


def test_the_reach_of_the_card():
    """40 Bohr give 0.3 % less than 95; the last atom that is felt lies two cutoffs away."""
    x = inputs(CRYSTALS["skewed"], dtype=F64)
    near, far = (float(model(cutoff=r)(x)["energy"]) for r in (REACH, 95 * units.Bohr))
    assert 0.001 < far / near - 1 < 0.005
    one = model(cutoff=6.0, coordination_cutoff=4.0).asking("node_energies")
    assert one.card.receptive_field == 10.0
    chain = Atoms("NNNO", positions=[[0, 0, 0], [5.8, 0, 0], [9.7, 0, 0], [0, 3, 0]])
    nodes = lambda atoms: one(inputs(atoms, dtype=F64))["node_energies"]
    moved = chain.copy()
    moved.positions[2, 0] += 0.1
    assert nodes(chain)[0] != nodes(moved)[0]
    chain.positions[2, 0] = moved.positions[2, 0] = 10.1
    moved.positions[2, 0] += 0.1
    assert nodes(chain)[0] == nodes(moved)[0]


@pytest.mark.parametrize("kind", ["as it is", "smooth", "zero"])
def test_hessian_x_finite_differences(kind):
    made = model(**KINDS[kind][0])
    x = inputs(CRYSTALS["slab"], dtype=F64)
    hessian, h = made.asking("hessian")(x)["hessian"], 1e-4
    for atom, axis in (0, 0), (1, 2):
        gradients = []
        for sign in (1, -1):
            pos = x["pos"].clone()
            pos[atom, axis] += sign * h
            gradients.append(made(x | {"pos": pos})["position_gradients"])
        slope = (gradients[0] - gradients[1]) / (2 * h)
        torch.testing.assert_close(hessian[:, :, atom, axis], slope, rtol=1e-5, atol=1e-8)
    assert abs(hessian).max() > 1e-3


def test_sum_of_models_x_ase():
    """One Model, one call, beside ASE's sum of the two packages' own calculators."""
    case = MODELS["sevennet"]
    atoms = case.systems["skewed"].copy()
    atoms.calc = of_torch(case.build(torch.float32) + D3())
    wanted = atoms.copy()
    wanted.calc = SumCalculator([case.calculator(), reference({})])
    assert abs(atoms.get_potential_energy() - wanted.get_potential_energy()) < 1e-5 * len(atoms)
    assert abs(atoms.get_forces() - wanted.get_forces()).max() < 1e-4
    assert abs(atoms.get_stress() - wanted.get_stress()).max() < 1e-5
    assert abs(atoms.get_potential_energies().sum() - atoms.get_potential_energy()) < 1e-4
    assert atoms.calc.card.cutoff == REACH


def springs(x):
    """A JAX potential of its own: each pair of a system by a spring, minimum images left out."""
    apart = x["pos"][:, None] - x["pos"][None]
    same = x["batch"][:, None] == x["batch"][None]
    pairs = 0.01 * jnp.where(same, (apart**2).sum(-1), 0.0).sum(1)
    return jax.ops.segment_sum(pairs, x["batch"], num_segments=len(x["cell"]))


def test_sum_in_jax_x_lanes(lane):
    """With an energy of JAX: bridge.potential's sum and direct's, jitted, with all derivatives."""
    atoms = MOLECULES["ethanol"]
    mine = with_gradients(springs)
    R = jnp.asarray(atoms.positions)
    bound = bridge.potential(model(), atomic_numbers=atoms.numbers, lane=lane)
    both = bound + potential.potential(mine, atomic_numbers=atoms.numbers)
    e, g = jax.jit(jax.value_and_grad(both))(R)
    out = model()(inputs(atoms, dtype=F64))
    alone = potential.potential(mine, atomic_numbers=atoms.numbers)
    assert abs(e - alone(R) - float(out["energy"])) < 1e-10
    wanted = jax.grad(alone)(R) + out["position_gradients"].numpy()
    np.testing.assert_allclose(g, wanted, atol=1e-10)
    np.testing.assert_allclose(
        jax.vmap(both)(jnp.stack([R, 1.1 * R])), [both(R), both(1.1 * R)], rtol=1e-10
    )
    hessian = jax.jit(jax.hessian(both))(R)
    step = 1e-4 * jnp.zeros_like(R).at[1, 2].set(1.0)
    slope = (jax.grad(both)(R + step) - jax.grad(both)(R - step)) / 2e-4
    np.testing.assert_allclose(hessian[1, 2], slope, rtol=1e-5, atol=1e-6)
    x = {key: jnp.asarray(v.numpy()) for key, v in inputs(atoms, dtype=F64).items()}
    summed = direct.direct(bridge.jax_potential(model(), lane=lane)) + direct.direct(mine)
    found = jax.jit(lambda x: summed(x))(x)
    np.testing.assert_allclose(found.total_energies, [e], rtol=1e-10)
    np.testing.assert_allclose(found.gradients.positions, g, atol=1e-10)


def test_sum_in_torch_x_a_jax_potential():
    x = inputs(MOLECULES["ethanol"], dtype=F64)
    jax_model = bridge.torch_potential(with_gradients(springs))
    out = (Wrapped(jax_model, bridge.Card(batches=True), "model") + model())(x)
    wanted = [m(x)["position_gradients"] for m in (jax_model, model())]
    torch.testing.assert_close(out["position_gradients"], sum(wanted), rtol=1e-10, atol=1e-10)


def test_dtype_and_device_x_the_card():
    made = D3()
    assert made.card.dtype == "float32" and not list(made.parameters())
    x = inputs(CRYSTALS["si"])
    assert made(x)["energy"].dtype == torch.float32
    made = made.double()
    assert made.card.dtype == "float64" and made.tables.c6ab.dtype == F64
    with pytest.raises(ValueError, match="expected pos as float64, the model's dtype"):
        made(x)
    out = made(x | {key: x[key].double() for key in ("pos", "cell")})
    assert abs(float(out["energy"] - model()(inputs(CRYSTALS["si"], dtype=F64))["energy"])) < 1e-5
    with pytest.raises(ValueError, match="expected one dtype for all terms of a sum"):
        D3() + model()


def test_bad_arguments():
    with pytest.raises(
        ValueError,
        match="expected a functional for which D3 has parameters with damping='bj', got 'b3lyp'; write",
    ):
        D3("b3lyp")
    with pytest.raises(ValueError, match="with damping='bjm', got 'r2scan'"):
        D3("r2scan", "bjm")
    with pytest.raises(ValueError, match="expected damping as one of 'bj', 'zero', 'bjm', 'zerom'"):
        D3(damping="none")
    with pytest.raises(
        ValueError, match="expected the parameters s6, rs6, s18, rs18, alp, got a1, s6; pass these"
    ):
        D3({"s6": 1.0, "a1": 0.4})
    with pytest.raises(ValueError, match="expected a positive cutoff in Angstrom, got -1"):
        D3(cutoff=-1.0)
    for bad in (0.0, 9.0):
        text = f"expected a coordination_cutoff of more than 0 and at most the cutoff, 8, got {bad:g}; pass"
        with pytest.raises(ValueError, match=text):
            D3(cutoff=8.0, coordination_cutoff=bad)


def test_an_element_without_parameters():
    heavy = inputs(Atoms("Am", positions=[[0, 0, 0]]), dtype=F64)
    with pytest.raises(
        ValueError, match=r"expected one of the 94 elements of D3, got Am \(Z = 95\)"
    ):
        model()(heavy)


def test_a_lonely_atom_x_no_energy():
    out = model()(inputs(Atoms("Pu", positions=[[0, 0, 0]]), dtype=F64))
    assert out["energy"] == 0 and not out["position_gradients"].any()


@pytest.mark.parametrize(
    "options, got",
    [
        ({"smooth": True, "cutoff": 6.0}, "got smooth=True; leave it out"),
        ({"cutoff": 6.0, "coordination_cutoff": 5.0}, "got a coordination_cutoff of 5; leave it"),
    ],
)
def test_refused_in_a_compiled_program(options, got):
    x = inputs(CRYSTALS["si"], dtype=F64)
    x |= Padded(6.0, 500)(x)
    with status.collecting(), pytest.raises(NotImplementedError, match=got):
        model(**options)(x)


@pytest.mark.full  # compiles for half a minute
def test_native_lane():
    """The whole energy compiled, at fixed sizes, with edges as slots."""
    atoms = CRYSTALS["si"]
    made = model(cutoff=6.0)
    energy = bridge.potential(made, atomic_numbers=atoms.numbers, lane="native")
    R, H = jnp.asarray(atoms.positions), jnp.asarray(atoms.cell.array)
    edges = bridge.edges(6.0, 120)(R, H, jnp.ones(3, bool))
    e, g = jax.jit(jax.value_and_grad(energy))(R, H, **edges)
    out = made(inputs(atoms, dtype=F64))
    assert abs(e - float(out["energy"])) < 1e-10
    np.testing.assert_allclose(g, out["position_gradients"], atol=1e-10)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_dftd.dftd3_xc_params", None)
    with pytest.raises(
        ImportError, match="expected the package 'torch-dftd' for the D3 correction"
    ):
        D3()
    monkeypatch.setitem(sys.modules, "torch_dftd.nn.dftd3_module", None)
    with pytest.raises(
        ImportError, match="expected the package 'torch-dftd' for the D3 correction"
    ):
        D3(D3_PARAMETERS)
