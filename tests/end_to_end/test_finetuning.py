"""A pretrained run is finetuned by its own commands: parts frozen, adapters, finer images."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml

from distributed.ranks import run_program
from metalm.checkpoint.folders import find_checkpoint
from metalm.checkpoint.reader import CheckpointReader
from metalm.run_metrics import read_metrics

REPOSITORY = Path(__file__).parents[2]


def train(pipeline: Path, num_ranks: int, *overrides: str) -> None:
    code, output = run_program(["-m", "metalm", "train", str(pipeline), *overrides], num_ranks)
    assert code == 0, output


def losses_of(run: Path) -> dict[int, float]:
    return {entry["step"]: entry["loss/all"] for entry in read_metrics(run) if "loss/all" in entry}


def test_an_adapter_is_trained_beside_a_pretrained_run_and_resumed_elsewhere(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    base = tmp_path / "base"
    own = (f"run.folder={tmp_path}", "monitor.sinks.tensorboard=false")
    train(tiny_data / "tiny.yaml", 1, *own, "run.name=base", "training.steps=3", "data.workers=0")
    content = {
        "extends": str(tiny_data / "tiny.yaml"),
        "initialize": {"decoder": str(base), "encoders": str(base)},
        "model": {
            "decoder": {"adapter": {"kind": "lora", "rank": 4}},
            "encoders": {
                "text": {"trained_layers": "none"},
                "image": {"image": {"image_size": 36}, "adapter": {"kind": "lora", "rank": 2}},
            },
        },
        "data": {"workers": 0, "sources": {"scenes": {"augmentation": {"operations": 2}}}},
        "training": {"optimizer": {"learning_rates": {"decoder": 2e-3, "connectors": {"image": 5e-4}}}},
        "deepspeed": {"decoder": "deepspeed_configs/decoder_zero3.json"},
    }
    pipeline = tmp_path / "finetune.yaml"
    pipeline.write_text(yaml.safe_dump(content))
    tuned = tmp_path / "tuned"
    train(pipeline, 2, *own, "run.name=tuned", "parallel.tensor=2")
    expected = losses_of(tuned)
    assert len(expected) == 8
    shutil.rmtree(tuned / "checkpoints/step_00000008")
    train(pipeline, 1, *own, "run.name=tuned")
    assert (tuned / "logs/rank_00000.log").read_text().count("resumed from") == 1
    assert losses_of(tuned) == pytest.approx(expected, abs=1e-5)

    start, end = (CheckpointReader(find_checkpoint(run)) for run in (base, tuned))
    for component in ("decoder", "encoders"):
        saved = start.parameters(component)
        for name, shape in end.parameters(component).items():
            is_adapter = name.endswith((".lora_a", ".lora_b"))
            assert is_adapter == (name not in saved)
            if not is_adapter and "image_positions" not in name and ".connector." not in name:
                assert torch.equal(start.read(component, name), end.read(component, name)), name
            if is_adapter or ".connector." in name:
                assert end.states(component, name) == ("master", "exp_avg", "exp_avg_sq")
            assert "image_positions" not in name or shape[0] == 9
