"""A run that averages its weights and keeps its best checkpoint: resumed, continued by another, exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distributed.ranks import run_program
from metalm.checkpoint.names import list_checkpoints
from metalm.checkpoint.reader import CheckpointReader
from metalm.run_metrics import read_metrics

REPOSITORY = Path(__file__).parents[2]
OVERRIDES = (
    "data.workers=0",
    "model.decoder.scale_docked_vectors=true",
    "training.average={decay: 0.6, evaluate: true}",
    "training.schedule={warmup_steps: 1, decay: constant}",
    # The highest loss is the first: not among the last checkpoints.
    "checkpoint={every_steps: 2, keep_last: 1, keep_best: {figure: held_out/text, direction: highest}}",
    "monitor.evaluate_every_steps=2",
    "monitor.sample_every_steps=100",
    "monitor.sinks.tensorboard=false",
)


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def train(data: Path, run: Path, *overrides: str) -> dict[str, dict[int, float]]:
    """Train the tiny run; answer what it has logged by figure and step."""
    words = ["-m", "metalm", "train", str(data / "tiny.yaml"), f"run.folder={run.parent}"]
    code, output = run_program([*words, f"run.name={run.name}", *OVERRIDES, *overrides])
    assert code == 0, output
    figures: dict[str, dict[int, float]] = {}
    for entry in read_metrics(run):
        for name, value in entry.items():
            figures.setdefault(name, {})[entry["step"]] = value
    return figures


def saved_steps(run: Path) -> list[int]:
    return [int(folder.name.removeprefix("step_")) for folder in list_checkpoints(run / "checkpoints")]


def named_best(run: Path) -> int:
    return int((run / "checkpoints" / "best").read_text().splitlines()[0].removeprefix("step_"))


def test_the_best_is_kept_and_found_again_continued_and_exported(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "whole"
    figures = train(tiny_data, run, "training.steps=6")
    measured = {step: figures["held_out/text"][step] for step in (2, 4, 6)}
    best = max(measured, key=lambda step: measured[step])
    assert named_best(run) == best < 6
    assert saved_steps(run) == [best, 6]
    assert figures["held_out/text/average"][0] == figures["held_out/text"][0]
    assert figures["held_out/text/average"][6] != figures["held_out/text"][6]

    branch = train(
        tiny_data,
        tmp_path / "branch",
        f"initialize.run={run / 'checkpoints' / 'best'}",
        f"training.steps={best + 2}",
        "training.schedule={warmup_steps: 1, decay: linear, decay_steps: 2}",
        "checkpoint.keep_best=null",
    )
    assert min(branch["loss/all"]) == best + 1
    assert branch["loss/all"][best + 1] == figures["loss/all"][best + 1]
    assert branch["optimizer/learning_rate"] == {best + 1: pytest.approx(5e-4), best + 2: 0.0}

    (run / "checkpoints" / "best").unlink()  # as if killed before it was written
    figures = train(tiny_data, run, "training.steps=8")
    measured |= {8: figures["held_out/text"][8]}
    assert named_best(run) == best == max(measured, key=lambda step: measured[step])
    assert saved_steps(run) == [best, 8]

    tool = [str(REPOSITORY / "tools" / "convert_to_hf.py"), str(run), str(tmp_path / "out"), "--average"]
    code, output = run_program(tool)
    assert code == 0, output
    assert json.loads((tmp_path / "out" / "config.json").read_text())["scale_docked_vectors"]  # and proved
    assert "moving average over the steps" in (tmp_path / "out" / "README.md").read_text()
    exported = load_file(tmp_path / "out" / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    reader = CheckpointReader(run / "checkpoints" / "step_00000008")
    name = "gpt.decoder.layers.1.mlp.linear_fc2.weight"
    assert torch.equal(exported, reader.read("decoder", name, "average"))
    assert not torch.equal(exported, reader.read("decoder", name))
