"""A right potential, in torch and in JAX, and a gallery of wrong ones, each with the property of
bridge.testing that must catch it."""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import torch

from bridge.card import Card
from jax_side.potentials.strain import with_gradients as jax_with_gradients
from torch_side.potentials.geometry import edge_vectors
from torch_side.potentials.neighbors import neighbor_list
from torch_side.potentials.strain import lattice_gradient_from_virial, virial, with_gradients

CUTOFF = 3.0
FINITE = "position gradients are those of finite differences"
CELL = "cell gradients are those of finite differences at fixed Cartesian positions"


# The right model: pairs, and a square root of the density that all neighbours make (as in the
# embedded-atom method).


def nodes(numbers, i, j, d2, used=1.0):
    """Node energies in torch: numbers (N,), edges i -> j of squared lengths d2; `used` is 0 for
    edges that count nothing."""
    q, n = numbers.to(d2.dtype) / 10, len(numbers)
    near = used * (1 - d2 / CUTOFF**2).clamp(min=0) ** 4
    pairs = d2.new_zeros(n).index_add(0, i, q[i] * q[j] * near * torch.exp(-d2 / 3))
    density = d2.new_zeros(n).index_add(0, i, q[j] * near)
    return pairs - q * (0.1 + density) ** 0.5


def per_system(each, x):
    return each.new_zeros(len(x["cell"])).index_add(0, x["batch"], each)


def right(x):
    """A graph model: its energy, over the edges that it is given."""
    i, j = x["edge_index"]
    each = nodes(x["atomic_numbers"], i, j, edge_vectors(x).square().sum(-1))
    return {"energy": per_system(each, x), "node_energies": each}


def right_jax(x, used=None):
    """The same in JAX; unused slots and padding atoms count nothing."""
    pos, cell, batch, (i, j) = x["pos"], x["cell"], x["batch"], x["edge_index"]
    n, q = len(pos), x["atomic_numbers"].astype(pos.dtype) / 10
    used = (i < n) & (j < n) if used is None else used
    i, j = jnp.where(used, i, 0), jnp.where(used, j, 0)
    d2 = (
        (
            pos[j]
            - pos[i]
            + jnp.einsum("ea,eab->eb", x["cell_offsets"].astype(pos.dtype), cell[batch[i]])
        )
        ** 2
    ).sum(-1)
    near = used * jnp.maximum(1 - d2 / CUTOFF**2, 0) ** 4
    pairs, density = (
        jax.ops.segment_sum(v, i, num_segments=n)
        for v in (q[i] * q[j] * near * jnp.exp(-d2 / 3), q[j] * near)
    )
    each = pairs - q * (0.1 + density) ** 0.5
    return {
        "energy": jax.ops.segment_sum(each, batch, num_segments=len(cell)),
        "node_energies": each,
    }


def edged(x, **changed):
    """The inputs with edges of a model that finds its own."""
    y = x | changed
    return x | dict(
        zip(
            ("edge_index", "cell_offsets"),
            neighbor_list(*(y[k] for k in ("pos", "cell", "pbc")), CUTOFF, y["batch"]),
        )
    )


# the right model as a structure model that gives its gradients
structure = with_gradients(lambda x: right(edged(x)))


# Wrong in their gradients.


def forces_as_gradients(x):
    out = structure(x)
    return out | {"position_gradients": -out["position_gradients"]}


def twice_the_cell_gradient(x):
    out = structure(x)
    return out | {"cell_gradients": 2 * out["cell_gradients"]}


def from_virial(change):
    """A model whose G comes from its virial, by a function of (W, g, inputs)."""

    def model(x):
        out = structure(x)
        if not x["pbc"].any():
            return out
        w = virial(
            out["position_gradients"], out["cell_gradients"], x["pos"], x["batch"], x["cell"]
        )
        return out | {"cell_gradients": change(w, out["position_gradients"], x)}

    return model


def _wrong_volume(w, g, x):
    edges = torch.linalg.vector_norm(x["cell"], dim=-1).prod(-1)
    w = w * (edges / torch.linalg.det(x["cell"]).abs())[:, None, None]
    return lattice_gradient_from_virial(-g, x["pos"], x["batch"], x["cell"], w)


def _symmetrised(w, g, x):
    own = torch.zeros_like(w).index_add(0, x["batch"], x["pos"][:, :, None] * g[:, None, :])
    return torch.linalg.solve(x["cell"].mT, w - (own + own.mT) / 2)


wrong_volume = from_virial(_wrong_volume)
symmetrised_virial = from_virial(_symmetrised)
fixed_fractional = from_virial(lambda w, g, x: torch.linalg.solve(x["cell"].mT, w))


def no_second_derivatives(x):
    """Right gradients, a Hessian of zero."""
    out = structure(x)
    return {k: v.detach() + 0 * x["pos"].sum() for k, v in out.items()}


# Wrong in their energies; torch.autograd makes the gradients.


def transposed_cell(x):
    return right(edged(x | {"cell": x["cell"].mT}))


def fewer_edges(keep):
    """A model that leaves edges out: keep(i, j, offsets, lengths)."""

    def model(x):
        y = edged(x)
        (i, j), offsets = y["edge_index"], y["cell_offsets"]
        kept = keep(i, j, offsets, edge_vectors(y).square().sum(-1))
        return right(y | {"edge_index": y["edge_index"][:, kept], "cell_offsets": offsets[kept]})

    return model


def _shortest(i, j, offsets, d2):
    """One image for each pair."""
    first = {}
    for k in torch.argsort(d2.detach(), stable=True).tolist():
        first.setdefault((int(i[k]), int(j[k])), k)
    return torch.tensor(sorted(first.values()), dtype=torch.int64)


half_list = fewer_edges(lambda i, j, offsets, d2: i <= j)
no_self_images = fewer_edges(lambda i, j, offsets, d2: i != j)
minimum_image = fewer_edges(_shortest)


def leaks_energy(x):
    out = right(edged(x))
    return {"energy": out["energy"].sum().expand(len(x["cell"]))}


def leaks_neighbours(x):
    """Atoms of other systems are neighbours."""
    one = x["batch"] * 0
    y = edged({**x, "cell": x["cell"][:1], "pbc": x["pbc"][:1], "batch": one})
    each = nodes(x["atomic_numbers"], *y["edge_index"], edge_vectors(y).square().sum(-1))
    return {"energy": per_system(each, x)}


def float32_inside(x):
    y = edged(x)
    each = nodes(
        x["atomic_numbers"],
        *y["edge_index"],
        edge_vectors(y).float().square().sum(-1).to(x["pos"].dtype),
    )
    return {"energy": per_system(each, x)}


def float32_sum(x):
    each = right(edged(x))["node_energies"].float()
    return {"energy": per_system(each, x).to(x["pos"].dtype)}


def float32_out(x):
    return {k: v.float() for k, v in structure(x).items()}


def mean(x):
    out = right(edged(x))
    return {"energy": out["energy"] / torch.bincount(x["batch"], minlength=len(x["cell"]))}


def first_atom_counts_twice(x):
    each = right(edged(x))["node_energies"]
    first = torch.ones_like(x["batch"]).scatter(
        0, torch.searchsorted(x["batch"], torch.unique(x["batch"])), 2
    )
    return {"energy": per_system(first * each, x)}


def not_wrapped(x):
    """Offsets of the wrapped atoms, positions as they come."""
    if not x["pbc"].all():
        return right(edged(x))
    cell = x["cell"][x["batch"]]
    s = torch.linalg.solve(cell.mT, x["pos"].detach())
    y = edged(x, pos=(x["pos"] - torch.einsum("na,nab->nb", torch.floor(s), cell)).detach())
    return right(y)


def field(x):
    """Depends on where the atoms are."""
    return {"energy": right(edged(x))["energy"] + per_system(torch.sin(x["pos"][:, 0]), x)}


def anisotropic(x):
    y = edged(x)
    d2 = (edge_vectors(y).square() * torch.tensor([1.1, 1.0, 1.0], dtype=x["pos"].dtype)).sum(-1)
    return {"energy": per_system(nodes(x["atomic_numbers"], *y["edge_index"], d2), x)}


# Wrong in what they remember, write or return.


class StaleCache:
    """Answers by what it answered for another structure of as many atoms."""

    def __init__(self):
        self.known = {}

    def __call__(self, x):
        return self.known.setdefault((len(x["pos"]), len(x["cell"])), structure(x))


class Counter:
    """No answer is like the one before."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        out = structure(x)
        return out | {"energy": out["energy"] + self.calls}


def writes_to_its_inputs(x):
    out = structure(x)
    x["pos"].detach().add_(1.0)
    return out


def cell_gradients_of_one(x):
    out = structure(x)
    return out | {"cell_gradients": out["cell_gradients"][0]}


@dataclass(frozen=True)
class CountsPadding:
    """A graph model with a card that takes padding for real: the edges' unused slots are edges of
    the first atom."""

    card = Card(cutoff=CUTOFF, neighbor_list="own")

    def __call__(self, x):
        def energy(x):
            i, j = x["edge_index"]
            inside = torch.stack([torch.where(k < len(x["pos"]), k, 0) for k in (i, j)])
            return right(x | {"edge_index": inside})["energy"] + 0.1 * len(i)

        return with_gradients(energy)(x if "edge_index" in x else edged(x))


def counts_padding_jax(x):
    """JAX clamps an index out of range: an unused slot is an edge of the last atom."""
    return (
        right_jax(x, used=jnp.ones(x["edge_index"].shape[1], bool))["energy"]
        + 0.01 * x["edge_index"].shape[1]
    )


def counts_padding_atoms_jax(x):
    """An atom of number 0 has an energy."""
    return right_jax(x)["energy"] - 0.5 * jax.ops.segment_sum(
        jnp.ones(len(x["pos"]), x["pos"].dtype), x["batch"], num_segments=len(x["cell"])
    )


def forces_as_gradients_jax(x):
    out = jax_with_gradients(right_jax)(x)
    return out | {"position_gradients": -out["position_gradients"]}


def mean_jax(x):
    return right_jax(x)["energy"] / jax.ops.segment_sum(
        jnp.ones(len(x["pos"])), x["batch"], num_segments=len(x["cell"])
    )


def radial(f):
    """A graph model of pairs: the sum of f(r) over its edges."""

    def energy(x):
        i = x["edge_index"][0]
        return per_system(
            edge_vectors(x)[:, 0]
            .new_zeros(len(x["pos"]))
            .index_add(0, i, f(edge_vectors(x).norm(dim=-1))),
            x,
        )

    return energy


def jumps_jax(x):
    """Distances in a cell that is none: the model has no cutoff of its own."""
    i, j = x["edge_index"]
    r = jnp.sqrt((edges_jax(x) ** 2).sum(-1))
    used = (i < len(x["pos"])) & (r < CUTOFF)
    each = jax.ops.segment_sum(
        jnp.where(used, jnp.exp(-r), 0), jnp.where(used, i, 0), num_segments=len(x["pos"])
    )
    return jax.ops.segment_sum(each, x["batch"], num_segments=len(x["cell"]))


def edges_jax(x):
    pos, cell, batch, (i, j) = x["pos"], x["cell"], x["batch"], x["edge_index"]
    used = (i < len(pos)) & (j < len(pos))
    i, j = jnp.where(used, i, 0), jnp.where(used, j, 0)
    r = (
        pos[j]
        - pos[i]
        + jnp.einsum("ea,eab->eb", x["cell_offsets"].astype(pos.dtype), cell[batch[i]])
    )
    return jnp.where(used[:, None], r, CUTOFF)


class Wrong(NamedTuple):
    """`make()` gives the model, `caught` is the property that it breaks."""

    make: callable
    caught: str
    options: dict


def _torch(model, caught, gradients="model"):
    return Wrong(lambda: model, caught, {"kind": "torch", "gradients": gradients})


def _jax(model, caught, gradients="autodiff"):
    return Wrong(lambda: model, caught, {"kind": "jax", "gradients": gradients, "cutoff": CUTOFF})


_energy = functools.partial(_torch, gradients="autograd")
DIGITS = "deterministic and dtype kept"
PADDING = "padding changes nothing"
CONTINUOUS = "continuous where neighbours come and go"


def _radial(f):
    return Wrong(
        lambda: radial(f), CONTINUOUS, {"kind": "torch", "gradients": "autograd", "cutoff": CUTOFF}
    )


GALLERY = {
    "forces as gradients": _torch(forces_as_gradients, FINITE),
    "twice the cell gradient": _torch(twice_the_cell_gradient, CELL),
    "volume as the product of lengths": _torch(wrong_volume, "virial is that of strain"),
    "symmetrised virial": _torch(symmetrised_virial, "virial is that of strain"),
    "gradient at fixed fractional positions": _torch(fixed_fractional, CELL),
    "no second derivatives": _torch(no_second_derivatives, "transforms agree"),
    "transposed cell": _energy(transposed_cell, "rotation"),
    "half neighbour list": _energy(half_list, "permutation"),
    "no self images": _energy(no_self_images, "extensive"),
    "minimum image": _energy(minimum_image, "extensive"),
    "energy of all systems": _energy(leaks_energy, "batched equals single"),
    "neighbours of other systems": _energy(leaks_neighbours, "batched equals single"),
    "float32 distances": _energy(float32_inside, DIGITS),
    "float32 sum": _energy(float32_sum, DIGITS),
    "float32 results": _torch(float32_out, DIGITS),
    "mean over atoms": _energy(mean, "extensive"),
    "first atom counts twice": _energy(first_atom_counts_twice, "permutation"),
    "not wrapped": _energy(not_wrapped, "periodic wrap"),
    "a field": _energy(field, "translation"),
    "anisotropic": _energy(anisotropic, "rotation"),
    "stale cache": Wrong(StaleCache, DIGITS, {"kind": "torch"}),
    "counter": Wrong(Counter, "lanes agree", {"kind": "torch"}),
    "writes to its inputs": _torch(writes_to_its_inputs, "shapes of the contract"),
    "cell gradients of one system": _torch(cell_gradients_of_one, "shapes of the contract"),
    "energy jumps at the cutoff": _radial(lambda r: torch.exp(-r)),
    "energy jumps a little": _radial(lambda r: (1 - r / CUTOFF) ** 3 + 1e-5),
    "forces jump at the cutoff": _radial(lambda r: CUTOFF - r),
    "energy jumps at an inner radius": _radial(
        lambda r: (1 - r / CUTOFF) ** 4 * (1 + 0.1 * (r < 2.2))
    ),
    "energy jumps, structure model": _energy(
        lambda x: radial(lambda r: torch.exp(-r))(edged(x)), CONTINUOUS
    ),
    "energy jumps at the cutoff, JAX": _jax(jumps_jax, CONTINUOUS),
    "padding counted": Wrong(CountsPadding, PADDING, {}),
    "padding counted, JAX": _jax(counts_padding_jax, PADDING),
    "padding atoms counted, JAX": _jax(counts_padding_atoms_jax, PADDING),
    "forces as gradients, JAX": _jax(forces_as_gradients_jax, FINITE, "model"),
    "mean over atoms, JAX": _jax(mean_jax, "extensive"),
}
