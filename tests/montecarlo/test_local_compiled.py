"""The compiled loop of a Monte Carlo run: no array of as many rows as there are atoms is copied, or
written anew."""

import re

import jax
import jax.numpy as jnp
import pytest
import torch

import bridge
from jax_side.montecarlo import moves
from jax_side.montecarlo.local import Change, Layout, LocalPotential

ATOMS, KEYS = 20_000, jax.ShapeDtypeStruct((5,), jax.random.key(0).dtype)
LAYOUT = Layout(ATOMS, 4, 6, (True,) * 3, (20, 20, 20), (1, 1, 1), 1.0)
IN_PLACE = (
    "parameter",
    "get-tuple-element",
    "tuple",
    "while",
    "fusion",
    "scatter",
    "dynamic-update-slice",
    "bitcast",
    "call",
    "conditional",
)


def spring(of_torch=False):
    edge = lambda a, b, r: (1 - (r**2).sum(-1)[:, None]) * b
    edge = (
        bridge.to_jax(lambda a, b, r: torch.tanh(r.square().sum(-1, keepdim=True)) * b)
        if of_torch
        else edge
    )
    return LocalPotential(
        lambda Z: jnp.ones((len(Z), 2), "float32") * Z[:, None],
        edge,
        lambda a, s: (s**2).sum(-1),
        1.0,
    )


def move(k, cache, i, shift, key):
    at = (i + jnp.arange(k)) % ATOMS
    return moves.moved(at, cache.pos[at] + shift)


KINDS = {
    "move one": lambda *x: move(1, *x),
    "move three": lambda *x: move(3, *x),
    "exchange": lambda cache, i, shift, key: Change(
        i[None], shift[None], jnp.where(cache.atomic_numbers[i] > 0, 0, 18)[None]
    ),
    "swap": lambda cache, i, shift, key: moves.swapped(cache, moves.pick(cache, key), i),
    "insert": lambda cache, i, shift, key: moves.inserted(
        moves.vacant(cache, key), shift, jnp.array([18])
    ),
}


def step(local, kind, commit=None):
    def one(cache, key):
        i = jax.random.randint(key, (), 0, ATOMS, jnp.int32)
        energy, change, proposal = local.update(
            cache, KINDS[kind](cache, i, jax.random.normal(key, (3,), "float32"), key)
        )
        accept = jnp.log(jax.random.uniform(key)) < -change
        return (commit or local.commit)(cache, proposal, accept), energy

    return one


def compiled(local, one, chains=0):
    """Its text, with the donated cache as carry."""
    x = jax.ShapeDtypeStruct
    full = lambda pos, numbers: local.full(
        {"pos": pos, "atomic_numbers": numbers, "cell": 20.0 * jnp.eye(3, dtype="float32")}, LAYOUT
    )
    run = lambda cache, keys: jax.lax.scan(one, cache, keys)
    lead = (chains,) if chains else ()
    full, run = (jax.vmap(full), jax.vmap(run)) if chains else (full, run)
    cache = jax.eval_shape(full, x((*lead, ATOMS, 3), "float32"), x((*lead, ATOMS), "int32"))
    return (
        jax.jit(run, donate_argnums=0)
        .lower(cache, x((*lead, *KEYS.shape), KEYS.dtype))
        .compile()
        .as_text()
    )


def computations(text):
    """{name: lines}."""
    found, name = {}, None
    for line in text.splitlines():
        head = re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line)
        if head and not line.startswith(" "):
            name = head[1]
            found[name] = []
        elif name and " = " in line:
            found[name].append(line.strip())
    return found


def size(shape):
    """Elements of the greatest array of a shape, or of a tuple of them."""
    counts = [1]
    for dims in re.findall(r"\w+\[([\d,]*)\]", shape):
        n = 1
        for d in dims.split(","):
            n *= int(d or 1)
        counts.append(n)
    return max(counts)


def written(text, rows=ATOMS):
    """Instructions in the bodies of loops, and in what these call, that make an array of at least
    so many elements, but in place."""
    all_, seen = computations(text), set()
    todo = re.findall(r"body=%?([\w.\-]+)", text)
    assert todo
    while todo:
        name = todo.pop()
        if name in all_ and name not in seen:
            seen.add(name)
            todo += re.findall(r"%([\w.\-]+)", "\n".join(all_[name]))  # those that are computations
    found = []
    for line in (line for name in seen for line in all_[name]):
        parts = re.match(r"(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\(", line)
        if parts and parts[2] not in IN_PLACE and size(parts[1]) >= rows:
            found.append(line)
    return found


CASES = [
    ("move one", False, 0),
    ("insert", False, 0),
    ("exchange", True, 2),
    *(
        pytest.param(*case, marks=pytest.mark.full)
        for case in (
            ("exchange", False, 0),
            ("swap", False, 0),
            ("move three", True, 0),
            ("move three", False, 2),
        )
    ),
]


@pytest.mark.parametrize("kind, of_torch, chains", CASES)
def test_copies_x_loop(kind, of_torch, chains):
    local = spring(of_torch)
    assert written(compiled(local, step(local, kind), chains)) == []


def kept_alive(local):
    """The old cache is read after the commit."""
    one = step(local, "move one")
    return lambda cache, key: (one(cache, key)[0], cache.pos.sum())


def by_where(local):
    """Whole arrays are chosen."""

    def commit(cache, proposal, accept):
        new = local.commit(cache, proposal, True)
        return jax.tree.map(lambda a, b: jnp.where(accept, a, b), new, cache)

    return step(local, "move one", commit)


@pytest.mark.parametrize("planted", [kept_alive, by_where])
def test_copies_x_planted_loop(planted):
    local = spring()
    lines = written(compiled(local, planted(local)))
    assert any(" copy(" in line or " select(" in line for line in lines)
