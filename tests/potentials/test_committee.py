"""Committees against loops over their members: values, derivatives, one call of torch for all,
through JAX too; errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

import bridge
from bridge.card import Card
from tests.model_cases import CRYSTALS, MODELS, MOLECULES, inputs, mace_network
from torch_side.models.mace import MACE
from torch_side.potentials import geometry, graph
from torch_side.potentials.committee import Committee
from torch_side.potentials.model import Wrapped

F64 = torch.float64
CUTOFF = 4.0
CARD = Card(
    outputs={
        "energy",
        "position_gradients",
        "cell_gradients",
        "node_energies",
        "embeddings",
        "hessian",
    },
    batches=True,
    cutoff=CUTOFF,
    neighbor_list="own",
    elements={1, 6, 8, 11, 14, 17},
    dtype="float64",
    device="cpu",
    sizes=(("F", 6),),
)
SOME = [CRYSTALS["skewed"], MOLECULES["water"], CRYSTALS["slab"]]


class Pairs(nn.Module):
    """A neural network of distances and species with its own scale for energies: a potential of a
    user."""

    def __init__(self, seed, width=6, act=torch.tanh):
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        new = lambda *shape: nn.Parameter(torch.randn(*shape, generator=random, dtype=F64))
        self.species, self.first, self.last = new(18, width), new(5, width), new(width)
        self.register_buffer("scale", 0.3 + 0.1 * torch.rand((), generator=random, dtype=F64))
        self.register_buffer("centres", torch.linspace(0.5, CUTOFF, 5, dtype=F64))
        self.act, self.calls = act, []

    def forward(self, x):
        self.calls.append(1)
        i, j = x["edge_index"]
        r = geometry.edge_vectors(x).norm(dim=-1)
        cut = (torch.cos(r * torch.pi / CUTOFF) + 1) / 2
        radial = (
            self.act(torch.exp(-((r[:, None] - self.centres) ** 2)) @ self.first) * cut[:, None]
        )
        numbers = x["atomic_numbers"]
        features = (
            torch.zeros_like(self.species[numbers]).index_add(
                0, i, radial * self.species[numbers[j]]
            )
            + self.species[numbers]
        )
        nodes = self.scale * features.tanh() @ self.last
        energy = nodes.new_zeros(len(x["cell"])).index_add(0, x["batch"], nodes)
        return {"energy": energy, "node_energies": nodes, "embeddings": features}


def members(n=3, frozen=True):
    return [Wrapped(Pairs(seed), CARD, "autograd").requires_grad_(not frozen) for seed in range(n)]


@functools.cache
def maces():
    return [MACE(mace_network(seed=seed), dtype=F64) for seed in (1, 2)]


def calls(model):
    """How often the forward of the one network in it has run."""
    (network,) = (m for m in model.modules() if isinstance(m, Pairs))
    return len(network.calls)


def close(a, b, atol=1e-10):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=atol)


COMMITTEES = {
    "vmap": lambda: (Committee(members()), members()),
    "loop": lambda: (Committee(members(), vmap=False), members()),
    "mace": lambda: (Committee(maces(), vmap=False), maces()),
    "one": lambda: (Committee(members(1)), members(1)),
}
committees = pytest.mark.parametrize("build", COMMITTEES.values(), ids=COMMITTEES)


@committees
def test_values_x_loop(build):
    committee, alone = build()
    x = inputs(*SOME, dtype=F64)
    asked = committee.asking("member_energies", "member_position_gradients", "node_energies")
    out, each = asked(x), [m(x) for m in alone]
    for name in ("energy", "position_gradients", "cell_gradients", "node_energies"):
        close(out[name], sum(e[name] for e in each) / len(each))
    for name, spread, every in (
        ("energy", "energy_std", "member_energies"),
        ("position_gradients", "position_gradients_std", "member_position_gradients"),
    ):
        of_each = np.stack([e[name] for e in each])
        close(out[every], torch.tensor(of_each))
        close(out[spread], torch.tensor(of_each.std(0)))
        assert len(each) == 1 or out[spread].max() > 1e-2
    shapes = asked.card.shapes(len(x["pos"]), 3)
    assert (
        shapes["member_position_gradients"] == (len(each), len(x["pos"]), 3)
        and "embeddings" not in asked.card.outputs
    )
    assert {n: tuple(out[n].shape) for n in shapes} == shapes and not any(
        v.requires_grad for v in out.values()
    )
    assert "member_energies" not in committee(x)


@committees
def test_hessian_x_loop(build):
    committee, alone = build()
    x = inputs(MOLECULES["water"], dtype=F64)
    H = [m.asking("hessian")(x)["hessian"] for m in alone]
    out = committee.asking("hessian")(x)
    close(out["hessian"], sum(H) / len(H), atol=1e-9)
    assert out["hessian"].abs().max() > 1e-2 and not out["hessian"].requires_grad


@committees
def test_spread_x_derivatives(build):
    """The slope of energy_std, and mixed second derivatives of the mean in the cell."""
    committee, alone = build()
    x, step = inputs(CRYSTALS["skewed"], dtype=F64), 1e-4
    d = torch.randn(x["pos"].shape, dtype=F64, generator=torch.Generator().manual_seed(0))
    moving = {k: x[k].clone().requires_grad_() for k in ("pos", "cell")}
    out = committee(x | moving)
    (slope,) = torch.autograd.grad(out["energy_std"].sum(), moving["pos"], retain_graph=True)
    ends = [committee(x | {"pos": x["pos"] + s * d})["energy_std"].item() for s in (step, -step)]
    assert (slope * d).sum().item() == pytest.approx(
        (ends[0] - ends[1]) / (2 * step), rel=1e-5, abs=1e-9
    )
    assert len(alone) == 1 or slope.abs().max() > 1e-3
    a = torch.autograd.grad(out["cell_gradients"][0, 0, 1], moving["pos"], retain_graph=True)[0][
        1, 2
    ]
    b = torch.autograd.grad(out["position_gradients"][1, 2], moving["cell"])[0][0, 0, 1]
    assert a.item() == pytest.approx(b.item(), rel=1e-9) and abs(a) > 1e-6


def test_forward_x_counted():
    """One pass through the module for all, with gradients; and for a Hessian too."""
    committee, x = Committee(members(5)), inputs(*SOME, dtype=F64)
    committee(x)
    assert calls(committee) == 1
    committee.asking("hessian")(inputs(MOLECULES["water"], dtype=F64))
    assert calls(committee) == 2


def test_members_of_own_gradients_x_loop():
    """Members that return g and G themselves are asked for these."""

    class Springs(nn.Module):
        def __init__(self, k):
            super().__init__()
            self.k = nn.Parameter(torch.tensor(k, dtype=F64))

        def forward(self, x):
            energy = torch.zeros_like(x["cell"][:, 0, 0]).index_add(
                0, x["batch"], self.k * x["pos"].square().sum(-1)
            )
            return {
                "energy": energy,
                "position_gradients": 2 * self.k * x["pos"],
                "cell_gradients": torch.zeros_like(x["cell"]),
            }

    x = inputs(MOLECULES["water"], dtype=F64)
    out = Committee([Wrapped(Springs(k), Card(), "model") for k in (1.0, 2.0, 6.0)])(x)
    close(out["position_gradients"], 6 * x["pos"])
    close(out["position_gradients_std"], 2 * x["pos"].abs() * np.std([1.0, 2.0, 6.0]))


def test_padding_x_values():
    committee, x = Committee(members()).asking("member_energies"), inputs(*SOME, dtype=F64)
    more = {"pos": (2, 3), "atomic_numbers": (2,), "batch": (2,), "cell": (1, 3, 3), "pbc": (1, 3)}
    padded = {k: torch.cat([v, v.new_zeros(more[k])]) for k, v in x.items()}
    padded["batch"][-2:] = 3
    out, plain = committee(padded), committee(x)
    close(out["position_gradients_std"][:-2], plain["position_gradients_std"])
    close(out["member_energies"][:, :-1], plain["member_energies"])
    assert not out["member_energies"][:, -1].any() and not out["position_gradients_std"][-2:].any()


@pytest.mark.parametrize("vmap", [True, False])
def test_weights_x_trained(vmap):
    """Each member learns from the gradients of all: as a loop."""
    alone, x = members(frozen=False), inputs(MOLECULES["water"], dtype=F64)
    committee = Committee(members(frozen=False), vmap=vmap)
    committee(x)["position_gradients"].square().sum().backward()
    (sum(m(x)["position_gradients"] for m in alone) / 3).square().sum().backward()
    wanted = torch.stack([m.model.species.grad for m in alone])
    found = (
        committee.members.model.model.species.grad
        if vmap
        else torch.stack([m.model.species.grad for m in committee.members])
    )
    close(found, wanted)
    assert wanted.abs().max() > 1e-3


def test_weights_x_copied_or_shared():
    first, x = members(), inputs(MOLECULES["water"], dtype=F64)
    copied, shared = Committee(first), Committee(first, vmap=False)
    before = copied(x)["energy"]
    with torch.no_grad():
        first[0].model.scale += 0.1
    close(copied(x)["energy"], before)
    assert abs(shared(x)["energy"] - before) > 1e-3


def test_equal_buffers_x_not_batched():
    """What is the same in all members may be read by Python; a buffer of each one's own may not."""

    class Reads(Pairs):
        def forward(self, x):
            assert self.centres[-1].item() == CUTOFF
            return super().forward(x)

    class ReadsOwn(Pairs):
        def forward(self, x):
            return super().forward(x) if self.scale.item() else {}

    x = inputs(*SOME, dtype=F64)
    close(
        Committee([Wrapped(Reads(s), CARD, "autograd") for s in range(3)])(x)["energy"],
        Committee(members())(x)["energy"],
    )
    with pytest.raises(NotImplementedError, match="got Wrapped, which it can't .*item"):
        Committee([Wrapped(ReadsOwn(s), CARD, "autograd") for s in range(3)])(x)


def test_tied_weights_x_loop():
    class Tied(Pairs):
        def __init__(self, seed):
            super().__init__(seed)
            self.again = nn.Linear(1, 6, bias=False, dtype=F64)
            self.again.weight = self.last_matrix = nn.Parameter(self.last.detach()[:, None].clone())

        def forward(self, x):
            out = super().forward(x)
            return out | {
                "energy": out["energy"]
                + (self.again.weight * self.last_matrix).sum() * x["pos"].square().sum()
            }

    alone = [Wrapped(Tied(seed), CARD, "autograd").requires_grad_(False) for seed in range(2)]
    x = inputs(MOLECULES["water"], dtype=F64)
    close(Committee(alone)(x)["energy"], sum(m(x)["energy"] for m in alone) / 2)


def test_dtype_x_moved():
    committee = Committee(members()).to(torch.float32)
    x = inputs(*SOME)
    assert committee.card.dtype == "float32" and committee(x)["energy_std"].dtype == torch.float32
    close(
        committee(x)["energy"].double(),
        Committee(members())(inputs(*SOME, dtype=F64))["energy"],
        atol=1e-4,
    )


def test_sum_x_spread():
    """The spread of a sum is that of its one committee."""
    x = inputs(*SOME, dtype=F64)
    committee, (other,) = Committee(members()), members(1)
    out = (committee + other)(x)
    close(out["energy"], committee(x)["energy"] + other(x)["energy"])
    close(out["energy_std"], committee(x)["energy_std"])


# Through JAX


@pytest.mark.parametrize("name", ["vmap", "mace"])
def test_potential_x_jit(name):
    committee, alone = COMMITTEES[name]()
    atoms = CRYSTALS["skewed"]
    x = inputs(atoms, dtype=F64)
    energy = bridge.potential(committee, atomic_numbers=atoms.numbers, pbc=True)
    r, h = jnp.asarray(atoms.positions), jnp.asarray(np.array(atoms.cell))
    e, (g, G) = jax.jit(jax.value_and_grad(energy, (0, 1)))(r, h)
    each = [m(x) for m in alone]
    for found, key in ((e[None], "energy"), (g, "position_gradients"), (G[None], "cell_gradients")):
        np.testing.assert_allclose(found, sum(o[key] for o in each) / len(each), rtol=0, atol=1e-9)
    spread = jax.jit(lambda r, h: energy.outputs(r, h)["energy_std"])(r, h)
    np.testing.assert_allclose(spread, np.std([o["energy"] for o in each], 0), rtol=0, atol=1e-9)


def test_potential_x_counted():
    committee, atoms = Committee(members(4)), MOLECULES["water"]
    energy = bridge.potential(committee, atomic_numbers=atoms.numbers)
    step = jax.jit(lambda r: (energy.outputs(r), jax.value_and_grad(energy)(r))[1])
    jax.block_until_ready(step(jnp.asarray(atoms.positions)))
    before = calls(committee)
    jax.block_until_ready(step(jnp.asarray(atoms.positions) + 0.01))
    assert calls(committee) - before == 1


class Energy(Pairs):
    """One number."""

    def forward(self, x):
        return super().forward(x)["energy"].sum()


def test_functional_x_vmap_of_parameters():
    """jax.vmap over the weights of an energy-only module: one call of torch for all members, with
    gradients too."""
    nets, x = [Energy(seed) for seed in range(4)], graph_of(CRYSTALS["skewed"])
    apply, _ = bridge.functional(nets[0])
    stacked = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *[dict(bridge.functional(net)[1]) for net in nets]
    )
    fixed = {k: jnp.asarray(v.numpy()) for k, v in x.items()}
    energy = lambda params, pos: apply(params, fixed | {"pos": pos})

    energies = jax.vmap(apply, (0, None))
    each = jax.jit(jax.vmap(jax.value_and_grad(energy, (0, 1)), (0, None)))
    total = jax.jit(
        jax.grad(
            lambda params, pos: (jnp.arange(4.0) * energies(params, fixed | {"pos": pos})).sum(),
            (0, 1),
        )
    )
    results = []
    for call in (
        lambda: jax.jit(energies)(stacked, fixed),
        lambda: each(stacked, fixed["pos"]),
        lambda: total(stacked, fixed["pos"]),
    ):
        jax.block_until_ready(call())
        before = len(nets[0].calls)
        results.append(jax.block_until_ready(call()))
        assert len(nets[0].calls) - before == 1
    pos = x["pos"].clone().requires_grad_()
    for k, net in enumerate(nets):
        energy = net(x | {"pos": pos})
        named = dict(net.named_parameters()) | {"pos": pos}
        wanted = dict(zip(named, torch.autograd.grad(energy, list(named.values()))))
        assert results[0][k] == pytest.approx(energy.item(), rel=1e-10) and results[1][0][
            k
        ] == pytest.approx(energy.item(), rel=1e-10)
        for name in set(named) - {"pos"}:
            np.testing.assert_allclose(
                results[1][1][0][name][k], wanted[name], rtol=1e-9, atol=1e-10
            )
            np.testing.assert_allclose(
                results[2][0][name][k], k * wanted[name], rtol=1e-9, atol=1e-10
            )
        np.testing.assert_allclose(results[1][1][1][k], wanted["pos"], rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(
        results[2][1],
        jnp.einsum("m,mia->ia", jnp.arange(4.0), results[1][1][1]),
        rtol=1e-9,
        atol=1e-9,
    )


def graph_of(atoms):
    """The contract's dict with edges."""
    x = inputs(atoms, dtype=F64)
    kept = {}
    graph.evaluate(
        lambda inner: kept.update(inner) or {"energy": inner["pos"].sum().reshape(1)},
        x,
        CARD,
        "nothing",
    )
    return kept


# Errors


@pytest.mark.parametrize(
    "refused",
    [maces, lambda: [MODELS["sevennet"].build(torch.float32)] * 2],
    ids=["mace", "sevennet"],
)
def test_vmap_x_refused(refused):
    models = refused()
    x = inputs(CRYSTALS["skewed"], dtype=getattr(torch, models[0].card.dtype))
    with pytest.raises(
        NotImplementedError,
        match=rf"torch.func.vmap can run over, got {type(models[0]).__name__}.*vmap=False",
    ) as caught:
        Committee(models)(x)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_errors_of_the_model_x_own():
    """What is wrong with the model itself is not blamed on vmap."""

    class Broken(Pairs):
        def forward(self, x):
            return {"energy": self.last @ self.first}

    with pytest.raises(RuntimeError, match="size|shape"):
        Committee([Wrapped(Broken(s), CARD, "autograd") for s in range(2)])(
            inputs(*SOME, dtype=F64)
        )


def wrapped(**options):
    return Wrapped(Pairs(7, **options), CARD, "autograd")


UNLIKE = {
    "expected at least one model, got none; pass a list": (ValueError, list),
    "expected models of the contract as members, got a Pairs; wrap it": (
        TypeError,
        lambda: [Pairs(0), Pairs(1)],
    ),
    "expected members of one card, got cutoff 4.0 and 5.0; take models": (
        ValueError,
        lambda: [*members(1), Wrapped(Pairs(1), Card(**vars(CARD) | {"cutoff": 5.0}), "autograd")],
    ),
    r"differ in their weights alone, got the shape of model.species \(18, 6\) and \(18, 7\); build": (
        ValueError,
        lambda: [wrapped(), wrapped(width=7)],
    ),
    "differ in their weights alone, got model.act tanh and sigmoid; build": (
        ValueError,
        lambda: [wrapped(), wrapped(act=torch.sigmoid)],
    ),
    "differ in their weights alone, got model.training True and False; build": (
        ValueError,
        lambda: [wrapped(), Wrapped(Pairs(1).eval(), CARD, "autograd")],
    ),
    r"parameters or buffers that differ, got Wrapped without any; .*vmap=False": (
        TypeError,
        lambda: [Wrapped(lambda x: x["pos"].sum().reshape(1), Card(), "autograd")] * 2,
    ),
    r"energies\(inputs\) alone, got a Sum; .*vmap=False": (
        NotImplementedError,
        lambda: [m + m for m in members(2)],
    ),
}


@pytest.mark.parametrize("text", UNLIKE)
def test_members_x_errors(text):
    kind, build = UNLIKE[text]
    with pytest.raises(kind, match=text):
        Committee(build())


def test_outputs_x_errors():
    with pytest.raises(ValueError, match="got embeddings; ask for these"):
        Committee(members()).asking("embeddings")


def test_sums_x_one_after_another():
    """What vmap=True refuses is the same as a loop with vmap=False."""
    x, sums = inputs(*SOME, dtype=F64), [m + m for m in members(2)]
    close(Committee(sums, vmap=False)(x)["energy"], sum(m(x)["energy"] for m in sums) / 2)
