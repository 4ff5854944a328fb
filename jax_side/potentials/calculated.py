"""A calculator of ASE as a JAX model of the contract: one calculation for each system, on the host.
ase itself is handed in."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from bridge.atoms import PROPERTIES, has_stress
from bridge.card import Card
from bridge.contract import INFO, STRUCTURE, check_inputs, output_shapes
from bridge.conventions import from_
from bridge.errors import message
from bridge.function import Spec
from jax_side.calls.lanes import HostCall
from jax_side.potentials.derivatives import Inputs, Named

Arrays = dict[str, np.ndarray]  # by the names of the contract


@dataclass(frozen=True)
class Calculated:
    """What jax_side.engines.ase.model returns; its docstring is the documentation.

    `calculator` is a calculator of ASE, and `Atoms` is ase's class.
    """

    calculator: Any
    card: Card
    Atoms: type

    @property
    def __name__(self) -> str:
        """The name of the calculator's class, for error texts."""
        return type(self.calculator).__name__

    def __call__(self, inputs: Inputs) -> Named:
        sizes, dtype = check_inputs(inputs), str(inputs["pos"].dtype)
        if dtype not in ("float32", "float64"):
            raise ValueError(message("pos as float32 or float64", dtype, "cast pos and cell"))
        keys = tuple(k for k in (*STRUCTURE, *INFO) if k in inputs)
        names = self.card.active
        shapes = output_shapes(*sizes, names).values()
        outputs = tuple(Spec(shape, dtype) for shape in shapes)
        call = _Calculation(self.calculator, self.Atoms, keys, names, outputs)
        return dict(zip(names, _run(call, [inputs[k] for k in keys])))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _run(call, arrays):
    results = [jax.ShapeDtypeStruct(s.shape, s.dtype) for s in call.outputs]
    return jax.pure_callback(HostCall(call, call.run), results, *arrays, vmap_method="sequential")


@_run.defjvp
def _(call, primals, tangents):
    who = type(call.calculator).__name__
    do = "differentiate the energy of jax_side.potentials.potential.potential once, and take finite differences of forces beyond"
    raise NotImplementedError(
        message(
            f"first derivatives of the energy of {who}, an ASE calculator",
            "a derivative of its outputs",
            do,
        )
    )


@dataclass(frozen=True)
class _Calculation:
    """What the host lane runs. It takes arrays of the contract, and writes the outputs of the
    calculator into given arrays."""

    calculator: Any
    Atoms: type
    keys: tuple[str, ...]  # names of the inputs
    names: tuple[str, ...]  # of the outputs
    outputs: tuple[Spec, ...]

    def run(self, arrays: Sequence[Any], outs: Sequence[np.ndarray]) -> None:
        """Fills `outs` by one calculation for each system, with zeros for padding atoms."""
        given, out = dict(zip(self.keys, map(np.asarray, arrays))), dict(zip(self.names, outs))
        for x in outs:
            x[...] = 0
        for s in range(len(given["cell"])):
            mine = np.flatnonzero((given["batch"] == s) & (given["atomic_numbers"] != 0))
            if len(mine):
                self._system(given, s, mine, out)

    def _system(self, given: Arrays, s: int, mine: np.ndarray, out: Arrays) -> None:
        """Fills the rows of the outputs that belong to system s, whose atoms are `mine`."""
        info = {name: float(given[name][s]) for name in INFO if name in given}
        atoms = self.Atoms(
            given["atomic_numbers"][mine],
            given["pos"][mine],
            cell=given["cell"][s],
            pbc=given["pbc"][s],
            info=info,
        )
        wanted = [
            name
            for name, needed in PROPERTIES.items()
            if set(needed) <= set(self.names) and name != "free_energy"
        ]
        to_calculate = [name for name in wanted if name != "stress" or has_stress(atoms)]
        found = _calculated(self.calculator, atoms, to_calculate)
        for name in wanted:
            if name in ("energy", "dipole"):
                out[name][s] = found[name]
            elif name == "forces":
                out["position_gradients"][mine] = -found[name]
            elif name != "stress":
                out[PROPERTIES[name][0]][mine] = found[name]
        if "stress" in wanted:
            out["cell_gradients"][s] = _cell_gradients(atoms, found)


_locks = weakref.WeakKeyDictionary()


def _calculated(calculator: Any, atoms: Any, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The properties of these atoms, from one calculation, or from none if the calculator has them
    already."""
    with _locks.setdefault(calculator, threading.Lock()):
        changes = calculator.check_state(atoms)
        if changes:
            calculator.results = {}
        if changes or not set(names) <= set(calculator.results):
            calculator.atoms = atoms.copy()
            calculator.calculate(atoms, names, changes)
        if absent := [name for name in names if name not in calculator.results]:
            do = "ask for less: it implements them, but gave none for these atoms"
            raise RuntimeError(
                message(
                    f"{', '.join(names)} from {type(calculator).__name__}",
                    f"no {', '.join(absent)}",
                    do,
                )
            )
        return {name: np.array(calculator.results[name]) for name in names}


def _cell_gradients(atoms: Any, found: dict[str, np.ndarray]) -> np.ndarray | float:
    """G from stress and forces. Without a stress it is 0 where nothing is periodic, else NaN."""
    if "stress" not in found:
        return np.nan if atoms.pbc.any() else 0.0
    W = from_("ase", found["stress"], atoms.cell.array)
    return np.linalg.solve(atoms.cell.array.T, W + atoms.positions.T @ found["forces"])
