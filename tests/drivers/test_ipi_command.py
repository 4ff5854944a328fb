"""python -m bridge ipi, and the calculators that it makes of models of either bank."""

import sys
import threading

import numpy as np
import pytest
from ase.calculators.lj import LennardJones
from ase.calculators.socketio import SocketIOCalculator
from ase.io import write

import bridge.__main__ as entry
from bridge.join.calculators import calculator
from jax_side.potentials.strain import with_gradients
from tests.driver_cases import CARD, CRYSTAL, with_calculator
from tests.planted import CUTOFF, right, right_jax
from torch_side.potentials.model import Wrapped
from torch_side.potentials.strain import with_gradients as in_torch

MODELS = """
import torch
from ase.calculators.lj import LennardJones
from tests.planted import right, right_jax

class Module(torch.nn.Module):
    def forward(self, x):
        return right(x)

def of_ase():
    return LennardJones(sigma=1.8, epsilon=0.05, rc=4, smooth=True)
"""
WAYS = {
    "a module of torch": ["models_here:Module", "--gradients", "autograd", "--cutoff", "3"],
    "a function of torch": [
        *["models_here:right", "--kind", "torch", "--gradients", "autograd", "--cutoff", "3"],
        *["--dtype", "float64"],
    ],
    "a function of JAX": [
        *["models_here:right_jax", "--kind", "jax", "--gradients", "autograd", "--cutoff", "3"],
        *["--dtype", "float64"],
    ],
    "a calculator": ["models_here:of_ase"],
}


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs the command where models_here.py and a structure lie: (exit code, output, errors)."""
    (tmp_path / "models_here.py").write_text(MODELS)
    write(tmp_path / "start.extxyz", CRYSTAL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.delitem(sys.modules, "models_here", raising=False)

    def run(model, *arguments, structure="start.extxyz"):
        code = entry.main(["ipi", model, structure, *arguments])
        return code, *capsys.readouterr()

    yield run
    sys.modules.pop("models_here", None)


@pytest.mark.parametrize("way", WAYS)
def test_a_server_x_models(command, name, way):
    found = []

    def serve():
        atoms = CRYSTAL.copy()
        with SocketIOCalculator(timeout=60, unixsocket=name) as server:
            atoms.calc = server
            found.extend([atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()])

    server = threading.Thread(target=serve, daemon=True)
    server.start()
    code, out, err = command(*WAYS[way], "--unix", name, "--wait", "30")
    server.join(30)
    assert (code, out, err) == (0, "1 structures\n", "")
    wanted = with_calculator()
    if way == "a calculator":
        wanted.calc = LennardJones(sigma=1.8, epsilon=0.05, rc=4, smooth=True)
    assert abs(found[0] - wanted.get_potential_energy()) < 1e-9
    np.testing.assert_allclose(found[1], wanted.get_forces(), atol=1e-9)
    np.testing.assert_allclose(found[2], wanted.get_stress(), atol=1e-10)


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["models_here:of_ase", "--unix", "nobody", "--wait", "0"], "at /tmp/ipi_nobody, got none"),
        (
            ["models_here:right", "--port", "1", "--wait", "0"],
            'expected kind="torch" or kind="jax"',
        ),
        (["models_here"], "expected module:factory, got 'models_here'"),
        (["models_here:of_ase", "--kind", "tf"], "invalid choice: 'tf'"),
        (["models_here:of_ase", "--port", "high"], "invalid int value: 'high'"),
    ],
)
def test_bad_arguments_x_code_two(command, arguments, text):
    code, out, err = command(*arguments)
    assert code == 2 and text in err and not out


def test_no_structure_x_code_two(command):
    code, _, err = command("models_here:of_ase", structure="nowhere.xyz")
    assert code == 2 and "expected a file with a structure, got nowhere.xyz: FileNotFound" in err


def test_virial_and_address_x_options():
    options = entry._parsed_for_ipi(["m:f", "a.xyz", "--no-virial", "--host", "h", "--port", "7"])
    assert (options.virial, options.host, options.port, options.unix) == (False, "h", 7, None)
    assert entry._parsed_for_ipi(["m:f", "a.xyz"]).virial


@pytest.mark.parametrize(
    "model, options",
    [
        (Wrapped(right, CARD, "autograd"), {}),
        (in_torch(right), {"kind": "torch", "cutoff": CUTOFF}),
        (with_gradients(right_jax), {"kind": "jax", "cutoff": CUTOFF}),
    ],
)
def test_calculators_x_gradients_of_their_own(model, options):
    atoms = CRYSTAL.copy()
    atoms.calc = calculator(model, **options)
    wanted = with_calculator()
    np.testing.assert_allclose(atoms.get_forces(), wanted.get_forces(), atol=1e-9)
    np.testing.assert_allclose(atoms.get_stress(), wanted.get_stress(), atol=1e-10)


def test_a_calculator_of_an_unknown_kind():
    with pytest.raises(
        TypeError, match='expected kind="torch" or kind="jax", got a function, which'
    ):
        calculator(right)
    with pytest.raises(
        ValueError, match="expected kind as one of 'torch', 'jax', 'ase', None, got"
    ):
        calculator(right, kind="numpy")
