"""Every adapter under jit and vmap of several triclinic, perturbed systems: one torch call, the
calculator's own numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bridge
from tests.adapters import MODELS
from tests.model_cases import skewed


def replicas(atoms, n=3):
    """The same atoms, each time rattled and strained in another way."""
    return [skewed(atoms, seed=s, rattle=0.05, strain=0.03) for s in range(1, n + 1)]


@pytest.mark.parametrize("name", MODELS)
def test_vmap_of_several_systems_as_the_calculator(name, monkeypatch):
    case = MODELS[name]
    systems, model = replicas(case.systems[case.triclinic]), case.build(case.dtype)
    calls, energies = [], type(model).energies
    monkeypatch.setattr(
        type(model),
        "energies",
        lambda self, x: (calls.append(x["cell"].shape[0]), energies(self, x))[1],
    )
    energy = bridge.potential(model, atomic_numbers=systems[0].numbers, pbc=True)
    dtype = str(case.dtype).removeprefix("torch.")
    R, H = (
        jnp.asarray(np.stack([np.asarray(x) for x in xs]), dtype)
        for xs in zip(*((a.positions, a.cell.array) for a in systems))
    )
    e, (g, G) = jax.block_until_ready(jax.jit(jax.vmap(jax.value_and_grad(energy, (0, 1))))(R, H))
    assert calls == [3]
    stress = jax.block_until_ready(jax.jit(jax.vmap(energy.stress))(R, H))
    assert calls == [3, 3]
    for s, atoms in enumerate(systems):
        atoms.calc = case.calculator()
        assert abs(float(e[s]) - atoms.get_potential_energy()) < 1e-5 * len(atoms)
        assert abs(np.asarray(-g[s]) - atoms.get_forces()).max() < 1e-4
        if case.stress:
            assert abs(np.asarray(stress[s]) - atoms.get_stress(voigt=False)).max() < 1e-5
    assert abs(np.asarray(G[0] - G[1])).max() > 1e-3
