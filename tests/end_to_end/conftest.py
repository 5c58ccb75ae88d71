from __future__ import annotations

import sys
from pathlib import Path

import pytest

from distributed.ranks import run_command

REPOSITORY = Path(__file__).parents[2]

TINY = """
run: {{name: tiny, seed: 3}}
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
      connector: feed_forward
data:
  tokenizer: {folder}/tokenizer
  sequence_length: 64
  lanes: 4
  workers: 1
  spans: {{min_length: 4, max_length: 8}}
  sources:
    text: {{path: {folder}/text, kind: text, encoder: text}}
    scenes: {{path: {folder}/scenes, kind: image_text, encoder: image}}
  evaluation:
    text: {{path: {folder}/text, kind: text, encoder: text}}
    scenes: {{path: {folder}/scenes, kind: image_text, encoder: image}}
training:
  steps: 8
  global_batch_size: 4
  micro_batch_size: 1
  precision: fp32
  optimizer: {{learning_rate: 1.0e-3}}
  schedule: {{warmup_steps: 2}}
checkpoint: {{every_steps: 4}}
monitor:
  log_every_steps: 1
  evaluate_every_steps: 8
  evaluation_rows: 4
  sample_every_steps: 8
  num_samples: 2
  sample_new_tokens: 8
"""


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Demo data in small, made and prepared by the tools as a user calls them; with `tiny.yaml`."""
    folder = tmp_path_factory.mktemp("tiny")
    raw = folder / "raw"
    for tool, *arguments in (
        (
            "make_demo_data",
            raw,
            "--image-size",
            24,
            "--scenes",
            200,
            "--evaluation-scenes",
            20,
            "--text-mib",
            1,
        ),
        (
            *("train_tokenizer", raw / "text/train.jsonl", "--captions", raw / "scenes/train.jsonl"),
            *("--vocab-size", 512, "--out", folder / "tokenizer"),
        ),
        (
            "prepare_text",
            raw / "text/train.jsonl",
            "--tokenizer",
            folder / "tokenizer",
            "--out",
            folder / "text",
        ),
        ("prepare_image_text", raw / "scenes/train.jsonl", "--out", folder / "scenes"),
    ):
        command = [sys.executable, str(REPOSITORY / "tools" / f"{tool}.py"), *map(str, arguments)]
        code, output = run_command(command, timeout_s=120)
        assert code == 0, output
    (folder / "tiny.yaml").write_text(TINY.format(folder=folder))
    return folder
