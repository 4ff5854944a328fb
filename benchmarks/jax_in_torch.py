"""JAX callables in torch: groups of benchmarks.bench, beside a bare jit dispatch, pure torch and
the packages that offer the same.

All variants of a group must give the same numbers, which is seen before they are timed.
torch_jax_interop and jax2torch get the jitted function; where they are absent or fail, that is
reported in place of their figures.
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import torch

import bridge
from benchmarks.harness import Rival, dispatched, goals, group, then

ATOMS, BATCH, WIDTHS = 64, 32, (16, 64, 64, 4)
OF_DISPATCH, OF_TORCH, OF_RIVAL = 3, 3, 1 / 3
TO_TORCH, WRAPPED, SCALAR = (
    f"torch_jax_interop.{name}"
    for name in ("jax_to_torch", "WrappedJaxFunction", "WrappedJaxScalarFunction")
)
FORWARD = "jit on memory that it has not made takes 1.3 and is waited for (0.2), lending and taking 0.6; the rest is Python that looks"
BACKWARD = "an autograd.Function by hand, with no check at all, takes 4.1 to 4.4 itself: two dispatches, each with memory lent and taken"
BARE = "autograd.Function by hand, unchecked"
# chex: it imports it and doesn't require it
interop = functools.partial(Rival, "torch_jax_interop", "torch-jax-interop chex")
jax2torch = functools.partial(Rival, "jax2torch", "jax2torch")


def doubled_sine(xp):
    return lambda x: 2 * xp.sin(x)


def soft_spheres(eye):
    """All-pairs energy of atoms, for torch tensors and JAX arrays alike."""

    def energy(x):
        r2 = ((x[:, None] - x[None]) ** 2).sum(-1) + eye
        return ((1 - eye) / r2**6).sum() / 2

    return energy


def positions() -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 8, (ATOMS, 3)).astype("float32")


def numbers(results) -> list[np.ndarray]:
    return [
        np.asarray(x.detach() if isinstance(x, torch.Tensor) else x)
        for x in jax.tree.leaves(results)
    ]


def alike(steps: dict) -> dict:
    """{variant: run(n calls)} of steps, each seen to give what the first one gives, to rounding."""
    want = numbers(next(iter(steps.values()))())

    def checked(step):
        for x, y in zip(numbers(step()), want, strict=True):
            if x.shape != y.shape or not np.allclose(x, y, rtol=0, atol=1e-4 * np.abs(y).max()):
                raise ValueError(
                    f"it gives {x.shape} {x.ravel()[:3]}, the others {y.shape} {y.ravel()[:3]}"
                )
        return dispatched(step)

    return {name: then(step, checked) for name, step in steps.items()}


def waited(f):
    return lambda *args: jax.block_until_ready(f(*args))


def backward(loss, wrt):
    """Forward and backward of a scalar, by .backward()."""

    def step():
        for t in wrt:
            t.grad = None
        loss().backward()
        return [t.grad for t in wrt]

    return step


def gradients(functions: dict, x, cotangent) -> dict:
    """Forward and backward of each function in both ways: torch.autograd.grad with a given
    cotangent, and .backward()."""
    given = lambda f: lambda: torch.autograd.grad(f(x), x, cotangent)
    scalar = lambda f: backward(lambda: f(x).sum() if cotangent.ndim else f(x), [x])
    ways = {"": given, ", .backward()": scalar}
    return {name + how: then(f, way) for name, f in functions.items() for how, way in ways.items()}


def by_hand():
    """2 sin(x) as an autograd.Function over two jitted programs, by public functions, for dense
    tensors of the CPU."""
    forward = jax.jit(lambda x: (2 * jnp.sin(x), jnp.cos(x)))
    backward = jax.jit(lambda c, g: 2 * c * g)

    class Sine(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            y, c = map(torch.from_dlpack, forward(x.detach().numpy()))
            ctx.save_for_backward(c)
            return y

        @staticmethod
        def backward(ctx, g):
            return torch.from_dlpack(backward(ctx.saved_tensors[0].numpy(), g.numpy()))

    return Sine.apply


def rivals(f) -> dict:
    """f as the other packages make it differentiable; torch_jax_interop puts parameters first, here
    none."""
    return {
        WRAPPED: interop(
            lambda package: package.WrappedJaxFunction(jax.jit(lambda _, x: f(x)), ())
        ),
        "jax2torch": jax2torch(lambda package: package.jax2torch(jax.jit(f))),
    }


def scalar(package, f, params):
    """(a function, its parameters) by what torch_jax_interop has for scalars; it asks for an
    auxiliary result and gives it back."""
    net = package.WrappedJaxScalarFunction(jax.jit(lambda *args: (f(*args), ())), params)
    return lambda *args: net(*args)[0], list(net.parameters())


def against(*baselines, how="", ours="bridge"):
    """The goals for ours beside rivals, asked in the same way."""
    return [(ours + how, baseline + how, OF_RIVAL) for baseline in baselines]


@group(
    "bare jit dispatch",
    "pure torch",
    share=0.5,
    judge=goals(
        ("bridge", "bare jit dispatch", OF_DISPATCH, FORWARD),
        *against(TO_TORCH, "jax2torch"),
        *against(WRAPPED, "jax2torch", how=", requires_grad"),
    ),
)
def to_torch_forward():
    """2 sin(x) of (64, 3): the price of a call."""
    f, x = doubled_sine(jnp), positions()
    a, t, recorded, jitted = (
        jnp.asarray(x),
        torch.tensor(x),
        torch.tensor(x, requires_grad=True),
        jax.jit(f),
    )
    functions = {"pure torch": doubled_sine(torch), "bridge": bridge.to_torch(f), **rivals(f)}
    steps = {name: then(f, lambda f: functools.partial(f, t)) for name, f in functions.items()}
    steps |= {
        f"{name}, requires_grad": then(f, lambda f: functools.partial(f, recorded))
        for name, f in functions.items()
    }
    steps[TO_TORCH] = interop(lambda package: functools.partial(package.jax_to_torch(jitted), t))
    return alike(
        {
            "bare jit dispatch": functools.partial(jitted, a),
            "jit, waited for": functools.partial(waited(jitted), a),
            **steps,
        }
    )


@group(
    "jitted jax.vjp",
    "pure torch",
    BARE,
    share=0.5,
    judge=goals(
        ("bridge", "pure torch", OF_TORCH, BACKWARD),
        *against(WRAPPED, "jax2torch"),
        *against(WRAPPED, "jax2torch", how=", .backward()"),
    ),
)
def to_torch_backward():
    """2 sin(x) of (64, 3), forward and backward; also as a torch.autograd.Function written for it,
    with no check at all."""
    f, x = doubled_sine(jnp), torch.tensor(positions(), requires_grad=True)
    functions = {
        "pure torch": doubled_sine(torch),
        "bridge": bridge.to_torch(f),
        BARE: by_hand(),
        **rivals(f),
    }
    pull, a, ones = (
        jax.jit(lambda x, g: (f(x), *jax.vjp(f, x)[1](g))),
        jnp.asarray(positions()),
        jnp.ones((ATOMS, 3), "float32"),
    )
    controls = {
        "jitted jax.vjp": lambda: pull(a, ones)[1],
        "jitted jax.vjp, waited for": lambda: waited(pull)(a, ones)[1],
    }
    return alike({**controls, **gradients(functions, x, torch.ones(ATOMS, 3))})


@group(
    "jitted value_and_grad",
    "pure torch",
    share=0.1,
    judge=goals(
        *against(WRAPPED, SCALAR, "jax2torch"),
        *against(WRAPPED, SCALAR, "jax2torch", how=", .backward()"),
    ),
)
def to_torch_energy():
    """The energy of 64 atoms, forward and backward."""
    f, x = (
        soft_spheres(jnp.eye(ATOMS, dtype="float32")),
        torch.tensor(positions(), requires_grad=True),
    )
    functions = {
        "pure torch": soft_spheres(torch.eye(ATOMS)),
        "bridge": bridge.to_torch(f),
        **rivals(f),
    }
    functions[SCALAR] = interop(lambda package: scalar(package, lambda _, x: f(x), ())[0])
    both, a = jax.jit(jax.value_and_grad(f)), jnp.asarray(positions())
    controls = {
        "jitted value_and_grad": lambda: both(a)[1],
        "jitted value_and_grad, waited for": lambda: waited(both)(a)[1],
    }
    return alike({**controls, **gradients(functions, x, torch.ones(()))})


def perceptron(params, x):
    *hidden, (w, b) = params
    for weight, bias in hidden:
        x = jnp.tanh(x @ weight.T + bias)
    return x @ w.T + b


def mse(params, x, y):
    return jnp.mean((perceptron(params, x) - y) ** 2)


def three_layers() -> torch.nn.Sequential:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(*ends) for ends in itertools.pairwise(WIDTHS)]
    return torch.nn.Sequential(layers[0], torch.nn.Tanh(), layers[1], torch.nn.Tanh(), layers[2])


def own(net):
    return net, list(net.parameters())


def flat(package, params):
    """(a function, its parameters) by jax2torch, which differentiates with respect to positional
    tensors alone."""
    leaves = [torch.nn.Parameter(bridge.to_torch(a, copy=True)) for a in jax.tree.leaves(params)]
    f = package.jax2torch(
        jax.jit(lambda a, b, c, d, e, f, x: perceptron([(a, b), (c, d), (e, f)], x))
    )
    return lambda x: f(*leaves, x), leaves


@group(
    "jitted value_and_grad",
    "pure torch",
    share=0.1,
    judge=goals(
        *against(WRAPPED, "jax2torch", ours="bridge.module"),
        *against(SCALAR, how=", loss in JAX", ours="bridge.module"),
    ),
)
def to_torch_training():
    """Loss and .backward() of a perceptron of 3 layers with nn.Parameters, a batch of 32; the loss
    in torch, or in JAX."""
    net, x, y = three_layers(), torch.randn(BATCH, WIDTHS[0]), torch.randn(BATCH, WIDTHS[-1])
    params, ax, ay = bridge.to_jax(
        ([(layer.weight.detach(), layer.bias.detach()) for layer in net[::2]], x, y), copy=True
    )
    both = jax.jit(jax.value_and_grad(mse))
    models = {
        "pure torch": own(net),
        "bridge.module": own(bridge.module(perceptron, params)),
        WRAPPED: interop(
            lambda package: own(package.WrappedJaxFunction(jax.jit(perceptron), params))
        ),
        "jax2torch": jax2torch(lambda package: flat(package, params)),
    }
    scalars = {
        "bridge.module": own(bridge.module(mse, params)),
        SCALAR: interop(lambda package: scalar(package, mse, params)),
    }
    steps = {
        name: then(model, lambda m: backward(lambda: ((m[0](x) - y) ** 2).mean(), m[1]))
        for name, model in models.items()
    }
    steps |= {
        f"{name}, loss in JAX": then(model, lambda m: backward(lambda: m[0](x, y), m[1]))
        for name, model in scalars.items()
    }
    controls = {
        "jitted value_and_grad": lambda: both(params, ax, ay)[1],
        "jitted value_and_grad, waited for": lambda: waited(both)(params, ax, ay)[1],
    }
    return alike({**controls, **steps})
