"""i-PI's socket protocol: any potential as a driver of i-PI, or of another code that speaks it."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float

from bridge.atoms import has_stress
from bridge.errors import message, missing

if TYPE_CHECKING:
    from ase import Atoms


def drive(
    atoms: Atoms,
    *,
    unix: str | None = None,
    host: str = "localhost",
    port: int = 31415,
    wait: float = 10.0,
    virial: bool = True,
) -> int:
    """Serves energies, forces and virials of `atoms.calc` to a running i-PI until that ends, and
    returns how many structures it asked for.

    The protocol is that of V. Kapil et al., Comput. Phys. Commun. 236, 214 (2019), spoken by
    ase.calculators.socketio. `atoms` (ase.Atoms) has what the protocol leaves out: the elements, in
    i-PI's order, which axes are periodic, and a calculator in atoms.calc (jax_side.engines.ase,
    torch_side.engines.ase). Positions and cell come from i-PI at each step, and are written into
    `atoms`. The calculator is tried once before anything is connected.

    `unix` is the name of a Unix socket, the `address` of i-PI's input with mode="unix": the file
    /tmp/ipi_<name>, or the path if there is a slash in it. Without it the driver connects to `host`
    and `port`. It tries to for `wait` seconds, for i-PI takes its time to start.

    i-PI's virial is -W, in the units of an energy: from the stress of the calculator if an axis is
    periodic, and zeros in open systems. `virial=False` sends zeros in any case, for potentials
    without a stress at constant volume.

    When a calculation fails, the socket is closed and the error is raised. i-PI then waits for
    another driver, unless its input has <exit_on_disconnect>True</exit_on_disconnect>.

    Raises: ValueError for atoms without a calculator, for a calculator without a stress where one
    is needed, for another number of atoms than these, for positions that are not finite, and for a
    server that sends several structures at once (batch_size); ConnectionError where nobody listens,
    or for what is no i-PI; ImportError without ase; and what the calculator raises.

    >>> import ase.io                                                           # doctest: +SKIP
    >>> atoms = ase.io.read("init.xyz")                                         # doctest: +SKIP
    >>> atoms.calc = calculator(SevenNet("7net-0"))                             # doctest: +SKIP
    >>> drive(atoms, unix="driver")                                             # doctest: +SKIP
    """
    try:
        from ase.calculators.socketio import IPIProtocol, SocketClosed
    except ImportError as error:
        raise missing("ase", "drivers of i-PI") from error
    virial = virial and bool(atoms.pbc.any())
    check_calculator(atoms, virial)
    _evaluated(atoms, virial and has_stress(atoms))
    done = 0
    with _connected(unix, host, port, wait) as connection:
        server = _Server(IPIProtocol(connection))
        found = None
        while True:
            try:
                request = server.next(found)
            except (SocketClosed, BrokenPipeError, ConnectionResetError):  # i-PI has gone
                return done
            if request is None:
                return done
            if len(request.positions) != len(atoms):
                raise ValueError(
                    message(
                        f"{len(atoms)} atoms, those of the driver's structure",
                        f"{len(request.positions)} from i-PI",
                        "give both the same structure, with atoms in the same order",
                    )
                )
            atoms.set_cell(request.cell)
            atoms.positions[:] = request.positions
            found = _evaluated(atoms, virial)
            done += 1


class Request(NamedTuple):
    """What i-PI asks for: positions (N,3) and cell (3,3) by rows, in Angstrom."""

    positions: Float[np.ndarray, "N 3"]
    cell: Float[np.ndarray, "3 3"]


Results = tuple[float, Float[np.ndarray, "N 3"], Float[np.ndarray, "3 3"]]


class _Server:
    """i-PI on the other side of a socket. `protocol` is ASE's IPIProtocol."""

    def __init__(self, protocol: Any) -> None:
        self.protocol = protocol
        self.known = False  # whether it has told what it will send

    def next(self, found: Results | None) -> Request | None:
        """Hands over what was `found` of the last request, and returns the next one; None at the
        end.

        Raises: ValueError for several structures at once, and for positions that are not finite;
        ConnectionError for a message that i-PI does not send here."""
        while True:
            said = self._heard()
            if said == "EXIT":
                return None
            if said == "STATUS":
                ready = "HAVEDATA" if found else "READY"
                self.protocol.sendmsg(ready if self.known else "NEEDINIT")
            elif said == "INIT":
                self._told()
            elif said == "POSDATA" and self.known and found is None:
                return self._request()
            elif said == "GETFORCE" and found is not None:
                self.protocol.sendforce(*found)
                found = None
            else:
                do = "look at who listens there, and at the version of i-PI"
                raise ConnectionError(message("a message of i-PI's protocol", repr(said), do))

    def _heard(self) -> str:
        """The next message."""
        try:
            return self.protocol.recvmsg()
        except UnicodeDecodeError:
            return "bytes that are no text"

    def _told(self) -> None:
        """Reads what the server says of itself."""
        _, told = self.protocol.recvinit()
        words = told.tobytes().decode("ascii", errors="replace").replace(",", " ").split()
        self.known = True
        if several := [word for word in words if word.startswith("batch_size:")]:
            do = "take <batch_size> out of i-PI's input, and start more drivers instead"
            raise ValueError(message("one structure at a time", several[0], do))

    def _request(self) -> Request:
        """Reads positions and cell."""
        try:
            cell, _, positions = self.protocol.recvposdata()
        except AssertionError as error:  # of ASE, without a text
            raise ValueError(
                message(
                    "finite positions and cells from i-PI",
                    "others",
                    "look at the step before, and take a shorter one",
                )
            ) from error
        return Request(positions, cell)


def check_calculator(atoms: Atoms, stress: bool) -> None:
    """Raises ValueError where atoms have no calculator, or one without the `stress` that is
    needed."""
    if atoms.calc is None:
        do = "set atoms.calc = calculator(model), of jax_side.engines.ase or torch_side.engines.ase"
        raise ValueError(message("atoms with a calculator", "atoms.calc = None", do))
    if stress and "stress" not in atoms.calc.implemented_properties:
        raise ValueError(
            message(
                "a potential with a stress, for the virial of periodic atoms",
                f"one with {', '.join(atoms.calc.implemented_properties)}",
                "pass virial=False, and keep the volume constant",
            )
        )


def _evaluated(atoms: Atoms, virial: bool) -> Results:
    """Energy in eV, forces in eV/Angstrom and i-PI's virial, -W, in eV."""
    forces, energy = atoms.get_forces(), atoms.get_potential_energy()
    minus_W = np.zeros((3, 3))
    if virial:
        minus_W = -atoms.get_volume() * atoms.get_stress(voigt=False)
    return energy, forces, minus_W


@contextlib.contextmanager
def _connected(unix: str | None, host: str, port: int, wait: float) -> Iterator[socket.socket]:
    """A socket that is connected to a server that may have yet to start.

    At the end the server learns that no more will come, and what it has sent ahead is read. A
    socket that is closed with something unread resets the connection, and i-PI then waits forever.

    Raises: ConnectionError where there is none after `wait` seconds."""
    with _connect(unix, host, port, wait) as connection:
        try:
            yield connection
        finally:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
                connection.settimeout(1.0)
                while connection.recv(2**16):
                    pass


def _connect(unix: str | None, host: str, port: int, wait: float) -> socket.socket:
    """The socket, connected.

    Raises: ConnectionError where nobody listens after `wait` seconds."""
    if unix is None:
        kind, address, where = socket.AF_INET, (host, port), f"{host}:{port}"
    else:
        address = where = unix if "/" in unix else f"/tmp/ipi_{unix}"
        kind = socket.AF_UNIX
    end = time.monotonic() + wait
    while True:
        connection = socket.socket(kind)
        try:
            connection.connect(address)
        except OSError as error:
            connection.close()
            if time.monotonic() < end:
                time.sleep(0.05)
                continue
            raise ConnectionError(
                message(
                    f"a server of i-PI's protocol at {where}",
                    f"none in {wait:g} s ({error})",
                    "start i-PI first, with this address in its <ffsocket>, or pass a longer wait",
                )
            ) from error
        with contextlib.suppress(OSError):  # Unix sockets have no such option
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection
