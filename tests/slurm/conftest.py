"""The virtual cluster, and a run that is small enough for it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from distributed.ranks import run_command
from slurm.virtual_cluster import VirtualCluster, why_not

REPOSITORY = Path(__file__).parents[2]

_PIPELINE = """
run: {{name: tiny, folder: {folder}/runs, seed: 3}}
parallel: {{tensor: 2, timeout_minutes: 3}}
model:
  vocab_size: 512
  decoder: {{num_layers: 2, hidden_size: 32, num_heads: 4}}
  encoders:
    text: {{num_layers: 1, hidden_size: 32, num_heads: 2, max_text_positions: 16}}
    image:
      num_layers: 1
      hidden_size: 32
      num_heads: 2
      max_text_positions: 16
      image: {{image_size: 24, patch_size: 12}}
data:
  tokenizer: {folder}/tokenizer
  sequence_length: 64
  lanes: 4
  workers: 0
  spans: {{min_length: 4, max_length: 8}}
  sources:
    text: {{path: {folder}/text, kind: text, encoder: text}}
    scenes: {{path: {folder}/scenes, kind: image_text, encoder: image}}
training:
  steps: 16
  global_batch_size: 4
  micro_batch_size: 1
  precision: fp32
  optimizer: {{learning_rate: 1.0e-3}}
  schedule: {{warmup_steps: 2}}
checkpoint: {{every_steps: 8}}
monitor: {{log_every_steps: 1, evaluate_every_steps: 1000, sample_every_steps: 1000}}
"""


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VirtualCluster]:
    """Three nodes for all tests; each test leaves them idle."""
    if reason := why_not():
        pytest.skip(reason)
    running = VirtualCluster(tmp_path_factory.mktemp("cluster"))
    yield running
    running.close()


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline with its data, made by the tools as an operator calls them."""
    folder = tmp_path_factory.mktemp("tiny")
    raw = folder / "raw"
    sizes = ("--image-size", "24", "--scenes", "60", "--evaluation-scenes", "4", "--text-mib", "1")
    texts, scenes = str(raw / "text/train.jsonl"), str(raw / "scenes/train.jsonl")
    tokenizer = str(folder / "tokenizer")
    for tool, *arguments in (
        ("make_demo_data", str(raw), *sizes),
        ("train_tokenizer", texts, "--captions", scenes, "--vocab-size", "512", "--out", tokenizer),
        ("prepare_text", texts, "--tokenizer", tokenizer, "--out", str(folder / "text")),
        ("prepare_image_text", scenes, "--out", str(folder / "scenes")),
    ):
        command = [sys.executable, str(REPOSITORY / "tools" / f"{tool}.py"), *arguments]
        code, output = run_command(command, timeout_s=120)
        assert code == 0, output
    (folder / "tiny.yaml").write_text(_PIPELINE.format(folder=folder))
    return folder / "tiny.yaml"
