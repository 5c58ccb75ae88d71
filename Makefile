# Everything that is typed in this project. `make demo` and `make test` each work alone on a fresh clone.
PYTHON ?= python3
TORCH ?= torch==2.13.0
RANKS ?= 2

VENV := .venv
BIN := $(VENV)/bin
DEMO := data/demo
RUN := runs/demo

.PHONY: setup demo test test-slurm soak check clean
.DELETE_ON_ERROR:

setup: $(VENV)/ready

# torch comes first and by its exact version: an unpinned torch pulls gigabytes of CUDA packages.
$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

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

test: setup
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder \
		--ignore tests/slurm
	$(BIN)/python -m pytest tests/slurm

# On a cluster of virtual nodes of its own, which wants the machine for itself: hence after the other tests.
# Skipped, with the reason, without root or Slurm's packages (tests/slurm/install.sh).
test-slurm: setup
	$(BIN)/python -m pytest tests/slurm

# 20 runs that are killed 10 times each; `make test` has 2, killed once.
soak: setup
	KILLED_RUNS=20 KILLS_PER_RUN=10 $(BIN)/python -m pytest tests/faults/test_kills.py

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/shellcheck --external-sources .ci/run $$(git ls-files 'slurm/*.sh' 'slurm/*.sbatch' 'slurm/clusters/*.env' 'tests/slurm/*.sh')

clean:
	rm -rf $(DEMO) $(RUN)
