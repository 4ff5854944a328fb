"""A JAX potential (jax-md's NequIP) trained inside torch on energies and forces of a crystal, then
run there by ASE.

    make demo-jax-in-torch        or        python -m demos.fit --help

Ends with a table, and a PNG of the loss, of the forces and of the run, in demos/out.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path

import ase.build
import ase.md.velocitydistribution
import ase.md.verlet
import ase.units
import jax
import numpy as np
import torch
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT
from tqdm import tqdm

import bridge
from demos.arguments import add_device, at_least, device
from demos.crystals import METALS, Batch, inputs_of, strained
from jax_side.calls import programs
from jax_side.models.nequip import NequIP


def options(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demos.fit", description=__doc__.split("\n")[0])
    parser.add_argument("--metal", choices=METALS, default="Cu")
    parser.add_argument(
        "--repeat",
        type=at_least(int, 1),
        default=2,
        help="conventional cells along each axis (2: 32 atoms); one more in the run",
    )
    parser.add_argument("--train", type=at_least(int, 1), default=64, help="configurations to fit")
    parser.add_argument(
        "--test", type=at_least(int, 1), default=16, help="configurations to test on"
    )
    parser.add_argument("--steps", type=at_least(int, 1), default=1600, help="of Adam")
    parser.add_argument(
        "--batch", type=at_least(int, 1), default=8, help="configurations in a step"
    )
    parser.add_argument(
        "--lr", type=at_least(float, 1e-6), default=0.02, help="highest learning rate"
    )
    parser.add_argument("--cutoff", type=at_least(float, 1.0), default=4.0, help="Angstrom")
    parser.add_argument(
        "--layers", type=at_least(int, 1), default=2, help="interaction layers of the network"
    )
    parser.add_argument("--hidden", default="16x0e + 8x1o", help="irreps of its features")
    parser.add_argument("--md", type=at_least(int, 2), default=400, help="steps of NVE")
    parser.add_argument("--dt", type=at_least(float, 0.01, 10.0), default=3.0, help="fs")
    parser.add_argument("--temperature", type=at_least(float, 1.0), default=300.0, help="K")
    parser.add_argument("--seed", type=at_least(int, 0), default=0)
    parser.add_argument("--out", type=Path, default=Path("demos/out"))
    add_device(parser)
    chosen = parser.parse_args(argv)
    chosen.device = device(parser, chosen)
    if chosen.batch > chosen.train:
        parser.error(
            f"argument --batch: expected at most --train {chosen.train}, got {chosen.batch}; "
            "change one of them"
        )
    if chosen.out.exists() and not chosen.out.is_dir():
        parser.error(f"argument --out: expected a folder, got the file {chosen.out}; name another")
    return chosen


@contextlib.contextmanager
def counted():
    """A list that grows with each run of an XLA program: the bridge keeps those that it compiles in
    programs.Program."""
    runs, made = [], programs.Program.__init__

    def init(program, *args):
        made(program, *args)
        jitted = program._jitted
        program._jitted = lambda *groups: runs.append(program) or jitted(*groups)

    programs.Program.__init__ = init
    try:
        yield runs
    finally:
        programs.Program.__init__ = made


def rmse(model, batches) -> dict:
    """Errors in meV/atom, meV/Angstrom, meV/Angstrom^3; and all forces, by EMT and by the model."""
    with torch.no_grad():
        errors = [b.errors(model(b.inputs)) for b in batches]
    energy, forces, stress = (torch.cat(kind) for kind in zip(*errors))
    expected = torch.cat([b.forces for b in batches])
    found = {
        name: 1e3 * float(e.square().mean().sqrt())
        for name, e in dict(energy=energy, forces=forces, stress=stress).items()
    }
    return found | {"pairs": (expected.flatten().cpu(), (expected + forces).flatten().cpu())}


def fit(model, chosen, crystals) -> list[float]:
    """Adam on energies and forces, as for any torch model; the loss of each step."""
    rng = np.random.default_rng(chosen.seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=chosen.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, chosen.lr, chosen.steps + 1)
    per_epoch, losses, batches = len(crystals) // chosen.batch, [], []
    with tqdm(total=chosen.steps, desc="fit", unit="step", file=sys.stdout) as bar:
        for _ in range(chosen.steps):
            if not batches:
                groups = rng.permutation(len(crystals))[: per_epoch * chosen.batch].reshape(
                    per_epoch, chosen.batch
                )
                batches = [
                    Batch([crystals[i] for i in group], chosen.cutoff, chosen.device)
                    for group in groups
                ]
            batch = batches.pop()
            energy, forces, _ = batch.errors(model(batch.inputs))
            loss = 100 * energy.square().mean() + forces.square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            losses.append(float(loss.detach()))
            bar.update()
            bar.set_postfix(loss=f"{losses[-1]:.3g}")
    return losses


class InTorch(Calculator):
    """A torch module of the contract under ASE."""

    implemented_properties = ["energy", "forces"]

    def __init__(self, model):
        super().__init__()
        self.model = model

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        with torch.no_grad():
            out = self.model(inputs_of([atoms], next(self.model.parameters()).device))
        self.results = {
            "energy": float(out["energy"]),
            "forces": -out["position_gradients"].double().cpu().numpy(),
        }


def molecular_dynamics(model, chosen) -> dict:
    """NVE from twice the temperature in a perfect crystal; its forces beside those of EMT at every
    tenth step."""
    atoms = ase.build.bulk(chosen.metal, "fcc", cubic=True).repeat(chosen.repeat + 1)
    atoms.calc = InTorch(model)
    ase.md.velocitydistribution.thermalize_momenta(
        atoms, 2 * chosen.temperature, rng=np.random.default_rng(chosen.seed)
    )
    ase.md.velocitydistribution.Stationary(atoms)
    dynamics, trace, wrong = (
        ase.md.verlet.VelocityVerlet(atoms, timestep=chosen.dt * ase.units.fs),
        [],
        [],
    )
    for step in tqdm(range(chosen.md + 1), desc="NVE", unit="step", file=sys.stdout):
        if step:
            dynamics.run(1)
        trace.append((atoms.get_potential_energy(), atoms.get_kinetic_energy()))
        if step % 10 == 0:
            twin = atoms.copy()
            twin.calc = EMT()
            wrong.append(atoms.get_forces() - twin.get_forces())
    potential, kinetic = np.array(trace).T / len(atoms)
    ps = 1e-3 * chosen.dt * np.arange(len(trace))
    drift = 1e3 * np.polyfit(ps, potential + kinetic, 1)[0]
    return dict(
        n_atoms=len(atoms),
        ps=ps,
        potential=potential,
        kinetic=kinetic,
        drift=drift,
        forces=1e3 * float(np.sqrt(np.mean(np.square(wrong)))),
    )


def run(chosen) -> dict:
    crystals, n = (
        strained(chosen.metal, chosen.repeat, chosen.train + chosen.test, chosen.seed),
        chosen.batch,
    )
    train, test = (
        [Batch(part[i : i + n], chosen.cutoff, chosen.device) for i in range(0, len(part), n)]
        for part in (crystals[: chosen.train], crystals[chosen.train :])
    )
    shift = float(torch.cat([b.energy / b.n_atoms for b in train]).mean())
    neighbors = train[0].inputs["edge_index"].shape[1] / len(train[0].forces)
    print(
        f"{chosen.metal}, {len(crystals)} crystals of {len(crystals[0])} atoms, EMT; jax "
        f"{jax.__version__}, torch {torch.__version__}"
    )

    # The whole of the bridge: a JAX potential as an nn.Module of the potential contract, its
    # weights as Parameters.
    network = dict(
        layers=chosen.layers,
        hidden=chosen.hidden,
        neighbors=neighbors,
        scale=0.1,
        shift=shift,
        seed=chosen.seed,
    )
    apply, params = NequIP(crystals[0].numbers[:1], chosen.cutoff, **network)
    model = bridge.torch_potential(apply, params, gradients="autodiff", cutoff=chosen.cutoff)
    model.to(chosen.device)

    def measured(steps, work, *args):
        evaluated, compiled, began = len(runs), model.compilations, time.perf_counter()
        result = work(*args)
        return result, dict(
            steps=steps,
            calls=(len(runs) - evaluated) / steps,
            compiled=model.compilations - compiled,
            seconds=time.perf_counter() - began,
        )

    errors = lambda: {"train": rmse(model, train), "test": rmse(model, test)}
    with counted() as runs:
        found = {
            "errors, before": measured(len(train) + len(test), errors),
            "Adam in torch": measured(chosen.steps, fit, model, chosen, crystals[: chosen.train]),
            "errors, after": measured(len(train) + len(test), errors),
            "NVE in ASE": measured(chosen.md + 1, molecular_dynamics, model, chosen),
        }
    results = dict(
        zip(("before", "losses", "after", "md"), (result for result, _ in found.values()))
    )
    return results | dict(
        costs={name: cost for name, (_, cost) in found.items()},
        weights=sum(p.numel() for p in model.parameters()),
    )


def table(found) -> str:
    lines = [
        f"{'RMSE against EMT':22}{'energy meV/atom':>18}{'forces meV/A':>15}{'stress meV/A^3 (not fitted)':>30}"
    ]
    for when in ("before", "after"):
        for name, r in found[when].items():
            lines.append(
                f"{f'{name}, {when}':22}{r['energy']:>18.2f}{r['forces']:>15.1f}{r['stress']:>30.2f}"
            )
    lines.append(f"{'along the run':22}{'-':>18}{found['md']['forces']:>15.1f}{'-':>30}\n")
    lines.append(
        f"{'':22}{'steps':>8}{'JAX calls/step':>17}{'programs compiled':>20}{'seconds':>10}{'drift meV/atom/ps':>20}"
    )
    for name, c in found["costs"].items():
        drift = f"{found['md']['drift']:+.4f}" if name.startswith("NVE") else "-"
        lines.append(
            f"{name:22}{c['steps']:>8}{c['calls']:>17.2f}{c['compiled']:>20}{c['seconds']:>10.1f}{drift:>20}"
        )
    return "\n".join(lines)


def picture(found, chosen, path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    axes[0].semilogy(found["losses"], lw=0.6)
    axes[0].set(
        title=f"NequIP (JAX, {found['weights']} weights), Adam (torch)",
        xlabel="step",
        ylabel="loss",
    )
    for when, color in (("before", "lightgrey"), ("after", "C0")):
        test = found[when]["test"]
        axes[1].plot(
            *test["pairs"], ".", ms=2, color=color, label=f"{when}: {test['forces']:.0f} meV/Å"
        )
    limit = 1.05 * abs(found["after"]["test"]["pairs"][0]).max()
    axes[1].plot([-limit, limit], [-limit, limit], color="black", lw=0.6)
    axes[1].set(
        xlim=(-limit, limit),
        ylim=(-limit, limit),
        title="forces of the test set",
        xlabel="EMT (eV/Å)",
        ylabel="NequIP (eV/Å)",
        aspect="equal",
    )
    axes[1].legend(fontsize=8, markerscale=4)
    md = found["md"]
    for name, y in (
        ("potential", md["potential"]),
        ("kinetic", md["kinetic"]),
        ("total", md["potential"] + md["kinetic"]),
    ):
        axes[2].plot(
            md["ps"],
            1e3 * (y - (md["potential"][0] if name != "kinetic" else 0)),
            label=name,
            lw=0.8,
        )
    axes[2].set(
        title=f"{chosen.metal}, {md['n_atoms']} atoms, NVE in ASE",
        xlabel="time (ps)",
        ylabel="energy (meV/atom)",
    )
    axes[2].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main(argv=None) -> None:
    chosen = options(argv)
    began = time.perf_counter()
    chosen.out.mkdir(parents=True, exist_ok=True)
    found = run(chosen)
    picture(found, chosen, chosen.out / "fit.png")
    print(
        f"\n{table(found)}\n\npicture  {chosen.out / 'fit.png'}\n{time.perf_counter() - began:.0f} "
        "seconds"
    )


if __name__ == "__main__":
    main()
