"""Checks of benchmarks.gpu_check on steps: what the host waits for, and how long a step takes."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import bridge
from benchmarks import gpu_checks
from benchmarks.gpu_checks import check, energy, expect, place
from benchmarks.harness import bare, in_loop, measure


class Waiting(RuntimeError):
    """An operator for whose result a host waits, if it runs on a GPU."""


class Refusing(TorchDispatchMode):
    """Raises Waiting for operators that read values on the host, whose shapes depend on values, or
    that copy from one kind of device to another."""

    READING = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "_unique2", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        crosses = name in ("_to_copy", "copy_") and _crosses(name, args, kwargs)
        masked = name.startswith("index") and any(
            isinstance(i, torch.Tensor) and i.dtype == torch.bool
            for i in (args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ())
        )
        if name in self.READING or crosses or masked:
            raise Waiting(f"{name} waits for the device")
        return func(*args, **kwargs)


def _crosses(name: str, args: tuple, kwargs: dict) -> bool:
    """Whether a copy goes to the host, or from one kind of device to another."""
    if name == "copy_":
        return isinstance(args[1], torch.Tensor) and args[0].device.type != args[1].device.type
    if kwargs.get("device") is None:
        return False
    to = torch.device(kwargs["device"]).type
    return to == "cpu" or to != args[0].device.type


def watched(f, gpu):
    """f, which refuses on a CPU to run what would wait on a GPU. There torch itself refuses."""

    def run(*args):
        with Refusing() if gpu.platform == "cpu" else contextlib.nullcontext():
            return f(*args)

    return run


@contextlib.contextmanager
def no_synchronisation(gpu):
    """torch raises where the host waits for a stream, in all threads."""
    if gpu.platform == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@check()
def no_wait(gpu, values):
    """In a step of a bridged function, its gradient and a batch of it, the host waits for nothing,
    and a planted .item() is seen."""
    x = jax.device_put(jnp.linspace(0, 9, 48, dtype="float32").reshape(16, 3), gpu)
    f = bridge.to_jax(watched(energy, gpu), lane="ffi")
    step = lambda x, _: (x - 1e-3 * jax.grad(f)(x), jax.vmap(f)(jnp.stack([x, 2 * x])))
    scan = jax.jit(lambda x: jax.lax.scan(step, x, None, length=5))
    planted = jax.jit(
        bridge.to_jax(watched(lambda x: x * float(x.sum()), gpu), outputs=lambda x: x)
    )
    want, _ = jax.block_until_ready(scan(x))  # what is looked up once may wait
    with no_synchronisation(gpu):
        got, _ = jax.block_until_ready(scan(x))
        expect(bool((got == want).all()), "another result")
        try:
            jax.block_until_ready(planted(x))
        except Exception as error:
            values["planted"] = str(error).strip().splitlines()[0][:200]
    expect("planted" in values, "a planted .item() was not seen")


@check(limit=60)
def speed(gpu, values):
    """Ratios: a bridged sin in a loop to XLA's own, and a JAX function in torch, forward and
    backward, to torch's own; best of 7."""
    n, count = 10_000, max(1, gpu_checks.CALLS // 50)
    x = jax.device_put(jnp.linspace(0, 1, n, dtype="float32"), gpu)
    t = torch.linspace(0, 1, n, device=place(gpu))
    leaf = t.clone().requires_grad_()
    there = bridge.to_torch(lambda x: jnp.sin(x))
    pairs = {
        "sin in a loop": (in_loop(bridge.to_jax(torch.sin, lane="ffi"), x), in_loop(jnp.sin, x)),
        "JAX's sin in torch": (bare(there, t), bare(torch.sin, t)),
        "and its backward": (
            bare(lambda: there(leaf).sum().backward()),
            bare(lambda: torch.sin(leaf).sum().backward()),
        ),
    }
    for name, (ours, own) in pairs.items():
        times = measure({"ours": ours, "own": own}, count, 7)
        values[name] = {"us": min(times["ours"]), "ratio": min(times["ours"]) / min(times["own"])}


@check(limit=240, card=True)
def sevennet(gpu, values):
    """SevenNet-0 with 64 and 512 atoms: energy and gradients equal the CPU's, and a step in a
    jitted loop on the ffi lane takes so many ms beside bare torch."""
    from benchmarks.native import jitted, rattled, salt, structure, with_edges
    from torch_side.models.sevennet import SevenNet

    model, card = SevenNet("7net-0").eval(), SevenNet("7net-0").eval().to(place(gpu))
    for repeats, n in ((2, 64), (4, 512)):
        exact, padded = with_edges(structure(rattled(salt(repeats))), model.card.cutoff)
        there = {k: v.to(place(gpu)) for k, v in exact.items()}
        got = {k: v.cpu() for k, v in card(there).items()}
        if n == 64:
            want = model(exact)
            for key in ("energy", "position_gradients", "cell_gradients"):
                values[f"error of {key}"] = float((got[key] - want[key]).abs().max())
        given = {k: jax.device_put(jnp.asarray(v), gpu) for k, v in padded.items()}
        loop = jitted(bridge.jax_potential(card, lane="ffi"), given)
        times = measure({"jitted": loop, "bare torch": bare(card, there)}, 10, 3)
        values[f"ms, {n} atoms"] = {k: 1e-3 * min(us) for k, us in times.items()}
    expect(values["error of position_gradients"] < 1e-3, "other gradients than on the CPU")
    expect(np.isfinite(values["error of energy"]), "no energy")


@check(limit=90)
def monte_carlo(gpu, values):
    """Moves of a torch potential in a jitted scan: the energy after them is that of a full
    evaluation, and on the CPU it is the same."""
    from jax_side.montecarlo.local import LocalPotential
    from jax_side.montecarlo.states import Change

    parts = (
        lambda Z: torch.ones(len(Z), 1, device=Z.device),
        lambda a, b, r: (3 - torch.linalg.vector_norm(r, dim=-1, keepdim=True)) ** 3,
        lambda a, s: s[:, 0] / 2,
    )
    local = LocalPotential(*(bridge.to_jax(part, lane="ffi") for part in parts), 3.0)
    start = np.stack(np.meshgrid(*[range(4)] * 3), -1).reshape(-1, 3) * 1.8
    moves = 0.05 * np.random.default_rng(0).normal(size=(50, 3))

    def moved(cache, k_by):
        k, by = k_by
        at = k % 64
        _, change, proposal = local.update(cache, Change(at[None], (cache.pos[at] + by)[None]))
        return local.commit(cache, proposal, change < 0.1), change

    def run(device):
        put = lambda x, dtype: jax.device_put(jnp.asarray(x, dtype), device)
        graph = {"pos": put(start, "float32"), "atomic_numbers": put(np.ones(64), "int32")}
        scan = jax.jit(lambda cache, moves: jax.lax.scan(moved, cache, moves))
        cache, _ = scan(local.full(graph), (put(np.arange(50), "int32"), put(moves, "float32")))
        whole = local.full({**graph, "pos": cache.pos})
        return float(cache.energy), float(whole.energy)

    values["energy, whole"] = run(gpu)
    values["on the CPU"] = run(jax.devices("cpu")[0])
    energies = [*values["energy, whole"], *values["on the CPU"]]
    apart = max(energies) - min(energies)
    expect(apart < 1e-4 * abs(energies[0]), f"energies {apart:.3g} apart")
