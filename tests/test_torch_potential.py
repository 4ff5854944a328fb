"""JAX potentials as torch modules of the contract: an energy of our own, jax-md's Morse, jax-md's NequIP with random weights."""

import copy
import itertools
import pickle
import sys
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax_md import energy as jax_md_energy
from jax_md import space

import bridge
from bridge.contract import GRADIENTS
from jax_side import programs, strain
from jax_side.engines import jax_md as engine
from jax_side.models.nequip import NequIP
from torch_side.neighbors import neighbor_list

RNG = np.random.default_rng(0)
CELL = np.diag([6.0, 6.3, 5.8]) + 0.5 * RNG.uniform(-1, 1, (3, 3))
FRACTIONAL = np.array(list(itertools.product(range(2), repeat=3))) / 2 + 0.04 * RNG.normal(size=(8, 3))
IMAGES = jnp.array(list(itertools.product((-1, 0, 1), repeat=3)), float)
CUTOFF = 3.5
MORSE = dict(sigma=2.75, epsilon=0.5, alpha=1.25, r_onset=2.5, r_cutoff=2.875)  # exact in float32


def crystal(scale=1.0, n_systems=1, dtype=torch.float64):
    """A triclinic, perturbed crystal; several: at several volumes."""
    cells = [scale * 1.02**s * CELL for s in range(n_systems)]
    return {
        "pos": torch.tensor(np.concatenate([FRACTIONAL @ c for c in cells]), dtype=dtype),
        "cell": torch.tensor(np.stack(cells), dtype=dtype),
        "pbc": torch.ones(n_systems, 3, dtype=torch.bool),
        "batch": torch.arange(n_systems).repeat_interleave(8),
        "atomic_numbers": torch.tensor([29, 13] * 4 * n_systems),
    }


def pair(params, inputs):
    """Gaussians over 27 images, any number of systems."""
    pos, cell, batch = inputs["pos"], inputs["cell"], inputs["batch"]
    r = pos[None, :, None] - pos[:, None, None] + (IMAGES @ cell)[batch][:, None]
    each = jnp.exp(-params["a"] * (r**2).sum(-1)).sum(-1) * (batch[:, None] == batch)
    return params["e"] * jax.ops.segment_sum(each.sum(-1), batch, num_segments=len(cell))


def morse():
    displacement, _ = space.periodic_general(jnp.asarray(CELL.T), fractional_coordinates=True)
    return jax_md_energy.morse_pair(displacement, **MORSE)


@cache
def nequip(hidden="4x0e + 2x1o", harmonics="1x0e + 1x1o"):
    return NequIP([13, 29], CUTOFF, hidden=hidden, harmonics=harmonics, radial=4, neighbors=8, dtype="float64")


PAIR = pair, {"a": jnp.array(0.3), "e": jnp.array(1.7)}


@cache
def potentials(name):
    """(JAX energy of one dict, the module)"""
    if name in ("pair", "nequip"):
        apply, params = PAIR if name == "pair" else nequip()
        cutoff = CUTOFF if name == "nequip" else None
        return partial(apply, params), bridge.torch_potential(apply, params, gradients="autodiff", cutoff=cutoff).requires_grad_(False)
    energy = engine.model(morse(), name.split()[1])
    return energy, bridge.torch_potential(energy, gradients="autodiff")


NAMES = "pair", "jax-md box", "jax-md perturbation", "nequip"


def in_jax(inputs):
    edges = neighbor_list(*(inputs[k] for k in ("pos", "cell", "pbc")), CUTOFF, inputs["batch"])
    return {k: jnp.asarray(x.detach().numpy()) for k, x in (inputs | dict(zip(("edge_index", "cell_offsets"), edges))).items()}


def close(got, want, tolerance=1e-10):
    got, want = (np.asarray(x.detach() if isinstance(x, torch.Tensor) else x) for x in (got, want))
    assert got.shape == want.shape and abs(got - want).max() <= tolerance * abs(want).max(), abs(got - want).max() / abs(want).max()


@pytest.mark.parametrize("name", NAMES)
def test_outputs_equal_pure_jax(name):
    energy, module = potentials(name)
    inputs = crystal(n_systems=1 if "jax-md" in name else 2)
    out, want = module(inputs), strain.with_gradients(energy)(in_jax(inputs))
    assert set(out) == set(want) and {"energy", *GRADIENTS.values()} <= set(out) and not any(x.requires_grad for x in out.values())
    for key, x in out.items():
        close(x, want[key])
    assert min(abs(np.asarray(want[k])).max() for k in ("energy", *GRADIENTS.values())) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_finite_differences_and_torchs_own(name):
    module, inputs, h = potentials(name)[1], crystal(), 1e-4
    out = module(inputs)
    for key, gradient in GRADIENTS.items():
        found = torch.zeros_like(inputs[key])
        for i in range(0, found.numel(), 4):
            step = h * torch.eye(found.numel(), dtype=torch.float64)[i].reshape(found.shape)
            up, down = (module(inputs | {key: inputs[key] + s * step})["energy"] for s in (1, -1))
            found.view(-1)[i] = (up - down)[0] / (2 * h)
        close(found.flatten()[::4], out[gradient].flatten()[::4], 1e-6)
    leaves = [inputs[k].clone().requires_grad_() for k in GRADIENTS]
    energy = module(inputs | dict(zip(GRADIENTS, leaves)))["energy"]
    for found, gradient in zip(torch.autograd.grad(3 * energy.sum(), leaves), GRADIENTS.values()):
        close(found, 3 * out[gradient])


@pytest.mark.parametrize("name, wrt", [(n, (0, 1)) for n in ("pair", "jax-md perturbation", "nequip")] + [("jax-md box", (0,))])
def test_second_derivatives_equal_jax(name, wrt):
    reference, inputs = potentials(name)[0], crystal()
    module = potentials(name)[1]
    fixed = in_jax(inputs)
    if name.startswith("jax-md"):
        reference = plain_morse
    names = [list(GRADIENTS)[i] for i in wrt]
    want = jax.jacrev(jax.grad(lambda *xs: reference(fixed | dict(zip(names, xs)))["energy"].sum(), wrt), wrt)(*(fixed[n] for n in names))
    edges = {k: torch.tensor(np.asarray(fixed[k])) for k in ("edge_index", "cell_offsets")}
    total = lambda *xs: module(inputs | edges | dict(zip(names, xs)))["energy"].sum()  # noqa: E731
    double_backward = torch.autograd.functional.hessian(total, tuple(inputs[n] for n in names))
    for got, expected in zip(jax.tree.leaves(double_backward), jax.tree.leaves(want), strict=True):
        close(got, expected, 1e-9)
    if name != "nequip":
        close(torch.func.hessian(total)(*(inputs[n] for n in names)), want[0][0], 1e-9)
        close(torch.func.jacfwd(torch.func.jacfwd(total))(*(inputs[n] for n in names)), want[0][0], 1e-9)


def plain_morse(inputs):
    """jax-md's function of the distance, on minimum images by the plain formula."""
    pos, cell = inputs["pos"], inputs["cell"][0]
    s = (pos[:, None] - pos) @ jnp.linalg.inv(cell)
    r2 = ((pos[:, None] - pos - jax.lax.stop_gradient(jnp.round(s)) @ cell) ** 2).sum(-1) + jnp.eye(len(pos))
    f = jax_md_energy.multiplicative_isotropic_cutoff(jax_md_energy.morse, MORSE["r_onset"], MORSE["r_cutoff"])
    return {"energy": 0.5 * (f(jnp.sqrt(r2), *(MORSE[k] for k in ("sigma", "epsilon", "alpha"))) * (1 - jnp.eye(len(pos)))).sum()[None]}


def test_what_is_wrong_in_jax_md_itself():
    """Why cell="perturbation" exists: the real-space tangents of space.transform spoil mixed and forward-over-forward second derivatives."""
    inputs, box = in_jax(crystal()), engine.model(morse(), "box")
    mixed = [jax.jacrev(jax.grad(lambda pos, h: e(inputs | {"pos": pos, "cell": h})["energy"][0], 1))(inputs["pos"], inputs["cell"]) for e in (box, plain_morse)]
    assert abs(mixed[0] - mixed[1]).max() > 0.05 * abs(mixed[1]).max()
    hessian, forward = (d(jax.grad(morse()) if d is jax.jacrev else jax.jacfwd(morse()))(jnp.asarray(FRACTIONAL)) for d in (jax.jacrev, jax.jacfwd))
    assert abs(hessian - forward).max() > 0.05 * abs(hessian).max()


@pytest.fixture
def calls(monkeypatch):
    """Runs of XLA programs, for modules made from here on."""
    made, seen = programs.Program.__init__, []

    def init(self, *args):
        made(self, *args)
        jitted = self._jitted
        self._jitted = lambda *groups: seen.append(self) or jitted(*groups)

    monkeypatch.setattr(programs.Program, "__init__", init)
    return seen


def test_one_jax_call_for_each_evaluation(calls):
    module, inputs = bridge.torch_potential(*PAIR, gradients="autodiff"), crystal()
    with torch.no_grad():
        for n in (1, 2, 3):
            module(inputs | {"pos": inputs["pos"] + n})
            assert len(calls) == n and module.compilations == 1
    inputs["pos"].requires_grad_()
    for n in (1, 2):
        out = module(inputs)
        assert len(calls) == 3 + 2 * n - 1
        (out["energy"].sum() + out["position_gradients"].square().sum()).backward()
        assert len(calls) == 3 + 2 * n and module.compilations == 3


def test_a_batch_is_its_systems():
    module, inputs = potentials("nequip")[1], crystal(n_systems=2)
    out = module(inputs)
    for s in (0, 1):
        own = inputs["batch"] == s
        one = {k: x[own] if k in ("pos", "atomic_numbers") else x[s : s + 1] for k, x in inputs.items() if k != "batch"}
        single = module(one | {"batch": torch.zeros(8, dtype=torch.int64)})
        close(out["energy"][s], single["energy"][0])
        close(out["position_gradients"][own], single["position_gradients"])
        close(out["cell_gradients"][s], single["cell_gradients"][0])


def copper(cell, n=1):
    """One atom in a cell, repeated n times along each axis."""
    sites = torch.tensor(list(itertools.product(range(n), repeat=3)), dtype=torch.float64) @ cell
    return {"pos": sites, "cell": n * cell[None], "pbc": torch.ones(1, 3, dtype=torch.bool), "batch": torch.zeros(n**3, dtype=torch.int64), "atomic_numbers": torch.full((n**3,), 29)}


def test_small_cells_and_open_boundaries():
    module = potentials("nequip")[1]
    cell = 2.6 * torch.tensor([[1.0, 0.1, 0], [0, 1, 0.2], [0.1, 0, 1]], dtype=torch.float64)
    one, many = module(copper(cell)), module(copper(cell, 3))
    close(many["energy"], 27 * one["energy"])
    slab = copper(cell, 2) | {"pbc": torch.tensor([[True, True, False]])}
    close(module(slab | {"cell": slab["cell"] * torch.tensor([1.0, 1, 7])[:, None]})["energy"], module(slab)["energy"])
    alone = copper(cell) | {"pbc": torch.zeros(1, 3, dtype=torch.bool), "cell": torch.zeros(1, 3, 3, dtype=torch.float64)}
    assert not module(alone)["position_gradients"].any()  # no edges at all


def test_nequip_is_jax_mds_own():
    apply, params = nequip()
    cell = 1.6 * CELL
    displacement, _ = space.periodic_general(jnp.asarray(cell.T))
    config = apply._network()
    from jax_md._nn import nequip as theirs

    settings = theirs.default_config()
    settings.update(dict(apply.settings), n_elements=2, r_max=CUTOFF)
    assert theirs.model_from_config(settings) == config
    one_hot = jnp.asarray(crystal()["atomic_numbers"].numpy()[:, None] == [13, 29], float)
    neighbor_fn, _, energy_fn = jax_md_energy.nequip_neighbor_list(displacement, cell.T, settings, one_hot)
    R = jnp.asarray(FRACTIONAL * 0.6)  # within half of the box: one image
    want = energy_fn(params, R, neighbor_fn.allocate(R))
    inputs = crystal() | {"cell": torch.tensor(cell)[None], "pos": torch.tensor(FRACTIONAL * 0.6 @ cell)}
    close(potentials("nequip")[1](inputs)["energy"], want[None])


def test_nequip_is_invariant():
    module, inputs = potentials("nequip")[1], crystal()
    want, (pos, cell) = module(inputs), (inputs["pos"], inputs["cell"])
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    for q in (turn, -turn):
        out = module(inputs | {"pos": pos @ q + torch.tensor([1.0, 2, 3]), "cell": cell @ q})
        close(out["energy"], want["energy"])
        close(out["position_gradients"], want["position_gradients"] @ q, 1e-9)
        close(out["cell_gradients"], want["cell_gradients"] @ q, 1e-9)
    order = torch.tensor([3, 1, 7, 0, 2, 5, 4, 6])
    close(module(inputs | {"pos": pos[order], "atomic_numbers": inputs["atomic_numbers"][order]})["node_energies"], want["node_energies"][order])


def test_unused_slots_and_padding_atoms_contribute_nothing():
    energy, module = potentials("nequip")
    want, inputs = module(crystal()), crystal()
    edges, offsets = neighbor_list(*(inputs[k] for k in ("pos", "cell", "pbc")), CUTOFF + 1.0)  # edges beyond the cutoff, too
    padded = {"edge_index": torch.nn.functional.pad(edges, (3, 5), value=10), "cell_offsets": torch.nn.functional.pad(offsets, (0, 0, 3, 5))}
    more = {"pos": torch.cat([inputs["pos"], torch.zeros(2, 3)]), "atomic_numbers": torch.cat([inputs["atomic_numbers"], torch.zeros(2, dtype=torch.int64)])}
    out = module(inputs | more | padded | {"batch": torch.zeros(10, dtype=torch.int64)})
    close(out["energy"], want["energy"])
    close(out["position_gradients"][:8], want["position_gradients"])
    assert not out["position_gradients"][8:].any() and not out["node_energies"][8:].any()
    assert module(inputs | {"atomic_numbers": inputs["atomic_numbers"] + 1})["energy"].isnan().all()  # unknown elements


@pytest.mark.parametrize("name", ["pair", "nequip"])
def test_gradient_of_a_loss_on_forces_and_cell_gradients_equals_jax(name):
    apply, params = PAIR if name == "pair" else nequip()
    module, inputs = bridge.torch_potential(apply, params, gradients="autodiff", cutoff=CUTOFF), crystal(n_systems=2)
    fixed = in_jax(inputs)

    def loss(out):
        return out["energy"].sum() + (out["position_gradients"] ** 2).sum() + (out["cell_gradients"] ** 2).sum()

    loss(module(inputs)).backward()
    want = jax.grad(lambda p: loss(strain.with_gradients(partial(apply, p))(fixed)))(params)
    found = jax.tree.leaves(module.model.pytree())
    assert len(found) > 1
    for t, g in zip(found, jax.tree.leaves(want), strict=True):
        close(t.grad, g, 1e-9)
    optimiser, before = torch.optim.Adam(module.parameters(), 1e-3), float(loss(module(inputs)))
    optimiser.step()
    assert float(loss(module(inputs))) < before and module.compilations == 2


def given(params, inputs):
    """gradients="model": an energy that JAX can't differentiate in pos, with the gradients beside it; linear in k."""
    pos, fixed = inputs["pos"], jax.lax.stop_gradient(inputs["pos"])
    energy = params["k"] * jax.ops.segment_sum((fixed**2).sum(-1), inputs["batch"], num_segments=len(inputs["cell"]))
    return {"energy": energy, "position_gradients": 2 * params["k"] * pos, "cell_gradients": jnp.zeros_like(inputs["cell"]), "numbers": inputs["atomic_numbers"]}


def test_a_models_own_gradients_are_those_of_its_energy():
    module, inputs = bridge.torch_potential(given, {"k": jnp.array(2.0)}), crystal(n_systems=2)
    pos, k = inputs["pos"].requires_grad_(), module.get_parameter("model.k")
    out = module(inputs)
    g, dk = torch.autograd.grad((out["energy"] * torch.tensor([1.0, 3.0])).sum(), (pos, k), create_graph=True)
    weight = torch.tensor([1.0, 3.0])[inputs["batch"]][:, None]
    close(g, 4 * weight * pos)
    close(dk, (weight * pos**2).sum())
    close(torch.autograd.grad(g.sum(), k)[0], (2 * weight * pos).sum())
    assert out["numbers"].tolist() == inputs["atomic_numbers"].tolist()


def test_copies_pickles_and_float32():
    inputs = crystal(dtype=torch.float32)
    with jax.enable_x64(False):  # int64 indices are fine
        module = bridge.torch_potential(*NequIP([13, 29], CUTOFF, layers=1, hidden="2x0e", harmonics="1x0e", radial=2), gradients="autodiff", cutoff=CUTOFF)
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(twin(inputs)["energy"], module(inputs)["energy"]) and twin.cutoff == CUTOFF
        assert module(inputs)["position_gradients"].dtype == torch.float32
    assert [n for n, _ in module.named_parameters()][0].startswith("model.params.BesselEmbedding_0")


ERRORS = {
    "no pbc": (dict(pbc=None), "got no pbc"),
    "cell": (dict(cell=torch.eye(3, dtype=torch.float64)), "expected cell as float"),
    "dtype": (dict(cell=torch.eye(3)[None]), "one dtype for pos and cell, got pos float64 and cell float32"),
    "systems": (crystal(n_systems=2), "expected one system for a jax-md energy, got 2 cells; call the model once for each system"),
    "edges": (dict(edge_index=torch.zeros(3, 2, dtype=torch.int64)), r"expected edge_index as int\[2,E\]"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_inputs_outside_the_contract_are_refused(case):
    change, text = ERRORS[case]
    module = potentials("jax-md box")[1]
    with pytest.raises(ValueError, match=text):
        module(crystal() | change)


def test_models_outside_the_contract_are_refused(monkeypatch):
    inputs = crystal()
    for model, options, text in [
        (lambda x: {"energy": x["pos"].sum()[None]}, {}, "got only energy; let the model return position_gradients, cell_gradients"),
        (lambda x: x["pos"].sum(), {"gradients": "autodiff"}, r"expected energy as float\[1\], got float64\[\]"),
        (lambda x: {"e": x["pos"].sum()}, {"gradients": "autodiff"}, "expected the outputs energy, got only e"),
        (nequip()[0], {"params": nequip()[1], "gradients": "autodiff"}, "got no edge_index, cell_offsets"),
        (engine.model(lambda R, box: R), {"gradients": "autodiff"}, r"expected a scalar from the jax-md energy, got \(8, 3\)"),
    ]:
        with pytest.raises(ValueError, match=text):
            bridge.torch_potential(model, **options)(inputs)
    with pytest.raises(ValueError, match="expected gradients as one of 'model', 'autodiff', got 'autograd'"):
        bridge.torch_potential(pair, gradients="autograd")
    with pytest.raises(ValueError, match="cell as one of"):
        engine.model(morse(), "columns")
    for elements, cutoff, text in [([], 4.0, "atomic numbers, each once"), ([29, 29], 4.0, "each once"), ([29], 0.5, "above 0.5 Angstrom")]:
        with pytest.raises(ValueError, match=text):
            NequIP(elements, cutoff)
    monkeypatch.setitem(sys.modules, "jax_md._nn", None)
    with pytest.raises(ImportError, match="pip install jax-md"):
        NequIP([29], 4.0)


def test_free_space_and_edges_under_torch_func():
    displacement, _ = space.free()
    module, inputs = bridge.torch_potential(engine.model(jax_md_energy.morse_pair(displacement, **MORSE), None), gradients="autodiff"), crystal()
    out = module(inputs | {"cell": torch.zeros(1, 3, 3, dtype=torch.float64)})
    assert out["energy"].abs() > 0.1 and not out["cell_gradients"].any()
    close(torch.func.grad(lambda pos: module(inputs | {"pos": pos})["energy"].sum())(inputs["pos"]), out["position_gradients"])
