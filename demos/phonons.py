"""Phonons of a crystal with SevenNet-0: bands, density of states and Grueneisen parameters from one
jitted Hessian of a supercell; with --volumes 5 thermal expansion as well.

    make demo-phonons        or        python -m demos.phonons --help

Ends with a table of frequencies, and a PNG, in demos/out.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import ase.build
import ase.units
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import bridge
from demos.arguments import add_device, at_least, device
from demos.md import CRYSTALS
from jax_side.potentials.second import elastic_constants
from jax_side.properties import elastic, phonons, thermal
from torch_side.models.sevennet import SevenNet

# the transverse optical mode at q = 0 by experiment at room temperature, THz: the textbooks' 164 and
# 401 (infrared) and 520 cm^-1 (Raman)
MEASURED = {"NaCl": 4.9, "MgO": 12.0, "Si": 15.6}
POINTS = "GXWKL"


def options(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m demos.phonons", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--crystal", choices=CRYSTALS, default="NaCl")
    parser.add_argument(
        "--repeat",
        type=at_least(int, 1),
        help="primitive cells along each axis of the supercell (default: as many as the model's "
        "cutoff needs)",
    )
    parser.add_argument("--points", type=at_least(int, 10), default=200, help="of the path")
    parser.add_argument(
        "--mesh", type=at_least(int, 1), default=16, help="wave vectors along each axis"
    )
    parser.add_argument(
        "--volumes",
        type=at_least(int, 0),
        default=0,
        help="at which phonons are made for the thermal expansion: 4 or more (default: none)",
    )
    parser.add_argument("--chunk", type=at_least(int, 1), help="rows of the Hessian at a time")
    parser.add_argument("--out", type=Path, default=Path("demos/out"))
    add_device(parser)
    chosen = parser.parse_args(argv)
    chosen.device = device(parser, chosen)
    if 0 < chosen.volumes < thermal.PARAMETERS:
        parser.error(
            f"argument --volumes: expected 0 or at least {thermal.PARAMETERS}, got "
            f"{chosen.volumes}; give one of these"
        )
    if chosen.out.exists() and not chosen.out.is_dir():
        parser.error(f"argument --out: expected a folder, got the file {chosen.out}; name another")
    return chosen


def timed(name, f, *arguments):
    """The result, and a line that says how long it took."""
    began = time.perf_counter()
    result = jax.block_until_ready(f(*arguments))
    print(f"{name:42}{time.perf_counter() - began:8.1f} s", flush=True)
    return result


def run(chosen) -> dict:
    model = SevenNet("7net-0").double().to(chosen.device)
    atoms = ase.build.bulk(chosen.crystal, **CRYSTALS[chosen.crystal])
    small = bridge.potential(model, atomic_numbers=atoms.numbers, pbc=True)
    print(f"{chosen.crystal}; jax {jax.__version__}, torch float64, {chosen.device}")

    relax = jax.jit(partial(elastic.at_pressure, small, steps=6))
    home = jnp.array(atoms.positions), jnp.array(atoms.cell.array)
    at = timed("atoms and cell relaxed", relax, *home)
    if not (at.force < 1e-3 and at.strain < 1e-4):
        raise RuntimeError(f"the crystal is not at rest: force {at.force}, strain {at.strain}")
    r, h = at.positions, at.cell
    atoms.set_cell(np.asarray(h), scale_atoms=True)
    stiffness = timed(
        "elastic constants", jax.jit(partial(elastic_constants, small, stiffness="stress")), r, h
    )

    shortest = np.linalg.norm(np.asarray(h), axis=1).min()
    n = chosen.repeat or int(np.ceil(2 * model.card.cutoff / shortest))
    large = bridge.potential(model, atomic_numbers=(atoms * n).numbers, pbc=True)
    repeats, masses = (n, n, n), atoms.get_masses()
    make = lambda r, h: phonons.phonons(large, r, h, masses, repeats, chunk=chosen.chunk)
    found = timed(f"Hessian, {3 * len(atoms)} rows of {3 * len(atoms) * n**3}", make, r, h)
    slope = timed(
        "its derivative in the volume",
        partial(phonons.volume_slope, large, found, chunk=chosen.chunk),
    )

    path = atoms.cell.bandpath(npoints=chosen.points)
    f = np.asarray(found.frequencies(path.kpts))
    gamma = np.asarray(found.gruneisen(path.kpts, slope))
    axis = np.linspace(min(0.0, f.min()), 1.05 * f.max(), 300)
    mesh = 3 * (chosen.mesh,)
    dos = np.asarray(found.dos(mesh, axis, width=f.max() / 80))
    expansion = None
    if chosen.volumes:
        scaled = thermal.scaled(r, h, np.linspace(0.99, 1.03, chosen.volumes))
        bar = tqdm(scaled, desc="phonons of volumes", unit="volume", file=sys.stdout)
        temperatures = np.arange(0.0, 610.0, 10.0)
        expansion = thermal.expansion(
            large, bar, masses, repeats, temperatures, mesh=mesh, chunk=chosen.chunk
        )
    return dict(
        atoms=atoms,
        phonons=found,
        path=path,
        frequencies=f,
        gruneisen=gamma,
        axis=axis,
        dos=dos,
        stiffness=np.asarray(stiffness),
        expansion=expansion,
    )


def table(found, chosen) -> str:
    special = {k: q for k, q in found["path"].special_points.items() if k in POINTS}
    f = {k: np.asarray(found["phonons"].frequencies(q)) for k, q in special.items()}
    b = found["stiffness"] / ase.units.GPa
    born = elastic.born(b)
    lines = [
        f"lattice constant {np.sqrt(2) * np.linalg.norm(found['atoms'].cell[0]):8.4f} A",
        f"C11, C12, C44    {b[0, 0]:8.2f}{b[0, 1]:8.2f}{b[3, 3]:8.2f} GPa; Born's eigenvalues "
        f"{'all positive' if born.stable else 'not all positive: unstable'}",
        *(f"{k:17}{''.join(f'{x:8.3f}' for x in row)} THz" for k, row in f.items()),
        f"sum rule off by {found['phonons'].drift:.1e}, force constants at the border "
        f"{found['phonons'].border:.1e} of the largest",
    ]
    if chosen.crystal in MEASURED:
        lines.append(f"transverse optical mode at G, measured: {MEASURED[chosen.crystal]} THz")
    if (heat := found["expansion"]) is not None:
        at = int(np.searchsorted(heat.temperatures, 300.0))
        lines.append(
            f"at 300 K: expansion {1e6 * heat.expansion[at] / 3:.1f} 1e-6/K along an axis, bulk "
            f"modulus {heat.bulk_moduli[at] / ase.units.GPa:.1f} GPa, Grueneisen "
            f"{heat.gruneisen[at]:.2f}"
        )
    return "\n".join(lines)


def picture(found, chosen, path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    heat = found["expansion"]
    widths = [3, 1] if heat is None else [3, 1, 1.7]
    figure, axes = plt.subplots(
        1,
        len(widths),
        figsize=(3 + 1.5 * sum(widths), 4.2),
        width_ratios=widths,
        layout="constrained",
    )
    x, ticks, names = found["path"].get_linear_kpoint_axis()
    x = np.repeat(x[:, None], found["frequencies"].shape[1], 1)
    limit = np.nanpercentile(abs(found["gruneisen"]), 99)
    colours = axes[0].scatter(
        x,
        found["frequencies"],
        c=found["gruneisen"],
        s=3,
        cmap="coolwarm",
        vmin=-limit,
        vmax=limit,
        plotnonfinite=True,
    )
    figure.colorbar(colours, ax=axes[0], label="Grueneisen parameter", pad=0.01)
    axes[0].set_xticks(ticks, [n.replace("G", "Γ") for n in names])
    for tick in ticks:
        axes[0].axvline(tick, color="0.8", lw=0.6, zorder=0)
    top = found["axis"][-1]
    axes[0].set(
        xlim=(0, x.max()),
        ylim=(found["axis"][0], top),
        ylabel="frequency (THz)",
        title=f"{chosen.crystal}: SevenNet-0 (torch), one jitted Hessian",
    )
    axes[1].fill_betweenx(found["axis"], found["dos"], alpha=0.4)
    axes[1].plot(found["dos"], found["axis"], lw=1)
    axes[1].set(ylim=(found["axis"][0], top), xlim=(0, None), xlabel="states per THz", yticks=[])
    if heat is not None:
        axes[2].plot(heat.temperatures, 1e6 * heat.expansion / 3)
        axes[2].set(
            xlabel="temperature (K)",
            ylabel="thermal expansion (1e-6/K)",
            title="quasi-harmonic",
            xlim=(0, heat.temperatures[-1]),
        )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv=None) -> dict:
    chosen = options(argv)
    warnings.filterwarnings("ignore", message="No tensor product accelerator")  # sevenn, on a CPU
    chosen.out.mkdir(parents=True, exist_ok=True)
    with jax.enable_x64(True):
        found = run(chosen)
        text = table(found, chosen)
    png = chosen.out / "phonons.png"
    picture(found, chosen, png)
    print(f"\n{text}\n\npicture     {png}")
    return found


if __name__ == "__main__":
    main()
