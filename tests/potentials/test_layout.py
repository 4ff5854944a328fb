"""What is kept of a call's integers serves later calls of the same ones, and no others."""

import gc
import threading
import weakref

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings

import bridge
from tests.graph_cases import CARD, CELL, CUTOFF, POS, Embedded, H, R, joined, system
from torch_side.potentials import layout
from torch_side.potentials.model import Wrapped
from torch_side.potentials.neighbors import neighbor_list
from torch_side.potentials.strain import with_gradients

ONE, OTHER = system(), system(numbers=np.array([6, 6, 1, 8]))
TWO = joined(system(), system(pos=1.15 * POS, cell=1.15 * CELL))


def with_list(x, skin=0.5, dtype=torch.int32):
    """Given edges, and some unused slots behind them."""
    edges, offsets = neighbor_list(x["pos"], x["cell"], x["pbc"], CUTOFF + skin, x["batch"])
    spare = torch.full((2, 5), len(x["pos"]))
    index, shifts = torch.cat([edges, spare], 1), torch.cat([offsets, offsets.new_zeros(5, 3)])
    return x | {"edge_index": index.to(dtype), "cell_offsets": shifts.to(dtype)}


def results(model, x):
    out = model(x)
    return [out[key].detach() for key in ("energy", "position_gradients", "cell_gradients")]


def same(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def padded(x):
    numbers = x["atomic_numbers"].clone()
    numbers[-1] = 0
    return x | {"atomic_numbers": numbers}


def flipped(x):
    return x | {key: x[key].flip(axis) for key, axis in (("edge_index", 1), ("cell_offsets", 0))}


def doubled_offsets(x):
    return x | {"cell_offsets": 2 * x["cell_offsets"]}


CALLS = {
    "one": with_list(ONE),
    "moved": with_list(ONE) | {"pos": 1.01 * ONE["pos"]},
    "another cell": with_list(ONE) | {"cell": 1.02 * ONE["cell"]},
    "other elements": with_list(OTHER),
    "padding": padded(with_list(ONE)),
    "open": with_list(ONE) | {"pbc": torch.tensor([[True, False, True]])},
    "two systems": with_list(TWO),
    "another share of the atoms": with_list(
        TWO | {"batch": torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])}
    ),
    "int64": with_list(ONE, dtype=torch.int64),
    "a longer list": with_list(ONE, skin=1.0),
    "another order": flipped(with_list(ONE)),
    "other offsets": doubled_offsets(with_list(ONE)),
    "no list": ONE,
    "int32 numbers": with_list(ONE) | {"atomic_numbers": ONE["atomic_numbers"].int()},
}
WANTED = {name: results(Embedded(), x) for name, x in CALLS.items()}


@settings(deadline=None)
@given(st.lists(st.sampled_from(sorted(CALLS)), min_size=2, max_size=8))
def test_any_order_of_calls_gives_what_a_new_model_gives(names):
    model = Embedded()
    for name in names:
        same(results(model, CALLS[name]), WANTED[name])


@pytest.mark.parametrize("other", CALLS)
@pytest.mark.parametrize("key", layout.INTEGERS)
def test_the_same_tensors_changed_in_place(key, other):
    """By the caller, between two calls: copies were kept."""
    x = {name: t.clone() for name, t in CALLS["one"].items()}
    y = CALLS[other]
    if key not in y or y[key].shape != x[key].shape or y[key].dtype != x[key].dtype:
        return
    model = Embedded()
    model(x)
    x[key].copy_(y[key])
    same(results(model, x), results(Embedded(), CALLS["one"] | {key: y[key]}))


@pytest.mark.parametrize("key", layout.INTEGERS)
def test_a_model_that_changes_them_in_place(key):
    """What was kept is not believed any more."""
    calls, evaluate = [], with_gradients(Embedded().energies)

    def changing(x):
        found = evaluate(x)
        calls.append(None)
        if len(calls) == 1:
            x[key].logical_not_() if key == "pbc" else x[key].add_(1)
        return found

    model = Wrapped(
        changing, bridge.Card(cutoff=CUTOFF, neighbor_list="given", batches=True), "model"
    )
    for _ in range(3):
        same(results(model, CALLS["one"]), WANTED["one"])


def counted(monkeypatch):
    times, own = [], layout._found
    monkeypatch.setattr(layout, "_found", lambda *a: times.append(1) or own(*a))
    return times


def test_once_for_all_steps(monkeypatch):
    """A jitted loop with a list: the integers are looked at in its first step."""
    model = Wrapped(Embedded().energies, CARD, "autograd")
    energy = bridge.potential(model, atomic_numbers=ONE["atomic_numbers"].numpy())
    edges = bridge.edges(CUTOFF + 0.5, 600)(R, H)

    @jax.jit
    def relax(r, h):
        step = lambda _, r: r - 1e-3 * jax.grad(lambda r: energy(r, h, **edges))(r)
        return jax.lax.fori_loop(0, 10, step, r)

    times = counted(monkeypatch)
    relax(R, H).block_until_ready()
    assert len(times) == 1


def test_large_ones_are_looked_at_anew(monkeypatch):
    monkeypatch.setattr(layout, "LARGEST", 20)
    times, model = counted(monkeypatch), Embedded()
    for _ in range(3):
        same(results(model, CALLS["one"]), WANTED["one"])
    assert len(times) == 3


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_modes_of_torch(mode):
    model = Embedded()
    for _ in range(2):
        with mode():
            same(results(model, CALLS["one"]), WANTED["one"])
        same(results(model, CALLS["one"]), WANTED["one"])


def test_threads():
    """Two at once with other graphs, through one model."""
    model, wrong = Embedded(), []

    def run(name):
        for _ in range(60):
            try:
                same(results(model, CALLS[name]), WANTED[name])
            except BaseException as e:
                wrong.append(e)

    threads = [
        threading.Thread(target=run, args=[name])
        for name in ("one", "other elements", "two systems", "padding")
    ]
    [t.start() for t in threads], [t.join() for t in threads]
    assert not wrong


def test_kept_as_long_as_the_model():
    model = Embedded()
    model(CALLS["one"])
    kept = weakref.ref(layout._last[model])
    del model
    gc.collect()
    assert kept() is None


def test_errors_come_each_time():
    """Also where good ones were seen before, and the other way round."""
    model, x = Embedded(), CALLS["one"]
    flat = x | {"cell": torch.zeros(1, 3, 3, dtype=torch.float64)}
    wrong = x["edge_index"].clone()
    wrong[0, 3] = -1
    for _ in range(2):
        same(results(model, x), WANTED["one"])
        with pytest.raises(ValueError, match="independent cell vectors on periodic axes"):
            model(flat)
        with pytest.raises(ValueError, match="in slot 3"):
            model(x | {"edge_index": wrong})
        with pytest.raises(ValueError, match="finite positions"):
            model(x | {"pos": x["pos"] * float("nan")})


# Edges that cross the cell: few of many.


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64])
@pytest.mark.parametrize("systems", [1, 2])
def test_few_edges_cross(systems, dtype):
    """In a cell of several cutoffs: the same as with every edge shifted."""
    sites = np.stack(np.meshgrid(*[np.arange(8)] * 3), -1).reshape(-1, 3) * 2.0
    pos = sites + 0.1 * np.random.default_rng(0).normal(size=sites.shape)
    numbers = np.full(len(pos), 6)
    cell = 16 * np.eye(3) + 0.1 * np.random.default_rng(1).normal(size=(3, 3))
    parts = [system(pos, (1 + 0.01 * k) * cell, numbers) for k in range(systems)]
    x = with_list(joined(*parts), 0.3)
    x["cell_offsets"] = x["cell_offsets"].to(dtype)
    found = layout.find(x, CARD, "a model")
    crossing = found.edges.crossing
    assert 0 < len(crossing) < found.inner["edge_index"].shape[1] / 2
    got = results(Embedded(), x)
    same(
        got,
        results(
            Embedded(),
            {key: v for key, v in x.items() if key not in ("edge_index", "cell_offsets")},
        ),
    )
    energy = Embedded().energies
    pos, cells = (x[key].clone().requires_grad_() for key in ("pos", "cell"))
    length = torch.linalg.vector_norm(vectors(x), dim=-1)
    near = (length < CUTOFF) & (x["edge_index"] < len(pos)).all(0)
    plain = x | {
        "pos": pos,
        "cell": cells,
        "edge_index": x["edge_index"][:, near].long(),
        "cell_offsets": x["cell_offsets"][near],
    }
    e = energy(plain)["energy"]
    same(got, [e.detach(), *torch.autograd.grad(e.sum(), (pos, cells))])


def vectors(x):
    """r_j - r_i + offsets @ cell, edge by edge; of unused slots anything."""
    i, j = x["edge_index"].long().clamp(max=len(x["pos"]) - 1)
    cells = x["cell"][x["batch"][i]]
    return (
        x["pos"][j]
        - x["pos"][i]
        + torch.einsum("ea,eab->eb", x["cell_offsets"].to(x["cell"].dtype), cells)
    )


# Lists in order, or as they are found.


def test_ordered_lists():
    edges = {
        how: neighbor_list(ONE["pos"], ONE["cell"], ONE["pbc"], 2 * CUTOFF, ordered=how)
        for how in (True, False)
    }
    rows = {
        how: [(*pair, *s) for pair, s in zip(i.T.tolist(), s.tolist())]
        for how, (i, s) in edges.items()
    }
    assert sorted(rows[False]) == sorted(rows[True]) and len(set(rows[True])) == len(rows[True])
    centres = {how: i[0].tolist() for how, (i, _) in edges.items()}
    assert centres[True] == sorted(centres[True]) and centres[False] != sorted(centres[False])


@pytest.mark.parametrize("ordered", [True, False])
def test_edges_of_the_bridge_in_order(ordered):
    find = bridge.edges(2 * CUTOFF, 3000, ordered=ordered)
    edges = jax.jit(find)(R, H)
    centres = edges["edge_index"][0].tolist()
    assert (centres == sorted(centres)) is ordered
    again = bridge.edges(2 * CUTOFF, 3000, ordered=ordered)
    assert again == find and jnp.array_equal(again(R, H)["edge_index"], edges["edge_index"])
