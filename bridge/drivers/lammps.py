"""LAMMPS by its `fix external`: any potential as the forces of a run of the Python module lammps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from bridge.drivers.ipi import check_calculator
from bridge.errors import message

if TYPE_CHECKING:
    from ase import Atoms

FIX = "bridge"  # the ID of the fix in LAMMPS
# LAMMPS's order of the six numbers of a virial, as places in a matrix
VOIGT = ([0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2])


@contextlib.contextmanager
def driven(lmp: Any, atoms: Atoms, *, virial: bool = True) -> Iterator[None]:
    """Within the `with`, LAMMPS has the energy, forces and virial of `atoms.calc`.

    `lmp` is a lammps.lammps (A. P. Thompson et al., Comput. Phys. Commun. 271, 108171 (2022)) that
    has a box and its atoms, in metal units (eV, Angstrom, ps, bar), on one process. `atoms`
    (ase.Atoms) says what LAMMPS does not: atoms[i] is the element of the atom with ID i + 1, and
    atoms.calc a calculator (jax_side.engines.ase, torch_side.engines.ase). IDs run from 1 to N, and
    an atom type has one element. Masses are LAMMPS's own, and so are positions and the box, which
    are written into `atoms` at each step: in LAMMPS's frame, where the first cell vector lies along
    x and the second in the plane of x and y. The calculator works in that frame, so that nothing is
    rotated.

    A `fix external ... pf/callback 1 1` named "bridge" holds it all, for MD and minimize alike. Its
    forces are added to those of the pair style, if there is one; energy and virial count in
    LAMMPS's pe and pressure. The virial is -W, from the stress of the calculator if an axis is
    periodic. `virial=False` leaves it zero, for potentials without a stress at constant volume. At
    the end of the `with` the fix is taken away.

    LAMMPS goes on where a callback fails. So when a calculation fails, forces become NaN, the run
    ends after the step, and the error is raised at the end of the `with`, in place of what LAMMPS
    says of NaN.

    Raises: ValueError for other units than metal, several processes, a potential that LAMMPS has
    already, IDs that are not 1 to N, another number of atoms than these, also later in a run, other
    periodic axes, a type with two elements, atoms without a calculator, and for a calculator
    without a stress where one is needed; and what the calculator and LAMMPS raise.

    >>> lmp = lammps.lammps()                                                   # doctest: +SKIP
    >>> lmp.file("in.box")                                                      # doctest: +SKIP
    >>> with driven(lmp, atoms):                                                # doctest: +SKIP
    ...     lmp.commands_string("fix 1 all nve\\nrun 100")
    """
    _check(lmp, atoms)
    virial = virial and bool(atoms.pbc.any())
    check_calculator(atoms, virial)
    callback = _Callback(lmp, atoms, virial)
    lmp.command(f"fix {FIX} all external pf/callback 1 1")
    try:
        lmp.command(f"fix_modify {FIX} energy yes virial yes")
        lmp.set_fix_external_callback(FIX, callback, None)
        yield
    except BaseException as error:
        if callback.error is not None:
            raise callback.error from error
        raise
    finally:
        lmp.command(f"unfix {FIX}")
        lmp.command("timer timeout off")  # which the callback may have set
    if callback.error is not None:
        raise callback.error


class _Callback:
    """What LAMMPS calls at each step; `error` is the first that was raised in there."""

    def __init__(self, lmp: Any, atoms: Atoms, virial: bool) -> None:
        self.lmp = lmp
        self.atoms = atoms
        self.virial = virial
        self.error: BaseException | None = None

    def __call__(
        self,
        caller: None,
        step: int,
        n_atoms: int,
        ids: Int[np.ndarray, " N"],
        x: Float[np.ndarray, "N 3"],
        f: Float[np.ndarray, "N 3"],
    ) -> None:
        """Writes the forces of LAMMPS's positions `x` into `f`, both in LAMMPS's own memory."""
        try:
            if self.error is None:
                self._write(ids, x, f)
        except BaseException as error:
            self.error = error
        if self.error is not None:
            f[:] = np.nan
            self.lmp.force_timeout()

    def _write(
        self,
        ids: Int[np.ndarray, " N"],
        x: Float[np.ndarray, "N 3"],
        f: Float[np.ndarray, "N 3"],
    ) -> None:
        atoms, places = self.atoms, ids.reshape(-1) - 1
        _check_ids(ids.reshape(-1), len(atoms))
        atoms.set_cell(_box(self.lmp)[0])
        atoms.positions[places] = x
        f[:] = atoms.get_forces()[places]
        self.lmp.fix_external_set_energy_global(FIX, atoms.get_potential_energy())
        if self.virial:
            minus_W = -atoms.get_volume() * atoms.get_stress(voigt=False)
            self.lmp.fix_external_set_virial_global(FIX, minus_W[VOIGT].tolist())


def _box(lmp: Any) -> tuple[Float[np.ndarray, "3 3"], list[bool]]:
    """LAMMPS's box: the cell by rows, in Angstrom, and which axes are periodic."""
    low, high, xy, yz, xz, periodic, _ = lmp.extract_box()
    cell = np.diag(np.subtract(high, low))
    cell[1, 0], cell[2, 0], cell[2, 1] = xy, xz, yz
    return cell, [bool(p) for p in periodic]


def _check(lmp: Any, atoms: Atoms) -> None:
    """Raises ValueError where LAMMPS and the atoms don't fit together."""
    if (units := lmp.extract_global("units")) != "metal":
        do = 'write "units metal" at the top of the input'
        raise ValueError(message("LAMMPS in metal units", units, do))
    if (size := lmp.extract_setting("world_size")) != 1:
        do = "run LAMMPS without mpirun; the potential has its own threads"
        raise ValueError(message("LAMMPS on one process", f"{size}", do))
    if not lmp.extract_setting("box_exist"):
        do = "create it first (read_data, create_box), and the atoms"
        raise ValueError(message("LAMMPS with a box", "none", do))
    if lmp.has_id("fix", FIX):
        do = "leave the other `with` first; potentials add up before they are given to LAMMPS"
        raise ValueError(message("one potential at a time", f"a fix {FIX!r} in LAMMPS", do))
    ids, types = (lmp.numpy.extract_atom(name) for name in ("id", "type"))
    n_atoms = lmp.extract_setting("nlocal")
    _check_ids(ids[:n_atoms], len(atoms))
    periodic = _box(lmp)[1]
    if periodic != atoms.pbc.tolist():
        got = f"{periodic} in LAMMPS and {atoms.pbc.tolist()} in the atoms"
        do = "set LAMMPS's boundary, or atoms.pbc"
        raise ValueError(message("the same periodic axes", got, do))
    numbers = atoms.numbers[ids[:n_atoms] - 1]
    for kind in np.unique(types[:n_atoms]):
        if len(found := np.unique(numbers[types[:n_atoms] == kind])) > 1:
            got = f"Z = {', '.join(map(str, found))} for type {kind}"
            do = "give the atoms in the order of LAMMPS's IDs"
            raise ValueError(message("one element for each atom type", got, do))


def _check_ids(ids: Int[np.ndarray, " N"], n_atoms: int) -> None:
    """Raises ValueError where the IDs are not 1 to N."""
    if sorted(ids.tolist()) != list(range(1, n_atoms + 1)):
        got = f"{len(ids)} atoms, with IDs from {ids.min()} to {ids.max()}" if len(ids) else "none"
        do = "look for lost atoms, call reset_atoms id, or pass the same atoms"
        raise ValueError(message(f"{n_atoms} atoms in LAMMPS, with IDs from 1 on", got, do))
