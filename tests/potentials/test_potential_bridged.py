"""bridge.potential: torch potentials as JAX energies, against pure JAX, and SevenNet against its
own ASE calculator."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import bridge
from jax_side.calls import lanes
from jax_side.potentials import strain
from jax_side.potentials.potential import potential
from tests.cases import close
from tests.models.test_sevennet_values import SYSTEMS, calculator, model

rng = np.random.default_rng(0)
NUMBERS = np.array([1, 8, 6, 14])
R = jnp.asarray(rng.normal(size=(4, 3)))
H = jnp.asarray(3 * np.eye(3) + 0.4 * rng.normal(size=(3, 3)))
BATCH, CELLS = np.array([0, 1, 1, 1]), jnp.stack([H, 1.3 * H])


def energies(np_, sum_by_batch):
    """One text for both frameworks: couples the atoms of a system, their elements and the cell (not
    symmetric in strain)."""

    def f(x):
        pos, batch = x["pos"], x["batch"]
        d2 = ((pos[:, None] - pos[None]) ** 2).sum(-1)
        atoms = (np_.exp(-d2 / 3) * (batch[:, None] == batch[None])).sum(-1) * x["atomic_numbers"]
        atoms = atoms + np_.sin(np_.einsum("ni,nij,nj->n", pos, x["cell"][batch], pos))
        return sum_by_batch(atoms, batch, x["cell"])

    return f


in_torch = energies(
    torch, lambda a, batch, cell: a.new_zeros(len(cell)).index_add(0, batch.long(), a)
)
in_jax = energies(jnp, lambda a, batch, cell: jax.ops.segment_sum(a, batch, num_segments=len(cell)))


class Direct(torch.nn.Module):
    """Returns its own gradients."""

    def forward(self, x):
        from torch_side.potentials.strain import with_gradients

        return with_gradients(lambda x: in_torch(x))(x) | {"charges": x["pos"][:, 0]}


MODELS = {
    "energy only": (lambda x: {"energy": in_torch(x)}, "autograd"),
    "direct": (Direct(), "model"),
}
TRANSFORMS = {
    "energy": lambda e: e,
    "gradients": lambda e: (
        lambda r, h: jax.value_and_grad(lambda r, h: jnp.sum(e(r, h)), (0, 1))(r, h)
    ),
    "jvp": lambda e: lambda r, h: jax.jvp(e, (r, h), (jnp.cos(r), jnp.sin(h))),
    "hessian": lambda e: jax.hessian(lambda r, h: jnp.sum(e(r, h)), (0, 1)),
    "virial": lambda e: lambda r, h: jax.grad(lambda s: jnp.sum(e(r @ s, h @ s)))(jnp.eye(3)),
    "vmap": lambda e: (
        lambda r, h: jax.vmap(jax.value_and_grad(lambda r: jnp.sum(e(r, h))))(jnp.stack([r, 2 * r]))
    ),
}


@pytest.mark.matrix(2)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("systems", [1, 2])
def test_derivatives_equal_pure_jax(name, transform, systems, lane):
    torch_model, gradients = MODELS[name]
    some = {"batch": BATCH, "n_systems": 2} if systems == 2 else {}
    h = CELLS if systems == 2 else H
    bridged = bridge.potential(
        torch_model, atomic_numbers=NUMBERS, gradients=gradients, lane=lane, **some
    )
    pure = potential(strain.with_gradients(in_jax), atomic_numbers=NUMBERS, **some)
    of = TRANSFORMS[transform]
    close(jax.jit(of(bridged))(R, h), jax.jit(of(pure))(R, h), rtol=1e-10)


@pytest.mark.parametrize("systems", [1, 2])
def test_energies_and_all_gradients_are_one_forward(systems, lane):
    forwards = []

    def counted(x):
        forwards.append(1)
        return {"energy": in_torch(x)}

    some = {"batch": BATCH, "n_systems": 2} if systems == 2 else {}
    energy = bridge.potential(
        counted, atomic_numbers=NUMBERS, gradients="autograd", lane=lane, **some
    )
    step = jax.jit(jax.value_and_grad(lambda r, h: jnp.sum(energy(r, h)), (0, 1)))
    for _ in range(2):
        forwards.clear()
        jax.block_until_ready(step(R, CELLS if systems == 2 else H))
    assert len(forwards) == 1


def test_a_model_without_gradients_is_told_what_to_ask_for(lane):
    energy = bridge.potential(MODELS["energy only"][0], atomic_numbers=NUMBERS, lane=lane)
    with (
        pytest.raises(
            ValueError, match='got no position_gradients, cell_gradients; pass gradients="autograd"'
        ),
        bridge.raising(),
    ):
        jax.jit(energy)(R, H)
    with pytest.raises(
        ValueError, match="expected gradients as one of 'model', 'autograd', got 'both'"
    ):
        bridge.potential(Direct(), atomic_numbers=NUMBERS, gradients="both")


@pytest.mark.matrix
@pytest.mark.parametrize("system", SYSTEMS)
def test_sevennet_through_the_bridge_equals_its_ase_calculator(system, lane):
    """Issue's tolerances: 1e-5 eV, 1e-4 eV/A, 1e-5 eV/A^3 in float32."""
    atoms = SYSTEMS[system].copy()
    atoms.calc = calculator()
    pbc = tuple(bool(p) for p in atoms.pbc)
    energy = bridge.potential(model(), atomic_numbers=atoms.numbers, pbc=np.array(pbc), lane=lane)
    r, h = jnp.asarray(atoms.positions, jnp.float32), jnp.asarray(atoms.cell.array, jnp.float32)
    e, g = jax.jit(jax.value_and_grad(energy))(r, h)
    assert abs(float(e) - atoms.get_potential_energy()) < 1e-5
    np.testing.assert_allclose(-g, atoms.get_forces(), atol=1e-4)
    if all(pbc):
        np.testing.assert_allclose(
            jax.jit(energy.stress)(r, h), atoms.get_stress(voigt=False), atol=1e-5
        )


def test_lane_auto_is_the_host_lane_where_there_is_no_ffi(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_tvm_ffi", None)
    assert not lanes.has_ffi()
    text = jax.jit(bridge.to_jax(torch.sin)).lower(R).as_text()
    assert "bridge_call" not in text and "callback" in text
    close(jax.jit(bridge.to_jax(torch.sin))(R), jnp.sin(R))
    with pytest.raises(
        ImportError,
        match='expected the package .jax-tvm-ffi. for lane="ffi", got no such package; run: pip install jax-tvm-ffi',
    ):
        lanes._register.__wrapped__(torch.Tensor)
