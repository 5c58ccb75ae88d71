# Everything that is typed in this project. `make demo` and `make test` each work alone on a fresh clone.
PYTHON ?= python3
TORCH ?= torch==2.13.0
RANKS ?= 2

VENV := .venv
BIN := $(VENV)/bin
DEMO := data/demo
RUN := runs/demo

.PHONY: setup demo test test-fast test-slurm soak check clean
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
	$(BIN)/python tools/make_demo_data.py $(DEMO)/raw --image-size 48
	$(BIN)/python tools/train_tokenizer.py $(DEMO)/raw/text/train.jsonl \
		--captions $(DEMO)/raw/scenes/train.jsonl --vocab-size 2048 --out $(DEMO)/tokenizer
	for split in train heldout; do \
		$(BIN)/python tools/prepare_text.py $(DEMO)/raw/text/$$split.jsonl \
			--tokenizer $(DEMO)/tokenizer --shard-mib 4 --out $(DEMO)/shards/text_$$split || exit; \
	done
	for split in train heldout unseen; do \
		$(BIN)/python tools/prepare_image_text.py $(DEMO)/raw/scenes/$$split.jsonl \
			--out $(DEMO)/shards/scenes_$$split || exit; \
	done
	touch $@

PYTEST := $(BIN)/python -m pytest
PARALLEL := --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

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
	KILLED_RUNS=20 KILLS_PER_RUN=10 $(BIN)/python -m pytest tests/faults/test_kills.py

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/shellcheck --external-sources .ci/run $$(git ls-files 'slurm/*.sh' 'slurm/*.sbatch' 'slurm/clusters/*.env' 'tests/slurm/*.sh')

clean:
	rm -rf $(DEMO) $(RUN)
