"""D3 (Grimme et al. 2010), the dispersion correction of torch-dftd, as a potential to add."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal, Self

import torch

from bridge.call import one_of
from bridge.card import Card
from bridge.contract import ENERGY_AND_GRADIENTS
from bridge.errors import message, missing
from torch_side.calls import status
from torch_side.potentials.geometry import edge_vectors
from torch_side.potentials.model import Model

DAMPINGS = ("bj", "zero", "bjm", "zerom")
PARAMETERS = ("s6", "rs6", "s18", "rs18", "alp")  # torch-dftd's names
REACH = 21.167  # Angstrom, 40 Bohr


class D3(Model):
    """Grimme's D3 dispersion energy with torch-dftd's code and reference data: `model + D3()`.

    The energy is that of S. Grimme, J. Antony, S. Ehrlich and H. Krieg, J. Chem. Phys. 132, 154104
    (2010), without its three-body term: -1/2 sum over pairs of s6 C6 f6(r) / r^6 + s8 C8 f8(r) /
    r^8. C6 and C8 come from the coordination numbers of both atoms, so that this is a potential of
    many bodies.

    `xc` names the functional that is to be corrected, as Grimme's program writes it ("pbe",
    "pbesol", "b3-lyp", "r2scan"): the one that the other model was trained on. A model trained on
    energies with dispersion needs none. Or `xc` is a mapping with torch-dftd's parameters s6, rs6,
    s18, rs18 and alp (for "bj": s6, a1, s8, a2 in Bohr, and no use for alp).
    `damping` is f: "bj" (S. Grimme, S. Ehrlich and L. Goerigk, J. Comput. Chem. 32, 1456 (2011)),
    "zero" (of 2010), or the "bjm" and "zerom" of D. G. A. Smith et al., J. Phys. Chem. Lett. 7,
    2197 (2016).

    `cutoff` is that of pairs, in Angstrom. Grimme's program takes 95 Bohr (50.27), which is 13
    times the work and 0.3 % more energy than the 40 Bohr here, which MACE's calculators take too.
    Coordination numbers count atoms up to `coordination_cutoff`, None for `cutoff` or 40 Bohr if
    that is longer. Pairs are cut off hard, as in the other programs. `smooth=True` lets pair
    energies and coordination numbers go to zero over their last Bohr; take that with a short
    cutoff.

    The model takes the dict of the contract, with N atoms of elements up to Pu in B systems, and
    finds its neighbours where no edges are given. It returns, in eV and Angstrom, from one forward
    and one backward pass, energy (B,), position_gradients g = dE/dr at fixed cell (N,3),
    cell_gradients G = dE/dh at fixed Cartesian positions (B,3,3), node_energies (N,) (half of each
    pair), and, where `asking` names them, node_virials (N,3,3) and the hessian. It can be
    differentiated as often as one likes. It has no weights. Tables are converted to `dtype`, on
    `device`; pair energies are added up in float64.

    In a program that is compiled as a whole, coordination numbers must count as far as pairs go,
    and without `smooth`, as they do by default.

    Raises: what every Model raises; ValueError for a functional that has no parameters for this
    damping, for parameters that lack one, and for cutoffs that are not positive, or not in order;
    NotImplementedError in a program that is compiled as a whole, for a shorter coordination_cutoff
    and for smooth=True; ImportError without torch-dftd.

    >>> methane = D3("b3-lyp")                                                              # doctest: +SKIP
    >>> methane = D3({"s6": 1.0, "rs6": 0.3981, "s18": 1.9889, "rs18": 4.4211, "alp": 14})  # doctest: +SKIP
    """

    tables: Any  # a torch_dftd.nn.dftd3_module.DFTD3Module

    def __init__(
        self,
        xc: str | Mapping[str, float] = "pbe",
        damping: Literal["bj", "zero", "bjm", "zerom"] = "bj",
        *,
        cutoff: float = REACH,
        coordination_cutoff: float | None = None,
        smooth: bool = False,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__()
        parameters = _parameters(xc, one_of("damping", damping, DAMPINGS))
        if coordination_cutoff is None:
            coordination_cutoff = min(cutoff, REACH)
        self.card = Card(
            batches=True,
            outputs={*ENERGY_AND_GRADIENTS, "node_energies", "node_virials", "hessian"},
            cutoff=cutoff,
            neighbor_list="own",
            receptive_field=cutoff + coordination_cutoff,
            elements=range(1, 95),
            dtype=str(dtype).removeprefix("torch."),
            device=str(device),
        )
        if not 0 < coordination_cutoff <= cutoff:
            expected = f"a coordination_cutoff of more than 0 and at most the cutoff, {cutoff:g}"
            do = "pass one in Angstrom, or a longer cutoff"
            raise ValueError(message(expected, f"{coordination_cutoff:g}", do))
        self.damping = damping
        self.smooth = smooth
        self.tables = _tables(parameters, cutoff, coordination_cutoff, smooth, dtype).to(device)
        self.eval()

    def energies(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the energies (B,) and (N,) of inputs without padding.

        Raises: NotImplementedError for two cutoffs, or a smooth one, while a status is
        collected."""
        from torch_dftd.functions.dftd3 import d3_autoang, d3_autoev, edisp

        tables, batch = self.tables, inputs["batch"].long()
        edges = inputs["edge_index"].long()
        within = tables.cnthr < tables.cutoff or self.smooth
        if within and status.current() is not None:
            expected = (
                "coordination numbers that count as far as pairs go, without smooth=True, in a "
                "program that is compiled as a whole"
            )
            got = "smooth=True" if self.smooth else f"a coordination_cutoff of {tables.cnthr:g}"
            do = 'leave it out, or take lane="ffi"'
            raise NotImplementedError(message(expected, got, do))
        nodes = edisp(
            inputs["atomic_numbers"].long(),
            torch.linalg.vector_norm(edge_vectors(inputs), dim=-1) / d3_autoang,
            edges,
            c6ab=tables.c6ab,
            r0ab=tables.r0ab,
            rcov=tables.rcov,
            r2r4=tables.r2r4,
            params=tables.params,
            cutoff=tables.cutoff / d3_autoang,
            cnthr=tables.cnthr / d3_autoang if within else None,
            batch=batch,
            batch_edge=edges[0],  # a sum for each atom, and not for each system
            cell=inputs["pos"],  # whose length is the number of sums
            damping=self.damping,
            cutoff_smoothing=tables.cutoff_smoothing,
            bidirectional=True,
        )
        nodes = d3_autoev * nodes
        energy = nodes.new_zeros(len(inputs["cell"])).index_add(0, batch, nodes)
        dtype = inputs["pos"].dtype
        return {"energy": energy.to(dtype), "node_energies": nodes.to(dtype)}

    def _apply(self, fn: Callable, recurse: bool = True) -> Self:
        """What to(dtype) and to(device) do to the tables; the card follows them."""
        super()._apply(fn, recurse)
        home = self.tables.c6ab
        dtype = str(home.dtype).removeprefix("torch.")
        self.card = replace(self.card, dtype=dtype, device=str(home.device))
        return self


def _parameters(xc: str | Mapping[str, float], damping: str) -> dict[str, float]:
    """The parameters of a functional, or those given.

    Raises: ValueError for a functional that is not known, or for other parameters."""
    if isinstance(xc, Mapping):
        if {*xc} != {*PARAMETERS}:
            got = ", ".join(sorted(xc)) or "none"
            do = "pass these five; alp is 14 in all of Grimme's"
            raise ValueError(message(f"the parameters {', '.join(PARAMETERS)}", got, do))
        return dict(xc)
    try:
        from torch_dftd.dftd3_xc_params import get_dftd3_default_params
    except ImportError as error:
        raise missing("torch-dftd", "the D3 correction") from error
    try:
        return get_dftd3_default_params(damping, xc)
    except ValueError as error:
        expected = f"a functional for which D3 has parameters with damping={damping!r}"
        do = 'write it as Grimme\'s program does ("pbe", "b3-lyp"), or pass parameters as a mapping'
        raise ValueError(message(expected, repr(xc), do)) from error


def _tables(
    parameters: dict[str, float],
    cutoff: float,
    coordination_cutoff: float,
    smooth: bool,
    dtype: torch.dtype,
) -> Any:
    """torch-dftd's module with its reference data."""
    try:
        from torch_dftd.nn.dftd3_module import DFTD3Module
    except ImportError as error:
        raise missing("torch-dftd", "the D3 correction") from error
    return DFTD3Module(
        parameters,
        cutoff=cutoff,
        cnthr=coordination_cutoff,
        dtype=dtype,
        bidirectional=True,
        cutoff_smoothing="poly" if smooth else "none",
    )
