"""Long runs in jitted chunks: a progress bar, observables and trajectories on disk, a checkpoint,
Ctrl-C that costs one chunk."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

import ase.io
import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

import bridge
from bridge import archive, writing
from bridge.errors import message

ROOM = 2**20  # bytes of a checkpoint beside its arrays


@dataclass(frozen=True)
class Run:
    """What `run` returns: the last state, steps done of all that were asked for, observables by
    step from the first on."""

    state: object
    done: int
    steps: int
    observables: dict = field(repr=False)

    @property
    def finished(self) -> bool:
        return self.done == self.steps


def run(
    step,
    state,
    steps,
    *,
    chunk,
    path,
    observe=None,
    frames=None,
    settings=None,
    resume=False,
    desc="run",
    shown=None,
) -> Run:
    """`steps` of `step`, in jitted scans of `chunk`; what it sees goes to disk after each, and
    Ctrl-C loses nothing of it.

    step      state -> state, or state -> (state, seen), as of jax_side.engines.jax_md.observed;
              anything jit can take
    state     a pytree of arrays (a jax-md state, PRNG keys included)
    observe   (state, seen) -> a dict of arrays, for each step, inside the scan (seen is None if
              step gives none). Each step is a JSON line in `<path>.jsonl`, all come back in
              Run.observables as arrays (steps, ...)
    frames    (state, observables of the chunk's last step) -> {name: ase.Atoms}, after each chunk;
              each is appended to `<path>-<name>.extxyz`
    settings  what makes the run what it is, JSON: a checkpoint of others is refused
    desc      what the progress bar is called; None: no bar
    shown     observables of a chunk's last step -> a dict for the progress bar

    After each chunk `<path>.ckpt.npz` is replaced, at once or not at all. With resume=True the run
    goes on from there to `steps`, and `state` (as for a new run) only says what a state looks like;
    without a checkpoint it begins. The state after it, the trajectories and the observables are to
    the bit those of a run that was never stopped, given a model that repeats its bits: what was
    written after the checkpoint (a killed run) is cut off first. Frames are written whole, with one
    write.

    The first Ctrl-C lets the chunk end, writes it and returns; the second leaves the chunk at once,
    and the last checkpoint stands. Both close the files, print how to go on and return a Run with
    finished False. Elsewhere than in the main thread, where Python has no signals, a
    KeyboardInterrupt does as the second.

    Raises: ValueError where chunk does not divide steps, and for a checkpoint of another state,
    chunk or settings, one beyond `steps`, one without its files, or one that can't be read; OSError
    that names the file, where the disk is full, and the last checkpoint stands; what the model
    raises arrives as it is, and the checkpoint stands.

    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/doubling"
    >>> run(lambda x: 2 * x, jax.numpy.ones(()), 4, chunk=2, path=path, observe=lambda x, _: {"x": x}, desc=None).observables["x"].tolist()
    [2.0, 4.0, 8.0, 16.0]
    >>> float(run(lambda x: 2 * x, jax.numpy.ones(()), 6, chunk=2, path=path, resume=True, desc=None).state)
    64.0
    """
    if chunk < 1 or steps % chunk:
        raise ValueError(
            message(
                "steps as a multiple of chunk",
                f"steps {steps}, chunk {chunk}",
                "change one of them",
            )
        )
    files = Files(Path(path), json.loads(json.dumps({"chunk": chunk, **(settings or {})})))
    template = [_host(leaf) for leaf in jax.tree.leaves(state)]
    done, leaves = (
        files.load(template, steps)
        if resume and files.checkpoint.exists()
        else (0, files.begin(template))
    )
    state, many = _device(leaves, state), jax.jit(_scanned(step, observe, chunk))
    with (
        Interrupts() as interrupts,
        tqdm(
            total=steps, initial=done, desc=desc, unit="step", file=sys.stdout, disable=desc is None
        ) as bar,
    ):
        while done < steps and not interrupts.asked:
            try:
                with interrupts.allowed(), bridge.raising():
                    after, seen = jax.block_until_ready(many(state))
            except BaseException as error:
                if interrupts.asked < 2 and not isinstance(error, KeyboardInterrupt):
                    raise
                interrupts.asked = 2
                break
            state, done, seen = after, done + chunk, jax.tree.map(_host, seen)
            last = {name: x[-1] for name, x in seen.items()}
            files.append(seen, frames(state, last) if frames else {})
            files.save(done, [_host(leaf) for leaf in jax.tree.leaves(state)])
            bar.update(chunk)
            bar.set_postfix(shown(last) if shown else {})
    if done < steps:
        print(
            f"stopped after {done} of {steps} steps; to go on, run again with resume=True "
            f"(--resume): {files.checkpoint}",
            flush=True,
        )
    return Run(state, done, steps, files.observables())


class Files:
    """The checkpoint of a run, its observables and its trajectories."""

    def __init__(self, path, settings):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.settings, self.sizes = path, settings, {}
        self.checkpoint, self.lines = _beside(path, ".ckpt.npz"), _beside(path, ".jsonl")

    def begin(self, leaves):
        """A new run: nothing of an old one of this name is left."""
        for old in (
            self.checkpoint,
            self.lines,
            *self.path.parent.glob(f"{_escaped(self.path.name)}-*.extxyz"),
        ):
            old.unlink(missing_ok=True)
        self.append({}, {})
        return leaves

    def append(self, seen, frames):
        """One write for each file, so that readers find whole lines and frames."""
        rows = zip(*([(name, x) for x in array.tolist()] for name, array in seen.items()))
        self._append(self.lines, "".join(json.dumps(dict(row)) + "\n" for row in rows))
        for name, atoms in frames.items():
            text = io.StringIO()
            ase.io.write(text, atoms, format="extxyz")
            self._append(_beside(self.path, f"-{name}.extxyz"), text.getvalue())

    def _append(self, file, text):
        left = memoryview(text.encode())
        with writing.named(file), open(file, "ab", buffering=0) as opened:
            while left:  # a disk that is almost full takes a part
                left = left[opened.write(left) :]
            os.fsync(opened.fileno())  # the checkpoint will say that it is there
            self.sizes[file.name] = opened.tell()

    def save(self, done, leaves):
        """The checkpoint, complete before it gets its name."""
        meta = json.dumps(dict(done=done, settings=self.settings, sizes=self.sizes))
        with writing.whole(self.checkpoint) as opened:
            np.savez(
                opened, meta=np.array(meta), **{f"leaf_{i}": leaf for i, leaf in enumerate(leaves)}
            )

    def load(self, template, steps):
        """Steps done and leaves of the state, checked; files cut to what they were."""
        try:
            meta, leaves = self._read(sum(x.nbytes for x in template))
        except Exception as error:  # NumPy has no one exception for what it can't read
            raise ValueError(
                message(
                    "a checkpoint of runs.run",
                    f"{self.checkpoint}, which can't be read ({archive.said(error)})",
                    "begin anew (resume=False)",
                )
            ) from error
        kinds, found = ([(x.shape, str(x.dtype)) for x in part] for part in (template, leaves))
        differ = sorted(
            k
            for k in {*self.settings, *meta["settings"]}
            if self.settings.get(k) != meta["settings"].get(k)
        )
        here, there = ({k: s.get(k) for k in differ} for s in (self.settings, meta["settings"]))
        for fine, expected, got in [
            (not differ, f"a checkpoint with {here}", f"one with {there}"),
            (
                kinds == found,
                f"a checkpoint of {len(kinds)} arrays like the state's",
                f"{len(found)} of other shapes or dtypes",
            ),
            (
                meta["done"] <= steps,
                f"a checkpoint of at most {steps} steps",
                f"one of {meta['done']}",
            ),
        ]:
            if not fine:
                raise ValueError(
                    message(
                        expected,
                        got,
                        f"go on as it began, or begin anew (resume=False): {self.checkpoint}",
                    )
                )
        self._cut(meta["sizes"])
        return meta["done"], leaves

    def _read(self, n_bytes):
        """What `save` wrote: meta, of the kinds that it wrote, and the leaves, which have about
        `n_bytes` bytes."""
        saved = archive.entries(self.checkpoint.read_bytes(), n_bytes + ROOM)
        arrays = {
            name: np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
            for name, data in saved.items()
        }
        meta = json.loads(arrays.pop("meta.npy").item())
        mine = f"{self.path.name}-"
        for name, size in meta["sizes"].items():
            other = Path(name).name != name or not name.startswith(mine)
            if name != self.lines.name and (other or not name.endswith(".extxyz")):
                raise ValueError(f"a file {name!r:.80}, which is none of this run's")
            _check_count(size)
        _check_count(meta["done"])
        if not isinstance(meta["settings"], dict):
            raise ValueError("settings that are no dict")
        return meta, [arrays[f"leaf_{i}.npy"] for i in range(len(arrays))]

    def _cut(self, sizes):
        for name, size in sizes.items():
            file = self.path.parent / name
            if not file.exists() or file.stat().st_size < size:
                raise ValueError(
                    message(
                        f"{file} with at least {size} bytes, as at the checkpoint",
                        "less",
                        "bring it back, or begin anew (resume=False)",
                    )
                )
        for name, size in sizes.items():
            os.truncate(self.path.parent / name, size)
        for file in self.path.parent.glob(f"{_escaped(self.path.name)}-*.extxyz"):
            if file.name not in sizes:
                file.unlink()
        self.sizes = dict(sizes)

    def observables(self):
        """All of them from the file, (steps, ...)."""
        try:
            rows = [json.loads(line) for line in self.lines.read_text().splitlines()]
            names = rows[0] if rows else ()
            return {name: np.array([row[name] for row in rows]) for name in names}
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                message(
                    f"observables of runs.run in {self.lines}",
                    archive.said(error),
                    "bring the file back, or begin anew (resume=False)",
                )
            ) from error


class Interrupts:
    """SIGINT, counted: noted at first, a KeyboardInterrupt at the second time if that is allowed at
    the moment."""

    def __init__(self):
        self.asked, self.can, self.before = 0, False, None

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_):
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)

    def _note(self, *_):
        self.asked += 1
        if self.asked == 1:
            print("\nCtrl-C: this chunk ends first; once more to leave it at once", flush=True)
        elif self.can:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def allowed(self):
        self.can = True
        try:
            yield
        finally:
            self.can = False


def _scanned(step, observe, chunk):
    """state -> (state, observables of each of `chunk` steps)."""

    def one(state, _):
        kind, after = jax.tree.structure(state), step(state)
        after, seen = (after, None) if jax.tree.structure(after) == kind else after
        return after, observe(after, seen) if observe else {}

    return lambda state: jax.lax.scan(one, state, None, length=chunk)


def _host(leaf):
    """A leaf of the state as numpy has it, whole; of a typed key its data."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    typed = isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if typed else jax.numpy.asarray(leaf))


def _device(leaves, like):
    """The state of these leaves, typed as in `like`, weakly where that is, and over as many devices
    as there: a new run and a checkpoint get the same program."""

    def back(leaf, old):
        typed = isinstance(old, jax.Array) and jax.dtypes.issubdtype(old.dtype, jax.dtypes.prng_key)
        # jax-md's tau, a number of Python
        weak = leaf.ndim == 0 and getattr(old, "weak_type", not hasattr(old, "dtype"))
        array = jax.numpy.asarray(leaf.item()) if weak else jax.numpy.array(leaf)
        array = jax.random.wrap_key_data(array, impl=jax.random.key_impl(old)) if typed else array
        over = isinstance(old, jax.Array) and old.sharding.num_devices > 1
        return jax.device_put(array, old.sharding) if over else array

    old, structure = jax.tree.flatten(like)
    return jax.tree.unflatten(structure, [back(*pair) for pair in zip(leaves, old)])


def _check_count(n):
    if isinstance(n, bool) or not isinstance(n, int) or n < 0:
        raise ValueError(f"{n!r:.40} where a number of steps or bytes should be")


def _beside(path, suffix):
    return path.with_name(path.name + suffix)


def _escaped(name):
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
