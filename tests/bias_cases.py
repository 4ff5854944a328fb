"""A particle in a double well of three dimensions, its free energy by quadrature, and what samples
of it say: histograms of umbrella windows put together."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax_md import simulate, space

KT = 0.2  # eV
STIFFNESS = 20.0
CENTRES = np.linspace(-1.6, 1.6, 17)
BINS = np.linspace(-1.8, 1.8, 181)


def well(r, cell=None):
    """Two states of unlike depth and width along x; y and z follow x."""
    x, y, z = r[0]
    return (x**2 - 1) ** 2 + 0.15 * x + 2 * (y - 0.3 * x**2) ** 2 + (1.5 + x) ** 2 * z**2 / 2


def along(r, cell=None):
    return r[0, 0]


def exact(xs):
    """F(x) in eV, by quadrature over y and z."""
    y, z = np.linspace(-3, 3, 401), np.linspace(-40, 40, 8001)
    found = []
    for x in np.asarray(xs):
        of_y = np.trapezoid(np.exp(-2 * (y - 0.3 * x**2) ** 2 / KT), y)
        of_z = np.trapezoid(np.exp(-((1.5 + x) ** 2) * z**2 / 2 / KT), z)
        found.append((x**2 - 1) ** 2 + 0.15 * x - KT * np.log(of_y * of_z))
    return np.array(found)


def langevin(energy, steps, every, seen):
    """(key, positions, hills...) -> what is seen after each `every` steps of nvt_langevin."""
    init, step = simulate.nvt_langevin(energy, space.free()[1], 0.05, KT, 1.0)

    def run(key, r):
        def cycle(state, _):
            state = jax.lax.fori_loop(0, every, lambda _, state: step(state), state)
            return state, seen(state.position)

        return jax.lax.scan(cycle, init(key, r, mass=1.0), None, length=steps)[1]

    return run


def histograms_put_together(samples):
    """F in eV at the middles of BINS, from samples (windows, n) of umbrellas at CENTRES: WHAM
    (Kumar et al., J. Comput. Chem. 13, 1011 (1992)), which is MBAR of values in bins."""
    middles = (BINS[1:] + BINS[:-1]) / 2
    factors = np.exp(-STIFFNESS / 2 * (middles - CENTRES[:, None]) ** 2 / KT)
    counts, n, f = np.histogram(samples, BINS)[0], samples.shape[1], np.ones(len(CENTRES))
    for _ in range(20000):
        p = counts / (n * f @ factors)
        new = 1 / (factors @ p)
        new /= new[0]
        if abs(np.log(new / f)).max() < 1e-9:
            break
        f = new
    with np.errstate(divide="ignore"):
        return middles, -KT * np.log(p)


def particle(x):
    return jnp.array([[x, 0.3, 0.0]])


def coarse(F, n=10):
    """Free energies of n fine bins each, from those of the fine bins (..., k n)."""
    p = np.exp(-F / KT)
    found = -KT * np.log(p.reshape(*p.shape[:-1], -1, n).sum(-1))
    return found - found.mean(-1, keepdims=True)


def in_errors(found, wanted):
    """Deviations of the mean over independent runs (runs, G) in standard errors, and these."""
    error = found.std(0, ddof=1) / np.sqrt(len(found))
    return (found.mean(0) - wanted) / error, error
