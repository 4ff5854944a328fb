"""Exceptions of torch reach the person: text, type and frame on every path; the object itself where
it can."""

import contextlib
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import bridge

X = jnp.arange(1.0, 4.0)
SAME = lambda x: x


class NoSuchSpecies(ValueError):
    def __init__(self, text, species):
        super().__init__(text)
        self.species = species


def broken(x):
    if bool((x > -1e9).all()):
        raise NoSuchSpecies("species 117 is not in the training set", 117)
    return x


PATHS = {
    "jit": lambda f: jax.jit(f),
    "fori_loop": lambda f: jax.jit(lambda x: jax.lax.fori_loop(0, 3, lambda i, x: f(x), x)),
    "scan": lambda f: jax.jit(
        lambda x: jax.lax.scan(lambda x, _: (f(x), None), x, None, length=3)[0]
    ),
    "while_loop": lambda f: jax.jit(lambda x: jax.lax.while_loop(lambda x: x.sum() < 1e9, f, x)),
    "vmap": lambda f: jax.jit(lambda x: jax.vmap(f)(jnp.stack([x, x]))),
    "grad": lambda f: jax.jit(jax.grad(lambda x: f(x).sum())),
    "grad of scan": lambda f: jax.jit(
        jax.grad(lambda x: jax.lax.scan(lambda x, _: (f(x), None), x, None, length=3)[0].sum())
    ),
    "large": lambda f: jax.jit(lambda x: f(f(jnp.zeros((400, 400)) @ jnp.ones((400, 400)) + x[0]))),
}


def bridged(f, **options):
    return bridge.to_jax(f, outputs=SAME, derivatives="autograd", batched="sequential", **options)


@pytest.mark.parametrize("path", PATHS)
def test_type_text_and_frame_stand_in_the_error(path, lane):
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jax.block_until_ready(PATHS[path](bridged(broken, lane=lane))(X))
    text = str(caught.value)
    assert "NoSuchSpecies: species 117 is not in the training set" in text
    assert f'File "{__file__}", line {broken.__code__.co_firstlineno + 2}, in broken' in text


@pytest.mark.parametrize("path", PATHS)
def test_raising_gives_the_original_object(path, lane):
    program = PATHS[path](bridged(broken, lane=lane))
    with pytest.raises(NoSuchSpecies) as caught, bridge.raising():
        result = program(X)
    assert caught.value.species == 117
    assert isinstance(caught.value.__cause__, jax.errors.JaxRuntimeError)
    frames = [f.name for f in caught.traceback]
    assert "broken" in frames


def test_raising_lets_other_errors_and_results_pass():
    with pytest.raises(ZeroDivisionError), bridge.raising():
        1 / 0
    with bridge.raising():
        assert float(jax.jit(bridge.to_jax(torch.sum))(X)) == 6.0


def test_raising_keeps_nothing_after_the_block(lane):
    from bridge import failures

    with pytest.raises(NoSuchSpecies), bridge.raising():
        jax.jit(bridged(broken, lane=lane))(X)
    assert failures._listeners == []


def test_raising_knows_its_own_errors_from_earlier_ones():
    """An array that failed before the block, and is still held, is no business of the block."""

    def late(x):
        raise KeyError("old")

    big = jnp.ones((400, 400))
    # runs in XLA's threads, and fails each time it is waited for
    stale = jax.jit(lambda x: bridged(late)(x @ x))(big)
    with pytest.raises(jax.errors.JaxRuntimeError, match="old"):
        jax.block_until_ready(stale)
    with bridge.raising():
        assert float(jax.jit(bridge.to_jax(torch.sum))(X)) == 6.0
    with pytest.raises(NoSuchSpecies), bridge.raising():
        fresh = jax.jit(lambda x: bridged(broken)(x @ x))(big)
    with pytest.raises(jax.errors.JaxRuntimeError, match="old"):
        jax.block_until_ready(stale)
    del stale, fresh


def test_nested_raising_is_served_by_the_inner_block(lane):
    with bridge.raising(), pytest.raises(NoSuchSpecies), bridge.raising():
        jax.jit(bridged(broken, lane=lane))(X)


@pytest.mark.parametrize(
    "transform", [lambda f: f, lambda f: jax.grad(lambda x: f(x).sum()), jax.vmap]
)
def test_an_eager_call_raises_the_original_object(transform, lane):
    x = jnp.stack([X, X]) if transform is jax.vmap else X
    with pytest.raises(NoSuchSpecies) as caught:
        transform(bridged(broken, lane=lane))(x)
    assert caught.value.species == 117


def test_an_exception_that_is_kept_holds_no_array(lane):
    """Its frames are the callback's, and what they were given is memory that XLA gives back."""
    with pytest.raises(NoSuchSpecies) as caught, bridge.raising():
        jax.block_until_ready(jax.jit(bridged(broken, lane=lane))(X))
    frames = [frame for frame, _ in traceback.walk_tb(caught.value.__traceback__)]
    frames += [outer for frame in frames for outer, _ in traceback.walk_stack(frame)]
    inside = [f for f in frames if f.f_code.co_filename.endswith(("lanes.py", "callback.py"))]
    assert inside
    for frame in inside:
        held = {k: v for k, v in frame.f_locals.items() if _is_array(v)}
        assert not held, (frame, held)


def _is_array(value):
    leaves = jax.tree.leaves(value)
    return any(isinstance(x, jax.Array | np.ndarray | torch.Tensor) for x in leaves)


def test_process_and_program_stay_usable(lane):
    armed = [True]

    def sometimes(x):
        if armed[0]:
            raise RuntimeError("not now")
        return x * 2

    program = jax.jit(
        lambda x: jax.lax.fori_loop(0, 3, lambda i, x: bridged(sometimes, lane=lane)(x), x)
    )
    for _ in range(3):
        with pytest.raises(jax.errors.JaxRuntimeError, match="not now"):
            jax.block_until_ready(program(X))
    armed[0] = False
    assert program(X).tolist() == (X * 8).tolist()


KEYBOARD = """
    import logging, os, signal, sys, time
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background has it ignored
    import jax, jax.numpy as jnp, bridge
    class Slow(logging.Handler):  # JAX logs what a host callback raises, before it leaves it
        def emit(self, record):
            time.sleep(0.1)
    logging.getLogger("jax").addHandler(Slow())
    calls = [0]
    def slow(x):
        calls[0] += 1
        if calls[0] == 3:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        return x * 1.0
    lane, size, how = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    f = bridge.to_jax(slow, lane=lane, outputs=lambda x: x)
    step = lambda i, x: f(x @ x)
    program = jax.jit(lambda x: jax.lax.fori_loop(0, 200, step, x))
    with (bridge.raising() if how == "raising" else open(os.devnull)):
        try:
            jax.block_until_ready(program(jnp.eye(size)))
        except Exception as e:
            time.sleep(1.0)  # a program that goes on after errors: Ctrl-C must end it all the same
            if how == "raising":
                raise
    print("went on")
"""


HERE, THERE = 2, 300  # sizes of programs that XLA runs in the main thread, in its own


@pytest.mark.parametrize(
    "lane, size, how",
    [
        ("ffi", HERE, "plain"),
        pytest.param("ffi", THERE, "raising", marks=pytest.mark.full),
        ("host", HERE, "raising"),
        ("host", HERE, "plain"),
        pytest.param("host", THERE, "plain", marks=pytest.mark.full),
    ],
)
def test_keyboard_interrupt_ends_the_program(lane, size, how):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KEYBOARD), lane, str(size), how],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert "went on" not in done.stdout
    assert done.returncode in (-signal.SIGINT, 130, 1) and done.stderr.rstrip().splitlines()[
        -1
    ].startswith("KeyboardInterrupt"), done.stderr[-2000:]


BETWEEN = """
    import os, signal, sys, threading, time
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import jax, jax.numpy as jnp, bridge
    f = bridge.to_jax(lambda x: x * 1.0, lane=sys.argv[1], outputs=lambda x: x)
    # a program that XLA runs in the main thread, most of the time in code of its own
    much = lambda x: jax.lax.fori_loop(0, 200, lambda _, x: jnp.sin(x), x)
    program = jax.jit(lambda x, n: jax.lax.fori_loop(0, n, lambda i, x: much(f(x)), x))
    x = jnp.ones(64)
    jax.block_until_ready(program(x, 1))
    for k in range(8):
        timer = threading.Timer(0.2 + 0.01 * k, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        try:
            with bridge.raising():
                jax.block_until_ready(program(x, 10**6))
        except KeyboardInterrupt:
            print("interrupted")
        except Exception as e:
            print(f"an error: {e}")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        timer.join()
    assert program(x, 1).shape == x.shape
"""


def test_raising_tells_an_interrupt_between_two_calls(lane):
    """There it meets a frame above any `try`: of JAX, or the first one of a lane."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(BETWEEN), lane],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0 and done.stdout.split() == ["interrupted"] * 8, (
        done.stdout[-1000:],
        done.stderr[-1000:],
    )


def test_raising_leaves_a_handler_of_the_users_alone():
    handler, before = lambda *_: None, signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, handler)
    try:
        with bridge.raising():
            assert signal.getsignal(signal.SIGINT) is handler
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_raising_takes_no_other_error_for_an_interrupt(lane):
    """The user has caught Ctrl-C inside of the block; what comes later stays what it is."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(NoSuchSpecies), bridge.raising():
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            jax.block_until_ready(jax.jit(bridged(broken, lane=lane))(X))
    finally:
        signal.signal(signal.SIGINT, before)


# What a call must not do: each names the culprit.

kept = []


def _keep(x):
    kept.append(x)
    return x * 2


def _keep_view(x):
    kept.append(x.view(-1)[1:])
    return x * 2


def _keep_graph(x):
    with torch.enable_grad():  # which keeps x for the gradient of the weight
        kept.append(x * torch.ones(3, dtype=x.dtype, requires_grad=True))
    return x * 2


def _keep_storage(x):
    kept.append(x.untyped_storage())
    return x * 2


def _keep_array(x):
    kept.append(x.numpy())
    return x * 2


def _keep_capsule(x):
    kept.append(x.__dlpack__())
    return x * 2


def _in_place(x):
    x.add_(1.0)
    return x


class Caches(torch.nn.Module):
    def forward(self, x):
        self.last = x.view(-1)
        return x * 2


CULPRITS = {
    "a tensor kept": (
        _keep,
        "expected _keep to keep no view of its inputs after the call .* got input argument 0 still "
        "referenced; store a .detach.*clone",
    ),
    "a view kept": (
        _keep_view,
        "expected _keep_view to keep no view .* got input argument 0 still referenced",
    ),
    "a graph kept": (
        _keep_graph,
        "expected _keep_graph to keep no view .* got input argument 0 still referenced",
    ),
    "a storage kept": (
        _keep_storage,
        "expected _keep_storage to keep no view .* got input argument 0 still referenced",
    ),
    "an array kept": (
        _keep_array,
        "expected _keep_array to keep no view .* got input argument 0 still referenced",
    ),
    "a capsule kept": (
        _keep_capsule,
        "expected _keep_capsule to keep no view .* got input argument 0 still referenced",
    ),
    "kept by a module": (
        Caches(),
        "expected Caches to keep no view .* got input argument 0 still referenced",
    ),
    "changed in place": (
        _in_place,
        "expected _in_place to leave its inputs as they are, got input argument 0 changed in place",
    ),
    "no tensor": (
        lambda x: 3.0,
        r"expected output 0 of .*lambda.* as a torch.Tensor, got float 3.0; return torch.as_tensor",
    ),
    "wrong shape": (
        lambda x: x[1:],
        r"expected output 0 of .*lambda.* as float64\[3\], got float64\[2\]; shapes and dtypes are fixed",
    ),
    "wrong dtype": (
        lambda x: x.float(),
        r"expected output 0 of .* as float64\[3\], got float32\[3\]",
    ),
    "another structure": (lambda x: {"energy": x}, "expected outputs .* got .*energy"),
    "sparse": (
        lambda x: x.to_sparse(),
        "as a dense tensor, got layout torch.sparse_coo; return it .to_dense",
    ),
    "sparse rows": (
        lambda x: x[None].to_sparse_csr(),
        "as a dense tensor, got layout torch.sparse_csr; return it .to_dense",
    ),
}


@pytest.mark.matrix
@pytest.mark.parametrize("way", ["eager", "ffi", "host"])
@pytest.mark.parametrize("culprit", CULPRITS)
def test_what_a_call_must_not_do(culprit, way):
    f, text = CULPRITS[culprit]
    g = bridge.to_jax(f, outputs=SAME, lane="auto" if way == "eager" else way)
    with pytest.raises((TypeError, ValueError), match=text), bridge.raising():
        (g if way == "eager" else jax.jit(g))(X + 0)
    kept.clear()


@pytest.mark.parametrize("way", ["eager", "ffi", "host"])
def test_a_change_in_place_that_values_decide(way):
    """No look at types sees it before the call."""

    def changing(x):
        if float(x.sum()) > 0:
            x.add_(1)
        return x * 2

    g = bridge.to_jax(changing, outputs=SAME, lane="auto" if way == "eager" else way)
    f = g if way == "eager" else jax.jit(g)
    assert f(-X - 1).tolist() == (-2 * X - 2).tolist()
    with pytest.raises(ValueError, match="in place"), bridge.raising():
        f(X + 1)


def test_a_look_at_the_storage_is_no_crime(lane):
    def looking(x):
        assert x.untyped_storage().nbytes() >= 8 * x.numel() and x.numpy().shape == x.shape
        return x * 2

    with bridge.raising():
        f = jax.jit(bridge.to_jax(looking, outputs=SAME, lane=lane))
        assert f(f(X)).tolist() == (4 * X).tolist()


def test_a_reference_cycle_is_no_crime(lane):
    def cyclic(x):
        box = [x]
        box.append(box)
        return x * 2

    with bridge.raising():
        assert jax.jit(bridge.to_jax(cyclic, lane=lane))(X).tolist() == (2 * X).tolist()


def test_another_thread_lets_go_a_moment_later(lane):
    """As XLA does with the inputs of a JAX function inside."""

    def read(x):
        threading.Thread(target=lambda x: time.sleep(0.02), args=(x.view(-1),)).start()
        return x * 2

    with bridge.raising():
        assert jax.jit(bridge.to_jax(read, lane=lane))(X).tolist() == (2 * X).tolist()


# Raised before anything runs.


class Noisy(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.inner = torch.nn.Sequential(torch.nn.Linear(3, 3), layer)

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize(
    "layer",
    [torch.nn.Dropout(), torch.nn.BatchNorm1d(3), torch.nn.AlphaDropout(), torch.nn.RReLU()],
)
def test_training_mode_is_an_error_that_names_the_layer(layer):
    net = Noisy(layer)
    text = rf"expected Noisy in evaluation mode, got layer inner.1 \({type(layer).__name__}\) in training mode.*call .eval"
    for make in (bridge.to_jax, bridge.functional, lambda m: bridge.to_jax(m.forward)):
        with pytest.raises(ValueError, match=text):
            make(net)
    bridge.to_jax(net.eval())
    f = bridge.to_jax(net)
    net.train()
    with pytest.raises(ValueError, match=text):
        f(jnp.ones((2, 3), jnp.float32))


def test_dropout_that_draws_nothing_is_fine():
    bridge.to_jax(Noisy(torch.nn.Dropout(0.0)))


BAD_CALLS = {
    "torch tensor": (
        lambda: bridge.to_jax(torch.sin)(torch.ones(3)),
        TypeError,
        r"expected JAX or NumPy arrays as arguments .* got Tensor; convert it first: bridge.to_jax\(tensor\)",
    ),
    "unhashable": (
        lambda: bridge.to_jax(torch.sin)(X, {1: {2}}),
        TypeError,
        "expected arrays, or hashable Python values, as arguments, got a set; pass arrays",
    ),
    "lane": (
        lambda: bridge.to_jax(torch.sin, lane="gpu"),
        ValueError,
        "expected lane as one of 'auto', 'ffi', 'host', 'native', got 'gpu'",
    ),
    "derivatives": (
        lambda: bridge.to_jax(torch.sin, derivatives="fd"),
        ValueError,
        "expected derivatives as one of 'func', 'autograd', got 'fd'",
    ),
    "batched": (
        lambda: bridge.to_jax(torch.sin, batched="yes"),
        ValueError,
        "expected batched as one of 'vmap', 'sequential', 'graph', an axis .*, got 'yes'",
    ),
    "batched names": (
        lambda: bridge.to_jax(lambda x: x, batched={"y": 0})(X),
        ValueError,
        r"expected names of array arguments in batched= \(x\), got y",
    ),
    "outputs": (
        lambda: bridge.to_jax(torch.sin, outputs=3)(X),
        TypeError,
        "expected outputs= as a pytree of jax.ShapeDtypeStruct, got int 3",
    ),
    "gradients": (
        lambda: bridge.functional(torch.nn.Linear(1, 1), gradients=True),
        ValueError,
        "expected gradients as one of 'trainable', 'all', got True",
    ),
    "data-dependent": (
        lambda: bridge.to_jax(lambda x: x[x > 0])(X),
        ValueError,
        "expected output shapes of .* that depend on input shapes alone, got a data-dependent "
        "operation; declare outputs=",
    ),
    "leaf": (
        lambda: bridge.to_jax({"a": [torch.ones(1), 3]}),
        TypeError,
        r"expected a torch.Tensor at \['a'\]\[1\], got int 3",
    ),
    "array leaf": (
        lambda: bridge.to_torch({"a": 3}),
        TypeError,
        r"expected a jax.Array at \['a'\], got int 3",
    ),
    "tracer": (lambda: jax.jit(lambda x: bridge.to_torch(x))(X), TypeError, r"to_jax\(function\)"),
    "unknown name": (
        lambda: bridge.nothing,
        AttributeError,
        "module 'bridge' has no attribute 'nothing'",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_are_refused_early(case):
    call, kind, text = BAD_CALLS[case]
    with pytest.raises(kind, match=text):
        call()


def test_shape_inference_keeps_the_error_of_the_model_and_says_where():
    with pytest.raises(
        RuntimeError,
        match="mat1 and mat2|must match|size mismatch|a and b must have same reduction dim",
    ) as caught:
        jax.jit(bridge.to_jax(lambda x: torch.ones(2, 5) @ x))(X)
    assert any("fake tensors to find its output shapes" in note for note in caught.value.__notes__)


def test_real_values_needed_says_declare_outputs():
    with pytest.raises(Exception) as caught:
        bridge.to_jax(lambda x: torch.from_numpy(x.numpy() * 2))(X)
    assert "outputs=" in "".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    declared = bridge.to_jax(lambda x: torch.from_numpy(x.numpy() * 2), outputs=SAME)
    assert jax.jit(declared)(X).tolist() == (2 * X).tolist()


def test_a_module_that_caches_in_shape_inference_is_told():
    class Lazy(torch.nn.Module):
        table = None

        def forward(self, x):
            if self.table is None:
                self.table = torch.arange(3.0)
            return x * self.table

    with pytest.raises(ValueError, match="attribute table.*declare outputs="):
        bridge.to_jax(Lazy())(X)


def test_64_bit_outputs_without_x64():
    with jax.enable_x64(False):
        x = jnp.ones(3)
        with pytest.raises(
            ValueError,
            match=r"expected output 0 of .* of at most 32-bit parts while x64 is off, got float64\[3\]; call jax.config.update",
        ):
            bridge.to_jax(lambda x: x.double())(x)
        with pytest.raises(
            ValueError,
            match=r"expected a NumPy argument of at most 32-bit parts .* got float64\[2\]",
        ):
            import numpy as np

            bridge.to_jax(torch.sin)(np.ones(2))


# Transforms that a model refuses.


class Direct(torch.nn.Module):
    """Computes its forces by torch.autograd inside, as many potentials do."""

    def forward(self, x):
        x = x.requires_grad_(True)
        e = (x**3).sum()
        return e, torch.autograd.grad(e, x, create_graph=True)[0]


def test_an_inner_autograd_goes_by_derivatives_autograd(lane):
    f = bridge.to_jax(Direct(), lane=lane, derivatives="autograd", batched="sequential")
    e, g = jax.jit(f)(X)
    assert g.tolist() == (3 * X**2).tolist()
    assert jnp.allclose(jax.jit(jax.jacrev(lambda x: f(x)[1]))(X), jnp.diag(6 * X))


def test_torch_func_refusal_names_the_alternative(lane):
    def hooks(x):
        return (x.requires_grad_(True) ** 2).sum()

    f = bridge.to_jax(hooks, lane=lane)
    with pytest.raises(RuntimeError) as caught:
        jax.hessian(f)(X)
    assert any('derivatives="autograd"' in n for n in caught.value.__notes__)
    with pytest.raises(jax.errors.JaxRuntimeError, match='derivatives="autograd"'):
        jax.block_until_ready(jax.jit(jax.hessian(f))(X))


def test_scripted_parts_are_named():
    net = Noisy(torch.nn.ReLU())
    net.inner[1] = torch.jit.script(torch.nn.Tanh())
    from torch_side.calls.running import _culprits

    assert _culprits(net) == " (TorchScript parts: inner.1)"


def test_vmap_of_autograd_derivatives_names_the_alternative(lane):
    f = bridge.to_jax(lambda x: (x**2).sum(), lane=lane, derivatives="autograd")
    with pytest.raises(
        NotImplementedError, match='got batched="vmap" .* pass batched="sequential"'
    ):
        jax.vmap(jax.grad(f))(jnp.stack([X, X]))
    # many tangents at one point need no such batch
    assert (jax.hessian(f)(X).reshape(X.size, X.size) == 2 * jnp.eye(X.size)).all()


def test_native_batch_refuses_what_it_cannot_serve(lane):
    f = bridge.to_jax(lambda x, w: x * w, lane=lane, batched={"x": 0})
    with pytest.raises(
        NotImplementedError,
        match=r"expected vmap over the inputs named in batched= of .* only, got input argument 1; name its axis",
    ):
        jax.vmap(f, (None, 0))(X, jnp.stack([X, X]))
    with pytest.raises(
        NotImplementedError, match=r"got input argument 1 without a batch axis; name it in batched="
    ):
        jax.vmap(jax.jacrev(f, 1), (0, None))(jnp.stack([X, X]), X)


def test_native_batch_shape_is_checked_never_trusted(lane):
    f = bridge.to_jax(
        lambda x: x.sum(), lane=lane, outputs=lambda x: jax.ShapeDtypeStruct((), x.dtype), batched=0
    )
    with (
        pytest.raises(
            ValueError, match=r"expected output 0 of .* as float64\[2\], got float64\[\]"
        ),
        bridge.raising(),
    ):
        jax.jit(jax.vmap(f))(jnp.stack([X, X]))


def test_random_numbers_under_vmap_are_an_error(lane):
    f = bridge.to_jax(lambda x: x + torch.rand_like(x), lane=lane)
    with pytest.raises(RuntimeError, match="random"), bridge.raising():
        jax.jit(jax.vmap(f))(jnp.stack([X, X]))
