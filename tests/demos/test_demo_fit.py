"""The demo of a JAX potential in a torch loop: it learns, at two JAX calls for a step of training
and one for a step of the run."""

import numpy as np
import pytest
import torch

import bridge
from demos import fit
from demos.crystals import Batch, inputs_of, strained
from tests.potential_cases import PARAMS, bonds

TINY = (
    "--repeat 1 --train 6 --test 2 --batch 2 --steps 150 --lr 0.05 --layers 1 --hidden 4x0e --md 20"
)
NONSENSE = {
    "--steps 0": "argument --steps: expected a number (int) at least 1, got 0; give such a number",
    "--dt 11": "argument --dt: expected a number (float) from 0.01 to 10.0, got 11; give such a number",
    "--batch 65": "argument --batch: expected at most --train 64, got 65; change one of them",
    "--metal Unobtainium": "argument --metal: invalid choice: 'Unobtainium'",
    "--out a_file": "argument --out: expected a folder, got the file",
}


@pytest.mark.parametrize("args", NONSENSE)
def test_nonsense_is_refused_in_one_clear_line(args, refused_line):
    assert NONSENSE[args] in refused_line(fit.options, args)


def test_a_step_of_training_is_two_jax_calls_and_one_of_the_run_is_one(tmp_path, capsys):
    fit.main([*TINY.split(), "--out", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    rows = {line[:22].strip(): line[22:].split() for line in lines if len(line) > 60}
    assert [rows[name][1] for name in ("errors, before", "Adam in torch", "NVE in ASE")] == [
        "1.00",
        "2.00",
        "1.00",
    ]
    # a forward and a backward for each rung of edges
    assert int(rows["Adam in torch"][2]) <= 4 and int(rows["NVE in ASE"][2]) <= 2
    energy, forces, stress = (
        float(rows["train, after"][k]) / float(rows["train, before"][k]) for k in range(3)
    )
    assert forces < 0.8 and energy < 1
    assert (tmp_path / "fit.png").stat().st_size > 10_000


def test_stress_errors_are_those_of_ase():
    """The signs and units that the table relies on: a potential of our own beside ASE's numerical
    stress."""
    model = bridge.torch_potential(
        bonds, {k: v.astype("float32") for k, v in PARAMS.items()}, gradients="autodiff", cutoff=3.5
    ).requires_grad_(False)
    atoms = strained("Cu", 1, 1, 0)[0]
    batch = Batch([atoms], 3.5)
    stress = batch.errors(model(batch.inputs))[2] + batch.stress
    numerical, h = np.zeros((3, 3)), 1e-2
    for a, b in ((0, 0), (1, 1), (0, 2)):
        energies = []
        for s in (h, -h):
            strain = np.eye(3)
            strain[a, b] += s
            moved = atoms.copy()
            moved.set_cell(atoms.cell.array @ strain, scale_atoms=True)
            energies.append(float(model(inputs_of([moved]))["energy"]))
        numerical[a, b] = (energies[0] - energies[1]) / (2 * h * atoms.get_volume())
        assert abs(numerical[a, b] - float(stress[0, a, b])) < 0.02 * float(stress.abs().max())
    assert torch.is_tensor(stress)
