"""The tables of `make bench-full`: a file for each, which measures it, and here what they are called."""

from __future__ import annotations

from typing import NamedTuple


class Table(NamedTuple):
    """The title of a table, and what is measured in it."""

    title: str
    text: str


TABLES = {  # each is a file in benchmarks/tables
    "calls": Table(
        "Torch in JAX: what a call costs",
        "Jitted, one thread. *By hand* is what one writes with public functions of JAX or of "
        "jax-tvm-ffi for this one function, with no check at all.",
    ),
    "in_torch": Table(
        "JAX in torch: what a call costs",
        "The packages that offer the same get the jitted function. Under torch.compile there is an "
        "operation of torch before and after the call, and graph breaks are allowed.",
    ),
    "models": Table(
        "Energy, forces and stress of real models",
        "NaCl, float32, neighbours found anew at each call. The lanes are jitted JAX functions. "
        "The MACE has random weights and is small. The native lane is measured where its package "
        "takes a few minutes at most, torch.compile up to 64 atoms.",
    ),
    "engines": Table(
        "Molecular dynamics and relaxation: a step",
        "NVE, and FIRE at a fixed cell, with the neighbours found in each step. The pair potential "
        "is written in torch, in float64; the Lennard-Jones that engines have of their own are "
        "cheaper functions with the same cutoff. The bare model does no step.",
    ),
    "batches": Table(
        "vmap over small systems",
        "Energy and gradients of systems of 27 atoms of an EAM-like potential in float64, "
        "microseconds a system, neighbours included.",
    ),
    "second": Table(
        "Hessians and products of them with a vector",
        "Of a crystal of an EAM-like potential in float64, and of real models in float32, beside "
        "torch.autograd and torch.func.",
    ),
    "mc": Table(
        "Monte Carlo: a move of one atom",
        "A Lennard-Jones fluid in JAX and a small network of torch, in jitted scans. Beside a move "
        "there is the full evaluation that it would cost without the cache.",
    ),
    "million": Table(
        "A million atoms, each way",
        "Energy and gradients of a pair potential on a list of 6 million edges, float32. Each "
        "variant is a process of its own, in turns. Memory is the highest that the process had, "
        "less what it had before the first call.",
    ),
    "startup": Table(
        "Start-up",
        "Whole processes, from their start to their end: imports alone, and up to the first "
        "result.",
    ),
    "shapes": Table(
        "A new shape at each call",
        "1,000 shapes one after another, as many as fit into the time of a round: what a call "
        "costs whose shape was never seen.",
    ),
    "threads": Table(
        "Threads, and the doctor's advice",
        "`python -m bridge doctor` advises no more threads than cores, and for JAX models an option "
        "of XLA's. Each variant is a process that is held to one or two cores.",
    ),
}
