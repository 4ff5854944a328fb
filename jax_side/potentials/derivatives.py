"""How the outputs of a model differentiate: the energy in pos and cell by the model's own
gradients, all else by JAX."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Float, Int

from bridge.contract import GRADIENTS
from bridge.errors import message

Named = dict[str, jax.Array]  # by the names of the contract
Inputs = dict[str, Any]  # the same, with pytrees of arrays under names of the user's own
Model = Callable[[Inputs], Named]  # from the contract's inputs to its outputs
Placed = dict[Any, jax.Array]  # the arrays of a call, by place, which is anything hashable


class Call(NamedTuple):
    """One call of a model, as a function of its arrays.

    evaluate   gives the model's outputs for {place: array}
    places     the inputs of the contract: for each name its place, or a pytree of places
    others     what differentiates beside the energy in pos and cell, see `outputs`
    who        the model's name in error texts; "" leaves it out
    """

    evaluate: Callable[[Placed], Named]
    places: Mapping[str, Any]
    others: Literal["JAX", "unknown", "refused"] = "JAX"
    who: str = ""


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def outputs(call: Call, arrays: Placed) -> Named:
    """Returns the outputs of a model from one evaluation; they differentiate as follows.

    The derivative of the energy in pos and cell is made of the gradients that the model returns,
    dE[b] = sum_{i in b} g_i . dr_i + <G_b, dh_b>, and needs no further evaluation. `call.others`
    says what holds for all else, that is for the other outputs and for the energy in other inputs:

    "JAX"      JAX differentiates the model. A model that returns no gradients at all is
               differentiated by JAX in pos and cell too
    "unknown"  the model can't be differentiated. Derivatives of the other outputs are NaN, and
               derivatives of the energy in other inputs are refused
    "refused"  nothing but the energy is returned, and its derivatives in other inputs are refused

    Where JAX differentiates once more, for second derivatives, it differentiates the model, its
    gradients included ("unknown": they are NaN).

    Raises: NotImplementedError for a derivative that is refused, and for one in pos or cell where
    the model returns the gradient in the other of the two alone. It names the input.
    """
    return _returned(call, call.evaluate(arrays))


def _outputs_jvp(call, primals, tangents):
    (arrays,), (tangents,) = primals, tangents
    moved = {i: t for i, t in tangents.items() if not isinstance(t, SymbolicZero)}
    names = {i: name for name, places in call.places.items() for i in jax.tree.leaves(places)}
    if call.others == "JAX":
        out, change = _push(call.evaluate, arrays, moved)
        has_gradients = any(key in out for key in GRADIENTS.values())
        own = [i for i in moved if has_gradients and names.get(i) in GRADIENTS]
    elif call.others == "unknown":
        out = outputs(call, arrays)
        change, own = _unknown(out, moved), list(moved)
    else:
        out = call.evaluate(arrays)
        change, own = {}, list(moved)

    for name in sorted({names[i] for i in own}):
        gradient_of(out, name, call.who)
    if own:
        batch = arrays[call.places["batch"]]
        energy = _work(out, {names[i]: moved[i] for i in own}, batch)
        if rest := {i: t for i, t in moved.items() if i not in own}:
            energy += _push(lambda arrays: call.evaluate(arrays)["energy"], arrays, rest)[1]
        change |= {"energy": energy}
    return _returned(call, out), change


outputs.defjvp(_outputs_jvp, symbolic_zeros=True)


def _returned(call, out):
    return {"energy": out["energy"]} if call.others == "refused" else out


def _push(f, arrays, moved):
    """jax.jvp of f in the arrays that move."""
    return jax.jvp(lambda part: f(arrays | part), ({i: arrays[i] for i in moved},), (moved,))


def _unknown(out, moved):
    """NaN for the derivatives of a model that has none. They are linear in the tangents, so that
    nothing comes of them where they are not used."""
    nan = jnp.nan * sum(t.sum() for t in moved.values())
    return {name: jnp.broadcast_to(nan, x.shape).astype(x.dtype) for name, x in out.items()}


def _work(out: Named, moved: Named, batch: Int[jax.Array, " N"]) -> Float[jax.Array, " B"]:
    """The change of the energy as pos and cell move, by the model's own gradients."""
    energy, change = out["energy"], jnp.zeros_like(out["energy"])
    if "pos" in moved:
        work = (out["position_gradients"] * moved["pos"]).sum(-1)
        change += jax.ops.segment_sum(work, batch, num_segments=len(energy)).astype(energy.dtype)
    if "cell" in moved:
        change += (out["cell_gradients"] * moved["cell"]).sum((-2, -1)).astype(energy.dtype)
    return change


def gradient_of(out: Named, name: str, who: str = "") -> jax.Array:
    """Returns the gradient of the energy in one input, from the outputs of the model `who`.

    Raises: NotImplementedError where it is not among them, naming the input.
    """
    key = GRADIENTS.get(name)
    if key is None or key not in out:
        got = f"outputs {', '.join(sorted(out))}" + (f" of {who}" if who else "")
        do = f"hold {name} fixed (jax.lax.stop_gradient)" + (
            f", or let the model return {key}" if key else ""
        )
        raise NotImplementedError(
            message(f"a gradient of the energy in {name} to differentiate with", got, do)
        )
    return out[key]
