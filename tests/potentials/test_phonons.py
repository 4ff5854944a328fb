"""Phonons of silicon with SevenNet-0 in float64: its Hessian through JAX against ASE's finite
differences of its forces."""

import tempfile
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import torch
from ase.build import bulk
from ase.calculators.calculator import Calculator, all_changes
from ase.vibrations import Vibrations

import bridge
from jax_side.potentials.second import UNITS, frequencies, hessian, hessian_rows, hvp
from tests.model_cases import inputs, sevennet

MODEL = sevennet(torch.float64)


def silicon():
    """Two atoms, not quite on their sites. No neighbours near 4.5 Angstrom, where SevenNet-0
    switches its cutoff on and the second derivative jumps (at 5.43 Angstrom the third shell lies
    there: finite differences are then off by 0.5 %)."""
    atoms = bulk("Si", a=5.5)
    atoms.rattle(0.01, seed=1)
    return atoms


class Own(Calculator):
    """The adapter as ASE sees a model: energy and forces."""

    implemented_properties = ("energy", "forces")

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        out = MODEL(inputs(atoms, dtype=torch.float64))
        self.results = {
            "energy": float(out["energy"]),
            "forces": -out["position_gradients"].numpy(),
        }


@cache
def through_jax():
    """The energy, where it is taken, and the whole Hessian (N,3,N,3)."""
    atoms = silicon()
    energy = bridge.potential(MODEL, atomic_numbers=atoms.numbers)
    where = jnp.asarray(atoms.positions), jnp.asarray(atoms.cell[:])
    return energy, where, jax.jit(lambda r, h: hessian(energy, r, h))(*where)


@cache
def by_differences():
    """ASE's Hessian (N,3,N,3)."""
    atoms = silicon()
    atoms.calc = Own()
    with tempfile.TemporaryDirectory() as folder:
        vibrations = Vibrations(atoms, delta=2e-3, nfree=2, name=f"{folder}/vib")
        vibrations.run()
        return vibrations.get_vibrations().get_hessian()


def test_hessian_x_ase():
    found, want = np.asarray(through_jax()[2]), by_differences()
    assert abs(found - want).max() < 1e-4 * abs(want).max()
    assert abs(found - found.transpose(2, 3, 0, 1)).max() < 1e-9 * abs(found).max()
    assert abs(found.sum(2)).max() < 1e-9 * abs(found).max()  # translations


def test_frequencies_x_ase():
    energy, where, _ = through_jax()
    atoms = silicon()
    mass = np.repeat(atoms.get_masses(), 3)
    squares = np.linalg.eigvalsh(by_differences().reshape(6, 6) / np.sqrt(np.outer(mass, mass)))
    want = UNITS["THz"] * np.sign(squares) * np.sqrt(abs(squares))
    f = np.asarray(jax.jit(lambda r, h: frequencies(energy, r, h, atoms.get_masses()))(*where))
    modes = abs(want) > 0.3  # all but the acoustic ones
    assert modes.sum() == 3 and 11 < want[-1] < 16  # 15.6 by experiment
    np.testing.assert_allclose(f[modes], want[modes], rtol=1e-3)
    assert abs(f[~modes]).max() < 1e-3


def test_rows_and_products_x_the_whole_hessian():
    energy, where, found = through_jax()
    v = jnp.sin(jnp.arange(12.0)).reshape(2, 2, 3)
    want = jnp.einsum("iajb,kjb->kia", found, v)
    np.testing.assert_allclose(
        jax.jit(lambda r, h: hvp(energy, r, h, v))(*where),
        want,
        rtol=0,
        atol=1e-10 * abs(want).max(),
    )
    rows = jax.jit(lambda r, h: hessian_rows(energy, r, h, [(0, 0), (1, 2)]))(*where)
    np.testing.assert_allclose(
        rows, found[jnp.array([0, 1]), jnp.array([0, 2])], rtol=0, atol=1e-10 * abs(want).max()
    )
