"""Vectors along edges: right, made once in a call, handed on only where they are of what is asked
for."""

import numpy as np
import pytest
import torch

from tests.adapters import MODELS
from tests.graph_cases import CUTOFF, Embedded, joined, system
from tests.model_cases import inputs
from torch_side.potentials import geometry, layout, padding
from torch_side.potentials.geometry import edge_vectors
from torch_side.potentials.model import Wrapped
from torch_side.potentials.neighbors import neighbor_list
from torch_side.potentials.strain import with_gradients

SKIN = 0.7  # Angstrom
ONE, TWO = system(), joined(system(), system(cell=1.1 * system()["cell"][0].numpy()))
SYSTEMS = {"one system": ONE, "two systems": TWO}


def with_edges(x, cutoff=CUTOFF, dtype=torch.int64):
    edges = neighbor_list(x["pos"], x["cell"], x["pbc"], cutoff, x["batch"])
    return x | {key: e.to(dtype) for key, e in zip(("edge_index", "cell_offsets"), edges)}


def formula(x):
    """r_j - r_i + offsets @ cell, edge by edge."""
    i, j = x["edge_index"].long()
    cells = x["cell"][x["batch"].long()[i]]
    return (
        x["pos"][j]
        - x["pos"][i]
        + torch.einsum("ea,eab->eb", x["cell_offsets"].to(x["cell"].dtype), cells)
    )


def cast(x, dtype):
    return x | {key: x[key].to(dtype) for key in ("pos", "cell")}


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SYSTEMS)
def test_formula_x_dtypes(name, dtype, index):
    x = cast(with_edges(SYSTEMS[name], dtype=index), dtype)
    x["batch"] = x["batch"].to(index)
    torch.testing.assert_close(
        edge_vectors(x), formula(x), rtol=0, atol=4 * torch.finfo(dtype).eps * 8
    )
    shifts = formula(x | {"pos": torch.zeros_like(x["pos"])})
    torch.testing.assert_close(
        geometry.edge_shifts(x), shifts, rtol=0, atol=4 * torch.finfo(dtype).eps * 8
    )


def derivatives(x):
    """A function of vectors, its gradients in pos and cell, and theirs."""
    pos, cell = (x[key].detach().requires_grad_() for key in ("pos", "cell"))
    r = edge_vectors(x | {"pos": pos, "cell": cell})
    weights = torch.cos(torch.arange(r.numel(), dtype=r.dtype)).reshape(r.shape)
    first = torch.autograd.grad((weights * r.sin()).sum(), (pos, cell), create_graph=True)
    second = torch.autograd.grad(sum((g * g.detach().cos()).sum() for g in first), (pos, cell))
    return [r, *first, *second]


@pytest.mark.parametrize("name", SYSTEMS)
def test_handed_on_x_derivatives(name):
    x = with_edges(SYSTEMS[name])
    want = derivatives(x)
    with geometry.handing_on(geometry.make(x)), made_anew() as times:
        got = derivatives(x)
    assert not times
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("wanted", ["pos", "cell"])
@pytest.mark.parametrize("name", SYSTEMS)
def test_handed_on_x_one_derivative(name, wanted):
    """The gradients of pos alone, of cell alone."""
    x = with_edges(SYSTEMS[name])

    def gradient():
        variable = x[wanted].detach().requires_grad_()
        (g,) = torch.autograd.grad(edge_vectors(x | {wanted: variable}).sin().sum(), variable)
        return g

    want = gradient()
    with geometry.handing_on(geometry.make(x)):
        torch.testing.assert_close(gradient(), want)


class made_anew:
    """How often vectors were computed within."""

    def __enter__(self):
        self.times, self.own = [], geometry._vectors
        geometry._vectors = lambda *args: self.times.append(1) or self.own(*args)
        return self.times

    def __exit__(self, *_):
        geometry._vectors = self.own


CHANGES = {
    "another pos": lambda x: x | {"pos": 1.01 * x["pos"]},
    "a copy of pos": lambda x: x | {"pos": x["pos"].clone()},
    "another cell": lambda x: x | {"cell": 1.01 * x["cell"]},
    "half of the edges": lambda x: (
        x
        | {
            key: x[key][..., ::2] if key == "edge_index" else x[key][::2]
            for key in ("edge_index", "cell_offsets")
        }
    ),
    "a transposed cell": lambda x: x | {"cell": x["cell"].mT},
    "pos in place": lambda x: x["pos"].mul_(1.01) is None or x,
    "edges in place": lambda x: x["edge_index"].copy_(x["edge_index"].flip(0)) is None or x,
    "offsets in place": lambda x: x["cell_offsets"].neg_() is None or x,
    "the vectors in place": lambda x: edge_vectors(x).mul_(2) is None or x,
}


@pytest.mark.parametrize("change", CHANGES)
def test_not_handed_on(change):
    x = {key: t.clone() for key, t in with_edges(TWO).items()}
    with geometry.handing_on(geometry.make(x)):
        x = CHANGES[change](x)
        torch.testing.assert_close(edge_vectors(x), formula(x), rtol=0, atol=1e-14)


def test_transforms_of_torch():
    """torch.func and forward mode are not given vectors that they don't see through."""
    x = with_edges(TWO)
    f = lambda pos, cell: edge_vectors(x | {"pos": pos, "cell": cell}).sin().sum()
    args = x["pos"], x["cell"]
    want = torch.func.grad(f, (0, 1))(*args)
    hessian = torch.func.hessian(f)(*args)
    tangent = torch.func.jvp(f, args, args)[1]
    many = torch.func.vmap(f)(torch.stack([args[0], 2 * args[0]]), torch.stack([args[1]] * 2))
    with geometry.handing_on(geometry.make(x)):
        torch.testing.assert_close(torch.func.grad(f, (0, 1))(*args), want)
        torch.testing.assert_close(torch.func.hessian(f)(*args), hessian)
        torch.testing.assert_close(torch.func.jvp(f, args, args)[1], tangent)
        torch.testing.assert_close(
            torch.func.vmap(f)(torch.stack([args[0], 2 * args[0]]), torch.stack([args[1]] * 2)),
            many,
        )


def test_nothing_is_left_behind():
    x = with_edges(ONE)
    with pytest.raises(KeyError), geometry.handing_on(geometry.make(x)):
        raise KeyError
    with made_anew() as times:
        edge_vectors(x)
    assert len(times) == 1


GIVEN = {
    "none": lambda x: x,
    "as long as the cutoff": with_edges,
    "with a skin": lambda x: with_edges(x, CUTOFF + SKIN),
}


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("name", SYSTEMS)
def test_once_for_each_call(name, given):
    x = GIVEN[given](SYSTEMS[name])
    with made_anew() as times:
        out = Embedded()(x)
    assert len(times) == 1
    near = with_edges(SYSTEMS[name])
    want = with_gradients(lambda x: Embedded().energies(x))(near)
    for key in ("energy", "position_gradients", "cell_gradients"):
        torch.testing.assert_close(out[key], want[key], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"mace"}))
def test_once_x_adapters(name):
    """MACE makes its own from cell_offsets @ cell."""
    case = MODELS[name]
    systems = [a for a in case.systems.values() if a.pbc.all() or case.triclinic is None][:2]
    x = inputs(*systems, dtype=case.dtype)
    with made_anew() as times:
        case.build(case.dtype)(x)
    assert len(times) == 1


def slots(x, where):
    """Given edges, among a fifth of unused slots."""
    edges, offsets = x["edge_index"].int(), x["cell_offsets"].int()
    n = edges.shape[1]
    place = {
        "behind": np.arange(n),
        "in front": np.arange(n) + n // 4,
        "among": np.sort(np.random.default_rng(0).permutation(n + n // 4)[:n]),
    }[where]
    index = edges.new_full((2, n + n // 4), len(x["pos"]))
    index[:, place] = edges
    more = offsets.new_zeros(n + n // 4, 3)
    more[place] = offsets
    return x | {"edge_index": index, "cell_offsets": more}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("skin", [0, SKIN])
@pytest.mark.parametrize("where", ["behind", "in front", "among"])
@pytest.mark.parametrize("name", SYSTEMS)
def test_unused_slots(name, where, skin, padded):
    """Wherever they lie, and where atoms are padding as well: what a model sees and gives is the
    same."""
    x = with_edges(SYSTEMS[name], CUTOFF + skin)
    if padded:
        last = len(x["pos"]) - 1
        x["atomic_numbers"] = x["atomic_numbers"].clone()
        x["atomic_numbers"][last] = 0
    seen = []

    def energy(x):
        seen.append(x)
        return Embedded().energies(x)

    out = Wrapped(energy, Embedded().card, "autograd")(slots(x, where))
    (inner,) = seen
    assert (
        inner["edge_index"].dtype == inner["batch"].dtype == torch.int64
        and inner["edge_index"].is_contiguous()
    )
    real = x["atomic_numbers"] > 0
    fewer = {key: x[key][real] for key in ("pos", "atomic_numbers", "batch")}
    want = with_gradients(Embedded().energies)(with_edges({**x, **fewer}))
    torch.testing.assert_close(out["energy"], want["energy"], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(
        out["cell_gradients"], want["cell_gradients"], rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(
        out["position_gradients"][real], want["position_gradients"], rtol=1e-12, atol=1e-12
    )
    assert not out["position_gradients"][~real].any()


@pytest.mark.parametrize("seed", range(40))
def test_used_slots_x_masks(seed):
    """Unused slots and edges of padding atoms, each first, last, among the others or absent: what a
    mask leaves."""
    rng = np.random.default_rng(seed)
    numbers = np.array([29, 29, 29, *[0] * (seed % 3 > 0)])
    edges = rng.integers(0, len(numbers) + seed % 2, (2, 6))
    used = (edges < len(numbers)).all(0)
    used[used] = (numbers[edges[:, used]] > 0).all(0)
    order = {0: np.argsort(used), 1: np.argsort(~used)}.get(seed // 2 % 3, np.arange(6))
    edges, used = edges[:, order], used[order]
    kept = layout.used(torch.from_numpy(edges), numbers, np.zeros(len(numbers), int), 1)
    got = padding.rows("edge_index", torch.from_numpy(edges), {"E": kept})
    np.testing.assert_array_equal(got, edges[:, used])


@pytest.mark.parametrize("padding_edges_last", [True, False])
def test_unused_slots_in_front_x_padding_atoms(padding_edges_last):
    edges = torch.tensor([[3, 0, 1, 2, 0], [3, 1, 0, 0, 2]])[
        :, [0, 1, 2, 3, 4] if padding_edges_last else [3, 0, 1, 4, 2]
    ]
    kept = layout.used(edges, np.array([29, 29, 0]), np.zeros(3, int), 1)
    assert padding.rows("edge_index", edges, {"E": kept}).tolist() == [[0, 1], [1, 0]]


def test_unused_slots_only():
    x = with_edges(ONE)
    n = len(x["pos"])
    none = {
        "edge_index": torch.full((2, 7), n),
        "cell_offsets": torch.zeros(7, 3, dtype=torch.int64),
    }
    alone = Embedded()(x | none)
    torch.testing.assert_close(
        alone["energy"],
        Embedded()(
            x | {key: e[..., :0] if key == "edge_index" else e[:0] for key, e in none.items()}
        )["energy"],
    )
    assert not alone["position_gradients"].any()


WRONG = {
    "behind": (lambda edges: edges[0].__setitem__(2, -1), r"got \[-1, \d+\] in slot \d+"),
    "to another system": (
        lambda edges: edges[1].__setitem__(3, 7),
        r"edges within one system, got atoms \d of system 0 and 7 of system 1 in slot \d+",
    ),
}


@pytest.mark.parametrize("where", ["behind", "in front", "among"])
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_slots(wrong, where):
    change, text = WRONG[wrong]
    x = with_edges(TWO)
    x["edge_index"] = x["edge_index"].clone()
    change(x["edge_index"])
    x = slots(x, where)
    with pytest.raises(ValueError, match=text) as caught:
        Embedded()(x)
    slot = int(str(caught.value).split("slot ")[1].split(";")[0])
    i, j = x["edge_index"][:, slot].tolist()
    assert (i, j)[0] == -1 or {i // 4, j // 4} == {0, 1}
