"""One potential in both banks, and runs of i-PI in processes of their own, for tests of drivers."""

import subprocess
import sys

import numpy as np
from ase import Atoms, units
from ase.io import write

from bridge.card import Card
from jax_side.engines import ase as in_jax
from jax_side.potentials.strain import with_gradients
from tests.planted import CUTOFF, right, right_jax
from torch_side.engines import ase as in_torch
from torch_side.potentials.model import Wrapped

CARD = Card(cutoff=CUTOFF, neighbor_list="own", dtype="float64")
BANKS = {
    "torch": lambda: in_torch.calculator(Wrapped(right, CARD, "autograd")),
    "jax": lambda: in_jax.calculator(with_gradients(right_jax), cutoff=CUTOFF),
}
CRYSTAL = Atoms(
    "SiOSiO",
    positions=[[0, 0, 0.1], [1.9, 0.1, 0], [0.2, 2.0, 0.1], [2.1, 1.8, 0.3]],
    cell=[[4.0, 0, 0], [0.5, 4.2, 0], [0.1, -0.3, 3.1]],
    pbc=True,
)


def with_calculator(bank="torch", atoms=CRYSTAL, **changed):
    atoms = atoms.copy()
    atoms.calc = BANKS[bank]()
    for name, value in changed.items():
        setattr(atoms.calc, name, value)
    return atoms


def failing(calculator, good):
    """The calculator, which raises an error after `good` calculations."""
    calculate, done = calculator.calculate, []

    def broken(*given):
        done.append(1)
        if len(done) > good:
            raise RuntimeError("the model broke")
        calculate(*given)

    calculator.calculate = broken
    return calculator


# what the script i-pi does, wherever the package lies
I_PI = """
import sys
from ipi.engine.simulation import Simulation
from ipi.utils.softexit import softexit
simulation = Simulation.load_from_xml(open(sys.argv[1]), custom_verbosity="low")
softexit.hard_exit = True
simulation.run()
softexit.trigger(status="success", message="done")
"""
INPUT = """
<simulation verbosity='low' threading='{threading}'>
  <output prefix='run'>
    <properties stride='1'>[step, potential{{electronvolt}}, conserved{{electronvolt}}, volume{{angstrom3}}]</properties>
    <properties filename='virial' stride='1'>[virial_md{{ase}}]</properties>
    <checkpoint filename='check' stride='{steps}' overwrite='true'/>
  </output>
  <total_steps>{steps}</total_steps>
  <prng><seed>1</seed></prng>
  <ffsocket name='bridge' mode='{mode}'>
    <address>{address}</address><port>{port}</port><latency>1e-3</latency>
    <exit_on_disconnect>True</exit_on_disconnect>{more}
  </ffsocket>
  <system>
    <initialize nbeads='1'>
      <file mode='ase' units='ase'>{folder}/start.extxyz</file>
      <masses mode='manual' units='dalton'>{masses}</masses>
    </initialize>
    <forces><force forcefield='bridge'/></forces>
    <motion mode='dynamics'>
      <dynamics mode='{ensemble}'>
        <timestep units='femtosecond'>{dt}</timestep>{barostat}
      </dynamics>
    </motion>
    <ensemble><temperature units='kelvin'>300</temperature>{pressure}</ensemble>
  </system>
</simulation>
"""
NPT = """
        <thermostat mode='langevin'><tau units='femtosecond'>1000</tau></thermostat>
        <barostat mode='{barostat}'><tau units='femtosecond'>50</tau></barostat>"""
PRESSURE = "<pressure units='megapascal'>0.1</pressure>"


def start(folder, atoms, *, steps, dt=1.0, ensemble="nve", unix=None, port=0, more="", npt=""):
    """Starts i-PI in `folder` with these atoms at rest."""
    write(folder / "start.extxyz", atoms, columns=["symbols", "positions"])
    text = INPUT.format(
        threading="false",
        steps=steps,
        dt=dt,
        ensemble=ensemble,
        mode="inet" if unix is None else "unix",
        address="localhost" if unix is None else unix,
        port=port or 31415,
        more=more,
        folder=folder,
        masses=list(map(float, atoms.get_masses())),
        barostat=NPT.format(barostat=npt) if npt else "",
        pressure=PRESSURE if npt else "",
    )
    (folder / "input.xml").write_text(text)
    return subprocess.Popen(
        [sys.executable, "-c", I_PI, "input.xml"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def columns(folder, name="out"):
    """The properties that i-PI has written, one row a step."""
    return np.loadtxt(folder / f"run.{name}", ndmin=2)


def positions(folder):
    """Those of i-PI's last checkpoint (N,3) in Angstrom."""
    text = (folder / "run.check").read_text()
    numbers = text.split("<q shape=")[1].split("[", 1)[1].split("]")[0]
    return np.array([float(x) for x in numbers.split(",")]).reshape(-1, 3) * units.Bohr
