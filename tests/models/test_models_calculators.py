"""Every adapter of tests.model_cases: as its own ASE calculator, eager and in jit; batches,
padding, derivatives, cards."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import bridge
from bridge.contract import GRADIENTS, OUTPUTS, output_shapes
from tests.adapters import MODELS
from tests.model_cases import inputs
from torch_side.potentials import strain
from torch_side.potentials.neighbors import neighbor_list

models = pytest.mark.parametrize("case", MODELS.values(), ids=MODELS)
each_system = pytest.mark.parametrize(
    "case, system",
    [pytest.param(c, s, id=f"{m}-{s}") for m, c in MODELS.items() for s in c.systems],
)
exact = pytest.mark.parametrize(
    "case", [pytest.param(c, id=m) for m, c in MODELS.items() if c.float64]
)


def reference(case, atoms):
    """Energy, forces and stress (None without one) of the family's own calculator."""
    atoms = atoms.copy()
    atoms.calc = case.calculator()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stress = atoms.get_stress(voigt=False) if case.stress and atoms.pbc.any() else None
        return atoms.get_potential_energy(), atoms.get_forces(), stress


def assert_as_reference(found, wanted):
    n_atoms = len(wanted[1])
    assert abs(float(found[0]) - wanted[0]) < 1e-5 * n_atoms
    assert abs(np.asarray(found[1]) - wanted[1]).max() < 1e-4
    if wanted[2] is not None:
        assert abs(np.asarray(found[2]) - wanted[2]).max() < 1e-5


def stress(out, x):
    virial = strain.virial(
        out["position_gradients"], out["cell_gradients"], x["pos"], x["batch"], x["cell"]
    )
    return strain.stress(virial, x["cell"], x["pbc"])


def whole(case):
    """The model in its most exact dtype with all outputs but the Hessian, and that dtype."""
    dtype = torch.float64 if case.float64 else case.dtype
    model = case.build(dtype)
    return model.asking(*(model.card.outputs - {"hessian"})), dtype


def sample(case):
    """The triclinic crystal, for a model without periodic axes the first system."""
    return case.systems[case.triclinic or next(iter(case.systems))]


def rows(x, name, axis, index):
    """The rows of an output along its axis of atoms or systems; all of it where it has none."""
    shape = OUTPUTS[name][0]
    return x.index_select(shape.index(axis), index) if axis in shape else x


def close(a, b, exact):
    torch.testing.assert_close(a, b, rtol=1e-9 if exact else 1e-4, atol=1e-9 if exact else 1e-4)


@each_system
def test_ase_calculator_x_eager(case, system):
    x = inputs(case.systems[system], dtype=case.dtype)
    out = case.build(case.dtype)(x)
    wanted = reference(case, case.systems[system])
    assert_as_reference(
        (
            out["energy"],
            -out["position_gradients"],
            stress(out, x)[0] if wanted[2] is not None else None,
        ),
        wanted,
    )


@models
def test_ase_calculator_x_jit(case):
    atoms, dtype = sample(case), str(case.dtype).removeprefix("torch.")
    energy = bridge.potential(case.build(case.dtype), atomic_numbers=atoms.numbers, pbc=atoms.pbc)
    step = jax.jit(
        lambda r, h: (
            *jax.value_and_grad(energy)(r, h),
            energy.stress(r, h) if atoms.pbc.any() else jnp.zeros((3, 3)),
        )
    )
    for scale in (0.0, 0.03):
        moved = atoms.copy()
        deform = np.eye(3) + scale * np.random.default_rng(1).normal(size=(3, 3))
        moved.set_cell(atoms.cell[:] @ deform, scale_atoms=bool(atoms.cell.rank))
        moved.rattle(scale, seed=2)
        e, g, sigma = step(jnp.asarray(moved.positions, dtype), jnp.asarray(moved.cell[:], dtype))
        assert_as_reference((e, -g, sigma), reference(case, moved))
    assert step._cache_size() == 1


@models
def test_values_x_batch(case):
    """Unequal systems in one call, against each alone."""
    model, dtype = whole(case)
    systems = list(case.systems.values())
    x = inputs(*systems, dtype=dtype)
    out = model(x)
    assert {
        name: tuple(out[name].shape) for name in model.card.active_outputs
    } == model.card.shapes(len(x["pos"]), len(systems))
    for s, atoms in enumerate(systems):
        for name, one in model(inputs(atoms, dtype=dtype)).items():
            mine = rows(
                rows(out[name], name, "N", (x["batch"] == s).nonzero()[:, 0]),
                name,
                "B",
                torch.tensor([s]),
            )
            close(mine, one, case.float64)


@models
def test_values_x_padding(case):
    """Atoms of Z = 0 in a last system of their own, and slots of edges that are not used."""
    model, dtype = whole(case)
    x = inputs(*list(case.systems.values())[:3], dtype=dtype)
    n_atoms, n_systems, more = len(x["pos"]), len(x["cell"]), 2
    padded = {
        key: torch.cat(
            [
                v,
                v.new_zeros(
                    (more if key in ("pos", "atomic_numbers", "batch") else 1, *v.shape[1:])
                ),
            ]
        )
        for key, v in x.items()
    }
    padded["batch"][n_atoms:] = n_systems
    if model.card.cutoff is not None:
        edges, offsets = neighbor_list(x["pos"], x["cell"], x["pbc"], model.card.cutoff, x["batch"])
        unused = torch.tensor(
            [[n_atoms + more, 0, n_atoms], [n_atoms + more, n_atoms + more + 3, n_atoms + 1]]
        )
        padded |= {
            "edge_index": torch.cat([unused, edges], 1),
            "cell_offsets": torch.cat([offsets.new_ones(3, 3), offsets]),
        }
    plain, out = model(x), model(padded)
    sizes = output_shapes(n_atoms + more, n_systems + 1, out, **dict(model.card.sizes))
    assert plain.keys() == out.keys() and {name: tuple(v.shape) for name, v in out.items()} == sizes
    for name, v in out.items():
        real = rows(rows(v, name, "N", torch.arange(n_atoms)), name, "B", torch.arange(n_systems))
        close(real, plain[name], case.float64)
        phantom = rows(
            rows(v, name, "N", torch.arange(n_atoms, n_atoms + more)),
            name,
            "B",
            torch.tensor([n_systems]),
        )
        assert not phantom.any()


@models
def test_values_x_int32(case):
    """As integers come from JAX without x64."""
    model, dtype = whole(case)
    x = inputs(sample(case), dtype=dtype)
    if model.card.cutoff is not None:
        x |= dict(
            zip(
                ("edge_index", "cell_offsets"),
                neighbor_list(x["pos"], x["cell"], x["pbc"], model.card.cutoff, x["batch"]),
            )
        )
    out = model({key: v.int() if v.dtype == torch.int64 else v for key, v in x.items()})
    for name, v in model(x).items():
        close(out[name], v, case.float64)


@exact
def test_gradients_x_finite_differences(case):
    model, x = case.build(torch.float64), inputs(sample(case), dtype=torch.float64)
    out, step = model(x), 1e-4
    for name, gradient in GRADIENTS.items():
        if name == "cell" and not x["pbc"].any():
            continue
        for seed in range(2):
            d = torch.randn(
                x[name].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
            )
            at = {
                k: model(x | {name: x[name] + k * step * d})["energy"].item()
                for k in (-2, -1, 1, 2)
            }
            found = (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * step)
            assert found == pytest.approx((out[gradient] * d).sum().item(), rel=1e-6, abs=1e-7)


@exact
def test_hessian_x_finite_differences(case):
    model = case.build(torch.float64)
    if "hessian" not in model.card.outputs:
        with pytest.raises(ValueError, match="got hessian"):
            model.asking("hessian")
        return
    atoms = min(case.systems.values(), key=len).copy()
    atoms.rattle(0.05, seed=3)
    x, step = inputs(atoms, dtype=torch.float64), 3e-5
    H = model.asking("hessian")(x)["hessian"]
    torch.testing.assert_close(H, H.permute(2, 3, 0, 1), rtol=0, atol=1e-8 * H.abs().max().item())
    d = torch.randn(x["pos"].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    g = {
        k: model(x | {"pos": x["pos"] + k * step * d})["position_gradients"] for k in (-2, -1, 1, 2)
    }
    found = (8 * (g[1] - g[-1]) - (g[2] - g[-2])) / (12 * step)
    torch.testing.assert_close(
        torch.einsum("iajb,jb->ia", H, d), found, rtol=1e-6, atol=1e-6 * H.abs().max().item()
    )


@models
def test_inputs_x_unchanged(case):
    model, x = case.build(case.dtype), inputs(sample(case), dtype=case.dtype)
    before = {k: v.clone() for k, v in x.items()}
    out = model(x)
    assert x.keys() == before.keys() and all(
        torch.equal(before[k], x[k]) and not x[k].requires_grad for k in x
    )
    assert not any(v.requires_grad for v in out.values())


@models
def test_outputs_x_card(case):
    """What is not on the card is refused before anything runs; what is active comes."""
    model = case.build(case.dtype)
    for name in set(OUTPUTS) - model.card.outputs:
        with pytest.raises(ValueError, match=f"got {name}; ask for these"):
            model.asking(name)
    assert model.card.active_outputs <= model(inputs(sample(case), dtype=case.dtype)).keys()
