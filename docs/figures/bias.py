"""Draws bias.png, the figure of docs/bias.md: python docs/figures/bias.py (a minute)."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import torch
from jax_md import simulate, space

import bridge
from jax_side.engines import jax_md as engine
from jax_side.potentials.bias import umbrella
from jax_side.potentials.metadynamics import metadynamics

matplotlib.use("Agg")
import matplotlib.pyplot as plt

KT, STIFFNESS, RUNS = 0.05, 10.0, 8
CENTRES, BINS = np.linspace(1.0, 3.0, 13), np.linspace(0.8, 3.2, 121)
R = jnp.array([[0.0, 0, 0], [1.5, 0, 0]])


class Dimer(torch.nn.Module):
    """The one of the page."""

    def forward(self, x: dict[str, torch.Tensor]) -> torch.Tensor:
        """Energies (B,) in eV."""
        r = x["pos"].reshape(-1, 2, 3)
        d = (r[:, 1] - r[:, 0]).norm(dim=-1)
        return 0.2 * (4 * (d - 2) ** 2 - 1) ** 2


def exact(d: np.ndarray) -> np.ndarray:
    """U(d) - 2 kT ln d, its lowest value 0."""
    found = 0.2 * (4 * (d - 2) ** 2 - 1) ** 2 - 2 * KT * np.log(d)
    return found - found.min()


def distance(r: jax.Array, cell: jax.Array | None = None) -> jax.Array:
    """The collective variable."""
    return jnp.linalg.norm(r[1] - r[0])


ENERGY = bridge.potential(Dimer(), atomic_numbers=np.array([18, 18]), gradients="autograd")


def dynamics(potential):
    """init and step of jax-md."""
    return simulate.nvt_langevin(engine.energy(potential), space.free()[1], 0.1, KT, 0.5)


@jax.jit
@partial(jax.vmap, in_axes=(None, 0))
@jax.vmap
def windows(centre, key):
    """Distances (1000,) in one window."""
    start, step = dynamics(ENERGY + umbrella(distance, centre, STIFFNESS))

    def cycle(state, _):
        state = jax.lax.fori_loop(0, 10, lambda _, state: step(state), state)
        return state, distance(state.position)

    return jax.lax.scan(cycle, start(key, R / 1.5 * centre, mass=40.0), length=1000)[1]


def wham(samples: np.ndarray) -> np.ndarray:
    """Free energies in the bins (Kumar et al., J. Comput. Chem. 13, 1011 (1992))."""
    middles = (BINS[1:] + BINS[:-1]) / 2
    factors = np.exp(-STIFFNESS / 2 * (middles - CENTRES[:, None]) ** 2 / KT)
    counts, f = np.histogram(samples, BINS)[0], np.ones(len(CENTRES))
    for _ in range(5000):
        p = counts / (samples.shape[1] * f @ factors)
        f = 1 / (factors @ p)
        f /= f[0]
    with np.errstate(divide="ignore"):
        return -KT * np.log(p)


BIAS = metadynamics(distance, 0.004, 0.05, kT=KT, bias_factor=8.0)


@jax.jit
@jax.vmap
def hills(key):
    """The hills of one run."""
    start, step = dynamics(ENERGY + BIAS)

    def cycle(carry, _):
        state, hills = carry
        state = jax.lax.fori_loop(0, 20, lambda _, state: step(state, hills=hills), state)
        return (state, BIAS.deposit(hills, state.position)), None

    none = BIAS.start(R, capacity=3000)
    state = start(key, R, mass=40.0, hills=none)
    return jax.lax.scan(cycle, (state, none), length=3000)[0][1]


def main() -> None:
    """Writes the figure beside this file."""
    grid, middles = np.linspace(1.25, 2.75, 61), (BINS[1:] + BINS[:-1]) / 2
    inner = (middles > 1.25) & (middles < 2.75)
    keys = jax.random.split(jax.random.key(0), (RUNS, len(CENTRES)))
    samples = np.asarray(windows(jnp.asarray(CENTRES), keys))[:, :, 100:]
    by_windows = np.array([wham(one)[inner] for one in samples])
    deposited = hills(jax.random.split(jax.random.key(1), RUNS))
    BIAS.check(deposited)
    by_hills = np.asarray(jax.vmap(lambda h: BIAS.free_energy(h, grid))(deposited))
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    axes.plot(grid, 1e3 * exact(grid), color="#222222", label="quadrature: U(d) - 2 kT ln d")
    for x, found, colour, label in (
        (middles[inner], by_windows, "#1f6fb4", "umbrella windows"),
        (grid, by_hills, "#d1682a", "metadynamics"),
    ):
        shifted = found - (found - exact(x)).mean(1, keepdims=True)
        error = 1e3 * shifted.std(0, ddof=1) / np.sqrt(RUNS)
        off = abs(shifted.mean(0) - exact(x)) * 1e3
        print(f"{label}: {off.max():.1f} meV off, standard error up to {error.max():.1f} meV")
        every = slice(None, None, 3)
        axes.errorbar(
            x[every],
            1e3 * shifted.mean(0)[every],
            error[every],
            fmt="o",
            ms=3,
            lw=1,
            color=colour,
            label=label,
        )
    axes.set(xlabel="distance (Angstrom)", ylabel="free energy (meV)")
    axes.legend(frameon=False, loc="upper center")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
