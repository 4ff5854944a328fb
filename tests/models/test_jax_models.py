"""Potentials that nobody here wrote as models of the contract, in torch: jax-md's Morse, jax-md's
NequIP with random weights."""

import pickle
import sys
from functools import cache

import jax
import jax.numpy as jnp
import pytest
import torch
from jax_md import energy as jax_md_energy
from jax_md import space

import bridge
from jax_side.engines import jax_md as engine
from jax_side.models.nequip import NequIP
from tests.potential_cases import (
    CELL,
    CUTOFF,
    FRACTIONAL,
    MORSE,
    check_autograd,
    check_gradients,
    check_outputs,
    check_second_derivatives,
    check_training,
    close,
    crystal,
    in_jax,
    lattice,
    morse,
    plain_morse,
    potentials,
    total,
    trainable,
)
from torch_side.potentials.neighbors import neighbor_list

WAYS = pytest.mark.parametrize("name", ["jax-md box", "jax-md perturbation"])


@cache
def by_jax_md():
    """Energy and forces of jax-md, the gradient in the cell by the plain formula."""
    inputs = in_jax(crystal())
    in_cell = jax.grad(lambda h: total(plain_morse, inputs | {"cell": h}))
    return jax.jit(lambda R, h: (*jax.value_and_grad(morse())(R), in_cell(h)))(
        FRACTIONAL, inputs["cell"]
    )


@WAYS
def test_jax_md_x_values_and_gradients(name):
    check_outputs(name, 1)
    check_gradients(name)
    out = check_autograd(potentials(name)[1], crystal())
    energy, position_gradients, cell_gradients = by_jax_md()
    close(out["energy"][0], energy)
    close(out["position_gradients"], position_gradients)
    close(out["cell_gradients"], cell_gradients)


@pytest.mark.parametrize(
    "name, names",
    [
        pytest.param("jax-md box", ("pos",), marks=pytest.mark.full),
        ("jax-md perturbation", ("pos", "cell")),
    ],
)
def test_jax_md_x_second_derivatives(name, names):
    check_second_derivatives(name, plain_morse, names)


def test_what_is_wrong_in_jax_md_itself():
    """Why cell="perturbation" exists: the real-space tangents of space.transform spoil mixed and
    forward-over-forward second derivatives."""
    inputs = in_jax(crystal())
    G = [
        jax.grad(lambda pos, h, e=e: total(e, inputs | {"pos": pos, "cell": h}), 1)
        for e in (potentials("jax-md box")[0], plain_morse)
    ]
    mixed = [jax.jit(jax.jacrev(g))(inputs["pos"], inputs["cell"]) for g in G]
    assert abs(mixed[0] - mixed[1]).max() > 0.02 * abs(mixed[1]).max()
    R = jnp.asarray(FRACTIONAL)
    hessian, forward = (
        jax.jit(jax.jacrev(jax.grad(morse())))(R),
        jax.jit(jax.jacfwd(jax.jacfwd(morse())))(R),
    )
    assert abs(hessian - forward).max() > 0.02 * abs(hessian).max()


def test_jax_md_x_free_space():
    energy = engine.model(jax_md_energy.morse_pair(space.free()[0], **MORSE), None)
    module, inputs = bridge.torch_potential(energy, gradients="autodiff"), crystal()
    out = module(inputs | {"cell": torch.zeros(1, 3, 3, dtype=torch.float64)})
    assert out["energy"].abs() > 0.1 and not out["cell_gradients"].any()
    close(
        torch.func.grad(lambda pos: module(inputs | {"pos": pos})["energy"].sum())(inputs["pos"]),
        out["position_gradients"],
    )


def test_jax_md_x_errors():
    with pytest.raises(
        ValueError,
        match="expected one system for a jax-md energy, got 2 cells; call the model once for each system",
    ):
        potentials("jax-md box")[1](crystal(2))
    with pytest.raises(ValueError, match=r"expected a scalar from the jax-md energy, got \(8, 3\)"):
        engine.model(lambda R, box: R, cutoff=1.0)(in_jax(crystal()))
    with pytest.raises(ValueError, match="cell as one of"):
        engine.model(morse(), "columns", cutoff=1.0)


def test_equal_models_are_equal():
    f = morse()
    of = lambda cell="box", cutoff=2.0: engine.model(f, cell, cutoff=cutoff)
    assert of() == of() and hash(of()) == hash(of()) and of() != of(None) and of() != of(cutoff=3.0)
    a = trainable("nequip")[0]
    b = pickle.loads(pickle.dumps(a))
    assert a == b and hash(a) == hash(b)


def test_nequip_x_gradients():
    check_gradients("nequip")


@pytest.mark.full
def test_nequip_x_values_and_gradients_of_a_loss():
    """A double backward, through gradients to parameters, positions and cell."""
    check_training("nequip")


def test_nequip_is_jax_mds_own():
    from jax_md._nn import nequip

    apply, params = trainable("nequip")
    cell, R = 1.6 * CELL, 0.6 * FRACTIONAL  # within half of the box: one image
    settings = nequip.default_config()
    settings.update(dict(apply.settings), n_elements=2, r_max=CUTOFF)
    one_hot = jnp.asarray(crystal()["atomic_numbers"].numpy()[:, None] == [13, 29], float)
    neighbor_fn, _, energy_fn = jax_md_energy.nequip_neighbor_list(
        space.periodic_general(jnp.asarray(cell.T))[0], cell.T, settings, one_hot
    )
    want = jax.jit(energy_fn)(params, jnp.asarray(R), neighbor_fn.allocate(jnp.asarray(R)))
    close(
        potentials("nequip")[1](
            crystal() | {"cell": torch.tensor(cell)[None], "pos": torch.tensor(R @ cell)}
        )["energy"],
        want[None],
    )


def test_nequip_x_invariance():
    module, inputs = potentials("nequip")[1], crystal()
    want, pos, cell = module(inputs), inputs["pos"], inputs["cell"]
    turn = torch.linalg.qr(
        torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    )[0]
    for q in (turn, -turn):
        out = module(inputs | {"pos": pos @ q + torch.tensor([1.0, 2, 3]), "cell": cell @ q})
        close(out["energy"], want["energy"])
        close(out["position_gradients"], want["position_gradients"] @ q, 1e-9)
        close(out["cell_gradients"], want["cell_gradients"] @ q, 1e-9)
    order = torch.tensor([3, 1, 7, 0, 2, 5, 4, 6])
    close(
        module(inputs | {"pos": pos[order], "atomic_numbers": inputs["atomic_numbers"][order]})[
            "node_energies"
        ],
        want["node_energies"][order],
    )


def test_nequip_x_small_cells():
    cell = 0.43 * crystal()["cell"][0]
    one, eight = lattice(cell), lattice(cell, 2)
    both = {k: torch.cat([one[k], eight[k]]) for k in one} | {"batch": torch.tensor([0] + 8 * [1])}
    energy = potentials("nequip")[1](both)["energy"]
    close(energy[1], 8 * energy[0])


def test_nequip_x_unused_slots_and_padding_atoms():
    module, inputs = potentials("nequip")[1], crystal()
    # edges beyond the cutoff, too
    edges, offsets = neighbor_list(*(inputs[k] for k in ("pos", "cell", "pbc")), CUTOFF + 1.0)
    padded = {
        "edge_index": torch.nn.functional.pad(edges, (3, 5), value=10),
        "cell_offsets": torch.nn.functional.pad(offsets, (0, 0, 3, 5)),
    }
    more = {
        "pos": torch.cat([inputs["pos"], torch.zeros(2, 3)]),
        "atomic_numbers": torch.cat([inputs["atomic_numbers"], torch.zeros(2, dtype=torch.int64)]),
    }
    out, want = (
        module(inputs | more | padded | {"batch": torch.zeros(10, dtype=torch.int64)}),
        module(inputs),
    )
    close(out["energy"], want["energy"])
    close(out["position_gradients"][:8], want["position_gradients"])
    assert not out["position_gradients"][8:].any() and not out["node_energies"][8:].any()


def test_nequip_x_unknown_element():
    out = potentials("nequip")[1](crystal() | {"atomic_numbers": torch.tensor([29] * 7 + [30])})
    assert out["energy"].isnan().all() and out["position_gradients"].isnan().any()


def test_nequip_x_missing_edges():
    """-1 says that edges are missing (jax_side.engines.jax_md.edges)."""
    inputs = crystal()
    edges, offsets = neighbor_list(*(inputs[k] for k in ("pos", "cell", "pbc")), CUTOFF)
    for lost in (slice(None), slice(3, 4)):
        given = edges.clone()
        given[:, lost] = -1
        out = potentials("nequip")[1](inputs | {"edge_index": given, "cell_offsets": offsets})
        assert all(x.isnan().all() for x in out.values())


def test_nequip_x_errors(monkeypatch):
    apply, params = trainable("nequip")
    with pytest.raises(ValueError, match="got no edge_index, cell_offsets"):
        bridge.torch_potential(apply, params, gradients="autodiff")(crystal())
    for elements, cutoff, text in [
        ([], 4.0, "atomic numbers, each once"),
        ([29, 29], 4.0, "each once"),
        ([29], 0.5, "above 0.5 Angstrom"),
    ]:
        with pytest.raises(ValueError, match=text):
            NequIP(elements, cutoff)
    monkeypatch.setitem(sys.modules, "jax_md._nn", None)
    with pytest.raises(ImportError, match="pip install jax-md"):
        NequIP([29], 4.0)
    monkeypatch.setitem(sys.modules, "jax_md", None)
    with pytest.raises(ImportError, match="pip install jax-md"):
        engine.model(morse, cutoff=1.0)
