"""Custom autograd Functions: second derivatives are right, or an error that names the Function;
never silently zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

import bridge
from bridge.card import Card
from torch_side.potentials.strain import with_gradients


class Cube(Function):
    """x**3, its backward in operations of torch."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, c):
        return 3 * ctx.saved_tensors[0] ** 2 * c


class Once(Cube):
    backward = staticmethod(once_differentiable(Cube.backward))


class Detached(Cube):
    @staticmethod
    def backward(ctx, c):
        return 3 * ctx.saved_tensors[0].detach() ** 2 * c


class ByNumpy(Cube):
    """Its derivative is a number to torch, its cotangent is not."""

    @staticmethod
    def forward(ctx, x):
        ctx.x = x.detach().numpy().copy()
        return torch.from_numpy(ctx.x**3)

    @staticmethod
    def backward(ctx, c):
        return c * torch.from_numpy(3 * ctx.x**2)


class WhollyByNumpy(ByNumpy):
    @staticmethod
    def backward(ctx, c):
        return torch.from_numpy(c.detach().numpy() * 3 * ctx.x**2)


class Transformable(Function):
    """@once_differentiable, in the form that torch.func takes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, c):
        return 3 * ctx.saved_tensors[0] ** 2 * c


class Triple(Function):
    """3 x: its gradient is an honest constant."""

    @staticmethod
    def forward(ctx, x):
        return 3 * x

    @staticmethod
    def backward(ctx, c):
        return 3 * c


class Straight(Function):
    """round(x), whose backward hands on its cotangent as it is (a straight-through estimator)."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, c):
        return c


CUT = {cls.__name__: cls for cls in (Once, Detached, ByNumpy, WhollyByNumpy, Transformable)}
HONEST = {
    "Cube": (Cube, lambda x: x**3),
    "Triple": (Triple, lambda x: 3 * x),
    "Straight": (Straight, lambda x: x + jax.lax.stop_gradient(jnp.round(x) - x)),
}
X = jnp.array([[0.3, -0.7, 1.1], [0.5, 0.9, -1.3]])
ENGINES = {"func": {}, "autograd": {"derivatives": "autograd", "batched": "sequential"}}
SECOND = {
    "hessian": jax.hessian,
    "jacrev of grad": lambda f: jax.jacrev(jax.grad(f)),
    "hvp": lambda f: lambda x: jax.jvp(jax.grad(f), (x,), (jnp.cos(x),))[1],
    "force loss": lambda f: jax.grad(lambda x: (jax.grad(f)(x) ** 2).sum()),
}
TEXT = "expected a backward of {} that can be differentiated again, got one that is cut off .*; take first derivatives only .*derivative_order=1"


def energy_of(cls):
    """A term with the kernel inside, and one without."""
    return lambda x: cls.apply(x).sum() + (x.sum(-1) ** 2).sum()


def model_of(cls):
    def model(x):
        nodes = cls.apply(x["pos"]).sum(-1) + x["pos"].sum(-1) ** 2
        return nodes.new_zeros(len(x["cell"])).index_add(0, x["batch"], nodes)

    return model


def function(cls, derivatives):
    declared = jax.ShapeDtypeStruct((), "float64")  # NumPy inside can't be seen through
    return bridge.to_jax(energy_of(cls), outputs=declared, **ENGINES[derivatives])


def potential(cls, **options):
    return bridge.potential(
        model_of(cls), atomic_numbers=np.array([1, 1]), gradients="autograd", **options
    )


@pytest.mark.parametrize("way", SECOND)
@pytest.mark.parametrize("derivatives", ENGINES)
@pytest.mark.parametrize("name", CUT)
def test_error_x_functions(name, derivatives, way, maybe_jit):
    f = function(CUT[name], derivatives)
    np.testing.assert_allclose(jax.grad(f)(X), 3 * X**2 + 2 * X.sum(-1, keepdims=True), rtol=1e-12)
    with pytest.raises(NotImplementedError, match=TEXT.format(name)), bridge.raising():
        jax.block_until_ready(maybe_jit(SECOND[way](f))(X))


@pytest.mark.parametrize("way", SECOND)
@pytest.mark.parametrize("name", CUT)
def test_error_x_potentials(name, way):
    energy = potential(CUT[name])
    np.testing.assert_allclose(
        jax.grad(energy)(X), 3 * X**2 + 2 * X.sum(-1, keepdims=True), rtol=1e-12
    )
    with pytest.raises(NotImplementedError, match=TEXT.format(name)), bridge.raising():
        jax.block_until_ready(jax.jit(SECOND[way](energy))(X))


@pytest.mark.parametrize("name", CUT)
def test_error_x_hessian_as_an_output(name):
    card = Card(outputs={"energy", "position_gradients", "cell_gradients", "hessian"})
    with pytest.raises(NotImplementedError, match=TEXT.format(name)):
        potential(CUT[name], card=card, outputs=("hessian",)).outputs(X)


def test_values_x_two_honest_functions():
    """Each is compared with itself where the inputs have moved. Both are new: what was once found
    honest is not looked at again."""
    three, straight = type("Three", (Triple,), {}), type("AsItIs", (Straight,), {})
    model = lambda x: (3 * three.apply(x) ** 2 + straight.apply(x) ** 2).sum()
    f = bridge.to_jax(model, outputs=jax.ShapeDtypeStruct((), "float64"))
    hessian = jax.hessian(f)(X).reshape(X.size, X.size)
    np.testing.assert_allclose(hessian, (3 * 2 * 9 + 2) * np.eye(X.size), rtol=1e-12)


@pytest.mark.parametrize("name", ["Detached", "Triple"])
def test_error_x_compiled(name):
    """There are no values there, by which a constant is told from what was cut off."""
    cls = CUT.get(name) or HONEST[name][0]
    f = bridge.to_jax(energy_of(cls), lane="native")
    with pytest.raises(
        NotImplementedError,
        match=f"a backward of {name} that .* got one that may be cut off from its input, which can't be told while it is compiled; take this derivative once outside of jit",
    ):
        jax.jit(jax.hessian(f))(X)


@pytest.mark.parametrize("name", CUT)
def test_first_order_cards_say_so_before_anything_runs(name):
    energy = potential(CUT[name], card=Card(derivative_order=1))
    jax.grad(energy)(X)
    with pytest.raises(NotImplementedError, match="whose card has derivative_order=1"):
        jax.hessian(energy)(X)


@pytest.mark.parametrize("name", ["WhollyByNumpy"])
def test_forward_mode_x_functions_of_several_outputs(name):
    """A first jvp goes by the backward, differentiated in its cotangent."""
    f = bridge.to_jax(CUT[name].apply, outputs=lambda x: x, derivatives="autograd")
    with pytest.raises(NotImplementedError, match=TEXT.format(name)):
        jax.jvp(f, (X,), (X,))


@pytest.mark.parametrize("way", SECOND)
@pytest.mark.parametrize("derivatives", [*ENGINES, "potential"])
@pytest.mark.parametrize("name", HONEST)
def test_values_x_honest_functions(name, derivatives, way):
    cls, pure = HONEST[name]
    f = potential(cls) if derivatives == "potential" else function(cls, derivatives)
    want = SECOND[way](lambda x: pure(x).sum() + (x.sum(-1) ** 2).sum())(X)
    for _ in range(2):
        np.testing.assert_allclose(SECOND[way](f)(X), want, rtol=1e-10)


STRUCTURE = {
    "pos": torch.from_numpy(np.array(X)),
    "cell": torch.zeros(1, 3, 3, dtype=torch.float64),
    "batch": torch.zeros(2, dtype=torch.int64),
}


@pytest.mark.parametrize("name", CUT)
def test_torch_force_losses_in_positions(name):
    pos = STRUCTURE["pos"].clone().requires_grad_()
    with pytest.raises(NotImplementedError, match=TEXT.format(name)):
        with_gradients(model_of(CUT[name]))(STRUCTURE | {"pos": pos})


@pytest.mark.parametrize("name", [*CUT, *HONEST])
def test_torch_force_losses_in_weights_beside_a_kernel(name):
    """Weights that the kernel does not see are trained on forces: its own gradient is a constant to
    them."""
    cls = CUT.get(name) or HONEST[name][0]
    weight = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    pos = STRUCTURE["pos"]
    model = lambda x: model_of(cls)(x) + weight * (x["pos"] ** 4).sum().reshape(1)
    forces = with_gradients(model)(STRUCTURE, create_graph=True)["position_gradients"]
    kernel = {Triple: 3, Straight: 1}.get(cls, 3 * pos**2)
    torch.testing.assert_close(forces, kernel + 2 * pos.sum(-1, keepdim=True) + 4 * weight * pos**3)
    torch.testing.assert_close(
        torch.autograd.grad((forces**2).sum(), weight)[0], (8 * forces * pos**3).sum().detach()
    )


@pytest.mark.parametrize("name", [*CUT, *HONEST])
def test_torch_force_losses_in_weights_that_scale_a_kernel(name):
    """The weights are in the cotangent that the kernel's backward is given: a backward that is cut
    off from it would make the forces a constant to them, one that is cut off from its input not."""
    cls = CUT.get(name) or HONEST[name][0]
    weight = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    forces = lambda: with_gradients(lambda x: weight * model_of(cls)(x))(
        STRUCTURE, create_graph=True
    )["position_gradients"]
    if cls in (Once, WhollyByNumpy, Transformable):
        with pytest.raises(NotImplementedError, match=TEXT.format(name)):
            forces()
    else:
        pos = STRUCTURE["pos"]
        kernel = {Triple: 3, Straight: 1}.get(cls, 3 * pos**2)
        of_one = kernel + 2 * pos.sum(-1, keepdim=True) + 0 * pos
        found = torch.autograd.grad((forces() ** 2).sum(), weight)[0]
        torch.testing.assert_close(found, (4 * of_one**2).sum())


def test_own_gradients_without_a_graph():
    """gradients="model": g from NumPy, or detached, is no constant."""

    def model(x):
        pos = x["pos"].detach()
        energy = pos.new_zeros(len(x["cell"])).index_add(0, x["batch"], (pos**3).sum(-1))
        return {
            "energy": energy,
            "position_gradients": 3 * pos**2,
            "cell_gradients": torch.zeros_like(x["cell"]),
        }

    energy = bridge.potential(model, atomic_numbers=np.array([1, 1]))
    np.testing.assert_allclose(jax.grad(energy)(X), 3 * X**2)
    with pytest.raises(
        NotImplementedError,
        match="expected position_gradients of .*model that can be differentiated, got some that change with the positions",
    ):
        jax.hessian(energy)(X)


def test_own_constant_gradients():
    """A uniform field: without a graph, and right."""

    def model(x):
        pos = x["pos"].detach()
        energy = pos.new_zeros(len(x["cell"])).index_add(0, x["batch"], pos[:, 2])
        field = torch.zeros_like(pos)
        field[:, 2] = 1
        return {
            "energy": energy,
            "position_gradients": field,
            "cell_gradients": torch.zeros_like(x["cell"]),
        }

    energy = bridge.potential(model, atomic_numbers=np.array([1, 1]))
    assert not jax.hessian(energy)(X).any() and jax.grad(energy)(X)[:, 2].tolist() == [1, 1]
