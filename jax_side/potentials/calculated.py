"""A calculator of ASE as a JAX model of the contract: one calculation for each system, on the host.
ase itself is handed in."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np

from bridge.atoms import INFO, PROPERTIES, has_stress
from bridge.card import Card
from bridge.contract import STRUCTURE, check_inputs, output_shapes
from bridge.conventions import from_
from bridge.errors import message
from bridge.function import Spec
from jax_side.calls.lanes import HostCall


@dataclass(frozen=True)
class Calculated:
    """What jax_side.engines.ase.model returns; its docstring is the documentation. `Atoms` is ase's
    class."""

    calculator: object
    card: Card
    Atoms: type

    @property
    def __name__(self):
        return type(self.calculator).__name__

    def __call__(self, inputs: dict) -> dict:
        sizes, dtype = check_inputs(inputs), str(inputs["pos"].dtype)
        if dtype not in ("float32", "float64"):
            raise ValueError(message("pos as float32 or float64", dtype, "cast pos and cell"))
        keys = tuple(k for k in (*STRUCTURE, *INFO) if k in inputs)
        shapes = tuple(output_shapes(*sizes, self.card.active).values())
        call = _Calculation(
            self.calculator,
            self.Atoms,
            keys,
            self.card.active,
            tuple(Spec(shape, dtype) for shape in shapes),
        )
        return dict(zip(self.card.active, _run(call, [inputs[k] for k in keys])))


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
    """What the host lane runs: arrays of the contract in, outputs of the calculator into given
    arrays."""

    calculator: object
    Atoms: type
    keys: tuple
    names: tuple
    outputs: tuple

    def run(self, arrays, outs):
        given, out = dict(zip(self.keys, map(np.asarray, arrays))), dict(zip(self.names, outs))
        for x in outs:
            x[...] = 0
        for s in range(len(given["cell"])):
            mine = np.flatnonzero((given["batch"] == s) & (given["atomic_numbers"] != 0))
            if len(mine):
                self._system(given, s, mine, out)

    def _system(self, given, s, mine, out):
        """One system's rows of the outputs."""
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
        found = _calculated(
            self.calculator,
            atoms,
            [name for name in wanted if name != "stress" or has_stress(atoms)],
        )
        for name in wanted:
            if name in ("energy", "dipole"):
                out[name][s] = found[name]
            elif name != "stress":
                out[PROPERTIES[name][0]][mine] = -found[name] if name == "forces" else found[name]
        if "stress" in wanted:
            out["cell_gradients"][s] = _cell_gradients(atoms, found)


_locks = weakref.WeakKeyDictionary()


def _calculated(calculator, atoms, names) -> dict:
    """At most one calculation for all properties; what the calculator has of these atoms is not
    calculated again."""
    with _locks.setdefault(calculator, threading.Lock()):
        changes = calculator.check_state(atoms)
        if changes:
            calculator.results = {}
        if changes or not set(names) <= set(calculator.results):
            calculator.atoms = atoms.copy()
            calculator.calculate(atoms, names, changes)
        if absent := [name for name in names if name not in calculator.results]:
            do = "it implements them, but not for these atoms"
            raise RuntimeError(
                message(
                    f"{', '.join(names)} from {type(calculator).__name__}",
                    f"no {', '.join(absent)}",
                    do,
                )
            )
        return {name: np.array(calculator.results[name]) for name in names}


def _cell_gradients(atoms, found):
    """G from stress and forces; 0 where nothing is periodic."""
    if "stress" not in found:
        return np.nan if atoms.pbc.any() else 0.0
    W = from_("ase", found["stress"], atoms.cell.array)
    return np.linalg.solve(atoms.cell.array.T, W + atoms.positions.T @ found["forces"])
