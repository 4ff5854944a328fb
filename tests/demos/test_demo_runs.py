"""Long runs in chunks: the same bits after a checkpoint, whole files at every moment, Ctrl-C,
refusals; observables beside ASE's."""

import functools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import ase.build
import ase.io
import ase.neighborlist
import ase.units
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase.calculators.singlepoint import SinglePointCalculator
from jax_md import simulate, space

from demos import observables, runs
from jax_side.engines import jax_md as engine
from tests.matrices import a_few

N = 4


def langevin(dtype=jnp.float64):
    """A jax-md state with a PRNG key in it, its step, what is seen of it, its frames: everything
    made anew."""
    energy_fn = lambda R, **_: (R**4).sum() + jnp.sin(3 * R).sum()
    init, step = engine.observed(
        simulate.nvt_langevin, energy_fn, space.free()[1], 0.01, 0.3, gamma=0.5
    )
    state, _ = init(
        jax.random.key(7), jnp.arange(3.0 * N, dtype=dtype).reshape(N, 3) / 10, mass=2.0
    )

    def observe(state, energy):
        return {"energy": energy, "R": state.position}

    def frames(state, last):
        atoms = ase.Atoms("H4", positions=np.asarray(state.position))
        atoms.calc = SinglePointCalculator(atoms, energy=float(last["energy"]))
        return {"a": atoms, "b": atoms}

    return dict(step=step, state=state, observe=observe, frames=frames)


def toy(dtype=jnp.float64, seed=7):
    """The same in small: a random walk."""

    def step(state):
        key, now = jax.random.split(state["key"])
        return dict(key=key, R=state["R"] + jax.random.normal(now, (N, 3), dtype))

    frames = lambda state, last: {
        name: ase.Atoms("H4", positions=np.asarray(state["R"])) for name in "ab"
    }
    state = dict(key=jax.random.key(seed), R=jnp.zeros((N, 3), dtype))
    return dict(
        step=step, state=state, observe=lambda state, _: {"energy": state["R"].sum()}, frames=frames
    )


def leaves(state):
    return [
        np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
        for x in jax.tree.leaves(state)
    ]


def same(path, other, run, whole):
    for ours, theirs in zip(leaves(run.state), leaves(whole.state), strict=True):
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
    assert {k: v.tolist() for k, v in run.observables.items()} == {
        k: v.tolist() for k, v in whole.observables.items()
    }
    for suffix in ("-a.extxyz", "-b.extxyz", ".jsonl"):
        assert runs._beside(path, suffix).read_bytes() == runs._beside(other, suffix).read_bytes()


def test_a_run_from_a_checkpoint_ends_with_the_same_bits(tmp_path):
    whole = runs.run(**langevin(), steps=12, chunk=3, path=tmp_path / "whole")
    first = runs.run(**langevin(), steps=6, chunk=3, path=tmp_path / "parts")
    rest = runs.run(**langevin(), steps=12, chunk=3, path=tmp_path / "parts", resume=True)
    assert (
        first.finished
        and rest.finished
        and not np.array_equal(leaves(first.state)[0], leaves(rest.state)[0])
    )
    same(tmp_path / "parts", tmp_path / "whole", rest, whole)
    assert len(ase.io.read(tmp_path / "parts-a.extxyz", ":")) == 4 and rest.observables[
        "R"
    ].shape == (12, N, 3)


def test_another_seed_has_other_bits(tmp_path):
    """The twin of the test above: bits that differ are seen."""
    a, b = (
        runs.run(**x, steps=3, chunk=3, path=tmp_path / name)
        for x, name in ((toy(), "a"), (toy(seed=8), "b"))
    )
    with pytest.raises(AssertionError):
        same(tmp_path / "a", tmp_path / "b", a, b)


def test_what_was_written_after_the_checkpoint_is_cut_off(tmp_path):
    """As a killed process leaves it: frames and lines of a later chunk, the last of them torn."""
    whole = runs.run(**toy(), steps=9, chunk=3, path=tmp_path / "whole")
    runs.run(**toy(), steps=3, chunk=3, path=tmp_path / "killed")
    old = (tmp_path / "killed.ckpt.npz").read_bytes()
    runs.run(**toy(), steps=6, chunk=3, path=tmp_path / "killed", resume=True)
    (tmp_path / "killed.ckpt.npz").write_bytes(old)
    for name in ("killed-a.extxyz", "killed.jsonl"):
        with open(tmp_path / name, "ab") as file:
            file.write(b"4\nLattice=")
    (tmp_path / "killed-late.extxyz").write_text("a trajectory that the checkpoint does not know\n")
    rest = runs.run(**toy(), steps=9, chunk=3, path=tmp_path / "killed", resume=True)
    same(tmp_path / "killed", tmp_path / "whole", rest, whole)
    assert not (tmp_path / "killed-late.extxyz").exists()


def test_a_new_run_of_the_same_name_starts_with_empty_files(tmp_path):
    for _ in range(2):
        runs.run(**toy(), steps=3, chunk=3, path=tmp_path / "run")
    assert (
        len(ase.io.read(tmp_path / "run-a.extxyz", ":")) == 1
        and len((tmp_path / "run.jsonl").read_text().splitlines()) == 3
    )


def test_without_observables_and_frames_there_is_a_checkpoint_alone(tmp_path):
    run = runs.run(lambda x: x + 1, jnp.zeros(3), 4, chunk=2, path=tmp_path / "deep" / "run")
    assert (
        run.state.tolist() == [4.0, 4.0, 4.0]
        and run.observables == {}
        and (tmp_path / "deep" / "run.ckpt.npz").exists()
    )


def test_numbers_of_python_in_a_state_stay_weak(tmp_path):
    step, given = (
        lambda s: dict(x=s["x"] * s["tau"], tau=s["tau"]),
        dict(chunk=2, path=tmp_path / "run"),
    )
    state = dict(x=jnp.ones(2, jnp.float32), tau=0.5)
    runs.run(step, state, 2, **given)
    run = runs.run(step, state, 4, **given, resume=True)
    assert run.state["x"].dtype == jnp.float32 and run.state["x"].tolist() == [0.0625, 0.0625]


REFUSED = {
    "another chunk": (dict(chunk=2), "{'chunk': 2}, got one with {'chunk': 3}"),
    "other settings": (dict(settings={"T": 1.0}), "{'T': 1.0}, got one with {'T': None}"),
    "fewer steps": (dict(steps=3), "a checkpoint of at most 3 steps, got one of 6"),
    "float32": (dict(**toy(jnp.float32)), "of other shapes or dtypes"),
    "no trajectory": (lambda path: (path / "run-b.extxyz").unlink(), "run-b.extxyz with at least"),
    "a torn checkpoint": (
        lambda path: (path / "run.ckpt.npz").write_bytes((path / "run.ckpt.npz").read_bytes()[:99]),
        "which can't be read",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_checkpoint_that_does_not_fit_is_refused(case, tmp_path):
    runs.run(**toy(), steps=6, chunk=3, path=tmp_path / "run")
    change, text = REFUSED[case]
    given = dict(steps=12, chunk=3) | toy() | (change if isinstance(change, dict) else {})
    if callable(change):
        change(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="expected .*, got .*; ") as error:
        runs.run(**given, path=tmp_path / "run", resume=True)
    assert text in str(error.value)
    assert before == {file.name: file.read_bytes() for file in tmp_path.iterdir()}


def test_chunks_must_divide_the_steps(tmp_path):
    with pytest.raises(
        ValueError,
        match="expected steps as a multiple of chunk, got steps 5, chunk 2; change one of them",
    ):
        runs.run(lambda x: x, jnp.zeros(()), 5, chunk=2, path=tmp_path / "run")


def test_an_error_of_the_model_arrives_and_the_checkpoint_stands(tmp_path):
    import bridge

    class Broken(Exception):
        pass

    calls = []

    def model(x):
        calls.append(1)
        if len(calls) == 5:
            raise Broken("once")
        return x + 1

    step = bridge.to_jax(model, outputs=jax.ShapeDtypeStruct((2,), jnp.float64))
    given = dict(chunk=2, path=tmp_path / "run", observe=lambda x, _: {"x": x})
    with pytest.raises(Broken, match="once"):
        runs.run(step, jnp.zeros(2), 8, **given)
    assert len((tmp_path / "run.jsonl").read_text().splitlines()) == 4
    assert runs.run(step, jnp.zeros(2), 8, **given, resume=True).observables["x"][
        :, 0
    ].tolist() == list(range(1, 9))


SCRIPT = """
    import sys, time, torch, jax, jax.numpy as jnp, numpy as np, ase, bridge
    from demos import runs

    def model(x):
        time.sleep(0.003)
        return x + 1

    step = bridge.to_jax(model, outputs=jax.ShapeDtypeStruct((2, 3), jnp.float32))
    frames = lambda x, last: {"t": ase.Atoms("H2", positions=np.asarray(x), info={"x": last["x"].item()})}
    run = runs.run(step, jnp.zeros((2, 3), jnp.float32), 40000, chunk=4, path=sys.argv[1], observe=lambda x, _: {"x": x[0, 0]}, frames=frames)
    print("DONE", run.done, run.finished, flush=True)
"""


def test_ctrl_c_in_a_process_leaves_readable_files_and_a_run_that_goes_on(tmp_path):
    """A reader beside it finds whole frames at any moment; another process goes on."""
    code, root = (
        textwrap.dedent(SCRIPT),
        str(Path(__file__).resolve().parents[2]),
    )
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    counts, trajectory = [], tmp_path / "run-t.extxyz"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")], cwd=root, **pipes
    ) as process:
        while len(set(counts)) < 6 and process.poll() is None:
            if trajectory.exists() and trajectory.stat().st_size:
                counts.append(len(ase.io.read(trajectory, ":")))
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "this chunk ends first" in said and "Traceback" not in said
    done = json.loads(np.load(tmp_path / "run.ckpt.npz")["meta"].item())["done"]
    assert (
        4 <= done < 40000
        and done % 4 == 0
        and f"stopped after {done} of 40000 steps; to go on" in said
        and f"DONE {done} False" in said
    )
    assert counts == sorted(counts) and [
        atoms.info["x"] for atoms in ase.io.read(trajectory, ":")
    ] == list(range(4, done + 1, 4))
    frames = lambda x, last: {
        "t": ase.Atoms("H2", positions=np.asarray(x), info={"x": last["x"].item()})
    }
    more = dict(
        chunk=4,
        path=tmp_path / "run",
        observe=lambda x, _: {"x": x[0, 0]},
        frames=frames,
        resume=True,
    )
    run = runs.run(lambda x: x + 1, jnp.zeros((2, 3), jnp.float32), done + 8, **more)
    read = ase.io.read(trajectory, ":")
    assert (
        run.finished
        and [atoms.info["x"] for atoms in read] == list(range(4, done + 9, 4))
        and (read[-1].positions == done + 8).all()
    )
    assert run.observables["x"].tolist() == list(range(1, done + 9))


@pytest.mark.parametrize("times", [1, 2])
def test_the_second_ctrl_c_does_not_wait_for_the_chunk(times, tmp_path, capsys):
    import bridge

    calls, handler = [], signal.getsignal(signal.SIGINT)

    def model(x):
        calls.append(1)
        if len(calls) == 6:  # the second chunk, in the middle
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.05)
        return x + 1

    step = bridge.to_jax(model, outputs=jax.ShapeDtypeStruct((2,), jnp.float64))
    given = dict(chunk=4, path=tmp_path / "run", observe=lambda x, _: {"x": x})
    run = runs.run(step, jnp.zeros(2), 400, **given)
    done = {1: 8, 2: 4}[times]
    assert (
        not run.finished
        and run.done == done == len(run.observables["x"])
        and run.state.tolist() == [done, done]
    )
    assert (
        f"stopped after {done} of 400 steps; to go on" in capsys.readouterr().out
        and signal.getsignal(signal.SIGINT) is handler
    )
    again = runs.run(step, jnp.zeros(2), 12, **given, resume=True)
    assert again.finished and again.observables["x"][:, 1].tolist() == list(range(1, 13))


@functools.cache
def crystal(fractional):
    """400 steps of NPT in a triclinic crystal: the last state, what was seen, the energy function,
    kT and pressure."""
    atoms = ase.build.bulk("NaCl", "rocksalt", a=5.6, cubic=True)
    atoms.set_cell(atoms.cell.array + np.tril(np.full((3, 3), 0.3)), scale_atoms=True)
    box, kT, P0, fs = jnp.asarray(atoms.cell.array.T), 0.05, 0.002, ase.units.fs
    home, V0 = jnp.asarray(atoms.get_scaled_positions()), 1.05 * atoms.get_volume()

    def potential(r, cell):
        """Springs to the sites of the lattice, smooth over its period, and a crystal that wants to
        be larger."""
        d = jnp.sin(2 * jnp.pi * (r @ jnp.linalg.inv(cell) - home)) / (2 * jnp.pi) @ cell
        return (
            d**2 @ jnp.array([2.0, 2.5, 3.0]) @ jnp.ones(len(r))
            + 0.1 * (jnp.linalg.det(cell) - V0) ** 2 / V0
        )

    energy_fn = engine.energy(potential, fractional=fractional)
    shift = (
        space.periodic_general(box, fractional_coordinates=True)[1]
        if fractional
        else space.free()[1]
    )
    R, chains = home if fractional else jnp.asarray(atoms.positions), dict(tau=100 * fs)
    init, step = engine.npt_nose_hoover(
        energy_fn, shift, fs, P0, kT, barostat_kwargs=chains, thermostat_kwargs=chains
    )

    def one(state, _):
        state = step(state)
        return state, observables.thermodynamics(state, kT=kT, pressure=P0)

    run = jax.jit(
        lambda key: jax.lax.scan(
            one, init(key, R, box, mass=jnp.asarray(atoms.get_masses())), None, length=400
        )
    )
    return atoms, *run(jax.random.key(0)), energy_fn, kT, P0


def test_observables_are_those_of_ase():
    atoms, state, seen, energy_fn, kT, P0 = crystal(fractional=False)
    seen = {name: np.asarray(x[-1]) for name, x in seen.items()}
    found = observables.frame(atoms, jax.tree.map(np.asarray, state), seen)
    W = np.asarray(
        jax.grad(lambda P: energy_fn(state.position, box=state.box, perturbation=P))(jnp.eye(3))
    )
    np.testing.assert_allclose(
        found.get_stress(voigt=False, include_ideal_gas=False),
        0.5 * (W + W.T) / found.get_volume(),
        atol=1e-9,
    )
    stress = found.get_stress(voigt=False, include_ideal_gas=True)
    np.testing.assert_allclose(0.5 * (seen["stress"] + seen["stress"].T), stress, atol=1e-7)
    # the kinetic part shows
    assert abs(found.get_stress(voigt=False, include_ideal_gas=False) - stress).max() > 1e-4
    assert float(seen["pressure"]) == pytest.approx(-np.trace(stress) / 3, abs=1e-7)
    assert float(seen["volume"]) == pytest.approx(found.get_volume(), rel=1e-7)
    assert float(seen["density"]) == pytest.approx(
        found.get_masses().sum() * 1.66053906660 / found.get_volume(), rel=1e-6
    )
    assert float(seen["temperature"]) == pytest.approx(found.get_temperature() * 8 / 7, rel=1e-6)
    assert float(seen["conserved"]) == pytest.approx(
        float(simulate.npt_nose_hoover_invariant(energy_fn, state, P0, kT)), abs=1e-6
    )
    assert (
        found.info["temperature"] == seen["temperature"]
        and found.get_potential_energy() == seen["potential"]
    )


@pytest.mark.parametrize("fractional", a_few([False, True], [True]))
def test_npt_conserves_in_real_coordinates(fractional):
    """jax-md strains R itself, so that for fractions the quantity drifts: the demo's choice of real
    coordinates is no taste."""
    seen = crystal(fractional)[2]
    assert np.ptp(seen["volume"]) > 1.0 and np.ptp(seen["potential"]) > 0.1
    assert (np.ptp(seen["conserved"]) < 1e-3) != fractional, np.ptp(seen["conserved"])


def test_other_states_have_their_own_conserved_quantity():
    energy_fn = lambda R, **_: (R**2).sum()
    init, step = engine.observed(simulate.nvt_nose_hoover, energy_fn, space.free()[1], 0.01, 0.1)
    state, energy = step(init(jax.random.key(0), jnp.ones((4, 3)))[0])
    seen = observables.thermodynamics(state, energy=energy, kT=0.1)
    assert float(seen["conserved"]) == pytest.approx(
        float(simulate.nvt_nose_hoover_invariant(energy_fn, state, 0.1)), rel=1e-6
    )
    assert set(seen) == {"potential", "kinetic", "temperature", "conserved"}
    with pytest.raises(
        ValueError,
        match="expected kT for the conserved quantity of NVTNoseHooverState, got None; pass kT in eV",
    ):
        observables.thermodynamics(state, energy=energy)
    with_box = observables.thermodynamics(
        state, energy=energy, kT=0.1, virial=jnp.zeros((3, 3)), box=2.0 * jnp.eye(3)
    )
    assert float(with_box["pressure"]) == pytest.approx(
        2 * float(with_box["kinetic"]) / 24, rel=1e-6
    )


@pytest.mark.parametrize(
    "cell",
    [
        5.0 * np.eye(3),
        [[4.0, 0, 0], [3.1, 4.2, 0], [-2.0, 1.5, 5.0]],
        [[9.0, 0, 0], [0, 2.5, 0], [0, 0, 12.0]],
    ],
)
def test_pairs_are_counted_with_all_images(cell):
    """Beside ASE's neighbour list; r_max is far beyond half the cell, atoms are anywhere."""
    rng, r_max, bins = np.random.default_rng(0), 7.0, 20
    atoms = ase.Atoms(
        "NaClNaClNa", cell=cell, pbc=True, scaled_positions=rng.uniform(-1.5, 2.5, (5, 3))
    )
    pairs = observables.PairHistogram(atoms.get_chemical_symbols(), atoms.cell.array, r_max, bins)
    counts = (
        jax.jit(pairs.counts)(jnp.asarray(atoms.positions), jnp.asarray(atoms.cell.array))
        / atoms.get_volume()
    )
    i, j, d = ase.neighborlist.neighbor_list("ijd", atoms, r_max)
    for a, first in enumerate(pairs.names):
        for b, second in enumerate(pairs.names):
            chosen = (atoms.symbols[i] == first) & (atoms.symbols[j] == second)
            np.testing.assert_allclose(
                counts[a, b], np.histogram(d[chosen], bins, (0, r_max))[0], rtol=1e-12
            )
    shrunk = pairs.counts(jnp.asarray(atoms.positions), 0.5 * jnp.asarray(atoms.cell.array))
    assert np.isnan(shrunk).all()


def test_g_of_r_is_one_without_order():
    rng, cell = np.random.default_rng(1), 6.0 * np.eye(3)
    pairs = observables.PairHistogram(["A"] * 20 + ["B"] * 10, cell, r_max=8.0, bins=4)
    total = sum(
        np.asarray(pairs.counts(jnp.asarray(rng.uniform(0, 6, (30, 3))), jnp.asarray(cell)))
        for _ in range(20)
    )
    r, g = pairs.rdf(total, 20)
    assert r.tolist() == [1.0, 3.0, 5.0, 7.0]
    np.testing.assert_allclose(g[0, 1], 1.0, atol=0.05)
    np.testing.assert_allclose(g[1, 1], 0.9, atol=0.15)  # (N-1)/N of the others, and its own images


def test_block_averages():
    noise = np.random.default_rng(0).normal(size=80_000)
    mean, error = observables.averaged(noise, 100)
    assert abs(mean) < 0.02 and error == pytest.approx(1 / np.sqrt(80_000), rel=0.2)
    # neighbours alike
    assert observables.averaged(np.repeat(noise[:800], 100), 100)[1] == pytest.approx(
        1 / np.sqrt(800), rel=0.25
    )
    with pytest.raises(
        ValueError, match="expected from 2 to 3 blocks of 3 values, got 8; take fewer"
    ):
        observables.averaged([1.0, 2.0, 3.0], 8)
