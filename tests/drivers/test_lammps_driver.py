"""What LAMMPS's driver does with LAMMPS, by an object that has the same methods: order, signs, every
error. Runs of LAMMPS itself are in tests/lammps."""

import numpy as np
import pytest
from ase import Atoms

from bridge.drivers.lammps import driven
from tests.driver_cases import BANKS, CRYSTAL, failing, with_calculator

ORDER = [2, 0, 3, 1]  # of the atoms in LAMMPS's memory


class Lammps:
    """The methods of lammps.lammps that the driver calls; `step` is one of a run."""

    def __init__(self, atoms, **changed):
        self.ids = np.array(ORDER) + 1
        self.types = np.where(atoms.numbers[ORDER] == 14, 1, 2)
        self.cell, self.x = atoms.cell.array, atoms.positions[ORDER]
        self.globals = {"units": "metal"}
        self.settings = {"world_size": 1, "box_exist": 1, "nlocal": 4}
        self.periodic, self.fixes, self.said = atoms.pbc, {}, []
        self.timed_out = False
        vars(self).update(changed)
        self.numpy = self

    def extract_global(self, name):
        return self.globals[name]

    def extract_setting(self, name):
        return self.settings[name]

    def extract_atom(self, name):
        # LAMMPS has room for more
        return np.append({"id": self.ids, "type": self.types}[name], [0, 0])

    def extract_box(self):
        h = self.cell
        low = [7.0, -1.0, 0.5]
        periodic = [int(p) for p in self.periodic]
        return low, (low + h.diagonal()).tolist(), h[1, 0], h[2, 1], h[2, 0], periodic, 0

    def has_id(self, category, name):
        return category == "fix" and name in self.fixes

    def command(self, text):
        self.said.append(text)
        words = text.split()
        if words[0] == "fix":
            self.fixes[words[1]] = None
        elif words[0] == "unfix":
            del self.fixes[words[1]]

    def set_fix_external_callback(self, name, callback, caller):
        self.fixes[name] = callback

    def fix_external_set_energy_global(self, name, energy):
        self.energy = energy

    def fix_external_set_virial_global(self, name, virial):
        self.virial = virial

    def force_timeout(self):
        self.timed_out = True

    def step(self):
        f = np.zeros((len(self.ids), 3))
        self.fixes["bridge"](None, 0, len(self.ids), self.ids, self.x, f)
        return f


@pytest.mark.parametrize("bank", BANKS)
def test_a_step_x_order_and_signs(bank):
    atoms, wanted = with_calculator(bank), with_calculator("torch")
    lmp = Lammps(CRYSTAL)
    with driven(lmp, atoms):
        for step in range(2):
            f = lmp.step()
            np.testing.assert_allclose(f, wanted.get_forces()[ORDER], atol=1e-10)
            assert abs(lmp.energy - wanted.get_potential_energy()) < 1e-10
            xx, yy, zz, yz, xz, xy = -wanted.get_volume() * wanted.get_stress()
            np.testing.assert_allclose(lmp.virial, [xx, yy, zz, xy, xz, yz], atol=1e-9)
            wanted.rattle(0.1, seed=step)
            wanted.set_cell(1.02 * wanted.cell[:], scale_atoms=True)
            lmp.x, lmp.cell = wanted.positions[ORDER], wanted.cell.array
    assert lmp.said == [
        "fix bridge all external pf/callback 1 1",
        "fix_modify bridge energy yes virial yes",
        "unfix bridge",
        "timer timeout off",
    ]


@pytest.mark.parametrize("open_axes, virial", [(True, True), (False, False)])
def test_no_virial_x_open_systems_and_whoever_wants_none(open_axes, virial):
    atoms = with_calculator(
        atoms=Atoms(CRYSTAL, pbc=not open_axes), implemented_properties=["energy", "forces"]
    )
    lmp = Lammps(atoms)
    with driven(lmp, atoms, virial=virial):
        assert lmp.step().any()
    assert not hasattr(lmp, "virial")


def test_a_calculation_fails_x_the_end_of_the_with():
    """Whether LAMMPS then complains of NaN or not."""
    for raises in (False, True):
        atoms = CRYSTAL.copy()
        atoms.calc = failing(BANKS["torch"](), 1)
        lmp = Lammps(CRYSTAL)
        with pytest.raises(RuntimeError, match="the model broke"), driven(lmp, atoms):
            assert np.isfinite(lmp.step()).all() and not lmp.timed_out
            lmp.x = lmp.x + 0.1
            assert np.isnan(lmp.step()).all() and lmp.timed_out
            lmp.x = CRYSTAL.positions[ORDER]
            assert np.isnan(lmp.step()).all()
            if raises:
                raise Exception("ERROR: Non-numeric atom coords")
        assert lmp.said[-2:] == ["unfix bridge", "timer timeout off"]


def test_an_error_of_lammps_is_its_own():
    lmp = Lammps(CRYSTAL)
    with pytest.raises(Exception, match="ERROR: Unknown command"), driven(lmp, with_calculator()):
        raise Exception("ERROR: Unknown command")
    assert lmp.said[-1] == "timer timeout off"


def test_atoms_are_lost_in_a_run():
    lmp = Lammps(CRYSTAL)
    text = "expected 4 atoms in LAMMPS, with IDs from 1 on, got 3 atoms, with IDs from 1 to 4"
    with pytest.raises(ValueError, match=text), driven(lmp, with_calculator()):
        lmp.step()
        lmp.ids, lmp.x = lmp.ids[:3], lmp.x[:3]
        lmp.step()


SETTINGS = {"world_size": 1, "box_exist": 1, "nlocal": 4}
WRONG = {
    "units": (
        dict(globals={"units": "real"}),
        'expected LAMMPS in metal units, got real; write "units metal"',
    ),
    "processes": (
        dict(settings=SETTINGS | {"world_size": 2}),
        "expected LAMMPS on one process, got 2; run LAMMPS without mpirun",
    ),
    "no box": (
        dict(settings=SETTINGS | {"box_exist": 0}),
        "expected LAMMPS with a box, got none; create it first",
    ),
    "no atoms": (
        dict(settings=SETTINGS | {"nlocal": 0}),
        "expected 4 atoms in LAMMPS, with IDs from 1 on, got none; look for lost atoms",
    ),
    "fewer atoms": (
        dict(settings=SETTINGS | {"nlocal": 3}),
        "got 3 atoms, with IDs from 1 to 4",
    ),
    "other IDs": (dict(ids=np.array([3, 1, 5, 2])), "got 4 atoms, with IDs from 1 to 5"),
    "boundaries": (
        dict(periodic=[True, True, False]),
        r"expected the same periodic axes, got \[True, True, False\] in LAMMPS and \[True, True, True\] in",
    ),
    "two elements": (
        dict(types=np.array([1, 1, 1, 2])),
        "expected one element for each atom type, got Z = 8, 14 for type 1; give the atoms in the",
    ),
    "a potential already": (
        dict(fixes={"bridge": None}),
        "expected one potential at a time, got a fix 'bridge' in LAMMPS; leave the other",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit(name):
    changed, text = WRONG[name]
    lmp = Lammps(CRYSTAL, **changed)
    with pytest.raises(ValueError, match=text), driven(lmp, with_calculator()):
        pass
    assert not lmp.said


def test_atoms_that_can_not_be_served():
    lacking = with_calculator(implemented_properties=["energy", "forces"])
    texts = {
        "expected atoms with a calculator, got atoms.calc = None": CRYSTAL.copy(),
        "expected a potential with a stress, for the virial of periodic atoms": lacking,
    }
    for text, atoms in texts.items():
        with pytest.raises(ValueError, match=text), driven(Lammps(CRYSTAL), atoms):
            pass
