"""Property-based checks of users' own models: check_potential and check_function, with the
strategies that draw their inputs."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import hypothesis as h
import numpy as np
from hypothesis.errors import Flaky

from bridge.call import one_of
from bridge.card import Card
from bridge.errors import message
from bridge.testing.checks import PROPERTIES, Mismatch
from bridge.testing.comparing import check_function
from bridge.testing.strategies import (
    Structure,
    Structures,
    arrays,
    batches,
    crystals,
    graphs,
    molecules,
    of_ase,
    st,
    systems_of,
)
from bridge.testing.subject import Gradients, Kind, Subject

if TYPE_CHECKING:
    from ase import Atoms

    Given = Structures | Sequence[Atoms | dict[str, Any]]  # what structures are drawn from

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
ALL = tuple(name for name, p in PROPERTIES.items() if "compiled" not in p.needs)
PREFERRED = (8, 14, 1, 6, 7, 29)  # elements to draw, where the model knows them
SECONDS = 20.0  # of looking for a smaller structure, for each property that fails


def check_potential(
    model: Callable[..., Any],
    structures: Given | None = None,
    *,
    checks: Sequence[str] = ALL,
    kind: Kind | None = None,
    gradients: Gradients | None = None,
    cutoff: float | None = None,
    elements: Sequence[int] | None = None,
    dtype: str | None = None,
    pbc: bool | None = None,
    extras: Mapping[str, float] | None = None,
    tolerance: float = 1.0,
    max_examples: int = 20,
    min_distance: float = 1.6,
    n_atoms: tuple[int, int] = (1, 4),
) -> None:
    """Checks a potential of the contract, on structures that hypothesis draws.

    `model` is what `bridge.potential` (kind="torch") or `bridge.torch_potential` (kind="jax")
    takes: a callable from the dict of bridge.contract to a dict with energy (B,),
    position_gradients g (N,3) and cell_gradients G at fixed Cartesian positions (B,3,3), in eV and
    Angstrom. With gradients="autograd" (or "autodiff") it gives the energy alone. `kind` is found
    for nn.Modules and models with a `.card`, and has to be said for others.

    These properties are checked:

    - g, G and the virial W = R^T g + h^T G (all nine components) are those of finite differences of
      the energy
    - the energy is invariant under translation, rotation, permutation, and change of periodic image
      and of lattice basis, and g and G change as they must
    - the energy is extensive
    - systems of a batch give what they give alone
    - energy and forces are continuous where a neighbour comes and goes; a kink in second
      derivatives is a warning only
    - padding changes nothing (for models that take edges)
    - shapes are those of the contract
    - a second call gives the same results in the same dtypes, float64 to its last digits, and
      inputs are left alone
    - both lanes and all transforms of the bridge give what the model itself gives
    - so does the native lane, with unused slots among the edges. This one compiles the model, and is
      checked where `checks` has its name, "native lane agrees"

    checks        names of some of these properties; bridge.testing.ALL, the default, has all names
                  but that of the native lane
    structures    a strategy of one structure (`crystals`, `molecules`), or a list of ase.Atoms or
                  dicts. None: crystals and molecules with `elements` (atomic numbers), `n_atoms`
                  (least, most) and atoms at least `min_distance` (Angstrom) apart, in cells of
                  which some are smaller than the cutoff
    gradients     "model" (the default) or "autograd"
    cutoff        for models that take edge_index and cell_offsets: the radius (Angstrom) of the
                  edges that are made for them
    dtype         "float64" or "float32". The default is float64, but the default float of JAX for a
                  JAX model
    pbc           False: the model has no periodic boundaries. True: it has no others
    extras        other inputs, one number for each system, as {"charge": 0.0}
    tolerance     factor on all that is allowed. In float64 that is 1e-5 of the largest entry for
                  finite differences, else 1e-8
    max_examples  structures for each property. Properties for which each structure is compiled anew
                  (transforms) get few of them

    A model with a card (torch_side.potentials.model.Model) has its own cutoff, elements, dtype and
    boundaries. Structures are drawn the same way each time, and nothing is stored.

    Raises: AssertionError for a model that breaks a property, or that raises an exception itself
    (the error's __cause__). It names each property, both numbers and where they are, with the
    smallest structure found, as ase.Atoms(...). TypeError for a model of unknown kind; ValueError
    for arguments that make no sense; ImportError without hypothesis. Warns (UserWarning) of a kink
    in second derivatives.

    >>> import torch
    >>> from bridge.testing import check_potential
    >>> springs = lambda x: {"energy": torch.zeros(len(x["cell"]), dtype=x["pos"].dtype).index_add(0, x["batch"], x["pos"].square().sum(-1))}
    >>> check_potential(springs, kind="torch", gradients="autograd", checks=["translation"])       # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    AssertionError: 1 of 1 properties failed: translation...
    """
    found = list(
        run_checks(
            model,
            structures,
            checks=checks,
            max_examples=max_examples,
            elements=elements,
            pbc=pbc,
            min_distance=min_distance,
            n_atoms=n_atoms,
            kind=kind,
            gradients=gradients,
            cutoff=cutoff,
            dtype=dtype,
            extras=extras,
            tolerance=tolerance,
        )
    )
    if checks is not ALL and (skipped := [f for f in found if f.skipped]):
        got = f"{skipped[0].name}, but {skipped[0].skipped}"
        raise ValueError(message("checks that apply to this model", got, "leave it out"))
    for f in found:
        if f.warning:
            warnings.warn(f"{f.name}: {f.warning}", stacklevel=2)
    if failures := [f for f in found if f.failure]:
        names = ", ".join(f.name for f in failures)
        title = f"{len(failures)} of {len(found)} properties failed: {names}"
        text = "\n\n".join([title, *(f.failure for f in failures)])
        raise AssertionError(text) from failures[0].error


@dataclass(frozen=True)
class Found:
    """What became of one property, `name`.

    `failure` is the text of its failure, with the model's own exception in `error`. `skipped` says
    why it does not apply to this model. `warning` tells of what is no failure and may surprise: a
    kink in second derivatives. All are "" for a property that simply holds.
    """

    name: str
    failure: str = ""
    skipped: str = ""
    warning: str = ""
    error: BaseException | None = field(default=None, compare=False)


def run_checks(
    model: Callable[..., Any],
    structures: Given | None = None,
    *,
    checks: Sequence[str] = ALL,
    max_examples: int = 20,
    elements: Sequence[int] | None = None,
    pbc: bool | None = None,
    min_distance: float = 1.6,
    n_atoms: tuple[int, int] = (1, 4),
    **options: Any,
) -> Iterator[Found]:
    """Yields a Found for each property of `check_potential`, as it is done.

    The arguments are those of `check_potential`, and it raises what that does but for
    AssertionError.
    """
    for name in checks:
        one_of("checks", name, tuple(PROPERTIES))
    subject = Subject(model, **options)
    least, most = n_atoms
    two = min(max(2, least), most), most
    single, periodic = _drawn(structures, subject.card, elements, pbc, min_distance, n_atoms)
    several, _ = _drawn(structures, subject.card, elements, pbc, min_distance, two)
    batch = batches(single, (2, 2 if subject.kind == "jax" else 3))
    for name in checks:
        needs = PROPERTIES[name].needs
        why, drawn = subject.refuses(needs), single
        if "systems" in needs:
            drawn = batch
        if "pbc" in needs:
            why = why or ("no structure is periodic" if periodic is None else "")
            drawn = single if periodic is None else periodic
        if through := needs & {"lanes", "transforms"}:
            drawn = several
        if why:
            yield Found(name, skipped=why)
            continue
        rare = through or "scan" in needs or (subject.kind == "jax" and "edges" in needs)
        count = subject.few(max_examples) if rare else max_examples
        count = 1 if "compiled" in needs else count
        yield _found(name, subject, drawn, count)


def _drawn(
    structures: Given | None,
    card: Card | None,
    elements: Sequence[int] | None,
    pbc: bool | None,
    min_distance: float,
    n_atoms: tuple[int, int],
) -> tuple[Structures, Structures | None]:
    """(strategy of one structure, the same with a periodic axis or None)."""
    if isinstance(structures, st.SearchStrategy):
        return structures, structures.filter(lambda s: bool(s["pbc"].any()))
    if structures is not None:
        given = [of_ase(s) for s in structures]
        periodic = [s for s in given if s["pbc"].any()]
        return st.sampled_from(given), st.sampled_from(periodic) if periodic else None
    known = card.elements if card and card.elements else PREFERRED
    elements = tuple(elements or [z for z in PREFERRED if z in known][:2] or sorted(known)[:2])
    if pbc is None and card is not None:
        may, must = card.supports_pbc, card.needs_pbc
    else:
        may, must = pbc is not False, pbc is True
    inside = crystals(elements, n_atoms, min_distance=min_distance)
    outside = molecules(elements, n_atoms, min_distance=min_distance)
    if must:
        return inside, inside if may else None
    return (inside | outside, inside) if may else (outside, None)


def _found(name: str, subject: Subject, structures: Structures, max_examples: int) -> Found:
    """What becomes of a property on structures that hypothesis draws, and then makes smaller."""
    last: list[tuple[Structure, Exception]] = []
    failed: set[str] = set()
    since: list[float] = []
    told: list[str] = []

    def run(s: Structure, seed: int) -> None:
        known = repr((s, seed))
        if since and time.monotonic() - since[0] > SECONDS and known not in failed:
            return  # no more time to look for a smaller one
        try:
            told.append(PROPERTIES[name].check(subject, s, np.random.default_rng(seed)) or "")
        except Exception as error:
            since.append(time.monotonic())
            failed.add(known)
            last[:] = [(s, error)]
            raise

    again = ""
    try:
        _run_on(structures, run, max_examples)
    except Exception as end:
        if not last:
            raise
        if isinstance(end, Flaky):
            again = "\n  (the next time it was otherwise: the model is not deterministic)"
    if not last:
        return Found(name, warning=next(filter(None, told), ""))
    s, error = last[0]
    own = None if isinstance(error, Mismatch) else error
    what = str(error) if own is None else f"the check raised {type(error).__name__}: {error}"
    text = f"FAILED {name}\n  {what}{again}\n  smallest structure found:\n{pasted(s)}"
    return Found(name, text, error=own)


def _run_on(
    structures: Structures, run: Callable[[Structure, int], None], max_examples: int
) -> None:
    """Runs `run` on what hypothesis draws, which is the same each time."""
    settings = h.settings(
        max_examples=max_examples,
        phases=(h.Phase.generate, h.Phase.shrink),
        # hypothesis does not type what iterating over this enumeration gives
        suppress_health_check=cast("list[h.HealthCheck]", list(h.HealthCheck)),
        deadline=None,
        database=None,
        derandomize=True,
        print_blob=False,
        report_multiple_bugs=False,
        verbosity=h.Verbosity.quiet,
    )
    settings(h.given(structures, st.integers(0, 99))(run))()


def pasted(s: Structure) -> str:
    """Returns a structure as Python, with one ase.Atoms(...) for each system."""
    return "\n".join("    " + _atoms(one) for one in systems_of(s))


def _atoms(s: Structure) -> str:
    cell = f", cell={s['cell'][0].tolist()}, pbc={s['pbc'][0].tolist()}" if s["pbc"].any() else ""
    return f"ase.Atoms(numbers={s['atomic_numbers'].tolist()}, positions={s['pos'].tolist()}{cell})"
