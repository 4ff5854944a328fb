"""Checks of benchmarks.gpu_check on steps: what the host waits for, and how long a step takes."""

from __future__ import annotations

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import bridge
from benchmarks import gpu_checks
from benchmarks.gpu_checks import chain, check, energy, expect, place, problem, same
from benchmarks.harness import bare, in_loop, measure
from bridge.card import Card
from torch_side.calls import buffers, export, late, running
from torch_side.potentials.geometry import edge_vectors
from torch_side.potentials.model import Wrapped


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


@contextlib.contextmanager
def as_on_a_gpu(refusing: bool = True):
    """Calls of torch in compiled programs run as on a GPU, whose host runs ahead; with `refusing`
    an operator that would wait is an error."""

    def run(fn, *given):
        with Refusing() if refusing else contextlib.nullcontext():
            return running.run(fn, *given)

    kept = buffers.runs_ahead, export.TorchFunction.runner
    buffers.runs_ahead = lambda tensors: True
    export.TorchFunction.runner = staticmethod(lambda fn, ready: functools.partial(run, fn))
    jax.clear_caches()  # programs know how they call
    try:
        yield
    finally:
        buffers.runs_ahead, export.TorchFunction.runner = kept[0], staticmethod(kept[1])
        jax.clear_caches()
        late.known(wait=True)


def chains(repeats: int):
    """A pair potential of a simple cubic crystal with its edges given: the energy in JAX, positions
    (N,3), edges."""

    def pairs(x):
        length = torch.linalg.vector_norm(edge_vectors(x), dim=-1)
        centre = x["batch"][x["edge_index"][0]]
        each = (1 - length / 2.5) ** 2
        return {"energy": each.new_zeros(len(x["cell"])).index_add(0, centre, each)}

    card = Card(cutoff=2.5, neighbor_list="given", elements=[14], batches=True)
    lattice = np.stack(np.meshgrid(*[range(repeats)] * 3), -1).reshape(-1, 3) * 1.7
    x = (lattice + 0.02 * np.sin(7 * lattice)).astype("float32")
    length = np.linalg.norm(x[:, None] - x, axis=-1)
    index = np.stack(np.nonzero((length < 3) & (length > 0))).astype("int32")
    unused = np.full((2, 9), len(x), "int32")
    edges = {
        "edge_index": np.concatenate([index, unused], 1),
        "cell_offsets": np.zeros((index.shape[1] + 9, 3), "int32"),
    }
    numbers = np.full(len(x), 14, "int32")
    model = Wrapped(pairs, card, "autograd")
    return bridge.potential(model, atomic_numbers=numbers, lane="ffi"), x, edges


@check()
def potential_no_wait(gpu, values):
    """In a scan of MD with a potential whose edges are given, and in batches of it, the host waits
    for nothing; a structure that is wrong is NaN, and an error with its text later."""
    energy, x, edges = chains(4)
    cpu = jax.devices("cpu")[0]
    put = lambda device: jax.device_put((x, edges), device)
    step = lambda x, _: (x - 1e-2 * jax.grad(energy)(x, **edges_now), energy(x, **edges_now))
    x_cpu, edges_now = put(cpu)
    want = jax.jit(lambda x: jax.lax.scan(step, x, None, length=5))(x_cpu)
    x_there, edges_now = put(gpu)
    scan = jax.jit(lambda x: jax.lax.scan(step, x, None, length=5))
    batch = jax.jit(jax.vmap(jax.grad(lambda x: energy(x, **edges_now))))
    with as_on_a_gpu() if gpu.platform == "cpu" else contextlib.nullcontext():
        jax.block_until_ready((scan(x_there), batch(x_there[None])))  # what is looked up once
        with no_synchronisation(gpu):
            got = jax.block_until_ready(scan(x_there))
            jax.block_until_ready(batch(jnp.stack([x_there, x_there])))
        apart = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - b).max()), got, want)
        values |= dict(zip(("positions apart", "energies apart"), apart))
        expect(max(apart) < 1e-3, "other numbers than on the CPU")
        one = jax.jit(lambda x: energy(x, **edges_now))
        expect(
            np.isnan(one(x_there.at[3, 1].set(jnp.nan))), "a wrong input gave a plausible energy"
        )
        try:
            with bridge.raising():
                one(x_there)
        except ValueError as error:
            values["later"] = str(error)[:150]
        expect("atom 3" in values.get("later", ""), "no error was raised later")


@check()
def jax_potential(gpu, values):
    """A JAX potential in torch: energy and gradients of a batch on the device equal those on the
    CPU, and so does the gradient of a loss on forces."""

    def springs(x):
        shift = (x["cell_offsets"][:, :, None] * x["cell"][x["batch"][x["edge_index"][0]]]).sum(1)
        r = x["pos"][x["edge_index"][1]] - x["pos"][x["edge_index"][0]] + shift
        each = jnp.where(
            x["edge_index"][0] < len(x["pos"]), (2.5 - jnp.sqrt((r**2).sum(-1) + 1e-6)) ** 2, 0
        )
        owner = x["batch"][x["edge_index"][0]]
        return jax.ops.segment_sum(each, owner, num_segments=len(x["cell"]))

    model = bridge.torch_potential(springs, gradients="autodiff", cutoff=2.5)
    _, x, _ = chains(3)
    inputs = {
        "pos": torch.tensor(x).repeat(2, 1),
        "cell": 6 * torch.eye(3).repeat(2, 1, 1),
        "pbc": torch.ones(2, 3, dtype=torch.bool),
        "batch": torch.arange(2).repeat_interleave(len(x)),
        "atomic_numbers": torch.full((2 * len(x),), 14),
    }
    found = {}
    for where in {"cpu", str(place(gpu))}:
        there = {key: value.to(where) for key, value in inputs.items()}
        there["pos"].requires_grad_()
        out = model(there)
        out["position_gradients"].square().sum().backward()
        found[where] = [*out.values(), there["pos"].grad]
    ours, theirs = found[str(place(gpu))], found["cpu"]
    values["apart"] = [float((a.cpu() - b).abs().max()) for a, b in zip(ours, theirs, strict=True)]
    expect(max(values["apart"]) < 1e-3, "other numbers than on the CPU")
    expect(all(a.device == place(gpu) for a in ours), "a result on another device")


@check(card=True)
def side_stream(gpu, values):
    """A JAX function called on a stream of torch's that is not the default one reads what that
    stream is still writing, and is read by it at once."""
    x, p, rolled = problem(gpu)
    tx, tp = bridge.to_torch(x), bridge.to_torch(p)
    f = bridge.to_torch(lambda x: 2 * x)
    f(tx)
    torch.cuda.synchronize()
    for k in range(5):
        with torch.cuda.stream(torch.cuda.Stream()):
            y = f(chain(tx, tp) + k) + 1
            same(y.cpu(), 2 * (rolled + k) + 1, f"round {k}")


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
    """SevenNet-0 with 64, 512 and 4,096 atoms: energy and gradients equal the CPU's, and a step in a
    jitted loop on the ffi lane takes so many ms beside bare torch."""
    from benchmarks.native import jitted, rattled, salt, structure, with_edges
    from torch_side.models.sevennet import SevenNet

    model, card = SevenNet("7net-0").eval(), SevenNet("7net-0").eval().to(place(gpu))
    for repeats, n in ((2, 64), (4, 512), (8, 4096)):
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


@check(limit=240, card=True)
def sevennet_native(gpu, values):
    """SevenNet-0 with 64 atoms on the native lane: so many ms a step in a jitted loop, beside the
    ffi lane."""
    from benchmarks.native import jitted, rattled, salt, structure, with_edges
    from torch_side.models.sevennet import SevenNet

    card = SevenNet("7net-0").eval().to(place(gpu))
    _, padded = with_edges(structure(rattled(salt(2))), card.card.cutoff)
    given = {k: jax.device_put(jnp.asarray(v), gpu) for k, v in padded.items()}
    loops = {
        lane: jitted(bridge.jax_potential(card, lane=lane), given) for lane in ("ffi", "native")
    }
    times = measure(loops, 10, 3)
    values["ms"] = {lane: 1e-3 * min(us) for lane, us in times.items()}


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
