"""Electric response of potentials that have a dipole or take a field: Born effective charges,
polarisability, infrared spectra."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.core
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Float

from bridge.errors import message, spec
from jax_side.potentials.potential import UNKNOWN, Potential, array
from jax_side.potentials.second import UNITS, dynamical_matrix

# 1 e Angstrom^2/V in Angstrom^3: e / (4 pi eps0) in V Angstrom (CODATA 2018)
ANGSTROM3 = 14.3996454784
# 1 (e/Angstrom)^2/amu in km/mol: N_A e^2 / (12 eps0 c^2 amu Angstrom^2) (CODATA 2018)
KM_PER_MOL = 974.880112

Positions = Float[ArrayLike, "N 3"]  # in Angstrom
Cell = Float[ArrayLike, "3 3"]  # lattice vectors as rows, in Angstrom
Dipole = Callable[..., Float[jax.Array, "3"]]  # dipole(positions, cell) in e Angstrom


class Born(NamedTuple):
    """Born effective charges Z*, and how far they are from the acoustic sum rule.

    charges   (N,3,3) in e, Z*[i,a,b] = d mu_b / d r_ia: a is the axis of the displacement
    excess    (3,3) in e, sum_i Z*[i] - Q 1 as the model gives it, before any correction
    """

    charges: Float[jax.Array, "N 3 3"]
    excess: Float[jax.Array, "3 3"]


class Infrared(NamedTuple):
    """Vibrations at q = 0 and the intensities of their infrared bands, by ascending frequency.

    frequencies   (3N,) in cm^-1, -|f| for an imaginary one
    intensities   (3N,) in km/mol, integrated over the wave number
    strengths     (3N,) in (e/Angstrom)^2/amu, |d mu / d Q|^2
    modes         (3N,N,3) displacements of the atoms, in amu^(-1/2), dr = modes[k] dQ_k
    born          the Born charges that they are made of
    """

    frequencies: Float[jax.Array, " 3*N"]
    intensities: Float[jax.Array, " 3*N"]
    strengths: Float[jax.Array, " 3*N"]
    modes: Float[jax.Array, "3*N N 3"]
    born: Born


def dipole(
    energy: Potential, *, by: Literal["output", "field"] = "output", **inputs: Any
) -> Dipole:
    """Returns the dipole of a potential of one system as a function mu(positions, cell=None), (3,)
    in e Angstrom, that differentiates as the model does.

    `energy` is what bridge.potential or jax_side.potentials.potential.potential gives. `inputs`
    (charge, edge_index, ...) are handed to it at each call. `by` says where the dipole is from:

    "output"   the output `dipole` of the contract. A torch model needs a card that has it, and
               outputs=("dipole",)
    "field"    mu = -dE/dF at the field F, in V/Angstrom, of an energy that takes an input `field`
               (1,3). It is zero if `inputs` do not give it

    In a periodic cell mu itself depends on the cell that atoms are counted in, and its derivatives
    do not.

    Raises: TypeError for an energy that has no outputs; ValueError for several systems, for a card
    without a dipole (or without a field), and, when called, for outputs without one.

    >>> from jax_side.potentials.potential import potential
    >>> q = jnp.array([1.0, -1.0])
    >>> ions = lambda x: {"energy": jnp.zeros(1), "dipole": (q @ x["pos"])[None]}
    >>> mu = dipole(potential(ions, atomic_numbers=jnp.array([11, 17])))
    >>> mu(jnp.array([[1.0, 0, 0], [0, 2, 0]])).tolist()
    [1.0, -2.0, 0.0]
    """
    if by not in ("output", "field"):
        raise ValueError(message('by as one of "output", "field"', repr(by), "take one of these"))
    if not isinstance(energy, Potential):
        do = "pass what bridge.potential gives, or, instead of a dipole, a function of your own"
        raise TypeError(message("a potential, whose outputs hold a dipole", _name(energy), do))
    if not energy.single:
        do = "bind the potential to one system (no batch=), and use jax.vmap for several"
        raise ValueError(message("one system for a dipole", f"{energy.n_systems} of them", do))
    if by == "field":
        _check_field(energy)
        return partial(_of_field, energy, inputs.pop("field", None), inputs)
    card = energy.card
    if card is not UNKNOWN and "dipole" not in card.outputs:
        raise _no_dipole(energy, card.outputs)

    def of_output(positions: Positions, cell: Cell | None = None) -> Float[jax.Array, 3]:
        out = energy.outputs(positions, cell, **inputs)
        if "dipole" not in out:
            raise _no_dipole(energy, out)
        return out["dipole"][0]

    return of_output


def born_charges(
    mu: Dipole,
    positions: Positions,
    cell: Cell | None = None,
    *,
    sum_rule: bool = False,
    charge: float | Float[jax.Array, ""] = 0.0,
) -> Born:
    """Returns the Born effective charges Z*[i,a,b] = d mu_b / d r_ia (N,3,3) in e, and how far their
    sum is from that of the acoustic sum rule.

    `mu(positions, cell)` is any JAX function to (3,), the dipole in e Angstrom, such as
    `electric.dipole(energy)`. It is differentiated three times in reverse, at once. In the literature
    the first of the two axes is often that of the field: there Z*[i] is transposed (Gonze and Lee,
    Phys. Rev. B 55, 10355 (1997)).

    As all atoms move together, mu changes by the total charge Q times the way: sum_i Z*[i] = Q 1.
    `excess` is what the model's sum has beyond that, for a `charge` Q in e. With sum_rule=True it is
    taken away, the same share from each atom.

    Raises: ValueError for positions of another shape, for a dipole that is not (3,), and where all
    charges of a `dipole(energy, by="field")` are zero, as for a model that passes over its field
    (inside jit they are then NaN).

    >>> q = jnp.array([1.0, -0.75])
    >>> born = born_charges(lambda r, cell: q @ r, jnp.ones((2, 3)), sum_rule=True)
    >>> born.charges[:, 0, 0].tolist(), born.excess[0].tolist()
    ([0.875, -0.875], [0.25, 0.0, 0.0])
    """
    r = array("positions", positions)
    if r.ndim != 2 or r.shape[1] != 3:
        do = "for several structures use jax.vmap"
        raise ValueError(message("positions as [N, 3]", spec(r.shape, r.dtype), do))

    def checked(r: jax.Array) -> jax.Array:
        found = mu(r, cell)
        if jnp.shape(found) != (3,):
            do = "return one dipole, in e Angstrom"
            raise ValueError(message("a dipole as [3]", spec(found.shape, found.dtype), do))
        return found

    charges = jax.jacrev(checked)(r).transpose(1, 2, 0)
    if isinstance(mu, partial) and mu.func is _of_field:  # nobody else has looked at the field
        charges = _changing(charges, "atoms", "take a model that reads inputs['field']")
    excess = charges.sum(0) - jnp.asarray(charge, r.dtype) * jnp.eye(3, dtype=r.dtype)
    return Born(charges - excess / len(r) if sum_rule else charges, excess)


def polarisability(
    energy: Potential,
    positions: Positions,
    cell: Cell | None = None,
    *,
    by: Literal["output", "field"] = "output",
    step: float | None = None,
    field: Float[ArrayLike, 3] | None = None,
    **inputs: Any,
) -> Float[jax.Array, "3 3"]:
    """Returns the polarisability alpha[a,b] = d mu_b / d F_a in e Angstrom^2/V, of a potential of one
    system that takes a `field` (1,3) in V/Angstrom. Times ANGSTROM3 it is a volume in Angstrom^3.

    The atoms stay where they are. `by` is that of `dipole`: from the output `dipole`, or from the
    energy alone (-d2E/dF dF). `field` (3,) is where the derivative is taken, by default no field.
    Without `step` it is the model's own derivative; with a step in V/Angstrom it is the central
    difference [mu(F + step) - mu(F - step)] / 2 step, for models whose dipole has none in the field.
    Nothing is symmetrised.

    Raises: ValueError as `dipole`, for a card without a field, for a step that is not positive, and
    where all of alpha is zero, as for a model that passes over its field (inside jit alpha is then
    NaN).

    >>> from jax_side.potentials.potential import potential
    >>> model = lambda x: {"energy": jnp.zeros(1), "dipole": x["pos"].sum(0) + 0.5 * x["field"]}
    >>> energy = potential(model, atomic_numbers=jnp.array([1]))
    >>> polarisability(energy, jnp.ones((1, 3))).diagonal().tolist()
    [0.5, 0.5, 0.5]
    """
    if step is not None and not step > 0:
        raise ValueError(
            message("a positive step of the field", f"{step}", "give it in V/Angstrom")
        )
    _check_field(energy)
    r = array("positions", positions)

    def mu(f: jax.Array) -> jax.Array:
        given = f if by == "field" else f[None]
        return dipole(energy, by=by, **inputs, field=given)(r, cell)

    at = _field(field, r.dtype)
    if step is None:
        alpha = jax.jacrev(mu)(at).T
    else:
        moves = step * jnp.eye(3, dtype=r.dtype)
        alpha = jnp.stack([(mu(at + d) - mu(at - d)) / (2 * step) for d in moves])
    do = "take a model that reads inputs['field'], or pass step= if it only cuts the derivative"
    return _changing(alpha, "the field", do)


def infrared(
    energy: Callable[..., Float[jax.Array, ""]],
    positions: Positions,
    cell: Cell | None,
    masses: Float[ArrayLike, " N"],
    *,
    mu: Dipole | None = None,
    sum_rule: bool = False,
    charge: float | Float[jax.Array, ""] = 0.0,
    chunk: int | None = None,
) -> Infrared:
    """Returns the vibrations at q = 0 with the intensities of their infrared bands, in the harmonic
    approximation.

    The mode k displaces atoms by dr_i = e_ki / sqrt(m_i) dQ_k, where e_k is an eigenvector of the
    dynamical matrix, and

        strength    |d mu / d Q_k|^2 = sum_b (sum_ia Z*[i,a,b] e_kia / sqrt(m_i))^2
        intensity   N_A / (12 eps0 c^2) times this

    (Porezag and Pederson, Phys. Rev. B 54, 7830 (1996); Neugebauer, Reiher, Kind, Hess, J. Comput.
    Chem. 23, 895 (2002)), that is 974.88 km/mol for 1 (e/Angstrom)^2/amu and 42.256 km/mol for 1
    (Debye/Angstrom)^2/amu. Among modes of one frequency only the sum is defined, and derivatives of
    the result are NaN there. In a crystal these are the transverse modes; the field of longitudinal
    ones is not there.

    `energy(positions, cell)` is that of jax_side.potentials.second, at rest in these positions.
    `mu` is the dipole as in `born_charges`; None takes that of the energy, which is then a potential with
    one. `masses` (N,) are in amu. `sum_rule` and `charge` are those of `born_charges`, `chunk` is
    that of second.hessian_rows.

    Raises: what `dipole`, `born_charges` and second.dynamical_matrix raise.

    >>> spring = lambda r, cell: ((r[1] - r[0])[0] - 1) ** 2 / 2
    >>> found = infrared(spring, jnp.array([[0.0, 0, 0], [1, 0, 0]]), None, jnp.array([2.0, 2]), mu=lambda r, cell: r[1] - r[0])
    >>> round(float(found.frequencies[-1]), 1), round(float(found.intensities[-1]), 1)
    (521.5, 974.9)
    """
    born = born_charges(
        dipole(cast("Potential", energy)) if mu is None else mu,
        positions,
        cell,
        sum_rule=sum_rule,
        charge=charge,
    )
    d = dynamical_matrix(energy, positions, cell, masses, chunk=chunk)
    n = len(d)
    squares, vectors = jnp.linalg.eigh(d.reshape(3 * n, 3 * n))
    root = jnp.sqrt(jnp.asarray(masses, d.dtype))[:, None]
    modes = vectors.T.reshape(3 * n, n, 3) / root
    strengths = (jnp.einsum("kia,iab->kb", modes, born.charges) ** 2).sum(1)
    frequencies = UNITS["cm^-1"] * jnp.sign(squares) * jnp.sqrt(abs(squares))
    return Infrared(frequencies, KM_PER_MOL * strengths, strengths, modes, born)


def _of_field(
    energy: Potential, field: Any, inputs: dict[str, Any], positions: Positions, cell: Any = None
) -> Float[jax.Array, 3]:
    """-dE/dF at this field, in e Angstrom."""
    r = array("positions", positions)
    at = _field(field, r.dtype)
    return -jax.grad(lambda f: energy.outputs(r, cell, field=f[None], **inputs)["energy"][0])(at)


def _changing(slopes: jax.Array, what: str, do: str) -> jax.Array:
    """Derivatives of a dipole: ValueError where all of them are zero, NaN if that is traced."""
    zero = jnp.all(slopes == 0)
    if not isinstance(zero, jax.core.Tracer) and zero:
        raise ValueError(message(f"a dipole that changes with {what}", "one that does not", do))
    return jnp.where(zero, jnp.nan, slopes)


def _check_field(energy: Potential) -> None:
    """ValueError for a card that has no use for a field."""
    if isinstance(energy, Potential) and energy.card.unused(("field",)):
        do = "take a model with field among its card's optional_inputs"
        who = _name(energy.model)
        raise ValueError(message(f"a field among the inputs of {who}", "a card without", do))


def _field(field: Any, dtype: Any) -> Float[jax.Array, 3]:
    """The field (3,), zero if there is none."""
    found = jnp.zeros(3, dtype) if field is None else jnp.asarray(field, dtype)
    if found.shape != (3,):
        do = "give its three components in V/Angstrom"
        raise ValueError(message("a field as [3]", spec(found.shape, found.dtype), do))
    return found


def _no_dipole(energy: Potential, outputs: Any) -> ValueError:
    """The error for a model without a dipole."""
    do = 'pass outputs=("dipole",) where the potential is made, or take another model'
    got = f"only {', '.join(sorted(outputs))}"
    return ValueError(message(f"a dipole among the outputs of {_name(energy.model)}", got, do))


def _name(x: Any) -> str:
    return getattr(x, "__name__", type(x).__name__)
