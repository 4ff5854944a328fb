"""Potentials of both banks as drivers: beside ASE's server, in runs of i-PI, and every error."""

import contextlib
import functools
import socket
import threading
import time

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.socketio import IPIProtocol, SocketClosed, SocketIOCalculator
from ase.md.verlet import VelocityVerlet
from ase.units import GPa, fs

from bridge.card import Card
from bridge.drivers.ipi import drive
from tests import driver_cases
from tests.driver_cases import BANKS, CRYSTAL, failing, with_calculator
from tests.planted import CUTOFF, right
from torch_side.engines import ase as in_torch
from torch_side.potentials.model import Wrapped


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


OPEN = Card(cutoff=CUTOFF, neighbor_list="own", supports_pbc=False)


class Driver(threading.Thread):
    """drive() in a thread; what it returned or raised is in `result` once it has ended."""

    def __init__(self, atoms, **options):
        super().__init__(daemon=True)
        self.call = functools.partial(drive, atoms, **options)
        self.start()

    def run(self):
        try:
            self.result = self.call()
        except Exception as error:
            self.result = error

    def ended(self):
        self.join(30)
        assert not self.is_alive()
        return self.result


@pytest.mark.parametrize("bank, way", [("torch", "unix"), ("jax", "inet"), ("jax", "path")])
def test_values_x_the_server_of_ase(bank, way, name, tmp_path):
    """Positions and cells that change, beside the same potential in the other bank."""
    where = {
        "unix": dict(unix=name),
        "inet": dict(port=free_port()),
        "path": dict(unix=f"/tmp/ipi_{name}"),
    }[way]
    at_server = where if way == "inet" else dict(unixsocket=name)
    driver = Driver(with_calculator(bank), **where)
    served, wanted = CRYSTAL.copy(), with_calculator("jax" if bank == "torch" else "torch")
    with SocketIOCalculator(timeout=30, **at_server) as server:
        served.calc = server
        for step in range(3):
            for atoms in served, wanted:
                atoms.rattle(0.05, seed=step)
                atoms.set_cell(atoms.cell[:] * (1 + 0.01 * step), scale_atoms=True)
            assert abs(served.get_potential_energy() - wanted.get_potential_energy()) < 1e-10
            np.testing.assert_allclose(served.get_forces(), wanted.get_forces(), atol=1e-10)
            np.testing.assert_allclose(served.get_stress(), wanted.get_stress(), atol=1e-11)
            assert abs(wanted.get_stress()).max() > 1e-3
    assert driver.ended() == 3


def test_open_systems_x_no_virial(name):
    """i-PI has a cell even so; the driver's atoms say that no axis is periodic."""
    driver = Driver(with_calculator(atoms=Atoms(CRYSTAL, pbc=False)), unix=name)
    served, wanted = CRYSTAL.copy(), with_calculator(atoms=Atoms(CRYSTAL, pbc=False))
    with SocketIOCalculator(timeout=30, unixsocket=name) as server:
        served.calc = server
        np.testing.assert_allclose(served.get_forces(), wanted.get_forces(), atol=1e-10)
        assert not served.get_stress().any()
    assert driver.ended() == 1
    assert abs(wanted.get_forces() - with_calculator().get_forces()).max() > 0.01


def test_virial_false_x_a_potential_without_stress(name):
    lacking = with_calculator(implemented_properties=["energy", "forces"])
    text = "expected a potential with a stress, for the virial of periodic atoms, got one with energy, forces; pass virial=False"
    with pytest.raises(ValueError, match=text):
        drive(lacking, unix=name, wait=0)
    driver = Driver(lacking, unix=name, virial=False)
    served = CRYSTAL.copy()
    with SocketIOCalculator(timeout=30, unixsocket=name) as server:
        served.calc = server
        assert not served.get_stress().any() and served.get_forces().any()
    assert driver.ended() == 1


def test_nobody_listens(name):
    start = time.monotonic()
    text = f"expected a server of i-PI's protocol at /tmp/ipi_{name}, got none in 0.2 s .*start i-PI first"
    with pytest.raises(ConnectionError, match=text):
        drive(with_calculator(), unix=name, wait=0.2)
    assert 0.2 < time.monotonic() - start < 5
    port = free_port()
    with pytest.raises(ConnectionError, match=f"at localhost:{port}, got none in 0 s"):
        drive(with_calculator(), port=port, wait=0)


def test_what_is_wrong_is_known_before_anybody_is_asked(name):
    """Nobody listens at that address: another error comes first."""
    with pytest.raises(ValueError, match="expected atoms with a calculator, got atoms.calc = None"):
        drive(CRYSTAL.copy(), unix=name, wait=0)
    closed = with_calculator()
    closed.calc = in_torch.calculator(Wrapped(right, OPEN, "autograd"))
    with pytest.raises(ValueError, match="expected open boundaries, which is all that"):
        drive(closed, unix=name, wait=0)


@pytest.mark.parametrize("there", [CRYSTAL[:1], CRYSTAL[:3], CRYSTAL * (2, 1, 1)])
def test_another_number_of_atoms(name, there):
    driver = Driver(with_calculator(), unix=name)
    there = there.copy()
    with SocketIOCalculator(timeout=30, unixsocket=name) as server:
        there.calc = server
        with pytest.raises((SocketClosed, ConnectionError)):
            there.get_forces()
    text = f"expected 4 atoms, those of the driver's structure, got {len(there)} from i-PI; give"
    assert str(driver.ended()).startswith(text)


def test_the_model_raises_x_the_server_is_told(name):
    atoms = CRYSTAL.copy()
    atoms.calc = failing(BANKS["torch"](), 2)  # the first before anybody is asked
    driver = Driver(atoms, unix=name)
    served = CRYSTAL.copy()
    served.rattle(0.1)
    with SocketIOCalculator(timeout=30, unixsocket=name) as server:
        served.calc = server
        served.get_forces()
        served.rattle(0.1)
        with pytest.raises((SocketClosed, ConnectionError)):
            served.get_forces()
    assert str(driver.ended()) == "the model broke"


@contextlib.contextmanager
def protocol(name):
    """The server's end of a socket, for what ASE's server does not say."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"/tmp/ipi_{name}")
        listening.listen()
        listening.settimeout(30)
        connection = listening.accept()[0]
        with connection:
            yield IPIProtocol(connection)


def test_positions_that_are_not_finite(name):
    driver = Driver(with_calculator(), unix=name)
    with protocol(name) as server:
        server.sendinit()
        server.sendposdata(np.eye(3), np.eye(3), np.full((4, 3), np.nan))
        text = "expected finite positions and cells from i-PI, got others; look at the step before"
        assert text in str(driver.ended())


def test_several_structures_at_once(name):
    driver = Driver(with_calculator(), unix=name)
    with protocol(name) as server:
        assert server.status() == "NEEDINIT"
        server.sendmsg("INIT")
        for number in 0, 14:
            server.send(number, np.int32)
        server.send(np.frombuffer(b" batch_size:12", np.byte), np.byte)
        text = "expected one structure at a time, got batch_size:12; take <batch_size> out"
        assert text in str(driver.ended())


@pytest.mark.parametrize("said", ["HELLO", "GETFORCE", "POSDATA"])
def test_another_protocol(name, said):
    """Forces before positions, positions before INIT."""
    driver = Driver(with_calculator(), unix=name)
    with protocol(name) as server:
        server.sendmsg(said)
        text = f"expected a message of i-PI's protocol, got '{said}'; look at who listens"
        assert isinstance(driver.ended(), ConnectionError) and text in str(driver.result)


def test_another_protocol_x_no_text(name):
    driver = Driver(with_calculator(), unix=name)
    with protocol(name) as server:
        server.socket.sendall(b"\xff" * 12)
        assert "got 'bytes that are no text'; look" in str(driver.ended())


@pytest.mark.parametrize("when", ["at once", "in a message", "before the forces"])
def test_a_server_that_goes(name, when):
    """It is the end of the run, as in ASE's own client."""
    driver = Driver(with_calculator(), unix=name)
    with protocol(name) as server:
        if when != "at once":
            server.sendinit()
            server.sendmsg("POSDATA")
        if when == "before the forces":
            server.send(np.eye(3), np.float64)
            server.send(np.eye(3), np.float64)
            server.send(4, np.int32)
            server.send(CRYSTAL.positions, np.float64)
            server.sendmsg("STATUS")
    assert driver.ended() == (when == "before the forces")


def test_nve_x_the_same_run_in_ase(name, tmp_path):
    """Positions after 20 steps of i-PI, energies at each, and its virial (times a volume)."""
    atoms = with_calculator("jax")
    atoms.calc = None
    run = driver_cases.start(tmp_path, atoms, steps=20, unix=name)
    try:
        driver = Driver(with_calculator("jax"), unix=name, wait=60)
        out = run.communicate(timeout=120)[0]
    finally:
        run.kill()
    assert run.returncode == 0, out
    assert driver.ended() == 21
    atoms.calc = BANKS["torch"]()
    stress = atoms.get_stress()[[0, 1, 2, 5, 4, 3]]  # i-PI's order: xx, yy, zz, xy, xz, yz
    np.testing.assert_allclose(driver_cases.columns(tmp_path, "virial")[0], -stress, rtol=1e-6)
    energies = [atoms.get_potential_energy()]
    dynamics = VelocityVerlet(atoms, fs)
    for _ in range(20):
        dynamics.run(1)
        energies.append(atoms.get_potential_energy())
    _, potential, conserved, _ = driver_cases.columns(tmp_path).T
    np.testing.assert_allclose(potential, energies, atol=1e-6)
    assert abs(conserved - conserved[0]).max() < 0.01 * np.ptp(potential)
    # the codes' constants differ in the eighth digit
    assert abs(driver_cases.positions(tmp_path) - atoms.positions).max() < 1e-6
    assert abs(atoms.positions - CRYSTAL.positions).max() > 0.01


def test_npt_x_the_virial_of_the_last_cell(name, tmp_path):
    run = driver_cases.start(
        tmp_path, CRYSTAL, steps=10, dt=0.5, ensemble="npt", npt="flexible", unix=name
    )
    try:
        atoms = with_calculator("torch")
        driver = Driver(atoms, unix=name, wait=60)
        out = run.communicate(timeout=120)[0]
    finally:
        run.kill()
    assert run.returncode == 0, out
    assert driver.ended() >= 11
    volumes = driver_cases.columns(tmp_path)[:, 3]
    assert abs(volumes[-1] / volumes[0] - 1) > 1e-3
    assert abs(volumes[-1] / atoms.get_volume() - 1) < 1e-6
    stress = atoms.get_stress()[[0, 1, 2, 5, 4, 3]]
    np.testing.assert_allclose(driver_cases.columns(tmp_path, "virial")[-1], -stress, rtol=1e-6)
    assert abs(stress).max() > 0.01 * GPa


def test_the_model_raises_x_i_pi_ends(name, tmp_path):
    """With <exit_on_disconnect>."""
    run = driver_cases.start(tmp_path, CRYSTAL, steps=1000, unix=name)
    try:
        atoms = CRYSTAL.copy()
        atoms.calc = failing(BANKS["torch"](), 6)
        driver = Driver(atoms, unix=name, wait=60)
        run.communicate(timeout=60)
    finally:
        run.kill()
    assert str(driver.ended()) == "the model broke"
    assert 3 <= len(driver_cases.columns(tmp_path)) <= 7
