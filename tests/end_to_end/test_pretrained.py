"""Runs with five encoders docked at once, of text, images and audio, four of them of transformers, on several
layouts and after a resume."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distributed.ranks import run_program
from metalm.checkpoint.reader import CheckpointReader
from metalm.run_metrics import read_metrics
from reference.encoder_tokenizer import save_tokenizer
from reference.pretrained import save_pretrained, vision_model

REPOSITORY = Path(__file__).parents[2]
PRETRAINED = ("roberta", "vit", "ast", "wav2vec2-masked")
ENCODERS = {"wav2vec2-masked": "ear"}
"""Names in the pipeline, where they are others."""


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


@pytest.fixture(scope="module")
def pipeline(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run with our own encoder of images, a frozen RoBERTa, an AST with LoRA beside it, a ViT whose
    last layer is trained, and a Wav2Vec2 that is trained as a whole."""
    folder = tmp_path_factory.mktemp("pretrained")
    for name in PRETRAINED:
        save_pretrained(name, folder / name)
    save_tokenizer(folder / "roberta")
    prepare_tones(folder)
    lora = {"rank": 2, "targets": ["q_proj", "v_proj"]}
    ear = {"path": str(folder / "wav2vec2-masked"), "clip_seconds": 0.05}
    shards = str(folder / "shards")
    heard = {
        name: {"path": shards, "readers": {"audio": encoder}}
        for name, encoder in (("mel", "ast"), ("tones", "ear"))
    }
    data = yaml.safe_load((tiny_data / "tiny.yaml").read_text())["data"]["sources"]
    content = {
        "extends": str(tiny_data / "tiny.yaml"),
        "model": {
            "encoders": {
                "text": None,
                "roberta": {"pretrained": {"path": str(folder / "roberta")}, "trained_layers": "none"},
                "vit": {"pretrained": {"path": str(folder / "vit")}, "trained_layers": 1},
                "ast": {"pretrained": {"path": str(folder / "ast")}, "adapter": lora},
                "ear": {"pretrained": ear, "connector": "feed_forward"},
            }
        },
        "data": {
            "sources": {
                "text": {"readers": {"text": "roberta"}},
                "more": {**data["scenes"], "readers": {"image": "vit"}},
                **heard,
            },
            "evaluation": {"text": {"readers": {"text": "roberta"}}, **heard},
        },
        "training": {"steps": 6},
        "monitor": {"evaluate_every_steps": 6, "sample_every_steps": 6},
        "checkpoint": {"every_steps": 3, "keep_every_steps": 3},
    }
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def prepare_tones(folder: Path) -> None:
    """Forty clips of several lengths and rates, prepared by the tool from a table."""
    (folder / "clips").mkdir()
    lines = ["path,caption"]
    for number in range(40):
        rate, seconds = (16_000, 44_100)[number % 2], (0.05, 0.02, 0.3)[number % 3]
        samples = 0.4 * np.sin(np.arange(round(rate * seconds)) * (100 + 40 * number) * 2 * np.pi / rate)
        soundfile.write(folder / "clips" / f"{number}.wav", samples, rate)
        lines.append(f"{number}.wav,a tone of {100 + 40 * number} hertz")
    table = folder / "tones.csv"
    table.write_text("\n".join(lines) + "\n")
    tool = ["tools/prepare_audio_text.py", str(table), "--audio-folder", str(folder / "clips")]
    code, output = run_program([*tool, "--resample", "16000", "--out", str(folder / "shards")], timeout_s=60)
    assert code == 0, output
    assert "40" in output


def train(pipeline: Path, runs: Path, name: str, num_ranks: int = 1, *overrides: str) -> dict[int, float]:
    words = ["-m", "metalm", "train", str(pipeline), f"run.folder={runs}", f"run.name={name}", *overrides]
    code, output = run_program(words, num_ranks, timeout_s=240)
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


def test_what_is_trained_has_moved_and_nothing_else(pipeline: Path, alone: Path) -> None:
    found = weights(alone, 6)
    models = {
        ENCODERS.get(name, name): save_pretrained(name, pipeline.parent / "again" / name)
        for name in PRETRAINED
    }
    moved = set()
    for name, model in models.items():
        for parameter, value in vision_model(model).named_parameters():
            mine = found.get(f"encoders.{name}.model.{parameter}")
            if mine is None:
                assert parameter.startswith(("pooler.", "masked_spec_embed"))
            elif not torch.equal(mine, value.detach()):
                moved.add(f"{name}.{parameter}")
    adapters = {n for n in found if n.startswith("encoders.ast.") and ".lora_" in n}
    assert len(adapters) == 2 * 2 * 3 and all(bool(found[name].any()) for name in adapters)
    last = [n for n, _ in models["vit"].named_parameters() if n.startswith(("layers.2.", "layernorm."))]
    # The bias of the keys shifts all scores of a query alike: its gradient is nothing.
    trained = {f"vit.{n}" for n in last}
    trained |= {f"ear.{n}" for n, _ in models["ear"].named_parameters() if n != "masked_spec_embed"}
    without_gradient = {n for n in trained if n.endswith("attention.k_proj.bias")}
    assert trained - without_gradient <= moved <= trained


def test_a_run_goes_on_without_the_folders(pipeline: Path, alone: Path, tmp_path: Path) -> None:
    """From its own config: of the folders, the text encoder's tokenizer alone is still read."""
    run = tmp_path / "resumed"
    (run / "checkpoints").mkdir(parents=True)
    shutil.copytree(alone / "checkpoints" / "step_00000003", run / "checkpoints" / "step_00000003")
    resolved = yaml.safe_load((alone / "config.yaml").read_text())
    resolved.pop("provenance")
    folders = tmp_path / "elsewhere"
    save_tokenizer(folders / "roberta")
    for name in PRETRAINED:
        encoder = ENCODERS.get(name, name)
        resolved["model"]["encoders"][encoder]["pretrained"]["path"] = str(folders / name)
    (tmp_path / "resolved.yaml").write_text(yaml.safe_dump(resolved, sort_keys=False))
    found = train(tmp_path / "resolved.yaml", tmp_path, "resumed", 2, "parallel.tensor=2")
    assert found == pytest.approx({step: losses(alone)[step] for step in (4, 5, 6)}, abs=1e-5)


def test_clips_are_evaluated_and_can_be_listened_to(alone: Path) -> None:
    *_, entry = [entry for entry in read_metrics(alone) if "held_out/tones" in entry]
    for name in ("tones", "mel"):
        assert 0 < entry[f"held_out/{name}"] != entry[f"held_out/{name}/wrong_audio"] > 0
    events = EventAccumulator(str(alone / "tensorboard"), size_guidance={"audio": 0}).Reload()
    # One is too short for mel frames: the next is shown in its place.
    assert events.Tags()["audio"] == ["mel/0", "mel/1", "tones/0", "tones/1"]
    *_, clip = events.Audio("tones/0")
    samples, rate = soundfile.read(io.BytesIO(clip.encoded_audio_string))
    assert (rate, len(samples)) == (16_000, 800)
