"""The benchmark of Monte Carlo moves: one JSON line for each case, verdicts that can fail, a
control that does no move. Timings are not judged."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from benchmarks import mc
from jax_side.montecarlo.local import Layout


@pytest.mark.full
def test_every_case_is_one_json_line_and_one_row_of_the_table(tmp_path, capsys):
    threads = torch.get_num_threads()
    assert (
        mc.main(
            ["--sizes", "27", "--moves", "3", "--rounds", "2", "--out", str(tmp_path / "mc.png")]
        )
        == 0
    )
    torch.set_num_threads(threads)
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    found = {
        r["name"]: r for r in map(json.loads, filter(lambda line: line.startswith("{"), lines))
    }
    cases = [f"{model}, {n} atoms" for model in ("JAX", "torch", "control") for n in (27,)]
    verdicts = [f"acceptance/{model}: a move at 27 atoms / at 27" for model in mc.MODELS]
    assert list(found) == ["environment", *cases, *verdicts]
    assert all(any(line.startswith(name) for line in lines) for name in (*cases, *verdicts))
    assert (
        all(found[case]["us"] >= found[case]["us_best"] > 0 for case in cases)
        and found["JAX, 27 atoms"]["speed_up"] > 0
    )
    assert all(
        found[v]["verdict"] == ("PASS" if found[v]["value"] <= 1.3 else "FAIL") for v in verdicts
    )
    assert found["environment"]["per_cell"] > 0 and (tmp_path / "mc.png").stat().st_size > 5_000


@pytest.mark.parametrize(
    "middle, last, word", [(1.2, 1.3, "PASS"), (1.0, 1.4, "FAIL"), (1.4, 1.0, "FAIL")]
)
def test_verdict_x_planted_times(middle, last, word):
    us = {"JAX": (100.0, 100 * middle, 100 * last), "control": (1.0, 9.0, 9.0)}
    sizes = (1000, 10000, 100000)
    times = {(model, n): [t, 2 * t, 3 * t] for model, row in us.items() for n, t in zip(sizes, row)}
    found = mc.rows(times, {("JAX", n): n * 1e-3 for n in sizes}, sizes, {})
    assert [r["verdict"] for r in found if "verdict" in r] == [word]
    assert (
        mc.table(found).endswith(word)
        and found[1]["speed_up"] == 5000
        and found[1]["without_control"] == 198.0
    )


def test_what_is_timed_is_a_move():
    """One that is accepted where it should: of all that a scan does, nothing is left out."""
    seen = []
    cache = SimpleNamespace(pos=jnp.zeros((27, 3)), layout=SimpleNamespace(atoms=27))
    fake = SimpleNamespace(
        update=lambda c, change: (0, -1.0, change),
        commit=lambda c, proposal, yes: seen.append((proposal, yes)) or c,
    )
    i, far, _ = mc.drawn(key := jax.random.key(1), 27)
    assert mc.step(fake, cache, key) == (cache, -1.0)
    [(change, yes)] = seen
    assert (
        change.index.tolist() == [i]
        and change.pos[0].tolist() == far.tolist()
        and abs(far).max() > 0
        and yes
    )


def test_systems_have_one_density_and_one_room(monkeypatch):
    systems = {n: mc.fluid(n) for n in (100, 343)}
    for n, graph in systems.items():
        assert len(graph["pos"]) == n and abs(n / np.linalg.det(graph["cell"]) - mc.DENSITY) < 1e-5
    rooms = iter(
        [
            Layout(100, 30, 90, (True,) * 3, (1,) * 3, (1,) * 3, 2.5),
            Layout(343, 40, 80, (True,) * 3, (2,) * 3, (1,) * 3, 2.5),
        ]
    )
    monkeypatch.setattr(mc.LocalPotential, "allocate", lambda self, graph: next(rooms))
    assert {(n, x.atoms, x.per_cell, x.neighbors) for n, x in mc.layouts(systems).items()} == {
        (100, 100, 40, 90),
        (343, 343, 40, 90),
    }
    in_order, shuffled = (np.asarray(mc.fluid(100, x)["pos"]) for x in (False, True))
    assert not np.array_equal(in_order, shuffled) and np.array_equal(
        np.sort(in_order, 0), np.sort(shuffled, 0)
    )
