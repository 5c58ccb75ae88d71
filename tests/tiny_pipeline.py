"""A tiny pipeline with its data, made by the tools as an operator calls them."""

from __future__ import annotations

from pathlib import Path

from distributed.ranks import run_program

REPOSITORY = Path(__file__).parents[1]
NUM_SCENES = 200

_PIPELINE = """
run: {{name: tiny, folder: {folder}/runs, seed: 3}}
parallel: {{timeout_minutes: 3}}
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
    text: {{path: {folder}/text, readers: {{text: text}}}}
    scenes: {{path: {folder}/scenes, readers: {{image: image, text: image}}}}
  evaluation:
    text: {{path: {folder}/text, readers: {{text: text}}}}
    scenes: {{path: {folder}/scenes, readers: {{image: image, text: image}}}}
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


def prepare_tiny(folder: Path) -> None:
    """Write raw data, a tokenizer, shards `text` and `scenes`, and `tiny.yaml` that trains on them."""
    folder.mkdir(exist_ok=True)
    raw, tokenizer = folder / "raw", folder / "tokenizer"
    texts, scenes = raw / "text/train.jsonl", raw / "scenes/train.jsonl"
    sizes = ("--image-size", 24, "--scenes", NUM_SCENES, "--evaluation-scenes", 20, "--text-mib", 1)
    for tool, *arguments in (
        ("make_demo_data", raw, *sizes),
        ("train_tokenizer", texts, "--captions", scenes, "--vocab-size", 512, "--out", tokenizer),
        ("prepare_text", texts, "--tokenizer", tokenizer, "--out", folder / "text"),
        ("prepare_image_text", scenes, "--out", folder / "scenes"),
    ):
        words = [str(REPOSITORY / "tools" / f"{tool}.py"), *map(str, arguments)]
        code, output = run_program(words, timeout_s=120)
        assert code == 0, output
    (folder / "tiny.yaml").write_text(_PIPELINE.format(folder=folder))
