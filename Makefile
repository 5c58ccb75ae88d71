# Everything that is typed in this project. `make demo` and `make test` each work alone on a fresh clone.
PYTHON ?= python3
TORCH ?= torch==2.13.0
RANKS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest
PARALLEL := --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder
# What meets transformers, Triton, DeepSpeed and Megatron.
VERSIONED_TESTS := tests/conversion tests/kernels tests/distributed

DEMO := data/demo
RUN := runs/demo

.PHONY: setup constraints demo reproduce test test-fast test-newest test-oldest test-slurm soak check docs clean
.DELETE_ON_ERROR:

setup: $(VENV)/ready

# In the versions of constraints.txt. torch comes first: where it has a build without CUDA, that is taken. What
# DeepSpeed compiles for ranks on CPU is compiled here, not at the first start.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade --constraint constraints.txt pip
	$(BIN)/pip install --quiet --constraint constraints.txt "$(TORCH)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m metalm.training.extensions > $(VENV)/extensions.log 2>&1 || { cat $(VENV)/extensions.log; exit 1; }
	touch $@

# The newest and the oldest versions that pyproject.toml allows, each in an environment of its own.
test-newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet "$(TORCH)"
	.venv-newest/bin/pip install --quiet --upgrade --upgrade-strategy eager --editable ".[dev]"
	.venv-newest/bin/python -m pytest $(PARALLEL) $(VERSIONED_TESTS)

test-oldest:
	$(PYTHON) -m venv .venv-oldest
	$(PYTHON) tools/lower_bounds.py > .venv-oldest/constraints.txt
	.venv-oldest/bin/pip install --quiet --constraint .venv-oldest/constraints.txt --editable ".[dev]"
	.venv-oldest/bin/python -m pytest $(PARALLEL) $(VERSIONED_TESTS)

# Writes constraints.txt anew from the environment, once its tests have passed.
constraints: setup
	{ sed '/^[^#]/d' constraints.txt; $(BIN)/pip list --format freeze --exclude-editable | sed 's/+[a-z0-9.]*$$//'; } > $(VENV)/constraints.txt
	mv $(VENV)/constraints.txt constraints.txt

demo: setup $(DEMO)/ready
	$(BIN)/torchrun --nproc-per-node $(RANKS) -m metalm train pipelines/demo.yaml
	$(BIN)/torchrun --nproc-per-node $(RANKS) -m metalm evaluate pipelines/demo.yaml --samples 200
	rm -rf $(RUN)/hf
	$(BIN)/python tools/convert_to_hf.py $(RUN) $(RUN)/hf
	$(BIN)/python tools/summarise_demo.py $(RUN)

$(DEMO)/ready: | setup
	rm -rf $(DEMO)
	$(BIN)/python tools/prepare_demo.py $(DEMO)
	touch $@

# The paper's claims in small, on public data: hours on a laptop. `make reproduce CLAIMS=b` takes one of them.
CLAIMS ?=
ONLY := $(if $(CLAIMS),--only $(CLAIMS))
SCALE ?= cpu
reproduce: setup
	$(BIN)/python tools/fetch_data.py $$($(BIN)/python tools/reproduce.py $(ONLY) --sets)
	$(BIN)/python tools/reproduce.py $(ONLY) --scale $(SCALE)

# All tests but the soak; those on a Slurm cluster after the others, since their jobs time out on a busy machine.
test: setup
	$(PYTEST) $(PARALLEL) -m "not slurm"
	$(MAKE) test-slurm

# For the time between two commits: neither ranks nor commands nor a cluster is started.
test-fast: setup
	$(PYTEST) $(PARALLEL) -m "not ranks and not slurm and not slow"

# Each worker has a cluster of virtual nodes of its own; most of a job's time is waiting for Slurm. Skipped, with
# the reason, without root or Slurm's packages (tests/slurm/install.sh).
test-slurm: setup
	$(PYTEST) -m slurm --numprocesses 3 --dist loadgroup

# 20 runs that are killed 10 times each; `make test` has 2, killed once.
soak: setup
	KILLED_RUNS=20 KILLS_PER_RUN=10 $(PYTEST) tests/faults/test_kills.py

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/shellcheck --external-sources .ci/run $$(git ls-files 'slurm/*.sh' 'slurm/*.sbatch' 'slurm/clusters/*.env' 'tests/slurm/*.sh')
	$(BIN)/hadolint slurm/container/Dockerfile

# The site of documentation, in build/site; warnings are errors.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

clean:
	rm -rf $(DEMO) $(RUN)
