"""A state machine over structures of one potential: edited, padded, batched, and evaluated by every
way, in both directions; energies and gradients by brute force in NumPy say what is right."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import torch
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

import bridge
from bridge.card import Card
from bridge.testing.strategies import concatenate, crystals, molecules, pad, with_edges
from tests.local_cases import CUTOFF, pairs
from torch_side.calls import status
from torch_side.potentials.geometry import edge_vectors
from torch_side.potentials.model import Wrapped

ELEMENTS = (1, 8, 14)
SYSTEMS, ATOMS = 3, 8  # at most: systems, and atoms of one
TOLERANCE = {"float64": 1e-9, "float32": 2e-4}


def nodes_of(sqrt, cos, sums, u, numbers, i, j):
    """Energies (N,) of a pair potential and of an embedding, from squared lengths u (E,): the same
    text for each library."""
    f = (1 - u / CUTOFF**2) ** 3
    return sums(f * cos(u), i) / 2 - sqrt(1 + sums(f * numbers[j], i)) + numbers / 100


def in_torch(inputs):
    u = edge_vectors(inputs).square().sum(-1)
    n, (i, j) = inputs["atomic_numbers"].to(u.dtype), inputs["edge_index"]
    sums = lambda x, i: u.new_zeros(len(n)).index_add(0, i, x)
    nodes = nodes_of(torch.sqrt, torch.cos, sums, u, n, i, j)
    energy = u.new_zeros(len(inputs["cell"])).index_add(0, inputs["batch"], nodes)
    return {"energy": energy, "node_energies": nodes}


def in_jax(inputs):
    """The same, which has to mask what is no edge itself."""
    pos, batch, (i, j) = inputs["pos"], inputs["batch"], inputs["edge_index"]
    numbers = inputs["atomic_numbers"]
    used = (i < len(pos)) & (j < len(pos))
    i, j = jnp.where(used, i, 0), jnp.where(used, j, 0)
    offsets = inputs["cell_offsets"].astype(pos.dtype)
    r = pos[j] - pos[i] + jnp.einsum("ea,eab->eb", offsets, inputs["cell"][batch[i]])
    u = (r**2).sum(-1)
    used &= (u < CUTOFF**2) & (numbers[i] > 0) & (numbers[j] > 0)
    # what is no edge has the length of the cutoff, at which all terms are zero
    u = jnp.where(used, u, CUTOFF**2)
    sums = lambda x, i: jax.ops.segment_sum(x, i, len(pos))
    nodes = nodes_of(jnp.sqrt, jnp.cos, sums, u, numbers.astype(pos.dtype), i, j)
    nodes = jnp.where(numbers > 0, nodes, 0)
    return {
        "energy": jax.ops.segment_sum(nodes, batch, len(inputs["cell"])),
        "node_energies": nodes,
    }


def by_brute_force(s):
    """Energy, gradients in positions and cell, and node energies of one system, in NumPy."""
    pos, cell, n = s["pos"], s["cell"][0], s["atomic_numbers"]
    i, j, images = pairs(pos, cell, n, s["pbc"][0])
    r = pos[j] - pos[i] + images @ cell
    u, sums = (r**2).sum(-1), lambda x, i: np.bincount(i, x, len(pos))
    nodes = np.where(n > 0, nodes_of(np.sqrt, np.cos, sums, u, n, i, j), 0)
    f, df = (1 - u / CUTOFF**2) ** 3, -3 * (1 - u / CUTOFF**2) ** 2 / CUTOFF**2
    embedded = -0.5 / np.sqrt(1 + sums(f * n[j], i))
    du = (df * np.cos(u) - f * np.sin(u)) / 2 + embedded[i] * df * n[j]
    along = 2 * du[:, None] * r
    g = np.zeros_like(pos)
    np.add.at(g, j, along)
    np.add.at(g, i, -along)
    return {
        "energy": nodes.sum()[None],
        "position_gradients": g,
        "cell_gradients": (images.T @ along)[None],
        "node_energies": nodes,
    }


OUTPUTS = ("energy", "position_gradients", "cell_gradients", "node_energies")


def model(neighbor_list):
    card = Card(
        outputs=set(OUTPUTS),
        cutoff=CUTOFF,
        neighbor_list=neighbor_list,
        elements=range(1, 20),
        batches=True,
    )
    return Wrapped(in_torch, card, "autograd")


MODELS = {"own": model("own"), "given": model("given")}
IN_JAX = {
    (lists, lane): bridge.jax_potential(m, lane=lane)
    for lists, m in MODELS.items()
    for lane in ("ffi", "host")
}
JITTED = {key: jax.jit(f) for key, f in IN_JAX.items()}
IN_TORCH = bridge.torch_potential(in_jax, gradients="autodiff", cutoff=CUTOFF)


def tensors(s):
    return {k: torch.from_numpy(np.array(x)) for k, x in s.items()}


def arrays(s):
    return {k: jnp.asarray(x) for k, x in s.items()}


def by_static_graph(lists, s):
    """As a compiled model is evaluated."""
    with status.collecting() as found:
        out = MODELS["given"](tensors(s))
        row = found.row()
    assert row is None or found.text(row.tolist()) is None, found.text(row.tolist())
    return out


def by_energy(lists, s):
    """bridge.potential, eager; its value and its gradients."""
    bound = {k: s[k] for k in ("atomic_numbers", "pbc", "batch")}
    energy = bridge.potential(MODELS[lists], n_systems=len(s["cell"]), **bound)
    edges = {k: jnp.asarray(s[k]) for k in ("edge_index", "cell_offsets") if k in s}
    total = lambda pos, cell: (lambda e: (e.sum(), e))(energy(pos, cell, **edges))
    at = jnp.asarray(s["pos"]), jnp.asarray(s["cell"])
    (_, e), (g, cell) = jax.value_and_grad(total, (0, 1), has_aux=True)(*at)
    return {"energy": e, "position_gradients": g, "cell_gradients": cell}


def by_torch_autograd(lists, s):
    """A JAX potential in torch, differentiated by torch."""
    x = tensors(s)
    x |= {k: x[k].requires_grad_() for k in ("pos", "cell")}
    e = IN_TORCH(x)["energy"]
    g, cell = torch.autograd.grad(e.sum(), [x["pos"], x["cell"]])
    return {"energy": e, "position_gradients": g, "cell_gradients": cell}


# What each makes of a structure whose edges are given, or not; those that compile get few sizes.
WAYS = {
    "torch": lambda lists, s: MODELS[lists](tensors(s)),
    "static": by_static_graph,
    "eager": lambda lists, s: IN_JAX[lists, "ffi"](arrays(s)),
    "energy": by_energy,
    "ffi": lambda lists, s: JITTED[lists, "ffi"](arrays(s)),
    "host": lambda lists, s: JITTED[lists, "host"](arrays(s)),
    "JAX in torch": lambda lists, s: IN_TORCH(tensors(s)),
    "JAX in torch, autograd": by_torch_autograd,
}
COMPILE = ("ffi", "host", "JAX in torch", "JAX in torch, autograd")
structures = crystals(ELEMENTS, (1, 4)) | molecules(ELEMENTS, (1, 4))
which, seeds = st.integers(0, ATOMS - 1), st.integers(0, 2**16)


def moved(s, rng):
    """All atoms a bit, and to other images."""
    images = rng.integers(-3, 4, s["pos"].shape) * s["pbc"] * rng.integers(2)
    step = np.round(rng.uniform(-0.1, 0.1, s["pos"].shape), 3)
    return {"pos": s["pos"] + step + images @ s["cell"][0]}


def strained(s, rng):
    by = np.eye(3) + rng.uniform(-0.03, 0.03, (3, 3))
    return {"pos": s["pos"] @ by, "cell": s["cell"] @ by}


def permuted(s, rng):
    order = rng.permutation(len(s["pos"]))
    return {"pos": s["pos"][order], "atomic_numbers": s["atomic_numbers"][order]}


def padded(s, rng):
    """An atom of padding, at any place among the others and anywhere in space."""
    if len(s["pos"]) == ATOMS:
        return {}
    k = rng.integers(0, len(s["pos"]) + 1)
    pos = np.insert(s["pos"], k, rng.uniform(-5, 5, 3), 0)
    numbers = np.insert(s["atomic_numbers"], k, 0)
    return {"pos": pos, "atomic_numbers": numbers, "batch": np.zeros(len(pos), np.int64)}


def removed(s, rng):
    """An atom becomes padding; a system may be left without any."""
    return {"atomic_numbers": np.where(at_random(s, rng), 0, s["atomic_numbers"])}


def mutated(s, rng):
    present = s["atomic_numbers"] > 0
    return {
        "atomic_numbers": np.where(
            at_random(s, rng) & present, rng.choice(ELEMENTS), s["atomic_numbers"]
        )
    }


def at_random(s, rng):
    return np.arange(len(s["pos"])) == rng.integers(len(s["pos"]))


EDITS = {f.__name__: f for f in (moved, strained, permuted, padded, removed, mutated)}


class Potentials(RuleBasedStateMachine):
    """Up to SYSTEMS systems, each with some atoms of padding."""

    def __init__(self):
        super().__init__()
        self.systems = []

    @initialize(s=structures)
    def begin(self, s):
        self.systems.append(s)

    @precondition(lambda self: len(self.systems) < SYSTEMS)
    @rule(s=structures)
    def another(self, s):
        self.systems.append(s)

    @precondition(lambda self: len(self.systems) > 1)
    @rule(i=which, away=st.booleans())
    def reorder(self, i, away):
        s = self.systems.pop(i % len(self.systems))
        if not away:
            self.systems.insert(0, s)

    @rule(
        edits=st.lists(st.tuples(which, st.sampled_from(list(EDITS)), seeds), max_size=3),
        way=st.sampled_from(list(WAYS)),
        lists=st.sampled_from(["own", "given"]),
        dtype=st.sampled_from(["float64", "float64", "float32"]),
        slots=st.integers(0, 3),
        seed=seeds,
        skin=st.sampled_from([0.0, 0.4]),
    )
    def evaluate(self, edits, way, lists, dtype, slots, seed, skin):
        for i, name, number in edits:
            i %= len(self.systems)
            s = self.systems[i]
            self.systems[i] = s | EDITS[name](s, np.random.default_rng(number))
        s = concatenate(self.systems)
        if lists == "given" or way == "static":
            s = with_edges(s, CUTOFF + skin)
            if way in COMPILE:
                slots = -s["edge_index"].shape[1] % 64
        atoms = -len(s["pos"]) % 4 if way in COMPILE else 0
        n = len(s["pos"])
        if "edge_index" in s:
            s = pad(s, atoms, slots, seed)
        elif atoms:
            none = {"edge_index": np.zeros((2, 0), int), "cell_offsets": np.zeros((0, 3), int)}
            s = pad(s | none, atoms, 0)
            del s["edge_index"], s["cell_offsets"]
        s = {k: x.astype(dtype) if x.dtype.kind == "f" else x for k, x in s.items()}
        found = WAYS[way](lists, s)
        wanted = [by_brute_force(one) for one in self.systems]
        wanted = {k: np.concatenate([w[k] for w in wanted]) for k in OUTPUTS}
        for k in set(OUTPUTS) & set(found):
            x = found[k]
            got = np.asarray(x.detach() if isinstance(x, torch.Tensor) else x)
            assert got.dtype == dtype and np.isfinite(got).all(), (way, k, got)
            want = wanted[k]
            if k in ("position_gradients", "node_energies"):
                assert not got[n:].any(), (way, k, got)
                got = got[:n]
            room = TOLERANCE[dtype] * max(1, abs(want).max(initial=0))
            np.testing.assert_allclose(got, want, rtol=0, atol=room, err_msg=f"{way} {lists} {k}")


def test_potentials(fuzz):
    fuzz(Potentials)
