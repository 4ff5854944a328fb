"""Property-based checks of users' own models: check_potential and check_function, with the
strategies that draw their inputs."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, field

import hypothesis as h
import numpy as np
from hypothesis.errors import Flaky

from bridge.call import one_of
from bridge.errors import message
from bridge.testing.checks import PROPERTIES, Mismatch
from bridge.testing.comparing import check_function
from bridge.testing.strategies import (
    arrays,
    batches,
    crystals,
    graphs,
    molecules,
    of_ase,
    st,
    systems_of,
)
from bridge.testing.subject import Subject

__all__ = [
    "ALL",
    "arrays",
    "batches",
    "check_function",
    "check_potential",
    "crystals",
    "graphs",
    "molecules",
    "run_checks",
]
ALL = tuple(PROPERTIES)
PREFERRED = (8, 14, 1, 6, 7, 29)  # elements to draw, where the model knows them
SECONDS = 20.0  # of looking for a smaller structure, for each property that fails


def check_potential(
    model,
    structures=None,
    *,
    checks=ALL,
    kind=None,
    gradients=None,
    cutoff=None,
    elements=None,
    dtype=None,
    pbc=None,
    extras=None,
    tolerance=1.0,
    max_examples=20,
    min_distance=1.6,
    n_atoms=(1, 4),
):
    """Check a potential of the contract: AssertionError with the smallest structure found for each
    property that it breaks.

    `model` is what `bridge.potential` (kind="torch") or `bridge.torch_potential` (kind="jax")
    takes: a callable from the dict of bridge.contract to a dict with energy (B,),
    position_gradients g (N,3) and cell_gradients G at fixed Cartesian positions (B,3,3), in eV and
    Angstrom; with gradients="autograd" (or "autodiff") to the energy alone. `kind` is found for
    nn.Modules and models with a `.card`; otherwise say it.

    These properties are checked (`checks` names some of them; bridge.testing.ALL has all), each on
    structures that hypothesis draws: g, G and the virial W = R^T g + h^T G (all nine components)
    against finite differences of the energy; invariance under translation, rotation, permutation,
    change of periodic image and of lattice basis, by which g and G change as they must;
    extensivity; systems in a batch as alone; continuity where a neighbour comes and goes (a kink in
    second derivatives is a warning alone); padding (models that take edges); same results and
    dtypes again, float64 to the last digits, inputs left alone; shapes; both lanes and all
    transforms of the bridge against the model itself.

    structures    a strategy of one structure (`crystals`, `molecules`), or a list of ase.Atoms or
                  dicts; None: crystals and molecules with `elements` (atomic numbers), `n_atoms`
                  (least, most), atoms at least `min_distance` apart, cells partly smaller than the
                  cutoff
    gradients     "model" (the default) or "autograd"
    cutoff        for models that take edge_index and cell_offsets: the radius of the edges made for
                  them
    dtype         "float64" or "float32"; the default is float64, but the default float of JAX for a
                  JAX model
    pbc           False: the model has no periodic boundaries. True: it has no others
    extras        other inputs, one number for each system, as {"charge": 0.0}
    tolerance     factor on all that is allowed (float64: 1e-5 of the largest entry for finite
                  differences, else 1e-8)
    max_examples  structures for each property; few of them where each is compiled anew (transforms)

    cutoff, elements, dtype and boundaries are the model's own where it has a card
    (torch_side.potentials.model.Model). Structures are drawn the same way each time, and nothing is
    stored. A failure names the property, both numbers, where, and the structure as ase.Atoms(...).

    Raises: AssertionError for a model that breaks a property, or raises an exception itself (its
    __cause__); TypeError for a model of unknown kind; ValueError for arguments that make no sense;
    ImportError without hypothesis. Warns (UserWarning) of a kink in second derivatives.

    >>> import torch
    >>> from bridge.testing import check_potential
    >>> springs = lambda x: {"energy": torch.zeros(len(x["cell"]), dtype=x["pos"].dtype).index_add(0, x["batch"], x["pos"].square().sum(-1))}
    >>> check_potential(springs, kind="torch", gradients="autograd", checks=["translation"])       # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    AssertionError: 1 of 1 properties failed: translation...
    """
    options = dict(
        kind=kind,
        gradients=gradients,
        cutoff=cutoff,
        elements=elements,
        dtype=dtype,
        pbc=pbc,
        extras=extras,
        tolerance=tolerance,
        max_examples=max_examples,
        min_distance=min_distance,
        n_atoms=n_atoms,
    )
    found = list(run_checks(model, structures, checks=checks, **options))
    if checks is not ALL and (skipped := [f for f in found if f.skipped]):
        raise ValueError(
            message(
                "checks that apply to this model",
                f"{skipped[0].name}, but {skipped[0].skipped}",
                "leave it out",
            )
        )
    for f in found:
        if f.warning:
            warnings.warn(f"{f.name}: {f.warning}", stacklevel=2)
    if failures := [f for f in found if f.failure]:
        names = ", ".join(f.name for f in failures)
        text = [
            f"{len(failures)} of {len(found)} properties failed: {names}",
            *(f.failure for f in failures),
        ]
        raise AssertionError("\n\n".join(text)) from failures[0].error


@dataclass(frozen=True)
class Found:
    """What became of one property: the text of its failure, or why it does not apply to this model;
    neither where it holds.

    `warning` tells of what is no failure and may surprise: a kink in second derivatives."""

    name: str
    failure: str = ""
    skipped: str = ""
    warning: str = ""
    error: BaseException | None = field(default=None, compare=False)


def run_checks(
    model,
    structures=None,
    *,
    checks=ALL,
    max_examples=20,
    elements=None,
    pbc=None,
    min_distance=1.6,
    n_atoms=(1, 4),
    **options,
):
    """The properties of `check_potential`, one after another as they are done: yields a Found for
    each."""
    for name in checks:
        one_of("checks", name, ALL)
    subject = Subject(model, **options)
    draw = lambda least: _drawn(
        structures,
        subject.card,
        elements,
        pbc,
        min_distance,
        (min(max(least, n_atoms[0]), n_atoms[1]), n_atoms[1]),
    )
    (single, periodic), (several, _) = draw(1), draw(2)
    for name in checks:
        needs = PROPERTIES[name].needs
        if why := subject.refuses(needs) or (
            "pbc" in needs and periodic is None and "no structure is periodic"
        ):
            yield Found(name, skipped=why)
            continue
        through = needs & {"lanes", "transforms"}
        batch = batches(single, (2, 2 if subject.kind == "jax" else 3))
        drawn = (
            several
            if through
            else periodic
            if "pbc" in needs
            else batch
            if "systems" in needs
            else single
        )
        rare = through or "scan" in needs or (subject.kind == "jax" and "edges" in needs)
        text, error, warning = _failure(
            name, subject, drawn, subject.few(max_examples) if rare else max_examples
        )
        yield Found(name, text, error=error, warning=warning)


def _drawn(structures, card, elements, pbc, min_distance, n_atoms):
    """(strategy of one structure, the same with a periodic axis or None)."""
    if structures is not None and not hasattr(structures, "example"):
        given = [of_ase(s) for s in structures]
        periodic = [s for s in given if s["pbc"].any()]
        return st.sampled_from(given), st.sampled_from(periodic) if periodic else None
    if structures is not None:
        return structures, structures.filter(lambda s: s["pbc"].any())
    known = card.elements if card and card.elements else PREFERRED
    elements = tuple(elements or [z for z in PREFERRED if z in known][:2] or sorted(known)[:2])
    may, must = (
        (pbc is not False, pbc is True)
        if pbc is not None or card is None
        else (card.supports_pbc, card.needs_pbc)
    )
    inside, outside = (
        make(elements, n_atoms, min_distance=min_distance) for make in (crystals, molecules)
    )
    return inside if must else inside | outside if may else outside, inside if may else None


def _failure(name, subject, structures, max_examples):
    """(text of the smallest failure that hypothesis finds or "", the exception of the model or
    None, a warning or "")."""
    last, failed, since, told = [None], set(), [], []

    def run(s, seed):
        known = repr((s, seed))
        if since and time.monotonic() - since[0] > SECONDS and known not in failed:
            return  # no more time to look for a smaller one
        try:
            told.append(PROPERTIES[name].check(subject, s, np.random.default_rng(seed)) or "")
        except Exception as error:
            since.append(time.monotonic())
            failed.add(known)
            last[0] = s, error
            raise

    again = ""
    try:
        _given(run, structures, max_examples)
    except Exception as end:
        if last[0] is None:
            raise
        again = (
            "\n  (the next time it was otherwise: the model is not deterministic)"
            if isinstance(end, Flaky)
            else ""
        )
    if last[0] is None:
        return "", None, next(filter(None, told), "")
    s, error = last[0]
    what = (
        str(error)
        if isinstance(error, Mismatch)
        else f"the check raised {type(error).__name__}: {error}"
    )
    return (
        f"FAILED {name}\n  {what}{again}\n  smallest structure found:\n{pasted(s)}",
        None if isinstance(error, Mismatch) else error,
        "",
    )


def _given(run, structures, max_examples):
    """`run` on what hypothesis draws, the same each time."""
    quiet = dict(
        deadline=None,
        database=None,
        derandomize=True,
        print_blob=False,
        report_multiple_bugs=False,
        verbosity=h.Verbosity.quiet,
    )
    phases, checks = (h.Phase.generate, h.Phase.shrink), list(h.HealthCheck)
    h.settings(max_examples=max_examples, phases=phases, suppress_health_check=checks, **quiet)(
        h.given(structures, st.integers(0, 99))(run)
    )()


def pasted(s):
    """A structure as Python: one ase.Atoms(...) for each system."""
    return "\n".join("    " + _atoms(one) for one in systems_of(s))


def _atoms(s):
    cell = f", cell={s['cell'][0].tolist()}, pbc={s['pbc'][0].tolist()}" if s["pbc"].any() else ""
    return f"ase.Atoms(numbers={s['atomic_numbers'].tolist()}, positions={s['pos'].tolist()}{cell})"
