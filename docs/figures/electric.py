"""Draws electric.png, the figure of docs/electric.md: python docs/figures/electric.py."""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import torch
from ase import Atoms, units
from ase.vibrations import Infrared

import bridge
from bridge.card import Card
from jax_side.properties import electric
from torch_side.engines.ase import calculator
from torch_side.potentials.model import Wrapped

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LENGTH, COSINE, WIDTH = 0.96, -0.25, 30.0
MASSES = np.array([15.999, 1.008, 1.008])
SINE = np.sqrt((1 - COSINE) / 2)
R = LENGTH * np.array(
    [[0, 0, 0], [SINE, 0, np.sqrt(1 - SINE**2)], [-SINE, 0, np.sqrt(1 - SINE**2)]]
)


def water(x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The molecule of the page, without a field."""
    bonds = x["pos"][1:] - x["pos"][:1]
    d = bonds.norm(dim=-1)
    cosine = (bonds[0] * bonds[1]).sum() / d.prod()
    energy = 25 * ((d - LENGTH) ** 2).sum() + 2 * (cosine - COSINE) ** 2
    dipole = ((0.4 + 0.35 * (d - LENGTH))[:, None] * bonds).sum(0)
    return {"energy": energy[None], "dipole": dipole[None]}


def main() -> None:
    """Writes the figure beside this file."""
    jax.config.update("jax_enable_x64", True)
    card = Card(outputs=("energy", "position_gradients", "cell_gradients", "dipole"))
    model = Wrapped(water, card, "autograd").asking("dipole")
    energy = bridge.potential(model, atomic_numbers=np.array([8, 1, 1]))
    mine = electric.infrared(energy, jnp.asarray(R), None, MASSES)
    atoms = Atoms([8, 1, 1], R, masses=MASSES)
    atoms.calc = calculator(model)
    with tempfile.TemporaryDirectory() as folder:
        theirs = Infrared(atoms, name=f"{folder}/ir", delta=1e-3)
        theirs.run()
        theirs.read()
    lines = np.real(theirs.get_frequencies())[6:]
    heights = theirs.intensities[6:] * units.Debye**2 * electric.KM_PER_MOL
    grid = np.linspace(1000, 4500, 1400)
    away = grid - np.asarray(mine.frequencies)[6:, None]
    shape = WIDTH / 2 / np.pi / (away**2 + (WIDTH / 2) ** 2)  # of area 1
    spectrum = (np.asarray(mine.intensities)[6:, None] * shape).sum(0)
    figure, axes = plt.subplots(figsize=(6.4, 3.2))
    axes.plot(grid, spectrum, color="#1f6fb4", label="derivatives of the model")
    axes.plot(
        lines, heights * 2 / np.pi / WIDTH, "x", color="#d1682a", label="ASE, finite differences"
    )
    print(np.asarray(mine.frequencies)[6:], lines, np.asarray(mine.intensities)[6:], heights)
    axes.set(xlabel="wave number (1/cm)", ylabel="absorption (km/mol per 1/cm)")
    axes.legend(frameon=False)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
