"""SevenNet against sevenn's own ASE calculator, against itself in batches, and its second
derivatives."""

import functools
import sys
import warnings

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111, molecule

from tests.model_cases import inputs
from tests.model_cases import sevennet_calculator as calculator
from torch_side.models.sevennet import SevenNet
from torch_side.potentials import strain


def skewed():
    """NaCl in a triclinic cell, rattled."""
    atoms = bulk("NaCl", "rocksalt", 5.6) * (2, 1, 1)
    atoms.rattle(0.1, seed=1)
    deform = np.eye(3) + 0.06 * np.random.default_rng(0).normal(size=(3, 3))
    atoms.set_cell(atoms.cell[:] @ deform, scale_atoms=True)
    return atoms


SYSTEMS = {
    "si": bulk("Si"),
    "si8": bulk("Si", cubic=True),
    "nacl": bulk("NaCl", "rocksalt", 5.6),
    "skewed": skewed(),
    "water": molecule("H2O"),
    "atom": Atoms("Ar"),
    "far apart": Atoms("OAr", positions=[[0, 0, 0], [0, 0, 20]]),
    "slab": fcc111("Al", (1, 1, 2), vacuum=4.0),
}
SYSTEMS["si8"].rattle(0.05, seed=0)


@functools.cache
def model(dtype=torch.float32):
    return SevenNet("7net-0", dtype=dtype)


def stress(out, x):
    virial = strain.virial(
        out["position_gradients"], out["cell_gradients"], x["pos"], x["batch"], x["cell"]
    )
    return strain.stress(virial, x["cell"], x["pbc"])


@pytest.mark.parametrize("name", SYSTEMS)
def test_as_the_ase_calculator(name):
    atoms = SYSTEMS[name].copy()
    atoms.calc = calculator()
    x = inputs(atoms)
    out = model()(x)
    assert abs(out["energy"].item() - atoms.get_potential_energy()) < 1e-5
    assert abs(-out["position_gradients"].numpy() - atoms.get_forces()).max() < 1e-4
    assert abs(out["node_energies"].numpy() - atoms.calc.results["energies"]).max() < 1e-5
    if atoms.pbc.any() and atoms.cell.volume > 0:
        assert abs(stress(out, x)[0].numpy() - atoms.get_stress(voigt=False)).max() < 1e-5


def test_batch_equals_single_systems():
    names = ["water", "skewed", "atom", "si"]
    x = inputs(*(SYSTEMS[n] for n in names))
    out = model()(x)
    for s, name in enumerate(names):
        one, mine = model()(inputs(SYSTEMS[name])), x["batch"] == s
        torch.testing.assert_close(out["energy"][s], one["energy"][0], rtol=0, atol=1e-5)
        torch.testing.assert_close(
            out["cell_gradients"][s], one["cell_gradients"][0], rtol=0, atol=1e-4
        )
        torch.testing.assert_close(
            out["position_gradients"][mine], one["position_gradients"], rtol=0, atol=1e-5
        )
        torch.testing.assert_close(
            out["node_energies"][mine], one["node_energies"], rtol=0, atol=1e-5
        )


def test_shapes_and_an_empty_system():
    x = inputs(SYSTEMS["water"], SYSTEMS["si"])
    x |= {"cell": torch.cat([x["cell"], x["cell"][1:]]), "pbc": torch.cat([x["pbc"], x["pbc"][1:]])}
    out = model()(x)
    assert {k: tuple(v.shape) for k, v in out.items()} == {
        "energy": (3,),
        "position_gradients": (5, 3),
        "cell_gradients": (3, 3, 3),
        "node_energies": (5,),
    }
    assert out["energy"][2] == 0 and not out["cell_gradients"][2].any()


def test_lonely_atoms_have_energy_and_no_gradient():
    out = model()(inputs(SYSTEMS["far apart"]))
    assert torch.isfinite(out["energy"]).all() and not out["position_gradients"].any()
    alone = model()(inputs(SYSTEMS["atom"]))
    torch.testing.assert_close(out["node_energies"][1], alone["energy"][0])


def test_gradients_in_float64_against_finite_differences():
    x, step = inputs(SYSTEMS["skewed"], dtype=torch.float64), 1e-4
    out = model(torch.float64)(x)
    for name, gradient in (("pos", "position_gradients"), ("cell", "cell_gradients")):
        direction = torch.randn(
            x[name].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
        )
        up, down = (
            model(torch.float64)(x | {name: x[name] + s * direction})["energy"]
            for s in (step, -step)
        )
        found = ((up - down) / (2 * step)).item()
        assert found == pytest.approx((out[gradient] * direction).sum().item(), rel=1e-6, abs=1e-7)


def test_virial_is_symmetric_though_its_terms_are_not():
    x = inputs(SYSTEMS["skewed"], dtype=torch.float64)
    out = model(torch.float64)(x)
    W = strain.virial(
        out["position_gradients"], out["cell_gradients"], x["pos"], x["batch"], x["cell"]
    )[0]
    moment = x["pos"].T @ out["position_gradients"]
    assert (W - W.T).abs().max() < 1e-9 * W.abs().max() and (moment - moment.T).abs().max() > 1e-3
    G = strain.lattice_gradient_from_virial(
        -out["position_gradients"], x["pos"], x["batch"], x["cell"], W[None]
    )
    torch.testing.assert_close(G, out["cell_gradients"], rtol=1e-9, atol=1e-9)


def test_hessian_by_double_backward():
    x, step = inputs(SYSTEMS["water"], dtype=torch.float64), 1e-4
    x["pos"].requires_grad_()
    g = model(torch.float64)(x)["position_gradients"].flatten()
    hessian = torch.stack(
        [torch.autograd.grad(v, x["pos"], retain_graph=True)[0].flatten() for v in g]
    )
    assert (hessian - hessian.T).abs().max() < 1e-8
    moved = [
        model(torch.float64)(
            x | {"pos": x["pos"].detach() + s * torch.eye(9, dtype=torch.float64)[0].view(3, 3)}
        )["position_gradients"].flatten()
        for s in (step, -step)
    ]
    torch.testing.assert_close(
        hessian[0].detach(), (moved[0] - moved[1]) / (2 * step), rtol=1e-5, atol=1e-5
    )


def test_mixed_second_derivatives_in_the_cell():
    x = inputs(SYSTEMS["si"], dtype=torch.float64)
    x["pos"] = x["pos"] + torch.tensor([[0.1, 0.0, -0.05], [0, 0, 0]], dtype=torch.float64)
    x["cell"].requires_grad_(), x["pos"].requires_grad_()
    out = model(torch.float64)(x)
    a = torch.autograd.grad(out["cell_gradients"][0, 0, 1], x["pos"], retain_graph=True)[0][0, 2]
    b = torch.autograd.grad(out["position_gradients"][0, 2], x["cell"])[0][0, 0, 1]
    assert a.item() == pytest.approx(b.item(), rel=1e-9) and abs(a.item()) > 1e-4


def test_weights_are_frozen_and_can_be_trained():
    network, x = SevenNet("7net-0"), inputs(SYSTEMS["water"])
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    assert not any(v.requires_grad for v in network(x).values())
    network.requires_grad_(True)
    network(x)["position_gradients"].square().sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in network.parameters())


def test_inputs_are_left_as_they_were():
    x = inputs(SYSTEMS["si"])
    before = {k: v.clone() for k, v in x.items()}
    model()(x)
    assert all(torch.equal(before[k], x[k]) and not x[k].requires_grad for k in x)


def test_narrow_integers_are_fine():
    x = inputs(SYSTEMS["water"])
    narrow = x | {k: x[k].to(torch.int32) for k in ("atomic_numbers", "batch")}
    assert torch.equal(model()(narrow)["energy"], model()(x)["energy"])


def test_no_warning_and_no_global_state():
    model()  # sevenn is imported by now; torch has something to say about its scripted functions
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        filters = list(warnings.filters)
        SevenNet("7net-0")(inputs(SYSTEMS["water"]))
        assert warnings.filters == filters
    assert (threads, dtype) == (torch.get_num_threads(), torch.get_default_dtype())


def test_modal_model_as_the_ase_calculator():
    from sevenn.calculator import SevenNetCalculator

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        atoms = SYSTEMS["skewed"].copy()
        atoms.calc = SevenNetCalculator("7net-mf-0", device="cpu", modal="R2SCAN")
    out = SevenNet("7net-mf-0", modal="R2SCAN")(inputs(atoms))
    assert abs(out["energy"].item() - atoms.get_potential_energy()) < 1e-5
    assert abs(-out["position_gradients"].numpy() - atoms.get_forces()).max() < 1e-4


# Errors

NAN = torch.tensor([[0.0, 0, 0], [1, float("nan"), 0], [0, 1, 0]])
BAD = {
    r"one of the 89 elements of SevenNet, got Po \(Z = 84\) for atom 1 of system 0; take another": dict(
        atomic_numbers=torch.tensor([8, 84, 1])
    ),
    r"got no element \(Z = 300\) for atom 0": dict(atomic_numbers=torch.tensor([300, 1, 1])),
    r"got no element \(Z = -5\) for atom 0": dict(atomic_numbers=torch.tensor([-5, 1, 1])),
    r"pos as float32, the model's dtype, got float64; .*load the model with dtype=float64": dict(
        pos=NAN.double(), cell=torch.zeros(1, 3, 3).double()
    ),
    r"expected one dtype for pos and cell, got pos float64 and cell float32": dict(
        pos=NAN.double()
    ),
    r"expected finite positions, got \[.*nan.*\] for atom 1 of system 0": dict(pos=NAN),
    r"expected cell as float\[B,3,3\], got float32\[3,3\]": dict(cell=torch.zeros(3, 3)),
    r"expected batch as int\[3\], got int64\[2\]": dict(batch=torch.zeros(2, dtype=torch.long)),
    r"expected pos on cpu, the model's device, got meta; move the model, .to\('meta'\)": dict(
        pos=torch.zeros(3, 3, device="meta")
    ),
}


@pytest.mark.parametrize("text", BAD)
def test_errors_say_what_came(text):
    with pytest.raises(ValueError, match=text):
        model()(inputs(SYSTEMS["water"]) | BAD[text])


def test_missing_inputs_are_named():
    with pytest.raises(
        ValueError,
        match="expected the inputs pos, atomic_numbers, cell, pbc, batch, got no pbc; add",
    ):
        model()({k: v for k, v in inputs(SYSTEMS["water"]).items() if k != "pbc"})


def test_errors_in_loading():
    with pytest.raises(
        ValueError, match="expected modal to be one of R2SCAN, PBE, got None; pass modal"
    ):
        SevenNet("7net-mf-0")
    with pytest.raises(ValueError, match="expected no modal for a model without modals, got 'PBE'"):
        SevenNet("7net-0", modal="PBE")
    with pytest.raises(ValueError, match="nonsense does not exist"):
        SevenNet("nonsense")


def test_without_sevenn_the_error_gives_the_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "sevenn.util", None)
    with pytest.raises(ImportError, match="pip install sevenn"):
        SevenNet("7net-0")
