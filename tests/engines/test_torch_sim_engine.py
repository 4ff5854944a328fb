"""torch_side.engines.torch_sim: torch-sim's own validator, values, its integrators, optimizers and
autobatchers, errors."""

import copy
import functools
import inspect
import sys
from dataclasses import replace
from typing import get_args

import jax
import jax.numpy as jnp
import pytest
import torch
import torch_sim as ts
from ase.build import bulk, molecule
from jax_md import energy as jax_md_energy
from jax_md import space
from torch_sim import autobatching
from torch_sim.integrators import MDState
from torch_sim.models.interface import ModelInterface, validate_model_outputs
from torch_sim.typing import MemoryScaling

import bridge
from bridge.card import Card
from jax_side.engines import jax_md
from tests.graph_cases import MODEL as EMBEDDED
from tests.graph_cases import Embedded
from tests.model_cases import sevennet, skewed
from torch_side.engines import torch_sim as engine
from torch_side.models.d3 import D3
from torch_side.potentials import strain
from torch_side.potentials.geometry import edge_vectors
from torch_side.potentials.model import Wrapped

# Morse copper (Girifalco and Weizer, Phys. Rev. 114, 687 (1959)), cut off here
DEPTH, WIDTH, R0, CUTOFF = (
    0.3429,
    1.3588,
    2.866,
    5.0,
)
KT, DT = 0.02585, 1e-3 * ts.units.UnitSystem.metal.time  # 300 K, 1 fs
OUTPUTS = {"energy", "position_gradients", "cell_gradients", "node_energies"}
TIGHT = dict(rtol=0, atol=1e-10)


def names():
    """(nve for integrate, FIRE of positions and cell for optimize, Langevin's NPT): the first of
    torch-sim 0.6, the second of 0.3."""
    if hasattr(ts, "Integrator"):
        fire = {
            "optimizer": ts.Optimizer.fire,
            "init_kwargs": {"cell_filter": ts.CellFilter.frechet},
        }
        return ts.Integrator.nve, fire, "npt_langevin_isotropic"
    return ts.nve, {"optimizer": ts.frechet_cell_fire}, "npt_langevin"


NVE, FIRE, NPT = names()


def pair(r2, xp):
    """Half of Morse's energy for each directed edge, taken to zero at the cutoff."""
    x = xp.exp(-WIDTH * (xp.sqrt(r2) - R0))
    return 0.5 * DEPTH * (x * x - 2 * x) * (1 - r2 / CUTOFF**2) ** 2


def morse_jax(x):
    (i, j), batch, n = x["edge_index"], x["batch"], len(x["pos"])
    used = i < n
    i, j = jnp.where(used, i, 0), jnp.where(used, j, 0)
    r = (
        x["pos"][j]
        - x["pos"][i]
        + jnp.einsum("ea,eab->eb", x["cell_offsets"].astype(x["pos"].dtype), x["cell"][batch[i]])
    )
    r2 = jnp.where(used, (r**2).sum(-1), CUTOFF**2)
    nodes = jnp.zeros(n, r2.dtype).at[i].add(pair(r2, jnp))
    return {"energy": jax.ops.segment_sum(nodes, batch, len(x["cell"])), "node_energies": nodes}


def morse_torch(x):
    nodes = (
        x["pos"]
        .new_zeros(len(x["pos"]))
        .index_add(0, x["edge_index"][0], pair(edge_vectors(x).square().sum(-1), torch))
    )
    return {
        "energy": nodes.new_zeros(len(x["cell"])).index_add(0, x["batch"], nodes),
        "node_energies": nodes,
    }


def one_system():
    """jax-md's own Morse pairs: one system a call, no cutoff that torch knows of."""
    displacement, _ = space.periodic_general(jnp.eye(3), fractional_coordinates=True)
    pairs = jax_md_energy.morse_pair(
        displacement, sigma=2.4, epsilon=0.3, alpha=1.5, r_onset=2.0, r_cutoff=2.6
    )
    return bridge.torch_potential(jax_md.model(pairs, cutoff=2.6), gradients="autodiff")


@functools.cache
def morse(kind="jax"):
    if kind == "jax":
        return bridge.torch_potential(morse_jax, gradients="autodiff", cutoff=CUTOFF)
    return Wrapped(
        morse_torch, Card(outputs=OUTPUTS, cutoff=CUTOFF, neighbor_list="own"), "autograd"
    )


@functools.cache
def morse_model(kind="jax"):
    return engine.model(morse(kind), dtype=torch.float64)


def state(*atoms, dtype=torch.float64):
    return ts.io.atoms_to_state(list(atoms), torch.device("cpu"), dtype)


def copper(a=3.6, repeat=(1, 1, 1), **kwargs):
    return skewed(bulk("Cu", "fcc", a, cubic=True) * repeat, **kwargs)


CRYSTALS = [
    copper(seed=1),
    skewed(bulk("Cu", "fcc", 3.7) * (2, 1, 1), seed=2),
    bulk("Cu", "fcc", 3.5),
]


def moving(*atoms, seed=0):
    """An MDState with momenta of about 300 K."""
    s = state(*atoms)
    momenta = (
        torch.randn(s.positions.shape, dtype=s.dtype, generator=torch.Generator().manual_seed(seed))
        * (s.masses * KT).sqrt()[:, None]
    )
    mean = (
        torch.zeros(s.n_systems, 3, dtype=s.dtype).index_add(0, s.system_idx, momenta)
        / s.n_atoms_per_system[:, None]
    )
    momenta = momenta - mean[s.system_idx]
    return MDState(
        **vars(s),
        momenta=momenta,
        energy=torch.zeros(len(atoms), dtype=s.dtype),
        forces=torch.zeros_like(s.positions),
    )


def own(potential, s):
    """What the potential itself says about a state."""
    inputs = {
        "pos": s.positions,
        "cell": s.row_vector_cell,
        "batch": s.system_idx,
        "atomic_numbers": s.atomic_numbers,
    }
    return inputs, potential(inputs | {"pbc": torch.as_tensor(s.pbc).expand(s.n_systems, 3)})


VALIDATED = {
    "torch, float64": lambda: engine.model(Embedded(), compute_stress=False, compute_forces=False),
    "SevenNet-0, float32": lambda: engine.model(sevennet(torch.float32)),
    "JAX graph": lambda: morse_model("jax"),
    "jax-md, one system": lambda: engine.model(
        one_system(), dtype=torch.float64, batched="sequential"
    ),
}


def roomy(s):
    """The state in cells of at least 6 A: jax-md looks at the nearest image only, and refuses the
    validator's iron."""
    if not torch.as_tensor(s.pbc).any():
        return s
    heights = 1 / torch.linalg.inv(s.row_vector_cell).norm(dim=1)
    s.cell = s.cell * (6 / heights.amin(1)).clamp(min=1)[:, None, None]
    return s


@pytest.mark.parametrize("name", VALIDATED)
def test_torch_sims_own_validator_passes(name):
    model = VALIDATED[name]()
    assert isinstance(model, ModelInterface) and isinstance(model, torch.nn.Module)
    takes = inspect.signature(validate_model_outputs).parameters
    changes = (
        {"state_modifier": roomy}
        if name == "jax-md, one system" and "state_modifier" in takes
        else {}
    )
    validate_model_outputs(model, model.device, model.dtype, **changes)
    # the validator has switched on what was off
    assert model.compute_stress and model.compute_forces


@pytest.mark.parametrize("kind", ["jax", "torch"])
def test_values_of_a_batch_are_the_potentials(kind):
    s = state(*CRYSTALS)
    out, (inputs, expected) = morse_model(kind)(s), own(morse(kind), s)
    assert s.n_atoms_per_system.tolist() == [4, 2, 1] and set(out) == {
        "energy",
        "forces",
        "stress",
        "energies",
    }
    W = strain.virial(
        expected["position_gradients"],
        expected["cell_gradients"],
        inputs["pos"],
        inputs["batch"],
        inputs["cell"],
    )
    want = {
        "energy": expected["energy"],
        "forces": -expected["position_gradients"],
        "stress": W / torch.linalg.det(s.cell).abs()[:, None, None],
    }
    for name, x in (want | {"energies": expected["node_energies"]}).items():
        torch.testing.assert_close(out[name], x, **TIGHT)
    assert out["stress"].abs().max() > 1e-2 and out["forces"].abs().max() > 0.1


def test_a_sum_with_dispersion_x_its_terms():
    """`model + D3()`, one call of torch-sim, beside direct calls of both."""
    terms, s = (morse("torch"), D3("pbe", cutoff=8.0, dtype=torch.float64)), state(*CRYSTALS)
    model = engine.model(terms[0] + terms[1])
    out, (inputs, _) = model(s), own(terms[0], s)
    wanted, dispersion = (own(term, s)[1] for term in terms)
    summed = {name: wanted[name] + dispersion[name] for name in wanted}
    g, G = summed["position_gradients"], summed["cell_gradients"]
    W = strain.virial(g, G, inputs["pos"], inputs["batch"], inputs["cell"])
    torch.testing.assert_close(out["energy"], summed["energy"], **TIGHT)
    torch.testing.assert_close(out["forces"], -g, **TIGHT)
    volumes = torch.linalg.det(s.cell).abs()[:, None, None]
    torch.testing.assert_close(out["stress"], W / volumes, **TIGHT)
    assert (dispersion["energy"] < -0.1).all() and model.dtype is torch.float64
    assert dispersion["cell_gradients"].abs().amin(0).max() > 1e-2


def test_jax_and_torch_agree_on_a_batch():
    s = state(*CRYSTALS)
    (jax_out, torch_out) = (morse_model(kind)(s) for kind in ("jax", "torch"))
    for name, x in torch_out.items():
        torch.testing.assert_close(jax_out[name], x, **TIGHT)


@pytest.mark.parametrize("kind", ["jax", "torch"])
def test_forces_and_stress_are_derivatives_of_the_energy(kind):
    model, step, base = morse_model(kind), 1e-4, state(*CRYSTALS)
    out, eye = model(base), torch.eye(3, dtype=torch.float64)

    def energy(strained, moved):
        s = base.clone()
        s.positions, s.cell = (s.positions + moved) @ (eye + strained), (eye + strained).mT @ s.cell
        return model(s)["energy"]

    for a, b in ((0, 0), (1, 1), (0, 2), (2, 1)):
        e = torch.zeros_like(eye)
        e[a, b] = step
        slope = (energy(e, 0) - energy(-e, 0)) / (2 * step * torch.linalg.det(base.cell).abs())
        torch.testing.assert_close(out["stress"][:, a, b], slope, rtol=0, atol=1e-7)
    d = torch.zeros_like(base.positions)
    d[5, 1] = step
    torch.testing.assert_close(
        out["forces"][5, 1],
        -(energy(0 * eye, d) - energy(0 * eye, -d))[1] / (2 * step),
        rtol=0,
        atol=1e-6,
    )


def test_positions_may_lie_in_any_image_and_the_dict_will_do():
    s = state(*CRYSTALS)
    away = s.positions + 2 * s.cell[s.system_idx][:, :, 0] - s.cell[s.system_idx][:, :, 2]
    fields = {
        "positions": away,
        "cell": s.cell,
        "pbc": torch.tensor(True),
        "atomic_numbers": s.atomic_numbers,
        "system_idx": s.system_idx,
    }
    model = morse_model("torch")
    for name, x in model(s).items():
        torch.testing.assert_close(model(fields)[name], x, **TIGHT)
    one = state(CRYSTALS[0])
    alone = {
        "positions": one.positions,
        "cell": one.cell[0],
        "pbc": True,
        "atomic_numbers": one.atomic_numbers,
    }
    torch.testing.assert_close(model(alone)["stress"], model(one)["stress"], **TIGHT)


def test_one_system_after_another_is_the_whole_batch():
    s, single = (
        state(*CRYSTALS),
        engine.model(morse("torch"), dtype=torch.float64, batched="sequential"),
    )
    for name, x in morse_model("torch")(s).items():
        torch.testing.assert_close(single(s)[name], x, **TIGHT)


def test_outputs_are_detached_unless_positions_ask_for_more():
    model, s = engine.model(Embedded()), state(*CRYSTALS)
    assert all(p.requires_grad for p in model.parameters()) and not any(
        x.requires_grad for x in model(s).values()
    )
    s.positions = s.positions.requires_grad_()
    out = model(s)
    (slope,) = torch.autograd.grad(out["energy"].sum(), s.positions, retain_graph=True)
    torch.testing.assert_close(slope, -out["forces"], **TIGHT)
    (second,) = torch.autograd.grad(out["forces"][0, 0], s.positions)
    assert second.abs().max() > 1e-3
    with torch.no_grad():
        assert not any(x.requires_grad for x in model(s).values())


def test_a_graph_that_a_potential_leaves_is_cut():
    """Else each step of a simulation would keep the one before."""
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)

    def potential(x):
        with torch.enable_grad():
            return {
                "energy": weight * x["pos"].new_ones(len(x["cell"])),
                "position_gradients": weight * x["pos"],
            }

    card = Card(outputs={"energy", "position_gradients"})
    out = engine.model(Wrapped(potential, card, "model"), dtype=torch.float64)(state(*CRYSTALS))
    assert set(out) == {"energy", "forces"} and not any(x.requires_grad for x in out.values())


def test_nothing_is_copied_or_evaluated_twice():
    given = []

    def potential(inputs):
        given.append(inputs)
        return morse_torch(inputs)

    wrapped, s = (
        Wrapped(potential, replace(morse("torch").card, batches=True), "autograd"),
        moving(*CRYSTALS),
    )
    model = engine.model(wrapped, dtype=torch.float64)
    model(s)
    assert (
        model.potential is wrapped
        and len(given) == 1
        and given[0]["pos"].data_ptr() == s.positions.data_ptr()
    )
    init, step = engine.integrator("nve", model, dt=torch.tensor(DT), kT=torch.tensor(KT))
    s = init(s)
    for _ in range(3):
        s = step(s)
    assert len(given) == 5


def test_extra_outputs_keep_the_contracts_names():
    card = Card(
        outputs={"energy", "position_gradients", "cell_gradients", "charges"},
        required_inputs={"charge"},
        optional_inputs={"spin"},
        needs_pbc=False,
    )

    def potential(x):
        return {
            "energy": x["charge"] * (1 if "spin" not in x else 1 + x["spin"]),
            "charges": x["pos"].sum(-1),
        }

    s = state(*CRYSTALS)
    out = engine.model(
        Wrapped(potential, card, "autograd"), dtype=torch.float64, charge=-1, spin=2.0
    )(s)
    torch.testing.assert_close(out["charges"], s.positions.sum(-1))
    assert out["energy"].tolist() == [-3.0] * 3 and out["forces"].abs().max() == 0
    s.charge = torch.tensor([1, 0, -1])
    assert engine.model(Wrapped(potential, card, "autograd"), dtype=torch.float64, charge=-1)(s)[
        "energy"
    ].tolist() == [1.0, 0.0, -1.0]
    with pytest.raises(ValueError, match="got no charge; pass charge="):
        engine.model(Wrapped(potential, card, "autograd"), dtype=torch.float64)(state(*CRYSTALS))


def total(s):
    return s.energy + ts.calc_kinetic_energy(
        momenta=s.momenta, masses=s.masses, system_idx=s.system_idx
    )


@pytest.mark.parametrize("kind", ["jax", "torch"])
def test_nve_of_a_batch_conserves_energy(kind):
    init, step = engine.integrator(
        "nve", morse_model(kind), dt=torch.tensor(DT), kT=torch.tensor(KT)
    )
    s = init(moving(copper(rattle=0.02), copper(3.65, (2, 1, 1), rattle=0.02, seed=3)))
    first, kinetic, totals = s.energy.clone(), [], []
    for _ in range(80):
        s = step(s)
        totals.append(total(s))
        kinetic.append(
            ts.calc_kinetic_energy(momenta=s.momenta, masses=s.masses, system_idx=s.system_idx)
        )
    assert (s.energy - first).abs().min() > 1e-3
    spread = lambda xs: torch.stack(xs).max(0).values - torch.stack(xs).min(0).values
    assert (spread(totals) < 0.02 * spread(kinetic)).all() and spread(kinetic).min() > 0.05


def test_nvt_of_a_batch_has_its_temperature():
    dt, gamma = torch.tensor(2 * DT).double(), torch.tensor(0.02 / DT)
    init, step = engine.integrator(
        "nvt_langevin", morse_model(), dt=dt, kT=torch.tensor(KT), gamma=gamma
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        s = init(state(*[bulk("Cu", "fcc", 3.62, cubic=True) * (2, 2, 1) for _ in range(4)]))
        seen_kT = []
        for n in range(250):
            s = step(s)
            if n >= 50:
                seen_kT.append(
                    ts.calc_kT(momenta=s.momenta, masses=s.masses, system_idx=s.system_idx)
                )
    assert abs(torch.stack(seen_kT).mean() / KT - 1) < 0.12


def test_npt_of_a_batch_goes_to_its_pressure():
    barostat = dict(
        alpha=torch.tensor(0.5),
        cell_alpha=torch.tensor(5.0),
        b_tau=torch.tensor(100 * DT).double(),
        external_pressure=torch.tensor(0.0).double(),
    )
    init, step = engine.integrator(
        NPT, morse_model("torch"), dt=torch.tensor(2 * DT).double(), kT=torch.tensor(KT), **barostat
    )
    pressure = lambda s: -torch.einsum("bii->b", s.stress) / 3
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        s = init(state(*(bulk("Cu", "fcc", a, cubic=True) * (2, 1, 1) for a in (3.55, 4.05))))
        volume, first, later = s.volume.clone(), pressure(s), []
        for n in range(200):
            s = step(s)
            later.append(pressure(s))
    assert (
        first[0] > 0.1
        and first[1] < -0.04
        and s.volume[0] > 1.1 * volume[0]
        and s.volume[1] < 0.95 * volume[1]
    )
    assert (torch.stack(later[120:]).mean(0).abs() < 0.6 * first.abs()).all()


def relaxed(model, *atoms, **kwargs):
    done = ts.generate_force_convergence_fn(force_tol=2e-3, include_cell_forces=True)
    return ts.optimize(state(*atoms), model, convergence_fn=done, max_steps=600, **FIRE, **kwargs)


@pytest.mark.parametrize("kind", ["jax", "torch"])
def test_relaxation_of_a_batch_with_its_cells(kind):
    start = [
        copper(3.5, seed=1, strain=0.02, rattle=0.05),
        copper(3.9, (2, 1, 1), seed=2, strain=0.02, rattle=0.05),
    ]
    model, before = morse_model(kind), morse_model(kind)(state(*start))
    after = model(s := relaxed(model, *start))
    assert (after["energy"] < before["energy"] - 0.05).all() and after["forces"].norm(
        dim=-1
    ).max() < 2e-3 < before["forces"].norm(dim=-1).max()
    assert (
        after["stress"].norm(dim=-1).amax(-1) * s.volume / s.n_atoms_per_system < 2e-3
    ).all() and before["stress"].abs().max() > 1e-2
    per_atom = after["energy"] / s.n_atoms_per_system
    # both are the same fcc crystal now
    torch.testing.assert_close(per_atom[0], per_atom[1], rtol=0, atol=1e-5)


def test_the_memory_figure():
    assert (
        morse_model().memory_scales_with
        == engine.model(Embedded()).memory_scales_with
        == "n_atoms_x_density"
    )
    assert engine.model(one_system(), batched="sequential").memory_scales_with == "n_atoms"
    for figure in get_args(MemoryScaling):
        assert engine.model(morse(), memory_scales_with=figure).memory_scales_with == figure


def figure(atoms):
    """torch-sim's n_atoms_x_density, the density in atoms for each cubic nm."""
    return len(atoms) ** 2 / (atoms.get_volume() / 1000)


def test_autobatched_values_and_dynamics_are_those_of_one_batch():
    model, systems = (
        morse_model("torch"),
        [copper(3.6, seed=n) * ((2, 1, 1) if n % 2 else (1, 1, 1)) for n in range(5)],
    )
    bins = autobatching.BinningAutoBatcher(
        model,
        memory_scales_with=model.memory_scales_with,
        max_memory_scaler=1.1 * max(map(figure, systems)),
    )
    one, several = (
        ts.static(state(*systems), model),
        ts.static(state(*systems), model, autobatcher=bins),
    )
    assert len(bins.index_bins) > 2 and len(one) == len(several) == 5
    for a, b in zip(one, several):
        for name in ("potential_energy", "forces", "stress"):
            torch.testing.assert_close(a[name], b[name], **TIGHT)
    run = functools.partial(
        ts.integrate,
        moving(*systems),
        model,
        integrator=NVE,
        n_steps=5,
        temperature=300.0,
        timestep=1e-3,
    )
    torch.testing.assert_close(run(autobatcher=bins).positions, run().positions, **TIGHT)


def test_relaxation_in_flight_is_that_of_one_batch():
    model, systems = (
        morse_model("torch"),
        [copper(3.55 + 0.05 * n, seed=n, strain=0.02, rattle=0.05) for n in range(3)],
    )
    most = 1.5 * max(map(figure, systems))
    swapping = autobatching.InFlightAutoBatcher(
        model, memory_scales_with=model.memory_scales_with, max_memory_scaler=most
    )
    one, several = relaxed(model, *systems), relaxed(model, *systems, autobatcher=swapping)
    torch.testing.assert_close(several.energy, one.energy, rtol=0, atol=1e-5)


def test_the_largest_batch_is_found_by_xlas_own_error(monkeypatch):
    def hungry(x):
        room = jnp.ones(10**15 if len(x["pos"]) > 20 else 10, jnp.float64)
        return {
            "energy": jax.ops.segment_sum(x["pos"].sum(-1), x["batch"], len(x["cell"]))
            + jnp.cumsum(room)[-1] * x["pos"][0, 0]
        }

    model = engine.model(bridge.torch_potential(hungry, gradients="autodiff"), dtype=torch.float64)
    # it refuses a CPU
    monkeypatch.setattr(
        autobatching, "measure_model_memory_forward", lambda s, m: float(m(s)["energy"].sum())
    )
    # of 4, 12, 36: two before the error
    assert (
        autobatching.determine_max_batch_size(
            state(bulk("Cu")), model, start_size=4, scale_factor=3
        )
        == 4
    )
    with pytest.raises(
        torch.OutOfMemoryError, match="CUDA out of memory, found by XLA: RESOURCE_EXHAUSTED"
    ):
        model(state(*[bulk("Cu")] * 36))


def test_it_moves_with_its_potential():
    model = engine.model(copy.deepcopy(Embedded()))
    model.potential.card = Card(
        **{**vars(model.potential.card), "dtype": "float64", "device": "cpu"}
    )
    assert (
        model.to(torch.float32).dtype is torch.float32
        and model.potential.weight.dtype is torch.float32
    )
    assert model(state(*CRYSTALS, dtype=torch.float32))["stress"].dtype is torch.float32
    with pytest.raises(
        ValueError,
        match="expected positions as torch.float32 on cpu, where the model is, got torch.float64 on cpu; make the state by",
    ):
        model(state(*CRYSTALS))


def test_dtype_and_device_are_the_potentials_unless_it_takes_any():
    assert (
        engine.model(sevennet(torch.float32)).dtype is torch.float32
        and engine.model(Embedded()).dtype is torch.float64
    )
    assert engine.model(morse()).dtype is torch.get_default_dtype() and engine.model(
        morse()
    ).device == torch.device("cpu")
    with pytest.raises(
        ValueError,
        match=r"expected dtype=torch.float32, the potential's, got torch.float64; convert the potential first: potential.to",
    ):
        engine.model(sevennet(torch.float32), dtype=torch.float64)
    with pytest.raises(ValueError, match="expected device=cpu, the potential's, got meta"):
        engine.model(sevennet(torch.float32), device="meta")


def test_a_state_elsewhere_is_refused():
    s = state(*CRYSTALS)
    with pytest.raises(
        ValueError,
        match="expected positions as torch.float64 on cpu, where the model is, got torch.float64 on meta",
    ):
        morse_model()(
            {
                "positions": s.positions.to("meta"),
                "cell": s.cell.to("meta"),
                "pbc": True,
                "atomic_numbers": s.atomic_numbers.to("meta"),
            }
        )
    s.cell = s.cell.float()
    with pytest.raises(
        ValueError,
        match="expected cell as torch.float64 on cpu, where the model is, got torch.float32 on cpu",
    ):
        morse_model()(s)


def test_a_molecule_has_no_stress():
    model, water = engine.model(EMBEDDED, dtype=torch.float64), state(molecule("H2O"))
    out, (_, expected) = model(water), own(EMBEDDED, water)
    assert out["stress"].isnan().all() and out["forces"].abs().max() > 1e-3
    torch.testing.assert_close(out["energy"], expected["energy"], **TIGHT)
    torch.testing.assert_close(out["forces"], -expected["position_gradients"], **TIGHT)
    model.compute_stress = False
    assert set(model(water)) == set(out) - {"stress"}


def test_a_molecule_beside_a_crystal_leaves_its_stress_alone():
    s, model = state(*CRYSTALS[:2]), morse_model("torch")
    fields = {name: getattr(s, name) for name in ("positions", "atomic_numbers", "system_idx")}
    cell = torch.stack([0 * s.cell[0], s.cell[1]])
    out = model(fields | {"cell": cell, "pbc": torch.tensor([[False] * 3, [True] * 3])})
    assert out["stress"][0].isnan().all()
    torch.testing.assert_close(out["stress"][1], model(s)["stress"][1], **TIGHT)


def test_what_a_potential_does_not_have_is_refused():
    card = Card(outputs={"energy"})
    only = Wrapped(lambda x: {"energy": x["pos"].new_zeros(len(x["cell"]))}, card, "model")
    model = engine.model(only, dtype=torch.float64)
    assert (
        not model.compute_stress
        and not model.compute_forces
        and set(model(state(*CRYSTALS))) == {"energy"}
    )
    with pytest.raises(
        NotImplementedError,
        match="a potential with cell_gradients for compute_stress=True, got Wrapped, which has none; set it to False",
    ):
        model.compute_stress = True
    with pytest.raises(NotImplementedError, match="position_gradients for compute_forces=True"):
        engine.model(only, compute_forces=True)


def test_outputs_that_cannot_be_joined_are_refused():
    s = state(*CRYSTALS)
    model = engine.model(Embedded().asking("hessian"), batched="sequential")
    with pytest.raises(
        ValueError,
        match='expected outputs with one axis of atoms or systems for batched="sequential", got hessian',
    ):
        model(s)


NONSENSE = {
    "memory_scales_with": (
        dict(memory_scales_with="n_pairs"),
        "expected memory_scales_with as one of n_atoms_x_density, n_atoms.*, got 'n_pairs'",
    ),
    "batched": (dict(batched="vmap"), "expected batched as one of graph, sequential, got 'vmap'"),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_refused(name):
    with pytest.raises(ValueError, match=NONSENSE[name][1]):
        engine.model(Embedded(), **NONSENSE[name][0])


def test_an_integrator_or_setting_that_torch_sim_does_not_have_is_refused():
    with pytest.raises(
        ValueError,
        match="expected an integrator of torch-sim, such as nve, got 'euler'; see what torch_sim.integrators",
    ):
        engine.integrator("euler", morse_model(), dt=DT)
    with pytest.raises(TypeError, match="gama"):
        engine.integrator("nvt_langevin", morse_model(), dt=DT, kT=KT, gama=1.0)


def test_a_plain_function_is_refused():
    with pytest.raises(
        TypeError,
        match="expected a Model of the contract, got a function; wrap it by torch_side.potentials.model.Wrapped, or bridge.torch_potential",
    ):
        engine.model(morse_torch)


def test_without_torch_sim_the_error_gives_the_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_sim.models.interface", None)
    monkeypatch.setattr(engine, "_interface", engine._interface.__wrapped__)
    with pytest.raises(ImportError, match="pip install torch-sim-atomistic"):
        engine.model(Embedded())
