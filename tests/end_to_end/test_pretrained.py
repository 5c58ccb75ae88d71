"""Runs with three encoders docked at once, two of transformers, on several layouts and after a resume."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

from distributed.ranks import run_command
from metalm.checkpoint.reader import CheckpointReader
from metalm.training.metrics import read_metrics
from reference.encoder_tokenizer import save_tokenizer
from reference.pretrained import save_pretrained, vision_model

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


@pytest.fixture(scope="module")
def pipeline(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run with a frozen RoBERTa for text, a ViT whose last layer is trained, and our own encoder."""
    folder = tmp_path_factory.mktemp("pretrained")
    save_pretrained("roberta", folder / "roberta")
    save_tokenizer(folder / "roberta")
    save_pretrained("vit", folder / "vit")
    data = yaml.safe_load((tiny_data / "tiny.yaml").read_text())["data"]["sources"]
    content = {
        "extends": str(tiny_data / "tiny.yaml"),
        "model": {
            "encoders": {
                "text": None,
                "roberta": {"pretrained": {"path": str(folder / "roberta")}, "trained_layers": "none"},
                "vit": {"pretrained": {"path": str(folder / "vit")}, "trained_layers": 1},
            }
        },
        "data": {
            "sources": {"text": {"encoder": "roberta"}, "more": {**data["scenes"], "encoder": "vit"}},
            "evaluation": {"text": {"encoder": "roberta"}, "more": {**data["scenes"], "encoder": "vit"}},
        },
        "training": {"steps": 6},
        "checkpoint": {"every_steps": 3, "keep_every_steps": 3},
    }
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def train(pipeline: Path, runs: Path, name: str, num_ranks: int = 1, *overrides: str) -> dict[int, float]:
    start = [sys.executable, "-m"]
    if num_ranks > 1:
        start += ["torch.distributed.run", "--nproc-per-node", str(num_ranks), "--rdzv-backend", "c10d"]
        start += ["--rdzv-endpoint", "127.0.0.1:0", "-m"]
    words = ["metalm", "train", str(pipeline), f"run.folder={runs}", f"run.name={name}", *overrides]
    code, output = run_command([*start, *words], timeout_s=240)
    assert code == 0, output
    return losses(runs / name)


def losses(run: Path) -> dict[int, float]:
    return {entry["step"]: entry["loss/all"] for entry in read_metrics(run) if "loss/all" in entry}


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(run / "checkpoints" / f"step_{step:08d}", verify=True)
    return {name: reader.read("encoders", name) for name in reader.parameters("encoders")}


@pytest.fixture(scope="module")
def alone(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps on one rank."""
    runs = tmp_path_factory.mktemp("runs")
    assert sorted(train(pipeline, runs, "alone")) == list(range(1, 7))
    return runs / "alone"


@pytest.mark.parametrize("tensor", [2, 1])
def test_two_ranks_give_the_same_losses(pipeline: Path, alone: Path, tmp_path: Path, tensor: int) -> None:
    """Under ZeRO 3 on a tensor-parallel group, under ZeRO 1 on data-parallel ranks."""
    stage = 3 if tensor == 2 else 1
    overrides = (
        f"parallel.tensor={tensor}",
        f"deepspeed.encoders=deepspeed_configs/encoders_zero{stage}.json",
    )
    assert train(pipeline, tmp_path, "two", 2, *overrides) == pytest.approx(losses(alone), abs=1e-5)


def test_frozen_weights_are_the_folders_and_the_last_layer_alone_has_moved(
    pipeline: Path, alone: Path
) -> None:
    found = weights(alone, 6)
    models = {name: save_pretrained(name, pipeline.parent / "again" / name) for name in ("roberta", "vit")}
    moved = set()
    for name, model in models.items():
        for parameter, value in vision_model(model).named_parameters():
            mine = found.get(f"encoders.{name}.model.{parameter}")
            if mine is None:
                assert parameter.startswith("pooler.")
            elif not torch.equal(mine, value.detach()):
                moved.add(f"{name}.{parameter}")
    last = [n for n, _ in models["vit"].named_parameters() if n.startswith(("layers.2.", "layernorm."))]
    # The bias of the keys shifts all scores of a query alike: its gradient is nothing.
    assert {f"vit.{n}" for n in last} - {"vit.layers.2.attention.k_proj.bias"} <= moved
    assert moved <= {f"vit.{n}" for n in last}


def test_a_run_goes_on_without_the_folders(pipeline: Path, alone: Path, tmp_path: Path) -> None:
    """From its own config: of the folders, the text encoder's tokenizer alone is still read."""
    run = tmp_path / "resumed"
    (run / "checkpoints").mkdir(parents=True)
    shutil.copytree(alone / "checkpoints" / "step_00000003", run / "checkpoints" / "step_00000003")
    resolved = yaml.safe_load((alone / "config.yaml").read_text())
    resolved.pop("provenance")
    folders = tmp_path / "elsewhere"
    save_tokenizer(folders / "roberta")
    for name in ("roberta", "vit"):
        resolved["model"]["encoders"][name]["pretrained"]["path"] = str(folders / name)
    (tmp_path / "resolved.yaml").write_text(yaml.safe_dump(resolved, sort_keys=False))
    found = train(tmp_path / "resolved.yaml", tmp_path, "resumed", 2, "parallel.tensor=2")
    assert found == pytest.approx({step: losses(alone)[step] for step in (4, 5, 6)}, abs=1e-5)
