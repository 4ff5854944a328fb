"""What a jax-md state says of itself, without a further evaluation of the model: temperature,
pressure, stress, conserved quantity, g(r)."""

from __future__ import annotations

import math

import ase
import ase.units
import jax.numpy as jnp
import numpy as np
from ase.calculators.singlepoint import SinglePointCalculator
from jax_md import quantity, simulate

from bridge.errors import message

GPA = 1 / ase.units.GPa  # GPa in one eV/Angstrom^3
GRAMS = ase.units._amu * 1e3 / (ase.units.Angstrom * 1e-8) ** 3  # g/cm^3 in one amu/Angstrom^3
INVARIANTS = {
    "NPTNoseHooverState": simulate.npt_nose_hoover_invariant,
    "NVTNoseHooverState": simulate.nvt_nose_hoover_invariant,
}


def thermodynamics(state, *, kT=None, pressure=0.0, energy=None, virial=None, box=None) -> dict:
    """Observables of one jax-md state, scalars but for `stress`; jit, vmap and scan compose with
    it.

    potential, kinetic    eV
    temperature           K, of 3N-3 degrees of freedom: the centre of mass rests (jax-md's
                          quantity.temperature divides by 3N)
    conserved             eV: what the integrator conserves. NVE: the energy; NVT and NPT
                          Nose-Hoover: jax-md's invariant for kT (eV) and pressure (eV/Angstrom^3),
                          whose evaluation of the energy is replaced by the one that is known
    and where there is a box and a virial
    volume                Angstrom^3
    density               g/cm^3
    stress                (3,3) eV/Angstrom^3, (dE/dP - sum p p / m) / V: kinetic part included,
                          TENSION positive, as ASE's get_stress(include_ideal_gas=True) (jax-md's
                          quantity.stress has the other sign)
    pressure              eV/Angstrom^3, -tr stress / 3: COMPRESSION positive, kinetic part included

    `state` of jax_side.engines.jax_md.npt_nose_hoover knows its energy, virial dE/dP (3,3) of r ->
    P r, and box; for others energy is what `observed` returned, virial and box (columns) are
    optional.

    >>> from jax_md import space
    >>> init, step = simulate.nve(lambda R, **_: (R ** 2).sum(), space.free()[1], 1e-3)
    >>> state = init(jax.random.key(0), jnp.ones((2, 3)), 0.0)
    >>> {name: float(x) for name, x in thermodynamics(state, energy=6.0).items()}
    {'potential': 6.0, 'kinetic': 0.0, 'temperature': 0.0, 'conserved': 6.0}
    """
    energy = state.energy if energy is None else energy
    virial, box = (
        getattr(state, name, None) if given is None else given
        for name, given in (("virial", virial), ("box", box))
    )
    p, m = state.momentum, state.mass
    kinetic = quantity.kinetic_energy(momentum=p, mass=m)
    temperature = 2 * kinetic / (3 * max(len(p) - 1, 1) * ase.units.kB)
    out = dict(
        potential=energy,
        kinetic=kinetic,
        temperature=temperature,
        conserved=_conserved(state, energy, kinetic, kT, pressure),
    )
    if virial is not None and box is not None:
        volume = abs(quantity.volume(3, box))
        stress = (virial - (p / m).T @ p) / volume
        out |= dict(
            volume=volume,
            density=(m * jnp.ones((len(p), 1))).sum() * GRAMS / volume,
            stress=stress,
            pressure=-jnp.trace(stress) / 3,
        )
    return {name: jnp.asarray(x, p.dtype) for name, x in out.items()}


def _conserved(state, energy, kinetic, kT, pressure):
    """By the kind of state; those of this package are subclasses of jax-md's."""
    for kind in type(state).__mro__:
        if invariant := INVARIANTS.get(kind.__name__):
            if kT is None:
                raise ValueError(
                    message(
                        f"kT for the conserved quantity of {kind.__name__}", "None", "pass kT in eV"
                    )
                )
            target = (pressure, kT) if kind.__name__.startswith("NPT") else (kT,)
            return invariant(lambda R, **_: energy, state, *target)
    return energy + kinetic


class PairHistogram:
    """Distances between the atoms of groups, counted in bins of [0, r_max) with ALL periodic
    images: cells of any shape and size.

    `groups` are one label for each atom (chemical symbols), `cell` (3,3) by rows in Angstrom.
    counts(positions, cell) is (groups, groups, bins), directed pairs, weighted with the volume;
    sums of them over n steps become g(r) by rdf(sum, n). How many images are looked at is decided
    here: cells may shrink by a tenth in width; for one that shrank further counts are NaN. jax-md's
    quantity.pair_correlation takes minimum images, right only up to half the width of the cell.

    >>> h = PairHistogram(["Po"], np.eye(3), r_max=1.25, bins=5)
    >>> h.counts(jnp.zeros((1, 3)), jnp.eye(3))[0, 0].tolist()
    [0.0, 0.0, 0.0, 0.0, 6.0]
    """

    def __init__(self, groups, cell, r_max=8.0, bins=160):
        self.names, index = np.unique(list(groups), return_inverse=True)
        self.index, self.sizes, self.r_max, self.bins = index, np.bincount(index), r_max, bins
        self.reach = [
            math.ceil(r_max / (0.9 * width) - 0.5) for width in _widths(np.asarray(cell, float), np)
        ]
        self.images = np.stack(
            np.meshgrid(*(np.arange(-n, n + 1) for n in self.reach), indexing="ij"), -1
        ).reshape(-1, 3)

    @property
    def zero(self):
        return np.zeros((len(self.names), len(self.names), self.bins), np.float32)

    def counts(self, positions, cell):
        s = positions @ jnp.linalg.inv(cell)
        ds = s[None] - s[:, None]
        ds = (ds - jnp.round(ds))[:, :, None] + self.images.astype(s.dtype)  # (N,N,images,3)
        itself = np.eye(len(s), dtype=bool)[:, :, None] & (self.images == 0).all(-1)
        distance = jnp.sqrt(((ds @ cell) ** 2).sum(-1))
        place = jnp.where(
            itself | (distance >= self.r_max),
            self.zero.size,
            jnp.floor(distance * (self.bins / self.r_max)).astype(int),
        )
        pair = (self.index[:, None] * len(self.names) + self.index)[:, :, None] * self.bins
        counts = (
            jnp.zeros(self.zero.size, s.dtype)
            .at[place + pair]
            .add(1.0, mode="drop")
            .reshape(self.zero.shape)
        )
        seen = (jnp.array(self.reach) + 0.5) * _widths(cell, jnp) >= self.r_max
        return jnp.where(seen.all(), counts * abs(jnp.linalg.det(cell)), jnp.nan)

    def rdf(self, total, n):
        """r (bins,), and g (groups, groups, bins) of counts summed over n steps: 1 where there is
        no order."""
        edges = np.linspace(0, self.r_max, self.bins + 1)
        shells = 4 / 3 * np.pi * np.diff(edges**3)
        return 0.5 * (edges[1:] + edges[:-1]), np.asarray(total, float) / (
            n * np.multiply.outer(self.sizes, self.sizes)[..., None] * shells
        )


def frame(atoms, state, seen) -> ase.Atoms:
    """One frame for extxyz: Cartesian positions, momenta, cell; energy, forces, stress (potential
    part, as ASE has it); `seen` in info.

    `state` is an NPT state with real coordinates, as numpy arrays; `seen` what `thermodynamics`
    said of it."""
    numbers = {name: x.item() for name, x in seen.items() if np.ndim(x) == 0}
    atoms = ase.Atoms(
        atoms.numbers,
        cell=np.array(state.box, float).T,
        pbc=True,
        positions=np.array(state.position, float),
    )
    atoms.set_masses(np.array(state.mass, float).reshape(-1))
    atoms.set_momenta(np.array(state.momentum, float))
    atoms.wrap()
    virial = np.array(state.virial, float)
    stress = 0.5 * (virial + virial.T) / atoms.get_volume()
    atoms.calc = SinglePointCalculator(
        atoms, energy=numbers["potential"], forces=np.array(state.force, float), stress=stress
    )
    atoms.info |= numbers
    return atoms


def averaged(x, blocks=8):
    """Mean of a series and its standard error, from the means of blocks (equal in length, the first
    steps left out if need be).

    >>> averaged(np.arange(8.0), blocks=2)
    (3.5, 2.0)
    """
    if not 2 <= blocks <= len(x):
        raise ValueError(
            message(
                f"from 2 to {len(x)} blocks of {len(x)} values",
                f"{blocks}",
                "take fewer, or run for longer",
            )
        )
    means = np.asarray(x, float)[len(x) % blocks :].reshape(blocks, -1).mean(1)
    return float(means.mean()), float(means.std(ddof=1) / math.sqrt(blocks))


def _widths(cell, np):
    """Distances between opposite faces."""
    return 1 / np.sqrt((np.linalg.inv(cell) ** 2).sum(0))
