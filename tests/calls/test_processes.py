"""Several processes: one program of two under jax.distributed, one of which may fail; JAX modules
under DistributedDataParallel and FSDP, in workers of a DataLoader, and in forks."""

import os
import socket
import subprocess
import sys

import pytest

DISTRIBUTED = """
import sys, jax, jax.numpy as jnp, numpy as np, torch, bridge
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
rank, port, lane, limit = int(sys.argv[1]), sys.argv[2], sys.argv[3], float(sys.argv[4])
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
from jax.sharding import NamedSharding, PartitionSpec as P

calls = []
def energy(x, w):
    calls.append(tuple(x.shape))
    if lane != "native" and x.shape[0] == 2 and x.max() > limit:
        raise ValueError("a structure that the model refuses")
    return (w * x**3).sum(-1)

mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
X, W = np.linspace(0.1, 2, 24).reshape(8, 3), np.array([1.0, 2, 3])
place = lambda x, *spec: jax.make_array_from_callback(x.shape, NamedSharding(mesh, P(*spec)), lambda i: x[i])
f = bridge.to_jax(energy, lane=lane, batched={"x": 0}, outputs=lambda x, w: jax.ShapeDtypeStruct(x.shape[:-1], x.dtype))
loss = lambda f: jax.value_and_grad(lambda x, w: (jax.vmap(f, (0, None))(x, w) ** 2).sum(), (0, 1))
value, (gx, gw) = jax.block_until_ready(jax.jit(loss(f))(place(X, "d"), place(W)))
v, (hx, hw) = jax.jit(loss(lambda x, w: (w * x**3).sum(-1)))(X, W)
np.testing.assert_allclose(value, v, rtol=1e-12)
np.testing.assert_allclose(gw, hw, rtol=1e-12)
for shard in gx.addressable_shards:
    np.testing.assert_allclose(shard.data, hx[shard.index], rtol=1e-12)
assert jax.device_count() == 4 and all(c == (2, 3) for c in calls if len(c) > 1), calls
print("passed")
"""
TORCH = """
import os, sys, jax.numpy as jnp, torch, bridge
import torch.distributed as dist
rank, port, how = int(sys.argv[1]), sys.argv[2], sys.argv[3]
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE="2")
dist.init_process_group("gloo")
torch.manual_seed(0)

def made():
    params = {"w": jnp.linspace(-1, 1, 6).reshape(3, 2), "b": jnp.array([0.1, 0.2])}
    module = bridge.module(lambda p, x: jnp.tanh(x @ p["w"] + p["b"]).sum(-1), params)
    return torch.nn.Sequential(torch.nn.Linear(3, 3), module)

ours, alone = made(), made()
alone.load_state_dict(ours.state_dict())
X = torch.linspace(0, 1, 24).reshape(8, 3)
if how == "ddp":
    model = torch.nn.parallel.DistributedDataParallel(ours)
else:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    model = fully_shard(ours, mesh=init_device_mesh("cpu", (2,)))
optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, alone)]
for _ in range(2):
    for m, x, optimizer in zip((model, alone), (X[rank::2], X), optimizers):
        optimizer.zero_grad()
        (m(x) ** 2).mean().backward()
        optimizer.step()
whole = lambda x: x.full_tensor() if how == "fsdp" else x
for p, q in zip(ours.parameters(), alone.parameters(), strict=True):
    torch.testing.assert_close(whole(p.grad), q.grad)
    torch.testing.assert_close(whole(p).detach(), q.detach())
dist.destroy_process_group()
print("passed")
"""
WORKERS = """
import sys, torch, jax.numpy as jnp, bridge

def apply(p, x):
    return jnp.tanh(x @ p["w"]).sum(-1)

def sine(x):
    return jnp.sin(x)

class Data(torch.utils.data.Dataset):
    def __init__(self, module, function):
        self.module, self.function = module, function

    def __len__(self):
        return 6

    def __getitem__(self, i):
        with torch.no_grad():
            return self.module(self.function(torch.full((3,), float(i))))

if __name__ == "__main__":
    module = bridge.module(apply, {"w": jnp.linspace(-1, 2, 6).reshape(3, 2)})
    function = bridge.to_torch(sine)
    whole = module(torch.sin(torch.arange(6.0)[:, None].repeat(1, 3)))
    data = Data(module, function)
    loader = torch.utils.data.DataLoader(data, 2, num_workers=2, multiprocessing_context=sys.argv[1], timeout=60)
    torch.testing.assert_close(torch.cat([*loader]), whole.detach())
    print("passed")
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def together(source, *arguments, limit=100):
    """Two processes of a program: (exit codes, what each said). None may outlive the limit."""
    port = str(free_port())
    settings = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS",)}
    begin = lambda rank: subprocess.Popen(
        [sys.executable, "-c", source, str(rank), port, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=settings,
    )  # fmt: skip
    both = [begin(rank) for rank in range(2)]
    try:
        said = [p.communicate(timeout=limit)[0] for p in both]
    finally:
        for p in both:
            p.kill()
    return [p.returncode for p in both], said


@pytest.mark.parametrize("lane", ["ffi", "host", pytest.param("native", marks=pytest.mark.full)])
def test_one_program_of_two_processes(lane):
    """Four devices, the numbers of one process; each process evaluates its own examples."""
    codes, said = together(DISTRIBUTED, lane, "9")
    assert codes == [0, 0], said
    assert all("passed" in text and "terminate" not in text for text in said), said


@pytest.mark.parametrize("lane", ["ffi", "host"])
def test_a_process_that_fails_ends_the_job(lane):
    """The other process would wait for it in a collective."""
    codes, said = together(DISTRIBUTED, lane, "1.9")
    assert 0 not in codes, said
    assert all("a structure that the model refuses" in text for text in said), said
    assert "bridge: process 1 of this job failed, and so process 0 ends: ValueError" in said[0]


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_jax_modules_trained_by_two_processes(how):
    codes, said = together(TORCH, how)
    assert codes == [0, 0] and all("passed" in text for text in said), said


@pytest.mark.parametrize("how", ["spawn", "forkserver", "fork"])
def test_workers_of_a_data_loader(how, tmp_path):
    """A fork has none of the threads that JAX waits for, which is an error at once."""
    script = tmp_path / "workers.py"
    script.write_text(WORKERS)
    command = [sys.executable, str(script), how]
    settings = {**os.environ, "PYTHONPATH": os.getcwd()}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, env=settings)
    if how != "fork":
        assert ended.stdout.strip() == "passed", ended.stderr
        return
    assert ended.returncode and "expected a process of its own for JAX, got a fork" in ended.stderr
    assert 'DataLoader(..., multiprocessing_context="spawn")' in ended.stderr
