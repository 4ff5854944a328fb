"""Franken against its own calculator, its own two ways of differentiating, its own trainer;
committees, feature maps in JAX, stress."""

import copy
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import bridge
from tests import franken_cases as cases
from tests.matrices import a_few
from tests.model_cases import inputs, quiet
from torch_side.models.franken import Franken
from torch_side.potentials import strain
from torch_side.potentials.neighbors import neighbor_list

SYSTEMS = cases.SYSTEMS
derivatives = pytest.mark.parametrize("derivatives", ["autograd", "func"])
COMMITTEE = ("member_energies", "member_position_gradients", "energy_std", "position_gradients_std")


def committee(dtype=torch.float64, derivatives="autograd"):
    return cases.model(dtype, derivatives).asking(*COMMITTEE)


def stress(out, x):
    virial = strain.virial(
        out["position_gradients"], out["cell_gradients"], x["pos"], x["batch"], x["cell"]
    )
    return strain.stress(virial, x["cell"], x["pbc"])


def close(a, b, tolerance):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, check_dtype=False)


def slope(f, x, name, direction, step=1e-3):
    """d f / d x[name] along a direction, of fourth order."""
    at = {k: f(x | {name: x[name] + k * step * direction}) for k in (-2, -1, 1, 2)}
    return (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * step)


@pytest.mark.matrix
@derivatives
@pytest.mark.parametrize("system", SYSTEMS)
def test_energies_forces_x_own_calculator(system, derivatives):
    atoms = SYSTEMS[system].copy()
    atoms.calc = cases.calculator()
    out = cases.model(torch.float32, derivatives, False)(inputs(atoms))
    assert abs(out["energy"].item() - atoms.get_potential_energy()) < 1e-5 * len(atoms)
    assert abs(-out["position_gradients"].numpy() - atoms.get_forces()).max() < 1e-4


@pytest.mark.matrix
@derivatives
@pytest.mark.parametrize("mode", ["torch.autograd", "torch.func"])
@pytest.mark.parametrize("system", ["skewed", "trimer"])
def test_members_x_own_modes(system, mode, derivatives):
    potential, weights = cases.fitted()
    energies, forces = potential.energy_and_forces(
        cases.configuration(SYSTEMS[system], potential), weights, forces_mode=mode
    )
    out = committee(torch.float32, derivatives)(inputs(SYSTEMS[system]))
    close(out["member_energies"], energies.detach(), 4e-5)
    close(-out["member_position_gradients"], forces, 1e-4)


@derivatives
def test_committee_x_mean_and_spread(derivatives):
    x = inputs(SYSTEMS["skewed"], SYSTEMS["trimer"], dtype=torch.float64)
    out = committee(derivatives=derivatives)(x)
    for mean, spread, members in (
        ("energy", "energy_std", COMMITTEE[0]),
        ("position_gradients", "position_gradients_std", COMMITTEE[1]),
    ):
        values = out[members].numpy()
        assert values.shape[0] == 4 and values.std(0).max() > 1e-3
        np.testing.assert_allclose(out[mean].numpy(), values.mean(0), atol=1e-12)
        np.testing.assert_allclose(
            out[spread].numpy(), np.sqrt(((values - values.mean(0)) ** 2).mean(0)), atol=1e-12
        )


def test_members_x_single_models():
    """A committee is its members, one after another, each with its own gradients."""
    potential, weights = cases.fitted()
    x = inputs(SYSTEMS["skewed"], dtype=torch.float64)
    out = committee(derivatives="func")(x)
    alone = [Franken(potential, w, dtype=torch.float64)(x) for w in weights]
    close(out["member_energies"][:, 0], torch.cat([a["energy"] for a in alone]), 1e-10)
    close(
        out["member_position_gradients"],
        torch.stack([a["position_gradients"] for a in alone]),
        1e-10,
    )
    close(out["cell_gradients"], torch.stack([a["cell_gradients"] for a in alone]).mean(0), 1e-10)


def test_members_x_finite_differences():
    model, x = committee(), inputs(SYSTEMS["skewed"], dtype=torch.float64)
    out, direction = (
        model(x),
        torch.randn(
            x["pos"].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
        ),
    )
    found = slope(lambda y: model(y)["member_energies"][:, 0], x, "pos", direction)
    close((out["member_position_gradients"] * direction).sum((1, 2)), found, 1e-7)


def test_all_outputs_x_func_as_autograd():
    x = inputs(SYSTEMS["gold"], SYSTEMS["trimer"], dtype=torch.float64)
    one, other = (cases.model(torch.float64, d) for d in ("autograd", "func"))
    one, other = (m.asking(*m.card.outputs)(x) for m in (one, other))
    assert one.keys() == other.keys() and len(one) == 10
    for name in one:
        close(one[name], other[name], 1e-9)


def test_second_derivatives_x_torch_func():
    """With derivatives="func" the model is a function for torch.func, to any order."""
    model, x = cases.model(torch.float64, "func"), inputs(SYSTEMS["trimer"], dtype=torch.float64)
    found = torch.func.hessian(lambda r: model(x | {"pos": r})["energy"][0])(x["pos"])
    close(found, model.asking("hessian")(x)["hessian"], 1e-9)
    third = torch.func.jvp(
        lambda r: model(x | {"pos": r})["position_gradients"],
        (x["pos"],),
        (torch.ones_like(x["pos"]),),
    )[1]
    assert third.abs().max() < 1e-9 < found.abs().max()  # translation


@derivatives
def test_evaluations_x_committee(derivatives, monkeypatch):
    """Descriptors and features are computed once for all members and all their gradients, in JAX as
    well."""
    counts, model = {}, committee(torch.float32, derivatives)
    for owner, name in ((model.potential.gnn, "descriptors"), (model.potential.rf, "feature_map")):
        monkeypatch.setattr(type(owner), name, counted(getattr(type(owner), name), counts))
    model(inputs(*SYSTEMS.values()))
    assert counts == {"descriptors": 1, "feature_map": 1}
    energy = bridge.potential(model, atomic_numbers=SYSTEMS["trimer"].numbers)
    step = jax.jit(jax.value_and_grad(energy)).lower(jnp.zeros((3, 3), "float32")).compile()
    counts.clear()
    jax.block_until_ready(step(jnp.asarray(SYSTEMS["trimer"].positions, "float32")))
    assert counts == {"descriptors": 1, "feature_map": 1}


def counted(f, counts):
    def call(*args, **kwargs):
        counts[f.__name__] = counts.get(f.__name__, 0) + 1
        return f(*args, **kwargs)

    return call


def test_weights_x_training():
    """dE/dw is n_atoms phi; gradients reach the weights through the forces as well; nothing is
    trained unasked."""
    model, x = (
        Franken(cases.fitted()[0], cases.fitted()[1], dtype=torch.float64),
        inputs(SYSTEMS["skewed"], dtype=torch.float64),
    )
    assert not any(v.requires_grad for v in (*model.parameters(), *model(x).values()))
    model.weights.requires_grad_()
    out = model(x)
    close(
        torch.autograd.grad(out["energy"].sum(), model.weights, retain_graph=True)[0],
        len(SYSTEMS["skewed"]) * model.features(x).expand(4, -1) / 4,
        1e-12,
    )
    assert torch.autograd.grad(out["position_gradients"].square().sum(), model.weights)[0].any()


# Stress


def test_stress_x_triclinic():
    model, x = cases.model(torch.float64), inputs(SYSTEMS["skewed"], dtype=torch.float64)
    out = model(x)
    W = strain.virial(
        out["position_gradients"], out["cell_gradients"], x["pos"], x["batch"], x["cell"]
    )[0]
    moment = x["pos"].T @ out["position_gradients"]
    assert (W - W.T).abs().max() < 1e-9 * W.abs().max() and (moment - moment.T).abs().max() > 1e-3
    for name, gradient in (("pos", "position_gradients"), ("cell", "cell_gradients")):
        direction = torch.randn(
            x[name].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
        )
        found = slope(lambda y: model(y)["energy"][0], x, name, direction)
        close((out[gradient] * direction).sum(), found, 1e-7)


@derivatives
def test_energy_forces_stress_x_jit(derivatives):
    atoms, model = SYSTEMS["skewed"], cases.model(torch.float64, derivatives)
    x = inputs(atoms, dtype=torch.float64)
    out, energy = model(x), bridge.potential(model, atomic_numbers=atoms.numbers, pbc=True)
    r, h = bridge.to_jax((x["pos"], x["cell"][0]))
    e, (g, G) = jax.jit(jax.value_and_grad(energy, (0, 1)))(r, h)
    found = bridge.to_torch((e, g, G, jax.jit(energy.stress)(r, h)))
    for mine, wanted in zip(
        found,
        (out["energy"][0], out["position_gradients"], out["cell_gradients"][0], stress(out, x)[0]),
    ):
        close(mine, wanted, 1e-10)
    v = jnp.asarray(np.random.default_rng(0).normal(size=r.shape))
    hvp = jax.jit(lambda r: jax.grad(lambda r: jnp.vdot(jax.grad(energy)(r, h), v))(r))(r)
    close(
        bridge.to_torch(hvp),
        torch.einsum("iajb,jb->ia", model.asking("hessian")(x)["hessian"], bridge.to_torch(v)),
        1e-9,
    )


# Feature maps


@quiet
def heads():
    """Every head of franken, also those that its configurations don't build."""
    from franken.rf import heads

    D = cases.untrained().gnn.feature_dim()
    return {
        "gaussian": heads.OrthogonalRFF(D, 20, length_scale=3.0, rng_seed=1),
        "no offset": heads.OrthogonalRFF(D, 20, use_offset=False, length_scale=3.0, rng_seed=1),
        "biased": heads.BiasedOrthogonalRFF(D, 20, length_scale=3.0, bias=2.0, rng_seed=1),
        "multiscale": heads.MultiScaleOrthogonalRFF(D, 20, rng_seed=1),
        "linear": heads.Linear(D, bias=0.5),
        "sketch": heads.TensorSketch(D, 20, degree=2, bias=0.3, rng_seed=1),
        "by species": heads.OrthogonalRFF(
            D, 20, num_species=2, chemically_informed_ratio=0.4, length_scale=3.0, rng_seed=1
        ),
    }


@pytest.mark.parametrize(
    "name",
    a_few(
        ["gaussian", "no offset", "biased", "multiscale", "linear", "sketch", "by species"],
        ["no offset", "sketch", "by species"],
    ),
)
def test_features_energies_x_heads(name):
    potential = copy.copy(cases.untrained())
    potential._modules = {**potential._modules, "rf": heads()[name]}
    weights = torch.randn(
        3, potential.rf.total_random_features, generator=torch.Generator().manual_seed(0)
    )
    one = Franken(potential, weights).asking(*COMMITTEE)
    other = copy.copy(one)
    other.derivatives = "func"
    assert ("node_energies" in one.card.outputs) == (name != "by species")
    systems = [SYSTEMS[s] for s in ("skewed", "trimer")]
    x = inputs(*systems)
    found, features = one(x), one.features(x)
    close(other(x)["member_position_gradients"], found["member_position_gradients"], 1e-5)
    close(other(x)["cell_gradients"], found["cell_gradients"], 1e-5)
    for s, atoms in enumerate(systems):
        data = cases.configuration(atoms, potential)
        energies, forces = potential.energy_and_forces(data, weights)
        close(features[s], potential.feature_map(data)[0].detach(), 3e-5)
        close(found["member_energies"][:, s], energies[:, 0].detach(), 1e-5)
        close(-found["member_position_gradients"][:, x["batch"] == s], forces, 1e-4)


@pytest.mark.parametrize("name", ["features", "descriptors"])
def test_features_descriptors_x_jax(name, maybe_jit):
    model, x = (
        cases.model(torch.float64),
        inputs(SYSTEMS["skewed"], SYSTEMS["trimer"], dtype=torch.float64),
    )
    X, ours = bridge.to_jax(x), getattr(model, name)
    f, shape = (
        bridge.to_jax(ours),
        {"features": (2, model.n_features), "descriptors": (7, model.n_descriptors)}[name],
    )
    values = maybe_jit(f)(X)
    assert values.shape == shape
    close(bridge.to_torch(values), ours(x), 1e-12)
    c = jnp.asarray(np.random.default_rng(0).normal(size=shape))
    r, h = (x[k].clone().requires_grad_() for k in ("pos", "cell"))
    wanted = torch.autograd.grad(
        (ours(x | {"pos": r, "cell": h}) * bridge.to_torch(c)).sum(), (r, h)
    )
    found = maybe_jit(jax.grad(lambda r, h: jnp.vdot(f({**X, "pos": r, "cell": h}), c), (0, 1)))(
        X["pos"], X["cell"]
    )
    assert all(w.any() for w in wanted)
    close(bridge.to_torch(found), wanted, 1e-10)


def test_features_descriptors_x_own():
    potential, model = cases.fitted()[0], cases.model(torch.float32)
    for atoms in SYSTEMS.values():
        data = cases.configuration(atoms, potential)
        close(model.descriptors(inputs(atoms)), potential.gnn.descriptors(data).detach(), 1e-5)
        close(model.features(inputs(atoms)), potential.feature_map(data).detach(), 1e-5)


def test_features_x_padding():
    """An atom of Z = 0 in a system of its own, and an unused slot: rows of zeros, and the others as
    they were."""
    model, x = (
        cases.model(torch.float64),
        inputs(SYSTEMS["skewed"], SYSTEMS["trimer"], dtype=torch.float64),
    )
    edges, offsets = neighbor_list(x["pos"], x["cell"], x["pbc"], model.card.cutoff, x["batch"])
    padded = {key: torch.cat([v, v.new_zeros((1, *v.shape[1:]))]) for key, v in x.items()}
    padded["batch"][-1] = 2
    padded |= {
        "edge_index": torch.cat([edges, edges.new_full((2, 1), 99)], 1),
        "cell_offsets": torch.cat([offsets, offsets[:1]]),
    }
    for f in (model.features, model.descriptors):
        plain, found = f(x), f(padded)
        close(found[:-1], plain, 1e-12)
        assert found.shape == (len(plain) + 1, plain.shape[1]) and not found[-1].any()


@pytest.mark.full
def test_weights_x_ridge_in_jax():
    """The normal equations of energies and forces on features of JAX: the weights of franken's own
    trainer."""
    potential, weights = cases.fitted()
    data = cases.labelled()
    model = cases.model(torch.float64)
    X = bridge.to_jax(inputs(*data, dtype=torch.float64))
    reference = Franken(potential, torch.zeros_like(weights[:1]), dtype=torch.float64)(
        inputs(*data, dtype=torch.float64)
    )["energy"].numpy()
    n, features = (
        np.array([len(a) for a in data]),
        bridge.to_jax(model.features, derivatives="autograd", batched="sequential"),
    )
    energies = (np.array([a.get_potential_energy() for a in data]) - reference) / n
    forces = np.concatenate([a.get_forces() / len(a) for a in data])

    @jax.jit
    def normal_equations(r):
        phi, slopes = (
            features({**X, "pos": r}),
            -jax.jacrev(lambda r: features({**X, "pos": r}).sum(0))(r),
        )
        of_energies = phi.T @ phi, phi.T @ energies
        return of_energies, (
            jnp.einsum("fia,gia->fg", slopes, slopes),
            jnp.einsum("fia,ia->f", slopes, forces),
        )

    (A, b), (C, d) = normal_equations(X["pos"])
    eye = jnp.eye(len(A))
    fits = [
        jnp.linalg.solve((1 - w) * A + w * C + p * eye, (1 - w) * b + w * d)
        for w in cases.FORCE_WEIGHTS
        for p in cases.PENALTIES
    ]
    mine = Franken(potential, bridge.to_torch(jnp.stack(fits)), dtype=torch.float64).asking(
        *COMMITTEE
    )
    for atoms in (*data[3:6], *SYSTEMS.values()):
        x = inputs(atoms, dtype=torch.float64)
        found, wanted = mine(x), committee()(x)
        close(found["member_energies"], wanted["member_energies"], 5e-5)
        close(found["member_position_gradients"], wanted["member_position_gradients"], 1e-4)


# Backbones, files, errors


@derivatives
def test_energies_gradients_x_mace(derivatives):
    potential = cases.mace()
    weights = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    systems = [SYSTEMS[s] for s in ("skewed", "trimer")]
    out = Franken(potential, weights, derivatives=derivatives).asking(*COMMITTEE)(inputs(*systems))
    batch = inputs(*systems)["batch"]
    for s, atoms in enumerate(systems):
        energies, forces = potential.energy_and_forces(
            cases.configuration(atoms, potential), weights
        )
        close(out["member_energies"][:, s], energies[:, 0].detach(), 1e-5)
        close(-out["member_position_gradients"][:, batch == s], forces, 1e-4)
        assert forces.abs().max() > 1e-3
    model, x = (
        Franken(potential, weights, derivatives=derivatives, dtype=torch.float64),
        inputs(systems[0], dtype=torch.float64),
    )
    direction = torch.randn(
        1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    close(
        (model(x)["cell_gradients"] * direction).sum(),
        slope(lambda y: model(y)["energy"][0], x, "cell", direction),
        1e-7,
    )


def test_weights_x_checkpoint(tmp_path):
    """All the weights that franken saved beside a model; its own one where there are no others."""
    potential, weights = cases.fitted()
    x = inputs(SYSTEMS["skewed"])
    potential.save(tmp_path / "many.pt", multi_weights=weights)
    potential.save(tmp_path / "one.pt")
    close(
        Franken(tmp_path / "many.pt", trust=True).asking("member_energies")(x)["member_energies"],
        committee(torch.float32)(x)["member_energies"],
        1e-6,
    )
    close(
        Franken(str(tmp_path / "one.pt"), trust=True)(x)["energy"],
        cases.model(torch.float32, "autograd", False)(x)["energy"],
        1e-6,
    )


def test_potential_x_unchanged():
    """The user's potential is copied, and torch.func leaves nothing behind in the copy."""
    potential = copy.deepcopy(cases.untrained())
    before = {k: v.clone() for k, v in potential.state_dict().items()}
    model = Franken(
        potential, torch.ones(2, cases.N_FEATURES), derivatives="func", dtype=torch.float64
    )
    model.asking(*COMMITTEE)(inputs(SYSTEMS["trimer"], dtype=torch.float64))
    assert all(
        torch.equal(before[k], v) and before[k].dtype == v.dtype
        for k, v in potential.state_dict().items()
    )
    x = inputs(SYSTEMS["trimer"], dtype=torch.float64)
    narrow = x | {k: x[k].to(torch.int32) for k in ("atomic_numbers", "batch")}
    assert torch.equal(
        model(narrow)["position_gradients"], model(x)["position_gradients"]
    ) and torch.equal(model.features(narrow), model.features(x))
    assert copy.deepcopy(model).state_dict().keys() == model.state_dict().keys()
    assert (
        model.float().card.dtype == "float32"
        and model(inputs(SYSTEMS["trimer"]))["energy"].dtype == torch.float32
    )


def test_card_x_elements():
    potential, trimer = cases.untrained(), inputs(SYSTEMS["trimer"])
    assert cases.model().card.elements == {29, 79} and len(Franken(potential).card.elements) == 83
    unknown = (
        (cases.model(), 1, r"2 elements of Franken, got H \(Z = 1\) for atom 0"),
        (Franken(potential), 89, r"83 elements .*Ac \(Z = 89\)"),
    )
    for model, number, text in unknown:
        with pytest.raises(ValueError, match=text):
            model(trimer | {"atomic_numbers": torch.tensor([number, 79, 29])})
    with pytest.raises(ValueError, match="outputs that this model has .*got energy_std; ask"):
        cases.model(torch.float32, "autograd", False).asking("energy_std")


class Old(torch.autograd.Function):
    """As torch.func does not take them."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g


def test_error_x_backbone_without_torch_func(monkeypatch):
    descriptors, x = type(cases.untrained().gnn).descriptors, inputs(SYSTEMS["trimer"])
    wanted = cases.model(torch.float32)(x)
    monkeypatch.setattr(
        type(cases.untrained().gnn),
        "descriptors",
        lambda self, data: Old.apply(descriptors(self, data)),
    )
    close(cases.model(torch.float32)(x)["position_gradients"], wanted["position_gradients"], 1e-6)
    text = 'a backbone that torch.func can differentiate, got RuntimeError: .*; pass derivatives="autograd" to Franken'
    with pytest.raises(NotImplementedError, match=text) as e:
        cases.model(torch.float32, "func")(x)
    assert isinstance(e.value.__cause__, RuntimeError) and "setup_context" in str(e.value.__cause__)


def test_errors_x_building(monkeypatch):
    potential = cases.untrained()
    for weights, got in (
        (torch.ones(2, 5), r"float32\[2,5\]"),
        (np.ones((1, 2, 48)), r"float64\[1,2,48\]"),
        (torch.ones(0, 48), r"float32\[0,48\]"),
    ):
        with pytest.raises(
            ValueError, match=rf"expected weights as float\[M,48\], got {got}; pass weights="
        ):
            Franken(potential, weights)
    with pytest.raises(ValueError, match=r"expected weights as float\[M,96\], got float32\[1,48\]"):
        Franken(cases.untrained(cases.N_FEATURES, False))
    with pytest.raises(
        ValueError, match="""expected derivatives "autograd" or "func", got 'torch.func'"""
    ):
        Franken(potential, derivatives="torch.func")
    with pytest.raises(
        TypeError, match="expected a FrankenPotential, or the path of one, got a Linear"
    ):
        Franken(torch.nn.Linear(1, 1))
    other = copy.deepcopy(potential)
    other.gnn_config = SimpleNamespace(family="pet")
    with pytest.raises(ValueError, match="expected a backbone of mace or sevenn, got pet"):
        Franken(other)
    monkeypatch.setitem(sys.modules, "franken.rf.model", None)
    with pytest.raises(ImportError, match="run: pip install franken"):
        Franken(potential)
